"""Mending scales: fused groups, missing and unusable input scales, signs, dead tensors.

Multipliers are compared and made; where a layout stores a divisor, it is stored again as one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite, log2, sqrt

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nybble.check.completeness_weights import wrong_scales
from nybble.check.contents import CODES, INPUT_SCALES, TENSOR_SCALES, Module, is_divisor
from nybble.check.rule import Finding
from nybble.check.survey import Survey
from nybble.checkpoint.safetensors import DTYPES, TensorInfo
from nybble.formats.element import E2M1, decode, unpack_nibbles
from nybble.rewrite.draft import Draft, U8Array
from nybble.rewrite.mend import Step

#: A scale that is put in for a missing one is the largest of its layer times this: what the others
#: measured may be exceeded, and a factor of two costs E4M3 block scales nothing but range.
HEADROOM = 2.0
#: A shift of E4M3 scales costs 2.6 % at worst, while they stay in its normal range.
WORST_ROUNDING = 0.05
#: No two matrices with one input differ so much in size; their scales were not both measured.
SMALLEST_RATIO = 1e-3
#: How near a known scale must be to what the source's weights ask for, by least squares.
GUESS = 0.04
_SMALLEST = 2.0**-9  # of E4M3 above zero
_LARGEST = 448.0
_expert = re.compile(r"\.experts\.(\d+)(?=[.:])").search
#: The sum of the squares of the two E2M1 codes in a byte.
_ENERGY = (
    decode(unpack_nibbles(np.arange(256, dtype=np.uint8)[:, None]), E2M1).astype(np.float64) ** 2
).sum(axis=1)


def multiplier(info: TensorInfo, stored: NDArray[np.generic]) -> float:
    """The multiplying value of a stored scalar scale; infinite for a divisor of 0."""
    value = float(stored.astype(np.float64).reshape(-1)[0])
    if not is_divisor(info):
        return value
    return 1.0 / value if value else float("inf")


def _stored_like(info: TensorInfo, value: float) -> NDArray[np.generic]:
    """A multiplier in the dtype, shape and convention of another stored scale."""
    number = np.float32(1) / np.float32(value) if is_divisor(info) else np.float32(value)
    return np.full(info.shape, number, dtype=np.float32).astype(DTYPES[info.dtype])


def fused_groups(draft: Draft, held: str) -> Iterator[list[Module]]:
    """Modules that engines run as one matmul, two or more that hold this format."""
    family = draft.survey.family
    groups: dict[str, list[Module]] = {}
    for module in draft.quantized if family else ():
        claimed = family.claim_module(module.name) if family else None
        if claimed is not None and claimed.group_key and module.kind.held == held:
            groups.setdefault(claimed.group_key, []).append(module)
    return (members for members in groups.values() if len(members) > 1)


# ------------------------------------------------------------------------------------ fused groups


def unify_tensor_scales(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """One tensor scale per fused group, the largest; the other members' block scales follow.

    A group whose block scales cannot follow is left as it is: one of its scales is wrong.
    """
    rule = findings[0].rule.id
    groups = list(fused_groups(draft, "nvfp4"))
    for members, tops in _with_scales(draft, groups, TENSOR_SCALES):
        values = [multiplier(info, stored) for info, stored in tops]
        if len(set(values)) == 1 or not all(isfinite(v) and v > 0 for v in values):
            continue
        most = max(values)
        chosen = tops[values.index(most)][1]
        shifts = [
            _Shift(draft, module, info, value, most)
            for module, (info, _), value in zip(members, tops, values, strict=True)
            if value != most
        ]
        if why := next(filter(None, (shift.refusal for shift in shifts)), ""):
            draft.leave(rule, why)
            continue
        for shift in shifts:
            shift.make(rule, chosen)


def _with_scales(
    draft: Draft, groups: Iterable[list[Module]], leaves: Sequence[str]
) -> Iterator[tuple[list[Module], list[tuple[TensorInfo, NDArray[np.generic]]]]]:
    """Groups whose members all have one of these scalars, with the stored values."""
    found = []
    for members in groups:
        held = [module.tensor(*leaves) for module in members]
        scalars = [info for info in held if info is not None and info.size == 1]
        if len(scalars) == len(members):
            found.append((members, scalars))
    stored = iter(draft.values([i.name for _, scalars in found for i in scalars]))
    for members, scalars in found:
        yield members, [(info, next(stored)) for info in scalars]


class _Shift:
    """A member of a fused group, and what giving it the group's tensor scale means."""

    def __init__(
        self, draft: Draft, module: Module, top: TensorInfo, value: float, most: float
    ) -> None:
        codes, blocks = module.tensor(*CODES), module.tensor("weight_scale")
        assert codes is not None
        assert blocks is not None
        self.draft, self.module, self.top, self.blocks = draft, module, top, blocks
        self.value, self.most, self.ratio = value, most, value / most
        old = draft.read(blocks.name)
        new = rebased(old, self.ratio)
        self.error = rounding_error(draft.read(codes.name), old, new, self.ratio)
        self.changed, self.size = int((old != new).sum()), old.size

    @property
    def refusal(self) -> str:
        """Why it must not be done; "" if it may."""
        if self.error <= WORST_ROUNDING and self.ratio >= SMALLEST_RATIO:
            return ""
        return (
            f"{self.module.name}: at the scale of its fused group, {1 / self.ratio:.6g} times its "
            f"own, rounding would move the weights by {self.error:.2%} of their rms: one of the "
            "tensor scales is wrong; the source must be quantized again"
        )

    def make(self, rule: str, chosen: NDArray[np.generic]) -> None:
        """Change the draft: the scalar now, the block scales when they are written."""
        origin, ratio = self.draft.origins[self.blocks.name], self.ratio

        def make() -> U8Array:
            if origin.make is not None:
                return rebased(origin.make(), ratio)
            assert origin.survey is not None
            assert origin.info is not None
            info = origin.info
            raw = origin.survey.files.read(info.file, info.offset, info.nbytes)
            return rebased(np.frombuffer(raw, dtype=np.uint8), ratio)

        self.draft.set(
            rule,
            self.top.name,
            chosen.astype(DTYPES[self.top.dtype]).reshape(self.top.shape),
            f"{self.value:.6g} -> {self.most:.6g}, the largest of its fused group",
        )
        self.draft.set_later(
            rule,
            self.blocks.name,
            self.blocks.dtype,
            self.blocks.shape,
            make,
            f"{self.changed:,} of {self.size:,} block scales times {ratio:.6g}; rounding moves "
            f"the weights by {self.error:.2%} of their rms",
        )


