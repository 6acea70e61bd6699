"""What differs between two checkpoints: tensors, values, configuration, tokenizer, chat template.

Puts together what `rewrite/diff_tensors.py` and `rewrite/diff_texts.py` find. Says what differs,
not which of the two is right.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from nybble.checkpoint.reader import Checkpoint
from nybble.progress import Progress
from nybble.rewrite.diff_tensors import Count, ModuleValues, Retyped, TensorComparison, Values
from nybble.rewrite.diff_texts import Setting, Template, TextComparison, compare_templates


@dataclass(frozen=True)
class Difference:
    """What differs. `is_rearranged`, `respelled` and `renamed` are told and count as equal.

    `renamed` are tensors of quantized modules that another layout calls otherwise; `respelled` JSON
    files of equal content; `hidden_settings` counts settings beyond the first hundred of a file.
    """

    a: Path
    b: Path
    deep: bool
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    retyped: tuple[Retyped, ...]
    values: tuple[Values, ...]
    modules: tuple[ModuleValues, ...]
    settings: tuple[Setting, ...]
    hidden_settings: int
    files_only_in_a: tuple[str, ...]
    files_only_in_b: tuple[str, ...]
    files: tuple[str, ...]
    template: Template | None
    is_rearranged: bool
    respelled: tuple[str, ...]
    tensors_a: int
    tensors_b: int
    compared_whole: int
    compared_bytes: int
    sampled: int

    @property
    def is_equal(self) -> bool:
        """Nothing differs in what was compared."""
        return not (
            self.only_in_a
            or self.only_in_b
            or self.retyped
            or self.values
            or self.modules
            or self.settings
            or self.files_only_in_a
            or self.files_only_in_b
            or self.files
            or self.template
        )

    def as_json(self) -> dict[str, object]:
        """The JSON document `nybble.diff/1`."""
        names = [f.name for f in fields(self)]
        return {
            "schema": "nybble.diff/1",
            "equal": self.is_equal,
            **{name: _plain(getattr(self, name)) for name in names},
        }


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, (Count, Retyped, Values, ModuleValues, Setting, Template)):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return value


def compare(
    a: Checkpoint, b: Checkpoint, *, deep: bool = False, progress: Progress | None = None
) -> Difference:
    """What differs between two open checkpoints; with `deep` every byte is compared."""
    values = TensorComparison(a, b, deep, progress or Progress())
    values.run()
    texts = TextComparison(a, b)
    texts.run()
    both = a.tensors.keys() & b.tensors.keys()
    return Difference(
        a=a.path,
        b=b.path,
        deep=deep,
        only_in_a=tuple(n for n in a.tensors if n not in values.paired_a and n not in both),
        only_in_b=tuple(n for n in b.tensors if n not in values.paired_b and n not in both),
        renamed=tuple(values.renamed),
        retyped=tuple(values.retyped),
        values=tuple(values.values),
        modules=tuple(values.modules),
        settings=tuple(texts.settings),
        hidden_settings=texts.hidden,
        files_only_in_a=tuple(texts.only_in_a),
        files_only_in_b=tuple(texts.only_in_b),
        files=tuple(texts.files),
        template=compare_templates(a, b),
        is_rearranged=[(t.name, t.file) for t in a.tensors.values()]
        != [(t.name, t.file) for t in b.tensors.values()]
        and a.tensors.keys() == b.tensors.keys(),
        respelled=tuple(texts.respelled),
        tensors_a=len(a.tensors),
        tensors_b=len(b.tensors),
        compared_whole=values.whole,
        compared_bytes=values.read_bytes,
        sampled=values.sampled,
    )
