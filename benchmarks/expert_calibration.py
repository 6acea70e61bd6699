"""Calibrating the routed experts of one layer with real shapes, under a limit on private memory.

    python benchmarks/expert_calibration.py MODEL [--tokens 65536] [--experts 32] [--limit-gb 6]

MODEL: benchmarks/make_wide.py makes one with the shapes of Qwen3.6-35B-A3B. Inputs are correlated
noise and the router is the model's, so that experts are crowded unequally: for time and memory,
never for fidelity. The limit is RLIMIT_DATA, private writable memory: going over it fails. Files
that are mapped count in the peak of resident memory, which is shown beside it.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nybble.api.plan import LAYOUTS
from nybble.calibrate.expert_tasks import ExpertTask, RoundedRows, run_task, task_bytes
from nybble.calibrate.experts import round_experts
from nybble.calibrate.rounding import EFFORTS
from nybble.checkpoint.reader import Checkpoint
from nybble.models.feed_forward import MixtureOfExperts
from nybble.models.loader import Weights
from nybble.plan.plan import make_plan
from nybble.plan.recipe import load_recipe
from nybble.quantize.scales import job_scales

BATCH = 2048
GUARD = 1 / 6


class Peak(threading.Thread):
    """Samples memory of this process: bytes that are private, and that are resident in all."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.private = self.resident = 0

    def run(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            found = {
                line.split(":")[0]: line.split()[1] for line in status.splitlines() if "kB" in line
            }
            self.private = max(self.private, int(found["RssAnon"]) << 10)
            self.resident = max(self.resident, int(found["VmRSS"]) << 10)
            time.sleep(0.05)


def inputs(tokens: int, hidden: int, seed: int) -> Iterator[Tensor]:
    """Rows whose channels are correlated and of unequal size, a batch at a time."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn((hidden, hidden), generator=generator) / hidden**0.5
    sizes = torch.logspace(0, -2, hidden)
    mean = torch.randn(hidden, generator=generator) / 2
    generator.manual_seed(seed)
    for at in range(0, tokens, BATCH):
        rows = torch.randn((min(BATCH, tokens - at), hidden), generator=generator)
        rows = (rows * sizes) @ mix * 8 + mean
        yield rows / rows.square().mean(-1, keepdim=True).sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--experts", type=int, default=32, help="how many of the layer's")
    parser.add_argument("--effort", choices=list(EFFORTS), default="default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit-gb", type=float, default=6.0)
    parser.add_argument("--all-experts", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    limit = int(args.limit_gb * 10**9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    peak = Peak()
    peak.start()
    with Checkpoint.open(args.model) as checkpoint, tempfile.TemporaryDirectory() as folder:
        plan = make_plan(checkpoint, load_recipe("nvfp4-all"), LAYOUTS["modelopt"])
        weights = Weights(checkpoint)
        mixture = weights.layer(0).feed_forward
        assert isinstance(mixture, MixtureOfExperts)
        wanted = {m for e in mixture.gate_up.modules[: args.experts] for m in e}
        wanted |= {m for e in mixture.down.modules[: args.experts] for m in e}
        jobs = [job for job in plan.jobs if job.members[0].module in wanted]
        matrices = {m.module: m.matrix(checkpoint) for job in jobs for m in job.members}
        scales = job_scales(jobs, matrices, plan.layout, "mse", args.threads)
        count = sum(matrix.size for matrix in matrices.values())
        dims = weights.network.dims
        sizes = (args.tokens, dims.hidden, dims.expert_width, dims.experts, dims.experts_per_token)
        print(f"{len(jobs)} jobs, {count / 1e6:.0f} M weights, {args.tokens} tokens")
        print(f"planned for a task: {task_bytes(*sizes, args.threads) / 1e9:.2f} GB")
        base = peak.private
        tasks_s = [0.0]

        def timed(tasks: Iterable[ExpertTask]) -> Iterator[Sequence[RoundedRows]]:
            for task in tasks:
                begun = time.process_time()
                done = run_task(task, weights)
                tasks_s[0] += time.process_time() - begun
                yield done

        guard = int(args.tokens * GUARD)
        begun, cpu = time.perf_counter(), time.process_time()
        rungs: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        won, seen = [], []
        for found in round_experts(
            weights,
            mixture,
            inputs(args.tokens - guard, dims.hidden, 1),
            inputs(guard, dims.hidden, 2),
            jobs,
            scales,
            EFFORTS[args.effort],
            folder=Path(folder),
            threads=args.threads,
            all_experts=args.all_experts,
            runner=timed,
        ):
            rungs[found.choice.method] += 1
            reasons[found.choice.reason or "-"] += 1
            won.append(found.choice.won)
            seen.append(found.choice.tokens)
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
    print(f"rungs {dict(rungs)}, tokens of an expert {min(seen)} to {max(seen)}")
    for reason, times in reasons.most_common(6):
        print(f"  {times:4d} x {reason}")
    print(f"won of round-to-nearest's held-out loss: {sum(won) / len(won):.3f}")
    print(f"{wall:.1f} s, {cpu:.1f} CPU s in all, {tasks_s[0]:.1f} CPU s in tasks")
    print(f"{tasks_s[0] / count * 1e6:.4f} CPU us per weight of tasks ({args.threads} threads)")
    print(f"private memory: {base / 1e9:.2f} GB before, {peak.private / 1e9:.2f} GB at most")
    print(f"resident with mapped files: {peak.resident / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
