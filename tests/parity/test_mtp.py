"""The MTP head against a plain reference written from the specification."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from mtp_reference import dense, reference_head
from nybble.checkpoint.reader import Checkpoint
from nybble.kernels.compute import Compute
from nybble.models.linear import Mode
from nybble.models.model import MTP_LAYER, Model
from nybble.models.sequence import SequenceState
from nybble.models.state import PagePool, make_batch

F32 = Mode(Compute("f32", 2))
TOLERANCE = 1e-4  # float32 sums in two orders
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("family", tiny.HYBRIDS)
def test_the_head_agrees_with_the_reference(family: str, tmp_path: Path) -> None:
    """Entry 0, made of no hidden state, is alone; entries from 1 on do not see it."""
    cfg = tiny.config(family, dtype="F32", rope_parameters=ROPE)
    folder = tiny.checkpoint(tmp_path, family, dtype="F32", rope_parameters=ROPE)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn((70, cfg["text_config"]["hidden_size"]), generator=generator)
    tokens = torch.randint(0, 131, (70,), generator=generator)
    hidden[0] = 0.0
    pieces = (slice(0, 1), slice(1, 70))
    expected = torch.cat(
        [reference_head(dense(folder), cfg["text_config"], tokens[p], hidden[p]) for p in pieces]
    )
    with Checkpoint.open(folder) as checkpoint:
        model = Model(checkpoint)
        head = model.mtp
        assert head is not None
        pool = PagePool(model.network, [MTP_LAYER], 1, 80, "f32")
        state = SequenceState(pool.numbers.take())
        parts = []
        for part in (slice(0, 66), slice(66, 67), slice(67, 70)):
            batch = make_batch(model.network, [tokens[part]], [state])
            parts.append(
                head(
                    model.embed(tokens[part], F32), hidden[part], batch, pool.layers[MTP_LAYER], F32
                )
            )
            state.commit(part.stop - part.start)
    difference = float((torch.cat(parts) - expected).abs().max())
    assert difference <= TOLERANCE * float(expected.abs().max())
