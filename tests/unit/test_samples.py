"""Calibration windows: every token once, nothing padded, a guard of other documents, hashes of all
that went in; files of the user's in every form, and what is wrong with them."""

from __future__ import annotations

import json
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.calibrate import corpus, presets
from nybble.calibrate.overlap import KEPT, Sketch, refuse_overlap
from nybble.calibrate.samples import GUARD_SHARE, LEAST_TOKENS, Piece, choose_guard, open_samples
from nybble.calibrate.sources import read_file
from nybble.errors import EvaluationError, MissingExtra, TextError
from nybble.text.chat import ChatTemplate
from nybble.text.tokenizer import Tokenizer

MODELS = Path(__file__).parents[2] / "models"
CHAT, PLAIN = MODELS / "hybrid-chat-mtp", MODELS / "stories-hybrid-moe"


def ids_of(samples: Any) -> Counter[int]:
    return Counter(i for w in samples.windows for i in w.tolist())


def sentences(count: int, seed: int = 0) -> str:
    words = "the small river ran under an old bridge where three boats waited for rain".split()
    lines = []
    for i in range(count):
        state = (i + 1) * 2654435761 + seed * 97
        lines.append(" ".join(words[(state >> k) % len(words)] for k in range(3, 23)) + ".")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- the mixture


@pytest.mark.parametrize("model", [CHAT, PLAIN], ids=lambda p: p.name)
def test_the_default_fills_its_windows_with_all_domains(model: Path) -> None:
    found = open_samples(model)
    record: Any = found.record
    assert found.fit_tokens + found.guard_tokens == presets.SAMPLES * presets.LENGTH
    assert all(w.dtype == torch.int64 and 16 <= len(w) <= 512 for w in found.windows)
    assert set(record["domains"]) == set(corpus.domains())
    for share in corpus.SHARES:
        tokens = record["domains"][share.domain]
        # A domain's guard is a sixth of it to within half of its largest piece.
        whole = tokens["fit"] + tokens["guard"]
        assert abs(tokens["guard"] - whole / GUARD_SHARE) < 1000, share.domain
        assert tokens["guard"] > 500
    assert record["tokens"] == {"fit": found.fit_tokens, "guard": found.guard_tokens}
    assert not found.all_experts
    assert json.loads(json.dumps(record)) == record
    listed = {e["path"]: e["sha256"] for e in corpus.files()}
    assert {f["name"]: f["sha256"] for f in record["files"]} == listed


def test_the_windows_hold_the_tokens_of_the_rendered_documents() -> None:
    tokenizer, template = Tokenizer.open(CHAT), ChatTemplate.open(CHAT)
    assert template is not None
    expected: list[int] = []
    for document in corpus.mixture():
        expected += tokenizer.encode(
            corpus.render(document, template), parse_special=document.messages is not None
        )
        if len(expected) >= 20 * 128:
            break
    found = open_samples(CHAT, samples=20, length=128)
    left_out = found.record["tokens_left_out"]
    assert isinstance(left_out, int)
    assert left_out < 10 * 16
    missing = Counter(expected[: 20 * 128])
    missing.subtract(ids_of(found))
    assert sum(missing.values()) == left_out
    assert min(missing.values()) >= 0
    # What only a template writes is there, as one token.
    assert ids_of(found)[tokenizer.encode("<|im_start|>")[0]] > 0


def test_the_same_call_gives_the_same_windows_and_another_text_another_hash() -> None:
    one, two = open_samples(PLAIN, samples=12), open_samples(PLAIN, samples=12)
    assert one.record == two.record
    assert all(torch.equal(a, b) for a, b in zip(one.windows, two.windows, strict=True))
    assert open_samples(PLAIN, samples=13).record["sha256"] != one.record["sha256"]


