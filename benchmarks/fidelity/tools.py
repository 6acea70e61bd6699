"""Who takes part in the contest, and how each makes a checkpoint of a model.

Every tool is a process of its own, so that its CPU seconds and its memory are its own. It leaves
FOLDER/checkpoint, which nybble opens, and FOLDER/cost.json. Knows no text and no score.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import nybble

ROOT = Path(__file__).resolve().parents[2]
#: Where this process has nybble from: its children take the same.
SOURCE = str(Path(nybble.__file__).resolve().parents[1])
PEERS = Path(os.environ.get("NYBBLE_PEERS", Path.home() / ".cache" / "nybble" / "peers"))


@dataclass(frozen=True)
class Task:
    """What a tool is given: a model, calibration windows (tokens.py) and threads."""

    model: Path
    ids: Path
    threads: int
    recipe: str


Commands = Callable[[Task, Path], Sequence[Sequence[str | Path]]]


@dataclass(frozen=True)
class Tool:
    """`commands` make the folder of the second argument; the last of them, what it weighs."""

    name: str
    title: str
    commands: Commands
    kind: str = "nybble"


@dataclass(frozen=True)
class Cost:
    """What making a checkpoint took: all processes' CPU seconds and the largest one's memory."""

    cpu_s: float
    wall_s: float
    peak_mib: float
    threads: int


def ours(*options: str) -> Commands:
    """Our own command, with the weights-only recipe of the task."""

    def commands(task: Task, out: Path) -> list[list[str | Path]]:
        given = [str(task.ids) if option == "IDS" else option for option in options]
        command: list[str | Path] = [sys.executable, "-m", "nybble", "quantize", task.model, out]
        return [[*command, "-r", task.recipe, "-j", str(task.threads), *given]]

    return commands


def peer(environment: str, script: str, *options: str) -> Commands:
    """A script of peers/ in the environment of its tool."""

    def commands(task: Task, out: Path) -> list[list[str | Path]]:
        given = [str(task.ids) if option == "IDS" else option for option in options]
        return [[python_of(environment), ROOT / "peers" / script, task.model, out, *given]]

    return commands


def llamacpp(kind: str, *options: str) -> Commands:
    """llama-quantize of a GGUF of the model, decoded by llama.cpp again and read as BF16."""

    def commands(task: Task, out: Path) -> list[list[str | Path]]:
        program = PEERS / "llamacpp" / "build" / "bin" / "llama-quantize"
        source, packed = task.model.with_suffix(".gguf"), out.with_suffix(".gguf")
        plain = out.with_suffix(".f32.gguf")
        threads = str(task.threads)
        return [
            [program, *options, source, packed, kind, threads],
            [program, "--allow-requantize", packed, plain, "F32", threads],
            [sys.executable, "-m", "nybble", "convert", plain, out, "--to", "bf16"],
        ]

    return commands


def python_of(environment: str) -> Path:
    """The interpreter of a peer's environment."""
    python = PEERS / environment / "bin" / "python"
    if not python.exists():
        sys.exit(f"{environment} is not installed: scripts/peers install {environment}")
    return python


def _modelopt(recipe: str, *options: str) -> Commands:
    return peer("modelopt", "run_modelopt.py", recipe, *options)


#: Keeps embedding and head as they are, as the contest has it for all others.
_LINEARS_ONLY = ("--token-embedding-type", "bf16", "--output-tensor-type", "bf16")

