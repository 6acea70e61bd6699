"""Flips on a multiple-choice set: how often another choice is likeliest than in BF16.

    scripts/bench fidelity/choices MODEL QUESTIONS.jsonl CHECKPOINT... [--items 400]

QUESTIONS holds a JSON object a line: question, choices, answer (index from 0), perhaps context. The
likeliest choice is that with the largest log-likelihood of its text after "Question: ... Answer:",
for each byte of it. Prints a line of JSON for each checkpoint: accuracy, the share of questions
answered differently from MODEL (flips, whether for better or worse), and both with intervals from
resampled questions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.reader import Checkpoint
from nybble.evaluate.score import score
from nybble.evaluate.significance import mean_estimate
from nybble.evaluate.sources import StreamedSource
from nybble.evaluate.windows import Window
from nybble.kernels.compute import Compute
from nybble.models.linear import Mode
from nybble.models.model import Model
from nybble.progress import Progress
from nybble.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """A prompt and the texts that may follow it."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: Path, items: int) -> list[Question]:
    """The first `items` of a file."""
    found = []
    for line in path.read_text("utf-8").splitlines()[:items]:
        row = json.loads(line)
        context = f"{row['context']}\n" if row.get("context") else ""
        choices = tuple(f" {choice}" for choice in row["choices"])
        prompt = f"{context}Question: {row['question']}\nAnswer:"
        found.append(Question(prompt, choices, int(row["answer"])))
    return found


def windows_of(questions: Sequence[Question], tokenizer: Tokenizer) -> tuple[Window, ...]:
    """A window for each choice of each question, in order; only the choice's tokens are scored."""
    found = []
    for question in questions:
        prompt = [int(i) for i in tokenizer.encode(question.prompt, parse_special=False)]
        for choice in question.choices:
            ids = [int(i) for i in tokenizer.encode(choice, parse_special=False)]
            tokens = np.array(prompt + ids, dtype=np.int64)
            found.append(Window(tokens, len(prompt), 0))
    return tuple(found)


def answers(folder: Path, questions: Sequence[Question], threads: int) -> NDArray[np.int64]:
    """The likeliest choice of each question, int64 [questions]."""
    with Checkpoint.open(folder) as checkpoint:
        model = Model(checkpoint)
        windows = windows_of(questions, Tokenizer.open(folder))
        mode = Mode(Compute("f32", threads), simulate=False)
        source = StreamedSource(
            model, windows, mode, page_dtype="f32", title=folder.name, progress=Progress()
        )
        source.run()
        scores = score(source, windows, mode, Progress())
        source.close()
    sums = np.bincount(scores.window, weights=-scores.nll, minlength=len(windows))
    found, at = [], 0
    for question in questions:
        lengths = [len(choice.strip().encode()) for choice in question.choices]
        found.append(int(np.argmax(sums[at : at + len(lengths)] / lengths)))
        at += len(lengths)
    return np.array(found, dtype=np.int64)


def judge(
    given: NDArray[np.int64], reference: NDArray[np.int64], questions: Sequence[Question]
) -> dict[str, object]:
    """Accuracy, flips and their net effect, each with its interval of resampled questions."""
    truth = np.array([question.answer for question in questions])
    numbers = np.arange(len(questions))
    right, was_right = given == truth, reference == truth
    figures = {
        "accuracy": right,
        "flipped": given != reference,
        "lost": right.astype(float) - was_right,
    }
    return {
        name: mean_estimate(values.astype(float), numbers).as_json()
        for name, values in figures.items()
    }


def main() -> None:
    """Ask everyone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="*")
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    questions = read_questions(a.questions, a.items)
    reference = answers(a.model, questions, a.threads)
    for folder in (a.model, *a.checkpoints):
        given = reference if folder is a.model else answers(folder, questions, a.threads)
        found = judge(given, reference, questions)
        print(json.dumps({"checkpoint": str(folder), "questions": len(questions), **found}))


if __name__ == "__main__":
    main()
