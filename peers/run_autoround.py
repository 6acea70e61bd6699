"""Quantise a BF16 checkpoint with AutoRound, for comparison.

    run_autoround.py MODEL OUT --ids IDS.json [--iterations 50] [--batch 2]

Environment: autoround.

NVFP4 weights and 16-bit activations, in float32 (`amp` off), and exported as compressed-tensors.
IDS.json is {"input_ids": [[...]]}, windows of equal length. 0 iterations is AutoRound's round to
nearest. Prints one JSON line: CPU seconds, wall seconds, peak resident MiB.
"""

import argparse
import json
import os
import resource
import sys
import time
import traceback
from contextlib import redirect_stdout
from pathlib import Path


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(r.ru_utime + r.ru_stime for r in used)


def quantize(options: argparse.Namespace) -> None:
    import torch
    import transformers
    from auto_round import AutoRound
    from auto_round.schemes import QuantizationScheme

    with open(options.ids, encoding="utf-8") as file:
        rows = json.load(file)["input_ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    scheme = QuantizationScheme(bits=4, group_size=16, sym=True, data_type="nv_fp", act_bits=16)
    rounder = AutoRound(
        model,
        tokenizer,
        scheme=scheme,
        iters=options.iterations,
        nsamples=len(rows),
        seqlen=len(rows[0]),
        batch_size=options.batch,
        dataset=[torch.tensor(row)[None] for row in rows],
        device_map="cpu",
        amp=False,
    )
    rounder.quantize_and_save(options.out, format="llm_compressor")
    out = Path(options.out)
    # Into a folder of its own below, where its optional libraries are not all there.
    for inner in (
        [] if (out / "config.json").exists() else [p.parent for p in out.glob("*/config.json")]
    ):
        for file in inner.iterdir():
            file.rename(out / file.name)
        inner.rmdir()
    declare_weights_alone(out / "config.json")


def declare_weights_alone(path: Path) -> None:
    """AutoRound 0.16.1 declares NVFP4 inputs for `act_bits=16` too, and writes no scales for them:
    no engine could run that. The declaration is put right, the weights are its own."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = None
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--ids", required=True, metavar="IDS.json")
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--batch", type=int, default=2)
    options = parser.parse_args()
    row: dict[str, object] = {"tool": "autoround", "iterations": options.iterations, "ok": True}
    start = time.time()
    try:
        with redirect_stdout(sys.stderr):
            quantize(options)
    except Exception as error:
        traceback.print_exc()
        row |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
    peak = max(
        resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    row |= {
        "cpu_s": round(cpu_seconds(), 1),
        "wall_s": round(time.time() - start, 1),
        "peak_rss_mib": peak // 1024,
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
    sys.stdout.write(json.dumps(row) + "\n")
    return 0 if row["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
