"""Whether a text that a model is judged on was calibrated on: a sketch of the calibration text that
is small enough to travel with the checkpoint.

The sketch holds the smallest hashes of the text's shingles (`corpus.shingles`; bottom-k sketches,
Broder 1997). The hashes are uniform, so these are a sample of all shingles, and any other text's
shingles below the largest of them are the same sample of that text. Knows no file, no tokenizer.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from nybble.calibrate import corpus
from nybble.errors import EvaluationError, TextError

#: Hashes kept: of 64k tokens' text about one shingle in 60, in 32 KiB.
KEPT = 4096
#: Shared shingles above which two texts share a passage, not a phrase: some 50 words in a row.
#: Licence headers and the rules that chat templates write are shorter or not among the hashes.
PASSAGE = 200


@dataclass(frozen=True, slots=True)
class Sketch:
    """The `KEPT` smallest shingle hashes of a text that has about `count` different ones."""

    count: int
    hashes: frozenset[int]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Sketch:
        """Of several texts; a shingle never spans two of them. `count` is an estimate above KEPT,
        by how far apart the smallest hashes lie."""
        found: set[int] = set()
        limit = corpus.HASHES
        for text in texts:
            for value in corpus.shingle_hashes(text):
                if value < limit:
                    found.add(value)
                    if len(found) > 8 * KEPT:  # memory stays bounded, whatever the text
                        found = set(sorted(found)[: KEPT + 1])
                        limit = max(found)
        kept = sorted(found)[:KEPT]
        count = len(kept) if len(found) <= KEPT else round((KEPT - 1) * corpus.HASHES / kept[-1])
        return cls(count, frozenset(kept))

    def shared(self, text: str) -> int:
        """About how many shingles of `text` the sketched text has too; exact if it is short."""
        if not self.hashes:
            return 0
        met = {value for value in corpus.shingle_hashes(text) if value in self.hashes}
        return round(len(met) * self.count / len(self.hashes))

    def as_json(self) -> dict[str, object]:
        """What `from_json` reads."""
        values = np.array(sorted(self.hashes), dtype="<u8")
        return {
            "shingle": corpus.SHINGLE,
            "count": self.count,
            "hashes": base64.b64encode(values.tobytes()).decode("ascii"),
        }

    @classmethod
    def from_json(cls, record: object, where: str) -> Sketch:
        """Raises TextError naming `where` for what `as_json` did not write."""
        try:
            if isinstance(record, Mapping) and record["shingle"] == corpus.SHINGLE:
                data = base64.b64decode(record["hashes"], validate=True)
                values = np.frombuffer(data, dtype="<u8").tolist()
                if len(values) <= record["count"]:
                    return cls(int(record["count"]), frozenset(values))
        except (KeyError, TypeError, ValueError, binascii.Error):
            pass
        raise TextError(
            f"{where}: the sketch of the calibration text cannot be read; without it nobody can "
            "tell whether a text was calibrated on. Take the file from where the checkpoint came"
        )


def refuse_overlap(sketch: Sketch, text: str, *, calibrated: str, judged: str) -> None:
    """Raise EvaluationError if `text`, called `judged`, shares a passage with what the sketch is
    of, called `calibrated`."""
    shared = sketch.shared(text)
    if shared >= PASSAGE:
        raise EvaluationError(
            f"{judged} shares about {shared:,} runs of {corpus.SHINGLE} letters with {calibrated}: "
            "a model judged on what it was calibrated on looks better than it is. Judge it on "
            "another text, or calibrate on another one"
        )
