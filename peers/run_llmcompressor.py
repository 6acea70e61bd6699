"""Quantise a BF16 checkpoint with llm-compressor, for comparison.

    run_llmcompressor.py MODEL OUT RECIPE [--calibrate TEXT_FILE | --ids IDS.json]
                         [--ignore PATTERN...] [--dtype float32]

Environment: llmcompressor. RECIPE is a compressed-tensors preset in lower
case (nvfp4a16, mxfp4a16, fp8_dynamic, fp8_block; nvfp4 with a text to calibrate on), run through
`oneshot`, rounded to nearest; with the prefix gptq_ by its GPTQ, which needs a text or windows of
token ids ({"input_ids": [[...]]}); with the prefix mf_ through `model_free_ptq`, which never builds
the model. Router,
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
GPTQ = "gptq_"  # before a preset
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


def rows_of(options: argparse.Namespace) -> list[list[int]]:
    """The windows of a file of ids, or a text's tokens in rows of 128."""
    if options.ids:
        with open(options.ids, encoding="utf-8") as file:
            return json.load(file)["input_ids"]
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    with open(options.calibrate, encoding="utf-8") as file:
        ids = tokenizer(file.read())["input_ids"]
    return [ids[at : at + 128] for at in range(0, len(ids), 128)]


def samples(options: argparse.Namespace) -> dict[str, object]:
    """What `oneshot` is told of a text; nothing without one."""
    if not options.ids and not options.calibrate:
        return {}
    import datasets

    rows = rows_of(options)
    columns = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    return {
        "dataset": datasets.Dataset.from_dict(columns),
        "num_calibration_samples": len(rows),
        "max_seq_length": max(map(len, rows)),
    }


def modifier(recipe: str, ignore: list[str]) -> object:
    """What is done to the linears."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    kind = GPTQModifier if recipe.startswith(GPTQ) else QuantizationModifier
    scheme = recipe.removeprefix(GPTQ).upper()
    return kind(targets="Linear", scheme=scheme, ignore=ignore)


def run_oneshot(options: argparse.Namespace, ignore: list[str], config: object) -> None:
    import torch
    import transformers
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe

    wrapped = "vision_config" in config.to_dict()
    loader = (
        transformers.AutoModelForImageTextToText if wrapped else transformers.AutoModelForCausalLM
    )
    is_moe = "moe" in config.model_type
    with load_quantizable_moe(loader) if is_moe else contextlib.nullcontext():
        model = loader.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    oneshot(model=model, recipe=modifier(options.recipe, ignore), **samples(options))
    model.save_pretrained(options.out, save_compressed=True)
    transformers.AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("recipe")
    parser.add_argument("--calibrate", metavar="TEXT_FILE", default="")
    parser.add_argument("--ids", metavar="IDS.json", default="")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
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
                run_oneshot(options, ignore, config)
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
