"""Every rule that a checkpoint folder must keep, broken once each; and what the reader answers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from nybble.checkpoint import files, reader, safetensors
from nybble.checkpoint.reader import INDEX, Checkpoint
from nybble.checkpoint.safetensors import DTYPES, TensorInfo, TensorSpec
from nybble.errors import CheckpointError


def entry(
    dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def pack(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def one(name: str = "w", fill: int = 1) -> bytes:
    return pack({name: entry()}, bytes([fill]) * 4)


def write(folder: Path, files: dict[str, bytes | object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def refusal(folder: Path, **options: bool) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder, **options)
    return str(caught.value)


# --------------------------------------------------------------------------------- one file

HUGE = 2**62
BAD_FILES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["0 bytes", "at least 8"]),
    "seven bytes": (b"\0" * 7, ["7 bytes"]),
    "header beyond the file": (pack({"w": entry()})[:20], ["the file at 20"]),
    "header over the cap": ((10**8 + 1).to_bytes(8, "little"), ["100000001", "100000000"]),
    "header length 2^64 - 1": (b"\xff" * 8 + b"{}", ["18446744073709551615"]),
    "no header": (pack(b""), ["must start with '{'"]),
    "leading space": (pack(b" {}"), ["must start with '{'"]),
    "a list": (pack(b"[]"), ["must start with '{'"]),
    "not UTF-8": (pack(b'{"\xff":1}'), ["not UTF-8 at byte 2"]),
    "not JSON": (pack(b"{w}"), ["not valid JSON"]),
    "text after the object": (pack(b"{} x"), ["not valid JSON"]),
    "nested": (pack(b'{"w":' + b"[" * 200_000), ["nested too deeply"]),
    "a number of 5000 digits": (pack(b'{"w":' + b"9" * 5000 + b"}"), ["not valid JSON"]),
    "NaN": (pack(b'{"w":NaN}'), ["NaN is not JSON"]),
    "duplicate tensor": (
        pack(b'{"w":%s,"w":%s}' % ((json.dumps(entry()).encode(),) * 2), b"1234"),
        ["'w'", "twice"],
    ),
    "duplicate key": (
        pack(b'{"w":{"dtype":"U8","shape":[4],"shape":[4],"data_offsets":[0,4]}}', b"1234"),
        ["'shape'", "twice"],
    ),
    "duplicate key, escaped": (
        pack(b'{"w":{"dtype":"U8","shape":[1],"sh\\u0061pe":[4],"data_offsets":[0,4]}}', b"1234"),
        ["'shape'", "twice"],
    ),
    "two metadata": (pack(b'{"__metadata__":{},"__metadata__":{}}'), ["__metadata__", "twice"]),
    "metadata of a number": (pack({"__metadata__": {"k": 1}}), ["'k'", "must hold a string"]),
    "metadata a list": (pack({"__metadata__": []}), ["must be an object"]),
    "metadata null": (pack({"__metadata__": None}), ["must be an object"]),
    "entry a list": (pack({"w": [1, 2, 3]}), ["'w'", "expected an object"]),
    "entry without shape": (pack({"w": {"dtype": "U8", "data_offsets": [0, 1]}}), ["'w'"]),
    "entry with more": (pack({"w": {**entry(), "x": 1}}), ["'w'", "expected an object"]),
    "entry misspelt": (pack({"w": {"dtype": "U8", "shape": [1], "offsets": [0, 1]}}), ["'w'"]),
    "unknown dtype": (pack({"w": entry("Q3")}), ["'w'", "unknown dtype 'Q3'", "BF16"]),
    "dtype a list": (pack({"w": entry(["U8"])}), ["'w'", "unknown dtype"]),
    "F4": (pack({"w": entry("F4", [8])}), ["'w'", "F4", "less than a byte"]),
    "F6": (pack({"w": entry("F6_E2M3", [8])}), ["'w'", "F6_E2M3"]),
    "shape a number": (pack({"w": entry(shape=4)}), ["'w'", "shape must be"]),
    "shape negative": (pack({"w": entry(shape=[-4])}), ["'w'", "[-4]"]),
    "shape of a float": (pack({"w": entry(shape=[4.0])}), ["'w'", "[4.0]"]),
    "shape of a bool": (pack({"w": entry(shape=[True, 4])}), ["'w'", "[True, 4]"]),
    "40 dimensions": (pack({"w": entry(shape=[1] * 40)}), ["'w'", "40 dimensions"]),
    "product over 2^63": (pack({"w": entry("F64", [HUGE, 4])}), ["'w'", "exceeds 2^63"]),
    "over 2^63 and empty": (pack({"w": entry("U8", [HUGE, 4, 0], [0, 0])}), ["exceeds 2^63"]),
    "one offset": (pack({"w": entry(offsets=[4])}), ["'w'", "data_offsets"]),
    "offsets of text": (pack({"w": entry(offsets="04")}), ["'w'", "data_offsets"]),
    "offset a float": (pack({"w": entry(offsets=[0, 4.0])}, b"1234"), ["'w'", "data_offsets"]),
    "offsets falling": (pack({"w": entry(offsets=[4, 0])}, b"1234"), ["'w'", "rise"]),
    "offset negative": (pack({"w": entry(offsets=[-4, 0])}, b"1234"), ["'w'", "rise"]),
    "offset over 2^63": (pack({"w": entry(offsets=[2**64, 2**64 + 4])}), ["'w'", "rise"]),
    "bytes against shape": (
        pack({"w": entry("BF16")}, b"1234"),
        ["'w'", "BF16 [4] takes 8 bytes", "span 4"],
    ),
    "overlap": (
        pack({"a": entry(), "b": entry(offsets=[2, 6])}, b"123456"),
        ["'b'", "overlaps 'a'"],
    ),
    "hole": (
        pack({"a": entry(), "b": entry(offsets=[6, 10])}, b"1234567890"),
        ["'b'", "leaves 2 unused bytes after 'a'"],
    ),
    "hole at the start": (pack({"a": entry(offsets=[1, 5])}, b"12345"), ["after the header"]),
    "bytes at the end": (pack({"a": entry()}, b"12345"), ["as its header says", "download"]),
    "truncated": (pack({"a": entry()}, b"123"), ["as its header says", "download"]),
    "no data": (pack({"a": entry()}), ["the data are missing"]),
    "empty name": (pack({"": entry()}, b"1234"), ["0 characters"]),
    "long name": (pack({"n" * 1025: entry()}, b"1234"), ["1025 characters", "nnn"]),
    "control character": (pack({"a\nb": entry()}, b"1234"), ["'a\\nb'", "unprintable"]),
    "NUL": (pack({"a\0b": entry()}, b"1234"), ["a\\x00b", "unprintable"]),
    "half a surrogate": (pack(b'{"\\ud800":%s}' % json.dumps(entry()).encode()), ["unprintable"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_each_rule_of_the_format_is_enforced(tmp_path: Path, case: str) -> None:
    content, expected = BAD_FILES[case]
    message = refusal(write(tmp_path, {"model.safetensors": content}))
    assert "model.safetensors" in message
    assert len(message) < 1000
    for text in expected:
        assert text in message


def test_sizes_in_a_message_are_exact(tmp_path: Path) -> None:
    content = pack({"a": entry()}, b"123")
    message = refusal(write(tmp_path, {"model.safetensors": content}))
    assert f"expected {len(content) + 1} bytes" in message
    assert f"found {len(content)};" in message


def test_what_the_format_allows_is_read(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt", "note": 'quotes " and \\ too'},
        "b": entry("BF16", [2, 3], [4, 16]),
        'a"\u00e9': entry(offsets=[0, 4]),
        "none": entry("F32", [0, 5], [4, 4]),
        "scalar": entry("F32", [], [16, 20]),
    }
    data = bytes(range(20))
    text = json.dumps(header, indent=1).encode() + b"   \n"
    with Checkpoint.open(write(tmp_path, {"model.safetensors": pack(text, data)})) as checkpoint:
        assert list(checkpoint.tensors) == ['a"\u00e9', "none", "b", "scalar"]
        assert checkpoint.shards[0].metadata == header["__metadata__"]
        assert checkpoint.shards[0].header_bytes == 8 + len(text)
        assert checkpoint.shards[0].has_data
        b = checkpoint.array("b")
        assert b.dtype == ml_dtypes.bfloat16
        assert b.shape == (2, 3)
        assert b.tobytes() == data[4:16]
        assert checkpoint.raw("b").tobytes() == data[4:16]
        assert checkpoint.array("none").shape == (0, 5)
        assert checkpoint.array("scalar").shape == ()
        assert checkpoint.tensors["b"].offset == 8 + len(text) + 4
        assert checkpoint.tensors["b"].spec == TensorSpec("b", "BF16", (2, 3))


def test_a_file_without_tensors_is_legal(tmp_path: Path) -> None:
    assert Checkpoint.open(write(tmp_path, {"model.safetensors": pack({})})).tensors == {}


def test_every_dtype_has_its_width() -> None:
    for name, dtype in DTYPES.items():
        digits = "".join(c for c in name.split("_")[0] if c.isdigit())
        assert dtype.itemsize == (int(digits) // 8 if digits else 1)
        assert TensorSpec("t", name, (3, 5)).nbytes == 15 * dtype.itemsize
        info = TensorInfo("t", name, (3, 5), "f", 0)
        assert (info.size, info.spec.size) == (15, 15)
        assert info.nbytes == info.spec.nbytes


# ------------------------------------------------------------------------------- the folder

INDEXED = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}


def named(file: object) -> dict[str, object]:
    return {INDEX: {"weight_map": {"a": file}}, "x.safetensors": one("a")}


BAD_FOLDERS: dict[str, tuple[dict[str, object], list[str]]] = {
    "empty": ({}, ["is empty"]),
    "nothing of use": ({"README.md": b""}, ["no *.safetensors"]),
    "pickles": (
        {"pytorch_model-00001-of-00002.bin": b"", "config.json": {}},
        ["pytorch_model-00001-of-00002.bin", "pickle files are never loaded", "convert"],
    ),
    "index of pickles": (named("pytorch_model.bin"), ["pytorch_model.bin", "never loaded"]),
    "index without map": ({INDEX: {}, "x.safetensors": one()}, [INDEX, "weight_map"]),
    "index with an empty map": ({INDEX: {"weight_map": {}}}, [INDEX, "weight_map"]),
    "index a list": ({INDEX: []}, [INDEX, "expected a JSON object"]),
    "index metadata a list": ({INDEX: {**INDEXED, "metadata": []}}, [INDEX, "metadata"]),
    "index not JSON": ({INDEX: b"{"}, [INDEX, "not valid JSON"]),
    "index twice the key": ({INDEX: b'{"weight_map":{"a":"x","a":"x"}}'}, ["'a'", "twice"]),
    "index file a number": (named(7), [INDEX, "'a'", "7"]),
    "file above": (named("../x.safetensors"), ["../x.safetensors", "inside the folder"]),
    "file above, later": (named("sub/../../x.safetensors"), ["inside the folder"]),
    "file absolute": (named("/tmp/x.safetensors"), ["/tmp/x.safetensors", "inside the folder"]),
    "file with backslash": (named("..\\x.safetensors"), ["inside the folder"]),
    "file with NUL": (named("x\0.safetensors"), ["inside the folder"]),
    "file empty": (named(""), ["inside the folder"]),
    "file of another kind": (named("config.json"), ["config.json", "inside the folder"]),
    "files missing": (
        {
            INDEX: {"weight_map": {c: f"{c}.safetensors" for c in "xpqrs"}},
            "x.safetensors": one("x"),
        },
        ["4 of 5 files", "'p.safetensors'", "...", "complete the download"],
    ),
    "tensor missing": (
        {INDEX: INDEXED, "x.safetensors": one("a"), "y.safetensors": pack({})},
        ["y.safetensors", "lacks the tensor 'b'", "download again"],
    ),
    "tensor not named": (
        {INDEX: INDEXED, "x.safetensors": one("c"), "y.safetensors": one("b")},
        ["x.safetensors", "'c'", "does not name it"],
    ),
    "tensor named elsewhere": (
        {INDEX: INDEXED, "x.safetensors": one("b"), "y.safetensors": one("a")},
        ["x.safetensors", "'b'", "places it in 'y.safetensors'"],
    ),
    "duplicates without index": (
        {"x.safetensors": one("a"), "y.safetensors": one("a")},
        ["'a'", "'x.safetensors'", "'y.safetensors'"],
    ),
    "numbered and incomplete": (
        {
            "model-00001-of-00003.safetensors": one("a"),
            "model-00003-of-00003.safetensors": one("b"),
        },
        ["one of 3 files, found 2", "complete the download"],
    ),
    "config not JSON": ({"model.safetensors": one(), "config.json": b"x"}, ["config.json"]),
    "config a list": ({"model.safetensors": one(), "config.json": []}, ["config.json", "object"]),
    "shard a folder": ({"model.safetensors/x": b""}, ["not a regular file"]),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_each_rule_of_the_folder_is_enforced(tmp_path: Path, case: str) -> None:
    files, expected = BAD_FOLDERS[case]
    message = refusal(write(tmp_path / "model", files))
    assert str(tmp_path / "model") in message
    for text in expected:
        assert text in message


def test_the_path_must_be_a_folder(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": one()})
    assert "is a file" in refusal(tmp_path / "model.safetensors")
    assert "no such folder" in refusal(tmp_path / "nowhere")


def test_index_names_are_free_and_the_index_decides(tmp_path: Path) -> None:
    """As unsloth/Qwen3.8-27B-NVFP4: model.safetensors beside an index; others add a file of old."""
    files = {
        INDEX: {
            "metadata": {"total_size": 8},
            "weight_map": {"a": "model.safetensors", "m": "sub/model_mtp.safetensors"},
        },
        "model.safetensors": one("a", 3),
        "sub/model_mtp.safetensors": one("m", 4),
        "consolidated.safetensors": b"never looked at",
        ".hidden.safetensors": b"nor this",
        "config.json": {"model_type": "x"},
    }
    with Checkpoint.open(write(tmp_path, files)) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "m"]
        assert checkpoint.unindexed == ("consolidated.safetensors",)
        assert checkpoint.index_metadata == {"total_size": 8}
        assert checkpoint.config == {"model_type": "x"}
        assert checkpoint.array("m").tolist() == [4] * 4


def test_without_index_all_files_are_read(tmp_path: Path) -> None:
    files = {f"m-0000{i}-of-00002.safetensors": one(f"t{i}", i) for i in (1, 2)}
    with Checkpoint.open(write(tmp_path, {**files, "z.safetensors": one("z", 9)})) as checkpoint:
        assert [checkpoint.array(n)[0] for n in checkpoint.tensors] == [1, 2, 9]
        assert checkpoint.config == {}


def test_headers_alone_serve_planning_only(tmp_path: Path) -> None:
    write(tmp_path, {"a.safetensors": pack({"w": entry()}), "b.safetensors": one("v")})
    assert "a.safetensors" in refusal(tmp_path)
    with Checkpoint.open(tmp_path, headers_only=True) as checkpoint:
        assert [s.has_data for s in checkpoint.shards] == [False, True]
        assert checkpoint.array("v").tolist() == [1] * 4
        with pytest.raises(CheckpointError, match=r"a\.safetensors: holds only its header"):
            checkpoint.array("w")
    write(tmp_path, {"a.safetensors": pack({"w": entry()}, b"12")})
    assert "download it again" in refusal(tmp_path, headers_only=True)


def test_links_may_not_leave_the_folder(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", {"model.safetensors": one(), "config.json": {}})
    inside = write(tmp_path / "inside", {"real.bin": one()})
    (inside / "model.safetensors").symlink_to(outside / "model.safetensors")
    message = refusal(inside)
    assert "model.safetensors" in message
    assert str(outside) in message
    (inside / "model.safetensors").unlink()
    (inside / "model.safetensors").symlink_to("real.bin")
    Checkpoint.open(inside)
    (inside / "config.json").symlink_to(outside / "config.json")
    assert "config.json" in refusal(inside)


def test_a_snapshot_of_the_hub_cache_is_read(tmp_path: Path) -> None:
    model = tmp_path / "models--org--name"
    write(model / "blobs", {"f00d": one(), "beef": {"a": 1}})
    snapshot = write(model / "snapshots" / "rev", {})
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
    (snapshot / "config.json").symlink_to("../../blobs/beef")
    (snapshot / "LICENSE").symlink_to("../../blobs/beef")
    checkpoint = Checkpoint.open(snapshot)
    assert checkpoint.array("w").tolist() == [1] * 4
    assert checkpoint.config == {"a": 1}
    assert checkpoint.side_files() == ["LICENSE"]
    # The same links elsewhere lead out.
    (model / "snapshots").rename(model / "other")
    assert "leaves the folder" in refusal(model / "other" / "rev")


def test_a_named_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert "not a regular file" in refusal(tmp_path)


# ----------------------------------------------------------------------- what it answers


def test_views_are_read_only_and_outlive_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, {"model.safetensors": one()}))
    view = checkpoint.array("w")
    assert not view.flags.writeable
    checkpoint.close()
    assert view.tolist() == [1] * 4
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.array("w")


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, {"model.safetensors": one()}))
    with pytest.raises(CheckpointError, match="no tensor 'v' among its 1"):
        checkpoint.array("v")


def test_a_file_changed_after_opening_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, {"model.safetensors": one()}))
    write(tmp_path, {"model.safetensors": one() + b"x"})
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        checkpoint.array("w")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        checkpoint.array("w")


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[2]) * os.sysconf("SC_PAGESIZE")  # shared pages: those of mapped files


def test_dropped_pages_leave_the_process_and_come_back(tmp_path: Path) -> None:
    n = 32 << 20
    data = np.arange(n, dtype=np.uint8)
    content = pack({"w": entry(shape=[n], offsets=[0, n])}) + data.tobytes()
    with Checkpoint.open(write(tmp_path, {"model.safetensors": content})) as checkpoint:
        checkpoint.will_need("w", 0, 4096)
        view = checkpoint.array("w")
        before = resident_bytes()
        assert np.array_equal(view, data)
        assert resident_bytes() - before > n // 2
        checkpoint.drop_pages("w")
        checkpoint.drop_pages("w", 5, 5)
        assert resident_bytes() - before < n // 4
        assert np.array_equal(view, data)


def test_the_fingerprint_sees_headers_sizes_times_and_config(tmp_path: Path) -> None:
    def fresh() -> str:
        return Checkpoint.open(tmp_path).fingerprint()

    write(tmp_path, {"model.safetensors": one(), "config.json": {}, "README.md": b"1"})
    os.utime(tmp_path / "model.safetensors", ns=(10, 10))
    first = fresh()
    write(tmp_path, {"README.md": b"2"})
    assert fresh() == first
    os.utime(tmp_path / "model.safetensors", ns=(10, 11))
    assert fresh() != first
    write(tmp_path, {"model.safetensors": one("v")})
    os.utime(tmp_path / "model.safetensors", ns=(10, 10))
    assert fresh() != first
    write(tmp_path, {"model.safetensors": one()})
    os.utime(tmp_path / "model.safetensors", ns=(10, 10))
    assert fresh() == first
    write(tmp_path, {"config.json": {"a": 1}})
    assert fresh() != first


def test_side_files_are_everything_but_weights_and_rewritten_files(tmp_path: Path) -> None:
    keep = [
        ".gitattributes",
        "LICENSE",
        "README.md",
        "assets/config.json",
        "assets/deep/vocab.txt",
        "chat_template.jinja",
        "generation_config.json",
        "modeling.py",
        "preprocessor_config.json",
        "tokenizer.json",
    ]
    leave = [
        ".cache/huggingface/x",
        "config.json",
        "hf_quant_config.json",
        "model.safetensors",
        INDEX,
        "old.bin",
        "pytorch_model.bin.index.json",
        "original/consolidated.00.pth",
        "sub/x.safetensors",
        "x.gguf",
        "x.ckpt",
        "x.pt",
        "x.pkl",
    ]
    index = {"weight_map": {"w": "model.safetensors"}}
    content = {"model.safetensors": one(), "config.json": {}, INDEX: index}
    write(tmp_path, {**dict.fromkeys([*keep, *leave], b""), **content})
    assert Checkpoint.open(tmp_path).side_files() == keep


@pytest.mark.parametrize("is_folder", [False, True])
def test_side_files_may_not_lead_out(tmp_path: Path, is_folder: bool) -> None:
    write(tmp_path, {"model/model.safetensors": one(), "secret/x": b""})
    link = tmp_path / "model" / "vocab.json"
    link.symlink_to(tmp_path / "secret" / ("" if is_folder else "x"))
    with pytest.raises(CheckpointError, match=r"vocab\.json"):
        Checkpoint.open(tmp_path / "model").side_files()


def test_json_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (files, safetensors):
        monkeypatch.setattr(module, "HEADER_LIMIT", 100)
    write(tmp_path, {"model.safetensors": one(), "config.json": {"a": "x" * 100}})
    assert "at most 100" in refusal(tmp_path)
    with pytest.raises(CheckpointError, match="at most 100"):
        safetensors.parse_json(b" " * 101, "here")


Fault = Callable[..., object]


@pytest.mark.parametrize("broken", ["listdir", "open", "pread", "short pread", "mmap"])
def test_a_failing_disk_is_reported_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    write(tmp_path, {"model.safetensors": one()})

    def fail(*_: object, **__: object) -> object:
        raise OSError(5, "Input/output error")

    checkpoint = Checkpoint.open(tmp_path)
    if broken == "mmap":
        monkeypatch.setattr(reader.mmap, "mmap", fail)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be mapped"):
            checkpoint.array("w")
        return
    replacement: Fault = (lambda *_: b"") if broken == "short pread" else fail
    monkeypatch.setattr(reader.os, broken.split()[-1], replacement)
    expected = "became 8 bytes shorter" if broken == "short pread" else "Input/output error"
    assert expected in refusal(tmp_path)


def test_opening_many_tensors_is_not_quadratic(tmp_path: Path) -> None:
    """20,000 tensors take 0.1 s: a quadratic check would take minutes."""
    n = 20_000
    header = {f"model.layers.{i}.weight": entry(offsets=[4 * i, 4 * i + 4]) for i in range(n)}
    write(tmp_path, {"model.safetensors": pack(header, bytes(4 * n))})
    start = time.process_time()
    assert len(Checkpoint.open(tmp_path).tensors) == n
    assert time.process_time() - start < 20
