"""Every answer that a route declares is produced, and none that it does not declare."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import httpx
import pytest

from adapters.errors import AdapterMismatchError
from rora_serve.api.openapi import openapi_document
from rora_serve.api.reception import RECEPTION_STATE
from rora_serve.tenants import EVERYBODY, Limits
from tests.conftest import file_limit
from tests.rora_serve.adapter_server import Place, Rights, form_headers
from tests.rora_serve.echo_server import write_keys

Answer = Awaitable[httpx.Response]

CASES: list[tuple[str, int, Callable[[Place], Answer]]] = []


def case(operation: str, status: int) -> Callable[[Callable[[Place], Answer]], object]:
    def register(ask: Callable[[Place], Answer]) -> object:
        CASES.append((operation, status, ask))
        return ask

    return register


def plain(operation: str, status: int, method: str, path: str, **options: Any) -> None:
    CASES.append((operation, status, lambda place: place.ask(method, path, **options)))


LARGE = b"x" * 100_000  # above the limit that is set for these tests

# What all routes of one adapter have in common.
for operation, body in (
    ("GET /v1/adapters/{name}", None),
    ("PUT /v1/adapters/{name}/aliases/{alias}", {"version": "latest"}),
    ("POST /v1/adapters/{name}/rollback", {}),
    ("POST /v1/adapters/{name}/load", None),
    ("POST /v1/adapters/{name}/unload", None),
    ("PUT /v1/adapters/{name}/pin", None),
    ("DELETE /v1/adapters/{name}/pin", None),
    ("DELETE /v1/adapters/{name}", None),
):
    method, _, template = operation.partition(" ")
    path = template.replace("{alias}", "stable").replace("{name}", "NAME")
    plain(operation, 200, method, path.replace("NAME", "a"), json=body)
    plain(operation, 404, method, path.replace("NAME", "nobody"), json=body)
    if method != "GET":
        plain(operation, 413, method, path.replace("NAME", "a"), content=LARGE)

        @case(operation, 503)
        async def of_the_dead(
            place: Place, method: str = method, path: str = path, body: object = body
        ) -> httpx.Response:
            place.server.is_alive = False
            return await place.ask(method, path.replace("NAME", "a"), json=body)

    @case(operation, 500)
    async def broken(
        place: Place, method: str = method, path: str = path, body: object = body
    ) -> httpx.Response:
        place.break_record()
        return await place.ask(method, path.replace("NAME", "a"), json=body)


plain("GET /v1/adapters", 200, "GET", "/v1/adapters")
plain("GET /v1/models", 200, "GET", "/v1/models")
plain("GET /v1/models/{model}", 200, "GET", "/v1/models/a")
plain("GET /v1/models/{model}", 404, "GET", "/v1/models/nobody")
plain("GET /ready", 200, "GET", "/ready")
plain("PUT /v1/adapters/{name}/aliases/{alias}", 400, "PUT", "/v1/adapters/a/aliases/x", json={})
plain("POST /v1/adapters/{name}/rollback", 400, "POST", "/v1/adapters/a/rollback", json={"x": 1})
plain("DELETE /v1/adapters/{name}", 400, "DELETE", "/v1/adapters/a?force=perhaps")


@case("GET /ready", 503)
async def dead(place: Place) -> httpx.Response:
    place.server.is_alive = False
    return await place.ask("GET", "/ready")


@case("GET /v1/adapters", 500)
async def unreadable_names(place: Place) -> httpx.Response:
    (place.store.root / "names").rename(place.store.root / "elsewhere")
    (place.store.root / "names").write_text("")
    return await place.ask("GET", "/v1/adapters")


@case("GET /v1/models", 500)
async def unreadable_models(place: Place) -> httpx.Response:
    (place.store.root / "names").rename(place.store.root / "elsewhere")
    (place.store.root / "names").write_text("")
    return await place.ask("GET", "/v1/models")


@case("GET /v1/models/{model}", 500)
async def unreadable_model(place: Place) -> httpx.Response:
    place.break_record()
    return await place.ask("GET", "/v1/models/a")


@case("POST /v1/adapters/{name}/rollback", 409)
async def nothing_earlier(place: Place) -> httpx.Response:
    place.store.rollback("a")
    return await place.ask("POST", "/v1/adapters/a/rollback")


@case("POST /v1/adapters/{name}/load", 422)
async def load_refused(place: Place) -> httpx.Response:
    place.server.engine.errors.append(AdapterMismatchError("no such layer"))
    return await place.ask("POST", "/v1/adapters/a/load")


@case("PUT /v1/adapters/{name}/pin", 422)
async def pin_refused(place: Place) -> httpx.Response:
    place.server.engine.errors.append(AdapterMismatchError("no such layer"))
    return await place.ask("PUT", "/v1/adapters/a/pin")


@case("PUT /v1/adapters/{name}/aliases/{alias}", 409)
async def moved_meanwhile(place: Place) -> httpx.Response:
    place.server.engine.is_held_up = True
    body = {"version": place.first}
    move = asyncio.create_task(place.ask("PUT", "/v1/adapters/a/aliases/latest", json=body))
    while not place.server.engine.num_loads:
        await asyncio.sleep(0.01)
    place.store.add(place.third, name="a")
    place.server.engine.is_held_up = False
    return await move


@case("PUT /v1/adapters/{name}/aliases/{alias}", 422)
async def move_refused(place: Place) -> httpx.Response:
    place.server.engine.errors.append(AdapterMismatchError("no such layer"))
    return await place.ask("PUT", "/v1/adapters/a/aliases/stable", json={"version": "latest"})


@case("POST /v1/adapters/{name}/rollback", 422)
async def rollback_refused(place: Place) -> httpx.Response:
    place.server.engine.errors.append(AdapterMismatchError("no such layer"))
    return await place.ask("POST", "/v1/adapters/a/rollback")


@case("PUT /v1/adapters/{name}/pin", 409)
async def pins_full(place: Place) -> httpx.Response:
    place.server.directory.tier.capacity = place.store.record("a").latest.num_bytes
    return await place.ask("PUT", "/v1/adapters/a/pin")


@case("POST /v1/adapters/{name}/unload", 409)
async def unload_in_use(place: Place) -> httpx.Response:
    await place.server.running("a")
    return await place.ask("POST", "/v1/adapters/a/unload")


@case("PUT /v1/adapters/{name}/aliases/{alias}", 507)
async def alias_without_room(place: Place) -> httpx.Response:
    with file_limit(64):
        return await place.ask("PUT", "/v1/adapters/a/aliases/stable", json={"version": "latest"})


@case("POST /v1/adapters/{name}/rollback", 507)
async def rollback_without_room(place: Place) -> httpx.Response:
    with file_limit(64):
        return await place.ask("POST", "/v1/adapters/a/rollback")


@case("DELETE /v1/adapters/{name}", 507)
async def removal_without_room(place: Place) -> httpx.Response:
    place.store.set_alias("a@latest", "stable")
    with file_limit(64):
        return await place.ask("DELETE", "/v1/adapters/a@stable")


@case("DELETE /v1/adapters/{name}", 409)
async def removal_in_use(place: Place) -> httpx.Response:
    await place.server.running("a")
    return await place.ask("DELETE", "/v1/adapters/a")


# Uploads and imports.

UPLOAD = "POST /v1/adapters"
TAR = {"content-type": "application/x-tar"}
plain(UPLOAD, 415, "POST", "/v1/adapters", content=b"x")
plain(UPLOAD, 400, "POST", "/v1/adapters", content=b"x", headers=form_headers())
plain(UPLOAD, 422, "POST", "/v1/adapters?name=b", content=b"x", headers=TAR)
plain(UPLOAD, 413, "POST", "/v1/adapters?name=b", headers={**TAR, "content-length": "9" * 30})


@case(UPLOAD, 201)
async def uploaded(place: Place) -> httpx.Response:
    return await place.server.upload(place.third, "a")


@case(UPLOAD, 403)
async def not_for_you(place: Place) -> httpx.Response:
    place.server.tenant = Rights(use=("a",), manage=("a",))
    return await place.server.upload(place.third, "a")


@case(UPLOAD, 403)
async def alias_not_for_you(place: Place) -> httpx.Response:
    """Whoever may only upload moves `latest`, which is the control."""
    place.server.tenant = Rights(upload=("a",))
    answer = await place.server.upload(place.third, "a", alias="stable")
    assert (await place.server.upload(place.third, "a")).status_code == 201
    return answer


@case(UPLOAD, 408)
async def half_an_upload(place: Place) -> httpx.Response:
    async def content() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    headers = {"content-type": "application/json"}
    return await place.ask("POST", "/v1/adapters", content=content(), headers=headers)


@case(UPLOAD, 500)
async def broken_record(place: Place) -> httpx.Response:
    place.break_record()
    return await place.server.upload(place.third, "a")


@case(UPLOAD, 429)
async def too_many_uploads(place: Place) -> httpx.Response:
    limited = replace(EVERYBODY, limits=Limits(requests_per_minute=1))
    with mock.patch("rora_serve.api.front_door.EVERYBODY", limited):
        assert (await place.server.upload(place.third, "a")).status_code == 201
        return await place.server.upload(place.third, "a")


@case(UPLOAD, 507)
async def no_room(place: Place) -> httpx.Response:
    (place.third / "README.md").write_bytes(b"x" * 100_000)
    with file_limit(4096):
        return await place.server.upload(place.third, "a")


# vLLM's own.

LOAD, UNLOAD = "POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter"


def load(place: Place, **keys: object) -> Answer:
    body = {"lora_name": "b", "lora_path": str(place.third), **keys}
    return place.ask("POST", "/v1/load_lora_adapter", json=body)


for operation in (UPLOAD, LOAD, UNLOAD):

    @case(operation, 503)
    async def of_the_stopping(place: Place, operation: str = operation) -> httpx.Response:
        place.server.is_alive = False
        method, _, path = operation.partition(" ")
        return await place.ask(method, path, json={})


plain(LOAD, 413, "POST", "/v1/load_lora_adapter", content=LARGE)
plain(UNLOAD, 413, "POST", "/v1/unload_lora_adapter", content=LARGE)
plain(UNLOAD, 200, "POST", "/v1/unload_lora_adapter", json={"lora_name": "a"})
plain(UNLOAD, 400, "POST", "/v1/unload_lora_adapter", json={"lora_name": ""})
plain(UNLOAD, 404, "POST", "/v1/unload_lora_adapter", json={"lora_name": "nobody"})
CASES.append((LOAD, 200, load))
CASES.append((LOAD, 400, lambda place: load(place, lora_name="a")))
CASES.append((LOAD, 404, lambda place: load(place, lora_path="/nowhere")))


@case(LOAD, 403)
async def load_not_for_you(place: Place) -> httpx.Response:
    place.server.tenant = Rights(use=("b",), upload=("b",))
    return await load(place)


@case(LOAD, 422)
async def load_broken(place: Place) -> httpx.Response:
    (place.third / "adapter_config.json").write_text("{")
    return await load(place)


@case(LOAD, 500)
async def load_over_a_broken_record(place: Place) -> httpx.Response:
    place.break_record()
    return await load(place, lora_name="a")


@case(LOAD, 507)
async def load_without_room(place: Place) -> httpx.Response:
    (place.third / "README.md").write_bytes(b"x" * 100_000)
    with file_limit(4096):
        return await load(place)


@case(UNLOAD, 409)
async def lora_in_use(place: Place) -> httpx.Response:
    await place.server.running("a")
    return await place.ask("POST", "/v1/unload_lora_adapter", json={"lora_name": "a"})


@case(UNLOAD, 500)
async def lora_broken(place: Place) -> httpx.Response:
    place.break_record()
    return await place.ask("POST", "/v1/unload_lora_adapter", json={"lora_name": "a"})


# The front door's own.

for operation in sorted({operation for operation, _, _ in CASES} - {"GET /ready"}):

    @case(operation, 401)
    async def without_a_key(place: Place, operation: str = operation) -> httpx.Response:
        place.server.ask_for_keys(write_keys(place.store.root.with_name("keys.toml")))
        method, _, path = operation.partition(" ")
        return await place.ask(method, path)

    if operation.startswith("GET") or operation == UPLOAD:
        continue

    @case(operation, 408)
    async def half_a_body(place: Place, operation: str = operation) -> httpx.Response:
        async def content() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.sleep(60)

        method, _, path = operation.partition(" ")
        return await place.ask(method, path, content=content())

    @case(operation, 429)
    async def beside_large_bodies(place: Place, operation: str = operation) -> httpx.Response:
        reception = getattr(place.server.app.state, RECEPTION_STATE)
        method, _, path = operation.partition(" ")
        with reception.bodies.of(EVERYBODY.name) as hold:
            hold(64 * 1024 * 1025)
            return await place.ask(method, path, content=b" " * 65 * 1024)


@pytest.mark.parametrize(
    ("operation", "status", "ask"), CASES, ids=[f"{case[0]} {case[1]}" for case in CASES]
)
def test_each_answer_is_as_it_is_declared(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    status: int,
    ask: Callable[[Place], Answer],
) -> None:
    monkeypatch.setattr("rora_serve.api.asgi.MAX_BODY_BYTES", len(LARGE) - 1)
    monkeypatch.setattr("rora_serve.api.asgi.MAX_BODY_SECONDS", 0.2)
    monkeypatch.setattr("rora_serve.api.uploads.MAX_SILENT_SECONDS", 0.2)

    async def run() -> httpx.Response:
        return await ask(place)

    answer = asyncio.run(run())
    assert answer.status_code == status, answer.text
    assert str(place.store.root) not in answer.text
    if status >= 400 and operation != "GET /ready":
        error = answer.json()["error"]
        assert {"message", "type", "param", "code"} <= set(error)
        # vLLM's own routes answer in vLLM's words, past the front door.
        is_vllms = "lora_adapter" in operation and status not in (401, 408, 413, 429, 503)
        assert isinstance(error["code"], int if is_vllms else str)


def test_no_answer_is_declared_that_is_not_tried_here(place: Place) -> None:
    document = openapi_document(place.server.routes)
    declared = {
        (f"{method.upper()} {path}", int(status))
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        for status in operation["responses"]
    }
    assert declared == {(operation, status) for operation, status, _ in CASES}


def test_the_document_is_served_and_whole(place: Place) -> None:
    async def run() -> httpx.Response:
        return await place.ask("GET", "/openapi.json")

    answer = asyncio.run(run())
    assert answer.json() == json.loads(json.dumps(openapi_document(place.server.routes)))
    assert "HTTPValidationError" not in answer.text
    upload = answer.json()["paths"]["/v1/adapters"]["post"]["requestBody"]["content"]
    assert set(upload) > {"multipart/form-data", "application/x-tar", "application/json"}


def test_the_front_door_lets_in_what_there_is_and_nothing_else(place: Place) -> None:
    document = openapi_document(place.server.routes)

    async def run() -> None:
        for template, operations in document["paths"].items():
            path = template
            for part in ("{name}", "{alias}", "{model}"):
                path = path.replace(part, "nobody")
            for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
                answer = await place.ask(method, path)
                code = answer.json()["error"]["code"] if answer.status_code == 404 else None
                assert (code == "route_not_found") == (method.lower() not in operations), path
                assert answer.status_code != 405

    asyncio.run(run())


def test_mistakes_of_a_request_name_the_key(place: Place) -> None:
    path = "/v1/adapters/a/aliases/x"

    async def send(content: bytes) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return await place.ask("PUT", path, content=content, headers=headers)

    async def ask() -> None:
        for body, param in (
            ({}, "version"), ({"version": 5}, "version"), ({"version": "latest", "x": 1}, "x"),
            ([], None), (None, None),
        ):  # fmt: skip
            answer = await place.ask("PUT", path, json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (
                400,
                param,
                "bad_request",
            )
        answer = await place.ask("PUT", path, json={"version": "latest"})
        assert answer.status_code == 200  # the control
        for content in (b"{", b"\xff", b""):
            answer = await send(content)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (400, None, "bad_request")

    asyncio.run(ask())
