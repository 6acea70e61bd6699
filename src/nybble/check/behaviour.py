"""Rules about what goes along with the weights (NB5xx): sampling defaults, image processor, and the
subjects that have files of their own: code, tokenizer, chat template, known-bad combinations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nybble.check import behaviour_code, behaviour_tokenizer, known_bad, templates
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import Survey

GENERATION = "generation_config.json"
#: transformers 5 writes the second in place of the first.
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
#: What changes the answers. Others are of a version, or of a request.
_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "eos_token_id", "suppress_tokens", "bad_words_ids"),
)


def _generation(survey: Survey) -> Iterator[Finding]:
    ours = survey.documents.get(GENERATION)
    theirs = survey.source.documents.get(GENERATION) if survey.source else None
    if ours is None:
        yield from _no_generation(survey, theirs)
    elif theirs is not None:
        yield from _other_generation(ours, theirs)


def _no_generation(survey: Survey, theirs: Mapping[str, object] | None) -> Iterator[Finding]:
    if GENERATION in survey.names or not survey.config:
        return  # there, and no JSON: another rule's
    if theirs is not None:
        yield GENERATION_DIFFERS.finding(
            f"{GENERATION}: the source has one, this checkpoint has none: expected the same",
            file=GENERATION,
        )
    elif survey.source is None:
        yield GENERATION_DIFFERS.finding(
            f"{GENERATION} is missing: engines sample with their own defaults, and stop at the "
            "eos_token_id of config.json alone",
            file=GENERATION,
            severity=Severity.NOTE,
        )


def _other_generation(
    ours: Mapping[str, object], theirs: Mapping[str, object]
) -> Iterator[Finding]:
    changed = [key for key in _SAMPLING if ours.get(key) != theirs.get(key)]
    # ModelOpt switches it on where top_k or top_p is set, without which the file would not load.
    is_switched = bool(ours.get("do_sample")) != bool(theirs.get("do_sample"))
    if changed:
        parts = [f"{k} {theirs.get(k)} became {ours.get(k)}" for k in changed]
        yield GENERATION_DIFFERS.finding(
            f"{GENERATION}: differs from the source's: {', '.join(parts)}", changed, file=GENERATION
        )
    elif is_switched:
        yield GENERATION_DIFFERS.finding(
            f"{GENERATION}: do_sample {theirs.get('do_sample')} became {ours.get('do_sample')}: "
            "engines that sample by it answer otherwise than the source",
            ["do_sample"],
            file=GENERATION,
            severity=Severity.NOTE,
        )


def _processor(survey: Survey) -> Iterator[Finding]:
    if not templates.advertises_vision(survey) or _has_processor(survey):
        return
    inherited = survey.source is not None and not _has_processor(survey.source)
    yield PROCESSOR_MISSING.finding(
        f"config.json has a vision tower, but there is no {' or '.join(PROCESSORS)}: expected one",
        file=PROCESSORS[0],
        severity=Severity.NOTE if inherited else None,
    )


def _has_processor(survey: Survey) -> bool:
    return any(name in survey.names for name in PROCESSORS)


GENERATION_DIFFERS = Rule(
    "NB515",
    "generation-config",
    Severity.WARNING,
    "generation_config.json is missing or changed",
    "Engines take their default sampling and the tokens to stop at from this file. Without it, or "
    "with other values, the same prompt is answered with another temperature, or the answer does "
    "not stop; comparisons with the source measure that and not the quantization. ModelOpt forces "
    "do_sample where top_k or top_p is set: a note.",
    "Copy generation_config.json from the source.",
    _generation,
    threads=("https://github.com/JustVugg/colibri/issues/1478",),
    is_repairable=True,
)
PROCESSOR_MISSING = Rule(
    "NB516",
    "image-processor-missing",
    Severity.WARNING,
    "Vision is advertised, but the image processor's configuration is missing",
    "config.json has a vision tower; how images become patches is said in "
    "preprocessor_config.json. Without it engines refuse to start, refuse images, or accept and "
    "discard them.",
    "Copy preprocessor_config.json (and video_preprocessor_config.json) from the source.",
    _processor,
    threads=("https://github.com/ollama/ollama/issues/17501",),
    is_repairable=True,
)

RULES: tuple[Rule, ...] = (
    *behaviour_code.RULES,
    *behaviour_tokenizer.RULES,
    *templates.RULES,
    GENERATION_DIFFERS,
    PROCESSOR_MISSING,
    *known_bad.RULES,
)
