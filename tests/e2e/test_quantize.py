"""Whole runs: a folder goes in, a folder comes out, and its raw bytes are what the definition says.

The files are read by the code of this test alone. Codes and block scales are compared with
`formats.search.quantize` of the same source; what engines decode is checked with tables written
here.
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
import nybble.api.quantize as api
import nybble.quantize.run as run_module
import nybble.quantize.tiles as tiles_module
import tiny
from nybble.api.quantize import Result
from nybble.checkpoint.disk import Disk
from nybble.errors import CheckFailed, CheckpointError, DoesNotFit, FormatError, RecipeError
from nybble.formats.block import FORMATS, FP8_BLOCK, FP8_CHANNEL, MXFP4, NVFP4
from nybble.formats.search import SEARCHES, Search, block_amax, tensor_scale
from nybble.formats.search import quantize as define
from nybble.kernels.dispatch import choose
from nybble.plan.recipe import parse_recipe

#: What measured scales change is tested in tests/unit/test_input_scales.py.
quantize = partial(api.quantize, data_free=True)

#: Recipes that run without data, in the layouts that carry them.
RUNS = [
    ("nvfp4", "modelopt"),
    ("nvfp4", "compressed-tensors"),
    ("nvfp4-all", "modelopt"),
    ("nvfp4-all", "compressed-tensors"),
    ("fp8", "compressed-tensors"),
    ("mxfp4", "compressed-tensors"),
]
BLOCKS = parse_recipe(
    "blocks",
    '[[rule]]\nroles = ["attention", "mlp", "routed_expert"]\nscheme = "fp8-block"\n'
    '[[rule]]\nroles = ["linear_attention"]\nscheme = "fp8-dynamic"\n'
    '[[rule]]\nroles = ["lm_head"]\nscheme = "nvfp4-w4a16"\n',
)
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("in_proj_qkv", "in_proj_z"))
Matrix = NDArray[np.float32]
Folder = dict[str, tuple[str, tuple[int, ...], bytes]]


def source_matrix(source: Folder, module: str) -> NDArray[Any]:
    """The matrix of a module, from its own tensor or out of a stack."""
    if module + ".weight" in source:
        return tiny.array(source[module + ".weight"])
    found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj", module)
    assert found, module
    part = found[3]
    stack = tiny.array(source[found[1] + (".down_proj" if part == "down" else ".gate_up_proj")])
    half = len(stack[0]) // 2
    rows = {"gate": slice(0, half), "up": slice(half, None), "down": slice(None)}[part]
    return stack[int(found[2])][rows]


def fused_with(module: str, present: set[str]) -> list[str]:
    """The modules that engines run with this one as one matmul, itself included."""
    parent, _, name = module.rpartition(".")
    group = next((g for g in FUSED if name in g), (name,))
    return [m for m in (f"{parent}.{n}" if parent else n for n in group) if m in present]


def decode_e2m1(packed: NDArray[np.uint8]) -> Matrix:
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    out = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.float32)
    out[..., 0::2], out[..., 1::2] = values[packed & 15], values[packed >> 4]
    return out


def quantized_modules(written: Folder) -> set[str]:
    return {n.removesuffix(".weight_scale") for n in written if n.endswith(".weight_scale")}


def check_module(source: Folder, written: Folder, module: str, search: Search, some: int) -> float:
    """Hold a module's bytes against the definition, the first and last `some` rows; its SQNR in
    dB."""
    x = source_matrix(source, module)
    found = {
        k.removeprefix(module + "."): v for k, v in written.items() if k.startswith(module + ".")
    }
    codes = tiny.array(found.get("weight_packed", found.get("weight")))  # type: ignore[arg-type]
    scale = tiny.array(found["weight_scale"])
    is_packed = codes.dtype == np.uint8
    rows = np.unique(np.r_[: min(some, len(x)), max(len(x) - some, 0) : len(x)])
    if is_packed and scale.dtype == np.uint8:
        expected = define(x[rows], MXFP4, search)
        decoded = decode_e2m1(codes) * np.repeat(np.exp2(scale.astype(np.float32) - 127), 32, 1)
        assert np.array_equal(scale[rows], expected.scale)
    elif is_packed:
        together = fused_with(module, quantized_modules(written))
        amax = max(np.abs(source_matrix(source, m).astype(np.float32)).max() for m in together)
        top = tensor_scale(np.float32(amax), NVFP4, search)
        if "weight_scale_2" in found:
            assert found["weight_scale_2"][:2] == ("F32", ())
            stored = tiny.array(found["weight_scale_2"])
            assert stored == top
        else:
            assert found["weight_global_scale"][:2] == ("F32", (1,))
            stored = 1 / tiny.array(found["weight_global_scale"])
            assert tiny.array(found["weight_global_scale"]) == np.float32(1) / top
        assert 0 < stored < np.inf
        expected = define(x[rows], NVFP4, search, scale=np.asarray(top))
        values = scale.astype(np.float32)
        assert np.isfinite(values).all()
        assert (values > 0).all()
        decoded = decode_e2m1(codes) * np.repeat(values * np.float32(stored), 16, 1)
        assert scale[rows].tobytes() == expected.scale.tobytes()
    else:
        fmt = FP8_CHANNEL if scale.shape == (len(x), 1) else FP8_BLOCK
        exact = tensor_scale(block_amax(x.astype(np.float32), fmt), fmt, search)
        assert scale.dtype == ml_dtypes.bfloat16
        assert np.array_equal(scale, exact.astype(ml_dtypes.bfloat16))
        expected = define(x, fmt, search, scale=scale.astype(np.float32))
        size = 1 if fmt is FP8_CHANNEL else 128
        wide = np.repeat(
            np.repeat(scale.astype(np.float32), size, 0), fmt.block[1] or x.shape[1], 1
        )
        decoded = codes.astype(np.float32) * wide[: len(x), : x.shape[1]]
        rows = np.arange(len(x))
    assert codes[rows].tobytes() == expected.codes.tobytes()
    if search == "absmax" and "weight_global_scale" in found:  # 1 / (1 / scale) may be one ulp off
        assert np.allclose(decoded[rows], expected.dequantize(), rtol=2**-22, atol=0)
    else:
        assert np.array_equal(decoded[rows], expected.dequantize())
    exact = x.astype(np.float64)
    return float(10 * np.log10((exact**2).sum() / ((exact - decoded) ** 2).sum()))


def check_result(
    path: Path, result: Result, search: Search, *, some: int = 8, every: int = 1
) -> set[str]:
    """Everything that can be said of an output folder; the quantized modules."""
    source, written = tiny.read(path), tiny.read(result.out)
    assert {n: v[:2] for n, v in written.items()} == {
        o.name: (o.dtype, o.shape) for o in result.plan.outputs
    }
    assert sum(len(v[2]) for v in written.values()) == result.plan.payload_bytes
    assert result.audit is not None
    assert result.audit.payload_bytes == result.plan.payload_bytes
    assert result.audit.problems == []
    modules = quantized_modules(written)
    copied = {n for n in written if n.rpartition(".")[0] not in modules or n.endswith(".bias")}
    assert all(written[n] == source[n] for n in copied)
    assert len(copied) == result.audit.copied
    assert sum(e.modules for e in result.audit.errors) == len(modules)
    is_mx = any(e.scheme.startswith("mx") for e in result.audit.errors)
    worst: dict[str, float] = {}
    for module in sorted(modules)[::every]:
        worst[module] = check_module(source, written, module, search, some)
        assert worst[module] > (16 if is_mx else 18), module
    if every == 1:
        for role in result.audit.errors:
            assert worst[role.worst_module] == pytest.approx(role.worst_db, abs=1e-3)
    check_files(path, result)
    return modules


def check_files(path: Path, result: Result) -> None:
    """Side files go over unchanged, config.json keeps its other keys, the index is right."""
    before, after = tiny.tree(path), tiny.tree(result.out)
    ours = {"config.json", "model.safetensors.index.json"}
    if result.plan.layout.name == "modelopt":
        ours.add("hf_quant_config.json")
    side = {n for n in before if not n.endswith((".safetensors", ".index.json"))} - ours
    assert side
    assert {n: after[n] for n in side} == {n: before[n] for n in side}
    shards = {n for n in after if n.endswith(".safetensors")}
    assert after.keys() == side | shards | ours
    config, written = json.loads(before["config.json"]), json.loads(after["config.json"])
    section = written.pop("quantization_config")
    assert section["quant_method"] == result.plan.layout.name
    assert written == config
    index = json.loads(after["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) == shards
    assert index["metadata"]["total_size"] == result.plan.payload_bytes
    assert index["metadata"]["total_parameters"] == result.plan.stored_parameters
    of = f"-of-{len(shards):05d}.safetensors"
    assert shards == {f"model-{i:05d}{of}" for i in range(1, len(shards) + 1)}
    assert not result.out.with_name(result.out.name + ".partial").exists()


# ------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize(("recipe", "layout"), RUNS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_in_every_recipe_and_layout(
    tmp_path: Path, family: str, recipe: str, layout: str
) -> None:
    path = tiny.checkpoint(
        tmp_path / "m", family, shards=2, **({"vision": True} if family in tiny.HYBRIDS else {})
    )
    result = quantize(path, tmp_path / "out", recipe, layout=layout)
    modules = check_result(path, result, "mse", some=2, every=3)
    assert not any(m.startswith(("mtp.", "model.visual.")) for m in modules)
    assert ("lm_head" in modules) == (recipe in ("nvfp4", "nvfp4-all"))


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(
    ("recipe", "layout"), [r for r in RUNS if r[0] != "mxfp4"] + [("mxfp4", "compressed-tensors")]
)
def test_every_search_gives_the_bytes_of_the_definition(
    tmp_path: Path, recipe: str, layout: str, search: Search
) -> None:
    if recipe == "mxfp4" and search == "four-six":
        path = tiny.checkpoint(tmp_path / "m", "qwen3")
        with pytest.raises(FormatError, match="use absmax or mse"):
            quantize(path, tmp_path / "out", recipe, layout=layout, search=search)
        assert [p.name for p in tmp_path.iterdir()] == ["m"]
        return
    path = tiny.checkpoint(tmp_path / "m", "qwen3_5_moe")
    result = quantize(path, tmp_path / "out", recipe, layout=layout, search=search)
    check_result(path, result, search, some=3)


@pytest.mark.parametrize("dtype", ["F16", "F32", "BF16"])
@pytest.mark.parametrize("search", SEARCHES)
def test_every_source_dtype(tmp_path: Path, dtype: str, search: Search) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen2", dtype=dtype)
    result = quantize(path, tmp_path / "out", "nvfp4-all", search=search)
    check_result(path, result, search, some=5)


@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_fp8_in_blocks_with_ragged_edges(tmp_path: Path, search: Search) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3_5_moe", shared_expert_intermediate_size=160)
    result = quantize(path, tmp_path / "out", BLOCKS, layout="compressed-tensors", search=search)
    check_result(path, result, search)


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_the_trained_chat_model(tmp_path: Path, layout: str) -> None:
    path = tiny.MODELS / "hybrid-chat-mtp"
    result = quantize(path, tmp_path / "out", "nvfp4-all", layout=layout)
    modules = check_result(path, result, "mse", some=1, every=4)
    assert len(modules) == 8 * 27 + 6 * 3 + 2 * 4 + 1
    source, written = tiny.read(path), tiny.read(tmp_path / "out")
    side = [n for n in source if n.startswith(("mtp.", "model.visual."))]
    assert len(side) == 19 + 33
    assert all(written[n] == source[n] for n in side)


def test_the_trained_story_model_keeps_its_tied_head(tmp_path: Path) -> None:
    path = tiny.MODELS / "stories-hybrid-moe"
    result = quantize(path, tmp_path / "out", "nvfp4")
    modules = check_result(path, result, "mse", some=2, every=5)
    assert "lm_head" not in modules
    assert any("tied" in note for note in result.plan.notes)


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_fused_members_share_one_tensor_scale_and_others_do_not(
    tmp_path: Path, layout: str
) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3_5_moe")
    result = quantize(path, tmp_path / "out", "nvfp4-all", layout=layout)
    written = tiny.read(result.out)
    leaf = "weight_scale_2" if layout == "modelopt" else "weight_global_scale"
    scales = {n.removesuffix("." + leaf): v[2] for n, v in written.items() if n.endswith(leaf)}
    groups = {tuple(fused_with(m, set(scales))) for m in scales}
    assert {len(g) for g in groups} == {1, 2, 3}
    assert all(len({scales[m] for m in group}) == 1 for group in groups)
    assert len(set(scales.values())) > 3
    mantissas = {np.frexp(np.frombuffer(s, np.float32))[0].item() for s in scales.values()}
    assert mantissas == {0.5}  # powers of two


def test_a_better_search_never_has_more_error(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3_5_moe")
    found: dict[str, dict[str, float]] = {}
    for search in SEARCHES:
        result = quantize(path, tmp_path / search, "nvfp4-all", search=search)
        assert result.audit is not None
        found[search] = {e.role: e.sqnr_db for e in result.audit.errors}
    assert all(found["mse"][role] >= found["four-six"][role] for role in found["mse"])
    assert all(found["mse"][role] >= found["absmax"][role] + 1 for role in found["mse"])


# ------------------------------------------------------------------- what must not change a byte


def test_neither_threads_nor_tiles_nor_kernels_change_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.checkpoint(
        tmp_path / "m",
        "qwen3_5",
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )
    quantize(path, tmp_path / "one", "nvfp4-all", jobs=1)
    expected = tiny.tree(tmp_path / "one")
    for jobs in (2, 3):
        quantize(path, tmp_path / str(jobs), "nvfp4-all", jobs=jobs)
        assert tiny.tree(tmp_path / str(jobs)) == expected
    with monkeypatch.context() as changed:
        for module in (run_module, tiles_module):
            changed.setattr(module, "TILE_BYTES", 4096)
        changed.setattr(run_module, "COMMIT_BYTES", 1)
        quantize(path, tmp_path / "tiles", "nvfp4-all", jobs=2)
        assert tiny.tree(tmp_path / "tiles") == expected
    assert choose().backend == "cpu", "no compiled kernels to compare with"
    monkeypatch.setenv("NYBBLE_KERNELS", "reference")
    result = quantize(path, tmp_path / "reference", "nvfp4-all")
    assert result.kernels == "reference"
    assert tiny.tree(tmp_path / "reference") == expected


@pytest.mark.parametrize("recipe", ["fp8", "mxfp4", BLOCKS])
def test_tiles_and_kernels_do_not_change_other_formats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Any
) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3_5_moe", intermediate_size=320)
    options: dict[str, Any] = {"layout": "compressed-tensors", "search": "absmax"}
    quantize(path, tmp_path / "one", recipe, **options)
    for module in (run_module, tiles_module):
        monkeypatch.setattr(module, "TILE_BYTES", 4096)
    quantize(path, tmp_path / "tiles", recipe, **options)
    monkeypatch.setenv("NYBBLE_KERNELS", "reference")
    quantize(path, tmp_path / "reference", recipe, **options)
    assert tiny.tree(tmp_path / "tiles") == tiny.tree(tmp_path / "one")
    assert tiny.tree(tmp_path / "reference") == tiny.tree(tmp_path / "one")


def test_small_shards_hold_the_same_tensors(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3_5_moe", vision=True)
    whole = quantize(path, tmp_path / "whole")
    parts = quantize(path, tmp_path / "parts", shard_size=50_000)
    check_files(path, parts)
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 8
    largest = max(o.nbytes for o in parts.plan.outputs)
    for file in files:
        size = file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
        assert size <= max(50_000, largest)
    assert tiny.read(tmp_path / "parts") == tiny.read(tmp_path / "whole")
    assert whole.plan.payload_bytes == parts.plan.payload_bytes


@pytest.mark.parametrize(
    ("family", "recipe", "layout"),
    [
        ("qwen3_5_moe", "nvfp4", "modelopt"),
        ("qwen3_5_moe", "fp8", "compressed-tensors"),
        ("qwen3_moe", "mxfp4", "compressed-tensors"),
    ],
)
def test_stacked_and_split_experts_become_the_same(
    tmp_path: Path, family: str, recipe: str, layout: str
) -> None:
    for name, stacked in (("a", True), ("b", False)):
        path = tiny.checkpoint(tmp_path / name, family, stacked=stacked)
        quantize(path, tmp_path / f"{name}.out", recipe, layout=layout)
    a, b = tmp_path / "a.out", tmp_path / "b.out"
    assert tiny.read(a) == tiny.read(b)
    assert (a / "config.json").read_bytes() == (b / "config.json").read_bytes()


def test_text_only_prefixes_and_old_releases(tmp_path: Path) -> None:
    path = tiny.checkpoint(
        tmp_path / "m", "qwen3_5_moe", prefix="model.", mtp_stacked=False, f32_gdn=True
    )
    result = quantize(path, tmp_path / "out", "nvfp4-all")
    check_result(path, result, "mse", some=1, every=6)
    written = tiny.read(result.out)
    assert written["model.layers.0.linear_attn.A_log"][0] == "F32"
    assert "mtp.layers.0.mlp.experts.2.down_proj.weight" in written


def test_data_at_odd_offsets_are_read_right(tmp_path: Path) -> None:
    """Old writers did not align: a header of odd length puts every F32 value across words."""
    cfg = tiny.config("qwen3", dtype="F32")
    values = tiny.tensors(cfg)
    path = tiny.write(tmp_path / "m", cfg, values)
    quantize(path, tmp_path / "aligned", "nvfp4-all")
    data = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip() + b" " * 3
    while (len(text) + 8) % 4 == 0 or len(text) % 2 == 0:
        text += b" "
    (path / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + data[8 + length :]
    )
    quantize(path, tmp_path / "odd", "nvfp4-all")
    assert tiny.tree(tmp_path / "odd") == tiny.tree(tmp_path / "aligned")


def test_an_unknown_model_is_quantized_by_names_and_shapes(tmp_path: Path) -> None:
    cfg = tiny.config("llama", attention_bias=True, mlp_bias=True)
    cfg["model_type"] = "neverseen"
    values = tiny.tensors(tiny.config("llama", attention_bias=True, mlp_bias=True))
    path = tiny.write(tmp_path / "m", cfg, values)
    result = quantize(path, tmp_path / "out", "nvfp4-all", generic=True)
    modules = check_result(path, result, "mse", some=1, every=2)
    assert len(modules) == 2 * 7


# -------------------------------------------------------------------------------- awkward values


def test_dead_and_tiny_weights_are_written_with_sound_scales(tmp_path: Path) -> None:
    cfg = tiny.config("qwen3")
    values = tiny.tensors(cfg)
    values["model.layers.0.mlp.down_proj.weight"][:] = 0  # a dead tensor
    values["model.layers.0.mlp.gate_proj.weight"][:] = 0  # of a group that lives
    values["model.layers.1.mlp.up_proj.weight"][3:5, 16:48] = 0  # zero blocks
    values["model.layers.1.mlp.down_proj.weight"][0] = -0.0
    values["model.layers.1.mlp.down_proj.weight"][1] = 1e-30
    values["model.layers.1.self_attn.o_proj.weight"][2] = 2.0**-130  # a BF16 subnormal row
    path = tiny.write(tmp_path / "m", cfg, values)
    for search in SEARCHES:
        for recipe, layout in RUNS:
            if (recipe, search) == ("mxfp4", "four-six"):
                continue
            out = tmp_path / f"{search}-{recipe}-{layout}"
            result = quantize(path, out, recipe, layout=layout, search=search)
            assert result.audit is not None
            written = tiny.read(out)
            for module in quantized_modules(written):
                for leaf in ("weight_scale", "weight_scale_2", "weight_global_scale"):
                    entry = written.get(f"{module}.{leaf}")
                    if entry and entry[0] != "U8":
                        scale = tiny.array(entry).astype(np.float32)
                        assert np.isfinite(scale).all()
                        assert (scale > 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "index", "recipe", "layout"),
    [
        ("layers.1.mlp.experts.gate_up_proj", (2, 100, 7), "nvfp4", "modelopt"),
        ("layers.0.mlp.experts.down_proj", (1, 95, 63), "mxfp4", "compressed-tensors"),
        ("layers.2.linear_attn.in_proj_z.weight", (191, 95), "fp8", "compressed-tensors"),
        ("layers.1.self_attn.v_proj.weight", (31, 0), BLOCKS, "compressed-tensors"),
        ("layers.0.mlp.shared_expert.up_proj.weight", (0, 0), "nvfp4", "compressed-tensors"),
    ],
)
def test_a_value_that_is_not_finite_is_refused_by_tensor_and_index(
    tmp_path: Path, value: float, name: str, index: tuple[int, ...], recipe: Any, layout: str
) -> None:
    cfg = tiny.config("qwen3_5_moe")
    values = tiny.tensors(cfg)
    full = f"model.language_model.{name}"
    values[full][index] = value
    path = tiny.write(tmp_path / "m", cfg, values)
    with pytest.raises(FormatError) as found:
        quantize(path, tmp_path / "out", recipe, layout=layout)
    said = str(found.value)
    assert f"tensor {full}: value {value} at index {list(index)}" in said
    assert "Mend the source" in said
    assert not (tmp_path / "out").exists()
    left = {p.name for p in (tmp_path / "out.partial").iterdir()}
    assert "model.safetensors.index.json" not in left
    assert "config.json" not in left


def test_a_value_that_is_not_finite_is_copied_where_nothing_is_quantized(tmp_path: Path) -> None:
    cfg = tiny.config("qwen3")
    values = tiny.tensors(cfg)
    values["model.layers.0.self_attn.q_proj.weight"][1, 2] = np.nan
    path = tiny.write(tmp_path / "m", cfg, values)
    quantize(path, tmp_path / "out", "nvfp4")  # attention stays without data
    name = "model.layers.0.self_attn.q_proj.weight"
    assert tiny.read(tmp_path / "out")[name] == tiny.read(path)[name]


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_an_output_that_exists_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3")
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "precious").write_text("x")
    elif kind == "file":
        out.write_text("x")
    else:
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to(tmp_path / "elsewhere")
    before = tiny.tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"out: exists"):
        quantize(path, out)
    assert tiny.tree(tmp_path) == before
    assert not (tmp_path / "out.partial").exists()


def test_an_output_inside_the_source_is_refused(tmp_path: Path) -> None:
    """The source's side files go along: the output would carry itself."""
    path = tiny.checkpoint(tmp_path / "m", "qwen3")
    before = tiny.tree(path)
    with pytest.raises(CheckpointError, match="inside the source folder"):
        quantize(path, path / "nvfp4")
    with pytest.raises(CheckpointError):
        quantize(path, path)
    assert tiny.tree(path) == before


