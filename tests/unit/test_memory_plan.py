"""The memory that is planned is the memory that pools hold, to the byte; scales of FP8 pages."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import DoesNotFit, EngineError, ModelError
from nybble.families import find_family
from nybble.families.dimensions import LINEAR, Dimensions
from nybble.models.loader import ARCHITECTURES, Weights
from nybble.models.model import MTP_LAYER
from nybble.models.network import Network, read_network
from nybble.models.state import PagePool, StatePool
from nybble.plan.memory import (
    EngineMemory,
    attention_layers,
    default_budget,
    most_bytes,
    page_bytes,
    plan_memory,
    slot_bytes,
)

GIB = 1 << 30
MOE = "nvidia--Qwen3.6-35B-A3B-NVFP4"
DENSE = "nvidia--Qwen3.6-27B-NVFP4"


@lru_cache
def network(folder: str) -> Network:
    """The network of a published model, of which the sizes count here."""
    config = json.loads((tiny.CONFIGS / folder / "config.json").read_text())
    family = find_family(config)
    return read_network(config, family, ARCHITECTURES[family.model_type])


def pools(
    made: Network, memory: EngineMemory, kv_dtype: str, page_tokens: int = 64
) -> tuple[PagePool, StatePool]:
    linear = [i for i, kind in enumerate(made.dims.layer_types) if kind == LINEAR]
    full = [i for i in range(made.dims.layers) if i not in linear]
    if memory.has_mtp:
        full.append(MTP_LAYER)
    slots = memory.slots + memory.snapshots
    return (
        PagePool(made, full, memory.pages, page_tokens, kv_dtype),
        StatePool(made, linear, slots, has_mtp=memory.has_mtp),
    )


@lru_cache
def small(has_states: bool) -> Network:
    """A network of unequal sizes, of which thousands of pools fit."""
    made = network(MOE)
    kinds = (LINEAR, "full_attention", LINEAR) if has_states else ("full_attention",) * 3
    return replace(
        made,
        dims=replace(
            made.dims,
            layers=3,
            layer_types=kinds,
            hidden=7,
            kv_heads=3,
            head_dim=5,
            linear_key_heads=2,
            linear_value_heads=6,
            linear_key_dim=3,
            linear_value_dim=4,
        ),
    )


def test_a_state_of_the_published_models() -> None:
    """30 of 40 layers with 32 value heads, 48 of 64 with 48; 128 x 128 a head, float32."""
    assert slot_bytes(network(MOE).dims) == 30 * (32 * 128 * 128 * 4 + 3 * 8192 * 4) == 65_863_680
    assert slot_bytes(network(DENSE).dims) == 48 * (48 * 128 * 128 * 4 + 3 * 10_240 * 4)


def test_a_page_of_the_35b() -> None:
    """10 attention layers, 2 key/value heads of 256."""
    dims = network(MOE).dims
    assert attention_layers(dims) == 10
    assert page_bytes(dims, 64, "bf16", 10) == 10 * 2 * 2 * 256 * 64 * 2
    assert page_bytes(dims, 64, "fp8", 10) * 4 == page_bytes(dims, 64, "f32", 10)
    with pytest.raises(EngineError, match="'fp4'.*f32, bf16, fp8"):
        page_bytes(dims, 64, "fp4", 10)


@pytest.mark.parametrize("kv_dtype", ["fp8", "bf16", "f32"])
@pytest.mark.parametrize(
    ("folder", "has_mtp"),
    [(MOE, False), (MOE, True), (DENSE, False), (DENSE, True), ("Qwen--Qwen3-30B-A3B", False)],
)
def test_pools_hold_what_was_planned(folder: str, kv_dtype: str, has_mtp: bool) -> None:
    made = network(folder)
    memory = plan_memory(
        made.dims,
        budget_bytes=GIB,
        max_sequences=4,
        context=10_000,
        kv_dtype=kv_dtype,
        has_mtp=has_mtp,
    )
    assert (memory.drafts, memory.snapshots, memory.has_mtp) == (0, 0, has_mtp)
    pages, states = pools(made, memory, kv_dtype)
    assert pages.nbytes == memory.pages * memory.page_bytes
    assert states.nbytes == memory.slots * memory.slot_bytes
    assert pages.nbytes + states.nbytes == memory.total_bytes <= GIB
    assert memory.tokens == memory.pages * 64
    assert (pages.numbers.count, states.numbers.count) == (memory.pages, memory.slots)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_pools_with_drafts_and_snapshots_hold_what_was_planned(data: st.DataObject) -> None:
    """To the byte, whatever was asked for; and what was asked for is given or given up by rule."""
    draw = data.draw
    has_states, has_mtp, cache = (draw(st.booleans()) for _ in range(3))
    made, page_tokens = small(has_states), draw(st.sampled_from([1, 16, 64]))
    max_sequences, context = draw(st.integers(1, 9)), draw(st.integers(1, 200))
    drafts, kv_dtype = draw(st.integers(0, 4)), draw(st.sampled_from(["fp8", "f32"]))
    asked = draw(st.one_of(st.none(), st.integers(0, 50_000)))
    budget = draw(st.integers(0, 300_000))
    try:
        memory = plan_memory(
            made.dims,
            budget_bytes=budget,
            max_sequences=max_sequences,
            context=context,
            page_tokens=page_tokens,
            kv_dtype=kv_dtype,
            has_mtp=has_mtp,
            drafts=drafts,
            snapshot_bytes=asked,
            cache=cache,
        )
    except DoesNotFit:
        return
    pages, states = pools(made, memory, kv_dtype, page_tokens)
    assert pages.nbytes + states.nbytes == memory.total_bytes <= budget
    assert states.nbytes == (memory.slots + memory.snapshots) * memory.slot_bytes
    assert memory.snapshot_bytes == memory.snapshots * memory.slot_bytes
    assert memory.has_states == (has_states or memory.has_mtp)
    assert memory.has_mtp == (has_mtp and (memory.drafts > 0 or not drafts))
    assert memory.slots == memory.sequences * (1 + memory.drafts if memory.has_states else 1)
    assert 1 <= memory.sequences <= max_sequences
    if not memory.has_states:
        assert memory.snapshots == 0
    elif asked is not None:  # whole slots, and no less
        assert asked - memory.slot_bytes < memory.snapshot_bytes <= asked
    if memory.drafts and memory.has_states:
        assert memory.pages >= memory.sequences >= min(4, max_sequences)
    assert memory.drafts <= drafts


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 1 << 40),
    st.integers(1, 300),
    st.integers(1, 1 << 18),
    st.sampled_from([16, 64, 100]),
    st.sampled_from(["fp8", "bf16"]),
    st.sampled_from([MOE, "Qwen--Qwen3-30B-A3B"]),
)
def test_a_plan_is_within_its_budget_and_wastes_none(
    budget: int, max_sequences: int, context: int, page_tokens: int, kv_dtype: str, folder: str
) -> None:
    dims = network(folder).dims
    page = page_bytes(dims, page_tokens, kv_dtype, attention_layers(dims))
    slot = slot_bytes(dims)
    plan = partial(
        plan_memory,
        dims,
        budget_bytes=budget,
        max_sequences=max_sequences,
        context=context,
        page_tokens=page_tokens,
        kv_dtype=kv_dtype,
    )
    if budget < page + slot:
        with pytest.raises(DoesNotFit, match=f"{page:,} bytes .*{slot:,}; raise --memory"):
            plan()
        return
    found = plan()
    assert found.total_bytes == found.pages * page + found.slots * slot <= budget
    most = found.slots * -(-context // page_tokens)
    assert 1 <= found.pages <= most
    assert found.pages == most or budget - found.total_bytes < page
    assert 1 <= found.slots <= max_sequences
    if found.slots < max_sequences:  # half of the budget holds no more
        assert (found.slots + 1) * slot * 2 > budget


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 1 << 26),
    st.integers(1, 300),
    st.sampled_from([16, 64, 8192]),  # pages smaller and larger than a state
    st.sampled_from([MOE, "Qwen--Qwen3-30B-A3B"]),
)
def test_the_memory_that_a_refusal_names_is_enough(
    budget: int, max_sequences: int, page_tokens: int, folder: str
) -> None:
    sizes: dict[str, Any] = {
        "max_sequences": max_sequences,
        "context": 1 << 18,
        "page_tokens": page_tokens,
    }
    try:
        plan_memory(network(folder).dims, budget_bytes=budget, **sizes)
    except DoesNotFit as error:
        [gib] = re.findall(r"raise --memory to ([\d.]+) \(GiB\) or more", str(error))
        found = plan_memory(network(folder).dims, budget_bytes=int(float(gib) * 2**30), **sizes)
        assert found.pages >= 1
        assert found.total_bytes > budget


def test_all_that_is_needed_is_planned_and_no_more() -> None:
    for folder in (MOE, "Qwen--Qwen3-30B-A3B"):
        dims = network(folder).dims
        most = most_bytes(dims, max_sequences=3, context=1000, kv_dtype="fp8")
        plan = plan_memory(
            dims, budget_bytes=1 << 50, max_sequences=3, context=1000, kv_dtype="fp8"
        )
        assert (plan.total_bytes, plan.pages, plan.slots) == (most, 3 * 16, 3)


@pytest.mark.parametrize(
    ("folder", "asked", "slots", "snapshots"),
    [
        (MOE, None, 3 * 4, 64),
        (MOE, 1 << 30, 3 * 4, (1 << 30) // (65_863_680 + 8_192)),
        (MOE, 0, 3 * 4, 0),
        ("Qwen--Qwen3-30B-A3B", None, 3, 0),
        ("Qwen--Qwen3-30B-A3B", 1 << 30, 3, 0),
    ],
)
def test_most_counts_drafts_snapshots_and_the_pages_of_a_cache(
    folder: str, asked: int | None, slots: int, snapshots: int
) -> None:
    """A budget of just that much is used to the last byte."""
    dims = network(folder).dims
    sizes: dict[str, Any] = {
        "max_sequences": 3,
        "context": 1000,
        "has_mtp": folder == MOE,
        "drafts": 3,
        "snapshot_bytes": asked,
        "cache": True,
    }
    most = most_bytes(dims, **sizes)
    for budget in (most, 1 << 50):
        plan = plan_memory(dims, budget_bytes=budget, **sizes)
        assert (plan.total_bytes, plan.pages) == (most, 2 * 3 * 16)
        assert (plan.slots, plan.snapshots, plan.drafts) == (slots, snapshots, 3)


def test_a_quarter_of_the_memory_is_snapshots_unasked() -> None:
    dims = network(MOE).dims
    plan = partial(plan_memory, dims, max_sequences=32, context=1 << 18, snapshot_bytes=None)
    found = plan(budget_bytes=8 * GIB)
    assert found.snapshots == 2 * GIB // 65_863_680 == 32
    assert plan(budget_bytes=40 * GIB).snapshots == 64  # more would not be used
    least = page_bytes(dims, 64, "bf16", 10) + slot_bytes(dims)
    assert plan(budget_bytes=least).snapshots == 0  # a sequence comes first


def test_sequences_go_before_drafts_down_to_four() -> None:
    """A slot is 65.9 MB; half of the budget is for slots, where not all sequences fit."""
    dims = network(MOE).dims
    plan = partial(plan_memory, dims, max_sequences=32, context=1 << 18, drafts=3)
    held = [
        (found.sequences, found.drafts)
        for slots in (128, 17, 16, 15, 12, 11, 8, 7, 4, 1)
        for found in [plan(budget_bytes=2 * slots * 65_863_680)]
    ]
    assert held == [
        (32, 3),
        (4, 3),
        (4, 3),
        (5, 2),
        (4, 2),
        (5, 1),
        (4, 1),
        (7, 0),
        (4, 0),
        (1, 0),
    ]
    single = plan_memory(
        dims, budget_bytes=8 * 65_863_680, max_sequences=1, context=1 << 18, drafts=3
    )
    assert (single.sequences, single.drafts) == (1, 3)  # who asked for one has drafts for it


def test_an_mtp_head_without_drafts_takes_nothing() -> None:
    sizes: dict[str, Any] = {"max_sequences": 4, "context": 1 << 18}
    with_head = plan_memory(
        network(MOE).dims, budget_bytes=GIB // 4, drafts=2, has_mtp=True, **sizes
    )
    without = plan_memory(network(MOE).dims, budget_bytes=GIB // 4, **sizes)
    assert with_head == without
    assert not with_head.has_mtp


def test_snapshots_that_leave_nothing_or_hold_nothing_are_refused() -> None:
    dims = network(MOE).dims
    plan = partial(plan_memory, dims, max_sequences=4, context=1000)
    with pytest.raises(
        DoesNotFit, match=r"holds no sequence beside 16 snapshots: .*or lower --snapshot-memory"
    ) as told:
        plan(budget_bytes=GIB, snapshot_bytes=GIB)
    [gib] = re.findall(r"raise --memory to ([\d.]+) \(GiB\)", str(told.value))
    found = plan(budget_bytes=int(float(gib) * 2**30), snapshot_bytes=GIB)
    assert (found.snapshots, found.sequences) == (16, 1)
    with pytest.raises(DoesNotFit, match="1,000 bytes hold no snapshot, .*65,863,680; give --snap"):
        plan(budget_bytes=GIB, snapshot_bytes=1000)


@pytest.mark.parametrize("field", ["max_sequences", "context", "page_tokens"])
def test_sizes_below_one_are_refused(field: str) -> None:
    sizes: dict[str, Any] = {"max_sequences": 1, "context": 1, "page_tokens": 1, field: 0}
    with pytest.raises(EngineError, match=f"{field} must be 1 or more, found 0"):
        plan_memory(network(MOE).dims, budget_bytes=GIB, **sizes)


def test_a_model_without_recurrent_layers_has_slots_of_nothing() -> None:
    assert slot_bytes(Dimensions(layer_types=("full_attention",), conv_kernel=0)) == 0
    made = network("Qwen--Qwen3-30B-A3B")
    plan = plan_memory(made.dims, budget_bytes=GIB, max_sequences=7, context=64)
    assert (plan.slots, plan.slot_bytes) == (7, 0)
    assert StatePool(made, [], plan.slots).nbytes == 0


def test_the_default_budget() -> None:
    assert default_budget(100, 20, 1000) == 48  # 60 % of what the weights leave
    assert default_budget(100, 20, 30) == 30  # no more than can be used
    assert default_budget(100, 400, 1000) == 6  # a model larger than memory
    assert default_budget(100, 95, 1000) == 6


# ------------------------------------------------------------------------------- scales of a cache


def checkpoint_with(folder: Path, **tensors: object) -> Path:
    """A tiny Llama, of whose first layer's attention these are scalar tensors more."""
    config = tiny.config("llama")
    more = {
        f"model.layers.0.self_attn.{name.replace('__', '.')}": np.array(value, dtype=np.float32)
        for name, value in tensors.items()
    }
    return tiny.write(folder, config, {**tiny.tensors(config), **more})


