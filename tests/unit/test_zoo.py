"""The zoo: every planted defect is found, by its rule; clean folders have no error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from defects import all_defects
from folder import Defect, Folder, read_shard
from make import CLEAN, main, make
from nybble.api.check import check
from nybble.api.repair import repair, undo
from nybble.check.rule import Severity
from nybble.check.rules import RULES
from nybble.check.survey import Survey

DEFECTS = all_defects()
BASES = sorted(p.name for p in CLEAN.iterdir() if p.is_dir())
OURS = [name for name in BASES if name.startswith("nybble-")]
NOT_IN_FOLDERS = {"NB090"}  # of a lock, which is no part of a folder


def _names(defects: list[Defect]) -> list[str]:
    return [d.name for d in defects]


def _source(defect: Defect) -> Path | None:
    return CLEAN / defect.source if defect.source else None


@pytest.mark.parametrize("defect", DEFECTS, ids=_names(DEFECTS))
def test_a_planted_defect_is_found(defect: Defect, tmp_path: Path) -> None:
    folder = make(defect, tmp_path / defect.name)
    found = check(
        folder,
        source=_source(defect),
        engine=defect.engine,
        tensor_parallel=defect.tensor_parallel,
        deep=defect.deep,
    )
    own = next(r for r in RULES if r.id == defect.rule)
    levels = {str(f.severity) for f in found.findings if f.rule.id == defect.rule}
    assert (defect.severity or str(own.severity)) in levels
    errors = {f.rule.id for f in found.findings if f.severity == Severity.ERROR}
    assert errors <= {defect.rule, *defect.also}


@pytest.mark.parametrize("defect", DEFECTS, ids=_names(DEFECTS))
def test_its_clean_twin_does_not_fire(defect: Defect) -> None:
    assert defect.twin in BASES
    found = check(
        CLEAN / defect.twin,
        source=_source(defect),
        engine=defect.engine,
        tensor_parallel=defect.tensor_parallel,
        deep=defect.deep,
        select=[defect.rule],
    )
    assert [f.message for f in found.findings] == []


def _is_note(defect: Defect) -> bool:
    return next(r for r in RULES if r.id == defect.rule).severity == Severity.NOTE


@pytest.mark.parametrize("base", BASES)
def test_a_clean_folder_has_no_error(base: str) -> None:
    found = check(CLEAN / base, deep=True)
    assert [f.message for f in found.findings if f.severity == Severity.ERROR] == []


@pytest.mark.parametrize("base", OURS)
def test_ours_have_no_warning(base: str) -> None:
    source = CLEAN / ("source-dense" if "dense" in base else "source")
    found = check(CLEAN / base, source=source, deep=True)
    assert [f.message for f in found.findings if f.severity > Severity.NOTE] == []


def test_every_rule_has_a_defect() -> None:
    assert {r.id for r in RULES} - {d.rule for d in DEFECTS} - NOT_IN_FOLDERS == set()


def test_the_zoo_is_large_and_partly_wild() -> None:
    wild = [d for d in DEFECTS if d.origin.startswith(("tool: ", "thread: https://"))]
    assert len(DEFECTS) >= 60
    assert len(wild) >= 20
    assert len({d.name for d in DEFECTS}) == len(DEFECTS)


def _original(defect: Defect) -> Path:
    return CLEAN / ("source-dense" if "dense" in defect.base else "source")


REPAIRED = [d for d in DEFECTS if d.repaired]


@pytest.mark.parametrize("defect", REPAIRED, ids=_names(REPAIRED))
def test_a_repairable_defect_is_repaired(defect: Defect, tmp_path: Path) -> None:
    folder = make(defect, tmp_path / "broken")
    done = repair(
        folder,
        tmp_path / "out",
        source=_source(defect) or _original(defect),
        only=[defect.rule] if _is_note(defect) else [],
        engine=defect.engine,
        deep=defect.deep,
    )
    assert done.changes
    assert done.after is not None
    assert defect.rule not in {f.rule.id for f in done.after.findings}
    assert not done.has_errors
    _shows_every_change(
        folder,
        tmp_path / "out",
        {c.name for c in done.changes} | {c.old_name for c in done.changes},
    )


@pytest.mark.parametrize("defect", REPAIRED, ids=_names(REPAIRED))
def test_a_repair_can_be_undone(defect: Defect, tmp_path: Path) -> None:
    folder = make(defect, tmp_path / "broken")
    source = _source(defect) or _original(defect)
    only = [defect.rule] if _is_note(defect) else []
    done = repair(folder, tmp_path / "out", source=source, only=only, engine=defect.engine)
    if not done.changes:  # found only with --deep
        return
    not_kept = undo(tmp_path / "out", tmp_path / "back")
    assert not_kept == done.not_kept
    before, after = Survey.open(folder), Survey.open(tmp_path / "back")
    assert before.tensors.keys() == after.tensors.keys()
    for name, info in before.tensors.items():
        a, b = before.values([info])[0], after.values([after.tensors[name]])[0]
        assert a is not None
        assert b is not None
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    mine, theirs = _files(folder), _files(tmp_path / "back")
    assert {n: d for n, d in mine.items() if n not in not_kept} == theirs


def _shows_every_change(before: Path, after: Path, shown: set[str]) -> None:
    """Tensors and side files that the diff does not name are the same bytes, by another reader."""
    old, new = _tensors(before, shown), _tensors(after, set())
    for name in (old.keys() | new.keys()) - shown:
        assert (old[name].dtype, old[name].tobytes()) == (new[name].dtype, new[name].tobytes())
    a, b = (Folder.read(p).files if p == after else _files(p) for p in (before, after))
    for name in a.keys() | b.keys():
        if name not in shown and not name.startswith("nybble_repair/"):
            assert a[name] == b[name]


def _files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.suffix != ".safetensors" and p.name != "model.safetensors.index.json"
    }


def _tensors(folder: Path, dropped_files: set[str]) -> dict:  # type: ignore[type-arg]
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in dropped_files:
            found |= read_shard(file)
    return found


def test_every_rule_that_says_so_is_repaired_by_some_defect() -> None:
    assert {r.id for r in RULES if r.is_repairable} == {d.rule for d in REPAIRED}


def test_making_the_zoo_lists_it(tmp_path: Path) -> None:
    names = _names(DEFECTS)[:3]
    main([str(tmp_path), *names])
    listed = json.loads((tmp_path / "zoo.json").read_text())
    assert [row["name"] for row in listed] == names
    assert all((tmp_path / name).is_dir() for name in names)
