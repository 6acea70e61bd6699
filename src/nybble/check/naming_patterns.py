"""Rules about the regular expressions of the configuration: what they can and cannot match."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nybble.check.declared_files import LINEAR_ROLES, VLLM, count
from nybble.check.declared_modules import exclusions
from nybble.check.naming_entries import ct_targets, representatives
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import Survey
from nybble.checkpoint.dialects import COMPRESSED_TENSORS, MODELOPT
from nybble.checkpoint.patterns import compile_pattern

# ------------------------------------------------------------------------------------------- NB407


def _patterns(survey: Survey) -> Iterator[Finding]:
    ignored = exclusions(survey)
    targets = tuple(ct_targets(survey))
    bad = [e for e in (*ignored, *targets) if e.startswith("re:") and not _compiles(e[3:])]
    if bad:
        yield UNFIT_PATTERN.finding(f"{count(bad, 'pattern')}: no regular expression", bad)
    if survey.sections.dialect == MODELOPT:
        foreign = [e for e in ignored if e.startswith("re:")]
        if foreign:
            yield UNFIT_PATTERN.finding(
                f"{count(foreign, 'entry')}: expected a glob, as ModelOpt's lists have, found "
                "compressed-tensors' re:, which matches nothing there",
                foreign,
                severity=Severity.WARNING,
            )
    elif survey.sections.dialect == COMPRESSED_TENSORS and survey.tensors and not bad:
        yield from _anchored(survey, ignored, targets)


def _compiles(pattern: str) -> bool:
    try:
        compile_pattern(pattern)
    except re.error:
        return False
    return True


def _anchored(
    survey: Survey, ignored: tuple[str, ...], targets: tuple[str, ...]
) -> Iterator[Finding]:
    """Patterns that match the file's name of a module, and not the path that vLLM gives it."""
    if not survey.contents.model_type.startswith("qwen3_5"):
        return
    if not any("ForConditionalGeneration" in a for a in _architectures(survey)):
        return
    few = [m for m in representatives(survey) if m.role in LINEAR_ROLES]
    for what, entries, wanted in (
        ("ignore", ignored, [m.name for m in few if not m.kind.is_quantized]),
        ("targets", targets, [m.name for m in few if m.kind.is_quantized]),
    ):
        match = [compile_pattern(e[3:]).match for e in entries if e.startswith("re:")]
        exact = set(entries)
        lost = [
            name
            for name in wanted
            if name not in exact
            and any(m(name) for m in match)
            and not any(m(_vllm_path(name)) for m in match)
        ]
        if lost:
            yield UNFIT_PATTERN.finding(
                f"patterns of {what} match {count(lost, 'module')}, but not vLLM's path of it, "
                f"{_vllm_path(lost[0])!r}: begin them with re:.*",
                lost,
                engine="vllm",
                list=what,
            )


def _architectures(survey: Survey) -> list[str]:
    found = survey.config.get("architectures")
    return [a for a in found if isinstance(a, str)] if isinstance(found, list) else []


def _vllm_path(name: str) -> str:
    """vLLM's mapper of the Qwen3.5 classes (models/qwen3_5.py, qwen3_vl.py)."""
    for mine, theirs in (
        ("model.visual.", "visual."),
        ("lm_head", "language_model.lm_head"),
        ("model.language_model.", "language_model.model."),
    ):
        if name.startswith(mine):
            return theirs + name[len(mine) :]
    return name


UNFIT_PATTERN = Rule(
    "NB407",
    "unfit-pattern",
    Severity.ERROR,
    "A pattern of the configuration cannot match what it is meant for",
    "compressed-tensors' patterns are matched from the start of a path, and vLLM matches them "
    "against its own path, `language_model.model.layers...`: one that begins with "
    "`model.language_model` or `lm_head` never matches there, and what it excludes is built as "
    "quantized. In ModelOpt's lists `re:` has no meaning. A pattern that is no regular expression "
    "stops every reader.",
    "Begin patterns with re:.*, and end them with $.",
    _patterns,
    threads=(f"{VLLM}48508",),
    is_repairable=True,
)


RULES: tuple[Rule, ...] = (UNFIT_PATTERN,)
