"""The values that the rules about scales look at, read once: scalars all, the rest by choice.

One number per tensor (tensor scales, input scales) is cheap: writers put them side by side at the
front of a shard, so all are read. Block scales, codes and plain weights are sampled: three pieces
each of at most MODULES modules, spread over layers, projections and experts, of the last two
modules of each shard, where an interrupted download leaves zeros, and of up to SUSPECTS modules
whose scalars look odd. A deep survey counts every byte of everything instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nybble.check import deep
from nybble.check.contents import (
    CODES,
    INPUT_SCALES,
    SCALES,
    SIDE,
    TENSOR_SCALES,
    Module,
    is_divisor,
    is_fp4,
)
from nybble.check.deep import Counts, U8Array
from nybble.check.engines.matching import FUSED_OF
from nybble.checkpoint.safetensors import TensorInfo
from nybble.formats.element import E2M1, decode, unpack_nibbles

if TYPE_CHECKING:
    from nybble.check.survey import Survey

F64Array = NDArray[np.float64]

#: Modules whose block scales and codes are sampled: of a folder, and behind a network.
MODULES, REMOTE_MODULES = 384, 48
#: Plain tensors that are sampled: of a folder, and behind a network.
PLAIN, REMOTE_PLAIN = 512, 48
#: Modules that are sampled because their scalars look odd.
SUSPECTS = 64
#: Bytes of block scales in each of the three pieces; of the codes, what belongs to them.
SCALE_BYTES = 512
PLAIN_BYTES = 4096
#: Tensors from the end of a shard among which the last two large ones are looked for.
_END = 64
_FLOATS = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
_SCALAR_DTYPES = frozenset(_FLOATS)
_BLOCK_SCALES = ("F8_E4M3", "U8", "F8_E8M0")
#: Where no family is known, what engines fuse by name alone; w1 and w3 are Mixtral's gate and up.
_FUSED_ELSEWHERE = {**FUSED_OF, "w1": "gate_up_proj", "w3": "gate_up_proj"}
#: Sum of squares of the two codes in a byte.
_ENERGY = (
    decode(unpack_nibbles(np.arange(256, dtype=np.uint8)[:, None]), E2M1).astype(np.float32) ** 2
).sum(axis=1)
_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E8M0 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)


@dataclass(frozen=True)
class Scalars:
    """One number per module; `places` are the modules' numbers among the quantized ones.

    `stored` is NaN where `is_read` is False: the file is cut off there, or it was left out behind a
    network.
    """

    places: NDArray[np.int64]
    modules: Sequence[Module]
    infos: Sequence[TensorInfo]
    stored: F64Array
    is_read: NDArray[np.bool_]

    @cached_property
    def multiplier(self) -> F64Array:
        """As a factor: the reciprocal of a divisor, infinite for a divisor of 0."""
        divides = np.fromiter(map(is_divisor, self.infos), dtype=bool, count=len(self.infos))
        with np.errstate(divide="ignore", over="ignore"):
            return np.where(divides, 1.0 / self.stored, self.stored)

    def where(self, mask: NDArray[np.bool_]) -> list[int]:
        """Indices of what was read and is in the mask."""
        return indices(mask & self.is_read)

    @cached_property
    def peers(self) -> dict[tuple[str, str, str], NDArray[np.int64]]:
        """Indices of modules that do the same in different places."""
        return peers(self.modules)

    @cached_property
    def by_module(self) -> dict[str, int]:
        return {m.name: i for i, m in enumerate(self.modules)}


@dataclass(frozen=True)
class Counted:
    """Tensors of one purpose and the counts of what was looked at.

    `total` is how many there are, `is_whole` whether every byte of all of them was looked at.
    """

    modules: Sequence[Module]
    infos: Sequence[TensorInfo]
    counts: Counts
    total: int
    is_whole: bool

    def column(self, name: str) -> NDArray[np.int64]:
        """One count of all tensors."""
        return np.asarray(self.counts[name], dtype=np.int64)

    @property
    def looked(self) -> str:
        """How many were looked at, in words."""
        read = int((self.column("size") > 0).sum())
        if self.is_whole:
            return f"all {read:,} looked at"
        return f"{read:,} of {self.total:,} looked at in pieces"


@dataclass(frozen=True)
class Sampled:
    """Corresponding pieces of a four-bit module: `scales` [blocks], decoded; `energy` [blocks], the
    sum of the squares of each block's codes; `codes`, bytes."""

    module: Module
    scales: NDArray[np.float32]
    energy: NDArray[np.float32]
    codes: U8Array
    weights: int


