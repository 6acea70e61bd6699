"""`nybble check`: what is wrong with a checkpoint, ours or anybody's, local or behind HTTP."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import nybble
from nybble.check.engines import find_engine
from nybble.check.engines.replayed import Replay
from nybble.check.lock import Lock, make_lock, read_lock
from nybble.check.replay_modules import replays
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.rules import RULES
from nybble.check.run import run_rules, select_rules
from nybble.check.survey import Survey, Target
from nybble.checkpoint.files import ADDRESSES, Files, LocalFiles
from nybble.checkpoint.safetensors import collector_paused, parse_json
from nybble.errors import CheckpointError, RecipeError

Place = str | PathLike[str]
#: Compute capabilities that engines decide by.
HARDWARE = (
    *("sm75", "sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm103", "sm110", "sm120", "sm121"),
    "cpu",
)
#: With an error of these, what the headers say is not the model.
_BROKEN = frozenset(
    (
        *("NB001", "NB002", "NB003", "NB007", "NB009", "NB010", "NB014", "NB015", "NB016"),
        *("NB017", "NB021", "NB101", "NB109", "NB110", "NB111", "NB118", "NB119"),
    )
)


@dataclass
class Checked:
    """What `check` found, the worst first.

    `known` are findings of the baseline; `skipped` are rules that could not look, with the reason.
    `replays` are the engines, each with what it would make of the checkpoint.
    """

    where: str
    source: str
    deep: bool
    target: Target
    findings: list[Finding]
    known: list[Finding]
    skipped: list[tuple[Rule, str]]
    tensors: int
    files: int
    payload_bytes: int
    modules: int
    replays: list[Replay] = field(default_factory=list)

    def count(self, severity: Severity) -> int:
        """How many findings have this severity."""
        return sum(f.severity == severity for f in self.findings)

    def obstacle(self, engine: str) -> str:
        """Why a replay of headers says nothing of this engine's loading: files that are broken, or
        an error of its own; "" if nothing stands against it."""
        broken = sorted({f.rule.id for f in self._errors() if f.rule.id in _BROKEN})
        if broken:
            return f"not judged, as the files are not whole ({', '.join(broken)})"
        own = sorted({f.rule.id for f in self._errors() if f.engine == engine})
        return f"does not run it as asked ({', '.join(own)})" if own else ""

    def _errors(self) -> Iterator[Finding]:
        return (f for f in (*self.findings, *self.known) if f.severity == Severity.ERROR)

    @property
    def has_errors(self) -> bool:
        """`check` fails with exit code 3."""
        return self.count(Severity.ERROR) > 0

    def as_json(self) -> dict[str, object]:
        """The JSON document `nybble.check/1`."""
        return {
            "schema": "nybble.check/1",
            "nybble": nybble.__version__,
            "path": self.where,
            "source": self.source,
            "deep": self.deep,
            "engine": self.target.engine,
            "engine_version": self.target.engine_version,
            "tensors": self.tensors,
            "modules": self.modules,
            "files": self.files,
            "bytes": self.payload_bytes,
            "errors": self.count(Severity.ERROR),
            "warnings": self.count(Severity.WARNING),
            "notes": self.count(Severity.NOTE),
            "findings": [finding_json(f) for f in self.findings],
            "baseline": [fingerprint(f) for f in self.known],
            "skipped": [{"rule": rule.id, "reason": reason} for rule, reason in self.skipped],
            "engines": [engine_json(r, self.obstacle(r.engine)) for r in self.replays],
        }


def check(
    path: Place,
    *,
    source: Place | None = None,
    engine: str = "",
    tensor_parallel: int = 0,
    hardware: str = "",
    deep: bool = False,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    baseline: Place | None = None,
    lock: Place | None = None,
) -> Checked:
    """Check a checkpoint: a local folder, hf://org/model[@revision], or an http(s) folder.

    `engine` is "vllm" or "vllm@0.32": its replay's refusals become errors, the other engines are
    left out. `baseline` names a document of `write_baseline`, whose findings are set aside; `lock`
    one of `write_lock`, whose hashes must hold. Raises CheckpointError if there is nothing to
    check, RecipeError for an unknown rule or engine.
    """
    rules = select_rules(select, ignore)
    name, version = "", ""
    if engine:
        found_engine, version = find_engine(engine)
        name = found_engine.name
    if hardware and hardware not in HARDWARE:
        raise RecipeError(
            f"hardware {hardware!r} is not known: expected one of {', '.join(HARDWARE)}"
        )
    target = Target(name, version, tensor_parallel, hardware)
    with collector_paused():
        return _check(path, source, target, rules, deep, baseline, lock)


def _check(
    path: Place,
    source: Place | None,
    target: Target,
    rules: Sequence[Rule],
    deep: bool,
    baseline: Place | None,
    lock: Place | None,
) -> Checked:
    before = None if source is None else Survey(open_files(source))
    held = None if lock is None else read_lock(Path(lock))
    survey = Survey(open_files(path), before, deep=deep, target=target, lock=held)
    refuse_nothing(survey)
    report = run_rules(survey, rules)
    known = set() if baseline is None else _read_baseline(Path(baseline))
    return Checked(
        where=survey.where,
        source=before.where if before else "",
        deep=deep,
        target=target,
        findings=[f for f in report.findings if not known or fingerprint(f) not in known],
        known=[f for f in report.findings if known and fingerprint(f) in known],
        skipped=report.skipped,
        tensors=len(survey.tensors),
        files=len(survey.shards),
        payload_bytes=sum(m.kind.nbytes for m in survey.modules)
        + sum(t.nbytes for t in survey.contents.kv_scales),
        modules=len(survey.modules),
        replays=list(replays(survey).values()),
    )


def open_files(path: Place) -> Files:
    """The files at a path or an address."""
    if isinstance(path, str) and path.startswith(ADDRESSES):
        from nybble.checkpoint.remote import open_remote

        return open_remote(path)
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: {'is a file' if folder.exists() else 'no such folder'}; give the folder of "
            "a checkpoint, hf://org/model, or an http(s) address"
        )
    return LocalFiles(folder)


def refuse_nothing(survey: Survey) -> None:
    """Raise CheckpointError for a folder that holds no checkpoint at all."""
    if not survey.shards and not survey.faults and not survey.config:
        raise CheckpointError(
            f"{survey.where}: neither config.json nor *.safetensors among its "
            f"{len(survey.names)} files; nothing to check"
        )


# ----------------------------------------------------------------------------------- baseline, lock


def fingerprint(finding: Finding) -> str:
    """What makes a finding the same one next time: rule, severity, engine, file, all it is about,
    and its words but for the numbers in them."""
    words = re.sub(r"[\d.,]+", "#", finding.message)
    about = hashlib.sha256("\n".join([*sorted(finding.subjects), words]).encode()).hexdigest()[:16]
    level = str(finding.severity)
    return "/".join((finding.rule.id, level, finding.engine, finding.file, about))


def write_baseline(checked: Checked, file: Place) -> None:
    """Keep all findings, known ones too, to be set aside next time."""
    entries = [
        {"finding": fingerprint(f), "message": f.message} for f in checked.findings + checked.known
    ]
    document = {"schema": "nybble.baseline/1", "findings": entries}
    _write(file, document)


def _write(file: Place, document: Mapping[str, object]) -> None:
    try:
        Path(file).write_text(json.dumps(document, indent=2) + "\n")
    except OSError as error:
        raise RecipeError(f"{file}: cannot be written: {error.strerror}") from error


def refuse_unwritable(file: Place) -> None:
    """Raise RecipeError, before any work, for a place where no file can be made."""
    folder = Path(file).absolute().parent
    if Path(file).is_dir() or not folder.is_dir():
        what = "is a folder" if Path(file).is_dir() else f"there is no folder {folder}"
        raise RecipeError(f"{file}: cannot be written: {what}")


def _read_baseline(file: Path) -> set[str]:
    document = _read_document(file, "nybble.baseline/1", "--write-baseline")
    entries = document.get("findings")
    if not isinstance(entries, list):
        raise RecipeError(f"{file}: findings must be a list")
    return {str(e.get("finding")) for e in entries if isinstance(e, Mapping)}


def _read_document(file: Path, schema: str, option: str) -> dict[str, object]:
    try:
        document = parse_json(file.read_bytes(), str(file))
    except OSError as error:
        raise RecipeError(
            f"{file}: cannot be read: {error.strerror}; {option} makes such a file"
        ) from error
    if document.get("schema") != schema:
        raise RecipeError(f"{file}: expected schema {schema}, found {document.get('schema')!r}")
    return document


def write_lock(path: Place, file: Place) -> Lock:
    """Write size and sha256 of every file of a checkpoint, for `check(lock=...)`.

    Reads everything, except of a hub that lists the hashes itself.
    """
    files = open_files(path)
    lock = make_lock(files)
    _write(file, lock.as_json())
    return lock


# --------------------------------------------------------------------------------------------- JSON


def finding_json(finding: Finding) -> dict[str, object]:
    """One entry of `findings`."""
    return {
        "rule": finding.rule.id,
        "name": finding.rule.name,
        "severity": str(finding.severity),
        "message": finding.message,
        "file": finding.file,
        "engine": finding.engine,
        "subjects": list(finding.subjects),
        "facts": dict(finding.facts),
        "fix": finding.rule.fix,
        "repairable": finding.rule.is_repairable,
        "fingerprint": fingerprint(finding),
    }


def engine_json(replay: Replay, obstacle: str) -> dict[str, object]:
    """One entry of `engines`."""
    return {
        "engine": replay.engine,
        "version": replay.version,
        "loads": replay.loads and not obstacle,
        "obstacle": obstacle,
        "refusals": list(replay.refusals),
        "runs_as": runs_as(replay),
        "notes": list(replay.notes),
    }


def runs_as(replay: Replay) -> dict[str, int]:
    """How many modules of the file run in which way: {"W4A16": 30961, "W8A8": 130, ...}."""
    counts: dict[str, int] = {}
    for built in replay.built:
        if built.runs_as:
            counts[built.runs_as] = counts.get(built.runs_as, 0) + built.count
    return counts


def rule_json(rule: Rule) -> dict[str, object]:
    """A rule's row."""
    return {
        "id": rule.id,
        "name": rule.name,
        "severity": str(rule.severity),
        "summary": rule.summary,
        "explanation": rule.explanation,
        "fix": rule.fix,
        "threads": list(rule.threads),
        "repairable": rule.is_repairable,
        "needs": sorted(rule.needs),
    }


def find_rules(words: Iterable[str]) -> tuple[Rule, ...]:
    """The rules that ids, prefixes or names choose."""
    return select_rules(tuple(words))


__all__ = [
    "RULES",
    "Checked",
    "Finding",
    "Replay",
    "Rule",
    "Severity",
    "check",
    "find_rules",
    "finding_json",
    "fingerprint",
    "rule_json",
    "runs_as",
    "write_baseline",
    "write_lock",
]
