"""Every back end sends each row through its own expert, with the bits of that expert alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from nybble.errors import FormatError
from nybble.formats.block import FORMATS
from nybble.formats.search import quantize
from nybble.kernels import dispatch
from nybble.kernels.block_matmul import Weight, matmul, prepare
from nybble.kernels.compute import PRECISIONS, Compute, Precision
from nybble.kernels.expert_matmul import expert_matmul, prepare_experts
from nybble.kernels.expert_matmul.reference import expert_matmul as definition
from nybble.kernels.program import Program

#: As in test_block_matmul: the same sums in another order, against the sum of magnitudes.
RTOL = 2e-6
K = 192
BACKENDS = ["reference", *dispatch.ISAS]
#: Skewed, with experts that nobody chose, first and last included.
COUNTS = ([0, 1, 150, 0, 3, 7, 0], [4, 0, 0, 0, 0, 0, 0], [1] * 7, [0, 0, 0, 0, 0, 0, 33])
KINDS = ["nvfp4", "mxfp4", "fp8", "fp8_block", "f32"]


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


def experts_of(kind: str, count: int = 7) -> list[list[Weight]]:
    """Gate [11, K] and up [6, K] of each expert; one expert was left in float32."""
    rng = np.random.default_rng(count)
    found: list[list[Weight]] = []
    for e in range(count):
        gate, up = (rng.standard_normal((n, K), dtype=np.float32) for n in (11, 6))
        if kind == "f32" or e == 4:
            found.append([gate, up])
        else:
            found.append([quantize(w, FORMATS[kind], "absmax") for w in (gate, up)])
    return found


def rows(m: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(m).standard_normal((m, K), dtype=np.float32))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_go_through_their_expert(backend: str, kind: str, precision: Precision) -> None:
    experts = experts_of(kind)
    stack = prepare_experts(experts, name="experts")
    assert (stack.k, stack.n) == (K, 17)
    for counts in COUNTS:
        x, number = rows(sum(counts)), torch.tensor(counts)
        found = expert_matmul(x, number, stack, Compute(precision, 2))
        wanted = definition(x, number, stack, Compute(precision, 1))
        magnitudes = [
            [w.dequantize() if hasattr(w, "dequantize") else w for w in members]
            for members in experts
        ]
        sums = definition(
            x.abs(),
            number,
            prepare_experts([[np.abs(w) for w in members] for members in magnitudes]),
            Compute(precision, 1),
        )
        assert found.shape == wanted.shape
        assert ((found - wanted).abs() <= RTOL * sums).all(), counts


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_bits_of_its_expert_alone(backend: str, kind: str) -> None:
    if backend == "reference":
        pytest.skip("the definition is torch's matmul, which sums as it likes")
    experts = experts_of(kind)
    stack = prepare_experts(experts)
    for precision, counts in itertools.product(PRECISIONS, COUNTS):
        x = rows(sum(counts))
        found = expert_matmul(x, torch.tensor(counts), stack, Compute(precision, 2))
        single = expert_matmul(x, torch.tensor(counts), stack, Compute(precision, 1))
        assert torch.equal(found, single)
        row = 0
        for members, count in zip(experts, counts, strict=True):
            alone = prepare(members)
            for i in range(row, row + count, 9):
                assert torch.equal(
                    found[i : i + 1], matmul(x[i : i + 1], alone, Compute(precision, 1))
                )
            row += count


def test_recorded_counts_are_those_of_the_replay(backend: str) -> None:
    if backend == "reference":
        pytest.skip("only compiled kernels are recorded")
    stack = prepare_experts(experts_of("nvfp4"))
    x, counts = rows(2 * 9), torch.zeros(7, dtype=torch.int64)
    program = Program(tokens=9, sequences=1, outputs=1)
    with program.recording():
        found = expert_matmul(x, counts, stack, Compute("int8", 2, program))
    for tokens, chosen in ((9, [0, 1, 10, 0, 3, 4, 0]), (2, [4, 0, 0, 0, 0, 0, 0]), (0, [0] * 7)):
        counts.copy_(torch.tensor(chosen))
        program.run(tokens=tokens, sequences=1, outputs=1)
        m = 2 * tokens
        wanted = expert_matmul(x[:m], counts, stack, Compute("int8", 1))
        assert torch.equal(found[:m], wanted)


def test_nan_stays_with_its_row(backend: str) -> None:
    stack = prepare_experts(experts_of("nvfp4"))
    counts = torch.tensor([2, 0, 5, 0, 0, 1, 0])
    x = rows(8)
    x[4, 0] = float("nan")
    found = expert_matmul(x, counts, stack, Compute("bf16", 2))
    assert found.isnan().all(dim=1).nonzero().flatten().tolist() == [4]
    assert found.isnan().any(dim=1).nonzero().flatten().tolist() == [4]


def test_no_rows_at_all(backend: str) -> None:
    stack = prepare_experts(experts_of("nvfp4", 3))
    none = torch.zeros(3, dtype=torch.int64)
    assert expert_matmul(rows(0), none, stack, Compute("bf16", 2)).shape == (0, 17)


def test_wrong_counts_and_inputs_are_refused(backend: str) -> None:
    stack = prepare_experts(experts_of("nvfp4", 3), name="layers.1.experts")
    compute = Compute("bf16", 1)
    for counts in (
        torch.tensor([1, 1, 1]),  # 3 of 4 rows
        torch.tensor([5, -1, 0]),
        torch.tensor([2, 2]),
        torch.tensor([2.0, 1.0, 1.0]),
        torch.tensor([2, 1, 1], dtype=torch.int32),
    ):
        with pytest.raises(FormatError, match=r"layers\.1\.experts"):
            expert_matmul(rows(4), counts, stack, compute)
    with pytest.raises(FormatError, match=r"layers\.1\.experts"):
        expert_matmul(torch.zeros(4, K - 1), torch.tensor([2, 1, 1]), stack, compute)


def test_experts_of_other_shapes_are_refused() -> None:
    a, b = np.zeros((4, 32), dtype=np.float32), np.zeros((5, 32), dtype=np.float32)
    with pytest.raises(FormatError, match="expert 1 has 5 outputs"):
        prepare_experts([[a], [b]])
    with pytest.raises(FormatError, match="expert 1, member 0"):
        prepare_experts([[a], [a[:, :16]]])
    with pytest.raises(FormatError, match="at least one weight"):
        prepare_experts([[a], []])
    with pytest.raises(FormatError, match="at least one weight"):
        prepare_experts([])
