"""A step replayed from a program against the forward it was recorded from: the same bits.

The forward runs one sequence at a time, its prompt whole, in one page; the runner runs batches of
chunks and decodes mixed, in small scattered pages and shuffled slots.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from nybble.api.quantize import quantize
from nybble.checkpoint.reader import Checkpoint
from nybble.engine.model_runner import ModelRunner, StepSize
from nybble.engine.runner import Work
from nybble.errors import ContextTooLong, EngineError
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute, Precision
from nybble.models.linear import Mode
from nybble.models.model import Model
from nybble.models.sequence import SequenceState
from nybble.models.state import make_batch

ROPE = {
    "rope_type": "default",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [4, 2, 2],
    "mrope_interleaved": True,
}
HYBRID = {"rope_parameters": ROPE, "rope_theta": None, "max_position_embeddings": 400}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {"hidden_size": 160, "max_position_embeddings": 400}, ""),
    "qwen2-bias-nvfp4": (
        "qwen2",
        {"head_dim": None, "hidden_size": 160, "max_position_embeddings": 400},
        "nvfp4-all",
    ),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True, "max_position_embeddings": 400}, ""),
    "qwen3_moe-nvfp4": (
        "qwen3_moe",
        {"num_experts": 5, "max_position_embeddings": 400},
        "nvfp4-all",
    ),
    "qwen3_5-ratio-3-nvfp4": ("qwen3_5", HYBRID, "nvfp4-all"),
    "qwen3_5_moe-mxfp4": ("qwen3_5_moe", HYBRID | {"linear_num_value_heads": 4}, "mxfp4"),
}
PROMPTS = (150, 64, 1, 77, 128)
NEW = 5
SIZE = StepSize(tokens=200, sequences=6, outputs=18, context=300)


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    family, options, recipe = CASES[request.param]
    folder = tiny.checkpoint(tmp_path_factory.mktemp("m") / "bf16", family, **options)
    if recipe:
        out = folder.parent / "out"
        layout = "compressed-tensors" if recipe == "mxfp4" else "modelopt"
        quantize(folder, out, recipe=recipe, layout=layout)
        folder = out
    with Checkpoint.open(Path(folder)) as checkpoint:
        yield Model(checkpoint)


def ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 131, (count,), generator=generator).tolist()


def alone(
    model: Model, prompt: list[int], new: list[int], mode: Mode, dtype: str = "bf16"
) -> torch.Tensor:
    """Logits after the prompt and after each new token, [1 + new, V]."""
    pages = model.page_pool(1, len(prompt) + len(new), dtype)
    states = model.state_pool(1)
    held = SequenceState(pages.numbers.take(), slots=states.numbers.take())
    found = []
    for part in [prompt, *[[t] for t in new]]:
        batch = make_batch(model.network, [part], [held], is_decode=part is not prompt)
        hidden = model.forward(batch, pages, states, mode)
        held.commit(len(part))
        found.append(model.logits(hidden[-1:], mode))
    return torch.cat(found)


def runner(model: Model, compute: Compute, dtype: str = "bf16") -> ModelRunner:
    pages = model.page_pool(80, 16, dtype)
    states = model.state_pool(SIZE.sequences)
    for pool in pages.layers.values():  # what nobody wrote must not be read
        pool.keys.view(torch.uint8).fill_(0xFF)
        pool.values.view(torch.uint8).fill_(0xFF)
    for state in states.layers.values():
        state.conv.fill_(torch.nan)
        state.state.fill_(torch.nan)
    return ModelRunner(model, pages, states, SIZE, compute)


def steps() -> list[list[tuple[int, int, bool]]]:
    """(sequence, tokens, whether decoding) of each step: chunks cut at multiples of 64, decodes
    beside chunks, replays of several generated tokens at once."""
    first = [[(0, 64, False), (1, 64, False), (2, 1, False)]]
    mixed = [
        [(2, 1, True), (0, 64, False), (1, 1, True), (3, 64, False)],
        [(1, 1, True), (0, 22, False), (2, 2, True), (3, 13, False)],
        [(4, 128, False), (3, 1, True), (0, 1, True)],
        [(0, 2, True), (1, 3, True), (2, 2, True), (3, 4, True), (4, 5, True)],
        [(0, 2, True)],
    ]
    return first + mixed


HOW: list[tuple[Precision, str]] = [
    ("bf16", "bf16"),
    ("bf16", "fp8"),
    ("f32", "f32"),
    ("int8", "bf16"),
]


@pytest.mark.parametrize(("precision", "dtype"), HOW)
@pytest.mark.parametrize("isa", ["", "avx512", "avx2", "portable"])
def test_replayed_batches_equal_the_forward_alone(
    model: Model, precision: Precision, dtype: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isa and isa not in dispatch.machine_isas():
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setenv("NYBBLE_ISA", isa)
    compute = Compute(precision, threads=2)
    prompts = [ids(n, n) for n in PROMPTS]
    new = [ids(NEW, 1000 + n) for n in PROMPTS]
    one = Mode(Compute(precision, 1))
    expected = [alone(model, p, n, one, dtype) for p, n in zip(prompts, new, strict=True)]
    replayed = runner(model, compute, dtype)
    assert replayed.program is not None
    pages: list[list[int]] = [[] for _ in prompts]
    slots = [5, 0, 3, 1, 4]
    lengths = [0] * len(prompts)
    for step in steps():
        works, wanted = [], []
        for i, count, is_decode in step:
            text = prompts[i] + new[i]
            end = lengths[i] + count
            while len(pages[i]) * 16 < end:
                pages[i] += replayed.pages.numbers.take()
            first = len(prompts[i])  # logits from the last token of the prompt on
            rows = [p for p in range(lengths[i], end) if p >= first - 1]
            works.append(
                Work(text[lengths[i] : end], pages[i], slots[i], lengths[i], is_decode, len(rows))
            )
            wanted += [expected[i][p - first + 1] for p in rows]
            lengths[i] = end
        found = replayed.forward(works)
        assert len(found) == len(wanted)
        for row, right in zip(found, wanted, strict=True):
            assert torch.equal(row, right)
    assert lengths == [len(p) + NEW for p in prompts]


def test_states_in_between_are_those_of_shorter_steps(model: Model) -> None:
    """Of a chunk that writes on the way, and of tokens that write one by one, read by others."""
    replayed = runner(model, Compute(threads=2))
    text = ids(131, 6)
    one = Mode(Compute(threads=1))
    expected = [alone(model, text[:n], [text[n]], one)[1] for n in (64, 128)]
    pages, others = (replayed.pages.numbers.take(n) for n in (9, 10))
    replayed.forward([Work(text[:128], pages, 0, 0, False, 1, ((64, 1), (128, 2)))])
    for n, (length, slot) in enumerate(((64, 1), (128, 2))):
        mine = [*pages[: length // 16], *others[5 * n : 5 * n + 5]]
        works = [
            Work([text[length]], [*mine[: length // 16], page], slot, length, True, 1, ((1, to),))
            for page, to in ((others[5 * n], 3), (others[5 * n + 1], 4))
        ]
        for row in replayed.forward(works):
            assert torch.equal(row, expected[n])
    steps = Work(text[128:], pages, 2, 128, True, 3, ((1, 3), (2, 5), (3, 0)))
    wanted = replayed.forward([steps]).clone()
    again = Work(text[129:], pages, 3, 129, True, 2, ((1, 3), (2, 4)))
    assert torch.equal(replayed.forward([again]), wanted[1:])


def test_a_copied_state_goes_on_alike(model: Model) -> None:
    replayed = runner(model, Compute(threads=2))
    text = ids(90, 4)
    source, target = replayed.pages.numbers.take(6), replayed.pages.numbers.take(6)
    replayed.forward([Work(text[:83], source, 2, 0, False, 1)])
    replayed.copy(source, target, 2, 4)
    works = [
        Work(text[83:], source, 2, 83, True, 1),
        Work(text[83:], target, 4, 83, True, 1),
    ]
    found = replayed.forward(works)
    assert torch.equal(found[0], found[1])
    assert found.isfinite().all()


def test_without_compiled_kernels_the_forward_runs(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NYBBLE_KERNELS", "reference")
    plain = runner(model, Compute(threads=2))
    assert plain.program is None
    text = ids(70, 9)
    pages = plain.pages.numbers.take(5)
    found = plain.forward([Work(text, pages, 1, 0, False, 2)]).clone()
    monkeypatch.setenv("NYBBLE_KERNELS", "cpu")
    replayed = runner(model, Compute(threads=2))
    pages = replayed.pages.numbers.take(5)
    other = replayed.forward([Work(text, pages, 1, 0, False, 2)])
    torch.testing.assert_close(found, other, rtol=0.05, atol=0.05 * float(other.abs().max()))


def test_work_that_does_not_fit_is_refused(model: Model) -> None:
    step = runner(model, Compute(threads=1))
    pages = step.pages.numbers.take(30)
    wrong: list[tuple[list[Work], str]] = [
        ([], "1 to 200"),
        ([Work([1] * 201, pages, 0, 0, False)], "made for 1 to 200"),
        ([Work([1] * 19, pages, 0, 0, False, 19)], "19 rows of logits, made for 18"),
        ([Work([1], pages, 0, 0, False), Work([1], pages, 0, 0, True)], "1 writes slot 0"),
        ([Work([1], pages, 6, 0, False)], "writes slot 6, of 6 slots"),
        ([Work([1], pages, -1, 0, False, 0, ((1, 0),))], "reads slot -1, of 6 slots"),
        ([Work([1] * 2, pages, 0, 0, True, 0, ((1, 2), (2, 2)))], "writes slot 2"),
        (
            [Work([1], pages, 0, 64, True), Work([1], pages, 0, 64, True, 0, ((1, 1),))],
            "1 reads slot 0, which work 0 writes",
        ),
        ([Work([1] * 2, pages, 0, 0, True, 0, ((1, 1),))], "after [1] tokens of 2"),
        ([Work([1] * 2, pages, 0, 0, True, 0, ((0, 1), (2, 2)))], "after [0, 2] tokens"),
        ([Work([1] * 2, pages, 0, 0, True, 0, ((1, 1), (1, 3), (2, 2)))], "after [1, 1, 2]"),
        ([Work([1] * 2, pages, 0, 0, True, 0, ((2, 1), (1, 2)))], "after [2, 1] tokens"),
        ([Work([1] * 70, pages, 0, 64, False, 0, ((63, 1), (70, 0)))], "after [127] tokens"),
        ([Work([], pages, 0, 0, False)], "0 tokens"),
        ([Work([1], pages, 0, 0, False, 2)], "2 outputs"),
        ([Work([1], pages, 0, 5, False)], "begins at 5, expected a multiple of 64"),
        ([Work([1] * 20, pages[:1], 0, 0, False)], "need 2 pages of 16"),
        ([Work([1], [80], 0, 0, False)], "need 1 pages"),
        ([Work([1], [-1], 0, 0, False)], "need 1 pages"),
        ([Work([131], pages, 0, 0, False)], "vocabulary has 131"),
        ([Work([-1], pages, 0, 0, False)], "from -1"),
    ]
    for works, words in wrong:
        if " slot " in words and not step.states.layers:
            continue
        with pytest.raises(EngineError, match=re.escape(words)):
            step.forward(works)
    with pytest.raises(ContextTooLong, match="301 tokens, but the context is 300"):
        step.forward([Work([1], pages, 0, 300, True)])


def test_what_a_step_takes_is_known(model: Model) -> None:
    step = runner(model, Compute(threads=1))
    assert step.program is not None
    assert step.program.arena_bytes <= step.nbytes < 200 << 20
