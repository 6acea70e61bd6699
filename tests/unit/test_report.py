"""Documents carry their conditions, and unequal ones are not compared."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from nybble.errors import CheckpointError, EvaluationError
from nybble.evaluate.perplexity import measure_perplexity
from nybble.evaluate.report import (
    NOTED,
    SUBJECTS,
    Conditions,
    Report,
    eval_report,
    parse_conditions,
    perplexity_report,
    read_report,
    refuse_unequal,
)
from nybble.evaluate.significance import Bootstrap

CONDITIONS = Conditions(
    model="SmolLM2-135M-NVFP4",
    weights_sha256="11" * 32,
    config_sha256="22" * 32,
    tokenizer_sha256="33" * 32,
    text="wikitext2",
    text_sha256="44" * 32,
    convention="windows",
    length=512,
    stride=None,
    bos=None,
    tokens=1024,
    windows=2,
    scored=1022,
    precision="bf16",
    kv_dtype="f32",
    activations="none",
    reference="SmolLM2-135M",
    reference_sha256="55" * 32,
    nybble="0.2.0",
    torch="2.13.0",
    isa="avx512bf16",
    kernels="cpu",
    threads=2,
)


def document() -> Report:
    nll = np.random.default_rng(0).gamma(2, 1, 1022)
    figures = measure_perplexity(nll, np.arange(1022) // 511, bootstrap=Bootstrap(resamples=100))
    return perplexity_report(CONDITIONS, figures)


def changed(name: str) -> Conditions:
    """The conditions with one of them different."""
    value = getattr(CONDITIONS, name)
    other = 7 if value is None or isinstance(value, int) else value + "x"
    return replace(CONDITIONS, **{name: other})


DECISIVE = [f.name for f in fields(Conditions) if f.name not in (*SUBJECTS, *NOTED)]


def test_a_document_begins_with_its_schema_and_is_read_back_equal(tmp_path: Path) -> None:
    report = document()
    path = tmp_path / "p.json"
    path.write_text(json.dumps(report.as_json(), indent=2))
    assert next(iter(report.as_json().items())) == ("schema", "nybble.perplexity/1")
    again = read_report(path)
    assert again.conditions == CONDITIONS
    assert json.dumps(again.as_json()) == json.dumps(report.as_json())


@pytest.mark.parametrize("name", DECISIVE)
def test_a_condition_that_decides_the_figure_must_agree(name: str) -> None:
    a = document()
    b = replace(a, conditions=changed(name))
    with pytest.raises(EvaluationError, match=f"{name}: .* against .*same ones"):
        refuse_unequal(a, b)
    assert len(refuse_unequal(a, b, may_differ=(name,))) == 1


def test_every_condition_that_differs_is_listed() -> None:
    a = document()
    b = replace(a, conditions=replace(CONDITIONS, length=1024, precision="f32", threads=8))
    with pytest.raises(EvaluationError) as caught:
        refuse_unequal(a, b)
    assert "length: 512 against 1024; precision: 'bf16' against 'f32')" in str(caught.value)


@pytest.mark.parametrize("name", NOTED)
def test_what_decides_nothing_is_said(name: str) -> None:
    a = document()
    assert refuse_unequal(a, replace(a, conditions=changed(name))) == (
        f"{name}: {getattr(CONDITIONS, name)!r} against {getattr(changed(name), name)!r}",
    )


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_models_that_are_compared_may_differ(name: str) -> None:
    a = document()
    assert refuse_unequal(a, replace(a, conditions=changed(name))) == ()


def test_documents_of_two_kinds_are_not_compared() -> None:
    a = document()
    with pytest.raises(EvaluationError, match="run the same command"):
        refuse_unequal(a, replace(a, schema="nybble.eval/1"))


def test_figures_of_other_tokens_than_the_conditions_say_are_refused() -> None:
    figures = measure_perplexity([1.0, 2.0], [0, 1], bootstrap=Bootstrap(resamples=100))
    with pytest.raises(EvaluationError, match="2 tokens in 2 windows .* 1022 in 2"):
        perplexity_report(CONDITIONS, figures)


def test_a_divergence_names_its_reference() -> None:
    from test_divergence import FAST, random_tokens

    from nybble.evaluate.divergence import summarize

    found = summarize(random_tokens(120, 4), FAST)
    conditions = replace(CONDITIONS, windows=4, scored=120)
    report = eval_report(conditions, found)
    assert json.loads(json.dumps(report.as_json()))["divergence"]["tokens"] == 120
    with pytest.raises(EvaluationError, match="which model it is from"):
        eval_report(replace(conditions, reference_sha256=None), found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": "2"}, "'threads' must be int"),
        ({"threads": True}, "'threads' must be int"),
        ({"bos": 1.5}, r"'bos' must be int \| None"),
        ({"text": None}, "'text' must be str"),
        ({"colour": "red"}, "unknown"),
    ],
)
def test_conditions_of_wrong_types_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        parse_conditions({**CONDITIONS.as_json(), **change}, "a.json")
    with pytest.raises(EvaluationError, match="lack"):
        parse_conditions([], "a.json")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", CheckpointError, "not valid JSON"),
        ('{"schema": "nybble.plan/1"}', EvaluationError, "schema 'nybble.plan/1'"),
        ('{"schema": ["x"]}', EvaluationError, "schema"),
        ('{"schema": "nybble.eval/1"}', EvaluationError, "conditions lack"),
    ],
)
def test_files_that_are_no_report_are_refused(
    tmp_path: Path, text: str, error: type[Exception], message: str
) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(error, match=message):
        read_report(path)
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_report(tmp_path / "none.json")


def test_a_document_with_other_figures_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**document().as_json(), "divergence": {}}))
    with pytest.raises(EvaluationError, match="expected an object 'perplexity'"):
        read_report(path)
