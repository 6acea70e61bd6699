"""Any recipe on any family is planned soundly or refused with a reason: nothing in between.

What readers make of the configuration files is simulated in tests/readers.py.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny
from nybble.api.plan import LAYOUTS
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import NybbleError, RecipeError
from nybble.families import ROLES
from nybble.formats.scheme import SCHEMES
from nybble.plan.plan import Plan, make_plan
from nybble.plan.recipe import Recipe, Rule, parse_recipe
from nybble.quantize.run import units
from readers import ALGORITHM, ct_match, linear_modules, vllm_mixed

VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {} for family in tiny.FAMILIES},
    "qwen3_5_moe per expert": {"stacked": False, "mtp_stacked": False, "prefix": "model."},
    "qwen3_moe stacked": {"stacked": True},
    "qwen3 tied": {"tie_word_embeddings": True},
    "llama with biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": None},
    "qwen3_moe with a dense layer": {"mlp_only_layers": [0]},
    "qwen3_5 with a tower": {"vision": True, "f32_gdn": True},
    "qwen3_5 with K of 80": {"intermediate_size": 80},
}
GLOBS = (
    "*",
    "*.layers.0.*",
    "*.layers.[12].*",
    "*_proj",
    "*.q_proj",
    "*.down_proj",
    "*.experts.1.*",
    "*.gate_proj",
    "*self_attn*",
    "lm_head",
    "nothing",
)
LINEAR_ROLES = ("routed_expert", "shared_expert", "mlp", "attention", "linear_attention", "lm_head")

rules = st.builds(
    Rule,
    roles=st.lists(
        st.one_of(st.sampled_from(LINEAR_ROLES), st.sampled_from(ROLES)), min_size=1, max_size=4
    ).map(tuple),
    modules=st.one_of(
        st.just(()), st.lists(st.sampled_from(GLOBS), min_size=1, max_size=2).map(tuple)
    ),
    scheme=st.sampled_from(list(SCHEMES.values())),
    without_data=st.none(),
)
recipes = st.builds(
    Recipe,
    name=st.just("any"),
    title=st.just(""),
    kv_cache=st.sampled_from(["", "fp8"]),
    rules=st.lists(rules, min_size=1, max_size=3).map(tuple),
)


@pytest.fixture(scope="module")
def sources() -> Iterator[dict[str, Checkpoint]]:
    with tempfile.TemporaryDirectory() as folder:
        opened = {}
        for name, options in VARIANTS.items():
            path = tiny.checkpoint(Path(folder) / name, name.split()[0], **options)
            opened[name] = Checkpoint.open(path)
        yield opened
        for checkpoint in opened.values():
            checkpoint.close()


def check_accounts(plan: Plan) -> None:
    """Every source element goes to one place, every written byte is in one row."""
    taken: Counter[str] = Counter()
    for copy in plan.copies:
        taken[copy.tensor.name] += copy.tensor.size
    for job in plan.jobs:
        assert job.members
        assert job.scheme.weight is not None
        for m in job.members:
            taken[m.source] += m.shape[0] * m.shape[1]
    assert taken == {name: t.size for name, t in plan.checkpoint.tensors.items()}
    outputs = plan.outputs
    assert len({o.name for o in outputs}) == len(outputs)
    assert sum(o.nbytes for o in outputs) == plan.payload_bytes == sum(r.bytes for r in plan.rows)
    assert sum(r.parameters for r in plan.rows) == sum(taken.values())
    assert sum(r.tensors for r in plan.rows) == len(taken)
    assert all(0 <= r.active <= r.parameters for r in plan.rows)
    done: Counter[str] = Counter()
    for unit in units(plan):
        done.update([unit.copy.tensor.name] if unit.copy else [])
        done.update({m.source for job in unit.jobs for m in job.members})
    assert done == Counter(taken.keys())


def check_groups(plan: Plan) -> None:
    """Fused members lie in one job, experts of a layer have one scheme."""
    schemes: dict[str, set[str]] = {}
    for module, scheme in linear_modules(plan).items():
        if ".mlp.experts." in module and not module.startswith("mtp."):
            schemes.setdefault(module.partition(".mlp.experts.")[0], set()).add(scheme)
    assert all(len(found) == 1 for found in schemes.values())
    place = {m.module: job.name for job in plan.jobs for m in job.members}
    for fused in (
        ("q_proj", "k_proj", "v_proj"),
        ("gate_proj", "up_proj"),
        ("in_proj_qkv", "in_proj_z"),
    ):
        for module in list(place):
            parent, _, name = module.rpartition(".")
            if name in fused:
                assert len({place[f"{parent}.{n}"] for n in fused}) == 1, module


def check_documents(plan: Plan) -> None:
    """Readers give every module the scheme that was planned for it."""
    documents = plan.layout.documents(plan.checkpoint.config, plan.listing("0"))
    section = json.loads(documents["config.json"])["quantization_config"]
    is_hybrid = plan.family.model_type in tiny.HYBRIDS
    is_nested = any(n.startswith("model.language_model.") for n in plan.checkpoint.tensors)
    for module, scheme in linear_modules(plan).items():
        if plan.layout.name == "compressed-tensors":
            for inside in (False, True) if is_hybrid and is_nested else (False,):
                assert ct_match(section, module, inside_vllm=inside) == scheme, module
        else:
            head, found, _ = module.partition(".mlp.experts.")
            asked = f"{head}.mlp.experts" if found else module
            assert vllm_mixed(section, asked) == ALGORITHM.get(scheme), module


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    variant=st.sampled_from(list(VARIANTS)), recipe=recipes, layout=st.sampled_from(list(LAYOUTS))
)
def test_a_plan_is_sound_or_refused(
    sources: dict[str, Checkpoint], variant: str, recipe: Recipe, layout: str
) -> None:
    try:
        plan = make_plan(sources[variant], recipe, LAYOUTS[layout])
    except NybbleError:
        return
    check_accounts(plan)
    check_groups(plan)
    check_documents(plan)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    variant=st.sampled_from(list(VARIANTS)),
    roles=st.sets(st.sampled_from(LINEAR_ROLES), min_size=1),
    layers=st.sampled_from(["", "*.layers.0.*", "*.layers.1.*"]),
    schemes=st.lists(st.sampled_from(list(SCHEMES.values())), min_size=2, max_size=2),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_whole_roles_and_layers_are_planned_soundly(
    sources: dict[str, Checkpoint],
    variant: str,
    roles: set[str],
    layers: str,
    schemes: list[Any],
    layout: str,
) -> None:
    """Recipes that people write: most of them pass, so the invariants are tested often."""
    first = Rule(tuple(sorted(roles)), (layers,) if layers else (), schemes[0], None)
    rest = Rule(LINEAR_ROLES, (), schemes[1], None)
    recipe = Recipe("any", "", "", (first, rest))
    try:
        plan = make_plan(sources[variant], recipe, LAYOUTS[layout])
    except NybbleError:
        return
    check_accounts(plan)
    check_groups(plan)
    check_documents(plan)


@settings(max_examples=200, deadline=None)
@given(
    document=st.recursive(
        st.one_of(st.booleans(), st.integers(-3, 3), st.sampled_from(["mlp", "bf16", "fp8", "x"])),
        lambda children: st.one_of(
            st.lists(children, max_size=2),
            st.dictionaries(
                st.sampled_from(
                    ["title", "kv_cache", "rule", "roles", "modules", "scheme", "without_data"]
                ),
                children,
                max_size=4,
            ),
        ),
        max_leaves=8,
    )
)
def test_no_document_breaks_the_parser(document: Any) -> None:
    """A recipe, or a RecipeError: never another exception."""

    def toml(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(toml, value)) + "]"
        return json.dumps(value)

    table = document if isinstance(document, dict) else {"rule": document}
    text = "\n".join(f"{key} = {toml(value)}" for key, value in table.items())
    with contextlib.suppress(RecipeError):
        assert parse_recipe("any", text).rules
