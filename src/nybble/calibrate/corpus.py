"""The text that comes with nybble for measuring activations and for calibrated quantization.

Five domains under `texts/`: prose, dialogue, code, mathematics, and 27 languages, together enough
for 128 windows of 512 tokens. Each file is listed in `texts/MANIFEST.json` with its licence and its
hash; a changed file is an error. None of it is in the text that models are judged on: `overlap`
says how much of a text the corpus contains, and `texts/README.md` what was compared.

Knows bytes, letters and messages, no token ids: how many tokens a piece has is the tokenizer's
business, so shares are shares of UTF-8 bytes, which all tokenizers follow roughly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

from nybble.errors import TextError
from nybble.text.chat import ChatTemplate

Message = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Share:
    """How much of the mixture a domain is, in percent of the bytes, and how long its pieces get."""

    domain: str
    percent: int
    piece_bytes: int


#: Of the mixture. Pieces of languages are short, so that 8k tokens already hold several of them;
#: conversations stay whole, whatever their length, since a template needs their turns in order.
SHARES = (
    Share("prose", 31, 1600),
    Share("dialogue", 22, 1600),
    Share("code", 20, 1600),
    Share("mathematics", 15, 1200),
    Share("languages", 12, 600),
)

#: Letters and digits of a shingle: about 13 English words, the length GPT-3's authors compared
#: (Brown et al. 2020, appendix C), but meaningful in scripts without spaces too.
SHINGLE = 50

#: A Karp-Rabin hash (1987) modulo a Mersenne prime: two different shingles meet with p < 1e-15.
HASHES = 2**61 - 1
_BASE = 1_000_003_103
_LEADING = pow(_BASE, SHINGLE, HASHES)

# Where a text may be cut, from best to worst.
_ENDS = ("\n\n", "\n", ". ", "。", "। ", "? ", "! ", " ")

# The golden ratio's multiples spread evenly over [0, 1), however many there are (Weyl).
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or a conversation: exactly one of `text` and `messages` is set.

    `messages` are as chat templates take them (role, content, reasoning_content, tool_calls),
    strictly alternating between user and assistant apart from tool calls and a first system
    message. `tools` are the JSON schemas offered in it. `licence` is an SPDX identifier.
    """

    domain: str
    name: str
    licence: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    tools: tuple[Message, ...] | None = None

    @property
    def size_bytes(self) -> int:
        """UTF-8 bytes of what it says, without the marks of any template."""
        return len(render(self, None).encode())


def domains() -> tuple[str, ...]:
    """The names of the domains, in the order of SHARES."""
    return tuple(share.domain for share in SHARES)


def documents(domain: str, root: Traversable | None = None) -> list[Document]:
    """All documents of a domain, in a fixed order. `root` is a folder with a MANIFEST.json of its
    own, instead of the texts of the package.

    Raises TextError for an unknown domain, and for a file that is missing or has changed.
    """
    if domain not in domains():
        raise TextError(f"no domain {domain!r} of calibration text; one of {', '.join(domains())}")
    root = _package_texts() if root is None else root
    found: list[Document] = []
    for entry in _manifest(root):
        if entry["domain"] == domain:
            found += _parse(entry, _verified(root, entry))
    return found


def files() -> list[dict[str, str]]:
    """The entries of the corpus's own manifest: path, domain, licence, bytes, sha256."""
    return _manifest(_package_texts())


def mixture() -> Iterator[Document]:
    """The whole corpus as pieces, the same on every machine: every prefix holds all domains.

    The next piece always comes from the domain that is furthest below its share, so after any
    number of pieces no domain is further from SHARES than a piece of each domain. Inside a domain
    the pieces of every document are spread evenly from beginning to end. Ends when a domain is used
    up, for then the shares would no longer hold: after about 310 kB.
    """
    waiting = {share.domain: iter(_spread(share)) for share in SHARES}
    used = dict.fromkeys(waiting, 0)
    while True:
        share = min(SHARES, key=lambda s: used[s.domain] / s.percent)
        piece = next(waiting[share.domain], None)
        if piece is None:
            return
        used[share.domain] += piece.size_bytes
        yield piece


def render(document: Document, template: ChatTemplate | None) -> str:
    """The text of a document; a conversation's by the model's template, if there is one.

    Some templates know no tools, or no system message. A conversation that needs either and is
    refused is written plainly, as all are without a template: it is the words that count here.
    Raises TextError if a template refuses a conversation of user and assistant alone.
    """
    if document.text is not None:
        return document.text
    assert document.messages is not None
    if template is not None:
        try:
            return template.render(
                document.messages, tools=document.tools, add_generation_prompt=False
            )
        except TextError:
            if {m["role"] for m in document.messages} <= {"user", "assistant"}:
                raise
    tools = "" if document.tools is None else f"Tools: {_json(document.tools)}\n\n"
    return tools + "".join(f"{_plain(message)}\n\n" for message in document.messages)


def shingles(text: str) -> frozenset[int]:
    """The hashes of all runs of SHINGLE letters and digits in a text; case, spaces and punctuation
    do not count. Empty for a shorter text. The same in every process and on every machine."""
    return frozenset(shingle_hashes(text))


