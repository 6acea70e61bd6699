"""Rules about the words and keys of a section on quantization: whether engines understand them.

No rule here needs a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

from nybble.check.declared_files import (
    MODEL_OPTIMIZER,
    SGLANG,
    VLLM,
    count,
    layer_map,
    said_of,
    statements,
)
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import CONFIG, Survey
from nybble.checkpoint.dialects import COMPRESSED_TENSORS
from nybble.checkpoint.dialects.modelopt import MIXED, SPELLINGS, Statement
from nybble.checkpoint.modelopt import CONFIG_FILE

#: What vLLM 0.32 takes for a whole file, and what every engine dispatches layer by layer.
_VLLM_UNIFORM = frozenset(
    ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8", MIXED)
)
_PER_LAYER = frozenset(("FP8", "NVFP4", "W4A16_NVFP4"))
_PER_LAYER_NEW = frozenset(("FP8_PB_WO", "MXFP8", "FP8_PER_CHANNEL_PER_TOKEN"))
_NESTED_KNOWN = frozenset(("NVFP4", MIXED))  # by vLLM, beside all that begins with FP8


# ------------------------------------------------------------------------------------------- NB305


def _mixed_without_map(survey: Survey) -> Iterator[Finding]:
    said = said_of(survey)
    if any(s.algorithm.upper() == MIXED for s in said) and not layer_map(survey)[1]:
        yield MIXED_WITHOUT_MAP.finding(
            f"quant_algo is {MIXED} and no file has quantized_layers: expected a map of module "
            "paths to algorithms, found none; vLLM refuses it, SGLang takes it for W4AFP8",
            file=said[0].file,
        )


MIXED_WITHOUT_MAP = Rule(
    "NB305",
    "mixed-without-map",
    Severity.ERROR,
    "MIXED_PRECISION without quantized_layers",
    "MIXED_PRECISION only says that there is a map of layers. Without one vLLM stops, and SGLang "
    "takes the word for another format, W4AFP8, that uses it too.",
    "Write quantized_layers into both files, from the tensors.",
    _mixed_without_map,
    threads=(f"{SGLANG}28099", f"{VLLM}36312"),
    is_repairable=True,
)


# ------------------------------------------------------------------------------------------- NB306


def _unknown_algorithm(survey: Survey) -> Iterator[Finding]:
    for said in said_of(survey):
        words = {said.algorithm: [said.file]} if said.algorithm else {}
        for name, (spelling, _) in said.layers.items():
            words.setdefault(spelling, []).append(name)
        for word, where in words.items():
            yield from _judge(said, word, where)


def _judge(said: Statement, word: str, where: list[str]) -> Iterator[Finding]:
    upper = word.upper()
    is_top = word == said.algorithm
    place = f"{said.file}: quant_algo" if is_top else f"{said.file}: {count(where, 'entry')}:"
    subjects = () if is_top else where
    if upper not in SPELLINGS and upper not in (MIXED, "NONE"):
        known = ", ".join(sorted((*SPELLINGS, MIXED)))
        yield UNKNOWN_ALGORITHM.finding(
            f"{place} {word!r} is no algorithm that any engine knows: expected one of {known}",
            subjects,
            file=said.file,
        )
    elif is_top and upper not in (*_VLLM_UNIFORM, "NONE"):
        yield UNKNOWN_ALGORITHM.finding(
            f"{place} {word!r} is refused by vLLM, which takes {', '.join(sorted(_VLLM_UNIFORM))}",
            file=said.file,
            severity=Severity.WARNING,
            engine="vllm",
        )
    elif word != upper:
        usual = word in ("fp8_pb_wo", "mxfp4")  # ModelOpt itself writes these two so
        yield UNKNOWN_ALGORITHM.finding(
            f"{place} {word!r} is spelled in small letters: vLLM reads it as {upper}, engines that "
            "compare the word as it stands do not know it",
            subjects,
            file=said.file,
            severity=Severity.NOTE if usual else Severity.WARNING,
        )


UNKNOWN_ALGORITHM = Rule(
    "NB306",
    "unknown-algorithm",
    Severity.ERROR,
    "An algorithm's name is not one that engines know",
    "`quant_algo` is compared as a word. A refreshed revision of a public checkpoint renamed "
    "FP8_BLOCK_SCALES to FP8_PB_WO and no longer loaded; vLLM rejects NVFP4_AWQ, W4A8 and MXFP4 "
    "that SGLang or TensorRT-LLM take.",
    "Spell the algorithm as ModelOpt does: NVFP4, W4A16_NVFP4, FP8, MIXED_PRECISION ...",
    _unknown_algorithm,
    threads=(f"{VLLM}37854",),
    is_repairable=True,
)


# ------------------------------------------------------------------------------------------- NB312


def _one_config(survey: Survey) -> Iterator[Finding]:
    flat, nested = statements(survey)
    if nested is not None and flat is None:
        word = nested.algorithm.upper()
        if not (word in _NESTED_KNOWN or word.startswith("FP8") or not word):
            yield ONE_CONFIG_OF_TWO.finding(
                f"{CONFIG_FILE} alone declares {nested.algorithm}, {CONFIG} has no "
                "quantization_config: vLLM stops with 'Unknown ModelOpt quant algo', because it "
                "knows only FP8, NVFP4 and MIXED_PRECISION in that file",
                file=CONFIG_FILE,
                severity=Severity.WARNING,
                engine="vllm",
            )
        else:
            yield ONE_CONFIG_OF_TWO.finding(
                f"{CONFIG_FILE} alone declares {nested.algorithm or 'the quantization'}, {CONFIG} "
                "has no quantization_config: vLLM, SGLang and TensorRT-LLM fall back to it, "
                "transformers and older llama.cpp see an unquantized model",
                file=CONFIG_FILE,
            )
    elif flat is not None and nested is None and survey.sections.method.startswith("modelopt"):
        yield ONE_CONFIG_OF_TWO.finding(
            f"{CONFIG} alone declares {flat.algorithm or 'the quantization'}, there is no "
            f"{CONFIG_FILE}: TensorRT-LLM reads that file",
            file=CONFIG,
        )


ONE_CONFIG_OF_TWO = Rule(
    "NB312",
    "one-config-of-two",
    Severity.NOTE,
    "The quantization is declared in one of the two files only",
    "Older ModelOpt exports have hf_quant_config.json only. vLLM, SGLang and TensorRT-LLM read it; "
    "transformers does not, and vLLM does not know W4A16_NVFP4 there. A checkpoint without "
    "hf_quant_config.json in turn is not read by older TensorRT-LLM.",
    "Write both files.",
    _one_config,
    threads=(f"{MODEL_OPTIMIZER}929",),
    is_repairable=True,
)


# ------------------------------------------------------------------------------------------- NB313


def _keys(survey: Survey) -> Iterator[Finding]:
    flat, nested = statements(survey)
    if flat is not None and not survey.sections.method:
        yield KEYS_MISSING.finding(
            f"{CONFIG}: quantization_config has no quant_method: expected 'modelopt'; transformers "
            "and engines that look for it refuse, others recognise quant_algo",
            file=CONFIG,
            severity=Severity.WARNING,
            missing=["quant_method"],
        )
    said = [s for s in (flat, nested) if s is not None]
    if said and not any(s.algorithm or s.kv_cache for s in said):
        files = " and ".join(s.file for s in said)
        yield KEYS_MISSING.finding(
            f"{files}: no quant_algo: expected one such as NVFP4; engines stop",
            file=said[0].file,
            missing=["quant_algo"],
        )
    if nested is not None and nested.algorithm.upper() == "NVFP4":
        needed = ("group_size", "kv_cache_quant_algo", "exclude_modules")
        missing = [key for key in needed if key not in nested.keys]
        if missing:
            yield KEYS_MISSING.finding(
                f"{CONFIG_FILE}: {', '.join(missing)} missing: vLLM needs "
                f"{', '.join(needed)} beside NVFP4 wherever it reads this file (null will do)"
                + (f"; here it reads {CONFIG}" if flat else ""),
                file=CONFIG_FILE,
                severity=Severity.NOTE if flat else Severity.ERROR,
                engine="vllm",
                missing=missing,
            )


KEYS_MISSING = Rule(
    "NB313",
    "keys-missing",
    Severity.ERROR,
    "A key that engines insist on is missing",
    "vLLM stops with 'NVFP4 quantization requires the following fields' unless group_size, "
    "kv_cache_quant_algo and exclude_modules stand in hf_quant_config.json; SGLang reports a "
    "missing group size as a missing quant_algo; transformers wants a quant_method.",
    "Add the keys; `nybble repair` writes both files anew.",
    _keys,
    threads=("https://github.com/sgl-project/sglang/pull/8829",),
    is_repairable=True,
)


# ------------------------------------------------------------------------------------------- NB316


def _not_dispatched(survey: Survey) -> Iterator[Finding]:
    file, layers = layer_map(survey)
    by_word: dict[str, list[str]] = {}
    for name, (spelling, _) in layers.items():
        by_word.setdefault(spelling.upper(), []).append(name)
    for word, names in by_word.items():
        if word in _PER_LAYER or word not in SPELLINGS:
            continue
        if word == "FP8_BLOCK_SCALES":  # vLLM has the alias for experts only
            names = [n for n in names if "experts" not in n.split(".")] or names
        is_new = word in _PER_LAYER_NEW or all("experts" in n.split(".") for n in names)
        who = "older vLLM" if is_new else "vLLM"
        yield NOT_DISPATCHED.finding(
            f"{file}: {count(names, 'module')}, listed as {word} within {MIXED}: {who} dispatches "
            "FP8, NVFP4 and W4A16_NVFP4 per layer and builds anything else unquantized; it stops "
            "at the scales, or reads the codes as BF16 without a word",
            names,
            file=file,
            severity=Severity.WARNING if is_new else Severity.ERROR,
            engine="vllm",
            algorithm=word,
        )


NOT_DISPATCHED = Rule(
    "NB316",
    "not-dispatched-per-layer",
    Severity.ERROR,
    "MIXED_PRECISION with an algorithm that engines do not dispatch per layer",
    "Within MIXED_PRECISION engines know FP8 (static, per tensor), NVFP4 and W4A16_NVFP4. A layer "
    "of any other algorithm falls through to an unquantized linear: loading stops at its scales, "
    "or, where unknown tensors are skipped, FP8 bytes land in BF16 parameters and the answers are "
    "fluent garbage. Newer vLLM adds FP8_PB_WO, MXFP8 and FP8 per channel.",
    "Requantize these layers to FP8 or NVFP4, leave them in BF16, or use compressed-tensors.",
    _not_dispatched,
    threads=(f"{VLLM}54367", f"{VLLM}50617", f"{VLLM}55498"),
)


# ------------------------------------------------------------------------------------ NB321, NB322


def _nested_section(survey: Survey) -> Iterator[Finding]:
    if survey.sections.where.startswith("text_config."):
        yield SECTION_IN_TEXT_CONFIG.finding(
            f"{CONFIG}: the section is at {survey.sections.where}, none at the top: readers of the "
            "top level alone find an unquantized model",
            file=CONFIG,
        )


SECTION_IN_TEXT_CONFIG = Rule(
    "NB321",
    "section-in-text-config",
    Severity.NOTE,
    "quantization_config lies inside text_config",
    "Wrapped models may carry the section of their language model. Engines that know the class "
    "find it there; converters and calculators that look at the top level do not.",
    "Copy the section to the top level if a reader of yours needs it there.",
    _nested_section,
    threads=("https://github.com/ai-dynamo/aiconfigurator/pull/454",),
)


def _foreign_method(survey: Survey) -> Iterator[Finding]:
    flat, method = survey.sections.flat, survey.sections.method
    if not method or "quant_algo" not in flat or method.startswith("modelopt"):
        return
    if survey.sections.dialect == COMPRESSED_TENSORS and not flat.get("quant_algo"):
        return
    expects = flat.get("moe_quant_algo")
    yield METHOD_CONTRADICTS_ALGO.finding(
        f"{CONFIG}: quant_method is {method!r} beside quant_algo {flat.get('quant_algo')!r}"
        + (f" and moe_quant_algo {expects!r}" if expects else "")
        + f": engines that decide by quant_method see {method} and not ModelOpt's map",
        file=CONFIG,
        severity=Severity.NOTE if expects else Severity.WARNING,
    )


METHOD_CONTRADICTS_ALGO = Rule(
    "NB322",
    "method-contradicts-algo",
    Severity.WARNING,
    "quant_method is another tool's, beside ModelOpt's quant_algo",
    "Engines choose their loader by quant_method. A section that says fp8 there and "
    "MIXED_PRECISION in quant_algo is block FP8 for one engine and ModelOpt for another. "
    "DeepSeek-V4's NVFP4 files are made so on purpose, and name moe_quant_algo for the class that "
    "reads them.",
    "Write quant_method 'modelopt', unless an engine's own class expects the other.",
    _foreign_method,
    threads=("https://github.com/sgl-project/sglang/pull/25820",),
)


RULES: tuple[Rule, ...] = (
    MIXED_WITHOUT_MAP,
    UNKNOWN_ALGORITHM,
    ONE_CONFIG_OF_TWO,
    KEYS_MISSING,
    NOT_DISPATCHED,
    SECTION_IN_TEXT_CONFIG,
    METHOD_CONTRADICTS_ALGO,
)
