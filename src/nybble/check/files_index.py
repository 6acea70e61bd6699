"""Rules about the index: which files and tensors make the model (NB005-NB008, NB012, NB016-NB019,
NB023).

Compares the index with headers, and file names with each other. Knows no tensor by its purpose,
except to say whether a stray file holds anything of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import Survey, SurveyedShard
from nybble.check.wording import first_of, plural
from nybble.checkpoint.reader import INDEX
from nybble.checkpoint.safetensors import TensorInfo

LONE = "model.safetensors"

_numbered = re.compile(r"^(.*?)-(\d{5})-of-(\d{5})\.safetensors$").match


# ---------------------------------------------------------------------------- which shards count


def _unindexed_shards(survey: Survey) -> Iterator[Finding]:
    """Files beside the index that hold something of the model that no other has."""
    useful = [shard for shard in _orphans(survey) if _new_tensors(survey, shard)]
    if useful:
        new = [name for shard in useful for name in _new_tensors(survey, shard)]
        yield UNINDEXED_SHARD.finding(
            f"{plural(len(useful), 'file')} that {INDEX} does not name "
            f"hold{'s' if len(useful) == 1 else ''} {plural(len(new), 'tensor')} of the model that "
            f"no other file has: {useful[0].name} has {new[0]}",
            [shard.name for shard in useful],
            file=useful[0].name,
            tensors=new,
        )


def _orphan_shards(survey: Survey) -> Iterator[Finding]:
    """Files beside the index that hold nothing new."""
    useless = [shard for shard in _orphans(survey) if not _new_tensors(survey, shard)]
    if useless:
        nbytes = sum(shard.size for shard in useless)
        yield ORPHAN_SHARD.finding(
            f"{plural(len(useless), 'file')} that {INDEX} does not name, "
            f"{first_of((s.name for s in useless), len(useless))}: {nbytes:,} bytes that hold "
            "nothing new of the model",
            [shard.name for shard in useless],
            file=useless[0].name,
            nbytes=nbytes,
        )


def _orphans(survey: Survey) -> list[SurveyedShard]:
    if survey.weight_map is None:
        return []
    named = set(survey.weight_map.values())
    return [shard for name, shard in survey.shards.items() if name not in named]


def _new_tensors(survey: Survey, shard: SurveyedShard) -> list[str]:
    """The tensors of a stray file that belong to the model and are in no other."""
    new = [name for name in shard.tensors if name not in survey.tensors]
    family = survey.family
    if family is None:
        return new
    return [n for n in new if family.claim(n) or family.claim_module(n.rpartition(".")[0])]


def _lone_name(survey: Survey) -> Iterator[Finding]:
    files = sorted(set((survey.weight_map or {}).values()))
    if LONE in files and len(files) > 1:
        others = [name for name in files if name != LONE]
        hidden = sum(file != LONE for file in (survey.weight_map or {}).values())
        yield LONE_NAME.finding(
            f"{LONE} lies beside {first_of(others, len(others))}: a loader that takes {LONE} "
            f"wherever it finds it misses {plural(hidden, 'tensor')}",
            others,
            file=LONE,
        )


def _numbered_gaps(survey: Survey) -> Iterator[Finding]:
    """model-00001-of-00003 without its sisters: the index, if there is one, does not tell."""
    named = set((survey.weight_map or {}).values())
    present = named if named else set(survey.shards) | {f.file for f in survey.faults}
    sets: dict[tuple[str, int], set[int]] = {}
    for name in present:
        if found := _numbered(name):
            sets.setdefault((found[1], int(found[3])), set()).add(int(found[2]))
    for (stem, total), numbers in sorted(sets.items()):
        if total > 100_000 or len(numbers) >= total:
            continue
        absent = [
            f"{stem}-{i:05d}-of-{total:05d}.safetensors"
            for i in range(1, total + 1)
            if i not in numbers
        ]
        there = [name for name in absent if name in survey.shards]
        words = f"{INDEX} names" if named else "the folder has"
        yield NUMBERED_GAP.finding(
            f"{words} {len(numbers)} of {total} numbered files: {first_of(absent, len(absent))} is "
            "missing",
            absent,
            file=absent[0],
            severity=Severity.WARNING if named else Severity.ERROR,
            present=there,
        )


def _no_index(survey: Survey) -> Iterator[Finding]:
    if INDEX in survey.names or LONE in survey.shards or not survey.shards:
        return
    names = sorted(survey.shards)
    yield NO_INDEX.finding(
        f"{plural(len(names), 'file')} with other names than {LONE} and no {INDEX}, "
        f"{first_of(names, len(names))}: transformers finds no weights, other engines take every "
        "file of the folder",
        names,
        file=names[0],
    )


# -------------------------------------------------------------------------------------- the index


def _in_two_shards(survey: Survey) -> Iterator[Finding]:
    """Tensors that two of the model's files hold; equal bytes are only a waste."""
    named = None if survey.weight_map is None else set(survey.weight_map.values())
    shards = [s for name, s in survey.shards.items() if named is None or name in named]
    if sum(len(shard.tensors) for shard in shards) == len(survey.tensors):
        return
    places: dict[str, list[TensorInfo]] = {}
    for shard in shards:
        for name, info in shard.tensors.items():
            places.setdefault(name, []).append(info)
    twice = {name: found for name, found in places.items() if len(found) > 1}
    different = [name for name, found in twice.items() if not _are_equal(survey, found)]
    for names, word, severity in (
        (different, "different", Severity.ERROR),
        ([n for n in twice if n not in set(different)], "the same", Severity.WARNING),
    ):
        if names:
            yield IN_TWO_SHARDS.finding(
                f"{plural(len(names), 'tensor')} in two files with {word} content, "
                f"{first_of(names, len(names))} in "
                f"{' and '.join(info.file for info in twice[names[0]])}",
                names,
                file=twice[names[0]][0].file,
                severity=severity,
                files={name: [info.file for info in twice[name]] for name in names},
            )


