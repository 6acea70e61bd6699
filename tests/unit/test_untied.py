"""A tied model with an output head of its own: codes of the embedding, a configuration that says
so, and nothing else that differs."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import dialects
import tiny
from command_line import asking
from measured import Pass
from nybble.api.plan import open_source, plan, totals
from nybble.api.quantize import quantize
from nybble.check.run import run_rules
from nybble.check.survey import Survey
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import ModelError, NybbleError, RecipeError
from nybble.plan.recipe import load_recipe, parse_recipe

EMBEDDING = {
    "llama": "model.embed_tokens",
    "qwen3": "model.embed_tokens",
    "qwen3_5": "model.language_model.embed_tokens",
    "qwen3_5_moe": "model.language_model.embed_tokens",
}


MLP = '[[rule]]\nroles = ["mlp"]\nscheme = "nvfp4-w4a16"\n'
HEAD = '[[rule]]\nroles = ["lm_head", "mlp"]\nscheme = "nvfp4-w4a16"\n'
HEAD_KEPT = '[[rule]]\nroles = ["lm_head"]\nscheme = "bf16"\n'
HEAD_BELOW_LAYERS = """
[[rule]]
roles = ["lm_head", "attention"]
modules = ["*.layers.*"]
scheme = "nvfp4-w4a16"
"""


def tied(folder: Path, family: str, **options: Any) -> Path:
    made = tiny.checkpoint(folder, family, tie_word_embeddings=True, **options)
    assert "lm_head.weight" not in tiny.read(made)
    return made


def tied_keys(config: object) -> list[object]:
    """What the key says, wherever it stands."""
    if not isinstance(config, dict):
        return []
    inner = [value for section in config.values() for value in tied_keys(section)]
    return [config["tie_word_embeddings"], *inner] if "tie_word_embeddings" in config else inner


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("family", EMBEDDING)
def test_the_head_is_the_embedding_in_codes(tmp_path: Path, family: str, layout: str) -> None:
    """Decoded by hand: the nearest of NVFP4's values, at the error of every other linear; what the
    embedding was is still there, byte for byte."""
    source = tied(tmp_path / "m", family, shards=2)
    out = tmp_path / "q"
    quantize(source, out, "nvfp4-all", layout=layout, data_free=True, untie_head=True)
    before, after = tiny.read(source), tiny.read(out)
    name = f"{EMBEDDING[family]}.weight"
    assert after[name] == before[name]
    x = tiny.array(before[name]).astype(np.float32)
    head = dialects.decode(after, "lm_head")
    assert head.shape == x.shape
    error = np.square(head - x).sum() / np.square(x).sum()
    assert 0.003 < error < 0.012
    config = json.loads((out / "config.json").read_text())
    assert set(tied_keys(config)) == {False}
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_moe"])
def test_all_else_is_as_without_it(tmp_path: Path, family: str) -> None:
    source = tied(tmp_path / "m", family)
    for name, untie in (("kept", False), ("untied", True)):
        quantize(source, tmp_path / name, "nvfp4-all", data_free=True, untie_head=untie)
    kept, untied = tiny.read(tmp_path / "kept"), tiny.read(tmp_path / "untied")
    assert {n: t for n, t in untied.items() if not n.startswith("lm_head.")} == kept
    assert {n for n in untied if n not in kept} == {
        f"lm_head.{leaf}" for leaf in ("weight", "weight_scale", "weight_scale_2")
    }


def test_a_plan_counts_a_head_that_is_read_instead_of_the_embedding(tmp_path: Path) -> None:
    source = tied(tmp_path / "m", "qwen3")
    kept, untied = (plan(source, "nvfp4-all", untie_head=u) for u in (False, True))
    vocab, hidden = 131, 96
    codes = (
        vocab * hidden * 9 // 16 + 4
    )  # 4 bits, an eighth bit of scale for each, the scale of all
    assert totals(untied).bytes - totals(kept).bytes == codes
    for name in ("source_tensors", "source_bytes", "source_bytes_per_token"):
        assert getattr(totals(untied), name) == getattr(totals(kept), name), name
    assert (
        totals(kept).bytes_per_token - totals(untied).bytes_per_token == 2 * vocab * hidden - codes
    )
    assert any("--untie-head" in note for note in kept.notes)
    assert any("lm_head.weight: the bytes of" in note for note in untied.notes)
    assert not any("--untie-head" in note for note in untied.notes)


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"tie_word_embeddings": False}, ModelError, "does not tie .*; leave --untie-head out"),
        ({"recipe": MLP}, RecipeError, "leaves lm_head.weight as it is"),
        ({"recipe": HEAD_BELOW_LAYERS + MLP}, RecipeError, "leaves lm_head.weight as it is"),
        ({"recipe": HEAD_KEPT + HEAD}, RecipeError, "leaves lm_head.weight as it is"),
        ({"generic": True}, RecipeError, "--generic guesses"),
        ({"stored": True}, ModelError, "the files hold lm_head.weight"),
        ({"model_type": "gpt2"}, ModelError, "gpt2"),
    ],
)
def test_what_cannot_be_untied_says_why(
    tmp_path: Path, change: dict[str, Any], kind: type[NybbleError], words: str
) -> None:
    options = {"tie_word_embeddings": True} | {
        k: v for k, v in change.items() if k == "tie_word_embeddings"
    }
    source = tiny.checkpoint(tmp_path / "m", "qwen3", **options)
    recipe = load_recipe("nvfp4-all")
    if "recipe" in change:
        recipe = parse_recipe("mine", change["recipe"])
    if "stored" in change:
        vector = tiny.array(tiny.read(source)["model.embed_tokens.weight"])
        tiny.write_safetensors(source / "head.safetensors", {"lm_head.weight": vector})
    if "model_type" in change:
        path = source / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    before = tiny.tree(tmp_path)
    with pytest.raises(kind, match=words):
        quantize(
            source,
            tmp_path / "out",
            recipe,
            data_free=True,
            untie_head=True,
            generic=change.get("generic", False),
        )
    assert tiny.tree(tmp_path) == before


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_what_passes_into_it_is_measured(tmp_path: Path, layout: str) -> None:
    """A head whose inputs are quantized too stores their scale, as any linear does."""
    pytest.importorskip("torch")
    source = tied(tmp_path / "m", "qwen3")
    recipe = parse_recipe("mine", HEAD.replace("w4a16", "w4a4"))
    measure = Pass(lm_head=3.0)
    made = quantize(source, tmp_path / "q", recipe, layout=layout, untie_head=True, measure=measure)
    assert measure.calls == 1
    assert made.input_scales is not None
    assert made.input_scales.values["lm_head"] > 0
    assert any(n.startswith("lm_head.input") for n in tiny.read(tmp_path / "q"))


def test_a_run_goes_on_only_as_it_began(tmp_path: Path) -> None:
    """The journal knows whether the head was untied."""
    source, out = tied(tmp_path / "m", "qwen3"), tmp_path / "q"

    class Stop(Exception):
        pass

    def stop(*args: object, **named: object) -> None:
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nybble.checkpoint.writer.CheckpointWriter.finish", stop)
        with pytest.raises(Stop):
            quantize(source, out, "nvfp4-all", data_free=True, untie_head=True)
    with pytest.raises(NybbleError, match=r'untied: \["lm_head.weight"\] then, \[\] now'):
        quantize(source, out, "nvfp4-all", data_free=True, resume=True)
    with pytest.raises(NybbleError, match='recipe: "nvfp4-all" then, "nvfp4" now'):
        quantize(source, out, "nvfp4", untie_head=True, resume=True, calibrate="nothing")
    quantize(source, out, "nvfp4-all", data_free=True, untie_head=True, resume=True)
    quantize(source, tmp_path / "at once", "nvfp4-all", data_free=True, untie_head=True)
    assert tiny.read(out) == tiny.read(tmp_path / "at once")


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The source is counted once, before and after; a target of bits is refused in words."""
    ask, source, out = asking(monkeypatch, capsys), tied(tmp_path / "m", "qwen3"), tmp_path / "q"
    refused = ask("quantize", source, out, "--untie-head", "--target-bits", "5")
    assert (refused.code, out.exists()) == (1, False)
    assert "--untie-head and a target" in refused.err
    done = ask("quantize", source, out, "-r", "nvfp4-all", "--data-free", "--untie-head")
    assert done.code == 0
    sizes = [line for line in done.out.splitlines() if line.startswith(("size ", "total "))]
    assert len({re.findall(r"[\d.]+ [KM]iB", line)[0] for line in sizes}) == 1, sizes
    planned = json.loads(ask("plan", source, "-r", "nvfp4-all", "--untie-head", "--json").out)
    assert planned["source_tensors"] == len(tiny.read(source))


