"""Measuring how large the inputs of linears get: the short pass behind every stored `input_scale`.

One streamed forward of the unquantized model over a few thousand tokens. The largest magnitude is
what matters: ModelOpt's own study found it within 0.06 dB of the best scale on every layer, and
percentiles worse. Of inputs in blocks, how small the small ones are says how much room above is
free. The same pass measures keys and values where somebody asks (`kv_scales.py`). Knows nothing of
formats: what becomes of the figures is in `scales.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nybble.calibrate import corpus
from nybble.calibrate.block_amax import BLOCK, BlockAmax
from nybble.calibrate.kv_scales import KvSizes
from nybble.calibrate.scales import InputAmax
from nybble.errors import TextError
from nybble.formats.element import E2M1
from nybble.kernels.compute import Compute
from nybble.machine import available_bytes
from nybble.models.linear import Mode
from nybble.models.model import MTP_LAYER, Model
from nybble.plan.plan import Plan
from nybble.progress import Progress
from nybble.stream.drafts import draft_states
from nybble.stream.executor import Stream
from nybble.stream.watched import Watched
from nybble.text.chat import ChatTemplate
from nybble.text.tokenizer import Tokenizer

#: Tokens of a window of the pass: long enough for attention to spread, short for a small cache.
WINDOW = 512


class AmaxObserver:
    """The largest input magnitude of each module, and the tokens it was seen on; of `blocked`
    modules, how large the blocks are: experts of a layer together."""

    def __init__(self, wanted: Collection[str], blocked: Collection[str] = ()) -> None:
        self.wanted, self.blocked = frozenset(wanted), frozenset(blocked)
        self.amax: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.blocks: dict[str, BlockAmax] = {}

    def linear(self, modules: tuple[str, ...], x: Tensor) -> None:
        """See models.linear.Observer."""
        wanted = [m for m in modules if m in self.wanted]
        if wanted and len(x):
            self._note(wanted, float(x.abs().max()), len(x))
            self._count([m for m in modules if m in self.blocked], x)

    def experts(self, modules: Sequence[tuple[str, ...]], x: Tensor, counts: Tensor) -> None:
        """See models.linear.Observer."""
        if not len(x) or modules[0][0] not in self.wanted:
            return
        rows = x.abs().amax(-1)
        which = torch.repeat_interleave(torch.arange(len(counts)), counts)
        found = torch.zeros(len(counts)).scatter_reduce_(0, which, rows, "amax")
        for names, amax, count in zip(modules, found.tolist(), counts.tolist(), strict=True):
            if count:
                self._note(names, amax, count)
        if modules[0][0] in self.blocked:
            self._count([name for names in modules for name in names], x)

    def _note(self, modules: Sequence[str], amax: float, tokens: int) -> None:
        for module in modules:
            # A NaN stays: max(NaN, x) would depend on the order.
            known = self.amax.get(module, 0.0)
            self.amax[module] = amax if amax > known or amax != amax else known
            self.tokens[module] = self.tokens.get(module, 0) + tokens

    def _count(self, modules: Sequence[str], x: Tensor) -> None:
        if not modules or x.shape[-1] % BLOCK:
            return
        maxima = x.reshape(len(x), -1, BLOCK).abs().amax(-1)
        blocks = self.blocks.setdefault(modules[0], BlockAmax())
        self.blocks.update(dict.fromkeys(modules, blocks))
        blocks.add(maxima.numpy())


def measure_amax(
    plan: Plan,
    *,
    text: str | None = None,
    tokens: int = 8192,
    windows: Sequence[Tensor] | None = None,
    kv: KvSizes | None = None,
    threads: int,
    progress: Progress,
) -> InputAmax:
    """Run the plan's source over `tokens` tokens of `text`, or of the project's own mixture, or
    over `windows` int64 [length] that somebody has made.

    `kv` is shown the keys and values of every layer, the MTP head's too. Raises TextError for a
    text that is too short, MissingExtra without tokenizers, and what opening the model raises.
    """
    checkpoint = plan.checkpoint
    jobs = [j for j in plan.jobs if j.scheme.needs_input_scale]
    wanted = {m.module for j in jobs for m in j.members}
    in_blocks = [j for j in jobs if j.scheme.input and j.scheme.input.element is E2M1]
    observer = AmaxObserver(wanted, {m.module for j in in_blocks for m in j.members})
    model = Model(checkpoint)
    if windows is None:
        windows = calibration_windows(checkpoint.path, text, tokens)
    mode = Mode(Compute("bf16", threads), observer)
    stream = Stream(
        model,
        windows,
        mode,
        limit_bytes=available_bytes(),
        progress=progress,
        title="measure inputs",
    )
    what = f"the inputs of {len(wanted):,} linears" if wanted else "keys and values"
    progress.say(
        f"measuring {what} on {stream.plan.tokens:,} tokens: "
        f"{stream.plan.private_bytes / 2**30:.2f} GiB of memory"
    )
    _run(stream, kv)
    head = model.head.modules
    if wanted.intersection(head):
        for _, normed in stream.normed():
            observer.linear(head, normed)
    if any(j.role == "mtp" for j in jobs) or (kv is not None and _has_head(plan)):
        look = None if kv is None else partial(kv.look, MTP_LAYER)
        for _ in draft_states(model, stream.windows, stream.normed(), mode, look=look):
            pass
    stream.close()
    return InputAmax(observer.amax, observer.tokens, stream.plan.tokens, observer.blocks)


def _has_head(plan: Plan) -> bool:
    """The checkpoint holds an MTP head, quantized or not."""
    return any(c.role == "mtp" for c in plan.copies) or any(j.role == "mtp" for j in plan.jobs)


def _run(stream: Stream, kv: KvSizes | None) -> None:
    """All layers; `kv` sees the pages of each."""
    if kv is None:
        stream.run()
        return
    weights, layers = stream.model.weights, stream.model.network.dims.layers
    stream.begin()
    stream.progress.stage(stream.title, stream.plan.tokens * layers, unit="token layers")
    for number in range(layers):
        stream.step(number, Watched(weights.layer(number), partial(kv.look, number)))
        weights.drop_layer(number)


def calibration_windows(folder: Path, text: str | None, tokens: int) -> list[Tensor]:
    """About `tokens` tokens of text as windows, with the model's own tokenizer and chat template.

    Raises TextError if a text of the user's has fewer.
    """
    tokenizer = Tokenizer.open(folder)
    if text is not None:
        if not text.strip():
            raise TextError("the calibration text is empty: there is nothing to measure on")
        ids = tokenizer.encode(text, parse_special=False)
        if len(ids) < tokens:
            raise TextError(
                f"the calibration text has {len(ids):,} tokens, expected {tokens:,}; use a longer "
                f"text, or --calibration-tokens {len(ids)}"
            )
        ids = ids[:tokens]
    else:
        ids = _mixture_ids(tokenizer, ChatTemplate.open(folder), tokens)
    return [torch.tensor(ids[i : i + WINDOW]) for i in range(0, len(ids), WINDOW)]


def _mixture_ids(tokenizer: Tokenizer, template: ChatTemplate | None, tokens: int) -> list[int]:
    ids: list[int] = []
    for document in corpus.mixture():
        # Only a template may write special tokens; in a text they are words like others.
        text = corpus.render(document, template)
        ids += tokenizer.encode(text, parse_special=document.messages is not None)
        if len(ids) >= tokens:
            return ids[:tokens]
    raise TextError(
        f"{tokens:,} tokens were asked for, and the text that comes with nybble has {len(ids):,} "
        "with this tokenizer; ask for fewer, or give a text (--calibration-text)"
    )