def overlap(text: str) -> float:
    """The share of a text's shingles that the corpus contains too, from 0 to 1.

    More than 0 means that models calibrated on the corpus must not be judged on this text. A text
    of fewer than SHINGLE letters and digits has no shingles, and 0.
    """
    known = _corpus_shingles()
    found = [value in known for value in shingle_hashes(text)]
    return sum(found) / len(found) if found else 0.0


# ------------------------------------------------------------------------------------------- files


def _package_texts() -> Traversable:
    return resources.files("nybble.calibrate") / "texts"


def _manifest(root: Traversable) -> list[dict[str, str]]:
    try:
        data = json.loads((root / "MANIFEST.json").read_bytes())
        return [{str(k): str(v) for k, v in entry.items()} for entry in data["files"]]
    except (OSError, ValueError, KeyError) as error:
        raise TextError(
            f"{root / 'MANIFEST.json'}: cannot be read: {error}; reinstall nybble"
        ) from error


def _verified(root: Traversable, entry: Mapping[str, str]) -> str:
    path = root.joinpath(*entry["path"].split("/"))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error}; reinstall nybble") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry["sha256"]:
        raise TextError(
            f"{path}: calibration text has changed: expected sha256 {entry['sha256']}, found "
            f"{digest}; reinstall nybble, or give a text of your own"
        )
    return data.decode()


def _parse(entry: Mapping[str, str], content: str) -> list[Document]:
    """One document of a .txt, one of each line of a .jsonl."""
    domain, licence = entry["domain"], entry["licence"]
    stem = entry["path"].rpartition("/")[2].rpartition(".")[0]
    if not entry["path"].endswith(".jsonl"):
        return [Document(domain, stem, licence, text=content)]
    found = []
    for line in content.removesuffix("\n").split("\n"):  # splitlines() knows other ends too
        row = json.loads(line)
        name = f"{stem}/{row['name']}"
        if "text" in row:
            found.append(Document(domain, name, licence, text=row["text"]))
        else:
            tools = tuple(row["tools"]) if "tools" in row else None
            messages = tuple(row["messages"])
            found.append(Document(domain, name, licence, messages=messages, tools=tools))
    return found


# ---------------------------------------------------------------------------------------- mixture


def _spread(share: Share) -> list[Document]:
    """The pieces of a domain, each document's at even distances from beginning to end.

    Piece k of n lies at (k + u) / n, where u in [0, 1) is the document's own: without it the short
    documents would all lie in the middle.
    """
    placed = []
    for number, document in enumerate(documents(share.domain)):
        pieces = _pieces(document, share.piece_bytes)
        offset = (number + 1) * _GOLDEN % 1.0
        placed += [((k + offset) / len(pieces), number, k, p) for k, p in enumerate(pieces)]
    return [piece for *_, piece in sorted(placed, key=lambda row: row[:3])]


def _pieces(document: Document, limit_bytes: int) -> list[Document]:
    if document.text is None:
        return [document]
    texts = _cut(document.text, limit_bytes)
    return [
        replace(document, text=text, name=f"{document.name}#{k}") for k, text in enumerate(texts)
    ]


def _cut(text: str, limit_bytes: int) -> list[str]:
    """Texts of at most `limit_bytes` that joined give the text, cut where a paragraph, a line, a
    sentence or a word ends, whichever comes first in this list and leaves half a piece or more."""
    cut = []
    while len(text.encode()) > limit_bytes:
        head = text.encode()[:limit_bytes].decode(errors="ignore")
        ends = (head.rfind(end) + len(end) for end in _ENDS if end in head)
        at = next((end for end in ends if end > len(head) // 2), len(head))
        cut.append(text[:at])
        text = text[at:]
    return [*cut, text]


# ----------------------------------------------------------------------------------- plain and hash


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _plain(message: Message) -> str:
    said = _said(message)
    calls = message.get("tool_calls")
    if isinstance(calls, Sequence):
        said += [_json(call["function"]) for call in calls]
    return f"{str(message['role']).capitalize()}: " + "\n".join(said)


def _said(message: Message) -> list[str]:
    parts = (message.get("reasoning_content"), message.get("content"))
    return [part for part in parts if isinstance(part, str) and part]


def shingle_hashes(text: str) -> Iterator[int]:
    """The hashes of a text's shingles one after the other, below HASHES, repeated ones too."""
    letters = [ord(c) for c in text.casefold() if c.isalnum()]
    value = 0
    for letter in letters[:SHINGLE]:
        value = (value * _BASE + letter) % HASHES
    if len(letters) >= SHINGLE:
        yield value
    for leaving, entering in zip(letters, letters[SHINGLE:], strict=False):
        value = (value * _BASE + entering - leaving * _LEADING) % HASHES
        yield value


@cache
def _corpus_shingles() -> frozenset[int]:
    found: set[int] = set()
    for domain in domains():
        for document in documents(domain):
            if document.text is not None:
                found.update(shingle_hashes(document.text))
            for message in document.messages or ():
                for part in _said(message):
                    found.update(shingle_hashes(part))
    return frozenset(found)
