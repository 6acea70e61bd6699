"""A head of its own, quantized: transformers computes the same with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny
from nybble.api.convert import convert
from nybble.api.quantize import quantize
from nybble.checkpoint.reader import Checkpoint
from nybble.kernels.compute import Compute
from nybble.models.linear import Mode
from nybble.models.model import Model
from nybble.models.sequence import SequenceState
from nybble.models.state import make_batch

TOLERANCE = 1e-4
F32 = Mode(Compute("f32", 2))


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_an_untied_checkpoint_agrees(tmp_path: Path, layout: str) -> None:
    """Logits of the packed folder against transformers' on its BF16 form, which it reads as an
    untied model: two matrices, and other logits than the tied model's."""
    source = tiny.checkpoint(tmp_path / "m", "qwen3", tie_word_embeddings=True)
    out, plain = tmp_path / "q", tmp_path / "plain"
    quantize(source, out, "nvfp4-all", layout=layout, data_free=True, untie_head=True)
    convert(out, plain, to="bf16")
    ids = torch.randint(0, 131, (23,), generator=torch.Generator().manual_seed(3))
    logits = []
    for folder in (plain, source):
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ends = peer.get_output_embeddings().weight, peer.get_input_embeddings().weight
        assert (ends[0].data_ptr() == ends[1].data_ptr()) == (folder == source)
        with torch.inference_mode():
            logits.append(peer(ids[None]).logits[0])
    with Checkpoint.open(out) as checkpoint:
        model = Model(checkpoint)
        pages, states = model.page_pool(1, len(ids), "f32"), model.state_pool(1)
        held = SequenceState(pages.numbers.take(), slots=states.numbers.take())
        batch = make_batch(model.network, [ids], [held])
        found = model.logits(model.forward(batch, pages, states, F32), F32)
    size = max(float(logits[0].abs().max()), 1.0)
    assert float((found - logits[0]).abs().max()) <= TOLERANCE * size
    assert float((found - logits[1]).abs().max()) > 100 * TOLERANCE * size
