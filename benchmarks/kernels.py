"""Speed of the compiled kernels per instruction set, and the SQNR of the scale searches.

    python benchmarks/kernels.py [--mib 32] [--runs 7] [--threads N] [--json]

GB/s of BF16 input (10^9 bytes). One thread: its own CPU time, so that a busy neighbour does not
count; all threads: wall time. Medians. The same run measures what bounds them: numpy's copy, and a
multiply-add loop if there is a C compiler. SQNR: 2^20 weights per distribution, in dB.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nybble.formats.block import MXFP4, NVFP4
from nybble.formats.search import SEARCHES, tensor_scale
from nybble.kernels import block_quantize, build, dispatch

ROOT = Path(__file__).resolve().parents[1]
BF16 = np.dtype(ml_dtypes.bfloat16)
WARM_UP_S = 0.3  # clocks rise, pages are touched
SAMPLES = 1 << 20
FMA = """
typedef float lanes __attribute__((vector_size(64)));
float fma_loop(long n) {
  lanes a[12], x = (lanes){0} + 1.0001f, y = (lanes){0} + 0.5f, sum = {0};
  for (int i = 0; i < 12; i++) a[i] = sum + (float)i;
  for (long k = 0; k < n; k++)
    for (int i = 0; i < 12; i++) a[i] = a[i] * x + y;
  for (int i = 0; i < 12; i++) sum += a[i];
  return sum[0];
}
"""


def seconds(call: Callable[[], object], clock: Callable[[], float], runs: int) -> float:
    """Median of `runs` calls, after a warm-up."""
    until = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < until:
        call()
    taken = []
    for _ in range(runs):
        start = clock()
        call()
        taken.append(clock() - start)
    return statistics.median(taken)


def operations(x: NDArray[np.generic]) -> dict[str, Callable[[int], object]]:
    """Name -> the operation on x with a number of threads."""
    codes = [np.zeros(x.size // 2, dtype=np.uint8)]
    blocks = [np.full(x.size // 16, 0x38, dtype=np.uint8)]
    scales = {s: tensor_scale(block_quantize.amax([x]), NVFP4, s) for s in SEARCHES}

    def quantizer(search: str) -> Callable[[int], object]:
        return lambda threads: block_quantize.quantize(
            [x], NVFP4, search, scales[search], codes, blocks, threads
        )

    return {
        "amax": lambda threads: block_quantize.amax([x], threads),
        **{f"quantize {search}": quantizer(search) for search in SEARCHES},
        "compare": lambda threads: block_quantize.compare(
            [x], NVFP4, scales["mse"], codes, blocks, threads
        ),
        "decode": lambda threads: block_quantize.decode(
            NVFP4, scales["mse"], codes, blocks, threads
        ),
    }


def speeds(x: NDArray[np.generic], isas: list[str], threads: int, runs: int) -> list[dict]:
    """One row per instruction set and operation, in GB/s of BF16 input."""
    rows = []
    for isa in isas:
        os.environ["NYBBLE_ISA"] = isa
        for name, call in operations(x).items():
            one = seconds(lambda call=call: call(1), time.thread_time, runs)
            every = seconds(lambda call=call: call(threads), time.perf_counter, runs)
            rows.append(
                {
                    "isa": isa,
                    "operation": name,
                    "one_thread_gb_s": round(x.nbytes / one / 1e9, 2),
                    "all_threads_gb_s": round(x.nbytes / every / 1e9, 2),
                }
            )
    del os.environ["NYBBLE_ISA"]
    return rows


def copy_gb_s(nbytes: int, runs: int) -> float:
    """Bytes read plus written per second of wall time by a numpy copy too large for a cache."""
    source = np.ones(max(nbytes, 256 << 20), dtype=np.uint8)
    target = np.zeros_like(source)
    return (
        2
        * source.nbytes
        / seconds(lambda: np.copyto(target, source), time.perf_counter, runs)
        / 1e9
    )


def fma_gflop_s(runs: int) -> float | None:
    """Float32 multiply-adds of one thread, two operations each; None without a compiler."""
    steps = 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "fma.c", Path(folder) / "fma.so"
        source.write_text(FMA)
        flags = ["-O3", "-march=native", "-funroll-loops", "-fPIC", "-shared"]
        for compiler in build.compilers():
            command = [*compiler, *flags, str(source), "-o", str(library)]
            if subprocess.run(command, capture_output=True).returncode == 0:
                break
        else:
            return None
        loop = ctypes.CDLL(str(library)).fma_loop
        taken = seconds(lambda: loop(ctypes.c_long(steps)), time.thread_time, runs)
    return steps * 12 * 16 * 2 / taken / 1e9


def sqnr() -> list[dict]:
    """SQNR in dB of every search on 2^20 weights of each distribution."""
    rng = np.random.default_rng(0)
    drawn = {
        "gaussian": rng.standard_normal(SAMPLES),
        "laplace": rng.laplace(size=SAMPLES),
        "student_t5": rng.standard_t(5, SAMPLES),
        "student_t3": rng.standard_t(3, SAMPLES),
    }
    rows = []
    for fmt, search in [*((NVFP4, s) for s in SEARCHES), (MXFP4, "absmax"), (MXFP4, "mse")]:
        row: dict[str, object] = {"format": str(fmt), "search": search}
        for name, values in drawn.items():
            x = values.astype(np.float32).astype(BF16)
            scale = tensor_scale(block_quantize.amax([x]), fmt, search)
            codes = [np.empty(x.size // 2, dtype=np.uint8)]
            blocks = [np.empty(x.size // fmt.block[1], dtype=np.uint8)]
            block_quantize.quantize([x], fmt, search, scale, codes, blocks)
            [found] = block_quantize.compare([x], fmt, scale, codes, blocks)
            row[name] = round(float(10 * np.log10(found.energy / found.error)), 2)
        rows.append(row)
    return rows


def cpu_model() -> str:
    """What the system calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this tree, with a + if files differ from it."""
    described = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"],
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or "unknown"


def table(rows: list[dict]) -> str:
    """Rows with equal keys, aligned."""
    keys = list(rows[0])
    lines = [keys, *([str(row[k]) for k in keys] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=32, help="BF16 input, MiB (default 32)")
    parser.add_argument("--runs", type=int, default=7, help="calls per figure (default 7)")
    parser.add_argument("--threads", type=int, default=dispatch.default_threads())
    parser.add_argument("--json", action="store_true", help="one document on stdout")
    options = parser.parse_args()
    isas = dispatch.machine_isas()
    if not isas:
        sys.exit(f"no compiled kernels: {build.load().origin}")
    x = np.random.default_rng(0).standard_normal((options.mib << 20) // 2, dtype=np.float32)
    x = (x * np.float32(0.02)).astype(BF16)
    fma = fma_gflop_s(options.runs)
    result = {
        "schema": "nybble.benchmark.kernels/1",
        "conditions": {
            "cpu": cpu_model(),
            "threads": options.threads,
            "commit": commit(),
            "library": build.load().origin,
            "input_mib": options.mib,
            "runs": options.runs,
            "load": round(os.getloadavg()[0], 2),
        },
        "copy_gb_s": round(copy_gb_s(x.nbytes, options.runs), 1),
        "fma_gflop_s": None if fma is None else round(fma, 1),
        "speed": speeds(x, isas, options.threads, options.runs),
        "sqnr_db": sqnr(),
    }
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print("\n".join(f"{key}: {value}" for key, value in result["conditions"].items()))
    print(f"numpy copy: {result['copy_gb_s']} GB/s read + written, one thread")
    print(f"FMA: {f'{fma:.1f} GFLOP/s, one thread' if fma else 'not measured: no C compiler'}\n")
    print(table(result["speed"]), "\n")
    print(table(result["sqnr_db"]))


if __name__ == "__main__":
    main()
