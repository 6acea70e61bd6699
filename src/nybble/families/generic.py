"""A family made from the names and shapes of one checkpoint, for unknown model types (`--generic`).

The rules, first match wins; a name is looked at component by component:

    vision    a component that begins with vision, visual, image, audio, multi_modal or mm_
    mtp       a component that begins with mtp or nextn
    bias      a tensor called `bias` or `..._bias`
    rotary    rotary tables: `inv_freq`, or a component that begins with rotary
    lm_head   a module called lm_head, embed_out, output_layer or score, or a top-level `output`
    embedding a module whose name contains embed, or wte, wpe
    norm      a module whose name contains norm, or begins with ln
    router    a module called gate, or whose name contains router or ends in _gate
    other     a component that contains lora or adapter
    linear    what is left, is called `weight`, and in every layer is a matrix in BF16, F16 or F32
    other     everything else

Only `linear` may be quantized; all the rest is copied. Siblings q/k/v (q_proj, query, wq ...),
gate_proj/up_proj, w1/w3 and in_proj_qkv/in_proj_z form fused groups. 3-D expert stacks are copied:
their axes are unknown. A weight is taken to be [N, K], as `torch.nn.Linear` stores it; one whose
bias says otherwise (GPT-2) is refused.

What this loses against a family: roles for recipes, and expected names and shapes (a missing tensor
goes unnoticed).
"""

from __future__ import annotations

from collections.abc import Mapping

from nybble.errors import ModelError
from nybble.families.dimensions import GENERIC
from nybble.families.family import Claim, Family, normalise
from nybble.formats.block import Shape

_FLOATS = ("BF16", "F16", "F32")
_VISION = ("vision", "visual", "image", "audio", "multi_modal", "mm_")
_MTP = ("mtp", "nextn")
_HEADS = ("lm_head", "embed_out", "output_layer", "score")
_GROUPS = {
    **dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "query", "key", "value", "wq", "wk", "wv"), "qkv"
    ),
    **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up"),
    **dict.fromkeys(("in_proj_qkv", "in_proj_z"), "qkvz"),
}


def generic_family(tensors: Mapping[str, tuple[str, Shape]]) -> Family:
    """The family of a checkpoint, from the dtype and shape of each of its tensors.

    `dimensions` of such a family knows nothing, `contradictions` and `missing` find nothing.
    Raises ModelError for a weight that is stored transposed.
    """
    is_matrix: dict[str, bool] = {}
    for name, (dtype, shape) in tensors.items():
        pattern = normalise(name)
        fits = name.endswith(".weight") and len(shape) == 2 and dtype in _FLOATS
        is_matrix[pattern] = is_matrix.get(pattern, True) and fits
    claims = tuple(_claim(pattern, fits) for pattern, fits in is_matrix.items())
    linears = {c.pattern for c in claims if c.is_linear}
    for name, (_, shape) in tensors.items():
        if normalise(name) in linears:
            _refuse_transposed(name, shape, tensors)
    return Family(
        model_type="generic",
        title="by names and shapes",
        architectures=(),
        prefixes=("",),
        claims=claims,
        reads=frozenset({GENERIC}),
    )


def _claim(pattern: str, is_matrix: bool) -> Claim:
    role = _role(pattern.split("."))
    if role or not is_matrix:
        return Claim(pattern, role or "other", needed="never")
    group = _GROUPS.get(pattern.split(".")[-2], "")
    return Claim(pattern, "linear", is_linear=True, group=group, needed="never")


def _role(words: list[str]) -> str:
    """The role that the name alone gives; "" if it says nothing against a linear."""
    leaf, module = words[-1], words[-2] if len(words) > 1 else ""
    if any(w.startswith(_VISION) for w in words):
        return "vision"
    if any(w.startswith(_MTP) for w in words):
        return "mtp"
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias"
    if leaf == "inv_freq" or any(w.startswith("rotary") for w in words):
        return "rotary"
    return _module_role(words, module)


def _module_role(words: list[str], module: str) -> str:
    if module in _HEADS or words in (["output", "weight"], ["model", "output", "weight"]):
        return "lm_head"
    if "embed" in module or module in ("wte", "wpe"):
        return "embedding"
    if "norm" in module or module.startswith("ln"):
        return "norm"
    if module in ("gate", "in_proj_a", "in_proj_b", "in_proj_ba") or "router" in module:
        return "router"
    if module.endswith("_gate"):
        return "router"
    return "other" if any("lora" in w or "adapter" in w for w in words) else ""


def _refuse_transposed(name: str, shape: Shape, tensors: Mapping[str, tuple[str, Shape]]) -> None:
    bias = tensors.get(name.removesuffix("weight") + "bias")
    if bias is not None and tuple(bias[1]) == (shape[1],) and shape[0] != shape[1]:
        raise ModelError(
            f"{name}: its bias has {shape[1]} elements, so this weight {list(shape)} is stored as "
            "[K, N], transposed; `--generic` needs [N, K], as torch.nn.Linear stores it"
        )
