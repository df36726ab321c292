"""The OpenAPI document: every route that the front door lets in, and all that it may answer.

A route declares what it answers itself. What the front door answers before it, and what it adds to
answers, is declared here, once for all routes of a kind.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from rora_serve.api.allowed import MODEL_ROUTES, Kind, kind_of
from rora_serve.api.front_door import ADAPTER_HEADER, LOAD_HEADER, TIER_HEADER
from rora_serve.api.model_request import DEADLINE_HEADER, MAX_DEADLINE_MS, NOT_FOR_CLIENTS
from rora_serve.api.routing import OurRoute
from rora_serve.request_log import REQUEST_ID_HEADER

Json = dict[str, Any]

_DESCRIPTION = (
    "vLLM's OpenAI-style server with many LoRA adapters beside its base model. Routes that are not "
    "listed here are 404."
)
_TAGS = [
    {"name": "requests", "description": "To the base model or an adapter, which `model` names."},
    {"name": "models", "description": "What requests may name."},
    {"name": "adapters", "description": "Adapters, their versions and aliases, and their memory."},
    {"name": "vLLM", "description": "vLLM's own two routes for adapters."},
    {"name": "server", "description": "How the server is."},
]
_JSON_TYPE, _TEXT_TYPE = "application/json", "text/plain"
_KEY = "key"
_KEY_SCHEME = {
    "type": "http",
    "scheme": "bearer",
    "description": "A tenant's key. A server without a key file needs none.",
}


def _header(description: str, *, always: bool = False, kind: str = "string") -> Json:
    return {"description": description, "required": always, "schema": {"type": kind}}


_EVERY_ANSWER = {
    REQUEST_ID_HEADER.decode(): _header("The request's own, if it sent one, else a new one.")
}
_ANSWERS_OF_MODELS = {
    ADAPTER_HEADER.decode(): _header("Of an adapter: name@sha256: and 12 digits."),
    TIER_HEADER.decode(): _header("Of an adapter: where it was found."),
    LOAD_HEADER.decode(): _header(
        "Of an adapter: milliseconds to get it into the engine.", kind="number"
    ),
}
_MODEL = {
    "type": "string",
    "minLength": 1,
    "description": "An adapter: name, name@alias or name@sha256:…; or the base model's name.",
}
_DEADLINE_PARAMETER = {
    "name": DEADLINE_HEADER.decode(),
    "in": "header",
    "required": False,
    "description": "Milliseconds in which the request is to be let in, or refused with 504.",
    "schema": {"type": "integer", "minimum": 1, "maximum": MAX_DEADLINE_MS},
}


@dataclass(frozen=True)
class _Answer:
    """An answer of the front door's own, with an ErrorBody.

    Args: why: it is given.
    """

    why: str
    headers: Mapping[str, Json] = field(default_factory=dict)


_NO_KEY = _Answer(
    "Where the server has a key file: the request has no key of it.",
    {"www-authenticate": _header("Bearer", always=True)},
)
_TOO_LARGE = _Answer("The body is too large.")
_TOO_SLOW = _Answer("The body did not come in time.")
_RETRY_AFTER = {"retry-after": _header("Seconds.", always=True, kind="integer")}
_NO_ROOM = _Answer("Too many large bodies are being read.", _RETRY_AFTER)
_LIMITED = _Answer("A limit of the caller's is reached.", _RETRY_AFTER)
_LEAVING = _Answer("The server is stopping, or its engine died.")
_OF_MODELS = {
    400: _Answer("The request says something else than what is expected."),
    404: _Answer("There is no such model, or the caller may not use it."),
    408: _TOO_SLOW,
    413: _TOO_LARGE,
    422: _Answer("The adapter does not fit the base model, or failed its probe."),
    429: _Answer(
        "A limit of the caller's is reached, or too many requests wait already.", _RETRY_AFTER
    ),
    500: _Answer("A fault of the server; its log says which."),
    504: _Answer(f"The request was not let in within {DEADLINE_HEADER.decode()}."),
}


def document_route() -> BaseRoute:
    """Return the route /openapi.json, which describes its app's routes."""
    made: list[bytes] = []

    def show(request: Request) -> Response:  # in a thread: vLLM's bodies take a while
        if not made:
            made.append(bytes(JSONResponse(openapi_document(request.app.routes)).body))
        return Response(made[0], media_type=_JSON_TYPE)

    return OurRoute("/openapi.json", show, methods={"GET"}, include_in_schema=False)


