"""Mending a checkpoint: a draft of what it is to be, its writing, the proof, and the way back.

The result is a new folder; the one that was given is never touched. Beside the checkpoint it holds
`nybble_repair/`: a manifest of every change and what was there before, so that `undo` makes the
tensors and files of the original again.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nybble.check.rule import Finding, Severity
from nybble.check.run import select_rules
from nybble.check.survey import REPAIR_FOLDER, Survey
from nybble.checkpoint.disk import Disk
from nybble.checkpoint.files import LocalFiles
from nybble.checkpoint.reader import INDEX, Checkpoint
from nybble.checkpoint.safetensors import TensorInfo, parse_json, show
from nybble.checkpoint.writer import (
    SHARD_BYTES,
    CheckpointWriter,
    layout_shards,
    partial_folder,
)
from nybble.errors import CheckFailed, CheckpointError, RecipeError
from nybble.progress import Progress
from nybble.rewrite.draft import PIECE_BYTES, Change, Draft, Origin, is_carried
from nybble.rewrite.mends import STEPS

FOLDER = REPAIR_FOLDER.rstrip("/")
MANIFEST = f"{FOLDER}/manifest.json"
OLD_BYTES = f"{FOLDER}/tensors"
SCHEMA = "nybble.repair-manifest/1"


@dataclass
class Repair:
    """What is to be done: the draft and its changes, and what is not mended, with the reason."""

    draft: Draft
    changes: list[Change]
    unmended: list[tuple[Finding, str]] = field(default_factory=list)

    @property
    def not_kept(self) -> list[str]:
        """Files that are left out and too large to be kept for `undo`: they are still in the
        folder that was given."""
        return _not_kept(self.draft)


def plan_repair(
    survey: Survey, findings: Sequence[Finding], *, only: Sequence[str] = (), version: str
) -> Repair:
    """Draft what takes away these findings; those of severity note only if `only` names them.

    `only` are words of `check --select`. Raises RecipeError for one that no mend answers to,
    CheckpointError for a source of another model.
    """
    named = _named(only)
    _refuse_stranger(survey)
    draft = Draft(survey, version)
    wanted = [f for f in findings if _is_wanted(f, named)]
    repair = Repair(draft, draft.changes)
    mended: set[str] = set()
    for step in STEPS:
        called = [f for f in wanted if f.rule.id in step.rules]
        if not called:
            continue
        if step.needs_source and survey.source is None:
            repair.unmended += [(f, "needs --source") for f in called]
            continue
        before = len(draft.changes)
        try:
            step.mend(draft, survey.source, called)
        except CheckpointError as error:  # what cannot be said in a layout, for one
            repair.unmended += [(f, str(error)) for f in called]
            continue
        if len(draft.changes) > before:
            mended |= {f.rule.id for f in called}
    left = dict(draft.left)
    for f in wanted:
        if any(f is g for g, _ in repair.unmended):
            continue
        if f.rule.id in left:
            repair.unmended.append((f, left[f.rule.id]))
        elif f.rule.id not in mended:
            other = "nothing was left to change after the other mends"
            mine = other if draft.changes else "no mend found what to change"
            reason = mine if f.rule.is_repairable else "no mend for it"
            repair.unmended.append((f, reason))
    return repair


def _named(only: Sequence[str]) -> frozenset[str]:
    """The ids of the rules that the words choose."""
    if not only:
        return frozenset()
    chosen = {rule.id for rule in select_rules(only)}
    known = {rule for step in STEPS for rule in step.rules}
    if not chosen & known:
        raise RecipeError(
            f"{', '.join(only)}: no mend answers to that; there are mends for "
            f"{', '.join(sorted(known))}"
        )
    return frozenset(chosen)


def _refuse_stranger(survey: Survey) -> None:
    """A source that is another model would be mixed into this one, tensor by tensor."""
    a, b = survey, survey.source
    if b is None or a.family is None or b.family is None:
        return
    facts = [(s.family.model_type if s.family else "", *_sizes(s)) for s in (a, b)]
    if facts[0] != facts[1] and a.dimensions and b.dimensions:
        raise CheckpointError(
            f"{b.where}: is not the source of {a.where}: model type and sizes are "
            f"{list(facts[1])}, expected {list(facts[0])}; give the checkpoint that it was made of"
        )


def _sizes(survey: Survey) -> tuple[int, ...]:
    d = survey.dimensions
    return (d.layers, d.hidden, d.vocab, d.heads, d.experts, d.expert_width) if d else ()


def _is_wanted(finding: Finding, named: frozenset[str]) -> bool:
    return finding.rule.id in named if named else finding.severity > Severity.NOTE


# ------------------------------------------------------------------------------------------ writing


def write_repair(
    repair: Repair, out: Path, *, shard_bytes: int = SHARD_BYTES, progress: Progress
) -> None:
    """Write the draft to OUT, with the manifest, and prove that only what was shown is changed.

    Raises CheckpointError while tensors are missing that nothing brought back, and whatever the
    writer raises; CheckFailed if OUT is not the draft.
    """
    draft = repair.draft
    _refuse_incomplete(draft)
    _write(draft, out, _Before(draft), shard_bytes, progress)
    _prove(draft, out, progress)


def _refuse_incomplete(draft: Draft) -> None:
    lost = [n for n in draft.cut_off if n not in draft.tensors]
    # An entry whose shard is there and sound is the index's mistake, which is made anew.
    gone = {f.file for f in draft.survey.faults_of("missing", "header", "unreadable", "bare")}
    named = draft.survey.weight_map or {}
    lost += [n for n, file in named.items() if file in gone and n not in draft.tensors]
    if lost:
        raise CheckpointError(
            f"{draft.survey.where}: {len(lost)} tensors are cut off or absent, {lost[0]} for one, "
            "and nothing can make them again; complete the download, or quantize the source again"
        )
    if not draft.survey.tensors or not draft.tensors:
        raise CheckpointError(
            f"{draft.survey.where}: holds no safetensors weights that can be read; there is "
            "nothing to repair"
        )


def _write(
    draft: Draft, out: Path, before: _Before | None, shard_bytes: int, progress: Progress
) -> None:
    shards = layout_shards([info.spec for info in draft.tensors.values()], shard_bytes)
    files: dict[str, bytes] = {MANIFEST: before.manifest()} if before else {}
    copied = []
    for name, held in draft.files.items():
        if isinstance(held, bytes):
            files[name] = held
        elif held[0].files.local is not None:
            copied.append((held[0].files.local / held[1], name))
        else:
            files[name] = held[0].files.read(held[1])
    progress.stage("write", sum(info.nbytes for info in draft.tensors.values()))
    with _removed_if_broken(out), CheckpointWriter(out, shards, disk=Disk()) as writer:
        for shard in shards:
            for info in shard.tensors:
                for at, data in draft.pieces(info.name):
                    writer.write(info.name, data, at)
                    progress.advance(len(data), info.name)
        if before:
            before.write(writer.folder)
        stored = sum(m.kind.stored for m in draft.contents.modules if m.role != "mtp")
        writer.finish(files, copied, stored)


@contextmanager
def _removed_if_broken(out: Path) -> Iterator[None]:
    """Nothing half-written stays: a repair starts from the beginning."""
    work = partial_folder(out)
    if os.path.lexists(work):
        raise CheckpointError(f"{work}: is left from a run that was stopped; remove it")
    try:
        yield
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _prove(draft: Draft, out: Path, progress: Progress) -> None:
    """Open OUT afresh: every tensor and file is what the draft says."""
    wrong = []
    progress.stage("verify", sum(info.nbytes for info in draft.tensors.values()))
    with Checkpoint.open(out) as written:
        if list(written.tensors.keys() ^ draft.tensors.keys()):
            wrong.append("the names of the tensors")
        for name, info in draft.tensors.items():
            there = written.tensors.get(name)
            if there is None or (there.dtype, there.shape) != (info.dtype, info.shape):
                wrong.append(name)
                continue
            raw = written.raw(name)
            for at, data in draft.pieces(name):
                if not np.array_equal(raw[at : at + len(data)], np.frombuffer(data, np.uint8)):
                    wrong.append(name)
                progress.advance(len(data), name)
            written.drop_pages(name)
    files = LocalFiles(out)
    wrong += [name for name in draft.files if files.read(name) != draft.file_bytes(name)]
    if wrong:
        raise CheckFailed(
            f"{out}: {len(wrong)} places are not what was to be written, {wrong[0]} for one; do "
            "not use this folder, and please report it"
        )


# -------------------------------------------------------------------------------- manifest and undo


def _not_kept(draft: Draft) -> list[str]:
    """Shards and pickles that the result leaves out."""
    dropped = {c.name for c in draft.changes if c.what == "file" and c.action == "dropped"}
    return sorted(n for n in dropped if n != INDEX and not is_carried(n))


class _Before:
    """What was there before: the manifest, and a file with the old bytes of changed tensors."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        old_names = {c.name: c.old_name for c in draft.changes if c.old_name}
        changed = {c.name for c in draft.changes if c.what == "tensor" and not c.old_name}
        self.tensors: dict[str, TensorInfo] = {}
        for name in sorted(changed):
            info = draft.survey.tensors.get(old_names.get(name, name))
            if info is not None and draft.survey.is_held(info):
                self.tensors[name] = info

    def manifest(self) -> bytes:
        survey, at = self.draft.survey, 0
        tensors: dict[str, object] = {}
        for name, info in self.tensors.items():
            tensors[name] = {"dtype": info.dtype, "shape": list(info.shape), "offset": at}
            at += info.nbytes
        files = {
            name: base64.b64encode(survey.files.read(name)).decode()
            for name in sorted({c.name for c in self.draft.changes if c.what == "file"})
            if name in survey.names and is_carried(name)
        }
        document = {
            "schema": SCHEMA,
            "of": survey.where,
            "changes": [change.as_json() for change in self.draft.changes],
            "order": list(survey.tensors),
            "tensors": tensors,
            "files": files,
            "not_kept": _not_kept(self.draft),
        }
        return (json.dumps(document, indent=1) + "\n").encode()

    def write(self, folder: Path) -> None:
        """The old bytes, one tensor after the other, into the folder at work."""
        (folder / FOLDER).mkdir(exist_ok=True)
        survey = self.draft.survey
        with (folder / OLD_BYTES).open("wb") as file:
            for info in self.tensors.values():
                for at in range(0, info.nbytes, PIECE_BYTES):
                    length = min(PIECE_BYTES, info.nbytes - at)
                    file.write(survey.files.read(info.file, info.offset + at, length))
            file.flush()
            os.fsync(file.fileno())


