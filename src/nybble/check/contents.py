"""What a checkpoint's files hold, module by module, against what its configuration declares.

Tensors become modules by the names of their last parts, formats by dtypes and shapes: headers are
enough, and no value is looked at. Works on anything; where the family is unknown, roles are "".

A measured `input_scale` says nothing of how a module is meant to be run. Published weight-only
checkpoints carry one per module; it is noted, is no fault, and never makes a module W4A4.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from math import prod
from typing import Protocol

from nybble.checkpoint.declaration import Declaration, Declared
from nybble.checkpoint.safetensors import WIDTHS, TensorInfo, collector_paused
from nybble.errors import ModelError
from nybble.families import Family, find_family
from nybble.formats.block import FP8_BLOCK, Shape

INPUT_SCALES = ("input_scale", "input_global_scale")
KV_SCALES = ("k_scale", "v_scale", "q_scale")
#: The scales of a weight's blocks, channels or whole, and those of a tensor above them.
SCALES = ("weight_scale", "weight_scale_inv", "scales")
TENSOR_SCALES = ("weight_scale_2", "weight_global_scale")
#: Names of the codes of a quantized weight, the more telling first.
CODES = ("weight_packed", "qweight", "weight")
#: What describes a weight and is no parameter.
SIDE = frozenset(
    (
        *("weight_scale", "weight_scale_2", "weight_scale_inv", "weight_global_scale"),
        *(*INPUT_SCALES, *KV_SCALES, "pre_quant_scale", "output_scale", "scales"),
        *("weight_zero_point", "weight_shape", "weight_g_idx", "qzeros", "g_idx"),
    )
)
#: What scales may be stored in: numbers, and the bytes of E4M3 or E8M0 for blocks.
_SCALE_NUMBERS = ("F32", "BF16", "F16", "F64")
_SCALE_BYTES = ("F8_E4M3", "F8_E8M0", "U8")
#: Formats, or their beginnings, of two weights in a byte; of these, E2M1 with a byte per block.
_FOUR_BIT = ("nvfp4", "mxfp4", "int4", "u8")
_FP4 = ("nvfp4", "mxfp4")
_NO_LINEAR = ("norm", "embedding", "router", "linear_attention_state", "rotary", "bias", "other")
_OF_MANY_KINDS = ("mtp", "vision")  # roles that say nothing of whether a module is a linear
_names_no_linear = re.compile(r"norm|embed|conv|rotary|router|^(wte|wpe|ln.*|gate)$").search

_Leaf = tuple[str, str, Shape]
_Signature = tuple[_Leaf, ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """What all modules with the same tensors have in common.

    `held` is a format ("nvfp4", "fp8_block", "int4" ...), or the dtype in small letters where
    nothing is quantized. `problem` says what the tensors lack; `agrees` is None where the
    declaration is one that nybble cannot read. `parameters` counts weights, `stored` elements as
    model hubs do: two four-bit weights in one byte are one.
    """

    held: str
    is_quantized: bool
    problem: str
    agrees: bool | None
    has_input_scale: bool
    has_residual: bool  # an input scale that nothing declared reads
    nbytes: int
    parameters: int
    stored: int


@dataclass(frozen=True, slots=True)
class Module:
    """The tensors of one module. `declared` is None where the module is to stay as it is."""

    name: str
    role: str
    declared: Declared | None
    kind: Kind
    tensors: tuple[TensorInfo, ...]

    def tensor(self, *leaves: str) -> TensorInfo | None:
        """The first of these tensors that the module has."""
        by_leaf = {t.name[len(self.name) + 1 :]: t for t in self.tensors}
        return next((by_leaf[leaf] for leaf in leaves if leaf in by_leaf), None)

    def as_json(self) -> dict[str, object]:
        """One entry of `modules` in `nybble.inspect/1`."""
        return {
            "name": self.name,
            "role": self.role,
            "declared": declared_json(self.declared),
            "held": self.kind.held,
            "has_input_scale": self.kind.has_input_scale,
            "agrees": self.kind.agrees,
            "problem": self.kind.problem,
            "parameters": self.kind.parameters,
            "bytes": self.kind.nbytes,
            "tensors": [
                {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes}
                for t in self.tensors
            ],
        }


def is_divisor(scale: TensorInfo) -> bool:
    """Whether a stored scale divides; all others multiply."""
    return scale.name.endswith("_global_scale")


def is_four_bit(module: Module) -> bool:
    """Whether the module's weights are packed into four bits, in whatever format."""
    return module.kind.is_quantized and module.kind.held.startswith(_FOUR_BIT)


