"""Draw docs/bytes.svg: the bytes of Qwen3.6-35B-A3B, before and after, from the planner itself.

python docs/make_pictures.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from nybble import plan_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "tests/fixtures/configs/nvidia--Qwen3.6-35B-A3B-NVFP4/config.json"
COLOURS = {
    "routed_expert": ("experts", "#4c78a8"),
    "linear_attention": ("DeltaNet", "#72b7b2"),
    "attention": ("attention", "#54a24b"),
    "lm_head": ("lm_head", "#f58518"),
    "embedding": ("embedding", "#e45756"),
    "mtp": ("MTP head", "#b279a2"),
    "vision": ("vision", "#9d755d"),
    "": ("rest", "#bab0ac"),
}
WIDTH, LEFT, BAR, GAP = 860, 150, 26, 14


def main() -> None:
    """Plan on headers, draw one bar per recipe."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "tests/make_headers.py"), str(CONFIG)]
        subprocess.run(
            [*command, "--out", folder, "--data", "none"], check=True, stdout=subprocess.DEVNULL
        )
        plans = {
            "nvfp4": plan_checkpoint(folder, "nvfp4"),
            "nvfp4, data-free": plan_checkpoint(folder, "nvfp4", data_free=True),
            "nvfp4-all": plan_checkpoint(folder, "nvfp4-all"),
            "fp8": plan_checkpoint(folder, "fp8", layout="compressed-tensors"),
        }
        rows = plans["nvfp4"].rows
        bars = {"BF16": shares((r.role, r.source_bytes) for r in rows)}
        bars |= {name: shares((r.role, r.bytes) for r in p.rows) for name, p in plans.items()}
    (ROOT / "docs" / "bytes.svg").write_text(draw(bars), encoding="utf-8")


def shares(amounts: object) -> dict[str, int]:
    """Bytes by what has a colour."""
    found = dict.fromkeys(COLOURS, 0)
    for role, size in amounts:  # type: ignore[attr-defined]
        role = "routed_expert" if role == "shared_expert" else role
        found[role if role in COLOURS else ""] += size
    return found


def draw(bars: dict[str, dict[str, int]]) -> str:
    """One horizontal stacked bar per line, with its total."""
    most = max(sum(parts.values()) for parts in bars.values())
    scale = (WIDTH - LEFT - 110) / most
    height = len(bars) * (BAR + GAP) + 60
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for i, (name, parts) in enumerate(bars.items()):
        y, x = 10 + i * (BAR + GAP), float(LEFT)
        lines.append(f'<text x="{LEFT - 8}" y="{y + 18}" text-anchor="end">{name}</text>')
        for role, size in parts.items():
            width = size * scale
            lines.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" '
                f'fill="{COLOURS[role][1]}"/>'
            )
            x += width
        total = sum(parts.values())
        lines.append(f'<text x="{x + 6:.1f}" y="{y + 18}">{total / 1e9:.2f} GB</text>')
    x = float(LEFT)
    for label, colour in COLOURS.values():
        y = height - 30
        lines.append(f'<rect x="{x:.0f}" y="{y}" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{x + 16:.0f}" y="{y + 11}">{label}</text>')
        x += 34 + 7.5 * len(label)
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
