"""A checkpoint behind HTTP: the same survey as of the folder, and few bytes read of it."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

import tiny
from nybble.check.files_lock import compare_lock
from nybble.check.lock import make_lock
from nybble.check.survey import Survey
from nybble.checkpoint import remote
from nybble.checkpoint.files import Habit, LocalFiles, read_ranges
from nybble.checkpoint.remote import RemoteFiles, open_remote
from nybble.errors import CheckpointError
from range_server import serve


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.checkpoint(tmp_path / "model", "qwen3_5_moe", shards=2)
    return tmp_path / "model"


def test_a_survey_over_http_is_that_of_the_folder(folder: Path) -> None:
    with serve(folder) as served:
        far, near = Survey(open_remote(served.address)), Survey(LocalFiles(folder))
    assert far.tensors == near.tensors
    assert far.config == near.config
    assert far.faults == near.faults == ()
    assert far.modules == near.modules


def test_values_over_http_are_those_of_the_folder(folder: Path) -> None:
    with serve(folder) as served:
        survey = Survey(open_remote(served.address))
        near = Survey(LocalFiles(folder))
        infos = [i for i in survey.tensors.values() if i.size < 500]
        for a, b in zip(survey.values(infos), near.values(infos), strict=True):
            assert a is not None
            assert b is not None
            assert a.tobytes() == b.tobytes()


def test_only_headers_and_what_is_asked_for_is_transferred(folder: Path) -> None:
    weights = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    with serve(folder) as served:
        survey = Survey(open_remote(served.address))
        headers = sum(shard.header_bytes for shard in survey.shards.values())
        data = sum(
            int(r.partition("=")[2].split("-")[1]) - int(r.partition("=")[2].split("-")[0]) + 1
            for path, r, _ in served.requests
            if path.endswith(".safetensors")
        )
    assert data < headers + 64
    assert headers < weights / 2


def test_a_busy_server_is_asked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    with serve(folder) as served:
        served.busy = 2
        assert open_remote(served.address).size("config.json") > 0


def test_a_server_that_stays_busy_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    with serve(folder) as served:
        served.busy = 10**6
        with pytest.raises(CheckpointError, match="status 503"):
            open_remote(served.address)


def test_small_files_do_without_ranges_and_large_ones_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = (folder / "config.json").read_bytes()
    with serve(folder) as served:
        files = open_remote(served.address)
        served.ranges = False
        assert files.read("config.json") == expected
        assert files.read("config.json", 3, 5) == expected[3:8]
        monkeypatch.setattr(remote, "_SMALL", 100)
        shard = next(n for n in files.names() if n.endswith(".safetensors"))
        with pytest.raises(CheckpointError, match="whole file for a range"):
            files.read(shard, 0, 8)


def test_a_short_answer_is_no_data(folder: Path) -> None:
    with serve(folder) as served:
        files = open_remote(served.address)
        served.cut = True
        with pytest.raises(CheckpointError, match="asked for bytes 0 to 100, got 50"):
            files.read("config.json", 0, 100)


def test_bytes_beyond_the_end_are_refused(folder: Path) -> None:
    with serve(folder) as served:
        files = open_remote(served.address)
        with pytest.raises(CheckpointError, match="of a file of"):
            files.read("config.json", 0, 10**9)
        with pytest.raises(CheckpointError, match="no such file"):
            files.read("secret")


def test_an_address_without_a_checkpoint_says_what_is_missing(tmp_path: Path) -> None:
    with serve(tmp_path) as served, pytest.raises(CheckpointError, match=r"none of config\.json"):
        open_remote(served.address)


def test_nobody_there_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="127"):
        open_remote("http://127.0.0.1:9/model")


def _point_hub_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does, which is read when the library is imported."""
    import huggingface_hub.constants as constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")


@pytest.mark.usefixtures("hub")
def test_a_hub_is_read_by_its_listing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(folder) as served:
        _point_hub_to(served.address, monkeypatch)
        files = open_remote("hf://org/model@v1.0")
        assert files.names() == LocalFiles(folder).names()
        assert files.read("config.json") == (folder / "config.json").read_bytes()
        paths = {path for path, _, _ in served.requests}
    assert "/api/models/org/model/tree/v1.0" in paths
    assert "/org/model/resolve/v1.0/config.json" in paths


@pytest.mark.usefixtures("hub")
def test_the_token_stays_with_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(folder) as served, serve(folder) as other:
        _point_hub_to(served.address, monkeypatch)
        served.redirect = other.address
        open_remote("hf://org/model").read("config.json")
        assert {token for _, _, token in served.requests} == {"Bearer secret"}
        assert {token for _, _, token in other.requests} == {""}


def test_the_token_is_not_sent_on_without_encryption(monkeypatch: pytest.MonkeyPatch) -> None:
    """From https to http of the same host, which anyone between them can answer."""
    sent: list[tuple[str, str]] = []

    def answer(_: object, address: str, headers: dict[str, str], __: int) -> remote._Answer:
        sent.append((address, headers.get("Authorization", "")))
        to = {"https://h/x": "https://h/y", "https://h/y": "http://h/z"}.get(address, "")
        return remote._Answer(302 if to else 200, b"", 0, to, "")

    monkeypatch.setattr(RemoteFiles, "_request", answer)
    RemoteFiles("h", "https://h/", {"Authorization": "secret"})._get("https://h/x", "", 0)
    assert sent == [("https://h/x", "secret"), ("https://h/y", "secret"), ("http://h/z", "")]


