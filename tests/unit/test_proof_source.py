"""The proof reads the source by itself: what a converter overlooks or misreads is found."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import dialects
import nybble.rewrite.convert as convert_module
from folder import Folder
from nybble.api.convert import convert
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.safetensors import TensorInfo
from nybble.formats.block import FORMATS
from nybble.rewrite import proof_layouts
from nybble.rewrite.conversion import Conversion, Dropped
from nybble.rewrite.held import Weight
from nybble.rewrite.proof_reading import Written, number
from nybble.rewrite.proof_source import may_be_left_out, source_fault


def made(tmp_path: Path, name: str, target: str) -> tuple[Conversion, Checkpoint]:
    """A sound conversion, to be told falsely of."""
    source = dialects.checkpoint(tmp_path / "source", name)
    done = convert(source, tmp_path / "out", target)
    again = replace(done.conversion, source=Checkpoint.open(source))
    return again, Checkpoint.open(tmp_path / "out")


def first_fault(conversion: Conversion, written: Checkpoint) -> str:
    return convert_module.unexplained(conversion, convert_module.prove(conversion, written))


def with_dropped(conversion: Conversion, tensor: TensorInfo) -> Conversion:
    return replace(conversion, dropped=(*conversion.dropped, Dropped(tensor, "no reason")))


@pytest.mark.parametrize("name", dialects.KINDS)
def test_a_sound_source_is_read_as_it_was_converted(name: str, tmp_path: Path) -> None:
    conversion, written = made(tmp_path, name, "bf16")
    assert conversion.weights
    assert {source_fault(conversion.source, w) for w in conversion.weights} == {""}
    assert first_fault(conversion, written) == ""


@pytest.mark.parametrize("target", ["compressed-tensors", "bf16"])
@pytest.mark.parametrize("part", ["scale", "codes", "plain"])
def test_what_must_stay_cannot_be_left_out(part: str, target: str, tmp_path: Path) -> None:
    conversion, written = made(tmp_path, "modelopt-nvfp4", target)
    weight = conversion.weights[0]
    norm = next(t for n, t in conversion.source.tensors.items() if n.endswith("norm.weight"))
    tensor = {"scale": weight.scale, "codes": weight.codes, "plain": norm}[part]
    fault = first_fault(with_dropped(conversion, tensor), written)
    assert f"{tensor.name} was left out of the result" in fault


def test_a_measured_input_scale_cannot_be_left_out_of_a_layout(tmp_path: Path) -> None:
    conversion, written = made(tmp_path, "modelopt-fp8", "compressed-tensors")
    scale = next(w.input_scale for w in conversion.weights if w.input_scale)
    assert "was left out" in first_fault(with_dropped(conversion, scale), written)


@pytest.mark.parametrize(
    ("name", "target", "allowed"),
    [
        ("a.input_scale", "modelopt", True),
        ("a.input_global_scale", "modelopt", True),
        ("b.input_scale", "modelopt", False),  # declared
        ("b.input_scale", "bf16", True),
        ("a.k_proj.k_scale", "modelopt", False),
        ("a.k_proj.k_scale", "bf16", True),
        ("a.weight_scale", "bf16", False),
        ("a.bias", "bf16", False),
    ],
)
def test_few_names_may_be_left_out(name: str, target: str, allowed: bool) -> None:
    assert may_be_left_out(name, target, {"b.input_scale"}) == allowed


@pytest.mark.parametrize("target", ["compressed-tensors", "bf16"])
def test_a_weight_that_was_overlooked_is_a_fault(target: str, tmp_path: Path) -> None:
    conversion, written = made(tmp_path, "modelopt-nvfp4", target)
    lost = conversion.weights[0]
    fault = first_fault(replace(conversion, weights=conversion.weights[1:]), written)
    assert f"{lost.name}." in fault
    assert "is a part of a quantized weight that was not compared" in fault


@pytest.mark.parametrize("name", dialects.KINDS)
@pytest.mark.parametrize("target", ["layout", "bf16"])
def test_a_weight_that_was_misread_is_a_fault(name: str, target: str, tmp_path: Path) -> None:
    conversion, written = made(tmp_path, name, "bf16")
    if target == "layout":
        conversion = replace(conversion, target="compressed-tensors")
    weight = conversion.weights[0]
    n, k = weight.shape
    misread: list[Weight] = [
        replace(weight, shape=(n, 2 * k)),
        replace(weight, scale=weight.codes),
        replace(weight, codes=conversion.weights[1].codes),
    ]
    others = [f for f in FORMATS.values() if f.scale is not weight.format.scale]
    misread += [replace(weight, format=fmt) for fmt in others]
    for wrong in misread:
        assert source_fault(conversion.source, wrong).startswith(f"{weight.name}: was converted ")
    told = replace(conversion, weights=(misread[0], *conversion.weights[1:]))
    proof = convert_module.prove(told, written)
    assert any(f"{weight.name}: was converted as" in problem for problem in proof.problems)


def test_a_tensor_scale_that_is_passed_over_is_a_fault(tmp_path: Path) -> None:
    conversion, _ = made(tmp_path, "modelopt-nvfp4", "bf16")
    wrong = replace(conversion.weights[0], tensor_scale=None)
    assert "from other tensors than its names tell" in source_fault(conversion.source, wrong)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_stored_numbers_are_read_by_their_bits(dtype: type, tmp_path: Path) -> None:
    values = np.array([0.375, -(2.0**-14), 0, 3.0e-5, np.inf], np.float32).astype(dtype)
    Folder({"a.weight_scale": values}, files={"config.json": b"{}"}, has_index=False).write(
        tmp_path
    )
    found = number(Checkpoint.open(tmp_path), "a.weight_scale")
    assert found.tolist() == values.astype(np.float32).tolist()


def test_rows_at_both_ends_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the bytes are equal: the place of a scale shows only in decoded rows."""
    conversion, written = made(tmp_path, "modelopt-nvfp4", "compressed-tensors")
    seen: list[tuple[int, int]] = []
    plain = Written.rows

    def rows(self: Written, first: int, last: int) -> object:
        seen.append((first, last))
        return plain(self, first, last)

    monkeypatch.setattr(proof_layouts, "_EDGE_ELEMENTS", 1)
    monkeypatch.setattr(Written, "rows", rows)
    assert not convert_module.prove(conversion, written).problems
    for weight in conversion.weights:
        n = weight.shape[0]
        assert {(0, 1), (n - 1, n)} <= set(seen)
