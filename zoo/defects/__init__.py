"""The planted defects, a file per subject of the rules, and their list."""

from __future__ import annotations

import importlib
from pathlib import Path

from folder import Defect


def all_defects() -> list[Defect]:
    """Every defect of every subject file beside this one, by name."""
    found: list[Defect] = []
    for file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        found += importlib.import_module(f"defects.{file.stem}").DEFECTS
    return sorted(found, key=lambda defect: defect.name)
