"""`nybble doctor`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.cli.output import JsonFlag, OutputFormat, gib, wants_json

if TYPE_CHECKING:
    from nybble.api.doctor import Environment


def command(json: JsonFlag = False, output_format: OutputFormat = "text") -> None:
    """Describe this machine as nybble sees it, to paste into a report."""
    from nybble.api.doctor import doctor
    from nybble.cli.output import write_json
    from nybble.progress import waiting

    as_json = wants_json(json, output_format)
    with waiting("compiling the kernels, once"):
        found = doctor()
    if as_json:
        write_json(found.as_json())
    else:
        sys.stdout.write(render(found))


def render(found: Environment) -> str:
    """The environment as text, without the name of the home folder."""
    from nybble.api.doctor import REQUIRED

    rows = {
        "nybble": found.nybble,
        "python": found.python,
        "system": found.system,
        "processor": f"{found.processor}; {_cores(found)}",
        "kernels": f"{found.kernels}{_of(found)}",
        "library": found.kernels_origin
        + (f" ({found.kernels_compiler})" if found.kernels_compiler else ""),
        "compilers": ", ".join(found.compilers) or "none found",
        "memory": _memory(found),
        "disk": f"{gib(found.working_folder_free_bytes)} GiB free here, "
        f"{gib(found.temporary_folder_free_bytes)} GiB in {found.temporary_folder}",
        "cache": found.cache_folder + (", writable" if found.cache_is_writable else ", read-only"),
        "packages": _versions(found, REQUIRED),
        "optional": _optional(found),
        "settings": " ".join(f"{k}={v}" for k, v in found.settings.items()) or "none",
    }
    lines = [f"{name:<11}{value}" for name, value in rows.items()]
    lines += [f"{'note':<11}{line}" for line in found.advice]
    lines += [
        f"{'known bad':<11}{row.engine}: {row.symptom} {row.workaround} {row.threads[0]}"
        for row in found.known_bad
    ]
    return "\n".join(lines).replace(str(Path.home()), "~") + "\n"


def _cores(found: Environment) -> str:
    text = f"{found.cores} of {found.cores_installed} cores usable"
    return text if found.cpu_quota is None else f"{text}, cgroup quota {found.cpu_quota:g}"


def _of(found: Environment) -> str:
    return f", of {', '.join(found.instruction_sets)}" if found.instruction_sets else ""


def _memory(found: Environment) -> str:
    parts = [
        f"{gib(size)} GiB {what}"
        for size, what in (
            (found.memory_total_bytes, "in all"),
            (found.memory_available_bytes, "available"),
            (found.memory_limit_bytes, "allowed by the cgroup"),
        )
        if size is not None
    ]
    return ", ".join(parts) or "unknown"


def _versions(found: Environment, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {found.packages[name]}" for name in names if found.packages[name])


def _optional(found: Environment) -> str:
    """What is there, and that what is not is not missed."""
    from nybble.api.doctor import OPTIONAL

    parts = [_versions(found, OPTIONAL)]
    absent = [name for name in OPTIONAL if not found.packages[name] and name != "gguf"]
    if absent:
        parts.append(f"not installed, and nybble needs none of them: {', '.join(absent)}")
    return "; ".join(part for part in parts if part)
