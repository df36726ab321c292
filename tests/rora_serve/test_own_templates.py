"""Adapters with a chat template of their own, beside others, against transformers' rendering."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.names import DEFAULT_MODEL_NAME as BASE
from tests.rora_serve.conftest import OWN_TEMPLATE
from tests.rora_serve.serving import Server
from trainer.model import load_tokenizer

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


def post(server: Server, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=120)


def expected(base: Path, template: str | None) -> list[int]:
    encoded: Any = load_tokenizer(base).apply_chat_template(
        MESSAGES, chat_template=template, add_generation_prompt=True
    )
    return list(encoded["input_ids"])


def test_each_request_is_written_by_its_own_adapters_template(
    server: Server, default_model: Path
) -> None:
    own, plain = expected(default_model, OWN_TEMPLATE), expected(default_model, None)
    assert own != plain
    names = ["templated", BASE, "lora-8"] * 4

    def ask(name: str) -> tuple[list[int], list[int]]:
        tokens = post(server, "/tokenize", {"model": name, "messages": MESSAGES}).json()["tokens"]
        limits = {"model": name, "temperature": 0}
        chat = post(
            server, "/v1/chat/completions", {**limits, "messages": MESSAGES, "max_tokens": 1}
        )
        response = post(
            server, "/v1/responses", {**limits, "input": MESSAGES, "max_output_tokens": 1}
        )
        used = [chat.json()["usage"]["prompt_tokens"], response.json()["usage"]["input_tokens"]]
        return tokens, used

    with ThreadPoolExecutor(len(names)) as pool:
        for name, (tokens, used) in zip(names, pool.map(ask, names), strict=True):
            wanted = own if name == "templated" else plain
            assert tokens == wanted, name
            assert used == [len(wanted)] * 2, name


def test_calls_of_tools_are_read_before_they_are_written(server: Server) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = {"role": "assistant", "content": "x", "tool_calls": [call]}
    for path in ("/tokenize", "/v1/chat/completions"):
        body = {"model": "templated", "messages": [*MESSAGES, said, MESSAGES[1]]}
        answer = post(server, path, body | {"max_tokens": 1})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "no tools here"),
        ({"chat_template": "{{ 1 }}"}, "--trust-request-chat-template"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "--trust-request-chat-template"),
    ],
)
def test_what_a_template_does_not_take_is_the_clients_mistake(
    server: Server, change: dict[str, Any], reason: str
) -> None:
    body = {"model": "templated", "messages": MESSAGES, "max_tokens": 1, **change}
    answer = post(server, "/v1/chat/completions", body)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]["message"]