def test_a_folder_left_by_another_run_needs_resume(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3")
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(CheckpointError, match="--resume"):
        quantize(path, tmp_path / "out")


def test_headers_without_data_are_refused_by_name(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    with pytest.raises(CheckpointError, match="the data are missing; only plan"):
        quantize(path, tmp_path / "out")
    assert quantize(path, tmp_path / "out", dry_run=True).plan.jobs
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["nvfp4-w4a4", "nvfp4-redhat", "nvfp4-experts-fp8"])
def test_recipes_that_need_data_write_nothing(tmp_path: Path, recipe: str) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3_5_moe")
    with pytest.raises(RecipeError, match="measured input_scale"):
        quantize(path, tmp_path / "out", recipe, layout="compressed-tensors")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_plan_with_measured_scales_is_not_executed(tmp_path: Path) -> None:
    """The last line of defence, below the recipe's own refusal."""
    from nybble.api.plan import plan
    from nybble.progress import Progress

    found = plan(tiny.checkpoint(tmp_path / "m", "qwen3_5_moe"), "nvfp4-w4a4")
    with pytest.raises(RecipeError, match=r"experts\.0\.gate_proj: nvfp4-w4a4 needs a measured"):
        run_module.execute(
            found, tmp_path / "out", run_module.Options(), version="1", progress=Progress()
        )
    assert not (tmp_path / "out.partial").exists()


def test_an_unknown_search_lists_the_searches(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3")
    with pytest.raises(FormatError, match="'best': choose one of absmax, four-six, mse"):
        quantize(path, tmp_path / "out", search="best")  # type: ignore[arg-type]
    assert not (tmp_path / "out.partial").exists()


class FullDisk(Disk):
    def free_bytes(self, path: Path) -> int:
        return 1000


def test_a_disk_that_is_too_small_is_found_out_before_anything_is_written(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3")
    with pytest.raises(DoesNotFit, match=r"[KMG]iB to write, .* free"):
        quantize(path, tmp_path / "out", disk=FullDisk())
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_what_is_written_wrongly_fails_the_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.checkpoint(tmp_path / "m", "qwen3")
    true_audit = api.audit

    def spoil(plan: Any, out: Path, **options: Any) -> Any:
        file = next(out.glob("*.safetensors"))
        data = bytearray(file.read_bytes())
        data[-1] ^= 0x80  # of the last tensor; the widest dtypes come first
        file.write_bytes(data)
        name = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert list(name)[-1].endswith(".weight")
        return true_audit(plan, out, **options)

    monkeypatch.setattr(api, "audit", spoil)
    quantize(path, tmp_path / "out", "nvfp4-all")  # a code of a weight: an error, no broken rule

    def spoil_copy(plan: Any, out: Path, **options: Any) -> Any:
        file = next(out.glob("*.safetensors"))
        data = file.read_bytes()
        needle = tiny.read(path)["model.norm.weight"][2]
        file.write_bytes(data.replace(needle, needle[:-1] + bytes([needle[-1] ^ 1])))
        return true_audit(plan, out, **options)

    monkeypatch.setattr(api, "audit", spoil_copy)
    with pytest.raises(CheckFailed, match=r"model\.norm\.weight differs from its source"):
        quantize(path, tmp_path / "other", "nvfp4-all")


def test_formats_are_all_covered_here() -> None:
    """FP8 per tensor needs measured scales (tests/unit/test_input_scales.py); every other format
    ran above."""
    assert set(FORMATS) == {"nvfp4", "mxfp4", "fp8", "fp8_channel", "fp8_block"}