def openapi_document(routes: Sequence[BaseRoute]) -> Json:
    """Return the OpenAPI document of those of an app's routes that are served.

    Args: routes: ours among them, which bring the schemas of errors.
    Cost: a second with vLLM's.
    """
    document = get_openapi(
        title="rora-serve",
        version="1",
        description=_DESCRIPTION,
        routes=list(_served(routes)),
        tags=_TAGS,
    )
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _complete(operation, kind_of(method.upper(), path), method)
    components = document["components"]
    components["securitySchemes"] = {_KEY: _KEY_SCHEME}
    for name in _FASTAPIS_SCHEMAS:
        components["schemas"].pop(name, None)
    for path in MODEL_ROUTES & document["paths"].keys():
        for schema in _schemas_of_body(document["paths"][path]["post"]):
            of_body = components["schemas"][schema]
            for key in NOT_FOR_CLIENTS:
                of_body["properties"].pop(key, None)
            # vLLM would do without; the front door does not.
            of_body["properties"]["model"] = _MODEL
            of_body["required"] = sorted({*of_body.get("required", ()), "model"})
    return document


# Of its own answer to bad values, which here is a 400.
_FASTAPIS_SCHEMAS = ("HTTPValidationError", "ValidationError")


def _schemas_of_body(operation: Json) -> list[str]:
    """Return the names of those that an operation's body may have."""
    schema = operation["requestBody"]["content"][_JSON_TYPE]["schema"]
    return [one["$ref"].rpartition("/")[2] for one in schema.get("anyOf", [schema])]


def _served(routes: Sequence[BaseRoute]) -> Iterator[APIRoute]:
    """Yield the routes that the front door lets in; of those for the same the first, which answers.

    Routes without a form of their own, like vLLM's /metrics, are none that a document describes.
    """
    seen: set[tuple[str, str]] = set()
    for route in routes:
        if isinstance(route, APIRoute) and route.include_in_schema:
            asked = {(method, route.path_format) for method in route.methods}
            if not asked & seen and not any(kind_of(*each) is Kind.UNKNOWN for each in asked):
                seen |= asked
                yield route


def _complete(operation: Json, kind: Kind, method: str) -> None:
    """Declare what the front door does for this kind of route."""
    responses: Json = operation["responses"]
    if _FASTAPIS_SCHEMAS[0] in str(responses.get("422")):
        del responses["422"]
    for status, response in responses.items():
        if int(status) >= 400 and _TEXT_TYPE in response.get("content", {}):
            # FastAPI takes errors to be of the type that a route's success has.
            response["content"] = {_JSON_TYPE: response["content"][_TEXT_TYPE]}
    operation["security"] = [] if kind is Kind.OPEN else [{_KEY: []}, {}]
    if kind is Kind.OPEN:
        responses.setdefault("503", {"description": "The engine died."})
    for number, answer in _answers_in_front(kind, method):
        _declare(responses, str(number), answer)
    if kind is Kind.MODEL:
        operation.setdefault("tags", ["requests"])
        operation.setdefault("parameters", []).append(_DEADLINE_PARAMETER)
        _add_headers(responses["200"], _ANSWERS_OF_MODELS)
    else:
        operation.setdefault("tags", ["server"])
    if kind is not Kind.OPEN:
        for response in responses.values():
            _add_headers(response, _EVERY_ANSWER)


def _answers_in_front(kind: Kind, method: str) -> Iterator[tuple[int, _Answer]]:
    if kind is not Kind.OPEN:
        yield 401, _NO_KEY
    if kind is Kind.MODEL:
        yield from _OF_MODELS.items()
    if kind is Kind.UPLOAD:
        yield 429, _LIMITED
    if kind is not Kind.OPEN and method != "get":
        yield 503, _LEAVING
    if kind is Kind.OWN and method != "get":
        yield 408, _TOO_SLOW
        yield 413, _TOO_LARGE
        yield 429, _NO_ROOM


def _declare(responses: Json, status: str, answer: _Answer) -> None:
    """Add an answer to those of the route itself, whose body may be another."""
    response = responses.setdefault(status, {"description": answer.why})
    content = response.setdefault("content", {}).setdefault(_JSON_TYPE, {})
    ours = {"$ref": "#/components/schemas/ErrorBody"}
    own = content.get("schema", ours)
    content["schema"] = ours if own == ours else {"anyOf": [ours, own]}
    _add_headers(response, answer.headers)


def _add_headers(response: Json, headers: Mapping[str, Json]) -> None:
    response["headers"] = {**response.get("headers", {}), **headers}
