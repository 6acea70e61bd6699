"""A layer that shows what it has put into its pages: for who measures keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nybble.kernels.paged_attention import Pages
from nybble.models.layer import Layer
from nybble.models.linear import Mode
from nybble.models.state import Batch, Cache
from nybble.stream.drafts import Look


@dataclass(frozen=True, slots=True)
class Watched:
    """Stands in for a layer in `Stream.step`; computes the same."""

    layer: Layer
    look: Look

    @property
    def name(self) -> str:
        """The layer's."""
        return self.layer.name

    def __call__(self, x: Tensor, batch: Batch, cache: Cache, mode: Mode) -> Tensor:
        """As the layer; what is in the pages then is shown to `look`."""
        found = self.layer(x, batch, cache, mode)
        if isinstance(cache, Pages):
            self.look(cache, batch)
        return found
