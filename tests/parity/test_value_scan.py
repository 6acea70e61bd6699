"""The compiled counts of values are those of the definition, for every byte and any length."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nybble.errors import FormatError
from nybble.kernels import dispatch, value_scan
from nybble.kernels.value_scan import KINDS, WIDTHS, cpu, reference

#: Around a vector, a block of the byte kinds (240), and one of the wide kinds (4096).
LENGTHS = (0, 1, 15, 16, 17, 239, 240, 241, 255, 480, 4095, 4096, 4097, 10_000)

needs_library = pytest.mark.skipif(not dispatch.machine_isas(), reason="no compiled kernels")


def random_bytes(size: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@needs_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fill", ["random", 0x00, 0x7F, 0x80, 0xFF, 0x7E])
def test_counts_are_those_of_the_definition(kind: str, fill: str | int) -> None:
    data = random_bytes(60_000) if fill == "random" else np.full(60_000, fill, dtype=np.uint8)
    # Every start within a vector: tensors of a file need not be aligned.
    places = [(i % 19, length * WIDTHS[kind], kind) for i, length in enumerate(LENGTHS)]
    assert np.array_equal(cpu.scan(data, places), reference.scan(data, places))


@needs_library
@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=700), kind=st.sampled_from(sorted(KINDS)), start=st.integers(0, 9))
def test_any_bytes_count_alike(data: bytes, kind: str, start: int) -> None:
    values = np.frombuffer(data, dtype=np.uint8)
    start = min(start, values.size)
    length = (values.size - start) // WIDTHS[kind] * WIDTHS[kind]
    places = [(start, length, kind)]
    assert np.array_equal(cpu.scan(values, places), reference.scan(values, places))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("e4m3", ml_dtypes.float8_e4m3fn),
        ("e8m0", ml_dtypes.float8_e8m0fnu),
        ("bf16", ml_dtypes.bfloat16),
        ("f16", np.float16),
    ],
)
def test_counts_mean_what_the_dtype_means(kind: str, dtype: type) -> None:
    """All bit patterns, judged by numpy."""
    width = np.dtype(dtype).itemsize
    words = np.arange(1 << 8 * width, dtype=np.uint16 if width == 2 else np.uint8)
    with np.errstate(invalid="ignore"):
        values = words.view(dtype).astype(np.float64)
    (found,) = value_scan.scan(words.view(np.uint8), [(0, words.nbytes, kind)])
    finite = values[np.isfinite(values)]
    assert found["size"] == words.size
    assert found["nan"] == np.isnan(values).sum()
    assert found["inf"] == np.isinf(values).sum()
    # E8M0 has no zero: its byte 0, the smallest number, stands for one.
    assert found["zero"] == ((values == 0).sum() if kind != "e8m0" else 1)
    assert found["saturated"] == (np.abs(finite) == np.abs(finite).max()).sum()
    assert found["negative"] == (np.signbit(values).sum() if kind != "e8m0" else 0)


def test_a_byte_of_codes_is_zero_if_both_are() -> None:
    data = np.array([0x00, 0x08, 0x80, 0x88, 0x10, 0x01, 0x77, 0xFF, 0xF0], dtype=np.uint8)
    (found,) = value_scan.scan(data, [(0, data.size, "codes")])
    assert (found["zero"], found["saturated"], found["nan"]) == (4, 2, 0)
    assert (found["least"], found["largest"]) == (0, 0x77)


def test_extremes_order_as_magnitudes() -> None:
    values = np.array([-3.0, 0.5, -0.25, 2.0], dtype=np.float32)
    (found,) = value_scan.scan(values.view(np.uint8), [(0, values.nbytes, "f32")])
    bits = np.array([0.25, 3.0], dtype=np.float32).view(np.uint32)
    assert (found["least"], found["largest"], found["negative"]) == (bits[0], bits[1], 2)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_add_up_to_the_whole(kind: str) -> None:
    data = random_bytes(4096, seed=3)
    whole = value_scan.scan(data, [(0, 4096, kind)])
    pieces = value_scan.scan(data, [(0, 1000, kind), (1000, 24, kind), (1024, 3072, kind)])
    total = value_scan.empty(1)
    value_scan.add(total, np.zeros(3, dtype=np.int64), pieces)
    assert np.array_equal(total, whole)


@pytest.mark.parametrize(
    "place", [(0, 3, "bf16"), (0, 9, "e4m3"), (-1, 2, "e4m3"), (7, 2, "codes"), (0, 4, "int4")]
)
def test_what_cannot_be_scanned_is_refused(place: tuple[int, int, str]) -> None:
    with pytest.raises(FormatError):
        value_scan.scan(np.zeros(8, dtype=np.uint8), [place])


def test_only_bytes_are_scanned() -> None:
    with pytest.raises(FormatError, match="run of bytes"):
        value_scan.scan(np.zeros(8, dtype=np.float32), [])  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backends_are_chosen_by_name(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "cpu" and not dispatch.machine_isas():
        pytest.skip("no compiled kernels")
    monkeypatch.setenv("NYBBLE_KERNELS", backend)
    (found,) = value_scan.scan(np.zeros(8, dtype=np.uint8), [(0, 8, "e4m3")])
    assert (found["size"], found["zero"]) == (8, 8)
