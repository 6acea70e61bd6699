"""Forward passes for an engine: work of some sequences in, logits out, and guesses of what follows.

`Work` and `Guess` hold no tensors, so that a scheduler, and its tests, need none.
`model_runner.ModelRunner` computes.
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

    `writes` are pairs of a count and a slot, counts rising: the recurrent state after the first
    `count` tokens goes to that slot; the last is that after all tokens. Of chunks all counts but
    the last end at a multiple of 64. Empty: the state after all tokens goes to `slot`, where it was
    read. A slot that nobody writes may be read by many.

    `has_hidden`: where there is an MTP head, the hidden states that it reads are kept, for `guess`
    and beside each written state. Without, nothing can be guessed for the work, nor by the head for
    what begins from the states that it wrote.
    """

    tokens: Sequence[int]
    pages: Sequence[int]
    slot: int
    length: int
    is_recurrent: bool
    outputs: int = 0
    writes: Sequence[tuple[int, int]] = ()
    has_hidden: bool = True


@dataclass(frozen=True, slots=True)
class Guess:
    """What the MTP head is to compute for a sequence after a step.

    The head's entry at a position comes of the token there and the trunk's hidden state at the
    position before. `tokens` are those at `start` and after it, whose entries are missing; `work`
    is the number of the last forward's work that ran the positions before them, or, for the first
    token, began right there: then the hidden state that came with the slot it read is used. The
    entries go to `pages`, beside the trunk's. `drafts` tokens are guessed to follow the last one,
    0 for none; the entries of all but the last draft go to `pages` too, and are overwritten when
    their tokens are known.
    """

    work: int
    tokens: Sequence[int]
    pages: Sequence[int]
    start: int
    drafts: int = 0


class Runner(Protocol):
    """Who computes. Logits are the same bits however work is divided over steps and batches."""

    @property
    def vocab(self) -> int:
        """How many logits a row has."""
        ...

    def forward(self, works: Sequence[Work]) -> Tensor:
        """Run a batch; the logits float32 [sum of outputs, V], in the order of the works. They may
        be overwritten by the next call, also of `guess`. With each written state of a work that
        has hidden states goes that of its last token, where there is an MTP head."""
        ...

    def guess(self, guesses: Sequence[Guess]) -> list[list[int]]:
        """After a forward: fill the MTP head's entries, and guess; for each what it asked for.
        Guesses are greedy, and the same however they are divided over batches."""
        ...

    def copy(
        self, from_pages: Sequence[int], to_pages: Sequence[int], from_slot: int, to_slot: int
    ) -> None:
        """Give another sequence the same state: pages, recurrent state, and hidden state. No pages:
        the slot alone, as a snapshot is."""
        ...

    def describe(self) -> str:
        """All about how it computes that decides about bits."""
        ...

    def explain(self) -> str:
        """Why logits are NaN: what of the model holds NaN itself; "" if nothing does."""
        ...
