"""Flags that several commands share, as dataclasses: one field, one flag of its name.

`@expands` turns a parameter of a command that is such a dataclass into its flags. A flag that was
not given is None, so that a command can tell it from one that repeats a default.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_type_hints

import typer

from nybble.errors import EngineError

if TYPE_CHECKING:
    from nybble.api.opening import OpenOptions
    from nybble.engine.request import Grammar, SamplingParams

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CKPT", help="A local checkpoint folder, quantized or not.")
]

PRECISIONS = ("bf16", "f32", "int8")
CACHE_DTYPES = ("auto", "bf16", "fp8", "f32")
DRAFT_SOURCES = ("auto", "mtp", "ngram", "off")


def look_at(folder: Path) -> None:
    """Read the headers of a checkpoint: a wrong path is answered before anything heavy is loaded.

    Raises CheckpointError.
    """
    from nybble.checkpoint.reader import Checkpoint as Reader

    Reader.open(folder).close()


def expands(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose dataclass parameters are flags, one for each field."""
    hints = get_type_hints(command, include_extras=True)
    parameters: dict[str, inspect.Parameter] = {}
    groups: dict[str, type] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if not dataclasses.is_dataclass(hints[name]):
            parameters[name] = parameter.replace(annotation=hints[name])
            continue
        groups[name] = hints[name]
        inner = get_type_hints(hints[name], include_extras=True)
        for field in dataclasses.fields(hints[name]):
            parameters[field.name] = inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=inner[field.name],
            )

    @functools.wraps(command)
    def flat(**given: object) -> None:
        # ml_dtypes, where it is the first to load numpy, prints a traceback at Ctrl-C.
        import numpy  # noqa: F401

        for name, group in groups.items():
            fields = [f.name for f in dataclasses.fields(group)]
            given[name] = group(**{field: given.pop(field) for field in fields})
        command(**given)

    ordered = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters.values()]
    flat.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    flat.__annotations__ = {name: p.annotation for name, p in parameters.items()}
    return flat


@dataclass(frozen=True)
class EngineFlags:
    """How a checkpoint is opened to generate from it."""

    memory: Annotated[
        float | None,
        typer.Option("--memory", help="GiB for the state of sequences; default: by what is free."),
    ] = None
    kv_cache_dtype: Annotated[
        str,
        typer.Option(
            "--kv-cache-dtype", help="auto (what the checkpoint declares), bf16, fp8 or f32."
        ),
    ] = "auto"
    max_sequences: Annotated[
        int,
        typer.Option(
            "--max-sequences", "--max-num-seqs", min=1, help="Sequences that run at once."
        ),
    ] = 32
    max_batched_tokens: Annotated[
        int,
        typer.Option(
            "--max-batched-tokens",
            "--max-num-batched-tokens",
            min=64,
            help="Tokens of one forward pass; at least --max-sequences + 64.",
        ),
    ] = 1024
    max_context: Annotated[
        int | None,
        typer.Option(
            "--max-context",
            "--max-model-len",
            min=1,
            help="Tokens of a sequence; default: the model's.",
        ),
    ] = None
    precision: Annotated[
        str, typer.Option("--precision", help="Activations in matmuls: bf16, f32 or int8.")
    ] = "bf16"
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Default: all processors.")
    ] = None

    def options(self, ahead: AheadFlags | None = None) -> OpenOptions:
        """For `open_engine`. A word that none knows is a usage error."""
        _check_word("--precision", self.precision, PRECISIONS)
        _check_word("--kv-cache-dtype", self.kv_cache_dtype, CACHE_DTYPES)
        from nybble.api.opening import OpenOptions

        try:
            options = OpenOptions(**dataclasses.asdict(self))
            return options if ahead is None else ahead.added_to(options)
        except EngineError as error:
            raise typer.BadParameter(str(error)) from error


@dataclass(frozen=True)
class AheadFlags:
    """What spares work and changes no token: the prefix cache, and tokens guessed ahead."""

    prefix_cache: Annotated[
        bool,
        typer.Option(
            "--prefix-cache/--no-prefix-cache", help="Keep what prompts that begin alike share."
        ),
    ] = True
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Keep only what has the bits of a prompt that is read anew."),
    ] = False
    snapshot_memory: Annotated[
        float | None,
        typer.Option(
            "--snapshot-memory",
            metavar="GIB",
            help="Of --memory, for copies of recurrent states; default: chosen.",
        ),
    ] = None
    draft: Annotated[
        str,
        typer.Option(
            "--draft", help="Who guesses ahead: auto (the MTP head, else ngram), mtp, ngram, off."
        ),
    ] = "auto"
    draft_tokens: Annotated[
        str,
        typer.Option(
            "--draft-tokens", metavar="auto|0..8", help="How many; auto: as it pays, 0: none."
        ),
    ] = "auto"

    def added_to(self, options: OpenOptions) -> OpenOptions:
        """The options with these fields. A word that none knows is a usage error; raises
        EngineError for what cannot be together."""
        _check_word("--draft", self.draft, DRAFT_SOURCES)
        own = dataclasses.asdict(self) | {"draft_tokens": self._draft_tokens()}
        return dataclasses.replace(options, **own)

    def _draft_tokens(self) -> int | None:
        if self.draft_tokens == "auto":
            return None
        if not (self.draft_tokens.isascii() and self.draft_tokens.isdigit()):
            raise typer.BadParameter(
                f"{self.draft_tokens!r}; write auto, or a number from 0 to 8",
                param_hint="--draft-tokens",
            )
        return int(self.draft_tokens)


