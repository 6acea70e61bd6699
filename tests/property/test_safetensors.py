"""Laws of the file format: what we write others read, and what we read we check."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from nybble.checkpoint.disk import Disk
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.safetensors import DTYPES, TensorSpec, parse_header
from nybble.checkpoint.writer import CheckpointWriter, layout_shards
from nybble.errors import CheckpointError

FIXED = settings(derandomize=True, deadline=None, max_examples=60)
#: What `safetensors.numpy` can hand out; the bytes of all others are compared through its header.
NUMPY = ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")

names = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=20)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
specs = st.lists(
    st.builds(TensorSpec, names, st.sampled_from(sorted(DTYPES)), shapes),
    min_size=1,
    max_size=12,
    unique_by=lambda t: t.name,
).filter(lambda ts: all(t.name != "__metadata__" for t in ts))


def content(spec: TensorSpec, seed: int) -> bytes:
    high = 2 if spec.dtype == "BOOL" else 256
    return np.random.default_rng(seed).integers(0, high, spec.nbytes, dtype=np.uint8).tobytes()


def write(out: Path, tensors: list[TensorSpec], limit: int) -> dict[str, bytes]:
    data = {t.name: content(t, i) for i, t in enumerate(tensors)}
    with CheckpointWriter(out, layout_shards(tensors, limit), disk=Disk()) as writer:
        for name, value in reversed(data.items()):
            writer.write(name, value)
        writer.finish({}, [], 0)
    return data


@FIXED
@given(specs, st.integers(1, 300))
def test_what_is_written_is_read_alike_by_us_and_by_safetensors(
    tensors: list[TensorSpec], limit: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = write(Path(folder) / "out", tensors, limit)
        with Checkpoint.open(Path(folder) / "out") as checkpoint:
            assert {t.spec for t in checkpoint.tensors.values()} == set(tensors)
            for t in tensors:
                assert checkpoint.raw(t.name).tobytes() == data[t.name]
                array = checkpoint.array(t.name)
                assert (array.shape, array.dtype) == (t.shape, DTYPES[t.dtype])
                assert array.flags.aligned
            files = {t.name: Path(folder) / "out" / t.file for t in checkpoint.tensors.values()}
        for t in tensors:
            with safe_open(files[t.name], framework="np") as theirs:
                view = theirs.get_slice(t.name)
                assert (view.get_dtype(), tuple(view.get_shape())) == (t.dtype, t.shape)
                if t.dtype in NUMPY:
                    assert theirs.get_tensor(t.name).tobytes() == data[t.name]


@FIXED
@given(specs, st.integers(1, 300))
def test_a_layout_covers_its_files_without_gaps(tensors: list[TensorSpec], limit: int) -> None:
    shards = layout_shards(tensors, limit)
    assert sorted(t.name for s in shards for t in s.tensors) == sorted(t.name for t in tensors)
    for shard in shards:
        at = len(shard.header)
        assert at % 64 == 0
        for t in shard.tensors:
            assert t.offset == at
            at += t.nbytes
        assert at == shard.size
        assert len(shard.tensors) == 1 or at - len(shard.header) <= limit


VALID = layout_shards(
    [
        TensorSpec("model.layers.0.mlp.weight", "BF16", (4, 6)),
        TensorSpec("scale", "F32", ()),
        TensorSpec("empty", "U8", (0, 3)),
        TensorSpec("codes", "U8", (5,)),
    ]
)[0].header

edits = st.lists(
    st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 3), st.binary(max_size=8)),
    min_size=1,
    max_size=4,
)


@settings(FIXED, max_examples=400)
@given(edits)
def test_a_damaged_header_is_refused_or_right_and_never_large(
    changes: list[tuple[int, int, bytes]],
) -> None:
    """Whatever the bytes, the answer is a CheckpointError or tensors inside the file."""
    header = VALID
    for at, removed, added in changes:
        header = header[:at] + added + header[at + removed :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(header + bytes(57))
        message = None
        tracemalloc.start()
        try:
            with Checkpoint.open(Path(folder)) as checkpoint:
                for name, info in checkpoint.tensors.items():
                    assert info.offset + info.nbytes <= path.stat().st_size
                    assert checkpoint.raw(name).nbytes == info.nbytes
                    assert checkpoint.array(name).shape == info.shape
        except CheckpointError as error:
            message = str(error)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert message is None or str(path) in message
        assert peak < 1 << 20


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
numbers = st.integers(-2, 70) | st.sampled_from([2**31, 2**62, 2**63, 2**64]) | st.booleans()
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "X"]) | json_values,
        "shape": st.lists(numbers, max_size=3) | json_values,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | json_values,
    }
)


@settings(FIXED, max_examples=200)
@given(st.dictionaries(st.text(max_size=8), entries | json_values, max_size=4))
def test_a_header_of_any_values_is_refused_or_covered(header: dict[str, object]) -> None:
    try:
        _, tensors, total = parse_header(json.dumps(header).encode(), "f", "f")
    except CheckpointError:
        return
    assert sum(t.nbytes for t in tensors.values()) == total
    assert tensors.keys() == header.keys() - {"__metadata__"}


@settings(FIXED, max_examples=200)
@given(st.data(), specs)
def test_our_reader_and_safetensors_accept_the_same_files(
    data: st.DataObject, tensors: list[TensorSpec]
) -> None:
    """We may refuse more (odd names, duplicate keys), but never take what the reference refuses."""
    (shard,) = layout_shards(tensors)
    at = data.draw(st.integers(0, len(shard.header) - 1))
    header = bytearray(shard.header)
    header[at] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(bytes(header) + bytes(shard.size - len(header)))
        try:
            Checkpoint.open(Path(folder)).close()
        except CheckpointError:
            return
        with safe_open(path, framework="np") as theirs:
            assert theirs.keys() is not None
