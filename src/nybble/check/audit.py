"""The self-audit: a written checkpoint, opened afresh, held against its plan and its source.

Names, dtypes, shapes and bytes; scales finite and positive; fused members with one tensor scale and
one input scale; copies byte for byte; and the error of every quantized weight, decoded from the
file. Nothing of the run that wrote it is trusted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, log10
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.reader import Checkpoint
from nybble.errors import CheckFailed
from nybble.formats.block import FP8_BLOCK, FP8_CHANNEL, MXFP4, NVFP4
from nybble.formats.element import F32Array
from nybble.formats.tensor import BlockScaledTensor
from nybble.kernels import block_quantize
from nybble.plan.jobs import Job, Member
from nybble.plan.plan import Plan
from nybble.progress import Progress

CHUNK = 64 << 20
#: Signal to noise below which a module's codes cannot have come from its weights. The worst seen of
#: any search: NVFP4 and MXFP4 above 18 dB, FP8 above 31.
FLOOR_DB = 10.0
#: Mean square below which weights vanish in any four-bit format and the ratio says nothing.
VANISHING = 1e-60


@dataclass
class RoleError:
    """Squared error and energy of the weights of one role and scheme."""

    role: str
    scheme: str
    modules: int = 0
    error: float = 0.0
    energy: float = 0.0
    worst_db: float = inf
    worst_module: str = ""

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise, decibel."""
        return decibel(self.energy, self.error)


@dataclass
class Audit:
    """What the audit found. `problems` empty means that the file is what was planned."""

    tensors: int = 0
    payload_bytes: int = 0
    copied: int = 0
    copied_by_role: dict[str, int] = field(default_factory=dict)
    errors: list[RoleError] = field(default_factory=list)
    all_zero: list[str] = field(default_factory=list)  # modules whose source is zeros alone
    input_scales: int = 0  # modules whose stored input_scale was looked at
    problems: list[str] = field(default_factory=list)

    @property
    def sqnr_db(self) -> float:
        """Over all quantized weights."""
        return decibel(sum(e.energy for e in self.errors), sum(e.error for e in self.errors))


def decibel(energy: float, error: float) -> float:
    """10 log10(energy / error); infinite without error, minus infinity where it is not finite."""
    if not isfinite(error):
        return -inf
    return 10 * log10(energy / error) if error > 0 and energy > 0 else inf


def audit(
    plan: Plan,
    out: Path,
    *,
    threads: int,
    progress: Progress,
    input_scales: Mapping[str, float] | None = None,
) -> Audit:
    """Open `out` and hold it against the plan and the source.

    `input_scales` by module are what the file must hold; None where they are not known any more:
    they must be finite, positive and equal in fused groups then. Raises CheckFailed with the first
    problems found.
    """
    found = Audit()
    with Checkpoint.open(out) as written:
        _check_names(plan, written, found)
        if not found.problems:
            total = sum(t.nbytes for t in plan.checkpoint.tensors.values())
            progress.stage("verify", total)
            _check_copies(plan, written, found, progress)
            for job in plan.jobs:
                if job.scheme.needs_input_scale:
                    _check_input_scales(plan, written, job, input_scales, found)
            _check_jobs(plan, written, found, threads, progress)
    if found.problems:
        raise CheckFailed(
            f"{out}: what was written is not what was planned: {'; '.join(found.problems[:5])}"
            f"{f' (and {len(found.problems) - 5} more)' if len(found.problems) > 5 else ''}. "
            "Do not use this folder, and please report it"
        )
    return found


def _check_names(plan: Plan, written: Checkpoint, found: Audit) -> None:
    planned = {s.name: s for s in plan.outputs}
    for name in sorted(planned.keys() - written.tensors.keys()):
        found.problems.append(f"tensor {name} is missing")
    for name in sorted(written.tensors.keys() - planned.keys()):
        found.problems.append(f"tensor {name} was not planned")
    for name, info in written.tensors.items():
        spec = planned.get(name)
        if spec is not None and (spec.dtype, spec.shape) != (info.dtype, info.shape):
            found.problems.append(
                f"tensor {name}: planned {spec.dtype} {list(spec.shape)}, found {info.dtype} "
                f"{list(info.shape)}"
            )
    found.tensors = len(written.tensors)
    found.payload_bytes = sum(t.nbytes for t in written.tensors.values())
    if found.payload_bytes != plan.payload_bytes:
        found.problems.append(f"planned {plan.payload_bytes} bytes, found {found.payload_bytes}")


