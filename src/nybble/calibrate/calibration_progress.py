"""The progress of a calibrated run: one bar over all layers, with what is won so far.

Counts token layers, and rounding as one pass of the tokens: the display's rate and time left are
then those of whole layers.
"""

from __future__ import annotations

from nybble.calibrate.rounding import Choice
from nybble.progress import Progress


class CalibrationProgress(Progress):
    """Tells another display: layer, what is being done there, and the loss won so far."""

    def __init__(self, shown: Progress) -> None:
        self.shown = shown
        self._layer = self._doing = ""
        self._has_begun = False
        self._absmax = self._taken = 0.0

    def begin(self, total: int, done: int) -> None:
        """Begin the bar, `done` of `total` behind; once."""
        if not self._has_begun:
            self._has_begun = True
            self.shown.stage("calibrate", total, unit="token layers")
            self.shown.advance(done)

    def at(self, layer: str) -> None:
        """Name the layer at work."""
        self._layer = layer

    def doing(self, what: str) -> None:
        """Name what is done there."""
        self._doing = what

    def won(self, choice: Choice) -> None:
        """Count what a linear's codes won over round-to-nearest on held-out tokens."""
        if choice.method in choice.losses:
            self._absmax += choice.losses["absmax"]
            self._taken += choice.losses[choice.method]

    @property
    def share(self) -> float:
        """The share of round-to-nearest's loss that is gone, over all linears so far."""
        return 1 - self._taken / self._absmax if self._absmax > 0 else 0.0

    def advance(self, count: int, note: str = "") -> None:
        """See Progress."""
        where = f"{self._layer}, {self._doing} {note}".rstrip()
        won = f"; {self.share:.0%} of the loss won" if self._absmax > 0 else ""
        self.shown.advance(count, where + won)

    def say(self, line: str) -> None:
        """See Progress."""
        self.shown.say(line)
