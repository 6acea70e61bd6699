"""Beside others, preempted, forked, in chunks and in pages of another size: a request of a real
model gets the bits that it gets alone."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest

import tiny
from fake_runner import letters
from nybble.api.quantize import quantize
from nybble.checkpoint.reader import Checkpoint
from nybble.engine.engine import Engine, EngineOptions
from nybble.engine.model_runner import ModelRunner, StepSize
from nybble.engine.request import Event, Request, SamplingParams
from nybble.engine.sampler import Sampler
from nybble.kernels import dispatch
from nybble.kernels.compute import Compute, Precision
from nybble.models.model import Model
from nybble.text.tokenizer import Tokenizer

CONTEXT = 400

# Without compiled kernels torch multiplies, whose sums depend on the batch.
needs_library = pytest.mark.skipif(not dispatch.machine_isas(), reason="no compiled kernels")


@dataclass(frozen=True)
class Case:
    """A model and how it is computed; `recipe` "" leaves BF16, `isa` "" is the machine's best."""

    family: str
    recipe: str = ""
    pages: str = "bf16"
    precision: Precision = "bf16"
    isa: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.family, self.recipe, self.pages, self.precision)))


FAMILIES = ("llama", "qwen3_5", "qwen3_5_moe")
CASES = [
    *(Case(family) for family in FAMILIES),
    *(Case(family, "nvfp4-all", "fp8") for family in FAMILIES),
    *(Case(family, "nvfp4-all", "bf16", "int8") for family in FAMILIES),
    Case("qwen3_5_moe", "mxfp4", "f32", "f32"),
    Case("qwen3_5_moe", "", "fp8", "int8"),  # INT8 leaves BF16 weights alone
]
# The compiler's code for a machine without vectors is slow, so its case is one of the small ones.
FORCED = [
    Case("qwen3_5_moe", "nvfp4-all", "fp8", "int8", "avx2"),
    Case("qwen3_5", "nvfp4-all", "fp8", "bf16", "avx2"),
    Case("llama", "nvfp4-all", "fp8", "int8", "portable"),
    Case("qwen3_5_moe", "nvfp4-all", "fp8", "bf16", "portable"),
]


def engine(
    model: Model,
    tokenizer: Tokenizer,
    options: EngineOptions,
    pages: int,
    threads: int,
    case: Case,
) -> Engine:
    pool = model.page_pool(pages, options.page_tokens, case.pages)
    states = model.state_pool(options.max_sequences)
    vocab, compute = model.network.dims.vocab, Compute(case.precision, threads)
    sizes = (options.max_batched_tokens, options.max_sequences, options.max_outputs(vocab))
    runner = ModelRunner(model, pool, states, StepSize(*sizes, CONTEXT), compute)
    sampler = Sampler(vocab, compute)
    numbers = pool.numbers, states.numbers
    return Engine(runner, tokenizer, options, *numbers, CONTEXT, sampler)


def run(made: Engine, requests: list[Request]) -> dict[tuple[str, int], list[Event]]:
    heard: dict[tuple[str, int], list[Event]] = defaultdict(list)
    for request in requests:
        made.add(request)
    while not made.is_idle:
        for event in made.step():
            heard[event.request, event.choice].append(event)
    made.check()
    return heard


def requests(vocab: int) -> list[Request]:
    draw = random.Random(1)
    made = []
    for i, length in enumerate([5, 64, 130, 70, 150, 3]):
        params = SamplingParams(
            max_tokens=40,
            temperature=float(i % 3),
            seed=i,
            n=1 + (i == 2),
            ignore_eos=True,
            logprobs=2,
            prompt_logprobs=2 if i % 2 else None,
            repetition_penalty=1.2 if i == 4 else 1.0,
        )
        made.append(Request(str(i), tuple(draw.randrange(vocab) for _ in range(length)), params))
    return made


def folder_of(case: Case, folder: Path) -> Path:
    size = {"hidden_size": 160} if case.family == "llama" else {}
    made = tiny.checkpoint(folder / "bf16", case.family, max_position_embeddings=CONTEXT, **size)
    if not case.recipe:
        return made
    layout = "compressed-tensors" if case.recipe == "mxfp4" else "modelopt"
    quantize(made, folder / "quantized", case.recipe, layout=layout, data_free=True)
    return folder / "quantized"


@needs_library
@pytest.mark.parametrize("case", CASES + FORCED, ids=lambda c: f"{c}-{c.isa}".rstrip("-"))
def test_a_crowded_engine_gives_the_bits_of_a_lonely_one(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case.isa:
        if case.isa not in dispatch.machine_isas():
            pytest.skip(f"this machine has no {case.isa}")
        monkeypatch.setenv("NYBBLE_ISA", case.isa)
    tokenizer = letters(tmp_path)
    with Checkpoint.open(folder_of(case, tmp_path)) as checkpoint:
        model = Model(checkpoint)
        asked = requests(model.network.dims.vocab)
        crowded = engine(model, tokenizer, EngineOptions(5, 200, 16), 16, 2, case)
        heard = run(crowded, asked)
        assert case.isa in crowded.runner.describe()
        assert crowded.stats.preemptions > 0
        assert len(heard) == len(asked) + 1
        assert all(not event.error for events in heard.values() for event in events)
        lonely = engine(model, tokenizer, EngineOptions(1, 300, 32), 20, 1, case)
        for request in asked:
            for key, events in run(lonely, [request]).items():
                assert heard[key] == events, key
