"""The MTP head at work: its entries in the pages, the hidden states it reads, its guesses.

The hidden states that came with the slots of a forward and those of its tokens lie in one table,
from which entries take their rows. One program writes the entries of all tokens, then guesses, one
token of each sequence after another; a token that was guessed goes to where the next guess reads
it. A batch replays as much of the program as it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.engine.runner import Guess, Work
from nybble.engine.step_inputs import Angles, StepInputs, written_states
from nybble.errors import EngineError
from nybble.kernels.compute import Compute
from nybble.kernels.elementwise import look_up
from nybble.kernels.program import Program
from nybble.kernels.vocabulary import likeliest
from nybble.models.linear import Mode
from nybble.models.model import MTP_LAYER, Model
from nybble.models.state import Batch, PagePool, StatePool

#: So many drafts are recorded at first; who asks for more has the program recorded anew.
DRAFTS = 3


class _Ran(NamedTuple):
    """A work of the last forward: its first row of the table, where it began, how many tokens."""

    row: int
    start: int
    tokens: int


class _Entered(NamedTuple):
    """Of all entries that were written, what the layer read, [T, H], and what holds their queries,
    [T, W]."""

    joined: Tensor
    mixed: Tensor


class MtpRunner:
    """Runs the MTP head after forwards of at most `tokens` tokens of `sequences` sequences."""

    def __init__(
        self,
        model: Model,
        pages: PagePool,
        states: StatePool,
        angles: Angles,
        tokens: int,
        sequences: int,
        mode: Mode,
    ) -> None:
        """Raises EngineError for a model without a head, and for pools that were made without."""
        if states.hidden is None or MTP_LAYER not in pages.layers or model.mtp is None:
            raise EngineError(
                "drafting by the MTP head was asked for, but the checkpoint has none, or its pools "
                "were made without has_mtp; draft without it"
            )
        self._model, self._pages, self._mode = model, pages, mode
        self._sequences, self._angles = sequences, angles
        self._table = torch.zeros((sequences + tokens, model.network.dims.hidden))
        # A sequence may have one entry more than the forward had tokens.
        rows = tokens + sequences
        self._inputs = StepInputs(angles, rows, sequences, pages.page_tokens)
        self._index = torch.zeros(rows, dtype=torch.int64)
        self._ahead = _Ahead(DRAFTS, sequences)
        self._ran: list[_Ran | None] = []
        self._beside: Program | None = None
        self._program: Program | None = None
        self._ends: list[int] = []
        #: Of the first guesses, float32 [sequences, V].
        self.logits = torch.empty(0)
        self._held, self._rows = states.hidden.numpy(), self._table.numpy()
        self._numbers, self._indices = np.arange(len(self._table)), self._index.numpy()

    @property
    def normed(self) -> Tensor:
        """Where a forward puts the final normed hidden states of its tokens, float32 [T, H]."""
        return self._table[self._sequences :]

    @property
    def nbytes(self) -> int:
        """What it takes beside the pools, the angles, the weights, and the memory of programs."""
        return self._table.nbytes + self._inputs.nbytes + self._index.nbytes + self._ahead.nbytes

    def record(self, beside: Program) -> None:
        """Write its program down, in the memory of that one."""
        most, sequences = len(self._index), self._sequences
        program = Program(tokens=most, sequences=sequences, outputs=sequences, beside=beside)
        parts = (self._inputs, self._index, self._table, self._ahead, self._angles)
        program.keep((self._model, self._pages, parts))
        mode = Mode(Compute(self._mode.compute.precision, self._mode.compute.threads, program))
        with program.recording():
            entered = self._enter(sequences, most, mode)
            self._ends = [len(program.names)]
            with program.counting("sequences"):
                hidden = self._guess_first(entered, sequences, mode)
                del entered
                self._ends.append(len(program.names))
                for ahead in range(1, self._ahead.drafts):
                    hidden = self._guess_next(hidden, ahead, sequences, mode)
                    self._ends.append(len(program.names))
        self._beside, self._program = beside, program

    # ------------------------------------------------------------------------- around a forward

    def begin(self, works: Sequence[Work]) -> bool:
        """Before a forward: set aside the hidden states that come with the slots it reads. Whether
        there is something to finish, since hidden states of some work are to be kept."""
        self._ran = [None] * len(works)
        found, held, rows = False, self._held, self._rows
        for i, work in enumerate(works):
            if work.has_hidden:
                rows[i] = held[work.slot] if work.length else 0.0
                found = True
        return found

    def finish(self, works: Sequence[Work]) -> None:
        """After a forward: hidden states go where it wrote the states of their tokens."""
        held, rows, at, ran = self._held, self._rows, self._sequences, self._ran
        for i, work in enumerate(works):
            if work.has_hidden:
                for count, slot in written_states(work):
                    held[slot] = rows[at + count - 1]
                ran[i] = _Ran(at, work.length, len(work.tokens))
            at += len(work.tokens)

    # --------------------------------------------------------------------------------- guessing

    def guess(self, guesses: Sequence[Guess]) -> list[list[int]]:
        """See `runner.Runner`. Raises EngineError, before anything is written, for what the last
        forward did not run, or ran without hidden states, and for positions without a page."""
        self._check(guesses)
        found: list[list[int]] = [[] for _ in guesses]
        for part in self._parts(guesses):
            for i, drafts in zip(part, self.draft([guesses[i] for i in part]), strict=True):
                found[i] = drafts
        return found

    def _parts(self, guesses: Sequence[Guess]) -> Iterator[list[int]]:
        """Numbers of guesses to run at once. Several choices of one prompt all miss the same
        entries, together perhaps more than a forward has tokens."""
        part, room = list[int](), len(self._index)
        # Those that guess furthest come first, so that those that go on are the first ones.
        for i in sorted(range(len(guesses)), key=lambda i: -guesses[i].drafts):
            count = len(guesses[i].tokens)
            if count > room:
                yield part
                part, room = [], len(self._index)
            part.append(i)
            room -= count
        if part:
            yield part

    def draft(self, guesses: Sequence[Guess]) -> list[list[int]]:
        """Entries and drafts of checked guesses that fit, those with most drafts first."""
        most = guesses[0].drafts
        if most > self._ahead.drafts:
            self._lengthen(most)
        tokens = self._fill(guesses)
        counts = [len(guesses)] + [sum(g.drafts > ahead for g in guesses) for ahead in range(most)]
        if self._program is None:
            self._compute(counts, tokens)
        else:
            self._replay(self._program, counts, tokens)
        return [self._ahead.found[: guess.drafts, i].tolist() for i, guess in enumerate(guesses)]

    def _lengthen(self, drafts: int) -> None:
        self._ahead = _Ahead(drafts, self._sequences)
        if self._beside is not None:
            self.record(self._beside)

    def _fill(self, guesses: Sequence[Guess]) -> int:
        """Write the tokens down whose entries are missing; how many there are."""
        at = 0
        for i, guess in enumerate(guesses):
            end = self._inputs.put(i, at, guess.tokens, guess.start, guess.pages)
            ran = self._ran[guess.work]
            assert ran is not None
            row = ran.row + guess.start - ran.start - 1  # of the hidden state before
            self._indices[at:end] = self._numbers[row : row + end - at]
            if guess.start == ran.start:
                self._indices[at] = guess.work
            last = guess.start + len(guess.tokens) - 1
            self._ahead.put(i, end - 1, last)
            self._angles.reach(last, last + max(guess.drafts, 1))
            at = end
        return at

    def _replay(self, program: Program, counts: Sequence[int], tokens: int) -> None:
        """The entries and each guess for as many sequences as there are; where as many go on, in
        one call."""
        begin, ends = 0, self._ends
        for ahead, count in enumerate(counts):
            if ahead + 1 == len(counts) or counts[ahead + 1] != count:
                program.run(tokens=tokens, sequences=count, outputs=0, calls=(begin, ends[ahead]))
                begin = ends[ahead]

    def _compute(self, counts: Sequence[int], tokens: int) -> None:
        """The same without a program."""
        entered = self._enter(counts[0], tokens, self._mode)
        hidden = torch.empty(0)
        for ahead, count in enumerate(counts[1:]):
            if ahead:
                hidden = self._guess_next(hidden[:count], ahead, count, self._mode)
            else:
                hidden = self._guess_first(entered, count, self._mode)

    # ---------------------------------------------------------------------- what is recorded

    def _enter(self, sequences: int, tokens: int, mode: Mode) -> _Entered:
        """Write the entries of all tokens."""
        hidden = look_up(self._rows, self._index[:tokens], mode.compute)
        batch = self._inputs.batch(sequences, tokens, mode.compute)
        return _Entered(*self._model.mtp_enter(batch, hidden, self._pages, mode))

    def _guess_first(self, entered: _Entered, count: int, mode: Mode) -> Tensor:
        """Guess what follows the last token of so many sequences, float32 [count, H]: the hidden
        state that the next guess begins with."""
        last = self._ahead.last[:count]
        joined, mixed = (look_up(rows.numpy(), last, mode.compute) for rows in entered)
        batch = self._batch(0, count, mode.compute)
        normed = self._model.mtp_leave(joined, mixed, batch, self._pages, mode)
        self.logits = self._choose(normed, 0, mode)
        return normed

    def _guess_next(self, hidden: Tensor, ahead: int, count: int, mode: Mode) -> Tensor:
        """Guess what follows the `ahead` tokens guessed before."""
        batch = self._batch(ahead, count, mode.compute)
        normed = self._model.mtp_forward(batch, hidden, self._pages, mode)
        self._choose(normed, ahead, mode)
        return normed

    def _choose(self, normed: Tensor, ahead: int, mode: Mode) -> Tensor:
        """The most likely next token of each; of equals the lowest."""
        logits = self._model.draft_logits(normed, mode)
        likeliest(logits, self._ahead.tokens[ahead][: len(normed)], mode.compute)
        return logits

    def _batch(self, ahead: int, count: int, compute: Compute) -> Batch:
        """One token of each sequence: the last known one, or one that was guessed."""
        known, next_ones = self._inputs, self._ahead
        return Batch(
            next_ones.tokens[ahead - 1][:count],
            next_ones.starts[: count + 1],
            next_ones.lengths[ahead][:count],
            known.table[:count],
            known.slots[:count],
            known.writes[:count],
            *self._angles.look_up(next_ones.positions[ahead][:count], compute),
            known.recurrent[:count],
        )

    # --------------------------------------------------------------------------------- checking

    def _check(self, guesses: Sequence[Guess]) -> None:
        """The kernels trust every number of a batch: each is looked at here."""
        if len(guesses) > self._sequences:
            raise EngineError(f"{len(guesses)} guesses at once, made for {self._sequences}")
        for guess in guesses:
            self._check_ran(guess)
            self._check_room(guess)

    def _check_ran(self, guess: Guess) -> None:
        if not 0 <= guess.work < len(self._ran) or not guess.tokens or guess.drafts < 0:
            raise EngineError(
                f"a guess of {guess.drafts} drafts after {len(guess.tokens)} tokens of work "
                f"{guess.work}; the last forward had {len(self._ran)} works"
            )
        ran, end = self._ran[guess.work], guess.start + len(guess.tokens)
        if ran is None:
            raise EngineError(
                f"a guess for work {guess.work}, which the last forward ran with has_hidden=False; "
                "expected a work whose hidden states were kept"
            )
        if not ran.start <= guess.start < end <= ran.start + ran.tokens + 1:
            raise EngineError(
                f"entries {guess.start} to {end - 1} of the MTP head, but the last forward ran "
                f"{ran.start} to {ran.start + ran.tokens - 1}: expected those, or one more"
            )
        vocab = self._model.network.dims.vocab
        if not 0 <= min(guess.tokens) <= max(guess.tokens) < vocab:
            raise EngineError(
                f"token ids from {min(guess.tokens)} to {max(guess.tokens)}, but the vocabulary "
                f"has {vocab:,}"
            )

    def _check_room(self, guess: Guess) -> None:
        size, count = self._pages.page_tokens, self._pages.numbers.count
        end = guess.start + len(guess.tokens) - 1 + max(guess.drafts, 1)
        needed = -(-end // size)
        pages = guess.pages[:needed]
        if len(pages) < needed or not 0 <= min(pages) <= max(pages) < count:
            raise EngineError(
                f"a guess up to position {end - 1} needs {needed} pages of {size}; found "
                f"{len(guess.pages)}, of a pool of {count}"
            )
        if end > self._inputs.context:
            raise EngineError(
                f"a guess up to position {end - 1}, made for a context of {self._inputs.context}"
            )


class _Ahead:
    """Where guesses are counted from and go to, in memory whose addresses a program holds.

    `last` int64 [B] is the row of each sequence's last known token among the entries, `tokens`
    int64 [K, B] what is guessed to follow it, `positions` int64 and `lengths` int32 [K, B] where
    the token stands that a guess follows.
    """

    def __init__(self, drafts: int, sequences: int) -> None:
        self.drafts = drafts
        self.starts = torch.arange(sequences + 1, dtype=torch.int32)
        self.last = torch.zeros(sequences, dtype=torch.int64)
        self.tokens = torch.zeros((drafts, sequences), dtype=torch.int64)
        self.positions = torch.zeros((drafts, sequences), dtype=torch.int64)
        self.lengths = torch.zeros((drafts, sequences), dtype=torch.int32)
        self.found: NDArray[np.int64] = self.tokens.numpy()
        self._last, self._steps = self.last.numpy(), np.arange(drafts)
        self._positions, self._lengths = self.positions.numpy(), self.lengths.numpy()

    @property
    def nbytes(self) -> int:
        """What the buffers take."""
        found = (self.starts, self.last, self.tokens, self.positions, self.lengths)
        return sum(t.nbytes for t in found)

    def put(self, row: int, entry: int, position: int) -> None:
        """A sequence's last known token: which entry it is, and where it stands."""
        self._last[row] = entry
        positions = self._steps + position
        self._positions[:, row] = positions
        self._lengths[:, row] = positions
