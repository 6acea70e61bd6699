"""Log-likelihoods and divergences are those of torch in float64, over vocabularies of any size;
likeliest entries those of numpy."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import torch
from torch import Tensor

from nybble.errors import EngineError, EvaluationError
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute
from nybble.kernels.program import Program
from nybble.kernels.vocabulary import divergence, likeliest, log_likelihood

BACKENDS = ["reference", *dispatch.ISAS]
#: The exponentials are good to 5e-12 relative, all in the same direction at worst.
ATOL = 1e-11
#: One entry; below, at and above a vector; a block of 1,024 and its neighbours; two of them.
SIZES = (1, 7, 16, 33, 1023, 1024, 1025, 2049, 49_153)


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


def pair(rows: int, vocabulary: int, noise: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Reference and candidate logits, and targets."""
    made = torch.Generator().manual_seed(rows + vocabulary)
    reference = 4 * torch.randn(rows, vocabulary, generator=made)
    candidate = reference + noise * torch.randn(rows, vocabulary, generator=made)
    return reference, candidate, torch.randint(vocabulary, (rows,), generator=made)


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=ATOL, rtol=1e-13, equal_nan=True)


@pytest.mark.parametrize("vocabulary", SIZES)
def test_log_likelihood(backend: str, vocabulary: int) -> None:
    x, _, targets = pair(3, vocabulary)
    found = log_likelihood(x, targets, Compute(threads=2))
    log_p = x.double().log_softmax(-1)
    same(found.nll, -log_p.gather(1, targets[:, None])[:, 0])
    same(found.log_sum, x.double().logsumexp(-1))
    assert torch.equal(found.top, x.argmax(-1))


@pytest.mark.parametrize("noise", [0.001, 0.3, 5.0])
@pytest.mark.parametrize("vocabulary", SIZES)
def test_divergence(backend: str, vocabulary: int, noise: float) -> None:
    x, y, targets = pair(3, vocabulary, noise)
    y += 50  # a shift of all logits changes nothing
    found = divergence(x, y, targets, Compute(threads=2))
    p, q = (z.double().log_softmax(-1) for z in (x, y))
    same(found.kl, (p.exp() * (p - q)).sum(-1))
    assert (found.kl >= -ATOL).all()
    for log_p, nll, top, probability, z in (
        (p, found.reference_nll, found.reference_top, found.reference_p, x),
        (q, found.candidate_nll, found.candidate_top, found.candidate_p, y),
    ):
        at_target = log_p.gather(1, targets[:, None])[:, 0]
        same(nll, -at_target)
        same(probability, at_target.exp())
        assert torch.equal(top, z.argmax(-1))


def test_the_largest_vocabulary(backend: str) -> None:
    x, y, targets = pair(2, 248_320)
    found = divergence(x, y, targets, Compute(threads=2))
    p, q = (z.double().log_softmax(-1) for z in (x, y))
    same(found.kl, (p.exp() * (p - q)).sum(-1))
    same(found.candidate_nll, -q.gather(1, targets[:, None])[:, 0])


def test_identical_rows_do_not_diverge_at_all(backend: str) -> None:
    x, _, targets = pair(9, 5001)
    found = divergence(x, x.clone(), targets, Compute(threads=2))
    assert (found.kl == 0).all()


def test_rows_and_threads_leave_the_bits(backend: str) -> None:
    x, y, targets = pair(11, 3001)
    whole = divergence(x, y, targets, Compute(threads=1))
    scores = log_likelihood(x, targets, Compute(threads=1))
    for threads in (2, 3):
        again = divergence(x, y, targets, Compute(threads=threads))
        assert all(torch.equal(a, b) for a, b in zip(astuple(again), astuple(whole), strict=True))
    assert torch.equal(scores.nll, whole.reference_nll)
    if backend == "reference":
        pytest.skip("the reference promises no bits for other numbers of rows")
    for i in (0, 4, 10):
        one = divergence(x[i : i + 1], y[i : i + 1], targets[i : i + 1], Compute(threads=2))
        for a, b in zip(astuple(one), astuple(whole), strict=True):
            assert torch.equal(a[0], b[i])


