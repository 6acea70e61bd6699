"""Quantise a BF16 checkpoint with llm-compressor, round to nearest, for comparison.

    run_llmcompressor.py MODEL OUT RECIPE [--calibrate TEXT_FILE] [--ignore PATTERN...]

Environment: llmcompressor. RECIPE is a compressed-tensors preset in lower
case (nvfp4a16, mxfp4a16, fp8_dynamic, fp8_block; nvfp4 with a text to calibrate on), run through
`oneshot`; with the prefix mf_ through `model_free_ptq`, which never builds the model. Router,
vision, gated DeltaNet, embeddings, MTP and the head stay BF16, as in llm-compressor's own example
for this family; `--ignore` replaces that list. Prints one JSON line: CPU seconds, wall seconds,
peak resident MiB.
"""

import argparse
import contextlib
import json
import os
import resource
import sys
import time
import traceback

IGNORE = ["lm_head", "re:.*lm_head", "re:.*embed_tokens"]
IGNORE_MOE = [
    "re:.*mlp.gate$",
    "re:.*shared_expert_gate$",
    "re:.*visual.*",
    "re:.*linear_attn.*",
    "re:.*mtp.*",
]
IGNORE_BY_TENSOR = ["re:.*norm.*"]  # model_free_ptq sees tensors, not modules


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(r.ru_utime + r.ru_stime for r in used)


def run_model_free(model_dir: str, out: str, preset: str, ignore: list[str]) -> None:
    from llmcompressor import model_free_ptq

    scheme = preset.upper()
    model_free_ptq(
        model_dir, out, scheme=scheme, ignore=ignore + IGNORE_BY_TENSOR, max_workers=1, device="cpu"
    )


def samples(model_dir: str, text: str) -> dict[str, object]:
    """What `oneshot` is told of a text: its tokens in rows of 128; nothing without one."""
    if not text:
        return {}
    import datasets
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    with open(text, encoding="utf-8") as file:
        ids = tokenizer(file.read())["input_ids"]
    rows = [ids[at : at + 128] for at in range(0, len(ids), 128)]
    columns = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    return {
        "dataset": datasets.Dataset.from_dict(columns),
        "num_calibration_samples": len(rows),
        "max_seq_length": 128,
    }


def run_oneshot(
    model_dir: str, out: str, preset: str, ignore: list[str], config: object, text: str
) -> None:
    import torch
    import transformers
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modifiers.quantization import QuantizationModifier

    wrapped = "vision_config" in config.to_dict()
    loader = (
        transformers.AutoModelForImageTextToText if wrapped else transformers.AutoModelForCausalLM
    )
    is_moe = "moe" in config.model_type
    with load_quantizable_moe(loader) if is_moe else contextlib.nullcontext():
        model = loader.from_pretrained(model_dir, dtype=torch.bfloat16)
    oneshot(
        model=model,
        recipe=QuantizationModifier(targets="Linear", scheme=preset.upper(), ignore=ignore),
        **samples(model_dir, text),
    )
    model.save_pretrained(out, save_compressed=True)
    transformers.AutoTokenizer.from_pretrained(model_dir).save_pretrained(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("recipe")
    parser.add_argument("--calibrate", metavar="TEXT_FILE", default="")
    parser.add_argument("--ignore", metavar="PATTERN", nargs="+")
    options = parser.parse_args()
    row: dict[str, object] = {"tool": "llmcompressor", "recipe": options.recipe, "ok": True}
    start = time.time()
    preset = options.recipe.removeprefix("mf_")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import transformers

            config = transformers.AutoConfig.from_pretrained(options.model)
            usual = IGNORE + (IGNORE_MOE if "moe" in config.model_type else [])
            ignore = options.ignore or usual
            if options.recipe.startswith("mf_"):
                run_model_free(options.model, options.out, preset, ignore)
            else:
                run_oneshot(options.model, options.out, preset, ignore, config, options.calibrate)
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
