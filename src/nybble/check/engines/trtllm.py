"""What TensorRT-LLM's PyTorch flow makes of a checkpoint.

Read in single files of the repository, of mid-2026, not of one commit and not run:
`_torch/model_config.py` at 008e0af8 (`load_modelopt_quant_config`, `_build_modelopt_quant_config`,
`load_hf_quant_config`), `_torch/models/modeling_qwen3_5.py` at 00620eb0
(`_normalize_qwen35_exclude_modules`, `_normalize_qwen35_quant_config_dict`,
`_lm_head_nvfp4_enabled`), `_torch/models/modeling_utils.py` (`apply_layerwise_quant_config`,
`apply_quant_config_exclude_modules`), `quantization/modelopt_config.py` at 2edf354d,
`models/quant_config_utils.py` at 21156a7a and `_torch/modules/fused_moe/quantization.py`
(`load_expert_fc31_input_scale_nvfp4`). They are counted as version 1.3.

hf_quant_config.json counts before config.json. On SM100 and SM103 weight-only NVFP4 of experts, of
dense MLPs and of lm_head is promoted to W4A4, with the input scales that the file happens to have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from nybble.check.engines.matching import (
    FUSED,
    UNQUANTIZED,
    Habits,
    Object,
    Scheme,
    Unit,
    build,
    find_units,
    leaves_of,
    model_type_of,
    objects,
    section_of,
    sizes_unknown,
    strings,
    unfit_units,
    unreadable_config,
)
from nybble.check.engines.replayed import Built, Change, Replay, Unfit
from nybble.check.survey import Survey
from nybble.checkpoint.modelopt import CONFIG_FILE
from nybble.checkpoint.patterns import compile_pattern

ARCHITECTURES = (
    *("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
    *("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
    *("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
)
#: `QuantAlgo`, as far as checkpoints are concerned; spelled exactly so.
ALGORITHMS = frozenset(
    (
        *("W8A16", "W4A16", "W4A16_AWQ", "W4A8_AWQ", "W4A16_GPTQ", "FP8", "INT8", "NVFP4"),
        *("FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES", "MIXED_PRECISION", "W4A16_NVFP4"),
        *("NVFP4_AWQ", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "W4A8_MXFP4_MXFP8", "W4A16_MXFP4"),
        *("MXFP8", "NO_QUANT"),
    )
)
_MIXED = "MIXED_PRECISION"
_PROMOTED = ("", "sm100", "sm103")
_HABITS = Habits("TensorRT-LLM", refuses_unknown=False, fills="what the memory held")
_LANGUAGE = "model.language_model."
_MTP_TOP = {"fc": "fc", "norm": "shared_head.norm"} | {
    name: name for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden")
}
#: What stands for a fused linear when the map of layers is searched.
_SPEAKER = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}


@dataclass(frozen=True)
class _Reading:
    """`QuantConfig` and the map of layers. `refusals`: why reading stops."""

    algorithm: str
    excluded: tuple[str, ...]
    layers: Mapping[str, str] | None
    is_compressed: bool
    refusals: tuple[str, ...]


def _read(survey: Survey, units: tuple[Unit, ...]) -> _Reading:
    nested = survey.documents.get(CONFIG_FILE)
    if nested is not None:
        return _modelopt(nested)
    section = section_of(survey.config) or section_of(survey.text_config)
    if section is None:
        return _Reading("", (), None, False, ())
    producer = section_of(section, "producer") or {}
    method = str(section.get("quant_method") or "").lower()
    if method.startswith("modelopt") or producer.get("name") == "modelopt":
        return _modelopt(section)
    if method == "compressed-tensors":
        return _compressed(section, units)
    return _native(section, method)


def _modelopt(said: Object) -> _Reading:
    wrapped = said.get("quantization")
    if "quantization" in said and not isinstance(wrapped, Mapping):
        return _refused(f"{CONFIG_FILE}: 'quantization' must be a dict")
    inner = section_of(said, "quantization") or said
    algorithm = str(inner.get("quant_algo") or "")
    algorithm = "FP8_BLOCK_SCALES" if algorithm == "fp8_pb_wo" else algorithm
    excluded = strings(inner.get("exclude_modules")) or strings(inner.get("ignore"))
    refusals = [_unknown(algorithm)] if algorithm and algorithm not in ALGORITHMS else []
    layers: dict[str, str] | None = None
    if algorithm == _MIXED:
        entries = objects(inner.get("quantized_layers"))
        layers = {name: str(entry.get("quant_algo") or "") for name, entry in entries.items()}
        if not layers:
            refusals.append("MIXED_PRECISION without quantized_layers: there is nothing to build")
        strange = sorted(set(layers.values()) - ALGORITHMS)
        refusals += [_unknown(spelling) for spelling in strange]
    return _Reading(algorithm, tuple(excluded), layers, False, tuple(refusals))


def _unknown(spelling: str) -> str:
    return f"{spelling!r} is not a valid QuantAlgo"


def _refused(why: str) -> _Reading:
    return _Reading("", (), None, False, (why,))


def _native(section: Object, method: str) -> _Reading:
    excluded = tuple(
        entry
        for key in ("modules_to_not_convert", "ignored_layers", "ignore")
        for entry in strings(section.get(key))
    )
    known = {"mxfp8": "MXFP8", "nvfp4": "NVFP4", "mxfp4": "W4A16_MXFP4"}
    is_block = section.get("weight_block_size") or section.get("activation_scheme") == "static"
    if method == "fp8" and is_block:
        return _Reading("FP8_BLOCK_SCALES", excluded, None, False, ())
    return _Reading(known.get(method, ""), excluded, None, False, ())


# ------------------------------------------------------------------------------- compressed-tensors


def _compressed(section: Object, units: tuple[Unit, ...]) -> _Reading:
    groups = objects(section.get("config_groups"))
    if not groups:
        return _refused("config_groups is not set")
    refusals = []
    cache = section.get("kv_cache_scheme")
    if isinstance(cache, Mapping) and (cache.get("num_bits"), cache.get("type")) != (8, "float"):
        refusals.append(f"Unsupported kv_cache_scheme: {dict(cache)}")
    algorithms = {name: _group_algorithm(group) for name, group in groups.items()}
    refusals += [why for algorithm, why in algorithms.values() if why]
    ignored = strings(section.get("ignore"))
    if len(groups) == 1:
        algorithm = next(iter(algorithms.values()))[0]
        return _Reading(algorithm, tuple(ignored), None, True, tuple(refusals))
    targets: dict[str, str] = {}
    for name, group in groups.items():
        targets |= dict.fromkeys(strings(group.get("targets")), algorithms[name][0])
    layers, unmatched = _resolve(targets, ignored, units)
    if unmatched:
        refusals.append(f"config_groups targets matched no checkpoint module: {unmatched}")
    return _Reading(_MIXED, (), layers, True, tuple(refusals))


def _group_algorithm(group: Object) -> tuple[str, str]:
    """The algorithm of a group, and why it is refused."""
    weights = section_of(group, "weights") or {}
    inputs = section_of(group, "input_activations")
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    is_float, given = weights.get("type") == "float", (inputs or {}).get("strategy")
    if bits == 4 and is_float and strategy == "group" and inputs is None:
        size = weights.get("group_size")
        return "W4A16_MXFP4", "" if size == 32 else f"Unsupported group_size: {size}"
    if bits == 4 and is_float and strategy == "tensor_group":
        if weights.get("group_size") != 16:
            return "NVFP4", f"Unsupported group_size: {weights.get('group_size')}"
        return ("NVFP4", "") if given == "tensor_group" else ("W4A16_NVFP4", "")
    if bits == 8 and strategy == "channel":
        why = "" if given == "token" else f"Unsupported inputs_quant_strategy: {given}"
        return "FP8_PER_CHANNEL_PER_TOKEN", why
    if bits == 8 and strategy == "block":
        why = "" if given == "group" else f"Unsupported inputs_quant_strategy: {given}"
        return "FP8_BLOCK_SCALES", why
    if bits == 8:
        return "", f"Unsupported weights_quant_strategy: {strategy}"
    return "", f"Unsupported quant_bits: {bits}, {weights.get('type')} by {strategy}"


def _resolve(
    targets: Mapping[str, str], ignored: list[str], units: tuple[Unit, ...]
) -> tuple[dict[str, str], list[str]]:
    """`_build_layer_quant_configs`: the first target by alphabet, plain ones first; no classes."""
    ordered = sorted(targets, key=lambda target: ("re:" in target, target))
    tests = [(target, _test(target)) for target in ordered]
    skips = [_test(entry) for entry in ignored]
    matched: set[str] = set()
    layers = {}
    for unit in units:
        for member in unit.members:
            hits = [target for target, test in tests if test(member.name)]
            matched.update(hits)
            if hits and not any(skip(member.name) for skip in skips):
                layers[unit.path if unit.sort == "experts" else member.name] = targets[hits[0]]
    return layers, [target for target in ordered if target not in matched]


def _test(entry: str) -> Callable[[str], object]:
    """An expression that does not compile names nothing; it is a finding of its own."""
    if not entry.startswith("re:"):
        return entry.__eq__
    try:
        return compile_pattern(entry[3:]).match
    except re.error:
        return lambda _: None


# -------------------------------------------------------------------------------------------- names


def module_name(path: str, layers: int) -> str:
    """TensorRT-LLM's path of a module of the file; MTP layers are appended to the trunk."""
    if path.startswith(_LANGUAGE):
        return "model." + path[len(_LANGUAGE) :]
    if not path.startswith("mtp."):
        return path
    tail = path.removeprefix("mtp.")
    if tail.startswith("layers."):
        index, _, rest = tail.removeprefix("layers.").partition(".")
        star = "*" if index.endswith("*") and not rest else ""
        number = index.rstrip("*")
        if not number.isdecimal():
            return ""
        return f"model.layers.{layers + int(number)}" + (f".{rest}" if rest else star)
    top, dot, rest = tail.partition(".")
    known = _MTP_TOP.get(top.rstrip("*"))
    if known is None:
        return ""
    return f"model.layers.{layers}.{known}{'*' if top.endswith('*') else ''}{dot}{rest}"


