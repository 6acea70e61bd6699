"""`nybble doctor`: the machine as nybble sees it, to paste into a report.

It changes nothing, except that the kernels are compiled into their cache if that was never done.
Packages that nybble can do without are looked up by their metadata and never imported.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nybble
from nybble.check.known_bad import KnownBad, known_bad
from nybble.errors import KernelUnavailable
from nybble.kernels.build import build, cache_folder, compilers
from nybble.kernels.dispatch import choose, default_threads, machine_isas
from nybble.machine import cgroup_limits, read_lines

#: What nybble imports, and what it never does.
REQUIRED = ("numpy", "ml_dtypes", "safetensors", "typer", "rich")
OPTIONAL = ("gguf", "huggingface_hub", "torch", "transformers", "vllm", "sglang", "tensorrt_llm")
#: Engines of the table of known failures, by the package they come in.
_ENGINES = {"vllm": "vllm", "sglang": "sglang", "tensorrt_llm": "trtllm"}
#: Below these a run of any size is at risk: its buffers need about 0.3 GB.
LOW_MEMORY_BYTES = LOW_DISK_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Environment:
    """What decides how nybble runs here. None: this system does not tell."""

    nybble: str
    python: str
    system: str
    processor: str
    cores: int  # this process may use, by affinity
    cores_installed: int
    cpu_quota: float | None  # cores' worth of time, by cgroup
    instruction_sets: tuple[str, ...]  # the kernels can use here, best first
    kernels: str  # in use: "cpu avx512", "reference", or "none"
    kernels_origin: str
    kernels_compiler: str | None
    compilers: tuple[str, ...]
    memory_total_bytes: int | None
    memory_available_bytes: int | None
    memory_limit_bytes: int | None  # by cgroup
    working_folder_free_bytes: int
    temporary_folder: str
    temporary_folder_free_bytes: int
    cache_folder: str
    cache_is_writable: bool
    packages: dict[str, str | None]  # version; None: not installed
    settings: dict[str, str]  # NYBBLE_* of the environment
    advice: tuple[str, ...]  # what is missing, what it costs, what to do
    known_bad: tuple[KnownBad, ...] = ()  # of the engines that are installed, in their versions

    def as_json(self) -> dict[str, object]:
        """The JSON document `nybble.doctor/1`."""
        rows = [
            {
                "engine": row.engine,
                "id": row.id,
                "symptom": row.symptom,
                "workaround": row.workaround,
                "threads": list(row.threads),
            }
            for row in self.known_bad
        ]
        facts = asdict(replace(self, known_bad=()))
        return {"schema": "nybble.doctor/1", **facts, "known_bad": rows}


def doctor() -> Environment:
    """Look at this machine. Compiles the kernels if that was never done: a few seconds, once."""
    kernels, origin, library = _kernels()
    quota, limit = cgroup_limits()
    total, available = _memory()
    temporary = tempfile.gettempdir()
    facts = Environment(
        nybble=nybble.__version__,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=_system(),
        processor=_processor(),
        cores=default_threads(),
        cores_installed=os.cpu_count() or 1,
        cpu_quota=quota,
        instruction_sets=tuple(machine_isas()) if library else (),
        kernels=kernels,
        kernels_origin=origin,
        kernels_compiler=_compiled_by(library) if library else None,
        compilers=tuple(_compiler_version(tuple(command)) for command in compilers()),
        memory_total_bytes=total,
        memory_available_bytes=available,
        memory_limit_bytes=limit if limit and (total is None or limit < total) else None,
        working_folder_free_bytes=shutil.disk_usage(".").free,
        temporary_folder=temporary,
        temporary_folder_free_bytes=shutil.disk_usage(temporary).free,
        cache_folder=str(cache_folder()),
        cache_is_writable=_is_writable(cache_folder()),
        packages={name: _version(name) for name in (*REQUIRED, *OPTIONAL)},
        settings={k: v for k, v in sorted(os.environ.items()) if k.startswith("NYBBLE_")},
        advice=(),
    )
    return replace(facts, advice=advise(facts), known_bad=_known_bad(facts.packages))


def _known_bad(packages: Mapping[str, str | None]) -> tuple[KnownBad, ...]:
    """What others met with the engines that are installed, whatever the checkpoint."""
    return tuple(
        row
        for package, engine in _ENGINES.items()
        if (found := packages[package]) is not None
        for row in known_bad(engine, found)
    )


def advise(facts: Environment) -> tuple[str, ...]:
    """A line for each thing that is missing: what it costs, and what to do."""
    return (*_kernel_advice(facts), *_resource_advice(facts), *_package_advice(facts))


def _kernels() -> tuple[str, str, Path | None]:
    """The kernels in use, their origin or the reason, and the library's file."""
    if not hasattr(os, "getuid"):
        return "reference", f"no compiled kernels on {sys.platform}: numpy does the work", None
    try:
        choice = choose()
    except KernelUnavailable as error:
        return "none", str(error), build()[0]
    return str(choice), choice.origin, build()[0]


