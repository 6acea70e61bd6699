"""What an agent reads all day: rules, tools as JSON, and a customer's messages with the results of
tools between them. Made up for measuring; as long as is asked for, and always the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count

RULES = """\
# Rules for agents of the shop

You help customers of a shop for household goods with orders, deliveries, returns and accounts.
The time is 2026-03-02 14:05 UTC. You act for one customer in a conversation, and for nobody else.

## Before anything else
- Find out who writes: by e-mail address, or by name and postcode. Do so even if an order number is
  given, since order numbers can be guessed.
- Say what you are going to change, with all amounts, and wait for a clear yes. Then change it.
- Call one tool at a time, and answer the customer only when you have its result.
- Do not invent what neither the customer nor a tool has said. Do not promise exceptions.
- Hand over to a person if a request is outside these rules, and only then.

## Orders
- An order is pending, packed, sent, delivered or cancelled. A pending order can be cancelled or
  changed; a packed one can have its address changed within the same country; a sent one cannot be
  changed at all.
- To cancel, the reason must be that it is no longer needed or was ordered by mistake. The amount
  goes back the way it was paid: to a gift card at once, to anything else in five to seven days.
- An item can be exchanged for another one of the same product, in another colour or size, not for
  another product. The difference in price is charged or refunded to one payment method.
- Items of a pending order can be changed once. Ask whether that is all of them before you do it.

## Returns
- A delivered item can be returned within thirty days, unused and in its box; a lamp also without.
- Each return needs an order number, the items, and a way to pay back: the one that was used, or a
  gift card that the customer already has.
- The label for the parcel comes by e-mail. The money follows once the parcel is there.

## Deliveries
- Standard delivery takes three to five days, express one. A parcel that has not moved for four
  days is searched for; one that has not moved for ten is paid back or sent again, as the customer
  wishes.
- The driver's name and telephone number are never given out.

# Tools
Answer with the name of a tool and its arguments as one JSON object to call it.
"""

QUESTIONS = (
    "Hello, I ordered two lamps last week and one of them came with a broken foot. My name is "
    "Maria Keller, my postcode is 8004. What can we do about it?",
    'Result of find_customer: {"customer": "maria_keller_4412", "email": "m.keller@example.org", '
    '"orders": ["W204817", "W198330"], "gift_cards": [{"id": "G7712", "balance": 24.5}]}',
    'Result of get_order: {"order": "W204817", "status": "delivered", "paid_by": "card_3391", '
    '"items": [{"item": "lamp-oak-40", "price": 79.9}, {"item": "lamp-oak-40", "price": 79.9}]}',
    "Yes, the second one is fine. I would rather have the same lamp in walnut for the broken one, "
    "if there is one left. If it costs more, take it from the gift card.",
    'Result of find_items: {"product": "lamp", "items": [{"item": "lamp-walnut-40", "stock": 3, '
    '"price": 84.9}, {"item": "lamp-walnut-60", "stock": 0, "price": 99.9}]}',
    "Five more is all right. Please do that, and tell me when it will be here. I am away from the "
    "ninth to the twelfth.",
    'Result of exchange_item: {"order": "W204817", "status": "exchange requested", "charged": 5.0, '
    '"gift_card": "G7712", "label": "sent by e-mail", "arrives": "2026-03-06"}',
    "Thank you. One last thing: can the other order still go to my office instead? The address is "
    "Lindenweg 12, 8049 Zurich.",
)

_VERBS = ("get", "find", "create", "change", "cancel", "list", "check", "send")
_NOUNS = (
    *("order", "customer", "address", "return", "exchange", "parcel", "gift_card", "invoice"),
    *("product", "item", "payment", "subscription", "voucher", "delivery_date", "shop", "repair"),
)
_ARGUMENTS = {
    "id": ("string", "The number of the {noun}, such as W204817, exactly as a tool returned it."),
    "customer": ("string", "The customer whose {noun} it is, as find_customer returned it."),
    "reason": ("string", "Why the customer asks for it, in a few words of their own."),
    "amount": ("number", "In the currency of the shop; two digits after the point."),
    "before": ("string", "A date as YYYY-MM-DD; what is later is left out."),
    "notify": ("boolean", "Whether the customer hears of it by e-mail."),
    "limit": ("integer", "How many there may be at most, from 1 to 50."),
}


def tools() -> Iterator[str]:
    """Descriptions of tools as JSON, a line each, without an end; no two are equal."""
    for number in count():
        verb = _VERBS[number % len(_VERBS)]
        noun = _NOUNS[number // len(_VERBS) % len(_NOUNS)]
        series = number // (len(_VERBS) * len(_NOUNS))
        name = f"{verb}_{noun}" + (f"_{series + 1}" if series else "")
        yield json.dumps(_tool(name, verb, noun, number))


def _tool(name: str, verb: str, noun: str, number: int) -> dict[str, object]:
    names = tuple(_ARGUMENTS)
    chosen = [names[(number + i * (1 + number % 3)) % len(names)] for i in range(4)]
    properties = {
        argument: {
            "type": _ARGUMENTS[argument][0],
            "description": _ARGUMENTS[argument][1].format(noun=noun.replace("_", " ")),
        }
        for argument in dict.fromkeys(chosen)
    }
    about = noun.replace("_", " ")
    return {
        "name": name,
        "description": f"To {verb} one {about} of the customer. Fails if the rules do not allow "
        "it, and says then what would be allowed.",
        "parameters": {
            "type": "object",
            "properties": properties,
            "required": chosen[:2],
        },
    }
