"""Conversions as algebra: there and back is the identity for powers of two, and for any other scale
the list of what differs is exact."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))
import dialects
import tiny
from nybble.api.convert import convert

N, K = 3, 48
#: Any tensor scale whose reciprocal is a normal number.
SCALES = st.floats(2.0**-126, 2.0**126, width=32)
POWERS = st.integers(-126, 126).map(lambda e: float(2.0**e))


def modelopt(folder: Path, scales: Sequence[float], seed: int) -> Path:
    """Modules `a.0.down_proj` ... of random codes and block scales, every code among them."""
    rng = np.random.default_rng(seed)
    values: tiny.Tensors = {"a.norm.weight": np.ones(K, np.float32)}
    for i, scale in enumerate(scales):
        module = f"a.{i}.down_proj"
        values[f"{module}.weight"] = rng.integers(0, 256, (N, K // 2), dtype=np.uint8)
        blocks = rng.integers(0, 127, (N, K // 16), dtype=np.uint8)
        values[f"{module}.weight_scale"] = blocks.view(ml_dtypes.float8_e4m3fn)
        values[f"{module}.weight_scale_2"] = np.asarray(np.float32(scale))
    layers = {
        f"a.{i}.down_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16}
        for i in range(len(scales))
    }
    section = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
    config = {"model_type": "any", "quantization_config": {**section, "quantized_layers": layers}}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tiny.write_safetensors(folder / "model.safetensors", values)
    return folder


def different(one: dialects.Matrix, other: dialects.Matrix) -> int:
    """Values that differ; a product beyond float32 times a code of zero is NaN on both sides."""
    return int(((one != other) & ~(np.isnan(one) & np.isnan(other))).sum())


@given(scales=st.lists(POWERS, min_size=1, max_size=5), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_powers_of_two_go_there_and_back_byte_for_byte(scales: list[float], seed: int) -> None:
    with tempfile.TemporaryDirectory() as made:
        at = Path(made)
        source = modelopt(at / "source", scales, seed)
        there = convert(source, at / "there", "compressed-tensors", exact=True, generic=True)
        back = convert(at / "there", at / "back", "modelopt", exact=True, generic=True)
        assert there.verdict == back.verdict == f"{1 + 3 * len(scales)} tensors, 0 differing values"
        assert tiny.read(source) == tiny.read(at / "back")


@given(scales=st.lists(SCALES, min_size=1, max_size=5), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_what_any_other_scale_changes_is_listed_exactly(scales: list[float], seed: int) -> None:
    with tempfile.TemporaryDirectory() as made, np.errstate(over="ignore", invalid="ignore"):
        at = Path(made)
        source = modelopt(at / "source", scales, seed)
        done = convert(source, at / "there", "compressed-tensors", generic=True)
        before, after = dialects.weights(source), dialects.weights(at / "there")
        counts = {m: different(before[m], after[m]) for m in before}
        assert done.proof is not None
        assert {d.name: d.values for d in done.proof.differing} == {
            m: n for m, n in counts.items() if n
        }
        doubly = {s: np.float32(1) / (np.float32(1) / np.float32(s)) for s in scales}
        foreign = [f"a.{i}.down_proj" for i, s in enumerate(scales) if doubly[s] != np.float32(s)]
        listed = done.conversion.roundings
        assert [r.name for r in listed] == [f"{name}.weight_scale_2" for name in foreign]
        for r in listed:  # never by more than one unit in the last place
            one, other = np.float32(r.before), np.float32(r.after)
            assert np.nextafter(one, other) == other