def test_ties_go_to_the_lowest(backend: str) -> None:
    x = torch.zeros(5, 3000)
    x[1, [2999, 1030, 1500]] = 2  # equal ones in different blocks
    x[2, [20, 19]] = 3
    x[3] = -torch.inf
    x[3, [2998, 2999]] = -7
    x[4] = -1
    x[4, [5, 4]] = torch.tensor([0.0, -0.0])  # equal too
    targets = torch.zeros(5, dtype=torch.int64)
    assert log_likelihood(x, targets, Compute()).top.tolist() == [0, 1030, 19, 2998, 4]
    assert divergence(x + 1, x, targets, Compute()).candidate_top.tolist() == [0, 1030, 19, 2998, 4]


def test_large_and_small_logits(backend: str) -> None:
    x = torch.full((4, 1500), torch.finfo(torch.float32).min)
    x[0, 1400] = 0.0  # everything before it is as small as can be
    x[1, 3], x[1, 1200] = 3e38, 2.9e38
    x[2] = -1e4
    x[3, :] = torch.linspace(-2000, 0, 1500)
    targets = torch.tensor([1400, 3, 7, 1499])
    found = log_likelihood(x, targets, Compute())
    log_p = x.double().log_softmax(-1)
    same(found.nll, -log_p.gather(1, targets[:, None])[:, 0])


def test_impossible_entries(backend: str) -> None:
    x, y, targets = pair(4, 2100)
    x[0, :1100] = -torch.inf  # a first block of nothing
    x[1, 5] = y[1, 5] = -torch.inf  # impossible for both
    y[2, 6] = -torch.inf  # for the candidate alone
    targets[:] = torch.tensor([1, 5, 6, 7])
    found = divergence(x, y, targets, Compute())
    p, q = (z.double().log_softmax(-1) for z in (x, y))
    wanted = torch.where(p.isneginf(), torch.zeros_like(p), p.exp() * (p - q)).sum(-1)
    same(found.kl, wanted)
    assert found.kl[2] == torch.inf
    assert found.kl[[0, 1, 3]].isfinite().all()
    assert found.reference_nll[:2].tolist() == [torch.inf] * 2
    assert found.reference_p[:2].tolist() == [0.0] * 2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 17, 1024, 2099])
def test_nan_spoils_its_row_alone(backend: str, bad: float, at: int) -> None:
    x, y, targets = pair(3, 2100)
    clean = divergence(x, y, targets, Compute())
    x[1, at] = bad
    scores = log_likelihood(x, targets, Compute())
    assert scores.nll.isnan().tolist() == [False, True, False]
    assert scores.log_sum.isnan().tolist() == [False, True, False]
    assert scores.top[1] == at
    for found in (divergence(x, y, targets, Compute()), divergence(y, x, targets, Compute())):
        assert found.kl.isnan().tolist() == [False, True, False]
    found = divergence(x, y, targets, Compute())
    assert found.reference_p.isnan().tolist() == [False, True, False]
    same(found.candidate_nll, clean.candidate_nll)
    same(found.kl[[0, 2]], clean.kl[[0, 2]])


