"""A web server over a folder that answers range requests, and can be told to misbehave."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch
from urllib.parse import unquote, urlsplit


@dataclass
class Served:
    """`requests` are (path, Range, Authorization). `ranges` False: whole files only. `busy`: so
    many requests are answered 503 first. `redirect`: files are at this other address. `proxied`:
    (target, Proxy-Authorization) of requests that were made as to a proxy."""

    root: Path
    address: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    ranges: bool = True
    busy: int = 0
    redirect: str = ""
    cut: bool = False
    sent: int = 0
    proxied: list[tuple[str, str]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    served: Served
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        served = self.served
        if not self.path.startswith("/"):  # as to a proxy, which has the file itself
            served.proxied.append((self.path, self.headers.get("Proxy-Authorization", "")))
        path = unquote(urlsplit(self.path).path)
        ranges = self.headers.get("Range", "")
        served.requests.append((path, ranges, self.headers.get("Authorization", "")))
        if served.busy:
            served.busy -= 1
            self._send(503, b"")
        elif path.startswith("/api/models/"):
            self._send(200, json.dumps(_tree(served.root)).encode())
        elif served.redirect and not path.startswith("/elsewhere"):
            self.send_response(302)
            self.send_header("Location", served.redirect + "/elsewhere" + path)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._file(path, ranges)

    def do_CONNECT(self) -> None:
        """A tunnel is noted, with all that is said about it, and refused."""
        served = self.served
        served.proxied.append((self.path, self.headers.get("Proxy-Authorization", "")))
        served.requests.append((self.path, "", self.headers.get("Authorization", "")))
        self._send(502, b"")

    def _file(self, path: str, ranges: str) -> None:
        served, root = self.served, self.served.root
        name = path.removeprefix("/elsewhere").lstrip("/")
        parts = name.split("/")
        file = root / ("/".join(parts[4:]) if parts[2:3] == ["resolve"] else name)
        if not file.is_file():
            self._send(404, b"no")
            return
        data = file.read_bytes()
        if not (ranges and served.ranges):
            self._send(200, data)
            return
        first, last = (int(n) for n in ranges.removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        if served.cut:
            part = part[: len(part) // 2]
        self._send(206, part, f"bytes {first}-{last}/{len(data)}")

    def _send(self, status: int, data: bytes, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        try:
            self.wfile.write(data)
            self.served.sent += len(data)
        except OSError:  # the client has gone
            pass

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(root: Path) -> Iterator[Served]:
    """Serve `root` on the loopback; as a hub's repository too, below /org/model/resolve/REV/."""
    served = Served(root)

    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"served": served}))
    served.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        # Nobody's proxy knows the way to this machine's loopback.
        with patch.dict(os.environ, {"no_proxy": "127.0.0.1"}):
            yield served
    finally:
        server.shutdown()
        server.server_close()


def _tree(root: Path) -> list[dict[str, object]]:
    """The hub's list of files."""
    entries: list[dict[str, object]] = []
    for file in sorted(root.rglob("*")):
        if file.is_file():
            name = file.relative_to(root).as_posix()
            entry: dict[str, object] = {"type": "file", "path": name, "size": file.stat().st_size}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"oid": sha256(file.read_bytes()).hexdigest()}
            entries.append(entry)
    return entries
