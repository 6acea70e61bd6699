"""nybble's bytes against ModelOpt's and compressed-tensors', and the list of where those differ.

The files, and the numbered list that the second half follows, are in tests/golden/README.md.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from nybble.formats.block import FP8, FP8_BLOCK, FP8_CHANNEL, MXFP4, NVFP4, BlockFormat
from nybble.formats.element import E2M1, E4M3, E8M0, decode, encode, unpack_nibbles
from nybble.formats.search import quantize, tensor_scale
from nybble.formats.tensor import BlockScaledTensor

GOLDEN = Path(__file__).parents[1] / "golden"
MO, CT, CT32 = "modelopt", "compressed_tensors", "compressed_tensors_f32"
DTYPES = {"BF16": ml_dtypes.bfloat16, "F32": "<f4", "U8": "u1", "F8_E4M3": ml_dtypes.float8_e4m3fn}
FP8_FORMATS = {"fp8_tensor": FP8, "fp8_channel": FP8_CHANNEL, "fp8_block": FP8_BLOCK}
#: compressed-tensors decompresses to BF16 in BF16 arithmetic: two roundings of 2^-9.
BF16_RTOL = 2 * 2.0**-8


@cache
def golden(file: str) -> dict[str, NDArray]:
    raw = (GOLDEN / f"{file}.safetensors").read_bytes()  # safetensors.numpy has no float8
    start = 8 + int.from_bytes(raw[:8], "little")
    found = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            first, last = (start + at for at in entry["data_offsets"])
            array = np.frombuffer(raw[first:last], DTYPES[entry["dtype"]])
            found[name] = array.reshape(entry["shape"])
    return found


def cases(file: str) -> list[str]:
    return sorted(n.removesuffix(".source") for n in golden(file) if n.endswith(".source"))


def leaf(file: str, case: str, tool: str, name: str) -> NDArray:
    return golden(file)[f"{case}.{tool}.{name}"]


def source(file: str, case: str) -> NDArray:
    return golden(file)[f"{case}.source"]


def group_scale(case: str) -> NDArray[np.float32]:
    """The tensor scale over every member of the case's fused group."""
    group = case.split("__")[0]
    members = [c for c in cases("nvfp4_absmax") if c.split("__")[0] == group]
    amax = max(np.abs(source("nvfp4_absmax", c).astype(np.float32)).max() for c in members)
    return tensor_scale(np.float32(amax), NVFP4, "absmax")


@cache
def ours(file: str, case: str) -> BlockScaledTensor:
    if file == "nvfp4_absmax":
        return quantize(source(file, case), NVFP4, "absmax", scale=group_scale(case))
    fmt = MXFP4 if file == "mxfp4_absmax" else FP8_FORMATS[file]
    return quantize(source(file, case), fmt, "absmax")


def nvfp4(case: str, tool: str) -> tuple[NDArray, NDArray, float]:
    """Codes (one per byte), scale bytes and multiplying tensor scale that a tool wrote."""
    if tool == MO:
        codes, top = leaf("nvfp4_absmax", case, MO, "weight"), "weight_scale_2"
    else:
        codes, top = leaf("nvfp4_absmax", case, tool, "weight_packed"), "weight_global_scale"
    scale = leaf("nvfp4_absmax", case, tool, "weight_scale").view(np.uint8)
    number = float(leaf("nvfp4_absmax", case, tool, top).reshape(()))
    return unpack_nibbles(codes), scale, number if tool == MO else 1 / number


def mxfp4(case: str, tool: str) -> tuple[NDArray, NDArray]:
    name = "weight" if tool == MO else "weight_packed"
    codes = unpack_nibbles(leaf("mxfp4_absmax", case, tool, name))
    return codes, leaf("mxfp4_absmax", case, tool, "weight_scale")


def by_block(case: str, width: int, file: str) -> NDArray[np.float32]:
    x = source(file, case).astype(np.float32)
    return x.reshape(x.shape[0], -1, width)


# ------------------------------------------------------------------------ equal to ModelOpt


@pytest.mark.parametrize("case", [c for c in cases("nvfp4_absmax") if c != "dead"])
def test_nvfp4_absmax_writes_modelopts_bytes(case: str) -> None:
    found = ours("nvfp4_absmax", case)
    np.testing.assert_array_equal(found.codes, leaf("nvfp4_absmax", case, MO, "weight"))
    wanted = leaf("nvfp4_absmax", case, MO, "weight_scale").view(np.uint8)
    np.testing.assert_array_equal(found.scale, wanted)
    assert found.tensor_scale == leaf("nvfp4_absmax", case, MO, "weight_scale_2")


