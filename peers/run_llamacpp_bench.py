"""Build llama.cpp's benchmarks where that was not done, and run one of them once.

    run_llamacpp_bench.py MODEL.gguf --prompt 512 --threads 2
    run_llamacpp_bench.py MODEL.gguf --generate 128 [--batch 8]
    run_llamacpp_bench.py --build

The source is the one that `scripts/peers install llamacpp` unpacks; it is built for this machine as
its README says (Release, native instructions) with the system's cmake and compiler. One sequence is
llama-bench's, several are llama-batched-bench's. Both warm up by themselves. Prints one JSON line:
tokens and seconds. Runs in any Python.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

PEER = (
    Path(os.environ.get("NYBBLE_PEERS", Path.home() / ".cache" / "nybble" / "peers")) / "llamacpp"
)
BUILD = PEER / "build"
PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-quantize")


def build() -> None:
    """Compile what is missing. Takes minutes."""
    if all((BUILD / "bin" / name).exists() for name in PROGRAMS):
        return
    if not (PEER / "source").exists():
        sys.exit("llama.cpp is not there: scripts/peers install llamacpp")
    configure = ["cmake", "-S", str(PEER / "source"), "-B", str(BUILD)]
    configure += ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF"]
    configure += ["-DLLAMA_BUILD_SERVER=OFF", *(["-GNinja"] if shutil.which("ninja") else [])]
    jobs = str(os.cpu_count() or 1)
    for command in (
        configure,
        ["cmake", "--build", str(BUILD), "-j", jobs, "--target", *PROGRAMS],
    ):
        subprocess.run(command, check=True, stdout=sys.stderr)


def bench(model: str, prompt: int, generate: int, threads: int) -> tuple[int, float]:
    """Tokens and seconds of llama-bench: prompt or generation alone."""
    command = [str(BUILD / "bin" / "llama-bench"), "-m", model, "-t", str(threads), "-r", "1"]
    command += ["-p", str(prompt), "-n", str(generate), "-o", "jsonl"]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    [row] = [json.loads(line) for line in told.stdout.splitlines() if line.startswith(b"{")]
    return prompt or generate, row["samples_ns"][0] / 1e9


def batched(model: str, generate: int, batch: int, threads: int) -> tuple[int, float]:
    """Tokens and seconds of llama-batched-bench: sequences that generate side by side, after
    prompts of one token."""
    context = str(batch * (generate + 8))
    command = [str(BUILD / "bin" / "llama-batched-bench"), "-m", model, "-t", str(threads)]
    command += ["-c", context, "-npp", "1", "-ntg", str(generate), "-npl", str(batch)]
    command += ["--output-format", "jsonl"]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    [row] = [json.loads(line) for line in told.stdout.splitlines() if line.startswith(b"{")]
    return generate * batch, row["t_tg"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--prompt", type=int, default=0)
    parser.add_argument("--generate", type=int, default=0)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--build", action="store_true", help="compile and stop")
    a = parser.parse_args()
    build()
    if a.build:
        return
    if not a.model or bool(a.prompt) == bool(a.generate):
        sys.exit("name a model, and a prompt or a generation")
    if a.batch > 1:
        tokens, seconds = batched(a.model, a.generate, a.batch, a.threads)
    else:
        tokens, seconds = bench(a.model, a.prompt, a.generate, a.threads)
    print(json.dumps({"tokens": tokens, "seconds": seconds}))


if __name__ == "__main__":
    main()
