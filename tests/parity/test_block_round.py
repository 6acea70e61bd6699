"""Rounding in a metric: every back end has the definition's bits, and these are the least loss that
the search promises, by sums and by brute force."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nybble.errors import EngineError
from nybble.formats import search as definition
from nybble.formats.block import NVFP4
from nybble.formats.element import E2M1, E4M3, decode, unpack_nibbles
from nybble.kernels import dispatch
from nybble.kernels.block_round import BLOCK, Search, Strip, reference, round_strip

sys.path.insert(0, str(Path(__file__).parents[1]))
from hard_blocks import SOURCES, tensors

BACKENDS = ["reference", *dispatch.ISAS]
#: Every scale there is, and the code of 448.
ALL, LAST = 126, 126
#: A block's loss is a float32 sum of 16 squares; what they are squares of is itself a sum of 128.
LOSS_RTOL = 1e-4
#: float32 against float64 where two ways to round a block cost nearly the same.
NOISE = 1e-5
#: Hard tensors whose values are normal floats in units of their tensor scale.
NORMAL = {
    "gaussian",
    "student_t",
    "sparse",
    "integer_grid",
    "quarter_grid",
    "outlier",
    "constant",
    "two_level",
    "zeros",
    "dead",
    "subnormal_scales",
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """torch's own threads wait in loops: dear for matrices as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    fresh = torch.empty

    def filled(*size: object, **options: object) -> Tensor:  # outputs that a kernel forgets show
        x: Tensor = fresh(*size, **options)  # type: ignore[call-overload]
        return x.fill_(torch.nan if x.is_floating_point() else 0xAA)

    monkeypatch.setattr(torch, "empty", filled)
    return str(request.param)


def a_metric(columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """U and D of the Hessian of inputs whose channels differ in energy and go together."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    energy = torch.randn(columns, generator=generator, dtype=torch.float64).exp()
    x = torch.randn(3 * columns, columns, generator=generator, dtype=torch.float64) @ mix * energy
    hessian = x.T @ x / x.square().mean() / len(x)
    # H = U D U^T from the last column up: Cholesky of H read backwards.
    factor = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    return (factor / factor.diagonal()).float().contiguous(), factor.diagonal().square().float()


def some_rows(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Rows of all sizes, some with blocks of zeros, on a grid where quotients meet ties."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(rows, 1, generator=generator).mul(3).exp2() * 64
    x = torch.randn(rows, columns, generator=generator) * sizes
    x[::3, :16] = 0
    x[1::5] = (x[1::5] / 32).round() * 32
    return x.clamp(-2688, 2688).bfloat16().float()


def same_bits(a: Strip, b: Strip) -> bool:
    pairs = [(getattr(a, n), getattr(b, n)) for n in ("codes", "scales", "error", "loss")]
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def values_of(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 [N, S] of what a strip's bytes stand for."""
    s = decode(scales.numpy(), E4M3).repeat(BLOCK, axis=1)
    return torch.from_numpy(decode(codes.numpy(), E2M1) * s)


CASES = st.tuples(
    st.integers(0, 36),  # rows
    st.sampled_from([16, 48, 128]),
    st.integers(-9, 3),  # lowest
    st.integers(0, 13),  # more than that
    st.integers(0, 2),  # passes
    st.integers(1, 4),  # kept
    st.integers(0, 9),  # seed
)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=CASES, has_current=st.booleans(), threads=st.sampled_from([1, 3]))
def test_every_back_end_has_the_bits_of_the_definition(
    backend: str, case: tuple[int, int, int, int, int, int, int], has_current: bool, threads: int
) -> None:
    rows, columns, lowest, more, passes, kept, seed = case
    upper, importance = a_metric(columns, seed)
    weight = some_rows(rows, columns, seed)
    target = weight + torch.randn(rows, columns).where(weight != 0, torch.zeros(()))
    first = round_strip(weight, weight, upper, importance)
    current = (first.codes, first.scales) if has_current else None
    found = round_strip(
        weight,
        target,
        upper,
        importance,
        lowest=lowest,
        highest=lowest + more,
        passes=passes,
        kept=kept,
        current=current,
        threads=threads,
    )
    search = Search(lowest, lowest + more, passes, min(kept, more + 1) if passes else 1)
    wanted = reference.round_strip(weight, target, upper, importance, search, current, 1)
    assert same_bits(found, wanted)


@pytest.mark.parametrize("dtype", SOURCES, ids=str)
def test_without_a_metric_it_is_the_search_for_least_squares(
    backend: str, dtype: np.dtype[np.generic]
) -> None:
    for name, x in tensors(dtype, 33, BLOCK):
        if name not in NORMAL:
            continue
        wanted = definition.quantize(x, NVFP4, "mse")
        assert wanted.tensor_scale is not None
        weight = torch.from_numpy(x.astype(np.float32) / wanted.tensor_scale)
        found = round_strip(
            weight, weight, torch.eye(BLOCK), torch.ones(BLOCK), lowest=-ALL, highest=ALL
        )
        codes = unpack_nibbles(wanted.codes)
        codes[codes == 8] = 0  # that search keeps the sign of what vanishes
        assert np.array_equal(found.codes.numpy(), codes), name
        assert np.array_equal(found.scales.numpy(), wanted.scale), name


