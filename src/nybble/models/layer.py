"""A decoder layer: mixer and feed-forward, each behind a norm and beside a residual."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from nybble.errors import EngineError
from nybble.kernels.elementwise import add, add_norm, rms_norm
from nybble.kernels.paged_attention import Pages
from nybble.models.attention import Attention
from nybble.models.delta import GatedDelta
from nybble.models.feed_forward import MLP, MixtureOfExperts
from nybble.models.linear import Mode
from nybble.models.network import Network
from nybble.models.state import Batch, Cache


@dataclass(frozen=True, slots=True)
class Layer:
    """h = x + mixer(norm(x)); h + feed_forward(norm(h)). `name` is for messages."""

    name: str
    network: Network
    mixer: Attention | GatedDelta
    feed_forward: MLP | MixtureOfExperts
    input_norm: Tensor
    post_norm: Tensor

    @property
    def mixture(self) -> MixtureOfExperts | None:
        """Its experts, where it has some."""
        return self.feed_forward if isinstance(self.feed_forward, MixtureOfExperts) else None

    def __call__(self, x: Tensor, batch: Batch, cache: Cache, mode: Mode) -> Tensor:
        """x float32 [T, H] -> float32 [T, H]. Raises EngineError, naming the place, for NaN."""
        hidden = self._normed(x, mode)
        if isinstance(self.mixer, Attention):
            assert isinstance(cache, Pages)
            mixed = self.mixer(hidden, batch, cache, mode)
        else:
            assert not isinstance(cache, Pages)
            mixed = self.mixer(hidden, batch, cache, mode)
        del hidden  # so that a program has its memory back
        return self._fed(x, mixed, mode)

    def enter(self, x: Tensor, batch: Batch, cache: Pages, mode: Mode) -> Tensor:
        """The first part of an attention layer, up to keys and values in the pages: see
        `Attention.enter`."""
        assert isinstance(self.mixer, Attention)
        return self.mixer.enter(self._normed(x, mode), batch, cache, mode)

    def leave(self, x: Tensor, mixed: Tensor, batch: Batch, cache: Pages, mode: Mode) -> Tensor:
        """What is left of it, for tokens that have entered, all or some: their rows of x and of
        what `enter` returned, a batch of theirs alone. The same bits as the whole."""
        assert isinstance(self.mixer, Attention)
        return self._fed(x, self.mixer.attend(mixed, batch, cache, mode), mode)

    def _normed(self, x: Tensor, mode: Mode) -> Tensor:
        offset, eps = self.network.architecture.norm_offset, self.network.eps
        return rms_norm(x, self.input_norm, eps, offset=offset, compute=mode.compute)

    def _fed(self, x: Tensor, mixed: Tensor, mode: Mode) -> Tensor:
        """The second half of the layer."""
        offset, eps = self.network.architecture.norm_offset, self.network.eps
        self._check(mixed, "mixer", mode)
        x, hidden = add_norm(x, mixed, self.post_norm, eps, offset=offset, compute=mode.compute)
        fed = self.feed_forward(hidden, mode)
        self._check(fed, "feed-forward", mode)
        return add(x, fed, mode.compute)

    def _check(self, x: Tensor, what: str, mode: Mode) -> None:
        """The sum of finite numbers of this size is finite, so one pass tells.

        While a program records there is nothing to look at: in its replays NaN goes on through norm
        and residual to the logits, where it is found.
        """
        if mode.compute.program is not None:
            return
        if not math.isfinite(float(x.sum())):
            bad = x.isfinite().logical_not().any(-1).nonzero().reshape(-1)
            if len(bad):
                raise EngineError(
                    f"{self.name}: the output of the {what} is NaN or infinite for {len(bad)} of "
                    f"{len(x)} tokens, the first at row {int(bad[0])} of the batch: a weight or "
                    "scale of this layer is damaged; `nybble inspect` and `nybble diff` show more"
                )