def _check_copies(plan: Plan, written: Checkpoint, found: Audit, progress: Progress) -> None:
    for copy in plan.copies:
        name = copy.tensor.name
        before, after = plan.checkpoint.raw(name), written.raw(name)
        same = all(
            np.array_equal(before[at : at + CHUNK], after[at : at + CHUNK])
            for at in range(0, len(before), CHUNK)
        )
        if not same:
            found.problems.append(f"tensor {name} differs from its source")
        found.copied += 1
        found.copied_by_role[copy.role] = found.copied_by_role.get(copy.role, 0) + 1
        plan.checkpoint.drop_pages(name)
        written.drop_pages(name)
        progress.advance(len(before), name)


def _check_input_scales(
    plan: Plan,
    written: Checkpoint,
    job: Job,
    given: Mapping[str, float] | None,
    found: Audit,
) -> None:
    values = set()
    for m in job.members:
        leaf = next(x for x in plan.leaves(job.scheme, m.shape) if x.part == "input_scale")
        stored = written.array(f"{m.module}.{leaf.suffix}")
        value = float(plan.layout.load(leaf, stored))
        values.add(value)
        found.input_scales += 1
        if not (isfinite(value) and value > 0):
            found.problems.append(f"{m.module}: its input scale is not finite and positive")
        elif given is not None:
            # What this container makes of the value: a divisor, or BF16.
            expected = plan.layout.store(leaf, np.asarray(given[m.module], dtype=np.float32))
            if stored.tobytes() != expected.tobytes():
                wanted = float(plan.layout.load(leaf, expected))
                found.problems.append(
                    f"{m.module}: holds an input scale of {value:g}, measured was {wanted:g}"
                )
    if len(values) > 1:
        found.problems.append(f"{job.name}: its members have different input scales")


def _check_jobs(
    plan: Plan, written: Checkpoint, found: Audit, threads: int, progress: Progress
) -> None:
    roles: dict[tuple[str, str], RoleError] = {}
    for jobs in _together(plan):
        for job, member, error, energy in _compare(plan, written, jobs, found, threads):
            row = roles.setdefault(
                (job.role, job.scheme.name), RoleError(job.role, job.scheme.name)
            )
            row.modules += 1
            row.error += error
            row.energy += energy
            if not isfinite(error):
                found.problems.append(f"{member.module}: decodes to values that are not finite")
            db = decibel(energy, error)
            n, k = member.shape
            if energy == 0:
                found.all_zero.append(member.module)
            if db < FLOOR_DB and energy > n * k * VANISHING:
                found.problems.append(
                    f"{member.module}: decodes to {db:.1f} dB of its source, less than any scale "
                    "choice explains"
                )
            if db < row.worst_db:
                row.worst_db, row.worst_module = db, member.module
            width = plan.checkpoint.array(member.source).itemsize
            progress.advance(member.shape[0] * member.shape[1] * width, member.module)
        for name in {m.source for job in jobs for m in job.members}:
            plan.checkpoint.drop_pages(name)
    found.errors = list(roles.values())


