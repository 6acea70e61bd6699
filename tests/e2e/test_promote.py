"""A derived recipe: measured, written, read back, and quantized with."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from nybble.api.promotion import promoted_recipe
from nybble.api.quantize import quantize
from nybble.errors import CheckpointError, RecipeError, TextError
from nybble.formats.scheme import NVFP4_W4A4, NVFP4_W4A16

SOURCE = tiny.MODELS / "hybrid-chat-mtp"


def test_the_derived_recipe_is_a_file_that_quantizes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = promoted_recipe(SOURCE, out, "nvfp4-redhat", share=0.1, tokens=1024, threads=2)
    assert found.path == tmp_path / "out.recipe.toml"
    assert found.promotion is not None
    assert 0 < found.promotion.share <= 0.1
    assert found.promotion.spared > found.promotion.share  # the worst were taken
    text = found.path.read_text()
    assert text.startswith("# made by --promote of recipe nvfp4-redhat, share 0.1, modelopt, ")
    assert f"# W4A16 instead of W4A4: {len(found.promotion.promoted)} of " in text
    result = quantize(SOURCE, out, str(found.path), calibration_tokens=512)
    spared = {
        m for s in found.promotion.spots if s.name in found.promotion.promoted for m in s.modules
    }
    for job in result.plan.jobs:
        wanted = NVFP4_W4A16 if job.members[0].module in spared else NVFP4_W4A4
        assert job.scheme is wanted
    again = promoted_recipe(SOURCE, out, "nvfp4-redhat", share=0.1, tokens=1024, resume=True)
    assert again.promotion is None
    assert again.recipe == result.plan.recipe
    assert again.as_json() == {"recipe": str(found.path), "promotion": None}
    with pytest.raises(CheckpointError, match="asked for something else"):
        promoted_recipe(SOURCE, out, "nvfp4-redhat", share=0.2, tokens=1024, resume=True)
    with pytest.raises(CheckpointError, match="is there already"):
        promoted_recipe(SOURCE, out, "nvfp4-redhat")


def test_what_cannot_be_promoted_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match="nothing to promote"):
        promoted_recipe(SOURCE, out, "nvfp4-all", tokens=1024)
    with pytest.raises(TextError, match="one window"):
        promoted_recipe(SOURCE, out, "nvfp4-redhat", tokens=512)
    assert list(tmp_path.iterdir()) == []
