"""A recipe that says module by module what was chosen: an allocation in the words of
`plan/recipe.py`, to be read, kept and used again.

Knows recipes and plans; not why something was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nybble.calibrate.allocate import Group
from nybble.formats.scheme import BF16, Scheme
from nybble.plan.plan import Plan
from nybble.plan.recipe import Recipe, Rule


def derive(
    plan: Plan, groups: Sequence[Group], choice: Mapping[str, Scheme], name: str, title: str
) -> Recipe:
    """The recipe that gives every group its scheme, and leaves alone what `plan` leaves alone.

    Of each role, the scheme that most of its modules have stands last and names no modules.
    """
    chosen: dict[str, dict[str, tuple[Scheme, list[str]]]] = {}
    counts: dict[str, dict[str, int]] = {}

    def add(role: str, scheme: Scheme, glob: str, modules: int) -> None:
        by = chosen.setdefault(role, {})
        by.setdefault(scheme.name, (scheme, []))[1].append(glob)
        count = counts.setdefault(role, {})
        count[scheme.name] = count.get(scheme.name, 0) + modules

    for group in groups:
        is_stack = group.role == "routed_expert"
        for glob in (f"{group.name}.*",) if is_stack else group.modules:
            add(group.role, choice[group.name], glob, len(group.modules) if is_stack else 1)
    for copy in plan.copies:
        claimed = plan.family.claim(copy.tensor.name)
        if claimed is not None and claimed.claim.is_linear and copy.role in chosen:
            is_stack = bool(claimed.claim.stack)
            add(copy.role, BF16, claimed.module + (".*" if is_stack else ""), 1)
    rules = []
    for role, by in chosen.items():
        usual = max(by, key=lambda s: counts[role][s])
        for scheme_name, (scheme, globs) in by.items():
            if scheme_name != usual:
                rules.append(Rule((role,), tuple(globs), scheme, None))
        rules.append(Rule((role,), (), by[usual][0], None))
    return Recipe(name, title, plan.recipe.kv_cache, tuple(rules))


def recipe_text(recipe: Recipe) -> str:
    """The recipe as TOML, as `plan.recipe.parse_recipe` reads it."""
    lines = [f"title = {_quoted(recipe.title)}"]
    if recipe.kv_cache:
        lines.append(f"kv_cache = {_quoted(recipe.kv_cache)}")
    for rule in recipe.rules:
        lines += ["", "[[rule]]", f"roles = {_words(rule.roles)}"]
        if rule.modules:
            lines += ["modules = [", *(f"    {_quoted(m)}," for m in rule.modules), "]"]
        lines.append(f"scheme = {_quoted(rule.scheme.name)}")
        if rule.without_data is not None:
            lines.append(f"without_data = {_quoted(rule.without_data.name)}")
    return "\n".join(lines) + "\n"


def _words(words: Sequence[str]) -> str:
    return f"[{', '.join(map(_quoted, words))}]"


def _quoted(text: str) -> str:
    """A basic string; names of modules and titles hold no control characters."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
