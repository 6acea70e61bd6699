"""`nybble convert`: a quantized checkpoint in another container, or as plain weights, and the
proof of it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import nybble
from nybble.check.contents import read_contents
from nybble.checkpoint.dialects import declaration_of
from nybble.checkpoint.disk import Disk
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.writer import SHARD_BYTES, refuse_inside
from nybble.errors import CheckFailed, CheckpointError, RecipeError
from nybble.kernels.dispatch import default_threads
from nybble.progress import Progress
from nybble.rewrite.conversion import TARGETS, Conversion, Rounding
from nybble.rewrite.convert import (
    make_conversion,
    refuse_inexact,
    refuse_output,
    write_conversion,
)
from nybble.rewrite.from_gguf import write_bf16_from_gguf
from nybble.rewrite.proof import Difference, Proof
from nybble.rewrite.proof_gguf import prove_from_gguf, prove_gguf
from nybble.rewrite.to_gguf import write_gguf

#: Every word that --to takes.
WORDS = (*TARGETS, "gguf")


@dataclass(frozen=True, slots=True)
class Converted:
    """What was made of a checkpoint, and the proof of it; `proof` is None after a dry run."""

    out: Path
    conversion: Conversion
    proof: Proof | None
    seconds: float
    proof_seconds: float
    threads: int

    @property
    def verdict(self) -> str:
        """The last line: how many tensors were compared, and how many values differ."""
        proof = self.proof
        if proof is None:
            return f"{len(self.conversion.outputs):,} tensors to write; nothing was written"
        target = self.conversion.target
        forced = f"by scales that {target} files cannot hold exactly (listed above)"
        forced = "rounded to BF16" if target == "bf16" else forced
        return _verdict(proof, forced)

    def as_json(self) -> dict[str, object]:
        """The JSON document `nybble.convert/1`."""
        made, proof = self.conversion, self.proof
        return {
            "schema": "nybble.convert/1",
            "source": str(made.source.path),
            "out": str(self.out),
            "dry_run": proof is None,
            "from": made.held_layout,
            "to": made.target,
            "tensors": len(made.outputs),
            "source_bytes": made.source_bytes,
            "bytes": made.payload_bytes,
            "renamed": [{"from": a.name, "to": b.name} for a, b in made.renamed],
            "retyped": [
                {
                    "name": b.name,
                    "from": {"dtype": a.dtype, "shape": list(a.shape)},
                    "to": {"dtype": b.dtype, "shape": list(b.shape)},
                }
                for a, b in made.retyped
            ],
            "decoded": len(made.decoded),
            "dropped": [{"name": d.source.name, "why": d.why} for d in made.dropped],
            "roundings": [r.as_json() for r in made.roundings],
            "may_round": list(made.may_round),
            "notes": list(made.notes),
            "seconds": self.seconds,
            "proof_seconds": self.proof_seconds,
            "threads": self.threads,
            "proof": proof and _proof_json(proof),
        }


def convert(
    checkpoint: str | PathLike[str],
    out: str | PathLike[str],
    to: str,
    *,
    exact: bool = False,
    keep_input_scales: bool = False,
    stack_experts: bool | None = None,
    generic: bool = False,
    jobs: int | None = None,
    shard_size: int = SHARD_BYTES,
    dry_run: bool = False,
    progress: Progress | None = None,
    on_conversion: Callable[[Conversion], None] | None = None,
    disk: Disk | None = None,
) -> Converted:
    """Write a local checkpoint folder anew in another container, `to` one of TARGETS.

    Every value of the result is held against the source before `out` gets its name. With `exact`,
    a target that has to round a scale or a value is refused before anything is written.
    `keep_input_scales` keeps those of weight-only modules; `stack_experts` (of BF16) None: as the
    family publishes its originals. `on_conversion` is called before the work begins.

    Raises RecipeError for a target that cannot carry what is there, CheckpointError for a source
    that is not whole or not as declared and for an output that exists, DoesNotFit for a full disk,
    CheckFailed if the proof fails.
    """
    if to not in TARGETS:
        raise RecipeError(f"unknown target {to!r}: choose one of {', '.join(TARGETS)}")
    threads, target = jobs or default_threads(), Path(out)
    refuse_inside(Path(checkpoint), target)
    clocks = [time.perf_counter()]
    with Checkpoint.open(Path(checkpoint), headers_only=dry_run) as source:
        declaration = declaration_of(source)
        made = make_conversion(
            source,
            read_contents(source, declaration),
            declaration,
            to,
            version=nybble.__version__,
            keep_input_scales=keep_input_scales,
            stack_experts=stack_experts,
            generic=generic,
        )
        if exact:
            refuse_inexact(made)
        if not dry_run:
            refuse_output(target)
        if on_conversion is not None:
            on_conversion(made)
        proof = None
        if not dry_run:
            proof = write_conversion(
                made,
                target,
                threads=threads,
                shard_bytes=shard_size,
                progress=progress,
                disk=disk,
                on_written=lambda: clocks.append(time.perf_counter()),
            )
    clocks.append(time.perf_counter())
    proved = clocks[-1] - clocks[1] if len(clocks) > 2 else 0.0
    return Converted(target, made, proof, clocks[-1] - clocks[0] - proved, proved, threads)


@dataclass(frozen=True, slots=True)
class Exported:
    """What was made to or from a GGUF file, and the proof of it."""

    source: Path
    out: Path
    target: str
    types: Mapping[str, int]
    left_out: tuple[str, ...]
    proof: Proof
    seconds: float
    proof_seconds: float
    threads: int

    @property
    def verdict(self) -> str:
        """The last line: how many tensors were compared, and how many values differ."""
        return _verdict(self.proof, "rounded by the target's types")

    def as_json(self) -> dict[str, object]:
        """The JSON document `nybble.convert/1` of such a conversion."""
        return {
            "schema": "nybble.convert/1",
            "source": str(self.source),
            "out": str(self.out),
            "dry_run": False,
            "to": self.target,
            "types": dict(self.types),
            "left_out": list(self.left_out),
            "seconds": self.seconds,
            "proof_seconds": self.proof_seconds,
            "threads": self.threads,
            "proof": _proof_json(self.proof),
        }


def to_gguf(
    checkpoint: str | PathLike[str],
    out: str | PathLike[str],
    *,
    rest: str = "bf16",
    exact: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write a local checkpoint folder, quantized or plain, as the GGUF file `out`, and prove it.

    `rest` is the type of matrices that are not four-bit: "bf16" or "q8_0". Raises what
    `rewrite.to_gguf.write_gguf` raises, CheckpointError for an output that exists, RecipeError if
    `exact` and a value was rounded, CheckFailed if the proof fails; `out` is not there then.
    """
    source, target, threads = Path(checkpoint), Path(out), jobs or default_threads()
    with _unproven(target) as work, Checkpoint.open(source) as opened:
        start = time.perf_counter()
        made = write_gguf(opened, work, rest=rest, threads=threads, progress=progress)
        written = time.perf_counter()
        contents = read_contents(opened, declaration_of(opened))
        proof = prove_gguf(opened, contents, work, threads=threads, progress=progress)
        _accept(target, proof, exact=exact)
    seconds = (written - start, time.perf_counter() - written)
    return Exported(
        source, target, "gguf", made.types, made.left_out, proof, *seconds, threads=threads
    )


