"""Rules about the tokenizer: there, readable, the source's, and of one mind with the configuration.

tokenizer.json is JSON here and no program: it is parsed, never run. That of a large vocabulary has
20 MB, which takes longer to parse than all else that a check does; unless the check is deep, of
such a file the beginning is read (added tokens stand there) and the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import Survey
from nybble.check.templates import TOKENIZER_CONFIG, advertises_vision
from nybble.checkpoint.safetensors import collector_paused, parse_json, show
from nybble.errors import CheckpointError

TOKENIZER = "tokenizer.json"
#: Other tokenizers' files: one of them is enough for some engine.
_OTHERS = re.compile(r"tokenizer\.model(\.v\d+)?|.*\.tiktoken|tiktoken\.model|vocab\.(json|txt)"
                     r"|tekken\.json|spiece\.model|.*\.gguf|sentencepiece.*\.model")  # fmt: skip
#: A file of up to this size is parsed whole; of a larger one so much is read at each end.
WHOLE_BYTES, _END_BYTES = 4 << 20, 1 << 20
_GENERATION = "generation_config.json"
_EOS, _BOS, _PAD = "eos_token_id", "bos_token_id", "pad_token_id"
_VISION = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What tokenizer.json says: ids of tokens by their text. `is_whole`: of all of them, else of
    the added ones alone. `fault` says why it cannot be read."""

    ids: Mapping[str, int] = field(default_factory=dict)
    is_whole: bool = False
    fault: str = ""


def read_vocabulary(survey: Survey) -> Vocabulary:
    """The vocabulary of a checkpoint that has a tokenizer.json; read once."""
    return survey.once(_read)


def _read(survey: Survey) -> Vocabulary:
    try:
        size = survey.files.size(TOKENIZER)
        if size <= WHOLE_BYTES or survey.deep:
            with collector_paused():
                return _whole(survey.files.read(TOKENIZER))
        start = survey.files.read(TOKENIZER, 0, _END_BYTES)
        end = survey.files.read(TOKENIZER, size - 64, 64)
    except CheckpointError as error:
        return Vocabulary(fault=str(error))
    if not start.lstrip().startswith(b"{") or not end.rstrip().endswith(b"}"):
        return Vocabulary(fault=f"{size:,} bytes that do not begin with {{ and end with }}")
    return Vocabulary(_ids(_added_at_the_start(start.decode("utf-8", "replace"))))


def _whole(data: bytes) -> Vocabulary:
    if data.startswith(b"version https://git-lfs"):
        return Vocabulary(fault="it is a pointer of git-lfs, not the file that it stands for")
    try:
        document = parse_json(data, TOKENIZER, check_duplicates=False)
    except CheckpointError as error:
        return Vocabulary(fault=str(error).removeprefix(f"{TOKENIZER}: "))
    model = document.get("model")
    if not isinstance(model, Mapping):
        return Vocabulary(fault='it has no object "model"')
    pieces = model.get("vocab")
    ids: dict[str, int] = {}
    if isinstance(pieces, Mapping):
        ids = {text: i for text, i in pieces.items() if type(i) is int}
    elif isinstance(pieces, list):  # Unigram: pairs of piece and score
        texts = (piece[0] for piece in pieces if isinstance(piece, list) and piece)
        ids = {str(text): i for i, text in enumerate(texts)}
    if not ids:
        return Vocabulary(fault='its model has no "vocab"')
    return Vocabulary({**ids, **_ids(document.get("added_tokens"))}, is_whole=True)


def _added_at_the_start(text: str) -> object:
    found = re.search(r'"added_tokens"\s*:\s*', text)
    if not found:
        return []
    try:
        return json.JSONDecoder().raw_decode(text, found.end())[0]
    except (ValueError, RecursionError):
        return []  # longer than what was read


def _ids(added: object) -> dict[str, int]:
    rows = added if isinstance(added, list) else []
    pairs = [(row.get("content"), row.get("id")) for row in rows if isinstance(row, Mapping)]
    return {c: i for c, i in pairs if isinstance(c, str) and type(i) is int}


# ------------------------------------------------------------------------------- there, and theirs


def _missing(survey: Survey) -> Iterator[Finding]:
    if _has_tokenizer(survey) or not survey.config:
        return
    inherited = survey.source is not None and not _has_tokenizer(survey.source)
    yield MISSING.finding(
        f"there is no {TOKENIZER} nor any other tokenizer: expected one beside the weights",
        file=TOKENIZER,
        severity=Severity.NOTE if inherited else None,
    )


