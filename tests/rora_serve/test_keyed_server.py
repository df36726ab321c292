"""A real server with keys and traces: what it keeps apart, declares and tells."""

import json
import statistics
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.names import DEFAULT_MODEL_NAME as BASE
from adapters.tolerance import TOLERANCES
from rora_serve.api.allowed import MODEL_ROUTES
from tests.rora_serve.conftest import Oracle
from tests.rora_serve.serving import ask_together
from tests.rora_serve.tenant_table import NAMES, SPARING, KeyedServer
from tests.rora_serve.test_schemathesis import CONFIG, ask

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

BLOCK = 64  # tokens: what the CPU's cache of prefixes keeps together


@pytest.fixture(scope="module")
def client(keyed_server: KeyedServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=keyed_server.server.url, timeout=60) as client:
        yield client


def lines_of(keyed: KeyedServer) -> list[dict[str, Any]]:
    """Return what the log says of requests that have ended."""
    lines = keyed.server.log.read_text(errors="replace").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def line_of(keyed: KeyedServer, request_id: str) -> dict[str, Any]:
    """Return the line of the log about a request, which comes when it has ended."""
    for _ in range(100):
        for line in lines_of(keyed):
            if line["request_id"] == request_id:
                return line
        time.sleep(0.05)
    raise AssertionError("the request has no line")


@pytest.mark.parametrize(
    ("model", "first", "second"), [("shared-one", "acme", "globex"), (BASE, "acme", "guest")]
)
def test_a_tenants_prefix_is_in_nobody_elses_cache(
    keyed_server: KeyedServer, client: httpx.Client, model: str, first: str, second: str
) -> None:
    prompt = [(7 * place) % 4000 + 50 for place in range(2 * BLOCK + 10)]

    def cached(tenant: str, request_id: str, **options: str) -> int:
        headers = {**keyed_server.bearer(tenant), "x-request-id": request_id}
        body = {"model": model, "prompt": prompt, "max_tokens": 1, **options}
        answer = client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return int(line_of(keyed_server, request_id)["cached_tokens"])

    assert cached(first, f"{model}-1") == 0
    assert cached(first, f"{model}-2") == 2 * BLOCK
    assert cached(second, f"{model}-3") == 0
    assert cached(second, f"{model}-4") == 2 * BLOCK
    # A client's own salt parts its prefixes further, and brings it to nobody else's.
    assert cached(first, f"{model}-5", cache_salt="mine") == 0
    assert cached(second, f"{model}-6", cache_salt="mine") == 0


def test_a_request_has_one_span_under_its_clients_trace(
    keyed_server: KeyedServer, client: httpx.Client
) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {
        **keyed_server.bearer("acme"),
        "traceparent": f"00-{trace}-{parent}-01",
        "x-request-id": "traced",
    }
    body = {"model": "acme-one", "prompt": "Hi", "max_tokens": 3, "ignore_eos": True}
    assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
    span = keyed_server.collector.of_trace(trace)
    assert span.parent_id == parent
    assert "traced" in span.attributes["gen_ai.request.id"]
    assert span.attributes["gen_ai.usage.completion_tokens"] == 3


def test_in_bfloat16_each_adapter_answers_as_peft_does(
    keyed_server: KeyedServer, default_model: Path, prompts: list[tuple[int, ...]]
) -> None:
    """All in one batch, beside PEFT in float32; the control is to take another adapter's."""
    folders = {name: keyed_server.store.resolve(name).folder for name in NAMES}
    oracle = Oracle(default_model, folders)
    models = [BASE, *NAMES]
    found = ask_together(
        keyed_server.server,
        [(model, prompt) for prompt in prompts for model in models],
        num_tokens=8,
        key=keyed_server.keys["operator"],
    )
    for at, model in enumerate(models):
        answers = found[at :: len(models)]

        means = {
            name: statistics.mean(chain(*(oracle.differences(name, each) for each in answers)))
            for name in models
        }
        own = means.pop(model)
        print("mean difference in bfloat16:", model, own, "of others:", min(means.values()))
        assert own < TOLERANCES["bfloat16"].mean
        assert min(means.values()) > 2 * own


@pytest.mark.parametrize("path", sorted(MODEL_ROUTES))
def test_vllms_own_routes_answer_what_the_document_declares(
    keyed_server: KeyedServer, tmp_path: Path, path: str
) -> None:
    """What they take and refuse besides what their schemas say is left out in the configuration."""
    config = tmp_path / "config.toml"
    key = f'headers = {{ authorization = "Bearer {keyed_server.keys[SPARING]}" }}\n'
    config.write_text(key + CONFIG.read_text())
    options = ["--include-name", f"POST {path}", "--max-examples", "20"]
    # "coverage" has more than ten thousand cases for the schema of responses.
    phase = "fuzzing" if path == "/v1/responses" else "coverage,fuzzing"
    options += ["--phases", phase]
    found = ask(f"{keyed_server.server.url}/openapi.json", *options, folder=tmp_path, config=config)
    assert found.returncode == 0, found.stdout + found.stderr
    statuses = {
        line["status"]
        for line in lines_of(keyed_server)
        if (line["tenant"], line["path"]) == (SPARING, path)
    }
    # None of the completions that it makes up is one; clients' tests ask for those.
    expected = {400} if path == "/v1/completions" else {200, 400}
    assert expected <= statuses, "it was asked, and answered"