def test_promotion_sees_the_head(tmp_path: Path) -> None:
    """A recipe with a rule for the head alone, which the tied model has no linear for."""
    pytest.importorskip("torch")
    from nybble.api.promotion import promoted_recipe

    model = tiny.MODELS / "stories-hybrid-moe"
    recipe = parse_recipe(
        "mine",
        '[[rule]]\nroles = ["lm_head"]\nscheme = "nvfp4-w4a4"\n'
        '[[rule]]\nroles = ["attention"]\nscheme = "nvfp4-w4a4"\n',
    )
    with pytest.raises(RecipeError, match="matches no linear"):
        promoted_recipe(model, tmp_path / "tied", recipe, tokens=1024, threads=1)
    made = promoted_recipe(
        model, tmp_path / "own", recipe, share=0.3, tokens=1024, threads=1, untie_head=True
    )
    assert made.promotion is not None


# ----------------------------------------------------------------------------------- nybble check


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    source = tied(tmp_path / "m", "qwen3")
    quantize(source, tmp_path / "q", "nvfp4-all", data_free=True, untie_head=True)
    return source, tmp_path / "q"


def found(pair: tuple[Path, Path]) -> dict[str, str]:
    source, out = pair
    findings = run_rules(Survey.open(out, source, deep=True)).findings
    wrong = [f for f in findings if f.severity.name != "NOTE"]
    return {f.rule.id: f.message for f in wrong if f.file != "tokenizer.json"}  # no real one


