"""How often the MTP head's first guess is the token that the trunk itself takes for the likeliest.

Teacher-forced: head and trunk both see the text's own tokens, so every position of every window
counts and two checkpoints are held against each other position by position. That is the acceptance
of one greedy draft where the text is the model's own; on other text both are less sure, and the
share is lower. Under sampling, and for further drafts, figures differ (docs/engine.md).

What a quantized head costs is the difference, paired, on the same text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import tee

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.errors import EvaluationError
from nybble.evaluate.score import logits_rows
from nybble.evaluate.significance import Estimate, mean_estimate, mean_estimates
from nybble.models.linear import Mode
from nybble.models.model import Model
from nybble.progress import Progress
from nybble.stream.drafts import draft_states
from nybble.stream.executor import Stream


@dataclass(frozen=True, slots=True)
class Drafts:
    """Per judged position: its window, the token that the trunk takes for the likeliest, and the
    head's guess of it. All int64 [positions]."""

    window: NDArray[np.int64]
    trunk: NDArray[np.int64]
    guess: NDArray[np.int64]

    @property
    def is_right(self) -> NDArray[np.float64]:
        """1 where the guess would be accepted."""
        return np.asarray(self.guess == self.trunk, dtype=np.float64)

    def share(self) -> Estimate:
        """The share of guesses that would be accepted, with its interval over windows."""
        return mean_estimate(self.is_right, self.window)


@dataclass(frozen=True, slots=True)
class Change:
    """Acceptance before and after, and the difference after - before on the same positions.

    `same_trunk`: how often both trunks take the same token for the likeliest; what the trunk lost
    is no fault of the head.
    """

    before: Estimate
    after: Estimate
    difference: Estimate
    same_trunk: float
    positions: int

    def as_json(self) -> dict[str, object]:
        """For a report."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Lines of a table: what, and the figure in percent with its interval."""
        return [
            ("drafts accepted before", _percent(self.before)),
            ("drafts accepted after", _percent(self.after)),
            ("difference", _percent(self.difference, signed=True)),
            ("same first choice of the trunk", f"{100 * self.same_trunk:.1f} %"),
            ("positions", f"{self.positions:,}"),
        ]


def measure_drafts(
    model: Model,
    windows: Sequence[Tensor],
    mode: Mode,
    *,
    firsts: Sequence[int] | None = None,
    limit_bytes: int | None = None,
    progress: Progress | None = None,
) -> Drafts:
    """Run trunk and head over `windows`, int64 [length] each.

    Positions from `firsts` on are judged (the last of a prompt, where its answer is meant; default
    and least 1: before the first hidden state there is nothing to guess from). Raises
    EvaluationError for a model without an MTP head and for text with nothing to judge, and what a
    streamed forward raises.
    """
    if model.mtp is None:
        raise EvaluationError(
            f"{model.weights.checkpoint.path}: has no MTP head, so there is no draft to judge"
        )
    starts = [max(1, first) for first in firsts or [1] * len(windows)]
    judged = [(w, at) for w, at in zip(windows, starts, strict=True) if len(w) > at]
    if not judged:
        raise EvaluationError("no window has two tokens to judge: there is no draft")
    long, starts = [w for w, _ in judged], [at for _, at in judged]
    stream = Stream(model, long, mode, limit_bytes=limit_bytes, progress=progress, title="drafts")
    stream.run()
    which, trunk, guess = [], [], []
    for i, normed, drafted in _both(model, stream, mode):
        trunk.append(_likeliest(model, normed[starts[i] :], mode))
        guess.append(_likeliest(model, drafted[starts[i] :], mode))
        which.append(np.full(len(normed) - starts[i], i))
    stream.close()
    return Drafts(*(np.concatenate(x) for x in (which, trunk, guess)))


def change(before: Drafts, after: Drafts) -> Change:
    """What a checkpoint's drafts lost or won against another's, on the same windows.

    Raises EvaluationError if the windows differ.
    """
    if not np.array_equal(before.window, after.window):
        raise EvaluationError(
            f"drafts at {len(before.window):,} and {len(after.window):,} positions: they are not "
            "of the same windows; measure both checkpoints on one text"
        )
    old, new = before.is_right, after.is_right
    values = np.stack((old, new, new - old), axis=1)
    first, second, difference = mean_estimates(values, before.window)
    same = float((before.trunk == after.trunk).mean())
    return Change(first, second, difference, same, len(old))


def _both(model: Model, stream: Stream, mode: Mode) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The normed hidden states of trunk and head, window by window."""
    ours, heads = tee(stream.normed())
    drafted = draft_states(model, stream.windows, heads, mode)
    for (i, normed), (j, found) in zip(ours, drafted, strict=True):
        assert i == j
        yield i, normed, found


def _likeliest(model: Model, normed: Tensor, mode: Mode) -> NDArray[np.int64]:
    """The token with the largest logit of each row; the model's own head judges and guesses."""
    step = logits_rows(model.head.weight.n)
    tokens = [
        model.logits(normed[at : at + step].contiguous(), mode).argmax(-1)
        for at in range(0, len(normed), step)
    ]
    return torch.cat(tokens).numpy()


def _percent(estimate: Estimate, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    value = f"{100 * estimate.value:{sign}.1f} %"
    if estimate.interval is None:
        return value
    low, high = (100 * x for x in (estimate.interval.low, estimate.interval.high))
    return f"{value} [{low:{sign}.1f}, {high:{sign}.1f}]"
