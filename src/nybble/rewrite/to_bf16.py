"""A quantized checkpoint as plain BF16 weights: what there is to read, for tools that know no
format.

Every matrix is decoded by `kernels/block_decode`, as `formats/tensor.py` defines. The products are
exact in BF16 where the tensor scale is a power of two; others are rounded to the nearest, and
counted by the proof. Needs no scheme and no agreement of the configuration: only tensors that are
whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nybble.check.contents import Contents
from nybble.checkpoint.declaration import Declaration
from nybble.checkpoint.modelopt import dump
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.safetensors import TensorInfo, TensorSpec
from nybble.errors import CheckpointError, FormatError, ModelError, RecipeError
from nybble.families import find_family
from nybble.formats.element import F32
from nybble.formats.tensor import BlockScaledTensor
from nybble.kernels import value_scan
from nybble.rewrite.conversion import Conversion, Decoded, Dropped, Move
from nybble.rewrite.held import Weight, plain_tensors, read_weights
from nybble.rewrite.to_layout import without_quantization

U16Array = NDArray[np.uint16]

_expert = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight").fullmatch
_STACKS = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
}


def convert_to_bf16(
    checkpoint: Checkpoint,
    contents: Contents,
    declaration: Declaration,
    *,
    stack_experts: bool | None = None,
) -> Conversion:
    """Decide what every tensor becomes as plain weights.

    `stack_experts` None: as the family publishes its originals. Raises CheckpointError for modules
    that are not whole, experts that do not stack, FormatError for float scales that are not
    finite, and RecipeError where nothing is quantized.
    """
    weights = read_weights(contents)
    if not weights:
        raise RecipeError(
            f"{checkpoint.path}: holds no quantized weight, so there is nothing to decode; it is "
            "plain already"
        )
    has_data = all(shard.has_data for shard in checkpoint.shards)
    if has_data:
        for weight in weights:
            _refuse_unusable(weight, checkpoint)
    stacks = {} if stack_experts is False else _stacks(checkpoint, weights, stack_experts)
    outputs, moves, decoded = _draft(checkpoint, contents, weights, stacks)
    dropped = [
        *(Dropped(w.input_scale, "the input is not quantized") for w in weights if w.input_scale),
        *(Dropped(t, "the KV cache is not quantized") for t in contents.kv_scales),
    ]
    made = Conversion(
        checkpoint,
        declaration.layout,
        "bf16",
        tuple(weights),
        tuple(outputs),
        tuple(moves),
        (),
        tuple(decoded),
        tuple(dropped),
        (),
        tuple(w.name for w in weights if may_round(w, checkpoint)) if has_data else (),
        tuple(_notes(declaration, contents, dropped, stacks)),
        {"config.json": dump(without_quantization(checkpoint.config))},
        sum(m.kind.parameters for m in contents.modules if m.role != "mtp"),
    )
    made.check_complete()
    return made


def may_round(weight: Weight, checkpoint: Checkpoint) -> bool:
    """Whether a product of this matrix's codes and scales can be no BF16 number.

    A code of E2M1 has two significant bits, a scale or code of E4M3 four, BF16 eight: a float scale
    may bring two, or four, more.
    """
    scales = weight.multiplier(checkpoint)
    if scales is None:
        return False
    room = 4 if weight.format.scale is F32 else 2
    mantissa = np.frexp(scales)[0] * np.float32(1 << room)
    return not bool((mantissa == np.floor(mantissa)).all() and np.isfinite(scales).all())


# ---------------------------------------------------------------------- what decodes to no weights


def _refuse_unusable(weight: Weight, checkpoint: Checkpoint) -> None:
    """Raise FormatError for float scales that are NaN or infinite, or divide by 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scales = weight.multiplier(checkpoint)
    if scales is None or np.isfinite(scales).all():
        return
    assert weight.float_scale is not None
    stored = checkpoint.array(weight.float_scale.name).reshape(-1)
    first = int(np.argmin(np.isfinite(scales).reshape(-1)))
    raise FormatError(
        f"{weight.float_scale.name}: {int((~np.isfinite(scales)).sum())} of {scales.size} scales "
        f"make no finite weights, the first is {float(stored[first]):g} (number {first}); "
        f"{_BEFORE_DECODING}"
    )


def refuse_nan(weight: Weight, rows: BlockScaledTensor) -> None:
    """Raise FormatError if block scales or FP8 codes of these rows are NaN: decoding would make
    weights of them that nobody finds again. One pass over their bytes."""
    for info, data in ((weight.scale, rows.scale), (weight.codes, rows.codes)):
        kind = _NAN_KINDS.get(info.dtype)
        if kind is None or (info is weight.codes and weight.format.is_packed):
            continue
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        (counts,) = value_scan.scan(raw, [(0, raw.size, kind)])
        if counts["nan"]:
            what = "block scales" if info is weight.scale else "codes"
            raise FormatError(
                f"{info.name}: {int(counts['nan']):,} {what} of the rows looked at are NaN, and so "
                f"would be their weights; {_BEFORE_DECODING}"
            )


#: Bytes that may be NaN, as value_scan names them. U8 holds E8M0 where it holds scales.
_NAN_KINDS = {"F8_E4M3": "e4m3", "F8_E8M0": "e8m0", "U8": "e8m0"}
_BEFORE_DECODING = (
    "nothing was converted: find them with `nybble check --deep`, and mend or quantize again"
)


