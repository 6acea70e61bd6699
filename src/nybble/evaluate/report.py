"""Numbers with their conditions: what is published, kept in files, and compared.

A figure without its text, convention and precision says nothing, so they travel in one document:

    {"schema": "nybble.eval/1", "conditions": {...}, "divergence": {...}}
    {"schema": "nybble.perplexity/1", "conditions": {...}, "perplexity": {...}}

Two documents may be compared only if the conditions that decide a figure's size agree; what differs
otherwise (versions, threads) is said. Knows neither how figures are made nor how they are shown.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from nybble.checkpoint.safetensors import HEADER_LIMIT, parse_json, show
from nybble.errors import EvaluationError
from nybble.evaluate.divergence import Divergence
from nybble.evaluate.perplexity import Perplexity

EVAL_SCHEMA = "nybble.eval/1"
PERPLEXITY_SCHEMA = "nybble.perplexity/1"


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a figure depends on.

    `model` is the folder's name; `weights_sha256` its fingerprint (names, headers, sizes and times
    of the shards, not their content: a second download has another one), `config_sha256` and
    `tokenizer_sha256` hash config.json and tokenizer.json.
    `text` is a suite's or a file's name; `tokens` counts the ids that were cut into `windows`,
    `scored` those that count. `precision` is that of matmul operands, `kv_dtype` of the cache,
    `activations` what was simulated of quantized inputs, or "none". `reference` is the model that
    a divergence is from. `isa` and `kernels` are the instruction set and the back end.
    """

    model: str
    weights_sha256: str
    config_sha256: str
    tokenizer_sha256: str
    text: str
    text_sha256: str
    convention: str
    length: int
    stride: int | None
    bos: int | None
    tokens: int
    windows: int
    scored: int
    precision: str
    kv_dtype: str
    activations: str
    reference: str | None
    reference_sha256: str | None
    nybble: str
    torch: str
    isa: str
    kernels: str
    threads: int

    def as_json(self) -> dict[str, object]:
        return asdict(self)


#: What may differ between two models that are compared; all the rest of Conditions must agree or
#: is only noted.
SUBJECTS = ("model", "weights_sha256", "config_sha256", "reference")
NOTED = ("text", "reference_sha256", "nybble", "torch", "isa", "kernels", "threads")


@dataclass(frozen=True, slots=True)
class Report:
    """One document: its schema, its conditions, and its figures as JSON values by name."""

    schema: str
    conditions: Conditions
    figures: Mapping[str, object]

    def as_json(self) -> dict[str, object]:
        """The whole document, schema first."""
        return {"schema": self.schema, "conditions": self.conditions.as_json(), **self.figures}


def eval_report(conditions: Conditions, divergence: Divergence) -> Report:
    """The document of `nybble eval`. Raises EvaluationError if figures and conditions disagree."""
    _check_counts(conditions, divergence.tokens, divergence.windows)
    if conditions.reference_sha256 is None:
        raise EvaluationError("a divergence without reference_sha256: say which model it is from")
    return Report(EVAL_SCHEMA, conditions, {"divergence": divergence.as_json()})


def perplexity_report(conditions: Conditions, perplexity: Perplexity) -> Report:
    """The document of `nybble perplexity`. Raises EvaluationError as `eval_report` does."""
    _check_counts(conditions, perplexity.tokens, perplexity.windows)
    return Report(PERPLEXITY_SCHEMA, conditions, {"perplexity": perplexity.as_json()})


def refuse_unequal(a: Report, b: Report, may_differ: Collection[str] = ()) -> tuple[str, ...]:
    """Check that two results may be compared; returns what differs without deciding anything.

    `may_differ` names conditions whose difference is the question, such as ("activations",).
    Raises EvaluationError that lists every condition of the others that differs.
    """
    if a.schema != b.schema:
        raise EvaluationError(
            f"a document {a.schema} cannot be compared with one {b.schema}; run the same command"
        )
    return refuse_unequal_conditions(a.conditions, b.conditions, may_differ)


def refuse_unequal_conditions(
    a: Conditions, b: Conditions, may_differ: Collection[str] = ()
) -> tuple[str, ...]:
    """`refuse_unequal` on conditions alone: a candidate's against a reference pack's."""
    names = [field.name for field in fields(Conditions)]
    assert set(may_differ) <= set(names), f"{may_differ} are no conditions"
    differing = [n for n in names if n not in SUBJECTS and getattr(a, n) != getattr(b, n)]
    said = {n: f"{n}: {getattr(a, n)!r} against {getattr(b, n)!r}" for n in differing}
    fatal = [n for n in differing if n not in NOTED and n not in may_differ]
    if fatal:
        listed = "; ".join(said[n] for n in fatal)
        raise EvaluationError(
            f"{a.model} and {b.model} were measured under different conditions ({listed}); "
            "measure both under the same ones"
        )
    return tuple(said.values())


def _check_counts(conditions: Conditions, scored: int, windows: int) -> None:
    found, expected = (scored, windows), (conditions.scored, conditions.windows)
    if found != expected:
        raise EvaluationError(
            f"{conditions.model}: figures of {found[0]} tokens in {found[1]} windows under "
            f"conditions that say {expected[0]} in {expected[1]}"
        )


# ----------------------------------------------------------------------------------- from documents


def read_report(path: Path) -> Report:
    """A document that was saved. Raises EvaluationError if the file cannot be read or is of another
    schema, CheckpointError if it is no strict JSON."""
    try:
        with path.open("rb") as file:
            data = file.read(HEADER_LIMIT + 1)
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read: {error.strerror}") from error
    document = parse_json(data, str(path))
    schema = document.pop("schema", None)
    figure = {EVAL_SCHEMA: "divergence", PERPLEXITY_SCHEMA: "perplexity"}.get(str(schema))
    if figure is None:
        raise EvaluationError(
            f"{path}: schema {show(schema)}; expected {EVAL_SCHEMA} or {PERPLEXITY_SCHEMA}, which "
            "`nybble eval --json` and `nybble perplexity --json` write"
        )
    conditions = parse_conditions(document.pop("conditions", None), str(path))
    if document.keys() != {figure} or not isinstance(document[figure], dict):
        raise EvaluationError(
            f"{path}: expected an object {figure!r} beside schema and conditions, found "
            f"{show(sorted(document))}"
        )
    return Report(str(schema), conditions, document)


def parse_conditions(value: object, where: str) -> Conditions:
    """Conditions from their JSON object, every field of its type; else EvaluationError."""
    expected = {field.name: str(field.type) for field in fields(Conditions)}
    if not isinstance(value, dict) or value.keys() != expected.keys():
        keys = value.keys() if isinstance(value, dict) else ()
        missing = [name for name in expected if name not in keys]
        unknown = [show(name) for name in keys if name not in expected]
        raise EvaluationError(
            f"{where}: conditions lack {missing} and have unknown {unknown[:5]}; the file is "
            "damaged or of another version"
        )
    for name, type_name in expected.items():
        # Exact: JSON's true is an int to isinstance.
        if type(value[name]).__name__ not in type_name.replace("None", "NoneType").split(" | "):
            raise EvaluationError(
                f"{where}: condition {name!r} must be {type_name}, found {show(value[name])}"
            )
    return Conditions(**value)
