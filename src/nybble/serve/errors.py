"""Refusals, in the shape that clients of OpenAI's API read.

Source: OpenAI API reference, "Error codes"; the client `openai` picks the exception by status and
shows `message`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from nybble.errors import Busy, ContextTooLong, EngineError, NybbleError, OutOfPages, TextError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


_PATHS = (
    "POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /metrics, GET /health "
    "and GET /ready"
)


class Refusal(NybbleError):
    """An HTTP answer in place of a result.

    `param` is the field of the request that is wrong, `code` a word that programs may test.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        """The JSON document."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(param: str | None, message: str, code: str | None = None) -> Refusal:
    """The refusal of a request that cannot be answered as it is."""
    return Refusal(400, message, param=param, code=code)


def unsupported(param: str, instead: str = "", *, value: str = "") -> Refusal:
    """The refusal of an option of OpenAI's API, or of one `value` of it, that this server does not
    have."""
    what = f"{param} {value}" if value else param
    message = f"{what} is not supported yet{'; ' + instead if instead else ''}"
    return invalid(param, message, "unsupported_parameter")


def from_nybble(error: NybbleError) -> Refusal:
    """What a client is told of an error of ours: the request's fault, or the server's."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, Busy):
        seconds = str(max(1, math.ceil(error.retry_after_s)))
        return Refusal(429, str(error), code="queue_full", headers={"retry-after": seconds})
    if isinstance(error, (ContextTooLong, OutOfPages)):
        return invalid(None, str(error), "context_length_exceeded")
    if isinstance(error, TextError):
        return invalid(None, str(error))
    return Refusal(500, str(error), code="engine_error")


def from_params(error: EngineError, names: Mapping[str, str]) -> Refusal:
    """The refusal for sampling options out of bounds. The message begins with the option's name in
    SamplingParams, for which `names` has the request's."""
    message = str(error)
    name = message.split(" ", 1)[0].rstrip(":")
    param = names.get(name, name)
    return invalid(param, param + message[len(name) :])


def respond(refusal: Refusal) -> Response:
    """The HTTP answer of a refusal."""
    return Response(
        json.dumps(refusal.body()),
        refusal.status,
        headers=refusal.headers,
        media_type="application/json",
    )


async def on_refusal(request: Request, error: Exception) -> Response:
    """Answer an error that an endpoint raised before it began to answer."""
    assert isinstance(error, NybbleError)
    return respond(from_nybble(error))


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answer the router's own errors: 404 and 405."""
    assert isinstance(error, HTTPException)
    method, path = request.scope["method"], request.scope["path"]
    if error.status_code == 405:
        message = f"{path} does not take {method}"
    else:
        message = f"there is nothing at {method} {path}; there are {_PATHS}"
    return respond(Refusal(error.status_code, message, headers=error.headers))


async def on_bug(request: Request, error: Exception) -> Response:
    """Answer an exception that is our mistake; the server logs it."""
    message = "the server made a mistake, and its log has the traceback; other requests go on"
    return respond(Refusal(500, message, code="internal_error"))
