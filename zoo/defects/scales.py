"""Scales and values that are wrong: zero, NaN, unequal, missing, upside down, out of range."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from folder import Defect, Folder, read_shard

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_GITHUB = "thread: https://github.com/"
_EXPERT = r"layers\.1\.mlp\.experts\.1\."
Plant = Callable[[Folder], None]


def fill(pattern: str, value: float) -> Plant:
    """Set every tensor that matches to one value."""

    def plant(folder: Folder) -> None:
        names = folder.matching(pattern)
        if not names:
            raise ValueError(f"no tensor matches {pattern!r}")
        for name in names:
            old = folder.tensors[name]
            folder.tensors[name] = np.full(old.shape, value, dtype=np.float32).astype(old.dtype)

    return plant


def times(pattern: str, factor: float) -> Plant:
    """Multiply every scalar that matches."""

    def plant(folder: Folder) -> None:
        for name in folder.matching(pattern):
            old = folder.tensors[name]
            folder.tensors[name] = (old.astype(np.float32) * np.float32(factor)).astype(old.dtype)

    return plant


def reciprocal(pattern: str) -> Plant:
    """Turn factors into divisors and the reverse, without changing their names."""

    def plant(folder: Folder) -> None:
        for name in folder.matching(pattern):
            folder.tensors[name] = (np.float32(1) / folder.tensors[name]).astype(np.float32)

    return plant


def rescale(pattern: str, factor: float) -> Plant:
    """Give modules another tensor scale and make it good in the block scales: the weights stay."""

    def plant(folder: Folder) -> None:
        for name in folder.matching(pattern):
            module, _, leaf = name.rpartition(".")
            divides = leaf == "weight_global_scale"
            top, blocks = folder.tensors[name], folder.tensors[f"{module}.weight_scale"]
            folder.tensors[name] = (top / factor if divides else top * factor).astype(np.float32)
            moved = np.maximum(blocks.astype(np.float32) / factor, 2.0**-9)
            folder.tensors[f"{module}.weight_scale"] = moved.astype(E4M3)

    return plant


def bytes_of(pattern: str, change: Callable[[NDArray[np.uint8]], None]) -> Plant:
    """Change the bytes of every tensor that matches, in place."""

    def plant(folder: Folder) -> None:
        for name in folder.matching(pattern):
            change(folder.tensors[name].view(np.uint8).reshape(-1))

    return plant


def _set(places: slice, value: int) -> Callable[[NDArray[np.uint8]], None]:
    def change(data: NDArray[np.uint8]) -> None:
        data[places] = value

    return change


def drop(pattern: str) -> Plant:
    """Take tensors out."""

    def plant(folder: Folder) -> None:
        folder.drop(pattern)

    return plant


def signs_to_scales(folder: Folder) -> None:
    """Every third block of a module with a negative scale and flipped codes: the same weights."""
    (name,) = folder.matching(rf"{_EXPERT}down_proj\.weight_scale$")
    module = name.removesuffix(".weight_scale")
    scales = folder.tensors[name].view(np.uint8).reshape(-1)
    codes = folder.tensors[f"{module}.weight"].reshape(scales.size, -1)
    scales[::3] |= 0x80
    codes[::3] ^= 0x88


def clip(folder: Folder) -> None:
    """A tensor scale eight times too small: block scales end at 448, and codes at 6."""
    for name in folder.matching(r"layers\.0\.mlp\.experts\.0\.down_proj\.weight_scale_2$"):
        module = name.removesuffix(".weight_scale_2")
        blocks = folder.tensors[f"{module}.weight_scale"].astype(np.float32)
        codes = folder.tensors[f"{module}.weight"]
        weights = _decode(codes) * np.repeat(blocks, 16, axis=1)
        # So that the largest block would need a scale of 8 x 448.
        small = 8 * 448 / blocks.max()
        scales = np.minimum(blocks * small, 448).astype(E4M3)
        folder.tensors[name] = (folder.tensors[name] / small).astype(np.float32)
        folder.tensors[f"{module}.weight_scale"] = scales
        scaled = weights * small / np.repeat(scales.astype(np.float32), 16, axis=1)
        folder.tensors[f"{module}.weight"] = _encode(scaled)


def integers(folder: Folder) -> None:
    """Four-bit integers with an offset of 8 where E2M1 codes should be."""
    for name in folder.matching(r"\.weight$"):
        if folder.tensors[name].dtype == np.uint8:
            steps = np.clip(np.rint(_decode(folder.tensors[name]) * 7 / 6), -8, 7) + 8
            folder.tensors[name] = _pack(steps.astype(np.uint8))


_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)


def _decode(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    codes = np.stack((packed & 15, packed >> 4), axis=-1).reshape(packed.shape[0], -1)
    return np.where(codes & 8, -1, 1).astype(np.float32) * _VALUES[codes & 7]


def _encode(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    nearest = np.abs(np.abs(values)[..., None] - _VALUES).argmin(axis=-1).astype(np.uint8)
    return _pack(nearest | np.where(values < 0, 8, 0).astype(np.uint8))


def _pack(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def kv_scales(value: float) -> Plant:
    """Scales of the KV cache, the keys' of the first layer with this value."""

    def plant(folder: Folder) -> None:
        for name in folder.matching(r"language_model.*self_attn\.k_proj\.weight$"):
            module = name.removesuffix(".k_proj.weight")
            for leaf, number in (("k_proj.k_scale", value), ("v_proj.v_scale", 0.05)):
                folder.tensors[f"{module}.{leaf}"] = np.array(number, dtype=np.float32)
                folder.shard_of[f"{module}.{leaf}"] = folder.shard_of[name]

    return plant


