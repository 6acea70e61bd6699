"""Rules about files: shards and their headers, configurations, links, pickles (NB001-NB023).

What a survey recorded as a fault while it read becomes a finding here; files_index.py has the
rules about what the index makes of the files. Knows no tensor by its purpose.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress

from nybble.check import files_index
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import CONFIG, Survey
from nybble.check.wording import first_of, plural
from nybble.checkpoint.files import resolve
from nybble.checkpoint.modelopt import CONFIG_FILE
from nybble.checkpoint.reader import INDEX
from nybble.errors import CheckpointError

#: JSON that engines and transformers read; a fault in any other file disturbs nobody.
READ_BY_ENGINES = frozenset(
    (
        *(CONFIG, CONFIG_FILE, INDEX, "generation_config.json", "tokenizer_config.json"),
        *("preprocessor_config.json", "processor_config.json", "special_tokens_map.json"),
        *("video_preprocessor_config.json", "adapter_config.json"),
    )
)
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WEIGHTS = ("pytorch_model", "model", "consolidated", "adapter_model", "checkpoint")
LFS_POINTER = b"version https://git-lfs"


# ------------------------------------------------------------------------------------------- shards


def _missing_shards(survey: Survey) -> Iterator[Finding]:
    files = [fault.file for fault in survey.faults_of("missing")]
    if not files:
        return
    absent = set(files)
    tensors = sorted(t for t, file in (survey.weight_map or {}).items() if file in absent)
    yield SHARD_MISSING.finding(
        f"{plural(len(files), 'file')} that {INDEX} names "
        f"{'is' if len(files) == 1 else 'are'} not there, {first_of(files, len(files))}: "
        f"{len(tensors):,} of {len(survey.weight_map or {}):,} tensors are lost",
        files,
        file=files[0],
        tensors=tensors,
    )


def _truncated_shards(survey: Survey) -> Iterator[Finding]:
    """Cut files, and files without any data beside others that have it."""
    bare = survey.faults_of("bare")
    is_headers_only = len(bare) == len(survey.shards)
    names = [f.file for f in survey.faults_of("truncated")]
    names += [] if is_headers_only else [f.file for f in bare]
    if not names:
        return
    shards = [survey.shards[name] for name in names]
    lost = [t.name for shard in shards for t in shard.tensors.values() if not survey.is_held(t)]
    one = shards[0]
    yield SHARD_TRUNCATED.finding(
        f"{plural(len(names), 'file')} end{'s' if len(names) == 1 else ''} too early, "
        f"{first_of(names, len(names))}: expected {one.expected:,} bytes by its header, found "
        f"{one.size:,}; {plural(len(lost), 'tensor')} cut off",
        names,
        file=names[0],
        tensors=lost,
        expected_bytes={shard.name: shard.expected for shard in shards},
        found_bytes={shard.name: shard.size for shard in shards},
    )


def _damaged_shards(survey: Survey) -> Iterator[Finding]:
    faults = survey.faults_of("header")
    if not faults:
        return
    names = [fault.file for fault in faults]
    pointers = [name for name in names if _is_lfs_pointer(survey, name)]
    reason = faults[0].message
    if pointers:
        reason = f"{pointers[0]}: is a Git LFS pointer, not the file: `git lfs pull` fetches it"
    yield SHARD_DAMAGED.finding(
        f"{plural(len(names), 'file')} cannot be read as safetensors: {reason}",
        names,
        file=names[0],
        reasons=[fault.message for fault in faults],
        lfs_pointers=pointers,
    )


def _is_lfs_pointer(survey: Survey, name: str) -> bool:
    with suppress(CheckpointError):
        size = survey.files.size(name)
        return size < 1024 and survey.files.read(name, 0, size).startswith(LFS_POINTER)
    return False


def _trailing_bytes(survey: Survey) -> Iterator[Finding]:
    names = [fault.file for fault in survey.faults_of("trailing")]
    if not names:
        return
    extra = {name: survey.shards[name].size - survey.shards[name].expected for name in names}
    yield TRAILING_BYTES.finding(
        f"{plural(len(names), 'file')} with bytes after the last tensor, "
        f"{first_of(names, len(names))}: expected {survey.shards[names[0]].expected:,} bytes by "
        f"its header, found {extra[names[0]]:,} more",
        names,
        file=names[0],
        extra_bytes=extra,
    )


def _headers_only(survey: Survey) -> Iterator[Finding]:
    names = [fault.file for fault in survey.faults_of("bare")]
    if names and len(names) == len(survey.shards):
        yield HEADERS_ONLY.finding(
            f"{'the file has' if len(names) == 1 else f'all {len(names)} files have'} headers and "
            "no data: what scales and weights hold was not looked at",
            names,
            file=names[0],
        )


def _no_weights(survey: Survey) -> Iterator[Finding]:
    has_any = survey.shards or survey.weight_map or survey.faults_of("header", "unreadable")
    if not has_any:
        yield NO_WEIGHTS.finding(f"{survey.where} holds no .safetensors file")


# ------------------------------------------------------------------------------------ other files


def _bad_json(survey: Survey) -> Iterator[Finding]:
    for fault in survey.faults_of("json"):
        is_read = fault.file in READ_BY_ENGINES
        if is_read or not _is_any_json(survey, fault.file):
            yield BAD_JSON.finding(
                fault.message,
                [fault.file],
                file=fault.file,
                severity=Severity.ERROR if is_read else Severity.NOTE,
            )


def _is_any_json(survey: Survey, name: str) -> bool:
    """Whether a file that is no object is still JSON: a list is somebody else's right."""
    try:
        json.loads(survey.files.read(name))
    except (CheckpointError, ValueError, RecursionError):
        return False
    return True


