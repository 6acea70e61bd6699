"""What a layout's configuration says of a checkpoint, from its modules: shared by whoever writes
one.

Knows no recipe: a plan gives what it will quantize, a conversion what it found quantized.
"""

from __future__ import annotations

from collections.abc import Iterable

from nybble.checkpoint.layout import Listing
from nybble.families import Claimed, Family
from nybble.formats.scheme import Scheme
from nybble.plan.jobs import Copy

#: A quantized module: its path, its role, its scheme.
Quantized = tuple[str, str, Scheme]


def make_listing(
    modules: Iterable[Quantized],
    copies: Iterable[Copy],
    family: Family,
    *,
    kv_cache: str,
    version: str,
    has_kv_scales: bool = False,
) -> Listing:
    """Modules by scheme, experts by container; `copies` are all tensors that stay as they are."""
    quantized: dict[str, Scheme] = {}
    experts: dict[str, list[str]] = {}
    quantized_roles = set()
    for module, role, scheme in modules:
        quantized_roles.add(role)
        container, found, below = module.rpartition(".experts.")
        if role in ("routed_expert", "mtp") and found:
            experts.setdefault(f"{container}.experts", []).append(below)
            quantized[f"{container}.experts"] = scheme
        else:
            quantized[module] = scheme
    plain, plain_experts, others = [], [], []
    roles = set()
    for copy in copies:
        roles.add(copy.role)
        claimed = family.claim(copy.tensor.name)
        is_whole_head = copy.role == "mtp" and "mtp" not in quantized_roles
        if claimed is None or is_whole_head or not _is_linear_module(claimed):
            if copy.tensor.name.endswith(".weight") and len(copy.tensor.shape) == 2:
                others.append(copy.tensor.name.removesuffix(".weight"))
        elif claimed.claim.layout:
            name = claimed.module.partition(".experts")[0] + ".experts"
            if name not in experts:
                plain_experts.append(name)
                experts[name] = ["0.gate_proj", "0.up_proj", "0.down_proj"]
        else:
            plain.append(claimed.module)
    kept_whole = roles - quantized_roles  # no pattern for a head or tower that is quantized in part
    return Listing(
        quantized,
        experts,
        plain,
        plain_experts,
        others,
        has_mtp="mtp" in kept_whole,
        has_vision="vision" in kept_whole,
        kv_cache=kv_cache,
        version=version,
        has_kv_scales=has_kv_scales,
    )


def _is_linear_module(claimed: Claimed) -> bool:
    """A module that engines build as a linear layer, so that a config must say it stays plain."""
    claim = claimed.claim
    is_gate = claim.role in ("router", "shared_expert_gate")
    if claim.role == "mtp":  # one role for all of the head
        is_gate = claim.pattern.endswith(("mlp.gate.weight", "mlp.shared_expert_gate.weight"))
    return claim.is_linear or is_gate
