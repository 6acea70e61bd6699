"""What SGLang makes of a checkpoint: which method each module gets, and whether the tensors fit it.

Read of sglang 0.5.23, with the changes since 0.5.9 from the wheels of 0.5.8 to 0.5.22:
`layers/quantization/modelopt_quant.py` (`is_layer_excluded`, `_resolve_quant_algo`, `from_config`,
`get_quant_method`), `quantization/utils.py` (`is_layer_skipped`), `compressed_tensors/` (see
compressed.py), `configs/model_config.py` (`_parse_quant_hf_config`), `model_loader/weight_utils.py`
(`get_quant_config`), `models/qwen3_5.py`, `qwen3_5_mtp.py`, `qwen3_vl.py`, `qwen3_moe.py`,
`llama.py`. Its loaders pass over a tensor that has no parameter, with a warning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from nybble.check.engines import compressed
from nybble.check.engines.matching import (
    ATTENTION_AND_MLP,
    FUSED,
    UNQUANTIZED,
    Algorithms,
    Asked,
    Habits,
    Object,
    Scheme,
    Setup,
    Unit,
    build,
    failing,
    find_units,
    is_wrapped,
    model_type_of,
    objects,
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
from nybble.checkpoint.patterns import compile_pattern

_HYBRID = ("qwen3_5", "qwen3_5_moe")
_KNOWN_TYPES = (*_HYBRID, "llama", "qwen2", "qwen3", "qwen3_moe")
#: `packed_modules_mapping` of the model class; the dense classes of 0.5.23 have none.
_PACKED: dict[str, dict[str, tuple[str, ...]]] = {
    "qwen3_5": FUSED,
    "qwen3_5_moe": FUSED,
    "qwen3_moe": ATTENTION_AND_MLP,
}

CHANGES = (
    Change("0.5.9", "exclusion by any single part of a path", "wheels 0.5.8, 0.5.9"),
    Change("0.5.10", "MIXED_PRECISION, for Nemotron-H alone", "wheels 0.5.9, 0.5.10"),
    Change("0.5.15", "MIXED_PRECISION with NVFP4 layers, any model", "wheels 0.5.14, 0.5.15"),
    Change("0.5.15", "W4A16_NVFP4 per layer", "wheels 0.5.14, 0.5.15"),
    Change("0.5.17", "NVFP4_AWQ; MXFP8 per layer", "wheels 0.5.16, 0.5.17"),
    Change("0.5.18", "FP8_PB_WO per layer, for linears", "wheels 0.5.17, 0.5.18"),
    Change("0.5.19", "uniform W4A16_NVFP4", "wheels 0.5.18, 0.5.19"),
    Change("0.5.20", "a mixed MTP head is quantized if it is listed", "wheels 0.5.19, 0.5.20"),
    Change("0.5.21", "block FP8 experts of either spelling", "wheels 0.5.20, 0.5.21"),
    Change("", "KV cache of hf_quant_config.json for mixed files", "sglang PR 27906"),
)

_NVFP4 = Scheme(
    *("NVFP4", "nvfp4", "W4A4"), needs=("weight_scale", "weight_scale_2", "input_scale")
)
_W4A16 = Scheme(
    *("W4A16_NVFP4", "nvfp4", "W4A16"),
    needs=("weight_scale", "weight_scale_2"),
    accepts=("input_scale",),
)
_FP8 = Scheme("FP8", "fp8", "W8A8", needs=("weight_scale", "input_scale"))
_BLOCK = Scheme("FP8_PB_WO", "fp8_block", "W8A8", needs=("weight_scale_inv",))
_MXFP8 = Scheme("MXFP8", "mxfp8", "W8A8", needs=("weight_scale_inv",))
_UNIFORM = {
    "FP8": _FP8,
    "NVFP4": _NVFP4,
    "NVFP4_AWQ": replace(_NVFP4, says="NVFP4_AWQ", needs=(*_NVFP4.needs, "pre_quant_scale")),
    "W4A16_NVFP4": _W4A16,
}
_HABITS = Habits("SGLang", False, "1 or whatever the allocation held")


class Sglang:
    """SGLang, as an `Engine`."""

    name = "sglang"
    oldest = "0.5.9"
    newest = "0.5.23"
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
            scheme_of = _schemes(survey, setup)
            built = tuple(
                build(unit, engine_path(survey, unit), scheme_of(unit), _HABITS)
                for unit in find_units(survey)
            )
        refusals = (*unreadable_config(survey), *setup.refusals)
        return Replay(self.name, version or self.newest, refusals, built, tuple(notes))

    def unfit(self, survey: Survey, tensor_parallel: int) -> tuple[Unfit, ...]:
        """Rows of routed W4A4 experts are padded to 64 by one backend only; that is what counts."""
        setup = _setup(survey, Asked.of("", ""))
        if setup.resolve is None:
            return ()
        schemes = _schemes(survey, setup)
        return unfit_units(survey, find_units(survey), schemes, tensor_parallel, 64)


ENGINE = Sglang()


# ---------------------------------------------------------------------------- choosing the method


def _setup(survey: Survey, target: Asked) -> Setup:
    section = section_of(survey.config) or section_of(survey.config, "compression_config")
    nested = survey.documents.get(CONFIG_FILE)
    if section is None and nested is None:
        return Setup(lambda path, unit: UNQUANTIZED)
    method = str((section or {}).get("quant_method") or "").replace(
        "compressed_tensors", "compressed-tensors"
    )
    said = section or {}
    if section is None or method in ("", "modelopt"):
        document = section if section is not None else nested or {}
        said = dict(objects(document).get("quantization", document))
        method = _modelopt_method(survey, said, target)
        if not method:
            word = said.get("quant_algo")
            return Setup(None, (f"no quantization method for quant_algo {word!r}",))
    if method == "compressed-tensors":
        return _compressed(said, target, _packed(survey))
    least = {"modelopt_mixed": 80, "modelopt_fp4": 80, "modelopt_fp8": 89}.get(method, 0)
    if 0 < target.capability < least:
        why = f"minimum capability {least}, found {target.capability}"
        return Setup(None, (f"{method} is not supported for the current GPU: {why}",))
    if method == "modelopt_mixed":
        return _mixed(survey, section, target)
    if method in ("modelopt_fp4", "modelopt_fp8"):
        return _uniform(survey, said, section is None, method, target)
    if method == "w4afp8":
        what = "MIXED_PRECISION without an NVFP4 layer is taken for w4afp8, INT4 experts"
        return Setup(None, (f"{what}: FP8 layers are not found",))
    if method == "fp8":
        return _fp8(survey, said)
    return Setup(None, notes=(f"quant_method {method!r} is not replayed",))


def _modelopt_method(survey: Survey, said: Object, target: Asked) -> str:
    """`_parse_modelopt_quant_config`. Spellings count: nothing is put into capitals."""
    algorithm = str(said.get("quant_algo") or "")
    if algorithm == "MIXED_PRECISION":
        listed = {str(v.get("quant_algo") or "").upper() for v in _layers(said).values()}
        is_nemotron = model_type_of(survey) == "nemotron_h" and target.has("0.5.10")
        has_nvfp4 = bool(listed & {"NVFP4", "W4A16_NVFP4"})
        if is_nemotron or (target.has("0.5.15") and has_nvfp4):
            return "modelopt_mixed"
        return "w4afp8"
    if "FP4" in algorithm:
        return "modelopt_fp4"
    is_fp8 = algorithm == "FP8" or ("FP8" in algorithm and not target.has("0.5.15"))
    return "modelopt_fp8" if is_fp8 else "mxfp8" if algorithm == "MXFP8" else ""


def _layers(said: Object) -> dict[str, Object]:
    return objects(said.get("quantized_layers"))


def _uniform(survey: Survey, said: Object, is_nested: bool, method: str, target: Asked) -> Setup:
    algorithm = str(said.get("quant_algo") or "")
    since = {"NVFP4_AWQ": "0.5.17", "W4A16_NVFP4": "0.5.19"}.get(algorithm, "")
    if (
        algorithm not in _UNIFORM
        or not target.has(since)
        or (method == "modelopt_fp8") != (algorithm == "FP8")
    ):
        known = "FP8, NVFP4, NVFP4_AWQ, W4A16_NVFP4"
        return Setup(None, (f"ModelOpt currently only supports: {known}; found {algorithm}",))
    sizes = _group_sizes(said)
    if is_nested and method == "modelopt_fp4" and len(sizes) != 1:
        why = f"{CONFIG_FILE} has {len(sizes)} different group_size, expected one"
        return Setup(None, (f"Cannot find 'quant_algo' in the model's quantization config: {why}",))
    key = "exclude_modules" if is_nested else "ignore"
    if method == "modelopt_fp4" and key in said and said[key] is None:
        return Setup(None, ("NVFP4 quantization requires group_size and exclude_modules",))
    excluded = Excluded(strings(said.get(key) or said.get("exclude_modules")))
    scheme, packed = _on(_UNIFORM[algorithm], target), _packed(survey)

    def resolve(path: str, unit: Unit) -> Scheme:
        return UNQUANTIZED if excluded.covers(path, unit, packed) else scheme

    return Setup(resolve, drafts=method == "modelopt_fp8")


def _group_sizes(said: Object) -> set[int]:
    found = [said.get("group_size")]
    for group in objects(said.get("config_groups")).values():
        found += [group.get("group_size"), *(v.get("group_size") for v in objects(group).values())]
    return {size for size in found if isinstance(size, int)}


def _on(scheme: Scheme, target: Asked) -> Scheme:
    if scheme.runs_as == "W4A4" and 0 < target.capability < 100:
        return replace(scheme, runs_as="W4A16")
    if target.is_cpu and scheme.builds == "nvfp4":
        return failing(scheme.says, "no NVFP4 kernel for a CPU")
    return scheme


# ------------------------------------------------------------------------------------- exclusions


def _pattern(entry: str) -> str:
    """As SGLang turns a glob into an expression; one that is none, or may hang, as plain text."""
    pattern = entry.replace(".", r"\.").replace("*", ".*")
    try:
        return compile_pattern(pattern).pattern
    except re.error:
        return re.escape(entry)


class Excluded:
    """`is_layer_skipped`, by whole parts of a path, or `is_layer_excluded`, by pattern."""

    def __init__(self, entries: list[str]) -> None:
        self.plain = [entry.rstrip(".") for entry in entries]
        patterns = [_pattern(entry) for entry in entries]
        self.full = re.compile("|".join(f"(?:{p})" for p in patterns)).fullmatch
        self.is_empty = not entries

    def covers(self, path: str, unit: Unit, packed: Mapping[str, tuple[str, ...]]) -> bool:
        """Raises ValueError where only some members of a fused module are excluded."""
        if self.is_empty:
            return False
        if unit.sort != "experts" and self.skips(path, packed):
            return True
        paths = (path, path.removeprefix("language_model."))
        return any(
            self.full(word) for each in dict.fromkeys(paths) for word in (each, *each.split("."))
        )

    def skips(self, path: str, packed: Mapping[str, tuple[str, ...]]) -> bool:
        """`is_layer_skipped` alone."""
        last = path.rpartition(".")[2]
        members = packed.get(last) or ATTENTION_AND_MLP.get(last)
        if members is None:
            return self._names(path)
        found = [self._names(path.replace(last, member)) for member in members]
        if any(found) and not all(found):
            raise ValueError(f"Detected some but not all shards of {path} are quantized")
        return all(found)

    def _names(self, path: str) -> bool:
        dotted = f".{path}."
        return any(f".{entry}." in dotted for entry in self.plain)


# ---------------------------------------------------------------------------------- layer by layer


def _mixed(survey: Survey, section: Object | None, target: Asked) -> Setup:
    notes: tuple[str, ...] = ()
    said: Object = section or {}
    if "quantized_layers" not in said or not said.keys() & {
        "kv_cache_quant_algo",
        "kv_cache_scheme",
    }:
        document = survey.documents.get(CONFIG_FILE)
        lacking = "quantized_layers" if "quantized_layers" not in said else "the KV cache"
        if document is None:
            why = f"config.json says nothing of {lacking}, and there is no {CONFIG_FILE}"
            return Setup(None, (f"Cannot find the config file for modelopt_mixed: {why}",))
        said = objects(document).get("quantization", document)
        notes = (f"{CONFIG_FILE} is read: config.json says nothing of {lacking}",)
    layers = {name: str(v.get("quant_algo") or "").upper() for name, v in _layers(said).items()}
    if not layers:
        return Setup(None, ("MIXED_PRECISION quantization requires a quantized_layers map",))
    excluded = Excluded(strings(said.get("ignore", said.get("exclude_modules"))))
    algorithms, packed = Algorithms(layers, _candidates), _packed(survey)

    def resolve(path: str, unit: Unit) -> Scheme:
        algorithm = algorithms.of(path, packed)
        if excluded.covers(path, unit, packed):
            return UNQUANTIZED
        scheme = _dispatched(target, unit.sort == "experts").get(algorithm)
        if scheme is not None:
            return _on(scheme, target)
        says = f"{algorithm}, which has no method per layer" if algorithm else "unquantized"
        return replace(UNQUANTIZED, says=says)

    drafts = target.has("0.5.20") and any(name.startswith("mtp.") for name in layers)
    return Setup(resolve, notes=notes, drafts=drafts)


def _dispatched(target: Asked, is_experts: bool) -> dict[str, Scheme]:
    """The per-layer algorithms that have a method; all others are built unquantized."""
    found = {"FP8": _FP8, "NVFP4": _NVFP4}
    if target.has("0.5.15"):
        found["W4A16_NVFP4"] = _W4A16
    if target.has("0.5.17"):
        found["MXFP8"] = _MXFP8
    if target.has("0.5.21" if is_experts else "0.5.18"):
        found["FP8_PB_WO"] = _BLOCK
    if target.has("0.5.20"):
        found["FP8_BLOCK_SCALES"] = replace(_BLOCK, says="FP8_BLOCK_SCALES")
    return found


def _candidates(path: str) -> tuple[str, ...]:
    """The spellings of a path that `quantized_layers` may use."""
    if path.endswith(".lm_head"):
        return (path, "lm_head")
    if path.startswith("language_model.model."):
        return (path, "model.language_model." + path[len("language_model.model.") :])
    if path.startswith("model.language_model."):
        rest = path[len("model.language_model.") :]
        return (path, f"language_model.model.{rest}", f"model.{rest}")
    if path.startswith("model."):
        return (path, "model.language_model." + path[len("model.") :])
    return (path,)


# --------------------------------------------------------------------------------- other dialects


def _compressed(said: Object, target: Asked, packed: Mapping[str, tuple[str, ...]]) -> Setup:
    groups, refusals = compressed.read_groups(said, compressed.SGLANG)
    if refusals:
        return Setup(None, refusals)
    ignore = strings(said.get("ignore"))
    try:
        matcher = compressed.Matcher(groups, ignore, compressed.SGLANG, lambda name: name)
    except re.error as error:
        return Setup(None, (f"a target or ignore entry is no regular expression: {error}",))

    def resolve(path: str, unit: Unit) -> Scheme:
        is_experts = unit.sort == "experts"
        if is_experts:
            group = matcher.experts(path, packed)
        else:
            name = "ParallelLMHead" if unit.sort == "head" else "Linear"
            group = matcher.find(path, name, packed)
        return compressed.scheme_of(group, compressed.SGLANG, target.capability, is_experts)

    return Setup(resolve)


def _fp8(survey: Survey, said: Object) -> Setup:
    """Block or tensor FP8 of the kind that DeepSeek and Qwen publish; lm_head stays unquantized."""
    entries = strings(said.get("ignored_layers")) or strings(said.get("modules_to_not_convert"))
    excluded, packed = Excluded(entries), _packed(survey)
    is_block = said.get("weight_block_size") is not None
    scheme = (
        replace(_BLOCK, says="FP8 block")
        if is_block
        else replace(_FP8, says="FP8", needs=("weight_scale",), accepts=("input_scale",))
    )

    def resolve(path: str, unit: Unit) -> Scheme:
        if unit.sort == "head" or excluded.skips(path, packed):
            return UNQUANTIZED
        return scheme

    return Setup(resolve)


# ------------------------------------------------------------------------------ names and building


def engine_path(survey: Survey, unit: Unit) -> str:
    """The module path in SGLang: the file's own, but for text-only Qwen3.5 with a long prefix."""
    if unit.part == "mtp":
        return unit.path.removeprefix("model.")
    if unit.part == "trunk" and model_type_of(survey) in _HYBRID and not is_wrapped(survey):
        return unit.path.replace("model.language_model.", "model.", 1)
    return unit.path


def _packed(survey: Survey) -> Mapping[str, tuple[str, ...]]:
    return _PACKED.get(model_type_of(survey), {})


def _schemes(survey: Survey, setup: Setup) -> Callable[[Unit], Scheme]:
    """The scheme of each unit; what SGLang never quantizes never is."""
    is_hybrid = model_type_of(survey) in _HYBRID

    def scheme(unit: Unit) -> Scheme:
        never = unit.sort in ("router", "gate", "embedding", "other")
        is_draft = unit.part == "mtp" and (not setup.drafts or unit.path.endswith("mtp.fc"))
        if never or is_draft or (unit.part == "vision" and is_hybrid) or setup.resolve is None:
            return UNQUANTIZED
        try:
            return setup.resolve(engine_path(survey, unit), unit)
        except ValueError as error:
            return failing("", str(error))

    return scheme
