"""vLLM on a CPU as a contender: a case in a line of JSON, how long it took in another.

    run_vllm_bench.py CKPT [--threads 2]

Runs in the environment vllm. A case is {"prompt": P, "generate": G, "batch": B}: with G = 0 the
prompt and one token, with P = 0 a generation after eight tokens, less what those and one token
take; with both, whole requests that arrive together. Prints {"ready": 1} once it is warm.
"""

import argparse
import json
import os
import random
import sys
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("checkpoint")
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--max-context", type=int, default=4352)
parser.add_argument("--max-sequences", type=int, default=32)

SHORT = 8


def environment(threads: int) -> None:
    """What vLLM reads when it is imported; libiomp5 has to be there before everything else."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_CPU_KVCACHE_SPACE="2",
        VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, range(threads))),
        OMP_NUM_THREADS=str(threads),
        KMP_BLOCKTIME="1",  # its threads would spin through the others' turns
    )
    library = os.path.join(sys.prefix, "lib", "libiomp5.so")
    if "LD_PRELOAD" not in os.environ and os.path.exists(library):
        os.environ["LD_PRELOAD"] = library
        os.execv(sys.executable, [sys.executable, *sys.argv])


class Bench:
    """A loaded model."""

    def __init__(self, options: argparse.Namespace) -> None:
        from vllm import LLM, SamplingParams

        self.params = SamplingParams
        self.random = random.Random(0)
        self.llm = LLM(
            options.checkpoint,
            dtype="bfloat16",
            max_model_len=options.max_context,
            max_num_seqs=options.max_sequences,
            max_num_batched_tokens=options.max_context,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )

    def run(self, prompt: int, generate: int, batch: int) -> tuple[int, float]:
        """Generated tokens and seconds."""
        prompts = [
            {"prompt_token_ids": [self.random.randrange(100, 4000) for _ in range(prompt)]}
            for _ in range(batch)
        ]
        params = self.params(temperature=0, max_tokens=generate, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        done = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        return sum(len(one.outputs[0].token_ids) for one in done), seconds

    def case(self, prompt: int, generate: int, batch: int) -> tuple[int, float]:
        """Tokens and seconds of a case."""
        if prompt and generate:
            return self.run(prompt, generate, batch)
        if prompt:
            return prompt * batch, self.run(prompt, 1, batch)[1]
        before = self.run(SHORT, 1, batch)[1]
        return generate * batch, self.run(SHORT, generate + 1, batch)[1] - before


def main() -> None:
    options = parser.parse_args()
    environment(options.threads)
    bench = Bench(options)
    bench.run(SHORT, 4, 1)
    print(json.dumps({"ready": 1}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        tokens, seconds = bench.case(asked["prompt"], asked["generate"], asked["batch"])
        print(json.dumps({"tokens": tokens, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
