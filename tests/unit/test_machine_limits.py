"""The probes do the work they are timed for: their sums say so. No figure of speed is asserted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.errors import KernelUnavailable
from nybble.kernels import dispatch, machine_limits
from nybble.kernels.machine_limits import PEAKS, Limits

ISAS = dispatch.machine_isas()
pytestmark = pytest.mark.skipif(not ISAS, reason="no compiled kernels")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set of this machine."""
    monkeypatch.setenv("NYBBLE_ISA", request.param)
    return str(request.param)


@pytest.mark.parametrize("words", [0, 1, 7, 31, 33, (1 << 17) - 1, (1 << 17) + 5, 3 << 17])
def test_every_word_is_read_in_every_pass(isa: str, words: int) -> None:
    from nybble.kernels.machine_limits import cpu

    drawn = np.random.default_rng(words).integers(0, 2**64, words, dtype=np.uint64)
    total = int(drawn.sum(dtype=np.uint64))
    for threads in (1, 3):
        assert cpu.read(drawn, 1, threads) == total
        assert cpu.read(drawn, 3, threads) == 3 * total % 2**64


@given(rounds=st.integers(0, 5000), threads=st.integers(1, 4), kind=st.sampled_from(list(PEAKS)))
def test_the_sum_counts_the_multiply_adds(rounds: int, threads: int, kind: str) -> None:
    from nybble.kernels.machine_limits import cpu

    made, total = cpu.multiply(PEAKS[kind], rounds, threads)
    assert made == total


def test_the_sum_counts_on_every_instruction_set(isa: str) -> None:
    from nybble.kernels.machine_limits import cpu

    done = {kind: cpu.multiply(number, 100, 2) for kind, number in PEAKS.items()}
    assert all(made == total for made, total in done.values())
    assert done["f32"][0] > 0
    assert (done["bf16"][0] > 0) == (isa == "avx512bf16")
    if isa == "portable":
        assert done["int8"][0] == 0


def test_a_type_without_instruction_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYBBLE_ISA", "portable")
    found = machine_limits.measure(1, read_bytes=1 << 20, repeats=1)
    assert list(found.operations_s) == ["f32"]
    assert found.read_bytes_s > 0


def test_the_better_of_two_measurements_counts() -> None:
    one = Limits(2, 10.0, {"f32": 1.0, "bf16": 5.0})
    other = Limits(2, 12.0, {"f32": 0.5, "bf16": 6.0})
    assert one.or_better(other) == Limits(2, 12.0, {"f32": 1.0, "bf16": 6.0})


def test_without_compiled_kernels_nothing_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYBBLE_KERNELS", "reference")
    with pytest.raises(KernelUnavailable, match="compiled kernels"):
        machine_limits.measure(1)
