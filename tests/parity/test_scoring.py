"""Likelihoods of the trained hybrid model against transformers', and the figures of its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from nybble.checkpoint.reader import Checkpoint
from nybble.evaluate.score import TokenScores, compare, score
from nybble.evaluate.windows import Window, make_windows
from nybble.kernels.compute import Compute
from nybble.models.linear import Mode
from nybble.models.model import Model
from nybble.progress import Progress
from nybble.stream.executor import Stream

CARRIED = tiny.MODELS / "hybrid-chat-mtp"
#: Relative, of the perplexity in float32.
PERPLEXITY_TOLERANCE = 1e-4
#: Of one token's log-likelihood in float32, of trained logits of size 20.
TOKEN_TOLERANCE = 2e-3


class Source:
    def __init__(self, model: Model, windows: tuple[Window, ...], mode: Mode) -> None:
        stream = Stream(model, [torch.tensor(w.tokens) for w in windows], mode, page_dtype="f32")
        stream.run()
        self.head, self.normed = model.head, stream.normed


@pytest.fixture(scope="module")
def windows() -> tuple[Window, ...]:
    prompts = json.loads((tiny.TESTS / "fixtures/prompts/hybrid-chat-mtp.json").read_text())
    ids = [t for kind in ("dialogues", "stories") for p in prompts[kind] for t in p][:1500]
    return make_windows(ids, 512)


def found(windows: tuple[Window, ...], precision: str) -> TokenScores:
    mode = Mode(Compute(precision, 2))  # type: ignore[arg-type]
    with Checkpoint.open(CARRIED) as checkpoint:
        model = Model(checkpoint)
        return score(Source(model, windows, mode), windows, mode, Progress())


@pytest.fixture(scope="module")
def expected(windows: tuple[Window, ...]) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(
        CARRIED, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    rows = []
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor(window.tokens)
            logits = model(ids[None]).logits[0, :-1].double()
            rows.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
    return torch.cat(rows)


def test_perplexity_is_that_of_transformers(
    windows: tuple[Window, ...], expected: torch.Tensor
) -> None:
    nll = found(windows, "f32").nll
    assert len(nll) == len(expected) == 1500 - 3
    ratio = float(np.exp(nll.mean() - expected.numpy().mean()))
    assert abs(ratio - 1) <= PERPLEXITY_TOLERANCE
    assert np.abs(nll - expected.numpy()).max() <= TOKEN_TOLERANCE


def test_bf16_activations_cost_less_than_a_per_mille(
    windows: tuple[Window, ...], expected: torch.Tensor
) -> None:
    nll = found(windows, "bf16").nll
    assert np.exp(nll.mean() - expected.numpy().mean()) == pytest.approx(1, abs=5e-3)
    assert not np.array_equal(nll, found(windows, "f32").nll)


def test_a_model_does_not_differ_from_itself(windows: tuple[Window, ...]) -> None:
    mode = Mode(Compute("bf16", 2))
    with Checkpoint.open(CARRIED) as checkpoint:
        model = Model(checkpoint)
        sources = [Source(model, windows, mode) for _ in range(2)]
        same = compare(*sources, windows, mode, Progress())
        alone = score(sources[0], windows, mode, Progress())
    assert np.array_equal(same.kl, np.zeros(len(same.kl)))
    assert np.array_equal(same.reference_nll, alone.nll)
    assert np.array_equal(same.position, alone.position)
    assert same.position.min() == 1


def test_the_card_s_perplexity_of_dialogues(windows: tuple[Window, ...]) -> None:
    """7.21 on its 16,384 tokens; these few are of the same kind, so near it and no more."""
    nll = found(windows[:1], "f32").nll
    assert 3 < np.exp(nll.mean()) < 20


def private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def test_memory_does_not_grow_with_the_text() -> None:
    """Results kept between logits once tore the heap apart: 16 MB more with every window."""
    mode = Mode(Compute("bf16", 2))
    cut = make_windows(np.arange(120 * 512) % 4000, 512)
    with Checkpoint.open(CARRIED) as checkpoint:
        model = Model(checkpoint)
        hidden = torch.randn((512, model.network.dims.hidden))
        assert all(len(w.tokens) == 512 for w in cut)

        class Fixed:
            head = model.head

            def __init__(self, count: int) -> None:
                self.count = count

            def normed(self) -> Any:
                return ((i, hidden) for i in range(self.count))

        compare(Fixed(10), Fixed(10), cut[:10], mode, Progress())
        before = private_bytes()
        compare(Fixed(len(cut)), Fixed(len(cut)), cut, mode, Progress())
    assert private_bytes() - before < 400e6  # it was 1.9 GB
