"""What HTTP costs: streams through `nybble serve` against the engine alone, and the first token.

    python benchmarks/engine/server.py CKPT [--streams 32] [--prompt 32] [--generate 128]

Both serve the same requests in turn, each in a process of its own. The client reads sockets and
counts events, nothing more: it runs on the same cores. Time to the first token is measured at
concurrency 1, against the engine's own prefill of the same prompt and one sample.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from contest import Case, Judge, Turn, Worker, add_options, children, ours, process_cpu_s

EVENT = b"data: {"
DONE = b"data: [DONE]"


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Stream:
    """One request, and how far its answer is."""

    def __init__(self, port: int, prompt: list[int], generate: int) -> None:
        asked = {
            "model": "bench",
            "prompt": prompt,
            "max_tokens": generate,
            "stream": True,
            "temperature": 0,
            "ignore_eos": True,
        }
        body = json.dumps(asked).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.sendall(head.encode() + body)
        self.first_s = 0.0
        self.answer = b""

    def read(self) -> bool:
        """Take what came; whether it goes on."""
        part = self.socket.recv(1 << 16)
        self.answer += part
        if not self.first_s and EVENT in self.answer:
            self.first_s = time.perf_counter()
        return bool(part)

    def check(self) -> None:
        """A stream that ended early, or was refused, ends the measurement."""
        if DONE not in self.answer:
            sys.exit(f"a stream did not end well: {self.answer[-500:].decode(errors='replace')}")


class Server:
    """`nybble serve`, and a client for it."""

    name = "nybble serve"

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.port = free_port()
        context = str(options.prompt + options.generate)
        command = [sys.executable, "-m", "nybble", "serve", str(folder)]
        command += ["--port", str(self.port), "--threads", str(options.threads)]
        command += ["--served-model-name", "bench", "--max-context", context]
        command += ["--max-sequences", str(options.streams), "--kv-cache-dtype", "bf16"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self._wait()

    def _wait(self) -> None:
        for _ in range(600):
            try:
                with socket.create_connection(("127.0.0.1", self.port)) as asked:
                    asked.sendall(b"GET /ready HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                    if b" 200 " in asked.recv(1 << 12):
                        return
            except OSError:
                if self.process.poll() is not None:
                    sys.exit("nybble serve ended")
            time.sleep(0.2)
        sys.exit("nybble serve is not ready after two minutes")

    def run(self, case: Case) -> tuple[float, list[float]]:
        """Seconds until all streams ended, and until the first event of each."""
        draw = np.random.default_rng(0)
        began = time.perf_counter()
        streams = [
            Stream(self.port, draw.integers(100, 4000, case.prompt).tolist(), case.generate)
            for _ in range(case.batch)
        ]
        with selectors.DefaultSelector() as waiting:
            for stream in streams:
                waiting.register(stream.socket, selectors.EVENT_READ, stream)
            while waiting.get_map():
                for key, _ in waiting.select():
                    if not key.data.read():
                        waiting.unregister(key.fileobj)
                        key.data.socket.close()
        seconds = time.perf_counter() - began
        for stream in streams:
            stream.check()
        return seconds, [stream.first_s - began for stream in streams]

    def turn(self, case: Case) -> Turn:
        """All streams at once."""
        return Turn(case.generate * case.batch, self.run(case)[0])

    @property
    def cpu_s(self) -> float:
        """Of the server."""
        return sum(process_cpu_s(p) for p in (self.process.pid, *children(self.process.pid)))

    def close(self) -> None:
        """It drains and ends."""
        self.process.terminate()
        self.process.wait(30)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--generate", type=int, default=128)
    add_options(parser)
    a = parser.parse_args()
    sizes = ["--max-context", str(a.prompt + a.generate), "--max-sequences", str(a.streams)]
    engine: Worker = ours(a.checkpoint, a.threads, *sizes, name="engine alone")
    server = Server(a.checkpoint, a)
    case, judge = Case(a.prompt, a.generate, a.streams), Judge(a.rounds, a.wait, a.even_if_busy)
    try:
        rates = judge.rates([engine, server], [case])
        first_case = Case(a.prompt, 1)
        alone, served = [], []
        for _ in range(4 * a.rounds):
            alone.append(judge.fair_turn(engine, first_case).seconds)
            served.append(server.run(first_case)[1][0])
    finally:
        engine.close()
        server.close()
    medians = {name: statistics.median(values) for (name, _), values in rates.items()}
    print(f"{case}, {a.threads} threads, medians of {a.rounds}; others used at most", end=" ")
    print(f"{100 * max(judge.shares):.0f} % of a core\n")
    print("| through | tokens/s | of the engine | first token alone, ms |\n|---|--:|--:|--:|")
    for name, first in ((engine.name, alone), (server.name, served)):
        share = 100 * medians[name] / medians[engine.name]
        shown = f"{1e3 * statistics.median(first):.1f}"
        print(f"| {name} | {medians[name]:,.1f} | {share:.1f} % | {shown} |")
    added = 1e3 * (statistics.median(served) - statistics.median(alone))
    print(f"\nadded to the first token: {added:.1f} ms")


if __name__ == "__main__":
    main()
