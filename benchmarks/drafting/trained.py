"""What the carried model's own MTP head gives: stories, dialogues, code; acceptance and speed.

    python benchmarks/drafting/trained.py [CKPT] [--batch 1,4,16] [--drafts 1,2,3]

Stories and dialogues are the prompts on which the model's README states acceptance, and stop as
there; code is this package's own, which the model never saw. Acceptance by position is of texts
generated one at a time, with a fixed number of drafts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from lanes import (
    Lane,
    Load,
    Prompt,
    add_options,
    load,
    numbers,
    print_head,
    print_row,
    race,
)

import nybble
from nybble.api.opening import OpenOptions, open_engine
from nybble.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
CARRIED = ROOT / "models" / "hybrid-chat-mtp"
PROMPTS = ROOT / "tests" / "fixtures" / "prompts" / "hybrid-chat-mtp.json"
#: "By position" of models/hybrid-chat-mtp/README.md, MTP acceptance.
STATED = {
    ("stories", 1): (0.685,),
    ("stories", 2): (0.707, 0.460),
    ("stories", 3): (0.698, 0.445, 0.271),
    ("dialogues", 1): (0.787,),
    ("dialogues", 2): (0.720, 0.534),
    ("dialogues", 3): (0.702, 0.534, 0.385),
}
#: Files whose middles are the prompts of code, and tokens of each.
CODE = "engine/*.py"
CODE_TOKENS = 96


def prompts(tokenizer: Tokenizer, count: int) -> dict[str, list[Prompt]]:
    """So many of each kind."""
    carried = json.loads(PROMPTS.read_text())
    found = {name: [tuple(ids) for ids in carried[name]] for name in ("stories", "dialogues")}
    code: list[Prompt] = []
    for file in sorted(Path(nybble.__file__).parent.glob(CODE)) * count:
        ids = tokenizer.encode(file.read_text(), add_special=False)
        start = (1 + len(code)) * CODE_TOKENS % max(1, len(ids) - CODE_TOKENS)
        code.append(tuple(ids[start : start + CODE_TOKENS]))
        if len(code) == count:
            break
    return {name: texts[:count] for name, texts in {**found, "code": code}.items()}


def lane(a: argparse.Namespace, name: str, **drafting: object) -> Lane:
    """An engine as a user opens it."""
    options = OpenOptions(
        memory=a.memory,
        max_sequences=max(a.batch),
        max_context=a.max_context,
        precision=a.precision,
        threads=a.threads,
        prefix_cache=a.prefix_cache,
        **drafting,  # type: ignore[arg-type]
    )
    engine = open_engine(a.checkpoint, options)
    return Lane(name, lambda: engine)


def print_acceptance(lanes: Sequence[Lane], loads: Sequence[Load]) -> None:
    """Of fixed numbers of drafts, one text at a time, beside what is stated."""
    print_head(("prompts", "k", "steps", "accepted by position", "the model's README"), names=1)
    for case in loads:
        for one in lanes:
            run = one.runs[str(case)][-1]
            shares = ", ".join(
                f"{a / d:.3f}" for a, d in zip(run.accepted, run.drafted, strict=True) if d
            )
            if one.name.startswith("k="):
                k = int(one.name.removeprefix("k="))
                stated = STATED.get((case.name, k), ())
                told = ", ".join(f"{share:.3f}" for share in stated)
                print_row([case.name, str(k), str(run.verified), shares, told or "-"])
    print()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CARRIED)
    parser.add_argument("--batch", type=numbers, default=(1, 4, 16))
    parser.add_argument("--drafts", type=numbers, default=(1, 2, 3), help="fixed numbers")
    parser.add_argument("--texts", type=int, default=32, help="prompts of each kind")
    parser.add_argument("--kinds", default="stories,dialogues,code")
    parser.add_argument("--generate", type=int, default=64, help="tokens of a text at most")
    parser.add_argument("--max-context", type=int, default=1024)
    parser.add_argument("--memory", type=float, default=0.5, help="GiB of each lane's pools")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--prefix-cache", action="store_true")
    add_options(parser)
    a = parser.parse_args()
    lanes = [lane(a, "off", draft="off"), lane(a, "auto", draft="mtp")]
    lanes += [lane(a, f"k={k}", draft="mtp", draft_tokens=k) for k in a.drafts]
    texts = prompts(Tokenizer.open(a.checkpoint), a.texts)
    loads = [
        # Answers are short: with many at a time more give as many steps with all seats taken.
        load(kind, texts[kind] * -(-batch // 4), a.generate, batch, ignores_end=kind == "code")
        for kind in a.kinds.split(",")
        for batch in a.batch
    ]
    race(lanes, loads, a, side_by_side=True)
    if alone := [case for case in loads if case.batch == 1]:
        print()
        print_acceptance(lanes, alone)


if __name__ == "__main__":
    main()
