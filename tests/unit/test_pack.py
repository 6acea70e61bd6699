"""The reference pack: written in a stream, read back bit for bit, and refused when damaged."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from test_report import CONDITIONS

from faulty_disk import FaultyDisk
from nybble.checkpoint.disk import Disk
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import CheckpointError, DoesNotFit, EvaluationError, NybbleError
from nybble.evaluate.pack import HEAD, HIDDEN, PACK_JSON, TOKENS, Pack, PackWriter
from nybble.evaluate.windows import Window, count_scored, make_windows

FIXED = settings(derandomize=True, deadline=None, max_examples=150)
WIDTH, VOCABULARY = 6, 41


def parts(
    convention: str = "windows", **options: int
) -> tuple[tuple[Window, ...], list[np.ndarray], np.ndarray]:
    """Windows of a text, hidden states (BF16) of each, and a head [V, H]."""
    rng = np.random.default_rng(5)
    windows = make_windows(rng.integers(0, VOCABULARY, 53), 10, convention, **options)
    hidden = [rng.normal(0, 3, (len(w.tokens), WIDTH)).astype(ml_dtypes.bfloat16) for w in windows]
    return windows, hidden, rng.normal(0, 1, (VOCABULARY, WIDTH)).astype(ml_dtypes.bfloat16)


def conditions_of(windows: tuple[Window, ...]) -> object:
    return replace(CONDITIONS, windows=len(windows), scored=count_scored(windows))


def write(
    out: Path, convention: str = "windows", *, disk: Disk | None = None, has_head: bool = True
) -> None:
    windows, hidden, head = parts(convention, **({"stride": 4} if convention == "sliding" else {}))
    writer = PackWriter(out, conditions_of(windows), windows, head, has_head=has_head, disk=disk)
    with writer:
        for rows in hidden:
            writer.add(rows)
        writer.finish()


@pytest.mark.parametrize("convention", ["windows", "llamacpp", "sliding"])
def test_a_pack_is_read_back_bit_for_bit(tmp_path: Path, convention: str) -> None:
    write(tmp_path / "pack", convention)
    windows, hidden, head = parts(convention, **({"stride": 4} if convention == "sliding" else {}))
    with Pack.open(tmp_path / "pack") as pack:
        assert pack.conditions == conditions_of(windows)
        assert (pack.hidden_size, pack.vocabulary) == (WIDTH, VOCABULARY)
        assert len(pack.windows) == len(windows)
        for i, (ours, theirs) in enumerate(zip(pack.windows, windows, strict=True)):
            assert ours.tokens.dtype == np.int64
            assert ours.tokens.tolist() == theirs.tokens.tolist()
            assert (ours.first_scored, ours.start) == (theirs.first_scored, theirs.start)
            assert pack.hidden(i).dtype == ml_dtypes.bfloat16
            assert pack.hidden(i).tobytes() == hidden[i].tobytes()
            pack.drop_pages(i)
        assert pack.head().tobytes() == head.tobytes()
        pack.check_head(head)
        pack.verify()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pack"]


def test_others_can_read_the_files(tmp_path: Path) -> None:
    write(tmp_path / "pack")
    windows, _, _ = parts()
    rows = sum(len(w.tokens) for w in windows)
    with safe_open(tmp_path / "pack" / HIDDEN, framework="np") as file:
        view = file.get_slice("hidden")
        assert (view.get_dtype(), view.get_shape()) == ("BF16", [rows, WIDTH])
    with safe_open(tmp_path / "pack" / TOKENS, framework="np") as file:
        assert file.get_tensor("tokens").tolist() == [t for w in windows for t in w.tokens.tolist()]


def test_bits_are_as_good_as_bf16(tmp_path: Path) -> None:
    windows, hidden, head = parts()
    with PackWriter(tmp_path / "pack", conditions_of(windows), windows, head) as writer:
        for rows in hidden:
            writer.add(rows.view(np.uint16))
        writer.finish()
    with Pack.open(tmp_path / "pack") as pack:
        assert pack.hidden(1).tobytes() == hidden[1].tobytes()


def test_a_pack_without_its_head_takes_only_that_head(tmp_path: Path) -> None:
    write(tmp_path / "pack", has_head=False)
    _, _, head = parts()
    assert not (tmp_path / "pack" / HEAD).exists()
    with Pack.open(tmp_path / "pack") as pack:
        assert not pack.has_head
        pack.verify()
        pack.check_head(head.view(np.uint16))
        with pytest.raises(EvaluationError, match="--head PATH"):
            pack.head()
        other = head.copy()
        other[3, 2] = 0
        for wrong in (other, head[:-1]):
            with pytest.raises(EvaluationError, match="not the same"):
                pack.check_head(wrong)


# ------------------------------------------------------------------------------------------ writing


def test_nothing_is_out_before_it_is_whole(tmp_path: Path) -> None:
    windows, hidden, head = parts()
    out = tmp_path / "pack"
    with PackWriter(out, conditions_of(windows), windows, head) as writer:
        for rows in hidden[:-1]:
            writer.add(rows)
        with pytest.raises(EvaluationError, match="5 of 6 windows"):
            writer.finish()
    assert not out.exists()
    with pytest.raises(CheckpointError, match="interrupted run; remove it"):
        write(out)


@pytest.mark.parametrize("mode", ["enospc", "eio"])
def test_a_disk_that_fails_leaves_no_pack(tmp_path: Path, mode: str) -> None:
    clean = FaultyDisk()
    write(tmp_path / "clean", disk=clean)
    steps = len(clean.operations)
    assert steps > 20
    for k in range(1, steps):  # the last one flushes the name that is already there
        out = tmp_path / f"pack{k}"
        with pytest.raises(CheckpointError):
            write(out, disk=FaultyDisk(fail_at=k, mode=mode))
        assert not out.exists()


def test_hidden_states_of_another_shape_or_not_finite_are_refused(tmp_path: Path) -> None:
    windows, hidden, head = parts()
    with PackWriter(tmp_path / "pack", conditions_of(windows), windows, head) as writer:
        with pytest.raises(EvaluationError, match=r"window 0 are \[9, 6\], expected \[10, 6\]"):
            writer.add(hidden[0][1:])
        with pytest.raises(EvaluationError, match="float32, expected bfloat16"):
            writer.add(hidden[0].astype(np.float32))
        for value in (np.nan, np.inf, -np.inf):
            broken = hidden[0].copy()
            broken[4, 1] = value
            with pytest.raises(EvaluationError, match="window 0, token 4, element 1"):
                writer.add(broken)
        for rows in hidden:
            writer.add(rows)
        with pytest.raises(EvaluationError, match="all 6 windows"):
            writer.add(hidden[0])
        writer.finish()
    with Pack.open(tmp_path / "pack") as pack:
        pack.verify()


def test_an_occupied_place_a_full_disk_and_false_conditions_stop_it_first(tmp_path: Path) -> None:
    class Full(Disk):
        def free_bytes(self, path: Path) -> int:
            return 1000

    windows, _, head = parts()
    with pytest.raises(DoesNotFit, match="KiB to write, 1000 bytes free"):
        PackWriter(tmp_path / "a", conditions_of(windows), windows, head, disk=Full())
    with pytest.raises(EvaluationError, match="6 windows with 47 scored tokens .* 2 and 1022"):
        PackWriter(tmp_path / "a", CONDITIONS, windows, head)
    with pytest.raises(EvaluationError, match=r"\[V, H\]"):
        PackWriter(tmp_path / "a", conditions_of(windows), windows, head[0])
    with pytest.raises(EvaluationError, match="head of 20 rows: the tokenizer"):
        PackWriter(tmp_path / "a", conditions_of(windows), windows, head[:20])
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    with pytest.raises(CheckpointError, match="exists; name another output"):
        PackWriter(tmp_path / "a", conditions_of(windows), windows, head)


# ------------------------------------------------------------------------------------------ damaged


def edit(path: Path, change: Callable[[dict], object]) -> None:
    document = json.loads((path / PACK_JSON).read_text())
    change(document)
    (path / PACK_JSON).write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="nybble.reference/2"), "expected 'nybble.reference/1'"),
        (lambda d: d.update(colour=1), "keys"),
        (lambda d: d.pop("tokens"), "keys"),
        (lambda d: d.update(hidden_size=5), r"tensor '(head|hidden)'"),
        (lambda d: d.update(hidden_size=-6), "positive integer"),
        (lambda d: d.update(vocabulary=True), "positive integer"),
        (lambda d: d.update(tokens=52), "tensor 'hidden'"),
        (lambda d: d.update(windows=5), "tensor 'first_scored'"),
        (lambda d: d["files"].pop(HEAD), "holds"),
        (lambda d: d["files"].pop(HIDDEN), "files"),
        (lambda d: d["files"][HIDDEN].update(bytes=7), "different packs"),
        (lambda d: d["files"][TOKENS].update(header_sha256="0"), "different packs"),
        (lambda d: d["files"][TOKENS].update(data_sha256="0"), "file is damaged"),
        (lambda d: d["files"][TOKENS].update(data_sha256=None), "file is damaged"),
        (lambda d: d["files"].update({HEAD: 3}), "described by 3"),
        (lambda d: d.update(files=[]), "files"),
        (lambda d: d["conditions"].update(scored=46), "conditions and windows disagree"),
        (lambda d: d["conditions"].pop("isa"), "conditions lack"),
    ],
)
def test_a_pack_json_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    write(tmp_path / "pack")
    edit(tmp_path / "pack", change)
    with pytest.raises(EvaluationError, match=message):
        Pack.open(tmp_path / "pack")


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("tokens", 3, VOCABULARY),
        ("tokens", 3, -1),
        ("first_scored", 2, 0),
        ("first_scored", 2, 10),
        ("starts", 0, 1),
        ("starts", 1, 25),  # beyond starts[2]
        ("starts", 6, 52),
    ],
)
def test_windows_that_cannot_be_are_refused_even_with_the_right_hash(
    tmp_path: Path, name: str, at: int, value: int
) -> None:
    write(tmp_path / "pack")
    path = tmp_path / "pack" / TOKENS
    info = Checkpoint.open(tmp_path / "pack").tensors[name]
    data = bytearray(path.read_bytes())
    width = 8 if info.dtype == "I64" else 4
    place = info.offset + at * width
    data[place : place + width] = value.to_bytes(width, "little", signed=True)
    path.write_bytes(data)
    digest = hashlib.sha256(data[header_end(TOKENS) :]).hexdigest()
    edit(tmp_path / "pack", lambda d: d["files"][TOKENS].update(data_sha256=digest))
    with pytest.raises(EvaluationError, match="the pack is damaged"):
        Pack.open(tmp_path / "pack")


def test_files_that_are_missing_added_or_of_another_pack_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        write(tmp_path / name)
    (tmp_path / "a" / PACK_JSON).unlink()
    with pytest.raises(EvaluationError, match="no reference pack"):
        Pack.open(tmp_path / "a")
    (tmp_path / "b" / HEAD).unlink()
    with pytest.raises(EvaluationError, match="incomplete"):
        Pack.open(tmp_path / "b")
    (tmp_path / "c" / "extra.safetensors").write_bytes((tmp_path / "c" / HEAD).read_bytes())
    with pytest.raises(CheckpointError, match="in both"):
        Pack.open(tmp_path / "c")
    write(tmp_path / "other", "llamacpp")
    (tmp_path / "d" / HIDDEN).write_bytes((tmp_path / "other" / HIDDEN).read_bytes())
    with pytest.raises(EvaluationError, match="different packs"):
        Pack.open(tmp_path / "d")
    with pytest.raises(CheckpointError, match="no such folder"):
        Pack.open(tmp_path / "none")


@pytest.mark.parametrize("name", [HIDDEN, HEAD])
def test_a_flipped_bit_of_the_data_is_found_by_verify(tmp_path: Path, name: str) -> None:
    write(tmp_path / "pack")
    path = tmp_path / "pack" / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with (
        Pack.open(tmp_path / "pack") as pack,
        pytest.raises(EvaluationError, match=f"{name}: data of sha256"),
    ):
        pack.verify()


def whole_pack() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "pack")
        return {p.name: p.read_bytes() for p in (Path(folder) / "pack").iterdir()}


WHOLE = whole_pack()


def header_end(name: str) -> int:
    return 8 + int.from_bytes(WHOLE[name][:8], "little") if name != PACK_JSON else len(WHOLE[name])


def opens(name: str, data: bytes) -> bool:
    """Whether a pack with one file replaced opens; anything but our errors escapes."""
    with tempfile.TemporaryDirectory() as folder:
        for other, content in WHOLE.items():
            (Path(folder) / other).write_bytes(data if other == name else content)
        try:
            with Pack.open(Path(folder)) as pack:
                assert pack.windows
        except NybbleError:
            return False
        return True


places = st.sampled_from(sorted(WHOLE)).flatmap(
    lambda name: st.tuples(st.just(name), st.integers(0, header_end(name) - 1))
)


@FIXED
@given(places)
def test_a_pack_cut_anywhere_is_refused(place: tuple[str, int]) -> None:
    name, at = place
    # The last byte of pack.json is a line end, which JSON does not need.
    if (name, at) != (PACK_JSON, len(WHOLE[PACK_JSON]) - 1):
        assert not opens(name, WHOLE[name][:at])


@FIXED
@given(places, st.integers(0, 7))
def test_a_flipped_bit_of_a_header_is_refused(place: tuple[str, int], bit: int) -> None:
    """In pack.json a bit may change a word that nothing else knows, such as the name of the text:
    then the pack opens."""
    name, at = place
    data = bytearray(WHOLE[name])
    data[at] ^= 1 << bit
    assert not opens(name, bytes(data)) or name == PACK_JSON


@FIXED
@given(st.integers(0, len(WHOLE[TOKENS]) - header_end(TOKENS) - 1), st.integers(0, 7))
def test_a_flipped_bit_of_the_tokens_is_refused(at: int, bit: int) -> None:
    data = bytearray(WHOLE[TOKENS])
    data[header_end(TOKENS) + at] ^= 1 << bit
    assert not opens(TOKENS, bytes(data))
