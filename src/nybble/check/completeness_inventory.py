"""What a checkpoint has, as names of unquantized weights, and what config.json promises beyond it.

A quantized module counts as its `weight`, whatever its tensors are called, and so does one of which
only scales are left: other rules say that half of it is missing. Tensors that the index places in a
file that is not there count as present: that the file is missing is said once. Judges nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from nybble.check.contents import SIDE, Module
from nybble.check.survey import Survey
from nybble.formats.block import Shape

PACKED = ("weight_packed", "qweight")
MTP_KEYS = ("mtp_num_hidden_layers", "num_nextn_predict_layers", "num_mtp_layers")


@dataclass
class Inventory:
    """`names` are those of unquantized weights; `missing` by role what config.json promises and
    the files lack; `by_role` the modules of each role that a family knows."""

    names: set[str] = field(default_factory=set)
    missing: dict[str, list[str]] = field(default_factory=dict)
    by_role: dict[str, list[Module]] = field(default_factory=dict)

    def of(self, *roles: str) -> list[Module]:
        """The modules of these roles, and those of which nothing is known."""
        return [m for role in (*roles, "") for m in self.by_role.get(role, ())]


_made: WeakKeyDictionary[Survey, Inventory] = WeakKeyDictionary()


def take_inventory(survey: Survey) -> Inventory:
    """The inventory of a survey, made once."""
    if survey not in _made:
        _made[survey] = _take(survey)
    return _made[survey]


def _take(survey: Survey) -> Inventory:
    found = Inventory()
    plain: dict[int, tuple[str, ...]] = {}  # by kind: modules of one kind have the same leaves
    for module in survey.modules:
        found.by_role.setdefault(module.role, []).append(module)
        kind = id(module.kind)
        if kind not in plain:
            plain[kind] = _plain_leaves(module)
        dot = f"{module.name}." if module.name else ""
        found.names.update([dot + leaf for leaf in plain[kind]])
    found.names.update(_lost_names(survey))
    if survey.tensors and survey.family is not None and survey.dimensions is not None:
        for name in survey.family.missing(found.names, survey.dimensions):
            claimed = survey.family.claim(name)
            role = claimed.claim.role if claimed else ""
            found.missing.setdefault(role, []).append(name)
    return found


def _plain_leaves(module: Module) -> tuple[str, ...]:
    """The names below the module that its parameters have in an unquantized checkpoint."""
    leaves = [leaf_of(module, t.name) for t in module.tensors]
    kept = {leaf for leaf in leaves if leaf not in SIDE and leaf not in PACKED}
    return tuple(kept) if len(kept) == len(leaves) else tuple(kept | {"weight"})


def leaf_of(module: Module, tensor: str) -> str:
    """The tensor's name below its module."""
    return tensor[len(module.name) + 1 :] if module.name else tensor


def _lost_names(survey: Survey) -> list[str]:
    """Plain names of what lies in files that cannot be read, as far as the index tells."""
    found = []
    for tensor, file in (survey.weight_map or {}).items():
        if file not in survey.shards:
            module, _, leaf = tensor.rpartition(".")
            is_weight = leaf in SIDE or leaf in PACKED
            found.append(f"{module}.weight" if is_weight else tensor)
    return found


def looks_like_vision(name: str) -> bool:
    """By name alone, for families that are not known."""
    return any(
        part in ("visual", "vision_tower", "vision_model", "vision_encoder", "vit")
        for part in name.split(".")
    )


def is_vision(module: Module) -> bool:
    """Whether the module belongs to a vision tower."""
    return module.role == "vision" or (not module.role and looks_like_vision(module.name))


def is_mtp(module: Module) -> bool:
    """Whether the module belongs to an MTP head."""
    return module.role == "mtp" or (not module.role and module.name.split(".")[0] == "mtp")


def promised_mtp_layers(survey: Survey) -> tuple[str, int]:
    """The key of config.json that promises an MTP head, and its number of layers; ("", 0)."""
    for section, path in ((survey.text_config, "text_config."), (survey.config, "")):
        for key in MTP_KEYS:
            value = section.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                is_inner = section is not survey.config
                return (path if is_inner else "") + key, value
    return "", 0


def unpacked_shapes(modules: Iterable[Module]) -> dict[str, Shape]:
    """Shapes of weights as they are unquantized, by plain name; unknown packings are left out."""
    shapes: dict[str, Shape] = {}
    for module in modules:
        if not module.kind.is_quantized:
            for tensor in module.tensors:
                if leaf_of(module, tensor.name) not in SIDE:
                    shapes[tensor.name] = tensor.shape
            continue
        if module.kind.problem or not module.kind.held.startswith(("nvfp4", "mxfp4", "fp8")):
            continue
        weight = module.tensor("weight_packed", "weight")
        if weight is not None and len(weight.shape) > 1:
            factor = 2 if weight.dtype == "U8" else 1
            shapes[f"{module.name}.weight"] = (*weight.shape[:-1], factor * weight.shape[-1])
    return shapes