def is_fp4(module: Module) -> bool:
    """Whether the weights are NVFP4 or MXFP4: E2M1 codes and a byte of scale per block."""
    return module.kind.held.startswith(_FP4)


def foreign_scale(leaves: Mapping[str, TensorInfo]) -> str:
    """A sentence for the first scale of a module whose dtype no scale is stored in; "" for none.

    `leaves` are its tensors by the last part of their names.
    """
    return _foreign_scale({leaf: info.dtype for leaf, info in leaves.items()})


def _foreign_scale(dtypes: Mapping[str, str]) -> str:
    for leaf, dtype in dtypes.items():
        if leaf in ("weight_scale", "weight_scale_inv"):
            if dtype not in (*_SCALE_NUMBERS, *_SCALE_BYTES):
                return (
                    f"{leaf} is {dtype}, expected F8_E4M3, F8_E8M0 or a float of two bytes or more"
                )
        elif leaf in (*TENSOR_SCALES, *INPUT_SCALES) and dtype not in _SCALE_NUMBERS:
            return f"{leaf} is {dtype}, expected F32"
    return ""


def declared_json(declared: Declared | None) -> dict[str, object] | None:
    """What is declared of a module, for JSON documents."""
    if declared is None:
        return None
    return {
        "spelling": declared.spelling,
        "scheme": declared.scheme,
        "weight": declared.weight,
        "group_size": declared.group_size,
        "activation": declared.activation,
    }


@dataclass(frozen=True)
class Contents:
    """The modules in file order, and the scales of the KV cache, which belong to none.

    `model_type` is that of the family that gave the roles, "" if there is none, and `why_no_roles`
    the reason.
    """

    modules: tuple[Module, ...]
    kv_scales: tuple[TensorInfo, ...]
    model_type: str
    why_no_roles: str

    @cached_property
    def by_name(self) -> Mapping[str, Module]:
        return {m.name: m for m in self.modules}

    @cached_property
    def alike(self) -> tuple[tuple[Module, ...], ...]:
        """Modules of the same role, tensors and declaration: of each group look at the first.

        A 35B has 31,600 modules and some twenty groups.
        """
        groups: dict[tuple[int, str], list[Module]] = {}
        for module in self.modules:
            groups.setdefault((id(module.kind), module.role), []).append(module)
        return tuple(map(tuple, groups.values()))

    @cached_property
    def containers(self) -> frozenset[str]:
        """Every module path, and every path above one."""
        found: set[str] = set()
        for module in self.modules:
            name = module.name
            while name and name not in found:
                found.add(name)
                name = name.rpartition(".")[0]
        return frozenset(found)

    def matching(self, glob: str) -> Iterator[Module]:
        """The modules whose path matches."""
        matches = re.compile(translate(glob)).match
        return (m for m in self.modules if matches(m.name))


class HasTensors(Protocol):
    """What modules are made of: an open checkpoint, or a survey of a broken one."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name."""
        ...

    @property
    def config(self) -> Mapping[str, object]:
        """config.json."""
        ...


def read_contents(checkpoint: HasTensors, declaration: Declaration) -> Contents:
    """Group the tensors of a checkpoint into modules and hold them against the declaration."""
    with collector_paused():
        return _read(checkpoint, declaration)


