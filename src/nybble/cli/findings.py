"""Findings as people and machines read them: text, SARIF, GitHub annotations, Markdown."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

import nybble
from nybble.cli.output import amount

if TYPE_CHECKING:
    from nybble.api.check import Checked, Finding, Replay, Rule

_SHOWN = 3
_WIDTH = 100
_INDENT = " " * 6
_LEVELS = {"error": "error", "warning": "warning", "note": "note"}


def text(found: Checked, verbose: bool = False) -> str:
    """For people: each finding with what to do, then the engines, then one line that sums up."""
    from nybble.cli.inspect import printable

    lines: list[str] = []
    for f in found.findings:
        lines += _finding(f, verbose)
    lines += _engines(found)
    lines.append(_summary(found))
    return printable("\n".join(lines)) + "\n"


def _finding(f: Finding, verbose: bool) -> list[str]:
    where = f" [{f.engine}]" if f.engine else ""
    head = f"{f.rule.id} {f.severity} {f.rule.name}{where}: {f.message}"
    lines = textwrap.wrap(
        head, _WIDTH, subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False
    )
    shown = f.subjects if verbose else _some(f.subjects)
    lines += [f"{_INDENT}- {subject}" for subject in shown]
    if len(shown) < len(f.subjects):
        lines.append(f"{_INDENT}- and {len(f.subjects) - len(shown):,} more; --verbose names them")
    lines += _filled("fix: " + f.rule.fix)
    return [*lines, ""]


def _some(subjects: Sequence[str]) -> Sequence[str]:
    """One subject alone is in the message already."""
    return () if len(subjects) < 2 else subjects[:_SHOWN]


def _filled(line: str) -> list[str]:
    return textwrap.wrap(
        line,
        _WIDTH,
        initial_indent=_INDENT,
        subsequent_indent=_INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _engines(found: Checked) -> list[str]:
    lines = []
    for replay in found.replays:
        said = engine_words(replay, found.obstacle(replay.engine))
        words = f"engine       {replay.engine} {replay.version}: {said}"
        lines += textwrap.wrap(words, _WIDTH, subsequent_indent=" " * 13, break_on_hyphens=False)
    return lines


def engine_words(replay: Replay, obstacle: str) -> str:
    """What an engine makes of the checkpoint, in a few words."""
    from nybble.api.check import runs_as

    if replay.refusals:
        return f"refuses it: {replay.refusals[0]}"
    if not replay.loads:
        problem = next((b.problem for b in replay.built if b.problem), "a module cannot be built")
        return f"does not load it: {problem}"
    if obstacle:
        return obstacle
    counts = sorted(runs_as(replay).items(), key=lambda item: -item[1])
    ways = ", ".join(f"{count:,} as {way}" for way, count in counts)
    return f"loads it; modules run: {ways}" if ways else "loads it"


def _summary(found: Checked) -> str:
    from nybble.api.check import Severity

    counts = [
        f"{found.count(level):,} {level}{'' if found.count(level) == 1 else 's'}"
        for level in sorted(Severity, reverse=True)
    ]
    text = (
        f"checked      {found.tensors:,} tensors, {found.modules:,} modules, {found.files} files, "
        f"{amount(found.payload_bytes)}{', every byte' if found.deep else ''}: {', '.join(counts)}"
    )
    if found.known:
        text += f"; {len(found.known)} more in the baseline"
    if found.skipped:
        reasons: dict[str, int] = {}
        for _, reason in found.skipped:
            reasons[reason] = reasons.get(reason, 0) + 1
        left = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        text += f"; rules that did not look: {left}"
    return "\n".join(
        textwrap.wrap(text, _WIDTH, subsequent_indent=" " * 13, break_on_hyphens=False)
    )


def explanation(rule: Rule) -> str:
    """A rule, for people who met it."""
    lines = [f"{rule.id} {rule.name} ({rule.severity}): {rule.summary}", ""]
    lines += textwrap.wrap(rule.explanation, _WIDTH)
    lines += ["", *textwrap.wrap(f"Fix: {rule.fix}", _WIDTH)]
    if rule.is_repairable:
        lines.append("`nybble repair` mends it.")
    lines += [f"See {thread}" for thread in rule.threads]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------- for machines


def github(found: Checked, verbose: bool = False) -> str:
    """Workflow commands of GitHub Actions, a line per finding."""
    from nybble.cli.inspect import printable

    kinds = {"error": "error", "warning": "warning", "note": "notice"}
    lines = []
    for f in found.findings:
        file = f"file={_property(printable(_place(found, f.file)))}," if f.file else ""
        title = _property(f"{f.rule.id} {f.rule.name}")
        body = _data(f.message + "\n" + f.rule.fix)
        lines.append(f"::{kinds[str(f.severity)]} {file}title={title}::{body}")
    return "".join(f"{line}\n" for line in lines)


def _data(words: str) -> str:
    return words.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(words: str) -> str:
    return _data(words).replace(":", "%3A").replace(",", "%2C")


def markdown(found: Checked, verbose: bool = False) -> str:
    """Tables to paste into an issue or a model card."""
    lines = [f"`nybble check` {nybble.__version__}: {_cell(found.where)}", ""]
    if found.findings:
        lines += ["| rule | severity | finding |", "| --- | --- | --- |"]
        for f in found.findings:
            engine = f" ({f.engine})" if f.engine else ""
            name = f"{f.rule.id} {f.rule.name}{engine}"
            lines.append(f"| {name} | {f.severity} | {_cell(f.message)} |")
        lines.append("")
    if found.replays:
        lines += ["| engine | what it makes of it |", "| --- | --- |"]
        lines += [
            f"| {r.engine} {r.version} | {_cell(engine_words(r, found.obstacle(r.engine)))} |"
            for r in found.replays
        ]
        lines.append("")
    summary = " ".join(_summary(found).split())
    return "\n".join([*lines, summary.replace("checked ", "Checked ", 1)]) + "\n"


def _cell(words: str) -> str:
    from nybble.cli.inspect import printable

    clean = printable(words.replace("\n", " "))
    return clean.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def sarif(found: Checked) -> dict[str, object]:
    """A SARIF 2.1.0 log. Findings without a file are about the folder's config.json."""
    from nybble.api.check import RULES, fingerprint

    rules = {rule.id: i for i, rule in enumerate(RULES)}
    results = [
        {
            "ruleId": f.rule.id,
            "ruleIndex": rules[f.rule.id],
            "level": _LEVELS[str(f.severity)],
            "message": {"text": f"{f.message}. {f.rule.fix}"},
            "locations": [
                {
                    "physicalLocation": {
                        "artifactLocation": {"uri": _uri(_place(found, f.file or "config.json"))}
                    }
                }
            ],
            "partialFingerprints": {"nybble/1": fingerprint(f)},
            "properties": {"engine": f.engine, "subjects": list(f.subjects[:100])},
        }
        for f in found.findings
    ]
    driver = {
        "name": "nybble",
        "version": nybble.__version__,
        "rules": [_sarif_rule(rule) for rule in RULES],
    }
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }


