"""What the tensors of a checkpoint are for: claims, and the family that holds them.

A family is facts about one `model_type`. It names roles, fused groups, stacks and shapes; it opens
no file, knows no recipe and computes nothing but names and sizes. The side tensors of a quantized
checkpoint (`weight_scale`, `input_scale` ...) are no part of it: `claim_module` finds what their
module is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field

from nybble.families.dimensions import (
    FULL,
    LINEAR,
    Dimensions,
    evaluate,
    explain,
    read_dimensions,
)
from nybble.formats.block import Shape

ROLES: tuple[str, ...] = (
    "routed_expert",
    "shared_expert",
    "mlp",
    "attention",
    "linear_attention",
    "linear_attention_gate",
    "linear_attention_state",
    "router",
    "shared_expert_gate",
    "norm",
    "embedding",
    "lm_head",
    "mtp",
    "vision",
    "bias",
    "rotary",
    "linear",  # generic families only: a matmul weight of unknown purpose
    "other",  # generic families only: copied, purpose unknown
)

# Which models must have a tensor. A claim that is not needed is claimed when it is there.
NEEDED: dict[str, Callable[[Dimensions], bool]] = {
    "always": lambda d: True,
    "never": lambda d: False,
    "untied": lambda d: not d.tied,
    "attention_bias": lambda d: d.attention_bias,
    "mlp_bias": lambda d: d.mlp_bias,
    "mtp": lambda d: d.mtp_layers > 0,
    "vision": lambda d: d.has_vision,
}

# Which layers hold a tensor; in another layer it contradicts the keys named.
HOLDS: dict[str, tuple[Callable[[Dimensions, int], bool], str]] = {
    "all": (lambda d, i: True, "num_hidden_layers"),
    "full_attention": (lambda d, i: d.layer_types[i] == FULL, "layer_types"),
    "linear_attention": (lambda d, i: d.layer_types[i] == LINEAR, "layer_types"),
    "sparse": (lambda d, i: d.has_experts[i], "mlp_only_layers, decoder_sparse_step"),
    "dense": (lambda d, i: not d.has_experts[i], "mlp_only_layers, decoder_sparse_step"),
}


@dataclass(frozen=True, slots=True)
class Claim:
    """One kind of tensor.

    `pattern` is the name below the prefix, `#` for an index; a final `*` takes every other name.
    `is_linear`: a matmul weight [N, K], or a stack [E, N, K] of them, that a recipe may quantize.
    `group`: linears of one module with the same group run as one matmul in engines and must share a
    tensor scale.
    `stack`: the projections that the rows of each matrix of a stack divide into, evenly, in order.
    `shape`: names of `dimensions.SIZES`; () is not checked.
    `layout`: "stacked" or "split", for experts, which come as either.
    `prefixes`: overrides those of the family.
    """

    pattern: str
    role: str
    is_linear: bool = False
    group: str = ""
    stack: tuple[str, ...] = ()
    shape: tuple[str, ...] = ()
    needed: str = "always"
    layers: str = "all"
    layout: str = ""
    prefixes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Claimed:
    """What one tensor is.

    `module` is the name up to its last dot: "....q_proj" of "....q_proj.weight", and the container
    "....mlp.experts" of a stack. `group_key` names a fused group in the whole model
    ("model.layers.0.self_attn:qkv"), "" for a tensor that stands alone. `layer` and `expert` count
    in the trunk and are None elsewhere (MTP and vision included); `expert` is None for stacks.
    """

    claim: Claim
    prefix: str
    module: str
    group_key: str
    layer: int | None
    expert: int | None


@dataclass(frozen=True, slots=True)
class _Entry:
    """A claim under one prefix, and where in the name its indices are (-1: nowhere)."""

    claim: Claim
    prefix: str
    layer_at: int
    expert_at: int


_split_indices = re.compile(r"\.(\d+)(?=\.)").split  # "a.3.b" -> ["a", "3", ".b"]
_LAYERS = ("layers", "layer", "blocks", "h")
_IN_TRUNK = frozenset(ROLES) - {"mtp", "vision"}


def normalise(name: str) -> str:
    """The name with every number between two dots replaced by `#`."""
    return ".#".join(_split_indices(name)[::2])


@dataclass(frozen=True, slots=True)
class Family:
    """The facts about one `model_type`.

    `prefixes`: where the language model's names begin, the usual spelling first. `reads`: the
    groups of config keys that `dimensions` needs. The published layout of experts is claimed first.
    """

    model_type: str
    title: str
    architectures: tuple[str, ...]
    prefixes: tuple[str, ...]
    claims: tuple[Claim, ...]
    reads: frozenset[str] = frozenset()
    _entries: dict[str, _Entry] = field(init=False, repr=False, compare=False)
    _rest: tuple[_Entry, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        entries, rest = {}, []
        for claim in self.claims:
            for prefix in claim.prefixes or self.prefixes:
                full = prefix + claim.pattern
                entry = _Entry(claim, prefix, *_index_places(full, claim.role))
                if full.endswith("*"):
                    rest.append(entry)
                else:
                    entries[full] = entry
        object.__setattr__(self, "_entries", entries)
        object.__setattr__(self, "_rest", tuple(rest))

    def claim(self, name: str) -> Claimed | None:
        """What the tensor of this name is, or None if nothing in this family has such a name."""
        parts = _split_indices(name)
        entry = self._entries.get(".#".join(parts[::2])) or self._claim_rest(name)
        if entry is None:
            return None
        claim = entry.claim
        module = name[: name.rfind(".")]
        key = f"{module[: module.rfind('.')]}:{claim.group}" if claim.group else ""
        layer = int(parts[entry.layer_at]) if entry.layer_at >= 0 else None
        expert = int(parts[entry.expert_at]) if entry.expert_at >= 0 else None
        return Claimed(claim, entry.prefix, module, key, layer, expert)

    def _claim_rest(self, name: str) -> _Entry | None:
        for entry in self._rest:
            if name.startswith(entry.prefix + entry.claim.pattern[:-1]):
                return entry
        return None

    def claim_module(self, module: str) -> Claimed | None:
        """What a module is, whatever its tensors are called; a container of experts counts too."""
        return self.claim(module + ".weight") or self.claim(module + ".gate_up_proj")

    def dimensions(self, config: Mapping[str, object]) -> Dimensions:
        """The sizes that config.json states; ModelError names a key that is missing or wrong."""
        return read_dimensions(config, self.reads)

    def expected_shape(self, name: str, dims: Dimensions) -> Shape | None:
        """The shape that config.json promises for a tensor; None if nobody claims or checks it."""
        claimed = self.claim(name)
        if claimed is None or not claimed.claim.shape:
            return None
        return evaluate(claimed.claim.shape, dims)

    def contradictions(self, shapes: Mapping[str, Shape], dims: Dimensions) -> list[str]:
        """A sentence for every tensor whose shape, layer or expert number config.json contradicts.

        `shapes` are those of an unquantized checkpoint. Unclaimed names are passed over.
        """
        expected: dict[Claim, Shape] = {}
        found = []
        for name, shape in shapes.items():
            claimed = self.claim(name)
            if claimed is None:
                continue
            claim = claimed.claim
            if claim not in expected:
                expected[claim] = evaluate(claim.shape, dims)
            if problem := _misplaced(claimed, dims):
                found.append(f"{name}: {problem}")
            elif claim.shape and tuple(shape) != expected[claim]:
                found.append(
                    f"{name}: expected {list(expected[claim])} from config.json "
                    f"({explain(claim.shape, dims)}), found {list(shape)}"
                )
        return found

    def missing(self, names: Container[str], dims: Dimensions) -> list[str]:
        """The tensors that config.json promises and `names` lacks, layer by layer.

        Any prefix will do, and experts may be stacked or one by one; what is missing is spelled as
        the file spells the rest. Tensors that only some checkpoints of a model have (old rotary
        tables, the head of a tied model) are never missing.
        """
        return [
            name
            for scope in (self._trunk(), self._of("mtp"), self._of("vision"))
            for name in _missing(scope, self.prefixes, names, dims)
        ]

    def _trunk(self) -> tuple[Claim, ...]:
        return tuple(c for c in self.claims if c.role in _IN_TRUNK)

    def _of(self, role: str) -> tuple[Claim, ...]:
        return tuple(c for c in self.claims if c.role == role and not c.pattern.endswith("*"))


def _index_places(full: str, role: str) -> tuple[int, int]:
    """Where `_split_indices` puts the layer and the expert of a name that normalises to `full`."""
    layer, expert = -1, -1
    if role in _IN_TRUNK:
        words = full.split(".")
        places = [i for i, word in enumerate(words) if word == "#"]
        for n, i in enumerate(places):
            if words[i - 1] == "experts":
                expert = 2 * n + 1
            elif words[i - 1] in _LAYERS and layer < 0:
                layer = 2 * n + 1
    return layer, expert


def _misplaced(claimed: Claimed, dims: Dimensions) -> str:
    """Why config.json says that this layer or expert does not exist; "" if it does."""
    layer, expert, claim = claimed.layer, claimed.expert, claimed.claim
    if layer is not None and dims.layers:
        if layer >= dims.layers:
            return f"is in layer {layer}, but config.json has num_hidden_layers {dims.layers}"
        holds, keys = HOLDS[claim.layers]
        if not holds(dims, layer):
            kind = claim.layers.replace("_", " ")
            return f"belongs in a {kind} layer, which {layer} is not by config.json ({keys})"
    if expert is not None and dims.experts and expert >= dims.experts:
        return f"is expert {expert}, but config.json has num_experts {dims.experts}"
    return ""


# The tensors that config.json promises.


def _missing(
    claims: tuple[Claim, ...],
    family_prefixes: tuple[str, ...],
    names: Container[str],
    dims: Dimensions,
) -> Iterator[str]:
    needed = [c for c in claims if NEEDED[c.needed](dims)]
    spelling: dict[tuple[str, ...], str] = {}  # the prefix that the file uses, as far as seen

    def look(claim: Claim, tail: str) -> bool:
        prefixes = claim.prefixes or family_prefixes
        for prefix in prefixes:
            if prefix + tail in names:
                spelling.setdefault(prefixes, prefix)
                return True
        return False

    def find_layout(here: list[Claim], layer: int) -> str:
        """The layout in which any expert of this layer is there; "" if none is."""
        for claim in here:
            if claim.layout and any(look(claim, tail) for tail in _tails(claim, layer, dims)):
                return claim.layout
        return ""

    layers = [
        (layer, [c for c in needed if _belongs(c, layer, dims)])
        for layer in range(-1, _repeats(needed, dims))
    ]
    layouts = {layer: find_layout(here, layer) for layer, here in layers}
    published = next((c.layout for c in needed if c.layout), "")
    usual = next(filter(None, layouts.values()), published)
    absent = [
        (claim.prefixes or family_prefixes, tail)
        for layer, here in layers
        for claim in here
        if claim.layout in ("", layouts[layer] or usual)
        for tail in _tails(claim, layer, dims)
        if not look(claim, tail)
    ]
    for prefixes, tail in absent:
        yield spelling.get(prefixes, prefixes[0]) + tail


def _repeats(claims: list[Claim], dims: Dimensions) -> int:
    """How many layers the tensors of one scope (trunk, MTP, vision) have."""
    role = claims[0].role if claims else ""
    if role == "mtp":
        return dims.mtp_layers
    return dims.vision_layers if role == "vision" else dims.layers


def _belongs(claim: Claim, layer: int, dims: Dimensions) -> bool:
    """Whether the layer, -1 for outside all layers, holds this tensor."""
    if "#" not in claim.pattern:
        return layer < 0
    return layer >= 0 and HOLDS[claim.layers][0](dims, layer)


def _tails(claim: Claim, layer: int, dims: Dimensions) -> Iterator[str]:
    """The names below the prefix that a claim stands for in one layer."""
    tail = claim.pattern.replace("#", str(layer), 1)
    if "#" not in tail:
        yield tail
        return
    for expert in range(dims.experts):
        yield tail.replace("#", str(expert), 1)
