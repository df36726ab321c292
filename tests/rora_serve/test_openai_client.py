"""The official Python client, unchanged, against a real server: what it expects is what it gets."""

import json
import math
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from adapters import AdapterStore
from adapters.names import DEFAULT_MODEL_NAME as BASE
from tests.rora_serve.grammars import FOR_OUTLINES, answer_of
from tests.rora_serve.serving import Server, ends_within, requests_in_flight

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ADAPTER = "lora-8"
QUESTION = "What is the capital of France?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
MAX_TOKENS = 16
# Some 30 s of an answer, of which a test that leaves it waits for few.
LONG: Any = {"max_tokens": 900, "extra_body": {"ignore_eos": True}, "stream": True}


class Place(BaseModel):
    """What answers are made to be; nothing in it can go on for ever."""

    model_config = {"extra": "forbid"}

    city: Literal["Paris", "Rome"]
    is_capital: bool


TOOLS: Any = [openai.pydantic_function_tool(Place, name="look_up")]
NAMED: Any = {"type": "function", "function": {"name": "look_up"}}


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **options: Any) -> Any:
    given = {"model": ADAPTER, "messages": MESSAGES, "temperature": 0, "max_tokens": MAX_TOKENS}
    return client.chat.completions.create(**{**given, **options})


def text_of(answer: Any) -> str:
    (choice,) = answer.choices
    return str(choice.message.content)


def test_models_are_listed_and_retrieved(client: openai.OpenAI, store: AdapterStore) -> None:
    listed = [model.id for model in client.models.list()]
    assert listed[0] == BASE
    assert set(listed[1:]) == {record.name for record in store.names()}
    for model in (BASE, ADAPTER, f"{ADAPTER}@latest"):
        assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError, match="The model 'nobody' does not exist"):
        client.models.retrieve("nobody")


def test_an_answer_names_the_model_as_it_was_asked_for(
    client: openai.OpenAI, store: AdapterStore
) -> None:
    public_id = store.resolve(ADAPTER).public_id
    for model in (BASE, ADAPTER, f"{ADAPTER}@latest", public_id):
        raw = client.chat.completions.with_raw_response.create(
            model=model, messages=MESSAGES, max_tokens=1
        )
        assert raw.parse().model == model
        assert raw.headers.get("x-rora-adapter") == (None if model == BASE else public_id)
        assert raw.headers["x-request-id"]


def test_content_in_parts_is_no_adapters(client: openai.OpenAI) -> None:
    """vLLM would look for adapters that are named like kinds of parts."""
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    for model in (BASE, ADAPTER):
        whole = ask(client, model=model)
        assert text_of(ask(client, model=model, messages=parts)) == text_of(whole)


def test_usage_counts_the_answers_tokens(client: openai.OpenAI) -> None:
    answer = ask(client, extra_body={"ignore_eos": True})
    usage = answer.usage
    assert answer.choices[0].finish_reason == "length"
    assert usage.completion_tokens == MAX_TOKENS
    assert usage.prompt_tokens > len(QUESTION.split())
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_adds_up_to_the_answer_with_its_usage_last(client: openai.OpenAI) -> None:
    whole = ask(client)
    *chunks, last = ask(client, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(whole)
    assert {chunk.model for chunk in (*chunks, last)} == {ADAPTER}
    assert {chunk.usage for chunk in chunks} == {None}
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole.choices[0].finish_reason]
    assert last.choices == []
    assert last.usage.total_tokens == whole.usage.total_tokens


