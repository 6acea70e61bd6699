"""What `nybble perplexity`, `nybble eval` and `nybble reference` print."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nybble.api.acceptance import AcceptanceResult
    from nybble.api.evaluate import EvalResult, PerplexityResult, ReferenceResult
    from nybble.evaluate.divergence import Figure
    from nybble.evaluate.significance import Interval


def render_perplexity(found: PerplexityResult) -> str:
    """One figure, and what it depends on."""
    from nybble.cli.output import labelled

    p, c = found.perplexity, found.report.conditions
    per_byte = f", {p.bits_per_byte:.4f} bits per byte" if p.bits_per_byte is not None else ""
    lines = [
        labelled("perplexity", f"{p.value:.4f}{_between(p.interval)}{per_byte}"),
        labelled(
            "text",
            f"{c.text}, {c.scored:,} of {c.tokens:,} tokens scored in {c.windows:,} windows of "
            f"{c.length} ({c.convention})",
        ),
        labelled(
            "computed",
            f"activations {c.precision}, KV cache {c.kv_dtype}, simulated inputs: {c.activations}; "
            f"{c.kernels} {c.isa}".rstrip()
            + f", {c.threads} threads, {found.seconds:.1f} s "
            f"({c.tokens / max(found.seconds, 1e-9):,.0f} tokens/s)",
        ),
        *(labelled("note", note) for note in found.notes),
    ]
    return "\n".join(lines) + "\n"


def render_divergence(found: EvalResult) -> str:
    """The figures that matter, with intervals, and what they depend on."""
    from nybble.cli.output import labelled, table

    d, c = found.divergence, found.report.conditions
    rows = [
        ["KL, mean (nats)", f"{d.kl.value:.6f}", _range(d.kl)],
        *(
            [f"KL, {_percentile(at)}", f"{value:.6f}", ""]
            for at, value in d.kl_spread.quantiles
            if at in (0.5, 0.9, 0.99, 0.999)
        ),
        ["KL, largest", f"{d.kl_spread.maximum:.6f}", ""],
        ["same top token", f"{d.same_top.value:.2%}", _range(d.same_top, percent=True)],
        ["change of p, RMS", f"{d.rms_delta_p.value:.2%}", _range(d.rms_delta_p, percent=True)],
        ["perplexity", f"{d.candidate.value:.4f}", _interval(d.candidate.interval)],
        ["perplexity, reference", f"{d.reference.value:.4f}", _interval(d.reference.interval)],
        ["ratio of perplexities", f"{d.ratio.value:.5f}", _range(d.ratio)],
    ]
    lines = [
        table(["", c.model, "95 % interval"], rows, right=(1,)),
        "",
        labelled("reference", f"{c.reference}"),
        labelled(
            "text",
            f"{c.text}, {c.scored:,} of {c.tokens:,} tokens scored in {c.windows:,} windows of "
            f"{c.length} ({c.convention}); intervals resample windows"
            + ("" if c.windows >= 64 else f", and {c.windows} are few: they are too narrow"),
        ),
        labelled(
            "computed",
            f"activations {c.precision}, KV cache {c.kv_dtype}, simulated inputs: {c.activations}; "
            f"{c.kernels} {c.isa}".rstrip()
            + f", {c.threads} threads, {found.seconds:.1f} s",
        ),
        *(labelled("note", note) for note in found.notes),
    ]
    return "\n".join(lines) + "\n"


def render_drafts(found: AcceptanceResult) -> str:
    """How often the head's first guess is the trunk's own choice, before and after."""
    from nybble.cli.output import labelled, table

    lines = [
        "",
        table(["drafts of the MTP head", "with 95 % interval"], found.change.rows(), right=(1,)),
        "",
        labelled(
            "drafts",
            f"one guess at each position of {found.windows:,} windows of {found.text}; of answers "
            f"that the model writes itself, engines accept more; {found.seconds:.1f} s",
        ),
    ]
    return "\n".join(lines) + "\n"


def render_reference(found: ReferenceResult) -> str:
    """What was made, and what it is good for."""
    from nybble.cli.output import amount, labelled

    c = found.conditions
    head = "with the output head" if found.has_head else "without the output head (needs --head)"
    lines = [
        labelled("pack", f"{found.out}: {amount(found.nbytes)}, {head}, {found.seconds:.1f} s"),
        labelled(
            "holds",
            f"final hidden states of {c.model} on {c.tokens:,} tokens of {c.text} in {c.windows:,} "
            f"windows of {c.length} ({c.convention}); perplexity {found.perplexity.value:.4f}",
        ),
        labelled(
            "use",
            f"nybble eval CKPT --reference {found.out}"
            + ("" if found.has_head else " --head MODEL"),
        ),
    ]
    return "\n".join(lines) + "\n"


def _percentile(fraction: float) -> str:
    return "median" if fraction == 0.5 else f"{100 * fraction:g} % below"


def _between(interval: Interval | None) -> str:
    return "" if interval is None else f" ({interval.low:.4f} to {interval.high:.4f})"


def _interval(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.low:.4f} to {interval.high:.4f}"


def _range(figure: Figure, *, percent: bool = False) -> str:
    interval = figure.estimate.interval
    if interval is None:
        return ""
    spell = "{:.2%}" if percent else "{:.6f}"
    return f"{spell.format(interval.low)} to {spell.format(interval.high)}"