def _together(plan: Plan) -> Iterator[list[Job]]:
    """Jobs in batches of about CHUNK source bytes: one kernel call each."""
    batch: list[Job] = []
    size = 0
    for job in plan.jobs:
        batch.append(job)
        size += sum(m.shape[0] * m.shape[1] for m in job.members)
        if size >= CHUNK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _compare(
    plan: Plan, written: Checkpoint, jobs: Sequence[Job], found: Audit, threads: int
) -> Iterator[tuple[Job, Member, float, float]]:
    """Decode each member from the file and hold it against its source."""
    simple: dict[tuple[str, str], list[tuple[Job, Member, NDArray[np.generic]]]] = {}
    for job in jobs:
        tops = [_scale(plan, written, job, m) for m in job.members]
        _check_scales(job, tops, found)
        for m in job.members:
            matrix = m.matrix(plan.checkpoint)
            simple.setdefault((job.scheme.name, str(matrix.dtype)), []).append((job, m, matrix))
    for group in simple.values():
        fmt = group[0][0].scheme.weight
        assert fmt is not None
        if fmt is FP8_CHANNEL:
            for job, m, matrix in group:
                codes = _parts(plan, written, job, m)[0].reshape(m.shape)
                rows = _scale(plan, written, job, m).reshape(-1)
                (sums,) = block_quantize.compare(matrix, fmt, rows, codes, [], threads)
                yield job, m, sums.error, sums.energy
            continue
        if fmt is FP8_BLOCK:
            yield from (_compare_fp8_blocks(plan, written, *one) for one in group)
            continue
        parts = [_parts(plan, written, job, m) for job, m, _ in group]
        top = np.array([_scale(plan, written, job, m) for job, m, _ in group], dtype=np.float32)
        compared = block_quantize.compare(
            [matrix for *_, matrix in group],
            fmt,
            top.reshape(len(group)),
            [codes for codes, _ in parts],
            [blocks for _, blocks in parts],
            threads,
        )
        for (job, m, _), result in zip(group, compared, strict=True):
            if result.bad_scales:
                found.problems.append(
                    f"{m.module}: {result.bad_scales} block scales are zero, negative or NaN"
                )
            yield job, m, result.error, result.energy


def _parts(
    plan: Plan, written: Checkpoint, job: Job, member: Member
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The bytes of codes and of block scales in the file."""
    raw = {
        leaf.part: written.raw(f"{member.module}.{leaf.suffix}")
        for leaf in plan.leaves(job.scheme, member.shape)
    }
    return raw["codes"], raw.get("scale", np.empty(0, dtype=np.uint8))


def _scale(plan: Plan, written: Checkpoint, job: Job, member: Member) -> F32Array:
    """The multiplying scale in float32: tensor scale of NVFP4, scales of FP8; ones where the format
    has none."""
    for leaf in plan.leaves(job.scheme, member.shape):
        if leaf.part == "tensor_scale":
            return plan.layout.load(leaf, written.array(f"{member.module}.{leaf.suffix}"))
    return np.ones((), dtype=np.float32)


def _check_scales(job: Job, scales: Sequence[F32Array], found: Audit) -> None:
    for m, scale in zip(job.members, scales, strict=True):
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            found.problems.append(f"{m.module}: a scale is not finite and positive")
    if job.scheme.weight in (NVFP4, MXFP4) and len({float(s) for s in scales}) > 1:
        found.problems.append(f"{job.name}: its members have different tensor scales")


def _compare_fp8_blocks(
    plan: Plan, written: Checkpoint, job: Job, member: Member, matrix: NDArray[np.generic]
) -> tuple[Job, Member, float, float]:
    """Blocks of two dimensions: decoded by the definition, some rows at a time."""
    fmt = job.scheme.weight
    assert fmt is not None
    codes, _ = _parts(plan, written, job, member)
    n, k = member.shape
    scale = _scale(plan, written, job, member).reshape(fmt.scale_shape(member.shape))
    error = energy = 0.0
    step = max(128, (4 << 20) // k // 128 * 128)
    height = fmt.block[0]
    for first in range(0, n, step):
        last = min(first + step, n)
        part = BlockScaledTensor(
            fmt,
            (last - first, k),
            codes[first * k : last * k].reshape(last - first, k),
            scale[first // height : -(-last // height)],
            None,
        )
        x = matrix[first:last].astype(np.float32)
        d = (x - part.dequantize()).astype(np.float64)
        error += float((d * d).sum())
        energy += float((x.astype(np.float64) ** 2).sum())
    return job, member, error, energy
