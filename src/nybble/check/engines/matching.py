"""What engines have in common when they load a checkpoint: units, entries, and what does not fit.

A unit is what an engine builds as one module: a linear, linears fused into one matmul, or all
routed experts of a layer. Which scheme an engine gives a unit is for that engine's file; how that
scheme and the tensors of the file get on is said here. Judges headers only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from weakref import WeakKeyDictionary

from nybble.check.contents import CODES, KV_SCALES, SIDE, Module, foreign_scale
from nybble.check.engines.replayed import Built, Unfit, is_before
from nybble.check.survey import Survey
from nybble.checkpoint.safetensors import TensorInfo, collector_paused

Object = Mapping[str, object]

#: Fused module -> the modules of the file that it is made of, in order.
ATTENTION_AND_MLP: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
GATED_DELTA: dict[str, tuple[str, ...]] = {
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
FUSED: dict[str, tuple[str, ...]] = ATTENTION_AND_MLP | GATED_DELTA
FUSED_OF = {member: fused for fused, members in FUSED.items() for member in members}
#: The linears whose K is divided among ranks; N of all others is.
ROW_PARALLEL = frozenset({"o_proj", "down_proj", "out_proj", "linear_fc2", "proj"})

_NO_LINEAR = frozenset({"norm", "linear_attention_state", "rotary", "bias"})
_names_no_linear = re.compile(r"norm|conv|rotary|patch_embed|pos_embed|A_log|dt_bias").search


@dataclass(frozen=True, slots=True)
class Unit:
    """What is built as one.

    `path` is in the file's names, with the fused name last ("....self_attn.qkv_proj"), or the
    container of experts. `sort` is "linear", "experts", "head", "router", "gate" (of the shared
    expert), "embedding" or "other"; `part` is "trunk", "mtp" or "vision". `members` are the
    modules; of experts one for each projection and kind, with `counts` of how many are alike.
    """

    path: str
    sort: str
    part: str
    members: tuple[Module, ...]
    counts: tuple[int, ...]
    absent: tuple[str, ...] = ()  # fused partners that the file lacks

    @property
    def modules(self) -> tuple[str, ...]:
        """The names in the file; of experts their container."""
        return (self.path,) if self.sort == "experts" else tuple(m.name for m in self.members)

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def holds(self) -> str:
        """What the file holds, several joined by +."""
        return "+".join(dict.fromkeys(m.kind.held for m in self.members))

    @property
    def is_quantized(self) -> bool:
        return any(m.kind.is_quantized for m in self.members)


_units: WeakKeyDictionary[Survey, tuple[Unit, ...]] = WeakKeyDictionary()


def find_units(survey: Survey) -> tuple[Unit, ...]:
    """The units of a checkpoint, in file order; norms and other vectors are none."""
    if survey not in _units:
        _units[survey] = _find_units(survey)
    return _units[survey]


def _find_units(survey: Survey) -> tuple[Unit, ...]:
    linears: dict[str, list[Module]] = {}
    experts: dict[str, _Experts] = {}
    order: dict[str, str] = {}  # path -> sort, in file order
    with collector_paused():
        for module in survey.modules:
            name = module.name
            at = name.find(".experts.")
            if at >= 0 or name.endswith(".experts"):
                container = name[: at + 8] if at >= 0 else name
                if container not in experts:
                    experts[container] = _Experts()
                    order[container] = "experts"
                experts[container].add(module, name[name.rfind(".") :] if at >= 0 else "")
            elif sort := _sort(module):
                path = _fused_path(name) if sort == "linear" else name
                order.setdefault(path, sort)
                linears.setdefault(path, []).append(module)
    return tuple(
        experts[path].unit(path) if sort == "experts" else _linear(path, sort, linears[path])
        for path, sort in order.items()
    )


class _Experts:
    """The routed experts of a layer, those alike counted."""

    def __init__(self) -> None:
        self.first: dict[tuple[str, int], Module] = {}
        self.counts: dict[tuple[str, int], int] = {}

    def add(self, module: Module, projection: str) -> None:
        key = (projection, id(module.kind))
        if key in self.first:
            self.counts[key] += 1
        else:
            self.first[key] = module
            self.counts[key] = 1

    def unit(self, path: str) -> Unit:
        members, counts = tuple(self.first.values()), tuple(self.counts.values())
        return Unit(path, "experts", part_of(path), members, counts)


def _fused_path(name: str) -> str:
    """The path of the fused linear that this one goes into, or its own."""
    parent, _, last = name.rpartition(".")
    if last not in FUSED_OF or part_of(name) == "vision":
        return name
    return f"{parent}.{FUSED_OF[last]}"


def _linear(path: str, sort: str, members: list[Module]) -> Unit:
    order = FUSED.get(path.rpartition(".")[2], ())
    last = {m.name.rpartition(".")[2]: m for m in members}
    if any(name in last for name in order):
        members = [last[name] for name in order if name in last]
        absent = tuple(name for name in order if name not in last)
    else:
        absent = ()
    return Unit(path, sort, part_of(path), tuple(members), (1,) * len(members), absent)


def _sort(module: Module) -> str:
    """What a module is to an engine, "" for what no linear layer is and nobody quantized."""
    last = module.name.rpartition(".")[2]
    if module.role == "embedding" or last.startswith("embed_tokens"):
        return "embedding" if module.kind.is_quantized else ""
    if module.role in _NO_LINEAR or _names_no_linear(module.name):
        return "other" if module.kind.is_quantized else ""
    if last == "lm_head":
        return "head"
    if module.role == "router" or last in ("gate", "router"):
        return "router"
    if last == "shared_expert_gate":
        return "gate"
    codes = codes_of(module)
    return "linear" if codes is not None and len(codes.shape) == 2 else ""


def part_of(path: str) -> str:
    """Which of the models in one folder a module belongs to."""
    if path.startswith(("mtp.", "model.mtp.")):
        return "mtp"
    if path.startswith(("model.visual.", "visual.", "vision_tower.", "model.vision_tower.")):
        return "vision"
    return "trunk"


def leaves_of(module: Module) -> dict[str, TensorInfo]:
    """The tensors of a module by the last part of their names."""
    at = len(module.name) + 1
    return {t.name[at:]: t for t in module.tensors}


def codes_of(module: Module) -> TensorInfo | None:
    """The tensor of the weight, or of its codes."""
    return module.tensor(*CODES)


# -------------------------------------------------------------------------------- configurations


def unreadable_config(survey: Survey) -> tuple[str, ...]:
    """Why no engine can make a model of config.json: values of the wrong type or sign.

    A size that is only missing is none: engines have a default for most.
    """
    return tuple(
        "config.json cannot be read as this architecture: "
        + fault.message.removeprefix("config.json: ")
        for fault in survey.faults_of("values")
    )


def sizes_unknown(survey: Survey) -> tuple[str, ...]:
    """A sentence where config.json lacks a size: whether the engine's own fits is not known."""
    return tuple(
        f"{fault.message}; it loads if the engine's default is that of this model"
        for fault in survey.faults_of("dimensions")
    )


