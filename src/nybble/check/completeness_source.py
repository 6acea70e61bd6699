"""Rules that hold a checkpoint against its source: nothing lost, nothing added (NB101,
NB102).

Names are compared as those of unquantized weights, with experts stacked or one by one, and under
every prefix that the family knows. What the tensors hold is for others.
"""

from __future__ import annotations

from collections.abc import Iterator

from nybble.check.completeness_inventory import take_inventory
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import Survey
from nybble.check.wording import first_of, plural
from nybble.families import Family

#: Stacks of experts and the projections that their rows divide into.
STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
UNNEEDED = ("rotary",)


def _missing(survey: Survey) -> Iterator[Finding]:
    source = survey.source
    if source is None:
        return
    have = take_inventory(survey).names
    lost = [
        name
        for name in sorted(take_inventory(source).names)
        if not _is_there(survey, source, name, have) and _is_needed(survey, name)
    ]
    if lost:
        yield SOURCE_TENSOR_MISSING.finding(
            f"{plural(len(lost), 'tensor')} of the source "
            f"{'is' if len(lost) == 1 else 'are'} in no form in this checkpoint, "
            f"{first_of(lost, len(lost))}",
            lost,
            tensors=lost,
        )


def _added(survey: Survey) -> Iterator[Finding]:
    source = survey.source
    if source is None:
        return
    have = take_inventory(source).names
    added = [
        name
        for name in sorted(take_inventory(survey).names)
        if not _is_there(source, survey, name, have)
        and not (is_untied(survey) and head_of_tied(source, name))
    ]
    if added:
        yield NOT_IN_SOURCE.finding(
            f"{plural(len(added), 'tensor')} that the source does not have in any form, "
            f"{first_of(added, len(added))}",
            added,
            tensors=added,
        )


def _is_needed(survey: Survey, name: str) -> bool:
    """False for tensors that a model can do without: rotary tables, the head of a tied model."""
    claimed = survey.family.claim(name) if survey.family else None
    if claimed is None:
        return not name.endswith("rotary_emb.inv_freq")
    is_tied = survey.dimensions is not None and survey.dimensions.tied
    return not (claimed.claim.role in UNNEEDED or (claimed.claim.role == "lm_head" and is_tied))


def _is_there(survey: Survey, other: Survey, name: str, have: set[str]) -> bool:
    """Whether a tensor of `other` is in the survey: by name, prefix, stacked or split."""
    if name in have:
        return True
    return any(
        spelled in have or _is_converted(other, name, spelled, have)
        for spelled in spellings(survey.family, name)
    )


def _is_converted(other: Survey, name: str, spelled: str, have: set[str]) -> bool:
    container, _, leaf = spelled.rpartition(".")
    if leaf in STACKS and container.endswith("experts"):
        info = other.tensors.get(name)
        count = info.shape[0] if info is not None and len(info.shape) == 3 else 1
        parts = (f"{container}.{e}.{p}.weight" for e in range(count) for p in STACKS[leaf])
        return all(part in have for part in parts)
    if leaf != "weight":
        return False
    expert, _, projection = container.rpartition(".")
    experts, _, number = expert.rpartition(".")
    if not number.isdigit() or not experts.endswith("experts"):
        return False
    stack = next((s for s, parts in STACKS.items() if projection in parts), "")
    return bool(stack) and f"{experts}.{stack}" in have


def spellings(family: Family | None, name: str) -> Iterator[str]:
    """The name under every prefix that it may have."""
    claimed = family.claim(name) if family else None
    yield name
    if family is not None and claimed is not None:
        tail = name[len(claimed.prefix) :]
        for prefix in claimed.claim.prefixes or family.prefixes:
            if prefix != claimed.prefix:
                yield prefix + tail


def is_untied(survey: Survey) -> bool:
    """Whether readers use a head of its own, going by config.json."""
    return survey.dimensions is not None and not survey.dimensions.tied


def head_of_tied(source: Survey, name: str) -> str:
    """The source's embedding, where `name` is an output head and the source has none of its own:
    what such a head of another form of the model was made of. Else ""."""
    family = source.family
    claimed = family.claim(name) if family else None
    if family is None or claimed is None or claimed.claim.role != "lm_head":
        return ""
    if source.dimensions is None or not source.dimensions.tied:
        return ""
    found = ""
    for tensor in source.tensors:
        other = family.claim(tensor)
        role = other.claim.role if other is not None else ""
        if role == "lm_head":  # readers leave it aside; whether it is the embedding is open
            return ""
        found = tensor if role == "embedding" else found
    return found


# -------------------------------------------------------------------------------------- the rules

_GITHUB = "https://github.com/"

SOURCE_TENSOR_MISSING = Rule(
    "NB101",
    "source-tensor-missing",
    Severity.ERROR,
    "A tensor of the source is in no form in the checkpoint",
    "Every tensor of the source must have been copied, quantized, or split into the experts that "
    "it stacks. Tools that save what the model class builds lose what it does not build: MTP "
    "heads, whole files that hold one of them, vision towers. The result looks consistent.",
    "Copy the tensors from the source, and exclude what must stay unquantized.",
    _missing,
    threads=(
        f"{_GITHUB}areal-project/AReaL/pull/1403",
        f"{_GITHUB}NVIDIA/Model-Optimizer/pull/2427",
    ),
    is_repairable=True,
    needs=frozenset({"source"}),
)
NOT_IN_SOURCE = Rule(
    "NB102",
    "tensor-not-in-source",
    Severity.WARNING,
    "A tensor that the source does not have",
    "The name has no like in the source under any prefix, stacked or split: a spelling from inside "
    "a program that was saved as it was, or a leftover of another run. Engines stop at it, or skip "
    "it and leave what they expected unset. The output head that an untied form of a tied model "
    "has is no such tensor; one that config.json still ties is, for no reader looks at it.",
    "Rename it to what the source calls it, or remove it.",
    _added,
    needs=frozenset({"source"}),
)
RULES: tuple[Rule, ...] = (SOURCE_TENSOR_MISSING, NOT_IN_SOURCE)