def change_tensors(folder: Path, change: Callable[[tiny.Tensors], None]) -> None:
    (file,) = folder.glob("*.safetensors")
    values = {name: tiny.array(entry).copy() for name, entry in tiny.read(folder).items()}
    change(values)
    tiny.write_safetensors(file, values)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


def test_an_untied_head_is_no_finding(pair: tuple[Path, Path]) -> None:
    assert found(pair) == {}


def test_a_head_of_other_weights_is_found(pair: tuple[Path, Path]) -> None:
    """Rows in another order decode to nothing of the embedding's."""

    def reverse(values: tiny.Tensors) -> None:
        for leaf in ("weight", "weight_scale"):
            values[f"lm_head.{leaf}"] = values[f"lm_head.{leaf}"][::-1].copy()

    change_tensors(pair[1], reverse)
    assert "lm_head" in found(pair)["NB120"]


def test_a_plain_head_must_be_the_embedding(pair: tuple[Path, Path]) -> None:
    """Untied by another tool, unquantized: equal bytes are a copy, others are not."""
    source, out = pair
    shutil.rmtree(out)
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    name = "model.embed_tokens.weight"
    change_tensors(out, lambda values: values.update({"lm_head.weight": values[name]}))
    assert not {"NB102", "NB113", "NB121"} & found(pair).keys()
    change_tensors(out, lambda values: values.update({"lm_head.weight": -values[name]}))
    assert "NB113" in found(pair)


def test_untied_and_without_a_head_is_found(pair: tuple[Path, Path]) -> None:
    def drop(values: tiny.Tensors) -> None:
        for name in [n for n in values if n.startswith("lm_head.")]:
            del values[name]

    change_tensors(pair[1], drop)
    assert {"NB119", "NB121"} <= found(pair).keys()