def _has_tokenizer(survey: Survey) -> bool:
    return any(name == TOKENIZER or _OTHERS.fullmatch(name) for name in survey.names)


def _invalid(survey: Survey) -> Iterator[Finding]:
    if TOKENIZER in survey.names and (fault := read_vocabulary(survey).fault):
        yield INVALID.finding(f"{TOKENIZER}: {fault}: expected a tokenizer", file=TOKENIZER)


def _differs(survey: Survey) -> Iterator[Finding]:
    assert survey.source is not None
    there, here = survey.source, survey
    if TOKENIZER not in here.names or TOKENIZER not in there.names or read_vocabulary(here).fault:
        return
    if not here.deep and (here.files.local is None or there.files.local is None):
        return  # 20 MB to be downloaded: the rule says that it takes --deep
    try:
        mine, theirs = here.files.read(TOKENIZER), there.files.read(TOKENIZER)
        if mine == theirs:
            return
        with collector_paused():
            ours, original = parse_json(mine, TOKENIZER), parse_json(theirs, TOKENIZER)
    except CheckpointError:
        return  # the other rule's
    keys = [k for k in sorted(ours.keys() | original.keys()) if k not in _OF_A_REQUEST]
    changed = [k for k in keys if _canonical(ours.get(k)) != _canonical(original.get(k))]
    if changed:
        yield DIFFERS.finding(
            f"{TOKENIZER}: differs from the source's in {', '.join(changed)}: the same text "
            "becomes other tokens than the model was trained on",
            changed,
            file=TOKENIZER,
        )


#: Limits of a request that libraries save along, and the version of the format.
_OF_A_REQUEST = ("truncation", "padding", "version")


def _canonical(part: object) -> object:
    """Merges as pairs, whichever of the two spellings a library chose, and no defaults."""
    if isinstance(part, list):
        return [_canonical(x) for x in part]
    if not isinstance(part, Mapping):
        return part
    out = {k: _canonical(v) for k, v in part.items() if k != "merges" and v is not None}
    if isinstance(merges := part.get("merges"), list):
        out["merges"] = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in merges
                         if isinstance(m, (str, list))]  # fmt: skip
    for key in ("ignore_merges", "byte_fallback", "fuse_unk"):
        if out.get(key) is False:
            del out[key]
    return out


# ----------------------------------------------------------------------------------- of one mind


def _disagrees(survey: Survey) -> Iterator[Finding]:
    size = survey.text_config.get("vocab_size")
    if type(size) is not int:
        return
    ids = _known_ids(survey)
    beyond = [text for text, i in ids.items() if not 0 <= i < size]
    if beyond:
        first = max(beyond, key=lambda text: ids[text])
        yield DISAGREES.finding(
            f"{len(beyond)} tokens have ids outside of vocab_size {size:,}, the largest "
            f"{ids[first]:,} ({show(first)}): the embedding has no row for them",
            beyond[:100],
            file=TOKENIZER,
            severity=Severity.ERROR,
            count=len(beyond),
        )
    problems = _problems(survey, ids, size)
    if problems:
        is_inherited = survey.source is not None and problems == _problems(
            survey.source, _known_ids(survey.source), size
        )
        yield DISAGREES.finding(
            "; ".join(problems),
            problems,
            file="config.json",
            severity=Severity.NOTE if is_inherited else None,
        )


def _known_ids(survey: Survey) -> dict[str, int]:
    known = read_vocabulary(survey) if TOKENIZER in survey.names else Vocabulary()
    return {**known.ids, **_decoder_ids(survey)}


def _problems(survey: Survey, ids: Mapping[str, int], size: int) -> list[str]:
    return [*_outside(survey, size), *_vision(survey, ids), *_end(survey, ids)]


def _outside(survey: Survey, size: int) -> Iterator[str]:
    places = [("config.json", survey.text_config), (_GENERATION, survey.documents.get(_GENERATION))]
    for file, document in places:
        for key in (_EOS, _BOS, _PAD):
            for i in sorted(_as_ids((document or {}).get(key))):
                if i >= size:
                    yield f"{file}: {key} {i:,} is no token of {size:,}"


def _as_ids(value: object) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {v for v in values if type(v) is int}