_ALL = (
    Tool("nybble-absmax", "nybble, absmax", ours("--data-free", "--search", "absmax")),
    Tool("nybble-four-six", "nybble, four-six", ours("--data-free", "--search", "four-six")),
    Tool("nybble-mse", "nybble, exact MSE", ours("--data-free", "--search", "mse")),
    *(
        Tool(
            f"nybble-{effort}",
            f"nybble, calibrated ({effort})",
            ours("--calibrate", "IDS", "--effort", effort),
        )
        for effort in ("fast", "default", "best")
    ),
    Tool("modelopt-max", "ModelOpt, max", _modelopt("w4a16_max"), "modelopt"),
    Tool("modelopt-mse", "ModelOpt, MSE", _modelopt("w4a16_mse"), "modelopt"),
    Tool(
        "modelopt-lh",
        "ModelOpt, local Hessian",
        _modelopt("w4a16_local_hessian", "--ids", "IDS"),
        "modelopt",
    ),
    Tool(
        "llmcompressor-gptq",
        "llm-compressor, GPTQ",
        peer(
            *("llmcompressor", "run_llmcompressor.py", "gptq_nvfp4a16"),
            *("--ids", "IDS", "--dtype", "float32"),
        ),
        "llmcompressor",
    ),
    Tool(
        "autoround-50",
        "AutoRound, 50 iterations",
        peer(
            *("autoround", "run_autoround.py", "--ids", "IDS"),
            *("--iterations", "50", "--batch", "2"),
        ),
        "autoround",
    ),
    *(
        Tool(
            f"llamacpp-{kind.lower()}{suffix}",
            f"llama.cpp, {kind}{'' if suffix else ' (all)'}",
            llamacpp(kind, *options),
            "llamacpp",
        )
        for kind in ("Q4_0", "IQ4_NL", "Q4_K_M", "Q5_K_M")
        for suffix, options in (("-linears", _LINEARS_ONLY), ("", ()))
    ),
)
TOOLS = {tool.name: tool for tool in _ALL}


def prepare_kernels() -> None:
    """Compile our kernels where that was not done: no cost of quantizing."""
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    command = [sys.executable, "-m", "nybble", "kernels", "build"]
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)


def prepare_gguf(model: Path) -> Path:
    """The GGUF of a model that llama-quantize begins with."""
    out = model.with_suffix(".gguf")
    if not out.exists():
        script = ROOT / "peers" / "llamacpp_convert.py"
        subprocess.run([python_of("llamacpp"), script, model, out], check=True)
    program = PEERS / "llamacpp" / "build" / "bin" / "llama-quantize"
    if not program.exists():
        runner = ROOT / "peers" / "run_llamacpp_bench.py"
        subprocess.run([sys.executable, runner, "--build"], check=True)
    return out


def make(tool: Tool, task: Task, folder: Path) -> Cost:
    """Run a tool: FOLDER/checkpoint and FOLDER/cost.json. What was there is replaced.

    Only the first command is the tool's cost; the rest makes its file readable here.
    """
    if tool.kind == "llamacpp":
        prepare_gguf(task.model)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    costs = []
    with (folder / "log.txt").open("wb") as log:
        for command in tool.commands(task, folder / "checkpoint"):
            costs.append(run(command, log.fileno(), task.threads))
    _flatten(folder / "checkpoint")
    (folder / "checkpoint.f32.gguf").unlink(missing_ok=True)
    (folder / "cost.json").write_text(json.dumps(asdict(costs[0])))
    return costs[0]


def run(command: Sequence[str | Path], log: int, threads: int) -> Cost:
    """One process; exits with the log's place if it fails."""
    shown = [str(part) for part in command]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = SOURCE if shown[0] == sys.executable else ""
    began = time.monotonic()
    process = subprocess.Popen(shown, stdout=log, stderr=log, env=environment)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        target = os.readlink(f"/proc/self/fd/{log}")
        sys.exit(f"{' '.join(shown)}\nended with {process.returncode}; see {target}")
    return Cost(
        round(used.ru_utime + used.ru_stime, 1),
        round(time.monotonic() - began, 1),
        round(used.ru_maxrss / 1024),
        threads,
    )


def _flatten(checkpoint: Path) -> None:
    """AutoRound writes into a folder inside the one it was given."""
    if (checkpoint / "config.json").exists():
        return
    found = list(checkpoint.glob("*/config.json"))
    if len(found) != 1:
        sys.exit(f"{checkpoint}: no checkpoint there, but {len(found)} in folders of it")
    for file in found[0].parent.iterdir():
        file.rename(checkpoint / file.name)
