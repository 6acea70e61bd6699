"""Draft acceptance before and after: what quantizing a checkpoint, or its MTP head alone, does to
the guesses of its head."""

from __future__ import annotations

import time
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.api.calibrated import refuse_calibrated_on
from nybble.api.evaluate import PACK_FILE
from nybble.api.extras import needs_torch
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import EvaluationError
from nybble.kernels.dispatch import default_threads
from nybble.machine import available_bytes
from nybble.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from nybble.evaluate.acceptance import Change, Drafts
    from nybble.kernels.compute import Precision
    from nybble.models.linear import Mode

#: Windows of a text that are judged unless asked otherwise: enough for an interval.
WINDOWS, LENGTH = 64, 512


@dataclass(frozen=True, slots=True)
class AcceptanceResult:
    """The change, and the text that it was measured on."""

    before: Path
    after: Path
    change: Change
    text: str
    text_sha256: str
    windows: int
    seconds: float

    def as_json(self) -> dict[str, object]:
        """The JSON document `nybble.acceptance/1`."""
        return {
            "schema": "nybble.acceptance/1",
            "before_model": str(self.before),
            "after_model": str(self.after),
            "text": self.text,
            "text_sha256": self.text_sha256,
            "windows": self.windows,
            **self.change.as_json(),
        }


def acceptance(
    before: str | PathLike[str],
    after: str | PathLike[str],
    *,
    text: str | PathLike[str] | None = None,
    windows: int = WINDOWS,
    length: int = LENGTH,
    precision: Precision = "bf16",
    simulate: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> AcceptanceResult:
    """How often the first guess of the MTP head is the trunk's likeliest token, in both folders.

    Teacher-forced, on `windows` windows of `length` tokens of the file `text` (default: the test
    split of wikitext-2, in no calibration text). A text like those that the model writes itself
    comes closest to what an engine accepts. `precision` is that of activations in matmuls; with
    `simulate`, inputs are rounded as the checkpoints declare. Raises EvaluationError, before
    anything is computed, for a folder without an MTP head, then for two vocabularies or a text that
    `after` was calibrated on, and what opening and running a model raises.
    """
    needs_torch("draft acceptance")
    for folder in (before, after):
        refuse_headless(folder)
    import numpy as np
    import torch

    from nybble.evaluate.acceptance import change
    from nybble.evaluate.windows import load_suite, make_windows, read_text
    from nybble.kernels.compute import Compute
    from nybble.models.linear import Mode
    from nybble.text.tokenizer import Tokenizer

    progress, began = progress or Progress(), time.perf_counter()
    content = load_suite("wikitext2") if text is None else read_text(Path(text))
    tokenizer = Tokenizer.open(Path(before))
    ids = tokenizer.encode(content.content, parse_special=False)
    cut = [torch.from_numpy(np.array(w.tokens)) for w in make_windows(ids, length, limit=windows)]
    seen = tokenizer.decode([i for w in cut for i in w.tolist()])
    refuse_calibrated_on(Path(after), seen, content.name)
    compute = Compute(precision, threads or default_threads())
    mode = Mode(compute, simulate=simulate)
    first, second = (_measured(Path(folder), cut, mode, progress) for folder in (before, after))
    return AcceptanceResult(
        Path(before),
        Path(after),
        change(first, second),
        content.name,
        content.sha256,
        len(cut),
        time.perf_counter() - began,
    )


def refuse_headless(folder: str | PathLike[str]) -> None:
    """Raise EvaluationError unless `folder` is a model with an MTP head; reads headers alone."""
    from nybble.models.model import Model

    if (Path(folder) / PACK_FILE).exists():
        raise EvaluationError(
            f"{folder}: is a reference pack, which has no MTP head; drafts are compared with those "
            "of the model itself: name its folder, or leave --drafts out"
        )
    with Checkpoint.open(Path(folder)) as checkpoint:
        if Model(checkpoint).mtp is None:
            raise EvaluationError(
                f"{folder}: has no MTP head, so there is no draft to judge; leave --drafts out"
            )


def _measured(folder: Path, windows: list[Tensor], mode: Mode, progress: Progress) -> Drafts:
    from nybble.evaluate.acceptance import measure_drafts
    from nybble.models.model import Model

    with Checkpoint.open(folder) as checkpoint:
        model = Model(checkpoint)
        largest = max(int(w.max()) for w in windows)
        if largest >= model.network.dims.vocab:
            raise EvaluationError(
                f"{folder}: has {model.network.dims.vocab:,} tokens, and the text's ids go up to "
                f"{largest:,}: the two folders are not of one model"
            )
        return measure_drafts(
            model, windows, mode, limit_bytes=available_bytes(), progress=progress
        )
