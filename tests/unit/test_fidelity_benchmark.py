"""benchmarks/fidelity: what a wrong figure of the contest could come from, apart from the tools."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "fidelity"
CARRIED = FOLDER.parents[1] / "models" / "hybrid-chat-mtp"


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scripts import each other by name, as scripts/bench starts them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("dithered", "choices", "tokens", "tools"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_dithered_weights_stay_in_their_cells() -> None:
    import dithered

    generator = np.random.default_rng(1)
    values = generator.standard_normal((7, 96)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_1
    raw = gguf.quants.quantize(values, kind)
    before = gguf.quants.dequantize(raw, kind)
    moved = dithered.noise(raw, np.random.default_rng(2))
    step = raw.reshape(-1, 20)[:, :2].copy().view(np.float16).astype(np.float32)
    share = moved.reshape(-1, 32) / step
    assert np.abs(share).max() <= 0.5
    assert share.std() > 0.25  # a cell's whole width: uniform has 0.289
    blocks = before.reshape(-1, 32)
    lowest = blocks == blocks.min(axis=1, keepdims=True)
    assert (share[lowest] >= 0).all()  # Q4_1 puts a block's least weight on the grid


def test_only_the_choice_is_scored_after_its_prompt() -> None:
    import choices

    from nybble.text.tokenizer import Tokenizer

    question = choices.Question("Question: What is wet?\nAnswer:", (" water", " the dry sand"), 0)
    tokenizer = Tokenizer.open(CARRIED)
    windows = choices.windows_of([question], tokenizer)
    for window, choice in zip(windows, question.choices, strict=True):
        assert tokenizer.decode(window.targets.tolist(), skip_special=False) == choice
        prompt = window.tokens[: window.first_scored].tolist()
        assert tokenizer.decode(prompt, skip_special=False) == question.prompt


def test_flips_count_both_ways_and_accuracy_only_their_difference() -> None:
    import choices

    questions = [choices.Question("", ("a", "b", "c"), 0)] * 4
    reference = np.array([0, 0, 1, 1])
    found = choices.judge(np.array([0, 1, 0, 2]), reference, questions)
    values = {name: found[name]["value"] for name in found}  # type: ignore[index]
    assert values == {"accuracy": 0.5, "flipped": 0.75, "lost": 0.0}


def test_calibration_windows_hold_the_text_without_marks() -> None:
    import tokens

    from nybble.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.open(CARRIED)
    story = "Once upon a time there was a cat who liked the sea. " * 20
    marked = f'<doc id="1" url="x">\n{story}</doc>\n'
    windows = tokens.cut(tokenizer, marked, 3, 32)
    assert [len(w) for w in windows] == [32] * 3
    joined = tokenizer.decode([i for w in windows for i in w], skip_special=False)
    assert story.startswith(joined)
    with pytest.raises(SystemExit, match="need more"):
        tokens.cut(tokenizer, "too short", 3, 32)


def test_every_tool_runs_a_script_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tools

    task = tools.Task(tmp_path / "model", tmp_path / "ids.json", 1, "nvfp4-all")
    monkeypatch.setattr(tools, "python_of", Path)
    scripts = set()
    for tool in tools.TOOLS.values():
        for command in tool.commands(task, tmp_path / "out"):
            scripts |= {Path(part) for part in command if str(part).endswith(".py")}
            assert all("IDS" != str(part) for part in command)
    assert scripts
    assert all(script.exists() for script in scripts)
