"""Routing against its definition, against transformers, and against itself: alone, in company, on
other threads, from wider rows and replayed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear, silu

from nybble.errors import EngineError
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute
from nybble.kernels.program import Program
from nybble.kernels.routing import MOST_CHOICES, Routing, combine, gather, reference, route

BACKENDS = ["reference", *dispatch.ISAS]
ONE, TWO, FIVE = (Compute(threads=n) for n in (1, 2, 5))
#: An exponential, a sum of E of them and two divisions, each off by some units in the last place.
WEIGHT_RTOL = 2e-6
#: The products and sums are the definition's to the bit; the sigmoid of the gate is not.
GATE_RTOL = 1e-6
#: Of float64 against two matmuls of float32 with 32 and 24 terms: found at most 4e-7.
BLOCK_TOLERANCE = 2e-6


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
        return x.fill_(torch.nan if x.is_floating_point() else -(2**31))

    monkeypatch.setattr(torch, "empty", filled)
    return str(request.param)


def same_numbers(a: Routing, b: Routing) -> bool:
    return all(
        torch.equal(getattr(a, n), getattr(b, n)) for n in ("chosen", "counts", "order", "places")
    )


def some_logits(tokens: int, experts: int, seed: int = 0) -> Tensor:
    """Of a few values, so that most tokens meet ties."""
    torch.manual_seed(seed)
    return torch.randn(tokens, experts).mul(4).round() / 4


SHAPES = st.tuples(
    st.integers(0, 40),
    st.integers(1, 70),
    st.integers(1, 10),
    st.integers(0, 90),
    st.integers(0, 9),
)
ANY_BACKEND = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@ANY_BACKEND
@given(shape=SHAPES, normalises=st.booleans(), compute=st.sampled_from([ONE, FIVE]))
def test_every_back_end_is_the_definition(
    backend: str, shape: tuple[int, int, int, int, int], normalises: bool, compute: Compute
) -> None:
    tokens, experts, top, width, seed = shape
    top = min(top, experts)
    logits = some_logits(tokens, experts, seed)
    found = route(logits, top, normalises, compute)
    wanted = reference.route(logits, top, normalises, compute)
    assert same_numbers(found, wanted)
    torch.testing.assert_close(found.weights, wanted.weights, rtol=WEIGHT_RTOL, atol=0)
    x, parts = torch.randn(tokens, width), torch.randn(tokens * top, width)
    assert torch.equal(gather(x, found, compute), reference.gather(x, found, compute))
    plain = reference.combine(parts, found, None, None, compute)
    assert torch.equal(combine(parts, found, None, None, compute), plain)
    shared, gate = torch.randn(tokens, width), torch.randn(tokens, 1) * 3
    both = combine(parts, found, shared, gate, compute)
    wanted_shared = shared.double() * gate.double().sigmoid()
    torch.testing.assert_close(both.double(), plain + wanted_shared, rtol=GATE_RTOL, atol=GATE_RTOL)


@pytest.mark.parametrize("top", [1, 3, 64])
def test_entries_are_sorted_by_expert(backend: str, top: int) -> None:
    """What order, places and counts mean, said in other words than the definition's."""
    tokens = 50
    routing = route(some_logits(tokens, 70), top, True, TWO)
    entries = routing.chosen.reshape(-1).tolist()
    assert routing.order.tolist() == sorted(range(tokens * top), key=lambda i: (entries[i], i))
    assert [routing.order[p] for p in routing.places] == list(range(tokens * top))
    assert routing.counts.tolist() == [entries.count(e) for e in range(70)]


def test_the_larger_logit_comes_first_and_of_equals_the_lower_expert(backend: str) -> None:
    logits = torch.tensor([[0.0, -0.0, 1.0, 1.0, -1.0], [-2.0, -3.0, -1.0, -2.0, -torch.inf]])
    routing = route(logits, 4, True, ONE)
    assert routing.chosen.tolist() == [[2, 3, 0, 1], [2, 0, 3, 1]]
    # Logits so far apart that their probabilities are both 0 are no tie.
    far = route(torch.tensor([[500.0, 1.0, 2.0]]), 3, False, ONE)
    assert far.chosen.tolist() == [[0, 2, 1]]
    assert far.weights.tolist() == [[1.0, 0.0, 0.0]]