def _unreadable(survey: Survey) -> Iterator[Finding]:
    reasons = {fault.file: fault.message for fault in survey.faults_of("unreadable")}
    folder = survey.files.local
    if folder is not None:
        for name in survey.names:
            if name not in reasons and (folder / name).is_symlink():
                try:
                    resolve(folder, name)
                except CheckpointError as error:
                    reasons[name] = str(error)
    if reasons:
        names = sorted(reasons)
        yield UNREADABLE.finding(
            f"{plural(len(names), 'file')} cannot be read: {reasons[names[0]]}",
            names,
            file=names[0],
            reasons=reasons,
        )


def _pickles(survey: Survey) -> Iterator[Finding]:
    names = [n for n in survey.names if n.endswith(PICKLED) and _is_pickle(survey, n)]
    weights = [n for n in names if n.rpartition("/")[2].startswith(WEIGHTS) and "/" not in n]
    others = [n for n in names if n not in weights]
    if weights:
        is_all = not survey.shards
        yield PICKLE.finding(
            f"{plural(len(weights), 'file')} of pickled weights, "
            f"{first_of(weights, len(weights))}: loading one runs whatever code it holds"
            f"{', and there are no other weights' if is_all else ''}",
            weights,
            file=weights[0],
            severity=Severity.ERROR if is_all else Severity.WARNING,
        )
    if others:
        yield PICKLE.finding(
            f"{plural(len(others), 'pickle')} that no engine reads, "
            f"{first_of(others, len(others))}: opening one runs whatever code it holds",
            others,
            file=others[0],
            severity=Severity.NOTE,
        )


def _is_pickle(survey: Survey, name: str) -> bool:
    """By its name, or by its first bytes: a zip archive, as torch.save makes them, or a pickle's
    protocol. Other tools call files .bin and .pt too."""
    file = name.rpartition("/")[2]
    if file.endswith((".pkl", ".pickle")) or file.startswith("pytorch_model"):
        return True
    try:
        start = survey.files.read(name, 0, min(survey.files.size(name), 4))
    except CheckpointError:
        return False
    return start == b"PK\x03\x04" or (len(start) > 1 and start[0] == 0x80 and 2 <= start[1] <= 5)


def _declaration(survey: Survey) -> Iterator[Finding]:
    for fault in survey.faults_of("declaration"):
        yield BAD_DECLARATION.finding(fault.message, [fault.file], file=fault.file)


def _no_config(survey: Survey) -> Iterator[Finding]:
    if CONFIG not in survey.names:
        yield NO_CONFIG.finding(f"{survey.where} has no {CONFIG}", [CONFIG], file=CONFIG)


def _incomplete_config(survey: Survey) -> Iterator[Finding]:
    for fault in survey.faults_of("dimensions", "values"):
        severity = Severity.ERROR if fault.kind == "values" else None
        yield INCOMPLETE_CONFIG.finding(fault.message, [CONFIG], file=CONFIG, severity=severity)


def _unknown_family(survey: Survey) -> Iterator[Finding]:
    if survey.config and survey.family is None:
        yield UNKNOWN_FAMILY.finding(
            f"{survey.why_no_family.partition('. ')[0]}: what its tensors are for, and which must "
            "be there, was not looked at",
            [CONFIG],
            file=CONFIG,
        )


# -------------------------------------------------------------------------------------- the rules

_GITHUB = "https://github.com/"