def test_http_goes_to_the_proxy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(folder) as proxy:
        at = proxy.address.removeprefix("http://")
        monkeypatch.setenv("HTTP_PROXY", f"http://some%40one:pass@{at}")
        files = open_remote("http://models.invalid:8080")
        assert files.read("config.json") == (folder / "config.json").read_bytes()
    login = "Basic " + b64encode(b"some@one:pass").decode()
    assert proxy.proxied[0] == ("http://models.invalid:8080/config.json", login)
    assert {words for _, words in proxy.proxied} == {login}


def test_the_login_of_a_proxy_is_for_it_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(folder) as proxy, serve(folder) as near:
        monkeypatch.setenv("HTTP_PROXY", "http://me:pass@" + proxy.address.removeprefix("http://"))
        monkeypatch.setenv("no_proxy", near.address.removeprefix("http://"))
        open_remote(near.address).read("config.json")
    assert near.requests
    assert near.proxied == proxy.requests == []


def test_https_asks_the_proxy_for_a_tunnel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    with serve(tmp_path) as proxy:
        at = proxy.address.removeprefix("http://")
        monkeypatch.setenv("HTTPS_PROXY", f"me:pass@{at}")
        files = RemoteFiles("far", "https://models.invalid/", {"Authorization": "secret"})
        with pytest.raises(CheckpointError, match=rf"502.*by way of the proxy 'http://{at}'"):
            files.probe()
    login = "Basic " + b64encode(b"me:pass").decode()
    assert set(proxy.proxied) == {("models.invalid:443", login)}
    assert {words for _, _, words in proxy.requests} == {""}  # the token goes inside the tunnel


def test_a_proxy_that_is_not_there_is_named_without_its_login(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://me:hidden@127.0.0.1:9")
    with pytest.raises(
        CheckpointError, match=r"by way of the proxy 'http://127\.0\.0\.1:9'$"
    ) as said:
        open_remote("http://models.invalid/model")
    assert "hidden" not in str(said.value)


@pytest.mark.parametrize(
    "proxy", ["socks5://me:hidden@127.0.0.1:9", "https://127.0.0.1:9", "http://h:x"]
)
def test_other_proxies_are_refused(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(CheckpointError, match=r"expected http://HOST:PORT") as said:
        open_remote("http://models.invalid/model")
    assert "hidden" not in str(said.value)


@pytest.mark.usefixtures("hub")
def test_a_lock_of_a_hub_takes_its_hashes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(folder) as served:
        _point_hub_to(served.address, monkeypatch)
        lock = make_lock(open_remote("hf://org/model"))
        assert not [p for p, _, _ in served.requests if p.endswith(".safetensors")]
    for name, (size, digest) in lock.files.items():
        data = (folder / name).read_bytes()
        assert (size, digest) == (len(data), sha256(data).hexdigest())


@pytest.mark.usefixtures("hub")
def test_offline_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        open_remote("hf://org/model")


@pytest.mark.parametrize("address", ["hf://model", "hf://a/b/c", "hf://a/b@", "hf://../x@y z"])
def test_a_hub_address_has_two_parts(address: str) -> None:
    with pytest.raises(CheckpointError, match="expected hf://org/model"):
        open_remote(address)


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_a_redirection_leads_to_http_only(folder: Path, location: str) -> None:
    with serve(folder) as served:
        files = open_remote(served.address)
        served.redirect = location
        with pytest.raises(CheckpointError, match="no http or https address"):
            files.read("config.json")


def test_a_lock_notices_every_kind_of_change(folder: Path) -> None:
    lock = make_lock(LocalFiles(folder))
    assert list(compare_lock(LocalFiles(folder), lock)) == []
    (folder / "config.json").write_text("{}")
    shard = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    sorted(folder.glob("*.safetensors"))[1].unlink()
    (folder / "new.txt").write_text("x")
    found = {
        f.message.split("files are ")[-1].split(",")[0]: f.subjects
        for f in compare_lock(LocalFiles(folder), lock)
    }
    assert found["changed"] == ("config.json", shard.name)
    assert len(found["missing"]) == 1
    assert found["not in the lock"] == ("new.txt",)


class _Memory:
    """Files in memory that count their reads."""

    where, local = "memory", None

    def __init__(self, data: bytes, habit: Habit) -> None:
        self.data, self.habit, self.reads = data, habit, 0

    def names(self) -> tuple[str, ...]:
        return ("x",)

    def has(self, name: str) -> bool:
        return name == "x"

    def known_sha256(self, name: str) -> str:
        return ""

    def size(self, name: str) -> int:
        return len(self.data)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        self.reads += 1
        return self.data[start : None if length is None else start + length]


@pytest.mark.parametrize("habit", [Habit(0, 1), Habit(10, 1), Habit(10, 4), Habit(10**6, 1)])
def test_ranges_come_in_the_order_asked_for(habit: Habit) -> None:
    rng = np.random.default_rng(3)
    data = rng.bytes(5000)
    files = _Memory(data, habit)
    starts = rng.integers(0, 4900, 200)
    ranges = [(int(s), int(n)) for s, n in zip(starts, rng.integers(0, 100, 200), strict=True)]
    assert read_ranges(files, "x", ranges) == [data[s : s + n] for s, n in ranges]
    assert files.reads < 200


def test_remote_files_know_only_what_was_listed() -> None:
    files = RemoteFiles("http://x", "http://x/", sizes={"a": 1})
    assert files.names() == ("a",)
    with pytest.raises(CheckpointError, match="no such file"):
        files.size("b")


def test_a_lock_holds_over_http_for_files_that_nobody_lists(folder: Path) -> None:
    (folder / "README.md").write_text("about")
    lock = make_lock(LocalFiles(folder))
    with serve(folder) as served:
        assert list(compare_lock(open_remote(served.address), lock)) == []
        (folder / "README.md").unlink()
        (finding,) = compare_lock(open_remote(served.address), lock)
    assert finding.subjects == ("README.md",)
