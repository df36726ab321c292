"""curl and the official Node client against a real server, and the examples of docs/http-api.md."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters import AdapterStore
from tests.rora_serve.node_client import NodeClient
from tests.rora_serve.serving import Server, ends_within, requests_in_flight

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

MODEL = "lora-8@latest"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "is_capital": {"type": "boolean"}},
    "required": ["city", "is_capital"],
    "additionalProperties": False,
}
DOCUMENT = Path(__file__).parents[2] / "docs" / "http-api.md"


@pytest.mark.node
def test_the_node_client_gets_what_it_expects(server: Server, node_client: NodeClient) -> None:
    node_client.run("--test", "served.test.mjs", RORA_URL=server.url)


def curl_command(server: Server, path: str, body: dict[str, Any] | None) -> list[str]:
    sent = [] if body is None else ["--json", json.dumps(body)]
    return ["curl", "--silent", "--show-error", "--max-time", "60", *sent, f"{server.url}{path}"]


def curl(server: Server, path: str, *options: str, body: dict[str, Any] | None = None) -> str:
    command = [*curl_command(server, path, body), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def chat(**options: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 16, **options}


def ask(server: Server, **options: Any) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(curl(server, CHAT, body=chat(**options)))
    return answer


def texts_of(answer: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


def test_curl_chats_and_streams_the_same(server: Server) -> None:
    whole = ask(server)
    assert whole["model"] == MODEL
    options = {"stream": True, "stream_options": {"include_usage": True}}
    lines = curl(server, CHAT, body=chat(**options)).splitlines()
    assert set(lines[1::2]) == {""}
    *events, end = [line.removeprefix("data: ") for line in lines[::2]]
    assert end == "[DONE]"
    *chunks, last = map(json.loads, events)
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert ["".join(deltas)] == texts_of(whole)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]


def test_curl_lists_and_retrieves_models(server: Server) -> None:
    listed = [card["id"] for card in json.loads(curl(server, "/v1/models"))["data"]]
    assert "lora-8" in listed
    assert json.loads(curl(server, "/v1/models/lora-8"))["id"] == "lora-8"


def test_curl_gets_log_probs_and_usage(server: Server) -> None:
    answer = ask(server, logprobs=True, top_logprobs=2, ignore_eos=True)
    tokens = answer["choices"][0]["logprobs"]["content"]
    usage = answer["usage"]
    assert len(tokens) == usage["completion_tokens"] == 16
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    for token in tokens:
        first, second = token["top_logprobs"]
        assert (token["token"], token["logprob"]) == (first["token"], first["logprob"])
        assert first["logprob"] >= second["logprob"]


def test_curl_gets_several_choices_a_seed_and_stops_heeded(server: Server) -> None:
    sampling = {"n": 3, "temperature": 1, "seed": 7}
    first = texts_of(ask(server, **sampling))
    assert len(set(first)) == 3
    assert texts_of(ask(server, **sampling)) == first
    (text,) = texts_of(ask(server))
    stopped = ask(server, stop=text[8:11])
    assert texts_of(stopped) == [text[: text.index(text[8:11])]]
    assert stopped["choices"][0]["finish_reason"] == "stop"


def test_curl_gets_schemas_and_tools_kept(server: Server) -> None:
    schema = {"name": "place", "schema": PLACE}
    response_format = {"type": "json_schema", "json_schema": schema}
    (text,) = texts_of(ask(server, response_format=response_format, max_tokens=100))
    assert set(json.loads(text)) == {"city", "is_capital"}
    function = {"name": "look_up", "strict": True, "parameters": PLACE}
    tools = [{"type": "function", "function": function}]
    answer = ask(server, tools=tools, tool_choice="required", max_tokens=200)
    message = answer["choices"][0]["message"]
    assert message["tool_calls"]
    for call in message["tool_calls"]:
        assert set(json.loads(call["function"]["arguments"])) == {"city", "is_capital"}
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": "found"}
        for call in message["tool_calls"]
    ]
    (text,) = texts_of(ask(server, messages=[*MESSAGES, message, *results]))
    assert text


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [({"model": "nobody"}, "404", "'nobody' does not exist"), ({"n": 0}, "400", "n must be")],
)
def test_curl_is_told_errors(
    server: Server, options: dict[str, Any], status: str, message: str
) -> None:
    told = curl(server, CHAT, "--write-out", "\n%{http_code}", body=chat(**options))
    body, _, found = told.rpartition("\n")
    assert found == status
    assert message in json.loads(body)["error"]["message"]


def test_a_curl_that_is_ended_ends_its_request(server: Server) -> None:
    body = chat(stream=True, max_tokens=900, ignore_eos=True)
    command = [*curl_command(server, CHAT, body), "--no-buffer"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"data: ")
        assert requests_in_flight(server) == 1
        process.terminate()
    assert ends_within(server, 5)


def documented(language: str) -> list[str]:
    """Return the examples of the section on clients in one language."""
    section = DOCUMENT.read_text().partition("\n## Clients\n")[2].partition("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def run_shell(code: str) -> str:
    return subprocess.run(["bash", "-ec", code], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def mine(store: AdapterStore, adapters: dict[str, Path]) -> Iterator[None]:
    """The adapter that the examples ask."""
    store.add(adapters["lora-8"], name="mine")
    yield
    store.remove("mine", force=True)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("language", "number", "run"), [("python", 2, run_python), ("sh", 1, run_shell)]
)
def test_documented_examples_answer(
    server: Server, language: str, number: int, run: Callable[[str], str]
) -> None:
    examples = documented(language)
    assert len(examples) == number
    for example in examples:
        assert run(example.replace("http://127.0.0.1:8000", server.url)).strip()


@pytest.mark.node
@pytest.mark.usefixtures("mine")
def test_the_documented_example_for_node_answers(server: Server, node_client: NodeClient) -> None:
    (example,) = documented("js")
    script = node_client.folder / "example.mjs"
    script.write_text(example.replace("http://127.0.0.1:8000", server.url))
    assert node_client.run(script.name).strip()
