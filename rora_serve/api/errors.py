"""Errors -> status codes and OpenAI's error body. The only place that knows both."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from adapters.errors import (
    AdapterMismatchError,
    AdapterNotFoundError,
    ArtifactError,
    QuarantinedError,
    RoraError,
)


@dataclass(frozen=True)
class ErrorResponse:
    """A status and the body {"error": {"message", "type", "param", "code"}}."""

    status: int
    message: str
    code: str
    type: str = "invalid_request_error"
    param: str | None = None

    @property
    def body(self) -> bytes:
        """The JSON body."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error}).encode()


_STATUS: Mapping[type[RoraError], tuple[int, str]] = {
    AdapterNotFoundError: (404, "model_not_found"),
    # Not a 5xx: clients repeat those, and the adapter stays what it is.
    QuarantinedError: (422, "adapter_quarantined"),
    AdapterMismatchError: (422, "adapter_not_servable"),
    ArtifactError: (422, "adapter_not_servable"),
}


def to_response(error: RoraError, model: str) -> ErrorResponse:
    """Return what a client is told about an error while its `model` was opened."""
    for kind, (status, code) in _STATUS.items():
        if isinstance(error, kind):
            # The name is the client's own and may be of any length.
            missing = f"The model {model[:100]!r} does not exist."
            message = missing if status == 404 else str(error)
            return ErrorResponse(status, message, code, param="model")
    return internal_error()


def internal_error() -> ErrorResponse:
    """Return the answer when the fault is the server's own; its log says why."""
    return ErrorResponse(
        500, "The server could not open this model.", "internal_error", "server_error"
    )


def route_not_found(method: str, path: str) -> ErrorResponse:
    """Return the answer for a route that is not served."""
    return ErrorResponse(404, f"There is no {method} {path}.", "route_not_found")


def body_too_large(limit: int) -> ErrorResponse:
    """Return the answer for a body above the limit."""
    return ErrorResponse(413, f"The body is above {limit} bytes.", "body_too_large")
