"""Bytes against divergence: allocations at several sizes beside uniform NVFP4 and llama.cpp.

    scripts/bench fidelity/frontier MODEL --calibration IDS.json --out FOLDER [--targets +0.25,+0.5]

FOLDER is that of a contest (contest.py), whose rows are taken as they are; for each target one more
checkpoint is made with `nybble quantize --calibrate IDS --target-bits`. All are scored on the same
windows by the same scorer (inputs of FP8 linears rounded, as they are served), and sized by what
their files hold: bits a weight of all but embedding, head and norms, and megabytes of everything.
FOLDER keeps frontier.md, frontier.json and frontier.svg. A row of llama.cpp names the types it
substituted where a width is no multiple of 256.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from contest import enter, read_or_make
from scorer import protocol, score, sizes_of, summary
from table import Row, against, reduction
from tools import TOOLS, Task, Tool, ours, prepare_kernels

#: Marks by kind of row, as (colour, shape); a line joins our allocations with their uniform start.
_MARKS = {
    "nybble": ("#1f6feb", "circle"),
    "allocation": ("#d1242f", "circle"),
    "llamacpp": ("#57606a", "square"),
    "peer": ("#9a6700", "square"),
}
_LINE = ("nybble-default", "allocation")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 860, 520, 70, 30, 40, 60
_LABEL_WIDTH, _LABEL_HEIGHT = 150, 13


@dataclass(frozen=True)
class Point:
    """A row of the plot."""

    name: str
    title: str
    kind: str
    bits: float
    megabytes: float
    kl: float
    low: float
    high: float


def allocation(target: str, layout: str, recipe: str) -> Tool:
    """The tool that allocates up to a target."""
    options = ("--calibrate", "IDS", "--target-bits", target, "--layout", layout)
    name = f"allocation-{target.replace('+', 'plus-')}"
    title = f"nybble, {target} bits ({recipe} and wider)"
    return Tool(name, title, ours(*options), "allocation")


def enter_allocation(tool: Tool, task: Task, a: argparse.Namespace) -> Row:
    """Made and scored, its inputs rounded where FP8 linears round them."""
    folder = a.out / tool.name
    cost = read_or_make(tool, task, folder, reuse=True)
    conditions = replace(protocol(a.precision, a.windows, a.threads), simulate=True)
    figures = score(folder / "checkpoint", task.model, conditions, a.out)
    sizes = sizes_of(folder, task.model)
    return Row(tool, cost, sizes, {a.precision: figures}, summary(figures))


def point(row: Row) -> Point:
    """What the plot shows of a row."""
    found = row.stats.kl
    interval = found.estimate.interval
    kind = row.tool.kind if row.tool.kind in _MARKS else "peer"
    return Point(
        row.tool.name,
        row.tool.title,
        kind,
        row.sizes.bits,
        row.sizes.payload_bytes / 1e6,
        found.value,
        interval.low if interval else found.value,
        interval.high if interval else found.value,
    )


def markdown(rows: Sequence[Row], model: str, base: Row) -> str:
    """The table, by size."""
    stats = rows[0].stats
    lines = [
        f"{model}: {stats.windows} windows, {stats.tokens:,} tokens, {rows[0].precision}. Bits are "
        "those a weight of the decoder's linears takes, MB all tensors. Brackets: 95 % of paired "
        f"resamples of windows; base is {base.tool.title}.",
        "",
        "| row | bits | MB | mean KL | against base | p99.9 | top-1 % | types |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in sorted(rows, key=lambda r: (r.sizes.bits, r.stats.kl.value)):
        s = row.stats
        cells = [
            row.tool.title,
            f"{row.sizes.bits:.3f}",
            f"{row.sizes.payload_bytes / 1e6:.1f}",
            f"{s.kl.value:.5f}",
            "" if row is base else reduction(against(row, base)),
            f"{s.kl_spread.at(0.999):.3f}",
            f"{100 * s.same_top.value:.2f}",
            row.sizes.types,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


# -------------------------------------------------------------------------------------------- plot


def plot(points: Sequence[Point], model: str) -> str:
    """An SVG: bits a weight to the right, mean KL upwards on a logarithmic axis."""
    bits, kls = [p.bits for p in points], [v for p in points for v in (p.low, p.high) if v > 0]
    x0, x1 = math.floor(min(bits) * 4 - 0.2) / 4, math.ceil(max(bits) * 4 + 0.4) / 4
    y0, y1 = math.log10(min(kls)) - 0.1, math.log10(max(kls)) + 0.1

    def x(value: float) -> float:
        return _LEFT + (value - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        share = (math.log10(max(value, 10**y0)) - y0) / (y1 - y0)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="15">{escape(model)}: bytes against divergence</text>',
        *_axes(x, y, (x0, x1), (y0, y1)),
    ]
    line = sorted((p for p in points if p.kind == _LINE[1] or p.name == _LINE[0]), key=_bits)
    path = " ".join(f"{x(p.bits):.1f},{y(p.kl):.1f}" for p in line)
    if len(line) > 1:
        colour = _MARKS["allocation"][0]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
    labels = _labels([(x(p.bits), y(p.kl)) for p in points])
    for p, label in zip(points, labels, strict=True):
        parts += _mark(p, x(p.bits), y(p.kl), (y(p.low), y(p.high)), label)
    return "\n".join([*parts, "</svg>", ""])


def _bits(p: Point) -> float:
    return p.bits


def _axes(x: object, y: object, xs: tuple[float, float], ys: tuple[float, float]) -> list[str]:
    assert callable(x)
    assert callable(y)
    floor, ceiling = _HEIGHT - _BOTTOM, _TOP
    parts = []
    step = 0.25 if xs[1] - xs[0] <= 3 else 0.5
    for i in range(round((xs[1] - xs[0]) / step) + 1):
        at = xs[0] + i * step
        parts.append(f'<path d="M{x(at):.1f} {ceiling}V{floor}" stroke="#eaeef2"/>')
        parts.append(f'<text x="{x(at):.1f}" y="{floor + 18}" text-anchor="middle">{at:g}</text>')
    for power in range(math.floor(ys[0]), math.ceil(ys[1]) + 1):
        for digit in (1, 2, 5):
            value = digit * 10.0**power
            if ys[0] <= math.log10(value) <= ys[1]:
                at = y(value)
                parts.append(f'<path d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}" stroke="#eaeef2"/>')
                parts.append(
                    f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>'
                )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 16}" text-anchor="middle">bits a weight of the '
        "decoder's linears</text>"
    )
    parts.append(f'<text x="{_LEFT - 56}" y="{_TOP - 8}">mean KL, nats</text>')
    return parts


def _labels(places: Sequence[tuple[float, float]]) -> list[float]:
    """Where the text of each mark is, so that none lies on another's: each as near as can be below
    those that are above it."""
    found = [y for _, y in places]
    done: list[int] = []
    for i in sorted(range(len(places)), key=lambda i: places[i][1]):
        near = [found[j] for j in done if abs(places[j][0] - places[i][0]) < _LABEL_WIDTH]
        found[i] = max([found[i], *(at + _LABEL_HEIGHT for at in near)])
        done.append(i)
    return found


def _mark(p: Point, x: float, y: float, span: tuple[float, float], label: float) -> list[str]:
    colour, shape = _MARKS[p.kind]
    mark = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
        if shape == "circle"
        else f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>'
    )
    is_far = x > _WIDTH - 190
    anchor, at = ("end", x - 8) if is_far else ("start", x + 8)
    return [
        f'<path d="M{x:.1f} {span[1]:.1f}V{span[0]:.1f}" stroke="{colour}"/>',
        mark,
        f'<text x="{at:.1f}" y="{label + 4:.1f}" text-anchor="{anchor}" fill="{colour}">'
        f"{escape(p.title)}</text>",
    ]


def main() -> None:
    """Make what is missing, score everything, and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="windows of ids")
    parser.add_argument("--out", type=Path, required=True, help="folder of a contest")
    parser.add_argument("--targets", default="+0.125,+0.25,+0.5,+1", help="bits over uniform")
    parser.add_argument("--layout", default="compressed-tensors", help="of the allocations")
    parser.add_argument("--recipe", default="nvfp4-all")
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens")
    parser.add_argument("--precision", default="f32")
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    a.choices, a.reuse = None, True
    a.out.mkdir(parents=True, exist_ok=True)
    prepare_kernels()
    task = Task(a.model.resolve(), a.calibration.resolve(), a.threads, a.recipe)
    wanted = [allocation(t, a.layout, a.recipe) for t in a.targets.split(",") if t]
    made = [name for name in TOOLS if (a.out / name / "cost.json").exists()]
    rows = [enter(name, task, a) for name in dict.fromkeys(["nybble-absmax", *made])]
    rows += [enter_allocation(tool, task, a) for tool in wanted]
    base = rows[0]
    points = [point(row) for row in rows]
    text = markdown(rows, a.model.name, base)
    (a.out / "frontier.md").write_text(text)
    (a.out / "frontier.svg").write_text(plot(points, a.model.name))
    document = {
        "schema": "nybble.fidelity-frontier/1",
        "model": a.model.name,
        "rows": [p.__dict__ for p in points],
    }
    (a.out / "frontier.json").write_text(json.dumps(document, indent=1))
    print(text)


if __name__ == "__main__":
    main()
