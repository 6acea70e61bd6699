"""What a step reads and multiplies, against sums made from the headers by hand."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

import tiny
from nybble.api import conditions
from nybble.api.bench import BenchOptions, Case, Row, _row
from nybble.api.conditions import Watch, _busy_seconds
from nybble.api.quantize import quantize
from nybble.api.traffic import Traffic, operand, read_traffic
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import EngineError
from nybble.kernels.machine_limits import Limits

LIMITS = Limits(2, 1e9, {"f32": 1e9, "bf16": 2e9, "int8": 4e9})


def make(folder: Path, family: str, **changed: object) -> Path:
    config = tiny.config(family, **changed)
    tiny.write(folder, config, tiny.tensors(config))
    return folder


def traffic_of(folder: Path) -> Traffic:
    with Checkpoint.open(folder, headers_only=True) as checkpoint:
        return read_traffic(checkpoint)


def sizes(folder: Path, *parts: str) -> int:
    """Bytes of the tensors whose names hold one of these."""
    with Checkpoint.open(folder, headers_only=True) as checkpoint:
        return sum(
            info.nbytes
            for name, info in checkpoint.tensors.items()
            if any(p in name for p in parts)
        )


@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_step_reads_all_but_the_unused_rows_of_the_embedding(
    tmp_path: Path, tied: bool
) -> None:
    folder = make(tmp_path / "m", "llama", tie_word_embeddings=tied)
    found = traffic_of(folder)
    row = sizes(folder, "embed_tokens") // found.dims.vocab
    whole = sizes(folder, "")
    if tied:  # the head reads the whole embedding, the look-up three rows of it
        assert found.weight_bytes(3, 3) == whole + 3 * row
        assert found.weight_bytes(3, 0) == whole - sizes(folder, "embed_tokens") + 3 * row
    else:
        assert found.weight_bytes(3, 3) == whole - sizes(folder, "embed_tokens") + 3 * row
    assert found.stored_bytes == whole


def test_packed_bytes_count_not_decoded_ones(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "llama")
    before = traffic_of(folder)
    after = traffic_of(quantize(folder, tmp_path / "q", "nvfp4-all", data_free=True).out)
    assert before.formats == ("bf16",)
    assert after.formats == ("nvfp4",)
    assert after.dense.parameters == before.dense.parameters == after.dense.four_bit
    assert after.dense.nbytes < 0.32 * before.dense.nbytes  # 4.5 bits of 16, and the norms
    assert after.compute_seconds(1, 1, LIMITS, "bf16") == pytest.approx(
        before.compute_seconds(1, 1, LIMITS, "bf16")
    )
    assert after.compute_seconds(1, 1, LIMITS, "int8") == pytest.approx(
        before.compute_seconds(1, 1, LIMITS, "bf16") / 2
    )


def test_a_token_reads_its_own_experts_and_many_read_all(tmp_path: Path) -> None:
    found = traffic_of(make(tmp_path / "m", "qwen3_5_moe"))
    dims = found.dims
    per_token = dims.experts_per_token / dims.experts
    one, two, many = (found.weight_bytes(n, 0) - n * found.embedding_bytes for n in (1, 2, 500))
    assert one == pytest.approx(found.dense.nbytes + per_token * found.routed.nbytes)
    assert two == pytest.approx(
        found.dense.nbytes + (1 - (1 - per_token) ** 2) * found.routed.nbytes
    )
    assert many == pytest.approx(found.dense.nbytes + found.routed.nbytes)
    parameters = found.dense.parameters + per_token * found.routed.parameters
    assert found.compute_seconds(3, 0, LIMITS, "bf16") == pytest.approx(3 * 2 * parameters / 2e9)


def test_the_head_and_vision_are_not_counted_twice(tmp_path: Path) -> None:
    """Modules that no step of the language model reads: MTP, vision, the rest of the embedding."""
    folder = make(tmp_path / "m", "qwen3_5_moe")
    found = traffic_of(folder)
    counted = found.dense.nbytes + found.routed.nbytes + found.head.nbytes
    assert counted == sizes(folder, "") - sizes(folder, "mtp.", "visual.", "embed_tokens")


def test_states_are_read_and_written_pages_are_read(tmp_path: Path) -> None:
    found = traffic_of(make(tmp_path / "m", "qwen3_5"))
    d = found.dims
    linear = d.layer_types.count("linear_attention")
    full = len(d.layer_types) - linear
    heads = d.linear_value_heads * d.linear_key_dim * d.linear_value_dim
    channels = 2 * d.linear_key_heads * d.linear_key_dim + d.linear_value_heads * d.linear_value_dim
    states = 4 * linear * (heads + (d.conv_kernel - 1) * channels)
    pages = full * 2 * d.kv_heads * d.head_dim
    assert found.state_traffic(0, 2) == 2 * states
    assert found.state_traffic(10, 2) - found.state_traffic(0, 2) == 10 * 2 * pages
    assert found.state_traffic(10, 1) - found.state_traffic(0, 1) == 10 * pages


def test_operands_follow_precision_and_machine() -> None:
    everything = {"f32": 1.0, "bf16": 1.0, "int8": 1.0}
    assert operand("bf16", everything) == "bf16"
    assert operand("int8", everything) == "int8"
    assert operand("int8", everything, is_four_bit=False) == "bf16"
    assert operand("f32", everything) == "f32"
    assert operand("bf16", {"f32": 1.0}) == "f32"
    assert operand("int8", {"f32": 1.0}) == "f32"


def test_a_row_at_the_limit_is_at_its_roof(tmp_path: Path) -> None:
    found = traffic_of(make(tmp_path / "m", "llama"))
    case = Case(0, 7, 2)
    context = sum(range(1, 8)) / 7
    per_step = found.weight_bytes(2, 2) + 2 * found.state_traffic(context, 2)
    at_limit = 7 * per_step / LIMITS.read_bytes_s
    row = _row(case, (at_limit, 2 * at_limit, at_limit), found, LIMITS, "bf16", 2, 64)
    assert row.of_read == pytest.approx(1)
    assert row.tokens_per_s == pytest.approx(14 / at_limit)
    assert row.deviation > 0
    assert json.dumps(row.as_json())


def test_a_prompt_in_chunks_reads_the_weights_for_each(tmp_path: Path) -> None:
    found = traffic_of(make(tmp_path / "m", "llama"))
    whole = _row(Case(130, 0, 1), (1.0,), found, LIMITS, "bf16", 2, 192)
    parts = _row(Case(130, 0, 1), (1.0,), found, LIMITS, "bf16", 2, 64)
    assert whole.read_bytes == found.weight_bytes(130, 1)
    assert parts.read_bytes == pytest.approx(whole.read_bytes + 2 * found.dense.nbytes)
    assert parts.compute_s == whole.compute_s


def test_the_median_counts() -> None:
    row = Row(Case(100, 0, 1), (1.0, 50.0, 2.0), 4.0, 1.0, 0.5)
    assert row.tokens_per_s == 50
    assert row.of_roof == row.of_read == 0.5
    assert Row(Case(100, 0, 1), (1.0,), 4.0, 1.0, 0.5).deviation == 0


def test_tests_are_named_as_llama_bench_names_them() -> None:
    names = [str(t) for t in BenchOptions(512, 128, (1, 4)).cases]
    assert names == ["pp512", "tg128", "tg128@4"]
    assert [str(t) for t in BenchOptions(0, 8, (2,)).cases] == ["tg8@2"]
    assert [str(t) for t in BenchOptions(64, 0).cases] == ["pp64"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": 0, "generate": 0},
        {"prompt": -1},
        {"repeats": 0},
        {"batches": ()},
        {"batches": (1, 0)},
        {"generate": 1 << 21},
    ],
)
def test_sizes_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(EngineError):
        BenchOptions(**wrong)  # type: ignore[arg-type]


def test_waiting_for_a_disk_is_no_use_of_a_core(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 200 300 9999 8888 1 2 50 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    assert _busy_seconds(stat) == pytest.approx(6.03)
    assert _busy_seconds(tmp_path / "absent") is None


def test_own_work_is_not_the_work_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "_busy_seconds", lambda: 52.0)
    watch = Watch(began=time.monotonic() - 10, own=sum(os.times()[:4]) - 4, busy=40.0)
    share = watch.others_share()  # of 12 busy seconds in 10, 4 were ours
    assert share == pytest.approx(0.8, rel=0.05)
    alone = Watch(began=time.monotonic() - 10, own=sum(os.times()[:4]) - 20, busy=40.0)
    assert alone.others_share() == 0.0
    unknown = Watch(began=0.0, own=0.0, busy=None)
    assert unknown.others_share() is None
