"""The table of known failures: every row can be read, names a source, and matches what it says."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from nybble.check import known_bad as module
from nybble.check.known_bad import (
    ENGINES,
    FEATURES,
    features_of,
    known_bad,
    parse_table,
    parse_versions,
)
from nybble.check.survey import Survey, Target
from nybble.checkpoint.files import LocalFiles
from nybble.errors import RecipeError

CLEAN = Path(__file__).parents[2] / "zoo" / "clean"
HYBRID = frozenset(("gated_delta", "mtp"))
ROW = """[[row]]
id = "a"
engine = "vllm"
versions = ">=0.20,<0.29"
features = ["moe"]
flags = []
symptom = "s"
workaround = "w"
threads = ["https://example.org/1"]
state = "open"
"""


@pytest.mark.parametrize("row", known_bad(), ids=lambda row: row.id)
def test_every_row_names_a_source_and_says_what_helps(row: module.KnownBad) -> None:
    assert row.engine in ENGINES
    assert row.features <= FEATURES.keys()
    assert row.symptom.endswith(".")
    assert row.workaround
    for thread in row.threads:
        parts = urlsplit(thread)
        assert parts.scheme == "https"
        assert parts.netloc in ("github.com", "nvd.nist.gov")
        assert parts.path.rpartition("/")[2]


def test_the_table_is_long_and_begins_with_mtp_and_prefix_caching() -> None:
    rows = known_bad()
    assert len(rows) >= 25
    assert rows[0].id == "mtp-prefix-cache"
    assert rows[0].features == HYBRID
    assert {urlsplit(t).path for t in rows[0].threads} >= {
        f"/vllm-project/vllm/issues/{n}" for n in (43559, 47194, 53912)
    }


def test_every_feature_is_asked_for_or_a_fact_of_its_own() -> None:
    asked = frozenset().union(*(row.features for row in known_bad()))
    assert asked <= FEATURES.keys()
    assert FEATURES.keys() - asked <= {"fp8"}


def test_engine_version_and_features_choose_rows() -> None:
    assert {row.engine for row in known_bad("sglang")} == {"sglang"}
    assert known_bad("vllm", features=()) == ()
    assert "mtp-prefix-cache" in [row.id for row in known_bad("vllm", "0.33.0", HYBRID)]
    old, new = known_bad("vllm", "0.15.3"), known_bad("vllm", "0.16.0")
    assert "vllm-mixed-precision-whitelist" in [row.id for row in old]
    assert "vllm-mixed-precision-whitelist" not in [row.id for row in new]


@pytest.mark.parametrize(
    ("versions", "version", "expected"),
    [
        ("", "1.0", True),
        (">=0.20,<0.29", "0.20.0", True),
        (">=0.20,<0.29", "0.28.4.post1", True),
        (">=0.20,<0.29", "0.29.0", False),
        (">=0.20,<0.29", "0.29.0rc2", True),
        (">=0.20,<0.29", "0.19.9", False),
        (">=0.20", "0.20.0rc1", False),
        ("<=0.15", "0.15.9", True),
        (">0.15", "0.15.9", False),
        ("==5.20", "5.20.3", True),
        ("!=5.20", "5.20.3", False),
        ("<5.23", "5.23.0+cu130", False),
        ("<5.23", "main", True),
        ("<5.23", "", True),
        ("<1", "v0.9", True),
    ],
)
def test_versions_are_compared_number_by_number(
    versions: str, version: str, expected: bool
) -> None:
    row = parse_table(ROW.replace(">=0.20,<0.29", versions))[0]
    assert row.is_in(version) is expected


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"vllm"', '"vlm"', "engine: expected one of vllm"),
        ('"open"', '"perhaps"', "state: expected one of open"),
        ('["moe"]', '["mo"]', "'mo' is none of"),
        ('["moe"]', '"moe"', "features: expected a list"),
        ("https", "http", "at least one https address"),
        ('["https://example.org/1"]', "[]", "at least one https address"),
        (">=0.20", "0.20", "expected bounds"),
        ('">=0.20,<0.29"', "3", "expected a string"),
        ('symptom = "s"', 'symptom = ""', "must not be empty"),
        ('symptom = "s"', "symptom = 3", "must be strings"),
        ('symptom = "s"', "", "unknown keys symptom"),
        ('symptom = "s"', 'symptom = "s"\nmore = 1', "unknown keys more"),
        ("[[row]]", "[[row", "is not TOML"),
    ],
)
def test_a_row_that_is_wrong_is_refused(old: str, new: str, words: str) -> None:
    with pytest.raises(RecipeError, match="known_bad.toml") as found:
        parse_table(ROW.replace(old, new))
    assert words in str(found.value)


def test_an_id_counts_once() -> None:
    with pytest.raises(RecipeError, match="occurs twice"):
        parse_table(ROW + ROW)


def test_bounds_are_signs_and_numbers() -> None:
    assert parse_versions(" >=0.20 , <0.29 ", "here") == ((">=", "0.20"), ("<", "0.29"))


def test_a_hybrid_checkpoint_has_the_features_of_one() -> None:
    found = features_of(Survey.open(CLEAN / "nybble-w4a4"))
    assert found >= HYBRID | {"moe", "vision", "modelopt", "nvfp4-moe", "nvfp4-w4a4", "input-scale"}
    assert "nvfp4-w4a16" not in found
    assert "compressed-tensors" in features_of(Survey.open(CLEAN / "nybble-ct"))
    dense = features_of(Survey.open(CLEAN / "nybble-dense"))
    assert dense >= {"nvfp4-dense", "kv_fp8"}
    assert not dense & {"moe", "gated_delta", "mtp", "vision"}
    assert features_of(Survey.open(CLEAN / "source-dense")) == frozenset()


def test_the_note_names_the_rows_and_only_those_of_the_engine() -> None:
    survey = Survey(LocalFiles(CLEAN / "nybble-modelopt"), target=Target("sglang", "0.5.23"))
    (finding,) = module.KNOWN_BAD.look(survey)
    assert finding.engine == "sglang"
    assert set(finding.subjects) == {
        row.id for row in known_bad("sglang", "0.5.23", features_of(survey))
    }
    assert "sglang-fused-names" in finding.subjects
    (every,) = module.KNOWN_BAD.look(Survey.open(CLEAN / "nybble-modelopt"))
    assert "the first mtp-prefix-cache (vllm, with --enable-prefix-caching" in every.message
    assert set(finding.subjects) < set(every.subjects)
    assert not list(module.KNOWN_BAD.look(Survey.open(CLEAN / "source-dense")))
