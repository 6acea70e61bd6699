"""End to end: a checkpoint folder quantized by nybble and, side by side, by other tools on the same
file.

    python benchmarks/quantize.py MODEL [--peers modelopt,llmcompressor] [--runs 5] [--out FOLDER]

MODEL: benchmarks/make_wide.py makes one with real layer shapes. Rounds alternate between the tools,
so that a busy moment hits all of them. CPU seconds are user + system of the whole process tree;
memory is the peak of private (anonymous) memory, sampled. Peers need `scripts/peers install NAME`.
One line per run goes to benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(os.environ.get("NYBBLE_PEERS", Path.home() / ".cache" / "nybble" / "peers"))
#: Peers take minutes: they are run this often, our own as often as asked.
PEER_RUNS = 1


@dataclass
class Cost:
    """What one run took."""

    wall_s: float
    cpu_s: float
    private_mib: int
    output_mb: int
    verify_s: float = 0.0  # of ours: wall and CPU seconds of the audit, part of the above
    verify_cpu_s: float = 0.0


def commands(model: Path, out: Path, peers: list[str]) -> dict[str, list[str]]:
    """Name -> command line of each contender."""
    ours = [sys.executable, "-m", "nybble", "quantize", str(model), str(out), "--json"]
    found = {
        "nybble mse": [*ours, "--recipe", "nvfp4-all", "--search", "mse"],
        "nybble absmax": [*ours, "--recipe", "nvfp4-all", "--search", "absmax"],
    }

    def peer(env: str, script: str, *arguments: str) -> list[str]:
        python = str(PEERS / env / "bin" / "python")
        return [python, str(ROOT / "peers" / script), str(model), str(out), *arguments]

    if "modelopt" in peers:
        found["ModelOpt max"] = peer("modelopt", "run_modelopt.py", "w4a16_max")
    if "llmcompressor" in peers:
        found["llm-compressor RTN, oneshot"] = peer(
            "llmcompressor", "run_llmcompressor.py", "nvfp4a16"
        )
        found["llm-compressor RTN, model_free_ptq"] = peer(
            "llmcompressor", "run_llmcompressor.py", "mf_nvfp4a16"
        )
    return found


def run(command: list[str], out: Path) -> Cost:
    """Run one contender to its end."""
    for folder in (out, out.with_name(out.name + ".partial")):
        shutil.rmtree(folder, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    with tempfile.TemporaryFile("w+") as answer, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=answer, stderr=errors, env=environment)
        peak = [0]
        threading.Thread(target=watch, args=(process.pid, peak), daemon=True).start()
        if process.wait():
            errors.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{errors.read()[-2000:]}")
        wall = time.perf_counter() - started
        answer.seek(0)
        text = answer.read()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size = sum(f.stat().st_size for f in out.rglob("*.safetensors"))
    found = json.loads(text) if "nybble" in command else {}
    audit = (found.get("audit_seconds", 0.0), found.get("audit_cpu_seconds", 0.0))
    return Cost(wall, cpu, peak[0] // 1024, size // 10**6, *audit)


def watch(pid: int, peak: list[int]) -> None:
    """Sample the private memory of a process until it ends."""
    while True:
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        for line in text.splitlines():
            if line.startswith("RssAnon:"):
                peak[0] = max(peak[0], int(line.split()[1]))
        time.sleep(0.01)


def main() -> None:
    """Run the rounds, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--peers", default="")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where results go (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        out = Path(folder) / "out"
        contenders = commands(arguments.model, out, arguments.peers.split(","))
        shards = sorted(arguments.model.glob("*.safetensors"))
        source = sum(f.stat().st_size for f in shards)
        for shard in shards:  # a warm page cache for everybody
            subprocess.run(["cat", str(shard)], stdout=subprocess.DEVNULL, check=True)
        costs: dict[str, list[Cost]] = {name: [] for name in contenders}
        for i in range(arguments.runs):
            for name, command in contenders.items():
                if i < PEER_RUNS or name.startswith("nybble"):
                    costs[name].append(run(command, out))
                    print(f"# round {i + 1} {name}: {costs[name][-1]}", file=sys.stderr, flush=True)
    report(arguments.model, source, costs)


def report(model: Path, source: int, costs: dict[str, list[Cost]]) -> None:
    """The table on stdout, the rows in results.csv."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    machine = f"{cpu_model()}, {os.cpu_count()} cores"
    print(f"{model.name}: {source / 1e9:.2f} GB of source; {machine}; commit {commit}\n")
    base = statistics.median(c.cpu_s for c in costs["nybble mse"])
    plain = statistics.median(c.cpu_s - c.verify_cpu_s for c in costs["nybble mse"])
    print(
        f"nybble mse without its verification: {plain:.2f} CPU s; ratios in brackets are to that\n"
    )
    print("| tool | runs | wall s | of it verifying | CPU s | CPU, nybble mse = 1 | private MiB |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    with (ROOT / "benchmarks" / "results.csv").open("a", newline="") as file:
        writer = csv.writer(file)
        for name, runs in costs.items():
            wall, verify, cpu = (
                statistics.median(values)
                for values in zip(*((c.wall_s, c.verify_s, c.cpu_s) for c in runs), strict=True)
            )
            print(
                f"| {name} | {len(runs)} | {wall:.2f} | {verify:.2f} | {cpu:.2f} "
                f"| {cpu / base:.1f} ({cpu / plain:.1f}) | {max(c.private_mib for c in runs)} |"
            )
            for c in runs:
                row = ["quantize", commit, machine, model.name, name]
                writer.writerow(
                    [*row, c.wall_s, c.cpu_s, c.private_mib, c.verify_s, c.verify_cpu_s]
                )


def cpu_model() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
