"""Under what conditions something was measured: the machine, the versions, and how much of it
others used meanwhile."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import nybble
from nybble.api.doctor import doctor
from nybble.machine import read_lines

#: More than this share of one core taken by others, and a measurement says little.
BUSY_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class Conditions:
    """`others_share` is how much of one core other processes used, on average; None where the
    system does not tell."""

    nybble: str
    commit: str  # "" outside a checkout; a + where files differ from it
    python: str
    torch: str | None
    system: str
    processor: str
    cores: int
    instruction_set: str
    threads: int
    others_share: float | None

    @property
    def is_disturbed(self) -> bool:
        """Others took so much that the figures say little."""
        return self.others_share is not None and self.others_share > BUSY_SHARE

    def __str__(self) -> str:
        """One line to paste."""
        version = f"nybble {self.nybble}" + (f" ({self.commit})" if self.commit else "")
        others = "unknown" if self.others_share is None else f"{100 * self.others_share:.0f} %"
        return (
            f"{version}, {self.python}, torch {self.torch}; {self.processor}, {self.cores} cores, "
            f"{self.instruction_set}, {self.system}; {self.threads} threads; other processes: "
            f"{others} of one core"
        )


def conditions(threads: int, others_share: float | None) -> Conditions:
    """This machine now."""
    found = doctor()
    return Conditions(
        nybble=found.nybble,
        commit=_commit(Path(nybble.__file__).parents[2]),
        python=found.python,
        torch=found.packages["torch"],
        system=found.system,
        processor=found.processor,
        cores=found.cores,
        instruction_set=found.kernels,
        threads=threads,
        others_share=others_share,
    )


def _commit(root: Path) -> str:
    if not (root / ".git").exists():
        return ""
    try:
        told = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout.strip()


@dataclass(slots=True)
class Watch:
    """From when it is made: what part of one core processes other than this one and its children
    that ended have used."""

    began: float = field(default_factory=time.monotonic)
    own: float = field(default_factory=lambda: sum(os.times()[:4]))
    busy: float | None = field(default_factory=lambda: _busy_seconds())

    def others_share(self) -> float | None:
        """0: alone; 1: one whole core. None where the system does not tell."""
        busy, wall = _busy_seconds(), time.monotonic() - self.began
        if busy is None or self.busy is None or wall <= 0:
            return None
        return max(0.0, (busy - self.busy) - (sum(os.times()[:4]) - self.own)) / wall


def _busy_seconds(stat: Path = Path("/proc/stat")) -> float | None:
    """CPU seconds that all processes of the machine have used; waiting is not using."""
    for line in read_lines(stat):
        name, *rest = line.split()
        if name == "cpu":
            user, nice, system, _, _, irq, softirq = map(int, rest[:7])
            return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return None
