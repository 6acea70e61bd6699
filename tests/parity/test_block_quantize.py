"""Every back end and instruction set writes the bytes of the definition, and nothing else."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nybble.errors import FormatError
from nybble.formats import search as definition
from nybble.formats.block import FP8, MXFP4, NVFP4, BlockFormat
from nybble.formats.tensor import BlockScaledTensor
from nybble.kernels import block_quantize, dispatch

sys.path.insert(0, str(Path(__file__).parents[1]))
from hard_blocks import BF16, F16, F32, SOURCES, random_finite, tensors

#: Blocks per run: one lane of a vector, one short of 16, 16 itself, one more, two vectors and one.
RUN_BLOCKS = (1, 15, 16, 17, 33)
#: Elements per FP8 run: around the widths of all vectors.
RUN_ELEMENTS = (1, 7, 8, 9, 15, 16, 17, 31, 33, 250)
GUARD = 64
FILL = 0xAA
#: The kernels add 256 squares in float32 before they go on in double: 256 roundings at most.
COMPARE_RTOL = 256 * 2.0**-24

FOUR_BIT = [
    (NVFP4, "absmax"),
    (NVFP4, "four-six"),
    (NVFP4, "mse"),
    (MXFP4, "absmax"),
    (MXFP4, "mse"),
]
BACKENDS = ["reference", *dispatch.ISAS]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each back end and instruction set in turn; one this machine lacks is skipped by name."""
    if request.param == "reference":
        monkeypatch.setenv("NYBBLE_KERNELS", "reference")
    elif request.param not in dispatch.machine_isas():
        pytest.skip(f"this machine has no {request.param}")
    else:
        monkeypatch.setenv("NYBBLE_KERNELS", "cpu")
        monkeypatch.setenv("NYBBLE_ISA", request.param)
    return str(request.param)


@cache
def sources(dtype: np.dtype[np.generic], width: int) -> tuple[list[str], NDArray]:
    """Names and values [cases, 1, 33 * width] of the hard tensors."""
    made = list(tensors(dtype, RUN_BLOCKS[-1], width))
    return [n for n, _ in made], np.stack([x.reshape(1, -1) for _, x in made])


@cache
def expected(
    dtype: np.dtype[np.generic], fmt: BlockFormat, search: definition.Search
) -> BlockScaledTensor:
    return definition.quantize(sources(dtype, fmt.block[1] or 16)[1], fmt, search)


def unaligned(x: NDArray) -> NDArray:
    """A contiguous copy at an odd address, as a safetensors file with an odd header has it."""
    buffer = bytearray(x.nbytes + 2)
    at = 1 + np.frombuffer(buffer, np.uint8).ctypes.data % 2
    copy = np.frombuffer(buffer, x.dtype, x.size, offset=at)
    copy[...] = x.reshape(-1)
    assert copy.ctypes.data % 2 == 1
    return copy


class Guarded:
    """Output buffers of given sizes between guard bytes, at odd offsets, filled with 0xAA."""

    def __init__(self, sizes: Sequence[int]) -> None:
        ends = np.cumsum([GUARD + 1 + size for size in sizes])
        self.memory = np.full(int(ends[-1]) + GUARD, FILL, dtype=np.uint8)
        self.views = [self.memory[end - size : end] for end, size in zip(ends, sizes, strict=True)]

    def is_intact_around(self) -> bool:
        inside = np.zeros(self.memory.size, dtype=bool)
        start = self.memory.ctypes.data
        for view in self.views:
            inside[view.ctypes.data - start :][: view.size] = True
        return bool((self.memory[~inside] == FILL).all())


def assert_same(found: NDArray, wanted: NDArray, what: str) -> None:
    differ = np.flatnonzero(found != wanted)
    assert not len(differ), (
        f"{what}: {len(differ)} of {found.size} bytes differ, first at {differ[0]}: "
        f"{found[differ[0]]:#x} instead of {wanted[differ[0]]:#x}"
    )


# ----------------------------------------------------------------------------- quantize


