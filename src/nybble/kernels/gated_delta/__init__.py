"""The mixer of a gated DeltaNet layer: causal convolution, decay, and the gated delta rule.

Per value head, with a state S [Dk, Dv], a decay g <= 0 and a write strength beta in (0, 1):

    S <- exp(g) S;   e = v - S^T k;   S <- S + k (beta e)^T;   o = S^T q

Sources: Gated Delta Networks (arXiv 2412.06464); the chunked form, Yang et al., arXiv 2406.06484.
A batch is ragged: the new tokens of B sequences lie one after another, `starts` int32 [B + 1] says
where each begins (starts[0] = 0, starts[B] = T), and `lengths` int32 [B] how many tokens each had
before. `slots` int32 [B] says which row of the state pools each reads, and `writes` int32 [T] to
which row the state after a token goes, -1 for none; the last token of each sequence has one. What a
sequence writes no other one reads or writes; what nobody writes, several may read. A sequence of
length 0 starts from zeros and reads nothing. Inputs that are slices of a matmul's output may have
rows that lie apart.

While a program records (`compute.program`), the values in these tensors are not looked at: whoever
replays answers for them.

Knows nothing of projections, norms, gates, or of who owns a slot. `reference.py` is the definition,
`cpu.py` calls the C kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from nybble.errors import EngineError
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute
from nybble.kernels.tensors import check_rows, check_tensor

#: Taps of a convolution: what the C kernels keep at hand.
MOST_TAPS = 16
#: Tokens per chunk of the chunked form. Chunks lie at absolute positions, multiples of this.
CHUNK = 64


@dataclass(frozen=True, slots=True)
class Heads:
    """How the channels of a mixed row divide: query heads, key heads, value heads."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    @property
    def channels(self) -> int:
        """The width of a mixed row."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


def causal_conv(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    starts: Tensor,
    lengths: Tensor,
    slots: Tensor,
    writes: Tensor,
    compute: Compute,
) -> Tensor:
    """silu of the depthwise causal convolution of each sequence: x [T, C] -> [T, C].

    weight [C, K], K at most 16, tap K - 1 on the current token; a row of state [slots, K - 1, C] is
    the last K - 1 inputs up to a token, oldest first. All float32; all but the rows of x
    contiguous. Taps are added from the oldest to the newest.
    Raises EngineError for other shapes or dtypes, and for slots that are out of range or written
    and not a sequence's own, before anything is written.
    """
    channels, taps = weight.shape if weight.ndim == 2 else (-1, -1)
    count = len(state) if state.ndim == 3 else -1
    check_rows(x, "gated delta", "x", (len(x), channels))
    check_tensor(weight, "gated delta", "weight", (channels, min(max(taps, 1), MOST_TAPS)))
    check_tensor(state, "gated delta", "state", (count, taps - 1, channels))
    _check_batch(len(x), count, starts, lengths, slots, writes, compute)
    place = (starts, lengths, slots, writes)
    return _backend().causal_conv(x, weight, state, *place, compute)  # type: ignore[no-any-return]


def decay(
    a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor, compute: Compute
) -> tuple[Tensor, Tensor]:
    """(g, beta), float32 [T, Hv] each: -exp(a_log) * softplus(a + dt_bias), and sigmoid(b).

    a and b are [T, Hv], whose rows may lie apart, a_log and dt_bias [Hv], contiguous, all float32;
    softplus is linear above 20. Raises EngineError for other shapes or dtypes.
    """
    heads = len(a_log) if a_log.ndim == 1 else -1
    check_rows(a, "gated delta", "a", (len(a), heads))
    check_rows(b, "gated delta", "b", (len(a), heads))
    check_tensor(a_log, "gated delta", "a_log", (heads,))
    check_tensor(dt_bias, "gated delta", "dt_bias", (heads,))
    return _backend().decay(a, b, a_log, dt_bias, compute)  # type: ignore[no-any-return]


def gated_delta(
    mixed: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    starts: Tensor,
    lengths: Tensor,
    slots: Tensor,
    writes: Tensor,
    *,
    key_heads: int,
    value_heads: int,
    key_dim: int,
    value_dim: int,
    recurrent: Tensor,
    compute: Compute,
) -> Tensor:
    """The gated delta rule over each sequence: float32 [T, Hv, Dv].

    mixed [T, 2 Hk Dk + Hv Dv] holds the queries, the keys, then the values of each token; q and k
    are divided by sqrt(sum of squares + 1e-6) here, and q by sqrt(Dk). g and beta are [T, Hv];
    state is [slots, Hv, Dk, Dv]. Value head h reads key head h // (Hv / Hk). All float32 and
    contiguous, and so is the arithmetic, whatever `compute` says of matmuls.

    `recurrent` int32 [B] says how each sequence is run. 1: token by token, the same bits however
    the tokens are divided over calls. 0: in chunks of 64 at absolute positions, the same bits if a
    prompt is cut at multiples of 64; then writes are at such, or at the last token. What is written
    changes no bits.
    Raises EngineError for other shapes or dtypes, and for slots that are out of range or written
    and not a sequence's own, before anything is written.
    """
    heads = Heads(key_heads, value_heads, key_dim, value_dim)
    if min(key_heads, value_heads, key_dim, value_dim) < 1 or value_heads % key_heads:
        raise EngineError(
            f"gated delta: {value_heads} value heads of {value_dim} do not divide among "
            f"{key_heads} key heads of {key_dim}"
        )
    count = len(state) if state.ndim == 4 else -1
    check_tensor(mixed, "gated delta", "mixed", (len(mixed), heads.channels))
    check_tensor(g, "gated delta", "g", (len(mixed), value_heads))
    check_tensor(beta, "gated delta", "beta", (len(mixed), value_heads))
    check_tensor(state, "gated delta", "state", (count, value_heads, key_dim, value_dim))
    check_tensor(recurrent, "gated delta", "recurrent", tuple(lengths.shape), torch.int32)
    _check_batch(len(mixed), count, starts, lengths, slots, writes, compute)
    if compute.program is None:
        _check_chunks(starts, lengths, writes, recurrent)
    return _backend().gated_delta(  # type: ignore[no-any-return]
        mixed, g, beta, state, starts, lengths, slots, writes, recurrent, heads, compute
    )


def _backend() -> ModuleType:
    return _load(dispatch.choose().backend)


@lru_cache(maxsize=2)  # an import statement costs more than some of these kernels
def _load(backend: str) -> ModuleType:
    if backend == "cpu":
        from nybble.kernels.gated_delta import cpu

        return cpu
    from nybble.kernels.gated_delta import reference

    return reference


def _check_batch(
    tokens: int,
    pool: int,
    starts: Tensor,
    lengths: Tensor,
    slots: Tensor,
    writes: Tensor,
    compute: Compute,
) -> None:
    """Every number that addresses memory is read here, or by who replays: kernels trust them."""
    count = len(lengths) if lengths.ndim == 1 else -1
    check_tensor(lengths, "gated delta", "lengths", (count,), torch.int32)
    check_tensor(starts, "gated delta", "starts", (count + 1,), torch.int32)
    check_tensor(slots, "gated delta", "slots", (count,), torch.int32)
    check_tensor(writes, "gated delta", "writes", (tokens,), torch.int32)
    if compute.program is not None:
        return
    begins, before, numbers = starts.tolist(), lengths.tolist(), slots.tolist()
    if begins[0] != 0 or begins[-1] != tokens or begins != sorted(begins):
        raise EngineError(
            f"gated delta: starts must rise from 0 to the {tokens} tokens, found {begins}"
        )
    if count and min(before) < 0:
        raise EngineError(f"gated delta: lengths must not be negative, found {before}")
    if count and not 0 <= min(numbers) <= max(numbers) < pool:
        raise EngineError(f"gated delta: slots must be from 0 to {pool - 1}, found {numbers}")
    _check_writes(begins, before, numbers, writes.tolist(), pool)


def _check_writes(
    begins: list[int], before: list[int], slots: list[int], writes: list[int], pool: int
) -> None:
    """Each slot is written once, and read by nobody but its writer."""
    owners: dict[int, int] = {}
    for b, (begin, end) in enumerate(pairwise(begins)):
        if begin < end and writes[end - 1] < 0:
            raise EngineError(f"gated delta: the last state of sequence {b} is written nowhere")
        for slot in (w for w in writes[begin:end] if w != -1):
            if not 0 <= slot < pool or slot in owners:
                raise EngineError(
                    f"gated delta: sequence {b} writes slot {slot}; slots are from 0 to {pool - 1} "
                    "and written once"
                )
            owners[slot] = b
    for b, (begin, end) in enumerate(pairwise(begins)):
        if begin < end and before[b] and owners.get(slots[b], b) != b:
            raise EngineError(
                f"gated delta: sequence {b} reads slot {slots[b]}, which sequence "
                f"{owners[slots[b]]} writes"
            )


def _check_chunks(starts: Tensor, lengths: Tensor, writes: Tensor, recurrent: Tensor) -> None:
    """Within a chunk there is no state to write."""
    begins, before, written = starts.tolist(), lengths.tolist(), writes.tolist()
    for b, is_recurrent in enumerate(recurrent.tolist()):
        begin, last = begins[b], begins[b + 1] - 1
        ends = [before[b] + t + 1 - begin for t in range(begin, last) if written[t] >= 0]
        if not is_recurrent and any(end % CHUNK for end in ends):
            raise EngineError(
                f"gated delta: sequence {b} runs in chunks and writes states after {ends} tokens, "
                f"expected multiples of {CHUNK} before the last"
            )
