"""Every back end and instruction set multiplies as the definition does, and each row for itself."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.errors import FormatError
from nybble.formats.block import FORMATS, FP8, FP8_BLOCK, FP8_CHANNEL, MXFP4, NVFP4, BlockFormat
from nybble.formats.search import quantize
from nybble.formats.tensor import BlockScaledTensor
from nybble.kernels import dispatch
from nybble.kernels.block_matmul import Prepared, Weight, matmul, prepare
from nybble.kernels.compute import PRECISIONS, Compute, Precision
from nybble.kernels.program import Program

#: Float32 sums of K products: each rounds K times at most, by 2^-24 of a partial sum that is no
#: larger than the sum of magnitudes; the lanes and the randomness of signs leave a tenth of that.
#: Held against the sum of magnitudes, so that cancellation is not an error.
RTOL = 2e-6
PLAIN = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
}
KINDS = [*FORMATS, *PLAIN]
#: Rows: decoded in registers (1 to 4, or 6), tiles with every remainder, more than a block of 128.
ROWS = (1, 2, 3, 4, 5, 6, 67)
#: K: a tail of each kind, more than a decoded tile holds (1024 or 2048 elements), many scales.
ODD_K = (1, 31, 33, 100, 129, 1030, 2050)
BLOCK_K = {"nvfp4": (16, 48, 64, 80, 1040, 2080), "mxfp4": (32, 96, 128, 1056, 2080)}
#: N: fewer than a tile of 6, 4 or 4, an odd one, across a 128 row block of scales.
COLUMNS = (1, 3, 5, 13, 131)
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


def unaligned(x: NDArray) -> NDArray:
    """A read-only contiguous copy at an odd address, ending where its memory ends."""
    buffer = bytearray(x.nbytes + 1)
    at = 1 - np.frombuffer(buffer, np.uint8).ctypes.data % 2
    copy = np.frombuffer(buffer, x.dtype, x.size, offset=at).reshape(x.shape)
    copy[...] = x
    copy.flags.writeable = False
    assert copy.ctypes.data % 2 == 1
    return copy


def weight_of(kind: str, n: int, k: int, seed: int = 0) -> Weight:
    """A random weight [N, K] in a format or dtype, its arrays unaligned and read-only."""
    w = np.random.default_rng([seed, n, k]).standard_normal((n, k), dtype=np.float32)
    if kind in PLAIN:
        return unaligned(w.astype(PLAIN[kind]))
    fmt = FORMATS[kind]
    # absmax: tensor scales that are no powers of two
    q = quantize(w * 0.02, fmt, "absmax")
    return BlockScaledTensor(fmt, q.shape, unaligned(q.codes), unaligned(q.scale), q.tensor_scale)


def dense(weight: Weight) -> NDArray[np.float64]:
    """The weight in float64, its scales not rounded: what every order of sums approximates."""
    if not isinstance(weight, BlockScaledTensor):
        return weight.astype(np.float64)
    return weight.dequantize().astype(np.float64)


def rows(m: int, k: int, seed: int = 1) -> Tensor:
    rng = np.random.default_rng([seed, k])
    return torch.from_numpy(rng.standard_normal((m, k), dtype=np.float32))


def multiplied(x: Tensor, precision: Precision, weight: Weight) -> NDArray[np.float64]:
    """x in float64 as it meets a weight, rounded by other means than the definition's."""
    is_packed = isinstance(weight, BlockScaledTensor) and weight.format.is_packed
    if precision == "f32":
        return x.double().numpy()
    if precision == "bf16" or not is_packed:
        return x.numpy().astype(ml_dtypes.bfloat16).astype(np.float64)
    blocks = x.numpy().reshape(len(x), -1, 16)
    scale = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(127)
    assert (scale > 1e-30).all()
    integers = np.rint(blocks * (np.float32(1) / scale))
    assert np.abs(integers).max() <= 127
    return (integers.astype(np.float64) * scale.astype(np.float64)).reshape(x.shape)