def nan_inside(folder: Folder) -> None:
    """One NaN in an embedding, where no sample of its first, middle and last bytes looks."""
    (name,) = folder.matching(r"embed_tokens\.weight$")
    values = folder.tensors[name].reshape(-1)
    values[values.size // 3] = np.nan


def zero_tail(out: Path) -> None:
    """The second half of a shard reads as zeros, as a mapped file does that was cut short."""
    shard = sorted(out.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    shard.write_bytes(data)
    if not any(values.any() for values in read_shard(shard).values()):
        raise ValueError(f"{shard.name}: nothing is left")


DEFECTS = [
    Defect(
        "zero-tensor-scale",
        "NB201",
        "nybble-modelopt",
        "The tensor scale of one expert's projection is 0.",
        fill(rf"{_EXPERT}down_proj\.weight_scale_2$", 0),
    ),
    Defect(
        "zero-input-scale",
        "NB201",
        "nybble-w4a4",
        "The input scales of an expert that calibration never reached are 0.",
        fill(rf"{_EXPERT}(gate|up|down)_proj\.input_scale$", 0),
        origin=_GITHUB + "vllm-project/vllm/issues/45212",
        repaired=True,
    ),
    Defect(
        "negative-tensor-scale",
        "NB202",
        "nybble-modelopt",
        "The tensor scale of one projection is negative.",
        times(r"layers\.0\.mlp\.shared_expert\.down_proj\.weight_scale_2$", -1),
    ),
    Defect(
        "negative-input-scale",
        "NB202",
        "nybble-w4a4",
        "The input scale of one projection is negative.",
        times(rf"{_EXPERT}down_proj\.input_scale$", -1),
        repaired=True,
    ),
    Defect(
        "nan-input-scale",
        "NB203",
        "nybble-w4a4",
        "Input scales are NaN after a calibration whose tracing failed.",
        fill(rf"{_EXPERT}.*\.input_scale$", float("nan")),
        origin=_GITHUB + "vllm-project/compressed-tensors/issues/832",
        repaired=True,
    ),
    Defect(
        "infinite-input-scale",
        "NB204",
        "llmcompressor-dense",
        "A module that saw only zeros in calibration has 2688 / 0 as its input_global_scale.",
        fill(r"layers\.1\.mlp\.down_proj\.input_global_scale$", float("inf")),
        origin=_GITHUB + "vllm-project/compressed-tensors/pull/595",
    ),
    Defect(
        "infinite-expert-scale",
        "NB204",
        "nybble-w4a4",
        "The input scale of one expert's projection is infinite.",
        fill(rf"{_EXPERT}down_proj\.input_scale$", float("inf")),
        repaired=True,
    ),
    Defect(
        "nan-block-scale",
        "NB205",
        "nybble-ct",
        "A few block scales are 0x7F, the NaN of E4M3, as a cast without a clamp makes them.",
        bytes_of(rf"{_EXPERT}up_proj\.weight_scale$", _set(slice(5, 200, 60), 0x7F)),
        origin=_GITHUB + "vllm-project/compressed-tensors/issues/832",
    ),
    Defect(
        "signed-block-scale",
        "NB206",
        "nybble-modelopt",
        "Every third block scale of one projection is negative and its codes are flipped.",
        signs_to_scales,
        repaired=True,
    ),
    Defect(
        "underflown-block-scale",
        "NB207",
        "nybble-modelopt",
        "Block scales below 2^-9 were rounded to 0, their codes are not.",
        bytes_of(rf"{_EXPERT}down_proj\.weight_scale$", _set(slice(0, None, 11), 0)),
        origin=_GITHUB + "NVIDIA/Model-Optimizer/pull/1382",
    ),
    Defect(
        "zero-block-scales",
        "NB207",
        "nybble-ct",
        "All block scales of one projection are 0.",
        bytes_of(r"layers\.0\.mlp\.experts\.0\.down_proj\.weight_scale$", _set(slice(None), 0)),
    ),
    Defect(
        "default-block-scales",
        "NB208",
        "nybble-modelopt",
        "All block scales of one projection are 1, and its tensor scale is one that fits them.",
        lambda folder: (
            bytes_of(rf"{_EXPERT}down_proj\.weight_scale$", _set(slice(None), 0x38))(folder),
            fill(rf"{_EXPERT}down_proj\.weight_scale_2$", 0.0078125)(folder),
        )[0],
    ),
    Defect(
        "default-input-scales",
        "NB208",
        "nybble-w4a4",
        "Calibration skipped a class of a new name: every input scale is the default.",
        fill(r"\.input_scale$", 1.0),
        origin=_GITHUB + "vllm-project/llm-compressor/pull/2547",
    ),
    Defect(
        "missing-expert-input-scale",
        "NB209",
        "nybble-w4a4",
        "One expert has no input scales.",
        drop(rf"{_EXPERT}.*\.input_scale$"),
        origin=_GITHUB + "vllm-project/vllm/issues/45212",
        repaired=True,
    ),
    Defect(
        "unequal-gate-up",
        "NB210",
        "nybble-modelopt",
        "Gate and up of the experts of a layer have tensor scales four times apart.",
        rescale(r"layers\.1\.mlp\.experts\.\d+\.up_proj\.weight_scale_2$", 4),
        origin=_GITHUB + "vllm-project/vllm/issues/54974",
        repaired=True,
    ),
    Defect(
        "unequal-qkv",
        "NB210",
        "modelopt-dense",
        "q, k and v have tensor scales up to 2.14 times apart.",
        rescale(r"layers\.\d+\.self_attn\.q_proj\.weight_scale_2$", 2.14),
        origin=_GITHUB + "vllm-project/vllm/issues/47515",
        source="source-dense",
        repaired=True,
    ),
    Defect(
        "unequal-global-scales",
        "NB210",
        "llmcompressor-dense",
        "k has a weight_global_scale of 9600 where v and q have 12992.",
        rescale(r"self_attn\.k_proj\.weight_global_scale$", 12992 / 9600),
        origin=_GITHUB + "vllm-project/llm-compressor/issues/1869",
        source="source-dense",
        repaired=True,
    ),
    Defect(
        "unequal-inputs",
        "NB211",
        "nybble-w4a4",
        "Gate and up of one expert have input scales two times apart.",
        times(rf"{_EXPERT}up_proj\.input_scale$", 2),
        repaired=True,
    ),
    Defect(
        "divisors-as-factors",
        "NB212",
        "nybble-modelopt",
        "weight_scale_2 holds what compressed-tensors stores, 2688 / amax.",
        reciprocal(r"\.weight_scale_2$"),
        origin=_GITHUB + "JustVugg/colibri/issues/83",
        repaired=True,
    ),
    Defect(
        "factors-as-divisors",
        "NB212",
        "nybble-ct",
        "weight_global_scale holds what ModelOpt stores, amax / 2688.",
        reciprocal(r"\.weight_global_scale$"),
        origin=_GITHUB + "modular/modular/issues/6600",
        repaired=True,
    ),
    Defect(
        "no-tensor-scale",
        "NB213",
        "nybble-modelopt",
        "A naive NVFP4 with block scales alone.",
        drop(r"\.weight_scale_2$"),
        origin=_GITHUB + "ollama/ollama/issues/15880",
        also=("NB118",),
    ),
    Defect(
        "dead-expert",
        "NB214",
        "nybble-modelopt",
        "One expert has nothing but zeros for weights.",
        bytes_of(rf"{_EXPERT}(gate|up|down)_proj\.weight$", _set(slice(None), 0)),
        origin=_GITHUB + "flashinfer-ai/flashinfer/issues/3592",
    ),
    Defect(
        "clipped-weights",
        "NB215",
        "nybble-modelopt",
        "A tensor scale is eight times too small, and all large weights are clipped.",
        clip,
    ),
    Defect(
        "zero-kv-scale",
        "NB216",
        "nybble-modelopt",
        "The key scale of the attention layer is 0.",
        kv_scales(0.0),
    ),
    Defect(
        "huge-kv-scale",
        "NB216",
        "nybble-modelopt",
        "The key scale of the attention layer is 10^6: every key rounds to zero.",
        kv_scales(1e6),
        severity="warning",
    ),
    Defect(
        "nan-norm",
        "NB217",
        "nybble-dense",
        "The final norm holds an infinity.",
        bytes_of(
            r"^model\.norm\.weight$", lambda data: data[:2].__setitem__(slice(0, 2), (128, 127))
        ),
    ),
    Defect(
        "nan-inside-embedding",
        "NB217",
        "nybble-dense",
        "One value in the middle of the embedding is NaN.",
        nan_inside,
        deep=True,
    ),
    Defect(
        "vanished-projection",
        "NB218",
        "nybble-modelopt",
        "A projection has a tensor scale 16384 times too small.",
        times(rf"{_EXPERT}down_proj\.weight_scale_2$", 2.0**-14),
    ),
    Defect(
        "starved-expert",
        "NB219",
        "nybble-w4a4",
        "An expert that saw one small token has an input scale far below those of its layer.",
        times(rf"{_EXPERT}down_proj\.input_scale$", 2.0**-12),
    ),
    Defect(
        "integers-as-codes",
        "NB220",
        "nybble-modelopt",
        "Four-bit integers in the packing and under the names of E2M1 codes.",
        integers,
    ),
    Defect(
        "zero-tail",
        "NB221",
        "nybble-modelopt",
        "The second half of a shard reads as zeros: its download was cut short.",
        after=zero_tail,
        origin=_GITHUB + "osaurus-ai/vmlx-swift/issues/217",
        also=("NB201", "NB207", "NB210", "NB216"),
    ),
]