def test_every_kind_of_case_is_there() -> None:
    assert len(cases("nvfp4_absmax")) == 18
    assert {"dead", "subnormal_tensor", "scale_ties", "qkv__q"} <= set(cases("nvfp4_absmax"))


def test_members_of_a_fused_group_need_their_common_scale() -> None:
    k = source("nvfp4_absmax", "qkv__k")
    q = quantize(source("nvfp4_absmax", "qkv__q"), NVFP4, "absmax")
    assert q.tensor_scale != leaf("nvfp4_absmax", "qkv__q", MO, "weight_scale_2")
    assert quantize(k, NVFP4, "absmax").tensor_scale == group_scale("qkv__q")  # k is the largest


def test_nvfp4_dead_tensor_is_the_one_difference_from_modelopt() -> None:
    codes, scale, top = nvfp4("dead", MO)
    assert top == 0
    assert (scale == 0xFF).all()  # NaN
    assert (codes == 7).all()
    assert np.isnan(leaf("nvfp4_absmax", "dead", MO, "dequantized")).all()
    found = ours("nvfp4_absmax", "dead")
    assert found.tensor_scale == 1
    assert (found.scale == 0x38).all()  # 1.0
    assert (found.codes == 0).all()
    assert (found.dequantize() == 0).all()


@pytest.mark.parametrize(
    ("file", "case"),
    [(f, c) for f in FP8_FORMATS for c in cases(f) if (f, c) != ("fp8_tensor", "dead")],
)
def test_fp8_absmax_writes_modelopts_bytes(file: str, case: str) -> None:
    found = ours(file, case)
    np.testing.assert_array_equal(found.codes, leaf(file, case, MO, "weight").view(np.uint8))
    wanted = leaf(file, case, MO, "weight_scale").reshape(found.scale.shape)
    np.testing.assert_array_equal(found.scale, wanted)


def test_fp8_dead_tensor_differs_from_modelopt() -> None:
    assert leaf("fp8_tensor", "dead", MO, "weight_scale") == 0
    assert np.isnan(leaf("fp8_tensor", "dead", MO, "dequantized")).all()
    found = ours("fp8_tensor", "dead")
    assert found.scale.tolist() == [[1.0]]
    assert (found.dequantize() == 0).all()


def test_a_whole_modelopt_export_is_reproduced() -> None:
    names = sorted(n for n in golden("modelopt_export") if n.endswith(".weight"))
    written = golden("modelopt_export")
    assert len(names) == 7
    for group in (
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    ):
        members = [n for n in names if n.split(".")[-2] in group]
        amax = max(np.abs(written[f"{n}.source"].astype(np.float32)).max() for n in members)
        shared = tensor_scale(np.float32(amax), NVFP4, "absmax")
        for name in members:
            found = quantize(written[f"{name}.source"], NVFP4, "absmax", scale=shared)
            np.testing.assert_array_equal(found.codes, written[name])
            np.testing.assert_array_equal(found.scale, written[f"{name}_scale"].view(np.uint8))
            assert found.tensor_scale == written[f"{name}_scale_2"]


# ------------------------------------------------------------------- equal dequantisation


def stored(file: str, case: str, tool: str) -> BlockScaledTensor:
    """What a tool wrote, as nybble's own type: divisors turned, shapes made plain."""
    shape = source(file, case).shape
    if file == "nvfp4_absmax":
        name = "weight" if tool == MO else "weight_packed"
        top = leaf(file, case, tool, "weight_scale_2" if tool == MO else "weight_global_scale")
        top = top.reshape(())
        scale = leaf(file, case, tool, "weight_scale").view(np.uint8)
        factor = top if tool == MO else np.float32(1) / top
        return BlockScaledTensor(NVFP4, shape, leaf(file, case, tool, name), scale, factor)
    if file == "mxfp4_absmax":
        name = "weight" if tool == MO else "weight_packed"
        scale = leaf(file, case, tool, "weight_scale")
        return BlockScaledTensor(MXFP4, shape, leaf(file, case, tool, name), scale, None)
    fmt: BlockFormat = FP8_FORMATS[file]
    scale = leaf(file, case, tool, "weight_scale").astype(np.float32)
    codes = leaf(file, case, tool, "weight").view(np.uint8)
    return BlockScaledTensor(fmt, shape, codes, scale.reshape(fmt.scale_shape(shape)), None)


FILES = ["nvfp4_absmax", "mxfp4_absmax", *FP8_FORMATS]


