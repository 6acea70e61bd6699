"""The mixer kernels against the recurrence in float64, against transformers, and against
themselves: alone, in company, on other threads and cut into other calls."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nybble.errors import EngineError
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute
from nybble.kernels.gated_delta import causal_conv, decay, gated_delta
from nybble.kernels.program import Program

#: Key heads, value heads, key dim, value dim: ratios 1, 2, 3; multiples of no vector; Dk != Dv.
SHAPES = [(2, 2, 16, 32), (2, 4, 32, 16), (1, 3, 17, 37), (1, 2, 128, 64), (1, 1, 64, 128)]
#: Around one chunk and two, and more than three.
TOKENS = (1, 63, 64, 65, 130, 200)
#: Of the largest output. Each of some 200 sums of Dk terms is rounded to float32 (2^-24 each, and
#: they add up like a random walk); found: at most 7e-7 on any back end.
TOLERANCE = 1.5e-6
#: transformers also sums g in float32, where exp(G_i - G_j) loses digits; found: at most 2.7e-6.
PEER_TOLERANCE = 6e-6
#: 16 products of magnitude 3, each rounded once; found: at most 2.7e-6.
CONV_ATOL = 1e-5
#: Units in the last place of an exponential, a logarithm, a division and four products.
ELEMENT_RTOL = 1e-6
BACKENDS = ["reference", *dispatch.ISAS]
ONE, TWO = Compute(threads=1), Compute(threads=2)


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
        x = fresh(*size, **options)  # type: ignore[call-overload]
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", filled)
    return str(request.param)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def at_end(starts: Tensor, slots: Tensor) -> Tensor:
    """Writes of the last state of each sequence alone, to its own slot."""
    writes = torch.full((int(starts[-1]),), -1, dtype=torch.int32)
    has_tokens = starts[1:] > starts[:-1]
    writes[(starts[1:] - 1)[has_tokens]] = slots[has_tokens]
    return writes


def convolve(
    x: Tensor, weight: Tensor, state: Tensor, place: tuple[Tensor, ...], compute: Compute
) -> Tensor:
    """With the last state written where the first was read, unless `place` says otherwise."""
    if len(place) == 3:
        place = (*place, at_end(place[0], place[2]))
    return causal_conv(x, weight, state, *place, compute)


@dataclass(frozen=True)
class Case:
    """Random inputs of one batch, and its state pool."""

    mixed: Tensor
    g: Tensor
    beta: Tensor
    state: Tensor
    shape: tuple[int, int, int, int]

    def rows(self, begin: int, end: int) -> Case:
        """Some tokens, contiguous, on the same pool."""
        mixed, g, beta = (x[begin:end].contiguous() for x in (self.mixed, self.g, self.beta))
        return replace(self, mixed=mixed, g=g, beta=beta)

    def copy(self) -> Case:
        return replace(self, state=self.state.clone())

    def run(
        self,
        starts: Tensor,
        lengths: Tensor,
        slots: Tensor,
        recurrent: Tensor | bool,
        compute: Compute = TWO,
        writes: Tensor | None = None,
    ) -> Tensor:
        if isinstance(recurrent, bool):
            recurrent = torch.full_like(lengths, recurrent)
        names = ("key_heads", "value_heads", "key_dim", "value_dim")
        return gated_delta(
            self.mixed,
            self.g,
            self.beta,
            self.state,
            starts,
            lengths,
            slots,
            at_end(starts, slots) if writes is None else writes,
            **dict(zip(names, self.shape, strict=True)),
            recurrent=recurrent,
            compute=compute,
        )


def make(shape: tuple[int, int, int, int], tokens: int, slots: int = 1, seed: int = 0) -> Case:
    hk, hv, dk, dv = shape
    torch.manual_seed(seed)
    mixed = torch.randn(tokens, 2 * hk * dk + hv * dv)
    g = -torch.rand(tokens, hv) * torch.logspace(-2, 1, hv)  # heads that remember, and that forget
    return Case(mixed, g, torch.rand(tokens, hv), torch.randn(slots, hv, dk, dv), shape)


def heads_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [T, Hk, Dk] as they come, v [T, Hv, Dv]."""
    hk, hv, dk, dv = case.shape
    q, k, v = case.mixed.split([hk * dk, hk * dk, hv * dv], dim=1)
    return q.reshape(-1, hk, dk), k.reshape(-1, hk, dk), v.reshape(-1, hv, dv)


