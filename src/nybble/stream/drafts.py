"""The MTP head over windows of known text: what it makes of each token and the trunk before it.

Scoring drafts and measuring the inputs of the head's linears run on the one pass here. The head is
one layer, so its windows go through one by one and nothing is spilled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from nybble.kernels.paged_attention import Pages
from nybble.models.linear import Mode
from nybble.models.model import MTP_LAYER, Model
from nybble.models.sequence import SequenceState
from nybble.models.state import Batch, PagePool, make_batch

#: Who looks at the keys and values of the windows that a batch holds, once they are in their pages.
Look = Callable[[Pages, Batch], None]


def draft_states(
    model: Model,
    windows: Sequence[Tensor],
    normed: Iterable[tuple[int, Tensor]],
    mode: Mode,
    *,
    look: Look | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Window number and the head's normed hidden states, float32 [length, H], window by window.

    `windows` are int64 [length]; `normed` are the trunk's final normed hidden states by window, as
    `Stream.normed` gives them. Row q is made of token q and the trunk at q - 1, and guesses token
    q + 1; row 0 has no trunk before it and says nothing. Raises EngineError for a model without a
    head, and for NaN.
    """
    longest = max(map(len, windows), default=0)
    pages = PagePool(model.network, [MTP_LAYER], 1, longest)
    for i, hidden in normed:
        batch = make_batch(model.network, [windows[i]], [SequenceState([0])])
        before = torch.cat([torch.zeros_like(hidden[:1]), hidden[:-1]])
        found = model.mtp_forward(batch, before, pages, mode)
        if look is not None:
            look(pages.layers[MTP_LAYER], batch)
        yield i, found
