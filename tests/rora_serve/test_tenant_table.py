"""A real server with keys: who may do what, all cells, and every way around that we know."""

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from adapters.names import DEFAULT_MODEL_NAME as BASE
from rora_serve.tenants import new_key
from tests.rora_serve.tenant_table import (
    CROSSING,
    GRANTS,
    MAY,
    MISSING,
    NAMES,
    OF_ADAPTERS,
    OF_MODELS,
    KeyedServer,
    Route,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ASK = {"prompt": "Hi", "max_tokens": 1}
TENANTS = tuple(GRANTS)
CHAT = "/v1/chat/completions"
SILENCE_SECONDS = 1.0  # after which no further answer is expected


@pytest.fixture(scope="module")
def client(keyed_server: KeyedServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=keyed_server.server.url, timeout=60) as client:
        yield client


def ask(client: httpx.Client, route: Route, name: str, headers: dict[str, str]) -> httpx.Response:
    options = route.options(name)
    headers = {**options.pop("headers", {}), **headers, "x-request-id": "the-same"}
    path = route.path.replace("NAME", name)
    return client.request(route.method, path, headers=headers, **options)


def seen(answer: httpx.Response, name: str) -> tuple[int, bytes, dict[str, str]]:
    """Return all of an answer but its date and the name that was asked for."""
    headers = {key: value for key, value in answer.headers.items() if key != "date"}
    return answer.status_code, answer.content.replace(name.encode(), b"NAME"), headers


@pytest.mark.parametrize("tenant", TENANTS)
@pytest.mark.parametrize("route", [*OF_MODELS, *OF_ADAPTERS], ids=lambda route: route.id)
def test_a_tenant_does_what_it_may_and_the_rest_is_not_there(
    keyed_server: KeyedServer, client: httpx.Client, tenant: str, route: Route
) -> None:
    """What is forbidden answers as what is missing does: the same bytes, the same headers."""
    headers = keyed_server.bearer(tenant)
    names = [*NAMES, BASE] if route in OF_MODELS and "@" not in route.id else NAMES
    for name in names:
        answer = ask(client, route, name, headers)
        if set(route.needs) & set(MAY[tenant].get(name, ())):
            assert answer.status_code in route.done, (name, answer.text)
            if answer.status_code == 200 and route.path.startswith("/v1/c") and name != BASE:
                assert answer.headers["x-rora-adapter"].startswith(f"{name}@sha256:")
        else:
            assert answer.status_code == route.refused, (name, answer.text)
            assert "x-rora-adapter" not in answer.headers
            missing = MISSING.get(name)
            if missing is not None:
                other = ask(client, route, missing, headers)
                if not set(route.needs) & set(MAY[tenant].get(missing, ())):
                    assert seen(answer, name) == seen(other, missing)


@pytest.mark.parametrize("tenant", TENANTS)
def test_lists_name_what_a_tenant_may_see(
    keyed_server: KeyedServer, client: httpx.Client, tenant: str
) -> None:
    headers = keyed_server.bearer(tenant)
    models = client.get("/v1/models", headers=headers)
    usable = {name for name, rights in MAY[tenant].items() if "use" in rights}
    assert {card["id"] for card in models.json()["data"]} == usable
    listed = client.get("/v1/adapters", headers=headers)
    visible = {name for name, rights in MAY[tenant].items() if {"use", "manage"} & set(rights)}
    assert {card["name"] for card in listed.json()["data"]} == visible - {BASE}
    metrics = client.get("/metrics", headers=headers)
    assert metrics.status_code == (200 if tenant == "operator" else 401)


@pytest.mark.parametrize("name", CROSSING, ids=ascii)
def test_no_name_but_the_right_one_is_the_right_one(
    keyed_server: KeyedServer, client: httpx.Client, name: str
) -> None:
    """In bodies and in paths, as it is and escaped, also for an operator, who may use anything."""
    for tenant in ("acme", "operator"):
        if tenant == "operator" and name == "globex-one@latest":
            continue  # which is one
        headers = keyed_server.bearer(tenant)
        for path in ("/v1/completions", "/tokenize"):
            answer = client.post(path, json={"model": name, **ASK}, headers=headers)
            assert answer.status_code == 404, (tenant, path, answer.text)
            assert answer.json()["error"]["code"] == "model_not_found"
        for path in ("/v1/models/{}", "/v1/adapters/{}", "/v1/adapters/{}/load"):
            method = "POST" if path.endswith("load") else "GET"
            answer = client.request(method, path.format(quote(name, safe="")), headers=headers)
            if name in (".", ".."):  # which clients resolve: /v1/models is a list of one's own
                assert b"globex" not in answer.content or tenant == "operator"
            else:
                assert answer.status_code == 404, (tenant, path, answer.text)


def test_the_right_name_is_the_control(keyed_server: KeyedServer, client: httpx.Client) -> None:
    answer = client.post(
        "/v1/completions", json={"model": "acme-one", **ASK}, headers=keyed_server.bearer("acme")
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-rora-adapter"].startswith("acme-one@sha256:")


def strangers(keyed: KeyedServer) -> dict[str, list[tuple[str, str]]]:
    """Headers that are no key of anybody, though some have one in them."""
    key, other = keyed.keys["operator"], keyed.keys["acme"]
    return {
        "none": [],
        "unknown": [("authorization", f"Bearer {new_key()}")],
        "shortened": [("authorization", f"Bearer {key[:-1]}")],
        "lengthened": [("authorization", f"Bearer {key}A")],
        "upper case": [("authorization", f"Bearer {key.upper()}")],
        "empty": [("authorization", "Bearer")],
        "no scheme": [("authorization", key)],
        "basic": [("authorization", f"Basic {key}")],
        "token": [("authorization", f"Token {key}")],
        "two headers": [("authorization", f"Bearer {key}"), ("authorization", f"Bearer {other}")],
        "twice the same": [("authorization", f"Bearer {key}")] * 2,
        "with a comma": [("authorization", f"Bearer {other}, Bearer {key}")],
        "two keys": [("authorization", f"Bearer {other} {key}")],
        "api-key": [("api-key", key)],
        "x-api-key": [("x-api-key", key)],
        "proxy-authorization": [("proxy-authorization", f"Bearer {key}")],
        "x-authorization": [("x-authorization", f"Bearer {key}")],
        "x-forwarded-authorization": [("x-forwarded-authorization", f"Bearer {key}")],
        "cookie": [("cookie", f"authorization=Bearer {key}; api_key={key}; key={key}")],
        "x-rora-tenant": [("x-rora-tenant", "operator"), ("x-forwarded-user", "operator")],
    }


def test_who_has_no_key_gets_nothing(keyed_server: KeyedServer, client: httpx.Client) -> None:
    routes = (OF_MODELS[0], OF_MODELS[-1], OF_ADAPTERS[0], OF_ADAPTERS[1])
    for kind, headers in strangers(keyed_server).items():
        for route in routes:
            options = route.options("acme-one")
            path = route.path.replace("NAME", "acme-one")
            answer = client.request(route.method, path, headers=headers, **options)
            assert answer.status_code == 401, (kind, route.id, answer.text)
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for path in ("/v1/models", "/v1/adapters", "/metrics"):
            assert client.get(path, headers=headers).status_code == 401, kind
    key = keyed_server.keys["operator"]
    for query in ("api_key", "key", "authorization", "access_token"):
        assert client.get("/v1/models", params={query: key}).status_code == 401
    assert client.get("/health").status_code == client.get("/ready").status_code == 200


def test_browsers_may_ask_and_read_refusals(client: httpx.Client) -> None:
    page = {"origin": "http://page"}
    question = {"access-control-request-method": "POST"}
    question["access-control-request-headers"] = "authorization"
    assert client.options(CHAT, headers=page | question).status_code == 200
    refused = client.post(CHAT, json={}, headers=page)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "http://page"
    assert "x-request-id" in refused.headers["access-control-expose-headers"]
    head = client.head("/health")
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/invocations", "/v1/embeddings", "/v2/completions", "/docs", "//v1/completions",
        "/V1/completions", "/v1/completions/", "/v1//completions", "/x/../v1/completions",
        "/v1/%63ompletions/", "/v1/completions%00", "/v1/completions%0a", "/v1/completions;x",
        "/server_info", "/load", "/pause", "/collective_rpc", "/inference/v1/generate",
        "/v1/messages", "/generative_scoring",
    ],
)  # fmt: skip
def test_a_route_that_is_not_listed_asks_nobody(keyed_server: KeyedServer, path: str) -> None:
    """Sent as it is, since clients tidy paths up."""
    for tenant in ("acme", "operator"):
        body = json.dumps({"model": "globex-one", **ASK}).encode()
        last = b"connection: close\r\ncontent-length: %d\r\n" % len(body)
        (answer,) = raw(keyed_server, request(keyed_server, tenant, body, path=path, more=last))
        assert answer.startswith(b"HTTP/1.1 404"), answer


