"""Decode a quantized checkpoint without nybble, and compare it with what it was made from.

    python examples/decode.py CKPT [--source BF16]

Written from the format descriptions, with the safetensors library, numpy and ml_dtypes: it shares
no code with nybble, so the two can only agree if both read the format rightly. It takes what a
tensor is from its neighbours' names and dtypes, never from the configuration.

    weight         U8  + weight_scale E4M3 + weight_scale_2 F32       NVFP4, ModelOpt
    weight_packed  U8  + weight_scale E4M3 + weight_global_scale F32  NVFP4, compressed-tensors
    weight[_packed] U8 + weight_scale U8                              MXFP4
    weight         E4M3 + weight_scale (one, a row, a 128x128 block)  FP8

With --source, exits 1 if a tensor is missing or left over, a copied one differs in one byte, a
decoded one has another shape or is not finite, or its SQNR is below FLOOR_DB.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": "<f2", "F32": "<f4", "F64": "<f8", "U8": "u1"}
DTYPES |= {"F8_E4M3": E4M3, "I8": "i1", "I32": "<i4", "I64": "<i8", "BOOL": "?"}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], "f4")
PAIRS = np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], axis=-1)  # low half first
CHUNK_WEIGHTS = 1 << 22  # decoded at a time: 16 MiB of float32
CHUNK_BYTES = 1 << 26
FLOOR_DB = 10.0  # below any four-bit rounding (about 18 dB), far above mixed-up rows (about -3 dB)
SCALES = ("weight_scale", "weight_scale_2", "weight_global_scale")
UNCHECKED = ("input_scale", "input_global_scale", "k_scale", "v_scale")  # of activations
PARTS = {
    "mtp": r"(^|\.)mtp\.",
    "vision": r"(^|\.)visual\.",
    "routed experts": r"\.experts\.",
    "shared expert": r"\.shared_expert\.",
    "linear attention": r"\.linear_attn\.",
    "attention": r"\.self_attn\.",
    "mlp": r"\.mlp\.",
    "lm_head": r"(^|\.)lm_head\.",
}


def part(name: str) -> str:
    """The part of the model a tensor belongs to."""
    return next((label for label, pattern in PARTS.items() if re.search(pattern, name)), "other")


def read_file(file: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file as a memory map: nothing is read until it is used.

    Not with safe_open's own arrays: under numpy it knows no FP8 and in old versions no BF16.
    """
    with safe_open(file, "np") as checked:  # the library refuses a damaged file
        names = sorted(checked.keys())
    data = np.memmap(file, np.uint8, "r")
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:start].tobytes())
    tensors = {}
    for name in names:
        dtype, (begin, end) = header[name]["dtype"], header[name]["data_offsets"]
        if dtype not in DTYPES:
            raise SystemExit(f"{file}: {name} has the unknown dtype {dtype}")
        raw = np.asarray(data[start + begin : start + end])
        tensors[name] = raw.view(DTYPES[dtype]).reshape(header[name]["shape"])
    return tensors


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint folder, whose index has to agree with its files."""
    files = {file.name: read_file(file) for file in sorted(folder.glob("*.safetensors"))}
    places = {name: file for file, tensors in files.items() for name in tensors}
    index = folder / "model.safetensors.index.json"
    if index.exists() and json.loads(index.read_text())["weight_map"] != places:
        raise SystemExit(f"{index} does not say what the files hold")
    if not places or len(places) != sum(map(len, files.values())):
        raise SystemExit(f"{folder}: no tensor, or one in two files")
    return {name: tensor for tensors in files.values() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Module:
    """The tensors of one quantized linear; K is counted in weights, not in bytes."""

    codes: np.ndarray  # U8 [N, K // 2] or E4M3 [N, K]
    scale: np.ndarray
    tensor_scale: np.ndarray | None
    divides: bool  # compressed-tensors stores the reciprocal

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K]."""
        rows, width = self.codes.shape
        return rows, width * 2 if self.codes.dtype == np.uint8 else width

    @property
    def format(self) -> str:
        """Its name."""
        if self.codes.dtype == E4M3:
            return "FP8"
        return "NVFP4" if self.scale.dtype == E4M3 else "MXFP4"

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop, float32 [stop - start, K]."""
        stop = min(stop, len(self.codes))
        if self.format == "FP8":
            return self.codes[start:stop].astype(np.float32) * self._fp8_scale(start, stop)
        scale = self.scale[start:stop]
        if self.format == "MXFP4":
            factor = np.ldexp(np.float32(1), scale.astype(np.int32) - 127)
        else:
            factor = scale.astype(np.float32)
        blocks = PAIRS[self.codes[start:stop]].reshape(*factor.shape, -1)  # [rows, K // B, B]
        weight = (blocks * factor[..., None]).reshape(stop - start, -1)  # exact in float32
        if self.tensor_scale is None:
            return weight
        one = self.tensor_scale.reshape(())
        return weight / one if self.divides else weight * one

    def _fp8_scale(self, start: int, stop: int) -> np.ndarray:
        """The scale of rows start to stop, to be multiplied on [rows, K]."""
        (rows, columns), scale = self.shape, self.scale.astype(np.float32)
        if scale.size == 1:
            return scale.reshape(())
        if scale.shape in ((rows,), (rows, 1)):
            return scale.reshape(rows, 1)[start:stop]
        blocks = scale.reshape(math.ceil(rows / 128), math.ceil(columns / 128))
        return blocks[np.arange(start, stop) // 128].repeat(128, axis=1)[:, :columns]


def modules(tensors: dict[str, np.ndarray]) -> dict[str, Module]:
    """The quantized linears of a folder, by module name."""
    found = {}
    for name in sorted(tensors):
        base, _, leaf = name.rpartition(".")
        scale = tensors.get(base + ".weight_scale")
        if leaf not in ("weight", "weight_packed") or scale is None:
            continue
        divisor = tensors.get(base + ".weight_global_scale")
        factor = tensors.get(base + ".weight_scale_2")
        needed = tensors[name].dtype == np.uint8 and scale.dtype == E4M3
        given = sum(value is not None for value in (divisor, factor))
        known = tensors[name].dtype in (np.uint8, E4M3) and tensors[name].ndim == 2
        if not known or given != needed:
            raise SystemExit(f"{base}: no format known with these tensors")
        tensor_scale = factor if divisor is None else divisor
        found[base] = Module(tensors[name], scale, tensor_scale, divides=divisor is not None)
    return found


def decode(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every quantized linear of a checkpoint as (module name, float32 weight [N, K])."""
    for name, module in modules(read_folder(folder)).items():
        yield name, module.rows(0, len(module.codes))


