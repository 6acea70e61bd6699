"""The calibration protocols that have a name: nybble's own mixture, and what others use.

A preset is a source of documents with the number and length of its windows. Each says in its record
what it is and is not; data that are not there are an error that says what to fetch. Nothing is
downloaded unless hub ids are written out. Knows no tokenizer.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

from nybble.calibrate import corpus
from nybble.calibrate.corpus import Document
from nybble.calibrate.sources import USER_LICENCE, File, Source, conversation, read_file, read_rows
from nybble.errors import MissingExtra, TextError

#: Windows of the default protocol: 64k tokens, what the carried text has with large vocabularies.
SAMPLES, LENGTH = 128, 512

#: ModelOpt's default for language models: examples/llm_ptq/hf_ptq.py with the data sets of
#: modelopt/torch/utils/dataset_utils.py, 512 of each, cut at 512 tokens. Per set: the words in a
#: folder's name by which it is found, the hub id, its configuration and its splits.
NVIDIA_SAMPLES, NVIDIA_LENGTH = 512, 512
NVIDIA_SETS = (
    ("cnn_dailymail", "abisee/cnn_dailymail", "3.0.0", ("train",)),
    (
        "nemotron-post-training-dataset-v2",
        "nvidia/Nemotron-Post-Training-Dataset-v2",
        None,
        ("stem", "chat", "math", "code"),
    ),
)

#: The card of Infatoshi/Qwen3.6-35B-A3B-NVFP4-FP8: 64 samples of an English-dominant text corpus,
#: max_seq_length 2048, moe_calibrate_all_experts. Its text was not published.
INFATOSHI_SAMPLES, INFATOSHI_LENGTH = 64, 2048

PRESETS = ("default", "nvidia", "infatoshi")


def open_source(source: str | None) -> Source:
    """A preset by its name, "nvidia:PATH" or "infatoshi:FILE", or a file of the user's.

    Raises TextError for what is neither, and what reading raises.
    """
    name, _, path = (source or "default").partition(":")
    if name == "default" and not path:
        return _default()
    if name == "infatoshi":
        return _infatoshi(path)
    if name == "nvidia":
        return _nvidia(path)
    assert source is not None
    if not Path(source).exists():
        raise TextError(
            f"calibration text {source}: no such file, and no preset; the presets are "
            f"{', '.join(PRESETS)}"
        )
    return read_file(Path(source))


def _default() -> Source:
    return Source(
        "default",
        _corpus_files(),
        documents=tuple(corpus.mixture()),
        samples=SAMPLES,
        length=LENGTH,
        protocol="nybble's mixture of prose, dialogue, code, mathematics and 27 languages",
    )


def _corpus_files() -> tuple[File, ...]:
    return tuple(
        File(str(entry["path"]), int(str(entry["bytes"])), str(entry["sha256"]))
        for entry in corpus.files()
    )


def _infatoshi(path: str) -> Source:
    """Every expert sees every token; the text is the user's, or what English the mixture has."""
    if path:
        found = read_file(Path(path))
        text = f"the text {found.name}"
    else:
        english = [d for d in corpus.mixture() if d.domain != "languages"]
        found = Source("", _corpus_files(), documents=tuple(english))
        text = "nybble's mixture without its languages, as the card's own text is not published"
    return replace(
        found,
        name="infatoshi",
        samples=INFATOSHI_SAMPLES,
        length=INFATOSHI_LENGTH,
        all_experts=True,
        protocol=f"64 x 2048 tokens, all experts see all tokens (Infatoshi's card), of {text}",
    )


# ------------------------------------------------------------------------------------------- nvidia


def _nvidia(path: str) -> Source:
    """CNN/DailyMail and Nemotron v2, from a folder, or from the hub where ids are written out."""
    ids = ",".join(hub for _, hub, _, _ in NVIDIA_SETS)
    if not path:
        raise TextError(
            "preset nvidia: needs two data sets that do not come with nybble; download "
            f"{ids.replace(',', ' and ')} (the second asks for a licence agreement), with "
            "`hf download --repo-type dataset`, into one folder FOLDER and give nvidia:FOLDER, or "
            f"give nvidia:{ids} to read them from the hub"
        )
    protocol = "512 documents each of CNN/DailyMail and Nemotron v2, cut at 512 tokens (ModelOpt)"
    if path == ids:
        files: tuple[File, ...] = ()
        rows = [(key, _from_hub(hub, config, splits)) for key, hub, config, splits in NVIDIA_SETS]
    else:
        rows, files = _from_folder(Path(path))
    documents = [list(islice(_nvidia_documents(key, found), NVIDIA_SAMPLES)) for key, found in rows]
    for (key, _), found in zip(rows, documents, strict=True):
        if len(found) < NVIDIA_SAMPLES:
            protocol += f"; only {len(found)} of {key} were there"
    mixed = [d for pair in _alternating(documents) for d in pair]
    if not files:
        files = (_as_file(ids, mixed),)
    return Source(
        "nvidia",
        files,
        documents=tuple(mixed),
        samples=len(mixed),
        length=NVIDIA_LENGTH,
        is_packed=False,
        protocol=protocol,
    )


