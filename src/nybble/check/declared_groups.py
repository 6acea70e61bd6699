"""Rules about compressed-tensors' groups, and about what is declared of the KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nybble.check.declared_files import SGLANG, count
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import CONFIG, Survey
from nybble.checkpoint.dialects import COMPRESSED_TENSORS

_SGL_COOKBOOK = "https://github.com/sgl-project/sgl-cookbook/issues/"
_MIXED = "mixed-precision"
_GROUP_KEYS = frozenset(("targets", "weights", "input_activations", "output_activations", "format"))
_ARGS_KEYS = frozenset(
    (
        *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic"),
        *("actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
    )
)


def _groups_of(survey: Survey) -> dict[str, Mapping[str, object]]:
    """The groups of a compressed-tensors section that are objects."""
    groups = survey.sections.flat.get("config_groups")
    if survey.sections.dialect != COMPRESSED_TENSORS or not isinstance(groups, Mapping):
        return {}
    return {str(name): group for name, group in groups.items() if isinstance(group, Mapping)}


def _without_format(survey: Survey) -> Iterator[Finding]:
    if survey.sections.flat.get("format") != _MIXED:
        return
    groups = _groups_of(survey)
    bad = [name for name, group in groups.items() if group.get("format") in (None, "", _MIXED)]
    if bad:
        yield GROUP_WITHOUT_FORMAT.finding(
            f"{CONFIG}: {count(bad, 'group')}: the section's format is {_MIXED!r}, expected a "
            f"format of its own in each group, found {groups[bad[0]].get('format')!r}",
            bad,
            file=CONFIG,
        )


GROUP_WITHOUT_FORMAT = Rule(
    "NB317",
    "group-without-format",
    Severity.ERROR,
    "A group under mixed-precision has no format of its own",
    "A group without a format inherits 'mixed-precision', which says nothing of its tensors: vLLM "
    "then stops at FP8 groups with 'No compressed-tensors compatible scheme was found'.",
    "Give every group its format: nvfp4-pack-quantized, float-quantized ...",
    _without_format,
    threads=("https://github.com/vllm-project/vllm/pull/22468",),
    is_repairable=True,
)


def _fields(survey: Survey) -> Iterator[Finding]:
    unknown: list[str] = []
    reordered: list[str] = []
    for name, group in _groups_of(survey).items():
        unknown += [f"{name}.{key}" for key in group if key not in _GROUP_KEYS]
        for part in ("weights", "input_activations", "output_activations"):
            arguments = group.get(part)
            if isinstance(arguments, Mapping):
                unknown += [f"{name}.{part}.{key}" for key in arguments if key not in _ARGS_KEYS]
                order = arguments.get("actorder")
                if order is True or str(order).lower() in ("group", "dynamic"):
                    reordered.append(f"{name}.{part}.actorder")
    if unknown:
        yield REFUSED_FIELD.finding(
            f"{CONFIG}: {count(unknown, 'field')}: compressed-tensors knows no such field and "
            "refuses the section; expected only those of QuantizationArgs and QuantizationScheme",
            unknown,
            file=CONFIG,
            kind="unknown",
        )
    if reordered:
        yield REFUSED_FIELD.finding(
            f"{CONFIG}: {count(reordered, 'field')} reorders activations by group: "
            "compressed-tensors 0.20 and vLLM no longer take it; expected null, 'static' or "
            "'weight'",
            reordered,
            file=CONFIG,
            kind="actorder",
        )
    lacking = [name for name, group in _groups_of(survey).items() if "targets" not in group]
    if lacking:
        yield REFUSED_FIELD.finding(
            f"{CONFIG}: {count(lacking, 'group')}: expected targets, found none; "
            "compressed-tensors refuses a group without",
            lacking,
            file=CONFIG,
            kind="targets",
        )
    yield from _sparsity(survey)


def _sparsity(survey: Survey) -> Iterator[Finding]:
    found = survey.sections.flat.get("sparsity_config")
    is_ct = survey.sections.dialect == COMPRESSED_TENSORS
    if is_ct and isinstance(found, Mapping) and found.get("targets"):
        yield REFUSED_FIELD.finding(
            f"{CONFIG}: sparsity_config has targets: vLLM refuses sparse checkpoints; expected "
            "{} or none",
            file=CONFIG,
            kind="sparsity",
        )


REFUSED_FIELD = Rule(
    "NB318",
    "refused-field",
    Severity.ERROR,
    "A compressed-tensors section has a field that its readers refuse",
    "Groups are validated with extra fields forbidden, so one unknown word stops transformers, "
    "vLLM and SGLang alike. `actorder: group` and sparsity were valid once and are refused now.",
    "Take the field out; for actorder, requantize.",
    _fields,
    threads=("https://github.com/vllm-project/compressed-tensors/pull/599",),
    is_repairable=True,
)


# ------------------------------------------------------------------------------------------- NB319


def _kv_cache(survey: Survey) -> Iterator[Finding]:
    if not survey.tensors:
        return
    scales = [t.name for t in survey.contents.kv_scales if not t.name.endswith(".q_scale")]
    declared = survey.declaration.kv_cache
    if declared and not scales:
        yield _without_scales(survey, declared)
    elif scales and not declared and survey.declaration.layout:
        yield KV_CACHE.finding(
            f"{count(scales, 'KV scale')}: expected a KV cache format in the configuration, found "
            "none; engines keep the cache in BF16 and may stop at the tensor",
            scales,
            severity=Severity.WARNING,
            kind="undeclared",
        )
    yield from _single(scales)


def _without_scales(survey: Survey, declared: str) -> Finding:
    is_ct = survey.declaration.layout == COMPRESSED_TENSORS
    return KV_CACHE.finding(
        f"the KV cache is declared {declared} and no k_scale or v_scale is stored: engines use 1.0"
        + (", and compressed-tensors readers warn of every layer" if is_ct else ""),
        severity=Severity.WARNING if is_ct else Severity.NOTE,
        kind="no scales",
    )


def _single(scales: list[str]) -> Iterator[Finding]:
    """Layers with one of the two scales."""
    have: dict[str, set[str]] = {}
    for name in scales:
        head, _, leaf = name.rpartition(".")
        layer = head.removesuffix(f".{leaf[0]}_proj")
        have.setdefault(layer, set()).add(leaf)
    for leaf, does, severity in (
        ("k_scale", "vLLM stops with an assertion", Severity.ERROR),
        ("v_scale", "vLLM uses the keys' scale for the values too", Severity.WARNING),
    ):
        lacking = [layer for layer, found in have.items() if leaf not in found]
        if lacking:
            yield KV_CACHE.finding(
                f"{count(lacking, 'layer')}: expected k_scale and v_scale, {leaf} is missing: "
                f"{does}",
                lacking,
                severity=severity,
                kind=f"no {leaf}",
            )


KV_CACHE = Rule(
    "NB319",
    "kv-cache-scales",
    Severity.NOTE,
    "The declared KV cache format and the stored KV scales do not go together",
    "An FP8 KV cache may come with a k_scale and a v_scale per attention layer. Published files "
    "declare FP8 without any, and engines cast with scale 1.0; in compressed-tensors readers "
    "expect the tensors. Scales that nothing declares are ignored or stop the load, and a layer "
    "with one of the two stops vLLM or uses it for both.",
    "Declare the format if scales are stored; store both scales or none.",
    _kv_cache,
    threads=(f"{_SGL_COOKBOOK}237", f"{SGLANG}25792"),
    is_repairable=True,
)


RULES: tuple[Rule, ...] = (GROUP_WITHOUT_FORMAT, REFUSED_FIELD, KV_CACHE)
