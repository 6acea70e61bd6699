"""transformers' generate as a contender: a case in a line of JSON, how long it took in another.

    run_transformers_bench.py CKPT [--threads 2] [--dtype bfloat16]

Runs in any environment with torch and transformers. A case is {"prompt": P, "generate": G,
"batch": B}: with G = 0 one forward over the prompt, with P = 0 `generate` after eight tokens, less
what those and one token take; with both, `generate` of all requests as one batch. Greedy, with its
own default cache. Prints {"ready": 1} when it is loaded and warm.
"""

import argparse
import json
import os
import sys
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("checkpoint")
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--dtype", default="bfloat16")

SHORT = 8


class Bench:
    """A loaded model."""

    def __init__(self, options: argparse.Namespace) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        torch.set_num_threads(options.threads)
        dtype = getattr(torch, options.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=dtype).eval()
        self.vocab = min(4000, self.model.config.get_text_config().vocab_size)
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def run(self, prompt: int, generate: int, batch: int) -> float:
        """Seconds; no generation is a forward alone."""
        ids = self.torch.randint(100, self.vocab, (batch, prompt))
        began = time.perf_counter()
        with self.torch.inference_mode():
            if generate:
                mask = self.torch.ones_like(ids)
                self.model.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=False,
                    min_new_tokens=generate,
                    max_new_tokens=generate,
                )
            else:
                self.model(ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - began

    def case(self, prompt: int, generate: int, batch: int) -> tuple[int, float]:
        """Tokens and seconds of a case."""
        if prompt and generate:
            return generate * batch, self.run(prompt, generate, batch)
        if prompt:
            return prompt * batch, self.run(prompt, 0, batch)
        before = self.run(SHORT, 1, batch)
        return generate * batch, self.run(SHORT, generate + 1, batch) - before


def main() -> None:
    options = parser.parse_args()
    bench = Bench(options)
    bench.run(SHORT, 2, 1)
    print(json.dumps({"ready": 1}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        tokens, seconds = bench.case(asked["prompt"], asked["generate"], asked["batch"])
        print(json.dumps({"tokens": tokens, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
