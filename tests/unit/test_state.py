"""Pools hand every page and slot to one owner; a batch says where its tokens go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import ContextTooLong, EngineError, OutOfPages
from nybble.models.model import Model
from nybble.models.network import Network
from nybble.models.numbers import Numbers
from nybble.models.sequence import SequenceState
from nybble.models.state import PagePool, StatePool, make_batch

ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    folder = tiny.checkpoint(
        tmp_path_factory.mktemp("m"),
        "qwen3_5",
        rope_parameters=ROPE,
        max_position_embeddings=50,
    )
    with Checkpoint.open(folder) as checkpoint:
        return Model(checkpoint).network


ACTIONS = st.lists(st.one_of(st.integers(0, 4), st.just("release")), max_size=30)


@settings(max_examples=50, deadline=None)
@given(ACTIONS)
def test_pages_are_conserved(actions: list[Any]) -> None:
    pool = Numbers(9, "pages")
    held: list[list[int]] = []
    for action in actions:
        if action == "release":
            if held:
                pool.give_back(held.pop(0))
        elif action > pool.free:
            with pytest.raises(OutOfPages):
                pool.take(action)
        else:
            held.append(pool.take(action))
        owned = [p for pages in held for p in pages]
        assert len(set(owned)) == len(owned) == 9 - pool.free
        assert set(owned) <= set(range(9))
        pool.check()


@pytest.mark.parametrize(("count", "each"), [(12, 4), (14, 4), (12, 1), (3, 4)])
def test_what_is_taken_first_lies_side_by_side(count: int, each: int) -> None:
    """Also when it was given back, in whatever order."""
    pool = Numbers(count, "slots", first=5, each=each)
    takers = count // each
    for order in (range(takers), reversed(range(takers)), range(takers)):
        taken = [pool.take(each) for _ in range(takers)]
        assert sorted(numbers[0] for numbers in taken) == list(range(5, 5 + takers))
        assert all(n[at] - n[0] == at * takers for n in taken for at in range(each))
        for at in order:
            pool.give_back(taken[at])
        pool.check()
    assert sorted(pool.take(count)) == list(range(5, 5 + count))


def test_what_was_not_taken_cannot_be_given_back(network: Network) -> None:
    pages, slots = PagePool(network, [1], 3, 8), StatePool(network, [0, 2], 2)
    taken = pages.numbers.take(2)
    pages.numbers.give_back(taken[:1])
    for wrong in ([taken[0]], [7], [taken[1], taken[1]]):
        with pytest.raises(EngineError):
            pages.numbers.give_back(wrong)
    with pytest.raises(EngineError):
        slots.numbers.give_back([0])
    assert set(slots.numbers.take(2)) == {0, 1}
    with pytest.raises(OutOfPages):
        slots.numbers.take()


def test_a_lost_number_is_noticed() -> None:
    pool = Numbers(3, "pages")
    pool.take(2)
    pool._taken.pop()
    with pytest.raises(EngineError, match="lost"):
        pool.check()
    pool._free.append(pool._free[0])
    with pytest.raises(EngineError, match="twice"):
        pool.check()


def test_pools_hold_the_layers_that_need_them(network: Network) -> None:
    pages, slots = PagePool(network, [1], 3, 8), StatePool(network, [0, 2], 2)
    d = network.dims
    assert pages.layers[1].keys.shape == (3, d.kv_heads, 8, d.head_dim)
    channels = 2 * d.linear_key_heads * d.linear_key_dim
    channels += d.linear_value_heads * d.linear_value_dim
    assert slots.layers[2].conv.shape == (2, d.conv_kernel - 1, channels)
    assert slots.layers[2].state.shape == (
        *(2, d.linear_value_heads),
        *(d.linear_key_dim, d.linear_value_dim),
    )


def test_an_mtp_head_has_a_hidden_state_in_every_slot(network: Network) -> None:
    hidden = network.dims.hidden
    for layers in ([0, 2], []):
        plain = StatePool(network, layers, 5)
        pool = StatePool(network, layers, 5, has_mtp=True)
        assert plain.hidden is None
        assert pool.hidden is not None
        assert pool.hidden.shape == (5, hidden)
        assert pool.nbytes == plain.nbytes + 5 * hidden * 4
        assert pool.count == plain.count == 5


def test_a_sequence_without_new_tokens_writes_no_state(network: Network) -> None:
    states = [SequenceState([n], slots=[n]) for n in range(3)]
    batch = make_batch(network, [[5], [], [6, 7]], states)
    assert batch.writes.tolist() == [0, -1, 2]


def test_a_batch_continues_each_sequence(network: Network) -> None:
    a = SequenceState([2, 0], slots=[1, 4], length=7, slot=1)
    b = SequenceState([1], slots=[3])
    batch = make_batch(network, [[5, 6], [9]], [a, b], is_decode=True)
    assert batch.tokens.tolist() == [5, 6, 9]
    assert batch.starts.tolist() == [0, 2, 3]
    assert batch.lengths.tolist() == [7, 0]
    assert batch.table.tolist() == [[2, 0], [1, -1]]
    assert batch.slots.tolist() == [4, 3]
    cos, _ = network.rope.tables(torch.tensor([7, 8, 0]))
    assert torch.equal(batch.cos, cos)
    assert batch.writes.tolist() == [-1, 4, 3]
    a.commit(2, slot=0)
    assert (a.length, a.slot, a.drafts) == (9, 0, [])


def test_the_offset_of_images_moves_positions_only(network: Network) -> None:
    state = SequenceState([0], length=4, offset=-2)
    batch = make_batch(network, [[1]], [state])
    assert batch.lengths.tolist() == [4]
    assert torch.equal(batch.cos, network.rope.tables(torch.tensor([2]))[0])


def test_too_long_and_foreign_tokens_are_refused(network: Network) -> None:
    with pytest.raises(ContextTooLong, match="51 tokens"):
        make_batch(network, [[0] * 51], [SequenceState([0])])
    with pytest.raises(EngineError, match="vocabulary has 131"):
        make_batch(network, [[0, 131]], [SequenceState([0])])
    with pytest.raises(EngineError, match="tokenizer"):
        make_batch(network, [[-1]], [SequenceState([0])])


def test_the_context_is_that_of_config(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path, "llama", hidden_size=160, max_position_embeddings=77)
    with Checkpoint.open(folder) as checkpoint:
        assert Model(checkpoint).network.context == 77
