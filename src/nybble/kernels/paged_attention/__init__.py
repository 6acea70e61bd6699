"""Causal softmax attention over a pool of pages, and the writing of keys and values into it.

Knows positions, pages and heads; refuses to know rotary embeddings, norms, gates and whose the
sequences are. A *page* holds `page_tokens` consecutive positions of one sequence for all key/value
heads of one layer; a table says which page of the pool holds which positions. A batch is ragged:
the new tokens of B sequences lie one after another, `starts` int32 [B + 1] says where each begins
(starts[0] = 0, starts[B] = T), and `lengths` int32 [B] how many tokens each had before.

`reference.py` is the definition, `cpu.py` calls the C kernels, or records the calls: then shapes
are checked, and the numbers in `starts`, `lengths` and `table` are for who replays to check.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from nybble.errors import EngineError
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute
from nybble.kernels.tensors import check_rows, check_tensor

FP8 = torch.float8_e4m3fn
PAGE_DTYPES = (torch.bfloat16, torch.float32, FP8)


@dataclass(frozen=True, slots=True)
class Pages:
    """One layer's part of the page pool: keys and values, both contiguous
    [pages, kv heads, page tokens, D] of one dtype, bfloat16, float32 or float8_e4m3fn.

    FP8 pages hold number / scale, rounded to nearest even and at most 448 in magnitude; `clipped`,
    int64 [1], counts the numbers that were more.
    """

    keys: Tensor
    values: Tensor
    key_scale: float = 1.0
    value_scale: float = 1.0
    clipped: Tensor | None = None


def write(
    k: Tensor,
    v: Tensor,
    pages: Pages,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    compute: Compute,
) -> None:
    """Append keys and values to the pages of their sequences, in place.

    k and v are float32 [T, Hkv, D]; heads may lie apart, as parts of wider rows. Token i of
    sequence b goes to position lengths[b] + i, that is to offset position % page_tokens of page
    table[b, position // page_tokens]; BF16 and FP8 pages round to nearest even, and NaN stays NaN.
    `table` is int32 [B, P], -1 where a sequence has no page. Raises EngineError for wrong shapes,
    and for a position without a page, before anything is written.
    """
    _check_pages(pages)
    heads, head_dim = pages.keys.shape[1], pages.keys.shape[3]
    check_rows(k, "paged attention", "k", (k.shape[0], heads, head_dim))
    check_rows(v, "paged attention", "v", (k.shape[0], heads, head_dim))
    _check_shapes(table, starts, lengths)
    if compute.program is None:
        _check_batch(k.shape[0], pages, table, starts, lengths, None)
    _backend().write(k, v, pages, table, starts, lengths, compute)


def attention(
    q: Tensor,
    pages: Pages,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int = 0,
    first: int = 0,
    compute: Compute,
) -> Tensor:
    """softmax(q k^T * scale) v over the positions each query may see, float32 [T, Hq, D].

    `q` is float32 [T, Hq, D]; heads may lie apart, as parts of wider rows. The keys and values of
    the new tokens must be in the pages already (see `write`). Token i of sequence b sees positions
    0 .. lengths[b] + i, of which only the last `window`, itself included, if window > 0; pages
    wholly before every window may be missing. A position before `first` is seen by its own query
    alone. Query head h reads key/value head h // (Hq / Hkv).
    The arithmetic is float32 whatever the pages hold. The C back end gives a query the same bits
    however its prompt was cut into chunks, whatever else is in the batch, and for any page size and
    number of threads.

    Source: Vaswani et al. 2017 (3.2.1), grouped as in Ainslie et al. 2023; softmax block by block
    as in Dao et al. 2022 (FlashAttention, algorithm 1). Raises EngineError for wrong shapes and for
    a visible position without a page, DoesNotFit where there is no memory for the scratch.
    """
    _check_pages(pages)
    heads, head_dim = pages.keys.shape[1], pages.keys.shape[3]
    if q.ndim != 3 or q.shape[2] != head_dim or not q.shape[1] or q.shape[1] % heads:
        raise EngineError(
            f"attention: q must be [T, a multiple of {heads} heads, {head_dim}], "
            f"found {list(q.shape)}"
        )
    check_rows(q, "paged attention", "q", tuple(q.shape))
    if not 0 < scale < math.inf:
        raise EngineError(f"attention: scale must be positive, found {scale}")
    if window < 0:
        raise EngineError(f"attention: window must be 0 (everything) or more, found {window}")
    if first < 0:
        raise EngineError(f"attention: first must be 0 (everything) or more, found {first}")
    _check_shapes(table, starts, lengths)
    if compute.program is None:
        _check_batch(q.shape[0], pages, table, starts, lengths, (window, first))
    return _backend().attention(  # type: ignore[no-any-return]
        q, pages, table, starts, lengths, scale, window, first, compute
    )


def seen_from(at: int, window: int, first: int) -> int:
    """The first position that a query at position `at` sees."""
    return max(at - window + 1 if window else 0, min(first, at))


def _backend() -> ModuleType:
    return _load(dispatch.choose().backend)


@lru_cache(maxsize=2)
def _load(backend: str) -> ModuleType:
    if backend == "cpu":
        from nybble.kernels.paged_attention import cpu

        return cpu
    from nybble.kernels.paged_attention import reference

    return reference


def _check_pages(pages: Pages) -> None:
    keys = pages.keys
    if keys.ndim != 4 or keys.dtype not in PAGE_DTYPES or 0 in keys.shape[1:]:
        raise EngineError(
            "paged attention: pages must be bfloat16, float32 or float8_e4m3fn "
            f"[pages, kv heads, page tokens, D], found {keys.dtype} {list(keys.shape)}"
        )
    check_tensor(keys, "paged attention", "pages.keys", tuple(keys.shape), keys.dtype)
    check_tensor(pages.values, "paged attention", "pages.values", tuple(keys.shape), keys.dtype)
    for name, scale in (("key_scale", pages.key_scale), ("value_scale", pages.value_scale)):
        if not 0 < scale < math.inf:
            raise EngineError(f"paged attention: {name} must be positive and finite, found {scale}")
        if scale != 1 and keys.dtype != FP8:
            raise EngineError(
                f"paged attention: {name} is {scale}, but {keys.dtype} pages have no scale"
            )
    if pages.clipped is not None:
        check_tensor(pages.clipped, "paged attention", "pages.clipped", (1,), torch.int64)


def _check_shapes(table: Tensor, starts: Tensor, lengths: Tensor) -> None:
    count = lengths.shape[0] if lengths.ndim == 1 else -1
    check_tensor(lengths, "paged attention", "lengths", (count,), torch.int32)
    check_tensor(starts, "paged attention", "starts", (count + 1,), torch.int32)
    width = table.shape[1] if table.ndim == 2 else -1
    check_tensor(table, "paged attention", "table", (count, width), torch.int32)


def _check_batch(
    tokens: int,
    pages: Pages,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    seen: tuple[int, int] | None,
) -> None:
    """The kernels trust these numbers: a wrong one would be an address outside the pool.

    seen: window and first; pages are needed for what some new token sees. None: only for the new
    positions.
    """
    begins, before, numbers = starts.tolist(), lengths.tolist(), table.tolist()
    if begins[0] != 0 or begins[-1] != tokens or begins != sorted(begins):
        raise EngineError(
            f"paged attention: starts must rise from 0 to the {tokens} tokens, found {begins}"
        )
    pool, page_tokens = pages.keys.shape[0], pages.keys.shape[2]
    for b, row in enumerate(numbers):
        end = before[b] + begins[b + 1] - begins[b]
        if before[b] < 0:
            raise EngineError(f"paged attention: sequence {b} has length {before[b]}")
        if end == before[b]:
            continue
        first = before[b] if seen is None else seen_from(before[b], *seen)
        needed = row[first // page_tokens : (end - 1) // page_tokens + 1]
        wanted = (end - 1) // page_tokens + 1 - first // page_tokens
        if len(needed) < wanted or min(needed) < 0 or max(needed) >= pool:
            raise EngineError(
                f"paged attention: sequence {b} needs pages of {page_tokens} tokens for positions "
                f"{first} to {end - 1}, but its row of the table has {_shortened(needed)} for them "
                f"(expected {wanted} numbers from 0 to {pool - 1}); take pages first"
            )


def _shortened(numbers: list[int]) -> str:
    if len(numbers) <= 16:
        return str(numbers)
    return f"{str(numbers[:8])[:-1]}, ... {len(numbers)} numbers, {numbers[-1]}]"
