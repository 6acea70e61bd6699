"""One layer at a time is the whole model, bit for bit; and it says and keeps what memory it
takes."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import CheckpointError, DoesNotFit, EngineError, TextError
from nybble.kernels.compute import Compute
from nybble.models.linear import Mode
from nybble.models.model import Model
from nybble.models.sequence import SequenceState
from nybble.models.state import make_batch
from nybble.stream import shards
from nybble.stream.executor import Stream
from nybble.stream.memory import plan_stream
from nybble.stream.shards import ShardForward

ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
MODE = Mode(Compute("bf16", 2))
LENGTHS = (70, 5, 64, 130, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("m"), "qwen3_5_moe", rope_parameters=ROPE)


def windows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 131, (n,), generator=generator) for n in LENGTHS]


def whole(model: Model, window: torch.Tensor) -> torch.Tensor:
    pages, states = model.page_pool(1, len(window)), model.state_pool(1)
    held = SequenceState(pages.numbers.take(), slots=states.numbers.take())
    return model.forward(make_batch(model.network, [window], [held]), pages, states, MODE)


def run(stream: Stream) -> list[torch.Tensor]:
    stream.run()
    return [rows for _, rows in stream.normed()]


@pytest.mark.parametrize("spills", [False, True])
def test_streamed_is_whole_bitwise(folder: Path, tmp_path: Path, spills: bool) -> None:
    with Checkpoint.open(folder) as checkpoint:
        model = Model(checkpoint)
        stream = Stream(model, windows(), MODE, spill=tmp_path / "spill" if spills else None)
        for found, window in zip(run(stream), windows(), strict=True):
            assert torch.equal(found, whole(model, window))
        stream.close()
    assert not (tmp_path / "spill").exists()


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=30),
    limit=st.integers(1, 700),
    seed=st.integers(0, 99),
)
def test_shards_hold_every_window_once_and_cross_no_break(
    lengths: list[int], limit: int, seed: int
) -> None:
    draw = random.Random(seed)
    texts = [torch.full((n,), i) for i, n in enumerate(lengths)]
    breaks = {i for i in range(len(lengths)) if draw.random() < 0.1}
    batches: list[list[int]] = []
    for i in range(len(lengths)):
        if not batches or i in breaks or draw.random() < 0.5:
            batches.append([])
        batches[-1].append(i)
    with mock.patch.object(shards, "SHARD_TOKENS", limit):
        found = shards.shards_of(texts, batches, breaks, "bf16")
    assert [int(w[0]) for s in found for w in s.windows] == list(range(len(lengths)))
    assert [[s.first + i for i in b] for s in found for b in s.batches] == batches
    rows = 0
    for shard in found:
        assert shard.start == rows
        rows += shard.rows
        assert shard.rows <= limit or len(shard.batches) == 1
        assert not breaks.intersection(range(shard.first + 1, shard.first + len(shard.windows)))


def test_shards_computed_by_themselves_change_no_bit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As somebody else does who is sent the shard alone, in any order."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 100)
    with Checkpoint.open(folder) as checkpoint:
        model = Model(checkpoint)
        tokens = plan_stream(model.network, LENGTHS, batch_tokens=130).private_bytes
        stream = Stream(model, windows(), MODE, limit_bytes=tokens)
        assert len(stream.shards) > 2
        stream.begin()
        for number in range(model.network.dims.layers):
            layer = model.weights.layer(number)
            assert stream.hidden is not None
            read = stream.hidden.read
            sent = [pickle.loads(pickle.dumps(shard)) for shard in stream.shards]
            apart = [
                rows.clone()
                for shard in reversed(sent)
                for rows in torch.cat(
                    [r for _, r in ShardForward(model, shard).through(number, layer, MODE, read)]
                )[None]
            ]
            stream.step(number, layer)
            together = stream.hidden.read(0, sum(LENGTHS))
            assert torch.equal(torch.cat(apart[::-1]), together)


def test_smaller_batches_change_no_bit(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        model = Model(checkpoint)
        usual = run(Stream(model, windows(), MODE))
        plan = plan_stream(model.network, LENGTHS, batch_tokens=130)
        assert len(plan.batches) > 1
        small = Stream(model, windows(), MODE, limit_bytes=plan.private_bytes)
        assert len(small.plan.batches) > 1
        for a, b in zip(usual, run(small), strict=True):
            assert torch.equal(a, b)


def test_an_interrupted_run_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        model = Model(checkpoint)
        expected = run(Stream(model, windows(), MODE))
        calls: list[str] = []

        class Stops:
            def linear(self, modules: tuple[str, ...], x: torch.Tensor) -> None:
                calls.append(modules[0])
                if ".layers.2." in modules[0] and len(calls) > 3:
                    raise KeyboardInterrupt

            def experts(self, *_: object) -> None:
                pass

        first = Stream(model, windows(), Mode(MODE.compute, Stops()), spill=tmp_path / "s")
        with pytest.raises(KeyboardInterrupt):
            first.run()
        assert json.loads((tmp_path / "s" / "stream.json").read_text())["done"] == 2
        again: list[str] = []

        class Counts(Stops):
            def linear(self, modules: tuple[str, ...], x: torch.Tensor) -> None:
                again.append(modules[0])

        second = Stream(model, windows(), Mode(MODE.compute, Counts()), spill=tmp_path / "s")
        for a, b in zip(expected, run(second), strict=True):
            assert torch.equal(a, b)
        assert all(".layers.2." in name for name in again)


def test_a_spill_of_another_run_is_refused(folder: Path, tmp_path: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        model = Model(checkpoint)
        Stream(model, windows(), MODE, spill=tmp_path / "s").run()
        with pytest.raises(CheckpointError, match="another run"):
            Stream(model, windows()[1:], MODE, spill=tmp_path / "s").run()
        (tmp_path / "s" / "stream.json").write_text("{")
        with pytest.raises(CheckpointError, match="damaged"):
            Stream(model, windows(), MODE, spill=tmp_path / "s").run()


def test_too_little_memory_is_refused_before_anything_runs(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint, pytest.raises(DoesNotFit, match="spill"):
        Stream(Model(checkpoint), windows(), MODE, limit_bytes=1000)


def test_the_plan_counts_hidden_states_once_and_batches_whole_windows(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        network = Model(checkpoint).network
    plan = plan_stream(network, [512] * 9 + [93], batch_tokens=2048)
    assert [len(b) for b in plan.batches] == [4, 4, 2]
    assert plan.hidden_bytes == (512 * 9 + 93) * network.dims.hidden * 4
    spilled = plan_stream(network, [512] * 9 + [93], batch_tokens=2048, spills=True)
    assert spilled.private_bytes == plan.private_bytes - plan.hidden_bytes
    assert spilled.disk_bytes == 2 * plan.hidden_bytes


@pytest.mark.parametrize("bad", [[], [torch.zeros(0, dtype=torch.int64)]])
def test_no_text_is_refused(folder: Path, bad: list[torch.Tensor]) -> None:
    with Checkpoint.open(folder) as checkpoint, pytest.raises(TextError):
        Stream(Model(checkpoint), bad, MODE)


def test_nan_names_layer_and_part(tmp_path: Path) -> None:
    cfg: dict[str, Any] = tiny.config("qwen3_5_moe", rope_parameters=ROPE)
    values = tiny.tensors(cfg)
    name = "model.language_model.layers.1.mlp.shared_expert.down_proj.weight"
    damaged = values[name].astype(np.float32)
    damaged[3, 5] = np.nan
    values[name] = damaged.astype(values[name].dtype)
    folder = tiny.write(tmp_path, cfg, values)
    with (
        Checkpoint.open(folder) as checkpoint,
        pytest.raises(EngineError, match=rf"layers\.1: .* feed-forward is NaN.*{name} holds NaN"),
    ):
        Stream(Model(checkpoint), windows(), MODE).run()
