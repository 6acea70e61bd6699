"""Write docs/rules.md from the rules: `python docs/make_rules.py` (--check only looks)."""

from __future__ import annotations

import sys
from pathlib import Path

from nybble.check.rules import RULES

PAGE = Path(__file__).parent / "rules.md"
SUBJECTS = {
    "NB0": "Files",
    "NB1": "Completeness",
    "NB2": "Scales and values",
    "NB3": "Declarations",
    "NB4": "Names",
    "NB5": "What goes along",
    "NB6": "Engines",
}
HEAD = """# The rules of `nybble check`

An **error** does not load, or answers wrongly; a **warning** costs quality or speed somewhere, or
trips a later step; a **note** is worth knowing. Only errors make `check` exit with 3.
`nybble check --explain NB210` prints a rule; `--select` and `--ignore` take ids, prefixes and
names. Rules marked *mends* are mended by `nybble repair`.

This page is made from the rules by `python docs/make_rules.py`.
"""


def page() -> str:
    """The page."""
    lines = [HEAD, "| rule | severity | | finds |", "| --- | --- | --- | --- |"]
    for rule in RULES:
        mends = "mends" if rule.is_repairable else ""
        anchor = f"[{rule.id}](#{rule.id.lower()}-{rule.name})"
        lines.append(f"| {anchor} {rule.name} | {rule.severity} | {mends} | {rule.summary} |")
    subject = ""
    for rule in RULES:
        if rule.id[:3] != subject:
            subject = rule.id[:3]
            lines += ["", f"## {SUBJECTS[subject]} ({subject}xx)"]
        lines += ["", f"### {rule.id} {rule.name}", ""]
        needs = f" Needs {', '.join(sorted(rule.needs))}." if rule.needs else ""
        lines += [f"*{str(rule.severity).capitalize()}.*{needs} {rule.explanation}", ""]
        lines.append(f"**Fix:** {rule.fix}")
        seen = ", ".join(f"<{thread}>" for thread in rule.threads)
        lines += ["", f"Seen in: {seen}" if seen else "No public report known."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    text = page()
    if arguments == ["--check"]:
        if not PAGE.exists() or PAGE.read_text() != text:
            raise SystemExit(f"{PAGE}: is not what the rules say; run python docs/make_rules.py")
        return
    PAGE.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
