"""`--promote`: a W4A4 recipe that spares the linears whose inputs suffer most, as measured.

The derived recipe is a file beside the output, `OUT.recipe.toml`, which says in comments what was
measured: to be read, kept, and used again; an interrupted run is continued with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.api.extras import needs_torch
from nybble.api.plan import find_layout, open_source
from nybble.calibrate.derived import recipe_text
from nybble.errors import CheckpointError, TextError
from nybble.kernels.dispatch import default_threads
from nybble.machine import available_bytes
from nybble.plan.plan import make_plan
from nybble.plan.recipe import Recipe, load_recipe
from nybble.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from nybble.calibrate.promotion import Promotion

#: Tokens that are measured and judged on, half of them each.
TOKENS = 8192
#: Groups that the recipe's comments list.
_LISTED = 20


@dataclass(frozen=True, slots=True)
class Promoted:
    """The recipe, the file that holds it, and what it was made of (None: the file was there)."""

    recipe: Recipe
    path: Path
    promotion: Promotion | None

    def as_json(self) -> dict[str, object]:
        """For the document of `nybble quantize --json`."""
        found = None if self.promotion is None else self.promotion.as_json()
        return {"recipe": str(self.path), "promotion": found}


def promoted_recipe(
    model: str | PathLike[str],
    out: str | PathLike[str],
    recipe: str | Recipe,
    *,
    share: float | None = None,
    layout: str = "modelopt",
    text: str | None = None,
    tokens: int = TOKENS,
    windows: Sequence[Tensor] | None = None,
    headroom: float | None = None,
    generic: bool = False,
    untie_head: bool = False,
    resume: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Promoted:
    """Measure which W4A4 groups of `recipe` lose most by the rounding of their inputs, and write
    the recipe that makes `share` of their weights W4A16 (None: what is out of proportion).

    Scales are measured on every other window of `text` (default: the project's own mixture), or of
    some of the ready `windows`, int64 [length], about TOKENS tokens from the first to the last;
    damage on the windows between. `untie_head` as in `quantize`. With `resume` a file that was made
    of the same is taken.

    Raises RecipeError for a recipe without W4A4 and a share that is none, TextError for a text that
    is too short, CheckpointError for a file that is in the way, and what measuring raises.
    """
    path = Path(out).with_name(Path(out).name + ".recipe.toml")
    if path.exists() and not resume:
        raise CheckpointError(
            f"{path}: is there already; use it as the recipe (--recipe {path}), continue its run "
            "with --resume, or remove it"
        )
    needs_torch("--promote", ", or leave --promote out")
    from nybble.calibrate.amax import calibration_windows, measure_amax
    from nybble.calibrate.promotion import measure_spots, promote, refuse_nothing_to_promote
    from nybble.calibrate.scales import HEADROOM, input_scales

    progress, threads = progress or Progress(), threads or default_threads()
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    with open_source(
        model, headers_only=False, generic=generic, untie_head=untie_head
    ) as checkpoint:
        plan = make_plan(checkpoint, chosen, find_layout(layout), generic=generic)
        refuse_nothing_to_promote(plan)
        if windows is None:
            windows = calibration_windows(checkpoint.path, text, tokens)
        else:
            windows = _spread(windows)
        made_of = _made_of(chosen, share, layout, windows, untied=untie_head)
        if path.exists():
            _refuse_other(path, made_of)
            return Promoted(load_recipe(str(path)), path, None)
        if len(windows) < 2:
            raise TextError(
                f"{tokens:,} tokens are one window: --promote measures on one half of the text and "
                "judges on the other; use more"
            )
        _make_folder(path)
        measured = measure_amax(plan, windows=windows[::2], threads=threads, progress=progress)
        scales = input_scales(plan, measured, HEADROOM if headroom is None else headroom)
        spots = measure_spots(
            plan,
            scales.values,
            windows[1::2],
            threads=threads,
            progress=progress,
            limit_bytes=available_bytes(),
        )
        found = promote(plan, spots, share)
    _write(path, made_of, found)
    return Promoted(load_recipe(str(path)), path, found)


def _spread(windows: Sequence[Tensor]) -> list[Tensor]:
    """Some of many windows, from the first to the last, about TOKENS tokens of them."""
    count = max(2, TOKENS * len(windows) // max(1, sum(map(len, windows))))
    step = max(1.0, len(windows) / count)
    return [windows[int(i * step)] for i in range(min(count, len(windows)))]


def _made_of(
    recipe: Recipe, share: float | None, layout: str, windows: Sequence[Tensor], *, untied: bool
) -> str:
    """What the file is made of: its first line, by which a resumed run knows it."""
    digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in windows)).hexdigest()[:16]
    asked = "what is out of proportion" if share is None else f"share {share:g}"
    head = ", untied" if untied else ""
    return f"# made by --promote of recipe {recipe.name}, {asked}, {layout}{head}, windows {digest}"


def _refuse_other(path: Path, made_of: str) -> None:
    try:
        first = path.read_text("utf-8").split("\n", 1)[0]
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if first != made_of:
        raise CheckpointError(
            f"{path}: the interrupted run was asked for something else ({first!r} then, "
            f"{made_of!r} now); use the same options, or remove it and start again"
        )


def _make_folder(path: Path) -> None:
    """So that nothing is measured in vain."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path.parent}: cannot be made: {error.strerror}") from error


def _write(path: Path, made_of: str, found: Promotion) -> None:
    worst = sorted(found.spots, key=lambda s: -s.damage)[:_LISTED]
    lines = [
        made_of,
        f"# W4A16 instead of W4A4: {len(found.promoted)} of {len(found.spots)} groups, "
        f"{100 * found.share:.1f} % of their weights, {100 * found.spared:.1f} % of the damage of "
        "rounding inputs",
        "# (change of the layer's output by this group's rounding, relative, squared, per token):",
        *(f"# {s.damage:.2e} {'*' if s.name in found.promoted else ' '} {s.name}" for s in worst),
        "",
    ]
    try:
        path.write_text("\n".join(lines) + "\n" + recipe_text(found.recipe), "utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
