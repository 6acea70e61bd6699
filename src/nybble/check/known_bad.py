"""Combinations of engine, version and checkpoint that are known to fail: a table, and who matches.

The table is known_bad.toml, rows from public threads. A checkpoint shows only its own features; on
what hardware and with which flags it is run is for the reader to compare.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import zip_longest

from nybble.check import behaviour_code, templates
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import Survey
from nybble.errors import RecipeError

#: What a row may ask of a checkpoint.
FEATURES: Mapping[str, str] = {
    "moe": "routed experts",
    "gated_delta": "layers of gated linear attention, which keep a recurrent state",
    "mtp": "a multi-token-prediction head",
    "mtp-block-fp8": "an MTP head in block FP8",
    "vision": "a vision tower",
    "modelopt": "ModelOpt's layout",
    "compressed-tensors": "the compressed-tensors layout",
    "mixed": "more than one quantized format",
    "nvfp4": "weights in NVFP4",
    "nvfp4-moe": "routed experts in NVFP4",
    "nvfp4-dense": "attention or dense MLP in NVFP4",
    "nvfp4-lm-head": "lm_head in NVFP4",
    "nvfp4-w4a4": "NVFP4 with four-bit activations declared",
    "nvfp4-w4a16": "NVFP4 declared as weight-only",
    "fp8": "weights in FP8",
    "fp8-block": "weights in block FP8",
    "input-scale": "input scales",
    "kv_fp8": "an FP8 KV cache declared",
    "kv_nvfp4": "an NVFP4 KV cache declared",
    "code-hooks": "hooks to code in a configuration",
}
ENGINES = ("vllm", "sglang", "trtllm", "llamacpp", "transformers", "ollama", "flashinfer")
STATES = ("open", "closed", "fixed")

_BOUND = re.compile(r"(>=|<=|==|!=|>|<)\s*(\d+(?:\.\d+)*)")
_VERSION = re.compile(r"v?(\d+(?:\.\d+)*)(.*)")
_PRE_RELEASE = re.compile(r"[.\-_]?(a|b|rc|alpha|beta|dev|pre)")


@dataclass(frozen=True, slots=True)
class KnownBad:
    """One failure that others met. `versions` are bounds, () for all."""

    id: str
    engine: str
    versions: tuple[tuple[str, str], ...]
    hardware: str
    features: frozenset[str]
    flags: tuple[str, ...]
    symptom: str
    workaround: str
    threads: tuple[str, ...]
    state: str

    def is_in(self, version: str) -> bool:
        """Whether a version of the engine is among those named; an unknown one is."""
        found = _VERSION.match(version.strip())
        if found is None:
            return True
        # 0.29.0rc1 comes before 0.29; +cu130 and .post1 do not.
        early = _PRE_RELEASE.match(found[2]) is not None
        return all(_holds(found[1], early, sign, bound) for sign, bound in self.versions)

    @property
    def conditions(self) -> str:
        """Version, hardware and flags in words; "" for always."""
        bounds = ", ".join(f"{sign}{bound}" for sign, bound in self.versions)
        flags = f"with {' and '.join(self.flags)}" if self.flags else ""
        return "; ".join(part for part in (bounds, self.hardware, flags) if part)


def _holds(version: str, is_early: bool, sign: str, bound: str) -> bool:
    """Compare numbers part by part; "<=0.15" takes all of 0.15.x, as threads mean it."""
    ours, theirs = ([int(n) for n in v.split(".")] for v in (version, bound))
    if sign in ("<=", ">", "==", "!="):
        ours = ours[: len(theirs)]
    order = 0
    for a, b in zip_longest(ours, theirs, fillvalue=0):
        order = order or (a > b) - (a < b)
    if order == 0 and is_early and sign in ("<", ">="):
        order = -1
    signs = {"<": order < 0, "<=": order <= 0, ">": order > 0, ">=": order >= 0}
    return {**signs, "==": order == 0, "!=": order != 0}[sign]


def known_bad(
    engine: str = "", version: str = "", features: Collection[str] | None = None
) -> tuple[KnownBad, ...]:
    """The rows for an engine ("" for all), a version ("" for any) and a checkpoint's features (None
    for any): those rows all of whose features it has."""
    return tuple(
        row
        for row in _table()
        if (not engine or row.engine == engine)
        and row.is_in(version)
        and (features is None or row.features <= set(features))
    )


@cache
def _table() -> tuple[KnownBad, ...]:
    return parse_table(files("nybble.check").joinpath("known_bad.toml").read_text("utf-8"))


def parse_table(text: str) -> tuple[KnownBad, ...]:
    """The rows of a table in TOML. Raises RecipeError for a row that is incomplete or names what
    does not exist."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"known_bad.toml: is not TOML: {error}") from error
    rows = tuple(_row(row) for row in document.get("row", []))
    names = [row.id for row in rows]
    if twice := {name for name in names if names.count(name) > 1}:
        raise RecipeError(f"known_bad.toml: the id {min(twice)!r} occurs twice")
    return rows


_KEYS = frozenset(("id", "engine", "versions", "features", "flags", "symptom", "workaround",
                   "threads", "state"))  # fmt: skip


