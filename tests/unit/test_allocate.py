"""What there is to allocate, to the byte; and that networks put together of two checkpoints compute
what the checkpoint written of them computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from nybble.api.plan import find_layout, plan
from nybble.api.quantize import quantize
from nybble.calibrate.allocate import FORMATS, Ground, Group, find_ground
from nybble.calibrate.candidates import candidates, control, settle_inputs
from nybble.calibrate.damage import Bench, Branch, Source, measure_damages
from nybble.calibrate.derived import derive, recipe_text
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import RecipeError
from nybble.formats.scheme import BF16, FP8_DYNAMIC, FP8_STATIC, NVFP4_W4A4, NVFP4_W4A16, Scheme
from nybble.kernels.compute import Compute
from nybble.models.linear import Mode
from nybble.models.model import Model
from nybble.plan.plan import Plan, make_plan
from nybble.plan.recipe import parse_recipe
from nybble.progress import Progress
from nybble.stream.executor import Stream

MODE = Mode(Compute("bf16", 1), simulate=True)
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
W4A4 = parse_recipe("w4a4", '[[rule]]\nroles = ["mlp", "attention"]\nscheme = "nvfp4-w4a4"\n')


def a_plan(folder: Path, recipe: object = "nvfp4-all", layout: str = "compressed-tensors") -> Plan:
    return plan(folder, recipe, layout=layout)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("dense"), "qwen3", num_hidden_layers=4)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hybrid")
    return tiny.checkpoint(folder, "qwen3_5_moe", rope_parameters=ROPE)


def by_name(ground: Ground) -> dict[str, Group]:
    return {g.name: g for g in ground.groups}


# ----------------------------------------------------------------------------------------- groups


def test_groups_are_what_engines_run_as_one(hybrid: Path) -> None:
    found = by_name(find_ground(a_plan(hybrid)))
    base = "model.language_model.layers.1."
    assert len(found[f"{base}self_attn:qkv"].modules) == 3
    experts = found[f"{base}mlp.experts"]
    assert len(experts.modules) == 9  # gate, up and down of three experts
    assert experts.layer == 1
    assert found["lm_head"].layer is None
    assert {g.schemes for g in found.values() if g.role != "lm_head"} == {
        (NVFP4_W4A16, FP8_DYNAMIC, BF16)
    }
    assert found["lm_head"].schemes == (NVFP4_W4A16, BF16)


def test_modelopt_has_static_fp8_and_none_without_measurements(dense: Path) -> None:
    made = a_plan(dense, layout="modelopt")
    options = {g.schemes for g in find_ground(made).groups if g.role == "mlp"}
    assert options == {(NVFP4_W4A16, FP8_STATIC, BF16)}
    options = {g.schemes for g in find_ground(made, can_measure=False).groups}
    assert options == {(NVFP4_W4A16, BF16)}


def test_a_k_that_nvfp4_cannot_divide_leaves_the_wider_formats(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "m", "llama", intermediate_size=232)
    found = by_name(find_ground(a_plan(folder, "fp8")))
    assert found["model.layers.0.mlp.down_proj"].schemes == (FP8_DYNAMIC, BF16)
    assert found["model.layers.0.mlp:gate_up"].schemes == (NVFP4_W4A16, FP8_DYNAMIC, BF16)


@pytest.mark.parametrize(
    ("recipe", "formats", "says"),
    [("mxfp4", FORMATS, "Start from a recipe with NVFP4"),
     ("nvfp4-all", ("nvfp4",), "nothing to choose"),
     ("nvfp4-all", ("nvfp4", "int3"), "unknown format 'int3'")],
)  # fmt: skip
def test_what_cannot_be_allocated_is_refused(
    dense: Path, recipe: str, formats: tuple[str, ...], says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        find_ground(a_plan(dense, recipe), formats)


# ------------------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bytes_of_a_choice_are_those_of_its_derived_plan(
    tmp_path: Path, family: str, layout: str
) -> None:
    options = {"rope_parameters": ROPE} if family in tiny.HYBRIDS else {}
    folder = tiny.checkpoint(tmp_path / "m", family, **options)
    made = a_plan(folder, layout=layout)
    ground = find_ground(made)
    for turn in range(3):
        choice = {
            g.name: g.schemes[(i + turn) % len(g.schemes)] for i, g in enumerate(ground.groups)
        }
        recipe = derive(made, ground.groups, choice, f"turn-{turn}", 'a "title"')
        read = parse_recipe(recipe.name, recipe_text(recipe))
        assert read == recipe
        again = make_plan(made.checkpoint, read, find_layout(layout))
        assert again.payload_bytes == ground.payload_bytes(choice)
        scheme_of = {m: choice[g.name] for g in ground.groups for m in g.modules}
        for job in again.jobs:
            assert {scheme_of.pop(m.module) for m in job.members} == {job.scheme}
        assert set(scheme_of.values()) <= {BF16}


def test_modules_that_the_base_leaves_alone_stay_alone(dense: Path) -> None:
    rule = 'modules = ["model.layers.0.*", "model.layers.3.*"]\nscheme = "nvfp4-w4a16"\n'
    base = parse_recipe("some", f'[[rule]]\nroles = ["mlp"]\n{rule}')
    made = a_plan(dense, base)
    ground = find_ground(made)
    recipe = derive(made, ground.groups, ground.smallest(), "again", "")
    again = make_plan(made.checkpoint, recipe, made.layout)
    assert again.digest() == made.digest()


def test_bits_count_the_modules_and_their_scales(dense: Path) -> None:
    ground = find_ground(a_plan(dense))
    small, modules = ground.smallest(), sum(len(g.modules) for g in ground.open)
    assert ground.bits(small) == pytest.approx(4.5 + 32 * modules / ground.weights)
    limit = ground.limit(bits=4.75)
    assert limit == int(4.75 * ground.weights / 8)
    whole = ground.payload_bytes(small) + 1000
    open_bytes = sum(g.nbytes[0] for g in ground.open)
    assert ground.limit(payload_bytes=whole) == open_bytes + 1000


@pytest.mark.parametrize("target", [{"bits": 4.49}, {"bits": 16.0}, {"payload_bytes": 1000}])
def test_targets_that_nothing_reaches_are_refused(dense: Path, target: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="options lie between"):
        find_ground(a_plan(dense)).limit(**target)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------- candidates


def even(ground: Ground, rate: Callable[[Group], float]) -> dict[str, dict[str, float]]:
    share = {NVFP4_W4A4: 1.5, NVFP4_W4A16: 1.0, FP8_DYNAMIC: 0.1, BF16: 0.0}
    return {
        g.name: {s.name: share[s] * rate(g) * g.weights for s in g.schemes} for g in ground.open
    }


@pytest.mark.parametrize("bits", [4.6, 4.75, 5.5, 8.0, 12.0])
def test_every_candidate_keeps_the_limit(dense: Path, bits: float) -> None:
    ground = find_ground(a_plan(dense))
    limit = ground.limit(bits=bits)
    damages = even(ground, lambda g: 1e-6 * (1 + (g.layer or 0)) ** 2)
    found = candidates(ground, damages, limit)
    assert control(ground, limit) in [c.choice for c in found]
    for candidate in found:
        assert ground.bits(candidate.choice) <= bits
    choices = [c.choice for c in found]
    assert all(a != b for i, a in enumerate(choices) for b in choices[:i])


def test_the_frontier_raises_what_is_damaged_and_the_control_what_is_spread(dense: Path) -> None:
    ground = find_ground(a_plan(dense))
    damages = even(ground, lambda g: 1e-6 if g.layer != 2 else 1e-3)
    limit = ground.limit(bits=5.5)
    frontier = candidates(ground, damages, limit)[0]
    raised = {g.layer for g in ground.open if frontier.choice[g.name] is not g.schemes[0]}
    assert 2 in raised
    spread = control(ground, ground.limit(bits=6.5))
    whole = [
        n
        for n in range(4)
        if all(spread[g.name] is not g.schemes[0] for g in ground.open if g.layer == n)
    ]
    assert whole == [1, 3]  # two of four, evenly


def test_few_weights_give_up_rounded_inputs(dense: Path) -> None:
    made = a_plan(dense, W4A4)
    ground = find_ground(made)
    assert set(ground.smallest().values()) == {NVFP4_W4A4}
    hurt = "model.layers.3.mlp.down_proj"
    damages = even(ground, lambda g: 1.0 if g.name == hurt else 1e-6)
    settled, promoted = settle_inputs(ground, damages, share=0.125)
    assert hurt in promoted
    groups = by_name(settled)
    assert groups[hurt].schemes == (NVFP4_W4A16, FP8_DYNAMIC, BF16)
    given_up = sum(groups[name].weights for name in promoted)
    assert given_up <= 0.125 * ground.weights
    others = [g for g in settled.groups if g.name not in promoted]
    assert all(NVFP4_W4A16 not in g.schemes and NVFP4_W4A4 in g.schemes for g in others)


# --------------------------------------------------------------------------------------- branches


def windows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 131, (n,), generator=generator) for n in (40, 7, 65)]


@contextmanager
def a_bench(
    folder: Path, tmp_path: Path, ground: Ground, made: Plan, **options: int
) -> Iterator[Bench]:
    """NVFP4 and FP8 checkpoints of a plan's groups, and the original."""
    with ExitStack() as stack:
        sources: dict[str, Source] = {}
        for at, scheme in enumerate((NVFP4_W4A16, FP8_DYNAMIC)):
            choice = {g.name: scheme if scheme in g.schemes else BF16 for g in ground.groups}
            recipe = derive(made, ground.groups, choice, scheme.name, "")
            quantize(folder, tmp_path / str(at), recipe, layout="compressed-tensors", jobs=1)
            opened = stack.enter_context(Checkpoint.open(tmp_path / str(at)))
            sources[scheme.name] = Source(Model(opened))
        original = stack.enter_context(Checkpoint.open(folder))
        sources[BF16.name] = Source(Model(original))
        yield Bench(sources, ground.groups, windows(), MODE, Progress(), **options)


