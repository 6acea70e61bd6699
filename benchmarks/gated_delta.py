"""Speed of the kernels of a gated DeltaNet layer, beside transformers' on the same inputs.

    python benchmarks/gated_delta.py [--runs 9] [--threads N] [--json]

The shapes are those of Qwen3.6-35B-A3B: 16 key heads, 32 value heads of 128, 8192 channels, width
2048. Ours and theirs take turns, so that a busy neighbour slows both; medians of wall time. The
reference is float32 too, with torch's own threads. GFLOP/s counts what the chunked form here
multiplies; GB/s the state, read and written once per token.

A decode step is measured as the engine runs it: the mixers of many layers are recorded and
replayed, so that every state comes from memory. Beside it, the limit: the same states multiplied in
place by torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nybble.kernels import dispatch, elementwise
from nybble.kernels.compute import Compute
from nybble.kernels.elementwise import reference
from nybble.kernels.gated_delta import CHUNK, causal_conv, decay, gated_delta
from nybble.kernels.program import Program

HK, HV, D, TAPS, WIDTH = 16, 32, 128, 4, 2048
HEADS = {"key_heads": HK, "value_heads": HV, "key_dim": D, "value_dim": D}
CHANNELS = (2 * HK + HV) * D
Call = Callable[[], object]


def seconds(calls: list[Call], runs: int) -> list[float]:
    """Median of each, taking turns, after a warm-up."""
    taken: list[list[float]] = [[] for _ in calls]
    for turn in range(runs + 2):
        for call, mine in zip(calls, taken, strict=True):
            repeat = 1
            while True:
                start = time.perf_counter()
                for _ in range(repeat):
                    call()
                spent = time.perf_counter() - start
                if spent > 2e-3:
                    break
                repeat *= 4
            if turn >= 2:
                mine.append(spent / repeat)
    return [statistics.median(t) for t in taken]


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def written(slot: int, tokens: int) -> Tensor:
    """The last state of one sequence goes to a slot."""
    return numbers(*[-1] * (tokens - 1), slot)


def theirs(mixed: Tensor, g: Tensor, beta: Tensor, state: Tensor, is_recurrent: bool) -> object:
    """transformers' function on the same tokens: one sequence, state carried."""
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as peer

    rule = (
        peer.torch_recurrent_gated_delta_rule if is_recurrent else peer.torch_chunk_gated_delta_rule
    )
    q, k, v = mixed[None].split([HK * D, HK * D, HV * D], dim=-1)
    return rule(
        q.unflatten(-1, (HK, D)),
        k.unflatten(-1, (HK, D)),
        v.unflatten(-1, (HV, D)),
        g=g[None],
        beta=beta[None],
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )


def delta_calls(tokens: int, is_recurrent: bool, compute: Compute) -> tuple[Call, Call]:
    """Ours and theirs on one random sequence."""
    mixed = torch.randn(tokens, CHANNELS)
    g, beta = -torch.rand(tokens, HV), torch.rand(tokens, HV)
    state = torch.zeros(1, HV, D, D)
    place = (numbers(0, tokens), numbers(CHUNK), numbers(0), written(0, tokens))
    recurrent = numbers(is_recurrent)

    def ours() -> Tensor:
        return gated_delta(
            mixed, g, beta, state, *place, **HEADS, recurrent=recurrent, compute=compute
        )

    return ours, partial(theirs, mixed, g, beta, torch.zeros(1, HV, D, D), is_recurrent)


def others(tokens: int, compute: Compute) -> dict[str, tuple[Call, Call]]:
    """The operations around it, and what torch offers for each."""
    x, weight = torch.randn(tokens, CHANNELS), torch.randn(CHANNELS, TAPS)
    conv_state = torch.zeros(1, TAPS - 1, CHANNELS)
    place = (numbers(0, tokens), numbers(CHUNK), numbers(0), written(0, tokens))
    a, b, vector = torch.randn(tokens, HV), torch.randn(tokens, HV), torch.randn(HV)
    hidden, norm = torch.randn(tokens, WIDTH), torch.randn(WIDTH)
    heads, head_norm = torch.randn(tokens, HV, D), torch.randn(D)
    z = torch.randn(tokens, HV, D)
    query, angle = torch.randn(tokens, 16, 256), torch.randn(tokens, 32)
    cos, sin = angle.cos(), angle.sin()
    gate_up = torch.randn(tokens, 1024)
    functional = torch.nn.functional

    def torch_conv() -> Tensor:
        padded = torch.cat([conv_state[0], x]).t()[None]
        return functional.silu(functional.conv1d(padded, weight[:, None], groups=CHANNELS))

    return {
        "causal_conv": (lambda: causal_conv(x, weight, conv_state, *place, compute), torch_conv),
        "decay": (
            lambda: decay(a, b, vector, vector, compute),
            lambda: (-vector.exp() * functional.softplus(a + vector), b.sigmoid()),
        ),
        "rms_norm": (
            lambda: elementwise.rms_norm(hidden, norm, 1e-6, offset=1.0, compute=compute),
            lambda: reference.rms_norm(hidden, norm, 1e-6, 1.0, None, compute),
        ),
        "gated_rms_norm": (
            lambda: elementwise.gated_rms_norm(
                heads, z, head_norm, 1e-6, activation="silu", compute=compute
            ),
            lambda: reference.gated_rms_norm(heads, z, head_norm, 1e-6, "silu", compute),
        ),
        "rotary": (
            lambda: elementwise.rotary(query, cos, sin, compute),
            lambda: reference.rotary(query, cos, sin, compute),
        ),
        "silu_mul": (
            lambda: elementwise.silu_mul(gate_up, compute),
            lambda: reference.silu_mul(gate_up, compute),
        ),
        "sigmoid_mul": (
            lambda: elementwise.sigmoid_mul(heads, z, compute),
            lambda: reference.sigmoid_mul(heads, z, compute),
        ),
    }


