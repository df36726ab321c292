import asyncio
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from starlette.datastructures import State

from adapters import AdapterStore, ResolvedVersion
from adapters.errors import AdapterMismatchError
from rora_serve.api.asgi import MAX_BODY_BYTES, Exchange
from rora_serve.api.front_door import FrontDoor, current_adapter
from rora_serve.api.reception import RECEPTION_STATE
from rora_serve.api.routes import make_router
from rora_serve.models import ModelDirectory, ServedAdapter, ServedBase
from rora_serve.request_log import RequestRecord
from rora_serve.tenants import EVERYBODY, Limits
from tests.rora_serve.adapter_server import make_reception
from tests.rora_serve.reaching import client_of


@pytest.fixture
def store(tmp_path: Path, adapter: Path) -> AdapterStore:
    store = AdapterStore(tmp_path / "store")
    store.add(adapter, name="good")
    store.add(adapter, name="bad")
    return store


@pytest.fixture
def client(store: AdapterStore) -> Iterator[TestClient]:
    """An app that tells what its handlers see, behind the front door."""
    app = FastAPI()

    async def see(request: Request) -> dict[str, Any]:
        adapter = current_adapter.get()
        seen = adapter.resolved.public_id if adapter else None
        return {"adapter": seen, "body": (await request.body()).decode()}

    async def stream() -> StreamingResponse:
        async def chunks() -> Any:
            for _ in range(2):
                await asyncio.sleep(0.001)
                adapter = current_adapter.get()
                yield adapter.requested if adapter else "base"

        return StreamingResponse(chunks())

    app.add_api_route("/v1/chat/completions", see, methods=["POST"])
    app.add_api_route("/v1/completions", stream, methods=["POST"])
    app.add_api_route("/invocations", see, methods=["POST"])
    app.add_api_route("/health", see, methods=["GET"])

    class Engine:
        async def load(self, _: int, resolved: ResolvedVersion) -> int:
            if refuse == ["crash"]:
                raise RuntimeError("lost the engine")
            if refuse:
                raise AdapterMismatchError("no such layer")
            return resolved.version.num_bytes

        async def drop(self, lora_int_id: int) -> None:
            raise AssertionError(f"nothing has to go, {lora_int_id} neither")

    refuse: list[str] = []
    dead: list[bool] = []
    base = ServedBase(("base",), "", None)
    directory = ModelDirectory(base, store, Engine(), capacity=1_000_000)
    router = make_router(directory, started=7, is_ready=lambda: not dead)
    app.router.routes[:0] = router.routes
    app.add_middleware(FrontDoor)
    setattr(app.state, RECEPTION_STATE, make_reception(directory))
    app.state.refuse, app.state.dead = refuse, dead
    with TestClient(app) as client:
        yield client


def ask(client: TestClient, body: object) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post("/v1/chat/completions", content=content)


def test_a_request_reaches_its_handler_with_its_adapter_and_whole_body(
    client: TestClient, store: AdapterStore
) -> None:
    answer = ask(client, {"model": "good", "text": "x" * 200_000})
    expected = store.resolve("good").public_id
    assert answer.json()["adapter"] == answer.headers["x-rora-adapter"] == expected
    assert len(answer.json()["body"]) > 200_000


@pytest.mark.parametrize("body", [{"model": "base"}, {"model": 1}, [], b"{", b""])
def test_what_names_no_adapter_is_left_to_vllm_as_the_base(
    client: TestClient, body: object
) -> None:
    answer = ask(client, body)
    assert answer.status_code == 200
    assert answer.json()["adapter"] is None
    assert "x-rora-adapter" not in answer.headers