def test_no_rows(backend: str) -> None:
    none, targets = torch.zeros(0, 31), torch.zeros(0, dtype=torch.int64)
    assert log_likelihood(none, targets, Compute()).nll.shape == (0,)
    assert divergence(none, none, targets, Compute()).kl.shape == (0,)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 9), torch.tensor([0, 9]), "from 0 to 9 for a vocabulary of 9"),
        (torch.zeros(2, 9), torch.tensor([-1, 8]), "from -1 to 8"),
        (torch.zeros(2, 9), torch.tensor([1]), r"int64 \[2\]"),
        (torch.zeros(2, 9), torch.tensor([1, 2], dtype=torch.int32), "found torch.int32"),
        (torch.zeros(2, 9).double(), torch.tensor([1, 2]), "found torch.float64"),
        (torch.zeros(9, 2).T, torch.tensor([1, 2]), "strided"),
        (torch.zeros(2, 0), torch.tensor([0, 0]), "V > 0"),
        (torch.zeros(9), torch.tensor([0]), r"\[M, V\]"),
    ],
)
def test_refused(backend: str, logits: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        log_likelihood(logits, targets, Compute())
    with pytest.raises(EvaluationError, match=message):
        divergence(logits, logits, targets, Compute())


def test_vocabularies_of_different_size_are_refused(backend: str) -> None:
    with pytest.raises(EvaluationError, match=r"candidate must be contiguous float32 \[2, 9\]"):
        divergence(torch.zeros(2, 9), torch.zeros(2, 8), torch.tensor([1, 2]), Compute())


# ------------------------------------------------------------------------------ the likeliest entry


def chosen(logits: Tensor, threads: int = 2) -> list[int]:
    out = torch.full((len(logits),), -7, dtype=torch.int64)
    likeliest(logits, out, Compute(threads=threads))
    return out.tolist()


@pytest.mark.parametrize("vocabulary", [*SIZES, 151_936])
def test_the_likeliest_is_numpys(backend: str, vocabulary: int) -> None:
    """Also of rows that are parts of wider ones, next to larger numbers; on one thread and more."""
    x, _, _ = pair(5, vocabulary)
    wide = torch.full((5, vocabulary + 9), 1e9)
    wide[:, 4 : vocabulary + 4] = x
    expected = x.numpy().argmax(axis=1).tolist()
    assert chosen(x) == chosen(x, 1) == chosen(wide[:, 4 : vocabulary + 4]) == expected


@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("levels", [1, 3])
def test_of_equals_the_lowest_is_chosen(backend: str, vocabulary: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    x = torch.randint(-levels, 1, (6, vocabulary), generator=generator).float()
    x[1] = -torch.inf
    x[2, ::2] = -0.0  # equals 0
    assert chosen(x) == x.numpy().argmax(axis=1).tolist()


@pytest.mark.parametrize("vocabulary", SIZES)
def test_nan_is_never_the_likeliest(backend: str, vocabulary: int) -> None:
    """Unless there is nothing else: then it is the first entry."""
    x, _, _ = pair(6, vocabulary)
    generator = torch.Generator().manual_seed(vocabulary)
    x[torch.rand(x.shape, generator=generator) < 0.5] = torch.nan
    x[1] = torch.nan
    x[2], x[2, -1] = torch.nan, -torch.inf
    x[3, 0], x[3, -1] = torch.nan, torch.inf
    best = np.fmax.reduce(x.numpy(), axis=1, keepdims=True)
    expected = (x.numpy() == best).argmax(axis=1).tolist()
    assert chosen(x) == expected
    assert expected[1] == 0
    assert expected[2] == expected[3] == vocabulary - 1


def test_the_likeliest_is_recorded(backend: str) -> None:
    if backend == "reference":
        pytest.skip("programs hold compiled kernels")
    x, _, _ = pair(4, 1111)
    out = torch.full((4,), -7, dtype=torch.int64)
    program = Program(tokens=9, sequences=4, outputs=1)
    with program.recording(), program.counting("sequences"):
        likeliest(x, out, Compute(threads=1, program=program))
    program.run(tokens=0, sequences=3, outputs=0)
    assert out.tolist() == [*x[:3].argmax(-1).tolist(), -7]


@pytest.mark.parametrize(
    ("logits", "out", "message"),
    [
        (torch.zeros(2, 9), torch.zeros(3, dtype=torch.int64), r"out must be .* \[2\]"),
        (torch.zeros(2, 9), torch.zeros(2, dtype=torch.int32), "torch.int32"),
        (torch.zeros(2, 9).double(), torch.zeros(2, dtype=torch.int64), "torch.float64"),
        (torch.zeros(9, 2).T, torch.zeros(2, dtype=torch.int64), "contiguous rows"),
        (torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64), "V > 0"),
        (torch.zeros(9), torch.zeros(1, dtype=torch.int64), r"\[M, V\]"),
    ],
)
def test_no_likeliest_of(backend: str, logits: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        likeliest(logits, out, Compute())
