"""Rules about weights themselves: dead modules, NaN, and files filled up with zeros."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from operator import attrgetter

import numpy as np

from nybble.check import deep
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.scales_scan import indices, scan_of
from nybble.check.survey import Survey
from nybble.checkpoint.files import open_file

#: A hole of a file that covers part of a tensor: shorter ones are padding, or rows of zeros.
HOLE_BYTES = 1 << 20
#: A plain matrix of zeros below this may be meant.
MATRIX_BYTES = 4096
#: Dead experts are few; a larger share of zeros is a file that was not filled.
MANY = 0.1


def _zero_codes(survey: Survey) -> tuple[list[int], list[int]]:
    """Quantized weights that are zeros, as far as looked at: with scales, and without."""
    codes, scan = scan_of(survey).codes, scan_of(survey)
    size = codes.column("size")
    scaled = {
        m.name
        for column in (scan.blocks, scan.vectors)
        for m, largest in zip(column.modules, column.column("largest"), strict=True)
        if largest > 0
    }
    grouped = {m.name for column in (scan.blocks, scan.vectors) for m in column.modules}
    dead: list[int] = []
    empty: list[int] = []
    unsure: list[int] = []
    for i in (i for i, m in enumerate(codes.modules) if m.name in scan.zero_codes):
        name = codes.modules[i].name
        at = scan.tops.by_module.get(name)
        has_top = at is not None and scan.tops.stored[at] != 0
        if name in scaled or (has_top and name not in grouped):
            dead.append(i)
        else:
            # Some quantizers write scale 0 for zeros: a dead expert, if its tensor scale is sound.
            (unsure if has_top and ".experts." in name else empty).append(i)
    is_many = len(unsure) > MANY * len(size)
    return (dead if is_many else dead + unsure), (empty + unsure if is_many else empty)


def _dead(survey: Survey) -> Iterator[Finding]:
    codes = scan_of(survey).codes
    dead, _ = _zero_codes(survey)
    filled = {name for name, _ in _filled_tensors(survey)}
    dead = [i for i in dead if codes.infos[i].name not in filled]
    if dead:
        names = [codes.modules[i].name for i in dead]
        experts = sum(".experts." in name for name in names)
        yield DEAD.finding(
            f"{len(names):,} modules ({codes.looked}), {experts:,} of experts, have "
            f"nothing but zeros for weights, the first {names[0]}: expected weights",
            names,
            file=codes.infos[dead[0]].file,
            count=len(names),
            experts=experts,
        )


# ------------------------------------------------------------------------------------------- zeros


def _filled_tensors(survey: Survey) -> list[tuple[str, str]]:
    """(tensor, file) of what was filled up with zeros instead of data."""
    scan = scan_of(survey)
    _, empty = _zero_codes(survey)
    found = [(scan.codes.infos[i].name, scan.codes.infos[i].file) for i in empty]
    plain = scan.plain
    size = plain.column("size")
    for i in indices((size > 0) & (plain.column("zero") == size)):
        info = plain.infos[i]
        # Biases, norms about 1 and the like may be zeros.
        if sum(d > 1 for d in info.shape) > 1 and info.nbytes >= MATRIX_BYTES:
            found.append((info.name, info.file))
    found += _zero_ends(survey)
    found += _holes(survey)
    return list(dict.fromkeys(found))


def _zero_ends(survey: Survey) -> Iterator[tuple[str, str]]:
    """The last two large tensors of a shard if both are zeros: one may be a dead expert."""
    zeros: dict[str, bool] = {}
    for column in (scan_of(survey).codes, scan_of(survey).plain, scan_of(survey).blocks):
        size = column.column("size")
        is_zero = (size > 0) & (column.column("zero") == size)
        zeros.update(zip((t.name for t in column.infos), is_zero.tolist(), strict=True))
    for file, ends in scan_of(survey).ends.items():
        if len(ends) == 2 and all(zeros.get(t.name, False) for t in ends):
            yield from ((t.name, file) for t in ends)


def _holes(survey: Survey) -> Iterator[tuple[str, str]]:
    """Tensors that lie partly in a hole of a local file: room was made, data never came."""
    folder = survey.files.local
    if folder is None:
        return
    for name, shard in survey.shards.items():
        descriptor, status = open_file(folder, name)
        try:
            holes = [(a, b) for a, b in deep.holes_of(descriptor, status) if b - a >= HOLE_BYTES]
        finally:
            os.close(descriptor)
        tensors = sorted(shard.tensors.values(), key=attrgetter("offset"))
        begins = [info.offset for info in tensors]
        # Only a tensor that a hole begins or ends in can be covered in part.
        edges = {bisect_right(begins, edge) - 1 for hole in holes for edge in hole}
        for info in (tensors[i] for i in sorted(edges) if i >= 0):
            end = info.offset + info.nbytes
            covered = sum(max(0, min(end, b) - max(info.offset, a)) for a, b in holes)
            if HOLE_BYTES <= covered < info.nbytes:
                yield info.name, name


def _filled(survey: Survey) -> Iterator[Finding]:
    found = _filled_tensors(survey)
    if not found:
        return
    files = sorted({file for _, file in found})
    codes, plain = scan_of(survey).codes, scan_of(survey).plain
    yield FILLED.finding(
        f"{len(found):,} tensors in {len(files)} of {len(survey.shards)} files are filled with "
        f"zeros (weights looked at: {codes.looked} quantized, {plain.looked} plain), the first "
        f"{found[0][0]} in {found[0][1]}: expected data",
        [name for name, _ in found],
        file=found[0][1],
        count=len(found),
        files=files,
    )


# ------------------------------------------------------------------------------------ NaN, infinite


def _not_finite(survey: Survey) -> Iterator[Finding]:
    for column, what in ((scan_of(survey).plain, "plain"), (scan_of(survey).codes, "FP8")):
        if what == "FP8":
            meant = np.array([t.dtype == "F8_E4M3" for t in column.infos], dtype=bool)
        else:
            meant = np.ones(len(column.infos), dtype=bool)
        wrong = column.column("nan") + column.column("inf")
        bad = indices(meant & (wrong > 0))
        if len(bad):
            first = bad[0]
            yield NOT_FINITE.finding(
                f"{len(bad):,} {what} weights ({column.looked}) hold NaN or infinity, "
                f"the first {column.infos[first].name} with {int(wrong[first]):,} in "
                f"{int(column.column('size')[first]):,} values: expected finite ones",
                [column.infos[i].name for i in bad],
                file=column.infos[first].file,
                count=len(bad),
                values=int(wrong[bad].sum()),
            )


_VALUES = frozenset({"values"})
_TRUNCATED = "https://github.com/osaurus-ai/vmlx-swift/issues/217"

DEAD = Rule(
    "NB214",
    "dead-module",
    Severity.WARNING,
    "A quantized module has nothing but zeros for weights",
    "All codes are zero under sound scales: the module answers 0 to everything. An expert like "
    "that was lost on the way, or was dead in the source; which, only the source can tell. "
    "Tokens that route to it lose a share of their answer.",
    "Compare with `--source`; requantize the module if the source has weights there.",
    _dead,
    ("https://github.com/flashinfer-ai/flashinfer/issues/3592",),
    needs=_VALUES,
)
NOT_FINITE = Rule(
    "NB217",
    "weights-not-finite",
    Severity.ERROR,
    "Weights are NaN or infinite",
    "One such value in an embedding, a norm or a projection makes NaN of everything that it "
    "touches. It comes from a broken download, an overflow in a conversion to F16, or the source "
    "itself. Without --deep only pieces are looked at.",
    "Compare with the source; download or convert again.",
    _not_finite,
    needs=_VALUES,
)
FILLED = Rule(
    "NB221",
    "filled-with-zeros",
    Severity.ERROR,
    "Tensors are filled with zeros instead of data",
    "An interrupted download leaves a file of the full size whose end, or all of it, was never "
    "written: it reads as zeros, headers are fine, and it loads. Eight of 102 shards were like "
    "that in one report, and answers were gibberish on every fifth start. Found by tensors of "
    "zeros whose scales are zeros too, matrices of zeros, zeros at the end of a shard, and holes "
    "in the file that cover part of a tensor.",
    "Download the files named again, and compare their hashes.",
    _filled,
    (_TRUNCATED,),
    needs=_VALUES,
)

RULES = (DEAD, NOT_FINITE, FILLED)
