"""What the measuring pass notes, against hooks on transformers' model on the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from nybble.calibrate.amax import WINDOW, AmaxObserver, calibration_windows, measure_amax
from nybble.checkpoint.compressed_tensors import CompressedTensors
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import TextError
from nybble.plan.plan import Plan, make_plan
from nybble.plan.recipe import parse_recipe
from nybble.progress import Progress

CARRIED = tiny.MODELS / "hybrid-chat-mtp"
#: BF16 operands here, float32 there: the largest of many values moves by a rounding or two.
TOLERANCE = 0.03
TOKENS = 700
EVERYTHING = """
[[rule]]
roles = ["attention", "linear_attention", "shared_expert", "lm_head"]
scheme = "fp8-static"
[[rule]]
roles = ["routed_expert"]
scheme = "nvfp4-w4a4"
"""


@pytest.fixture(scope="module")
def plan() -> Any:
    with Checkpoint.open(CARRIED) as checkpoint:
        yield make_plan(checkpoint, parse_recipe("everything", EVERYTHING), CompressedTensors())


def measured(plan: Plan, text: str | None = None) -> Any:
    return measure_amax(plan, text=text, tokens=TOKENS, threads=2, progress=Progress())


@pytest.fixture(scope="module")
def found(plan: Plan) -> Any:
    return measured(plan)


def test_every_module_that_needs_a_scale_is_measured(plan: Plan, found: Any) -> None:
    wanted = {m.module for j in plan.jobs if j.scheme.needs_input_scale for m in j.members}
    assert wanted == set(found.amax) == set(found.tokens)
    assert found.total_tokens == TOKENS
    assert all(value > 0 for value in found.amax.values())


def test_inputs_are_those_that_transformers_sees(found: Any) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(
        CARRIED, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    seen: dict[str, float] = {}

    def note(name: str) -> Any:
        def hook(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[name] = max(seen.get(name, 0.0), float(inputs[0].abs().max()))

        return hook

    names = {n.replace("model.language_model.", "model."): n for n in found.amax}
    for name, module in model.named_modules():
        if name in names:
            module.register_forward_pre_hook(note(names[name]))
    with torch.inference_mode():
        for window in calibration_windows(CARRIED, None, TOKENS):
            model(window[None])
    assert len(seen) >= 8 * 5  # all but the routed experts, which are no modules there
    for name, amax in seen.items():
        assert found.amax[name] == pytest.approx(amax, rel=TOLERANCE), name


def test_experts_are_measured_on_the_tokens_that_visit_them(found: Any) -> None:
    base = "model.language_model.layers.3.mlp.experts"
    visits = [found.tokens[f"{base}.{e}.up_proj"] for e in range(8)]
    assert sum(visits) == 2 * TOKENS
    assert len(set(visits)) > 1
    gate = [found.amax[f"{base}.{e}.gate_proj"] for e in range(8)]
    assert gate == [found.amax[f"{base}.{e}.up_proj"] for e in range(8)]
    # The shared expert sees every token, so what any routed one sees too.
    assert max(gate) == found.amax["model.language_model.layers.3.mlp.shared_expert.up_proj"]


def test_the_observer_keeps_the_largest_and_nan() -> None:
    observer = AmaxObserver({"a", "e.0", "e.1"})
    observer.linear(("a", "b"), torch.tensor([[1.0, -3.0]]))
    observer.linear(("a", "b"), torch.tensor([[2.0, 0.5]]))
    rows = torch.tensor([[1.0], [-5.0], [2.0]])
    observer.experts([("e.0",), ("e.1",)], rows, torch.tensor([2, 1]))
    assert observer.amax == {"a": 3.0, "e.0": 5.0, "e.1": 2.0}
    assert observer.tokens == {"a": 2, "e.0": 2, "e.1": 1}
    observer.linear(("a",), torch.tensor([[torch.nan]]))
    observer.linear(("a",), torch.tensor([[9.0]]))
    assert observer.amax["a"] != observer.amax["a"]


def test_an_expert_that_nobody_visits_has_no_entry() -> None:
    observer = AmaxObserver({"e.0", "e.1"})
    observer.experts([("e.0",), ("e.1",)], torch.ones((2, 3)), torch.tensor([2, 0]))
    assert observer.tokens == {"e.0": 2}


def test_a_text_of_ones_own(plan: Plan) -> None:
    words = "Once upon a time there was a little girl. " * 200
    own = measured(plan, words)
    assert own.total_tokens == TOKENS
    with pytest.raises(TextError, match=r"expected 700; .*--calibration-tokens"):
        measured(plan, "too short")


def test_windows_follow_the_model_s_tokenizer(tmp_path: Path) -> None:
    windows = calibration_windows(CARRIED, None, 1100)
    assert [len(w) for w in windows] == [WINDOW, WINDOW, 1100 - 2 * WINDOW]
    ids = torch.cat(windows)
    assert (ids == 4088).any(), "dialogues are rendered with the model's own template"
    assert not torch.equal(
        ids[:500], torch.cat(calibration_windows(tiny.MODELS / "stories-hybrid-moe", None, 500))
    )
