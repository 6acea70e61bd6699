"""What `nybble quantize` prints of its result: the audit, and what was measured and calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nybble.api.quantize import Result


def render(result: Result) -> str:
    """What the audit found."""
    from nybble.api.plan import totals
    from nybble.cli.output import amount, labelled, table

    checked = result.audit
    if checked is None:
        return labelled("dry run", f"nothing written to {result.out}") + "\n"
    source = totals(result.plan).source_bytes
    head = ["role", "scheme", "modules", "SQNR dB", "worst", "in module"]
    rows = [
        [
            e.role,
            e.scheme,
            f"{e.modules:,}",
            f"{e.sqnr_db:.2f}",
            f"{e.worst_db:.2f}",
            e.worst_module,
        ]
        for e in checked.errors
    ]
    copied = ", ".join(f"{role} {n:,}" for role, n in sorted(checked.copied_by_role.items()))
    lines = [
        "",
        f"{result.out}: {'' if result.was_finished else 'written and '}opened again",
        table(head, rows, right=(2, 3, 4)),
        *_input_scales(result),
        *_kv_scales(result),
        *_calibration(result),
        labelled(
            "verified",
            f"{checked.tensors:,} tensors, {checked.payload_bytes:,} bytes as planned; scales "
            f"finite and positive; {checked.sqnr_db:.2f} dB over all quantized weights"
            f"{'' if result.was_finished else f' ({result.search})'}",
        ),
        labelled("checked", _findings(result)),
        labelled("identical", f"{checked.copied:,} copied tensors byte for byte: {copied}"),
        labelled("size", f"{amount(source)} -> {amount(checked.payload_bytes)}"),
        labelled(
            "time",
            f"{_work(result, source)}, {result.audit_seconds:.1f} s to verify "
            f"({result.audit_cpu_seconds:.1f} CPU s); {result.kernels}, {result.threads} threads",
        ),
    ]
    if checked.all_zero:
        lines.append(
            labelled(
                "warning",
                f"{len(checked.all_zero):,} modules are zeros in the source itself, "
                f"{checked.all_zero[0]} for one: an interrupted download looks like that",
            )
        )
    return "\n".join(lines) + "\n"


def _work(result: Result, source_bytes: int) -> str:
    if result.was_finished:
        return "nothing to do, an earlier run had written all"
    speed = source_bytes / max(result.seconds, 1e-9) / 1e9
    return (
        f"{result.seconds:.1f} s to quantize ({speed:.2f} GB/s of source, "
        f"{result.cpu_seconds:.1f} CPU s)"
    )


def _findings(result: Result) -> str:
    """What the rules of check say: the worst by name, the rest by number."""
    from nybble.api.check import Severity

    worse = [f for f in result.findings if f.severity > Severity.NOTE]
    notes = len(result.findings) - len(worse)
    said = "; ".join(
        f"{f.rule.id} {f'in {f.engine}' if f.engine else f.severity}: {f.message}"
        for f in worse[:3]
    )
    more = f" and {len(worse) - 3} more" if len(worse) > 3 else ""
    return (
        said or "no error, no warning"
    ) + f"{more}; {notes} notes (nybble check {result.out} --source {result.plan.checkpoint.path})"


def _input_scales(result: Result) -> list[str]:
    """How the input scales were measured; no line where there are none."""
    from nybble.cli.output import labelled

    scales, checked = result.input_scales, result.audit
    if scales is None:
        if checked is None or not checked.input_scales:
            return []
        found = f"{checked.input_scales:,} modules, finite, positive, equal in fused groups"
        return [labelled("input scales", f"{found}; not measured by this run")]
    when = "as the interrupted run measured them"
    if result.measure_seconds:
        when = f"measured in {result.measure_seconds:.1f} s"
    # Blocks of NVFP4 inputs may leave room that costs nothing; FP8 has no blocks.
    or_more = " or more" if any(j.scheme.activation == "FP4" for j in result.plan.jobs) else ""
    text = (
        f"{len(scales.values):,} modules, largest magnitudes on {scales.tokens:,} tokens times "
        f"{scales.headroom:g}{or_more}, {when} ({scales.calibration})"
    )
    if by_layer := scales.fallbacks_by_layer:
        most = max(by_layer, key=lambda layer: by_layer[layer])
        text += (
            f"; {len(scales.fallbacks):,} modules of experts without a token took the maximum of "
            f"their layer (most in {most}: {by_layer[most]:,})"
        )
    return [labelled("input scales", text)]


def _kv_scales(result: Result) -> list[str]:
    """The scales of an FP8 KV cache; no line where they were not asked for."""
    from nybble.cli.output import labelled

    layers = [row for row in result.kv_scales if _number(row, "layer") >= 0]
    if not layers:
        return []
    found = [_number(row, kind) for row in layers for kind in ("k_scale", "v_scale")]
    apart = [scale for scale in found if scale != 1]
    said = (
        f"{len(apart):,} are not 1: {min(apart):g} to {max(apart):g}"
        if apart
        else "all 1: nothing saturates or vanishes without"
    )
    text = f"{len(layers):,} layers, two each; {said}"
    if all("k_amax" in row for row in layers):
        key, value = (max(_number(r, name) for r in layers) for name in ("k_amax", "v_amax"))
        text += f"; keys up to {key:.3g}, values up to {value:.3g}"
    return [labelled("KV scales", text)]


def _number(row: Mapping[str, object], name: str) -> float:
    value = row[name]
    assert isinstance(value, (int, float))
    return value


def _calibration(result: Result) -> list[str]:
    """What calibration won, by role; no line where nothing was calibrated."""
    from nybble.calibrate.report import sums
    from nybble.calibrate.report_tables import RUNGS, percent
    from nybble.cli.output import amount, labelled, table

    report = result.calibration
    if report is None or not report.rows:
        return []
    head = ["calibrated", "scheme", "groups", *RUNGS, "loss", "absmax", "mse", "won"]
    rows = []
    for (role, scheme), found in report.by_role().items():
        total = sums(found)
        if not total.judged and not total.methods.keys() & set(RUNGS):
            continue  # made without text: another format
        losses = (f"{x / max(total.judged, 1):.5f}" for x in (total.loss, total.absmax, total.mse))
        counts = (f"{total.methods.get(rung, 0):,}" for rung in RUNGS)
        rows.append([role, scheme, f"{total.jobs:,}", *counts, *losses, percent(total.won)])
    total = sums(report.rows)
    lines = [
        "",
        table(head, rows, right=range(2, len(head))),
        labelled(
            "calibration",
            f"effort {report.effort} on {report.tokens_said}: {percent(total.won)} of the held-out "
            f"loss of round-to-nearest gone, {percent(total.won_over_mse)} of the data-free "
            f"search's; every linear in {result.out / 'report.txt'}",
        ),
    ]
    if report.routing:
        worst = min(report.routing, key=lambda a: a.experts)
        mean = sum(a.experts for a in report.routing) / len(report.routing)
        lines.append(
            labelled(
                "routing",
                f"routers choose {percent(mean)} of the experts they chose before; least in "
                f"{worst.layer}: {percent(worst.experts)}",
            )
        )
    if report.fallbacks:
        said = "; ".join(f"{n:,} x {why}" for why, n in list(report.fallbacks.items())[:3])
        lines.append(labelled("fallbacks", said))
    if result.planned_bytes:
        lines.append(
            labelled(
                "memory",
                f"{amount(result.planned_bytes)} were planned beside the program and mapped files; "
                f"{amount(result.peak_bytes)} resident at most, both included",
            )
        )
    return lines
