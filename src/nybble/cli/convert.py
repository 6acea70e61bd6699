"""`nybble convert`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli.output import JsonFlag, OutputFormat, wants_json
from nybble.cli.plan import Generic

if TYPE_CHECKING:
    from nybble.api.convert import Conversion, Converted, Exported
    from nybble.rewrite.conversion import Decoded
    from nybble.rewrite.proof import Proof

_SHOWN = 10
_LAYOUTS = ("modelopt", "compressed-tensors")


def command(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="A local checkpoint folder, or a .gguf file.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder, or .gguf file, to make.")],
    to: Annotated[str, typer.Option("--to", help="modelopt, compressed-tensors, gguf or bf16.")],
    exact: Annotated[
        bool, typer.Option("--exact", help="Refuse if any scale or value has to be rounded.")
    ] = False,
    keep_input_scales: Annotated[
        bool,
        typer.Option("--keep-input-scales", help="Keep input scales of weight-only modules."),
    ] = False,
    stack_experts: Annotated[
        bool | None,
        typer.Option(
            "--stack-experts/--no-stack-experts",
            help="BF16 experts as 3-D stacks or apart; default: as the original model has them.",
        ),
    ] = None,
    rest: Annotated[
        str | None,
        typer.Option("--rest", help="GGUF type of what is not four-bit: bf16 (default) or q8_0."),
    ] = None,
    generic: Generic = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Threads; default: all processors.")
    ] = None,
    shard_size: Annotated[
        str, typer.Option("--shard-size", help="Payload of a shard, decimal: 500MB, 5GB.")
    ] = "10GB",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would change and write nothing.")
    ] = False,
    json: JsonFlag = False,
    output_format: OutputFormat = "text",
) -> None:
    """Write a checkpoint in another container, as plain BF16 or as GGUF, and prove it.

    Codes and block scales go over byte for byte. The last line says how many values differ, after
    both sides were decoded by separate code. Exit code 3 if the proof fails; no OUT then.
    """
    from nybble.api.convert import WORDS, Exported, convert, from_gguf, to_gguf
    from nybble.cli.output import parse_bytes, write_json
    from nybble.progress import Display

    if to not in WORDS:
        raise typer.BadParameter(f"{to!r}; choose one of {', '.join(WORDS)}", param_hint="--to")
    as_json, shard_bytes = wants_json(json, output_format), parse_bytes(shard_size)
    is_file = checkpoint.suffix == ".gguf" and not checkpoint.is_dir()
    _refuse_words(
        "from a GGUF file" if is_file else f"--to {to}",
        {
            "--to (only bf16)": is_file and to != "bf16",
            "--rest": rest is not None and to != "gguf",
            "--keep-input-scales": keep_input_scales and to not in _LAYOUTS,
            "--stack-experts": stack_experts is not None and (to != "bf16" or is_file),
            "--generic": generic and to not in _LAYOUTS,
            "--dry-run": dry_run and (to == "gguf" or is_file),
        },
    )
    with Display() as progress:
        result: Converted | Exported
        if is_file:
            result = from_gguf(checkpoint, out, exact=exact, jobs=jobs, progress=progress)
        elif to == "gguf":
            result = to_gguf(
                checkpoint, out, rest=rest or "bf16", exact=exact, jobs=jobs, progress=progress
            )
        else:
            result = convert(
                checkpoint,
                out,
                to,
                exact=exact,
                keep_input_scales=keep_input_scales,
                stack_experts=stack_experts,
                generic=generic,
                jobs=jobs,
                shard_size=shard_bytes,
                dry_run=dry_run,
                progress=progress,
            )
    if as_json:
        write_json(result.as_json())
    else:
        sys.stdout.write(_exported(result) if isinstance(result, Exported) else render(result))


def _refuse_words(what: str, given: Mapping[str, bool]) -> None:
    for option, is_idle in given.items():
        if is_idle:
            raise typer.BadParameter(f"{option} has no effect {what}", param_hint=option)


def _exported(result: Exported) -> str:
    """What was made to or from a GGUF file, as text; the last line is the proof."""
    from nybble.cli.inspect import printable
    from nybble.cli.output import labelled

    types = ", ".join(f"{count:,} {name}" for name, count in result.types.items())
    lines = [
        f"{'source':<13}{result.source}",
        f"{'result':<13}{result.out}",
        f"{'types':<13}{types} tensors in the GGUF file",
        *(labelled("left out", line) for line in result.left_out),
        *_some(_differing(result.proof)),
        f"{'time':<13}converted in {result.seconds:.1f} s, proven in {result.proof_seconds:.1f} s, "
        f"{result.threads} threads",
        result.verdict,
    ]
    return printable("\n".join(lines)) + "\n"


def render(result: Converted) -> str:
    """What was done, as text; the last line is the proof."""
    from nybble.cli.inspect import printable
    from nybble.cli.output import amount, labelled

    made = result.conversion
    lines = [
        f"{'source':<13}{made.source.path}: {len(made.source.tensors):,} tensors, "
        f"{amount(made.source_bytes)}, {made.held_layout or 'no declaration'}",
        f"{'result':<13}{result.out}: {len(made.outputs):,} tensors, "
        f"{amount(made.payload_bytes)}, {made.target}",
        *_changes(made),
        *(labelled("note", note) for note in made.notes),
        *_rounded(result),
    ]
    if result.proof is not None:
        lines.append(
            f"{'time':<13}converted in {result.seconds:.1f} s, proven in "
            f"{result.proof_seconds:.1f} s, {result.threads} threads"
        )
    return printable("\n".join([*lines, result.verdict])) + "\n"


def _changes(made: Conversion) -> list[str]:
    """Kinds of tensors that are renamed, retyped, decoded or left out: one line for each."""
    rows = [
        *(("renamed", a.name, f" -> {b.name.rpartition('.')[2]}") for a, b in made.renamed),
        *(
            ("retyped", b.name, f": {_spell(a.dtype, a.shape)} -> {_spell(b.dtype, b.shape)}")
            for a, b in made.retyped
        ),
        *(("decoded", *_decoded(each)) for each in made.decoded),
        *(("left out", d.source.name, f": {d.why}") for d in made.dropped),
    ]
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for label, name, text in rows:
        kinds.setdefault((label, name.rpartition(".")[2], text), []).append(name)
    return [
        f"{label:<13}" + (names[0] if len(names) == 1 else f"{len(names):,} x ...{leaf}") + text
        for (label, leaf, text), names in kinds.items()
    ]


def _spell(dtype: str, shape: Sequence[int]) -> str:
    # Extents of matrices differ from module to module; a kind of change has one line.
    return f"{dtype} {list(shape) if len(shape) < 2 else f'{len(shape)}-D'}"


def _decoded(each: Decoded) -> tuple[str, str]:
    from nybble.checkpoint.safetensors import TensorInfo

    leaf = each.name.rpartition(".")[2]
    if isinstance(each.source, TensorInfo):
        return each.source.name, f": plain, into {leaf}"
    return f"{each.source.name}", f": {each.source.format} -> BF16 {leaf}"


def _rounded(result: Converted) -> list[str]:
    """The exact list of what differs, shortened; --json has all of it."""
    made, proof = result.conversion, result.proof
    lines = [
        f"{'rounded':<13}{r.name}: {r.part} {r.before:.9g} -> {r.after:.9g}"
        + (f" (the worst of {r.scales:,})" if r.scales > 1 else "")
        for r in made.roundings
    ]
    if proof is not None:
        return _some(lines) + _some(_differing(proof))
    may = "products may need more bits than BF16 has"
    return _some(lines) + _some([f"{'may round':<13}{name}: {may}" for name in made.may_round])


def _differing(proof: Proof) -> list[str]:
    return [
        f"{'differing':<13}{d.name}: {d.values:,} of {d.of:,} values, by a share of "
        f"{d.largest:.2g} at most"
        for d in proof.differing
        if d.part == "weight"
    ]


def _some(lines: Sequence[str]) -> list[str]:
    if len(lines) <= _SHOWN:
        return list(lines)
    return [*lines[:_SHOWN], f"{'':<13}and {len(lines) - _SHOWN:,} more; --json names them all"]
