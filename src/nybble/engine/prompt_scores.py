"""What a model thought of a prompt: log-probabilities of its tokens from rows of logits.

Knows one sequence and the rows that its share of a step gave.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nybble.engine.request import Alternative, PromptLogprobs
from nybble.engine.sequence import Sequence
from nybble.errors import EngineError
from nybble.kernels.compute import Compute
from nybble.kernels.vocabulary import log_likelihood
from nybble.models.threads import torch_alone


def score(
    sequence: Sequence, start: int, logits: Tensor, compute: Compute, explain: Callable[[], str]
) -> None:
    """Add what logits [R, V] tell that follow the tokens from `start` on.

    The row of a prompt's last token tells nothing of the prompt. Raises EngineError for NaN, which
    names the position, and what of the model is the reason, if `explain` knows.
    """
    if not sequence.scores:
        sequence.scores.append(None)
        sequence.alternatives.append(())
    prompt = sequence.request.prompt
    targets = prompt[start + 1 : start + 1 + len(logits)]
    if not targets:
        return
    rows = logits[: len(targets)]
    found = log_likelihood(rows, torch.tensor(targets, dtype=torch.int64), compute)
    losses = found.nll.tolist()
    for at, loss in enumerate(losses, start + 1):
        if math.isnan(loss):
            culprit = explain() or "see what `nybble check --deep` says"
            raise EngineError(
                f"the logits after {at} tokens of the prompt are NaN or infinite; the checkpoint "
                f"is damaged: {culprit}"
            )
    sequence.scores += [-loss for loss in losses]
    sequence.alternatives += _alternatives(
        rows, found.log_sum, sequence.request.params.prompt_logprobs or 0
    )


def told(sequence: Sequence) -> PromptLogprobs:
    """The scores of a whole prompt, once."""
    sequence.is_scored = True
    return PromptLogprobs(tuple(sequence.scores), tuple(sequence.alternatives))


def _alternatives(rows: Tensor, log_sum: Tensor, count: int) -> list[tuple[Alternative, ...]]:
    """The likeliest `count` tokens of each row, best first, of equal ones the lower id first."""
    if not count:
        return [()] * len(rows)
    with torch_alone():
        found = torch.topk(rows, min(count, rows.shape[1]))
    logprobs = (found.values.double() - log_sum[:, None]).tolist()
    return [
        tuple(Alternative(token, logprob) for logprob, token in _ordered(values, ids))
        for values, ids in zip(logprobs, found.indices.tolist(), strict=True)
    ]


def _ordered(values: list[float], ids: list[int]) -> list[tuple[float, int]]:
    return sorted(zip(values, ids, strict=True), key=lambda pair: (-pair[0], pair[1]))
