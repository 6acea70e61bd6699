"""Forward passes for an engine: work of some sequences in, logits out.

`Work` holds no tensors, so that a scheduler, and its tests, need none. `model_runner.ModelRunner`
computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence's share of a step.

    `tokens` are run after the `length` that the state in `pages` and `slot` holds. `is_recurrent`:
    through the kernels of decoding, as generated tokens are; else in chunks, whose starts are
    multiples of 64. `outputs`: of how many of the last tokens logits are wanted.
    """

    tokens: Sequence[int]
    pages: Sequence[int]
    slot: int
    length: int
    is_recurrent: bool
    outputs: int = 0


class Runner(Protocol):
    """Who computes. Logits are the same bits however work is divided over steps and batches."""

    @property
    def vocab(self) -> int:
        """How many logits a row has."""
        ...

    def forward(self, works: Sequence[Work]) -> Tensor:
        """Run a batch; the logits float32 [sum of outputs, V], in the order of the works. They may
        be overwritten by the next call."""
        ...

    def copy(
        self, from_pages: Sequence[int], to_pages: Sequence[int], from_slot: int, to_slot: int
    ) -> None:
        """Give another sequence the same state."""
        ...

    def describe(self) -> str:
        """All about how it computes that decides about bits."""
        ...

    def explain(self) -> str:
        """Why logits are NaN: what of the model holds NaN itself; "" if nothing does."""
        ...