@pytest.mark.parametrize(
    ("tensors", "wanted"),
    [
        ({}, (1.0, 1.0)),
        ({"k_proj__k_scale": 0.5, "v_proj__v_scale": 0.25}, (0.5, 0.25)),
        ({"k_scale": [2.0], "v_scale": [0.75]}, (2.0, 0.75)),
    ],
)
def test_scales_of_either_layout(
    tmp_path: Path, tensors: dict[str, object], wanted: tuple[float, float]
) -> None:
    with Checkpoint.open(checkpoint_with(tmp_path / "m", **tensors)) as checkpoint:
        weights = Weights(checkpoint)
        assert weights.kv_scales(0) == wanted
        assert weights.kv_scales(1) == (1.0, 1.0)
        pool = PagePool(weights.network, [0, 1], 1, 4, "fp8", {0: wanted})
    assert (pool.layers[0].key_scale, pool.layers[0].value_scale) == wanted
    assert pool.layers[1].key_scale == 1.0
    assert pool.clipped == 0


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"k_scale": 0.5}, "self_attn has a scale for its keys .* none for the other"),
        ({"v_proj__v_scale": 0.5}, "a scale for its values"),
        ({"k_scale": 0.0, "v_scale": 1.0}, r"self_attn.k_scale is 0.0, expected a positive"),
        ({"k_scale": 1.0, "v_scale": np.nan}, r"self_attn.v_scale is nan"),
        ({"k_scale": np.inf, "v_scale": 1.0}, r"self_attn.k_scale is inf"),
        ({"k_scale": [1.0, 2.0], "v_scale": 1.0}, r"self_attn.k_scale: expected \[\]"),
    ],
)
def test_scales_that_cannot_be_meant(
    tmp_path: Path, tensors: dict[str, object], message: str
) -> None:
    with Checkpoint.open(checkpoint_with(tmp_path / "m", **tensors)) as checkpoint:
        weights = Weights(checkpoint)
        with pytest.raises(ModelError, match=message):
            weights.kv_scales(0)


def test_pages_of_another_dtype_are_refused() -> None:
    made = network(MOE)
    with pytest.raises(EngineError, match="'int8'; choose bf16, f32, fp8"):
        PagePool(made, [3], 1, 64, "int8")
    few = replace(made.dims, layer_types=(LINEAR,))
    assert attention_layers(few, has_mtp=True) == made.dims.mtp_layers
