"""Mending what is missing, double or misnamed: tensors, side files, shards, code hooks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from nybble.check.behaviour_code import is_hook
from nybble.check.rule import Finding
from nybble.check.survey import Survey
from nybble.checkpoint.reader import INDEX
from nybble.checkpoint.safetensors import TensorInfo
from nybble.families import Family
from nybble.rewrite.draft import Draft
from nybble.rewrite.mend import Step

#: Roles that stay as they are in every recipe: their tensors come over from the source as they are.
_COPIED = frozenset(
    (
        *("mtp", "vision", "norm", "embedding", "router", "shared_expert_gate", "bias", "rotary"),
        *("linear_attention_gate", "linear_attention_state", "lm_head"),
    )
)
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt"),
)
_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")


# --------------------------------------------------------------------------------------- tensors


def restore_tensors(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """What the source has and the checkpoint lacks, of the roles that no recipe touches."""
    assert source is not None
    rule = findings[0].rule.id
    for name, info in _lacking(draft, source):
        draft.take(rule, source, info, f"{info.dtype} {list(info.shape)} of the source, {name}")


def _lacking(draft: Draft, source: Survey) -> Iterator[tuple[str, TensorInfo]]:
    family = source.family or draft.survey.family
    modules = {name.rpartition(".")[0] for name in draft.tensors}
    for name, info in source.tensors.items():
        role = _role(family, name)
        if name in draft.tensors or role not in _COPIED:
            continue
        # A quantizer may have split or quantized the module: then it is there in another form.
        if _is_there_otherwise(name, modules):
            continue
        yield role, info


def _is_there_otherwise(name: str, modules: set[str]) -> bool:
    module, _, leaf = name.rpartition(".")
    if leaf in ("gate_up_proj", "down_proj"):  # a stack, which may be there expert by expert
        return f"{module}.0.{'gate_proj' if leaf == 'gate_up_proj' else leaf}" in modules
    return leaf == "weight" and module in modules


def _role(family: Family | None, name: str) -> str:
    claimed = family.claim(name) if family else None
    if claimed is not None:
        return claimed.claim.role
    if re.match(r"(model\.)?mtp\.", name):
        return "mtp"
    return "vision" if re.match(r"(model\.)?(visual|vision_tower)\.", name) else ""


def restore_copies(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """Unquantized tensors that were to be copies, and are not.

    Not norms that smoothing changed: the codes were made for these. Nor many tensors: then the
    source is another model, or the checkpoint is a fine-tune of it.
    """
    assert source is not None
    rule = findings[0].rule.id
    meant = [f for f in findings if f.facts.get("kind") in ("values", "dtype")]
    for f in findings:
        if f not in meant:
            draft.leave(rule, f"{f.message}: they belong to the codes")
    values = [f for f in meant if f.facts.get("kind") == "values"]
    many = next((f for f in values if len(f.subjects) > max(3, _copies_of(f) // 10)), None)
    if many is not None:
        draft.leave(
            rule,
            f"{len(many.subjects)} of {_copies_of(many)} copies have other values than in the "
            f"source: {source.where} is another model, or this is a fine-tune of it",
        )
        meant = [f for f in meant if f is not many]
    for name in _subjects(meant):
        info, here = source.tensors.get(name), draft.tensors.get(name)
        if info is not None and here is not None:
            words = f"the source's {info.dtype} instead of {here.dtype}"
            draft.take(rule, source, info, words)


def _copies_of(finding: Finding) -> int:
    copies = finding.facts.get("copies")
    return copies if isinstance(copies, int) else 0


def drop_doubles(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """A plain weight beside the packed one of the same module; a stack beside its experts."""
    rule = findings[0].rule.id
    for module in list(draft.contents.modules):
        plain, packed = module.tensor("weight"), module.tensor("weight_packed")
        if plain is not None and packed is not None and plain.dtype in ("BF16", "F16", "F32"):
            draft.drop(rule, plain.name, f"{plain.dtype} beside {packed.name}")
        for leaf, split in (("gate_up_proj", "gate_proj"), ("down_proj", "down_proj")):
            stack = module.tensor(leaf)
            expert = draft.contents.by_name.get(f"{module.name}.0.{split}")
            if stack is not None and expert is not None and expert.kind.is_quantized:
                draft.drop(
                    rule, stack.name, f"the experts are there one by one, {expert.kind.held}"
                )


def rename_prefix(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """Names below a prefix that the family does not know, put below the one that it does."""
    family = draft.survey.family
    if family is None:
        return
    renamed = {}
    for name in draft.tensors:
        if family.claim_module(name.rpartition(".")[0]) is None and family.claim(name) is None:
            for turned in _turned(name):
                module = turned.rpartition(".")[0]
                if family.claim(turned) or family.claim_module(module):
                    renamed[name] = turned
                    break
    if renamed:
        draft.rename(findings[0].rule.id, renamed, "the prefix that engines know")


def _turned(name: str) -> Iterator[str]:
    """What a name may have been before it was turned around, nested twice or suffixed."""
    for pattern, to in (
        (r"^language_model\.model\.", "model.language_model."),
        (r"^model\.language_model\.language_model\.", "model.language_model."),
        (r"^model\.model\.", "model."),
        (r"^model\.language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^model\.lm_head\.", "lm_head."),
        (r"^visual\.", "model.visual."),
        (r"^model\.language_model\.visual\.", "model.visual."),
        (r"^model\.mtp\.", "mtp."),
        (r"^language_model\.", "model.language_model."),
        (r"^model\.", "model.language_model."),
    ):
        turned = re.sub(pattern, to, name)
        if turned != name:
            yield turned


# ----------------------------------------------------------------------------------------- shards


def reindex(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """Shards and index are written anew from what the model's shards hold; others stay behind."""
    survey, rule = draft.survey, findings[0].rule.id
    used = {info.file for info in survey.tensors.values()}
    for name, shard in survey.shards.items():
        if name in used:
            continue
        parts = [t for n, t in shard.tensors.items() if _is_part(draft, n)]
        for tensor in parts:
            draft.take(rule, survey, tensor, f"of {name}, which the index does not name")
        left = len(shard.tensors) - len(parts)
        draft.drop_file(rule, name, f"{left} of its {len(shard.tensors)} tensors are left out")
    draft.drop_file(rule, INDEX, "made anew from the shards")


