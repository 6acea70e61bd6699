"""Scales of whole jobs, before any code is made: tensor scales of NVFP4, scales of FP8.

The amax pass reads every weight once, so it is also where NaN and infinities are found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.layout import Layout
from nybble.errors import FormatError
from nybble.formats import search as definition
from nybble.formats.block import FP8, FP8_BLOCK, FP8_CHANNEL, NVFP4
from nybble.formats.element import F32Array
from nybble.formats.search import Search
from nybble.kernels import block_quantize
from nybble.plan.jobs import Job, Member

Matrix = NDArray[np.generic]

#: Rows that are widened to float32 at once; whole blocks of 128.
STRIP_ROWS = 1024


def job_scales(
    jobs: Sequence[Job],
    matrices: Mapping[str, Matrix],
    layout: Layout,
    search: Search,
    threads: int,
) -> dict[str, F32Array]:
    """The scales of each module, as the layout can store them; members of a job share theirs.

    NVFP4 and FP8 per tensor: 0-d. FP8 per channel: [N, 1]. FP8 in blocks: [rows, columns] of
    blocks. Raises FormatError for a value that is not finite, naming tensor and index.
    """
    members = [m for job in jobs for m in job.members]
    peaks = block_quantize.amax([matrices[m.module] for m in members], threads)
    amax = {m.module: peak for m, peak in zip(members, peaks, strict=True)}
    for m in members:
        if not np.isfinite(amax[m.module]):
            raise _not_finite(m, matrices[m.module])
    scales: dict[str, F32Array] = {}
    for job in jobs:
        fmt = job.scheme.weight
        assert fmt is not None
        shared = max(amax[m.module] for m in job.members)
        for m in job.members:
            # ModelOpt keeps one FP8 scale per member; engines requantise those to one.
            own = fmt is FP8 and search == "absmax"
            peak = np.asarray(amax[m.module] if own else shared, dtype=np.float32)
            if fmt is FP8_CHANNEL:
                peak = block_quantize.amax(matrices[m.module], threads)[:, None]
            elif fmt is FP8_BLOCK:
                strips = strips_of(matrices[m.module])
                peak = np.concatenate([definition.block_amax(s, fmt) for s in strips])
            scale = definition.tensor_scale(peak, fmt, search)
            scales[m.module] = scale if fmt is NVFP4 else layout.round_scales(scale)
    return scales


def strips_of(matrix: Matrix) -> Iterator[F32Array]:
    """The matrix in float32, some rows at a time."""
    for first in range(0, matrix.shape[0], STRIP_ROWS):
        yield matrix[first : first + STRIP_ROWS].astype(np.float32)


def _not_finite(member: Member, matrix: Matrix) -> FormatError:
    row, column = next(
        (at * STRIP_ROWS + int(bad[0][0]), int(bad[0][1]))
        for at, strip in enumerate(strips_of(matrix))
        if len(bad := np.argwhere(~np.isfinite(strip)))
    )
    expert = [] if member.expert is None else [member.expert]
    return FormatError(
        f"tensor {member.source}: value {float(matrix[row, column])} at index "
        f"{[*expert, member.first_row + row, column]} is not finite; no scale can hold it, and the "
        "model computes nothing with it. Mend the source, or keep this tensor out of the recipe"
    )