@pytest.mark.parametrize(("file", "case"), [(f, c) for f in FILES for c in cases(f)])
def test_decodes_modelopts_bytes_to_modelopts_values(file: str, case: str) -> None:
    found = stored(file, case, MO).dequantize()
    np.testing.assert_array_equal(found, leaf(file, case, MO, "dequantized"))


@pytest.mark.parametrize(("file", "case"), [(f, c) for f in FILES for c in cases(f)])
def test_decodes_compressed_tensors_bytes_to_its_values(file: str, case: str) -> None:
    found = stored(file, case, CT).dequantize()
    wanted = leaf(file, case, CT, "dequantized").astype(np.float32)
    # A BF16 decompression of the very smallest values has a grid of its own.
    np.testing.assert_allclose(found, wanted, rtol=BF16_RTOL, atol=2.0**-133)


# ------------------------- MXFP4 follows compressed-tensors, the container that engines read


def test_mxfp4_absmax_writes_compressed_tensors_scales_and_values() -> None:
    for case in cases("mxfp4_absmax"):
        found = ours("mxfp4_absmax", case)
        codes, scale = mxfp4(case, CT32)
        amax = np.abs(by_block(case, 32, "mxfp4_absmax")).max(axis=2)
        below = amax < 1.75 * 2.0**127  # from there on, difference 13
        # Exponent field 0 is the subnormal 2^-127. Both tools write it for zeros and for tiny
        # weights, nybble never does: scale 1 (127) for zeros, 2^-126 for the smallest.
        wanted = np.where(amax > 0, np.maximum(scale, 1), 127)
        np.testing.assert_array_equal(found.scale[below], wanted[below], case)
        plain = below & (scale > 0)
        mine = decode(unpack_nibbles(found.codes), E2M1).reshape(*amax.shape, 32)
        theirs = decode(codes, E2M1).reshape(*amax.shape, 32)
        np.testing.assert_array_equal(mine[plain], theirs[plain], case)
        assert np.isfinite(found.dequantize()).all()


def test_mxfp4_codes_differ_from_compressed_tensors_only_in_the_sign_of_zero() -> None:
    for case in set(cases("mxfp4_absmax")) - {"huge", "near_underflow"}:
        mine, theirs = unpack_nibbles(ours("mxfp4_absmax", case).codes), mxfp4(case, CT32)[0]
        differ = mine != theirs
        assert (mine[differ] & 7 == 0).all(), case
        assert (theirs[differ] & 7 == 0).all(), case


def test_mxfp4_keeps_the_huge_block_that_compressed_tensors_zeroes() -> None:
    x = source("mxfp4_absmax", "huge").astype(np.float64)
    mine = ours("mxfp4_absmax", "huge").dequantize()
    theirs = stored("mxfp4_absmax", "huge", CT).dequantize()
    assert ((x - mine) ** 2).sum() < 0.1 * ((x - theirs) ** 2).sum()


# ----------------------- where compressed-tensors differs from ModelOpt: one test per item


def assert_equal_but_for(
    case: str, differ: NDArray[np.bool_], tool: str = CT32
) -> tuple[NDArray, NDArray]:
    """NVFP4 scales of ModelOpt and of a tool at blocks that differ; elsewhere they are equal."""
    mo, ct = nvfp4(case, MO)[1], nvfp4(case, tool)[1]
    np.testing.assert_array_equal(mo[~differ], ct[~differ])
    return mo[differ], ct[differ]


@pytest.mark.parametrize("case", ["zero_blocks", "sparse", "negative_zeros"])
@pytest.mark.parametrize("tool", [CT, CT32])
def test_difference_1_scale_of_an_all_zero_block(case: str, tool: str) -> None:
    dead = (by_block(case, 16, "nvfp4_absmax") == 0).all(axis=2)
    assert dead.any()
    assert (nvfp4(case, MO)[1][dead] == 0x38).all()  # 1.0
    assert (nvfp4(case, tool)[1][dead] == 0x20).all()  # 0.125
    for any_tool in (MO, tool):
        codes = nvfp4(case, any_tool)[0].reshape(*dead.shape, 16)
        assert (codes[dead] == 0).all()
    assert (ours("nvfp4_absmax", case).scale[dead] == 0x38).all()


