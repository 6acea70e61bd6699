"""What prompt lookup gives a model without a head: texts that are copied, and free text.

    python benchmarks/drafting/ngram.py CKPT [--batch 1,4] [--drafts 3]

For a small chat model, such as SmolLM2: it is asked to repeat paragraphs, and to write of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lanes import Lane, Prompt, add_options, load, numbers, race

from nybble.api.agent_text import QUESTIONS, RULES
from nybble.api.opening import OpenOptions, open_engine
from nybble.errors import TextError
from nybble.text.chat import ChatTemplate
from nybble.text.tokenizer import Tokenizer

COPY = "Repeat this text word for word, and write nothing else:\n\n"
SUBJECTS = (
    *("the sea in winter", "a clock that runs backwards", "bread", "two neighbours and a wall"),
    *("how rivers find their way", "a letter that came late", "bees", "the first day at school"),
)


def prompts(folder: Path) -> dict[str, list[Prompt]]:
    """As many of each kind, in the form of the chat template."""
    template, tokenizer = ChatTemplate.open(folder), Tokenizer.open(folder)
    if template is None:
        raise TextError(f"{folder}: has no chat template; choose a chat model")

    def rendered(text: str) -> Prompt:
        told = template.render([{"role": "user", "content": text}])
        return tuple(tokenizer.encode(told, add_special=False))

    # What stands first in the rules is the task: each part begins with its own heading.
    texts = [*(part.strip() for part in RULES.split("\n## ")[1:]), *QUESTIONS][: len(SUBJECTS)]
    return {
        "copy": [rendered(COPY + text) for text in texts],
        "free": [rendered(f"Write a short story about {subject}.") for subject in SUBJECTS],
    }


def lane(a: argparse.Namespace, name: str, drafts: int | None) -> Lane:
    """An engine as a user opens it; None: as many drafts as pay."""
    options = OpenOptions(
        memory=a.memory,
        kv_cache_dtype="bf16",
        max_sequences=max(a.batch),
        max_context=1024,
        precision=a.precision,
        threads=a.threads,
        prefix_cache=False,
        draft="off" if drafts == 0 else "ngram",
        draft_tokens=drafts or None,
    )
    engine = open_engine(a.checkpoint, options)
    return Lane(name, lambda: engine)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--batch", type=numbers, default=(1, 4))
    parser.add_argument("--drafts", type=numbers, default=(1, 3), help="fixed numbers")
    parser.add_argument("--generate", type=int, default=128, help="tokens of a text at most")
    parser.add_argument("--memory", type=float, default=1.0, help="GiB of each lane's pools")
    parser.add_argument("--precision", default="bf16")
    add_options(parser)
    a = parser.parse_args()
    lanes = [lane(a, "off", 0), lane(a, "auto", None)]
    lanes += [lane(a, f"k={k}", k) for k in a.drafts]
    loads = [
        load(kind, texts, a.generate, batch)
        for kind, texts in prompts(a.checkpoint).items()
        for batch in a.batch
    ]
    race(lanes, loads, a, side_by_side=True)


if __name__ == "__main__":
    main()
