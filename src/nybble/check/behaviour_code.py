"""Rules about code that comes with a checkpoint: hooks in its JSON files, programs, pickles.

Nothing of it is imported or unpickled here; names and a few bytes are looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import Survey
from nybble.checkpoint.reader import INDEX
from nybble.checkpoint.safetensors import parse_json, show
from nybble.errors import CheckpointError

_HOOKS = ("auto_map", "custom_pipelines")
#: Keys whose value, where it names a repository, makes transformers fetch and run a kernel.
_ATTENTION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_is_python_file = re.compile(r"[\w.\-/\\]+\.py").fullmatch
#: JSON files of subfolders that are read: so many, of so many bytes.
_INNER_FILES, _INNER_BYTES = 64, 1 << 20

_PROGRAMS = frozenset(
    (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".cmd", ".ps1", ".jar")
)
_PICKLES = frozenset((".pkl", ".pickle", ".pt", ".pth", ".joblib", ".dill", ".ckpt", ".bin"))
_is_weights = re.compile(
    r"((pytorch|tf|flax)_model|model|consolidated|diffusion_pytorch_model|adapter_model)\b[^/]*"
    r"\.(bin|pt|pth|ckpt)|optimizer\.(pt|bin)"
).fullmatch
#: A pickle's first two bytes (protocols 2 to 5), and the zip and tar that torch.save writes.
_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


def _hooks(survey: Survey) -> Iterator[Finding]:
    found: dict[str, list[str]] = {}
    for name, document in _documents(survey):
        for hook in _walk(document):
            found.setdefault(name, []).append(hook)
    if not found:
        return
    subjects = [f"{name}: {hook}" for name, hooks in found.items() for hook in hooks]
    yield HOOK.finding(
        f"{len(subjects)} hooks to code in {', '.join(found)}, the first {subjects[0]}: expected "
        "none, as weights and a known model_type need none",
        subjects,
        file=next(iter(found)),
    )


def _documents(survey: Survey) -> Iterator[tuple[str, object]]:
    for name, document in survey.documents.items():
        if name != INDEX:
            yield name, document
    inner = [n for n in survey.names if "/" in n and n.endswith(".json")]
    if survey.files.local is None:
        return  # a request for each
    for name in inner[:_INNER_FILES]:
        try:
            if survey.files.size(name) <= _INNER_BYTES:
                yield name, parse_json(survey.files.read(name), name)
        except CheckpointError:
            continue  # unreadable, or no object: it holds no configuration


def _walk(document: object) -> Iterator[str]:
    """Every hook in a JSON value, as `key: value`."""
    rest: list[tuple[str, object]] = [("", document)]
    while rest:
        at, value = rest.pop()
        if isinstance(value, Mapping):
            for key, inner in value.items():
                hook = _hook(str(key), inner)
                if hook:
                    yield f"{at}{hook}"
                else:
                    rest.append((f"{at}{key}.", inner))
        elif isinstance(value, list):
            rest += [(at, inner) for inner in value if not isinstance(inner, (int, float))]
        elif isinstance(value, str) and _is_python_file(value):
            yield f"{at.rstrip('.')}: {show(value)}"


def _hook(key: str, value: object) -> str:
    return f"{key}: {show(value)}" if is_hook(key, value) else ""


def is_hook(key: str, value: object) -> bool:
    """Whether a key of a JSON object makes a loader fetch or run code."""
    if key in _HOOKS:
        return bool(value)
    if key == "trust_remote_code":
        return value is True
    return bool(_ATTENTION.fullmatch(key)) and isinstance(value, str) and "/" in value


def _programs(survey: Survey) -> Iterator[Finding]:
    found = [n for n in survey.names if PurePosixPath(n).suffix.lower() in _PROGRAMS]
    if found:
        yield PROGRAM.finding(
            f"{len(found)} programs lie in the folder, the first {found[0]}: expected data alone",
            found,
            file=found[0],
        )


def _pickles(survey: Survey) -> Iterator[Finding]:
    found = [n for n in survey.names if _is_pickle(survey, n)]
    if found:
        yield PICKLE.finding(
            f"{len(found)} files are pickles, the first {found[0]}: expected safetensors or JSON; "
            "loading one runs what it says",
            found,
            file=found[0],
        )


def _is_pickle(survey: Survey, name: str) -> bool:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix not in _PICKLES or _is_weights(PurePosixPath(name).name):
        return False
    # .bin may be anything; the others say what they are.
    if suffix != ".bin" or survey.files.local is None:
        return suffix != ".bin"
    try:
        return survey.files.read(name, 0, min(survey.files.size(name), 4)).startswith(_STARTS)
    except CheckpointError:
        return False


HOOK = Rule(
    "NB501",
    "code-hook",
    Severity.WARNING,
    "A configuration asks for code to be run",
    "auto_map, custom_pipelines, trust_remote_code, a .py file as a value, or an attention "
    "implementation that names a repository: with them, loading the checkpoint imports code from "
    "it or from a model hub. vLLM ran auto_map although remote code was off (CVE-2026-22807), "
    "transformers fetched kernels that config.json named (CVE-2026-4372). A published model may "
    "need its code; a quantized copy of a known architecture does not. nybble never imports any.",
    "Delete the keys where the engine knows the architecture; else read the code before trusting.",
    _hooks,
    threads=(
        "https://nvd.nist.gov/vuln/detail/CVE-2026-22807",
        "https://nvd.nist.gov/vuln/detail/CVE-2026-4372",
    ),
    is_repairable=True,
)
PROGRAM = Rule(
    "NB502",
    "program-in-folder",
    Severity.NOTE,
    "Programs lie among the weights",
    "Python files, shared libraries or scripts in a checkpoint folder are run by nobody unless a "
    "hook or a user does it. Export tools copy them from the source along with the configuration.",
    "Read or delete them; engines with support for the architecture need none.",
    _programs,
)
PICKLE = Rule(
    "NB503",
    "pickle-in-folder",
    Severity.WARNING,
    "A side file is a pickle",
    "Unpickling runs whatever the file says, weights_only included (CVE-2025-32434, "
    "CVE-2026-24747). Training leftovers such as training_args.bin or scheduler.pt serve nobody "
    "who loads a quantized checkpoint, and scripts that load *.pt of a folder execute them.",
    "Delete them, or convert what they hold to safetensors or JSON.",
    _pickles,
    threads=(
        "https://nvd.nist.gov/vuln/detail/CVE-2025-32434",
        "https://nvd.nist.gov/vuln/detail/CVE-2026-24747",
    ),
    is_repairable=True,
)

RULES = (HOOK, PROGRAM, PICKLE)
