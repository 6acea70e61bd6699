"""GPTQ-X: the codes and block scales of one group of linears, chosen by what its inputs need.

Methods, from what needs no data to what needs most:

    mse      the block scale with the least squared error of the weight, codes to the nearest
    local    scale and codes of a block together, in the metric of its own 16 x 16 Hessian
    gptq-x   columns in the order of their importance; what rounding misses is made up for by the
             columns that follow; each block's scale is chosen when its turn comes, by the loss that
             the feedback leaves; the damping of the Hessian by held-out loss

A guard decides: on tokens that nothing was fitted to, `local` must beat `mse` to be taken, and
`gptq-x` must beat both. Tensor scales are given, so all methods have the same bytes.

Source: docs/calibration.md; GPTQ (Frantar et al. 2022), LDLQ (Chee et al. 2023), group-aware
reordering (GPTQModel), local Hessians (NVIDIA ModelOpt).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nybble.calibrate.hessian import (
    BLOCK,
    Factors,
    NotPositiveDefinite,
    blocks_of,
    column_order,
    damped,
    factorize_ordered,
)
from nybble.calibrate.statistics import PLAIN_SHARE, RESIDUAL_SHARE
from nybble.formats import search as definition
from nybble.formats.block import NVFP4
from nybble.formats.element import E2M1_VALUES
from nybble.formats.search import Search
from nybble.kernels import block_quantize
from nybble.kernels.block_round import round_strip

Rung = Literal["gptq-x", "local", "mse"]
EffortName = Literal["fast", "default", "best"]

#: Columns between two updates by a matmul; the kernel makes those inside.
STRIP = 128
#: Rows that are worked on together: what bounds the memory of an output head.
ROWS = 16384
#: Rows that try the dampings; rows are independent, so a sample tells.
TRIAL_ROWS = 512
#: Scales that a block tries, from the E4M3 code that maps its largest target to 6.
LOWEST, HIGHEST = -4, 7
#: Of the local method: its matrices have 16 rows and as good as never lack tokens.
LOCAL_DAMPING = 0.01
#: Half of the E2M1 table, and the other half negated.
_VALUES = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)])
_E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is tried. `dampings` of gptq-x, in units of the mean diagonal; `passes` of
    coordinate descent over the codes of a block at its `kept` best scales; `sweeps` over all blocks
    with the whole Hessian afterwards. `is_sequential`: inputs come from layers that are already
    quantized.

    The switches below exist for the ablation (benchmarks/fidelity): each takes a part away.
    """

    name: EffortName
    gptq: bool
    dampings: tuple[float, ...] = (0.01,)
    passes: int = 1
    kept: int = 1
    sweeps: int = 0
    is_sequential: bool = True
    plain_share: float = PLAIN_SHARE
    residual_share: float = RESIDUAL_SHARE
    orders: bool = True
    searches_in_loop: bool = True
    guards: bool = True


