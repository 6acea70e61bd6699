"""What this process may use of the machine: control groups, versions 1 and 2, and free memory."""

from __future__ import annotations

from pathlib import Path

#: Page cache that a control group counts as used, and gives back when memory is asked for.
_CACHED = ("active_file", "inactive_file", "total_active_file", "total_inactive_file")


def read_lines(path: Path) -> list[str]:
    """The lines of a small file of the system, none if it is not there."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def cgroup_limits(
    proc: Path = Path("/proc"), mount: Path = Path("/sys/fs/cgroup")
) -> tuple[float | None, int | None]:
    """The tightest cgroup limits (versions 1 and 2): cores' worth of time, bytes of memory."""
    quotas: list[float] = []
    limits: list[int] = []
    for folder in _cgroups(proc, mount):
        words = " ".join(read_lines(folder / "cpu.max")).split() or [
            word
            for name in ("quota", "period")
            for word in read_lines(folder / f"cpu.cfs_{name}_us")
        ]
        if len(words) == 2 and words[0] not in ("max", "-1"):
            quotas.append(int(words[0]) / int(words[1]))
        for name in ("memory.max", "memory.limit_in_bytes"):
            limits += [int(line) for line in read_lines(folder / name) if line.isdecimal()]
    # Version 1 writes "no limit" as the largest number of whole pages.
    limits = [limit for limit in limits if limit < 1 << 62]
    return min(quotas, default=None), min(limits, default=None)


def _cgroups(proc: Path, mount: Path) -> list[Path]:
    """The folders of this process's cgroups and of all their parents."""
    found = []
    for line in read_lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        names = [name for name in controllers.split(",") if name in ("cpu", "memory")]
        bases = [mount / name for name in names] if controllers else [mount]
        for base in bases:
            folder = base / path.lstrip("/")
            found += [folder, *(p for p in folder.parents if p == base or base in p.parents)]
    return list(dict.fromkeys(found))


def available_bytes(proc: Path = Path("/proc"), mount: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory that this process may still take: the machine's, and that of its control groups.

    Pages of mapped files count as free: the system takes them back. None where nothing says.
    """
    found = [
        int(line.split()[1]) * 1024
        for line in read_lines(proc / "meminfo")
        if line.startswith("MemAvailable:")
    ]
    for folder in _cgroups(proc, mount):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            words = read_lines(folder / limit)[:1] + read_lines(folder / used)[:1]
            if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal():
                held = int(words[1]) - _cached_bytes(folder)
                found.append(int(words[0]) - max(held, 0))
    return max(min(found), 0) if found else None


def _cached_bytes(folder: Path) -> int:
    rows = dict(line.split(" ", 1) for line in read_lines(folder / "memory.stat") if " " in line)
    names = _CACHED[2:] if _CACHED[2] in rows else _CACHED[:2]
    return sum(int(rows.get(name, "0")) for name in names)