def test_with_importance_it_is_the_best_of_all_scales_and_codes(backend: str) -> None:
    weight, (_, importance) = some_rows(20, BLOCK), a_metric(BLOCK)
    found = round_strip(weight, weight, torch.eye(BLOCK), importance, lowest=-ALL, highest=ALL)
    scales = torch.from_numpy(decode(np.arange(1, LAST + 1, dtype=np.uint8), E4M3)).double()
    values = torch.from_numpy(decode(np.arange(16, dtype=np.uint8), E2M1)).double()
    grid = scales[:, None] * values  # [126, 16]
    apart = (weight.double()[:, None, :, None] - grid[:, None]).square().amin(dim=-1)
    wanted = (apart * importance.double()).sum(dim=-1).amin(dim=-1)
    torch.testing.assert_close(found.loss[:, 0].double(), wanted, rtol=NOISE, atol=0)


@pytest.mark.parametrize("passes", [0, 2])
def test_errors_and_losses_are_those_of_the_bytes(backend: str, passes: int) -> None:
    upper, importance = a_metric(80)
    weight = some_rows(21, 80)
    found = round_strip(weight, weight, upper, importance, passes=passes, kept=3)
    assert torch.equal(found.error, values_of(found.codes, found.scales) - weight)
    assert int((found.codes == 8).sum()) == 0  # never -0
    missed = (found.error.double() @ upper.double()).square() * importance.double()
    wanted = missed.reshape(21, 5, BLOCK).sum(dim=-1)
    torch.testing.assert_close(found.loss.double(), wanted, rtol=LOSS_RTOL, atol=1e-6)


def test_two_strips_are_one(backend: str) -> None:
    upper, importance = a_metric(64)
    weight = some_rows(18, 64)
    whole = round_strip(weight, weight, upper, importance, passes=1)
    first = round_strip(weight[:, :32], weight[:, :32], upper[:32, :32], importance[:32], passes=1)
    target = weight[:, 32:].clone()
    for i in range(32):
        target -= first.error[:, i, None] * upper[i, 32:]
    second = round_strip(weight[:, 32:], target, upper[32:, 32:], importance[32:], passes=1)
    for name in ("codes", "scales", "error", "loss"):
        parts = [getattr(first, name), getattr(second, name)]
        assert torch.equal(torch.cat(parts, dim=1), getattr(whole, name))


def test_compensation_lowers_the_loss(backend: str) -> None:
    """The point of it all; without it the loss of this Hessian is twice as much."""
    upper, importance = a_metric(128)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * 100
    plain = round_strip(weight, weight, torch.eye(128), torch.ones(128))
    error = plain.error.double() @ upper.double()
    without = float((error.square() * importance.double()).sum())
    losses = [
        float(round_strip(weight, weight, upper, importance, passes=p, kept=k).loss.double().sum())
        for p, k in ((0, 1), (2, 1), (2, 3))
    ]
    assert losses[2] < losses[1] < losses[0] < 0.7 * without


def test_descent_ends_where_no_code_can_be_bettered_alone(backend: str) -> None:
    upper, importance = a_metric(BLOCK)
    weight = some_rows(40, BLOCK)
    before = round_strip(weight, weight, upper, importance)
    found = round_strip(weight, weight, upper, importance, passes=30, kept=4)
    assert (found.loss <= before.loss).all()
    assert (found.loss < before.loss).any()
    factor = upper.double() * importance.double().sqrt()
    least = (found.error.double() @ factor).square().sum(dim=-1)
    for k, code in itertools.product(range(BLOCK), range(16)):
        codes = found.codes.clone()
        codes[:, k] = code
        error = (values_of(codes, found.scales) - weight).double()
        assert ((error @ factor).square().sum(dim=-1) >= least * (1 - NOISE)).all()


def test_what_is_there_stays_unless_the_new_is_better(backend: str) -> None:
    upper, importance = a_metric(48)
    weight = some_rows(33, 48)
    best = round_strip(weight, weight, upper, importance, passes=3, kept=4)
    again = round_strip(weight, weight, upper, importance, current=(best.codes, best.scales))
    assert (again.loss[:, 0] <= best.loss[:, 0]).all()
    stays = round_strip(
        weight, weight, upper, importance, passes=3, kept=4, current=(best.codes, best.scales)
    )
    assert same_bits(stays, best)
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 16, (33, 48), generator=generator, dtype=torch.uint8)
    scales = torch.randint(1, LAST + 1, (33, 3), generator=generator, dtype=torch.uint8)
    better = round_strip(weight, weight, upper, importance, current=(codes, scales))
    fresh = round_strip(weight, weight, upper, importance)
    assert (better.loss[:, 0] <= fresh.loss[:, 0]).all()
    junk = torch.full_like(codes, 8)  # -0: loses its sign where it stays
    dead = torch.zeros_like(weight)
    still = round_strip(dead, dead, upper, importance, current=(junk, scales))
    assert torch.equal(still.scales, scales)
    assert int(still.codes.max()) == 0