def section_of(config: Object, key: str = "quantization_config") -> dict[str, object] | None:
    """An object under this key of config.json, None if there is none."""
    value = config.get(key)
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else None


def objects(value: object) -> dict[str, Object]:
    """A mapping's entries that are objects themselves; {} for anything else."""
    if not isinstance(value, Mapping):
        return {}
    return {str(k): v for k, v in value.items() if isinstance(v, Mapping)}


def strings(value: object) -> list[str]:
    """A list's entries that are strings; [] for anything else."""
    return [v for v in value if isinstance(v, str)] if isinstance(value, (list, tuple)) else []


def is_wrapped(survey: Survey) -> bool:
    """Whether the folder is of a model with a vision tower around the language model."""
    names = strings(survey.config.get("architectures"))
    if names:
        return names[0].endswith("ForConditionalGeneration")
    return "vision_config" in survey.config


def model_type_of(survey: Survey) -> str:
    """`model_type` as written, without the suffix of a text-only part; "" if it has none."""
    return str(survey.config.get("model_type") or "").removesuffix("_text")


Rename = Callable[[str], str]


def renaming(prefixes: Mapping[str, str]) -> Rename:
    """Replace the beginnings of a name, one after the other, as engines' mappers do."""

    def rename(name: str) -> str:
        for old, new in prefixes.items():
            if name.startswith(old):
                name = new + name[len(old) :]
        return name

    return rename