def _read(checkpoint: HasTensors, declaration: Declaration) -> Contents:
    grouped: dict[str, list[TensorInfo]] = {}
    kv_scales = []
    for name, tensor in checkpoint.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in KV_SCALES:
            kv_scales.append(tensor)
        elif module in grouped:
            grouped[module].append(tensor)
        else:
            grouped[module] = [tensor]
    family, why = _family(checkpoint)
    kinds: dict[tuple[_Signature, Declared | None], Kind] = {}
    roles: dict[tuple[str, str], str] = {}
    modules = []
    for name, tensors in grouped.items():
        at = len(name) + 1 if name else 0
        signature = tuple((t.name[at:], t.dtype, t.shape) for t in tensors)
        container, found, below = name.partition(".experts.")
        alike = (container, below.partition(".")[2]) if found else (name, "")
        role = roles.get(alike)  # the experts of a layer have one role
        if role is None:
            role = roles[alike] = _role(family, name, tensors[0].name)
        declared = declaration.of(name)
        if declared is not None and not _can_be_meant(declared, name, role, signature):
            declared = None
        key = (signature, declared)
        if key not in kinds:
            kinds[key] = _classify({leaf: (d, s) for leaf, d, s in signature}, declared)
        modules.append(Module(name, role, declared, kinds[key], tuple(tensors)))
    model_type = family.model_type if family else ""
    return Contents(tuple(modules), tuple(kv_scales), model_type, why)


def _family(checkpoint: HasTensors) -> tuple[Family | None, str]:
    try:
        return find_family(checkpoint.config), ""
    except ModelError as error:
        return None, str(error).partition(". ")[0]


def _role(family: Family | None, module: str, tensor: str) -> str:
    if family is None:
        return ""
    claimed = family.claim_module(module) or family.claim(tensor)
    return claimed.claim.role if claimed else ""


def _can_be_meant(declared: Declared, module: str, role: str, signature: _Signature) -> bool:
    """Whether a declaration that may cover whole classes or containers speaks of this module.

    Vectors are never quantized. A declaration by class means `Linear` modules: in the families
    that is a role, elsewhere a guess by name. What holds scales is meant in any case.
    """
    if any(leaf in SIDE for leaf, _, _ in signature):
        return True
    if max(len(shape) for _, _, shape in signature) < 2:
        return False
    if not declared.by_class:
        return True
    weight = next((shape for leaf, _, shape in signature if leaf in CODES), ())
    by_role = role and role not in _OF_MANY_KINDS
    no_linear = role in _NO_LINEAR if by_role else _names_no_linear(module.rpartition(".")[2])
    return len(weight) == 2 and not no_linear


# ----------------------------------------------------------------------------- one kind of module

_Leaves = dict[str, tuple[str, Shape]]


def _classify(leaves: _Leaves, declared: Declared | None) -> Kind:
    held, fault, packing = _weight(leaves, declared)
    is_quantized = packing > 0
    has_input_scale = any(leaf in leaves for leaf in INPUT_SCALES)
    if is_quantized and declared and declared.needs_input_scale and not has_input_scale:
        name = INPUT_SCALES[held == "nvfp4" and "weight_packed" in leaves]
        fault = "; ".join(filter(None, (fault, f"lacks {name}")))
    if is_quantized:
        foreign = _foreign_scale({leaf: dtype for leaf, (dtype, _) in leaves.items()})
        fault = "; ".join(filter(None, (foreign, fault)))
    codes = next((leaf for leaf in CODES if leaf in leaves), "")
    sizes = {leaf: prod(shape) for leaf, (_, shape) in leaves.items()}
    stored = sum(size for leaf, size in sizes.items() if leaf not in SIDE)
    unpacked = round(sizes[codes] * (packing - 1)) if is_quantized else 0
    return Kind(
        held=held,
        is_quantized=is_quantized,
        problem=fault,
        agrees=_agrees(held, is_quantized, fault, declared),
        has_input_scale=has_input_scale,
        has_residual=has_input_scale
        and declared is not None
        and bool(declared.activation)
        and not declared.needs_input_scale,
        nbytes=sum(sizes[leaf] * WIDTHS[dtype] for leaf, (dtype, _) in leaves.items()),
        parameters=stored + unpacked,
        stored=stored,
    )


def _agrees(held: str, is_quantized: bool, fault: str, declared: Declared | None) -> bool | None:
    if fault:
        return False
    if declared is None or not is_quantized:
        return declared is None and not is_quantized
    return held == declared.weight if declared.weight else None


