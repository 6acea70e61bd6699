"""Rules about files: what a message counts and names, and what is no fault."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from defects import files as planted
from folder import INDEX, Defect, Folder, read_shard, write_shard
from make import CLEAN, make
from nybble.check import files
from nybble.check.rule import Finding, Severity
from nybble.check.survey import Survey

FIRST, SECOND = planted.FIRST, planted.SECOND
BY_NAME = {d.name: d for d in planted.DEFECTS}


def look(path: Path) -> list[Finding]:
    survey = Survey.open(path)
    return [f for rule in files.RULES for f in rule.look(survey)]


def only(path: Path) -> Finding:
    """The one finding of a folder."""
    (finding,) = look(path)
    return finding


def planted_in(tmp_path: Path, name: str) -> Path:
    return make(BY_NAME[name], tmp_path / name)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A sound checkpoint of two files that a test may change."""
    return Path(shutil.copytree(CLEAN / "nybble-modelopt", tmp_path / "checkpoint"))


def test_sound_folders_have_no_finding_but_notes() -> None:
    for base in sorted(CLEAN.iterdir()):
        assert [f.message for f in look(base) if f.severity > Severity.NOTE] == []


# Defects after which other rules of files fire as well, and why.
WITH_OTHERS = {
    "numbered-shard-alone": {"NB019"},  # it has no index either
    "two-files-without-index": set(),
    "pickled-weights-only": {"NB021"},
    "index-without-map": set(),
}


@pytest.mark.parametrize("defect", planted.DEFECTS, ids=lambda d: d.name)
def test_one_fault_is_one_finding(defect: Defect, tmp_path: Path) -> None:
    found = look(make(defect, tmp_path / "made"))
    assert [f.rule.id for f in found].count(defect.rule) == 1
    assert {f.rule.id for f in found} - {defect.rule} <= WITH_OTHERS.get(defect.name, set())


def test_a_missing_shard_names_its_tensors(tmp_path: Path) -> None:
    finding = only(planted_in(tmp_path, "shard-missing"))
    lost = read_shard(CLEAN / "nybble-modelopt" / SECOND)
    assert finding.subjects == (SECOND,)
    assert finding.facts["tensors"] == sorted(lost)
    assert f"{len(lost)} of 122 tensors are lost" in finding.message


def test_a_truncated_shard_names_what_is_cut_off(copy: Path) -> None:
    size = (copy / SECOND).stat().st_size
    os.truncate(copy / SECOND, size - 1)
    finding = only(copy)
    assert finding.rule.id == "NB002"
    assert len(finding.facts["tensors"]) == 1  # type: ignore[arg-type]
    assert finding.facts["expected_bytes"] == {SECOND: size}
    assert finding.facts["found_bytes"] == {SECOND: size - 1}


def test_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    finding = only(planted_in(tmp_path, "shard-is-lfs-pointer"))
    assert "git lfs pull" in finding.message
    assert finding.facts["lfs_pointers"] == [SECOND]


def test_headers_alone_are_a_note_and_beside_data_an_error(copy: Path) -> None:
    planted.cut_all_data(copy)
    assert [(f.rule.id, f.severity) for f in look(copy)] == [("NB002", Severity.ERROR)]
    planted.headers_only(copy)
    assert [(f.rule.id, f.severity) for f in look(copy)] == [("NB013", Severity.NOTE)]


def test_a_stray_file_counts_by_what_it_holds(copy: Path) -> None:
    tensors = read_shard(copy / SECOND)
    one = {name: tensors[name] for name in list(tensors)[:1]}
    write_shard(copy / "again.safetensors", one)
    assert only(copy).rule.id == "NB005"
    new = {"model.language_model.layers.1.self_attn.q_proj.bias": next(iter(one.values()))}
    write_shard(copy / "again.safetensors", new)
    finding = only(copy)
    assert (finding.rule.id, finding.facts["tensors"]) == ("NB023", list(new))


def test_copies_of_a_tensor_are_compared(tmp_path: Path) -> None:
    same = only(planted_in(tmp_path, "tensor-twice-equal"))
    other = only(planted_in(tmp_path, "tensor-twice-different"))
    assert (same.severity, other.severity) == (Severity.WARNING, Severity.ERROR)
    assert same.subjects == other.subjects == (planted.NORM,)


def test_index_entries_are_absent_or_misplaced(tmp_path: Path) -> None:
    absent = only(planted_in(tmp_path, "index-names-absent-tensor"))
    assert absent.severity == Severity.ERROR
    misplaced = only(planted_in(tmp_path, "index-names-wrong-file"))
    assert misplaced.severity == Severity.WARNING
    assert misplaced.facts["found_in"] == {planted.EMBEDDING: FIRST}


def test_total_size_may_be_that_of_the_files(copy: Path) -> None:
    sizes = sum(p.stat().st_size for p in copy.glob("*.safetensors"))
    index = json.loads((copy / INDEX).read_text())
    for stated, expected in ((sizes, []), (sizes + 1, [Severity.NOTE]), (1, [Severity.WARNING])):
        index["metadata"]["total_size"] = stated
        (copy / INDEX).write_text(json.dumps(index))
        assert [f.severity for f in look(copy)] == expected


