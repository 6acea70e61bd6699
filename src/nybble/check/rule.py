"""What a check rule is, and what it finds.

A rule is a row of text (id, severity, explanation, fix, public threads) and one function from a
survey to findings. The rules of a subject stand in that subject's file; `rules.py` has the list.
Knows no subject.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from nybble.check.survey import Survey


class Severity(IntEnum):
    """How bad a finding is. Only errors make `check` fail."""

    NOTE = 0  # worth knowing: some engine, or a reader, will take it otherwise than expected
    WARNING = 1  # answers or speed suffer somewhere, or a later step will stumble
    ERROR = 2  # it does not load, or answers wrongly

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, in one place or in many alike.

    `subjects` are the modules, tensors or files it is about, all of them; `message` is one
    sentence that counts them, names the first, and says expected against found. `facts` are
    numbers and lists for JSON and for `repair`. `severity` is the rule's unless the case at hand is
    milder or graver. `engine` is the replayed engine ("vllm"), "" for what holds for all.
    """

    rule: Rule
    message: str
    subjects: tuple[str, ...] = ()
    file: str = ""
    severity: Severity = Severity.ERROR
    facts: Mapping[str, object] = field(default_factory=dict)
    engine: str = ""


Look = Callable[[Survey], Iterable[Finding]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: a row of the documentation and the function that looks.

    `name` is kebab-case, `summary` one line, `explanation` a paragraph that says what happens to a
    user and why, `fix` one sentence. `threads` are public addresses that describe the failure.
    `is_repairable`: `nybble repair` mends it (with a source where it needs one). `needs` are
    "source" (another checkpoint to compare with) and "values" (bytes of tensors, not only
    headers): a rule whose needs are not met is skipped and counted as skipped.
    """

    id: str
    name: str
    severity: Severity
    summary: str
    explanation: str
    fix: str
    look: Look = field(repr=False, compare=False)
    threads: tuple[str, ...] = ()
    is_repairable: bool = False
    needs: frozenset[str] = frozenset()

    def finding(
        self,
        message: str,
        subjects: Iterable[str] = (),
        *,
        file: str = "",
        severity: Severity | None = None,
        engine: str = "",
        **facts: object,
    ) -> Finding:
        """A finding of this rule."""
        level = self.severity if severity is None else severity
        message = _for_people(message)
        return Finding(self, message, tuple(subjects), file, level, facts, engine)


#: A message is one sentence; what is longer repeats a file's own words.
_MESSAGE_LIMIT = 2000


def _for_people(message: str) -> str:
    """The message without what would command a terminal or fill it: it quotes untrusted names."""
    if not message.isprintable():
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    return message if len(message) <= _MESSAGE_LIMIT else message[: _MESSAGE_LIMIT - 3] + "..."
