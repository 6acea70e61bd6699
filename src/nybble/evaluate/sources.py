"""Where final hidden states come from: a model run layer by layer, or a reference pack.

Both are `score.HiddenSource`: windows in order, and the head that reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nybble.errors import EvaluationError
from nybble.evaluate.pack import Pack
from nybble.evaluate.windows import Window
from nybble.kernels.block_matmul import prepare
from nybble.models.linear import Linear, Mode
from nybble.models.model import Model
from nybble.progress import Progress
from nybble.stream.executor import Stream


class StreamedSource:
    """A model's own: nothing is computed before `run`."""

    def __init__(
        self,
        model: Model,
        windows: Sequence[Window],
        mode: Mode,
        *,
        page_dtype: str,
        title: str,
        progress: Progress,
        spill: Path | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        """Raises DoesNotFit by the plan of the stream."""
        self.stream = Stream(
            model,
            [torch.from_numpy(np.array(w.tokens, dtype=np.int64)) for w in windows],
            mode,
            page_dtype=page_dtype,
            title=title,
            progress=progress,
            spill=spill,
            limit_bytes=limit_bytes,
        )
        self.model = model

    @property
    def head(self) -> Linear:
        """See HiddenSource."""
        return self.model.head

    def run(self) -> None:
        """Compute all layers."""
        self.stream.run()

    def normed(self) -> Iterator[tuple[int, Tensor]]:
        """See HiddenSource."""
        return self.stream.normed()

    def close(self) -> None:
        """Give the hidden states up."""
        self.stream.close()


class PackedSource:
    """A reference pack's: what a BF16 model handed to its head, and that head."""

    def __init__(self, pack: Pack, head: Linear | None = None, count: int | None = None) -> None:
        """The first `count` windows. `head` is the reference model's own where the pack came
        without; it is held to the pack's hash. Raises EvaluationError if there is none or it is
        another one."""
        self.pack = pack
        self.count = len(pack.windows) if count is None else count
        if pack.has_head:
            self.head = Linear(("lm_head",), prepare([pack.head()], name="lm_head of the pack"))
            return
        if head is None:
            raise EvaluationError(
                f"{pack.path}: was made without the output head; give the folder of a checkpoint "
                "that has it unquantized with --head"
            )
        weight = head.weight.weights[0]
        if not isinstance(weight, np.ndarray):
            raise EvaluationError(
                f"{head.modules[0]}: is quantized; the pack needs the reference's own BF16 head"
            )
        pack.check_head(weight)
        self.head = head

    def normed(self) -> Iterator[tuple[int, Tensor]]:
        """See HiddenSource."""
        for i in range(self.count):
            yield i, torch.from_numpy(self.pack.hidden(i).astype(np.float32))
            self.pack.drop_pages(i)
