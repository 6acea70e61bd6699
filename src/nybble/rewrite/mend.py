"""What a mend is: the rules that call for it and the function that does it. Knows no mend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nybble.check.rule import Finding
from nybble.check.survey import Survey
from nybble.rewrite.draft import Draft

#: Changes the draft; is given the source, if there is one, and the findings that called for it.
Mend = Callable[[Draft, Survey | None, Sequence[Finding]], None]


@dataclass(frozen=True, slots=True)
class Step:
    """One mend; `needs_source`: without --source it is left undone, and said so."""

    rules: tuple[str, ...]
    mend: Mend
    needs_source: bool = False
