"""A layer of a tiny mixture of experts, with inputs, ready to be rounded by calibration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import tiny
from nybble.api.plan import LAYOUTS
from nybble.calibrate.experts import RoundedJob, round_experts
from nybble.calibrate.rounding import EFFORTS, Effort
from nybble.checkpoint.reader import Checkpoint
from nybble.formats.element import F32Array
from nybble.models.feed_forward import MixtureOfExperts
from nybble.models.loader import Weights
from nybble.plan.jobs import Job
from nybble.plan.plan import make_plan
from nybble.plan.recipe import load_recipe
from nybble.quantize.scales import job_scales

EXPERTS, HIDDEN, WIDTH = 5, 96, 48


@dataclass
class Layer:
    """A layer's experts, ready to be rounded."""

    weights: Weights
    mixture: MixtureOfExperts
    jobs: list[Job]
    matrices: dict[str, NDArray[np.generic]]
    scales: dict[str, F32Array]
    fit: list[Tensor]
    guard: list[Tensor]
    folder: Path

    def round(self, effort: Effort = EFFORTS["default"], **options: object) -> list[RoundedJob]:
        return list(
            round_experts(
                self.weights,
                self.mixture,
                self.fit,
                self.guard,
                self.jobs,
                self.scales,
                effort,
                folder=self.folder,
                **options,  # type: ignore[arg-type]
            )
        )


def bytes_of(found: Iterable[RoundedJob]) -> dict[str, tuple[bytes, bytes, object]]:
    return {
        module: (tensor.codes.tobytes(), tensor.scale.tobytes(), job.choice)
        for job in found
        for module, tensor in job.tensors.items()
    }


@contextmanager
def open_layer(folder: Path, recipe: str = "nvfp4-all", **options: object) -> Iterator[Layer]:
    sizes = {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH}
    path = tiny.checkpoint(folder / "model", "qwen3_moe", **sizes, **options)
    with Checkpoint.open(path) as checkpoint:
        plan = make_plan(checkpoint, load_recipe(recipe), LAYOUTS["modelopt"])
        jobs = [j for j in plan.jobs if j.name.startswith("model.layers.1.mlp.experts.")]
        assert len(jobs) == 2 * EXPERTS
        matrices = {m.module: m.matrix(checkpoint) for j in jobs for m in j.members}
        scales = job_scales(jobs, matrices, plan.layout, "mse", 1)
        weights = Weights(checkpoint)
        mixture = weights.layer(1).feed_forward
        assert isinstance(mixture, MixtureOfExperts)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn((150, HIDDEN), generator=generator) * torch.linspace(0.1, 3, HIDDEN)
        yield Layer(
            weights,
            mixture,
            jobs,
            matrices,
            scales,
            [x[:70], x[70:120]],
            [x[120:]],
            folder / "spill",
        )