def _exclusions(reading: _Reading, is_hybrid: bool, layers: int) -> tuple[str, ...]:
    """The patterns in TensorRT-LLM's names; of hybrids the fused projections are spelled out."""
    if not is_hybrid:
        return reading.excluded
    found = []
    for entry in reading.excluded:
        name = module_name(entry, layers)
        if name and not name.startswith("model.visual"):
            name = re.sub(r"\.in_proj_[ab](\b|\*)", ".in_proj_ba*", name)
            found.append(re.sub(r"\.in_proj_(q|k|v|z|qkv)(\b|\*)", ".in_proj_qkvz*", name))
    return tuple(found)


def _is_excluded(names: list[str], patterns: tuple[str, ...]) -> bool:
    return any(
        fnmatchcase(name, pattern) or name.startswith(pattern + ".")
        for name in names
        for pattern in patterns
    )


# ------------------------------------------------------------------------------------------ schemes


def _scheme(algorithm: str, reading: _Reading, hardware: str, needs_input: bool) -> Scheme:
    """The linear method of an algorithm, with the tensors in the spelling of the layout."""
    packed = "weight_packed" if reading.is_compressed else "weight"
    scale = "weight_global_scale" if reading.is_compressed else "weight_scale_2"
    given = "input_global_scale" if reading.is_compressed else "input_scale"
    if algorithm == "NVFP4":
        runs = "W4A16" if hardware in ("sm89", "sm90") else "W4A4"
        needs: tuple[str, ...] = ("weight_scale", scale, given)[: 3 if needs_input else 2]
        return Scheme(algorithm, "nvfp4", runs, packed, needs, needs, (given,))
    if algorithm == "W4A16_NVFP4":
        needs = ("weight_scale", scale)
        return Scheme(algorithm, "nvfp4", "W4A16", packed, needs, needs, (given,))
    if algorithm == "FP8":
        needs = ("weight_scale",)
        return Scheme(algorithm, "fp8", "W8A8", "weight", needs, needs, ("input_scale",))
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        return Scheme(algorithm, "fp8_channel", "W8A8", "weight", ("weight_scale",))
    if algorithm in ("", "NO_QUANT", _MIXED):
        return UNQUANTIZED
    return Scheme(algorithm, algorithm.lower(), algorithm[:4], is_known=False)