def assert_close(
    found: Tensor, x: Tensor, weights: Sequence[Weight], precision: Precision, what: str
) -> None:
    """Against float64: the error of each sum, in units of the sum of magnitudes."""
    rounded = multiplied(x, precision, weights[0])
    w = np.concatenate([dense(weight) for weight in weights])
    error = np.abs(found.double().numpy() - rounded @ w.T)
    bound = RTOL * (np.abs(rounded) @ np.abs(w).T) + 1e-30
    assert found.shape == error.shape
    worst = np.unravel_index((error / bound).argmax(), error.shape)
    assert (error <= bound).all(), f"{what}: {error[worst]} at {worst}, allowed {bound[worst]}"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_decoded_weight(
    backend: str, kind: str, precision: Precision
) -> None:
    for i, k in enumerate(BLOCK_K.get(kind, ODD_K)):
        n = COLUMNS[i % len(COLUMNS)]
        w = weight_of(kind, n, k)
        group = prepare([w])
        for m in ROWS:
            x = rows(m, k)
            found = matmul(x, group, Compute(precision, 2))
            assert found.dtype == torch.float32
            assert found.is_contiguous()
            assert_close(found, x, [w], precision, f"{kind} {backend} M {m} N {n} K {k}")


@pytest.mark.parametrize("n", COLUMNS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_columns(backend: str, kind: str, n: int) -> None:
    w = weight_of(kind, n, 160)
    for m in (1, 6):
        x = rows(m, 160)
        assert_close(matmul(x, prepare([w]), Compute("bf16", 2)), x, [w], "bf16", f"{kind} {n}")


def test_members_of_a_group_lie_side_by_side(backend: str) -> None:
    k = 192
    weights = [weight_of(kind, 7 + 2 * i, k, i) for i, kind in enumerate(KINDS)]
    rng = np.random.default_rng(3)
    biases: list[NDArray[np.float32] | None] = [None] * len(weights)
    for i in range(0, len(weights), 2):
        biases[i] = rng.standard_normal(weights[i].shape[0], dtype=np.float32)
    group = prepare(weights, biases, name="qkv")
    assert (group.k, group.n, group.name) == (k, sum(w.shape[0] for w in weights), "qkv")
    for m in (1, 3, 67):
        x = rows(m, k)
        found = matmul(x, group, Compute("bf16", 2))
        column = 0
        for w, bias in zip(weights, biases, strict=True):
            part = found[:, column : column + w.shape[0]]
            alone = matmul(x, prepare([w]), Compute("bf16", 1))
            wanted = alone if bias is None else alone + torch.from_numpy(bias)
            assert torch.equal(part, wanted)
            column += w.shape[0]


def test_a_bfloat16_input_is_read_as_it_is(backend: str) -> None:
    for kind in KINDS:
        group = prepare([weight_of(kind, 9, 96)])
        x = rows(5, 96).bfloat16()
        for precision in PRECISIONS:
            compute = Compute(precision, 1)
            assert torch.equal(matmul(x, group, compute), matmul(x.float(), group, compute))


def test_rows_of_the_input_may_lie_apart(backend: str) -> None:
    group = prepare([weight_of("nvfp4", 9, 96)])
    wide = rows(5, 200)
    part = wide[:, 40:136]
    compute = Compute("bf16", 1)
    assert torch.equal(matmul(part, group, compute), matmul(part.contiguous(), group, compute))


def test_the_precision_decides_if_the_input_is_rounded(backend: str) -> None:
    group = prepare([np.ones((1, 1), dtype=np.float32)])
    x = torch.tensor([[1.0 + 2.0**-8], [1.0 + 3 * 2.0**-8], [1 + 2.0**-20]])  # two ties, one below
    assert matmul(x, group, Compute("f32", 1)).equal(x)
    assert matmul(x, group, Compute("bf16", 1)).flatten().tolist() == [1.0, 1.015625, 1.0]


# --------------------------------------------------------------------- one order of the sums


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_never_depends_on_its_batch_or_the_threads(
    backend: str, kind: str, precision: Precision
) -> None:
    if backend == "reference":
        pytest.skip("the definition is torch's matmul, which sums as it likes")
    for n, k in ((13, 96), (50, 2208)):
        group = prepare([weight_of(kind, n, k)])
        x = rows(135, k)
        whole = matmul(x, group, Compute(precision, 2))
        assert torch.equal(whole, matmul(x, group, Compute(precision, 1)))
        for first, m in ((0, 1), (66, 1), (134, 1), (3, 2), (7, 3), (60, 4), (9, 5), (64, 67)):
            part = matmul(x[first : first + m], group, Compute(precision, 2))
            assert torch.equal(part, whole[first : first + m]), f"rows {first}..{first + m}"


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_many_long_rows_have_the_bits_of_few(backend: str, kind: str, precision: Precision) -> None:
    """Rows of x that the second cache does not hold go through K in pieces, for several windows of
    weight rows at once; the last windows overlap the ones before them."""
    if backend == "reference":
        pytest.skip("the definition is torch's matmul, which sums as it likes")
    n, k = 77, 4256
    w = weight_of(kind, n, k)
    group, x = prepare([w]), rows(250, k)
    whole = matmul(x, group, Compute(precision, 2))
    assert_close(whole, x, [w], precision, f"{kind} {backend}")
    for first, m in ((0, 1), (63, 5), (122, 6), (242, 8), (100, 60)):
        part = matmul(x[first : first + m], group, Compute(precision, 1))
        assert torch.equal(part, whole[first : first + m]), f"rows {first}, {m} of them"


def test_threads_of_the_caller_do_not_share_memory(backend: str) -> None:
    group = prepare([weight_of("nvfp4", 40, 512)])
    inputs = [rows(9, 512, seed) for seed in range(4)]
    wanted = [matmul(x, group, Compute("bf16", 1)) for x in inputs]
    wrong = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(matmul(inputs[i], group, Compute("bf16", 2)), wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_and_replayed_a_row_has_the_same_bits(backend: str, kind: str) -> None:
    """A program of 9 rows, whose input lies in wider ones, replayed for fewer."""
    if backend == "reference":
        pytest.skip("only compiled kernels are recorded")
    group = prepare([weight_of(kind, 11, 96), weight_of(kind, 3, 96)])
    wide = rows(9, 120)
    for precision in PRECISIONS:
        program = Program(tokens=9, sequences=1, outputs=1)
        with program.recording():
            found = matmul(wide[:, 20:116], group, Compute(precision, 2, program))
        for m in (9, 1, 5, 0):
            program.run(tokens=m, sequences=1, outputs=1)
            wanted = matmul(wide[:m, 20:116], group, Compute(precision, 1))
            assert torch.equal(found[:m], wanted)


# --------------------------------------------------------------------------- rounding to INT8


def identity(fmt: BlockFormat, k: int) -> BlockScaledTensor:
    """A weight [K, K] whose outputs are its inputs as they were rounded."""
    codes = np.zeros((k, k), dtype=np.uint8)
    np.fill_diagonal(codes, 2)  # 1 in E2M1
    one = 0x38 if fmt is NVFP4 else 0x7F
    scale = np.full(fmt.scale_shape((k, k)), one, dtype=np.uint8)
    top = np.array(1, dtype=np.float32) if fmt.has_tensor_scale else None
    return BlockScaledTensor(fmt, (k, k), codes[:, 0::2] | codes[:, 1::2] << 4, scale, top)


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=str)
def test_int8_rounds_to_the_nearest_ties_to_even(backend: str, fmt: BlockFormat) -> None:
    k = 96
    x = torch.arange(k).remainder(16).sub(8).add(0.5).repeat(8, 1)  # halves, up to 7.5
    x += torch.arange(8)[:, None] * 16
    x[:, ::16] = 127.0  # the scale is 1
    x[3::2, 5::16] = -127.0
    for m in (1, 8):
        found = matmul(x[:m], prepare([identity(fmt, k)]), Compute("int8", 2))
        assert torch.equal(found, x[:m].round())


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=str)
def test_each_block_of_16_has_a_scale_of_its_own(backend: str, fmt: BlockFormat) -> None:
    k = 160
    magnitudes = torch.tensor([1.0, 2**-30, 2**20, 3e38, 0.0, 2**-100, 7.0, 1e-45, 2**-110, 448.0])
    x = torch.repeat_interleave(magnitudes, 16) * rows(1, k).clamp(-1, 1)
    x[0, ::16] = magnitudes
    for m in (1, 7):
        found = matmul(x.repeat(m, 1), prepare([identity(fmt, k)]), Compute("int8", 1))
        error = (found - x).abs().unflatten(1, (-1, 16)).amax(dim=2)
        # Half a step of a 127th; float32 has room for scales down to 2^-120.
        assert (error <= magnitudes * (0.5 / 127 + 1e-6) + 127 * 2.0**-120).all()
        assert (found[:, 64:80] == 0).all()


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("nvfp4", "mxfp4")])
def test_int8_is_bf16_for_weights_of_more_than_four_bits(backend: str, kind: str) -> None:
    group, x = prepare([weight_of(kind, 9, 256)]), rows(7, 256)
    assert torch.equal(matmul(x, group, Compute("int8", 1)), matmul(x, group, Compute("bf16", 1)))


