"""Attention over pages is dense attention in float64, and does not care how its work is cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.errors import EngineError
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute
from nybble.kernels.paged_attention import Pages, attention, write

BACKENDS = ["reference", *dispatch.ISAS]
COMPILED = list(dispatch.ISAS)
#: Scores up to about 15 are float32 sums of up to 256 products, so their own error, some 1e-6, is
#: the relative error of a weight; values of about 3 make it 3e-6, and rounding of the sums doubles
#: that.
ATOL = 1e-5


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
        self.pages = Pages(*(torch.full(shape, torch.nan, dtype=self.dtype) for _ in range(2)))

    def run(self, pieces: list[tuple[int, int, int]], window: int = 0, threads: int = 2) -> Tensor:
        """Write and attend one batch: (sequence, first, end) of each of its pieces."""
        which = [p[0] for p in pieces]
        starts = ints(0, *torch.tensor([e - f for _, f, e in pieces]).cumsum(0).tolist())
        lengths = ints(*(f for _, f, _ in pieces))
        q, k, v = (torch.cat([x[b][f:e] for b, f, e in pieces]) for x in (self.q, self.k, self.v))
        table = self.table[which].contiguous()
        write(k, v, self.pages, table, starts, lengths)
        return attention(
            q,
            self.pages,
            table,
            starts,
            lengths,
            scale=self.scale,
            window=window,
            compute=Compute(threads=threads),
        )

    def whole(self, window: int = 0, threads: int = 2) -> list[Tensor]:
        """All sequences at once, from nothing."""
        found = self.run([(b, 0, n) for b, n in enumerate(self.lengths)], window, threads)
        return list(found.split(self.lengths))

    def wanted(self, b: int, window: int = 0) -> Tensor:
        """Sequence b by dense attention in float64 on what the pages can hold."""
        q, k, v = (x[b].double() for x in (self.q, self.k, self.v))
        if self.dtype == torch.bfloat16:
            k, v = (x.bfloat16().double() for x in (self.k[b], self.v[b]))
        k, v = (x.repeat_interleave(self.group, dim=1) for x in (k, v))
        at = torch.arange(len(q))
        unseen = at[None] > at[:, None]
        if window:
            unseen |= at[None] <= at[:, None] - window
        scores = torch.einsum("ihd,jhd->hij", q, k) * self.scale
        p = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        return torch.einsum("hij,jhd->ihd", p, v).float()


# --------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [8, 20, 32, 40, 64, 96, 128, 256])
def test_head_sizes(backend: str, head_dim: int, dtype: torch.dtype) -> None:
    case = Case([70, 131], head_dim=head_dim, dtype=dtype)
    for b, found in enumerate(case.whole()):
        torch.testing.assert_close(found, case.wanted(b), atol=ATOL, rtol=0)


@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (3, 1), (2, 3), (2, 5), (1, 8), (1, 97)])
def test_groups_of_query_heads(backend: str, kv_heads: int, group: int) -> None:
    case = Case([67, 1, 130], kv_heads=kv_heads, group=group, head_dim=24)
    for b, found in enumerate(case.whole()):
        torch.testing.assert_close(found, case.wanted(b), atol=ATOL, rtol=0)


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


@pytest.mark.parametrize("window", [0, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_chunks_neighbours_pages_and_threads_leave_the_bits(
    compiled: str, dtype: torch.dtype, window: int
) -> None:
    case = Case([600, 77, 130], dtype=dtype)
    whole = case.whole(window, threads=1)
    for threads in (2, 5):
        for found, wanted in zip(case.whole(window, threads), whole, strict=True):
            assert torch.equal(found, wanted)
    for page_tokens in (7, 64, 1000):
        case.place(page_tokens)
        cuts = [0, 5, 64, 197, 198, 511, 600]
        for first, end in zip(cuts, cuts[1:], strict=False):
            found = case.run([(0, first, end)], window)
            assert torch.equal(found, whole[0][first:end]), (page_tokens, first)
    case.place(16)
    case.run([(1, 0, 70), (2, 0, 1), (0, 0, 599)], window)
    found = case.run([(0, 599, 600), (2, 1, 130), (1, 70, 77)], window)
    assert torch.equal(found, torch.cat([whole[0][599:], whole[2][1:], whole[1][70:]]))


def test_decode_has_the_bits_of_prefill(compiled: str) -> None:
    case = Case([1090], kv_heads=1, head_dim=64)
    whole = case.whole()[0]
    for at in (0, 1, 63, 64, 511, 512, 513, 1024, 1089):
        for threads in (1, 2, 3):
            assert torch.equal(case.run([(0, at, at + 1)], threads=threads)[0], whole[at])


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
        ({"q": torch.zeros(4, 6, 40, dtype=torch.bfloat16)}, "q must be contiguous torch.float32"),
        ({"q": torch.zeros(6, 4, 40).transpose(0, 1)}, "not contiguous"),
        ({"starts": ints(0, 3)}, "from 0 to the 4 tokens"),
        ({"starts": ints(0, 5, 4)}, "starts must be"),
        ({"starts": torch.tensor([0, 4])}, "starts must be contiguous torch.int32"),
        ({"lengths": ints(-1)}, "length -1"),
        ({"lengths": ints(30)}, "needs pages"),
        ({"table": ints(0, 9)[None]}, "needs pages"),
        ({"table": ints(0, -1)[None]}, "needs pages"),
        ({"window": -1}, "window must be"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"scale": float("nan")}, "scale must be positive"),
        ({"pages": Pages(torch.zeros(3, 2, 16, 40), torch.zeros(3, 2, 16, 8))}, "pages.values"),
        ({"pages": Pages(*2 * [torch.zeros(3, 2, 16, 40).half()])}, "bfloat16 or float32"),
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
