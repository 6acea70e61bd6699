"""The contest's results as a table and as JSON: what was measured, and who beats whom by how much.

Pairs are compared token by token on the same windows; an interval is of whole windows resampled
(nybble.evaluate.significance). Knows no tool's workings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from scorer import Sizes
from tools import Cost, Tool

from nybble.evaluate.divergence import Divergence, compare_candidates
from nybble.evaluate.score import TokenDivergence
from nybble.evaluate.significance import Comparison, Interval


@dataclass(frozen=True)
class Row:
    """A tool's result; `figures` by precision, the first one is what `stats` sums up. `choices`
    holds what choices.py found, if it was asked."""

    tool: Tool
    cost: Cost
    sizes: Sizes
    figures: Mapping[str, TokenDivergence]
    stats: Divergence
    choices: Mapping[str, object] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """Of `stats`."""
        return next(iter(self.figures))


def against(row: Row, other: Row, precision: str | None = None) -> Comparison:
    """The KL of one held against another's."""
    chosen = precision or row.precision
    return compare_candidates(row.figures[chosen], other.figures[chosen])


def reduction(found: Comparison) -> str:
    """By how much the first is lower, with its interval: "-56 % (-58 .. -54)"."""
    value = 100 * (found.ratio.value - 1)
    return f"{value:+.1f} %{_span(found.ratio.interval)}"


def _span(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f" ({100 * (interval.low - 1):+.1f} .. {100 * (interval.high - 1):+.1f})"


# ---------------------------------------------------------------------------------------- markdown


def markdown(rows: Sequence[Row], model: str) -> str:
    """Two tables: every tool, and our rows against every peer."""
    stats = rows[0].stats
    head = (
        f"{model}: {stats.windows} windows, {stats.tokens:,} tokens, {rows[0].precision}; "
        f"perplexity of BF16 {stats.reference.value:.2f}; base is {rows[0].tool.title}. Brackets: "
        "95 % of paired resamples of windows.\n"
    )
    return "\n".join([head, *_results(rows), "", *_pairs(rows), *_notes(rows), ""])


def _results(rows: Sequence[Row]) -> list[str]:
    others = [p for p in rows[0].figures if p != rows[0].precision]
    more = "".join(f" KL {p} |" for p in others)
    shows_choices = any(row.choices for row in rows)
    more += " choices flipped | accuracy |" if shows_choices else ""
    lines = [
        "| tool | mean KL | against base |"
        " p99.9 | perplexity | top-1 % | bits | MB | CPU s | peak MiB |" + more,
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|" + "--:|" * more.count("|"),
    ]
    for row in rows:
        s = row.stats
        cells = [
            row.tool.title,
            f"{s.kl.value:.5f}",
            "" if row is rows[0] else reduction(against(row, rows[0])),
            f"{s.kl_spread.at(0.999):.3f}",
            f"{s.candidate.value:.2f}",
            f"{100 * s.same_top.value:.2f}",
            f"{row.sizes.bits:.3f}",
            f"{row.sizes.payload_bytes / 1e6:.1f}",
            f"{row.cost.cpu_s:,.0f}",
            f"{row.cost.peak_mib:,.0f}",
            *(f"{row.figures[p].kl.mean():.5f}" for p in others),
        ]
        if shows_choices:
            cells += [_share(row.choices.get(k)) for k in ("flipped", "accuracy")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _share(estimate: object) -> str:
    """Of an estimate in JSON: "12.0 % (9.1 .. 15.2)"."""
    if not isinstance(estimate, dict):
        return ""
    interval = estimate["interval"]
    span = f" ({100 * interval['low']:.1f} .. {100 * interval['high']:.1f})" if interval else ""
    return f"{100 * estimate['value']:.1f} %{span}"


def _pairs(rows: Sequence[Row]) -> list[str]:
    ours = [
        row for row in rows if row.tool.name in ("nybble-fast", "nybble-default", "nybble-best")
    ]
    theirs = [row for row in rows if row not in ours]
    if not ours:
        return []
    lines = [f"| our KL against | {' | '.join(row.tool.title for row in ours)} |"]
    lines.append("|---|" + "--:|" * len(ours))
    for other in theirs:
        cells = [reduction(against(row, other)) for row in ours]
        lines.append(f"| {other.tool.title} | {' | '.join(cells)} |")
    return lines


def _notes(rows: Sequence[Row]) -> list[str]:
    """What llama.cpp put where a width is no multiple of 256."""
    found = [f"- {row.tool.title}: {row.sizes.types}" for row in rows if row.sizes.types]
    return ["", "Types of llama.cpp's linears:", *found] if found else []


# -------------------------------------------------------------------------------------------- JSON


def as_json(rows: Sequence[Row], model: str) -> dict[str, object]:
    """Everything, with every row held against every other."""
    return {
        "schema": "nybble.fidelity-contest/1",
        "model": model,
        "precision": rows[0].precision,
        "windows": rows[0].stats.windows,
        "tokens": rows[0].stats.tokens,
        "reference_perplexity": rows[0].stats.reference.value,
        "rows": [_row_json(row) for row in rows],
        "pairs": [
            {"a": a.tool.name, "b": b.tool.name, **against(a, b).as_json()}
            for a in rows
            for b in rows
            if a is not b
        ],
    }


def _row_json(row: Row) -> dict[str, object]:
    s = row.stats
    return {
        "tool": row.tool.name,
        "title": row.tool.title,
        "kl": {p: float(f.kl.mean()) for p, f in row.figures.items()},
        "kl_interval": None if s.kl.estimate.interval is None else asdict(s.kl.estimate.interval),
        "p999": s.kl_spread.at(0.999),
        "perplexity": s.candidate.value,
        "same_top": s.same_top.value,
        "sizes": asdict(row.sizes),
        "cost": asdict(row.cost),
        "choices": dict(row.choices),
    }