EFFORTS: dict[str, Effort] = {
    e.name: e
    for e in (
        Effort("fast", gptq=False, is_sequential=False),
        Effort("default", gptq=True, dampings=(0.01, 0.03, 0.1)),
        Effort(
            "best", gptq=True, dampings=(0.003, 0.01, 0.03, 0.1, 0.3), passes=2, kept=4, sweeps=3
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a group's input is known by: Hessians float32 [K, K] with a mean diagonal of 1, of the
    tokens that codes are fitted to and of those that judge them.

    `rung` is the highest method that may be tried, `reason` why not a higher one. Where nothing is
    known both matrices may be empty.
    """

    fit: Tensor
    guard: Tensor | None
    tokens: int
    guard_tokens: int
    rung: Rung = "gptq-x"
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was taken, and what each method would have cost on held-out tokens.

    `losses` are relative: tr(D H D^T) / tr(W H W^T) by the guard's Hessian, of absmax and of every
    method tried. `reason` is empty, or says why a lower rung was taken.
    """

    method: str
    damping: float | None
    losses: Mapping[str, float]
    tokens: int
    guard_tokens: int
    reason: str = ""

    @property
    def won(self) -> float:
        """The share of round-to-nearest's held-out loss that is gone; 0 where nothing is known."""
        before = self.losses.get("absmax", 0.0)
        return 1 - self.losses[self.method] / before if before > 0 else 0.0


@dataclass(slots=True)
class Codes:
    """E2M1 codes uint8 [N, K], one a byte, and E4M3 codes of scales uint8 [N, K / 16]."""

    codes: Tensor
    scales: Tensor

    def error(self, weight: Tensor) -> Tensor:
        """What they decode to, less `weight` [N, K] in units of the tensor scale."""
        scales = _E4M3[self.scales.int()].repeat_interleave(BLOCK, 1)
        return _VALUES[self.codes.int()] * scales - weight

    def rows(self, other: Codes, first: int) -> None:
        """Put rows of another in their place."""
        self.codes[first : first + len(other.codes)] = other.codes
        self.scales[first : first + len(other.codes)] = other.scales


def round_group(
    weight: Tensor,
    tensor_scale: float,
    evidence: Evidence,
    effort: Effort,
    threads: int = 1,
    *,
    peak: float | None = None,
) -> tuple[Tensor, Tensor, Choice]:
    """Packed codes uint8 [N, K / 2], scale codes uint8 [N, K / 16], and how they were chosen.

    `weight` float32 [N, K] holds the members of a job one after the other: they share their input
    and the tensor scale, a power of two. `peak` is the job's largest magnitude where these are only
    some of its rows. Never fails for want of data: what is lacking is in the choice's `reason`.
    """
    unit = weight / tensor_scale
    mse = searched(weight, tensor_scale, "mse", threads)
    found: dict[str, Codes] = {"mse": mse}
    rung, reason = evidence.rung, evidence.reason
    if evidence.guard is None or not evidence.guard_tokens or not evidence.fit.numel():
        reason = reason or "no tokens to judge by"
        return *_packed(mse), Choice("mse", None, {}, evidence.tokens, 0, reason)
    judge = Judge(unit, evidence.guard)
    losses = {
        "absmax": judge.loss(absmax_error(weight, tensor_scale, threads, peak)),
        "mse": judge.loss(mse.error(unit)),
    }
    damping: float | None = None
    try:
        if rung != "mse":
            found["local"] = local(unit, evidence.fit, effort, threads)
            losses["local"] = judge.loss(found["local"].error(unit))
        if rung == "gptq-x" and effort.gptq:
            damping = _best_damping(unit, evidence, effort, judge, threads)
            found["gptq-x"] = gptq(unit, evidence.fit, damping, effort, threads)
            losses["gptq-x"] = judge.loss(found["gptq-x"].error(unit))
    except NotPositiveDefinite as error:
        reason = str(error)
    method = _taken(losses, found, effort)
    if not reason and method != list(found)[-1]:
        reason = f"{list(found)[-1]} is not better on held-out tokens"
    choice = Choice(
        method,
        damping if method == "gptq-x" else None,
        losses,
        evidence.tokens,
        evidence.guard_tokens,
        reason,
    )
    return *_packed(found[method]), choice


def _taken(losses: Mapping[str, float], found: Mapping[str, Codes], effort: Effort) -> str:
    """The highest method that beats those below it."""
    if not effort.guards:
        return list(found)[-1]
    best = "mse"
    for method in found:
        if losses[method] < losses[best]:
            best = method
    return best


# ----------------------------------------------------------------------------------- the methods


def searched(weight: Tensor, tensor_scale: float, search: Search, threads: int) -> Codes:
    """The data-free search, by the kernel that quantizes without calibration."""
    n, k = weight.shape
    codes, scales = np.empty(n * k // 2, np.uint8), np.empty(n * k // BLOCK, np.uint8)
    run = np.ascontiguousarray(weight.numpy())
    top = np.array([tensor_scale], dtype=np.float32)
    block_quantize.quantize([run], NVFP4, search, top, [codes], [scales], threads)
    packed = torch.from_numpy(codes).view(n, k // 2)
    return Codes(
        torch.stack((packed & 15, packed >> 4), -1).view(n, k),
        torch.from_numpy(scales).view(n, k // BLOCK),
    )


def absmax_error(
    weight: Tensor, tensor_scale: float, threads: int, peak: float | None = None
) -> Tensor:
    """What round-to-nearest with ModelOpt's scales misses, in units of `tensor_scale`."""
    most = np.float32(weight.abs().max() if peak is None else peak)
    top = definition.tensor_scale(most, NVFP4, "absmax")
    found = searched(weight, float(top), "absmax", threads)
    return found.error(weight / float(top)) * (float(top) / tensor_scale)


def local(unit: Tensor, h: Tensor, effort: Effort, threads: int) -> Codes:
    """Each block by its own 16 x 16 Hessian, feedback and descent inside the block only.

    unit [N, K] in units of the tensor scale, h [K, K].
    """
    n, k = unit.shape
    factors = blocks_of(h, LOCAL_DAMPING)
    found = Codes(
        torch.empty((n, k), dtype=torch.uint8), torch.empty((n, k // BLOCK), dtype=torch.uint8)
    )
    for start in range(0, k, STRIP):
        stop = min(start + STRIP, k)
        upper = _on_diagonal(factors.upper[start // BLOCK : stop // BLOCK])
        importance = factors.importance[start // BLOCK : stop // BLOCK].reshape(-1)
        part = unit[:, start:stop].contiguous()
        strip = round_strip(
            part, part, upper, importance, passes=effort.passes, kept=effort.kept, threads=threads
        )
        found.codes[:, start:stop] = strip.codes
        found.scales[:, start // BLOCK : stop // BLOCK] = strip.scales
    return found


def _on_diagonal(blocks: Tensor) -> Tensor:
    """Matrices [B, 16, 16] as one [16 B, 16 B], zero beside them."""
    count = len(blocks)
    whole = torch.zeros((count, BLOCK, count, BLOCK))
    each = torch.arange(count)
    whole[each, :, each] = blocks
    return whole.view(count * BLOCK, count * BLOCK)


def gptq(unit: Tensor, h: Tensor, damping: float, effort: Effort, threads: int) -> Codes:
    """GPTQ-X of unit [N, K], in units of the tensor scale, with h [K, K]."""
    whole = damped(h, damping)
    k = len(h)
    order = column_order(whole.diagonal()) if effort.orders else torch.arange(k)
    factors = factorize_ordered(whole, order)
    blocks = order.view(-1, BLOCK)[:, 0] // BLOCK  # which block of the weight each one is
    found = Codes(
        torch.empty(unit.shape, dtype=torch.uint8),
        torch.empty((len(unit), k // BLOCK), dtype=torch.uint8),
    )
    for first in range(0, len(unit), ROWS):
        part = unit[first : first + ROWS]
        codes, error = _feed_back(part[:, order], factors, effort, threads)
        own = Codes(torch.empty_like(codes.codes), torch.empty_like(codes.scales))
        own.codes[:, order], own.scales[:, blocks] = codes.codes, codes.scales
        if effort.sweeps:
            back = torch.empty_like(error)
            back[:, order] = error
            polish(part, own, back, whole, effort, threads)
        found.rows(own, first)
    return found


def _feed_back(
    weight: Tensor, factors: Factors, effort: Effort, threads: int
) -> tuple[Codes, Tensor]:
    """Strip after strip of columns, each made up for what those before it missed."""
    n, k = weight.shape
    found = Codes(
        torch.empty((n, k), dtype=torch.uint8), torch.empty((n, k // BLOCK), dtype=torch.uint8)
    )
    error = torch.empty((n, k))
    for start in range(0, k, STRIP):
        stop = min(start + STRIP, k)
        own = weight[:, start:stop]
        target = own - error[:, :start] @ factors.upper[:start, start:stop] if start else own
        strip = round_strip(
            own,
            target,
            factors.upper[start:stop, start:stop],
            factors.importance[start:stop],
            lowest=LOWEST if effort.searches_in_loop else 0,
            highest=HIGHEST if effort.searches_in_loop else 0,
            passes=effort.passes,
            kept=effort.kept,
            threads=threads,
        )
        found.codes[:, start:stop] = strip.codes
        found.scales[:, start // BLOCK : stop // BLOCK] = strip.scales
        error[:, start:stop] = strip.error
    return found, error


def polish(
    unit: Tensor, codes: Codes, error: Tensor, h: Tensor, effort: Effort, threads: int
) -> None:
    """Block coordinate descent with the whole Hessian, in place: each block is rounded again with
    all others fixed, and keeps what it has unless the loss falls.

    The errors of the others shift a block's optimum by -(E H)_b H_bb^-1 + E_b, the rest is as in
    `gptq`.
    """
    k = unit.shape[1]
    factors = blocks_of(h, 0.0)
    for _ in range(effort.sweeps):
        for start in range(0, k, STRIP):
            stop = min(start + STRIP, k)
            inner = h[start:stop, start:stop]
            pull = error @ h[:, start:stop]
            before = error[:, start:stop].clone()
            for at in range(start, stop, BLOCK):
                columns = slice(at, at + BLOCK)
                inside = slice(at - start, at - start + BLOCK)
                one = inner[inside, inside]
                moved = (error[:, start:stop] - before) @ inner[:, inside]
                force = pull[:, inside] + moved - error[:, columns] @ one
                target = (unit[:, columns] - torch.linalg.solve(one, force.T).T).contiguous()
                b = at // BLOCK
                strip = round_strip(
                    target,
                    target,
                    factors.upper[b],
                    factors.importance[b],
                    passes=effort.passes,
                    kept=effort.kept,
                    current=(
                        codes.codes[:, columns].contiguous(),
                        codes.scales[:, b : b + 1].contiguous(),
                    ),
                    threads=threads,
                )
                codes.codes[:, columns] = strip.codes
                codes.scales[:, b : b + 1] = strip.scales
                error[:, columns] = strip.error + (target - unit[:, columns])


# ------------------------------------------------------------------------------------- the guard


class Judge:
    """Held-out losses of a weight [N, K], in units of the tensor scale, by h [K, K]."""

    def __init__(self, unit: Tensor, h: Tensor) -> None:
        self.h = h
        self.of_rows = self._each(unit)
        self.whole = float(self.of_rows.sum())

    def loss(self, error: Tensor, rows: Tensor | None = None) -> float:
        """tr(E H E^T) / tr(W H W^T), of all rows or of those that `error` has."""
        whole = self.whole if rows is None else float(self.of_rows[rows].sum())
        return float(self._each(error).sum()) / whole if whole > 0 else 0.0

    def _each(self, rows: Tensor) -> Tensor:
        parts = [
            (rows[i : i + ROWS] @ self.h).mul_(rows[i : i + ROWS]).sum(-1).double()
            for i in range(0, len(rows), ROWS)
        ]
        return torch.cat(parts)


def _best_damping(
    unit: Tensor, evidence: Evidence, effort: Effort, judge: Judge, threads: int
) -> float:
    """The damping with the least held-out loss, on a sample of rows."""
    if len(effort.dampings) == 1:
        return effort.dampings[0]
    rows = torch.linspace(0, len(unit) - 1, min(TRIAL_ROWS, len(unit))).long()
    sample = unit[rows]
    quick = replace(effort, sweeps=0)
    losses = {}
    for damping in effort.dampings:
        codes = gptq(sample, evidence.fit, damping, quick, threads)
        losses[damping] = judge.loss(codes.error(sample), rows)
    return min(losses, key=lambda d: losses[d])


def _packed(codes: Codes) -> tuple[Tensor, Tensor]:
    return codes.codes[:, 0::2] | codes.codes[:, 1::2] << 4, codes.scales
