"""A server to ask, in a thread of the test or, run as a program, in a process of its own: the real
application and tokenizer over a scripted engine.

    python tests/served.py STEP_SECONDS DRAIN_SECONDS [KEY_FILE]
"""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import uvicorn

from nybble.serve import server
from nybble.serve.access import Keys
from nybble.serve.app import make_app
from nybble.serve.protocol import Bounds
from nybble.serve.service import Limits, Served, Service
from nybble.text.chat import ChatTemplate
from nybble.text.generation_config import sampling_defaults
from nybble.text.tokenizer import Tokenizer
from scripted_engine import ScriptedLoop

FOLDER = Path(__file__).parent.parent / "models" / "hybrid-chat-mtp"
CONTEXT = 512
SEQUENCES = 10
#: With a character of three tokens, so that tokens are parts of characters.
SCRIPT = "Once upon a time, 漢字 and a cat. "


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.open(FOLDER)


def served(*names: str, has_template: bool = True) -> Served:
    return Served(
        names or ("tiny", "tiny-2"),
        tokenizer(),
        ChatTemplate.open(FOLDER) if has_template else None,
        Bounds(tokenizer().vocab_size, CONTEXT, sampling_defaults(FOLDER)),
        "fp_test",
        SEQUENCES,
    )


@dataclass
class Running:
    url: str
    port: int
    loop: ScriptedLoop
    service: Service
    asyncio: asyncio.AbstractEventLoop

    def ask(self, request: bytes) -> bytes:
        """The raw answer to raw bytes, until the server closes or nothing comes for a while."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as sock:
            sock.sendall(request)
            return b"".join(iter(lambda: sock.recv(65536), b""))


@contextmanager
def running(
    loop: ScriptedLoop,
    *,
    keys: Keys | None = None,
    limits: Limits | None = None,
    has_template: bool = True,
    is_warm: bool = True,
) -> Iterator[Running]:
    made: list[Running] = []
    is_up = threading.Event()
    sock = server.bind("127.0.0.1", 0, has_keys=keys is not None)

    async def main() -> None:
        service = Service(served(has_template=has_template), loop, limits or Limits())
        if is_warm:
            await service.warm_up()
            loop.seen.clear()
        uvicorn_server = uvicorn.Server(server.configure(make_app(service, keys)))
        task = asyncio.create_task(uvicorn_server.serve(sockets=[sock]))
        while not uvicorn_server.started:
            await asyncio.sleep(0.005)
        url, port = server.url(sock), sock.getsockname()[1]
        made.append(Running(url, port, loop, service, asyncio.get_running_loop()))
        servers.append(uvicorn_server)
        is_up.set()
        await task
        service.close()

    servers: list[uvicorn.Server] = []
    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert is_up.wait(30)
    try:
        yield made[0]
    finally:
        servers[0].should_exit = servers[0].force_exit = True
        thread.join()
        loop.stop()
        sock.close()


def _main() -> None:
    step_s, drain_s = float(sys.argv[1]), float(sys.argv[2])
    keys = server.open_keys(Path(sys.argv[3]) if len(sys.argv) > 3 else None)
    loop = ScriptedLoop(tokenizer(), SCRIPT, step_s=step_s)
    sock = server.bind("127.0.0.1", 0, has_keys=keys is not None)

    def on_ready() -> None:
        sys.stdout.write(server.url(sock) + "\n")
        sys.stdout.flush()

    limits = Limits(drain_s=drain_s)
    server.run(sock, lambda: Service(served(), loop, limits), keys, on_ready)
    loop.stop()


if __name__ == "__main__":
    _main()
