"""`nybble serve`: a checkpoint behind OpenAI's API."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import nybble
from nybble.api.extras import needs_torch
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import EngineError, MissingExtra, TextError
from nybble.kernels.dispatch import choose
from nybble.text.chat import ChatTemplate
from nybble.text.generation_config import sampling_defaults

if TYPE_CHECKING:
    from nybble.api.llm import OpenOptions
    from nybble.engine.engine import Engine
    from nybble.serve.service import Served

_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How a model is offered. `names` are those that requests may use, the folder's where there are
    none; `max_waiting` choices wait beyond those that run; `drain_seconds` is how long answers
    under way may take when the server goes down."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    names: tuple[str, ...] = ()
    max_waiting: int = 256
    drain_seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class Serving:
    """What is being served, once it is: `tokens` of all sequences fit the KV cache, `sequences` run
    at once, each of `context` tokens at most. `ahead` says what spares work."""

    url: str
    names: tuple[str, ...]
    has_chat: bool
    has_keys: bool
    context: int
    tokens: int
    sequences: int
    kernels: str
    fingerprint: str
    ahead: str


def serve(
    model: str | PathLike[str],
    options: OpenOptions | None = None,
    offered: ServeOptions | None = None,
    on_ready: Callable[[Serving], None] = lambda serving: None,
) -> None:
    """Serve a local checkpoint folder until a signal ends it.

    `on_ready` is called when the model has generated its first token. Must run in the main thread.
    Raises MissingExtra without the extras torch and serve, ServeError before the
    model is opened, and what `open_engine` raises.
    """
    needs_torch("serve")
    _needs_serve()
    from nybble.api.opening import open_checkpoint
    from nybble.engine.loop import EngineLoop
    from nybble.serve import server
    from nybble.serve.service import Limits, Service

    offered = offered or ServeOptions()
    keys = server.open_keys(offered.api_key_file)
    with server.bind(offered.host, offered.port, has_keys=keys is not None) as sock:
        opened = open_checkpoint(model, options)
        engine = opened.engine
        served = _served(Path(model), offered, engine)
        limits = Limits(drain_s=offered.drain_seconds)
        loop = EngineLoop(engine, max_waiting=offered.max_waiting)
        serving = Serving(
            server.url(sock),
            served.names,
            served.template is not None,
            keys is not None,
            engine.limits.room,
            engine.pages.count * engine.options.page_tokens,
            engine.most_sequences,
            str(choose()),
            served.fingerprint,
            opened.ahead,
        )
        try:
            server.run(sock, lambda: Service(served, loop, limits), keys, lambda: on_ready(serving))
        finally:
            loop.stop()


def _needs_serve() -> None:
    for library in ("starlette", "uvicorn", "prometheus_client"):
        if find_spec(library) is None:
            raise MissingExtra(f"serve needs {library}: pip install 'nybble[serve]'")


def _served(folder: Path, offered: ServeOptions, engine: Engine) -> Served:
    from nybble.engine.request import SamplingParams
    from nybble.serve.protocol import Bounds
    from nybble.serve.service import Served

    defaults = sampling_defaults(folder)
    try:
        SamplingParams(**defaults)  # type: ignore[arg-type]
    except EngineError as error:
        raise TextError(f"{folder / 'generation_config.json'}: {error}") from error
    return Served(
        offered.names or (folder.resolve().name,),
        engine.tokenizer,
        ChatTemplate.open(folder),
        Bounds(engine.limits.vocab, engine.limits.room, defaults),
        fingerprint(folder, engine),
        engine.most_sequences,
    )


def fingerprint(folder: Path, engine: Engine) -> str:
    """A short name of all that decides about the bits of an answer: configuration, tokenizer,
    tensors (their headers, and samples of the files, as reading all of them takes minutes),
    kernels, precision, what the KV cache holds, whether states may come of generated text, and
    nybble's version."""
    digest = hashlib.sha256()
    checkpoint = Checkpoint.open(folder)
    parts = (checkpoint.config_sha256, engine.tokenizer.sha256, engine.runner.describe())
    cache = engine.scheduler.cache
    is_exact = cache is None or cache.is_exact
    for part in (*parts, "exact" if is_exact else "reused", nybble.__version__):
        digest.update(f"{part}\n".encode())
    for name, info in checkpoint.tensors.items():
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
    for shard in checkpoint.shards:
        with (folder / shard.name).open("rb") as file:
            size = file.seek(0, 2)
            for i in range(_SAMPLES):
                file.seek(size * i // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return f"fp_{digest.hexdigest()[:16]}"
