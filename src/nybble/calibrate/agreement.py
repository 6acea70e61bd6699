"""Whether a mixture's router still chooses the experts that it chose before quantization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.models.feed_forward import MixtureOfExperts
from nybble.models.linear import Mode


class Choices:
    """The experts that each token is sent to while a layer runs (models.linear.Observer)."""

    def __init__(self, mixture: MixtureOfExperts, mode: Mode) -> None:
        self.mixture, self.mode = mixture, Mode(mode.compute)
        self._chosen: list[Tensor] = []

    def linear(self, modules: tuple[str, ...], x: Tensor) -> None:
        """See models.linear.Observer: the router's input is the one that matters."""
        if modules == self.mixture.router.modules:
            self._chosen.append(self.mixture.route(x, self.mode).chosen.clone())

    def experts(self, modules: Sequence[tuple[str, ...]], x: Tensor, counts: Tensor) -> None:
        """See models.linear.Observer."""

    def add(self, chosen: Tensor) -> None:
        """Those of tokens that come later, int32 [M, top], noted elsewhere."""
        self._chosen.append(chosen)

    @property
    def chosen(self) -> Tensor:
        """int32 [T, top]."""
        return torch.cat(self._chosen)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of one layer: the share of chosen experts that are the teacher's too, and the share of tokens
    whose experts are exactly the teacher's."""

    experts: float
    tokens: float


def agreement(teacher: Tensor, student: Tensor) -> Agreement:
    """Both int [T, top], the experts of the same tokens."""
    common = (teacher[:, :, None] == student[:, None, :]).any(-1).sum(-1)
    top = teacher.shape[1]
    return Agreement(float(common.double().mean()) / top, float((common == top).double().mean()))
