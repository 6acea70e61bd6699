"""Recipes are strict: what a reader would have to ignore is an error that says what is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble.errors import RecipeError
from nybble.families import ROLES
from nybble.formats.scheme import SCHEMES
from nybble.plan.recipe import load_recipe, parse_recipe, recipe_names

SHIPPED = [
    "fp8",
    "mxfp4",
    "nvfp4",
    "nvfp4-all",
    "nvfp4-experts-fp8",
    "nvfp4-mtp",
    "nvfp4-redhat",
    "nvfp4-w4a4",
]
RULE = '[[rule]]\nroles = ["mlp"]\nscheme = "nvfp4-w4a16"\n'


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as found:
        parse_recipe("mine", text)
    assert "mine" in str(found.value)
    return str(found.value)


def test_the_shipped_recipes_are_those_of_the_house() -> None:
    assert recipe_names() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_parses_and_has_a_title(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.title
    assert recipe.rules


def test_a_rule_keeps_its_roles_globs_and_schemes() -> None:
    recipe = parse_recipe(
        "mine",
        'title = "t"\nkv_cache = "fp8"\n[[rule]]\nroles = ["mlp", "attention"]\n'
        'modules = ["*.layers.0.*"]\nscheme = "fp8-static"\nwithout_data = "bf16"\n',
    )
    (rule,) = recipe.rules
    assert (recipe.title, recipe.kv_cache) == ("t", "fp8")
    assert (rule.roles, rule.modules) == (("mlp", "attention"), ("*.layers.0.*",))
    assert (rule.scheme, rule.without_data) == (SCHEMES["fp8-static"], SCHEMES["bf16"])
    assert str(rule) == "mlp, attention in *.layers.0.* -> fp8-static"
    assert rule.matches("mlp", "model.layers.0.mlp.up_proj")
    assert not rule.matches("mlp", "model.layers.10.mlp.up_proj")
    assert not rule.matches("lm_head", "model.layers.0.mlp.up_proj")


def test_globs_know_upper_from_lower_case() -> None:
    rule = parse_recipe("mine", RULE + 'modules = ["*.Layers.*"]').rules[0]
    assert not rule.matches("mlp", "model.layers.0.mlp.up_proj")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "at least one [[rule]]"),
        ("rule = []", "at least one [[rule]]"),
        ("rule = 3", "at least one [[rule]]"),
        ("rule = [3]", "expected a table, found 3"),
        ("[[rule]", "mine"),
        ("titel = 1\n" + RULE, "unknown key 'titel'; known: kv_cache, rule, title"),
        ("title = 1\n" + RULE, "title must be text, found 1"),
        ('kv_cache = "int8"\n' + RULE, "kv_cache must be \"fp8\" or absent, found 'int8'"),
        ('kv_cache = ["fp8"]\n' + RULE, "kv_cache must be"),
        (RULE + "group_size = 16", "rule 1: unknown key 'group_size'; known: modules, roles"),
        ('[[rule]]\nscheme = "bf16"', "rule 1: roles must be a list of words, found None"),
        ('[[rule]]\nroles = "mlp"\nscheme = "bf16"', "roles must be a list of words, found 'mlp'"),
        ('[[rule]]\nroles = []\nscheme = "bf16"', "roles must be a list of words, found []"),
        ('[[rule]]\nroles = [1]\nscheme = "bf16"', "roles must be a list of words, found [1]"),
        ('[[rule]]\nroles = ["mpl"]\nscheme = "bf16"', "unknown role 'mpl'; the roles are routed_"),
        (RULE + "modules = []", "modules must be a list of words, found []"),
        (RULE + 'modules = "*"', "modules must be a list of words, found '*'"),
        ('[[rule]]\nroles = ["mlp"]', "scheme must be one of bf16, nvfp4-w4a16"),
        ('[[rule]]\nroles = ["mlp"]\nscheme = "nvfp4"', "found 'nvfp4'"),
        ('[[rule]]\nroles = ["mlp"]\nscheme = 4', "found 4"),
        (RULE + RULE + 'without_data = "none"', "rule 2: without_data must be one of bf16"),
    ],
)
def test_what_is_malformed_is_named(text: str, expected: str) -> None:
    assert expected in refusal(text)


def test_the_choices_in_messages_are_complete() -> None:
    said = refusal('[[rule]]\nroles = ["mpl"]\nscheme = "bf16"')
    assert all(role in said for role in ROLES)
    said = refusal('[[rule]]\nroles = ["mlp"]\nscheme = "x"')
    assert all(name in said for name in SCHEMES)


def test_an_unknown_name_lists_the_recipes_and_the_way_to_an_own_one() -> None:
    with pytest.raises(RecipeError) as found:
        load_recipe("nvfp5")
    assert "nvfp5" in str(found.value)
    assert ".toml" in str(found.value)
    assert all(name in str(found.value) for name in SHIPPED)


def test_a_recipe_file_is_named_after_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(RULE)
    assert load_recipe(str(tmp_path / "mine.toml")).name == "mine"


@pytest.mark.parametrize("data", [None, b"\xff\xfe"])
def test_a_recipe_file_that_cannot_be_read_is_named(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "mine.toml"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(RecipeError, match=r"mine\.toml cannot be read"):
        load_recipe(str(path))


def test_a_shipped_name_wins_over_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvfp4").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("nvfp4").name == "nvfp4"


# ------------------------------------------------------------------------------------ without data


@pytest.mark.parametrize("name", ["nvfp4-w4a4", "nvfp4-redhat", "nvfp4-experts-fp8"])
def test_a_recipe_that_needs_data_is_refused_by_rule_and_with_a_way_out(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.needs_data
    with pytest.raises(RecipeError) as found:
        recipe.without_data()
    said = str(found.value)
    assert f"recipe {name}" in said
    assert str(recipe.rules[0]) in said
    assert "input_scale" in said
    assert "nvfp4-all" in said


def test_the_data_free_form_of_the_published_mix_keeps_static_roles_in_bf16() -> None:
    recipe = load_recipe("nvfp4")
    assert recipe.needs_data
    free = recipe.without_data()
    assert not free.needs_data
    assert [str(rule.scheme) for rule in free.rules] == ["nvfp4-w4a16", "bf16"]
    assert (free.name, free.kv_cache) == (recipe.name, recipe.kv_cache)


@pytest.mark.parametrize("name", ["nvfp4-all", "fp8", "mxfp4"])
def test_a_recipe_without_measured_scales_is_its_own_data_free_form(name: str) -> None:
    recipe = load_recipe(name)
    assert not recipe.needs_data
    assert recipe.without_data().rules == tuple(recipe.rules)


def test_without_data_is_refused_where_it_would_change_a_rule_that_needs_none() -> None:
    """`plan` would show one thing and `quantize` do another."""
    said = refusal(RULE + 'without_data = "bf16"')
    assert "rule 1" in said
    assert "nvfp4-w4a16 needs no measured scales" in said


def test_without_data_may_not_need_data_itself() -> None:
    said = refusal(
        '[[rule]]\nroles = ["mlp"]\nscheme = "fp8-static"\nwithout_data = "nvfp4-w4a4"\n'
    )
    assert "without_data" in said
    assert "nvfp4-w4a4 needs measured scales" in said
