"""Teacher-forced drafts against a plain reference, and against the acceptance of a model card."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from mtp_reference import dense, reference_head
from nybble.api.acceptance import acceptance
from nybble.api.quantize import quantize
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import EvaluationError
from nybble.evaluate.acceptance import Drafts, change, measure_drafts
from nybble.kernels.compute import Compute
from nybble.models.linear import Mode
from nybble.models.model import Model
from nybble.models.sequence import SequenceState
from nybble.models.state import make_batch
from nybble.plan.recipe import parse_recipe

F32 = Mode(Compute("f32", 2))
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
PROMPTS = Path(__file__).parents[1] / "fixtures" / "prompts" / "hybrid-chat-mtp.json"
#: The card counts the drafts that a decoding of one draft makes, a part of all positions.
CARD, TOLERANCE = {"dialogues": 0.787, "stories": 0.685}, 0.05
NEAR_TIE = 0.02  # keys and values are BF16 here, float32 in the reference
NEW_TOKENS, STOPS = 64, (4087, 4089)


@pytest.mark.parametrize("family", tiny.HYBRIDS)
def test_guesses_are_those_of_plain_torch(family: str, tmp_path: Path) -> None:
    """At every position where the reference is no near-tie; windows of one token judge nothing."""
    options = {"dtype": "F32", "rope_parameters": ROPE}
    cfg = tiny.config(family, **options)["text_config"]  # type: ignore[arg-type]
    folder = tiny.checkpoint(tmp_path, family, **options)  # type: ignore[arg-type]
    values = dense(folder)
    generator = torch.Generator().manual_seed(3)
    windows = [torch.randint(0, 131, (n,), generator=generator) for n in (23, 1, 66)]
    with Checkpoint.open(folder) as checkpoint:
        model = Model(checkpoint)
        found = measure_drafts(model, windows, F32)
        clear = 0
        for number, tokens in enumerate((windows[0], windows[2])):
            pages, states = model.page_pool(1, 80), model.state_pool(1)
            batch = make_batch(model.network, [tokens], [SequenceState([0], slots=[0])])
            hidden = model.forward(batch, pages, states, F32)
            mine = found.window == number
            assert (found.trunk[mine] == model.logits(hidden, F32).argmax(-1)[1:].numpy()).all()
            rows = reference_head(values, cfg, tokens[1:], hidden[:-1])
            best = (rows @ values["lm_head.weight"].T).topk(2)
            sure = (best[0][:, 0] - best[0][:, 1] > NEAR_TIE * best[0][:, 0].abs()).numpy()
            assert (found.guess[mine][sure] == best[1][:, 0].numpy()[sure]).all()
            clear += int(sure.sum())
        assert clear > 50
        later = measure_drafts(model, windows, F32, firsts=[20, 0, 60])
        assert (
            later.guess.tolist() == found.guess[[*range(19, 22), *range(22 + 59, 22 + 65)]].tolist()
        )


@pytest.mark.parametrize("kind", [pytest.param("stories", marks=pytest.mark.slow), "dialogues"])
def test_on_the_model_s_own_text_it_is_the_acceptance_of_the_card(kind: str) -> None:
    prompts = json.loads(PROMPTS.read_text("utf-8"))[kind]
    with Checkpoint.open(tiny.MODELS / "hybrid-chat-mtp") as checkpoint:
        model = Model(checkpoint)
        texts = generated(model, prompts)
        firsts = [len(p) for p in prompts]
        share = measure_drafts(model, texts, F32, firsts=firsts).share()
    assert abs(share.value - CARD[kind]) < TOLERANCE


def generated(model: Model, prompts: list[list[int]]) -> list[torch.Tensor]:
    """The greedy answer to each prompt, with the prompt before it."""
    longest = max(map(len, prompts)) + NEW_TOKENS
    pages, states = model.page_pool(len(prompts), longest, "f32"), model.state_pool(len(prompts))
    held = [SequenceState([i], slots=[i]) for i in range(len(prompts))]
    texts, new = [list(p) for p in prompts], [list(p) for p in prompts]
    live = list(range(len(prompts)))
    for step in range(NEW_TOKENS):
        batch = make_batch(
            model.network, [new[i] for i in live], [held[i] for i in live], is_decode=step > 0
        )
        hidden = model.forward(batch, pages, states, F32)
        chosen = model.logits(hidden[batch.starts[1:].long() - 1], F32).argmax(-1).tolist()
        for i, token in zip(live, chosen, strict=True):
            held[i].commit(len(new[i]))
            texts[i].append(token)
            new[i] = [token]
        live = [i for i in live if texts[i][-1] not in STOPS]
        if not live:
            break
    return [torch.tensor(t) for t in texts]


def test_a_change_is_paired_by_position() -> None:
    window = np.repeat(np.arange(16), 10)
    trunk = np.arange(160)
    before = Drafts(window, trunk, np.where(np.arange(160) % 2, trunk, -1))
    after = Drafts(window, trunk, np.where(np.arange(160) % 2 | (window == 3), trunk, -1))
    found = change(before, after)
    assert (found.before.value, found.positions, found.same_trunk) == (0.5, 160, 1.0)
    assert found.difference.value == pytest.approx(5 / 160)
    assert found.difference.interval is not None
    assert found.difference.interval.low >= 0  # no window got worse: pairing shows it
    assert dict(found.rows())["difference"].startswith("+3.1 % [+0.0")
    assert found.as_json()["positions"] == 160
    with pytest.raises(EvaluationError, match="not of the same windows"):
        change(before, Drafts(window[1:], trunk[1:], trunk[1:]))


def test_a_model_without_a_head_and_text_without_drafts_are_refused(tmp_path: Path) -> None:
    for family, windows, message in (
        ("qwen3", [torch.arange(9)], "has no MTP head"),
        ("qwen3_5", [torch.arange(1)], "no window has two tokens"),
    ):
        with (
            Checkpoint.open(tiny.checkpoint(tmp_path / family, family)) as checkpoint,
            pytest.raises(EvaluationError, match=message),
        ):
            measure_drafts(Model(checkpoint), windows, F32)


def test_two_folders_are_compared_on_one_text(tmp_path: Path) -> None:
    """A quantized head on the trunk as it was: every change is the head's."""
    source = tiny.MODELS / "hybrid-chat-mtp"
    rule = '[[rule]]\nroles = ["mtp"]\nscheme = "nvfp4-w4a16"\n'
    quantize(source, tmp_path / "out", parse_recipe("head", rule), jobs=1)
    found = acceptance(source, tmp_path / "out", windows=8, length=128)
    assert (found.change.same_trunk, found.change.positions) == (1.0, 8 * 127)
    assert found.change.before.value > 0.1
    assert abs(found.change.difference.value) < 0.05
    document = found.as_json()
    assert (document["text"], document["windows"]) == ("wikitext2", 8)
    json.dumps(document)
    with pytest.raises(EvaluationError, match="not of one model"):
        acceptance(source, tiny.checkpoint(tmp_path / "tiny", "qwen3_5"), windows=1, length=64)