def _is_part(draft: Draft, name: str) -> bool:
    """A tensor of the model that no other file has."""
    if name in draft.tensors:
        return False
    family = draft.survey.family
    if family is None:
        return False
    module = name.rpartition(".")[0]
    return family.claim(name) is not None or family.claim_module(module) is not None


def drop_pickles(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """Pickle files stay behind: nothing of a checkpoint is ever to be executed."""
    if not draft.tensors:
        draft.leave(findings[0].rule.id, "the pickles hold the only weights; convert them first")
        return
    for name in draft.survey.names:
        if name.endswith(_PICKLES):
            draft.drop_file(findings[0].rule.id, name, "a pickle")


# ------------------------------------------------------------------------------------- side files


def restore_tokenizer(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """The source's tokenizer, all its files."""
    _take_files(draft, source, findings, _TOKENIZER)


def restore_template(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """The source's chat template, wherever it keeps it."""
    _take_files(draft, source, findings, (*_TEMPLATES, "tokenizer_config.json"))


def restore_generation(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """The source's sampling defaults."""
    _take_files(draft, source, findings, ("generation_config.json",))


def restore_processor(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """The source's image and video processors."""
    _take_files(draft, source, findings, _PROCESSOR)


def _take_files(
    draft: Draft, source: Survey | None, findings: Sequence[Finding], names: Iterable[str]
) -> None:
    assert source is not None
    for name in names:
        if name in source.names:
            draft.take_file(findings[0].rule.id, source, name, "the source's")


def unite_templates(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """chat_template.jinja is what engines read; tokenizer_config.json then says the same."""
    config = draft.document("tokenizer_config.json")
    if "chat_template.jinja" in draft.files and "chat_template" in config:
        config["chat_template"] = draft.file_bytes("chat_template.jinja").decode()
        words = "chat_template is that of chat_template.jinja"
        draft.put(findings[0].rule.id, "tokenizer_config.json", config, words)


def drop_hooks(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """Keys that make a loader import code of the folder, and the code."""
    rule = findings[0].rule.id
    for name in list(draft.files):
        if name.endswith(".json") and name in draft.survey.documents:
            document = draft.document(name)
            cleaned = _without_hooks(document)
            if cleaned != document and isinstance(cleaned, dict):
                draft.put(rule, name, cleaned, "without the keys that ask for code")
        elif name.endswith((".py", ".pyc", ".so")):
            draft.drop_file(rule, name, "code")


def _without_hooks(value: object) -> object:
    if isinstance(value, Mapping):
        return {k: _without_hooks(v) for k, v in value.items() if not is_hook(str(k), v)}
    return [_without_hooks(v) for v in value] if isinstance(value, list) else value


def _subjects(findings: Iterable[Finding]) -> list[str]:
    return [subject for finding in findings for subject in finding.subjects]


STEPS: tuple[Step, ...] = (
    Step(("NB403", "NB404"), rename_prefix),
    Step(
        ("NB004", "NB005", "NB006", "NB007", "NB008", "NB012", "NB018", "NB019", "NB023"), reindex
    ),
    Step(("NB011", "NB503"), drop_pickles),
    Step(("NB112",), drop_doubles),
    Step(
        ("NB101", "NB103", "NB104", "NB107", "NB110", "NB119"),
        restore_tensors,
        needs_source=True,
    ),
    Step(("NB113",), restore_copies, needs_source=True),
    Step(("NB504", "NB505", "NB518", "NB519"), restore_tokenizer, needs_source=True),
    Step(("NB506", "NB507", "NB508"), restore_template, needs_source=True),
    Step(("NB515",), restore_generation, needs_source=True),
    Step(("NB516",), restore_processor, needs_source=True),
    Step(("NB517",), unite_templates),
    Step(("NB501", "NB502"), drop_hooks),
)