def plan_undo(survey: Survey, version: str) -> tuple[Draft, list[str]]:
    """The draft of the tensors and files as they were before the repair that made this folder, and
    the names of files that were not kept.

    Raises CheckpointError for a folder that no repair made, and for a manifest that is none.
    """
    if MANIFEST not in survey.files.names():
        raise CheckpointError(f"{survey.where}: has no {MANIFEST}; no repair of ours made it")
    where = f"{survey.where}/{MANIFEST}"
    manifest = parse_json(survey.files.read(MANIFEST), where)
    try:
        return _undone(survey, manifest, version)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{where}: is no manifest of a repair, or was changed ({type(error).__name__}: "
            f"{show(str(error))}); nothing is undone"
        ) from error


def _undone(
    survey: Survey, manifest: Mapping[str, object], version: str
) -> tuple[Draft, list[str]]:
    """Raises any error of a wrong type or key for a manifest that was tampered with."""
    if manifest["schema"] != SCHEMA:
        raise ValueError(f"expected schema {SCHEMA}")
    draft = Draft(survey, version)
    changes, tensors = manifest["changes"], manifest["tensors"]
    files, order, not_kept = manifest["files"], manifest["order"], manifest["not_kept"]
    if not (
        isinstance(changes, list)
        and isinstance(tensors, dict)
        and isinstance(files, dict)
        and isinstance(order, list)
        and isinstance(not_kept, list)
    ):
        raise TypeError("changes, tensors, files, order or not_kept")
    for change in reversed(changes):
        _undo(draft, change, tensors)
    for name, data in files.items():
        draft.files[name] = base64.b64decode(data, validate=True)
    if set(order) != draft.tensors.keys():
        raise ValueError("order names other tensors")
    draft.tensors = {n: draft.tensors[n] for n in order}
    return draft, [str(name) for name in not_kept]