CLAIMS = (
    "x-rora-tenant", "x-rora-adapter", "x-rora-model", "x-tenant", "x-tenant-id",
    "x-forwarded-user",
    "x-remote-user", "remote-user", "x-model", "model", "openai-model", "openai-organization",
    "openai-project", "x-amzn-sagemaker-adapter-identifier", "x-amzn-sagemaker-custom-attributes",
    "x-sagemaker-adapter-alias", "x-original-url", "x-rewrite-url", "x-http-method-override",
    "x-forwarded-host", "x-forwarded-for", "forwarded", "x-lora-name", "x-vllm-model",
)  # fmt: skip


def test_no_header_claims_another_tenant_or_model(
    keyed_server: KeyedServer, client: httpx.Client
) -> None:
    for value in ("globex", "operator", "globex-one", "text", "/v1/adapters/globex-one"):
        headers = {**dict.fromkeys(CLAIMS, value), **keyed_server.bearer("acme")}
        answer = client.post("/v1/completions", json={"model": "acme-one", **ASK}, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-rora-adapter"].startswith("acme-one@sha256:")
        answer = client.post(
            "/v1/completions", json={"model": "globex-one", **ASK}, headers=headers
        )
        assert answer.status_code == 404
        assert client.get("/v1/adapters/globex-one", headers=headers).status_code == 404


@pytest.mark.parametrize(
    ("body", "adapter"),
    [
        # Of two values of a key the last one counts, to us and to vLLM.
        (b'{"model": "globex-one", "model": "acme-one", %s}', "acme-one"),
        (b'{"model": "acme-one", "model": "globex-one", %s}', None),
        (b'{"model": "acme-one", "\\u006dodel": "globex-one", %s}', None),
        (b'{"\\u006dodel": "globex-one", "model": "acme-one", %s}', "acme-one"),
        (b'{"model": "acme-one", "Model": "globex-one", "MODEL": "globex-one", %s}', "acme-one"),
        (b'{"model": "acme-one", "lora_name": "globex-one", %s}', "acme-one"),
        (b'{"model": ["globex-one"], %s}', None),
        (b'{"model": {"id": "globex-one"}, %s}', None),
        (b'[{"model": "globex-one", %s}]', None),
        (b'\xef\xbb\xbf{"model": "globex-one", %s}', None),
        (b"model=globex-one&prompt=Hi&max_tokens=1", None),
        (b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nglobex-one\r\n--x--', None),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "kind",
    ["application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"],
)
def test_no_body_means_another_model_to_vllm_than_to_us(
    keyed_server: KeyedServer, client: httpx.Client, body: bytes, adapter: str | None, kind: str
) -> None:
    if b"%s" in body:
        body = body.replace(b"%s", b'"prompt": "Hi", "max_tokens": 1')
    headers = {**keyed_server.bearer("acme"), "content-type": kind}
    answer = client.post(
        "/v1/completions", params={"model": "globex-one"}, content=body, headers=headers
    )
    if adapter is None or kind != "application/json":
        assert 400 <= answer.status_code < 500, answer.text
    else:
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-rora-adapter"].startswith(f"{adapter}@sha256:")
    assert "globex" not in answer.headers.get("x-rora-adapter", "")


def request(
    keyed: KeyedServer,
    tenant: str,
    body: bytes,
    *,
    path: str = "/v1/completions",
    more: bytes = b"",
) -> bytes:
    """Return a request as it is sent; `more` headers may contradict its length."""
    length = b"" if b"ontent-" in more else b"content-length: %d\r\n" % len(body)
    start = f"POST {path} HTTP/1.1\r\nhost: server\r\ncontent-type: application/json\r\n"
    key = f"authorization: Bearer {keyed.keys[tenant]}\r\n"
    return (start + key).encode() + length + more + b"\r\n" + body


def raw(keyed: KeyedServer, content: bytes) -> list[bytes]:
    """Send bytes and leave it to the server to end the connection. Returns: all that it answers."""
    url = httpx.URL(keyed.server.url)
    found = b""
    with socket.create_connection((url.host, url.port or 80), timeout=30) as connection:
        connection.sendall(content)
        with suppress(TimeoutError, ConnectionError):
            while piece := connection.recv(65536):
                found += piece
                connection.settimeout(SILENCE_SECONDS)
    return [b"HTTP/1.1 " + part for part in found.split(b"HTTP/1.1 ")[1:]]


def test_a_request_has_one_length_and_what_hides_in_it_has_no_key(
    keyed_server: KeyedServer,
) -> None:
    """What a proxy in front may read as another request than we do gets nobody else's rights."""
    own = json.dumps({"model": "acme-one", **ASK}).encode()
    # On a connection that had a key before.
    hidden = b"GET /v1/adapters/globex-one HTTP/1.1\r\nhost: server\r\n\r\n"
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(own), own)
    lengths = {
        "both, chunked body": (
            b"content-length: %d\r\ntransfer-encoding: chunked\r\n" % len(chunked), chunked
        ),
        "both, short length": (
            b"content-length: 4\r\ntransfer-encoding: chunked\r\n", chunked + hidden
        ),
        "both, nothing in chunks": (
            b"content-length: %d\r\ntransfer-encoding: chunked\r\n" % (5 + len(hidden)),
            b"0\r\n\r\n" + hidden,
        ),
        "two lengths": (b"content-length: %d\r\ncontent-length: 4\r\n" % len(own), own + hidden),
        "a length in words": (b"content-length: +%d\r\n" % len(own), own),
        "two codings": (
            b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\ncontent-x: y\r\n",
            chunked,
        ),
        "a strange coding": (b"transfer-encoding: xchunked\r\ncontent-x: y\r\n", chunked),
        "a space before the colon": (b"content-length : %d\r\n" % len(own), own),
    }  # fmt: skip
    for kind, (more, body) in lengths.items():
        answers = raw(keyed_server, request(keyed_server, "acme", body, more=more))
        assert answers, kind
        for answer in answers:
            assert int(answer.split()[1]) in (200, 400, 401), (kind, answer)
            assert b"globex" not in answer, (kind, answer)
            if answer.startswith(b"HTTP/1.1 200"):
                assert b"x-rora-adapter: acme-one@sha256:" in answer, (kind, answer)
    # The control: both requests are seen where each says honestly where it ends.
    first, second = raw(keyed_server, request(keyed_server, "acme", own) + hidden)
    assert first.startswith(b"HTTP/1.1 200"), first
    assert second.startswith(b"HTTP/1.1 401"), second


@pytest.mark.parametrize("tenant", ["operator", "guest"])
def test_an_adapter_named_like_a_kind_of_content_takes_no_base_request(
    keyed_server: KeyedServer, client: httpx.Client, tenant: str
) -> None:
    """vLLM looks a request's kinds of content up among the adapters' names."""
    question = "Name three colours."

    def answer_of(model: str, content: Any, caller: str) -> httpx.Response:
        body = {
            "model": model, "messages": [{"role": "user", "content": content}],
            "max_tokens": 8, "temperature": 0,
        }  # fmt: skip
        return client.post(CHAT, json=body, headers=keyed_server.bearer(caller))

    def text_of(answer: httpx.Response) -> str:
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    expected = text_of(answer_of(BASE, question, tenant))
    for kind in ("text", "input_text"):
        answer = answer_of(BASE, [{"type": kind, "text": question}], tenant)
        if answer.status_code == 200:
            assert text_of(answer) == expected
            assert "x-rora-adapter" not in answer.headers
        else:
            assert kind != "text"
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    answer = answer_of(BASE, [{"type": "text", "text": question}, picture], tenant)
    assert 400 <= answer.status_code < 500, answer.text
    # The control: those adapters answer otherwise, so they would be noticed.
    for name in ("text", "image"):
        assert text_of(answer_of(name, question, "operator")) != expected