# ------------------------------------------------------------------- what must not be hidden


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_not_finite_shows_in_its_row_only(
    backend: str, precision: Precision, value: float
) -> None:
    for kind in KINDS:
        group = prepare([weight_of(kind, 7, 96)])
        for m in (1, 3, 70):
            x = rows(m, 96)
            clean = matmul(x, group, Compute(precision, 2))
            x[m // 2, 95] = value
            found = matmul(x, group, Compute(precision, 2))
            broken = found[m // 2]
            assert (broken.isnan() if value != value else ~broken.isfinite()).all(), kind
            others = torch.arange(m) != m // 2
            if backend != "reference":
                assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4", "fp8", "fp8_channel", "fp8_block"])
def test_a_nan_code_or_scale_shows_in_its_column(backend: str, kind: str) -> None:
    w = weight_of(kind, 5, 160)
    assert isinstance(w, BlockScaledTensor)
    codes, scale = np.array(w.codes), np.array(w.scale)
    if w.format.is_packed:
        scale[2, -1] = 0x7F if kind == "nvfp4" else 0xFF
        columns = [2]
    else:
        codes[2, -1] = 0xFF
        columns = [2]
    broken = BlockScaledTensor(w.format, w.shape, codes, scale, w.tensor_scale)
    for m in (1, 7):
        for precision in PRECISIONS:
            found = matmul(rows(m, 160), prepare([broken]), Compute(precision, 2))
            assert found.isnan().any(dim=0).nonzero().flatten().tolist() == columns
            assert found.isnan().all(dim=0).nonzero().flatten().tolist() == columns


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=str)
def test_every_code_under_every_scale(backend: str, fmt: BlockFormat) -> None:
    """One block per scale byte; x picks one element at a time, so sums are single products."""
    width = fmt.block[1]
    codes = np.tile(np.arange(width, dtype=np.uint8) % 16, (256, 1))
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    scale = np.arange(256, dtype=np.uint8)[:, None]
    top = np.float32(1) if fmt.has_tensor_scale else None
    w = BlockScaledTensor(fmt, (256, width), packed, scale, None if top is None else np.array(top))
    found = matmul(torch.eye(width), prepare([w]), Compute("bf16", 1)).numpy().T
    int8 = matmul(torch.eye(width), prepare([w]), Compute("int8", 1)).numpy().T
    wanted = w.dequantize()
    # BF16 dot products take and give zero for subnormal numbers.
    wanted = np.where(np.abs(wanted) < 2.0**-126, found, wanted)
    with np.errstate(invalid="ignore"):
        # Infinity times the zeros of the other columns is NaN: 6 * 2^127 is no float32.
        overflows = ~np.isfinite(wanted).all(axis=1)
    np.testing.assert_array_equal(found[~overflows], wanted[~overflows])
    # 127 times the float32 nearest to a 127th of 1 is not quite 1.
    np.testing.assert_allclose(int8[~overflows], wanted[~overflows], rtol=1e-6, atol=2.0**-126)
    assert overflows.sum() == (2 if fmt is NVFP4 else 3)
    assert not np.isfinite(found[overflows]).all(axis=1).any()
    assert not np.isfinite(int8[overflows]).all(axis=1).any()


@pytest.mark.parametrize("fmt", [FP8, FP8_CHANNEL, FP8_BLOCK], ids=str)
def test_every_fp8_code(backend: str, fmt: BlockFormat) -> None:
    codes = np.arange(256, dtype=np.uint8)[:, None]
    scale = np.full(fmt.scale_shape((256, 1)), 0.375, dtype=np.float32)
    w = BlockScaledTensor(fmt, (256, 1), codes, scale, None)
    for m in (1, 5):
        found = matmul(torch.ones(m, 1), prepare([w]), Compute("bf16", 1))
        np.testing.assert_array_equal(found.numpy(), np.tile(w.dequantize().T, (m, 1)))


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect through ctypes")
@pytest.mark.parametrize("n", [7, 13])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_past_the_end_of_a_weight(backend: str, kind: str, n: int) -> None:
    """Codes, and scales, end where a page does, and the next page may not be read."""
    for k in {"nvfp4": (80, 528), "mxfp4": (96, 544)}.get(kind, (77,)):
        w = weight_of(kind, n, k)
        guards: list[mmap.mmap] = []
        if isinstance(w, BlockScaledTensor):
            codes, scale = at_page_end(w.codes, guards), at_page_end(w.scale, guards)
            held: Weight = BlockScaledTensor(w.format, w.shape, codes, scale, w.tensor_scale)
        else:
            held = at_page_end(w, guards)
        for m in (1, 4, 7):
            for precision in PRECISIONS:
                x, compute = rows(m, k), Compute(precision, 1)
                assert torch.equal(
                    matmul(x, prepare([held]), compute), matmul(x, prepare([w]), compute)
                )


def at_page_end(x: NDArray, guards: list[mmap.mmap]) -> NDArray:
    """A copy of x whose last byte is the last before a page without access."""
    size = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    guards.append(memory)
    whole = np.frombuffer(memory, np.uint8)
    copy = whole[size - x.nbytes : size].view(x.dtype).reshape(x.shape)
    copy[...] = x
    page = ctypes.c_void_p(whole.ctypes.data + size)
    assert ctypes.CDLL(None).mprotect(page, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return copy


# --------------------------------------------------------------------------------- refusals


def test_prepare_refuses_what_kernels_cannot_read() -> None:
    w = np.zeros((4, 32), dtype=np.float32)
    q = quantize(w, NVFP4)
    bias = np.zeros(4, dtype=np.float32)
    wrong_scale = BlockScaledTensor(NVFP4, (4, 32), q.codes, q.scale[:2], q.tensor_scale)
    wrong_codes = BlockScaledTensor(NVFP4, (4, 32), q.codes[:3], q.scale, q.tensor_scale)
    no_top = BlockScaledTensor(NVFP4, (4, 32), q.codes, q.scale, None)
    cases: list[tuple[list[Weight], list[NDArray | None] | None, str]] = [
        ([], None, "at least one"),
        ([w, np.zeros((4, 33), dtype=np.float32)], None, "share K"),
        ([np.zeros(4, dtype=np.float32)], None, "share K"),
        ([np.zeros((0, 4), dtype=np.float32)], None, "share K"),
        ([w.astype(np.float64)], None, "float64"),
        ([w.T], None, "contiguous"),
        ([w], [bias, bias], "biases"),
        ([w], [bias[:3]], "bias"),
        ([w], [bias.astype(np.float64)], "bias"),
        ([wrong_scale], None, "scales"),
        ([wrong_codes], None, "codes"),
        ([no_top], None, "tensor scale"),
    ]
    for weights, biases, message in cases:
        with pytest.raises(FormatError, match=message):
            prepare(weights, biases, name="layers.3.mlp")


def test_matmul_refuses_other_inputs(backend: str) -> None:
    group = prepare([np.zeros((4, 32), dtype=np.float32)], name="layers.3.mlp")
    for x in (
        torch.zeros(2, 31),
        torch.zeros(32),
        torch.zeros(2, 32, dtype=torch.float16),
        torch.zeros(32, 2).T,
    ):
        with pytest.raises(FormatError, match=r"layers\.3\.mlp"):
            matmul(x, group, Compute("bf16", 1))
    assert matmul(torch.zeros(0, 32), group, Compute("bf16", 1)).shape == (0, 4)


def test_rows_of_a_weight_may_lie_apart(backend: str) -> None:
    stack = np.random.default_rng(5).standard_normal((6, 3, 64)).astype(np.float32)
    part = stack[:, 1]
    apart, together = prepare([part]), prepare([np.ascontiguousarray(part)])
    x = rows(7, 64)
    compute = Compute("bf16", 1)
    assert isinstance(apart, Prepared)
    assert torch.equal(matmul(x, apart, compute), matmul(x, together, compute))