def _row(row: Mapping[str, object]) -> KnownBad:
    where = f"known_bad.toml: row {row.get('id')!r}"
    if not row.keys() - {"hardware"} == _KEYS:
        wrong = sorted((row.keys() - {"hardware"}) ^ _KEYS)
        raise RecipeError(f"{where}: missing or unknown keys {', '.join(wrong)}")
    words = {key: row.get(key, "") for key in (*_KEYS, "hardware")}
    if words["engine"] not in ENGINES:
        raise RecipeError(f"{where}: engine: expected one of {', '.join(ENGINES)}")
    if words["state"] not in STATES:
        raise RecipeError(f"{where}: state: expected one of {', '.join(STATES)}")
    features = _words(words["features"], where, "features")
    if unknown := set(features) - FEATURES.keys():
        raise RecipeError(f"{where}: features: {min(unknown)!r} is none of {', '.join(FEATURES)}")
    threads = _words(words["threads"], where, "threads")
    if not threads or not all(thread.startswith("https://") for thread in threads):
        raise RecipeError(f"{where}: threads: expected at least one https address")
    if not all(isinstance(words[key], str) for key in ("id", "symptom", "workaround", "hardware")):
        raise RecipeError(f"{where}: id, symptom, workaround and hardware must be strings")
    if not words["id"] or not words["symptom"] or not words["workaround"]:
        raise RecipeError(f"{where}: id, symptom and workaround must not be empty")
    return KnownBad(
        id=str(words["id"]),
        engine=str(words["engine"]),
        versions=parse_versions(words["versions"], where),
        hardware=str(words["hardware"]),
        features=frozenset(features),
        flags=_words(words["flags"], where, "flags"),
        symptom=str(words["symptom"]),
        workaround=str(words["workaround"]),
        threads=threads,
        state=str(words["state"]),
    )


def _words(value: object, where: str, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise RecipeError(f"{where}: {key}: expected a list of strings")
    return tuple(value)


def parse_versions(value: object, where: str) -> tuple[tuple[str, str], ...]:
    """Bounds such as ">=0.20,<0.29" as (sign, version) pairs; RecipeError for anything else."""
    if not isinstance(value, str):
        raise RecipeError(f"{where}: versions: expected a string")
    found = []
    for part in value.split(",") if value.strip() else ():
        match = _BOUND.fullmatch(part.strip())
        if match is None:
            raise RecipeError(f'{where}: versions: expected bounds as ">=0.20,<0.29", found {part}')
        found.append((match[1], match[2]))
    return tuple(found)


# ------------------------------------------------------------------------------- of a checkpoint


def features_of(survey: Survey) -> frozenset[str]:
    """What of FEATURES a checkpoint has, by its headers and configuration."""
    found = set(_weights(survey))
    found |= {f for f in ("modelopt", "compressed-tensors") if survey.declaration.layout == f}
    kv_cache = survey.declaration.kv_cache
    found |= {f"kv_{word}" for word in ("fp8", "nvfp4") if kv_cache.startswith(word)}
    if templates.advertises_vision(survey):
        found.add("vision")
    if any(True for _ in behaviour_code.HOOK.look(survey)):
        found.add("code-hooks")
    return frozenset(found & FEATURES.keys())


_ROLES = {
    "routed_expert": "moe",
    "linear_attention": "gated_delta",
    "linear_attention_state": "gated_delta",
    "mtp": "mtp",
}


def _weights(survey: Survey) -> Iterator[str]:
    # 31,600 modules have a few dozen combinations of these.
    seen = {(m.role, m.kind, m.declared) for m in survey.modules}
    formats = set()
    for role, kind, declared in seen:
        if role in _ROLES:
            yield _ROLES[role]
        if kind.has_input_scale:
            yield "input-scale"
        if not kind.is_quantized:
            continue
        formats.add(kind.held)
        yield from _quantized(role, kind.held)
        if kind.held == "nvfp4" and declared is not None:
            yield "nvfp4-w4a4" if declared.activation == "FP4" else "nvfp4-w4a16"
    if len(formats) > 1:
        yield "mixed"


def _quantized(role: str, held: str) -> Iterator[str]:
    yield held.split("_")[0]
    if held == "fp8_block":
        yield "fp8-block"
        if role == "mtp":
            yield "mtp-block-fp8"
    if held == "nvfp4":
        dense = ("attention", "mlp", "shared_expert", "linear_attention")
        names = {"routed_expert": "nvfp4-moe", "lm_head": "nvfp4-lm-head"}
        names |= dict.fromkeys(dense, "nvfp4-dense")
        if role in names:
            yield names[role]


def _matches(survey: Survey) -> Iterator[Finding]:
    rows = known_bad(survey.engine, survey.engine_version, features_of(survey))
    if not rows:
        return
    counts = Counter(row.engine for row in rows)
    engines = ", ".join(f"{engine} {count}" for engine, count in counts.items())
    first = rows[0]
    conditions = f", {first.conditions}" if first.conditions else ""
    yield KNOWN_BAD.finding(
        f"{len(rows)} known failures of engines with checkpoints of this kind ({engines}), the "
        f"first {first.id} ({first.engine}{conditions}): {first.symptom} {first.workaround} See "
        f"{first.threads[0]}",
        [row.id for row in rows],
        engine=survey.engine,
        rows=[_as_json(row) for row in rows],
    )


def _as_json(row: KnownBad) -> dict[str, object]:
    return {
        "id": row.id,
        "engine": row.engine,
        "state": row.state,
        "conditions": row.conditions,
        "symptom": row.symptom,
        "workaround": row.workaround,
        "threads": list(row.threads),
    }


KNOWN_BAD = Rule(
    "NB590",
    "known-bad",
    Severity.NOTE,
    "Others met failures with checkpoints of this kind",
    "The checkpoint itself is no worse for it: these are failures of engines, in versions, with "
    "hardware or flags, that public threads describe for files with these features. MTP together "
    "with prefix caching on gated-DeltaNet models is the best known. With --engine only the rows "
    "of that engine and version are shown.",
    "Read the conditions of each row and compare with how you run it.",
    _matches,
    threads=(
        "https://github.com/vllm-project/vllm/issues/43559",
        "https://github.com/vllm-project/vllm/issues/47194",
        "https://github.com/vllm-project/vllm/issues/53912",
    ),
)

RULES = (KNOWN_BAD,)