SHARD_MISSING = Rule(
    "NB001",
    "shard-missing",
    Severity.ERROR,
    "A file that the index names is not there",
    "The index promises tensors in a file that the folder lacks: a download that broke off, or an "
    "upload that forgot one. Some servers start all the same and answer from weights that were "
    "never set.",
    "Fetch the file again; where it never existed, make the checkpoint again.",
    _missing_shards,
    threads=(f"{_GITHUB}sgl-project/sglang/issues/32279",),
)
SHARD_TRUNCATED = Rule(
    "NB002",
    "shard-truncated",
    Severity.ERROR,
    "A file is shorter than its header says",
    "The header promises more bytes than the file has. Loaders that map files read zeros, or crash "
    "only when they reach the end: a public checkpoint with 8 of 102 files cut answered gibberish "
    "on a fifth of its launches.",
    "Fetch the file again and compare its size with the one that the hub states.",
    _truncated_shards,
    threads=(f"{_GITHUB}osaurus-ai/vmlx-swift/issues/217",),
)
SHARD_DAMAGED = Rule(
    "NB003",
    "shard-damaged",
    Severity.ERROR,
    "A file is no valid safetensors file",
    "The header is no JSON object, is longer than the file or than the format allows, or its "
    "tensors overlap, leave gaps, or have sizes that do not follow from dtype and shape. No "
    "careful loader opens it, and a careless one may read or allocate what it should not.",
    "Fetch the file again; do not patch a header by hand.",
    _damaged_shards,
    threads=(
        "https://github.com/lyogavin/airllm/issues/93",
        "https://github.com/run-ai/runai-model-streamer/pull/121",
    ),
)
TRAILING_BYTES = Rule(
    "NB004",
    "trailing-bytes",
    Severity.ERROR,
    "A file goes on after its last tensor",
    "The format requires that the tensors cover the data exactly, so the safetensors library "
    "refuses the file. Loaders with a reader of their own accept it, and the extra bytes travel "
    "along unseen.",
    "Rewrite the file, or fetch it again.",
    _trailing_bytes,
    threads=("https://github.com/Comfy-Org/ComfyUI/issues/15602",),
    is_repairable=True,
)
BAD_JSON = Rule(
    "NB009",
    "bad-json",
    Severity.ERROR,
    "A configuration file is no JSON object",
    "The file cannot be parsed, is no object, or states a key twice with different readers taking "
    "different ones.",
    "Fetch the file again or correct it.",
    _bad_json,
)
UNREADABLE = Rule(
    "NB010",
    "unreadable-file",
    Severity.ERROR,
    "A file cannot be read, or leaves the folder",
    "A link points to nothing or out of the folder (only the blobs of a hub cache may lie "
    "elsewhere), or the entry is no plain file. A checkpoint that reads files outside its folder "
    "can publish what they hold.",
    "Replace the link by the file that it should be.",
    _unreadable,
    threads=(
        "https://github.com/debpalash/VoiceStudio/pull/1056",
        "https://github.com/keiretsu-labs/kubernetes-manifests/pull/2517",
    ),
)
PICKLE = Rule(
    "NB011",
    "pickle-present",
    Severity.WARNING,
    "A pickled file, which runs code when it is loaded",
    "Files made by torch.save are pickles: loading one can run any code, and the restricted loader "
    "has been left more than once (CVE-2025-32434, CVE-2026-24747). Weights are complete as "
    "safetensors.",
    "Delete it, or convert it to safetensors in a place where it can do no harm.",
    _pickles,
    threads=(
        "https://github.com/vllm-project/vllm/pull/12366",
        "https://github.com/deepseek-ai/DeepSeek-V3/issues/872",
    ),
    is_repairable=True,
)
HEADERS_ONLY = Rule(
    "NB013",
    "headers-only",
    Severity.NOTE,
    "The files have headers and no data",
    "Enough to plan and to check names, shapes and configurations; rules that need values were "
    "skipped.",
    "Check the whole files before anything is served from them.",
    _headers_only,
)
BAD_DECLARATION = Rule(
    "NB014",
    "quantization-unreadable",
    Severity.ERROR,
    "The quantization section cannot be read",
    "The section that says how the weights are stored lacks what its own method requires, or has "
    "it in another type. Engines stop, or take the model for an unquantized one.",
    "Correct the section by hand, after the key that the message names.",
    _declaration,
    is_repairable=True,
)
NO_CONFIG = Rule(
    "NB015",
    "no-config",
    Severity.ERROR,
    "There is no config.json",
    "Without it no engine knows what model this is, nor how its weights are quantized.",
    "Copy config.json from the source and add the quantization section.",
    _no_config,
)
INCOMPLETE_CONFIG = Rule(
    "NB020",
    "config-incomplete",
    Severity.WARNING,
    "config.json lacks a size that its model type needs, or holds nonsense for it",
    "A key that decides shapes is missing: engines fill it with a default that fits another model, "
    "or stop. One that is there with a value of the wrong type or sign is an error: every engine "
    "stops at it. nybble guesses nothing, and rules that need sizes were skipped.",
    "Copy the key from the source's config.json.",
    _incomplete_config,
)
NO_WEIGHTS = Rule(
    "NB021",
    "no-weights",
    Severity.ERROR,
    "There is no safetensors file",
    "The folder has no weights that can be read safely.",
    "Fetch the weights, or convert pickled ones to safetensors.",
    _no_weights,
    threads=("https://github.com/huggingface/transformers/issues/31649",),
)
UNKNOWN_FAMILY = Rule(
    "NB022",
    "unknown-family",
    Severity.NOTE,
    "The model type is not known",
    "Rules that need no knowledge of the network (files, scales, configurations) have looked; "
    "those about its parts go by names alone, or have not.",
    "Nothing to do; read the result for what it covers.",
    _unknown_family,
)

RULES: tuple[Rule, ...] = (
    *(SHARD_MISSING, SHARD_TRUNCATED, SHARD_DAMAGED, TRAILING_BYTES, BAD_JSON),
    *(
        UNREADABLE,
        PICKLE,
        HEADERS_ONLY,
        BAD_DECLARATION,
        NO_CONFIG,
        INCOMPLETE_CONFIG,
        NO_WEIGHTS,
        UNKNOWN_FAMILY,
    ),
    *files_index.RULES,
)
