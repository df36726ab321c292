"""How our own routes answer: errors in OpenAI's words, and how they declare them."""

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from adapters.errors import RoraError
from rora_serve.api.errors import (
    ErrorResponse,
    Refusal,
    adapter_error,
    bad_request,
    bad_values,
    internal_error,
)
from rora_serve.api.protocol import ErrorBody, RefusedBody

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
Responses = dict[int | str, dict[str, Any]]

_SERVER_FAULT = 500  # the first status of those
_MEANINGS = {
    400: "The request says something else than what is expected.",
    403: "The caller may not add adapters of this name, or not under this alias.",
    404: "There is no such adapter or version, or the caller may not see it.",
    408: "Nothing of the body came for a minute.",
    409: "An alias, a version or running requests stand against it.",
    413: "The body is too large.",
    415: "The body is of a kind that is not expected.",
    422: "The adapter breaks a rule, or does not fit the base model.",
    500: "A fault of the server; its log says which.",
    503: "The server is stopping, or its engine died.",
    507: "The server's disk is full.",
}


def answers(*statuses: int, body: type = ErrorBody, refused: type = RefusedBody) -> Responses:
    """Return what a route declares of its other answers; 500 always is one."""
    return {
        status: {"model": refused if status == 422 else body, "description": _MEANINGS[status]}
        for status in (*statuses, 500)
    }


class OurRoute(APIRoute):
    """A route whose errors have OpenAI's body, whatever the app around it does with errors."""

    def get_route_handler(self) -> Handler:
        """Return the handler, with its errors caught."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except Exception as error:  # each is told, or logged
                return self.respond(_response_to(error, request))

        return answer

    def respond(self, response: ErrorResponse) -> Response:
        """Return an error's answer."""
        return Response(response.body, response.status, media_type="application/json")


def _response_to(error: Exception, request: Request) -> ErrorResponse:
    if isinstance(error, Refusal):
        return error.response
    if isinstance(error, RequestValidationError):
        return bad_values(error.errors())
    if isinstance(error, HTTPException):  # FastAPI's, of a body that it can not read
        return bad_request(None, str(error.detail))
    if isinstance(error, ClientDisconnect):
        return bad_request(None, "The body ended before its end.")
    if isinstance(error, RoraError):
        response = adapter_error(error)
        level = logging.INFO if response.status < _SERVER_FAULT else logging.ERROR
        logger.log(level, "%s %s: %s", request.method, request.url.path, error)
        return response
    logger.error("%s %s", request.method, request.url.path, exc_info=error)
    return internal_error("The server could not do this; its log says why.")
