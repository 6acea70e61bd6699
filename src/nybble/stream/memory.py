"""How much memory a streamed forward takes, said before it starts.

Private memory is counted: hidden states, one layer's cache, and what a layer computes with. Mapped
weights are the file's pages; the system takes them back at will, and each layer's are let go when
it is done.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from nybble.errors import DoesNotFit
from nybble.models.network import Network

#: Tokens that go through a layer together, at most; fewer where windows are few.
BATCH_TOKENS = 2048
_FLOAT = 4


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """What a streamed forward will hold, in bytes of private memory.

    `batches` are the windows, by number, that go through a layer together. `hidden_bytes` are
    the hidden states of all windows, on disk where `spills`; `cache_bytes` one layer's cache and
    the rotary tables of all tokens.
    """

    batches: tuple[tuple[int, ...], ...]
    tokens: int
    hidden_bytes: int
    cache_bytes: int
    workspace_bytes: int
    spills: bool

    @property
    def private_bytes(self) -> int:
        """The peak beyond what the program itself takes."""
        held = 0 if self.spills else self.hidden_bytes
        return held + self.cache_bytes + self.workspace_bytes

    @property
    def disk_bytes(self) -> int:
        """Of the spill: the hidden states before and after a layer."""
        return 2 * self.hidden_bytes if self.spills else 0


def plan_stream(
    network: Network,
    lengths: Sequence[int],
    *,
    batch_tokens: int = BATCH_TOKENS,
    spills: bool = False,
    limit_bytes: int | None = None,
    breaks: Collection[int] = (),
) -> StreamPlan:
    """The plan for windows of these lengths; those numbered in `breaks` begin a batch. Where
    `limit_bytes` is given, batches become smaller until it is kept. Raises DoesNotFit, with what
    would, if one window alone is too much."""
    while True:
        plan = _plan(network, lengths, batch_tokens, spills, breaks)
        if limit_bytes is None or plan.private_bytes <= limit_bytes:
            return plan
        if batch_tokens <= max(lengths):
            hint = "" if spills else "; spill the hidden states to disk (--spill FOLDER)"
            raise DoesNotFit(
                f"a streamed forward over {plan.tokens:,} tokens needs "
                f"{plan.private_bytes / 2**30:.2f} GiB, and the limit is "
                f"{limit_bytes / 2**30:.2f} GiB{hint}, or use shorter windows or fewer"
            )
        batch_tokens //= 2


def _plan(
    network: Network,
    lengths: Sequence[int],
    batch_tokens: int,
    spills: bool,
    breaks: Collection[int],
) -> StreamPlan:
    batches: list[list[int]] = []
    filled = batch_tokens + 1
    for i, length in enumerate(lengths):
        if (filled + length > batch_tokens and filled) or i in breaks:
            batches.append([])
            filled = 0
        batches[-1].append(i)
        filled += length
    largest = max((sum(lengths[i] for i in b) for b in batches), default=0)
    widest = max((len(b) for b in batches), default=0)
    d = network.dims
    hidden = sum(lengths) * d.hidden * _FLOAT
    rotary = sum(lengths) * 2 * len(network.rope.inverse) * _FLOAT
    pages = widest * max(lengths, default=0) * 2 * d.kv_heads * d.head_dim * _FLOAT
    states = widest * d.linear_value_heads * d.linear_key_dim * d.linear_value_dim * _FLOAT
    return StreamPlan(
        tuple(map(tuple, batches)),
        sum(lengths),
        hidden,
        pages + states + rotary,
        largest * _widths(network) * _FLOAT,
        spills,
    )


def _widths(network: Network) -> int:
    """Floats a token needs at the widest place of a layer, inputs, outputs and copies together."""
    d = network.dims
    gated = 2 if d.attention_gate else 1
    attention = 3 * d.heads * d.head_dim * gated + 4 * d.kv_heads * d.head_dim
    value = d.linear_value_heads * d.linear_value_dim
    delta = 3 * (2 * d.linear_key_heads * d.linear_key_dim + value) + 5 * value
    dense = 4 * d.intermediate
    routed = d.experts_per_token * (3 * d.hidden + 4 * d.expert_width) + 4 * d.shared_width
    return 5 * d.hidden + max(attention, delta, dense, routed + d.experts)
