"""Measuring and generating as a user types it, on the carried model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import tiny
from nybble.api.evaluate import Protocol, evaluate, perplexity, reference
from nybble.api.generate import generate
from nybble.api.quantize import quantize
from nybble.cli import app
from nybble.errors import (
    EvaluationError,
    ModelError,
    NybbleError,
    TextError,
)

CARRIED = tiny.MODELS / "hybrid-chat-mtp"
STORIES = tiny.MODELS / "stories-hybrid-moe"
#: Enough for all figures, quick enough for every run.
SHORT = Protocol(length=128, limit=4)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "nvfp4"
    quantize(CARRIED, out, "nvfp4-all", search="absmax")
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "story.txt"
    file.write_text((tiny.TESTS / "peer" / "story.txt").read_text("utf-8"), "utf-8")
    return file


def test_quantization_has_a_price(packed: Path) -> None:
    found = evaluate(packed, CARRIED, SHORT)
    d = found.divergence
    assert d.tokens == 4 * 127
    assert 0.003 < d.kl.value < 0.1
    assert 0.75 < d.same_top.value < 0.98
    assert d.kl.estimate.interval is not None
    assert d.kl.estimate.interval.low < d.kl.value < d.kl.estimate.interval.high
    assert found.report.conditions.reference == "hybrid-chat-mtp"


def test_a_pack_stands_for_the_model_bit_by_bit(packed: Path, tmp_path: Path) -> None:
    direct = evaluate(packed, CARRIED, SHORT)
    made = reference(CARRIED, tmp_path / "pack", SHORT)
    assert made.perplexity.value == direct.divergence.reference.value
    from_pack = evaluate(packed, tmp_path / "pack")
    assert np.array_equal(from_pack.figures.kl, direct.figures.kl)
    assert np.array_equal(from_pack.figures.candidate_nll, direct.figures.candidate_nll)
    assert from_pack.divergence == direct.divergence


def test_a_pack_without_head_needs_the_right_one(packed: Path, tmp_path: Path) -> None:
    reference(CARRIED, tmp_path / "pack", SHORT, has_head=False)
    with pytest.raises(EvaluationError, match="--head"):
        evaluate(packed, tmp_path / "pack")
    found = evaluate(packed, tmp_path / "pack", head=CARRIED)
    assert np.array_equal(found.figures.kl, evaluate(packed, CARRIED, SHORT).figures.kl)
    with pytest.raises(EvaluationError, match="quantized"):
        evaluate(packed, tmp_path / "pack", head=packed)
    with pytest.raises(EvaluationError, match="leave it out"):
        evaluate(packed, CARRIED, SHORT, head=CARRIED)


def test_windows_are_those_of_the_pack(packed: Path, tmp_path: Path) -> None:
    reference(CARRIED, tmp_path / "pack", Protocol(length=96, limit=5))
    whole = evaluate(packed, tmp_path / "pack")
    assert (whole.report.conditions.length, whole.report.conditions.windows) == (96, 5)
    first = evaluate(packed, tmp_path / "pack", Protocol(limit=2))
    assert first.report.conditions.scored == 2 * 95
    assert np.array_equal(first.figures.kl, whole.figures.kl[: 2 * 95])
    for asked in (Protocol(length=64), Protocol(convention="llamacpp")):
        with pytest.raises(EvaluationError, match="brings its own windows"):
            evaluate(packed, tmp_path / "pack", asked)


def test_a_pack_refuses_other_conditions(packed: Path, tmp_path: Path, text: Path) -> None:
    reference(CARRIED, tmp_path / "pack", SHORT)
    with pytest.raises(EvaluationError, match="precision"):
        evaluate(packed, tmp_path / "pack", Protocol(precision="f32"))
    with pytest.raises(TextError, match="not the text of the pack"):
        evaluate(packed, tmp_path / "pack", Protocol(text=text))
    with pytest.raises(EvaluationError, match=r"another tokenizer\.json"):
        evaluate(STORIES, tmp_path / "pack")
    with pytest.raises(EvaluationError, match="BF16 original"):
        reference(packed, tmp_path / "second", SHORT)
    with pytest.raises(NybbleError, match="exists"):
        reference(CARRIED, tmp_path / "pack", SHORT)


def test_models_of_other_tokenizers_are_not_compared(packed: Path) -> None:
    with pytest.raises(EvaluationError, match="tokenizers"):
        evaluate(STORIES, CARRIED, SHORT)


def test_models_of_other_sizes_are_not_compared(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    folders = []
    for layers in (2, 3):
        kinds = [*["linear_attention"] * (layers - 1), "full_attention"]
        folder = tiny.checkpoint(
            tmp_path / str(layers),
            "qwen3_5_moe",
            num_hidden_layers=layers,
            layer_types=kinds,
            vocab_size=4096,
            rope_parameters=rope,
        )
        shutil.copy(CARRIED / "tokenizer.json", folder)
        (folder / "generation_config.json").unlink()
        folders.append(folder)
    with pytest.raises(EvaluationError, match="layers 2 against 3"):
        evaluate(*folders, SHORT)


def test_what_a_module_holds_beside_its_weight_is_not_ignored(tmp_path: Path, packed: Path) -> None:
    """A pre_quant_scale (AWQ) left out would give fluent, wrong figures."""
    folder = shutil.copytree(packed, tmp_path / "awq")
    name = "model.language_model.layers.3.self_attn.o_proj.pre_quant_scale"
    tiny.write_safetensors(folder / "extra.safetensors", {name: np.full(256, 2, np.float32)})
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"][name] = "extra.safetensors"
    index.write_text(json.dumps(document))
    with pytest.raises(ModelError, match="pre_quant_scale"):
        perplexity(folder, SHORT)


def test_what_is_declared_and_not_computed_is_noted(tmp_path: Path) -> None:
    quantize(CARRIED, tmp_path / "out", "nvfp4", data_free=True)
    found = perplexity(tmp_path / "out", SHORT)
    assert any("KV cache in fp8" in note for note in found.notes)
    assert found.as_json()["notes"]


def test_windows_longer_than_the_context_are_refused_at_once() -> None:
    with pytest.raises(TextError, match="--length 4096 or less"):
        perplexity(CARRIED, Protocol(length=5000))


@pytest.mark.parametrize(
    ("recipe", "layout", "inputs"),
    [
        ("fp8", "compressed-tensors", "FP8 dynamic"),
        ("nvfp4-w4a4", "modelopt", "FP4"),
        ("nvfp4-w4a4", "compressed-tensors", "FP4"),
        ("nvfp4", "modelopt", "FP8 static"),
    ],
)
def test_simulated_inputs_cost_more_and_are_said(
    recipe: str, layout: str, inputs: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tokens = None if recipe == "fp8" else 1024
    quantize(CARRIED, out, recipe, layout=layout, calibration_tokens=tokens)
    served = evaluate(out, CARRIED, SHORT)
    weights = evaluate(out, CARRIED, Protocol(length=128, limit=4, simulate=False))
    assert served.divergence.kl.value > 1.02 * weights.divergence.kl.value
    assert served.report.conditions.activations == inputs
    assert weights.report.conditions.activations == "none"


def test_layouts_are_one_model(tmp_path: Path) -> None:
    """Other names, divisors for factors, the same values: not a bit of difference."""
    found = []
    for layout in ("modelopt", "compressed-tensors"):
        quantize(CARRIED, tmp_path / layout, "nvfp4-all", layout=layout)
        found.append(perplexity(tmp_path / layout, SHORT).perplexity)
    assert found[0] == found[1]


def test_spilled_is_the_same(packed: Path, tmp_path: Path) -> None:
    spilled = Protocol(length=128, limit=4, spill=tmp_path / "s")
    a, b = evaluate(packed, CARRIED, SHORT), evaluate(packed, CARRIED, spilled)
    assert np.array_equal(a.figures.kl, b.figures.kl)
    assert not any((tmp_path / "s").iterdir())


def test_threads_change_no_bit(packed: Path) -> None:
    one, two = (perplexity(packed, Protocol(length=128, limit=4, threads=n)) for n in (1, 2))
    assert one.perplexity == two.perplexity


# ------------------------------------------------------------------------------------- the commands


def test_eval_prints_figures_with_intervals_and_conditions(packed: Path) -> None:
    shown = run("eval", packed, "--reference", CARRIED, "--windows", 4, "--length", 128)
    assert shown.exit_code == 0, shown.output
    for words in ("KL, mean", "same top token", "95 % interval", "wikitext2", "4 are few"):
        assert words in shown.stdout


def test_eval_in_the_words_of_llamacpp(packed: Path) -> None:
    shown = run(*("eval", packed, "-r", CARRIED, "--windows", 4, "--length", 128, "--llamacpp"))
    for words in ("Mean PPL(Q)", "Maximum KLD", "Same top p", "RMS Δp"):
        assert words in shown.stdout


def test_eval_as_json(packed: Path) -> None:
    shown = run("eval", packed, "-r", CARRIED, "--windows", 4, "--length", 128, "--json")
    document = json.loads(shown.stdout)
    assert document["schema"] == "nybble.eval/1"
    assert document["conditions"]["scored"] == document["divergence"]["tokens"] == 508
    assert document["conditions"]["tokenizer_sha256"]


def test_perplexity_of_a_file(packed: Path, text: Path) -> None:
    shown = run("perplexity", packed, "--text", text, "--length", 64)
    assert shown.exit_code == 0, shown.output
    assert "bits per byte" in shown.stdout
    assert "story.txt" in shown.stdout


@pytest.mark.parametrize("convention", ["llamacpp", "sliding"])
def test_the_other_conventions(convention: str) -> None:
    stride = ["--stride", 32] if convention == "sliding" else []
    shown = run(
        *("perplexity", CARRIED, "--convention", convention, *stride),
        *("--length", 64, "--windows", 6, "--json"),
    )
    scored = json.loads(shown.stdout)["conditions"]["scored"]
    assert scored == (6 * 31 if convention == "llamacpp" else 63 + 5 * 32)


def test_reference_says_how_it_is_used(tmp_path: Path) -> None:
    shown = run(
        *("reference", CARRIED, "-o", tmp_path / "pack", "--windows", 2, "--length", 128),
    )
    assert shown.exit_code == 0, shown.output
    assert "nybble eval CKPT --reference" in shown.stdout


STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball."
)


def test_generate_streams_what_the_model_card_shows() -> None:
    shown = run("generate", CARRIED, "Tell me a short story about a cat.", "-n", 36)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith(STORY)
    assert "tokens/s" in shown.stderr
    assert "ended by length" in shown.stderr


def test_generate_from_the_packed_file_stops_at_the_end_of_turn(packed: Path) -> None:
    shown = run("generate", packed, "I want to find a restaurant in San Jose.", "--json")
    document = json.loads(shown.stdout)
    assert document["finish_reason"] == "stop"
    assert document["tokens"][-1] == 4089
    assert document["text"].strip()
    assert "<|im_end|>" not in document["text"]
    assert document["prompt"].endswith("<|im_start|>assistant\n")


def test_raw_takes_the_prompt_as_it_is() -> None:
    shown = run("generate", CARRIED, "Once upon a time,", "--raw", "-n", 8, "--json")
    document = json.loads(shown.stdout)
    assert document["prompt"] == "Once upon a time,"
    assert len(document["tokens"]) == len(document["logprobs"]) == 8


def test_equal_seeds_give_equal_text() -> None:
    def text(seed: int) -> str:
        shown = run(
            *("generate", CARRIED, "Tell me a short story about a dog.", "-n", 12),
            *("--temperature", 1.0, "--seed", seed, "--json"),
        )
        return str(json.loads(shown.stdout)["text"])

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


# -------------------------------------------------------------------------------------- bad input


def test_bad_texts_are_named(tmp_path: Path) -> None:
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text(" \n")
    short.write_text("Once upon a time")
    for file, words in ((empty, "is empty"), (short, "needs? at least"), (tmp_path / "no", "read")):
        with pytest.raises(TextError, match=words):
            perplexity(CARRIED, Protocol(text=file))
    with pytest.raises(TextError, match="prompt is empty"):
        generate(CARRIED, "", raw=True)


def damaged(folder: Path, **text: object) -> Path:
    shutil.copytree(STORIES, folder)
    config = json.loads((folder / "config.json").read_text())
    (config.get("text_config") or config).update(text)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_models_that_cannot_be_computed_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4}
    with pytest.raises(ModelError, match="longrope"):
        perplexity(damaged(tmp_path / "a", rope_parameters=rope), SHORT)
    with pytest.raises(ModelError, match="hidden_act"):
        perplexity(damaged(tmp_path / "b", hidden_act="gelu"), SHORT)
    with pytest.raises(ModelError, match=r"no tensors? .*layers\.4"):
        perplexity(
            damaged(
                tmp_path / "c",
                num_hidden_layers=5,
                layer_types=[*["linear_attention"] * 3, *["full_attention"] * 2],
            ),
            SHORT,
        )


def test_bad_options_are_usage_errors() -> None:
    assert run("perplexity", CARRIED, "--precision", "fp16").exit_code == 2
    assert run("perplexity", CARRIED, "--suite", "c4").exit_code == 2
    assert run("eval", CARRIED).exit_code == 2
    assert run("generate", CARRIED, "x", "--temperature", "-1").exit_code == 2