def _alternating(sets: list[list[Document]]) -> Iterator[list[Document]]:
    for i in range(max(len(s) for s in sets)):
        yield [s[i] for s in sets if i < len(s)]


def _nvidia_documents(
    key: str, rows: Iterable[tuple[str, Mapping[str, object]]]
) -> Iterator[Document]:
    """As ModelOpt reads them: the article; the contents of the turns, a line each, no template."""
    for number, (where, row) in enumerate(rows):
        if key == "cnn_dailymail":
            text = row.get("article", row.get("text"))
            if not isinstance(text, str):
                raise TextError(f"{where}: has no article")
        else:
            if "messages" not in row:
                raise TextError(f"{where}: has no messages")
            turns = conversation(where, row, key, "").messages or ()
            text = "\n".join(str(turn.get("content") or "") for turn in turns)
        if text.strip():
            yield Document(key, f"{key}/{number}", USER_LICENCE, text=text)


def _from_folder(
    folder: Path,
) -> tuple[list[tuple[str, Iterator[tuple[str, Mapping[str, object]]]]], tuple[File, ...]]:
    if not folder.is_dir():
        raise TextError(f"preset nvidia: {folder}: no such folder")
    found, files = [], []
    for key, hub, _, splits in NVIDIA_SETS:
        paths = [
            p
            for p in sorted(folder.rglob("*"))
            if p.suffix in (".jsonl", ".parquet")
            and key in p.relative_to(folder).as_posix().lower()
            and any(p.name.startswith(split) for split in (*splits, key))
        ]
        if not paths:
            raise TextError(
                f"preset nvidia: {folder}: no .jsonl or .parquet of {hub} in a folder below it "
                f"whose name has {key!r} in it; the files are those of the splits "
                f"{', '.join(splits)}"
            )
        # One file of each split, as the first rows of each are what is used.
        firsts = [next(p for p in paths if p.name.startswith(s)) for s in _begun(paths, splits)]
        chosen = firsts or paths[:1]
        files += [File(p.relative_to(folder).as_posix(), *_digest(p)) for p in chosen]
        found.append((key, _in_turn([_file_rows(p) for p in chosen])))
    return found, tuple(files)


def _begun(paths: list[Path], splits: tuple[str, ...]) -> list[str]:
    return [s for s in splits if any(p.name.startswith(s) for p in paths)]


def _in_turn(
    files: list[Iterator[tuple[str, Mapping[str, object]]]],
) -> Iterator[tuple[str, Mapping[str, object]]]:
    """A row of each file in turn, until all are used up."""
    while files:
        for rows in list(files):
            row = next(rows, None)
            if row is None:
                files.remove(rows)
            else:
                yield row


def _file_rows(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    if path.suffix == ".jsonl":
        for number, row in read_rows(path):
            yield f"{path}: line {number}", row
        return
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise MissingExtra(
            f"{path}: reading parquet needs pyarrow, which is not installed: pip install pyarrow, "
            "or give the set as .jsonl"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    yield str(path), row
    except (OSError, ValueError) as error:
        raise TextError(f"{path}: cannot be read: {error}") from None


def _from_hub(
    hub: str, config: str | None, splits: tuple[str, ...]
) -> Iterator[tuple[str, Mapping[str, object]]]:
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        raise MissingExtra(
            f"preset nvidia: reading {hub} from the hub needs datasets, which is not installed: "
            "pip install datasets, or download it and give nvidia:FOLDER"
        ) from None

    def rows(split: str) -> Iterator[tuple[str, Mapping[str, object]]]:
        try:
            for row in library.load_dataset(hub, name=config, split=split, streaming=True):
                yield f"{hub} {split}", row
        except Exception as error:  # whatever a hub, a proxy or a licence gate answers
            raise TextError(f"preset nvidia: {hub} cannot be read: {error}") from error

    return _in_turn([rows(split) for split in splits])


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _as_file(name: str, documents: Iterable[Document]) -> File:
    """What came from the hub, as if it had been one file."""
    data = json.dumps([d.text for d in documents], ensure_ascii=False).encode()
    return File(name, len(data), hashlib.sha256(data).hexdigest())
