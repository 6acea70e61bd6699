"""One scorer for everybody: the divergence from the BF16 model, sizes, and what a table needs.

A checkpoint that is scored is opened by nybble from the bytes its tool wrote; only llama.cpp's
files come as the BF16 rounding of what llama.cpp itself decodes them to.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.api.evaluate import Protocol
from nybble.checkpoint.reader import Checkpoint
from nybble.evaluate.divergence import Divergence, summarize
from nybble.evaluate.score import TokenDivergence, compare
from nybble.evaluate.sources import StreamedSource
from nybble.evaluate.windows import Window, load_suite, make_windows
from nybble.models.linear import Linear, Mode
from nybble.models.model import Model
from nybble.progress import Progress
from nybble.text.tokenizer import Tokenizer

#: Tensors that no tool of the contest quantizes, by a part of their names.
_OUTSIDE = ("embed_tokens", "lm_head", "norm", "token_embd")
PRECISIONS = ("f32", "bf16")


@dataclass(frozen=True)
class Sizes:
    """Bytes of a checkpoint's tensors, and bits a weight of all but embedding, head and norms;
    `types` says what a GGUF file holds there."""

    payload_bytes: int
    bits: float
    types: str = ""


def protocol(precision: str, windows: int, threads: int) -> Protocol:
    """Windows of 512 tokens of WikiText-2; weights as stored, activations never quantized."""
    if precision == "f32":
        return Protocol(
            limit=windows, precision="f32", kv_dtype="f32", simulate=False, threads=threads
        )
    return Protocol(limit=windows, simulate=False, threads=threads)


@dataclass(frozen=True)
class Known:
    """What the BF16 model hands to its head, and that head: `nybble eval` computes it anew for each
    candidate, here it is kept. A nybble.evaluate.score.HiddenSource."""

    head: Linear
    hidden: NDArray[np.float32]  # [tokens, H]
    starts: tuple[int, ...]

    def normed(self) -> Iterator[tuple[int, Tensor]]:
        """See HiddenSource."""
        for i, (start, stop) in enumerate(pairwise(self.starts)):
            yield i, torch.from_numpy(self.hidden[start:stop].copy())


def score(checkpoint: Path, model: Path, conditions: Protocol, kept: Path) -> TokenDivergence:
    """Every token's divergence, as `nybble.api.evaluate` has it; it is left beside the checkpoint
    and read again if it is there. `kept` is the folder of the model's own hidden states."""
    name = f"{conditions.precision}-{conditions.limit}"
    known = checkpoint.parent / f"tokens-{name}.npz"
    if known.exists():
        with np.load(known) as found:
            return TokenDivergence(**found)
    with Checkpoint.open(model) as source, Checkpoint.open(checkpoint) as candidate:
        tokenizer, reference = Tokenizer.open(model), Model(source)
        ids = tokenizer.encode(load_suite("wikitext2").content, parse_special=False)
        windows = make_windows(ids, 512, limit=conditions.limit)
        theirs = _hidden(reference, windows, conditions, kept / f"hidden-{name}.npy")
        ours = _source(Model(candidate), windows, conditions)
        ours.run()
        figures = compare(theirs, ours, windows, ours.stream.mode, Progress())
        ours.close()
    columns = {field.name: getattr(figures, field.name) for field in fields(figures)}
    np.savez(known, **columns)
    return figures


def _source(model: Model, windows: Sequence[Window], conditions: Protocol) -> StreamedSource:
    mode = Mode(conditions.compute, simulate=conditions.simulate)
    return StreamedSource(
        *(model, windows, mode),
        page_dtype=conditions.kv_dtype,
        title=model.weights.checkpoint.path.name,
        progress=Progress(),
    )


def _hidden(model: Model, windows: Sequence[Window], conditions: Protocol, kept: Path) -> Known:
    """Computed once, then read."""
    if not kept.exists():
        source = _source(model, windows, conditions)
        source.run()
        hidden = np.concatenate([normed.numpy() for _, normed in source.normed()])
        source.close()
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f"{kept.name}.{os.getpid()}.npy")
        np.save(partial, hidden)
        partial.rename(kept)
    starts = (0, *np.cumsum([len(w.tokens) for w in windows]).tolist())
    return Known(model.head, np.load(kept), starts)


def summary(figures: TokenDivergence) -> Divergence:
    """What the table shows."""
    return summarize(figures)


def sizes_of(folder: Path, model: Path) -> Sizes:
    """Of FOLDER/checkpoint, or of the GGUF file that it was decoded from."""
    with Checkpoint.open(model, headers_only=True) as source:
        weights = sum(prod(i.shape) for n, i in source.tensors.items() if _counts(n))
    packed = folder / "checkpoint.gguf"
    if packed.exists():
        return _gguf_sizes(packed, weights)
    with Checkpoint.open(folder / "checkpoint", headers_only=True) as found:
        nbytes = {name: info.nbytes for name, info in found.tensors.items()}
    inside = sum(n for name, n in nbytes.items() if _counts(name))
    return Sizes(sum(nbytes.values()), 8 * inside / weights)


def _counts(name: str) -> bool:
    return name != "output.weight" and not any(part in name for part in _OUTSIDE)


def _gguf_sizes(packed: Path, weights: int) -> Sizes:
    from gguf import GGUFReader

    tensors = GGUFReader(packed).tensors
    total = sum(int(t.n_bytes) for t in tensors)
    linears = [t for t in tensors if _counts(t.name)]
    counts = Counter(t.tensor_type.name for t in linears)
    shown = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    return Sizes(total, 8 * sum(int(t.n_bytes) for t in linears) / weights, shown)
