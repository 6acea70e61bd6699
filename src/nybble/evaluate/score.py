"""From hidden states to what is judged: log-likelihoods, and the divergence of two models.

Logits exist for a few rows at a time, of both models where two are compared, over the whole
vocabulary. What goes in is a source of final normed hidden states and a head: a streamed model, or
a reference pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.errors import EvaluationError
from nybble.evaluate.windows import Window
from nybble.kernels.vocabulary import divergence, log_likelihood
from nybble.models.linear import Linear, Mode
from nybble.progress import Progress

#: Bytes of logits that exist at once, of one model.
LOGITS_BYTES = 1 << 28
#: Of a divergence, in the order of TokenDivergence.
_COLUMNS = (
    *("kl", "reference_nll", "candidate_nll"),
    *("reference_top", "candidate_top", "reference_p", "candidate_p"),
)


def logits_rows(vocabulary: int) -> int:
    """How many rows of logits exist at once."""
    return max(1, min(1024, LOGITS_BYTES // (4 * vocabulary)))


def logits_bytes(vocabulary: int) -> int:
    """What they take, of one model."""
    return 4 * vocabulary * logits_rows(vocabulary)


class HiddenSource(Protocol):
    """Final normed hidden states of windows, and the head that reads them."""

    @property
    def head(self) -> Linear:
        """The output head [V, H]."""
        ...

    def normed(self) -> Iterator[tuple[int, Tensor]]:
        """Window number and float32 [length, H], in the order of the windows."""
        ...


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Per scored token: its window, its position there, its negative log-likelihood in nats
    (float64), and the likeliest token instead."""

    window: NDArray[np.int64]
    position: NDArray[np.int64]
    nll: NDArray[np.float64]
    top: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TokenDivergence:
    """Per scored token: KL(reference || candidate) in nats, and both sides' view of the token."""

    window: NDArray[np.int64]
    position: NDArray[np.int64]
    kl: NDArray[np.float64]
    reference_nll: NDArray[np.float64]
    candidate_nll: NDArray[np.float64]
    reference_top: NDArray[np.int64]
    candidate_top: NDArray[np.int64]
    reference_p: NDArray[np.float64]
    candidate_p: NDArray[np.float64]


def score(
    source: HiddenSource, windows: Sequence[Window], mode: Mode, progress: Progress
) -> TokenScores:
    """The log-likelihood of every scored token. Raises EvaluationError for NaN."""
    count = sum(w.scored_count for w in windows)
    # Filled in place: small results kept between large ones would tear the heap apart, and the
    # logits' memory could not be used again.
    nll, top = np.empty(count), np.empty(count, dtype=np.int64)
    progress.stage("likelihoods", count, unit="tokens")
    at = 0
    for i, normed in source.normed():
        for rows, targets in _pieces(windows[i], normed, source.head.weight.n):
            part = log_likelihood(source.head(rows, mode), targets, mode.compute)
            stop = at + len(targets)
            nll[at:stop], top[at:stop] = part.nll.numpy(), part.top.numpy()
            at = stop
            progress.advance(len(targets))
    where = _places(windows)
    _refuse_nan(nll, where, "the log-likelihood")
    return TokenScores(*where, nll, top)


def compare(
    reference: HiddenSource,
    candidate: HiddenSource,
    windows: Sequence[Window],
    mode: Mode,
    progress: Progress,
) -> TokenDivergence:
    """The divergence of two models at every scored token, exact over the whole vocabulary.

    Raises EvaluationError if their vocabularies differ in size, and for NaN.
    """
    sizes = reference.head.weight.n, candidate.head.weight.n
    if sizes[0] != sizes[1]:
        raise EvaluationError(
            f"the reference has a vocabulary of {sizes[0]:,} and the candidate of {sizes[1]:,}: "
            "they are not of one model"
        )
    count = sum(w.scored_count for w in windows)
    columns = {
        name: np.empty(count, dtype=np.int64 if name.endswith("_top") else np.float64)
        for name in _COLUMNS
    }
    progress.stage("divergence", count, unit="tokens")
    at = 0
    for (i, ours), (j, theirs) in zip(reference.normed(), candidate.normed(), strict=True):
        assert i == j
        pairs = zip(
            _pieces(windows[i], ours, sizes[0]), _pieces(windows[i], theirs, sizes[0]), strict=True
        )
        for (a, targets), (b, _) in pairs:
            logits = reference.head(a, mode), candidate.head(b, mode)
            part = divergence(*logits, targets, mode.compute)
            stop = at + len(targets)
            for name, column in columns.items():
                column[at:stop] = getattr(part, name).numpy()
            at = stop
            progress.advance(len(targets))
    where = _places(windows)
    found = TokenDivergence(*where, *columns.values())  # type: ignore[arg-type]
    _refuse_nan(found.reference_nll, where, "the reference's log-likelihood")
    _refuse_nan(found.kl, where, "the divergence")
    return found


def _pieces(window: Window, normed: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and the tokens they predict, a few at a time: row p predicts token p + 1."""
    tokens = torch.from_numpy(np.ascontiguousarray(window.tokens, dtype=np.int64))
    step = logits_rows(vocabulary)
    for at in range(window.first_scored, len(tokens), step):
        targets = tokens[at : at + step]
        yield normed[at - 1 : at - 1 + len(targets)].contiguous(), targets


def _places(windows: Sequence[Window]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    which = [np.full(w.scored_count, i, dtype=np.int64) for i, w in enumerate(windows)]
    where = [np.arange(w.first_scored, len(w.tokens), dtype=np.int64) for w in windows]
    return np.concatenate(which), np.concatenate(where)


def _refuse_nan(
    values: NDArray[np.float64], where: tuple[NDArray[np.int64], NDArray[np.int64]], what: str
) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        window, position = (int(w[bad[0]]) for w in where)
        raise EvaluationError(
            f"{what} of {len(bad)} of {len(values)} tokens is not finite, the first at position "
            f"{position} of window {window}: the head or the norm before it is damaged"
        )
