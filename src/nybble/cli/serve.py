"""`nybble serve`."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli.flags import AheadFlags, Checkpoint, EngineFlags, expands, look_at

if TYPE_CHECKING:
    from nybble.api.serve import Serving


@expands
def command(
    model: Checkpoint,
    host: Annotated[
        str,
        typer.Option("--host", help="Where to listen; beyond this machine only with keys."),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="0: a free one, which is printed.")
    ] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            metavar="FILE",
            help="Keys, one a line; SIGHUP reads it again. Without: nobody needs a key.",
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            "--served-model-name",
            metavar="NAME",
            help="What requests call the model; repeatable. Default: the folder's name.",
        ),
    ] = None,
    max_waiting: Annotated[
        int,
        typer.Option("--max-waiting", min=0, help="Who comes when so many wait gets 429."),
    ] = 256,
    drain_seconds: Annotated[
        float,
        typer.Option("--drain-seconds", min=0, help="For answers under way after SIGTERM."),
    ] = 30.0,
    access_log: Annotated[
        bool,
        typer.Option("--access-log", help="A line on stderr for all requests, not failures alone."),
    ] = False,
    *,
    engine: EngineFlags,
    ahead: AheadFlags,
) -> None:
    """Serve a checkpoint through OpenAI's API: chat and text completions, metrics, probes.

    The first SIGTERM or Ctrl-C lets answers under way come to their end, the second does not.
    """
    from nybble.api.extras import needs_torch
    from nybble.api.serve import ServeOptions, serve
    from nybble.kernels.dispatch import choose
    from nybble.progress import waiting

    needs_torch("serve")
    if access_log:
        _log_all_requests()
    options = engine.options(ahead)
    look_at(model)
    with waiting("compiling the kernels, once"):
        choose()
    offered = ServeOptions(
        host, port, api_key_file, tuple(served_model_name or ()), max_waiting, drain_seconds
    )
    serve(model, options, offered, _show)


def _log_all_requests() -> None:
    log = logging.getLogger("nybble.access")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())


def _show(serving: Serving) -> None:
    sys.stdout.write(render(serving))
    sys.stdout.flush()


def render(serving: Serving) -> str:
    """Where it listens, what it serves, and a line to try it."""
    from nybble.cli.output import labelled

    lines = [
        labelled("listening", f"{serving.url}/v1, {_access(serving)}"),
        labelled("model", f"{', '.join(serving.names)} ({serving.fingerprint})"),
        labelled(
            "room",
            f"{serving.tokens:,} tokens of all sequences, {serving.context:,} of one, "
            f"{serving.sequences} sequences at once; {serving.kernels}",
        ),
        labelled("ahead", serving.ahead),
    ]
    return "\n".join([*lines, labelled("try", "").rstrip(), _curl(serving)]) + "\n"


def _access(serving: Serving) -> str:
    return "with keys" if serving.has_keys else "no key needed on this machine"


def _curl(serving: Serving) -> str:
    if serving.has_chat:
        path = "chat/completions"
        body = '{"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64}'
    else:
        path, body = "completions", '{"prompt": "Once upon a time", "max_tokens": 64}'
    key = ' -H "Authorization: Bearer $KEY"' if serving.has_keys else ""
    return (
        f"  curl {serving.url}/v1/{path}{key} -H 'Content-Type: application/json' "
        f"-d {shlex.quote(body)}"
    )
