"""A proof says how far it is: never past its end, and at its end when it is done."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny
from nybble.api.convert import convert
from nybble.api.quantize import quantize
from nybble.progress import Progress


class Counted(Progress):
    """What is told of each stage."""

    def __init__(self) -> None:
        self.of: dict[str, list[int]] = {}

    def stage(self, title: str, total: int, unit: str = "bytes") -> None:
        self.of[title] = self.now = [0, total]

    def advance(self, count: int, note: str = "") -> None:
        self.now[0] += count


@pytest.mark.parametrize("to", ["compressed-tensors", "bf16"])
@pytest.mark.parametrize("recipe", ["nvfp4-all", "nvfp4"])
def test_a_proof_counts_to_its_end(tmp_path: Path, recipe: str, to: str) -> None:
    source = tiny.checkpoint(tmp_path / "m", "qwen3_5_moe")
    quantize(source, tmp_path / "q", recipe, data_free=True)
    told = Counted()
    convert(tmp_path / "q", tmp_path / "out", to, progress=told)
    done, total = told.of["prove"]
    assert done == total > 0
