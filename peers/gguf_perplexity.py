"""Let llama.cpp run a GGUF file: its perplexity over a text, by llama-perplexity.

    gguf_perplexity.py --build
    gguf_perplexity.py FILE.gguf TEXT [--length 256] [--threads 2]

Runs in the environment llamacpp. `--build` compiles llama-perplexity from the source in that
environment (cmake and a C++ compiler needed; minutes), into its folder `build`. The figure counts
the second half of every window of `length` tokens, which is `--convention llamacpp` of
`nybble perplexity`. Prints one JSON line.
"""

import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path

SOURCE = Path(sys.prefix) / "source"
BUILD = Path(sys.prefix) / "build"
BINARY = BUILD / "bin" / "llama-perplexity"
# Only what the program needs; the server and its pages take most of the time otherwise.
OPTIONS = [
    *("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_NATIVE=ON"),
    *("-DCMAKE_CXX_FLAGS_RELEASE=-O1", "-DCMAKE_C_FLAGS_RELEASE=-O3"),
    *("-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF"),
    *("-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_UI=OFF"),
]


def build() -> None:
    subprocess.run(["cmake", "-S", SOURCE, "-B", BUILD, *OPTIONS], check=True, stdout=sys.stderr)
    command = ["cmake", "--build", BUILD, "--target", "llama-perplexity", "--parallel"]
    subprocess.run(command, check=True, stdout=sys.stderr)


def perplexity(model: Path, text: Path, length: int, threads: int) -> dict[str, object]:
    command = [BINARY, "-m", model, "-f", text, "-c", str(length), "-t", str(threads)]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    found = re.search(r"Final estimate: PPL = ([\d.]+)", log)
    windows = re.search(r"over (\d+) chunks", log)
    if done.returncode or found is None or windows is None:
        raise RuntimeError(f"llama-perplexity ended with {done.returncode}: {log[-1500:]}")
    return {
        "ok": True,
        "nll": math.log(float(found[1])),
        "tokens": int(windows[1]) * (length - 1 - length // 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--build", action="store_true")
    options = parser.parse_args()
    row: dict[str, object] = {"tool": "llama.cpp", "is_built": BINARY.exists()}
    try:
        if options.build:
            build()
            row |= {"ok": True, "is_built": True}
        elif row["is_built"]:
            row |= perplexity(options.model, options.text, options.length, options.threads)
        else:
            row |= {"ok": False, "error": f"{BINARY} is not there; run this with --build"}
    except Exception as error:
        row |= {"ok": False, "error": f"{type(error).__name__}: {error}"[-2000:]}
    sys.stdout.write(json.dumps(row) + "\n")
    return 0 if row["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
