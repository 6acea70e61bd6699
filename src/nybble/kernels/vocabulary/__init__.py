"""What is asked of whole rows of logits: log-likelihoods and the divergence of two models, when a
model is judged, and the likeliest entry, when one guesses.

Knows rows of logits over a vocabulary; refuses to know tokens, windows and averages. Exact over the
whole vocabulary, computed in float64 from float32 logits, without a second array of their size.

`reference.py` is the definition, `cpu.py` calls the C kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from nybble.errors import EngineError, EvaluationError
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute
from nybble.kernels.tensors import check_rows, check_tensor


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """Of M rows: `nll` float64 [M], minus the log-probability of the target in nats; `top` int64
    [M], the likeliest entry; `log_sum` float64 [M], log of the sum of exp(logits)."""

    nll: Tensor
    top: Tensor
    log_sum: Tensor


@dataclass(frozen=True, slots=True)
class Divergence:
    """Of M pairs of rows: `kl` float64 [M], KL(reference || candidate) in nats, and of both sides
    the target's negative log-likelihood and probability (float64 [M]) and the likeliest entry
    (int64 [M])."""

    kl: Tensor
    reference_nll: Tensor
    candidate_nll: Tensor
    reference_top: Tensor
    candidate_top: Tensor
    reference_p: Tensor
    candidate_p: Tensor


def log_likelihood(logits: Tensor, targets: Tensor, compute: Compute) -> LogLikelihood:
    """The log-likelihood of targets int64 [M] under logits float32 [M, V].

    Ties of `top` go to the lowest entry. A row with NaN or +infinity has NaN for `nll` and
    `log_sum`, and with NaN the first NaN for `top`; -infinity is probability 0. A row's result has
    the same bits in any company and for any number of threads. Raises EvaluationError for wrong
    shapes or dtypes, and for targets outside 0 .. V - 1.
    """
    _check_logits(logits, "logits", tuple(logits.shape))
    _check_targets(targets, logits)
    return _backend().log_likelihood(logits, targets, compute)  # type: ignore[no-any-return]


def divergence(
    reference: Tensor, candidate: Tensor, targets: Tensor, compute: Compute
) -> Divergence:
    """Hold candidate logits against reference logits, both float32 [M, V]; targets int64 [M].

    KL sums p_reference * (log p_reference - log p_candidate) over the whole vocabulary: 0 exactly
    for identical rows, negative by rounding at most (about 1e-14 times the spread of the logits).
    An entry of probability 0 in the reference adds nothing; one of probability 0 in the candidate
    alone makes KL infinite. NaN, ties, bits and errors as in `log_likelihood`.
    """
    _check_logits(reference, "reference", tuple(reference.shape))
    _check_logits(candidate, "candidate", tuple(reference.shape))
    _check_targets(targets, reference)
    return _backend().divergence(  # type: ignore[no-any-return]
        reference, candidate, targets, compute
    )


def likeliest(logits: Tensor, out: Tensor, compute: Compute) -> None:
    """Write the likeliest entry of each row of logits float32 [M, V] into `out` int64 [M].

    Ties go to the lowest entry, NaN is passed over, and a row of nothing else gives 0. Rows may lie
    apart. Raises EngineError for other shapes or dtypes.
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise EngineError(f"likeliest: logits must be [M, V], V > 0, found {list(logits.shape)}")
    check_rows(logits, "likeliest", "logits", tuple(logits.shape))
    check_tensor(out, "likeliest", "out", (len(logits),), torch.int64)
    _backend().likeliest(logits, out, compute)


def _backend() -> ModuleType:
    if dispatch.choose().backend == "cpu":
        from nybble.kernels.vocabulary import cpu

        return cpu
    from nybble.kernels.vocabulary import reference

    return reference


def _check_logits(logits: Tensor, name: str, shape: tuple[int, ...]) -> None:
    is_plain = logits.dtype == torch.float32 and logits.is_contiguous() and logits.is_cpu
    if logits.ndim != 2 or logits.shape[1] == 0 or tuple(logits.shape) != shape or not is_plain:
        wanted = list(shape) if len(shape) == 2 else "[M, V]"
        raise EvaluationError(
            f"{name} must be contiguous float32 {wanted} in main memory with V > 0, found "
            f"{logits.dtype} {list(logits.shape)}{'' if logits.is_contiguous() else ', strided'}"
        )


def _check_targets(targets: Tensor, logits: Tensor) -> None:
    rows, vocabulary = logits.shape
    is_plain = targets.dtype == torch.int64 and targets.is_contiguous() and targets.is_cpu
    if tuple(targets.shape) != (rows,) or not is_plain:
        raise EvaluationError(
            f"targets must be contiguous int64 [{rows}] in main memory, "
            f"found {targets.dtype} {list(targets.shape)}"
        )
    if rows and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        raise EvaluationError(
            f"targets from {int(targets.min())} to {int(targets.max())} for a vocabulary of "
            f"{vocabulary:,}: leave out tokens that are not scored; otherwise the tokenizer "
            "belongs to another model"
        )
