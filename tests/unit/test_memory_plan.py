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
    made: Network, memory: EngineMemory, kv_dtype: str, has_mtp: bool
) -> tuple[PagePool, StatePool]:
    linear = [i for i, kind in enumerate(made.dims.layer_types) if kind == LINEAR]
    full = [i for i in range(made.dims.layers) if i not in linear]
    if has_mtp:
        full.append(MTP_LAYER)
    return (
        PagePool(made, full, memory.pages, 64, kv_dtype),
        StatePool(made, linear, memory.slots),
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
    pages, states = pools(made, memory, kv_dtype, has_mtp)
    assert pages.nbytes == memory.pages * memory.page_bytes
    assert states.nbytes == memory.slots * memory.slot_bytes
    assert pages.nbytes + states.nbytes == memory.total_bytes <= GIB
    assert memory.tokens == memory.pages * 64
    assert (pages.numbers.count, states.numbers.count) == (memory.pages, memory.slots)


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