def test_weights_are_shares_of_all_experts_unless_normalised(backend: str) -> None:
    logits = torch.randn(9, 33)
    all_of_them = logits.double().softmax(-1).sort(-1, descending=True).values[:, :5]
    found = route(logits, 5, False, ONE).weights.double()
    torch.testing.assert_close(found, all_of_them, rtol=WEIGHT_RTOL, atol=0)
    shares = all_of_them / all_of_them.sum(-1, keepdim=True)
    found = route(logits, 5, True, ONE).weights.double()
    torch.testing.assert_close(found, shares, rtol=WEIGHT_RTOL, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.nan])
def test_what_is_no_number_stays_with_its_token(backend: str, value: float) -> None:
    logits = some_logits(6, 40)
    whole = route(logits, 4, True, ONE)
    logits[2, 7] = logits[2, 30] = logits[4] = value
    found = route(logits, 4, True, ONE)
    assert found.chosen[2, :2].tolist() == [7, 30]
    assert found.chosen[4].tolist() == [0, 1, 2, 3]
    assert sorted(found.order.tolist()) == list(range(24))
    assert int(found.counts.sum()) == 24
    out = combine(torch.randn(24, 5), found, None, None, ONE)
    spoilt = torch.tensor([False, False, True, False, True, False])
    assert torch.equal(out.isnan(), spoilt[:, None].expand(6, 5))
    assert torch.equal(found.weights[~spoilt], whole.weights[~spoilt])


def test_no_logit_above_minus_infinity_is_nan_and_crashes_nothing(backend: str) -> None:
    found = route(torch.full((2, 20), -torch.inf), 3, True, ONE)
    assert found.chosen.tolist() == [[0, 1, 2]] * 2
    assert found.weights.isnan().all()