def pieces(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The linears in a stack of experts as (tensor name, [N, K]); gate rows precede up rows."""
    base, _, leaf = name.rpartition(".")
    for number, expert in enumerate(array):
        leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        for one, rows in zip(leaves, np.split(expert, len(leaves)), strict=True):
            yield f"{base}.{number}.{one}.weight", rows


def sqnr_db(signal: float, noise: float) -> float:
    """Signal to quantization noise; infinite without noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def energy(values: np.ndarray) -> float:
    """The sum of squares, in float64."""
    return float(np.einsum("ij,ij->", values, values, dtype=np.float64))


class Report:
    """What was found so far; says where it is every two seconds."""

    def __init__(self) -> None:
        self.bad: list[str] = []
        self.copied: dict[str, np.ndarray] = {}  # by part: byte-identical, all
        self.kinds: dict[tuple[str, str], np.ndarray] = {}  # modules, weights, signal, noise
        self.told_s = time.monotonic()

    def progress(self, name: str) -> None:
        """Say where it is."""
        if time.monotonic() - self.told_s > 2:
            self.told_s = time.monotonic()
            modules = sum(int(row[0]) for row in self.kinds.values())
            print(f"  {modules:,} modules decoded, at {name}", flush=True)

    def add_decoded(self, name: str, source: np.ndarray | None, module: Module) -> None:
        """Compare a quantized linear; without a source only look whether it is finite."""
        if source is not None and source.shape != module.shape:
            self.bad.append(f"{name}: shape {module.shape}, source {source.shape}")
            return
        signal = noise = 0.0
        step = max(1, CHUNK_WEIGHTS // module.shape[1])
        for start in range(0, module.shape[0], step):
            decoded = module.rows(start, start + step)
            wanted = decoded if source is None else source[start : start + step].astype(np.float32)
            signal, noise = signal + energy(wanted), noise + energy(decoded - wanted)
            self.progress(name)
        if not math.isfinite(signal + noise):
            self.bad.append(f"{name}: not finite")
        elif sqnr_db(signal, noise) < FLOOR_DB:
            self.bad.append(f"{name}: {sqnr_db(signal, noise):.1f} dB: not the source's weights")
        row = np.array([1, math.prod(module.shape), signal, noise])
        key = part(name), module.format
        self.kinds[key] = self.kinds.get(key, 0) + row

    def add_copied(self, name: str, source: np.ndarray, copy: np.ndarray | None) -> None:
        """Compare a tensor that was not quantized byte for byte."""
        same = copy is not None and (source.dtype, source.shape) == (copy.dtype, copy.shape)
        if copy is not None and same:
            left, right = (np.ascontiguousarray(a).reshape(-1).view("u1") for a in (source, copy))
            for start in range(0, left.size, CHUNK_BYTES):
                window = slice(start, start + CHUNK_BYTES)
                same = same and np.array_equal(left[window], right[window])
                self.progress(name)
        if not same:
            self.bad.append(f"{name}: {'missing' if copy is None else 'not a copy of the source'}")
        label = part(name) if part(name) in ("mtp", "vision") else "other"
        self.copied[label] = self.copied.get(label, 0) + np.array([same, 1])


def compare(checkpoint: Path, source: Path | None) -> Report:
    """Decode everything, a few rows at a time, and hold it against the source if there is one."""
    report, tensors = Report(), read_folder(checkpoint)
    quantized = modules(tensors)
    wanted: list[tuple[str, np.ndarray | None]] = []
    for name, original in (read_folder(source) if source else {}).items():
        stacked = original.ndim == 3 and ".experts." in name and name not in tensors
        wanted += pieces(name, original) if stacked else [(name, original)]
    if source is None:
        wanted = [(name + ".weight", None) for name in quantized]
    used = {f"{base}.{leaf}" for base in quantized for leaf in (*SCALES, "weight_packed")}
    used |= {name for name, _ in wanted}
    for name, array in wanted:
        base, _, leaf = name.rpartition(".")
        if leaf == "weight" and base in quantized:
            report.add_decoded(name, array, quantized[base])
        elif array is not None:
            report.add_copied(name, array, tensors.get(name))
    left = {name for name in tensors if name not in used and not name.endswith(UNCHECKED)}
    report.bad += [f"{name}: not in the source" for name in sorted(left) if source]
    return report


def show(report: Report, *, compared: bool) -> None:
    """Print the report."""
    print(f"{'decoded':18} {'format':6} {'modules':>8} {'weights':>15}  SQNR dB")
    for (label, form), (count, weights, signal, noise) in sorted(report.kinds.items()):
        value = f"{sqnr_db(signal, noise):.2f}" if compared else "-"
        print(f"{label:18} {form:6} {count:8,.0f} {weights:15,.0f}  {value}")
    for label, (same, count) in sorted(report.copied.items()):
        print(f"copied, {label}: {same:,} of {count:,} byte-identical")
    for line in report.bad[:20]:
        print("WRONG", line)
    count, weights = (sum(row[column] for row in report.kinds.values()) for column in (0, 1))
    print(f"{count:,.0f} modules, {weights:,.0f} weights decoded; {len(report.bad):,} wrong")


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--source", type=Path, help="the BF16 folder it was made from")
    arguments = parser.parse_args()
    report = compare(arguments.checkpoint, arguments.source)
    show(report, compared=arguments.source is not None)
    return 1 if report.bad else 0


if __name__ == "__main__":
    sys.exit(main())