def _are_equal(survey: Survey, found: list[TensorInfo]) -> bool:
    if len({(info.dtype, info.shape) for info in found}) > 1:
        return False
    return len({sample.tobytes() for sample in survey.samples(found)}) == 1


def _absent_tensors(survey: Survey) -> Iterator[Finding]:
    """What the index places in a file that is there and does not hold it."""
    absent: list[str] = []
    misplaced: list[str] = []
    if survey.weight_map == {name: info.file for name, info in survey.tensors.items()}:
        return  # as it should be; the loop below takes three times as long
    weight_map, get = survey.weight_map or {}, survey.tensors.get
    for tensor, file in weight_map.items():
        info = get(tensor)
        if (info is None or info.file != file) and file in survey.shards:
            (absent if info is None else misplaced).append(tensor)
    if absent:
        yield ABSENT_TENSOR.finding(
            f"{INDEX} names {plural(len(absent), 'tensor')} that no file holds, "
            f"{first_of(absent, len(absent))}, expected in {weight_map[absent[0]]}",
            absent,
            file=INDEX,
            tensors=absent,
        )
    if misplaced:
        one = misplaced[0]
        yield ABSENT_TENSOR.finding(
            f"{INDEX} names the wrong file for {plural(len(misplaced), 'tensor')}, "
            f"{first_of(misplaced, len(misplaced))}: expected in {weight_map[one]}, found in "
            f"{survey.tensors[one].file}",
            misplaced,
            file=INDEX,
            severity=Severity.WARNING,
            found_in={name: survey.tensors[name].file for name in misplaced},
        )


def _unlisted_tensors(survey: Survey) -> Iterator[Finding]:
    if survey.weight_map is None or survey.tensors.keys() <= survey.weight_map.keys():
        return
    unlisted = [name for name in survey.tensors if name not in survey.weight_map]
    if unlisted:
        yield UNLISTED_TENSOR.finding(
            f"{plural(len(unlisted), 'tensor')} of the model's files that {INDEX} does not list, "
            f"{first_of(unlisted, len(unlisted))} in {survey.tensors[unlisted[0]].file}",
            unlisted,
            file=INDEX,
            found_in={name: survey.tensors[name].file for name in unlisted},
        )


def _index_shape(survey: Survey) -> Iterator[Finding]:
    for fault in survey.faults_of("index"):
        yield INDEX_SHAPE.finding(fault.message, [INDEX], file=INDEX)


def _total_size(survey: Survey) -> Iterator[Finding]:
    """Payload bytes is what transformers writes; llm-compressor writes the sizes of the files."""
    stated = survey.index_metadata.get("total_size")
    weight_map = survey.weight_map or {}
    names = set(weight_map.values())
    shards = [survey.shards[name] for name in names if name in survey.shards]
    if stated is None or len(shards) < len(names) or not shards:
        return
    payload = sum(shard.expected - shard.header_bytes for shard in shards)
    sizes = sum(shard.size for shard in shards)
    if stated in (payload, sizes):
        return
    payload = sum(tensor.nbytes for tensor in survey.tensors.values())  # each once
    if stated == payload:
        return
    is_near = isinstance(stated, (int, float)) and payload <= stated <= sizes * 1.01
    yield TOTAL_SIZE.finding(
        f"{INDEX}: expected metadata.total_size {payload:,}, the bytes of all tensors, found "
        f"{stated!r}",
        [INDEX],
        file=INDEX,
        severity=Severity.NOTE if is_near else Severity.WARNING,
        expected=payload,
    )


# -------------------------------------------------------------------------------------- the rules

_GITHUB = "https://github.com/"