@pytest.mark.parametrize("sizes", [(700, 256, 8, 50), (90, 60, 4, 1500)], ids=str)
def test_a_token_has_the_same_bits_in_company_and_on_other_threads(
    sizes: tuple[int, int, int, int],
) -> None:
    """Sizes that are divided over threads, for route, gather and combine."""
    tokens, experts, top, width = sizes
    logits, x = torch.randn(tokens, experts), torch.randn(tokens, width)
    parts = torch.randn(tokens, top, width)
    shared, gate = torch.randn(tokens, width), torch.randn(tokens, 1)
    whole = route(logits, top, True, FIVE)
    by_expert = parts.reshape(-1, width)[whole.order.long()]
    out = combine(by_expert, whole, shared, gate, FIVE)
    assert torch.equal(gather(x, whole, FIVE), x[whole.order.long() // top])
    for t in (0, 1, tokens // 2, tokens - 1):
        row = slice(t, t + 1)
        alone = route(logits[row], top, True, ONE)
        assert torch.equal(alone.weights, whole.weights[row])
        assert torch.equal(alone.chosen, whole.chosen[row])
        mine = combine(parts[t][alone.order.long()], alone, shared[row], gate[row], ONE)
        assert torch.equal(mine, out[row])


def test_rows_of_a_wider_matrix_are_read_in_place(backend: str) -> None:
    wide = torch.randn(7, 120)
    logits, gate, x = wide[:, 3:40], wide[:, 2:3], wide[:, 41:90]
    found, wanted = (route(t, 3, True, TWO) for t in (logits, logits.contiguous()))
    assert same_numbers(found, wanted)
    torch.testing.assert_close(found.weights, wanted.weights, rtol=WEIGHT_RTOL, atol=0)
    assert torch.equal(gather(x, found, TWO), gather(x.contiguous(), found, TWO))
    parts = torch.randn(21, 49)
    out = combine(parts, found, x, gate, TWO)
    other = combine(parts, found, x.contiguous(), gate.contiguous(), TWO)
    torch.testing.assert_close(out, other, rtol=GATE_RTOL, atol=GATE_RTOL)


def test_a_layer_of_experts_equals_transformers(backend: str) -> None:
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as peer
    from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig

    torch.manual_seed(3)
    config = Qwen3_5MoeTextConfig(
        hidden_size=32,
        num_experts=12,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    )
    block = peer.Qwen3_5MoeSparseMoeBlock(config).double()
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    x = torch.randn(19, 32)
    with torch.no_grad():
        wanted = block(x.double()[None])[0]
        mine = block.float()
        routing = route(linear(x, mine.gate.weight), 3, True, TWO)
        rows = gather(x, routing, TWO).split(routing.counts.tolist())
        parts = []
        for e, row in enumerate(rows):
            gate, up = linear(row, mine.experts.gate_up_proj[e]).chunk(2, dim=-1)
            parts.append(linear(silu(gate) * up, mine.experts.down_proj[e]))
        shared, share = mine.shared_expert(x), mine.shared_expert_gate(x)
        found = combine(torch.cat(parts), routing, shared, share, TWO)
    worst = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert worst < BLOCK_TOLERANCE


@pytest.mark.parametrize("isa", dispatch.ISAS)
def test_a_replay_is_the_direct_call(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa not in dispatch.machine_isas():
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setenv("NYBBLE_KERNELS", "cpu")
    monkeypatch.setenv("NYBBLE_ISA", isa)
    logits, x, gate = torch.empty(30, 20), torch.empty(30, 70), torch.empty(30, 1)
    program = Program(tokens=30, sequences=4, outputs=4)

    def run(tokens: int, compute: Compute) -> tuple[Routing, Tensor]:
        routing = route(logits[:tokens], 3, True, compute)
        parts = gather(x[:tokens], routing, compute)
        return routing, combine(parts, routing, x[:tokens], gate[:tokens], compute)

    with program.recording():
        recorded, out = run(30, Compute(threads=2, program=program))
    for tokens in (30, 1, 17, 0):
        for buffer in (logits, x, gate):
            buffer.normal_()
        program.run(tokens=tokens, sequences=1, outputs=1)
        routing, wanted = run(tokens, ONE)
        assert torch.equal(out[:tokens], wanted)
        assert torch.equal(recorded.counts, routing.counts)
        assert torch.equal(recorded.order[: 3 * tokens], routing.order)


def test_what_does_not_fit_is_refused(backend: str) -> None:
    logits, most = torch.randn(4, 100), MOST_CHOICES
    for top in (0, -1, most + 1):
        with pytest.raises(EngineError, match=f"expected from 1 to {most}"):
            route(logits, top, True, ONE)
    with pytest.raises(EngineError, match="3 of 2 experts"):
        route(torch.randn(4, 2), 3, True, ONE)
    for wrong in (logits.double(), logits[0], logits.t()):
        with pytest.raises(EngineError, match="logits must be float32"):
            route(wrong, 2, True, ONE)
    with pytest.raises(EngineError, match="more rows than"):
        route(torch.zeros(1, 64).expand(2**26, 64), 64, True, ONE)
    routing = route(logits, 3, True, ONE)
    with pytest.raises(EngineError, match="x must be"):
        gather(torch.randn(5, 8), routing, ONE)
    parts, shared, gate = torch.randn(12, 8), torch.randn(4, 8), torch.randn(4, 1)
    with pytest.raises(EngineError, match="parts must be"):
        combine(parts[:11], routing, None, None, ONE)
    with pytest.raises(EngineError, match="come together"):
        combine(parts, routing, shared, None, ONE)
    with pytest.raises(EngineError, match="shared must be"):
        combine(parts, routing, shared[:, :7], gate, ONE)
    with pytest.raises(EngineError, match="gate must be"):
        combine(parts, routing, shared, shared, ONE)
