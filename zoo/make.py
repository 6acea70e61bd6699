"""Write the zoo: `python zoo/make.py OUT [NAME...]` makes one folder per planted defect.

Each comes from a folder of `zoo/clean` and differs from it in the one thing that its line of
`OUT/zoo.json` says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
CLEAN = HERE / "clean"
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from defects import all_defects  # noqa: E402
from folder import Defect, Folder  # noqa: E402


def make(defect: Defect, out: Path) -> Path:
    """Write one defect's folder; returns it."""
    folder = Folder.read(CLEAN / defect.base)
    if defect.plant:
        defect.plant(folder)
    folder.write(out)
    if defect.after:
        defect.after(out)
    return out


def row(defect: Defect) -> dict[str, object]:
    """What zoo.json says of a defect."""
    return {
        "name": defect.name,
        "rule": defect.rule,
        "summary": defect.summary,
        "base": defect.base,
        "clean": defect.twin,
        "origin": defect.origin,
        "source": defect.source,
        "engine": defect.engine,
        "tensor_parallel": defect.tensor_parallel,
        "severity": defect.severity,
        "repaired": defect.repaired,
        "deep": defect.deep,
    }


def main(arguments: list[str]) -> None:
    if not arguments:
        raise SystemExit(__doc__)
    out, names = Path(arguments[0]), set(arguments[1:])
    chosen = [d for d in all_defects() if not names or d.name in names]
    if names - {d.name for d in chosen}:
        raise SystemExit(f"no such defect: {', '.join(sorted(names - {d.name for d in chosen}))}")
    for defect in chosen:
        make(defect, out / defect.name)
    (out / "zoo.json").write_text(json.dumps([row(d) for d in chosen], indent=2) + "\n")
    sys.stdout.write(f"{len(chosen)} folders in {out}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
