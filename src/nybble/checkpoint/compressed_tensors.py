"""The compressed-tensors container: NVFP4 tensor scales are divisors of shape [1], FP8 scales are
BF16.

One config group per scheme; `format` is that of the group, and `mixed-precision` where there are
several. Source: docs/layouts.md; fields beyond those written here are rejected by its readers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.layout import Leaf, Listing
from nybble.checkpoint.modelopt import dump
from nybble.checkpoint.safetensors import TensorSpec
from nybble.errors import RecipeError
from nybble.formats.block import FP8, FP8_BLOCK, MXFP4, NVFP4, BlockFormat, Shape
from nybble.formats.element import F32Array
from nybble.formats.scheme import SCHEMES, Scheme

VERSION = "0.17.0"  # of the container format; what vLLM 0.33 pins

#: Where the path of an MTP head's module begins, also with a prefix before it.
_MTP = r".*\bmtp\."
_FORMATS = {NVFP4: "nvfp4-pack-quantized", MXFP4: "mxfp4-pack-quantized"}


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """See the module."""

    name: str = "compressed-tensors"
    # Readers make k_scale and v_scale of every declared KV cache and expect them in the file:
    # without them transformers computes with whatever was in memory.
    declares_kv_cache: bool = False

    def refusal(self, schemes: Sequence[Scheme]) -> str:
        """Every scheme has a spelling here."""
        return ""

    def leaves(self, scheme: Scheme, shape: Shape) -> tuple[Leaf, ...]:
        """weight_packed or weight, weight_scale, weight_global_scale (NVFP4), the input's scale
        where it has one."""
        fmt = scheme.weight
        if fmt is None:
            raise RecipeError(f"{scheme} has no tensors of its own")
        if fmt is NVFP4:
            leaves = [
                Leaf("weight_packed", "codes", "U8", fmt.codes_shape(shape)),
                Leaf("weight_scale", "scale", "F8_E4M3", fmt.scale_shape(shape)),
                Leaf("weight_global_scale", "tensor_scale", "F32", (1,)),
            ]
            if scheme.needs_input_scale:
                leaves.append(Leaf("input_global_scale", "input_scale", "F32", (1,)))
        elif fmt is MXFP4:
            leaves = [
                Leaf("weight_packed", "codes", "U8", fmt.codes_shape(shape)),
                Leaf("weight_scale", "scale", "U8", fmt.scale_shape(shape)),
            ]
        else:
            scale = (1,) if fmt is FP8 else fmt.scale_shape(shape)
            leaves = [
                Leaf("weight", "codes", "F8_E4M3", fmt.codes_shape(shape)),
                Leaf("weight_scale", "tensor_scale", "BF16", scale),
            ]
            if scheme.needs_input_scale:
                leaves.append(Leaf("input_scale", "input_scale", "BF16", (1,)))
        return tuple(leaves)

    def kv_scales(self, attention: str) -> tuple[TensorSpec, TensorSpec]:
        """On the attention itself, BF16; powers of two are exact."""
        key, value = (TensorSpec(f"{attention}.{kind}_scale", "BF16", (1,)) for kind in "kv")
        return key, value

    def round_scales(self, scales: F32Array) -> F32Array:
        """FP8 scales are stored as BF16; powers of two stay what they are. What BF16 rounds to zero
        becomes 1: such weights are zeros in FP8, whatever the scale."""
        rounded = scales.astype(ml_dtypes.bfloat16).astype(np.float32)
        return np.where(rounded > 0, rounded, np.float32(1))

    def store(self, leaf: Leaf, value: F32Array) -> NDArray[np.generic]:
        """NVFP4 tensor scales become divisors, exactly where they are powers of two; FP8 scales
        BF16."""
        value = np.asarray(value, dtype=np.float32).reshape(leaf.shape)
        if leaf.dtype == "BF16":
            return value.astype(ml_dtypes.bfloat16)
        return np.float32(1) / value

    def load(self, leaf: Leaf, stored: NDArray[np.generic]) -> F32Array:
        """Divisors become multipliers; [1] becomes 0-d."""
        value = stored.astype(np.float32)
        if leaf.dtype != "BF16":
            with np.errstate(divide="ignore"):  # a divisor of 0: the audit names it
                value = np.float32(1) / value
        return value.reshape(()) if value.size == 1 else value

    def documents(self, config: Mapping[str, object], listing: Listing) -> dict[str, bytes]:
        """config.json with one group per scheme."""
        patterns = _Patterns(listing)
        groups: dict[str, object] = {}
        for scheme in SCHEMES.values():
            targets = patterns.targets(scheme)
            if targets:
                groups[f"group_{len(groups)}"] = _group(scheme, targets)
        formats = {str(group["format"]) for group in groups.values() if isinstance(group, dict)}
        section: dict[str, object] = {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": patterns.ignored(),
            "kv_cache_scheme": _kv_cache(listing),
            "global_compression_ratio": None,
            "version": VERSION,
        }
        return {"config.json": dump({**config, "quantization_config": section})}


def _kv_cache(listing: Listing) -> dict[str, object] | None:
    """Declared only with its scales: readers compute with whatever was in memory otherwise."""
    if not (listing.kv_cache and listing.has_kv_scales):
        return None
    return {
        "num_bits": 8,
        "type": "float",
        "strategy": "tensor",
        "symmetric": True,
        "dynamic": False,
    }


class _Patterns:
    """Short rules that say exactly which modules have which scheme.

    Modules that differ only in numbers share a pattern, `re:.*layers\\.\\d+\\.mlp\\.up_proj$`. A
    pattern is used where all modules it covers have one scheme, exact names otherwise. Expressions
    start with `.*`: engines match them against their own paths, whose prefixes differ.
    """

    def __init__(self, listing: Listing) -> None:
        schemes: dict[str, Scheme | None] = dict.fromkeys(listing.plain)
        for name, scheme in listing.quantized.items():
            for module in _modules(name, listing.expert_modules):
                schemes[module] = scheme
        for name in listing.plain_experts:
            for module in _modules(name, listing.expert_modules):
                schemes[module] = None
        self.by_pattern: dict[str, dict[str, Scheme | None]] = {}
        for module, found in schemes.items():
            self.by_pattern.setdefault(_pattern(module), {})[module] = found
        self._split_heads()
        self.fixed = _fixed(listing)
        for module in listing.others:
            if not any(re.match(entry[3:], module) for entry in self.fixed):
                self._keep_out(module)

    def _split_heads(self) -> None:
        """An MTP head's layers are named like the trunk's: a pattern of its own where they
        differ."""
        for pattern, modules in list(self.by_pattern.items()):
            heads = {m: found for m, found in modules.items() if re.match(_MTP, m)}
            if not heads or len(heads) == len(modules) or len(set(modules.values())) == 1:
                continue
            del self.by_pattern[pattern]
            rest = {m: found for m, found in modules.items() if m not in heads}
            body = pattern.removeprefix("re:")
            self.by_pattern[f"re:{_MTP}{body}"] = heads
            self.by_pattern[f"re:(?!{_MTP}){body}"] = rest

    def _keep_out(self, module: str) -> None:
        """A pattern that would take this module along gives way to exact names."""
        for pattern, modules in self.by_pattern.items():
            if pattern.startswith("re:") and re.match(pattern[3:], module):
                modules[module] = None

    def targets(self, scheme: Scheme) -> list[str]:
        return list(self._entries(scheme))

    def ignored(self) -> list[str]:
        return [*self._entries(None), *self.fixed]

    def _entries(self, scheme: Scheme | None) -> Iterable[str]:
        for pattern, modules in self.by_pattern.items():
            here = [module for module, found in modules.items() if found == scheme]
            if here and len(here) == len(modules):
                yield pattern if pattern.startswith("re:") else here[0]
            else:
                yield from here


def _fixed(listing: Listing) -> list[str]:
    """What is ignored whole; a bare name would not cover what is below it."""
    entries = ["re:.*visual\\..*"] if listing.has_vision else []
    if listing.has_mtp:
        entries.append("re:^mtp.*")
        if any(".mtp." in module for module in listing.others):
            entries.append("re:.*\\.mtp\\..*")
    return entries


def _modules(name: str, expert_modules: Mapping[str, Sequence[str]]) -> list[str]:
    below = expert_modules.get(name)
    return [f"{name}.{module}" for module in below] if below else [name]


def _pattern(module: str) -> str:
    """A module's path with numbers generalised, from `layers` on; the path itself where there is no
    number.

    A name without a dot is an expression too: vLLM renames dotted names only, and calls lm_head
    language_model.lm_head.
    """
    at = module.find("layers.")
    if at < 0:
        return module if "." in module else f"re:.*{re.escape(module)}$"
    return "re:.*" + re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(module[at:])) + "$"


def _group(scheme: Scheme, targets: Sequence[str]) -> dict[str, object]:
    fmt = scheme.weight
    assert fmt is not None
    return {
        "targets": list(targets),
        "format": _FORMATS.get(fmt, "float-quantized"),
        "weights": _weights(fmt),
        "input_activations": _activations(scheme),
        "output_activations": None,
    }


def _weights(fmt: BlockFormat) -> dict[str, object]:
    numbers: dict[str, object] = {
        "num_bits": fmt.element.bits,
        "type": "float",
        "symmetric": True,
        "dynamic": False,
    }
    if fmt is NVFP4:
        numbers |= {
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn",
        }
    elif fmt is MXFP4:
        numbers |= {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    elif fmt is FP8_BLOCK:
        numbers |= {"strategy": "block", "block_structure": list(fmt.block)}
    else:
        numbers |= {"strategy": "tensor" if fmt is FP8 else "channel"}
    return numbers


def _activations(scheme: Scheme) -> dict[str, object] | None:
    if scheme.input is None:
        return None
    numbers: dict[str, object] = {
        "num_bits": scheme.input.element.bits,
        "type": "float",
        "symmetric": True,
    }
    if scheme.weight is NVFP4:
        return numbers | {
            "strategy": "tensor_group",
            "group_size": 16,
            "dynamic": "local",
            "scale_dtype": "torch.float8_e4m3fn",
        }
    granularity = scheme.input.granularity
    if granularity in ("tensor", "token"):
        return numbers | {"strategy": granularity, "dynamic": granularity == "token"}
    return numbers | {"strategy": "group", "group_size": int(granularity), "dynamic": True}
