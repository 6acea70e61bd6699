"""What differs between two checkpoints: every kind of difference, and what counts as equal."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from typer.testing import CliRunner

from nybble.api.diff import Count, Difference, Retyped, diff
from nybble.checkpoint.reader import INDEX
from nybble.checkpoint.safetensors import DTYPES
from nybble.cli import diff as cli
from nybble.errors import CheckpointError
from nybble.progress import Progress
from nybble.rewrite import diff_tensors

SPELLED = {dtype: name for name, dtype in DTYPES.items()}
E4M3, BF16 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16)

Tensors = dict[str, NDArray[Any]]
Files = Mapping[str, object]


def random(shape: tuple[int, ...], dtype: np.dtype[Any], seed: int = 0) -> NDArray[Any]:
    width = dtype.itemsize
    raw = np.random.default_rng(seed).integers(1, 100, (*shape[:-1], shape[-1] * width), np.uint8)
    return raw.view(dtype)


def write(folder: Path, tensors: Tensors, files: Files | None = None, shards: int = 1) -> Path:
    """A checkpoint of so many shards, and files beside it: text as it is, the rest as JSON."""
    folder.mkdir(parents=True)
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        entries: dict[str, object] = {}
        data = b""
        for tensor in names[shard::shards]:
            value = tensors[tensor]
            end = len(data) + value.nbytes
            entries[tensor] = {
                "dtype": SPELLED[value.dtype],
                "shape": value.shape,
                "data_offsets": [len(data), end],
            }
            data += value.tobytes()
            weight_map[tensor] = name
        header = json.dumps(entries).encode()
        (folder / name).write_bytes(len(header).to_bytes(8, "little") + header + data)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, content in (files or {}).items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
    return folder


def two(tmp_path: Path, a: Tensors, b: Tensors, **options: Any) -> Difference:
    return diff(write(tmp_path / "a", a), write(tmp_path / "b", b), **options)


def beside(tmp_path: Path, a: Files, b: Files) -> Difference:
    """The difference between two checkpoints of the same tensor and these files."""
    w = {"w": np.arange(4, dtype=np.uint8)}
    return diff(write(tmp_path / "a", w, a), write(tmp_path / "b", w, b))


PLAIN = {
    "x.weight": random((6, 10), BF16),
    "y.bias": random((7,), np.dtype(np.float32)),
    "z": np.array([1, 2, 3], dtype=np.int64),
}


# ------------------------------------------------------------------------------------------- equal


def test_a_checkpoint_does_not_differ_from_its_copy(tmp_path: Path) -> None:
    found = two(tmp_path, PLAIN, PLAIN)
    assert found.is_equal
    assert (found.compared_whole, found.sampled, found.is_rearranged) == (3, 0, False)


def test_other_shards_and_another_order_count_as_equal(tmp_path: Path) -> None:
    a = write(tmp_path / "a", PLAIN, shards=2)
    found = diff(a, write(tmp_path / "b", dict(reversed(PLAIN.items()))))
    assert found.is_equal
    assert found.is_rearranged
    assert "counts as equal" in cli.render(found)


def test_a_file_that_both_share_is_not_read(tmp_path: Path) -> None:
    a = write(tmp_path / "a", PLAIN)
    shutil.copytree(a, tmp_path / "b", copy_function=os.link)  # as the hub's cache does
    found = diff(a, tmp_path / "b")
    assert found.is_equal
    assert (found.compared_whole, found.compared_bytes) == (3, 0)


# ----------------------------------------------------------------------------------------- tensors


def test_names_dtypes_and_shapes(tmp_path: Path) -> None:
    b = {
        "x.weight": PLAIN["x.weight"].astype(np.float32),
        "y.bias": PLAIN["y.bias"][:5],
        "new": PLAIN["z"],
    }
    found = two(tmp_path, PLAIN, b)
    assert (found.only_in_a, found.only_in_b) == (("z",), ("new",))
    assert found.retyped == (
        Retyped("x.weight", "BF16 [6, 10]", "F32 [6, 10]"),
        Retyped("y.bias", "F32 [7]", "F32 [5]"),
    )
    assert not found.is_equal


def test_elements_that_differ_are_counted(tmp_path: Path) -> None:
    changed = PLAIN["x.weight"].copy()
    changed.view(np.uint16)[2, 3:6] ^= 1
    found = two(tmp_path, PLAIN, PLAIN | {"x.weight": changed})
    (values,) = found.values
    assert (values.name, values.elements) == ("x.weight", Count(3, 60, 60))
    assert "values       x.weight: 3 of 60 compared elements differ" in cli.render(found)


def test_a_large_tensor_is_sampled_and_deep_reads_all_of_it(tmp_path: Path) -> None:
    a = random((3, 1 << 19), np.dtype(np.uint8))
    hidden, seen = a.copy(), a.copy()
    hidden[0, 100_000] ^= 1
    seen[2, -1] ^= 1
    left, right = write(tmp_path / "a", {"w": a}), write(tmp_path / "b", {"w": hidden})
    shallow = diff(left, right)
    assert shallow.is_equal
    assert (shallow.sampled, shallow.compared_whole) == (1, 0)
    assert "--deep compares every byte" in cli.render(shallow)
    (values,) = diff(left, right, deep=True).values
    assert values.elements == Count(1, a.size, a.size)
    (values,) = diff(left, write(tmp_path / "c", {"w": seen})).values
    assert values.elements == Count(1, 3 * 4096, a.size)


def test_what_is_read_whole_has_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff_tensors, "BUDGET_BYTES", 100_000)
    tensors = {name: random((60_000,), np.dtype(np.uint8)) for name in "abc"}
    found = two(tmp_path, tensors, tensors)
    assert (found.compared_whole, found.sampled) == (1, 2)


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    class Counting(Progress):
        total = done = 0

        def stage(self, title: str, total_bytes: int) -> None:
            self.total = total_bytes

        def advance(self, n_bytes: int, note: str = "") -> None:
            self.done += n_bytes

    tensors = PLAIN | {"big": random((1 << 21,), np.dtype(np.uint8))}
    for deep in (False, True):
        progress = Counting()
        two(tmp_path / str(deep), tensors, tensors, deep=deep, progress=progress)
        assert progress.done == progress.total == sum(t.nbytes for t in tensors.values())


# --------------------------------------------------------------------------------------- quantized

N, K = 24, 64
CODES = random((N, K // 2), np.dtype(np.uint8))
SCALES = random((N, K // 16), E4M3, seed=1)


def f32(value: float, shape: tuple[int, ...] = ()) -> NDArray[np.float32]:
    return np.full(shape, value, dtype=np.float32)


def nvfp4(codes: NDArray[Any] = CODES, scales: NDArray[Any] = SCALES, top: float = 0.25) -> Tensors:
    return {"m.weight": codes, "m.weight_scale": scales, "m.weight_scale_2": f32(top)}


def test_codes_scales_and_the_tensor_scale_of_a_quantized_module(tmp_path: Path) -> None:
    codes, scales = CODES.copy(), SCALES.copy()
    codes[0, 0] ^= 0x11  # two nibbles
    codes[5, 7] ^= 0x30  # one
    scales.view(np.uint8)[3, 1:3] ^= 1
    found = two(tmp_path, nvfp4(), nvfp4(codes, scales, 0.5))
    (module,) = found.modules
    assert (module.name, module.held) == ("m", "nvfp4")
    assert module.codes == Count(3, N * K, N * K)
    assert module.scales == Count(2, N * K // 16, N * K // 16)
    assert module.tensor_scale_ratio == 2.0
    assert (found.values, found.only_in_a) == ((), ())
    text = cli.render(found)
    assert "1 modules differ; 3 of 1,536 compared codes" in text
    assert "tensor scale x 2" in text


def test_a_divisor_and_a_multiplier_that_mean_the_same_are_equal(tmp_path: Path) -> None:
    compressed = {
        "m.weight_packed": CODES,
        "m.weight_scale": SCALES,
        "m.weight_global_scale": f32(4.0, (1,)),
    }
    found = two(tmp_path, nvfp4(top=0.25), compressed)
    assert found.is_equal
    assert found.renamed == (
        ("m.weight", "m.weight_packed"),
        ("m.weight_scale_2", "m.weight_global_scale"),
    )
    assert "2 tensors of quantized modules have another name" in cli.render(found)
    compressed["m.weight_global_scale"] = f32(2.0, (1,))
    other = diff(tmp_path / "a", write(tmp_path / "c", compressed))
    assert [m.tensor_scale_ratio for m in other.modules] == [2.0]


def test_fp8_scales_by_tensor_are_a_ratio_and_by_channel_a_count(tmp_path: Path) -> None:
    codes = random((N, K), E4M3)
    a = {
        "t.weight": codes,
        "t.weight_scale": f32(0.5),
        "t.input_scale": f32(1.0),
        "c.weight": codes,
        "c.weight_scale": f32(0.5, (N,)),
    }
    channels = f32(0.5, (N, 1)).astype(BF16)
    channels[3] = 1
    b = {
        "t.weight": codes,
        "t.weight_scale": f32(0.25, (1,)).astype(BF16),
        "t.input_scale": f32(3.0),
        "c.weight": codes,
        "c.weight_scale": channels,
    }
    found = two(tmp_path, a, b)
    tensor, channel = sorted(found.modules, key=lambda m: m.name, reverse=True)
    assert (tensor.tensor_scale_ratio, tensor.input_scale_ratio) == (0.5, 3.0)
    assert (tensor.scales, channel.scales) == (None, Count(1, N, N))
    assert [r.name for r in found.retyped] == ["t.weight_scale", "c.weight_scale"]
    assert "1 input scales differ" in cli.render(found)


def test_a_scale_of_zero_is_a_difference(tmp_path: Path) -> None:
    found = two(tmp_path, nvfp4(top=0.0), nvfp4(top=0.5))
    assert [m.tensor_scale_ratio for m in found.modules] == [float("inf")]


def test_a_module_of_another_format_is_compared_by_its_tensors(tmp_path: Path) -> None:
    plain = {"m.weight": random((N, K), BF16)}
    found = two(tmp_path, plain, nvfp4())
    assert found.retyped == (Retyped("m.weight", f"BF16 [{N}, {K}]", f"U8 [{N}, {K // 2}]"),)
    assert found.only_in_b == ("m.weight_scale", "m.weight_scale_2")


def test_parts_that_do_not_fit_are_compared_by_name(tmp_path: Path) -> None:
    wide = nvfp4(random((N, K), np.dtype(np.uint8)), random((N, K // 8), E4M3))
    found = two(tmp_path, nvfp4(), wide)
    assert [r.name for r in found.retyped] == ["m.weight", "m.weight_scale"]
    finer = nvfp4(scales=random((N, K // 8), E4M3))  # blocks of 8: another format
    found = diff(tmp_path / "a", write(tmp_path / "c", finer))
    assert [r.name for r in found.retyped] == ["m.weight_scale"]
    lacking = {k: v for k, v in nvfp4().items() if k != "m.weight_scale_2"}
    found = diff(tmp_path / "a", write(tmp_path / "d", lacking))
    assert (found.only_in_a, found.modules) == (("m.weight_scale_2",), ())


# ------------------------------------------------------------------------------- files beside them


def test_settings_are_named_by_their_path(tmp_path: Path) -> None:
    layers = {"model.layers.0": {"quant_algo": "FP8"}}
    a = {
        "config.json": {"quantization_config": {"quantized_layers": layers, "ignore": ["x"]}},
        "generation_config.json": {"temperature": 1, "same": None},
        "tokenizer.json": {"added_tokens": [{"id": 1}, {"id": 2}]},
    }
    b = {
        "config.json": {"quantization_config": {"quantized_layers": {}, "ignore": ["x", "y"]}},
        "generation_config.json": {"temperature": 1.5, "top_k": 20, "same": None},
        "tokenizer.json": {"added_tokens": [{"id": 1}, {"id": 3}]},
    }
    found = beside(tmp_path, a, b)
    assert {(s.file, s.path): (s.a, s.b) for s in found.settings} == {
        ("config.json", 'quantization_config.quantized_layers["model.layers.0"]'): (
            '{"quant_algo": "FP8"}',
            "",
        ),
        ("config.json", "quantization_config.ignore"): ('["x"]', '["x", "y"]'),
        ("generation_config.json", "temperature"): ("1", "1.5"),
        ("generation_config.json", "top_k"): ("", "20"),
        ("tokenizer.json", "added_tokens[1].id"): ("2", "3"),
    }
    assert "generation_config.json: top_k: (absent) -> 20" in cli.render(found)


def test_long_lists_and_values_are_shortened(tmp_path: Path) -> None:
    a = {"config.json": {"list": list(range(20)), "text": "a" * 999, "flag": 1}}
    b = {"config.json": {"list": list(range(1, 31)), "text": "b" * 999, "flag": True}}
    settings = {s.path: (s.a, s.b) for s in beside(tmp_path, a, b).settings}
    assert settings["list"] == (
        "20 entries, 1 only here, 0 for one",
        "30 entries, 11 only here, 20 for one",
    )
    assert settings["text"][0].endswith("... (1001 characters)")
    assert settings["flag"] == ("1", "true")


def test_of_very_many_settings_a_hundred_are_kept(tmp_path: Path) -> None:
    a = {"tokenizer.json": {"vocab": {f"t{i}": i for i in range(250)}}}
    found = beside(tmp_path, a, {"tokenizer.json": {"vocab": {}}})
    assert (len(found.settings), found.hidden_settings) == (100, 150)
    text = cli.render(found)
    assert "and 90 more; --json names them all" in text
    assert "and 150 places more" in text


def test_the_same_json_in_other_bytes_counts_as_equal(tmp_path: Path) -> None:
    content = {"b": [1, 2], "a": None}
    other = json.dumps(dict(reversed(content.items())), indent=4)
    found = beside(tmp_path, {"config.json": content}, {"config.json": other})
    assert found.is_equal
    assert found.respelled == ("config.json",)


def test_side_files(tmp_path: Path) -> None:
    a = {"README.md": "one", "merges.txt": "same", "only.txt": "", "broken.json": "{"}
    b = {"README.md": "two", "merges.txt": "same", "hf_quant_config.json": {}, "broken.json": "["}
    found = beside(tmp_path, a, b)
    assert found.files == ("README.md", "broken.json")
    assert (found.files_only_in_a, found.files_only_in_b) == (
        ("only.txt",),
        ("hf_quant_config.json",),
    )
    assert "file differs README.md" in cli.render(found)


def test_a_moved_template_is_told_as_moved(tmp_path: Path) -> None:
    text = "{{ messages }}\n{{ tools }}\n"
    found = beside(
        tmp_path,
        {"tokenizer_config.json": {"chat_template": text, "eos": 1}},
        {"tokenizer_config.json": {"eos": 1}, "chat_template.jinja": text},
    )
    assert found.template is not None
    assert found.template.excerpt == ()
    assert (found.settings, found.files_only_in_b) == ((), ())
    assert not found.is_equal
    expected = "the same text, in tokenizer_config.json -> chat_template.jinja"
    assert expected in cli.render(found)


def test_a_changed_template_is_shown_as_a_diff(tmp_path: Path) -> None:
    lines = [f"line {i}" for i in range(60)]
    a = {"chat_template.jinja": "\n".join(lines)}
    b = {"chat_template.jinja": "\n".join([*lines[:30], "\x1b[31mnew", *lines[31:]])}
    found = beside(tmp_path, a, b)
    assert found.template is not None
    assert "-line 30" in found.template.excerpt
    assert "+\x1b[31mnew" in found.template.excerpt
    text = cli.render(found)
    assert "    +\\x1b[31mnew" in text
    assert "\x1b" not in text
    rewritten = beside(tmp_path / "2", a, {"chat_template.jinja": "\n" * 99})
    assert rewritten.template is not None
    assert len(rewritten.template.excerpt) == 40
    assert cli.render(rewritten).count("    ...") == 1


def test_named_templates_and_the_place_that_counts(tmp_path: Path) -> None:
    named = {"chat_template": [{"name": "default", "template": "a\nb"}]}
    a = {"tokenizer_config.json": named, "chat_template.jinja": "x"}
    b = {"chat_template.json": {"chat_template": "x"}, "tokenizer_config.json": "broken"}
    template = beside(tmp_path, a, b).template
    assert template is not None
    assert template.a == ("chat_template.jinja", "tokenizer_config.json")
    assert template.b == ("chat_template.json",)
    assert template.excerpt == ()


# ------------------------------------------------------------------------------------- the command


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(cli.command)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout


def test_exit_codes_and_json(tmp_path: Path) -> None:
    a, b = str(write(tmp_path / "a", PLAIN)), str(write(tmp_path / "b", {"z": PLAIN["z"]}))
    assert run(a, a)[0] == 0
    code, text = run(a, b, "--json")
    document = json.loads(text)
    assert code == 3
    assert next(iter(document.items())) == ("schema", "nybble.diff/1")
    assert (document["equal"], document["only_in_a"]) == (False, ["x.weight", "y.bias"])
    code, text = run(a, b)
    assert code == 3
    assert "only in A    x.weight" in text
    assert run(a, b, "--deep", "--output-format", "json")[0] == 3


def test_json_holds_every_kind_of_difference(tmp_path: Path) -> None:
    a = write(tmp_path / "a", nvfp4() | {"p": PLAIN["z"]}, {"config.json": {"x": 1}})
    b = write(tmp_path / "b", nvfp4(top=0.5) | {"p": PLAIN["z"] + 1}, {"config.json": {}})
    document = json.loads(json.dumps(diff(a, b).as_json()))
    assert document["modules"][0]["codes"] == {"different": 0, "compared": N * K, "size": N * K}
    assert document["values"][0]["elements"]["different"] == 3
    assert document["settings"] == [{"file": "config.json", "path": "x", "a": "1", "b": ""}]
    assert document["template"] is None


def test_names_that_differ_in_numbers_share_a_line(tmp_path: Path) -> None:
    a = {f"layers.{i}.{n}.bias": PLAIN["z"] for i in range(9) for n in "abcdefghijkl"}
    text = cli.render(two(tmp_path, PLAIN | a, PLAIN))
    assert "only in A    9 x layers.#.a.bias" in text
    assert "only in A    and 2 more" in text


def test_headers_without_data_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", PLAIN)
    b = write(tmp_path / "b", PLAIN)
    shard = b / "model-00001-of-00001.safetensors"
    length = int.from_bytes(shard.read_bytes()[:8], "little")
    os.truncate(shard, 8 + length)
    with pytest.raises(CheckpointError, match="the data are missing"):
        diff(a, b)


def test_a_file_that_shrinks_meanwhile_is_an_error(tmp_path: Path) -> None:
    big = {"w": random((1 << 21,), np.dtype(np.uint8))}
    a, b = write(tmp_path / "a", big), write(tmp_path / "b", big)

    class Truncating(Progress):
        def stage(self, title: str, total_bytes: int) -> None:
            os.truncate(b / "model-00001-of-00001.safetensors", 1 << 20)

    with pytest.raises(CheckpointError, match="changed since it was opened"):
        diff(a, b, progress=Truncating())
