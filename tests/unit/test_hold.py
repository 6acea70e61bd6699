"""Weights held in memory take the place of the file's: the layer is that of the checkpoint that has
them, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from calibrated_runs import ROPE, plan_of
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import ModelError
from nybble.kernels.compute import Compute
from nybble.models.linear import Mode
from nybble.models.loader import Held
from nybble.models.model import Model
from nybble.models.sequence import SequenceState
from nybble.models.state import PagePool, StatePool, make_batch
from nybble.plan.plan import Plan
from nybble.progress import Progress
from nybble.quantize.in_memory import searched
from nybble.quantize.input_scales import InputScales
from nybble.quantize.run import Options, execute

MODE = Mode(Compute("bf16", 1), simulate=True)
TOKENS = 21


def checkpoint(folder: Path, family: str, **options: Any) -> Path:
    if family in tiny.HYBRIDS:
        options["rope_parameters"] = ROPE
    return tiny.checkpoint(folder, family, **options)


def scales_for(plan: Plan) -> InputScales | None:
    """A made-up scale for each job that stores one."""
    values = {
        m.module: float(np.float32(0.001 * (1 + i % 3)))
        for i, job in enumerate(plan.jobs)
        for m in job.members
        if job.scheme.needs_input_scale
    }
    return InputScales(values, (), 2.0, 1) if values else None


def hold_all(model: Model, plan: Plan, scales: InputScales | None) -> None:
    values = scales.values if scales else {}
    for job in plan.jobs:
        for module, tensor in searched(plan, [job], "mse", 1).items():
            model.weights.hold(module, Held(tensor, job.scheme.input, values.get(module)))


def outputs(model: Model) -> list[torch.Tensor]:
    """What every layer, the head and the MTP head make of the same random numbers."""
    network = model.network
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((TOKENS, network.dims.hidden), generator=generator)
    tokens = torch.randint(0, network.dims.vocab, (TOKENS,), generator=generator)
    batch = make_batch(network, [tokens], [SequenceState(pages=[0], slots=[0])])
    found = []
    for i in range(network.dims.layers):
        if network.is_linear(i):
            cache: Any = StatePool(network, [i], 1).layers[i]
        else:
            cache = PagePool(network, [i], 1, TOKENS).layers[i]
        found.append(model.weights.layer(i)(x, batch, cache, MODE))
    found.append(model.weights.head()(x, MODE))
    head = model.weights.mtp()
    if head is not None:
        pages = PagePool(network, [-1], 1, TOKENS).layers[-1]
        found.append(head(x, x.flip(0), batch, pages, MODE))
    return found


@pytest.mark.parametrize(
    ("family", "recipe", "layout"),
    [
        ("qwen3_5_moe", "nvfp4-all", "modelopt"),
        ("qwen3_5_moe", "nvfp4-w4a4", "compressed-tensors"),
        ("qwen3_5_moe", "nvfp4", "modelopt"),
        ("qwen3_moe", "nvfp4-all", "compressed-tensors"),
        ("qwen2", "fp8", "compressed-tensors"),
        ("llama", "mxfp4", "compressed-tensors"),
    ],
)
def test_held_is_written_bitwise(
    tmp_path: Path, family: str, recipe: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Matrices in several tiles: their rows are put together again.
    monkeypatch.setattr("nybble.quantize.tiles.TILE_BYTES", 9_000)
    with Checkpoint.open(checkpoint(tmp_path / "m", family)) as source:
        plan = plan_of(source, recipe, layout)
        scales = scales_for(plan)
        execute(
            plan,
            tmp_path / "out",
            Options(threads=1),
            version="1",
            progress=Progress(),
            input_scales=scales,
        )
        model = Model(source)
        plain = outputs(model)
        hold_all(model, plan, scales)
        held = outputs(model)
        model.weights.release()
        released = outputs(model)
    with Checkpoint.open(tmp_path / "out") as written:
        expected = outputs(Model(written))
    assert len(held) == len(expected)
    for a, b in zip(held, expected, strict=True):
        assert torch.equal(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(held, plain, strict=True))
    for a, b in zip(released, plain, strict=True):
        assert torch.equal(a, b)


def test_a_part_of_a_stack_is_refused(tmp_path: Path) -> None:
    with Checkpoint.open(checkpoint(tmp_path / "m", "qwen3_5_moe")) as source:
        plan = plan_of(source, "nvfp4-all")
        model = Model(source)
        job = next(j for j in plan.jobs if j.members[0].module.endswith("experts.1.down_proj"))
        for module, tensor in searched(plan, [job], "mse", 1).items():
            model.weights.hold(module, Held(tensor))
        with pytest.raises(
            ModelError, match=r"1 of 3 matrices .*experts\.0\.down_proj for .* hold all"
        ):
            model.weights.layer(0)


def test_a_held_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    with Checkpoint.open(checkpoint(tmp_path / "m", "llama")) as source:
        plan = plan_of(source, "nvfp4-all")
        model = Model(source)
        job = next(j for j in plan.jobs if j.members[0].module.endswith("o_proj"))
        (tensor,) = searched(plan, [job], "mse", 1).values()
        model.weights.hold("model.layers.1.mlp.down_proj", Held(tensor))
        with pytest.raises(ModelError, match=r"down_proj: expected \[96, 224\] .* found"):
            model.weights.layer(1)
