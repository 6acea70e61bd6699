"""The data-free search with its result in memory: what a run would write of some jobs.

For who needs the tensors before they are written (a layer that is computed with them). The same
kernels, scales and tiles as `run.py`, so the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nybble.formats.element import F32Array, U8Array
from nybble.formats.search import Search
from nybble.formats.tensor import BlockScaledTensor
from nybble.plan.jobs import Job, Member
from nybble.plan.plan import Plan
from nybble.quantize.scales import job_scales
from nybble.quantize.tiles import batches, fill, tiles


def searched(
    plan: Plan, jobs: Sequence[Job], search: Search, threads: int
) -> dict[str, BlockScaledTensor]:
    """The tensors of every module of the jobs, which are all of one scheme.

    Raises FormatError for a value that is not finite, naming tensor and index.
    """
    found: dict[str, BlockScaledTensor] = {}
    for batch in batches(plan, jobs):
        matrices = {m.module: m.matrix(plan.checkpoint) for j in batch for m in j.members}
        scales = job_scales(batch, matrices, plan.layout, search, threads)
        for job in batch:
            for m in job.members:
                found[m.module] = _empty(job, m, scales[m.module])
        for tile in tiles(plan, batch, matrices):
            buffer = np.empty(sum(p.code_bytes + p.scale_bytes for p in tile), np.uint8)
            codes, blocks = fill(
                tile,
                scales,
                search,
                buffer,
                threads,
                bf16_quotient=search == "absmax" and plan.layout.name == "modelopt",
            )
            for p in tile:
                tensor = found[p.member.module]
                codes = _put(tensor.codes, p.first, p.last, codes, p.code_bytes)
                if p.scale_bytes:
                    blocks = _put(
                        tensor.scale.view(np.uint8), p.first, p.last, blocks, p.scale_bytes
                    )
    return found


def _empty(job: Job, member: Member, scale: F32Array) -> BlockScaledTensor:
    """Room for codes and block scales; FP8 has its scales already."""
    fmt, shape = job.scheme.weight, member.shape
    assert fmt is not None
    codes = np.empty(fmt.codes_shape(shape), np.uint8)
    if not fmt.is_packed:
        return BlockScaledTensor(fmt, shape, codes, scale.reshape(fmt.scale_shape(shape)), None)
    top = np.asarray(scale, dtype=np.float32) if fmt.has_tensor_scale else None
    return BlockScaledTensor(fmt, shape, codes, np.empty(fmt.scale_shape(shape), np.uint8), top)


def _put(array: U8Array, first: int, last: int, data: U8Array, size: int) -> U8Array:
    """The next `size` bytes of `data` as rows of an array; what is left of it."""
    array[first:last] = data[:size].reshape(last - first, -1)
    return data[size:]
