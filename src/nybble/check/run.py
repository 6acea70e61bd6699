"""Running the rules over a survey, and what comes out.

Selection is ruff's: a prefix of ids ("NB2"), an id, a rule's name, or ALL. Knows no rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

from nybble.check.rule import Finding, Rule, Severity
from nybble.check.rules import RULES
from nybble.check.survey import Survey
from nybble.errors import RecipeError


@dataclass
class CheckReport:
    """All findings, the worst first, and what was not looked at.

    `skipped` are (rule, reason) pairs; `known` are findings that the baseline has.
    """

    where: str
    findings: list[Finding] = field(default_factory=list)
    skipped: list[tuple[Rule, str]] = field(default_factory=list)
    known: list[Finding] = field(default_factory=list)

    def count(self, severity: Severity) -> int:
        """How many findings have this severity."""
        return sum(f.severity == severity for f in self.findings)

    @property
    def has_errors(self) -> bool:
        return any(f.severity == Severity.ERROR for f in self.findings)


def select_rules(select: Iterable[str] = (), ignore: Iterable[str] = ()) -> tuple[Rule, ...]:
    """The rules that the words choose, in the order of ids. Raises RecipeError for a word that
    chooses none."""
    chosen, dropped = tuple(select) or ("ALL",), tuple(ignore)
    for word in (*chosen, *dropped):
        if not any(_is_meant(rule, word) for rule in RULES):
            raise RecipeError(
                f"{word!r} is no rule: give an id such as {RULES[0].id}, a prefix of ids such as "
                f"NB2, a name such as {RULES[0].name}, or ALL"
            )
    return tuple(
        rule
        for rule in RULES
        if any(_is_meant(rule, w) for w in chosen) and not any(_is_meant(rule, w) for w in dropped)
    )


def _is_meant(rule: Rule, word: str) -> bool:
    return word == "ALL" or rule.id.startswith(word.upper()) or rule.name == word


def run_rules(survey: Survey, rules: Sequence[Rule] = RULES) -> CheckReport:
    """Look with every rule whose needs are met."""
    report = CheckReport(survey.where)
    for rule in rules:
        reason = _why_not(rule, survey)
        if reason:
            report.skipped.append((rule, reason))
        else:
            report.findings += rule.look(survey)
    report.findings.sort(key=lambda f: (-f.severity, f.rule.id))
    return report


def _why_not(rule: Rule, survey: Survey) -> str:
    if "source" in rule.needs and survey.source is None:
        return "needs --source"
    if "lock" in rule.needs and survey.lock is None:
        return "needs --lock"
    if "values" in rule.needs and not survey.has_data:
        return "the files hold no values"
    if "jinja2" in rule.needs and find_spec("jinja2") is None:
        return "needs jinja2: pip install 'nybble[torch]'"
    return ""
