"""An MTP head made of a model's own layer, and drafts that are right as often as is asked.

For models without a trained head: the head costs what a real one of that width does, since it is
computed in full; then its guesses are replaced by the text that is known to come, now and then by a
wrong token. So what is measured is what drafting would give at that acceptance, all its costs
included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from nybble.checkpoint.reader import Checkpoint
from nybble.engine.drafter import Ask, Drafter, MtpDrafter
from nybble.engine.engine import Engine, EngineOptions
from nybble.engine.model_runner import ModelRunner, StepSize
from nybble.engine.sampler import Sampler
from nybble.engine.speculation import Speculation
from nybble.kernels.block_matmul import prepare
from nybble.kernels.compute import Compute, Precision
from nybble.models.attention import Attention
from nybble.models.linear import Linear
from nybble.models.model import Model
from nybble.models.mtp import MtpHead
from nybble.models.numbers import Numbers
from nybble.text.tokenizer import Tokenizer

#: Tokens of a text by its prompt.
Answers = Mapping[tuple[int, ...], Sequence[int]]


def plant_head(model: Model) -> None:
    """Give a model an MTP head: its middle layer of attention, so that no cache still holds the
    weights after a forward, behind an fc of random BF16."""
    dims, offset = model.network.dims, model.network.architecture.norm_offset
    attention = [layer for layer in model.layers if isinstance(layer.mixer, Attention)]
    chosen = attention[len(attention) // 2]
    assert isinstance(chosen.mixer, Attention)
    draw = np.random.default_rng(0).standard_normal((dims.hidden, 2 * dims.hidden), np.float32)
    fc = (draw * np.float32(0.02)).astype(ml_dtypes.bfloat16)
    norm = torch.full((dims.hidden,), 0.0 if offset else 1.0)
    model.mtp = MtpHead(
        model.network,
        Linear(("mtp.fc",), prepare([fc], name="mtp.fc")),
        norm,
        norm,
        replace(chosen, name="mtp.layers.0", mixer=replace(chosen.mixer, first=1)),
        norm,
    )


class Oracle:
    """Has a drafter compute, and answers from what it knows, wrong at some positions of a text: of
    each, so often as not `acceptance`, drawn once."""

    needs_hidden = True

    def __init__(self, drafter: Drafter, acceptance: float, vocab: int, seed: int = 0) -> None:
        self.answers: Answers = {}
        self._drafter, self._vocab = drafter, vocab
        self._is_right = np.random.default_rng(seed).random(1 << 16) < acceptance

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        """As many as the drafter found."""
        found = self._drafter.draft(asks)
        return [
            self._known(ask, len(drafts)) if drafts else []
            for ask, drafts in zip(asks, found, strict=True)
        ]

    def _known(self, ask: Ask, count: int) -> list[int]:
        start = len(ask.output)
        text = self.answers[tuple(ask.prompt)][start : start + count]
        first = sum(ask.prompt) + start  # the texts of a batch are wrong at different positions
        return [
            token
            if self._is_right[(first + at) % len(self._is_right)]
            else (token + 1) % self._vocab
            for at, token in enumerate(text)
        ]

    def drop(self, key: int) -> None:
        """Forget a sequence."""
        self._drafter.drop(key)


class Planted:
    """A checkpoint with a planted head, and engines over one runner of it."""

    def __init__(
        self,
        folder: Path,
        *,
        sequences: int,
        context: int,
        drafts: int,
        lanes: int = 1,
        precision: Precision = "bf16",
        threads: int = 1,
    ) -> None:
        """For so many engines at once, with pages and slots of their own."""
        model = Model(Checkpoint.open(folder))
        if model.mtp is None:
            plant_head(model)
        self.tokenizer = Tokenizer.open(folder)
        self.context = context
        dims = model.network.dims
        self.slots_each = 1 + drafts if any(map(model.network.is_linear, range(dims.layers))) else 1
        self.sizes = EngineOptions(sequences, draft_tokens=drafts)
        self.pages = sequences * -(-context // self.sizes.page_tokens)
        self.slots = sequences * self.slots_each
        self.runner = ModelRunner(
            model,
            model.page_pool(lanes * self.pages, self.sizes.page_tokens, has_mtp=True),
            model.state_pool(lanes * self.slots, has_mtp=True),
            StepSize(
                self.sizes.max_batched_tokens,
                sequences,
                self.sizes.max_outputs(dims.vocab),
                context,
            ),
            Compute(precision, threads),
            has_mtp=True,
        )

    def oracle(self, acceptance: float) -> Oracle:
        """Drafts that are right so often."""
        return Oracle(MtpDrafter(self.runner), acceptance, self.runner.vocab)

    def engine(self, drafter: Drafter, most: int, *, is_fixed: bool, lane: int = 0) -> Engine:
        """An engine that knows nothing yet of times and acceptance: with as many drafts as pay, or
        always the most. Of those made for a lane, one may run at a time."""
        sizes = replace(self.sizes, draft_tokens=most)
        return Engine(
            self.runner,
            self.tokenizer,
            sizes,
            Numbers(self.pages, "pages", lane * self.pages),
            Numbers(self.slots, "slots", lane * self.slots, each=self.slots_each),
            self.context,
            Sampler(self.runner.vocab, self.runner.mode.compute),
            drafter=drafter,
            speculation=Speculation(most, most if is_fixed else None),
            slots_each=self.slots_each,
        )
