"""The runner of a model: a step's numbers go into fixed buffers, and a program is replayed.

The model's own forward is recorded once, at the largest step; every smaller one is a replay with
other counts. Without compiled kernels the forward itself is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.engine.runner import Work
from nybble.errors import ContextTooLong, EngineError
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute
from nybble.kernels.elementwise import look_up
from nybble.kernels.gated_delta import CHUNK
from nybble.kernels.program import Program
from nybble.models.linear import Mode
from nybble.models.model import Model
from nybble.models.rope import Rope
from nybble.models.state import Batch, PagePool, StatePool
from nybble.models.threads import torch_alone


@dataclass(frozen=True, slots=True)
class StepSize:
    """The largest step: tokens, sequences, rows of logits, and positions of one sequence."""

    tokens: int
    sequences: int
    outputs: int
    context: int


class ModelRunner:
    """Runs a `Model` over its pools; see `runner.Runner`."""

    def __init__(
        self,
        model: Model,
        pages: PagePool,
        states: StatePool,
        most: StepSize,
        compute: Compute | None = None,
    ) -> None:
        """Raises ModelError for a checkpoint that cannot be computed, DoesNotFit without memory."""
        self.model, self.pages, self.states, self.most = model, pages, states, most
        self.mode = Mode(compute or Compute())
        self._inputs = _Inputs(model, pages.page_tokens, most)
        self._program: Program | None = None
        self._logits = torch.empty(0)
        self._reason: str | None = None
        if dispatch.choose().backend == "cpu":
            self._record()

    @property
    def vocab(self) -> int:
        """How many logits a row has."""
        return self.model.network.dims.vocab

    def describe(self) -> str:
        """All about how it computes that decides about bits: kernels, precision, pages, scales."""
        held = next(iter(self.pages.layers.values()), None)
        pages = "none" if held is None else str(held.keys.dtype)
        scales = [(p.key_scale, p.value_scale) for p in self.pages.layers.values()]
        return f"{dispatch.choose()} {self.mode.compute.precision} {pages} {scales}"

    @property
    def program(self) -> Program | None:
        """The recorded step, None where the forward itself is called."""
        return self._program

    @property
    def nbytes(self) -> int:
        """What a step takes beside the pools and the weights, at its largest."""
        arena = 0 if self._program is None else self._program.arena_bytes
        return arena + self._inputs.nbytes

    def forward(self, works: Sequence[Work]) -> Tensor:
        """The logits float32 [sum of outputs, V] of a batch, overwritten by the next call.

        Raises EngineError for work that does not fit the step or the pools, before anything is
        written; ContextTooLong for positions beyond the model's context.
        """
        self._check(works)
        tokens, outputs = self._inputs.fill(works)
        if self._program is None:
            return self._forward(len(works), tokens, outputs)
        self._program.run(tokens=tokens, sequences=len(works), outputs=outputs)
        return self._logits[:outputs]

    def copy(
        self, from_pages: Sequence[int], to_pages: Sequence[int], from_slot: int, to_slot: int
    ) -> None:
        """Give another sequence the same state: its pages and slot are written over."""
        source, target = torch.tensor(list(from_pages)), torch.tensor(list(to_pages))
        with torch_alone():
            for layer in self.pages.layers.values():
                for pool in (layer.keys, layer.values):
                    raw = pool.view(torch.uint8)  # index_copy_ knows no FP8
                    raw[target] = raw[source]
            for state in self.states.layers.values():
                state.conv[to_slot] = state.conv[from_slot]
                state.state[to_slot] = state.state[from_slot]

    def explain(self) -> str:
        """Why logits are NaN: the first tensor of the checkpoint that holds NaN or infinity, with
        its layer, "" if none does. Reads the weights once."""
        if self._reason is None:
            layers = range(self.model.network.dims.layers)
            found = (self.model.weights.damaged(number) for number in layers)
            name = next((name for name in found if name), "")
            self._reason = f"{name} holds NaN or infinity" if name else ""
        return self._reason

    # -------------------------------------------------------------------------------- recording

    def _record(self) -> None:
        most = self.most
        program = Program(tokens=most.tokens, sequences=most.sequences, outputs=most.outputs)
        mode = Mode(Compute(self.mode.compute.precision, self.mode.compute.threads, program))
        program.keep((self.model, self.pages, self.states, self._inputs))
        self.model.prepare()  # making the parts computes with torch
        with program.recording():
            normed = self.model.forward(
                self._inputs.batch(most.sequences, most.tokens), self.pages, self.states, mode
            )
            with program.counting("outputs"):
                rows = look_up(normed.numpy(), self._inputs.wanted, mode.compute)
                self._logits = self.model.logits(rows, mode)
        self._program = program

    def _forward(self, sequences: int, tokens: int, outputs: int) -> Tensor:
        batch = self._inputs.batch(sequences, tokens)
        normed = self.model.forward(batch, self.pages, self.states, self.mode)
        return self.model.logits(normed[self._inputs.wanted[:outputs]], self.mode)

    # --------------------------------------------------------------------------------- checking

    def _check(self, works: Sequence[Work]) -> None:
        """The kernels trust every number of a batch: each is looked at here."""
        tokens, outputs = sum(len(w.tokens) for w in works), sum(w.outputs for w in works)
        most = self.most
        if not works or tokens > most.tokens or len(works) > most.sequences:
            raise EngineError(
                f"a step of {tokens} tokens of {len(works)} sequences; made for 1 to {most.tokens} "
                f"of {most.sequences}"
            )
        if outputs > most.outputs:
            raise EngineError(f"a step with {outputs} rows of logits, made for {most.outputs}")
        slots = [w.slot for w in works]
        if self.states.layers and (
            len(set(slots)) < len(slots) or not 0 <= min(slots) <= max(slots) < self._slots
        ):
            raise EngineError(f"a step with slots {slots} of {self._slots}, each once")
        for work in works:
            self._check_work(work)

    def _check_work(self, work: Work) -> None:
        end, size = work.length + len(work.tokens), self.pages.page_tokens
        if end > self.most.context:
            raise ContextTooLong(
                f"{end:,} tokens, but the context is {self.most.context:,}; shorten the prompt"
            )
        if not work.tokens or not 0 <= work.outputs <= len(work.tokens) or work.length < 0:
            raise EngineError(
                f"work of {len(work.tokens)} tokens after {work.length} with {work.outputs} outputs"
            )
        if not work.is_recurrent and work.length % CHUNK:
            raise EngineError(f"a chunk begins at {work.length}, expected a multiple of {CHUNK}")
        needed = -(-end // size)
        pages = work.pages[:needed]
        if len(pages) < needed or not 0 <= min(pages) <= max(pages) < self.pages.numbers.count:
            raise EngineError(
                f"{end} tokens need {needed} pages of {size}; found {len(work.pages)}, of a pool "
                f"of {self.pages.numbers.count}"
            )
        if not 0 <= min(work.tokens) <= max(work.tokens) < self.vocab:
            raise EngineError(
                f"token ids from {min(work.tokens)} to {max(work.tokens)}, but the vocabulary has "
                f"{self.vocab:,}; the tokenizer belongs to another model"
            )

    @property
    def _slots(self) -> int:
        return self.states.numbers.count


class _Inputs:
    """The numbers of a batch, in memory whose addresses a program holds."""

    def __init__(self, model: Model, page_tokens: int, most: StepSize) -> None:
        rotary = len(model.network.rope.inverse)
        width = -(-most.context // page_tokens)
        self.tokens = torch.zeros(most.tokens, dtype=torch.int64)
        self.starts = torch.zeros(most.sequences + 1, dtype=torch.int32)
        self.lengths = torch.zeros(most.sequences, dtype=torch.int32)
        self.table = torch.full((most.sequences, width), -1, dtype=torch.int32)
        self.slots = torch.zeros(most.sequences, dtype=torch.int32)
        self.recurrent = torch.zeros(most.sequences, dtype=torch.int32)
        self.cos = torch.zeros((most.tokens, rotary))
        self.sin = torch.zeros((most.tokens, rotary))
        self.wanted = torch.zeros(most.outputs, dtype=torch.int64)
        self._angles = _Angles(model.network.rope, most.context)
        self._rows: list[list[int]] = [[] for _ in range(most.sequences)]

    @property
    def nbytes(self) -> int:
        found = (self.tokens, self.starts, self.lengths, self.table, self.slots, self.recurrent)
        held = sum(t.nbytes for t in (*found, self.cos, self.sin, self.wanted))
        return held + self._angles.nbytes

    def batch(self, sequences: int, tokens: int) -> Batch:
        """The first so many, as a batch."""
        return Batch(
            self.tokens[:tokens],
            self.starts[: sequences + 1],
            self.lengths[:sequences],
            self.table[:sequences],
            self.slots[:sequences],
            self.cos[:tokens],
            self.sin[:tokens],
            self.recurrent[:sequences],
        )

    def fill(self, works: Sequence[Work]) -> tuple[int, int]:
        """Write a batch down; how many tokens and outputs it has."""
        tokens, starts, lengths = self.tokens.numpy(), self.starts.numpy(), self.lengths.numpy()
        slots, wanted = self.slots.numpy(), self.wanted.numpy()
        recurrent = self.recurrent.numpy()
        at = made = 0
        positions = []
        for i, work in enumerate(works):
            end = at + len(work.tokens)
            tokens[at:end] = work.tokens
            lengths[i], slots[i], recurrent[i] = work.length, work.slot, work.is_recurrent
            self._write_pages(i, work)
            wanted[made : made + work.outputs] = np.arange(end - work.outputs, end)
            positions.append(np.arange(work.length, work.length + len(work.tokens)))
            made += work.outputs
            at = end
            starts[i + 1] = end
        found = np.concatenate(positions)
        self._angles.look_up(found, self.cos.numpy()[:at], self.sin.numpy()[:at])
        return at, made

    def _write_pages(self, row: int, work: Work) -> None:
        """Only what a decode adds is new where the row held the same sequence a step ago."""
        count, before = len(work.pages), self._rows[row]
        start = len(before) if work.pages[: len(before)] == before else 0
        self.table.numpy()[row, start:count] = work.pages[start:]
        self._rows[row] = list(work.pages)


class _Angles:
    """Cosine and sine of positions, float32 [N, R / 2], made in blocks when they are first met."""

    BLOCK = 4096

    def __init__(self, rope: Rope, context: int) -> None:
        self.rope = rope
        shape = (context, len(rope.inverse))
        self.cos, self.sin = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self.known = np.zeros(-(-context // self.BLOCK), dtype=bool)

    @property
    def nbytes(self) -> int:
        """At most: blocks that nobody reached were never touched."""
        return self.cos.nbytes + self.sin.nbytes

    def look_up(
        self, positions: NDArray[np.int64], cos: NDArray[np.float32], sin: NDArray[np.float32]
    ) -> None:
        """Write those of some positions into cos and sin."""
        for block in np.unique(positions // self.BLOCK):
            if not self.known[block]:
                self._make(int(block))
        np.take(self.cos, positions, axis=0, out=cos, mode="clip")
        np.take(self.sin, positions, axis=0, out=sin, mode="clip")

    def _make(self, block: int) -> None:
        start, end = block * self.BLOCK, min((block + 1) * self.BLOCK, len(self.cos))
        cos, sin = self.rope.tables(torch.arange(start, end))
        self.cos[start:end], self.sin[start:end] = cos.numpy(), sin.numpy()
        self.known[block] = True
