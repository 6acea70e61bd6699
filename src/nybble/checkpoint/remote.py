"""A checkpoint folder behind HTTP, read by ranges: a verdict before gigabytes are downloaded.

`hf://org/model[@revision]` is a model hub's repository, its addresses as `huggingface_hub` has
them (HF_ENDPOINT, HF_HUB_OFFLINE and its token count); `http(s)://...` is any folder whose server
answers range requests. Proxies are those of HTTP_PROXY, HTTPS_PROXY and NO_PROXY. Nothing is
stored. Knows no format.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import local
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from nybble.checkpoint.files import Habit
from nybble.checkpoint.safetensors import HEADER_LIMIT, show
from nybble.errors import CheckpointError, MissingExtra

#: What a folder without a listing is asked for, beside what its index names.
USUAL = (
    "config.json",
    "hf_quant_config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "model.safetensors.index.json",
    "model.safetensors",
)
INDEX = "model.safetensors.index.json"

_HUB = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_TIMEOUT_S = 30
_TRIES = 4
_SMALL = 1 << 20
_REDIRECTS = 5
_BUSY = (429, 500, 502, 503, 504)


def open_remote(address: str) -> RemoteFiles:
    """The files at an address.

    Raises CheckpointError for one that cannot be reached, or serves no ranges; MissingExtra for
    hf:// without huggingface_hub.
    """
    if not address.startswith("hf://"):
        files = RemoteFiles(address.rstrip("/"), address.rstrip("/") + "/")
        files.probe()
        return files
    match = _HUB.fullmatch(address)
    if match is None:
        raise CheckpointError(
            f"{show(address)}: expected hf://org/model or hf://org/model@revision"
        )
    return _open_hub(address, match[1], match[2] or "main")


def _open_hub(address: str, repository: str, revision: str) -> RemoteFiles:
    try:
        from huggingface_hub import constants, get_token, hf_hub_url
    except ImportError as error:
        raise MissingExtra(
            f"{address}: addresses of the hub need the library huggingface_hub: "
            "pip install 'nybble[hub]'; or give an https:// address"
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"{address}: HF_HUB_OFFLINE is set, so nothing is asked of the hub; unset it, or give "
            "a local folder"
        )
    name = "config.json"
    base = hf_hub_url(repository, name, revision=revision, endpoint=constants.ENDPOINT)
    base = base[: -len(name)]
    token = get_token()
    files = RemoteFiles(address, base, {"Authorization": f"Bearer {token}"} if token else {})
    pinned = quote(revision, safe="")
    listing = f"{constants.ENDPOINT}/api/models/{repository}/tree/{pinned}?recursive=true"
    files.add_listing(listing)
    return files


@dataclass
class RemoteFiles:
    """Files below `base`, which ends with a slash.

    `headers` go to the first host only, never along with a redirection to another one, or to the
    same one without encryption. `hashes` are sha256 by file name, as far as the listing tells them.
    """

    where: str
    base: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    sizes: dict[str, int] = field(default_factory=dict, repr=False)
    hashes: dict[str, str] = field(default_factory=dict, repr=False)
    is_listed: bool = False
    _connections: local = field(default_factory=local, repr=False)

    @property
    def local(self) -> Path | None:
        return None

    @property
    def habit(self) -> Habit:
        """A request costs as much as some hundred kilobytes."""
        return Habit(gap_bytes=1 << 18, at_once=8)

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.sizes))

    def has(self, name: str) -> bool:
        if name not in self.sizes and not self.is_listed:
            self._find([name])
        return name in self.sizes

    def known_sha256(self, name: str) -> str:
        return self.hashes.get(name, "")

    def size(self, name: str) -> int:
        self._check_known(name)
        return self.sizes[name]

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        self._check_known(name)
        stop = self.sizes[name] if length is None else start + length
        if not 0 <= start <= stop <= self.sizes[name]:
            raise CheckpointError(
                f"{self.where}/{name}: bytes {start} to {stop} of a file of {self.sizes[name]}"
            )
        if stop - start > HEADER_LIMIT:
            raise CheckpointError(
                f"{self.where}/{name}: {stop - start} bytes in one request, at most "
                f"{HEADER_LIMIT}; download the checkpoint and give the folder"
            )
        if start == stop:
            return b""
        answer = self._get(self.base + quote(name), f"bytes={start}-{stop - 1}", stop - start)
        data = answer.data
        if answer.status == 200 and len(data) == self.sizes[name]:
            data = data[start:stop]  # a small file, sent whole
        if len(data) != stop - start or answer.status not in (200, 206):
            raise CheckpointError(
                f"{self.where}/{name}: asked for bytes {start} to {stop}, got {len(data)} bytes "
                f"and status {answer.status}; the server must answer range requests"
            )
        return data

    def probe(self) -> None:
        """Find out which files a folder without a listing has: the usual ones, the index's."""
        self._find(USUAL)
        if INDEX in self.sizes:
            try:
                found = json.loads(self.read(INDEX))["weight_map"].values()
                self._find(sorted({n for n in found if _is_inside(n)} - self.sizes.keys()))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                pass  # a broken index is for the rules to report
        if not self.sizes:
            raise CheckpointError(
                f"{self.where}: none of {', '.join(USUAL[:3])} ... is there; give the address of "
                "the folder that holds them"
            )

    def add_listing(self, address: str) -> None:
        """Read the hub's list of files, page by page."""
        self.is_listed = True
        while address:
            answer = self._get(address, "", HEADER_LIMIT)
            try:
                entries = json.loads(answer.data)
                files = [e for e in entries if e["type"] == "file"]
                self.sizes |= {str(e["path"]): int(e["size"]) for e in files}
                for e in files:
                    if "lfs" in e:
                        self.hashes[str(e["path"])] = str(e["lfs"]["oid"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CheckpointError(f"{self.where}: the list of files is unreadable") from error
            address = urljoin(address, answer.next_page) if answer.next_page else ""

    def _find(self, names: tuple[str, ...] | list[str]) -> None:
        for name in names:
            answer = self._get(self.base + quote(name), "bytes=0-0", 1, may_lack=True)
            if answer.status in (200, 206, 416):
                self.sizes[name] = answer.total

    def _check_known(self, name: str) -> None:
        if name not in self.sizes:
            raise CheckpointError(f"{self.where}/{name}: no such file")

    def _get(self, address: str, ranges: str, expected: int, may_lack: bool = False) -> _Answer:
        """Follow redirections and try again while the server is busy."""
        first, headers = _origin(address), dict(self.headers)
        problem = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(0.25 * 4 ** (attempt - 1))
            at = address
            try:
                for _ in range(_REDIRECTS):
                    own = headers if _origin(at) == first else {}
                    answer = self._request(
                        at, own | ({"Range": ranges} if ranges else {}), expected
                    )
                    if not answer.location:
                        break
                    at = urljoin(at, answer.location)
            except (OSError, http.client.HTTPException) as error:
                problem = (str(error) or type(error).__name__) + self._by_way_of(at)
                self._connections.__dict__.clear()
                if isinstance(error, (ConnectionRefusedError, socket.gaierror)):
                    break  # nobody is there, and asking again will not change that
                continue
            if answer.status in (200, 206) or (may_lack and answer.status in (404, 403, 416)):
                return answer
            problem = f"status {answer.status}"
            if answer.status not in _BUSY:
                break
        is_closed = problem in ("status 401", "status 403", "status 404")
        hint = "; it may be private: log in to the hub" if is_closed else ""
        if problem == "status 407":
            hint = "; the proxy wants a name and a password: http://NAME:PASSWORD@HOST:PORT"
        raise CheckpointError(f"{self.where}: {_shown(address)}: {problem}{hint}")

    def _request(self, address: str, headers: dict[str, str], expected: int) -> _Answer:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise CheckpointError(f"{self.where}: {_shown(address)} is no http or https address")
        known = self._connections.__dict__
        key = _origin(address)
        proxy = self._proxy(parts)
        if key not in known:
            known[key] = _connect(parts, proxy)
        connection: http.client.HTTPConnection = known[key]
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if proxy is not None and parts.scheme == "http":
            target = key + target
            headers = {**headers, **_login(proxy)}
        connection.request("GET", target, headers={"Accept-Encoding": "identity", **headers})
        answer = connection.getresponse()
        # A server that knows no ranges sends all of it: taken if small, refused below if not.
        wanted = max(expected, _SMALL) if answer.status == 200 else expected
        data = answer.read(wanted) if answer.status in (200, 206) else b""
        if not answer.isclosed() and (answer.status in (200, 206) or answer.read(1 << 16)):
            connection.close()  # more than was asked for is left unread
            del known[key]
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        size = total if total.isdigit() else answer.headers.get("Content-Length") or "0"
        if answer.status == 200 and "Range" in headers and size.isdigit() and int(size) > wanted:
            raise CheckpointError(
                f"{self.where}: {_shown(address)}: the server sends the whole file for a range; "
                "download the checkpoint and give the folder"
            )
        return _Answer(
            answer.status,
            data,
            int(size) if size.isdigit() else 0,
            answer.headers.get("Location", "") if answer.status in _MOVED else "",
            _next_page(answer.headers.get("Link", "")),
        )

    def _proxy(self, parts: SplitResult) -> SplitResult | None:
        """The proxy that the environment has for an address, or None."""
        address = getproxies().get(parts.scheme)
        if not address or proxy_bypass(parts.netloc):
            return None
        proxy = urlsplit(address if "://" in address else f"http://{address}")
        if proxy.scheme != "http" or not proxy.hostname or not _has_port(proxy):
            raise CheckpointError(
                f"{self.where}: the proxy for {parts.scheme} is {show(_without_login(proxy))}, "
                f"expected http://HOST:PORT; set {parts.scheme.upper()}_PROXY, or name the host "
                "in NO_PROXY"
            )
        return proxy

    def _by_way_of(self, address: str) -> str:
        proxy = self._proxy(urlsplit(address))
        return f", by way of the proxy {show(_without_login(proxy))}" if proxy else ""


def _connect(parts: SplitResult, proxy: SplitResult | None) -> http.client.HTTPConnection:
    """A connection to a host; over a proxy, https goes through a tunnel, http is told to it."""
    kind = http.client.HTTPSConnection if parts.scheme == "https" else _plain_connection
    if proxy is None:
        return kind(parts.netloc, timeout=_TIMEOUT_S)
    # 80 as for any http address without a port, not the 443 of what goes through the tunnel.
    connection = kind(str(proxy.hostname), proxy.port or 80, timeout=_TIMEOUT_S)
    if parts.scheme == "https":
        connection.set_tunnel(parts.netloc, headers=_login(proxy))
    return connection


def _login(proxy: SplitResult) -> dict[str, str]:
    """What a proxy is told, and nobody behind it."""
    if proxy.username is None:
        return {}
    words = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(words.encode()).decode()}


def _has_port(address: SplitResult) -> bool:
    """Whether its port can be read, or is left open."""
    try:
        return address.port != 0
    except ValueError:
        return False


def _without_login(address: SplitResult) -> str:
    return f"{address.scheme}://{address.netloc.rpartition('@')[2]}"


def _origin(address: str) -> str:
    """Scheme, host and port."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc}"


_plain_connection = http.client.HTTPConnection
_MOVED = (301, 302, 303, 307, 308)


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer; `total` is the size of the whole file."""

    status: int
    data: bytes
    total: int
    location: str
    next_page: str


def _next_page(link: str) -> str:
    match = re.search(r'<([^>]+)>;\s*rel="next"', link)
    return match[1] if match else ""


def _shown(address: str) -> str:
    """Without the query: it may hold a signature."""
    return show(address.partition("?")[0])


def _is_inside(name: object) -> bool:
    if not isinstance(name, str) or not name.isprintable():
        return False
    return not any(part in ("", ".", "..") for part in name.split("/"))
