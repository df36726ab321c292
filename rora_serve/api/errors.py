"""Errors -> status codes and OpenAI's error body. The only place that knows both."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.errors import (
    AdapterMismatchError,
    AdapterNameError,
    AdapterNotFoundError,
    AliasMovedError,
    ArtifactError,
    DeadlineError,
    EngineDiedError,
    LimitExceededError,
    NoEarlierVersionError,
    OverloadedError,
    QuarantinedError,
    ResidencyError,
    RoraError,
    StoppingError,
    StoreConflictError,
    StoreFullError,
)
from adapters.problems import Problem, describe, shown

_MAX_PROBLEMS = 1000  # told of one adapter
_MAX_SHOWN = 5  # mistakes of one request


@dataclass(frozen=True)
class ErrorResponse:
    """A status and the body {"error": {"message", "type", "param", "code"}}.

    Args: problems: the rules that an adapter breaks; they stand in the error too.
    """

    status: int
    message: str
    code: str
    type: str = "invalid_request_error"
    param: str | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def body(self) -> bytes:
        """The JSON body."""
        error: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        if self.problems:
            error["problems"] = [
                {"code": problem.code, "where": shown(problem.where), "message": problem.message}
                for problem in self.problems[:_MAX_PROBLEMS]
            ]
        return json.dumps({"error": error}).encode()


class Refusal(Exception):  # noqa: N818  (it is an answer)
    """Ends one of our own routes with another answer than what was asked for."""

    def __init__(self, response: ErrorResponse) -> None:
        super().__init__(response.message)
        self.response = response


_BAD_REQUEST = "invalid_request_error"
_TYPES = {429: "rate_limit_error", 503: "server_error", 504: "timeout_error"}
_STATUS: Mapping[type[RoraError], tuple[int, str]] = {
    AdapterNotFoundError: (404, "model_not_found"),
    # Not a 5xx: clients repeat those, and the adapter stays what it is.
    QuarantinedError: (422, "adapter_quarantined"),
    AdapterMismatchError: (422, "adapter_not_servable"),
    ArtifactError: (422, "adapter_not_servable"),
    LimitExceededError: (429, "rate_limit_exceeded"),
    OverloadedError: (429, "overloaded"),
    DeadlineError: (504, "deadline_exceeded"),
    StoppingError: (503, "stopping"),
    EngineDiedError: (503, "engine_died"),
}


def to_response(error: RoraError, model: str = "") -> ErrorResponse:
    """Return what a client is told about an error while its `model` was opened."""
    for kind, (status, code) in _STATUS.items():
        if isinstance(error, kind):
            if status == 404:
                return model_not_found(model)
            param = "model" if status == 422 else None
            return ErrorResponse(status, str(error), code, _TYPES.get(status, _BAD_REQUEST), param)
    return internal_error()


_CONFLICTS: Mapping[type[RoraError], str] = {
    NoEarlierVersionError: "no_earlier_version",
    AliasMovedError: "alias_moved",
    StoreConflictError: "adapter_in_use",
    ResidencyError: "adapter_in_use",
}


def not_authenticated(
    message: str = "A key is expected: Authorization: Bearer KEY.",
) -> ErrorResponse:
    """Return the answer for a request without a key that is known here."""
    return ErrorResponse(401, message, "invalid_api_key", "authentication_error")


def model_not_found(model: str) -> ErrorResponse:
    """Return the answer for a model that is not there, or not for this caller to see."""
    # The name is the client's own and may be of any length.
    message = f"The model {model[:100]!r} does not exist."
    return ErrorResponse(404, message, "model_not_found", param="model")


def internal_error(message: str = "The server could not open this model.") -> ErrorResponse:
    """Return the answer when the fault is the server's own; its log says why."""
    return ErrorResponse(500, message, "internal_error", "server_error")


def adapter_not_found(name: str) -> ErrorResponse:
    """Return the answer for an adapter that is not there, or not for this caller to see."""
    message = f"The adapter {name[:100]!r} does not exist."
    return ErrorResponse(404, message, "adapter_not_found", param="name")


def bad_request(param: str | None, message: str) -> ErrorResponse:
    """Return the answer for a request that says something else than what is expected."""
    return ErrorResponse(400, message, "bad_request", param=param)


def bad_values(errors: Sequence[Mapping[str, Any]]) -> ErrorResponse:
    """Return the answer for what pydantic found wrong in a request."""
    found = []
    for error in errors[:_MAX_SHOWN]:
        # A place in a text that is no JSON is a number.
        param = ".".join(part for part in error["loc"][1:] if isinstance(part, str))
        found.append((param, f"{shown(param) or 'body'}: {_lowered(error['msg'])}"))
    return bad_request(found[0][0] or None, "; ".join(message for _, message in found))


def adapter_error(error: RoraError) -> ErrorResponse:
    """Return what a caller of our routes is told about an error of an adapter that it may see.

    Neither the text of these errors nor what is told of others names a place on this machine.
    """
    match error:
        case NoEarlierVersionError() | AliasMovedError() | StoreConflictError() | ResidencyError():
            return ErrorResponse(409, str(error), _CONFLICTS[type(error)])
        case AdapterNotFoundError():
            return ErrorResponse(404, str(error), "adapter_not_found", param="version")
        case AdapterNameError():
            param = "alias" if str(error).startswith("alias") else "name"
            return bad_request(param, str(error))
        case ArtifactError():
            is_quarantined = isinstance(error, QuarantinedError)
            code = "adapter_quarantined" if is_quarantined else "adapter_not_servable"
            message = describe(error.problems) if error.problems else str(error)
            return ErrorResponse(422, message, code, problems=error.problems)
        case StoreFullError():
            message = "The server has no room for this adapter."
            return ErrorResponse(507, message, "no_room", "server_error")
        case _:
            return internal_error("The server could not do this; its log says why.")


def _lowered(text: str) -> str:
    return f"{text[:1].lower()}{text[1:]}"


def route_not_found(method: str, path: str) -> ErrorResponse:
    """Return the answer for a route that is not served."""
    return ErrorResponse(404, f"There is no {method} {path}.", "route_not_found")


def body_too_slow(seconds: float) -> ErrorResponse:
    """Return the answer for a body that does not come."""
    return ErrorResponse(408, f"The body did not come within {seconds:g} s.", "body_too_slow")


def body_too_large(limit: int) -> ErrorResponse:
    """Return the answer for a body above the limit."""
    return ErrorResponse(413, f"The body is above {limit} bytes.", "body_too_large")
