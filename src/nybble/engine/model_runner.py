"""The runner of a model: a step's numbers go into fixed buffers, and a program is replayed.

The model's own forward is recorded once, at the largest step; every smaller one is a replay with
other counts. Without compiled kernels the forward itself is called. Where there is an MTP head to
draft with, `MtpRunner` runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nybble.engine.mtp_runner import MtpRunner
from nybble.engine.runner import Guess, Work
from nybble.engine.step_inputs import Angles, StepInputs, written_states
from nybble.errors import ContextTooLong, EngineError
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute
from nybble.kernels.elementwise import look_up
from nybble.kernels.gated_delta import CHUNK
from nybble.kernels.program import Program
from nybble.models.linear import Mode
from nybble.models.model import MTP_LAYER, Model
from nybble.models.state import PagePool, StatePool
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
        *,
        has_mtp: bool = False,
    ) -> None:
        """`has_mtp`: the MTP head runs too; both pools are made with it then. Raises ModelError for
        a checkpoint that cannot be computed, EngineError for an MTP head that is not there,
        DoesNotFit without memory."""
        self.model, self.pages, self.states, self.most = model, pages, states, most
        self.mode = Mode(compute or Compute())
        self._angles = Angles(model.network.rope, most.context)
        self._inputs = StepInputs(self._angles, most.tokens, most.sequences, pages.page_tokens)
        self._wanted = torch.zeros(most.outputs, dtype=torch.int64)
        self._wants, self._rows = self._wanted.numpy(), np.arange(most.tokens)
        self._mtp: MtpRunner | None = None
        if has_mtp:
            place = (self._angles, most.tokens, most.sequences)
            self._mtp = MtpRunner(model, pages, states, *place, self.mode)
        self._slots = [a.numpy() for a in _slot_tensors(states)]
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
        """All about how it computes that decides about bits: kernels, precision, pages, scales; not
        the MTP head, whose guesses change none."""
        trunk = [page for i, page in self.pages.layers.items() if i != MTP_LAYER]
        pages = str(trunk[0].keys.dtype) if trunk else "none"
        scales = [(page.key_scale, page.value_scale) for page in trunk]
        return f"{dispatch.choose()} {self.mode.compute.precision} {pages} {scales}"

    @property
    def program(self) -> Program | None:
        """The recorded step, None where the forward itself is called."""
        return self._program

    @property
    def nbytes(self) -> int:
        """What a step takes beside the pools and the checkpoint's weights, at its largest."""
        arena = 0 if self._program is None else self._program.arena_bytes
        head = 0 if self._mtp is None else self._mtp.nbytes + self.model.draft_head_bytes
        return arena + head + self._inputs.nbytes + self._wanted.nbytes + self._angles.nbytes

    def forward(self, works: Sequence[Work]) -> Tensor:
        """The logits float32 [sum of outputs, V] of a batch, overwritten by the next call.

        Raises EngineError for work that does not fit the step or the pools, before anything is
        written; ContextTooLong for positions beyond the model's context.
        """
        self._check(works)
        has_hidden = self._mtp is not None and self._mtp.begin(works)
        tokens = self._inputs.fill(works)
        outputs = self._want(works)
        if self._program is None:
            logits = self._forward(len(works), tokens, outputs)
        else:
            self._program.run(tokens=tokens, sequences=len(works), outputs=outputs)
            logits = self._logits[:outputs]
        if has_hidden and self._mtp is not None:
            self._mtp.finish(works)
        return logits

    def guess(self, guesses: Sequence[Guess]) -> list[list[int]]:
        """What the MTP head makes of the last forward; see `runner.Runner`.

        Raises EngineError for a runner without the head, and, before anything is written, for
        tokens that the last forward does not reach and positions without a page.
        """
        if self._mtp is None:
            raise EngineError("this runner was made without the MTP head: pass has_mtp=True")
        return self._mtp.guess(guesses)

    def copy(
        self, from_pages: Sequence[int], to_pages: Sequence[int], from_slot: int, to_slot: int
    ) -> None:
        """Give another sequence the same state: its pages and slot are written over. Raises
        EngineError for slots that are not there."""
        if (
            self._slots
            and not 0 <= min(from_slot, to_slot) <= max(from_slot, to_slot) < self._count
        ):
            raise EngineError(f"a copy of slot {from_slot} to {to_slot}, of {self._count} slots")
        if len(from_pages):
            self._copy_pages(torch.tensor(list(from_pages)), torch.tensor(list(to_pages)))
        self._copy_slot(from_slot, to_slot)

    def _copy_pages(self, source: Tensor, target: Tensor) -> None:
        with torch_alone():
            for layer in self.pages.layers.values():
                for pool in (layer.keys, layer.values):
                    raw = pool.view(torch.uint8)  # index_copy_ knows no FP8
                    raw[target] = raw[source]

    def _copy_slot(self, source: int, target: int) -> None:
        for array in self._slots:
            array[target] = array[source]

    def _want(self, works: Sequence[Work]) -> int:
        """Note of which rows logits are wanted; how many."""
        wanted, rows, at, made = self._wants, self._rows, 0, 0
        for work in works:
            at += len(work.tokens)
            wanted[made : made + work.outputs] = rows[at - work.outputs : at]
            made += work.outputs
        return made

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
        program.keep((self.model, self.pages, self.states, self._inputs, self._wanted, self._mtp))
        self.model.prepare(has_mtp=self._mtp is not None)  # making the parts computes with torch
        with program.recording():
            normed = self._normed(most.sequences, most.tokens, mode)
            with program.counting("outputs"):
                rows = look_up(normed.numpy(), self._wanted, mode.compute)
                self._logits = self.model.logits(rows, mode)
        del normed, rows
        self._program = program
        if self._mtp is not None:
            self._mtp.record(program)

    def _forward(self, sequences: int, tokens: int, outputs: int) -> Tensor:
        normed = self._normed(sequences, tokens, self.mode)
        return self.model.logits(normed[self._wanted[:outputs]], self.mode)

    def _normed(self, sequences: int, tokens: int, mode: Mode) -> Tensor:
        """The final normed hidden states, where the MTP head finds them if there is one."""
        batch = self._inputs.batch(sequences, tokens, mode.compute)
        out = None if self._mtp is None else self._mtp.normed[:tokens]
        return self.model.forward(batch, self.pages, self.states, mode, out)

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
        for work in works:
            self._check_work(work)
            self._check_writes(work)
        if self._slots:
            self._check_slots(works)

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

    def _check_writes(self, work: Work) -> None:
        written = written_states(work)
        if len(written) == 1 and written[0][0] == len(work.tokens):
            return
        counts = [count for count, _ in written]
        if counts != sorted({*counts}) or counts[0] < 1 or counts[-1] != len(work.tokens):
            raise EngineError(
                f"states written after {counts} tokens of {len(work.tokens)}; expected rising "
                "counts, the last after all"
            )
        ends = [work.length + count for count in counts if count < len(work.tokens)]
        if not work.is_recurrent and any(end % CHUNK for end in ends):
            raise EngineError(
                f"a chunk writes states after {ends} tokens, expected multiples of {CHUNK} before "
                "its end"
            )

    def _check_slots(self, works: Sequence[Work]) -> None:
        """A slot is written once, and then read by its writer alone."""
        owners: dict[int, int] = {}
        for i, work in enumerate(works):
            for _, slot in written_states(work):
                if not 0 <= slot < self._count or slot in owners:
                    raise EngineError(
                        f"work {i} writes slot {slot}, of {self._count} slots, each written once"
                    )
                owners[slot] = i
        for i, work in enumerate(works):
            if not 0 <= work.slot < self._count:
                raise EngineError(f"work {i} reads slot {work.slot}, of {self._count} slots")
            if work.length and owners.get(work.slot, i) != i:
                raise EngineError(
                    f"work {i} reads slot {work.slot}, which work {owners[work.slot]} writes; only "
                    "slots that nobody writes are shared"
                )

    @property
    def _count(self) -> int:
        return self.states.count


def _slot_tensors(states: StatePool) -> list[Tensor]:
    """All that a slot consists of: tensors [slots, ...]."""
    found = [tensor for s in states.layers.values() for tensor in (s.conv, s.state)]
    return found if states.hidden is None else [*found, states.hidden]
