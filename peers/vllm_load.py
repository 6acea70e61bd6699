"""Load a checkpoint into vLLM on a CPU and say which quantisation method every layer got.

    vllm_load.py CKPT [--ids 1,2,3 | --ids FILE] [--weight-only] [--max-model-len N]

Runs in the environment vllm. vLLM's own configuration parsing, scheme choice and weight loaders
run, with `enable_weights_track`: a parameter that no checkpoint tensor filled is a failure. Only
--weight-only excuses activation scales, which vLLM allocates for weight-only NVFP4 too and which
ModelOpt and llm-compressor do not write for it. NVFP4 compute, which vLLM lacks on CPUs, comes
from vllm_cpu_nvfp4.py beside this file. Prints one JSON line: layers by method, parameters left
unfilled, and the mean negative log-likelihood of the ids. The vision tower is not built.
"""

import argparse
import collections
import json
import os
import re
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = (
    "0"  # the registered kernels and apply_model need this process
)


def read_ids(text: str) -> list[int]:
    if Path(text).is_file():
        text = Path(text).read_text()
    return [int(word) for word in text.replace(",", " ").split()]


def methods_of(model: object) -> dict[str, str]:
    """Module path to 'Method' or 'Method/Scheme', with '/W4A16' if so, where vLLM gave a method."""
    found = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None:
            continue
        scheme = getattr(module, "scheme", None)
        names = [type(method).__name__] + ([type(scheme).__name__] if scheme is not None else [])
        names += ["W4A16"] if is_weight_only(method) or is_weight_only(scheme) else []
        found[name] = "/".join(names)
    return found


def is_weight_only(method: object) -> bool:
    """Whether an NVFP4 method leaves activations alone; its class is the same either way."""
    spec = getattr(method, "spec", None)
    return getattr(method, "use_a16", False) or (spec is not None and spec.activation is None)


def by_pattern(methods: dict[str, str]) -> dict[str, dict[str, int]]:
    """{method: {module path with numbers as N: count}}, short enough for one line."""
    table: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for name, method in methods.items():
        table[method][re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name)] += 1
    return {method: dict(patterns) for method, patterns in table.items()}


def mean_nll(llm: object, ids: list[int]) -> float:
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    output = llm.generate([{"prompt_token_ids": ids}], settings, use_tqdm=False)[0]
    logprobs = [
        entry[i].logprob for entry, i in zip(output.prompt_logprobs[1:], ids[1:], strict=True)
    ]
    return -sum(logprobs) / len(logprobs)


def record_unfilled() -> list[str]:
    """Make vLLM's check of unfilled parameters list their names instead of stopping."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    unfilled: list[str] = []
    check = DefaultModelLoader.track_weights_loading

    def check_and_record(self, model, loaded_weights, **settings):
        try:
            check(self, model, loaded_weights, **settings)
        except ValueError:
            unfilled.extend(sorted({name for name, _ in model.named_parameters()} - loaded_weights))

    DefaultModelLoader.track_weights_loading = check_and_record
    return unfilled


def load(
    checkpoint: str, ids: list[int], max_model_len: int, weight_only: bool
) -> dict[str, object]:
    sys.path.insert(0, str(Path(__file__).parent))
    import vllm_cpu_nvfp4

    vllm_cpu_nvfp4.register()
    unfilled = record_unfilled()
    import vllm

    config = json.loads((Path(checkpoint) / "config.json").read_text())
    wrapped = {"limit_mm_per_prompt": {"image": 0, "video": 0}} if "vision_config" in config else {}
    llm = vllm.LLM(
        checkpoint,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=max_model_len,
        max_num_seqs=4,
        skip_tokenizer_init=True,
        model_loader_extra_config={"enable_weights_track": True},
        **wrapped,
    )
    excused = ("input_scale", "input_global_scale") if weight_only else ()
    row = {
        "ok": all(name.endswith(excused) for name in unfilled) if excused else not unfilled,
        "unfilled": by_pattern(dict.fromkeys(unfilled, "parameters")).get("parameters", {}),
        "vllm": vllm.__version__,
        "quantization": llm.llm_engine.model_config.quantization,
        "methods": by_pattern(llm.apply_model(methods_of)[0]),
    }
    if len(ids) > 1:
        row |= {"nll": round(mean_nll(llm, ids), 6), "nll_tokens": len(ids) - 1}
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--ids", type=read_ids, default=[])
    parser.add_argument("--weight-only", action="store_true")
    parser.add_argument("--max-model-len", type=int, default=1024)
    options = parser.parse_args()
    row: dict[str, object] = {"tool": "vllm"}
    try:
        with redirect_stdout(sys.stderr):
            row |= load(options.checkpoint, options.ids, options.max_model_len, options.weight_only)
    except Exception as error:
        traceback.print_exc()
        row |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
    sys.stdout.write(json.dumps(row) + "\n")
    return 0 if row["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
