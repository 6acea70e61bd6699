"""Which back end runs an operation, on which instruction set. Chosen once, said once, obeyed.

`NYBBLE_KERNELS=reference|cpu` and `NYBBLE_ISA=avx512bf16|avx512|avx2|portable` force a choice;
asking for what cannot run raises.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import lru_cache

from nybble.errors import KernelUnavailable
from nybble.kernels.build import load

log = logging.getLogger("nybble")

ISAS = {"portable": 0, "avx2": 1, "avx512": 2, "avx512bf16": 3}


@dataclass(frozen=True, slots=True)
class Choice:
    """The back end, the instruction set of the compiled one, and where its library came from."""

    backend: str  # "cpu" or "reference"
    isa: str  # "" for the reference
    origin: str

    def __str__(self) -> str:
        return f"{self.backend} {self.isa}".strip()


def machine_isas() -> list[str]:
    """Instruction sets the kernels can use on this machine, best first; empty without a library."""
    library = load()
    if library.handle is None:
        return []
    best = int(library.handle.nyb_isa())
    return [name for name, level in sorted(ISAS.items(), key=lambda i: -i[1]) if level <= best]


def choose() -> Choice:
    """The back end and instruction set for this process.

    Raises KernelUnavailable if a forced one cannot run.
    """
    return _choose(os.environ.get("NYBBLE_KERNELS", ""), os.environ.get("NYBBLE_ISA", ""))


@lru_cache(maxsize=8)
def _choose(backend: str, isa: str) -> Choice:
    if backend not in ("", "cpu", "reference"):
        raise KernelUnavailable(
            f"NYBBLE_KERNELS={backend}: unknown back end; choose cpu or reference"
        )
    if isa not in ("", *ISAS):
        raise KernelUnavailable(f"NYBBLE_ISA={isa}: unknown; choose {', '.join(ISAS)}")
    if backend == "reference":
        return Choice("reference", "", "NYBBLE_KERNELS=reference")
    library = load()
    if library.handle is None:
        if backend == "cpu" or isa:
            raise KernelUnavailable(
                f"compiled kernels were asked for and are not there: {library.origin}"
            )
        return Choice("reference", "", library.origin)
    available = machine_isas()
    if isa and isa not in available:
        raise KernelUnavailable(f"NYBBLE_ISA={isa}: this processor offers {', '.join(available)}")
    choice = Choice("cpu", isa or available[0], library.origin)
    log.info("kernels: %s (%s)", choice, choice.origin)
    return choice


def isa_level() -> int:
    """The number that C knows the chosen instruction set by (isa.h)."""
    return ISAS[choose().isa]


def default_threads() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