def module_path(rename: Rename, path: str) -> str:
    """A module's path after renaming; the dot lets prefixes that end in one match it whole."""
    return rename(path + ".")[:-1]


def globs(patterns: Iterable[str]) -> Callable[[str], object]:
    """Whether a name matches any of these shell patterns."""
    wild = [translate(p) for p in patterns if re.search(r"[*?\[]", p)]
    return re.compile("|".join(f"(?:{p})" for p in wild)).match if wild else lambda name: None


# ------------------------------------------------------------------------------------ the schemes


@dataclass(frozen=True, slots=True)
class Scheme:
    """What an engine builds for a unit, and the tensors that it then expects.

    `says` is the configuration's word as the engine reads it; `codes` the leaf that holds the
    weight; `needs` other leaves that must be filled, of which `noticed` raise if they are not;
    `accepts` leaves that have a place but may be missing. `error`: building it raises.
    `is_known`: nybble knows the tensors of this scheme.
    """

    says: str
    builds: str
    runs_as: str
    codes: str = "weight"
    needs: tuple[str, ...] = ()
    noticed: tuple[str, ...] = ()
    accepts: tuple[str, ...] = ()
    error: str = ""
    is_known: bool = True


UNQUANTIZED = Scheme("unquantized", "bf16", "BF16")


def failing(says: str, error: str) -> Scheme:
    """A scheme that raises when it is built."""
    return Scheme(says, "", "", error=error)


@dataclass(frozen=True, slots=True)
class Habits:
    """How an engine's loader behaves.

    `refuses_unknown`: a tensor without a parameter raises; otherwise it is dropped with a warning.
    `fills`: what stays in a parameter that no tensor fills, for messages.
    """

    engine: str
    refuses_unknown: bool
    fills: str


def build(unit: Unit, name: str, scheme: Scheme, habits: Habits) -> Built:
    """Hold a scheme against the tensors of a unit."""
    problem, is_silent = _judge(unit, scheme, habits)
    return Built(
        name=name,
        modules=unit.modules,
        count=unit.count,
        says=scheme.says,
        holds=unit.holds,
        builds=scheme.builds,
        runs_as=scheme.runs_as if not problem or is_silent else "",
        problem=problem,
        is_silent=is_silent,
    )


def _judge(unit: Unit, scheme: Scheme, habits: Habits) -> tuple[str, bool]:
    """The first fault that raises, else the first silent one, else none."""
    if scheme.error:
        return scheme.error, False
    silent = ""
    if scheme.is_known:
        for member, count in zip(unit.members, unit.counts, strict=True):
            problem, is_silent = _judge_member(unit, member, scheme, habits)
            if problem and count > 1:
                problem = f"{count} modules like {member.name}: {problem}"
            if problem and not is_silent:
                return problem, False
            silent = silent or problem
    if unit.absent and not silent:
        silent = (
            f"{', '.join(unit.absent)} missing: the rows of {_last(unit.path)} are never filled"
        )
    return silent, bool(silent)


def _judge_member(unit: Unit, member: Module, scheme: Scheme, habits: Habits) -> tuple[str, bool]:
    leaves = leaves_of(member)
    if unit.sort == "experts" and not any(leaf in leaves for leaf in CODES):
        return _judge_stack(member, scheme)
    if fault := _width(member, leaves, scheme):
        return fault, False
    strange = [
        leaf
        for leaf in leaves
        if leaf not in (scheme.codes, *scheme.needs, *scheme.accepts, *KV_SCALES, "bias")
        and (leaf in SIDE or leaf in CODES)
    ]
    if strange and habits.refuses_unknown:
        return f"{strange[0]} has no parameter to go to ({_built_as(scheme)})", False
    if scheme.codes not in leaves:
        return f"{scheme.codes} is never filled: the file has {', '.join(strange)}", True
    if scheme.builds == "bf16" and member.kind.is_quantized:
        return f"{member.kind.held} bytes are read as BF16 weights, their scales dropped", True
    missing = [leaf for leaf in scheme.needs if leaf not in leaves]
    for leaf in missing:
        if leaf in scheme.noticed:
            return f"{leaf} is never filled, which {habits.engine} notices and refuses", False
    if missing:
        return f"{', '.join(missing)} missing: {habits.engine} computes with {habits.fills}", True
    if foreign := foreign_scale(leaves):
        return f"{foreign}; {habits.engine} converts its numbers or refuses it", True
    lost = [leaf for leaf in strange if leaf in _CHANGES_VALUES]
    if lost:
        return f"{lost[0]} is dropped, and the weight means nothing without it", True
    return "", False


