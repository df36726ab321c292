"""What real clients make of the front door's refusals, over HTTP."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from adapters import AdapterStore
from tests.rora_serve.echo_server import ACME, TIRED, Server, write_keys
from tests.rora_serve.node_client import NodeClient
from tests.rora_serve.reaching import listening

WRONG = "rora-wrong"
Ask = Callable[[str, str, str], object]


@pytest.fixture
def url(tmp_path: Path, adapter: Path) -> Iterator[str]:
    """A server with keys, where one tenant has asked all that it may in this minute."""
    store = AdapterStore(tmp_path / "store")
    store.add(adapter, name="other")
    with listening(Server(store, write_keys(tmp_path / "keys.toml")).app) as url:
        answer = httpx.post(
            f"{url}/v1/completions",
            json={"model": "base"},
            headers={"authorization": f"Bearer {TIRED}"},
        )
        assert answer.status_code == 200
        yield url


def ask_openai(url: str, key: str, model: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hi"}])


def ask_langchain(url: str, key: str, model: str) -> None:
    api_key = SecretStr(key)
    ChatOpenAI(model=model, base_url=f"{url}/v1", api_key=api_key, max_retries=0).invoke("Hi")


@pytest.mark.parametrize("ask", [ask_openai, ask_langchain])
def test_python_clients_raise_what_their_users_catch(url: str, ask: Ask) -> None:
    with pytest.raises(openai.AuthenticationError, match="A key is expected") as wrong:
        ask(url, WRONG, "base")
    assert code_of(wrong.value) == "invalid_api_key"
    with pytest.raises(openai.NotFoundError, match="The model 'other' does not exist") as missing:
        ask(url, ACME, "other")
    assert code_of(missing.value) == "model_not_found"
    with pytest.raises(openai.RateLimitError, match="requests_per_minute is 1") as limited:
        ask(url, TIRED, "base")
    assert code_of(limited.value) == "rate_limit_exceeded"
    assert 1 <= int(limited.value.response.headers["retry-after"]) <= 60


def code_of(error: Any) -> object:
    return error.code


@pytest.mark.node
def test_the_node_client_throws_what_its_users_catch(url: str, node_client: NodeClient) -> None:
    keys = json.dumps({"acme": ACME, "tired": TIRED})
    node_client.run("--test", "refused.test.mjs", RORA_URL=url, KEYS=keys)


@pytest.mark.parametrize(
    ("key", "model", "status", "header"),
    [
        (WRONG, "base", "401", "www-authenticate: Bearer"),
        (ACME, "other", "404", ""),
        (TIRED, "base", "429", "retry-after: "),
    ],
    ids=["unknown key", "another's adapter", "limit reached"],
)
def test_curl_is_told_why(url: str, key: str, model: str, status: str, header: str) -> None:
    body = json.dumps({"model": model, "messages": []})
    result = subprocess.run(
        ["curl", "--silent", "--show-error", "--fail-with-body", "--include", "--json", body,
         "--header", f"authorization: Bearer {key}", f"{url}/v1/chat/completions"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 22, result.stderr
    assert result.stdout.startswith(f"HTTP/1.1 {status} ")
    assert header in result.stdout