def _compiled_by(library: Path) -> str | None:
    """The compiler that signed the library; None if none did.

    Objects of the C runtime may carry GCC's mark in any library, so clang is looked for first.
    """
    content = library.read_bytes()
    for pattern in (rb"clang version ([\d.]+)", rb"GCC: \([^)\0]*\) ([\d.]+)"):
        if match := re.search(pattern, content):
            return f"{'clang' if pattern.startswith(b'clang') else 'GCC'} {match[1].decode()}"
    return None


@lru_cache(maxsize=8)
def _compiler_version(command: tuple[str, ...]) -> str:
    if "ziglang" in command:
        return f"ziglang {_version('ziglang')}"
    try:
        told = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=2)
    except (OSError, subprocess.TimeoutExpired):
        return f"{' '.join(command)} (does not answer)"
    first = told.stdout.partition("\n")[0]
    found = re.search(r"\d+\.\d+(\.\d+)?", first.rpartition(")")[2] or first)
    return f"{' '.join(command)} {found[0] if found else first}".strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _system() -> str:
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    except (OSError, KeyError):
        release = platform.mac_ver()[0]
        return f"macOS {release}, {kernel}" if release else kernel


def _processor() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        told = subprocess.run(command, capture_output=True, text=True)
        return told.stdout.strip() or platform.machine()
    for line in read_lines(Path("/proc/cpuinfo")):
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "cpu model") and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def _memory() -> tuple[int | None, int | None]:
    """Total and available bytes."""
    kib = {
        line.split(":")[0]: int(line.split()[1])
        for line in read_lines(Path("/proc/meminfo"))
        if line.startswith(("MemTotal:", "MemAvailable:"))
    }
    if "MemTotal" in kib:
        available = kib.get("MemAvailable")
        return kib["MemTotal"] << 10, None if available is None else available << 10
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    except (AttributeError, OSError, ValueError):
        return None, None


def _is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or beside it where it does not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:  # permissions alone do not tell: root has them everywhere, and file systems are read-only
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _kernel_advice(facts: Environment) -> list[str]:
    forced = [
        f"{k}={v}" for k, v in facts.settings.items() if k in ("NYBBLE_KERNELS", "NYBBLE_ISA")
    ]
    best = facts.instruction_sets[0] if facts.instruction_sets else ""
    if facts.kernels == "none":
        return [f"{facts.kernels_origin}. Quantizing stops with this error; unset {forced[0]}"]
    if facts.kernels == "reference" and forced:
        return [
            f"{forced[0]} is set: numpy does the work, hundreds of times slower with the same "
            "result; unset it"
        ]
    if facts.kernels == "reference":
        return [
            f"no compiled kernels ({facts.kernels_origin}): quantizing is hundreds of times "
            "slower, with the same result. Install a C compiler or `pip install ziglang`, then "
            "`nybble kernels build`"
        ]
    if forced and facts.kernels != f"cpu {best}":
        return [f"{forced[-1]} is set, this processor offers {best}: slower, same result; unset it"]
    if best == "portable" and platform.machine() in ("x86_64", "AMD64"):
        return ["this processor has no AVX2: the search for scales is some ten times slower"]
    return []


def _resource_advice(facts: Environment) -> list[str]:
    found = []
    if not facts.cache_is_writable:
        found.append(
            f"the cache {facts.cache_folder} cannot be written: kernels are compiled into the "
            "temporary folder, again whenever that is emptied; set NYBBLE_CACHE to a folder that "
            "lasts"
        )
    if facts.cpu_quota is not None and facts.cpu_quota < facts.cores:
        found.append(
            f"the cgroup gives {facts.cpu_quota:g} cores' time to {facts.cores} cores: more "
            f"threads only take turns; pass --jobs {max(1, round(facts.cpu_quota))}"
        )
    known = [n for n in (facts.memory_available_bytes, facts.memory_limit_bytes) if n is not None]
    if known and min(known) < LOW_MEMORY_BYTES:
        found.append(
            f"only {min(known) / 2**30:.2f} GiB of memory: a run needs about 0.3 GiB of its own "
            "and the rest to keep pages of the source; expect it to be slow, or free some"
        )
    if facts.working_folder_free_bytes < LOW_DISK_BYTES:
        found.append(
            f"only {facts.working_folder_free_bytes / 2**30:.2f} GiB free here: what does not fit "
            "is not started; give an OUT on another disk"
        )
    if sys.platform != "linux":
        found.append(f"{sys.platform}: nybble is tested on Linux only")
    return found


def _package_advice(facts: Environment) -> list[str]:
    missing = [name for name, found in facts.packages.items() if found is None]
    lines = [
        f"{name} is not installed: nybble cannot run without it; `pip install {name}`"
        for name in missing
        if name in REQUIRED
    ]
    if "gguf" in missing:
        lines.append(
            "gguf is not installed: the demo's second model comes as a GGUF file and is left out; "
            "`pip install gguf`"
        )
    return lines