@pytest.mark.parametrize("dtype", SOURCES, ids=str)
@pytest.mark.parametrize(("fmt", "search"), FOUR_BIT, ids=str)
def test_four_bit_bytes_equal_the_definition(
    backend: str, dtype: np.dtype[np.generic], fmt: BlockFormat, search: definition.Search
) -> None:
    names, x = sources(dtype, fmt.block[1])
    wanted = expected(dtype, fmt, search)
    width = fmt.block[1]
    runs, scales, labels = [], [], []
    for case, name in enumerate(names):
        for blocks in RUN_BLOCKS:
            runs.append(unaligned(x[case, 0, : blocks * width]))
            scales.append(1.0 if wanted.tensor_scale is None else wanted.tensor_scale[case])
            labels.append((case, name, blocks))
    codes = Guarded([r.size // 2 for r in runs])
    blocks_out = Guarded([r.size // width for r in runs])
    block_quantize.quantize(
        runs,
        fmt,
        search,
        np.array(scales, dtype=np.float32),
        codes.views,
        blocks_out.views,
        threads=2,
    )
    for i, (case, name, blocks) in enumerate(labels):
        what = f"{name}, {blocks} blocks"
        assert_same(blocks_out.views[i], wanted.scale[case, 0, :blocks], f"scales of {what}")
        end = blocks * width // 2
        assert_same(codes.views[i], wanted.codes[case, 0, :end], f"codes of {what}")
    assert codes.is_intact_around()
    assert blocks_out.is_intact_around()


@pytest.mark.parametrize("dtype", SOURCES, ids=str)
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_fp8_bytes_equal_the_definition(
    backend: str, dtype: np.dtype[np.generic], search: definition.Search
) -> None:
    names, x = sources(dtype, 16)
    wanted = expected(dtype, FP8, search)
    runs = [unaligned(x[c, 0, :n]) for c in range(len(names)) for n in RUN_ELEMENTS]
    scales = np.repeat(wanted.scale.reshape(-1), len(RUN_ELEMENTS)).view(np.float32)
    codes = Guarded([r.size for r in runs])
    block_quantize.quantize(
        runs, FP8, search, scales, codes.views, [], threads=2, bf16_quotient=search == "absmax"
    )
    for i, run in enumerate(runs):
        case = i // len(RUN_ELEMENTS)
        assert_same(
            codes.views[i], wanted.codes[case, 0, : run.size], f"{names[case]}, {run.size} elements"
        )
    assert codes.is_intact_around()


@pytest.mark.parametrize(("fmt", "search"), [*FOUR_BIT, (FP8, "mse")], ids=str)
def test_threads_and_tiles_do_not_change_bytes(
    backend: str, fmt: BlockFormat, search: definition.Search
) -> None:
    if backend == "reference":
        pytest.skip("the reference has neither threads nor tiles")
    # Three runs: more than two tiles of 65,536, one tile and a bit, and a few blocks.
    sizes = [2 * 65536 + 96, 65536 + 32, 160]
    rng = np.random.default_rng(5)
    runs = [(rng.standard_normal(n) * 0.02).astype(BF16) for n in sizes]
    scales = np.full(3, 2.0**-14, dtype=np.float32)

    def bytes_of(threads: int, pieces: Sequence[NDArray]) -> bytes:
        codes = [np.empty(r.size // (2 if fmt.is_packed else 1), dtype=np.uint8) for r in pieces]
        blocks = [np.empty(r.size // (fmt.block[1] or 1), dtype=np.uint8) for r in pieces]
        repeated = np.full(len(pieces), scales[0], dtype=np.float32)
        block_quantize.quantize(pieces, fmt, search, repeated, codes, blocks, threads)
        return b"".join(c.tobytes() for c in codes) + (
            b"".join(b.tobytes() for b in blocks) if fmt.is_packed else b""
        )

    whole = bytes_of(1, runs)
    assert bytes_of(2, runs) == whole
    assert bytes_of(3, runs) == whole
    pieces = [p for r in runs for p in np.split(r, [32, r.size // 64 * 32])]
    assert bytes_of(2, pieces) == whole


def test_no_runs_are_no_work(backend: str) -> None:
    none = np.zeros(0, dtype=np.float32)
    assert block_quantize.amax([]).shape == (0,)
    block_quantize.quantize([], NVFP4, "mse", none, [], [])
    assert block_quantize.decode(NVFP4, none, [], []) == []
    assert block_quantize.compare([], NVFP4, none, [], []) == []


# --------------------------------------------------------------------------------- amax


@pytest.mark.parametrize("dtype", SOURCES, ids=str)
def test_amax_is_the_largest_magnitude(backend: str, dtype: np.dtype[np.generic]) -> None:
    _, x = sources(dtype, 16)
    runs = [unaligned(row[0, :n]) for row in x for n in (1, 3, 64, row.size)]
    runs.append(random_finite(dtype, (150_001,), seed=3))  # three tiles
    found = block_quantize.amax(runs, threads=2)
    wanted = [np.abs(r.astype(np.float32)).max() for r in runs]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", SOURCES, ids=str)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 7, 70_000, 70_016])
def test_amax_shows_what_is_not_finite(
    backend: str, dtype: np.dtype[np.generic], bad: float, at: int
) -> None:
    x = np.full(70_017, 3.0, dtype=dtype)
    x[at] = bad
    clean, found = block_quantize.amax([np.full(5, -2.0, dtype=dtype), x], threads=2)
    assert clean == 2.0
    assert np.isnan(found) if np.isnan(bad) else found == np.inf


def test_nan_is_not_hidden_by_infinity(backend: str) -> None:
    for order in ([np.inf, np.nan], [np.nan, np.inf]):
        assert np.isnan(block_quantize.amax([np.array(order, dtype=BF16)])[0])


# -------------------------------------------------------------------- decode and compare


def all_bytes(fmt: BlockFormat) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Codes and scales in which every code byte meets every scale byte."""
    if not fmt.is_packed:
        return np.arange(256, dtype=np.uint8), np.zeros(0, dtype=np.uint8)
    per_block = fmt.block[1] // 2
    codes = np.tile(np.arange(256, dtype=np.uint8), 256)
    return codes, np.repeat(np.arange(256, dtype=np.uint8), 256 // per_block)


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4, FP8], ids=str)
@pytest.mark.parametrize("tensor_scale", [1.0, 2.0**-14, 1.2345e-4, 3e-39, 2.0**119])
def test_decodes_every_byte_as_the_definition(
    backend: str, fmt: BlockFormat, tensor_scale: float
) -> None:
    codes, block_scales = all_bytes(fmt)
    top = np.array([tensor_scale], dtype=np.float32)
    [found] = block_quantize.decode(fmt, top, [codes], [block_scales], threads=2)
    wanted = BlockScaledTensor(
        fmt,
        (1, found.size),
        codes[None],
        block_scales[None] if fmt.is_packed else top[:, None],
        top[0] if fmt.has_tensor_scale else None,
    ).dequantize()[0]
    is_nan = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(found), is_nan)
    np.testing.assert_array_equal(found[~is_nan].view(np.uint32), wanted[~is_nan].view(np.uint32))


@pytest.mark.parametrize("dtype", SOURCES, ids=str)
@pytest.mark.parametrize("fmt", [NVFP4, MXFP4, FP8], ids=str)
def test_compares_as_the_definition(
    backend: str, fmt: BlockFormat, dtype: np.dtype[np.generic]
) -> None:
    names, x = sources(dtype, fmt.block[1] or 16)
    made = expected(dtype, fmt, "absmax")
    runs = [unaligned(row[0]) for row in x]
    codes = [c[0] for c in made.codes]
    block_scales = [s[0] for s in made.scale] if fmt.is_packed else []
    scales = made.tensor_scale if fmt.has_tensor_scale else made.scale.reshape(-1)
    if fmt is MXFP4:
        scales = np.ones(len(runs), dtype=np.float32)
    found = block_quantize.compare(runs, fmt, scales, codes, block_scales, threads=2)
    decoded = made.dequantize()
    for i, name in enumerate(names):
        source = runs[i].astype(np.float64)
        assert np.isfinite(decoded[i, 0]).all(), name
        d = (runs[i].astype(np.float32) - decoded[i, 0]).astype(np.float64)
        assert found[i].error == pytest.approx(d @ d, rel=COMPARE_RTOL, abs=0), name
        assert found[i].energy == pytest.approx(source @ source, rel=COMPARE_RTOL, abs=0), name
        assert found[i].bad_scales == 0, name


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_comparison_does_not_depend_on_threads(backend: str, threads: int) -> None:
    runs = [random_finite(F16, (n,), seed=n) for n in (65536 * 2 + 16, 32, 65536)]
    codes = [np.full(r.size // 2, 0x3B, dtype=np.uint8) for r in runs]
    block_scales = [np.full(r.size // 16, 0x38, dtype=np.uint8) for r in runs]
    scales = np.ones(3, dtype=np.float32)
    one = block_quantize.compare(runs, NVFP4, scales, codes, block_scales, 1)
    assert block_quantize.compare(runs, NVFP4, scales, codes, block_scales, threads) == one


def test_scales_that_no_engine_accepts_are_counted(backend: str) -> None:
    x = np.zeros(16 * 256, dtype=BF16)
    codes, scales = np.zeros(x.size // 2, dtype=np.uint8), np.arange(256, dtype=np.uint8)
    one = np.ones(1, dtype=np.float32)
    [found] = block_quantize.compare([x], NVFP4, one, [codes], [scales])
    assert found.bad_scales == 130  # 0x00, 0x7F and the 128 with a sign
    x, codes = np.zeros(32 * 256, dtype=BF16), np.zeros(16 * 256, dtype=np.uint8)
    [found] = block_quantize.compare([x], MXFP4, one, [codes], [scales])
    assert found.bad_scales == 1  # 0xFF


# ------------------------------------------------------------------ what is refused first


def buffers(elements: int) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
    return [np.zeros(elements // 2, dtype=np.uint8)], [np.zeros(elements // 16, dtype=np.uint8)]


ONE = np.ones(1, dtype=np.float32)
RUN = np.ones(64, dtype=BF16)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a | {"runs": [RUN, RUN.astype(F32)]}, "one dtype"),
        (lambda a: a | {"runs": [RUN.astype(np.float64)]}, "BF16, F16 or F32"),
        (lambda a: a | {"runs": [RUN.view(np.uint16).astype(">f4")]}, "BF16, F16 or F32"),
        (lambda a: a | {"runs": [np.ones(128, dtype=BF16)[::2]]}, "contiguous"),
        (lambda a: a | {"runs": [RUN[:40]]}, "whole blocks of 16: 40"),
        (lambda a: a | {"codes": [a["codes"][0][:-1]]}, "codes of run 0: expected 32"),
        (lambda a: a | {"codes": []}, "codes for 1 runs, found 0"),
        (lambda a: a | {"codes": [a["codes"][0].view(np.int8)]}, "found 32 int8"),
        (lambda a: a | {"codes": [np.zeros(64, np.uint8)[::2]]}, "not contiguous"),
        (lambda a: a | {"block_scales": [np.zeros(3, np.uint8)]}, "block_scales of run 0"),
        (lambda a: a | {"scales": np.ones(2, np.float32)}, "scales for 1 runs, found 2"),
        (lambda a: a | {"search": "best"}, "absmax, four-six, mse"),
        (lambda a: a | {"codes": [read_only(a["codes"][0])]}, "read-only"),
    ],
)
def test_quantize_refuses(backend: str, change: Callable[[dict], dict], says: str) -> None:
    codes, block_scales = buffers(64)
    arguments = {
        "runs": [RUN],
        "fmt": NVFP4,
        "search": "mse",
        "scales": ONE,
        "codes": codes,
        "block_scales": block_scales,
    }
    with pytest.raises(FormatError, match=says):
        block_quantize.quantize(**change(arguments))


def read_only(x: NDArray) -> NDArray:
    x.flags.writeable = False
    return x


def test_decode_and_compare_refuse_short_buffers(backend: str) -> None:
    codes, block_scales = buffers(64)
    with pytest.raises(FormatError, match="block_scales of run 0: expected 4"):
        block_quantize.decode(NVFP4, ONE, codes, [block_scales[0][:3]])
    with pytest.raises(FormatError, match="codes of run 0: expected 32"):
        block_quantize.compare([RUN], NVFP4, ONE, [codes[0][:8]], block_scales)


def test_mapped_files_can_be_decoded(backend: str) -> None:
    codes, block_scales = buffers(64)
    codes[0][:], block_scales[0][:] = 0x21, 0x38  # 0.5 and 1.0 in turn, scale 1
    found = block_quantize.decode(NVFP4, ONE, [read_only(codes[0])], [read_only(block_scales[0])])
    assert found[0].tolist() == [0.5, 1.0] * 32


# --------------------------------------------------------------------------- processes


def work(threads: int) -> bytes:
    runs = [np.full(65536, 1.0, dtype=BF16)] * 4
    codes = [np.empty(r.size // 2, dtype=np.uint8) for r in runs]
    block_scales = [np.empty(r.size // 16, dtype=np.uint8) for r in runs]
    scales = np.ones(4, dtype=np.float32)
    block_quantize.quantize(runs, NVFP4, "absmax", scales, codes, block_scales, threads)
    return codes[3].tobytes()


def finishes_in_child(seconds: int) -> bool:
    """Fork, run a kernel with two threads there, and see whether it ends with the right bytes."""
    wanted = work(1)
    child = os.fork()
    if child == 0:
        import signal

        signal.alarm(seconds)  # a hang becomes a failure
        os._exit(0 if work(2) == wanted else 1)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_threads_of_its_own(backend: str) -> None:
    work(2)  # the parent's workers exist; they do not in the child
    assert finishes_in_child(10)
    work(2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_while_another_thread_works_does_not_hang(backend: str) -> None:
    if backend == "reference":
        pytest.skip("no pool of threads")
    stop = threading.Event()
    busy = threading.Thread(target=lambda: [work(2) for _ in iter(stop.is_set, True)])
    busy.start()
    try:
        assert all(finishes_in_child(10) for _ in range(10))
    finally:
        stop.set()
        busy.join()


def test_callers_on_several_threads_do_not_mix(backend: str) -> None:
    wanted = work(1)
    found: list[bytes] = []
    callers = [threading.Thread(target=lambda: found.append(work(2))) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [wanted] * 6
