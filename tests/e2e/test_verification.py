"""The audit at the end of a run: what it cannot be talked out of, and how it is caught up on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from nybble.api import quantize as api
from nybble.errors import CheckFailed, CheckpointError
from nybble.quantize import run

MODEL = Path(__file__).resolve().parents[2] / "models" / "stories-hybrid-moe"


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        ("nvfp4-all", "modelopt"),
        ("nvfp4-all", "compressed-tensors"),
        ("mxfp4", "compressed-tensors"),
        ("fp8", "compressed-tensors"),
    ],
)
def test_codes_of_other_weights_are_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, layout: str
) -> None:
    """Finite scales, right shapes, right bytes: and not one weight of the model."""
    fill = run.fill

    def reversed_codes(*arguments: Any, **options: Any) -> Any:
        codes, blocks = fill(*arguments, **options)
        codes[:] = codes[::-1].copy()
        return codes, blocks

    monkeypatch.setattr(run, "fill", reversed_codes)
    with pytest.raises(CheckFailed, match="dB of its source"):
        api.quantize(MODEL, tmp_path / "out", recipe, layout=layout)


def test_a_run_stopped_while_it_verified_is_verified_with_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(api, "audit", stopped)
        with pytest.raises(KeyboardInterrupt):
            api.quantize(MODEL, tmp_path / "out", "nvfp4-all")
    before = tiny.tree(tmp_path / "out")
    result = api.quantize(MODEL, tmp_path / "out", "nvfp4-all", resume=True)
    assert result.audit is not None
    assert not result.audit.problems
    assert tiny.tree(tmp_path / "out") == before


def test_resume_does_not_take_another_folder_for_its_result(tmp_path: Path) -> None:
    api.quantize(MODEL, tmp_path / "out", "nvfp4-all", search="absmax")
    with pytest.raises(
        CheckpointError, match=r"made otherwise .* expected F32 \[\], found nothing"
    ):
        api.quantize(MODEL, tmp_path / "out", "nvfp4", resume=True)