def chunk_flops(tokens: int) -> float:
    """Multiplications and additions of the chunked form: triangles counted as halves."""
    whole = 3 * D * D  # K S, Q S, and the state
    triangles = (CHUNK + 1) / 2 * (2 * D + 2 * D)  # A and the scores; E and the outputs
    return 2 * HV * tokens * (whole + triangles)


def record_decode(states: Tensor, threads: int) -> Program:
    """The mixers of a step that decodes a token of each sequence: states [layers, B, Hv, D, D]."""
    layers, batch = states.shape[:2]
    x, ba = torch.randn(batch, CHANNELS + HV * D), torch.randn(batch, 2 * HV)
    conv_states = torch.randn(layers, batch, TAPS - 1, CHANNELS)
    weights, vector = torch.randn(layers, CHANNELS, TAPS), torch.randn(HV)
    slots = numbers(*range(batch))
    place = (numbers(*range(batch + 1)), numbers(*[CHUNK] * batch), slots, slots)
    recurrent = numbers(*[1] * batch)
    program = Program(tokens=batch, sequences=batch, outputs=batch)
    program.keep((states, x, ba, conv_states, weights, vector, place, recurrent))
    compute = Compute(threads=threads, program=program)
    with program.recording():
        for layer in range(layers):
            g, beta = decay(ba[:, :HV], ba[:, HV:], vector, vector, compute)
            conv = (weights[layer], conv_states[layer], *place)
            mixed = causal_conv(x[:, :CHANNELS], *conv, compute)
            delta = (mixed, g, beta, states[layer], *place)
            gated_delta(*delta, **HEADS, recurrent=recurrent, compute=compute)
    return program


def decode_rows(batch: int, threads: int, runs: int) -> list[dict[str, object]]:
    """Microseconds per layer of each kernel of a decode step, medians, and the limit of memory."""
    layers = max(4, 30 // batch)
    states = torch.randn(layers, batch, HV, D, D)
    program = record_decode(states, threads)
    taken = []
    for _ in range(runs + 2):
        ticks = np.zeros(len(program.names), dtype=np.int64)
        program.run(tokens=batch, sequences=batch, outputs=batch, ticks=ticks)
        taken.append(ticks.reshape(layers, 3).mean(axis=0) / 1e3)
    median = np.median(taken[2:], axis=0)
    limit = seconds([lambda: states.mul_(1.0)], runs)[0] / layers * 1e6
    moved = 2.0 * states[0].nbytes / 1e3
    return [
        {
            "operation": name.removeprefix("nyb_"),
            "batch": batch,
            "us": float(spent),
            "rate": f"{moved / spent:.1f} GB/s of {moved / limit:.1f}" if i == 2 else "",
        }
        for i, (name, spent) in enumerate(zip(program.names[:3], median, strict=True))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=dispatch.default_threads())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    compute = Compute(threads=options.threads)
    rows: list[dict[str, object]] = []

    def measure(name: str, tokens: int, calls: tuple[Call, Call], amount: float, unit: str) -> None:
        ours, peer = seconds(list(calls), options.runs)
        row: dict[str, object] = {"operation": name, "tokens": tokens, "ours_us": ours * 1e6}
        row |= {"theirs_us": peer * 1e6, "ratio": peer / ours}
        row["rate"] = f"{amount / ours / 1e9:.1f} {unit}" if unit else ""
        rows.append(row)
        if not options.json:
            print(
                f"{name:16} {tokens:5} tokens {ours * 1e6:10.1f} us {peer * 1e6:10.1f} us "
                f"x{peer / ours:<6.1f} {row['rate']}"
            )

    choice = str(dispatch.choose())
    if not options.json:
        print(f"{choice}, {options.threads} threads: ours, transformers or torch, ratio")
    for tokens in (64, 200, 512):
        calls = delta_calls(tokens, False, compute)
        measure("chunked", tokens, calls, chunk_flops(tokens), "GFLOP/s")
    for tokens in (1, 4):
        calls = delta_calls(tokens, True, compute)
        measure("recurrent", tokens, calls, 2.0 * tokens * HV * D * D * 4, "GB/s")
    for tokens in (1, 512):
        for name, calls in others(tokens, compute).items():
            measure(name, tokens, calls, 0, "")
    steps = [r for batch in (1, 4, 16) for r in decode_rows(batch, options.threads, options.runs)]
    for row in [] if options.json else steps:
        print(
            f"{row['operation']:16} {row['batch']:5} decoding {row['us']:10.1f} us   {row['rate']}"
        )
    if options.json:
        print(
            json.dumps(
                {"kernels": choice, "threads": options.threads, "rows": rows, "decode": steps}
            )
        )


if __name__ == "__main__":
    main()