_CHANGES_VALUES = ("pre_quant_scale", "weight_zero_point", "weight_g_idx", "weight_scale_2")


def _judge_stack(member: Module, scheme: Scheme) -> tuple[str, bool]:
    """Experts as 3-D tensors: unquantized ones into unquantized ones, or a shape that fails."""
    if scheme.builds != "bf16" and not member.kind.is_quantized:
        return f"3-D {member.kind.held} experts do not fit {_built_as(scheme)}", False
    return "", False


def _width(member: Module, leaves: Mapping[str, TensorInfo], scheme: Scheme) -> str:
    """Where shapes cannot fit: packed against unpacked, and scales of another block or grain."""
    held, built = member.kind.held, scheme.builds
    if _is_packed(held) != _is_packed(built) and not (held.startswith("int") or built == ""):
        return f"holds {held}, {_built_as(scheme)}: the shapes of weight differ"
    scaled = member.kind.is_quantized and "weight_scale" in leaves
    if scaled and built != "bf16" and held != built and not _is_same(held, built):
        return f"holds {held}, {_built_as(scheme)}: weight_scale does not fit"
    codes = leaves.get(scheme.codes)
    if codes is not None and built == "nvfp4" and codes.shape and codes.shape[-1] % 8:
        return f"K is {2 * codes.shape[-1]}, and must be a multiple of 16"
    return ""


def _is_packed(format_: str) -> bool:
    return format_.startswith(("nvfp4", "mxfp4", "u8"))


def _is_same(held: str, built: str) -> bool:
    """One weight per channel or one per block of a small tensor may be one scale of a tensor."""
    return built == "fp8" and held == "fp8"


def _built_as(scheme: Scheme) -> str:
    if scheme.builds == "bf16":
        reason = scheme.says.removeprefix("unquantized")
        return "built unquantized" + (f" ({reason})" if reason else "")
    return f"built as {scheme.builds}" + (f" ({scheme.says})" if scheme.says else "")


def _last(path: str) -> str:
    return path.rpartition(".")[2]


# --------------------------------------------------------------------------------- tensor parallel


def unfit_units(
    survey: Survey,
    units: Sequence[Unit],
    schemes: Callable[[Unit], Scheme],
    ranks: int,
    expert_multiple: int,
) -> tuple[Unfit, ...]:
    """The units that cannot be divided over `ranks`.

    N of column-parallel linears and K of row-parallel ones are divided; K per rank must be whole
    blocks. `expert_multiple`: what rows of routed W4A4 experts per rank must be a multiple of.
    """
    if ranks < 2:
        return ()
    found = []
    for unit in units:
        if unit.sort in ("linear", "experts") and (unit.part != "vision"):
            scheme = schemes(unit)
            reason = next(
                filter(
                    None,
                    (_undivided(m, unit, scheme, ranks, expert_multiple) for m in unit.members),
                ),
                "",
            )
            if reason:
                found.append(Unfit(unit.path, reason))
    return (*_undivided_heads(survey, ranks), *found)


def _undivided_heads(survey: Survey, ranks: int) -> tuple[Unfit, ...]:
    sizes = survey.dimensions
    if sizes is None:
        return ()
    found = []
    for what, count, may_repeat in (
        ("num_attention_heads", sizes.heads, False),
        ("num_key_value_heads", sizes.kv_heads, True),
        ("linear_num_key_heads", sizes.linear_key_heads, False),
        ("linear_num_value_heads", sizes.linear_value_heads, False),
    ):
        repeats = may_repeat and count and ranks % count == 0
        if count and count % ranks and not repeats:
            found.append(Unfit("config.json", f"{what} {count} does not divide over {ranks}"))
    return tuple(found)