def test_an_index_without_metadata_is_sound(copy: Path) -> None:
    index = json.loads((copy / INDEX).read_text())
    (copy / INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))
    assert look(copy) == []


def test_numbered_files_must_be_complete(tmp_path: Path) -> None:
    skipped = planted_in(tmp_path, "saver-skipped-shard")
    finding = next(f for f in look(skipped) if f.rule.id == "NB017")
    assert finding.severity == Severity.WARNING  # the index is consistent
    assert finding.subjects == ("model-00002-of-00003.safetensors",)
    (skipped / INDEX).unlink()
    finding = next(f for f in look(skipped) if f.rule.id == "NB017")
    assert finding.severity == Severity.ERROR


def test_a_huge_count_in_a_file_name_is_no_work(copy: Path) -> None:
    (copy / FIRST).rename(copy / "model-00001-of-99999.safetensors")
    (copy / SECOND).unlink()
    (copy / INDEX).unlink()
    finding = next(f for f in look(copy) if f.rule.id == "NB017")
    assert len(finding.subjects) == 99_998


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("modules.json", "[1, 2]", []),  # somebody else's file, and JSON
        ("modules.json", "[1,", [Severity.NOTE]),
        ("generation_config.json", "[]", [Severity.ERROR]),
        ("config.json", "", [Severity.ERROR]),
    ],
)
def test_json_counts_by_who_reads_it(
    copy: Path, name: str, text: str, expected: list[Severity]
) -> None:
    (copy / name).write_text(text)
    found = [f for f in look(copy) if f.rule.id == "NB009"]
    assert [f.severity for f in found] == expected
    assert {f.file for f in found} <= {name}


def test_links_inside_the_folder_are_fine(copy: Path) -> None:
    (copy / "copy.json").symlink_to("generation_config.json")
    assert look(copy) == []


def test_links_of_a_hub_cache_are_fine(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0a1b"
    shutil.copytree(CLEAN / "nybble-dense", blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert look(snapshot) == []


def test_a_pipe_is_not_waited_for(copy: Path) -> None:
    (copy / SECOND).unlink()
    os.mkfifo(copy / SECOND)
    assert "NB010" in {f.rule.id for f in look(copy)}


@pytest.mark.parametrize(
    ("name", "start", "expected"),
    [
        ("pytorch_model.bin", b"PK\x03\x04rest", [Severity.WARNING]),
        ("pytorch_model.bin", b"cos\nsystem\n", [Severity.WARNING]),
        ("tables.pkl", b"cos\nsystem\n", [Severity.NOTE]),
        ("consolidated.00.pth", b"\x80\x02rest", [Severity.WARNING]),
        ("training_args.bin", b"PK\x03\x04rest", [Severity.NOTE]),
        ("openvino_model.bin", b"\x00\x01\x02\x03", []),
        ("empty.pt", b"", []),
        ("one.pt", b"\x80", []),
    ],
)
def test_pickles_are_known_by_their_bytes(
    copy: Path, name: str, start: bytes, expected: list[Severity]
) -> None:
    (copy / name).write_bytes(start)
    assert [f.severity for f in look(copy)] == expected


def test_unknown_models_say_what_was_not_looked_at(tmp_path: Path) -> None:
    finding = only(planted_in(tmp_path, "unknown-model-type"))
    assert finding.severity == Severity.NOTE
    assert "'unheard_of'" in finding.message


def test_an_empty_folder_has_no_weights_and_no_config(tmp_path: Path) -> None:
    assert [f.rule.id for f in look(tmp_path)] == ["NB015", "NB021"]


@given(st.data())
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_damaged_bytes_are_found_or_harmless(copy: Path, data: st.DataObject) -> None:
    """Whatever is done to a header, rules answer; they find it, or names and places are as
    before."""
    sound = (CLEAN / "nybble-modelopt" / SECOND).read_bytes()
    before = Survey.open(CLEAN / "nybble-modelopt").shards[SECOND]
    broken = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, before.header_bytes - 1))] = data.draw(st.integers(0, 255))
    (copy / SECOND).write_bytes(broken)
    found = look(copy)
    if not any(f.severity == Severity.ERROR for f in found):
        after = Survey.open(copy).shards[SECOND]
        assert after.expected == before.expected
        assert {(t.offset, t.nbytes) for t in after.tensors.values()} == {
            (t.offset, t.nbytes) for t in before.tensors.values()
        }


def test_the_zoo_reads_what_it_writes(tmp_path: Path) -> None:
    folder = Folder.read(CLEAN / "source")
    folder.write(tmp_path / "again")
    again = Folder.read(tmp_path / "again")
    assert {n: t.tobytes() for n, t in folder.tensors.items()} == {
        n: t.tobytes() for n, t in again.tensors.items()
    }
    assert folder.files == again.files