def test_a_head_that_readers_leave_aside_is_found(pair: tuple[Path, Path]) -> None:
    """Codes of a head, and a configuration that still ties it: they are never read."""
    config = json.loads((pair[1] / "config.json").read_text())
    (pair[1] / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert "NB102" in found(pair)


def test_a_head_that_the_source_left_aside_is_another_network(pair: tuple[Path, Path]) -> None:
    """The source ties its head and stores a stale one, which an untied result would use."""
    source, out = pair
    name = "model.embed_tokens.weight"
    change_tensors(source, lambda values: values.update({"lm_head.weight": -values[name]}))
    shutil.rmtree(out)
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert "NB121" in found(pair)


def test_a_source_with_a_head_of_its_own_is_not_excused(tmp_path: Path) -> None:
    """The other way round: tied although the source is not, which loses its head."""
    source = tiny.checkpoint(tmp_path / "m", "qwen3")
    out = tmp_path / "q"
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert "NB121" in found((source, out))


# ------------------------------------------------------------------------------------- calibrated


def test_calibration_fits_the_head_here_and_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own inputs, as an untied model's; the same bytes from workers, who open the files and
    find no head there."""
    pytest.importorskip("torch")
    from test_scale_out import Elsewhere

    from calibrated_runs import samples
    from nybble.api.plan import find_layout
    from nybble.calibrate.rounding import EFFORTS
    from nybble.calibrate.sequential import Calibration
    from nybble.plan.plan import make_plan
    from nybble.progress import Progress
    from nybble.quantize.run import Options, execute

    monkeypatch.setattr("nybble.calibrate.stage_rounding.PART_WEIGHTS", 1024)
    source = tied(tmp_path / "m", "qwen3", hidden_size=32, vocab_size=67, num_attention_heads=2)
    recipe = load_recipe("nvfp4-all")
    workers = Elsewhere()
    for name, at in (("here", None), ("there", workers)):
        with open_source(source, headers_only=False, generic=False, untie_head=True) as checkpoint:
            made = make_plan(checkpoint, recipe, find_layout("modelopt"))
            rounder = Calibration(
                made,
                samples(67, (30, 17, 40, 25, 31), frozenset({1, 4})),
                replace(EFFORTS["default"], dampings=(0.03,)),
                spill=tmp_path / f"{name}.calibration",
                threads=1,
                progress=Progress(),
                workers=at,
            )
            execute(
                made,
                tmp_path / name,
                Options(threads=1),
                version="1",
                progress=Progress(),
                rounder=rounder,
            )
    assert tiny.tree(tmp_path / "there") == tiny.tree(tmp_path / "here")
    report = json.loads((tmp_path / "here" / "report.json").read_text())
    (head,) = [row for row in report["linears"] if "lm_head" in str(row)]
    assert head["method"] != "data-free"
    quantize(source, tmp_path / "free", "nvfp4-all", data_free=True, untie_head=True)
    codes = [tiny.read(tmp_path / n)["lm_head.weight"] for n in ("here", "free")]
    assert codes[0] != codes[1]


def test_an_alias_is_the_bytes_of_another_tensor(tmp_path: Path) -> None:
    source = tied(tmp_path / "m", "qwen3", shards=2)
    name = "model.embed_tokens.weight"
    with Checkpoint.open(source) as plain:
        seen = plain.with_alias("x.weight", name, {"a": 1})
        assert "x.weight" not in plain.tensors
        assert seen.raw("x.weight").tobytes() == plain.raw(name).tobytes()
        assert (seen.stored_name("x.weight"), seen.stored_name(name)) == (name, name)
        assert seen.config == {"a": 1}
        assert len(seen.tensors) == len(plain.tensors) + 1


def test_a_finished_folder_is_only_verified_for_what_it_is(tmp_path: Path) -> None:
    """Other options than it was made with are refused, and nothing is claimed of what it does not
    tell."""
    source, out = tied(tmp_path / "m", "qwen3"), tmp_path / "q"
    quantize(source, out, "nvfp4-all", data_free=True, untie_head=True)
    before = tiny.tree(out)
    for options, words in (
        ({"untie_head": False}, r"first lm_head.weight: expected nothing, found U8 \[131, 48\]"),
        ({"recipe": "nvfp4", "untie_head": True}, "made otherwise"),
        ({"layout": "compressed-tensors", "untie_head": True}, "made otherwise"),
    ):
        asked = {"recipe": "nvfp4-all", "data_free": True, **options}
        with pytest.raises(NybbleError, match=words):
            quantize(source, out, resume=True, **asked)
    again = quantize(
        source, out, "nvfp4-all", data_free=True, untie_head=True, search="absmax", resume=True
    )
    assert again.was_finished
    assert again.as_json()["search"] is None
    assert tiny.tree(out) == before


def test_calibrated_or_not_is_told_of_a_finished_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    ask, model = asking(monkeypatch, capsys), tiny.MODELS / "stories-hybrid-moe"
    plain, fitted = tmp_path / "plain", tmp_path / "fitted"
    how = ("-r", "nvfp4-all")
    few = ("--calibrate", "--samples", "20", "--length", "64", "--effort", "fast")
    assert ask("quantize", model, plain, *how).code == 0
    assert ask("quantize", model, fitted, *how, *few).code == 0
    for folder, options, words in (
        (plain, few, "(without calibration)"),
        (fitted, (), "(calibrated, effort fast)"),
        (fitted, (*few[:-1], "best"), "(calibrated with effort fast, not best)"),
    ):
        refused = ask("quantize", model, folder, *how, *options, "--resume")
        assert refused.code == 1
        assert words in " ".join(refused.err.split())
    done = ask("quantize", model, plain, *how, "--resume")
    assert done.code == 0
    assert "nothing to do, an earlier run had written all" in " ".join(done.out.split())
    assert "(mse)" not in done.out
