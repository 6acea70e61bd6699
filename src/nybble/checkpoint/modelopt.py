"""The ModelOpt container: scales multiply, scalars are 0-d, `weight` keeps its name.

Written as MIXED_PRECISION with a per-layer map (unlisted means unquantized) and two configuration
files of equal content, the form that vLLM, SGLang and llama.cpp all read. Source: docs/layouts.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.layout import Leaf, Listing
from nybble.checkpoint.safetensors import TensorSpec
from nybble.errors import RecipeError
from nybble.formats.block import Shape
from nybble.formats.element import F32Array
from nybble.formats.scheme import FP8_STATIC, NVFP4_W4A4, NVFP4_W4A16, Scheme

#: Scheme -> `quant_algo`. vLLM's mixed-precision loader dispatches these three per layer; anything
#: else it takes for
#: unquantized, and FP8 bytes would be read as BF16 without a word.
ALGORITHMS: dict[Scheme, str] = {
    NVFP4_W4A4: "NVFP4",
    NVFP4_W4A16: "W4A16_NVFP4",
    FP8_STATIC: "FP8",
}

CONFIG_FILE = "hf_quant_config.json"


@dataclass(frozen=True, slots=True)
class ModelOpt:
    """See the module."""

    name: str = "modelopt"
    declares_kv_cache: bool = True  # published files do; engines cast with scale 1.0

    def refusal(self, schemes: Sequence[Scheme]) -> str:
        """Schemes outside `ALGORITHMS` have no spelling that engines read per layer."""
        foreign = sorted({s.name for s in schemes if s.weight and s not in ALGORITHMS})
        if not foreign:
            return ""
        return (
            f"the modelopt layout cannot carry {', '.join(foreign)}: engines dispatch only "
            f"{', '.join(sorted(s.name for s in ALGORITHMS))} per layer and read anything else as "
            "BF16; use --layout compressed-tensors"
        )

    def leaves(self, scheme: Scheme, shape: Shape) -> tuple[Leaf, ...]:
        """weight, weight_scale, weight_scale_2 (NVFP4), input_scale (where activations have
        one)."""
        fmt = scheme.weight
        if fmt is None or scheme not in ALGORITHMS:
            raise RecipeError(self.refusal([scheme]) or f"{scheme} has no tensors of its own")
        leaves = [
            Leaf("weight", "codes", "U8" if fmt.is_packed else "F8_E4M3", fmt.codes_shape(shape))
        ]
        if fmt.has_tensor_scale:
            leaves.append(Leaf("weight_scale", "scale", "F8_E4M3", fmt.scale_shape(shape)))
            leaves.append(Leaf("weight_scale_2", "tensor_scale", "F32", ()))
        else:
            leaves.append(Leaf("weight_scale", "tensor_scale", "F32", ()))
        if scheme.needs_input_scale:
            leaves.append(Leaf("input_scale", "input_scale", "F32", ()))
        return tuple(leaves)

    def kv_scales(self, attention: str) -> tuple[TensorSpec, TensorSpec]:
        """Beside the projections that make them, float32."""
        key, value = (
            TensorSpec(f"{attention}.{kind}_proj.{kind}_scale", "F32", ()) for kind in "kv"
        )
        return key, value

    def round_scales(self, scales: F32Array) -> F32Array:
        """Float32 on disk: as they are."""
        return scales

    def store(self, leaf: Leaf, value: F32Array) -> NDArray[np.generic]:
        """A multiplier, as it is."""
        return np.asarray(value, dtype=np.float32).reshape(leaf.shape)

    def load(self, leaf: Leaf, stored: NDArray[np.generic]) -> F32Array:
        """As it is."""
        return stored.astype(np.float32)

    def documents(self, config: Mapping[str, object], listing: Listing) -> dict[str, bytes]:
        """config.json with the flat object, hf_quant_config.json with the nested one; equal
        content."""
        layers = {name: _entry(listing.quantized[name]) for name in sorted(listing.quantized)}
        ignore = ["mtp*", "mtp.layers.0*"] if listing.has_mtp else []
        # vLLM resolves `.experts` by any sibling under its parent, such as a quantized shared
        # expert.
        ignore += [name for name in listing.plain_experts if _has_quantized_sibling(name, listing)]
        # Engines take the name for the format's (TensorRT-LLM refuses any other); who wrote the
        # file stands in the version, which is free text.
        producer = {"name": "modelopt", "version": f"nybble-{listing.version}"}
        flat: dict[str, object] = {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "producer": producer,
            "ignore": ignore,
            "config_groups": _groups(listing),
            "quantized_layers": layers,
        }
        nested: dict[str, object] = {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": "FP8" if listing.kv_cache else None,
            "exclude_modules": ignore,
            "quantized_layers": layers,
        }
        if listing.kv_cache:
            flat["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
        return {
            "config.json": dump({**config, "quantization_config": flat}),
            CONFIG_FILE: dump({"producer": producer, "quantization": nested}),
        }


def dump(document: Mapping[str, object]) -> bytes:
    """JSON as Hugging Face files have it: two spaces, a newline at the end."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _entry(scheme: Scheme) -> dict[str, object]:
    entry: dict[str, object] = {"quant_algo": ALGORITHMS[scheme]}
    if scheme.weight and scheme.weight.is_packed:
        entry["group_size"] = scheme.weight.block[1]
    return entry


def _groups(listing: Listing) -> dict[str, object]:
    """One group per algorithm; W4A16 says nothing of activations, or engines would run it as
    W4A4."""
    groups: dict[str, object] = {}
    for scheme in ALGORITHMS:
        targets = sorted(name for name, s in listing.quantized.items() if s == scheme)
        if not targets or scheme.weight is None:
            continue
        bits = scheme.weight.element.bits
        numbers: dict[str, object] = {"dynamic": False, "num_bits": bits, "type": "float"}
        if scheme.weight.is_packed:
            numbers["group_size"] = scheme.weight.block[1]
        group: dict[str, object] = {"weights": numbers, "targets": targets}
        if scheme.input is not None:
            group["input_activations"] = dict(numbers)
        groups[f"group_{len(groups)}"] = group
    return groups


def _has_quantized_sibling(container: str, listing: Listing) -> bool:
    parent = container.rsplit(".", 1)[0] + "."
    return any(name.startswith(parent) for name in listing.quantized)
