"""A checkpoint under a limit of memory: what the engine takes of its own, and what it maps.

    python benchmarks/engine/limited.py CKPT [--private-mib 600] [--memory 0.1] [--cgroup FOLDER]

Weights are read where the mapped file has them, so private memory does not grow with them: the
limit here (RLIMIT_DATA: everything private and writable) may be far below the size of the file.
With `--cgroup`, a folder of a control group that you made and limited, the process runs in it: then
mapped pages count too, and the system takes them back as needed. Prints private and mapped peaks,
and the speed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from nybble.kernels.dispatch import choose, default_threads


def limiter(private_mib: int, cgroup: Path | None) -> Callable[[], None]:
    """What the child does before it becomes nybble."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (private_mib << 20, private_mib << 20))
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))

    return limit


class Peaks:
    """The largest figures of /proc/PID/status, looked at every 10 ms."""

    NAMES = ("RssAnon", "RssFile", "VmData")

    def __init__(self, pid: int) -> None:
        self.path = Path(f"/proc/{pid}/status")
        self.bytes = dict.fromkeys(self.NAMES, 0)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self) -> None:
        while not self.over.wait(0.01):
            try:
                lines = self.path.read_text().splitlines()
            except OSError:
                return
            for line in lines:
                name, _, value = line.partition(":")
                if name in self.bytes:
                    self.bytes[name] = max(self.bytes[name], int(value.split()[0]) << 10)

    def stop(self) -> dict[str, int]:
        """The peaks."""
        self.over.set()
        self.thread.join()
        return self.bytes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--private-mib", type=int, default=600)
    parser.add_argument("--memory", type=float, default=0.1, help="GiB for pages and states")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--cgroup", type=Path)
    a = parser.parse_args()
    choose()
    command = [sys.executable, "-m", "nybble", "generate", str(a.checkpoint), "The sea", "--raw"]
    command += ["--max-tokens", str(a.max_tokens), "--ignore-eos", "--memory", str(a.memory)]
    command += ["--max-context", "256", "--max-sequences", "1", "--max-batched-tokens", "128"]
    process = subprocess.Popen(
        [*command, "--threads", str(a.threads), "--json"],
        stdout=subprocess.PIPE,
        preexec_fn=limiter(a.private_mib, a.cgroup),
        # Arenas of malloc, one a thread, reserve address space that counts as private.
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"},
    )
    peaks = Peaks(process.pid)
    told, _ = process.communicate()
    found = peaks.stop()
    if process.returncode:
        sys.exit(f"nybble generate ended with {process.returncode}")
    answer = json.loads(told)
    weights = sum(f.stat().st_size for f in a.checkpoint.glob("*.safetensors"))
    mib = {name: value / 2**20 for name, value in found.items()}
    print("| checkpoint | weights, MiB | limit, private MiB | private | mapped | tokens/s |")
    print("|---|--:|--:|--:|--:|--:|")
    print(
        f"| {a.checkpoint.name} | {weights / 2**20:,.0f} | {a.private_mib} "
        f"| {mib['RssAnon']:,.0f} (reserved {mib['VmData']:,.0f}) | {mib['RssFile']:,.0f} "
        f"| {answer['tokens_per_second']:.1f} |"
    )


if __name__ == "__main__":
    main()