def test_a_row_has_the_same_bits_in_company_and_on_other_threads(backend: str) -> None:
    upper, importance = a_metric(32)
    weight = some_rows(70, 32)
    whole = round_strip(weight, weight, upper, importance, passes=1, kept=2, threads=5)
    before = weight.clone()
    for row in (0, 14, 15, 16, 17, 69):
        mine = slice(row, row + 1)
        alone = round_strip(weight[mine], weight[mine], upper, importance, passes=1, kept=2)
        parts = (getattr(whole, n)[mine] for n in ("codes", "scales", "error", "loss"))
        assert same_bits(alone, Strip(*parts))
    assert torch.equal(weight, before)  # nothing of the caller's is written


def test_columns_of_a_wider_matrix_are_read_in_place(backend: str) -> None:
    upper, importance = a_metric(96)
    weight, target = some_rows(19, 96), some_rows(19, 100, seed=1)[:, 3:99]
    mine = slice(32, 64)
    found = round_strip(weight[:, mine], target[:, mine], upper[mine, mine], importance[mine])
    parts = (weight[:, mine], target[:, mine], upper[mine, mine], importance[mine])
    wanted = round_strip(*(p.contiguous() for p in parts))
    assert same_bits(found, wanted)
    below = upper + torch.full((96, 96), torch.nan).tril()  # not read: the diagonal is 1, then 0
    assert same_bits(round_strip(*parts[:2], below[mine, mine], parts[3]), wanted)


def test_a_block_of_zeros_has_scale_one_and_costs_what_it_misses(backend: str) -> None:
    upper, importance = a_metric(32)
    weight = some_rows(20, 32)
    weight[:, :16] = 0
    found = round_strip(weight, weight, upper, importance, passes=1)
    assert (found.scales[:, 0] == 0x38).all()
    assert int(found.codes[:, :16].max()) == 0
    assert float(found.loss[:, 0].max()) == 0
    target = weight.clone()
    weight[:, :16] = 1.5  # targets of 0 that are not what the weights were
    missed = round_strip(weight, target, upper, importance, passes=1)
    assert (missed.scales[:, 0] == 0x38).all()
    assert (missed.error[:, :16] == -1.5).all()
    assert (missed.loss[:, 0] > 0).all()


def test_scales_end_where_e4m3_does(backend: str) -> None:
    weight = torch.ones(2, 16) * torch.tensor([[1e-6], [1e6]])
    found = round_strip(weight, weight, torch.eye(16), torch.ones(16), passes=1, kept=2)
    assert found.scales.flatten().tolist() == [1, LAST]
    assert found.codes.tolist() == [[0] * 16, [7] * 16]


def test_what_does_not_fit_is_refused(backend: str) -> None:
    upper, importance = a_metric(32)
    weight = some_rows(5, 32)
    for wrong in (weight[:, :24], torch.zeros(3, 144), torch.zeros(3, 0), weight[0]):
        with pytest.raises(EngineError, match="multiple of 16 and at most 128"):
            round_strip(wrong, wrong, upper, importance)
    for wrong in (weight.double(), some_rows(32, 5).t()):
        with pytest.raises(EngineError, match="weight must be float32"):
            round_strip(wrong, wrong, upper, importance)
    with pytest.raises(EngineError, match="target must be float32"):
        round_strip(weight, weight[:4], upper, importance)
    with pytest.raises(EngineError, match="upper must be float32"):
        round_strip(weight, weight, upper[:16], importance)
    with pytest.raises(EngineError, match="importance must be"):
        round_strip(weight, weight, upper, importance[:31])
    for value, shown in ((torch.nan, "nan"), (-torch.inf, "-inf")):
        spoilt = weight.clone()
        spoilt[3, 7] = value
        with pytest.raises(EngineError, match=f"weight is {shown} at row 3, column 7"):
            round_strip(spoilt, weight, upper, importance)
        with pytest.raises(EngineError, match=f"target is {shown} at row 3, column 7"):
            round_strip(weight, spoilt, upper, importance)
    for options in ({"lowest": 8}, {"passes": -1}, {"kept": 0}, {"kept": 5}):
        with pytest.raises(EngineError, match="expected an interval"):
            round_strip(weight, weight, upper, importance, **options)  # type: ignore[arg-type]
    codes, scales = torch.zeros(5, 32, dtype=torch.uint8), torch.ones(5, 2, dtype=torch.uint8)
    refused = [
        (codes[:4], scales, "current codes must be"),
        (codes, scales.float(), "current scales must be"),
        (codes + 16, scales, "a current code is 16"),
        (codes, scales - 1, "from 0 to 0"),
        (codes, scales + LAST, "from 127 to 127"),
    ]
    for bad_codes, bad_scales, message in refused:
        with pytest.raises(EngineError, match=message):
            round_strip(weight, weight, upper, importance, current=(bad_codes, bad_scales))