def mixed(ground: Ground) -> dict[str, Scheme]:
    return {g.name: g.schemes[i % len(g.schemes)] for i, g in enumerate(ground.groups)}


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_a_branch_computes_what_the_checkpoint_of_its_choice_computes(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(kind)
    made = a_plan(folder)
    ground = find_ground(made)
    with a_bench(folder, tmp_path, ground, made) as bench:
        found = bench.run([Branch({}), Branch(mixed(ground))], "branches")
        recipe = derive(made, ground.groups, mixed(ground), "mixed", "")
        quantize(folder, tmp_path / "mixed", recipe, layout="compressed-tensors", jobs=1)
        with Checkpoint.open(tmp_path / "mixed") as opened:
            expected = divergences(bench.original, Model(opened))
    assert (found.kl[0] == 0).all()
    # Of the same logits; the sums over the vocabulary are in another order.
    np.testing.assert_allclose(found.kl[1], expected, rtol=1e-8, atol=1e-12)
    assert found.window.tolist() == [0] * 40 + [1] * 7 + [2] * 65


def divergences(original: Model, other: Model) -> np.ndarray:  # type: ignore[type-arg]
    """The same by whole streams and a divergence written here, in float64."""
    sides = []
    for model in (original, other):
        stream = Stream(model, windows(), MODE)
        stream.run()
        logits = [model.head(rows, MODE).double() for _, rows in stream.normed()]
        sides.append(torch.log_softmax(torch.cat(logits), -1))
    p, q = sides
    return np.asarray((p.exp() * (p - q)).sum(-1).numpy())


def test_passes_of_few_branches_are_one_pass_of_all(dense: Path, tmp_path: Path) -> None:
    made = a_plan(dense)
    ground = find_ground(made)
    branches = [Branch({g.name: s}) for g in ground.groups for s in g.schemes[:2]]
    branches = branches[::-1]
    with a_bench(dense, tmp_path, ground, made) as bench:
        whole = bench.run(branches, "")
        bench.at_once = 3
        parts = bench.run(branches, "")
    np.testing.assert_array_equal(whole.kl, parts.kl)
    np.testing.assert_array_equal(whole.errors, parts.errors)


def test_damages_fall_with_the_bytes_and_short_probes_guess_the_long_ones(
    dense: Path, tmp_path: Path
) -> None:
    made = a_plan(dense)
    ground = find_ground(made)
    with a_bench(dense, tmp_path, ground, made) as bench:
        damages = measure_damages(bench, ground.groups)
        eight = [g for g in ground.groups if FP8_DYNAMIC in g.schemes]
        measured = bench.run([Branch({g.name: FP8_DYNAMIC}) for g in eight], "")
    assert set(damages) == {g.name for g in ground.groups}
    for g in ground.groups:
        by: Mapping[str, float] = damages[g.name]
        sizes = [by[s.name] for s in g.schemes]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] == 0
        assert sizes[0] > 0
    for g, kl in zip(eight, measured.kl, strict=True):
        ratio = damages[g.name][FP8_DYNAMIC.name] / float(kl.mean())
        assert 1 / 6 < ratio < 6  # an extrapolation: the right order of magnitude


def test_a_weight_only_source_reads_no_rounded_inputs(dense: Path, tmp_path: Path) -> None:
    made = a_plan(dense, "fp8")
    ground = find_ground(made, ("fp8", "bf16"))
    group = ground.open[0]
    quantize(dense, tmp_path / "fp8", "fp8", layout="compressed-tensors", jobs=1)
    with Checkpoint.open(tmp_path / "fp8") as eight, Checkpoint.open(dense) as original:
        sources = {
            FP8_DYNAMIC.name: Source(Model(eight)),
            "weights": Source(Model(eight), is_weight_only=True),
            BF16.name: Source(Model(original)),
        }
        bench = Bench(sources, ground.groups, windows(), MODE, Progress())
        weights = Scheme("weights", FP8_DYNAMIC.weight, None)
        run = partial(bench.run, title="")
        found = run([Branch({group.name: FP8_DYNAMIC}), Branch({group.name: weights})])
    assert 0 < found.errors[1] < found.errors[0]
