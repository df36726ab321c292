"""Keys, rights, limits, turns and what is not for clients to say, at the front door."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from adapters import AdapterStore
from rora_serve.api.front_door import FrontDoor
from rora_serve.api.model_request import ModelRequest, read_model_request
from rora_serve.api.plugin import let_browsers_read
from rora_serve.key_file import KeyFile
from rora_serve.tenants import EVERYBODY, Limits, Tenant
from tests.rora_serve.echo_server import ACME, OPERATOR, ROUTES, TIRED, Server, write_keys
from tests.rora_serve.reaching import client_of
from tests.workloads import set_alpha


@pytest.fixture
def store(tmp_path: Path, adapter: Path) -> AdapterStore:
    store = AdapterStore(tmp_path / "store")
    for name in ("acme-one", "other"):
        store.add(adapter, name=name)
    return store


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    return write_keys(tmp_path / "keys.toml")


def run(what: Any) -> None:
    asyncio.run(what)


@pytest.mark.parametrize("key", [None, "rora-wrong", OPERATOR[:-1], f"{OPERATOR} {ACME}"])
def test_without_a_known_key_only_health_is_told(
    store: AdapterStore, keys: KeyFile, key: str | None
) -> None:
    async def test() -> None:
        server = Server(store, keys)
        for path in ROUTES:
            answer = await server.ask(key=key, path=path)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert await server.get("/v1/models", key) == 401
        assert await server.get("/metrics", key) == 401
        assert await server.get("/health", key) == 200
        assert server.num_inside == 0

    run(test())


@pytest.mark.parametrize(
    ("key", "model", "status"),
    [
        (OPERATOR, "base", 200), (OPERATOR, "acme-one", 200), (OPERATOR, "other", 200),
        (OPERATOR, "nobody", 404),
        (ACME, "base", 404), (ACME, "acme-one", 200), (ACME, "acme-one@latest", 200),
        (ACME, "other", 404), (ACME, "other@latest", 404), (ACME, "acme-two", 404),
        (ACME, "Acme-one", 404), (ACME, "\u0430cme-one", 404), (ACME, "acme-one/../other", 404),
        (TIRED, "base", 200), (TIRED, "acme-one", 404), (TIRED, "other", 404),
    ],
)  # fmt: skip
def test_a_tenant_uses_what_it_may_and_the_rest_is_not_there(
    store: AdapterStore, keys: KeyFile, key: str, model: str, status: int
) -> None:
    async def test() -> None:
        server = Server(store, keys)
        answer = await server.ask(model, key=key)
        assert answer.status_code == status
        if status == 404:
            message = f"The model {model!r} does not exist."
            assert answer.json()["error"]["message"] == message
            assert server.num_inside == 0

    run(test())


def test_metrics_of_all_tenants_are_for_operators(store: AdapterStore, keys: KeyFile) -> None:
    async def test() -> None:
        server = Server(store, keys)
        assert await server.get("/metrics", OPERATOR) == 200
        assert await server.get("/metrics", ACME) == 401
        assert await Server(store, None).get("/metrics") == 200

    run(test())


def test_nothing_that_a_client_claims_makes_it_another_tenant(
    store: AdapterStore, keys: KeyFile
) -> None:
    async def test() -> None:
        server = Server(store, keys)
        for headers in (
            [("x-tenant", "operator")],
            [("x-rora-tenant", "operator")],
            [("openai-organization", "operator")],
            [("x-model", "other")],
            [("x-vllm-model", "other")],
        ):
            assert (await server.ask("other", key=ACME, headers=headers)).status_code == 404
        twice = [("authorization", f"Bearer {OPERATOR}"), ("authorization", f"Bearer {ACME}")]
        assert (await server.ask("other", headers=twice)).status_code == 401
        assert (await server.ask("acme-one", key=ACME, user="operator")).status_code == 200

    run(test())


def test_what_steers_vllm_is_taken_out_and_a_tenants_salt_put_in(
    store: AdapterStore, keys: KeyFile
) -> None:
    async def test() -> None:
        server = Server(store, keys)
        given: dict[str, Any] = {
            "priority": -9, "kv_transfer_params": {"a": 1}, "vllm_xargs": {"b": 2},
            "session_id": "s", "request_id": "r", "cache_salt": "own", "temperature": 0,
        }  # fmt: skip
        headers = [("x-vllm-priority", "-9"), ("x-session-id", "s"), ("x-request-id", "mine-1")]
        found = (await server.ask("acme-one", key=ACME, headers=headers, **given)).json()
        salt = found["body"].pop("cache_salt")
        assert found["body"] == {"model": "acme-one", "temperature": 0, "max_tokens": 7}
        assert salt.endswith(".own")
        assert len(salt) > 30
        assert found["headers"]["x-request-id"] == "mine-1"
        assert not {"x-vllm-priority", "x-session-id"} & set(found["headers"])
        other = (await server.ask("acme-one", key=OPERATOR, cache_salt="own")).json()["body"]
        assert other["cache_salt"] != salt
        plain = await Server(store, None).ask("other", cache_salt="own")
        assert plain.json()["body"]["cache_salt"] == "own"

    run(test())


def test_a_request_whose_version_was_removed_while_it_waited_gets_what_its_name_means(
    store: AdapterStore, adapter: Path, tmp_path: Path
) -> None:
    """Whoever removes it offline sees no lease, since nothing of it was in memory yet."""
    copy = tmp_path / "another"
    shutil.copytree(adapter, copy)
    set_alpha(copy, 3)
    old = store.resolve("other").version.digest
    store.remove("acme-one", force=True)  # which holds the same version

    async def wait_for(what: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not what():
                await asyncio.sleep(0.01)

    async def test() -> None:
        server = Server(store, places=1)
        server.gate.clear()
        running = asyncio.create_task(server.ask("base"))
        await wait_for(lambda: server.num_inside == 1)
        models = ("other", f"other@sha256:{old}")
        waiting = [asyncio.create_task(server.ask(model)) for model in models]
        await wait_for(lambda: server.reception.admission.num_waiting == 2)
        added = store.add(copy, name="other")
        store.remove(f"other@sha256:{old}", force=True)
        assert old in store.collect_garbage().digests
        server.gate.set()
        await running
        by_name, by_digest = await asyncio.gather(*waiting)
        assert by_name.status_code == 200
        assert by_name.headers["x-rora-adapter"] == added.public_id
        assert by_digest.status_code == 404

    run(test())


@pytest.mark.parametrize(
    ("path", "key"), [("/v1/chat/completions", "messages"), ("/v1/responses", "input")]
)
def test_names_of_images_are_not_for_clients(store: AdapterStore, path: str, key: str) -> None:
    """vLLM would answer one tenant from an image that another one sent under the same name."""
    named = {"type": "image_url", "image_url": {"url": "data:,"}, "uuid": "logo"}
    text = {"type": "text", "text": "uuid"}
    said = [{"role": "user", "content": [text, named]}, {"role": "user", "content": "uuid"}, "x"]

    async def test() -> None:
        body: dict[str, Any] = {key: said}
        found = (await Server(store, None).ask("other", path=path, **body)).json()["body"]
        assert found[key][0]["content"] == [text, {k: named[k] for k in ("type", "image_url")}]
        assert found[key][1:] == said[1:]

    run(test())


@pytest.mark.parametrize(
    ("path", "given", "expected"),
    [
        ("/v1/completions", {}, {"max_tokens": 7}),
        ("/v1/completions", {"max_tokens": 3}, {"max_tokens": 3}),
        ("/v1/completions", {"max_tokens": 8}, {"max_tokens": 7}),
        ("/v1/completions", {"max_tokens": "900"}, {"max_tokens": 7}),
        ("/v1/completions", {"max_tokens": None}, {"max_tokens": 7}),
        ("/v1/chat/completions", {}, {"max_completion_tokens": 7}),
        ("/v1/chat/completions", {"max_tokens": 9}, {"max_tokens": 7}),
        (
            "/v1/chat/completions",
            {"max_tokens": 9, "max_completion_tokens": 5},
            {"max_tokens": 7, "max_completion_tokens": 5},
        ),
        ("/v1/completions", {"max_tokens": "many"}, {"max_tokens": "many"}),
        (
            "/v1/responses",
            {"max_output_tokens": 1e9},
            {"max_output_tokens": 7, "store": False},
        ),
        ("/tokenize", {}, {}),
    ],
)
def test_tokens_are_capped_at_the_tenants_most(
    path: str, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    tenant = Tenant("acme", limits=Limits(max_tokens=7))
    assert body_of(given, path, tenant) == expected


@pytest.mark.parametrize(
    ("body", "number"),
    [
        ({}, 1), ({"n": 3}, 3), ({"n": 0}, 1), ({"n": "3"}, 3), ({"n": 64.0}, 64),
        ({"n": "64.0"}, 64),
        ({"n": "x"}, 1), ({"prompt": "a"}, 1),
        ({"prompt": ["a", "b"]}, 2), ({"prompt": ["a", "b"], "n": 4}, 8),
        ({"prompt": [1, 2, 3]}, 1), ({"prompt": [[1, 2], [3]]}, 2), ({"prompt": []}, 1),
    ],
)  # fmt: skip
def test_a_request_costs_its_sequences(body: dict[str, Any], number: int) -> None:
    assert read(body, "/v1/completions").num_sequences == number


def test_of_two_values_of_one_key_vllm_gets_the_one_that_was_looked_at() -> None:
    body = b'{"model": "mine", "model": "other", "priority": 1, "priority": 2}'
    found = read_model_request(body, "/v1/completions", EVERYBODY, max_model_len=1024)
    assert found.model == "other"
    assert json.loads(found.body) == {"model": "other"}


def test_a_response_ends_with_its_request() -> None:
    """vLLM refuses one in the background unless it is stored, by whatever it takes for true."""
    for given in ({}, {"store": True}, {"store": "false", "background": True}):
        assert body_of(given, "/v1/responses")["store"] is False
    assert "store" not in body_of({}, "/v1/completions")


def test_a_cap_is_no_more_than_the_model_takes() -> None:
    tenant = Tenant("acme", limits=Limits(max_tokens=4096))
    assert body_of({}, "/v1/chat/completions", tenant) == {"max_completion_tokens": 1024}
    assert body_of({}, "/v1/completions", tenant) == {"max_tokens": 16}


def read(given: dict[str, Any], path: str, tenant: Tenant = EVERYBODY) -> ModelRequest:
    body = json.dumps({"model": "mine", **given}).encode()
    return read_model_request(body, path, tenant, max_model_len=1024)


def body_of(given: dict[str, Any], path: str, tenant: Tenant = EVERYBODY) -> dict[str, Any]:
    """What vLLM gets beside the model."""
    body: dict[str, Any] = json.loads(read(given, path, tenant).body)
    assert body.pop("model") == "mine"
    return body


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/adapters", "/metrics", "/invocations"])
def test_browsers_read_refusals_and_their_questions_open_nothing(
    store: AdapterStore, keys: KeyFile, path: str
) -> None:
    async def test() -> None:
        server = Server(store, keys)
        cors = Middleware(CORSMiddleware, allow_origins=["http://page"], allow_methods=["*"])
        server.app.user_middleware.append(cors)  # inside the front door, as vLLM has it
        server.app.middleware_stack = server.app.build_middleware_stack()
        let_browsers_read(server.app)
        question = {"origin": "http://page", "access-control-request-method": "POST"}
        async with client_of(server.app) as client:
            asked = await client.options(path, headers=question)
            refused = await client.post(path, headers={"origin": "http://page"})
            others = await client.post(path, headers={"origin": "http://another"})
            plain = await client.options(path)
        assert asked.text == "OK"
        assert asked.headers["access-control-allow-origin"] == "http://page"
        assert refused.status_code in (401, 404)
        assert refused.headers["access-control-allow-origin"] == "http://page"
        assert "retry-after" in refused.headers["access-control-expose-headers"]
        assert "access-control-allow-origin" not in others.headers
        assert plain.status_code == 404

    run(test())


def test_a_version_that_is_waited_for_counts_as_running(store: AdapterStore) -> None:
    async def test() -> None:
        server = Server(store, None, places=1)
        server.gate.clear()
        directory = server.reception.directory
        first = asyncio.create_task(server.ask("acme-one"))
        await wait_until(lambda: server.num_inside == 1)
        second = asyncio.create_task(server.ask("other"))
        await wait_until(lambda: server.reception.admission.num_waiting == 1)
        versions = store.record("other").versions
        assert directory.num_running("other", versions) == 1
        server.gate.set()
        await asyncio.gather(first, second)
        assert directory.num_running("other", versions) == 0

    run(test())


def test_a_tenant_above_its_limit_is_told_when_to_come_again(
    store: AdapterStore, keys: KeyFile
) -> None:
    async def test() -> None:
        server = Server(store, keys)
        assert (await server.ask(key=TIRED)).status_code == 200
        answer = await server.ask(key=TIRED)
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert "requests_per_minute is 1" in answer.json()["error"]["message"]
        assert (await server.ask(key=OPERATOR)).status_code == 200

        async def body() -> AsyncIterator[bytes]:
            raise AssertionError("what is refused is not read")
            yield b""

        async with client_of(server.app) as client:
            headers = {"authorization": f"Bearer {TIRED}"}
            unread = await client.post("/v1/completions", content=body(), headers=headers)
        assert unread.status_code == 429

    run(test())


def test_a_request_that_finds_no_place_in_time_costs_nothing(
    store: AdapterStore, keys: KeyFile
) -> None:
    async def test() -> None:
        server = Server(store, keys, places=1)
        server.gate.clear()
        first = asyncio.create_task(server.ask(key=OPERATOR))
        await wait_until(lambda: server.reception.admission.in_flight == 1)
        late = await server.ask(key=TIRED, headers=[("x-rora-deadline-ms", "20")])
        assert late.status_code == 504
        server.gate.set()
        await first
        assert (await server.ask(key=TIRED)).status_code == 200
        assert (await server.ask(key=TIRED)).status_code == 429

    run(test())


def test_an_upload_counts_as_a_request(store: AdapterStore, keys: KeyFile) -> None:
    async def test() -> None:
        server = Server(store, keys)
        assert (await server.ask(key=TIRED, path="/v1/adapters")).status_code == 200
        answer = await server.ask(key=TIRED, path="/v1/adapters")
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 60

    run(test())


async def wait_until(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came to that")


def test_no_more_requests_are_inside_than_the_engine_runs_and_the_rest_wait_or_are_refused(
    store: AdapterStore,
) -> None:
    async def test() -> None:
        server = Server(store, None, places=2)
        server.gate.clear()
        admission = server.reception.admission
        asked = [asyncio.create_task(server.ask("other")) for _ in range(3)]
        await wait_until(lambda: admission.num_waiting == 1)
        asked += [asyncio.create_task(server.ask("base", n=2))]
        await wait_until(lambda: admission.num_waiting == 2)
        assert admission.in_flight == 2
        late = await server.ask(headers=[("x-rora-deadline-ms", "20")])
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "deadline_exceeded"
        more = [asyncio.create_task(server.ask("other")) for _ in range(40)]
        await wait_until(lambda: any(task.done() for task in more))
        refused = next(task.result() for task in more if task.done())
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "overloaded"
        server.gate.set()
        answers = await asyncio.gather(*asked, *more)
        assert {answer.status_code for answer in answers} == {200, 429}
        assert [answer.status_code for answer in answers[:4]] == [200] * 4
        assert (admission.in_flight, admission.num_waiting) == (0, 0)

    run(test())


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "soon", "99999999999", "\u0661"])
def test_a_deadline_is_a_number_of_milliseconds(store: AdapterStore, text: str) -> None:
    async def test() -> None:
        headers: Any = [("x-rora-deadline-ms", text.encode())]
        answer = await Server(store, None).ask(headers=headers)
        assert answer.status_code == 400
        assert "one whole number of milliseconds" in answer.json()["error"]["message"]

    run(test())


def test_a_client_that_hangs_up_while_it_waits_leaves_nothing_behind(store: AdapterStore) -> None:
    async def test() -> None:
        server = Server(store, None, places=1)
        server.gate.clear()
        admission = server.reception.admission
        first = asyncio.create_task(server.ask("other"))
        await wait_until(lambda: server.num_inside == 1)
        hung_up = asyncio.Event()
        messages: list[Any] = [{"type": "http.request", "body": b'{"model": "other"}'}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await hung_up.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            raise AssertionError(f"nobody is there for {message}")

        scope: Any = {
            "type": "http", "method": "POST", "path": "/v1/completions", "headers": [],
            "app": SimpleNamespace(state=server.app.state),
        }  # fmt: skip

        async def never(*_: Any) -> None:
            raise AssertionError("it was never let in")

        second = asyncio.create_task(FrontDoor(never)(scope, receive, send))
        await wait_until(lambda: admission.num_waiting == 1)
        hung_up.set()
        await second
        assert (admission.in_flight, admission.num_waiting) == (1, 0)
        server.gate.set()
        assert (await first).status_code == 200
        assert admission.in_flight == 0

    run(test())


def test_each_request_is_counted_and_says_where_its_adapter_was(
    store: AdapterStore, keys: KeyFile
) -> None:
    async def test() -> None:
        server = Server(store, keys)
        tiers = [(await server.ask("other", key=OPERATOR)).headers["x-rora-tier"] for _ in range(2)]
        assert tiers == ["store", "host"]
        answer = await server.ask("acme-one", key=ACME, headers=[("x-request-id", "a b")])
        assert float(answer.headers["x-rora-load-ms"]) >= 0
        assert answer.headers["x-rora-adapter"] == store.resolve("acme-one").public_id
        assert len(answer.headers["x-request-id"]) == 32
        await server.ask("no-such-name", key=ACME)
        registry = CollectorRegistry()
        registry.register(server.reception.metrics)
        page = generate_latest(registry).decode()
        for line in (
            'rora_requests_total{adapter="other",status="200"} 2.0',
            'rora_requests_total{adapter="acme-one",status="200"} 1.0',
            'rora_requests_total{adapter="none",status="404"} 1.0',
            'rora_tenant_requests_total{status="404",tenant="acme"} 1.0',
            'rora_refusals_total{reason="model_not_found"} 1.0',
            'rora_tier_hits_total{adapter="other",tier="store"} 1.0',
        ):
            names = line.partition("{")[0]
            found = [row for row in page.splitlines() if row.startswith(names)]
            assert line in page or _same(line, found), (line, found)
        assert "no-such-name" not in page

    run(test())


def _same(line: str, found: Sequence[str]) -> bool:
    """Labels may come in another order."""
    return sorted(line) in [sorted(row) for row in found]