def rebased(scales: U8Array, ratio: float) -> U8Array:
    """E4M3 scales times `ratio` <= 1, rounded to nearest; none becomes zero or leaves the range."""
    values = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    moved = np.clip(values * ratio, _SMALLEST, _LARGEST)
    out = moved.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    # Zero and NaN are other rules' faults, and stay as they are.
    return np.where((values > 0) & np.isfinite(values), out, scales)


def rounding_error(codes: U8Array, old: U8Array, new: U8Array, ratio: float) -> float:
    """How far the weights move, root mean square, over the root mean square of the weights."""
    energy = _ENERGY[codes].reshape(old.size, -1).sum(axis=1)
    before, after = (
        s.view(ml_dtypes.float8_e4m3fn).astype(np.float64).reshape(-1) for s in (old, new)
    )
    before = before * ratio
    moved, whole = (energy * (after - before) ** 2).sum(), (energy * before**2).sum()
    return sqrt(moved / whole) if whole else 0.0


# ------------------------------------------------------------------------------------ input scales


def unify_input_scales(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """One input scale per fused group, the largest: the members have the same input."""
    for held in ("nvfp4", "fp8"):
        for members, tops in _with_scales(draft, list(fused_groups(draft, held)), INPUT_SCALES):
            values = [multiplier(info, stored) for info, stored in tops]
            if len(set(values)) == 1 or not all(isfinite(v) and v > 0 for v in values):
                continue
            most = max(values)
            chosen = tops[values.index(most)][1]
            for _, (info, _), value in zip(members, tops, values, strict=True):
                if value != most:
                    words = f"{value:.6g} -> {most:.6g}, the largest of its fused group"
                    stored = chosen.astype(DTYPES[info.dtype]).reshape(info.shape)
                    draft.set(findings[0].rule.id, info.name, stored, words)


def fill_input_scales(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """Missing, zero, negative, infinite or NaN input scales of modules that need one: of the fused
    partner if it has one, else the largest of the layer's experts with head-room."""
    wanting = [m for m in draft.quantized if m.declared and m.declared.needs_input_scale]
    known, models = _known_input_scales(draft, wanting)
    by_place: dict[str, list[float]] = {}
    for m in wanting:
        if m.name in known:
            by_place.setdefault(_place(draft, m.name), []).append(known[m.name])
    by_group: dict[str, float] = {}
    for m in wanting:
        if m.name in known:
            group = _group(draft, m.name)
            by_group[group] = max(known[m.name], by_group.get(group, 0.0))
    for m in wanting:
        if m.name in known or not models:
            continue
        partner = by_group.get(_group(draft, m.name))
        others = by_place.get(_place(draft, m.name), [])
        if partner is None and not others:
            continue  # nothing to go by: only a measurement can tell
        value = partner if partner is not None else HEADROOM * max(others)
        why = "that of its fused partner"
        if partner is None:
            why = f"{HEADROOM:g} times the largest of {len(others)} of the layer"
        model = models[0]
        info = TensorInfo(
            f"{m.name}.{model.name.rpartition('.')[2]}", model.dtype, model.shape, "", 0
        )
        draft.set(findings[0].rule.id, info.name, _stored_like(info, value), f"{value:.6g}, {why}")


def _known_input_scales(
    draft: Draft, modules: Sequence[Module]
) -> tuple[dict[str, float], list[TensorInfo]]:
    """Usable input scales by module, and the tensors they are in, as models for new ones."""
    infos = [(m, info) for m in modules if (info := m.tensor(*INPUT_SCALES)) is not None]
    stored = draft.values([info.name for _, info in infos])
    known = {}
    for (m, info), value in zip(infos, stored, strict=True):
        number = multiplier(info, value)
        if isfinite(number) and number > 0:
            known[m.name] = number
    return known, [info for _, info in infos]


def _group(draft: Draft, module: str) -> str:
    family = draft.survey.family
    claimed = family.claim_module(module) if family else None
    return claimed.group_key if claimed and claimed.group_key else module


def _place(draft: Draft, module: str) -> str:
    """A fused group with the expert's number left out: the same input, or one like it."""
    group = _group(draft, module)
    match = _expert(group)
    return group if match is None else f"{group[: match.start(1)]}#{group[match.end(1) :]}"


def drop_residual_scales(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """Input scales of modules that are declared to read none."""
    for m in list(draft.quantized):
        if m.kind.has_residual:
            for leaf in INPUT_SCALES:
                info = m.tensor(leaf)
                if info is not None:
                    draft.drop(findings[0].rule.id, info.name, "the module is weight-only")


# ---------------------------------------------------------------------------- signs, dead tensors


def restore_tensor_scales(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """A tensor scale that is gone is that of the fused partner: writers give the pair one."""
    for members in fused_groups(draft, "nvfp4"):
        held = [t for m in members if (t := m.tensor(*TENSOR_SCALES)) is not None]
        for m in members:
            if m.tensor(*TENSOR_SCALES) is None and held:
                leaf = held[0].name.rpartition(".")[2]
                value = draft.values([held[0].name])[0]
                words = f"{multiplier(held[0], value):.6g}, that of its fused partner"
                draft.set(findings[0].rule.id, f"{m.name}.{leaf}", value, words)


def move_signs(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """A negative block scale becomes positive and its codes change sign: the same values, also for
    kernels that drop the scale's sign."""
    for m in list(draft.quantized):
        blocks, codes = m.tensor("weight_scale"), m.tensor(*CODES)
        if m.kind.held != "nvfp4" or blocks is None or codes is None:
            continue
        scales = draft.read(blocks.name)
        negative = (scales & 0x80 != 0) & (scales & 0x7F != 0x7F)
        if not negative.any():
            continue
        flipped = draft.read(codes.name).reshape(scales.size, -1).copy()
        flipped[negative] ^= 0x88
        words = f"{int(negative.sum()):,} of {scales.size:,} blocks: the sign moves to the codes"
        rule = findings[0].rule.id
        positive = np.where(negative, scales & 0x7F, scales).astype(np.uint8)
        draft.set(rule, blocks.name, _typed(positive, blocks), words)
        draft.set(rule, codes.name, _typed(flipped, codes), words)


def _typed(data: U8Array, info: TensorInfo) -> NDArray[np.generic]:
    return np.ascontiguousarray(data).view(DTYPES[info.dtype]).reshape(info.shape)


def mend_dead_scales(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """An unusable tensor scale of a tensor whose codes are all zero becomes 1: zeros stay zeros."""
    for m in list(draft.quantized):
        info, codes = m.tensor(*TENSOR_SCALES), m.tensor(*CODES)
        if m.kind.held != "nvfp4" or info is None or codes is None or info.size != 1:
            continue
        value = multiplier(info, draft.values([info.name])[0])
        if isfinite(value) and value > 0:
            continue
        if not (draft.read(codes.name) & 0x77).any():
            words = f"{value:g} -> 1: all codes are zero"
            draft.set(findings[0].rule.id, info.name, _stored_like(info, 1.0), words)


def invert_scales(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """A tensor scale that was stored as its reciprocal is turned back."""
    subjects = {s for f in findings for s in f.subjects}
    names = _scalars_of(draft, subjects)
    for info, stored in zip(names.values(), draft.values(list(names)), strict=True):
        value = np.asarray(stored, dtype=np.float32)
        words = f"{float(value.reshape(-1)[0]):.6g} -> its reciprocal"
        turned = (np.float32(1) / value).astype(DTYPES[info.dtype]).reshape(info.shape)
        draft.set(findings[0].rule.id, info.name, turned, words)


def _scalars_of(draft: Draft, subjects: set[str]) -> Mapping[str, TensorInfo]:
    """Tensor scales among the subjects: tensors by name, or those of modules."""
    found = {}
    for m in draft.quantized:
        info = m.tensor(*TENSOR_SCALES)
        if info is not None and (m.name in subjects or info.name in subjects):
            found[info.name] = info
    return found


def correct_scales(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """Tensor scales that make a module something else than the source: the fused partner's if that
    is what the weights ask for, or a power of two. Any other factor would be a guess."""
    rule = findings[0].rule.id
    factors = wrong_scales(draft.survey)
    modules = {m.name: m for m in draft.quantized}
    partners: dict[str, list[Module]] = {}
    for members in fused_groups(draft, "nvfp4"):
        partners |= {m.name: [p for p in members if p.name not in factors] for m in members}
    for name, factor in factors.items():
        info = modules[name].tensor(*TENSOR_SCALES) if name in modules else None
        if info is None or info.size != 1 or factor <= 0:
            draft.leave(rule, f"{name}: has no tensor scale that could be corrected")
            continue
        if draft.origins[info.name].make is not None:
            continue  # another mend has given it a value already
        value = multiplier(info, draft.values([info.name])[0])
        held = [t for p in partners.get(name, ()) if (t := p.tensor(*TENSOR_SCALES)) is not None]
        known = dict(zip((t.name for t in held), draft.values([t.name for t in held]), strict=True))
        for other in held:
            if abs(multiplier(other, known[other.name]) / value / factor - 1) < GUESS:
                stored = known[other.name].astype(DTYPES[info.dtype]).reshape(info.shape)
                words = f"{value:.6g} times {factor:.4g}, as the source asks: its fused partner's"
                draft.set(rule, info.name, stored, words)
                break
        else:
            power = 2.0 ** round(log2(factor))
            if abs(power / factor - 1) < GUESS:
                words = f"{value:.6g} times {power:g}, as the source's weights ask"
                draft.set(rule, info.name, _stored_like(info, value * power), words)
            else:
                draft.leave(
                    rule, f"{name}: must be multiplied by {factor:.4g}, and no scale says so"
                )


STEPS: tuple[Step, ...] = (
    Step(("NB212",), invert_scales),
    Step(("NB120",), correct_scales, needs_source=True),
    Step(("NB206",), move_signs),
    Step(("NB118", "NB213"), restore_tensor_scales),
    Step(("NB201", "NB202", "NB203", "NB204"), mend_dead_scales),
    Step(("NB209", "NB201", "NB202", "NB203", "NB204", "NB315"), fill_input_scales),
    Step(("NB210",), unify_tensor_scales),
    Step(("NB211",), unify_input_scales),
    Step(("NB314",), drop_residual_scales),
)
