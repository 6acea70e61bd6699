"""The calibration text: hashes, shares, cutting, and that none of it is held-out text.

`held_out_shingles.bin` has, for each document of the sets that models are judged on (wikitext2,
sgd_dialogues, tinystories_sample, the tests of gsm8k, math500, humaneval, mbpp and mgsm), the
smallest of its shingle hashes, so that a document copied into the corpus is found for certain.
NYBBLE_HELD_OUT=FOLDER compares every shingle of every file in a folder (and of those below it).
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from nybble.calibrate import corpus
from nybble.calibrate.corpus import Document, Share
from nybble.errors import TextError
from nybble.text.chat import ChatTemplate

HELD_OUT = Path(__file__).parent / "held_out_shingles.bin"
HASH_BYTES = 8
CHAT_MODEL = Path(__file__).parents[2] / "models" / "hybrid-chat-mtp"

#: Parts of the sets that are training text, by the README of each, and may be calibrated on.
MAY_OVERLAP = {"gsm8k/train.jsonl", "wikipedia_sample/wiki.txt", "tinyshakespeare/input.txt"}

#: Bytes of 128 windows of 512 tokens at 4.6 bytes a token, more than English has with 150k entries.
ENOUGH_BYTES = 128 * 512 * 4.6


def texts() -> Path:
    return Path(str(resources.files("nybble.calibrate"))) / "texts"


@pytest.fixture(scope="module")
def pieces() -> list[Document]:
    return list(corpus.mixture())


# ------------------------------------------------------------------------------------------- files


def test_every_file_is_in_the_manifest_with_a_licence() -> None:
    listed = json.loads((texts() / "MANIFEST.json").read_text())["files"]
    present = {
        p.relative_to(texts()).as_posix()
        for domain in corpus.domains()
        for p in (texts() / domain).iterdir()
        if p.name != "README.md"
    }
    assert {entry["path"] for entry in listed} == present
    for entry in listed:
        assert entry["bytes"] == (texts() / entry["path"]).stat().st_size
        assert entry["path"].startswith(entry["domain"] + "/")
        assert entry["licence"] in (texts() / entry["domain"] / "README.md").read_text()


def test_a_changed_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    root = Path(shutil.copytree(texts(), tmp_path / "texts"))
    assert corpus.documents("languages", root) == corpus.documents("languages")
    path = root / "languages" / "ko.txt"
    path.write_text(path.read_text().replace("할머니", "할아버지", 1))
    with pytest.raises(TextError, match=r"languages/ko\.txt.*changed.*expected sha256"):
        corpus.documents("languages", root)
    assert corpus.documents("code", root)
    path.unlink()
    with pytest.raises(TextError, match=r"languages/ko\.txt.*cannot be read"):
        corpus.documents("languages", root)
    (root / "MANIFEST.json").write_text("{}")
    with pytest.raises(TextError, match=r"MANIFEST\.json"):
        corpus.documents("code", root)


def test_an_unknown_domain_is_an_error_that_lists_them() -> None:
    with pytest.raises(TextError, match="no domain 'poetry'.*prose, dialogue"):
        corpus.documents("poetry")


def test_names_are_unique_and_a_document_is_one_thing() -> None:
    for domain in corpus.domains():
        found = corpus.documents(domain)
        assert len({d.name for d in found}) == len(found)
        assert all((d.text is None) != (d.messages is None) for d in found)
        assert all(d.domain == domain for d in found)


def test_languages_come_in_many_scripts() -> None:
    names = {d.name for d in corpus.documents("languages")}
    wanted = "zh zh-Hant ja ko ar fa he hi bn ta th ru uk el de fr es pt it tr vi id pl sw"
    assert set(wanted.split()) <= names


# ----------------------------------------------------------------------------------- conversations


def test_turns_alternate_and_tools_are_answered() -> None:
    for document in corpus.documents("dialogue"):
        assert document.messages is not None
        asked: list[object] = []
        previous = "assistant"
        for number, message in enumerate(document.messages):
            role, where = message["role"], f"{document.name}, message {number}"
            if role == "system":
                assert number == 0, where
            elif role == "tool":
                assert message["tool_call_id"] == asked.pop(0), where
                assert previous == "assistant", where
            else:
                assert not asked, where
                resumed = document.messages[number - 1]["role"] == "tool"
                assert (role != previous) or resumed, where
                calls = message.get("tool_calls", [])
                assert isinstance(calls, list)
                asked = [call["id"] for call in calls]
                assert document.tools is not None or not calls, where
                previous = str(role)
        assert previous == "assistant", document.name
        assert not asked, document.name


def test_dialogue_has_what_models_are_asked_for() -> None:
    found = corpus.documents("dialogue")
    messages = [m for d in found for m in d.messages or ()]
    assert sum(d.tools is not None for d in found) >= 5
    assert sum("reasoning_content" in m for m in messages) >= 5
    assert sum(m["role"] == "system" for m in messages) >= 5


def test_the_chat_template_writes_every_conversation() -> None:
    template = ChatTemplate.open(CHAT_MODEL)
    assert template is not None
    for document in [*corpus.documents("dialogue"), *corpus.documents("mathematics")]:
        written = corpus.render(document, template)
        if document.messages is None:
            assert written == document.text
            continue
        assert written.count("<|im_start|>assistant\n") == sum(
            m["role"] == "assistant" for m in document.messages
        )
        assert written.endswith("<|im_end|>\n")
        assert ("<tools>" in written) == (document.tools is not None)


def template_that(tmp_path: Path, source: str) -> ChatTemplate:
    (tmp_path / "chat_template.jinja").write_text(source)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    template = ChatTemplate.open(tmp_path)
    assert template is not None
    return template


def test_a_template_without_tools_gets_those_plainly(tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
        "{{ raise_exception('no ' + m.role) }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    template = template_that(tmp_path, source)
    with_tools = next(d for d in corpus.documents("dialogue") if d.tools)
    assert corpus.render(with_tools, template) == corpus.render(with_tools, None)
    roles = {"user", "assistant"}
    simple = next(
        d for d in corpus.documents("dialogue") if {m["role"] for m in d.messages} == roles
    )
    assert corpus.render(simple, template).startswith("[user]")


def test_a_template_that_refuses_everything_is_an_error(tmp_path: Path) -> None:
    template = template_that(tmp_path, "{{ raise_exception('never') }}")
    simple = Document("dialogue", "x", "Apache-2.0", messages=({"role": "user", "content": "a"},))
    with pytest.raises(TextError, match="never"):
        corpus.render(simple, template)


# ---------------------------------------------------------------------------------------- mixture


def test_every_prefix_has_all_domains_in_their_shares(pieces: list[Document]) -> None:
    used: Counter[str] = Counter()
    longest: Counter[str] = Counter()
    assert sum(share.percent for share in corpus.SHARES) == 100
    for number, piece in enumerate(pieces):
        used[piece.domain] += piece.size_bytes
        longest[piece.domain] = max(longest[piece.domain], piece.size_bytes)
        total = sum(used.values())
        slack = sum(longest.values())  # a piece of each: what "furthest below" can overshoot by
        for share in corpus.SHARES:
            assert abs(used[share.domain] - total * share.percent / 100) <= slack, number
    assert set(used) == set(corpus.domains())
    assert {p.domain for p in pieces[:8]} == set(corpus.domains())


def test_the_mixture_is_long_enough_and_the_same_again(pieces: list[Document]) -> None:
    assert sum(p.size_bytes for p in pieces) >= ENOUGH_BYTES
    assert list(corpus.mixture()) == pieces
    assert len({p.name for p in pieces}) == len(pieces)


def test_the_beginning_has_many_documents(pieces: list[Document]) -> None:
    begun = [p.name.partition("#")[0] for p in pieces[:60]]
    assert len(set(begun)) > 50
    assert sum(p.domain == "languages" for p in pieces[:60]) >= 12


def test_pieces_joined_are_the_document() -> None:
    for share in corpus.SHARES:
        for document in corpus.documents(share.domain):
            cut = corpus._pieces(document, share.piece_bytes)
            if document.text is None:
                assert cut == [document]
                continue
            assert "".join(p.text or "" for p in cut) == document.text
            assert all(0 < p.size_bytes <= share.piece_bytes for p in cut)
            assert all(p.size_bytes > share.piece_bytes // 3 for p in cut[:-1])


@pytest.mark.parametrize("limit", [7, 16, 61])
def test_cutting_splits_no_letter(limit: int) -> None:
    text = "Käse. 時計の針。\n\nпять слов и ещё одно\nनीम का पेड़ " * 3 + "x" * 70
    cut = corpus._cut(text, limit)
    assert "".join(cut) == text
    assert all(0 < len(part.encode()) <= limit for part in cut)


def test_cutting_prefers_paragraphs_to_lines_to_words() -> None:
    assert corpus._cut("aaa bbb\n\nccc dd\nee ff gg", 16) == ["aaa bbb\n\n", "ccc dd\nee ff gg"]
    assert corpus._cut("aaa bbb\nccc ddddd eee", 14) == ["aaa bbb\n", "ccc ddddd eee"]
    assert corpus._cut("aaaa bbbb cccc dddd", 12) == ["aaaa bbbb ", "cccc dddd"]


def test_a_short_document_may_lie_anywhere() -> None:
    share = Share("languages", 100, 10**6)
    order = [d.name for d in corpus._spread(share)]
    assert order != sorted(order)
    assert sorted(order) == sorted(f"{d.name}#0" for d in corpus.documents("languages"))


# ---------------------------------------------------------------------------------------- overlap


def test_shingles_see_letters_only_and_are_the_same_everywhere() -> None:
    plain = "The quick brown fox jumps over the lazy dog while 13 owls look on from an old barn"
    shouted = plain.upper().replace(" ", " \n-- ")
    letters = sum(c.isalnum() for c in plain)
    assert corpus.shingles(plain) == corpus.shingles(shouted)
    assert len(corpus.shingles(plain)) == letters - corpus.SHINGLE + 1
    assert corpus.shingles(plain[:40]) == frozenset()
    # By the definition: a polynomial in the letters, most significant first.
    run = [ord(c) for c in plain.casefold() if c.isalnum()][: corpus.SHINGLE]
    value = sum(x * 1_000_003_103 ** (corpus.SHINGLE - 1 - i) for i, x in enumerate(run))
    assert value % (2**61 - 1) in corpus.shingles(plain)


def test_overlap_finds_what_is_in_the_corpus() -> None:
    text = next(d.text for d in corpus.documents("prose") if d.name.startswith("wikipedia/"))
    assert text is not None
    assert corpus.overlap(text) == 1.0
    foreign = "".join(f"{n} zxcv{n * 7919 % 1009} " for n in range(len(text) // 9))
    assert corpus.overlap(foreign) == 0.0
    assert 0.3 < corpus.overlap(text + foreign) < 0.7
    turn = next(d for d in corpus.documents("dialogue") if d.name.endswith("/bedtime"))
    assert turn.messages is not None
    assert corpus.overlap(str(turn.messages[1]["content"])) == 1.0
    assert corpus.overlap("too short") == 0.0


def test_wikitext2_is_not_in_the_corpus() -> None:
    file = resources.files("nybble.evaluate") / "texts" / "wikitext2" / "wiki.test.raw.gz"
    assert corpus.overlap(gzip.decompress(file.read_bytes()).decode()) == 0.0


def test_no_held_out_document_is_in_the_corpus() -> None:
    data = HELD_OUT.read_bytes()
    held_out = {
        int.from_bytes(data[i : i + HASH_BYTES], "big") for i in range(0, len(data), HASH_BYTES)
    }
    assert len(held_out) > 5000
    assert not held_out & corpus._corpus_shingles()
    # The fixture was made with these hashes: articles of wikitext2 are in it, and known here.
    file = resources.files("nybble.evaluate") / "texts" / "wikitext2" / "wiki.test.raw.gz"
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    smallest = [min(corpus.shingles(line)) for line in lines[:60] if corpus.shingles(line)]
    assert smallest
    assert set(smallest) <= held_out


def strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def readable(path: Path) -> Iterator[str]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode()
    name = path.name.removesuffix(".gz")
    if name.endswith((".json", ".jsonl")):
        for row in [text] if _is_json(text) else text.split("\n"):
            yield from strings(json.loads(row or "null"))
    else:
        yield text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif("NYBBLE_HELD_OUT" not in os.environ, reason="NYBBLE_HELD_OUT names no folder")
def test_no_shingle_of_a_folder_is_in_the_corpus() -> None:
    root = Path(os.environ["NYBBLE_HELD_OUT"])
    suffixes = {".jsonl", ".json", ".txt", ".raw", ".tokens", ".tsv", ".gz", ".md", ".toml"}
    shared: dict[str, int] = {}
    for path in sorted(p for p in root.rglob("*") if p.suffix in suffixes):
        name = path.relative_to(root).as_posix()
        if name in MAY_OVERLAP or path.name in ("README.md", "MANIFEST.json"):
            continue
        known = corpus._corpus_shingles()
        count = sum(len(corpus.shingles(text) & known) for text in readable(path))
        shared |= {name: count} if count else {}
    assert shared == {}