def recurrence(case: Case, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and last state in float64, token by token, from `state` [Hv, Dk, Dv]."""
    hk, hv, dk, _ = case.shape
    q, k, v = (x.double() for x in heads_of(case))
    mine = torch.arange(hv) // (hv // hk)
    q = q[:, mine] / (q.square().sum(-1, keepdim=True)[:, mine] + 1e-6).sqrt() / dk**0.5
    k = k[:, mine] / (k.square().sum(-1, keepdim=True)[:, mine] + 1e-6).sqrt()
    out, state = torch.full_like(v, torch.nan), state.double().clone()
    for t in range(len(v)):
        state *= case.g[t].double().exp()[:, None, None]
        error = v[t] - torch.einsum("hkv,hk->hv", state, k[t])
        state += k[t, :, :, None] * (case.beta[t].double()[:, None] * error)[:, None]
        out[t] = torch.einsum("hkv,hk->hv", state, q[t])
    return out, state


@cache
def expected(shape: tuple[int, int, int, int], tokens: int) -> tuple[Tensor, Tensor]:
    """Of `make(shape, tokens)`, from zeros."""
    case = make(shape, tokens)
    return recurrence(case, torch.zeros_like(case.state[0]))


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == wanted.shape
    worst = (found.double() - wanted.double()).abs().max() / wanted.abs().max()
    assert worst < tolerance, f"off by {worst:.2e} of the largest"


# ----------------------------------------------------------------------------- the delta rule


@pytest.mark.parametrize("is_recurrent", [False, True], ids=["chunked", "recurrent"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_delta_equals_the_recurrence_in_float64(
    backend: str, shape: tuple[int, int, int, int], is_recurrent: bool
) -> None:
    case = make(shape, TOKENS[-1])
    outputs, state = expected(shape, TOKENS[-1])
    for tokens in TOKENS:
        mine = case.rows(0, tokens).copy()
        mine.state.fill_(torch.nan)  # a sequence of length 0 begins with zeros
        found = mine.run(ints(0, tokens), ints(0), ints(0), is_recurrent)
        assert_close(found, outputs[:tokens])
    assert_close(mine.state[0], state)


@pytest.mark.parametrize("is_recurrent", [False, True], ids=["chunked", "recurrent"])
def test_ragged_batch_with_states_in_any_order(backend: str, is_recurrent: bool) -> None:
    case = make((2, 4, 32, 16), 130, slots=5)
    starts, lengths, slots = ints(0, 1, 1, 66, 130), ints(7, 3, 0, 64), ints(4, 1, 0, 2)
    before = case.state.clone()
    out = case.run(starts, lengths, slots, is_recurrent)
    for b, length in enumerate(lengths.tolist()):
        begin, end = starts[b : b + 2].tolist()
        old = before[slots[b]] if length else torch.zeros_like(before[0])
        if begin == end:
            assert torch.equal(case.state[slots[b]], before[slots[b]])
            continue
        wanted, state = recurrence(case.rows(begin, end), old)
        assert_close(out[begin:end], wanted)
        assert_close(case.state[slots[b]], state)
    assert torch.equal(case.state[3], before[3])  # nobody's


@pytest.mark.parametrize("is_recurrent", [False, True], ids=["chunked", "recurrent"])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_delta_equals_transformers(
    backend: str, shape: tuple[int, int, int, int], is_recurrent: bool
) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it says that it is slow
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as peer

    rule = (
        peer.torch_recurrent_gated_delta_rule if is_recurrent else peer.torch_chunk_gated_delta_rule
    )
    case = make(shape, 130)
    q, k, v = (x[None] for x in heads_of(case))
    ratio = shape[1] // shape[0]
    q, k = (x.repeat_interleave(ratio, dim=2) for x in (q, k))
    wanted, state = rule(
        q,
        k,
        v,
        g=case.g[None],
        beta=case.beta[None],
        initial_state=case.state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    found = case.copy()
    out = found.run(ints(0, 130), ints(64), ints(0), is_recurrent)
    assert_close(out, wanted[0], PEER_TOLERANCE)
    assert_close(found.state, state, PEER_TOLERANCE)


@pytest.mark.parametrize("cuts", [(64,), (128,), (64, 128)], ids=str)
def test_chunks_cut_at_multiples_of_64_are_the_whole(backend: str, cuts: tuple[int, ...]) -> None:
    case = make((1, 3, 17, 37), 200)
    whole, parts = case.copy(), case.copy()
    wanted = whole.run(ints(0, 200), ints(0), ints(0), False)
    edges = [0, *cuts, 200]
    for begin, end in zip(edges, edges[1:], strict=False):
        out = parts.rows(begin, end).run(ints(0, end - begin), ints(begin), ints(0), False)
        assert torch.equal(out, wanted[begin:end])
    assert torch.equal(parts.state, whole.state)


def test_chunks_lie_at_absolute_positions(backend: str) -> None:
    """After 70 tokens, the next chunk ends at 128: so 58 tokens and 2 are one call of 60."""
    case = make((2, 2, 16, 32), 60)
    whole, parts = case.copy(), case.copy()
    wanted = whole.run(ints(0, 60), ints(70), ints(0), False)
    first = parts.rows(0, 58).run(ints(0, 58), ints(70), ints(0), False)
    second = parts.rows(58, 60).run(ints(0, 2), ints(128), ints(0), False)
    assert torch.equal(torch.cat([first, second]), wanted)
    assert torch.equal(parts.state, whole.state)


@pytest.mark.parametrize("cuts", [(1,), (1, 2, 3), (5, 70)], ids=str)
def test_tokens_one_by_one_are_the_same_in_any_calls(backend: str, cuts: tuple[int, ...]) -> None:
    case = make((1, 3, 17, 37), 75)
    whole, parts = case.copy(), case.copy()
    wanted = whole.run(ints(0, 75), ints(9), ints(0), True)
    edges = [0, *cuts, 75]
    for begin, end in zip(edges, edges[1:], strict=False):
        out = parts.rows(begin, end).run(ints(0, end - begin), ints(9 + begin), ints(0), True)
        assert torch.equal(out, wanted[begin:end])
    assert torch.equal(parts.state, whole.state)


@pytest.mark.parametrize("is_recurrent", [False, True], ids=["chunked", "recurrent"])
def test_delta_is_the_same_in_company_and_on_other_threads(
    backend: str, is_recurrent: bool
) -> None:
    case = make((2, 4, 32, 48), 140, slots=4)
    many, alone = case.copy(), case.copy()
    starts, lengths, slots = ints(0, 3, 73, 140), ints(5, 0, 62), ints(2, 3, 0)
    wanted = many.run(starts, lengths, slots, is_recurrent, Compute(threads=5))
    for b in range(3):
        begin, end = starts[b : b + 2].tolist()
        one = alone.rows(begin, end)
        out = one.run(ints(0, end - begin), lengths[b : b + 1], slots[b : b + 1], is_recurrent, ONE)
        assert torch.equal(out, wanted[begin:end])
    assert torch.equal(alone.state, many.state)


#: Each sequence: its new tokens, how many it had, and whether it runs token by token.
SEQUENCES = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 2, 5, 64, 70]), st.sampled_from([0, 3, 64, 100]), st.booleans()
    ),
    min_size=1,
    max_size=5,
)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(sequences=SEQUENCES, threads=st.sampled_from([1, 2, 5]), order=st.randoms())
def test_chunks_and_single_tokens_share_a_batch(
    backend: str, sequences: list[tuple[int, int, bool]], threads: int, order: Random
) -> None:
    """Each sequence has the bits that it has alone, whatever runs beside it and how."""
    tokens, lengths, recurrent = (list(x) for x in zip(*sequences, strict=True))
    slots = list(range(len(sequences) + 1))
    order.shuffle(slots)
    slots = slots[:-1]
    case = make((1, 3, 17, 37), sum(tokens), slots=len(sequences) + 1)
    many, alone = case.copy(), case.copy()
    starts = ints(0, *accumulate(tokens))
    place = (starts, ints(*lengths), ints(*slots))
    wanted = many.run(*place, ints(*recurrent), Compute(threads=threads))
    for b, count in enumerate(tokens):
        begin = int(starts[b])
        place = (ints(0, count), ints(lengths[b]), ints(slots[b]))
        out = alone.rows(begin, begin + count).run(*place, recurrent[b], ONE)
        assert torch.equal(out, wanted[begin : begin + count])
    assert torch.equal(alone.state, many.state)


@pytest.mark.parametrize("rate", [-40.0, -1e-7, 0.0])
def test_chunks_survive_any_decay(backend: str, rate: float) -> None:
    """exp(G_i - G_j) above the diagonal would overflow; a fast decay underflows to 0."""
    case = make((1, 2, 32, 32), 130)
    case.g[:, 0] = rate
    wanted, state = recurrence(case, case.state[0])
    found = case.copy()
    assert_close(found.run(ints(0, 130), ints(64), ints(0), False), wanted)
    assert_close(found.state[0], state)


@pytest.mark.parametrize("is_recurrent", [False, True], ids=["chunked", "recurrent"])
def test_nan_stays_with_its_sequence(backend: str, is_recurrent: bool) -> None:
    case = make((2, 4, 32, 16), 80, slots=2)
    case.mixed[10] = torch.nan
    out = case.run(ints(0, 70, 80), ints(0, 0), ints(1, 0), is_recurrent)
    assert out[10:70].isnan().all()
    assert out[70:].isfinite().all()
    assert case.state[1].isnan().all()
    assert case.state[0].isfinite().all()


# ----------------------------------------------------------------------------- where states go

#: Each sequence: new tokens, how many it had, whether token by token, how many it writes at most.
WRITTEN = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 2, 5, 64, 70, 133]),
        st.sampled_from([0, 3, 64, 100]),
        st.booleans(),
        st.sampled_from([1, 2, 4]),
    ),
    min_size=1,
    max_size=4,
)


def ends_of(length: int, count: int, is_recurrent: bool, most: int, order: Random) -> list[int]:
    """After how many tokens a sequence writes: any, or where chunks end; the last always."""
    able = [n for n in range(1, count) if is_recurrent or (length + n) % 64 == 0]
    return [*sorted(order.sample(able, min(most - 1, len(able)))), *([count] if count else [])]


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(sequences=WRITTEN, threads=st.sampled_from([1, 2, 5]), order=st.randoms())
def test_written_states_are_those_of_shorter_calls(
    backend: str, sequences: list[tuple[int, int, bool, int]], threads: int, order: Random
) -> None:
    """Whatever is written where, outputs have the bits of one call that writes the last state, and
    each written state those of a call that ends there. Several may read a slot nobody writes."""
    starts = ints(0, *accumulate(s[0] for s in sequences))
    recurrent = [s[2] for s in sequences]
    case = make((1, 3, 17, 37), int(starts[-1]), slots=24)
    x, weight = torch.randn(len(case.mixed), 530), torch.randn(530, 4)
    conv = torch.randn(24, 3, 530)
    numbers = list(range(2, 24))
    order.shuffle(numbers)
    writes = torch.full((len(x),), -1, dtype=torch.int32)
    slots, goes = [], []
    for b, (count, length, is_recurrent, most) in enumerate(sequences):
        ends = ends_of(length, count, is_recurrent, most, order)
        mine = [numbers.pop() for _ in ends] or [numbers.pop()]
        slots.append(order.choice([0, 1, *mine]))  # 0 and 1 are for all to read
        for end, slot in zip(ends, mine, strict=False):
            writes[int(starts[b]) + end - 1] = slot
            goes.append((b, end, slot))
    place = (starts, ints(*(s[1] for s in sequences)), ints(*slots))
    found, convolved = case.copy(), conv.clone()
    compute = Compute(threads=threads)
    out = found.run(*place, ints(*recurrent), compute, writes)
    mixed = convolve(x, weight, convolved, (*place, writes), compute)
    for b, end, slot in goes:
        begin = int(starts[b])
        rows, alone = slice(begin, begin + end), conv.clone()
        part = case.copy().rows(begin, begin + end)
        where = (ints(0, end), place[1][b : b + 1], place[2][b : b + 1])
        assert torch.equal(part.run(*where, recurrent[b], ONE), out[rows])
        assert torch.equal(part.state[slots[b]], found.state[slot])
        one = convolve(x[rows], weight, alone, where, ONE)
        # torch's own silu, which the reference calls, differs in bits by where a row lies.
        atol = 1e-6 if backend == "reference" else 0
        torch.testing.assert_close(one, mixed[rows], rtol=0, atol=atol)
        assert torch.equal(alone[slots[b]], convolved[slot])
    untouched = [s for s in range(24) if s not in {slot for *_, slot in goes}]
    assert torch.equal(found.state[untouched], case.state[untouched])
    assert torch.equal(convolved[untouched], conv[untouched])


# ----------------------------------------------------------------------------- convolution, decay


@pytest.mark.parametrize("taps", [1, 2, 4, 16])
@pytest.mark.parametrize("channels", [5, 64, 530])
def test_convolution_equals_float64(backend: str, channels: int, taps: int) -> None:
    torch.manual_seed(1)
    starts, lengths, slots = ints(0, 1, 4, 4, 40), ints(9, 1, 5, 0), ints(3, 0, 2, 4)
    x, weight = torch.randn(40, channels), torch.randn(channels, taps)
    state = torch.randn(5, taps - 1, channels)
    before = state.clone()
    before[4] = 0
    state[4] = torch.nan
    out = convolve(x, weight, state, (starts, lengths, slots), TWO)
    for b in range(4):
        begin, end = starts[b : b + 2].tolist()
        padded = torch.cat([before[slots[b]], x[begin:end]]).double()
        windows = padded.unfold(0, taps, 1)[: end - begin] if end > begin else padded[:0, :, None]
        sums = (windows * weight).sum(-1)
        wanted = sums * sums.sigmoid()
        torch.testing.assert_close(out[begin:end].double(), wanted, rtol=0, atol=CONV_ATOL)
        assert torch.equal(state[slots[b]], padded[end - begin :].float())
    assert torch.equal(state[1], before[1])


def test_convolution_equals_transformers(backend: str) -> None:
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as peer

    torch.manual_seed(2)
    x, weight, state = torch.randn(33, 96), torch.randn(96, 4), torch.zeros(1, 3, 96)
    prompt = convolve(x[:30], weight, state, (ints(0, 30), ints(0), ints(0)), TWO)
    rest = convolve(x[30:], weight, state, (ints(0, 3), ints(30), ints(0)), TWO)
    wanted = peer.causal_conv1d_fn(x.t()[None], weight, activation="silu")[0].t()
    torch.testing.assert_close(torch.cat([prompt, rest]), wanted, rtol=1e-5, atol=1e-6)


def test_convolution_is_the_same_in_any_calls_and_company(backend: str) -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(40, 700), torch.randn(700, 4)
    whole, parts = torch.randn(2, 3, 700), torch.empty(2, 3, 700)
    parts.copy_(whole)
    place = (ints(0, 30, 40), ints(4, 2), ints(1, 0))
    wanted = convolve(x, weight, whole, place, Compute(threads=5))
    for begin, end in [(0, 1), (1, 3), (3, 30)]:
        place = (ints(0, end - begin), ints(4 + begin), ints(1))
        assert torch.equal(convolve(x[begin:end], weight, parts, place, ONE), wanted[begin:end])
    alone = convolve(x[30:], weight, parts, (ints(0, 10), ints(2), ints(0)), ONE)
    assert torch.equal(alone, wanted[30:])
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("heads", [3, 32, 48])
def test_decay_equals_float64(backend: str, heads: int) -> None:
    torch.manual_seed(4)
    a, b = torch.randn(9, heads) * 8, torch.randn(9, heads) * 8
    a[0, :3], b[0, :3] = torch.tensor([-60.0, 19.99, 60.0]), torch.tensor([-80.0, 0.0, 80.0])
    a_log, bias = torch.randn(heads), torch.zeros(heads)
    g, beta = decay(a, b, a_log, bias, TWO)
    soft = torch.logaddexp(a.double(), torch.zeros(()).double())
    # torch's softplus, which the reference calls, has lost half its digits at e^-15.
    rtol = ELEMENT_RTOL if backend != "reference" else 1e-5
    torch.testing.assert_close(g.double(), -a_log.double().exp() * soft, rtol=rtol, atol=0)
    torch.testing.assert_close(beta.double(), b.double().sigmoid(), rtol=ELEMENT_RTOL, atol=0)
    if backend != "reference":
        alone = decay(a[4:5], b[4:5], a_log, bias, ONE)
        assert torch.equal(alone[0], g[4:5])
        assert torch.equal(alone[1], beta[4:5])


def test_decay_keeps_nan(backend: str) -> None:
    a, b = torch.zeros(2, 20), torch.zeros(2, 20)
    a[0, 3] = b[1, 19] = torch.nan
    g, beta = decay(a, b, torch.zeros(20), torch.zeros(20), ONE)
    assert g.isnan().nonzero().tolist() == [[0, 3]]
    assert beta.isnan().nonzero().tolist() == [[1, 19]]


# ----------------------------------------------------------------------------- slices, programs


def test_rows_of_a_wider_matrix_are_read_in_place(backend: str) -> None:
    torch.manual_seed(5)
    wide, weight, state = torch.randn(9, 150), torch.randn(70, 4), torch.randn(2, 3, 70)
    place = (ints(0, 4, 9), ints(3, 0), ints(1, 0))
    other = state.clone()
    out = convolve(wide[:, 11:81], weight, state, place, TWO)
    assert torch.equal(out, convolve(wide[:, 11:81].contiguous(), weight, other, place, TWO))
    assert torch.equal(state, other)
    a, b, vector = wide[:, :48], wide[:, 48:96], torch.randn(48)
    found = decay(a, b, vector, vector, TWO)
    wanted = decay(a.contiguous(), b.contiguous(), vector, vector, TWO)
    # torch's own sigmoid, which the reference calls, differs in bits by where a row lies.
    torch.testing.assert_close(found, wanted, rtol=ELEMENT_RTOL, atol=0)


@dataclass(frozen=True)
class Layer:
    """A mixer between the projections, on buffers that outlive a step."""

    shape: tuple[int, int, int, int]
    weight: Tensor
    conv: Tensor
    state: Tensor
    vector: Tensor

    def copy(self) -> Layer:
        return replace(self, conv=self.conv.clone(), state=self.state.clone())

    def run(self, qkvz: Tensor, ba: Tensor, place: list[Tensor], compute: Compute) -> Tensor:
        hv = self.shape[1]
        g, beta = decay(ba[:, hv:], ba[:, :hv], self.vector, self.vector, compute)
        x = qkvz[:, : len(self.weight)]
        starts, lengths, slots, recurrent, writes = place
        where = (starts, lengths, slots, writes)
        mixed = convolve(x, self.weight, self.conv, where, compute)
        case = Case(mixed, g, beta, self.state, self.shape)
        return case.run(starts, lengths, slots, recurrent, compute, writes)


@pytest.mark.parametrize("isa", dispatch.ISAS)
def test_a_replay_is_the_direct_call(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of batches that differ from the recorded one in everything but the buffers."""
    if isa not in dispatch.machine_isas():
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setenv("NYBBLE_KERNELS", "cpu")
    monkeypatch.setenv("NYBBLE_ISA", isa)
    torch.manual_seed(6)
    shape, channels = (2, 4, 24, 40), 2 * 2 * 24 + 4 * 40
    direct = Layer(
        shape,
        torch.randn(channels, 4),
        torch.randn(5, 3, channels),
        torch.randn(5, 4, 24, 40),
        torch.randn(4),
    )
    replayed = direct.copy()
    qkvz, ba = torch.empty(150, channels + 160), torch.empty(150, 8)
    # Slots are no slots yet.
    place = [torch.zeros(n, dtype=torch.int32) for n in (5, 4, 4, 4, 150)]
    program = Program(tokens=150, sequences=4, outputs=4)
    with program.recording():
        out = replayed.run(qkvz, ba, place, Compute(threads=2, program=program))
    for counts, lengths, slots, recurrent in [
        ((1, 1, 1, 1), (3, 64, 0, 9), (3, 0, 2, 4), (1, 1, 1, 1)),
        ((1, 0, 149), (4, 7, 0), (3, 0, 1), (1, 0, 0)),
        ((70,), (149,), (1,), (0,)),
    ]:
        size = len(counts)
        starts = (0, *accumulate(counts))
        for buffer, values in zip(place[:4], (starts, lengths, slots, recurrent), strict=True):
            buffer[: len(values)] = ints(*values)
        tokens = starts[-1]
        place[4][:tokens] = at_end(ints(*starts), ints(*slots))
        qkvz[:tokens], ba[:tokens] = torch.randn(tokens, channels + 160), torch.randn(tokens, 8)
        program.run(tokens=tokens, sequences=size, outputs=size)
        now = [place[0][: size + 1], *(x[:size] for x in place[1:4]), place[4][:tokens]]
        wanted = direct.run(qkvz[:tokens], ba[:tokens], now, ONE)
        assert torch.equal(out[:tokens], wanted)
        assert torch.equal(replayed.conv, direct.conv)
        assert torch.equal(replayed.state, direct.state)


# ----------------------------------------------------------------------------- what is refused


def test_what_does_not_fit_is_refused_before_anything_is_written(backend: str) -> None:
    case = make((2, 4, 32, 16), 4, slots=2)
    before = case.state.clone()
    end = ints(-1, -1, -1, 0)
    for starts, lengths, slots, writes, message in [
        (ints(0, 3), ints(0), ints(0), end, "starts must rise"),
        (ints(0, 4), ints(-1), ints(0), end, "negative"),
        (ints(0, 4), ints(0), ints(2), end, "slots must be from 0 to 1"),
        (ints(0, 2, 4), ints(0, 0), ints(1, 1), ints(-1, 1, -1, 1), "1 writes slot 1"),
        (ints(0, 4), ints(0), ints(0), ints(0, -1, -1, 0), "written once"),
        (ints(0, 4), ints(0), ints(0), ints(-1, -1, -1, 2), "slots are from 0 to 1"),
        (ints(0, 4), ints(0), ints(0), ints(-1, -2, -1, 1), "writes slot -2"),
        (ints(0, 4), ints(0), ints(0), ints(-1, 1, -1, -1), "0 is written nowhere"),
        (ints(0, 2, 4), ints(5, 5), ints(0, 0), ints(-1, 0, -1, 1), "1 reads slot 0, which"),
        (ints(0, 4), ints(0), ints(0), end[:3], "writes must be"),
        (ints(0, 4).long(), ints(0), ints(0), end, "starts must be"),
    ]:
        with pytest.raises(EngineError, match=message):
            case.run(starts, lengths, slots, True, writes=writes)
    with pytest.raises(EngineError, match=r"after \[66\] tokens, expected multiples of 64"):
        case.run(ints(0, 4), ints(64), ints(0), False, writes=ints(-1, 1, -1, 0))
    place = (ints(0, 4), ints(0), ints(0))
    with pytest.raises(EngineError, match="g must be contiguous"):
        replace(case, g=case.g[:, :3]).run(*place, True)
    for wrong in (torch.ones(1, dtype=torch.int64), ints(1, 1)):
        with pytest.raises(EngineError, match="recurrent must be"):
            case.run(*place, wrong)
    with pytest.raises(EngineError, match="x must be float32"):
        convolve(torch.zeros(8, 4).t(), torch.zeros(8, 2), torch.zeros(1, 1, 8), place, ONE)
    with pytest.raises(EngineError, match="do not divide"):
        replace(case, shape=(3, 4, 32, 16)).run(*place, True)
    with pytest.raises(EngineError, match=r"weight must be .*\[8, 16\]"):
        convolve(torch.zeros(4, 8), torch.zeros(8, 17), torch.zeros(1, 16, 8), place, ONE)
    assert torch.equal(case.state, before)