def test_no_document_is_on_both_sides_unless_it_is_long() -> None:
    pieces = [Piece("a", str(i), [0] * 100) for i in range(60)]
    pieces += [Piece("b", "long", [0] * 100) for _ in range(60)]
    judges = choose_guard(pieces)
    assert sum(judges[:60]) == sum(judges[60:]) == 10
    assert judges[60:] == [False] * 50 + [True] * 10  # the end of the long one
    pairs = [Piece("c", str(i // 2), [0] * 50) for i in range(60)]
    judges = choose_guard(pairs)
    assert judges[::2] == judges[1::2]
    assert sum(judges) == 10


@pytest.mark.parametrize("tokens", [1024, 2048, 4096, 8192, 16384])
def test_small_samples_have_their_guard_too(tokens: int) -> None:
    found = open_samples(CHAT, samples=tokens // 256, length=256)
    assert tokens / 12 < found.guard_tokens < tokens / 3


# -------------------------------------------------------------------------------------- own files


def test_a_text_file_becomes_windows_with_a_ragged_end(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text(sentences(120), "utf-8")
    whole = Tokenizer.open(PLAIN).encode(path.read_text(), parse_special=False)
    rest = len(whole) % 128
    found = open_samples(PLAIN, str(path), length=128)
    assert ids_of(found) == Counter(whole[: len(whole) - (rest if rest < 16 else 0)])
    sizes = sorted(len(w) for w in found.windows)
    assert sizes[1:] == [128] * (len(sizes) - 1)
    assert sizes[0] in (rest, 128)
    # Every sixth window judges, from beginning to end.
    assert len(found.guard) == pytest.approx(len(found.windows) / GUARD_SHARE, abs=1)
    assert found.record["template_sha256"] is None
    # Fewer than there are: from beginning to end, not the first ones.
    some = open_samples(PLAIN, str(path), samples=10, length=128)
    assert len(some.windows) == 10
    starts = {tuple(whole[i : i + 128]): i for i in range(0, len(whole), 128)}
    at = sorted(starts[tuple(w.tolist())] for w in some.windows)
    assert at[0] == 0
    assert at[-1] > len(whole) * 0.8


def test_of_a_huge_text_only_parts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.txt"
    path.write_text(sentences(9000), "utf-8")
    found = open_samples(PLAIN, str(path), samples=8, length=160)
    assert sorted(map(len, found.windows)) == [160] * 8
    decoded = [Tokenizer.open(PLAIN).decode(w.tolist()) for w in found.windows]
    assert len(set(decoded)) == 8


def test_a_text_of_one_window_is_cut_in_two(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text(sentences(60), "utf-8")
    found = open_samples(PLAIN, str(path), samples=1, length=LEAST_TOKENS)
    assert [len(w) for w in found.windows] == [LEAST_TOKENS - LEAST_TOKENS // 6, LEAST_TOKENS // 6]
    assert found.guard == {1}


def test_lines_of_words_and_conversations(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    rows: list[dict[str, object]] = [{"text": sentences(6, i), "domain": "a"} for i in range(20)]
    rows += [
        {
            "domain": "b",
            "messages": [
                {"role": "user", "content": sentences(2, 50 + i)},
                {"role": "assistant", "content": sentences(3, 80 + i)},
            ],
        }
        for i in range(14)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", "utf-8")
    found = open_samples(CHAT, str(path), length=256)
    record: Any = found.record
    assert set(record["domains"]) == {"a", "b"}
    assert all(side > 0 for d in record["domains"].values() for side in d.values())
    assert record["documents"] == 34
    assert record["template_sha256"]
    start = Tokenizer.open(CHAT).encode("<|im_start|>")[0]
    assert ids_of(found)[start] == 14 * 2


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_token_ids_are_the_windows(tmp_path: Path, form: str) -> None:
    ids = [[(7 * i + k) % 500 for k in range(100 + i)] for i in range(13)]
    path = tmp_path / f"ids.{form}"
    if form == "json":
        path.write_text(json.dumps({"input_ids": ids}))
    else:
        path.write_text("\n".join(json.dumps({"input_ids": row}) for row in ids))
    found = open_samples(PLAIN, str(path))
    assert sorted(w.tolist() for w in found.windows) == sorted(ids)
    assert len(found.guard) == 2
    cut = open_samples(PLAIN, str(path), length=60)
    assert ids_of(cut) == ids_of(found)
    assert max(map(len, cut.windows)) == 60


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "", "empty"),
        ("a.txt", " \n\t\n", "empty"),
        ("a.txt", "a few words", r"at least 1,024 are needed"),
        ("a.jsonl", '{"text": "x"}\n{"texts": "y"}', r"line 2: has texts, expected text"),
        ("a.jsonl", '{"text": "x"}\nnot', r"line 2 is no JSON"),
        ("a.jsonl", "[1]", r"line 1 holds list"),
        ("a.jsonl", '{"messages": []}', r"line 1: messages must be a list of objects"),
        ("a.jsonl", '{"messages": [{"content": "x"}]}', r"each of messages needs a role"),
        ("a.jsonl", '{"text": "x", "domain": 3}', r"line 1: domain is 3"),
        ("a.jsonl", '{"text": "x"}\n{"input_ids": [1]}', r"files of their own"),
        ("a.jsonl", '{"text": ""}', r"has no token"),
        ("a.json", '{"input_ids": []}', r'expected \{"input_ids"'),
        ("a.json", "{", r"no JSON"),
        ("a.json", '{"input_ids": [[1, -2]]}', r"input_ids\[0\]: expected a list of token ids"),
        ("a.json", '{"input_ids": [[1, true]]}', r"input_ids\[0\]: expected"),
        ("a.json", '{"input_ids": [[1], [512]]}', r"input_ids\[1\] holds the id 512.*512 tokens"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(TextError, match=said):
        open_samples(PLAIN, str(path))


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"no such file, and no preset.*default, nvidia"):
        open_samples(PLAIN, str(tmp_path / "nowhere.txt"))
    (tmp_path / "b.txt").write_bytes(b"abc\xff")
    with pytest.raises(TextError, match=r"b\.txt: not UTF-8 at byte 3"):
        open_samples(PLAIN, str(tmp_path / "b.txt"))
    with pytest.raises(TextError, match="cannot be read"):
        open_samples(PLAIN, str(tmp_path))


def test_more_than_there_is_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text(sentences(60), "utf-8")
    with pytest.raises(TextError, match=r"own\.txt has .* tokens .*use --samples \d+"):
        open_samples(PLAIN, str(path), samples=64, length=512)
    with pytest.raises(TextError, match=r"text that comes with nybble has"):
        open_samples(PLAIN, samples=4096, length=512)
    with pytest.raises(TextError, match=r"--samples 0"):
        open_samples(PLAIN, samples=0)
    with pytest.raises(TextError, match=r"--length 1: at least 16"):
        open_samples(PLAIN, length=1)
    with pytest.raises(TextError, match=r"longer than the model's context of 256"):
        open_samples(PLAIN, length=512, context=256)
    assert max(map(len, open_samples(PLAIN, samples=8, context=256).windows)) == 256


# ---------------------------------------------------------------------------------------- presets


def test_infatoshi_is_64_windows_of_2048_for_all_experts(tmp_path: Path) -> None:
    found = open_samples(CHAT, "infatoshi")
    record: Any = found.record
    assert found.all_experts
    assert record["all_experts"] is True
    assert "languages" not in record["domains"]
    assert max(map(len, found.windows)) == 2048
    path = tmp_path / "own.txt"
    path.write_text(sentences(200), "utf-8")
    own = open_samples(CHAT, f"infatoshi:{path}")
    assert own.all_experts
    assert own.record["source"] == "infatoshi"


def nvidia_folder(root: Path) -> Path:
    news, chats = root / "cnn_dailymail" / "3.0.0", root / "Nemotron-Post-Training-Dataset-v2"
    news.mkdir(parents=True)
    chats.mkdir()
    rows = [{"article": sentences(30, i)} for i in range(6)]
    (news / "train-00000.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (news / "test-00000.jsonl").write_text('{"article": "never read"}')
    for split in ("chat", "code", "math", "stem", "multilingual_de"):
        talks = [
            {"messages": [{"role": "user", "content": split}, {"role": "assistant", "content": t}]}
            for t in (sentences(20, 100 + i) for i in range(2))
        ]
        (chats / f"{split}-00000.jsonl").write_text("\n".join(map(json.dumps, talks)))
    return root


def test_nvidia_takes_both_sets_cut_and_not_packed(tmp_path: Path) -> None:
    found = open_samples(PLAIN, f"nvidia:{nvidia_folder(tmp_path)}")
    record: Any = found.record
    assert len(found.windows) == record["documents"] == 6 + 4 * 2
    assert max(map(len, found.windows)) <= 512
    names = [f["name"].rpartition("/")[2] for f in record["files"]]
    expected = ("train", "stem", "chat", "math", "code")
    assert names == [f"{split}-00000.jsonl" for split in expected]
    assert "only 6 of cnn_dailymail were there" in record["protocol"]
    tokenizer = Tokenizer.open(PLAIN)
    news = tokenizer.encode(sentences(30, 0), parse_special=False)[:512]
    assert any(w.tolist() == news for w in found.windows)
    # Contents line by line, as ModelOpt reads them; no template.
    talk = tokenizer.encode("stem\n" + sentences(20, 100), parse_special=False)[:512]
    assert any(w.tolist() == talk for w in found.windows)


def test_nvidia_without_its_data_says_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TextError, match=r"abisee/cnn_dailymail and nvidia/Nemotron.*nvidia:FOLDER"):
        open_samples(PLAIN, "nvidia")
    with pytest.raises(TextError, match=r"no such folder"):
        open_samples(PLAIN, f"nvidia:{tmp_path / 'none'}")
    with pytest.raises(TextError, match=r"no \.jsonl or \.parquet of abisee/cnn_dailymail"):
        open_samples(PLAIN, f"nvidia:{tmp_path}")
    hub = "nvidia:abisee/cnn_dailymail,nvidia/Nemotron-Post-Training-Dataset-v2"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match="pip install datasets"):
        open_samples(PLAIN, hub)

    def load_dataset(hub: str, name: str | None, split: str, streaming: bool) -> Any:
        assert streaming
        if hub.startswith("abisee"):
            assert (name, split) == ("3.0.0", "train")
            return ({"article": sentences(20, i)} for i in range(3))
        return ({"messages": [{"role": "user", "content": sentences(20, 9)}]} for _ in range(2))

    library = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", library)
    found = open_samples(PLAIN, hub)
    assert len(found.windows) == 3 + 4 * 2


# ---------------------------------------------------------------------------------------- overlap


def test_a_text_that_was_calibrated_on_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text(sentences(150, 3), "utf-8")
    record: Any = open_samples(PLAIN, str(path)).record
    sketch = Sketch.from_json(json.loads(json.dumps(record["words"])), "report.json")
    assert len(sketch.hashes) == min(KEPT, sketch.count)
    passage = path.read_text()[4000:5000].upper()
    judged = "An unrelated beginning. " + passage
    with pytest.raises(EvaluationError, match=r"the test shares about .* with own\.txt"):
        refuse_overlap(sketch, judged, calibrated="own.txt", judged="the test")
    other = "\n".join(d.text or "" for d in corpus.documents("prose"))
    refuse_overlap(sketch, other, calibrated="own.txt", judged="the test")


def test_the_default_mixture_is_recognised_by_a_page_of_it() -> None:
    sketch = Sketch.from_json(open_samples(CHAT).record["words"], "report.json")
    known = [d for d in corpus.mixture() if d.text is not None][:100]  # all used
    pages = [a.text + b.text for a, b in zip(known[::2], known[1::2], strict=False)]  # type: ignore[operator]
    found = sum(sketch.shared(page) >= 200 for page in pages)
    # One shingle in 60 is in the sketch, and such a page has a thousand or more.
    assert found >= 0.95 * len(pages)
    assert Sketch.of(["abc"]).shared("abc") == 0


def test_a_sketch_is_the_smallest_hashes_and_a_good_guess_of_their_number() -> None:
    texts = [d.text for d in corpus.documents("prose") if d.text is not None]
    every = frozenset[int]().union(*map(corpus.shingles, texts))
    assert len(every) > 10 * KEPT
    found = Sketch.of(texts)
    assert found.hashes == frozenset(sorted(every)[:KEPT])
    assert found.count == pytest.approx(len(every), rel=0.06)  # 4 / sqrt(KEPT)
    short = texts[0][:2000]
    few = corpus.shingles(short)
    assert 0 < len(few) < KEPT
    assert Sketch.of([short, short]) == Sketch(len(few), few)


@pytest.mark.parametrize(
    "record",
    [None, {}, {"shingle": 50, "count": 1, "hashes": "!"}, {"shingle": 13, "count": 1},
     {"shingle": 50, "count": 0, "hashes": "AAAAAAAAAAA="}],
)  # fmt: skip
def test_a_damaged_sketch_is_no_sketch(record: object) -> None:
    with pytest.raises(TextError, match=r"report\.json: the sketch"):
        Sketch.from_json(record, "report.json")


def test_endings_in_capitals_and_a_byte_order_mark_are_no_trouble(tmp_path: Path) -> None:
    line = '{"text": "one document"}\n'
    for name, content in (("U.JSONL", line), ("bom.jsonl", "\ufeff" + line)):
        (tmp_path / name).write_text(content, "utf-8")
        documents = read_file(tmp_path / name).documents
        assert [d.text for d in documents] == ["one document"]


@pytest.mark.parametrize("name", ["deep.jsonl", "deep.json"])
def test_json_that_is_nested_too_deeply_is_refused(tmp_path: Path, name: str) -> None:
    deep = '{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
    (tmp_path / name).write_text(deep)
    with pytest.raises(TextError, match="no JSON"):
        read_file(tmp_path / name)


def test_domains_count_what_the_windows_hold(tmp_path: Path) -> None:
    text = tmp_path / "one.txt"
    text.write_text("One story that goes on and on, and never ends. " * 600)
    found = open_samples(CHAT, str(text), length=256)
    counts = found.record["domains"]
    assert counts == {"text": {"fit": found.fit_tokens, "guard": found.guard_tokens}}
    assert found.guard_tokens > 0
