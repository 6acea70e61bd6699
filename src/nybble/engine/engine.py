"""An engine for one sequence: prefill in chunks, then token after token.

One page holds the whole sequence, one slot its recurrent state. The forward is the one that scoring
and calibration use; packed weights are read where the file has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from nybble.engine.request import SamplingParams, Token
from nybble.engine.sampler import sample
from nybble.errors import ContextTooLong, TextError
from nybble.models.linear import Mode
from nybble.models.model import Model
from nybble.models.state import PagePool, SequenceState, StatePool, make_batch
from nybble.text.tokenizer import Tokenizer

#: Tokens of a prompt that go through the model at once; chunks begin at multiples of 64.
CHUNK_TOKENS = 1024


class Engine:
    """A model, its tokenizer, and the state of the sequence being generated."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        mode: Mode | None = None,
        *,
        page_dtype: str = "bf16",
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.mode = mode or Mode()
        self.page_dtype = page_dtype

    def generate(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Token]:
        """Tokens as they come. Raises TextError for an empty prompt, ContextTooLong for one that
        leaves no room in the model's context."""
        context = self.model.network.context
        if not prompt:
            raise TextError("the prompt is empty: there is no token to go on from")
        if len(prompt) >= context:
            raise ContextTooLong(
                f"the prompt has {len(prompt):,} tokens and the model's context is {context:,}; "
                "shorten the prompt"
            )
        most = min(params.max_tokens, context - len(prompt))
        state, pages, states = self._allocate(len(prompt) + most)
        logits = self._prefill(prompt, state, pages, states)
        stream = self.tokenizer.stream()
        eos = frozenset() if params.ignore_eos else self.tokenizer.eos_ids
        for made in range(1, most + 1):
            chosen = sample(logits, params, state.length, self.mode.compute)
            token, logprob = chosen.token, chosen.logprob
            if token in eos:
                yield Token(token, stream.finish(), logprob, "stop")
                return
            text = stream.push(token)
            if made == most:
                yield Token(token, text + stream.finish(), logprob, "length")
                return
            yield Token(token, text, logprob)
            logits = self._step([token], state, pages, states, is_decode=True)

    def _allocate(self, tokens: int) -> tuple[SequenceState, PagePool, StatePool]:
        pages = self.model.page_pool(1, tokens, self.page_dtype)
        states = self.model.state_pool(1)
        return SequenceState(pages.take(1), slots=[states.take()]), pages, states

    def _prefill(
        self, prompt: Sequence[int], state: SequenceState, pages: PagePool, states: StatePool
    ) -> Tensor:
        for at in range(0, len(prompt), CHUNK_TOKENS):
            part = prompt[at : at + CHUNK_TOKENS]
            logits = self._step(part, state, pages, states, is_decode=False)
        return logits

    def _step(
        self,
        tokens: Sequence[int],
        state: SequenceState,
        pages: PagePool,
        states: StatePool,
        *,
        is_decode: bool,
    ) -> Tensor:
        """Run tokens and commit them; the logits float32 [V] that follow the last."""
        batch = make_batch(self.model.network, [tokens], [state], is_decode=is_decode)
        hidden = self.model.forward(batch, pages, states, self.mode)
        state.commit(len(tokens), hidden[-1])
        return self.model.logits(hidden[-1:], self.mode)[0]
