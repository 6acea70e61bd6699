"""The last of 262,144 positions: a sequence whose pages reach it, through the runner's program.

Most of a context so long is not computed here: its pages hold random keys and values, as some
prompt could have left them, and what follows is a chunk and some decoded tokens at the end. Each
is compared with the forward over one page of the whole context, which holds the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from nybble.checkpoint.reader import Checkpoint
from nybble.engine.model_runner import ModelRunner, StepSize
from nybble.engine.runner import Work
from nybble.errors import ContextTooLong
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute
from nybble.models.linear import Mode
from nybble.models.model import Model
from nybble.models.sequence import SequenceState
from nybble.models.state import PagePool, make_batch

POSITIONS = 262_144
PAGE = 64
#: A chunk begins at a multiple of 64; tokens are decoded up to the very last position.
CHUNK = range(POSITIONS - 128, POSITIONS - 40)
DECODED = range(POSITIONS - 40, POSITIONS)

SIZES: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": POSITIONS,
    "rope_theta": 1e7,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": POSITIONS // 8}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "full": ("qwen3", SIZES, "bf16"),
    "yarn-fp8": ("qwen3", SIZES | {"rope_scaling": YARN}, "fp8"),
    "sliding": (
        "qwen2",
        SIZES
        | {
            "head_dim": None,
            "use_sliding_window": True,
            "sliding_window": 100,
            "layer_types": ["sliding_attention"],
        },
        "bf16",
    ),
    "hybrid": (
        "qwen3_5",
        SIZES | {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
        "bf16",
    ),
}

needs_library = pytest.mark.skipif(not dispatch.machine_isas(), reason="no compiled kernels")


def fill(pool: PagePool, other: PagePool, order: list[int]) -> None:
    """Random keys and values for all positions, the same ones in pages of another size."""
    generator = torch.Generator().manual_seed(5)
    for layer, pages in pool.layers.items():
        one = other.layers[layer]
        for many, whole in ((pages.keys, one.keys), (pages.values, one.values)):
            _, heads, _, size = whole.shape
            values = torch.randn((heads, POSITIONS, size), generator=generator).to(whole.dtype)
            whole.view(torch.uint8)[0] = values.view(torch.uint8)
            cut = values.view(torch.uint8).unflatten(1, (-1, PAGE)).transpose(0, 1)
            many.view(torch.uint8)[torch.tensor(order)] = cut


@needs_library
@pytest.mark.parametrize("case", CASES)
def test_the_last_position_is_reached_in_pages(case: str, tmp_path: Path) -> None:
    family, options, dtype = CASES[case]
    folder = tiny.checkpoint(tmp_path / "m", family, **options)
    text = torch.randint(0, 131, (128,), generator=torch.Generator().manual_seed(1)).tolist()
    with Checkpoint.open(folder) as checkpoint:
        model = Model(checkpoint)
        assert model.network.context == POSITIONS
        pool = model.page_pool(POSITIONS // PAGE + 3, PAGE, dtype)
        whole = model.page_pool(1, POSITIONS, dtype)
        states, other = model.state_pool(2), model.state_pool(1)
        order = pool.numbers.take(POSITIONS // PAGE)[::-1]
        fill(pool, whole, order)
        held = SequenceState(whole.numbers.take(), slots=other.numbers.take())
        held.commit(CHUNK.start)
        size = StepSize(tokens=160, sequences=2, outputs=160, context=POSITIONS)
        runner = ModelRunner(model, pool, states, size, Compute("bf16", 2))
        assert runner.program is not None
        mode = Mode(Compute("bf16", 1))
        for is_decode, part in ((False, CHUNK), (True, DECODED)):
            ids = text[part.start - CHUNK.start : part.stop - CHUNK.start]
            expected = forward(model, ids, held, (whole, other), mode, is_decode=is_decode)
            found = runner.forward([Work(ids, order, 1, part.start, is_decode, len(ids))])
            assert found.isfinite().all()
            assert torch.equal(found, expected)
        assert held.length == POSITIONS
        with pytest.raises(ContextTooLong, match="262,145 tokens"):
            runner.forward([Work([1], [*order, 0], 1, POSITIONS, True)])


def forward(
    model: Model,
    ids: list[int],
    held: SequenceState,
    pools: Any,
    mode: Mode,
    *,
    is_decode: bool,
) -> torch.Tensor:
    """The logits of some tokens, and their state committed."""
    batch = make_batch(model.network, [ids], [held], is_decode=is_decode)
    logits = model.logits(model.forward(batch, *pools, mode), mode)
    held.commit(len(ids))
    return logits


@needs_library
def test_far_positions_count(tmp_path: Path) -> None:
    """Another first page is another result: nothing stops short of the whole context."""
    folder = tiny.checkpoint(tmp_path / "m", "qwen3", **SIZES)
    with Checkpoint.open(folder) as checkpoint:
        model = Model(checkpoint)
        pool, whole = (model.page_pool(POSITIONS // n, n, "bf16") for n in (PAGE, POSITIONS))
        order = pool.numbers.take(POSITIONS // PAGE)
        fill(pool, whole, order)
        size = StepSize(tokens=80, sequences=1, outputs=1, context=POSITIONS)
        runner = ModelRunner(model, pool, model.state_pool(1), size, Compute("f32", 2))
        work = [Work([7], order, 0, POSITIONS - 1, True, 1)]
        before = runner.forward(work).clone()
        for pages in pool.layers.values():
            pages.values[order[0]] = 100.0
        after = runner.forward(work)
        assert after.isfinite().all()
        assert not torch.equal(before, after)