class _Model:
    """The schemes of all units of one checkpoint."""

    def __init__(self, survey: Survey, hardware: str) -> None:
        count = survey.text_config.get("num_hidden_layers")
        self.layers = count if isinstance(count, int) else 0
        self.hardware = hardware
        self.units = find_units(survey)
        self.reading = _read(survey, self.units)
        self.is_hybrid = model_type_of(survey).startswith("qwen3_5")
        self.excluded = _exclusions(self.reading, self.is_hybrid, self.layers)
        # Not seen in the files read; its makers load such checkpoints, so they are honoured.
        self.patterns = [_test(e) for e in self.reading.excluded if e.startswith("re:")]

    def name(self, unit: Unit) -> str:
        """The module path; hybrids wrap a dense MLP once more."""
        name = module_name(unit.path, self.layers)
        if self.is_hybrid and unit.sort == "linear":
            name = re.sub(r"\.mlp\.(gate_up_proj|down_proj)$", r".mlp.mlp.\1", name)
        return name or unit.path

    def scheme(self, unit: Unit) -> Scheme:
        if unit.part == "vision" or unit.sort in ("router", "gate", "embedding", "other"):
            return UNQUANTIZED
        if unit.sort == "head":
            return self._head(unit)
        algorithm = self._algorithm(unit)
        is_stack = unit.sort == "experts"
        is_dense = unit.sort == "linear" and self.is_hybrid and ".mlp.mlp." in self.name(unit)
        promotes = self.is_hybrid and self.reading.layers is not None and (is_stack or is_dense)
        if algorithm == "W4A16_NVFP4" and promotes and self._is_promoted(unit):
            promoted = _scheme("NVFP4", self.reading, self.hardware, is_stack)
            return Scheme(
                "W4A16_NVFP4, promoted", "nvfp4", "W4A4", promoted.codes, promoted.needs,
                promoted.noticed, promoted.accepts,
            )  # fmt: skip
        return _scheme(algorithm, self.reading, self.hardware, is_stack)

    def _is_promoted(self, unit: Unit) -> bool:
        """On SM100 and SM103; where no hardware is named, if the input scales are there."""
        if self.hardware:
            return self.hardware in _PROMOTED
        leaves = ("input_scale", "input_global_scale")
        return all(any(leaf in leaves_of(m) for leaf in leaves) for m in unit.members)

    def _head(self, unit: Unit) -> Scheme:
        """Dequantized to BF16 by the hybrids' mapper, or promoted; elsewhere as it is listed."""
        algorithm = self._algorithm(unit)
        if not self.is_hybrid or not unit.is_quantized:
            return _scheme(algorithm, self.reading, self.hardware, False)
        if algorithm == "W4A16_NVFP4" and self._is_promoted(unit):
            return _scheme("NVFP4", self.reading, self.hardware, False)
        return Scheme(f"{algorithm}, dequantized", "bf16", "BF16", is_known=False)

    def _algorithm(self, unit: Unit) -> str:
        own = module_name(unit.path, self.layers)
        parent, _, last = own.rpartition(".")
        members = [f"{parent}.{member}" for member in FUSED.get(last, ())]
        if _is_excluded([own, *members], self.excluded) or any(
            match(m.name) for match in self.patterns for m in unit.members
        ):
            return ""
        if self.reading.layers is None:
            return self.reading.algorithm
        return self._listed(unit, own, parent, last)

    def _listed(self, unit: Unit, own: str, parent: str, last: str) -> str:
        listed = self._by_name
        if unit.sort == "experts":
            found = (a for name, a in listed.items() if own in name)
            return next(found, "") if own not in listed else listed[own]
        if last == "in_proj_qkvz":
            pair = [listed.get(f"{parent}.in_proj_{part}", "") for part in ("qkv", "z")]
            return "FP8" if pair == ["FP8", "FP8"] else _DEQUANTIZED if any(pair) else ""
        return listed.get(f"{parent}.{_SPEAKER.get(last, last)}".removeprefix("."), "")

    @property
    def _by_name(self) -> dict[str, str]:
        if not hasattr(self, "_listed_by_name"):
            layers = self.reading.layers or {}
            self._listed_by_name = {module_name(n, self.layers): a for n, a in layers.items()}
        return self._listed_by_name


