"""Attention over pages is dense attention in float64, and does not care how its work is cut."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nybble.errors import EngineError
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute
from nybble.kernels.paged_attention import FP8, Pages, attention, write
from nybble.kernels.program import Program

COMPILED = ["portable", "avx2", "avx512"]  # BF16 instructions change nothing here
BACKENDS = ["reference", *COMPILED]
#: Scores up to about 15 are float32 sums of up to 256 products, so their own error, some 1e-6, is
#: the relative error of a weight; values of about 3 make it 3e-6, and rounding of the sums doubles
#: that.
ATOL = 1e-5
DTYPES = [torch.bfloat16, torch.float32, FP8]
#: Not powers of two, so that a scale in the wrong place shows, and small enough to clip some.
SCALES = (0.0051, 0.0073)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each back end and instruction set in turn; one this machine lacks is skipped by name."""
    return force(request.param, monkeypatch)


@pytest.fixture(params=COMPILED)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set in turn: the reference promises no bits."""
    return force(request.param, monkeypatch)


def force(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if name == "reference":
        monkeypatch.setenv("NYBBLE_KERNELS", "reference")
    elif name not in dispatch.machine_isas():
        pytest.skip(f"this machine has no {name}")
    else:
        monkeypatch.setenv("NYBBLE_KERNELS", "cpu")
        monkeypatch.setenv("NYBBLE_ISA", name)
    return name


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def held(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """x, float64, as pages hold it; FP8 by another implementation."""
    if dtype != FP8:
        return x.to(dtype).double()
    return torch.from_numpy(e4m3(x.numpy(), scale).astype(np.float64) * float(np.float32(scale)))


def e4m3(x: np.ndarray, scale: float) -> np.ndarray:
    """x / scale as E4M3 numbers, saturated."""
    with np.errstate(invalid="ignore"):
        scaled = np.clip(x / np.float32(scale), -448, 448)
    return scaled.astype(ml_dtypes.float8_e4m3fn)


class Case:
    """Sequences of given lengths with random keys, values and queries, and a pool to put them in.

    The pool is filled with NaN: nothing that was not written may be read.
    """

    def __init__(
        self,
        lengths: list[int],
        *,
        kv_heads: int = 2,
        group: int = 3,
        head_dim: int = 40,
        page_tokens: int = 23,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 7,
    ) -> None:
        made = torch.Generator().manual_seed(seed)
        self.lengths, self.group, self.dtype = lengths, group, dtype
        self.scales = SCALES if dtype == FP8 else (1.0, 1.0)
        self.clipped = torch.zeros(1, dtype=torch.int64)
        shapes = [(n, kv_heads, head_dim) for n in lengths]
        self.k = [torch.randn(s, generator=made) for s in shapes]
        self.v = [torch.randn(s, generator=made) for s in shapes]
        self.q = [2 * torch.randn(n, kv_heads * group, head_dim, generator=made) for n in lengths]
        self.scale = head_dim**-0.5
        self.place(page_tokens)

    def place(self, page_tokens: int, seed: int = 3) -> None:
        """A fresh pool: pages out of order, shared by all sequences."""
        _, kv_heads, head_dim = self.k[0].shape
        width = max(-(-n // page_tokens) for n in self.lengths)
        count = width * len(self.lengths) + 3
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        self.table = order[: width * len(self.lengths)].int().reshape(-1, width).contiguous()
        for row, n in zip(self.table, self.lengths, strict=True):
            row[-(-n // page_tokens) :] = -1
        shape = (count, kv_heads, page_tokens, head_dim)
        empty = (torch.full(shape, torch.nan).to(self.dtype) for _ in range(2))
        self.pages = Pages(*empty, *self.scales, self.clipped)

    def run(
        self, pieces: list[tuple[int, int, int]], window: int = 0, threads: int = 2, first: int = 0
    ) -> Tensor:
        """Write and attend one batch: (sequence, first, end) of each of its pieces."""
        which = [p[0] for p in pieces]
        starts = ints(0, *torch.tensor([e - f for _, f, e in pieces]).cumsum(0).tolist())
        lengths = ints(*(f for _, f, _ in pieces))
        q, k, v = (torch.cat([x[b][f:e] for b, f, e in pieces]) for x in (self.q, self.k, self.v))
        table = self.table[which].contiguous()
        write(k, v, self.pages, table, starts, lengths, Compute(threads=threads))
        return attention(
            q,
            self.pages,
            table,
            starts,
            lengths,
            scale=self.scale,
            window=window,
            first=first,
            compute=Compute(threads=threads),
        )

    def whole(self, window: int = 0, threads: int = 2, first: int = 0) -> list[Tensor]:
        """All sequences at once, from nothing."""
        found = self.run([(b, 0, n) for b, n in enumerate(self.lengths)], window, threads, first)
        return list(found.split(self.lengths))

    def wanted(self, b: int, window: int = 0, first: int = 0) -> Tensor:
        """Sequence b by dense attention in float64 on what the pages can hold."""
        q = self.q[b].double()
        k, v = (
            held(x[b], self.dtype, s) for x, s in zip((self.k, self.v), self.scales, strict=True)
        )
        k, v = (x.repeat_interleave(self.group, dim=1) for x in (k, v))
        at = torch.arange(len(q))
        unseen = at[None] > at[:, None]
        if window:
            unseen |= at[None] <= at[:, None] - window
        unseen |= (at[None] < first) & (at[None] != at[:, None])
        scores = torch.einsum("ihd,jhd->hij", q, k) * self.scale
        p = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        return torch.einsum("hij,jhd->ihd", p, v).float()


# --------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 20, 32, 40, 64, 96, 128, 256])
def test_head_sizes(backend: str, head_dim: int, dtype: torch.dtype) -> None:
    case = Case([70, 131], head_dim=head_dim, dtype=dtype)
    for b, found in enumerate(case.whole()):
        torch.testing.assert_close(found, case.wanted(b), atol=ATOL, rtol=0)
    found = case.run([(0, 69, 70), (1, 130, 131)])  # one token each: another way through the code
    wanted = torch.stack([case.wanted(0)[-1], case.wanted(1)[-1]])
    torch.testing.assert_close(found, wanted, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("kv_heads", "group"), [(1, 1), (3, 1), (2, 3), (2, 5), (1, 8), (1, 16), (1, 17), (1, 97)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
def test_groups_of_query_heads(backend: str, kv_heads: int, group: int, dtype: torch.dtype) -> None:
    case = Case([67, 1, 130], kv_heads=kv_heads, group=group, head_dim=48, dtype=dtype)
    for b, found in enumerate(case.whole()):
        torch.testing.assert_close(found, case.wanted(b), atol=ATOL, rtol=0)
    found = case.run([(2, 129, 130)])
    torch.testing.assert_close(found[0], case.wanted(2)[-1], atol=ATOL, rtol=0)


@pytest.mark.parametrize("page_tokens", [1, 16, 23, 64, 1200])
def test_page_sizes_over_several_segments(backend: str, page_tokens: int) -> None:
    case = Case([1100, 33], kv_heads=1, page_tokens=page_tokens, dtype=torch.float32)
    for b, found in enumerate(case.whole()):
        torch.testing.assert_close(found, case.wanted(b), atol=ATOL, rtol=0)


@pytest.mark.parametrize("window", [1, 5, 64, 100, 600])
def test_window(backend: str, window: int) -> None:
    case = Case([700, 90], kv_heads=1)
    for b, found in enumerate(case.whole(window)):
        torch.testing.assert_close(found, case.wanted(b, window), atol=ATOL, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("first", "window"), [(1, 0), (1, 40), (64, 0), (70, 100), (300, 0)])
def test_positions_before_the_first_are_alone(
    backend: str, first: int, window: int, dtype: torch.dtype
) -> None:
    """Each is seen by its own query alone, which shows where it holds NaN."""
    case = Case([331, 1, 66], kv_heads=1, dtype=dtype)
    wanted = [case.wanted(b, window, first) for b in range(3)]
    for found, right in zip(case.whole(window, first=first), wanted, strict=True):
        torch.testing.assert_close(found, right, atol=ATOL, rtol=0)
    found = case.run([(0, 330, 331), (2, 64, 66)], window, first=first)
    right = torch.cat([wanted[0][330:], wanted[2][64:]])
    torch.testing.assert_close(found, right, atol=ATOL, rtol=0)
    clean = case.whole(window, first=first)[0]
    case.k[0][first - 1] = torch.nan
    if backend != "reference":  # there a weight of 0 is multiplied with the value
        case.v[0][first - 1] = torch.nan
    found = case.whole(window, first=first)[0]
    assert found[first - 1].isnan().all()
    clean[first - 1] = torch.nan
    torch.testing.assert_close(found, clean, atol=ATOL, rtol=0, equal_nan=True)


def test_pages_before_the_window_may_be_gone(backend: str) -> None:
    case = Case([650], page_tokens=16)
    case.run([(0, 0, 640)], window=40)
    gone = (640 - 40 + 1) // 16  # the first query sees positions 601 and later
    case.pages.keys[case.table[0, :gone].long()] = torch.nan
    case.table[0, :gone] = -1
    found = case.run([(0, 640, 650)], window=40)
    torch.testing.assert_close(found, case.wanted(0, 40)[640:], atol=ATOL, rtol=0)
    case.table[0, gone] = -1
    with pytest.raises(EngineError, match="positions 601 to 649"):
        case.run([(0, 640, 650)], window=40)


def test_large_scores_do_not_overflow(backend: str) -> None:
    case = Case([200], dtype=torch.float32)
    case.q[0] *= 1000
    found = case.whole()[0]
    assert found.isfinite().all()
    # Scores of thousands: float32 knows them to 1e-3, so two that compete weigh that much apart.
    torch.testing.assert_close(found, case.wanted(0), atol=5e-3, rtol=0)


# ----------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize(("window", "first"), [(0, 0), (90, 0), (0, 1), (90, 66)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_neighbours_pages_and_threads_leave_the_bits(
    compiled: str, dtype: torch.dtype, window: int, first: int
) -> None:
    case = Case([600, 77, 130], dtype=dtype)
    whole = case.whole(window, 1, first)
    for threads in (2, 5):
        for found, wanted in zip(case.whole(window, threads, first), whole, strict=True):
            assert torch.equal(found, wanted)
    for page_tokens in (7, 64, 1000):
        case.place(page_tokens)
        cuts = [0, 5, 64, 197, 198, 511, 600]
        for begin, end in zip(cuts, cuts[1:], strict=False):
            found = case.run([(0, begin, end)], window, first=first)
            assert torch.equal(found, whole[0][begin:end]), (page_tokens, begin)
    case.place(16)
    case.run([(1, 0, 70), (2, 0, 1), (0, 0, 599)], window, first=first)
    found = case.run([(0, 599, 600), (2, 1, 130), (1, 70, 77)], window, first=first)
    assert torch.equal(found, torch.cat([whole[0][599:], whole[2][1:], whole[1][70:]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("group", "head_dim", "window", "first"),
    [(3, 64, 0, 0), (8, 144, 0, 0), (7, 32, 300, 0), (4, 64, 0, 1), (3, 20, 0, 257)],
)
def test_decode_has_the_bits_of_prefill(
    compiled: str, group: int, head_dim: int, window: int, first: int, dtype: torch.dtype
) -> None:
    case = Case([1090], kv_heads=1, group=group, head_dim=head_dim, dtype=dtype)
    whole = case.whole(window, first=first)[0]
    for at in (0, 1, 63, 64, 255, 256, 257, 1024, 1089):
        for threads in (1, 3):
            found = case.run([(0, at, at + 1)], window, threads, first)
            assert torch.equal(found[0], whole[at])


def test_a_long_context_is_shared_out_beside_short_ones(compiled: str) -> None:
    case = Case([2500, 5, 40], head_dim=64, page_tokens=64)
    whole = case.whole()
    last = [(b, n - 1, n) for b, n in enumerate(case.lengths)]
    for threads in (1, 2, 16):
        found = case.run(last, threads=threads)
        assert torch.equal(found, torch.stack([x[-1] for x in whole])), threads


def test_a_prompt_is_written_by_all_threads(compiled: str) -> None:
    case = Case([700, 1, 300], kv_heads=4, head_dim=64, dtype=FP8)
    case.whole(threads=1)
    wanted, clipped = case.pages, int(case.clipped)
    case.place(23)
    case.whole(threads=3)
    for ours, theirs in ((case.pages.keys, wanted.keys), (case.pages.values, wanted.values)):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    assert int(case.clipped) == 2 * clipped > 0


# ------------------------------------------------------------------------------------------ NaN


def test_nan_reaches_those_who_see_it_alone(backend: str) -> None:
    case = Case([150, 20], dtype=torch.float32)
    clean = case.whole()
    case.q[0][17, 4] = torch.nan
    case.k[0][100, 1, 3] = torch.nan
    found = case.whole()
    assert found[0][17, 4].isnan().all()
    assert found[0][100:, 3:].isnan().all()  # the query heads of key head 1
    clean[0][17, 4], clean[0][100:, 3:] = torch.nan, torch.nan
    for ours, wanted in zip(found, clean, strict=True):
        torch.testing.assert_close(ours, wanted, atol=ATOL, rtol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_do_not_reach_the_past(compiled: str, bad: float) -> None:
    case = Case([150])
    clean = case.whole()[0]
    case.v[0][101, 1, 5] = bad
    found = case.whole()[0]
    assert not found[101:, 3:, 5].isfinite().any()
    assert torch.equal(found[:101], clean[:101])
    assert torch.equal(found[:, :3], clean[:, :3])


# ---------------------------------------------------------------------------------------- write


def test_write_rounds_as_torch_and_touches_nothing_else(backend: str) -> None:
    case = Case([3, 40], page_tokens=16)
    hard = [1 + 2**-8, 1 + 3 * 2**-8, -0.0, 1e-40, 3.4e38, torch.inf, -torch.inf]
    case.k[1][0, 0, : len(hard)] = torch.tensor(hard)
    case.pages.keys.fill_(5)
    case.pages.values.fill_(5)
    case.whole()
    for pool, rows in ((case.pages.keys, case.k), (case.pages.values, case.v)):
        wanted = torch.full_like(pool, 5)
        for b, x in enumerate(rows):
            for position, line in enumerate(x):
                wanted[case.table[b, position // 16], :, position % 16] = line.bfloat16()
        assert torch.equal(pool, wanted)


def test_write_keeps_nan(backend: str) -> None:
    case = Case([9])
    low = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)  # cut off: infinity
    case.k[0][4, 1, 7] = low[0]
    case.whole()
    assert case.pages.keys[case.table[0, 0], 1, 4].isnan().nonzero().tolist() == [[7]]


def test_write_refuses_a_position_without_a_page_before_it_writes(backend: str) -> None:
    case = Case([20, 47], page_tokens=16)
    case.table[1, 2] = -1
    with pytest.raises(EngineError, match=r"sequence 1 .* positions 0 to 46"):
        case.whole()
    assert case.pages.keys.isnan().all()


# ------------------------------------------------------------------------------------------ FP8


def test_fp8_rounds_saturates_and_counts(backend: str) -> None:
    """Every BF16 number, and float32 numbers beside the middles between codes."""
    codes = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middles = (codes[1:] + codes[:-1]) / 2
    near = [np.nextafter(middles, np.float32(to)) for to in (0, np.inf)]
    some = np.arange(1 << 16, dtype=np.uint32).astype(np.uint32) << 16
    x = np.concatenate(
        [some.view(np.float32), middles, -middles, *near, np.float32([448, 464, 464.1])]
    )
    x = np.resize(x, (-(-len(x) // 32), 1, 32))
    for scale in (1.0, 0.013):
        pages = Pages(
            *torch.zeros((2, 1, 1, len(x), 32)).to(FP8), scale, 1.0, torch.zeros(1).long()
        )
        starts, lengths, table = ints(0, len(x)), ints(0), ints(0)[None]
        write(torch.from_numpy(x), torch.zeros(x.shape), pages, table, starts, lengths, Compute())
        with np.errstate(over="ignore", invalid="ignore"):
            wanted, scaled = e4m3(x[:, 0], scale).view(np.uint8), x[:, 0] / np.float32(scale)
        wanted[np.isnan(scaled)] = 0x7F
        assert np.array_equal(pages.keys[0, 0].view(torch.uint8).numpy(), wanted)
        assert pages.clipped is not None
        assert int(pages.clipped) == (np.abs(scaled) > 448).sum() > 0


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("group", [1, 8])
def test_fp8_every_code_is_read_exactly(backend: str, tokens: int, group: int) -> None:
    """Positions that are alike: the softmax is their mean, and values come back as they are."""
    codes = torch.arange(256, dtype=torch.uint8).expand(1, 1, 2, 256).contiguous().view(FP8)
    pages = Pages(torch.zeros_like(codes), codes, 1.0, 0.375)
    found = attention(
        torch.zeros(tokens, group, 256),
        pages,
        ints(0)[None],
        ints(0, tokens),
        ints(2 - tokens),
        scale=1.0,
        compute=Compute(),
    )
    numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    wanted = torch.from_numpy(numbers * np.float32(0.375)).expand(tokens, group, 256)
    torch.testing.assert_close(found, wanted, atol=0, rtol=0, equal_nan=True)


def test_fp8_every_code_is_a_key(backend: str) -> None:
    """Query i picks element i of two keys, 0 and code i: their weights tell what was read."""
    codes = torch.zeros(1, 1, 2, 256, dtype=torch.uint8)
    codes[0, 0, 1] = torch.arange(256, dtype=torch.uint8)
    codes[0, 0, 1, 0x7F] = codes[0, 0, 1, 0xFF] = 0  # NaN would be in every sum
    values = torch.tensor([0.0, 1.0])[:, None].expand(1, 1, 2, 256).contiguous().to(FP8)
    found = attention(
        torch.eye(256)[None] * 0.25,
        Pages(codes.view(FP8), values, 0.125, 1.0),
        ints(0)[None],
        ints(0, 1),
        ints(1),
        scale=1.0,
        compute=Compute(),
    )
    numbers = codes[0, 0, 1].numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    wanted = torch.from_numpy(1 / (1 + np.exp(-numbers * 0.125 * 0.25))).float()
    torch.testing.assert_close(found[0], wanted[:, None].expand(256, 256), atol=ATOL, rtol=0)


# ------------------------------------------------------------------------- strides, far positions


def test_parts_of_wider_rows_have_the_bits_of_their_copies(backend: str) -> None:
    """Query and gate of a head lie side by side, and k and v behind them."""
    case = Case([50, 90], head_dim=32, dtype=torch.float32)
    whole = torch.cat(case.whole())
    keys, values = case.pages.keys.clone(), case.pages.values.clone()
    wide = torch.full((140, 6 * 64 + 4 * 32 + 3), torch.nan)
    q = wide[:, : 6 * 64].view(140, 6, 64)[..., :32]
    k, v = (wide[:, 6 * 64 + at : 6 * 64 + at + 64].view(140, 2, 32) for at in (0, 64))
    for part, rows in ((q, case.q), (k, case.k), (v, case.v)):
        part.copy_(torch.cat(rows))
    case.place(23)
    batch = (case.table, ints(0, 50, 140), ints(0, 0))
    write(k, v, case.pages, *batch, Compute())
    found = attention(q, case.pages, *batch, scale=case.scale, compute=Compute())
    assert found.is_contiguous()
    assert torch.equal(found, whole)
    for ours, theirs in ((case.pages.keys, keys), (case.pages.values, values)):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("window", [0, 500])
def test_the_last_of_262144_positions(backend: str, window: int) -> None:
    """Few pages stand for all positions but the last ones; beyond a window there are none."""
    context, page_tokens, some = 262_144, 64, 5
    made = torch.Generator().manual_seed(2)
    keys, values = torch.randn((2, some + 1, 1, page_tokens, 16), generator=made)
    table = (torch.arange(context // page_tokens) % some).int()[None].contiguous()
    table[0, -1] = some
    if window:
        table[0, : (context - 2 - window) // page_tokens] = -1
    q, k, v = torch.randn((3, 2, 1, 16), generator=made)
    pages = Pages(keys, values)
    batch = (table, ints(0, 2), ints(context - 2))
    write(k, v, pages, *batch, Compute(threads=2))
    assert torch.equal(keys[some, 0, -2:], k[:, 0])
    found = attention(q, pages, *batch, scale=0.5, window=window, compute=Compute(threads=2))
    rows = table[0].long().clamp(min=0)
    all_keys, all_values = (x[rows, 0].reshape(context, 16).double() for x in (keys, values))
    for i, at in enumerate((context - 2, context - 1)):
        seen = slice(max(0, at - window + 1) if window else 0, at + 1)
        p = (all_keys[seen] @ q[i, 0].double() * 0.5).softmax(0)
        wanted = (p @ all_values[seen]).float()
        # The reference rounds 262,144 weights of 4e-6 and their running sum: 5e-5 were seen.
        torch.testing.assert_close(found[i, 0], wanted, atol=2e-4, rtol=0)


def test_a_pool_of_more_than_2_to_the_31_numbers(backend: str) -> None:
    """Memory that is never touched costs nothing; the page is the last one."""
    shape = (2**31 // (8 * 64 * 256) + 2, 8, 64, 256)
    pages = Pages(*(torch.empty(shape, dtype=FP8) for _ in range(2)))
    batch = (ints(shape[0] - 1)[None], ints(0, 1), ints(0))
    v = torch.arange(8.0)[None, :, None].expand(1, 8, 256).contiguous()
    write(torch.ones_like(v), v, pages, *batch, Compute(threads=1))
    found = attention(v, pages, *batch, scale=0.1, compute=Compute(threads=1))
    torch.testing.assert_close(found, v, atol=ATOL, rtol=0)


# --------------------------------------------------------------------------------------- recorded


def test_replayed_calls_have_the_bits_of_direct_ones(compiled: str) -> None:
    case = Case([500, 77, 130], dtype=FP8, page_tokens=16)
    program = Program(tokens=600, sequences=3, outputs=1)
    compute = Compute(threads=2, program=program)
    q, k, v = torch.zeros(600, 6, 40), torch.zeros(600, 2, 40), torch.zeros(600, 2, 40)
    table, starts, lengths = torch.full((3, 40), -1).int(), ints(0, 0, 0, 0), ints(0, 0, 0)
    with program.recording():
        write(k, v, case.pages, table, starts, lengths, compute)
        out = attention(
            *(q, case.pages, table, starts, lengths),
            scale=case.scale,
            window=90,
            first=70,
            compute=compute,
        )
    assert program.names == ["nyb_paged_write", "nyb_paged_attention"]
    table[:, : case.table.shape[1]] = case.table
    mine, pieces = case.pages, [(0, 0, 400), (1, 0, 77), (2, 0, 64)]
    for batch in (pieces, [(2, 64, 65), (0, 400, 401)], [(1, 0, 0)]):
        case.pages = Pages(mine.keys.clone(), mine.values.clone(), *case.scales)
        wanted = case.run(batch, window=90, first=70)
        count = len(batch)
        table[:count, : case.table.shape[1]] = case.table[[b for b, _, _ in batch]]
        counts = torch.tensor([0, *(e - f for _, f, e in batch)])
        starts[: count + 1], lengths[:count] = (
            counts.cumsum(0),
            torch.tensor([f for _, f, _ in batch]),
        )
        for x, rows in ((q, case.q), (k, case.k), (v, case.v)):
            x[: len(wanted)] = torch.cat([rows[b][f:e] for b, f, e in batch])
        program.run(tokens=len(wanted), sequences=count, outputs=0)
        assert torch.equal(out[: len(wanted)], wanted)
        assert torch.equal(mine.keys.view(torch.uint8), case.pages.keys.view(torch.uint8))


# ---------------------------------------------------------------------------------------- at random


@st.composite
def batches(draw: st.DrawFn) -> tuple[Case, list[tuple[int, int, int]], int]:
    """A case, the pieces of a batch after whose beginnings it goes on, and a window."""
    lengths = draw(st.lists(st.integers(1, 300), min_size=1, max_size=4))
    case = Case(
        lengths,
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 9)),
        head_dim=draw(st.integers(1, 70)),
        page_tokens=draw(st.integers(1, 130)),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 99)),
    )
    pieces = []
    for b, n in enumerate(lengths):
        first = draw(st.integers(0, n))
        pieces.append((b, first, draw(st.integers(first, n))))
    return case, draw(st.permutations(pieces)), draw(st.sampled_from([0, 0, 1, 17, 64, 200]))


@settings(max_examples=60, deadline=None)
@given(batches(), st.integers(1, 4))
def test_any_batch(drawn: tuple[Case, list[tuple[int, int, int]], int], threads: int) -> None:
    case, pieces, window = drawn
    case.run([(b, 0, first) for b, first, _ in pieces], window, threads)
    found = case.run(pieces, window, threads)
    wanted = torch.cat([case.wanted(b, window)[first:end] for b, first, end in pieces])
    torch.testing.assert_close(found, wanted, atol=ATOL, rtol=0)


# --------------------------------------------------------------------------------------- refused


def test_empty_batches_and_sequences(backend: str) -> None:
    case = Case([30, 5])
    case.run([(0, 0, 29)])
    assert case.run([(0, 29, 29)]).shape == (0, 6, 40)
    found = case.run([(1, 0, 0), (0, 29, 30), (1, 0, 0)])
    torch.testing.assert_close(found, case.wanted(0)[29:], atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 5, 40)}, "a multiple of 2 heads"),
        ({"q": torch.zeros(4, 6, 48)}, "a multiple of 2 heads, 40"),
        ({"q": torch.zeros(4, 6, 40, dtype=torch.bfloat16)}, "q must be float32"),
        ({"q": torch.zeros(4, 40, 6).transpose(1, 2)}, "contiguous rows"),
        ({"starts": ints(0, 3)}, "from 0 to the 4 tokens"),
        ({"starts": ints(0, 5, 4)}, "starts must be"),
        ({"starts": torch.tensor([0, 4])}, "starts must be contiguous torch.int32"),
        ({"lengths": ints(-1)}, "length -1"),
        ({"lengths": ints(30)}, "needs pages"),
        ({"table": ints(0, 9)[None]}, "needs pages"),
        ({"table": ints(0, -1)[None]}, "needs pages"),
        ({"window": -1}, "window must be"),
        ({"first": -1}, "first must be"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"scale": float("nan")}, "scale must be positive"),
        ({"pages": Pages(torch.zeros(3, 2, 16, 40), torch.zeros(3, 2, 16, 8))}, "pages.values"),
        ({"pages": Pages(*2 * [torch.zeros(3, 2, 16, 40).half()])}, "bfloat16, float32 or float8"),
        ({"pages": Pages(*2 * [torch.zeros(3, 2, 16, 40)], 0.5)}, "pages have no scale"),
        ({"pages": Pages(*2 * [torch.zeros(3, 2, 16, 40).to(FP8)], 1, 0.0)}, "value_scale must be"),
        ({"pages": Pages(*2 * [torch.zeros(3, 2, 16, 40)], clipped=ints(0))}, "pages.clipped"),
        ({"scale": torch.inf}, "scale must be positive"),
    ],
)
def test_refused(backend: str, change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "q": torch.zeros(4, 6, 40),
        "pages": Pages(torch.zeros(3, 2, 16, 40), torch.zeros(3, 2, 16, 40)),
        "table": ints(2, 0)[None],
        "starts": ints(0, 4),
        "lengths": ints(20),
        "scale": 0.2,
        "compute": Compute(threads=1),
    }
    assert attention(**arguments).shape == (4, 6, 40)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=message):
        attention(**{**arguments, **change})  # type: ignore[arg-type]