def _weight(leaves: _Leaves, declared: Declared | None) -> tuple[str, str, float]:
    """Format, fault, and how many weights an element of the codes holds (0: not quantized)."""
    codes = next((leaf for leaf in CODES if leaf in leaves), "")
    dtype, shape = leaves.get(codes, ("", ()))
    scaled = [leaf for leaf in leaves if leaf in SIDE and leaf not in INPUT_SCALES]
    if dtype.startswith("F8_"):
        return (*_fp8(leaves, shape, declared), 1)
    is_packed = codes != "weight" or bool(scaled) or (declared and declared.weight == "nvfp4")
    if dtype == "U8" and is_packed:
        return (*_four_bit(leaves, codes, shape), 2)
    if dtype in ("I32", "I8") and (codes != "weight" or scaled):
        width = 8 * WIDTHS[dtype]
        known = declared.weight if declared and declared.weight.startswith("int") else ""
        bits = int(known[3:] or (8 if dtype == "I8" else 4)) if known or codes else 4
        return known or "int", "", width / bits
    widest = max(leaves.values(), key=lambda leaf: prod(leaf[1]))[0]
    fault = f"{scaled[0]} beside a weight in {widest}" if scaled and codes else ""
    return widest.lower(), fault, 0


def _four_bit(leaves: _Leaves, codes: str, shape: Shape) -> tuple[str, str]:
    """NVFP4 or MXFP4: two codes per byte along K, a scale per block of K."""
    tensor_scale = "weight_global_scale" if codes == "weight_packed" else "weight_scale_2"
    if "weight_scale" not in leaves:
        is_nvfp4 = tensor_scale in leaves or codes == "weight"
        lacks = [n for n in ("weight_scale", tensor_scale) if n not in leaves]
        return ("nvfp4" if is_nvfp4 else "u8"), f"lacks {', '.join(lacks)}"
    dtype, scales = leaves["weight_scale"]
    if dtype in ("F32", "BF16", "F16"):
        return "int4", ""  # AWQ, packed along N
    fits = len(scales) > 0 and scales[:-1] == shape[:-1] and scales[-1] > 0
    if not fits or 2 * shape[-1] % scales[-1]:
        fault = f"weight_scale {list(scales)} does not fit {codes} {list(shape)}"
        return ("nvfp4" if dtype == "F8_E4M3" else "mxfp4"), fault
    block = 2 * shape[-1] // scales[-1]
    # A foreign dtype says nothing: then it is what its tensor scale and its block say.
    is_foreign = bool(_foreign_scale({"weight_scale": dtype}))
    is_nvfp4 = dtype == "F8_E4M3" or (is_foreign and (tensor_scale in leaves or block == 16))
    if not is_nvfp4:
        return _with_block("mxfp4", block, 32), ""
    return (
        _with_block("nvfp4", block, 16),
        "" if tensor_scale in leaves else f"lacks {tensor_scale}",
    )


def _with_block(name: str, block: int, usual: int) -> str:
    return name if block == usual else f"{name}/{block}"


def _fp8(leaves: _Leaves, shape: Shape, declared: Declared | None) -> tuple[str, str]:
    """FP8 by the shape of its scales; where a shape fits several, the declared one of them."""
    name = next((n for n in ("weight_scale_inv", "weight_scale") if n in leaves), "")
    if not name:
        return "fp8", "lacks weight_scale"
    dtype, scales = leaves[name]
    fits = _fp8_formats(shape, dtype, scales)
    if not fits:
        return "fp8", f"{name} {list(scales)} does not fit weight {list(shape)}"
    return (declared.weight if declared and declared.weight in fits else fits[0]), ""


def _fp8_formats(shape: Shape, dtype: str, scales: Shape) -> list[str]:
    if len(shape) < 2:
        return []
    if dtype in ("U8", "F8_E8M0") and scales[-1:] == (shape[-1] // 32,):
        return ["mxfp8"]
    found = []
    if prod(scales) == 1 or scales == shape[:-2]:  # a scale per matrix of a stack
        found.append("fp8")
    blocks = FP8_BLOCK.scale_shape(shape)
    if scales in (blocks, (*shape[:-2], blocks[-2], 1, blocks[-1], 1)):
        # A small tensor is one block: two dimensions say so, one or none do not.
        found.insert(0 if len(scales) > 1 else len(found), "fp8_block")
    if scales in (shape[:-1], (*shape[:-1], 1)):
        found.insert(0, "fp8_channel")
    return found
