"""Rules about input scales, and what else beside a weight speaks of its input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nybble.check.contents import INPUT_SCALES, Module
from nybble.check.declared_files import AICONFIGURATOR, TENSORRT_LLM, VLLM, count
from nybble.check.declared_modules import leaves, names_of
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import Survey

_LORA = ("svdquant_lora_a", "svdquant_lora_b")


# ------------------------------------------------------------------------------------ NB314, NB315


def _residual(survey: Survey) -> Iterator[Finding]:
    found = [g for g in survey.contents.alike if g[0].kind.is_quantized and g[0].kind.has_residual]
    if found:
        words = sorted({str(g[0].declared) for g in found})
        yield WEIGHT_ONLY_WITH_INPUT_SCALE.finding(
            f"{count(names_of(found), 'module')}: declared {', '.join(words)}, which reads no "
            "input scale, and stored with one: vLLM, SGLang and llama.cpp drop it and run W4A16, "
            "TensorRT-LLM has run such files as W4A4",
            names_of(found),
        )


WEIGHT_ONLY_WITH_INPUT_SCALE = Rule(
    "NB314",
    "weight-only-with-input-scale",
    Severity.NOTE,
    "A weight-only module carries an input scale",
    "NVIDIA's published Qwen3.6 checkpoints do: W4A16_NVFP4 is declared and every module has a "
    "measured input_scale. The declaration counts, and the scale is dropped with a warning; an "
    "engine that goes by the tensors runs W4A4 instead. Never an error.",
    "Nothing; `nybble convert` leaves the scales out unless asked to keep them.",
    _residual,
    threads=(f"{VLLM}45132", f"{TENSORRT_LLM}15680", f"{AICONFIGURATOR}1513"),
    is_repairable=True,
)


def _without_input_scale(survey: Survey) -> Iterator[Finding]:
    """All experts of all layers, or any other module: of some experts another rule speaks."""
    lacking: list[Module] = []
    has = set()
    for group in survey.contents.alike:
        first = group[0]
        declared, held = first.declared, first.kind.held
        if not (first.kind.is_quantized and declared and declared.needs_input_scale):
            continue
        if declared.weight and held.partition("/")[0] != declared.weight.partition("/")[0]:
            continue  # another format than declared is a fault of its own
        if first.kind.has_input_scale:
            has |= {_experts_of(m.name) for m in group}
        else:
            lacking += group
    names = [m.name for m in lacking if _experts_of(m.name) not in has]
    if names:
        yield NO_INPUT_SCALE.finding(
            f"{count(names, 'module')}: declared {_declared_as(lacking, names)}, with static "
            f"activation scales, expected {' or '.join(INPUT_SCALES)}, found none",
            names,
        )


def _declared_as(modules: list[Module], names: list[str]) -> str:
    return next(str(m.declared) for m in modules if m.name == names[0])


def _experts_of(name: str) -> str:
    """All experts' projection of that name; other modules stand for themselves."""
    _, found, tail = name.partition(".experts.")
    return f"experts{tail.lstrip('0123456789')}" if found else name


NO_INPUT_SCALE = Rule(
    "NB315",
    "activations-without-input-scale",
    Severity.ERROR,
    "Quantized activations are declared, and no input scale is stored",
    "W4A4 and static FP8 need a measured scale per module. The engine's slot keeps what memory "
    "held, or zero: 1/0 becomes infinity and then NaN. Nothing is raised, because engines do not "
    "track missing tensors of quantized models.",
    "Calibrate input scales, or declare the modules weight-only (W4A16_NVFP4).",
    _without_input_scale,
    threads=(f"{VLLM}45212",),
    is_repairable=True,
)


# ------------------------------------------------------------------------------------------- NB320


def _smoothed(survey: Survey) -> Iterator[Finding]:
    found: dict[str, list[Sequence[Module]]] = {}
    for group in survey.contents.alike:
        for leaf in ("pre_quant_scale", *_LORA):
            if leaf in leaves(group[0]):
                found.setdefault(leaf, []).append(group)
    for leaf, groups in found.items():
        words = {str(g[0].declared) for g in groups}
        is_said = all("AWQ" in word.upper() or "SVD" in word.upper() for word in words)
        does = (
            "vLLM refuses that algorithm; SGLang takes NVFP4_AWQ"
            if is_said
            else "engines that read the declared format ignore it and multiply with weights that "
            "were scaled for it"
        )
        yield SMOOTHED.finding(
            f"{count(names_of(groups), 'module')}: {leaf} is stored, declared is "
            f"{', '.join(sorted(words))}: {does}",
            names_of(groups),
            severity=Severity.WARNING if is_said else Severity.ERROR,
            leaf=leaf,
        )


SMOOTHED = Rule(
    "NB320",
    "activation-smoothing",
    Severity.ERROR,
    "Weights need a pre_quant_scale or a low-rank correction that engines do not apply",
    "AWQ scales the columns of a weight and divides the input by the same numbers; SVDQuant adds a "
    "low-rank term. vLLM refuses NVFP4_AWQ and knows neither tensor, so a file that declares plain "
    "NVFP4 beside them answers wrongly.",
    "Fold pre_quant_scale into the norm or linear before, or requantize without it.",
    _smoothed,
    threads=(
        "https://github.com/vllm-project/vllm/issues/45333",
        "https://github.com/vllm-project/vllm-omni/pull/5087",
    ),
)


RULES: tuple[Rule, ...] = (WEIGHT_ONLY_WITH_INPUT_SCALE, NO_INPUT_SCALE, SMOOTHED)