def _undo(draft: Draft, change: Mapping[str, str], tensors: Mapping[str, object]) -> None:
    name, old_name = change["name"], change.get("old_name", "")
    action = change["action"]
    if change["what"] == "file":
        if action == "added":
            draft.files.pop(name, None)
    elif action == "renamed":
        info = draft.tensors.pop(name)
        draft.origins[old_name] = draft.origins.pop(name)
        draft.tensors[old_name] = info._replace(name=old_name)
    elif action == "added":
        draft.tensors.pop(name, None)
        draft.origins.pop(name, None)
    else:
        info = _old_tensor(draft.survey, name, tensors[name])
        draft.tensors[name] = info
        draft.origins[name] = Origin(draft.survey, info)


def _old_tensor(survey: Survey, name: str, entry: object) -> TensorInfo:
    """Where the old bytes of a tensor are."""
    if not isinstance(entry, dict):
        raise TypeError(name)
    shape = tuple(int(extent) for extent in entry["shape"])
    info = TensorInfo(name, str(entry["dtype"]), shape, OLD_BYTES, int(entry["offset"]))
    size = survey.files.size(OLD_BYTES)
    if min(shape, default=0) < 0 or not 0 <= info.offset <= info.offset + info.nbytes <= size:
        raise ValueError(f"{name}: beyond the {size} old bytes")
    return info


def write_undo(
    draft: Draft, out: Path, *, shard_bytes: int = SHARD_BYTES, progress: Progress
) -> None:
    """Write the original's tensors and files to OUT, and hold them against the draft."""
    _write(draft, out, None, shard_bytes, progress)
    _prove(draft, out, progress)