_DEQUANTIZED = "dequantized"


def _built(model: _Model, unit: Unit) -> Built:
    scheme = model.scheme(unit)
    if scheme.says == _DEQUANTIZED:
        scheme = Scheme(_DEQUANTIZED, "bf16", "BF16", is_known=False)
    elif scheme is UNQUANTIZED and unit.part == "vision":
        scheme = Scheme("unquantized", "bf16", "BF16", is_known=unit.is_quantized)
    return build(unit, model.name(unit), scheme, _HABITS)


# ------------------------------------------------------------------------------------------- engine


class TensorRtLlm:
    """TensorRT-LLM, PyTorch flow."""

    name = "trtllm"
    oldest = "1.3"
    newest = "1.3"
    changes = (
        Change(
            "",
            "W4A16_NVFP4 on Hopper, dequantized per step or by Marlin",
            "https://github.com/NVIDIA/TensorRT-LLM/pull/14775",
        ),
        Change(
            "",
            "Qwen3.6 NVFP4: MIXED_PRECISION of hybrids, W4A16 promoted to W4A4 on SM100/103",
            "https://github.com/NVIDIA/TensorRT-LLM/pull/15703",
        ),
        Change(
            "",
            "W4A16_NVFP4 on SM120/121, and weight-only NVFP4 of compressed-tensors",
            "https://github.com/NVIDIA/TensorRT-LLM/pull/16511",
        ),
    )

    def replay(self, survey: Survey, version: str = "", hardware: str = "") -> Replay:
        """What loading makes of a checkpoint; see `Engine`."""
        model = _Model(survey, hardware)
        built = tuple(_built(model, unit) for unit in model.units)
        notes = (*_notes(survey, built), *sizes_unknown(survey))
        refusals = (*unreadable_config(survey), *model.reading.refusals)
        return Replay(self.name, version or self.newest, refusals, built, notes)

    def unfit(self, survey: Survey, tensor_parallel: int) -> tuple[Unfit, ...]:
        """What cannot be divided; see `Engine`."""
        model = _Model(survey, "")
        return unfit_units(survey, model.units, model.scheme, tensor_parallel, 1)


def _notes(survey: Survey, built: tuple[Built, ...]) -> Iterator[str]:
    names = strings(survey.config.get("architectures"))
    if not names or names[0] not in ARCHITECTURES:
        yield f"architecture {names[0] if names else ''!r} is not known here: names are guessed"
    if any(b.says.endswith("promoted") for b in built):
        yield "on SM100 and SM103 weight-only NVFP4 is promoted to W4A4, elsewhere it stays W4A16"
    section = section_of(survey.config) or {}
    if survey.documents.get(CONFIG_FILE) is None and section.get("quant_method") == "modelopt":
        yield f"without {CONFIG_FILE} older versions read no ModelOpt configuration"


ENGINE = TensorRtLlm()
