"""The report of a calibrated run as text: every linear, experts by layer, routing, the totals."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from nybble.calibrate.report import Report, Row, sums

#: The ladder, from what needs most tokens to what needs none.
RUNGS = ("gptq-x", "local", "mse")

Table = tuple[list[str], list[list[str]]]  # its head and its rows


def text(report: Report) -> str:
    """Tables of every linear, of experts by layer, of routing, and the totals."""
    total = sums(report.rows)
    parts = [
        f"calibrated with effort {report.effort} on {report.samples.get('source', '?')}: "
        f"{total.jobs:,} groups of linears, {percent(total.won)} of the held-out loss of "
        f"round-to-nearest gone, {percent(total.won_over_mse)} of the data-free search's",
        _columns(*linears_table(report)),
    ]
    for head, rows in (experts_table(report), routing_table(report)):
        if rows:
            parts.append(_columns(head, rows))
    if report.fallbacks:
        parts.append("\n".join(f"{n:,} x {reason}" for reason, n in report.fallbacks.items()))
    return "\n\n".join(parts) + "\n"


def linears_table(report: Report) -> Table:
    """Each group that is no routed expert's."""
    head = ["module", "linears", "method", "damping", "loss", "absmax", "mse", "won", "tokens"]
    rows = [
        [
            r.place,
            r.leaves,
            r.method + ("*" if r.reason else ""),
            "" if r.damping is None else f"{r.damping:g}",
            *(_loss(r.losses.get(m)) for m in (r.method, "absmax", "mse")),
            percent(sums([r]).won) if sums([r]).judged else "",
            f"{r.tokens:,}",
        ]
        for r in report.rows
        if r.role != "routed_expert"
    ]
    return head, rows


def experts_table(report: Report) -> Table:
    """The experts of each layer, a line for each projection."""
    head = ["experts of", "linears", "number", *RUNGS, "won", "tokens least", "median", "most"]
    groups: dict[tuple[str, str], list[Row]] = {}
    for r in report.rows:
        if r.role == "routed_expert":
            groups.setdefault((r.place, r.leaves), []).append(r)
    rows = []
    for (place, leaves), found in groups.items():
        tokens = sorted(r.tokens for r in found)
        total = sums(found)
        rows.append(
            [
                place,
                leaves,
                f"{len(found):,}",
                *(f"{total.methods.get(rung, 0):,}" for rung in RUNGS),
                percent(total.won),
                *(f"{n:,}" for n in (tokens[0], round(median(tokens)), tokens[-1])),
            ]
        )
    return head, rows


def routing_table(report: Report) -> Table:
    """How far each layer's router does what it did."""
    head = ["router of", "same experts", "tokens with all the same"]
    rows = [[a.layer, percent(a.experts), percent(a.tokens)] for a in report.routing]
    return head, rows


def percent(share: float) -> str:
    """0.735 as 73.5 %."""
    return f"{100 * share:.1f} %"


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned names, right-aligned numbers, two spaces apart."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]
    return "\n".join(lines)
