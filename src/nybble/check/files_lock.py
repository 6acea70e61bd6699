"""The rule about a lock: every file is the one that was locked (NB090)."""

from __future__ import annotations

from collections.abc import Iterator

from nybble.check.lock import Lock, sha256_of
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import Survey
from nybble.checkpoint.files import Files


def compare_lock(files: Files, lock: Lock) -> Iterator[Finding]:
    """What differs; files of another size are not read."""
    present = set(files.names())
    absent = [n for n in sorted(lock.files) if n not in present and not files.has(n)]
    added = sorted(present - lock.files.keys())
    changed = [
        name
        for name in sorted(lock.files.keys() - set(absent))
        if files.size(name) != lock.files[name][0] or sha256_of(files, name) != lock.files[name][1]
    ]
    for what, names in (("missing", absent), ("changed", changed), ("not in the lock", added)):
        if names:
            yield LOCK_RULE.finding(
                f"{len(names)} of {len(lock.files)} locked files are {what}, the first {names[0]}"
                if what != "not in the lock"
                else f"{len(names)} files are not in the lock, the first {names[0]}",
                names,
                file=names[0],
                severity=Severity.NOTE if what == "not in the lock" else None,
            )


def _look(survey: Survey) -> Iterator[Finding]:
    return compare_lock(survey.files, survey.lock) if survey.lock else iter(())


LOCK_RULE = Rule(
    "NB090",
    "lock-broken",
    Severity.ERROR,
    "A file is not the one that was locked",
    "Publishers refresh a revision under the same name: spellings of the quantization section "
    "change, shards are replaced, and what was tested is no longer what is served. A lock holds "
    "size and sha256 of every file; any difference is an error, a file beyond the lock a note.",
    "Fetch the locked revision again, or test the new one and write a new lock.",
    _look,
    needs=frozenset({"lock"}),
)

RULES = (LOCK_RULE,)