def from_gguf(
    file: str | PathLike[str],
    out: str | PathLike[str],
    *,
    exact: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write the GGUF file as a Hugging Face folder `out` of BF16 weights, and prove it.

    Raises what `rewrite.from_gguf.write_bf16_from_gguf` raises, and as `to_gguf` does.
    """
    source, target, threads = Path(file), Path(out), jobs or default_threads()
    with _unproven(target) as work:
        start = time.perf_counter()
        made = write_bf16_from_gguf(source, work, threads=threads, progress=progress)
        written = time.perf_counter()
        with Checkpoint.open(work) as opened:
            proof = prove_from_gguf(source, opened, threads=threads, progress=progress)
        _accept(target, proof, exact=exact)
    seconds = (written - start, time.perf_counter() - written)
    return Exported(
        source, target, "bf16", made.types, made.left_out, proof, *seconds, threads=threads
    )


@contextmanager
def _unproven(out: Path) -> Iterator[Path]:
    """A place beside `out` that gets its name if nothing is raised, and is removed otherwise."""
    refuse_output(out)
    work = Path(os.path.abspath(out)).with_name(out.name + ".unproven")
    if os.path.lexists(work):
        raise CheckpointError(
            f"{work}: is left from a conversion that was stopped; remove it, a conversion starts "
            "from the beginning"
        )
    try:
        yield work
        os.rename(work, out)
    finally:
        for left in (work, work.with_name(work.name + ".partial")):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)


def _accept(out: Path, proof: Proof, *, exact: bool) -> None:
    if proof.problems:
        raise CheckFailed(
            f"{out}: {len(proof.problems)} faults, the first: {proof.problems[0]}; nothing is left "
            "of the result: please report it"
        )
    if exact and proof.differing:
        first = proof.differing[0]
        raise RecipeError(
            f"--exact: {proof.differing_values} values had to be rounded, in {first.name} for one; "
            "nothing is left of the result. Leave --exact out and they are listed"
        )


def _verdict(proof: Proof, forced: str) -> str:
    if not proof.differing:
        return f"{proof.tensors:,} tensors, 0 differing values"
    return (
        f"{proof.tensors:,} tensors, {proof.differing_values:,} differing values of "
        f"{proof.values:,} in {len(proof.differing):,} of them, all {forced}"
    )


def _proof_json(proof: Proof) -> dict[str, object]:
    return {
        "tensors": proof.tensors,
        "values": proof.values,
        "differing_values": proof.differing_values,
        "differing": [d.as_json() for d in proof.differing],
    }


__all__ = [
    "TARGETS",
    "WORDS",
    "Conversion",
    "Converted",
    "Difference",
    "Exported",
    "Rounding",
    "convert",
    "from_gguf",
    "to_gguf",
]
