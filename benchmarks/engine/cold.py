"""From a command to its first token: interpreter, libraries, mapping the checkpoint, prefill.

    python benchmarks/engine/cold.py CKPT [--runs 9]

`nybble generate` is started anew each time, and its standard output watched; the kernels are
compiled before. The files of the checkpoint may be in the system's cache, as they are after a copy;
`--uncached` has them dropped from it before each run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from nybble.api.conditions import Watch, conditions
from nybble.kernels.dispatch import choose, default_threads


def drop(folder: Path) -> None:
    """Take the files out of the system's cache."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first_token_s(folder: Path, threads: int) -> float:
    """Seconds until the first text of an answer."""
    command = [sys.executable, "-m", "nybble", "generate", str(folder), "The sea", "--raw"]
    command += ["--max-tokens", "8", "--ignore-eos", "--threads", str(threads)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 1)
    seconds = time.perf_counter() - began
    _, errors = process.communicate()
    if not first or process.returncode:
        sys.exit(f"nybble generate failed: {errors.decode()[-2000:]}")
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--uncached", action="store_true")
    a = parser.parse_args()
    choose()
    first_token_s(a.checkpoint, a.threads)
    watch, found = Watch(), []
    for _ in range(a.runs):
        if a.uncached:
            drop(a.checkpoint)
        found.append(first_token_s(a.checkpoint, a.threads))
    print("| checkpoint | first token, s | min | max |\n|---|--:|--:|--:|")
    print(
        f"| {a.checkpoint.name} | {statistics.median(found):.2f} | {min(found):.2f} "
        f"| {max(found):.2f} |\n\n{conditions(a.threads, watch.others_share())}"
    )


if __name__ == "__main__":
    main()