def test_log_probs_are_those_of_the_tokens(client: openai.OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    for token in tokens:
        values = [top.logprob for top in token.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, values[0])
        assert sum(map(math.exp, values)) <= 1 + 1e-5


def test_choices_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    def sampled(seed: int) -> list[str]:
        answer = ask(client, n=3, temperature=1, seed=seed)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    first = sampled(7)
    assert len(set(first)) == 3
    assert sampled(7) == first
    assert sampled(8) != first


def test_a_stop_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    text = text_of(ask(client))
    stop = text[8:11]
    answer = ask(client, stop=[stop, "never said"])
    assert text_of(answer) == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("model", [BASE, ADAPTER])
def test_a_json_schema_is_kept(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.parse(
        model=model, messages=MESSAGES, temperature=0, max_tokens=100, response_format=Place
    )
    assert isinstance(answer.choices[0].message.parsed, Place)


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_tool_is_called_and_its_answer_taken(client: openai.OpenAI, choice: Any) -> None:
    message = ask(client, tools=TOOLS, tool_choice=choice, max_tokens=200).choices[0].message
    assert message.tool_calls
    for call in message.tool_calls:
        assert call.function.name == "look_up"
        Place.model_validate_json(call.function.arguments)
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "found"} for call in message.tool_calls
    ]
    assert text_of(
        ask(client, tools=TOOLS, messages=[*MESSAGES, message, *results], tool_choice="none")
    )


def test_a_streamed_tool_call_adds_up(client: openai.OpenAI) -> None:
    asked: Any = {"tools": TOOLS, "tool_choice": NAMED, "max_tokens": 200}
    (whole,) = ask(client, **asked).choices[0].message.tool_calls
    with client.chat.completions.stream(
        model=ADAPTER, messages=MESSAGES, temperature=0, **asked
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls
    (call,) = message.tool_calls
    assert call.function.name == "look_up"
    assert isinstance(call.function.parsed_arguments, Place)
    # As the model wrote them; whole, vLLM lays them out anew.
    assert json.loads(call.function.arguments) == json.loads(whole.function.arguments)


def test_completions_answer_several_prompts(client: openai.OpenAI) -> None:
    prompts = ["The capital of France is", "One, two, three,"]
    answer = client.completions.create(
        model=ADAPTER, prompt=prompts, temperature=0, max_tokens=4, logprobs=1
    )
    alone = [
        client.completions.create(model=ADAPTER, prompt=prompt, temperature=0, max_tokens=4)
        for prompt in prompts
    ]
    assert [choice.text for choice in answer.choices] == [one.choices[0].text for one in alone]


def test_the_responses_api_answers_whole_streamed_and_to_a_schema(client: openai.OpenAI) -> None:
    asked: Any = {"model": f"{ADAPTER}@latest", "input": QUESTION, "temperature": 0}
    whole = client.responses.create(**asked, max_output_tokens=MAX_TOKENS)
    assert whole.model == asked["model"]
    assert whole.output_text
    assert whole.usage is not None
    assert whole.usage.output_tokens <= MAX_TOKENS
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    with client.responses.stream(**asked, max_output_tokens=MAX_TOKENS) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert stream.get_final_response().output_text == whole.output_text
    assert len(deltas) > 1
    assert "".join(deltas) == whole.output_text
    parsed = client.responses.parse(**asked, max_output_tokens=100, text_format=Place)
    assert isinstance(parsed.output_parsed, Place)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "The model 'nobody' does not exist"),
        ({"model": f"{ADAPTER}@gone"}, openai.NotFoundError, "does not exist"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "max_model_len"),
        ({"messages": [{"role": "user"}, 5]}, openai.BadRequestError, "messages"),
        ({"messages": []}, openai.BadRequestError, "empty conversation"),
        ({"top_logprobs": 10_000, "logprobs": True}, openai.BadRequestError, "logprobs"),
        ({"response_format": {"type": "json_schema"}}, openai.BadRequestError, "json_schema"),
        (answer_of({"type": "array", "minItems": 10**9}), openai.BadRequestError, "100000 items"),
        (answer_of(FOR_OUTLINES), openai.BadRequestError, "leave out patternProperties"),
        ({"model": ""}, openai.BadRequestError, "model: found nothing"),
    ],
)
def test_errors_are_those_that_the_client_knows(
    client: openai.OpenAI, options: dict[str, Any], error: type[openai.APIStatusError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        ask(client, **options)
    assert isinstance(caught.value.body, dict)
    assert {"message", "type", "param", "code"} <= set(caught.value.body)


def test_a_stream_that_is_left_ends_on_the_server(server: Server, client: openai.OpenAI) -> None:
    with ask(client, **LONG) as stream:
        next(iter(stream))
        assert requests_in_flight(server) == 1
    assert ends_within(server, 5)
    assert ask(client, max_tokens=1).choices