def _undivided(member: Module, unit: Unit, scheme: Scheme, ranks: int, expert_multiple: int) -> str:
    codes = codes_of(member)
    last = _last(member.name)
    if codes is None or len(codes.shape) != 2 or last in ("fc", "k_proj", "v_proj"):
        return ""
    n, k = codes.shape[0], codes.shape[1] * (2 if _is_packed(member.kind.held) else 1)
    if last in ROW_PARALLEL:
        block = {"nvfp4": 16, "fp8_block": 128, "mxfp4": 32, "mxfp8": 32}.get(scheme.builds, 1)
        if k % ranks or k // ranks % block:
            return f"{last}: K {k} over {ranks} is {k / ranks:g} per rank, no multiple of {block}"
        return ""
    if n % ranks:
        return f"{last}: N {n} does not divide over {ranks}"
    if unit.sort == "experts" and scheme.runs_as == "W4A4" and n // ranks % expert_multiple:
        return (
            f"{last}: N {n} over {ranks} is {n // ranks} per rank, no multiple of {expert_multiple}"
        )
    if scheme.builds == "fp8_block" and n // ranks % 128:
        return f"{last}: N {n} over {ranks} is {n // ranks} per rank, no multiple of 128"
    return ""


# --------------------------------------------------------------------- ModelOpt's map of algorithms


class Algorithms:
    """`_resolve_quant_algo` of vLLM, and of SGLang, which took it over: exact, then the members of
    a fused module, then what is listed below, then, for experts in newer vLLM, a sibling.

    `candidates` are the spellings of a path that the map may use.
    """

    def __init__(
        self,
        layers: Mapping[str, str],
        candidates: Callable[[str], tuple[str, ...]],
        *,
        experts_as_siblings: bool = False,
    ) -> None:
        self.layers = layers
        self.candidates = candidates
        self.experts_as_siblings = experts_as_siblings
        self.below: dict[str, str] = {}  # container -> the first algorithm listed under it
        for name, algorithm in layers.items():
            at = name.rfind(".")
            while at > 0:
                name = name[:at]
                self.below.setdefault(name, algorithm)
                at = name.rfind(".")

    def of(self, path: str, packed: Mapping[str, tuple[str, ...]]) -> str:
        """ "" for a module that nothing lists. Raises ValueError for a fused one that differs."""
        names = self.candidates(path)
        exact = next((self.layers[name] for name in names if name in self.layers), None)
        if exact is not None:
            return exact
        base, _, last = path.rpartition(".")
        listed = [
            self.layers[name]
            for parent in self.candidates(base)
            for member in packed.get(last, ())
            if (name := f"{parent}.{member}") in self.layers
        ]
        if len(set(listed)) > 1:
            algorithms = ", ".join(sorted(set(listed)))
            raise ValueError(f"Mixed quant_algo within fused layer {path}: {algorithms}")
        if listed:
            return listed[0]
        below = next((self.below[name] for name in names if name in self.below), "")
        if not below and self.experts_as_siblings and path.endswith(".experts"):
            return self.below.get(base, "")
        return below


# ------------------------------------------------------------------------ what a replay begins with


@dataclass(frozen=True, slots=True)
class Asked:
    """What a replay is for: version "" is the newest; `capability` is 90 for sm90, 0 for hardware
    that has everything."""

    version: str
    capability: int
    is_cpu: bool

    @classmethod
    def of(cls, version: str, hardware: str) -> Asked:
        """From the words of an `Engine`."""
        digits = re.sub(r"\D", "", hardware)
        return cls(version, int(digits or 0), hardware.lower() == "cpu")

    def has(self, since: str) -> bool:
        """Whether this version has what came with another."""
        return not is_before(self.version, since)


#: (the engine's module path, its unit) -> scheme. Raises ValueError as the engine does.
Resolve = Callable[[str, Unit], Scheme]


@dataclass(frozen=True)
class Setup:
    """The configuration that an engine ends up with; `resolve` is None where it stops. `drafts`:
    the MTP head is quantized too, if the engine decides that for the whole file."""

    resolve: Resolve | None
    refusals: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    drafts: bool = True