ORPHAN_SHARD = Rule(
    "NB005",
    "orphan-shard",
    Severity.NOTE,
    "A safetensors file that the index does not name, with nothing new in it",
    "A copy of what other files hold, or weights of something else. Most engines pass it over; "
    "those that take every file of the folder load it. Copies left by an interrupted run double "
    "the download: 47.4 GB instead of 17.7 in a public case.",
    "Delete the file.",
    _orphan_shards,
    threads=(f"{_GITHUB}intel/auto-round/issues/2350",),
    is_repairable=True,
)
UNINDEXED_SHARD = Rule(
    "NB023",
    "unindexed-shard",
    Severity.WARNING,
    "A safetensors file that the index does not name holds part of the model",
    "The index decides what the model is. Engines that go by it start without these tensors, those "
    "that take every file of the folder load them: the same folder is two models.",
    "Write the index again from the headers of all files.",
    _unindexed_shards,
    threads=(f"{_GITHUB}osaurus-ai/osaurus/pull/2585",),
    is_repairable=True,
)
IN_TWO_SHARDS = Rule(
    "NB006",
    "tensor-in-two-shards",
    Severity.ERROR,
    "Two files hold the same tensor",
    "Which copy an engine ends up with depends on the order in which it reads the files. Copies "
    "with the same content are only a waste.",
    "Keep the copy that the index names and rewrite the other file without it.",
    _in_two_shards,
    threads=(f"{_GITHUB}intel/auto-round/issues/2350",),
    is_repairable=True,
)
ABSENT_TENSOR = Rule(
    "NB007",
    "index-names-absent-tensor",
    Severity.ERROR,
    "The index names a tensor that its file does not hold",
    "The index was written for other files than these. transformers stops; servers that read files "
    "rather than the index start without the tensor and compute with memory that was never set.",
    "Restore the tensor from the source, or write the index again from the headers.",
    _absent_tensors,
    threads=(f"{_GITHUB}sgl-project/sglang/issues/32279",),
    is_repairable=True,
)
UNLISTED_TENSOR = Rule(
    "NB008",
    "tensor-not-in-index",
    Severity.WARNING,
    "A tensor that the index does not list",
    "Loaders that go by the index never ask for it, loaders that go by the files load it: the same "
    "folder is two models.",
    "Write the index again from the headers.",
    _unlisted_tensors,
    threads=("https://github.com/osaurus-ai/vmlx-swift/pull/388",),
    is_repairable=True,
)
TOTAL_SIZE = Rule(
    "NB012",
    "index-total-size",
    Severity.WARNING,
    "The index states a wrong total size",
    "metadata.total_size is what download tools and memory estimates go by; a wrong one usually "
    "means that the index was made for other files.",
    "Write the index again from the headers.",
    _total_size,
    threads=("https://github.com/Edge0-AI/Edge0/issues/104",),
    is_repairable=True,
)
INDEX_SHAPE = Rule(
    "NB016",
    "index-malformed",
    Severity.ERROR,
    "The index has no usable weight map",
    "weight_map must be an object from tensor names to safetensors files inside the folder. A path "
    "that leaves the folder is refused: it could read any file of the machine.",
    "Write the index again from the headers.",
    _index_shape,
)
NUMBERED_GAP = Rule(
    "NB017",
    "numbered-shard-absent",
    Severity.ERROR,
    "A file of a numbered set is missing",
    "Files are named 00001 to the last, and one number is in neither the folder nor the index. An "
    "index that was made without it looks consistent: a saver that skipped the files with MTP "
    "tensors lost lm_head and up to 16 layers this way.",
    "Fetch the missing file, or make the checkpoint again.",
    _numbered_gaps,
    threads=(f"{_GITHUB}areal-project/AReaL/pull/1403",),
)
LONE_NAME = Rule(
    "NB018",
    "lone-name-beside-others",
    Severity.NOTE,
    "model.safetensors is one file of several",
    "Some loaders take model.safetensors wherever it lies and never look at the index, so that "
    "they miss the tensors of the other files, often the MTP head. Published files look like that, "
    "and newer writers avoid the name.",
    "Rename the file, model_backbone.safetensors say, and its entries in the index.",
    _lone_name,
    is_repairable=True,
)
NO_INDEX = Rule(
    "NB019",
    "no-index",
    Severity.WARNING,
    "Several files, or one of another name, without an index",
    "transformers looks for model.safetensors or an index and finds neither; other engines load "
    "every safetensors file of the folder, whether it belongs to the model or not.",
    "Write an index from the headers.",
    _no_index,
    threads=("https://github.com/lm-sys/FastChat/issues/1530",),
    is_repairable=True,
)

RULES: tuple[Rule, ...] = (
    *(ORPHAN_SHARD, UNINDEXED_SHARD, IN_TWO_SHARDS, ABSENT_TENSOR, UNLISTED_TENSOR, TOTAL_SIZE),
    *(INDEX_SHAPE, NUMBERED_GAP, LONE_NAME, NO_INDEX),
)