@pytest.mark.parametrize("body", [{}, {"model": ""}, {"model": None}])
def test_who_names_no_model_gets_no_answer_of_the_base(client: TestClient, body: object) -> None:
    answer = ask(client, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("model: found nothing, the name of an")


@pytest.mark.parametrize(
    "body",
    [b'{"model": "\xff"}', b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"],
    ids=["no UTF-8", "deep", "long number"],
)
def test_what_can_not_be_read_is_refused_in_openais_words(client: TestClient, body: bytes) -> None:
    """FastAPI has words of its own for it, which no client knows."""
    answer = ask(client, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "bad_request"
    assert "JSON that can be read is expected" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "model", ["nobody", "../good", "/etc/passwd", "good@", "good@x", "good@sha256:00", "GOOD", "é"]
)
def test_an_unknown_model_is_404_in_openais_words(client: TestClient, model: str) -> None:
    answer = ask(client, {"model": model})
    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "message": f"The model {model!r} does not exist.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


def test_an_adapter_that_the_engine_refuses_is_422_with_the_reason(client: TestClient) -> None:
    client.app.state.refuse.append("misfit")  # type: ignore[attr-defined]
    answer = ask(client, {"model": "bad"})
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "adapter_not_servable"
    assert "no such layer" in answer.json()["error"]["message"]
    assert ask(client, {"model": "base"}).status_code == 200


def test_a_stream_keeps_its_adapter_to_the_end(client: TestClient) -> None:
    assert client.post("/v1/completions", json={"model": "good"}).text == "goodgood"
    assert client.post("/v1/completions", json={"model": "base"}).text == "basebase"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/invocations"),
        ("GET", "/v1/load_lora_adapter"),
        ("GET", "/docs"),
        ("GET", "/v1/models/good%0A"),
        ("POST", "/v1/adapters/good"),
        ("PUT", "/v1/adapters/good/alias/x"),
        ("GET", "/v1/chat/completions"),
        ("POST", "/health"),
        ("PUT", "/v1/models"),
        ("POST", "//v1/chat/completions"),
        ("POST", "/v1/chat/completions/"),
    ],
)
def test_routes_that_are_not_listed_are_404(client: TestClient, method: str, path: str) -> None:
    answer = client.request(method, f"http://testserver{path}", content=b"{}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "route_not_found"


def test_a_body_above_the_limit_is_413(client: TestClient) -> None:
    answer = ask(client, b"x" * (MAX_BODY_BYTES + 1))
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


def test_a_body_that_does_not_come_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rora_serve.api.asgi.MAX_BODY_SECONDS", 0.01)
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    exchange = Exchange(receive, send, RequestRecord("1", "POST", "/v1/completions", 0.0))
    assert asyncio.run(exchange.read_body(lambda _: None)) is None
    assert sent[0]["status"] == 408


def test_models_are_listed_with_their_base_and_version(
    client: TestClient, store: AdapterStore
) -> None:
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert list(cards) == ["base", "bad", "good"]
    assert cards["good"]["parent"] == "base"
    assert cards["good"]["version"] == f"sha256:{store.resolve('good').version.digest}"
    assert client.get("/v1/models/good").json() == cards["good"]
    assert client.get("/v1/models/base").json() == cards["base"]
    missing = client.get("/v1/models/nobody")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    assert cards["good"]["rank"] == {"min": 4, "max": 4}


def test_a_server_whose_engine_died_is_not_ready(client: TestClient) -> None:
    assert client.get("/ready").status_code == 200
    client.app.state.dead.append(True)  # type: ignore[attr-defined]
    assert client.get("/ready").status_code == 503


def test_a_fault_of_the_server_is_500_without_its_details(client: TestClient) -> None:
    client.app.state.refuse.append("crash")  # type: ignore[attr-defined]
    answer = ask(client, {"model": "good"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "lost" not in answer.text


def test_a_broken_record_is_left_out_of_the_list_and_is_a_500_by_name(
    client: TestClient, store: AdapterStore
) -> None:
    (store.root / "names" / "good.json").write_text("{")
    listed = [card["id"] for card in client.get("/v1/models").json()["data"]]
    assert listed == ["base", "bad"]
    for answer in (client.get("/v1/models/good"), ask(client, {"model": "good"})):
        assert answer.status_code == 500
        assert str(store.root) not in answer.text


def test_head_is_answered_as_get_is_and_logged_as_what_it_is(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    for path in ("/health", "/v1/models"):
        assert client.head(path).status_code == client.get(path).status_code == 200
    with caplog.at_level(logging.INFO, logger="rora_serve.requests"):
        assert client.head("/v1/completions").status_code == 404
    (record,) = caplog.records
    assert json.loads(record.getMessage())["method"] == "HEAD"


def test_a_request_of_very_many_sequences_is_400(client: TestClient) -> None:
    many: list[dict[str, Any]] = [
        {"prompt": ["a"] * 129}, {"prompt": "a", "n": 129},
        {"prompt": [[1]] * 43, "n": "3.0"},
    ]  # fmt: skip
    for body in many:
        answer = client.post("/v1/completions", json={"model": "base", **body})
        assert answer.status_code == 400
        assert "129 sequences, at most 128 are expected" in answer.json()["error"]["message"]
    most = {"model": "base", "prompt": ["a"] * 64, "n": 2}
    assert client.post("/v1/completions", json=most).status_code == 200


@pytest.mark.parametrize(
    ("body", "is_charged"),
    [({"model": "base"}, True), ({"model": "nobody"}, True), (b'{"n": 9', True), (None, False)],
)
def test_mistakes_are_charged_and_what_the_server_refuses_is_not(
    client: TestClient, body: Any, is_charged: bool
) -> None:
    """Else a tenant at its limit could have the loop read bodies without end."""
    app: Any = client.app
    reception = getattr(app.state, RECEPTION_STATE)
    limited = replace(EVERYBODY, limits=Limits(requests_per_minute=2))
    use = replace(reception, keys=SimpleNamespace(tenant_of=lambda _: limited))
    setattr(app.state, RECEPTION_STATE, use)
    if body is None:
        with use.bodies.of("everybody") as hold:
            hold(64 * 1024 * 1025)
            assert ask(client, b" " * 65 * 1024).status_code == 429
    else:
        ask(client, body)
    assert ask(client, {"model": "base"}).status_code == 200
    last = ask(client, {"model": "base"})
    assert last.status_code == (429 if is_charged else 200)


def test_a_load_ends_with_its_deadline_and_with_whoever_waits_for_it(store: AdapterStore) -> None:
    class Engine:
        async def load(self, _: int, resolved: ResolvedVersion) -> int:
            await asyncio.sleep(30)
            return resolved.version.num_bytes

        async def drop(self, lora_int_id: int) -> None:
            raise AssertionError(lora_int_id)

    directory = ModelDirectory(ServedBase(("base",), "", None), store, Engine(), capacity=1_000_000)
    app = FastAPI()
    app.add_middleware(FrontDoor)
    reception = make_reception(directory)
    setattr(app.state, RECEPTION_STATE, reception)

    async def run() -> None:
        async with client_of(app) as client:
            headers = {"x-rora-deadline-ms": "100"}
            late = await client.post("/v1/completions", json={"model": "good"}, headers=headers)
            assert late.status_code == 504
            assert "it was not loaded in" in late.json()["error"]["message"]
        messages = [{"type": "http.request", "body": b'{"model": "bad"}'}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await asyncio.sleep(0.2)  # by then it waits for the load
            assert reception.admission.in_flight == 1
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            raise AssertionError(message)

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "app": app,
        }  # fmt: skip
        async with asyncio.timeout(5):
            await FrontDoor(app)(scope, receive, send)
        assert reception.admission.in_flight == 0
        assert directory.num_running("bad", [store.resolve("bad").version]) == 0

    asyncio.run(run())


def test_interleaved_requests_keep_their_own_adapters(client: TestClient) -> None:
    """Each request's context is its own, whatever runs between its steps."""
    names = ["good", "base", "bad"] * 6
    app: Any = client.app

    async def ask_all() -> list[str]:
        async with client_of(app) as both:
            answers = await asyncio.gather(
                *(both.post("/v1/completions", json={"model": name}) for name in names)
            )
        return [answer.text for answer in answers]

    assert asyncio.run(ask_all()) == [name * 2 for name in names]


@pytest.mark.parametrize(
    ("hangs_up", "is_whole", "was_answered"),
    [(False, True, True), (True, True, False), (False, False, False)],
    ids=["answered", "hung up before the answer", "broken off"],
)
def test_an_adapter_is_kept_for_what_vllm_may_still_run(
    store: AdapterStore,
    monkeypatch: pytest.MonkeyPatch,
    hangs_up: bool,
    is_whole: bool,
    was_answered: bool,
) -> None:
    """vLLM answers a client that hung up, while its engine still gives the request up."""
    closed: list[bool] = []

    reached = asyncio.Event()

    async def app(_: Any, receive: Any, send: Any) -> None:
        await receive()
        reached.set()
        if hangs_up:
            assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": not is_whole})

    class Engine:
        async def load(self, _: int, resolved: ResolvedVersion) -> int:
            return resolved.version.num_bytes

        async def drop(self, _: int) -> None: ...

    async def run() -> None:
        directory = ModelDirectory(
            ServedBase(("base",), "", None), store, Engine(), capacity=1_000_000
        )
        close = directory.close

        def noted_close(served: ServedAdapter, *, was_answered: bool) -> None:
            closed.append(was_answered)
            close(served, was_answered=was_answered)

        monkeypatch.setattr(directory, "close", noted_close)
        state = State({RECEPTION_STATE: make_reception(directory)})
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [],
            "app": SimpleNamespace(state=state),
        }
        body = json.dumps({"model": "good"}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await (reached if hangs_up else asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        sent = []

        async def send(message: Any) -> None:
            sent.append(message)

        await FrontDoor(app)(scope, receive, send)
        assert any(name == b"x-rora-adapter" for name, _ in sent[0]["headers"])

    asyncio.run(run())
    assert closed == [was_answered]