# -------------------------------------------------------------------------------------- the tensors


_Stack = dict[int, str]  # expert -> its tensor of one projection


def _stacks(
    checkpoint: Checkpoint, weights: Sequence[Weight], asked: bool | None
) -> dict[str, dict[str, _Stack]]:
    """container -> projection -> expert -> tensor name, of the containers with quantized experts.

    Empty where experts stay apart.
    """
    try:
        family = find_family(checkpoint.config)
    except ModelError:
        if asked:
            raise
        return {}
    published = next((c.layout for c in family.claims if c.layout), "")
    if not asked and published != "stacked":
        return {}
    names = [f"{w.name}.weight" for w in weights]
    containers = {found[1] for found in map(_expert, names) if found}
    stacks: dict[str, dict[str, _Stack]] = {}
    for name in dict.fromkeys((*names, *checkpoint.tensors)):
        found = _expert(name)
        if found and found[1] in containers:
            by_part = stacks.setdefault(found[1], {part: {} for part in _STACKS})
            by_part[found[3]][int(found[2])] = name
    experts = family.dimensions(checkpoint.config).experts
    for container, by_part in stacks.items():
        for part, found_experts in by_part.items():
            absent = [e for e in range(experts) if e not in found_experts]
            if absent or len(found_experts) != experts:
                raise CheckpointError(
                    f"{container}: {part} is there for {len(found_experts)} experts, config.json "
                    f"says {experts}{f', {absent[0]} is missing' if absent else ''}; a stack needs "
                    "all of them. --no-stack-experts leaves them apart"
                )
    return stacks


def _draft(
    checkpoint: Checkpoint,
    contents: Contents,
    weights: Sequence[Weight],
    stacks: Mapping[str, Mapping[str, _Stack]],
) -> tuple[list[TensorSpec], list[Move], list[Decoded]]:
    by_part = {t.name: w for w in weights for t in w.tensors}
    plain = {t.name for t in plain_tensors(checkpoint, contents, weights)}
    sources: dict[str, Weight | TensorInfo] = {f"{w.name}.weight": w for w in weights}
    outputs: list[TensorSpec] = []
    moves: list[Move] = []
    decoded: list[Decoded] = []
    done: set[str] = set()
    for name, tensor in checkpoint.tensors.items():
        if name not in by_part and name not in plain:
            continue
        own = f"{by_part[name].name}.weight" if name in by_part else name
        if own in done:
            continue
        done.add(own)
        found = _expert(own)
        if found and found[1] in stacks:
            stack = f"{found[1]}.{_STACKS[found[3]][0]}"
            if stack not in done:
                done.add(stack)
                pieces = list(_stacked(checkpoint, stacks[found[1]], sources, stack))
                decoded += pieces
                outputs.append(_stack_spec(stack, pieces))
        elif name in plain:
            sources.setdefault(name, tensor)
            moves.append(Move(tensor, tensor.spec))
            outputs.append(tensor.spec)
        else:
            decoded.append(Decoded(by_part[name], own, 0))
            outputs.append(TensorSpec(own, "BF16", by_part[name].shape))
    return outputs, moves, decoded


def _stacked(
    checkpoint: Checkpoint,
    parts: Mapping[str, _Stack],
    sources: Mapping[str, Weight | TensorInfo],
    stack: str,
) -> Iterator[Decoded]:
    """The matrices of one stack in the order of its rows: per expert gate, then up."""
    wanted = [part for part, (name, _) in _STACKS.items() if stack.endswith(f".{name}")]
    row = 0
    shapes: set[tuple[int, ...]] = set()
    for expert in sorted(parts[wanted[0]]):
        for part in wanted:
            name = parts[part][expert]
            source = sources.get(name) or checkpoint.tensors[name]
            if isinstance(source, TensorInfo) and source.dtype != "BF16":
                raise CheckpointError(
                    f"{name}: is {source.dtype} among quantized experts; a stack has one dtype. "
                    "--no-stack-experts leaves them apart"
                )
            shapes.add(source.shape)
            yield Decoded(source, stack, row)
            row += source.shape[0]
    if len(shapes) > 1:
        raise CheckpointError(
            f"{stack}: its matrices have the shapes {sorted(shapes)} and do not stack; "
            "--no-stack-experts leaves them apart"
        )


def _stack_spec(stack: str, pieces: Sequence[Decoded]) -> TensorSpec:
    n, k = pieces[0].source.shape
    each = 2 if stack.endswith("gate_up_proj") else 1
    return TensorSpec(stack, "BF16", (len(pieces) // each, each * n, k))


def _notes(
    declaration: Declaration,
    contents: Contents,
    dropped: Sequence[Dropped],
    stacks: Mapping[str, object],
) -> Iterator[str]:
    yield from (f"the source's files disagree: {line}" for line in declaration.disagreements)
    measured = len(dropped) - len(contents.kv_scales)
    if measured:
        yield f"{measured} input scales are left out: the inputs of plain weights are not quantized"
    if declaration.kv_cache or contents.kv_scales:
        yield (
            f"the {declaration.kv_cache or 'undeclared'} KV cache is not declared any more, and "
            f"its {len(contents.kv_scales)} scales are left out"
        )
    if stacks:
        yield f"the experts of {len(stacks)} layers are stacked, as this family publishes them"