def _vision(survey: Survey, ids: Mapping[str, int]) -> Iterator[str]:
    """Placeholders of images that the tokenizer does not have, or has elsewhere."""
    if not advertises_vision(survey) or not ids:
        return
    texts = {i: text for text, i in ids.items()}
    config = survey.documents.get(TOKENIZER_CONFIG, {})
    for key in _VISION:
        i = survey.config.get(key)
        if type(i) is not int:
            continue
        named = config.get(key.removesuffix("_id"))
        if isinstance(named, str) and named in ids and ids[named] != i:
            yield f"config.json: {key} {i:,}, but {show(named)} is {ids[named]:,} in the tokenizer"
        elif i not in texts:
            yield f"config.json: {key} {i:,} is none of the tokenizer's tokens"


def _end(survey: Survey, ids: Mapping[str, int]) -> Iterator[str]:
    """The token that ends a turn, which generation must stop at."""
    named = survey.documents.get(TOKENIZER_CONFIG, {}).get("eos_token")
    text = named.get("content") if isinstance(named, Mapping) else named
    if not isinstance(text, str) or text not in ids:
        return
    stops = _as_ids(survey.documents.get(_GENERATION, {}).get(_EOS))
    for section in (survey.config, survey.text_config):
        stops |= _as_ids(section.get(_EOS))
    if stops and ids[text] not in stops:
        yield (
            f"{TOKENIZER_CONFIG}: eos_token {show(text)} is {ids[text]:,}, which is none of the "
            f"eos_token_id {sorted(stops)} of {_GENERATION} and config.json"
        )


def _decoder_ids(survey: Survey) -> dict[str, int]:
    decoder = survey.documents.get(TOKENIZER_CONFIG, {}).get("added_tokens_decoder")
    rows = decoder.items() if isinstance(decoder, Mapping) else ()
    return {
        str(row["content"]): int(i)
        for i, row in rows
        if isinstance(row, Mapping)
        and isinstance(row.get("content"), str)
        and re.fullmatch(r"\d{1,9}", i)
    }


MISSING = Rule(
    "NB504",
    "tokenizer-missing",
    Severity.WARNING,
    "The tokenizer is missing",
    "Export functions write weights and config.json; tokenizer and processor are copied by the "
    "scripts around them, or forgotten. Engines refuse to start, or fetch a tokenizer from a model "
    "hub by a name that config.json still carries.",
    "Copy tokenizer.json and tokenizer_config.json from the source.",
    _missing,
    threads=("https://github.com/tloen/alpaca-lora/issues/479",),
    is_repairable=True,
)
DIFFERS = Rule(
    "NB505",
    "tokenizer-differs",
    Severity.ERROR,
    "The tokenizer is not the source's",
    "Vocabulary, merges, added tokens or splitting rules differ from those the weights were "
    "trained with. Answers are a bit worse or quite wrong, and nothing reports an error. "
    "Spelling, order of keys and limits of truncation and padding do not count. The tokenizer of a "
    "folder behind HTTP is compared with --deep only, as it has 20 MB.",
    "Copy tokenizer.json from the source.",
    _differs,
    threads=("https://github.com/azampatti/Qwen3.8-Flash-Next-Int4-FAST/issues/2",),
    is_repairable=True,
    needs=frozenset({"source"}),
)
DISAGREES = Rule(
    "NB518",
    "token-ids-disagree",
    Severity.WARNING,
    "Tokenizer and configuration disagree on token ids",
    "A token id beyond vocab_size reads past the embedding: an error if it occurs in a prompt. An "
    "end token that generation_config.json does not know lets answers run on in engines that stop "
    "by it. An image placeholder that the tokenizer lacks makes images vanish.",
    "Take config.json, generation_config.json and tokenizer files from one revision of the source.",
    _disagrees,
    threads=(
        "https://github.com/Blaizzy/mlx-vlm/pull/2112",
        "https://github.com/QwenLM/Qwen3/issues/927",
    ),
    is_repairable=True,
)
INVALID = Rule(
    "NB519",
    "tokenizer-invalid",
    Severity.ERROR,
    "tokenizer.json cannot be read",
    "The file is cut off, is a pointer of git-lfs instead of the file, or is no tokenizer. Engines "
    "refuse to start, some after all weights were loaded. Of a large file the two ends are looked "
    "at, all of it with --deep.",
    "Fetch tokenizer.json again, or copy it from the source.",
    _invalid,
    threads=(
        "https://github.com/aliyun/qwen-dianjin/issues/15",
        "https://github.com/git-lfs/git-lfs/issues/6061",
    ),
    is_repairable=True,
)

RULES = (MISSING, DIFFERS, DISAGREES, INVALID)