def _check_word(flag: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        words = f"{', '.join(known[:-1])} or {known[-1]}"
        raise typer.BadParameter(f"{value!r}; choose {words}", param_hint=flag)


@dataclass(frozen=True)
class SamplingFlags:
    """How tokens are chosen, and when to end: the fields of SamplingParams."""

    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", "-n", min=1, help="Tokens to generate at most."),
    ] = None
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.0, help="0: always the likeliest token.")
    ] = None
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=0, help="The k likeliest; 0: all.")
    ] = None
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Nucleus of this probability; 1: all.")
    ] = None
    min_p: Annotated[
        float | None, typer.Option("--min-p", help="At least this part of the likeliest's.")
    ] = None
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, help="Equal seeds, equal text; default: drawn anew."),
    ] = None
    presence_penalty: Annotated[
        float | None, typer.Option("--presence-penalty", help="-2 to 2, for tokens that came.")
    ] = None
    frequency_penalty: Annotated[
        float | None, typer.Option("--frequency-penalty", help="-2 to 2, each time they came.")
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", help="1: none; the prompt counts too.")
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        typer.Option("--logit-bias", metavar="ID=BIAS", help="Added to a token; repeatable."),
    ] = None
    min_tokens: Annotated[
        int | None, typer.Option("--min-tokens", min=0, help="No end before so many tokens.")
    ] = None
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A text that ends it; repeatable.")
    ] = None
    stop_token_ids: Annotated[
        list[int] | None,
        typer.Option("--stop-token-ids", metavar="ID", help="A token that ends it; repeatable."),
    ] = None
    include_stop: Annotated[
        bool, typer.Option("--include-stop", help="Show the stop text too.")
    ] = False
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end of the turn.")
    ] = False
    bad_words: Annotated[
        list[str] | None,
        typer.Option("--bad-words", metavar="TEXT", help="What must not come; repeatable."),
    ] = None
    json_object: Annotated[
        bool, typer.Option("--json-object", help="The text is one JSON object.")
    ] = False
    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", metavar="FILE", help="JSON of this schema.")
    ] = None
    regex: Annotated[
        str | None, typer.Option("--regex", help="The text matches this regular expression.")
    ] = None
    lark: Annotated[
        Path | None,
        typer.Option("--lark", metavar="FILE", help="The text follows this grammar (llguidance)."),
    ] = None

    def params(self, defaults: Mapping[str, object], **more: object) -> SamplingParams:
        """SamplingParams of the flags that were given; `defaults` and `more` are its fields too.

        What is out of bounds is a usage error.
        """
        from nybble.engine.request import SamplingParams

        plain = {f.name for f in dataclasses.fields(self)} - _NOT_FIELDS
        given = {name: value for name in plain if (value := getattr(self, name)) is not None}
        given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        given["logit_bias"] = dict(map(_bias, self.logit_bias or ()))
        given["grammar"] = self._grammar()
        try:
            return SamplingParams(**{**defaults, **given, **more})
        except EngineError as error:
            raise typer.BadParameter(str(error)) from error

    def _grammar(self) -> Grammar | None:
        from nybble.engine.request import Grammar

        asked: list[tuple[Literal["json_object", "json_schema", "regex", "lark"], str]] = []
        if self.json_object:
            asked.append(("json_object", ""))
        if self.json_schema is not None:
            asked.append(("json_schema", _schema_of(self.json_schema)))
        if self.regex is not None:
            asked.append(("regex", self.regex))
        if self.lark is not None:
            asked.append(("lark", _text_of(self.lark, "--lark")))
        if len(asked) > 1:
            raise typer.BadParameter("choose one of --json-object, --json-schema, --regex, --lark")
        try:
            return Grammar(*asked[0]) if asked else None
        except EngineError as error:
            raise typer.BadParameter(str(error)) from error


_NOT_FIELDS = frozenset({"json_object", "json_schema", "regex", "lark", "logit_bias"})


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}; write ID=BIAS, as in 42=-100", param_hint="--logit-bias"
        ) from None


def _schema_of(path: Path) -> str:
    text = _text_of(path, "--json-schema")
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{path}: no JSON: {error}", param_hint="--json-schema") from error
    return text


def _text_of(path: Path, flag: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path}: cannot be read: {error}", param_hint=flag) from error
