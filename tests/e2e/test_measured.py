"""Runs that measure input scales: interrupted and resumed, without the libraries, and from the
command line.

The forward pass is a function of the test.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import nybble.api.extras as extras_module
import nybble.quantize.run as run_module
import tiny
from faulty_disk import FaultyDisk
from measured import MIXED, Pass, made_up, without
from nybble.api.input_measurement import CALIBRATION_TOKENS
from nybble.api.plan import LAYOUTS
from nybble.api.quantize import quantize
from nybble.calibrate.scales import HEADROOM, InputAmax, input_scales
from nybble.checkpoint.disk import Disk
from nybble.checkpoint.reader import Checkpoint
from nybble.cli import main
from nybble.errors import (
    CheckpointError,
    DoesNotFit,
    FormatError,
    MissingExtra,
    NybbleError,
    RecipeError,
    TextError,
)
from nybble.plan.plan import Plan, make_plan
from nybble.progress import Progress
from nybble.quantize.input_scales import stored_input_scales

LM = "model.language_model."
EXPERTS = LM + "layers.{}.mlp.experts."
DENSE = LM + "layers.1.self_attn.o_proj"
RARE = EXPERTS.format(0) + "1.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("source") / "m", "qwen3_5_moe", vision=True)


@pytest.fixture(scope="module")
def plan(source: Path) -> Iterator[Plan]:
    with Checkpoint.open(source) as checkpoint:
        yield make_plan(checkpoint, MIXED, LAYOUTS["modelopt"])


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras_module, "find_spec", lambda name: None)


# ---------------------------------------------------------------------------------------- resume


class Stopped(BaseException):
    """What a test stops a run with."""


def stop_after(commits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a run stop in the middle; the next one is undisturbed."""
    monkeypatch.setattr(run_module, "COMMIT_BYTES", 30_000)
    true_commit, seen = run_module.Run.commit, []

    def commit(self: run_module.Run) -> None:
        true_commit(self)
        seen.append(1)
        if len(seen) == commits:
            raise Stopped

    monkeypatch.setattr(run_module.Run, "commit", commit)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_resumed_run_has_the_scales_it_began_with_and_the_same_bytes(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    options: dict[str, Any] = {"layout": layout, "shard_size": 50_000, "headroom": 1.7}
    whole = quantize(source, tmp_path / "whole", MIXED, measure=Pass(), **options)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Stopped):
            quantize(source, out, MIXED, measure=Pass(), **options)
    header = json.loads((tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()[0])
    assert whole.input_scales is not None
    assert header["input_scales"]["sha256"] == whole.input_scales.sha256
    assert stored_input_scales(out) == whole.input_scales
    other = Pass(**{DENSE: 1000.0})
    resumed = quantize(source, out, MIXED, measure=other, resume=True, **options)
    assert other.calls == 0
    assert resumed.input_scales == whole.input_scales
    assert resumed.measure_seconds == 0
    assert tiny.tree(out) == tiny.tree(tmp_path / "whole")
    assert stored_input_scales(out) is None


def test_no_library_is_needed_where_the_scales_are_there(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, no_torch: None
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stopped):
            quantize(source, out, "nvfp4", measure=Pass())
    quantize(source, out, "nvfp4", resume=True)
    quantize(source, tmp_path / "whole", "nvfp4", measure=Pass())
    assert tiny.tree(out) == tiny.tree(tmp_path / "whole")


def test_a_resumed_run_is_asked_for_as_the_first_was(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text"
    text.write_text("Some words.")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stopped):
            quantize(source, out, "nvfp4", measure=Pass())
    for options, said in (
        ({"headroom": 3}, r"input_scales\.headroom: 2\.0 then, 3\.0 now"),
        ({"calibration_tokens": 99}, '"8,192 tokens of the project.s mixture" then, "99 tokens'),
        ({"calibration_text": text}, r"input_scales\.calibration: .* of a text with sha256 c04112"),
        ({"data_free": True}, "plan: "),
    ):
        with pytest.raises(CheckpointError, match=f"differs from this one in .*{said}"):
            quantize(source, out, "nvfp4", measure=Pass(), resume=True, **options)
    changed = tmp_path / "out.partial" / "journal.jsonl"
    assert stored_input_scales(out) is not None
    changed.write_bytes(changed.read_bytes()[1:])
    with pytest.raises(CheckpointError, match="is damaged"):
        quantize(source, out, "nvfp4", measure=Pass(), resume=True)


def test_a_header_that_differs_in_thousands_of_scales_is_told_in_a_line(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(headroom: float, **options: Any) -> None:
        run_module.execute(
            plan,
            tmp_path / "out",
            run_module.Options(**options),
            version="1",
            progress=Progress(),
            input_scales=input_scales(plan, made_up(plan), headroom),
        )

    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stopped):
            run(2.0)
    with pytest.raises(CheckpointError, match=r"sha256: .* \(and \d\d more\)") as found:
        run(3.0, resume=True)
    assert len(str(found.value)) < 1000


def test_a_disk_that_fails_anywhere_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every seventh operation; all of them, for a recipe without scales, in tests/property."""
    monkeypatch.setattr(run_module, "COMMIT_BYTES", 25_000)
    path = tiny.checkpoint(tmp_path / "m", "qwen3", num_hidden_layers=1)
    options: dict[str, Any] = {"search": "absmax", "measure": Pass(), "jobs": 1}
    clean = FaultyDisk()
    quantize(path, tmp_path / "clean", "nvfp4", disk=clean, **options)
    expected = tiny.tree(tmp_path / "clean")
    assert len(clean.operations) > 30
    for k in range(1, len(clean.operations), 7):
        out = tmp_path / str(k)
        with pytest.raises(CheckpointError, match="run again with --resume"):
            quantize(path, out, "nvfp4", disk=FaultyDisk(k, "eio"), **options)
        if not out.exists():
            quantize(path, out, "nvfp4", resume=True, **options)
        assert tiny.tree(out) == expected, clean.operations[k - 1]


# -------------------------------------------------------------- what stops a run before it measures


@pytest.mark.usefixtures("no_torch")
def test_without_torch_both_ways_out_are_named_and_nothing_is_written(
    tmp_path: Path, source: Path
) -> None:
    shown: list[Plan] = []
    with pytest.raises(MissingExtra) as found:
        quantize(source, tmp_path / "out", on_plan=shown.append)
    said = str(found.value)
    assert "recipe nvfp4" in said
    assert "pip install 'nybble[torch]'" in said
    assert "--data-free" in said
    assert shown == []
    with pytest.raises(MissingExtra) as found:
        quantize(source, tmp_path / "out", "nvfp4-w4a4")
    assert "--data-free" not in str(found.value)  # it has no such form
    assert "nvfp4-all" in str(found.value)
    assert list(tmp_path.iterdir()) == []
    assert quantize(source, tmp_path / "out", dry_run=True).plan.needs_data
    assert list(tmp_path.iterdir()) == []
    quantize(source, tmp_path / "free", data_free=True)
    quantize(source, tmp_path / "all", "nvfp4-all")


def test_without_a_data_free_form_data_free_says_so(tmp_path: Path, source: Path) -> None:
    with pytest.raises(RecipeError, match="recipe nvfp4-redhat has no data-free form: routed_exp"):
        quantize(source, tmp_path / "out", "nvfp4-redhat", data_free=True)


class FullDisk(Disk):
    def free_bytes(self, path: Path) -> int:
        return 1000


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("occupied", CheckpointError, "out: exists and is not an empty folder"),
        ("link", CheckpointError, "out: exists and is not an empty folder"),
        ("file", CheckpointError, "out: exists and is not an empty folder"),
        ("partial", CheckpointError, "left from an interrupted run; continue it with --resume"),
        ("disk", DoesNotFit, "free on that disk"),
        ("search", FormatError, "'best': choose one of"),
    ],
)
def test_nothing_is_measured_in_vain(
    tmp_path: Path, source: Path, kind: str, error: type[NybbleError], said: str
) -> None:
    out = tmp_path / "out"
    if kind == "occupied":
        out.mkdir()
        (out / "precious").write_text("x")
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        out.write_text("x")
    elif kind == "partial":
        (tmp_path / "out.partial").mkdir()
    before = tiny.tree(tmp_path)
    measure = Pass()
    options: dict[str, Any] = {"search": "best"} if kind == "search" else {}
    with pytest.raises(error, match=said):
        quantize(
            source,
            out,
            measure=measure,
            disk=FullDisk() if kind == "disk" else None,
            **options,
        )
    assert measure.calls == 0
    assert tiny.tree(tmp_path) == before


def test_a_measurement_that_fails_leaves_nothing_behind(tmp_path: Path, source: Path) -> None:
    with pytest.raises(RecipeError, match=f"^{DENSE}: its input was measured as nan"):
        quantize(source, tmp_path / "out", measure=Pass(**{DENSE: np.nan}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [{"headroom": 3.0}, {"calibration_tokens": 5}, {"calibration_text": __file__}]
)
@pytest.mark.parametrize("free", [{"recipe": "nvfp4-all"}, {"data_free": True}])
def test_calibration_options_without_effect_are_refused(
    tmp_path: Path, source: Path, options: dict[str, Any], free: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match="stores no input scale .* have no effect"):
        quantize(source, tmp_path / "out", **options, **free)


def test_calibration_texts_and_tokens_must_be_usable(tmp_path: Path, source: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(b"\xff\xfe\x00")
    for options, said in (
        ({"calibration_text": tmp_path / "absent"}, "absent cannot be read: .*No such file"),
        ({"calibration_text": bad}, "bad cannot be read: .*utf-8"),
        ({"calibration_tokens": 0}, "0 calibration tokens"),
    ):
        with pytest.raises(TextError, match=said):
            quantize(source, tmp_path / "out", **options)


# ------------------------------------------------------------------------------------ command line


@pytest.fixture
def ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command line, with a measurement of the test in place of the forward pass."""
    asked: dict[str, Any] = {}

    def measure_amax(plan: Plan, **options: Any) -> InputAmax:
        asked.update(options)
        base = EXPERTS.format(0)
        found = made_up(plan)
        return without(found, *(m for m in found.amax if m.startswith(base + "1.")))

    module = SimpleNamespace(measure_amax=measure_amax)
    monkeypatch.setitem(sys.modules, "nybble.calibrate.amax", module)
    monkeypatch.setattr(extras_module, "find_spec", lambda name: name)

    def run(*arguments: object) -> tuple[int, str, str]:
        asked.clear()
        monkeypatch.setattr(sys, "argv", ["nybble", *map(str, arguments)])
        try:
            main()
            code: Any = 0
        except SystemExit as done:
            code = done.code or 0
        return (code, *capsys.readouterr())

    run.asked = asked
    return run


def test_the_default_recipe_measures_with_what_the_flags_say(
    tmp_path: Path, source: Path, ask: Any
) -> None:
    code, out, _ = ask("quantize", source, tmp_path / "a", "--json")
    assert code == 0
    document = json.loads(out)["input_scales"]
    assert (document["tokens"], document["headroom"], document["modules"]) == (77, HEADROOM, 10)
    assert (ask.asked["text"], ask.asked["tokens"]) == (None, CALIBRATION_TOKENS)
    assert ask.asked["threads"] >= 1
    text = tmp_path / "text"
    text.write_text("Grüße.\n", "utf-8")
    flags = ["--calibration-text", text, "--calibration-tokens", 64, "--headroom", 4, "-j", 3]
    code, out, _ = ask("quantize", source, tmp_path / "b", *flags)
    assert code == 0
    assert (ask.asked["text"], ask.asked["tokens"], ask.asked["threads"]) == ("Grüße.\n", 64, 3)
    told = " ".join(out.split())
    assert "input scales 10 modules, largest magnitudes on 77 tokens times 4, measured in" in told
    assert "(64 tokens of a text with sha256 " in told
    assert "measured the input scales of 10 modules (fp8-static)" in told  # the plan


def test_fallbacks_are_told_by_count(tmp_path: Path, source: Path, ask: Any) -> None:
    code, out, _ = ask("quantize", source, tmp_path / "out", "-r", "nvfp4-w4a4")
    assert code == 0
    told = " ".join(out.split())
    assert "3 modules of experts without a token took the maximum of their layer" in told
    assert f"(most in {EXPERTS.format(0)[:-1]}: 3)" in told


def test_data_free_measures_nothing(tmp_path: Path, source: Path, ask: Any) -> None:
    code, out, _ = ask("quantize", source, tmp_path / "out", "--data-free")
    assert (code, ask.asked) == (0, {})
    assert "input scales" not in out.partition("written and opened again")[2]
    code, _, err = ask("quantize", source, tmp_path / "b", "--data-free", "--headroom", 3)
    assert code == 1
    assert "have no effect" in err
    code, _, err = ask("quantize", source, tmp_path / "b", "--data-free", "-r", "nvfp4-w4a4")
    assert code == 1
    assert "has no data-free form" in err
    assert ask("quantize", source, tmp_path / "b", "--headroom", 0.5)[0] == 2
    assert ask("quantize", source, tmp_path / "b", "--calibration-tokens", 0)[0] == 2


def test_help_states_the_defaults(ask: Any) -> None:
    out = " ".join(ask("quantize", "--help")[1].split())
    assert f"default: {CALIBRATION_TOKENS}." in out
    assert f"default: {HEADROOM:g}." in out


def test_a_plan_says_what_is_measured_and_what_data_free_would_be(source: Path, ask: Any) -> None:
    full = " ".join(ask("plan", source)[1].split())
    assert "measured the input scales of 10 modules (fp8-static)" in full
    free = json.loads(ask("plan", source, "--data-free", "--json")[1])
    assert f"({free['bytes']:,} bytes)" in full
    assert "without data with --data-free: linear_attention in BF16 (" in full
    assert free["needs_data"] is False
    assert any("the data-free form measures none" in note for note in free["notes"])
    assert "measured" not in ask("plan", source, "--data-free")[1].partition("note")[0]


def test_the_pass_takes_what_it_is_given() -> None:
    """The real one, where its libraries are there: the call above is answered by a stand-in."""
    amax = pytest.importorskip("nybble.calibrate.amax")
    signature = inspect.signature(amax.measure_amax)
    signature.bind(None, text=None, tokens=1, threads=1, progress=Progress())
    assert signature.parameters["tokens"].default == CALIBRATION_TOKENS
