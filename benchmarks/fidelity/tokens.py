"""Cut calibration texts into windows of token ids: one JSON file that every tool reads.

    scripts/bench fidelity/tokens MODEL OUT.json --text c4.txt --text wiki.txt [--samples 48]

Each text gives the same number of windows, interleaved; no special tokens, no padding. Marks such
as `<doc ...>` of WikiExtractor are removed. OUT is {"input_ids": [[...]], "sources": [...]}, which
is also what `nybble quantize --calibrate OUT.json` takes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

from nybble.text.tokenizer import Tokenizer

#: Characters looked at for each token wanted: no tokenizer of ours makes longer tokens on average.
_CHARACTERS_A_TOKEN = 8


def cut(tokenizer: Tokenizer, text: str, count: int, length: int) -> list[list[int]]:
    """The first `count` windows of `length` ids."""
    plain = re.sub(r"</?doc[^>]*>\n?", "", text)[: count * length * _CHARACTERS_A_TOKEN]
    ids = [int(i) for i in tokenizer.encode(plain, parse_special=False)]
    if len(ids) < count * length:
        sys.exit(f"a text has {len(ids):,} tokens; {count} windows of {length} need more")
    return [ids[at : at + length] for at in range(0, count * length, length)]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--length", type=int, default=512)
    a = parser.parse_args()
    if a.samples % len(a.text):
        sys.exit(f"{a.samples} windows are no whole number for each of {len(a.text)} texts")
    tokenizer = Tokenizer.open(a.model)
    each = a.samples // len(a.text)
    texts = [path.read_text("utf-8") for path in a.text]
    parts = [cut(tokenizer, text, each, a.length) for text in texts]
    rows = [part[i] for i in range(each) for part in parts]
    sources = [
        {"file": path.name, "sha256": hashlib.sha256(text.encode()).hexdigest(), "windows": each}
        for path, text in zip(a.text, texts, strict=True)
    ]
    a.out.write_text(json.dumps({"input_ids": rows, "sources": sources}))
    print(f"{a.out}: {len(rows)} windows of {a.length} tokens, sum of ids {sum(map(sum, rows)):,}")


if __name__ == "__main__":
    main()
