"""Which scales of an FP8 KV cache a checkpoint stores: two for every attention layer, or none.

All or none, for engines that find some: a layer's keys without its values, or the reverse, stops
vLLM or is taken for both, and readers of compressed-tensors compute with whatever was in memory.
The values are measured when the plan is executed. The MTP head's layer stays at 1.0: engines load
it apart, and are not known to look for its scales.
"""

from __future__ import annotations

from collections.abc import Mapping

from nybble.checkpoint.layout import Layout
from nybble.errors import RecipeError
from nybble.families import Claimed
from nybble.plan.jobs import KvScale
from nybble.plan.recipe import Recipe

#: What an attention layer of the trunk is known by.
_KEYS = "layers.#.self_attn.k_proj.weight"


def plan_kv_scales(
    recipe: Recipe, layout: Layout, claims: Mapping[str, Claimed | None]
) -> tuple[KvScale, ...]:
    """The scales, layer by layer, keys first.

    Raises RecipeError for a recipe that leaves the cache as it is, and where no layer has keys.
    """
    if not recipe.kv_cache:
        raise RecipeError(
            f"recipe {recipe.name} leaves the KV cache as it is, so there is no scale to store; "
            'add kv_cache = "fp8" to it, or leave --kv-scales out'
        )
    found = []
    for claimed in claims.values():
        if claimed is None or claimed.claim.pattern != _KEYS or claimed.layer is None:
            continue
        key, value = layout.kv_scales(claimed.module.removesuffix(".k_proj"))
        found += [KvScale(claimed.layer, True, key), KvScale(claimed.layer, False, value)]
    if not found:
        raise RecipeError("no attention layer of this model is known, so no KV scale can be stored")
    return tuple(sorted(found, key=lambda s: (s.layer, not s.is_key)))
