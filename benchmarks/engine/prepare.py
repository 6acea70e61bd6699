"""Make the checkpoints and GGUF files of these benchmarks: 15 GB, and ten minutes for llama.cpp.

    python benchmarks/engine/prepare.py FOLDER [--only llama-1b,smollm2,moe]

SmolLM2 comes from the package registry, the others are random. Each is there in BF16 and, by
`nybble quantize -r nvfp4-all --data-free`, in NVFP4; the dense ones also as GGUF: BF16 and NVFP4 by
llama.cpp's converter, Q4_0 by llama-quantize. What is there already is left alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from contest import PEERS, ROOT, environment_of

from nybble.kernels.build import cache_folder

NAMES = ("smollm2", "llama-1b", "moe")


def run(*command: object) -> None:
    """Show a command, and run it."""
    shown = [str(part) for part in command]
    print("+", *shown, flush=True)
    subprocess.run(shown, check=True, stdout=subprocess.DEVNULL)


def make_smollm2(out: Path) -> None:
    """Download, as the demo does, and decode."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from demo import fetch

    run(sys.executable, ROOT / "examples" / "smollm2.py", fetch(cache_folder() / "smollm2"), out)


def make(name: str, folder: Path) -> Path:
    """The BF16 checkpoint."""
    out = folder / name
    if out.exists():
        return out
    if name == "smollm2":
        make_smollm2(out)
    elif name == "llama-1b":
        run(sys.executable, ROOT / "benchmarks/make_random_llama.py", out, folder / "smollm2")
    else:
        run(sys.executable, ROOT / "benchmarks/make_hybrid_moe.py", out)
    return out


def pack(bf16: Path) -> Path:
    """The NVFP4 checkpoint."""
    out = bf16.with_name(f"{bf16.name}-nvfp4")
    if not out.exists():
        search = "mse" if bf16.name == "smollm2" else "absmax"  # random weights: as fast either way
        quantize = [sys.executable, "-m", "nybble", "quantize", bf16, out, "-r", "nvfp4-all"]
        run(*quantize, "--data-free", "--search", search)
    return out


def convert(folder: Path) -> None:
    """A GGUF beside a checkpoint."""
    out = folder.with_suffix(".gguf")
    if not out.exists():
        python = environment_of("llamacpp")
        run(python, ROOT / "peers" / "llamacpp_convert.py", folder, out)


def quantize_gguf(bf16: Path) -> None:
    """Q4_0 beside a BF16 GGUF."""
    out = bf16.with_name(f"{bf16.stem}-q4_0.gguf")
    if not out.exists():
        run(sys.executable, ROOT / "peers" / "run_llamacpp_bench.py", "--build")
        program = PEERS / "llamacpp" / "build" / "bin" / "llama-quantize"
        run(program, bf16, out, "Q4_0")


def main() -> None:
    """Make all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(NAMES))
    a = parser.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    for name in a.only.split(","):
        if name not in NAMES:
            sys.exit(f"{name!r}: choose from {', '.join(NAMES)}")
        if name == "llama-1b":
            make("smollm2", a.folder)  # its tokenizer
        bf16 = make(name, a.folder)
        packed = pack(bf16)
        if name == "moe":
            continue  # vision tower: llama.cpp's converter would want its own file
        convert(bf16)
        convert(packed)
        quantize_gguf(bf16.with_suffix(".gguf"))


if __name__ == "__main__":
    main()