@pytest.mark.parametrize("case", ["subnormal_scales", "outlier"])
def test_difference_2_block_scale_below_the_smallest_subnormal(case: str) -> None:
    blocks = by_block(case, 16, "nvfp4_absmax")
    unrounded = np.abs(blocks).max(axis=2) / 6 / nvfp4(case, MO)[2]
    below = unrounded <= 2.0**-10  # rounds to zero: a tie goes to the even code, 0
    mo, ct = assert_equal_but_for(case, below)
    assert len(mo) > 0
    assert (mo == 0x01).all()  # clamped to 2^-9
    assert (ct == 0x20).all()  # replaced by 0.125
    theirs = nvfp4(case, CT32)[0].reshape(blocks.shape)[below]
    assert (theirs & 7 == 0).all()  # which zeroes the block
    kept = nvfp4(case, MO)[0].reshape(blocks.shape)[below & (unrounded > 2.0**-11)]
    if case == "subnormal_scales":
        assert (kept & 7 > 0).any()
    between = (unrounded > 2.0**-10) & (unrounded < 2.0**-9)
    assert (nvfp4(case, CT32)[1][between] == 0x01).all()


@pytest.mark.parametrize("tool", [CT, CT32])
def test_difference_3_dead_tensor(tool: str) -> None:
    codes, scale, top = nvfp4("dead", tool)
    assert top == 1.0
    assert (scale == 0x20).all()
    assert (codes == 0).all()
    assert np.isnan(leaf("nvfp4_absmax", "dead", MO, "dequantized")).all()


def test_difference_4_tensor_amax_whose_reciprocal_overflows() -> None:
    codes, _, top = nvfp4("subnormal_tensor", CT32)
    assert top == 1.0
    assert (codes & 7 == 0).all()
    codes, _, top = nvfp4("subnormal_tensor", MO)
    assert 0 < top < np.finfo(np.float32).tiny
    assert (codes & 7 > 0).any()


def differing_codes(case: str) -> int:
    mo, ct = nvfp4(case, MO), nvfp4(case, CT32)
    np.testing.assert_array_equal(mo[1], ct[1])
    return int((mo[0] != ct[0]).sum())


def test_difference_5_order_of_operations() -> None:
    assert sum(differing_codes(f"qkv__{m}") for m in "qkv") == 4
    assert differing_codes("huge") == 1
    for case in ("gaussian", "student_t", "ties", "scale_ties", "tiny"):
        assert differing_codes(case) == 0, case


def test_difference_6_the_tensor_scale_is_a_divisor() -> None:
    exact = 0
    for case in set(cases("nvfp4_absmax")) - {"dead", "subnormal_tensor"}:
        ct = leaf("nvfp4_absmax", case, CT32, "weight_global_scale")
        mo = leaf("nvfp4_absmax", case, MO, "weight_scale_2")
        assert (ct.shape, mo.shape) == ((1,), ())
        assert float(ct[0]) * float(mo) == pytest.approx(1, abs=2.0**-23)
        exact += np.float32(1) / ct[0] == mo
    assert exact < len(cases("nvfp4_absmax")) - 2  # reciprocals to 1e-7, not exactly


def test_difference_7_bf16_observation_rounds_the_global_scale() -> None:
    for case in cases("nvfp4_absmax"):
        g = leaf("nvfp4_absmax", case, CT, "weight_global_scale")
        np.testing.assert_array_equal(g.astype(ml_dtypes.bfloat16).astype(np.float32), g)
    mo, ct = nvfp4("gaussian", MO), nvfp4("gaussian", CT)
    assert (mo[1].size, int((mo[1] != ct[1]).sum())) == (192, 5)
    assert (mo[0].size, int((mo[0] != ct[0]).sum())) == (3072, 32)


@pytest.mark.parametrize("file", FP8_FORMATS)
def test_difference_8_dtype_shape_and_quotient_of_fp8(file: str) -> None:
    for case in set(cases(file)) - {"dead"}:
        shape = source(file, case).shape
        assert leaf(file, case, CT, "weight_scale").dtype == ml_dtypes.bfloat16
        assert leaf(file, case, MO, "weight_scale").dtype == np.float32
        wanted = (1,) if file == "fp8_tensor" else FP8_FORMATS[file].scale_shape(shape)
        assert leaf(file, case, CT, "weight_scale").shape == wanted
        mo, wide = (leaf(file, case, tool, "weight").view(np.uint8) for tool in (MO, CT32))
        if file != "fp8_tensor":
            np.testing.assert_array_equal(mo, wide)
    if file == "fp8_tensor":
        mo, wide = (leaf(file, "gaussian", t, "weight").view(np.uint8) for t in (MO, CT32))
        assert (mo.size, int((mo != wide).sum())) == (1920, 63)


@pytest.mark.parametrize(
    ("file", "case"),
    [("fp8_tensor", "dead"), ("fp8_channel", "zero_row"), ("fp8_block", "zero_block")],
)
def test_difference_9_scale_of_zeros_in_fp8(file: str, case: str) -> None:
    scales = {tool: leaf(file, case, tool, "weight_scale").reshape(-1) for tool in (MO, CT, CT32)}
    found = ours(file, case)
    zero = found.scale.reshape(-1) == 1
    assert zero.sum() == 1
    assert scales[CT].astype(np.float32)[zero] == 2.0**-7
    assert scales[CT32][zero] == 2.0**-23
    assert scales[MO][zero] == (0 if file == "fp8_tensor" else 1)