def _location(place: str) -> dict[str, object]:
    return {"physicalLocation": {"artifactLocation": {"uri": _uri(place)}}}


def _place(found: Checked, file: str) -> str:
    """A file as seen from where the command runs: annotations attach to paths of the repository."""
    place = os.path.join(found.where, file)
    if "://" in found.where:
        return place
    relative = os.path.relpath(place)
    return place if relative.startswith("..") else relative


def _uri(name: str) -> str:
    """A URI reference, whatever characters a file's name has; an address stays one."""
    scheme, found, rest = name.partition("://")
    at, _, below = rest.partition("/")
    if found:
        return f"{scheme}://{at}/{quote(below, errors='surrogatepass')}"
    return quote(name, errors="surrogatepass")


def _sarif_rule(rule: Rule) -> dict[str, object]:
    row: dict[str, object] = {
        "id": rule.id,
        "name": rule.name,
        "shortDescription": {"text": rule.summary},
        "fullDescription": {"text": rule.explanation},
        "help": {"text": _joined([rule.fix, *rule.threads])},
        "defaultConfiguration": {"level": _LEVELS[str(rule.severity)]},
    }
    if rule.threads:
        row["helpUri"] = rule.threads[0]
    return row


def _joined(lines: Iterable[str]) -> str:
    return "\n".join(lines)
