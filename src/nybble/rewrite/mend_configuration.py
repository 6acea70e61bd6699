"""Mending what the configuration says: both files written anew from the tensors that are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nybble.check.contents import Contents, Module
from nybble.check.rule import Finding
from nybble.check.survey import Survey
from nybble.checkpoint.compressed_tensors import CompressedTensors
from nybble.checkpoint.dialects import read_declaration
from nybble.checkpoint.layout import Layout, Listing
from nybble.checkpoint.modelopt import CONFIG_FILE, ModelOpt
from nybble.checkpoint.safetensors import parse_json
from nybble.errors import CheckpointError
from nybble.families import Family
from nybble.formats.scheme import (
    FP8_BLOCK_DYNAMIC,
    FP8_DYNAMIC,
    FP8_STATIC,
    MXFP4_W4A16,
    NVFP4_W4A4,
    NVFP4_W4A16,
    SCHEMES,
    Scheme,
)
from nybble.plan.jobs import Copy
from nybble.plan.listing import make_listing
from nybble.rewrite.draft import Draft
from nybble.rewrite.mend import Step

_SECTIONS = ("quantization_config", "compression_config")


def rewrite_configuration(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """One section that says what the tensors are, in the layout that they are in; ModelOpt's also
    in hf_quant_config.json."""
    layout = layout_of(draft)
    rule = findings[0].rule.id
    if layout is None:
        return
    ordered = next((n for n in draft.tensors if n.endswith(("weight_g_idx", ".g_idx"))), "")
    if ordered:
        draft.leave(rule, f"{ordered}: columns are in another order, which only actorder says")
        return
    nested = draft.document(CONFIG_FILE) if CONFIG_FILE in draft.files else None
    try:
        declared = read_declaration(draft.config, nested)
    except CheckpointError:
        declared = read_declaration({}, None)
    kv_cache = declared.kv_cache if declared.kv_cache in ("fp8",) else ""
    if kv_cache and not (layout.declares_kv_cache or draft.contents.kv_scales):
        kv_cache = ""
    listing = listing_of(
        draft.contents, draft.survey.family, kv_cache=kv_cache, version=draft.version
    )
    refusal = layout.refusal(tuple(set(listing.quantized.values())))
    if refusal:
        raise CheckpointError(f"{draft.survey.where}: {refusal}")
    plain = {k: v for k, v in draft.config.items() if k not in _SECTIONS}
    for name, data in layout.documents(plain, listing).items():
        document = parse_json(data, name)
        draft.put(rule, name, document, f"what {len(listing.quantized):,} entries hold")
    if layout.name != "modelopt" and CONFIG_FILE in draft.files:
        draft.drop_file(rule, CONFIG_FILE, f"the tensors are in the layout {layout.name}")


def layout_of(draft: Draft) -> Layout | None:
    """The layout that the quantized tensors are in; None where they are in none, or in several."""
    leaves = {
        name.rpartition(".")[2] for m in draft.quantized for name in (t.name for t in m.tensors)
    }
    is_packed = "weight_packed" in leaves
    is_modelopt = "weight_scale_2" in leaves
    if is_packed and is_modelopt:
        return None
    if is_packed:
        return CompressedTensors()
    if is_modelopt:
        return ModelOpt()
    section = draft.config.get("quantization_config")
    method = str(section.get("quant_method") or "") if isinstance(section, dict) else ""
    if method.startswith("compressed"):
        return CompressedTensors()
    return ModelOpt() if leaves else None


def scheme_of(module: Module, *, has_inputs: bool = True) -> Scheme:
    """The scheme of a quantized module.

    Declared W4A4 where no module has an input scale, it can only run weight-only: `has_inputs`.
    Raises CheckpointError for a format that nybble has no scheme for.
    """
    held, declared = module.kind.held, module.declared
    if declared is not None and declared.scheme:
        scheme = SCHEMES[declared.scheme]
        is_runnable = has_inputs or scheme is not NVFP4_W4A4
        if scheme.weight is not None and scheme.weight.name == held and is_runnable:
            return scheme
    known = {
        "nvfp4": NVFP4_W4A4
        if has_inputs and declared and declared.activation == "FP4"
        else NVFP4_W4A16,
        "fp8": FP8_STATIC if module.kind.has_input_scale else None,
        "fp8_channel": FP8_DYNAMIC,
        "fp8_block": FP8_BLOCK_DYNAMIC,
        "mxfp4": MXFP4_W4A16,
    }
    found = known.get(held)
    if found is None:
        without = " without an input scale" if held == "fp8" else ""
        raise CheckpointError(
            f"{module.name}: holds {held}{without}, for which there is no scheme; known are "
            f"{', '.join(SCHEMES)}"
        )
    return found


def listing_of(
    contents: Contents, family: Family | None, *, kv_cache: str, version: str
) -> Listing:
    """Everything that a configuration has to say of these modules.

    Raises CheckpointError without a family, whose roles decide what engines build as linears, and
    for a format that has no scheme.
    """
    if family is None:
        raise CheckpointError(
            "the model type is unknown, so what a configuration has to name is unknown too"
        )
    held = [m for m in contents.modules if m.kind.is_quantized]
    has_inputs = any(m.kind.has_input_scale for m in held if m.kind.held == "nvfp4")
    quantized = [(m.name, m.role, scheme_of(m, has_inputs=has_inputs)) for m in held]
    copies = [
        Copy(tensor, m.role)
        for m in contents.modules
        if not m.kind.is_quantized
        for tensor in m.tensors
    ]
    return make_listing(
        quantized,
        copies,
        family,
        kv_cache=kv_cache,
        version=version,
        has_kv_scales=bool(contents.kv_scales),
    )


def restore_settings(draft: Draft, source: Survey | None, findings: Sequence[Finding]) -> None:
    """The settings of the network that are the source's: each key that a finding names."""
    assert source is not None
    config = draft.document("config.json")
    for finding in findings:
        for subject in finding.subjects:
            path = subject.partition(": ")[0].split(".")
            _set(config, path, _get(source.config, path))
    draft.put(findings[0].rule.id, "config.json", config, "; ".join(findings[0].subjects[:5]))


def _get(document: Mapping[str, object], path: Sequence[str]) -> object:
    value: object = document
    for key in path:
        assert isinstance(value, Mapping)
        value = value[key]
    return value


def _set(document: dict[str, object], path: Sequence[str], value: object) -> None:
    for key in path[:-1]:
        inner = document[key]
        assert isinstance(inner, dict)
        document = inner
    document[path[-1]] = value


STEPS: tuple[Step, ...] = (
    Step(("NB121",), restore_settings, needs_source=True),
    Step(
        (
            *("NB014", "NB106", "NB301", "NB302", "NB303", "NB304", "NB305", "NB306", "NB307"),
            *(
                "NB308",
                "NB309",
                "NB310",
                "NB311",
                "NB312",
                "NB313",
                "NB315",
                "NB316",
                "NB317",
                "NB318",
            ),
            *("NB319", "NB401", "NB402", "NB403", "NB404", "NB405", "NB407", "NB103", "NB107"),
            *("NB323", "NB411", "NB412"),
        ),
        rewrite_configuration,
    ),
)
