"""`nybble generate`: a prompt becomes text, token by token, from any checkpoint that loads."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.api.extras import needs_torch
from nybble.checkpoint.reader import Checkpoint
from nybble.kernels.compute import Compute, Precision
from nybble.kernels.dispatch import choose, default_threads

if TYPE_CHECKING:
    from nybble.engine.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated, and how fast: `prefill_s` until the first token, `decode_s` for the
    others."""

    text: str
    prompt: str
    prompt_tokens: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str
    prefill_s: float
    decode_s: float
    kernels: str
    threads: int

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens each second; the first belongs to the prefill."""
        return (len(self.tokens) - 1) / self.decode_s if self.decode_s > 0 else 0.0

    def as_json(self) -> dict[str, object]:
        """The JSON document `nybble.generate/1`."""
        return {
            "schema": "nybble.generate/1",
            "text": self.text,
            "prompt": self.prompt,
            "prompt_tokens": self.prompt_tokens,
            "tokens": list(self.tokens),
            "logprobs": list(self.logprobs),
            "finish_reason": self.finish,
            "prefill_seconds": self.prefill_s,
            "decode_seconds": self.decode_s,
            "tokens_per_second": self.tokens_per_s,
            "kernels": self.kernels,
            "threads": self.threads,
        }


def generate(
    model: str | PathLike[str],
    prompt: str,
    params: SamplingParams | None = None,
    *,
    raw: bool = False,
    system: str | None = None,
    precision: Precision = "bf16",
    threads: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Generate from a local checkpoint folder.

    The prompt is a user's message where the folder has a chat template, unless `raw`; `system` goes
    before it. `on_text` is called with every piece of text. Raises MissingExtra without torch,
    TextError for a prompt or template that cannot be used, and what opening a model raises.
    """
    needs_torch("generate")
    from nybble.engine.engine import Engine
    from nybble.engine.request import SamplingParams
    from nybble.models.linear import Mode
    from nybble.models.model import Model
    from nybble.text.tokenizer import Tokenizer

    folder = Path(model)
    compute = Compute(precision, threads or default_threads())
    with Checkpoint.open(folder) as checkpoint:
        tokenizer = Tokenizer.open(folder)
        rendered = None if raw else _render(folder, prompt, system)
        text = prompt if rendered is None else rendered
        engine = Engine(Model(checkpoint), tokenizer, Mode(compute))
        ids = tokenizer.encode(text, add_special=rendered is None)  # templates write their own
        began = time.perf_counter()
        first = began
        pieces: list[str] = []
        tokens: list[int] = []
        logprobs: list[float] = []
        finish = ""
        for token in engine.generate(ids, params or SamplingParams()):
            if not tokens:
                first = time.perf_counter()
            pieces.append(token.text)
            tokens.append(token.id)
            logprobs.append(token.logprob)
            finish = token.finish
            if on_text is not None and token.text:
                on_text(token.text)
        ended = time.perf_counter()
    return Generation(
        "".join(pieces),
        text,
        len(ids),
        tuple(tokens),
        tuple(logprobs),
        finish,
        first - began,
        ended - first,
        str(choose()),
        compute.threads,
    )


def _render(folder: Path, prompt: str, system: str | None) -> str | None:
    """The prompt in the folder's chat template, None if it has none."""
    from nybble.errors import TextError
    from nybble.text.chat import ChatTemplate

    template = ChatTemplate.open(folder)
    if template is None:
        if system is not None:
            raise TextError(
                f"{folder}: has no chat template, so a system message has no place; put it into "
                "the prompt"
            )
        return None
    messages = [{"role": "system", "content": system}] if system is not None else []
    return template.render([*messages, {"role": "user", "content": prompt}])
