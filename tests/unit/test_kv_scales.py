"""Scales of an FP8 KV cache: the rule, what is measured of pages, and the tensors they become."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import tiny
from nybble.api.plan import LAYOUTS
from nybble.calibrate.amax import measure_amax
from nybble.calibrate.kv_scales import KvSizes, Size, as_json
from nybble.check.audit import audit
from nybble.checkpoint.disk import Disk
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import CheckpointError, RecipeError
from nybble.kernels.compute import Compute
from nybble.kernels.paged_attention import Pages
from nybble.models.linear import Mode
from nybble.models.model import Model
from nybble.models.sequence import SequenceState
from nybble.models.state import make_batch
from nybble.plan.plan import make_plan
from nybble.plan.recipe import load_recipe, parse_recipe
from nybble.progress import Progress
from nybble.quantize.kv_scales import kv_record, kv_scale_tensors, stored_kv_scales
from nybble.quantize.run import Options, execute

WEIGHTS = 'kv_cache = "fp8"\n[[rule]]\nroles = ["mlp"]\nscheme = "nvfp4-w4a16"\n'
RECIPE = parse_recipe("weights", WEIGHTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("m") / "m", "qwen3_5")


def size(amax: float, middle: float) -> Size:
    found = Size()
    found.add(torch.tensor([middle] * 9 + [-amax]))
    return found


@pytest.mark.parametrize(
    ("amax", "middle", "scale"),
    [
        (400, 1.0, 1.0),
        (401, 1.0, 2.0),  # 2 * 401 / 448, the next power of two
        (448, 1.0, 2.0),
        (449, 1.0, 4.0),
        (7.0, 2.0**-5, 1.0),
        (7.0, 2.0**-6, 2.0**-5),  # small, so up they go, by room for twice the largest
        (0.001, 0.0005, 2.0**-17),
        (500, 2.0**-9, 4.0),  # both: what saturates is lost whole
        (0.0, 0.0, 1.0),
    ],
)
def test_the_scale_is_one_unless_something_saturates_or_vanishes(
    amax: float, middle: float, scale: float
) -> None:
    found = size(amax, middle)
    assert found.scale() == scale
    if scale != 1:
        assert 0.25 * 448 < found.amax / scale <= 0.5 * 448


def test_only_what_a_sequence_wrote_is_counted() -> None:
    keys = torch.full((3, 2, 5, 4), 1e9)
    values = torch.full((3, 2, 5, 4), torch.nan)
    keys[1, :, :3], values[1, :, :3] = 2.0, -0.5
    keys[2, :, :5], values[2, :, :5] = -8.0, 0.5
    sizes = KvSizes()

    class Two:
        starts, table = torch.tensor([0, 3, 8]), torch.tensor([[1], [2]])

    batch: Any = Two()
    sizes.look(4, Pages(keys, values), batch)
    (found,) = sizes.scales().values()
    assert (found.key_amax, found.value_amax) == (8.0, 0.5)
    assert (found.key_median, found.value_median) == (8.0, 0.5)
    assert as_json(sizes.scales())[0]["layer"] == 4
    keys[1, 0, 0, 0] = torch.inf
    sizes.look(4, Pages(keys, values), batch)
    with pytest.raises(RecipeError, match="layer 4 are NaN or infinite"):
        sizes.scales()
    with pytest.raises(RecipeError, match="no layer of this model"):
        KvSizes().scales()


def test_the_pass_sees_the_keys_and_values_of_every_layer(folder: Path) -> None:
    """And the MTP head's, against the pages of the plain forward."""
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(0, 131, (n,), generator=generator) for n in (40, 11)]
    sizes = KvSizes()
    with Checkpoint.open(folder) as checkpoint:
        plan = make_plan(checkpoint, RECIPE, LAYOUTS["modelopt"], kv_scales=True)
        measured = measure_amax(plan, windows=windows, kv=sizes, threads=2, progress=Progress())
        assert measured.amax == {}
        found = sizes.scales()
        assert sorted(found) == [-1, 1]
        model = Model(checkpoint)
        mode = Mode(Compute("bf16", 2))
        largest = [0.0, 0.0, 0.0, 0.0]
        for tokens in windows:
            pages, states = model.page_pool(1, 64, has_mtp=True), model.state_pool(1)
            held = SequenceState([0], slots=[0])
            batch = make_batch(model.network, [tokens], [held])
            hidden = model.forward(batch, pages, states, mode)
            before = torch.cat([torch.zeros_like(hidden[:1]), hidden[:-1]])
            model.mtp_forward(batch, before, pages, mode)
            parts = [x for n in (1, -1) for x in (pages.layers[n].keys, pages.layers[n].values)]
            for i, part in enumerate(parts):
                largest[i] = max(largest[i], float(part[0, :, : len(tokens)].float().abs().max()))
    trunk, head = found[1], found[-1]
    assert [trunk.key_amax, trunk.value_amax, head.key_amax, head.value_amax] == largest


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layer_has_both_in_the_names_of_the_layout(layout: str, folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        plain = make_plan(checkpoint, RECIPE, LAYOUTS[layout])
        plan = make_plan(checkpoint, RECIPE, LAYOUTS[layout], kv_scales=True)
    new = [s for s in plan.outputs if s not in plain.outputs]
    base = "model.language_model.layers.1.self_attn."
    expected = {
        "modelopt": [(base + "k_proj.k_scale", "F32", ()), (base + "v_proj.v_scale", "F32", ())],
        "compressed-tensors": [(base + "k_scale", "BF16", (1,)), (base + "v_scale", "BF16", (1,))],
    }
    assert [(s.name, s.dtype, s.shape) for s in new] == expected[layout]
    assert plan.payload_bytes - plain.payload_bytes == sum(s.nbytes for s in new)
    assert plan.digest() != plain.digest()
    config = json.loads(plan.layout.documents({}, plan.listing("0"))["config.json"])
    assert config["quantization_config"]["kv_cache_scheme"] is not None
    notes = [n for n in plain.notes if "KV cache" in n]
    assert bool(notes) == (layout == "compressed-tensors")
    assert not [n for n in plan.notes if "KV cache" in n]
    tensors = kv_scale_tensors(plan, {1: (2.0, 0.125)})
    kind = np.float32 if layout == "modelopt" else ml_dtypes.bfloat16
    assert {n: float(t.reshape(())) for n, t in tensors.items()} == {
        new[0].name: 2.0,
        new[1].name: 0.125,
    }
    assert {(t.dtype, t.shape) for t in tensors.values()} == {(np.dtype(kind), new[0].shape)}
    assert kv_record({1: (2.0, 0.125)}) == {"1": [2.0, 0.125]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_they_are_written_and_read_and_an_interrupted_run_keeps_them(
    layout: str, folder: Path, tmp_path: Path
) -> None:
    given = {1: (0.25, 8.0)}
    options = Options(threads=1)
    with Checkpoint.open(folder) as checkpoint:
        plan = make_plan(checkpoint, RECIPE, LAYOUTS[layout], kv_scales=True)

        def run(out: Path, options: Options, scales: dict[int, tuple[float, float]]) -> None:
            execute(plan, out, options, version="0", progress=Progress(), kv_scales=scales)

        run(tmp_path / "whole", options, given)
        with pytest.raises(RecipeError, match="layer 1: expected one pair"):
            run(tmp_path / "lacking", options, {})
        partial = tmp_path / "cut.partial"

        class Full(Disk):
            """The configuration cannot be written: the run ends before it is done."""

            def write_file(self, path: Path, data: bytes) -> None:
                if path.name == "config.json":
                    raise CheckpointError("the disk is full")
                super().write_file(path, data)

        with pytest.raises(CheckpointError):
            execute(
                plan,
                tmp_path / "cut",
                options,
                version="0",
                progress=Progress(),
                kv_scales=given,
                disk=Full(),
            )
        assert partial.is_dir()
        assert stored_kv_scales(tmp_path / "cut") == given
        assert stored_kv_scales(tmp_path / "nowhere") == {}
        with pytest.raises(CheckpointError, match=r"kv_scales"):
            run(tmp_path / "cut", replace(options, resume=True), {1: (0.5, 8.0)})
        run(tmp_path / "cut", replace(options, resume=True), given)
        audit(plan, tmp_path / "cut", threads=1, progress=Progress())
    assert tiny.tree(tmp_path / "cut") == tiny.tree(tmp_path / "whole")
    with Checkpoint.open(tmp_path / "whole") as checkpoint:
        pool = Model(checkpoint).page_pool(1, 16, "fp8", has_mtp=True)
        found = {n: (p.key_scale, p.value_scale) for n, p in pool.layers.items()}
    assert found == {1: (0.25, 8.0), -1: (1.0, 1.0)}


def test_what_is_not_the_plan_s_is_refused(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        plan = make_plan(checkpoint, RECIPE, LAYOUTS["modelopt"], kv_scales=True)
        plain = make_plan(checkpoint, RECIPE, LAYOUTS["modelopt"])
        with pytest.raises(RecipeError, match=r"leaves the KV cache as it is.*kv_cache = \"fp8\""):
            make_plan(checkpoint, replace(RECIPE, kv_cache=""), LAYOUTS["modelopt"], kv_scales=True)
    assert kv_scale_tensors(plain, None) == {}
    for given, message in (
        ({}, "layer 1: expected one pair"),
        (None, "layer 1: expected one pair"),
        ({1: (1.0, 1.0), 2: (1.0, 1.0)}, "layer 2: expected none"),
        ({1: (3.0, 1.0)}, r"k_scale: a scale of 3\.0; expected a power of two"),
        ({1: (1.0, 0.0)}, "v_scale: a scale of 0"),
        ({1: (1.0, float("nan"))}, "v_scale: a scale of nan"),
    ):
        with pytest.raises(RecipeError, match=message):
            kv_scale_tensors(plan, given)


def test_four_bit_caches_are_refused_with_the_reason() -> None:
    with pytest.raises(RecipeError, match=r"found 'nvfp4'; four-bit caches are not made"):
        parse_recipe("mine", WEIGHTS.replace("fp8", "nvfp4"))
    assert load_recipe("nvfp4").kv_cache == "fp8"
