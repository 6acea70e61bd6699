"""GGUF for all inputs: what is written is read, what is damaged is refused, no bit of a block is
lost."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.checkpoint.gguf import Field, parse
from nybble.checkpoint.gguf_blocks import BY_NAME, decode, nvfp4_blocks, nvfp4_parts, to_bf16
from nybble.checkpoint.gguf_writer import GGUFSpec, lay_out
from nybble.errors import CheckpointError
from nybble.formats.block import NVFP4
from nybble.formats.tensor import BlockScaledTensor

INTEGERS = {"u8": 8, "u16": 16, "u32": 32, "u64": 64, "i8": -8, "i16": -16, "i32": -32, "i64": -64}


def _integers(kind: str) -> st.SearchStrategy[int]:
    bits = INTEGERS[kind]
    return st.integers(0, 2**bits - 1) if bits > 0 else st.integers(-(2 ** (-bits - 1)), -1)


def _scalars() -> st.SearchStrategy[Field]:
    numbers = [_integers(kind).map(lambda v, k=kind: Field(k, v)) for kind in INTEGERS]
    decimals = st.floats(width=32, allow_nan=False).map(lambda v: Field("f32", v))
    return st.one_of(
        *numbers,
        decimals,
        st.floats(allow_nan=False).map(lambda v: Field("f64", v)),
        st.booleans().map(lambda v: Field("bool", v)),
        st.text(max_size=20).map(lambda v: Field("str", v)),
    )


def _arrays() -> st.SearchStrategy[Field]:
    i32 = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5)
    return st.one_of(
        st.lists(st.text(max_size=9), max_size=5).map(lambda v: Field("[str]", v)),
        i32.map(lambda v: Field("[i32]", np.array(v, dtype=np.int32))),
        st.lists(st.booleans(), max_size=5).map(lambda v: Field("[bool]", np.array(v, np.bool_))),
    )


@st.composite
def _specs(draw: st.DrawFn) -> list[GGUFSpec]:
    names = draw(
        st.lists(st.from_regex(r"[a-z]\.[a-z]{1,50}", fullmatch=True), unique=True, max_size=5)
    )
    specs = []
    for name in names:
        kind = draw(st.sampled_from(sorted(BY_NAME)))
        rows = draw(st.lists(st.integers(1, 3), max_size=3))
        k = BY_NAME[kind].block * draw(st.integers(1, 3))
        specs.append(GGUFSpec(name, kind, (*rows, k)))
    return specs


FIELDS = st.dictionaries(
    st.from_regex(r"k\.[a-z]{1,9}", fullmatch=True), st.one_of(_scalars(), _arrays()), max_size=6
)


@given(FIELDS, _specs())
def test_a_header_says_what_was_put_in(fields: dict[str, Field], specs: list[GGUFSpec]) -> None:
    header, placed, size = lay_out(fields, specs)
    version, found, tensors = parse(memoryview(header + bytes(size - len(header))), "x.gguf")
    assert version == 3
    assert list(found) == list(fields)
    for key, field in fields.items():
        assert found[key].kind == field.kind
        assert np.array_equal(found[key].value, field.value)  # type: ignore[arg-type]
    assert tuple(tensors.values()) == placed


@settings(max_examples=300)
@given(FIELDS, _specs(), st.data())
def test_damage_ends_in_an_error_or_in_a_sound_file(
    fields: dict[str, Field], specs: list[GGUFSpec], data: st.DataObject
) -> None:
    header, _, size = lay_out(fields, specs)
    damaged = bytearray(header + bytes(size - len(header)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(header) - 1))
        damaged[at] = data.draw(st.sampled_from([0, 1, 8, 9, 0x7F, 0xFF]))
    cut = data.draw(st.integers(0, len(damaged)))
    damaged = damaged[:cut] if data.draw(st.booleans()) else damaged
    try:
        _, _, tensors = parse(memoryview(bytes(damaged)), "x.gguf")
    except CheckpointError:
        return
    ends = [0]
    for tensor in tensors.values():
        assert ends[-1] <= tensor.offset
        assert tensor.offset + tensor.nbytes <= len(damaged)
        ends.append(tensor.offset + tensor.nbytes)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_nvfp4_keeps_every_bit_and_value(n: int, blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (n, 32 * blocks), np.uint8)
    scales = rng.integers(0, 0x7F, (n, 4 * blocks), np.uint8)
    raw = nvfp4_blocks(codes, scales)
    assert raw.nbytes == n * blocks * 36
    back = nvfp4_parts(raw)
    assert np.array_equal(back[0], codes.reshape(-1))
    assert np.array_equal(back[1], scales.reshape(-1))
    ours = BlockScaledTensor(NVFP4, (n, 64 * blocks), codes, scales, np.float32(1).reshape(()))
    assert np.array_equal(decode("NVFP4", raw), ours.dequantize().reshape(-1))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_bf16_rounds_to_the_nearest_and_counts_the_rest(values: list[float]) -> None:
    found = np.array(values, np.float32)
    bits, lost = to_bf16(found)
    back = (bits.astype(np.uint32) << 16).view(np.float32)
    assert lost == np.count_nonzero(back != found)
    finite = np.isfinite(back)
    assert (
        np.abs(back - found)[finite] <= np.maximum(np.abs(found[finite]) * 2**-8, 2.0**-133)
    ).all()
