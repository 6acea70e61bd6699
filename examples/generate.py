"""Many prompts at once, a stream, a conversation, several choices, and JSON by a schema.

    python examples/generate.py CKPT

CKPT is any checkpoint that nybble runs, quantized or not; the repository carries one in
models/hybrid-chat-mtp.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from nybble import LLM, SamplingParams
from nybble.engine.request import Grammar


def main(folder: str) -> None:
    """Show what an LLM does."""
    with LLM(folder, memory=1) as llm:
        print("# prompts side by side, as many as fit; the result of each is as if it were alone")
        prompts = ["Once upon a time,", "The sea was", "One day, a dog"]
        done = llm.generate(prompts, SamplingParams(max_tokens=24))
        for prompt, found in zip(prompts, done, strict=True):
            print(f"{prompt}|{found.text}")

        print("\n# a stream; leaving the loop ends it")
        for token in llm.stream("Lily and her cat", SamplingParams(max_tokens=24)):
            print(token.text, end="", flush=True)

        print("\n\n# a conversation, sampled as the model's publisher recommends")
        asked = {"role": "user", "content": "Tell me a short story about a cat."}
        answer = llm.chat([asked])
        print(answer.text)
        print(f"({answer.usage.tokens} tokens, {answer.usage.tokens_per_s:.0f} tokens/s)")

        print("\n# three choices; the log-probability of each under the model")
        params = SamplingParams(max_tokens=12, temperature=0.8, top_p=0.95, n=3, seed=1)
        for choice in llm.generate("The best thing about the park is", params)[0].choices:
            print(f"{sum(choice.logprobs):8.2f} {choice.text!r}")

        if find_spec("llguidance") is not None:
            print("\n# text that matches")
            params = SamplingParams(max_tokens=12, grammar=Grammar("regex", "(yes|no), sir"))
            print(llm.generate("Is the sky blue?", params)[0].text)


if __name__ == "__main__":
    main(*sys.argv[1:])