class Scan:
    """Everything that is read for the rules about values, each thing when first asked for."""

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        self.is_local = survey.files.local is not None

    @cached_property
    def quantized(self) -> tuple[Module, ...]:
        return tuple(self.survey.quantized)

    # ------------------------------------------------------------------------------------- scalars

    @cached_property
    def tops(self) -> Scalars:
        """The one scale of a tensor: NVFP4's second level, FP8's where it is a scalar."""
        return self._scalars(_tensor_scale)

    @cached_property
    def inputs(self) -> Scalars:
        """Input scales."""
        return self._scalars(lambda leaf, info: leaf in INPUT_SCALES and info.size == 1)

    def _scalars(self, is_meant: Callable[[str, TensorInfo], bool]) -> Scalars:
        held: dict[int, int] = {}  # by kind: its modules have the same tensors in one order
        places, modules, infos = [], [], []
        for place, m in enumerate(self.quantized):
            at = held.get(id(m.kind))
            if at is None:
                at = held[id(m.kind)] = _place(m, is_meant)
            if at >= 0:
                places.append(place)
                modules.append(m)
                infos.append(m.tensors[at])
        stored, is_read = deep.read_scalars(self.survey, infos)
        return Scalars(np.array(places, dtype=np.int64), modules, infos, stored, is_read)

    @cached_property
    def fused(self) -> NDArray[np.int64]:
        """Of each quantized module the number of its fused group, -1 for one that stands alone."""
        names: dict[tuple[str, str], str] = {}
        numbers: dict[tuple[str, str], int] = {}
        out = np.full(len(self.quantized), -1, dtype=np.int64)
        for i, m in enumerate(self.quantized):
            parent, _, last = m.name.rpartition(".")
            kind = (m.role, last)
            name = names.get(kind)
            if name is None:  # one question for all layers and experts
                claimed = self.survey.family and self.survey.family.claim_module(m.name)
                name = names[kind] = (
                    claimed.claim.group if claimed else _FUSED_ELSEWHERE.get(last, "")
                )
            if name:
                out[i] = numbers.setdefault((parent, name), len(numbers))
        return out

    # -------------------------------------------------------------------------------------- choice

    @cached_property
    def chosen(self) -> tuple[Module, ...]:
        """The quantized modules whose blocks and codes are sampled, in file order."""
        groups: dict[tuple[str, str], list[Module]] = {}
        for m in self.quantized:
            groups.setdefault(expert_place(m.name), []).append(m)
        count = MODULES if self.is_local else REMOTE_MODULES
        picked = {m.name for m in spread(list(groups.values()), count)}
        picked |= {m.name for m in self._tails() if m.kind.is_quantized}
        picked |= {m.name for m in self._suspects()}
        return tuple(m for m in self.quantized if m.name in picked)

    @cached_property
    def ends(self) -> dict[str, list[TensorInfo]]:
        """By shard its last two tensors that are no vectors, of two experts or other parents."""
        found = {}
        for shard in self.survey.shards.values():
            last = sorted(shard.tensors.values(), key=attrgetter("offset"))[: -_END - 1 : -1]
            large = [t for t in last if t.nbytes > 4096 and len(t.shape) > 1]
            # Not two of one expert, which may be dead.
            apart = {t.name.rsplit(".", 2)[0]: t for t in reversed(large)}
            found[shard.name] = sorted(apart.values(), key=attrgetter("offset"))[-2:]
        return found

    def _tails(self) -> Iterator[Module]:
        for info in (t for ends in self.ends.values() for t in ends):
            module = self.survey.contents.by_name.get(info.name.rpartition(".")[0])
            if module is not None:
                yield module

    def _suspects(self) -> Iterator[Module]:
        """Modules whose tensor scale is unusable, 1 or more, or far from its peers'."""
        tops = self.tops
        values = tops.multiplier
        with np.errstate(divide="ignore", invalid="ignore"):
            size = np.log10(np.where(values > 0, values, np.nan))
        far = ~np.isfinite(size) | (values >= 0.5)
        for members in tops.peers.values():
            usable = members[np.isfinite(size[members])]
            if usable.size:
                far[usable] |= np.abs(size[usable] - np.median(size[usable])) > 2.5
        odd = tops.where(far)
        for at in odd[:: max(1, -(-len(odd) // SUSPECTS))]:
            yield tops.modules[at]

    # ------------------------------------------------------------------------------ blocks, codes

    @cached_property
    def _looked_at(self) -> tuple[Module, ...]:
        return self.quantized if self.survey.deep else self.chosen

    @cached_property
    def _counted(self) -> dict[str, Counted]:
        """By purpose: "blocks", "codes", "plain", "vectors" (scales of channels and of FP8 blocks),
        "stacks" (scales that experts in one tensor have one each of)."""
        rows = [row for m in self._looked_at for row in purposes(m)]
        rows += [("plain", m, info, _FLOATS[info.dtype]) for m, info in self._plain_chosen]
        infos = [info for _, _, info, _ in rows]
        kinds = [kind for *_, kind in rows]
        if self.survey.deep:
            counts = deep.count_all(self.survey, infos, kinds)
        else:
            counts = deep.count_some([self._pieces[info.name] for info in infos], kinds)
        found = {}
        for purpose in ("blocks", "codes", "vectors", "stacks", "plain"):
            at = [i for i, row in enumerate(rows) if row[0] == purpose]
            some = [infos[i] for i in at]
            total = self._total(purpose)
            found[purpose] = Counted(
                [rows[i][1] for i in at],
                some,
                counts[at],
                total,
                len(some) == total and all(map(self._is_whole, some)),
            )
        return found

    def _is_whole(self, info: TensorInfo) -> bool:
        if self.survey.deep:
            return self.survey.is_held(info)
        return self._pieces[info.name].size == info.nbytes

    def _total(self, purpose: str) -> int:
        if purpose == "plain":
            return len(self._plain)
        return sum(
            count * sum(row[0] == purpose for row in purposes(m)) for m, count in self._kinds
        )

    @cached_property
    def _kinds(self) -> list[tuple[Module, int]]:
        """A module of each kind, and how many there are of it."""
        counts = Counter(id(m.kind) for m in self.quantized)
        return [(m, counts[id(m.kind)]) for m in {id(m.kind): m for m in self.quantized}.values()]

    @property
    def blocks(self) -> Counted:
        """Block scales of NVFP4 and MXFP4."""
        return self._counted["blocks"]

    @property
    def codes(self) -> Counted:
        """Quantized weights themselves."""
        return self._counted["codes"]

    @cached_property
    def zero_codes(self) -> frozenset[str]:
        """The modules of whose codes all that was looked at are zeros."""
        codes = self.codes
        size = codes.column("size")
        is_zero = (size > 0) & (codes.column("zero") == size)
        return frozenset(codes.modules[i].name for i in indices(is_zero))

    @property
    def vectors(self) -> Counted:
        """Scales in BF16, F16 or F32 that are more than one number."""
        return self._counted["vectors"]

    @property
    def stacks(self) -> Counted:
        """Tensor scales and input scales of experts that are stored in one tensor."""
        return self._counted["stacks"]

    @property
    def plain(self) -> Counted:
        """Unquantized parameters."""
        return self._counted["plain"]

    @cached_property
    def _plain(self) -> list[tuple[Module, TensorInfo]]:
        """Every floating-point parameter that is no scale and no quantized weight."""
        return [
            (m, t)
            for m in self.survey.modules
            for t in m.tensors
            if t.dtype in _SCALAR_DTYPES and t.name[len(m.name) + 1 :] not in SIDE and t.size
        ]

    @cached_property
    def _plain_chosen(self) -> list[tuple[Module, TensorInfo]]:
        if self.survey.deep:
            return self._plain
        count = PLAIN if self.is_local else REMOTE_PLAIN
        step = max(1, -(-len(self._plain) // count))
        tails = {m.name for m in self._tails()}
        return [
            pair for i, pair in enumerate(self._plain) if i % step == 0 or pair[0].name in tails
        ]

    @cached_property
    def _pieces(self) -> dict[str, U8Array]:
        """The sampled bytes of tensors by name."""
        rows = [row for m in self.chosen for row in purposes(m)]
        infos = [info for _, _, info, _ in rows]
        sizes = [_sample_bytes(m, purpose) for purpose, m, _, _ in rows]
        if not self.survey.deep:
            infos += [info for _, info in self._plain_chosen]
            sizes += [PLAIN_BYTES] * len(self._plain_chosen)
        read = deep.read_some(self.survey, infos, sizes)
        return {info.name: data for info, data in zip(infos, read, strict=True)}

    @cached_property
    def sampled(self) -> tuple[Sampled, ...]:
        """The chosen four-bit modules, decoded but for their tensor scale."""
        found = []
        for m in self.chosen:
            blocks, codes = m.tensor("weight_scale"), m.tensor(*CODES)
            if not is_fp4(m) or blocks is None or codes is None:
                continue
            if blocks.dtype not in _BLOCK_SCALES:
                continue  # a dtype that no scale is stored in: nothing was read of it
            scales, packed = self._pieces[blocks.name], self._pieces[codes.name]
            if scales.size and packed.size and packed.size % scales.size == 0:
                table = _E4M3 if blocks.dtype == "F8_E4M3" else _E8M0
                energy = _ENERGY[packed].reshape(scales.size, -1).sum(axis=1)
                found.append(Sampled(m, table[scales], energy, packed, 2 * packed.size))
        return tuple(found)

    @cached_property
    def magnitudes(self) -> dict[str, float]:
        """Root mean square of the sampled weights of modules, as the file decodes.

        NVFP4, MXFP4, and FP8 with one scale; NaN where a scale is.
        """
        found = {}
        for s in self.sampled:
            at = self.tops.by_module.get(s.module.name)
            if at is None and s.module.kind.held.startswith("nvfp4"):
                continue
            top = 1.0 if at is None else float(self.tops.multiplier[at])
            with np.errstate(over="ignore", invalid="ignore"):
                square = float((s.scales.astype(np.float64) ** 2 * s.energy).sum()) / s.weights
            found[s.module.name] = abs(top) * float(square) ** 0.5
        for m in self.chosen:
            codes, at = m.tensor(*CODES), self.tops.by_module.get(m.name)
            if codes is not None and at is not None and codes.dtype == "F8_E4M3":
                values = _E4M3[self.piece(codes)]
                if values.size:
                    top = abs(float(self.tops.multiplier[at]))
                    found[m.name] = top * float((values**2).mean()) ** 0.5
        return found

    def piece(self, info: TensorInfo) -> U8Array:
        """The sampled bytes of a chosen tensor; empty for any other."""
        return self._pieces.get(info.name, np.empty(0, dtype=np.uint8))


def _tensor_scale(leaf: str, info: TensorInfo) -> bool:
    is_one = leaf in TENSOR_SCALES or leaf in SCALES
    return is_one and info.size == 1 and info.dtype in _SCALAR_DTYPES


def _place(module: Module, is_meant: Callable[[str, TensorInfo], bool]) -> int:
    """Which of the module's tensors is meant; -1 for none."""
    at = len(module.name) + 1 if module.name else 0
    for i, info in enumerate(module.tensors):
        if is_meant(info.name[at:], info):
            return i
    return -1


def purposes(m: Module) -> Iterator[tuple[str, Module, TensorInfo, str]]:
    """What each of the large tensors of a quantized module is for, and the kind of its values."""
    codes = m.tensor(*CODES)
    scales = m.tensor(*SCALES)
    if is_fp4(m) and scales is not None and scales.dtype in _BLOCK_SCALES:
        yield "blocks", m, scales, "e4m3" if scales.dtype == "F8_E4M3" else "e8m0"
    elif scales is not None and scales.dtype in _FLOATS and scales.size > 1:
        yield "vectors", m, scales, _FLOATS[scales.dtype]
    for leaf in (*TENSOR_SCALES, *INPUT_SCALES):
        stack = m.tensor(leaf)
        if stack is not None and stack.dtype in _FLOATS and stack.size > 1:
            yield "stacks", m, stack, _FLOATS[stack.dtype]
    if codes is None:
        return
    if is_fp4(m):
        yield "codes", m, codes, "codes"
    elif codes.dtype == "F8_E4M3":
        yield "codes", m, codes, "e4m3"
    elif codes.dtype in ("U8", "I8", "I32"):
        yield "codes", m, codes, "e8m0"  # only zeros mean anything here


def _sample_bytes(m: Module, purpose: str) -> int:
    if purpose in ("vectors", "stacks"):
        return PLAIN_BYTES
    blocks, codes = m.tensor("weight_scale"), m.tensor(*CODES)
    if purpose == "blocks" or blocks is None or codes is None or not is_fp4(m):
        return SCALE_BYTES if purpose == "blocks" else 8 * SCALE_BYTES
    return SCALE_BYTES * max(1, codes.nbytes // max(blocks.nbytes, 1))


# ----------------------------------------------------------------------------------------- grouping


def indices(mask: NDArray[np.bool_]) -> list[int]:
    """Where the mask is set, as plain numbers."""
    return [int(i) for i in np.flatnonzero(mask)]


def expert_place(name: str) -> tuple[str, str]:
    """Of an expert's projection the container and the projection, of another module its name."""
    container, _, rest = name.rpartition(".experts.")
    if not container:
        return name, ""
    return container, rest.partition(".")[2]


def spread(groups: Sequence[Sequence[Module]], count: int) -> list[Module]:
    """About `count` modules: as many of each group as fit, of another place in each."""
    if len(groups) > count:
        groups = [groups[i * len(groups) // count] for i in range(count)]
    each = max(1, count // max(len(groups), 1))
    out = []
    for i, group in enumerate(groups):
        n = min(each, len(group))
        # 31 is prime to the usual counts of experts: neighbours in layers differ in expert.
        out += [group[(31 * i + j * len(group) // n) % len(group)] for j in range(n)]
    return out


def peers(modules: Sequence[Module]) -> dict[tuple[str, str, str], NDArray[np.int64]]:
    """Indices of modules that do the same in different places: role, last name and format."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for i, m in enumerate(modules):
        key = (m.role, m.name[m.name.rfind(".") + 1 :], m.kind.held)
        found.setdefault(key, []).append(i)
    return {key: np.array(at, dtype=np.int64) for key, at in found.items()}


def scan_of(survey: Survey) -> Scan:
    """The one scan of a survey, made when a rule first asks."""
    return survey.once(Scan)
