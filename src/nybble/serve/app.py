"""The routes, as an ASGI application.

/health says whether to restart the process, /ready whether to send requests to it; both are open,
and nothing else is.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nybble.errors import NybbleError
from nybble.serve.access import Access, Keys
from nybble.serve.access_log import AccessLog
from nybble.serve.answering import Answering
from nybble.serve.chat import prepare_chat
from nybble.serve.completions import prepare_completion
from nybble.serve.errors import on_bug, on_http_error, on_refusal
from nybble.serve.metrics import CONTENT_TYPE
from nybble.serve.service import Service


def routes(service: Service) -> list[Route]:
    """All that can be asked."""

    async def health(request: Request) -> Response:
        is_healthy = service.is_healthy
        status = {"status": "ok" if is_healthy else "the engine has stopped or hangs"}
        return JSONResponse(status, 200 if is_healthy else 503)

    async def ready(request: Request) -> Response:
        why = service.unready
        return JSONResponse({"status": why or "ready"}, 503 if why else 200)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def models(request: Request) -> Response:
        data = [_model(service, name) for name in service.served.names]
        return JSONResponse({"object": "list", "data": data})

    async def model(request: Request) -> Response:
        return JSONResponse(_model(service, service.check_model(request.path_params["id"])))

    return [
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{id:path}", model),
        Route("/v1/chat/completions", Answering(service, prepare_chat), methods=["POST"]),
        Route("/v1/completions", Answering(service, prepare_completion), methods=["POST"]),
    ]


def _model(service: Service, name: str) -> dict[str, object]:
    served = service.served
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "nybble",
        "root": served.names[0],
        "max_model_len": served.bounds.context,
    }


def make_app(service: Service, keys: Keys | None) -> ASGIApp:
    """The whole application, with its door."""
    inner = Starlette(
        routes=routes(service),
        exception_handlers={
            NybbleError: on_refusal,
            HTTPException: on_http_error,
            Exception: on_bug,
        },
    )
    # /v1/models/ is not /v1/models: a redirect would name the host that the client named.
    inner.router.redirect_slashes = False
    return AccessLog(Counted(Access(inner, keys), service))


class Counted:
    """ASGI middleware that counts answers by route and status."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._metrics = app, service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and count when the answer begins."""

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Only routes are named: who asks for random paths must not make random figures.
                route = scope.get("route")
                path = route.path if isinstance(route, Route) else "other"
                self._metrics.answered(path, message["status"])
            await send(message)

        await self._app(scope, receive, counting if scope["type"] == "http" else send)
