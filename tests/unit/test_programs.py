"""Programs: what is recorded is replayed, at any size, and memory is shared by liveness."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.errors import DoesNotFit, EngineError
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute
from nybble.kernels.elementwise import add, look_up, rms_norm, rotary, silu_mul
from nybble.kernels.program import Program

pytestmark = pytest.mark.skipif(
    dispatch.choose().backend != "cpu", reason="programs hold compiled kernels"
)
EPS = 1e-6


def test_a_replay_does_what_the_calls_did_at_every_size() -> None:
    torch.manual_seed(0)
    program = Program(tokens=9, sequences=2, outputs=4)
    compute = Compute("f32", 1, program)
    x, weight = torch.randn(9, 2 * 3 * 10), torch.rand(10)
    wanted = torch.zeros(4, dtype=torch.int64)
    with program.recording():
        heads = x.view(9, 6, 10)
        normed = rms_norm(heads, weight, EPS, offset=1.0, compute=compute)
        gated = silu_mul(normed.view(9, 60), compute)
        total = add(gated, gated, compute)
        with program.counting("outputs"):
            rows = look_up(total.numpy(), wanted, compute)
    plain = Compute("f32", 1)
    for tokens, chosen in ((9, [8, 0, 3]), (1, [0]), (4, [3, 3, 3, 1]), (0, [])):
        x.copy_(torch.randn_like(x))
        wanted[: len(chosen)] = torch.tensor(chosen)
        program.run(tokens=tokens, sequences=0, outputs=len(chosen))
        part = rms_norm(x[:tokens].view(-1, 6, 10), weight, EPS, offset=1.0, compute=plain)
        part = silu_mul(part.view(tokens, 60), plain)
        assert torch.equal(rows[: len(chosen)], (part + part)[chosen])


def test_memory_is_free_when_its_tensor_and_its_views_are_gone() -> None:
    program = Program(tokens=4, sequences=1, outputs=1)
    first = program.empty((4, 8))
    place = first.data_ptr()
    view = first[:, :4].view(4, 2, 2)
    del first
    second = program.empty((4, 8))
    assert second.data_ptr() != place
    del view
    assert program.empty((4, 8)).data_ptr() == place


def test_programs_beside_each_other_share_what_neither_holds() -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(8, 40), torch.rand(40)
    first = Program(tokens=8, sequences=1, outputs=1)
    compute = Compute("f32", 1, first)
    with first.recording():
        kept = add(rms_norm(x, weight, EPS, offset=0.0, compute=compute), x, compute)
    second = Program(tokens=4, sequences=1, outputs=1, beside=first)
    compute = Compute("f32", 1, second)
    with second.recording():
        other = add(rms_norm(x[:4], weight, EPS, offset=1.0, compute=compute), x[:4], compute)
    assert first.arena_bytes == second.arena_bytes == 64 << 20
    first.run(tokens=8, sequences=1, outputs=0)
    before = kept.clone()
    second.run(tokens=3, sequences=1, outputs=0)
    one = Compute("f32", 1)
    assert torch.equal(kept, before)
    wanted = rms_norm(x[:3], weight, EPS, offset=1.0, compute=one) + x[:3]
    assert torch.equal(other[:3], wanted)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5000)), max_size=60))
def test_living_tensors_never_overlap(actions: list[tuple[bool, int]]) -> None:
    program = Program(tokens=1, sequences=1, outputs=1)
    alive: list[torch.Tensor] = []
    for is_new, size in actions:
        if is_new or not alive:
            alive.append(program.empty((size,), "u8"))
        else:
            alive.pop(size % len(alive))
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in alive if t.nbytes)
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
    used = sum(-(-max(t.nbytes, 1) // 256) * 256 for t in alive)
    assert used <= program.arena_bytes or not alive


def test_torch_may_look_and_not_compute() -> None:
    program = Program(tokens=4, sequences=1, outputs=1)
    with program.recording():
        x = program.empty((4, 8))
        x[:, 2:].view(4, 3, 2).unsqueeze(0)
        for wrong in (
            lambda: x + 1,
            lambda: x[:, 2:].contiguous(),
            lambda: x.sum(),
            lambda: torch.zeros(3),
            lambda: x.clone(),
        ):
            with pytest.raises(EngineError, match="use a kernel"):
                wrong()
    assert torch.zeros(3).sum() == 0


def test_what_cannot_be_replayed_is_refused() -> None:
    program = Program(tokens=4, sequences=1, outputs=2)
    compute = Compute("f32", 1, program)
    x, cos = torch.zeros(6, 1, 8), torch.zeros(6, 2)
    with pytest.raises(EngineError, match="6 rows are no multiple of 4 tokens"):
        rotary(x, cos, cos, compute)
    with pytest.raises(EngineError, match="2 arguments for 'ppt'"):
        program.record("nyb_silu_mul", "ppt", (0, 0))
    with program.recording():
        silu_mul(program.empty((4, 2)), compute)
    with pytest.raises(EngineError, match="finished"):
        silu_mul(torch.zeros(4, 2), compute)
    for sizes in ((5, 0, 0), (0, 2, 0), (0, 0, 3), (-1, 0, 0)):
        with pytest.raises(EngineError, match="it was made for"):
            program.run(tokens=sizes[0], sequences=sizes[1], outputs=sizes[2])


@pytest.mark.parametrize("tokens", [1 << 42, 1 << 61])
def test_a_step_too_large_for_memory_is_refused_by_number(tokens: int) -> None:
    program = Program(tokens=tokens, sequences=1, outputs=1)
    with pytest.raises(DoesNotFit, match=rf"{32 * tokens:,} bytes .* max_batched_tokens"):
        program.empty((tokens, 8))
    assert program.arena_bytes == 0


def test_the_time_of_each_call_is_measured() -> None:
    program = Program(tokens=512, sequences=1, outputs=1)
    compute = Compute("f32", 1, program)
    x = torch.ones(512, 4096)
    with program.recording():
        small = silu_mul(program.empty((512, 2)), compute)
        large = silu_mul(x, compute)
        assert small.shape != large.shape
    ticks = np.zeros(len(program.names), dtype=np.int64)
    program.run(tokens=512, sequences=0, outputs=0, ticks=ticks)
    assert program.names == ["nyb_silu_mul", "nyb_silu_mul"]
    assert 0 <= ticks[0] < ticks[1]


def test_a_replay_may_be_of_some_calls_alone() -> None:
    """In parts with other sizes, as the whole; each part is timed where its calls stand."""
    torch.manual_seed(2)
    x = torch.randn(6, 8)
    program = Program(tokens=6, sequences=1, outputs=1)
    compute = Compute("f32", 1, program)
    with program.recording():
        sums = [add(x, x, compute)]
        sums.append(add(sums[-1], x, compute))
        sums.append(add(sums[-1], x, compute))
    for tensor in sums:
        tensor.numpy()[:] = -1
    ticks = np.zeros(3, dtype=np.int64)
    program.run(tokens=5, sequences=0, outputs=0, calls=(0, 1), ticks=ticks)
    assert ticks[0] > 0
    assert ticks[1] == ticks[2] == 0
    program.run(tokens=4, sequences=0, outputs=0, calls=(1, 3), ticks=ticks)
    assert (ticks > 0).all()
    for tensor, factor, rows in zip(sums, (2, 3, 4), (5, 4, 4), strict=True):
        wanted = x + x
        for _ in range(factor - 2):
            wanted = wanted + x
        assert torch.equal(tensor[:rows], wanted[:rows])
        assert (tensor[rows:] == -1).all()