def test_difference_10_exponent_rule_of_mxfp4() -> None:
    amax = np.abs(by_block("every_mantissa", 32, "mxfp4_absmax")).max(axis=2).reshape(-1)
    assert (amax == 1 + np.arange(128) / 128).all()
    first = {}
    for tool in (MO, CT, CT32):
        scale = mxfp4("every_mantissa", tool)[1].reshape(-1).astype(int)
        first[tool] = amax[scale > scale[0]][0]
        assert set(scale - scale[0]) == {0, 1}
    assert first == {MO: 1.5078125, CT: 1.75, CT32: 1.75}
    assert 0.2 <= ((amax > 1.5) & (amax < 1.75)).mean() <= 0.3
    scale = ours("mxfp4_absmax", "every_mantissa").scale.reshape(-1)
    assert amax[scale > scale[0]][0] == 1.75
    saturated = (amax > 1.5) & (amax < 1.75)
    codes = mxfp4("every_mantissa", CT32)[0].reshape(-1, 32)
    assert ((codes[saturated] & 7).max(axis=1) == 7).all()


def test_difference_11_ties_of_mxfp4() -> None:
    mo, ct = (decode(mxfp4("ties", tool)[0], E2M1) for tool in (MO, CT32))
    scale = decode(mxfp4("ties", CT32)[1], E8M0)
    quotient = source("mxfp4_absmax", "ties").astype(np.float32) / np.repeat(scale, 32, axis=1)
    np.testing.assert_array_equal(np.abs(ct), np.abs(decode(encode(quotient, E2M1), E2M1)))
    for tie, even, toward_zero in ((0.75, 1, 0.5), (1.75, 2, 1.5), (3.5, 4, 3), (5, 4, 4)):
        at = np.abs(quotient) == tie
        assert at.any()
        assert (np.abs(ct[at]) == even).all()
        assert (np.abs(mo[at]) == toward_zero).all()


@pytest.mark.parametrize("case", ["zero_blocks", "dead"])
def test_difference_12_zeros_of_mxfp4(case: str) -> None:
    zero = source("mxfp4_absmax", case).astype(np.float32) == 0
    assert (mxfp4(case, MO)[0][zero] == 8).all()
    assert (mxfp4(case, CT32)[0][zero] == 0).all()
    for tool in (MO, CT):
        assert (leaf("mxfp4_absmax", case, tool, "dequantized").astype(np.float32)[zero] == 0).all()


def test_difference_13_the_ends_of_the_exponent_range() -> None:
    amax = np.abs(by_block("huge", 32, "mxfp4_absmax")).max(axis=2)
    over = amax >= 1.75 * 2.0**127
    assert over.any()
    codes, scale = mxfp4("huge", CT32)
    assert (scale[over] == 127).all()
    assert (codes.reshape(*amax.shape, 32)[over] & 7 == 0).all()
    assert (mxfp4("huge", MO)[1][over] >= 252).all()
    # At the other end the tools agree: field 0 for all below 2^-125, where ModelOpt's rule of
    # difference 10 moves on at mantissa 1.5.
    amax = np.abs(by_block("near_underflow", 32, "mxfp4_absmax")).max(axis=2)
    mo, ct = mxfp4("near_underflow", MO)[1], mxfp4("near_underflow", CT32)[1]
    assert (mo[amax < 2.0**-125] == 0).all()
    assert (ct[amax < 2.0**-125] == 0).all()
    mantissa = 2 * np.frexp(amax[mo != ct])[0]
    assert len(mantissa) == 1
    assert 1.5 < mantissa < 1.75


def test_the_list_and_its_tests_have_the_same_numbers() -> None:
    text = (GOLDEN / "README.md").read_text().split("writes other bytes")[1]
    listed = {
        int(line.split(".")[0]) for line in text.splitlines() if line[:2].strip(".").isdigit()
    }
    tested = {int(n.split("_")[2]) for n in globals() if n.startswith("test_difference_")}
    assert listed == tested == set(range(1, 14))


def test_e4m3_of_both_tools_is_the_fn_kind() -> None:
    for case in cases("nvfp4_absmax"):
        for tool in (MO, CT, CT32):
            assert leaf("nvfp4_absmax", case, tool, "weight_scale").dtype == E4M3.dtype
