"""Recipes: ordered rules from roles to schemes, one TOML file each. Strict: what a reader would
ignore is an error.

    title = "..."                 # one line for tables
    kv_cache = "fp8"              # optional: what the checkpoint declares for the KV cache

    [[rule]]                      # the first rule that names a module decides
    roles = ["mlp", "attention"]  # words of families/family.py
    modules = ["*.layers.0.*"]    # optional: only modules whose path matches one of these globs
    scheme = "nvfp4-w4a16"        # a row of formats/scheme.py, or "bf16" to leave them alone
    without_data = "bf16"         # optional: the scheme where no activations were measured

What no rule names is copied.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path

from nybble.errors import RecipeError
from nybble.families import ROLES
from nybble.formats.scheme import SCHEMES, Scheme

_KEYS = {"title", "kv_cache", "rule"}
_RULE_KEYS = {"roles", "modules", "scheme", "without_data"}


@dataclass(frozen=True, slots=True)
class Rule:
    """Modules of these roles (and paths, where globs are given) get this scheme.

    `wanted` is the scheme of the full recipe, in the rules of its data-free form that differ.
    """

    roles: tuple[str, ...]
    modules: tuple[str, ...]
    scheme: Scheme
    without_data: Scheme | None
    wanted: Scheme | None = None

    def matches(self, role: str, module: str) -> bool:
        """Whether this rule names a module."""
        return role in self.roles and (
            not self.modules or any(fnmatchcase(module, glob) for glob in self.modules)
        )

    def __str__(self) -> str:
        where = f" in {', '.join(self.modules)}" if self.modules else ""
        return f"{', '.join(self.roles)}{where} -> {self.scheme}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named list of rules."""

    name: str
    title: str
    kv_cache: str
    rules: tuple[Rule, ...]

    @property
    def needs_data(self) -> bool:
        """Some rule asks for activations that only a measured input scale can serve."""
        return any(rule.scheme.needs_input_scale for rule in self.rules)

    def without_data(self) -> Recipe:
        """The recipe's data-free form. Raises RecipeError, naming the rules, if it has none."""
        lacking = [r for r in self.rules if r.scheme.needs_input_scale and r.without_data is None]
        if lacking:
            raise RecipeError(
                f"recipe {self.name} has no data-free form: {lacking[0]} quantizes activations "
                "with a measured input_scale, and a made-up one would silently ruin answers. Let "
                "it be measured (without --data-free), or use a weight-only recipe (nvfp4-all, "
                "nvfp4 --data-free) or one with dynamic activations (fp8)"
            )
        return replace(self, rules=tuple(_downgraded(r) for r in self.rules))


def _downgraded(rule: Rule) -> Rule:
    if not rule.scheme.needs_input_scale or rule.without_data is None:
        return rule
    return replace(rule, scheme=rule.without_data, wanted=rule.scheme)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = resources.files("nybble.plan") / "recipes"
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or a TOML file by path. Raises RecipeError for what is unknown or
    malformed."""
    if name in recipe_names():
        text = (resources.files("nybble.plan") / "recipes" / f"{name}.toml").read_text("utf-8")
        return parse_recipe(name, text)
    path = Path(name)
    if path.suffix == ".toml":
        try:
            return parse_recipe(path.stem, path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe file {path} cannot be read: {error}") from None
    raise RecipeError(
        f"unknown recipe {name!r}: choose one of {', '.join(recipe_names())}, or give a .toml file"
    )


def parse_recipe(name: str, text: str) -> Recipe:
    """Parse TOML text. Raises RecipeError naming the key that is unknown, missing or wrong."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {name}: {error}") from None
    _refuse_unknown(f"recipe {name}", document, _KEYS)
    kv_cache = document.get("kv_cache", "")
    if kv_cache not in ("", "fp8"):
        why = ""
        if isinstance(kv_cache, str) and kv_cache.startswith("nvfp4"):
            why = "; four-bit caches are not made: engines disagree about their scales"
        raise RecipeError(
            f'recipe {name}: kv_cache must be "fp8" or absent, found {kv_cache!r}{why}'
        )
    title = document.get("title", "")
    if not isinstance(title, str):
        raise RecipeError(f"recipe {name}: title must be text, found {title!r}")
    rules = document.get("rule")
    if not isinstance(rules, list) or not rules:
        raise RecipeError(f"recipe {name}: at least one [[rule]] is needed")
    parsed = tuple(_parse_rule(f"recipe {name}, rule {i}", r) for i, r in enumerate(rules, 1))
    return Recipe(name, title, kv_cache, parsed)


def _parse_rule(where: str, rule: object) -> Rule:
    if not isinstance(rule, Mapping):
        raise RecipeError(f"{where}: expected a table, found {rule!r}")
    _refuse_unknown(where, rule, _RULE_KEYS)
    roles = _words(where, "roles", rule.get("roles"))
    for role in roles:
        if role not in ROLES:
            raise RecipeError(f"{where}: unknown role {role!r}; the roles are {', '.join(ROLES)}")
    modules = _words(where, "modules", rule["modules"]) if "modules" in rule else ()
    scheme = _scheme(where, "scheme", rule.get("scheme"))
    without = None
    if "without_data" in rule:
        without = _scheme(where, "without_data", rule["without_data"])
        if not scheme.needs_input_scale:
            raise RecipeError(f"{where}: {scheme} needs no measured scales; take out without_data")
        if without.needs_input_scale:
            raise RecipeError(f"{where}: without_data: {without} needs measured scales itself")
    return Rule(roles, modules, scheme, without)


def _words(where: str, key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise RecipeError(f"{where}: {key} must be a list of words, found {value!r}")
    return tuple(value)


def _scheme(where: str, key: str, value: object) -> Scheme:
    if not isinstance(value, str) or value not in SCHEMES:
        raise RecipeError(f"{where}: {key} must be one of {', '.join(SCHEMES)}, found {value!r}")
    return SCHEMES[value]


def _refuse_unknown(where: str, table: Mapping[str, object], known: set[str]) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise RecipeError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
