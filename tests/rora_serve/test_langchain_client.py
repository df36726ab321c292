"""LangChain's OpenAI models, unchanged, against a real server."""

from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from tests.rora_serve.serving import Server, ends_within, requests_in_flight

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ADAPTER = "lora-8@latest"
QUESTION = "What is the capital of France?"


class Place(BaseModel):
    """A city, and whether it is a capital."""

    model_config = {"extra": "forbid"}

    city: Literal["Paris", "Rome"]
    is_capital: bool


def chat(server: Server, model: str = ADAPTER, **options: Any) -> ChatOpenAI:
    given = {"temperature": 0, "max_tokens": 16, **options}
    return ChatOpenAI(
        model=model,
        base_url=f"{server.url}/v1",
        api_key=SecretStr("none"),
        max_retries=0,
        stream_usage=True,
        **given,
    )


def test_an_answer_and_its_stream_are_the_same(server: Server) -> None:
    whole = chat(server).invoke(QUESTION)
    assert isinstance(whole, AIMessage)
    assert whole.response_metadata["model_name"] == ADAPTER
    first, *others = chat(server).stream(QUESTION)
    streamed = first
    for chunk in others:
        streamed += chunk
    assert streamed.content == whole.content
    assert streamed.usage_metadata is not None
    assert whole.usage_metadata is not None
    assert streamed.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]
    assert whole.usage_metadata["output_tokens"] <= 16
    (batched,) = chat(server).batch([QUESTION])
    assert batched.content == whole.content


def test_log_probs_choices_seeds_and_stops(server: Server) -> None:
    greedy = chat(server, logprobs=True, top_logprobs=2).invoke(QUESTION)
    assert greedy.usage_metadata is not None
    tokens = greedy.response_metadata["logprobs"]["content"]
    assert len(tokens) == greedy.usage_metadata["output_tokens"]
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    sampling = chat(server, n=3, temperature=1, seed=7)

    def sampled() -> list[str]:
        (choices,) = sampling.generate([[HumanMessage(QUESTION)]]).generations
        return [choice.text for choice in choices]

    first = sampled()
    assert len(set(first)) == 3
    assert sampled() == first
    text = str(greedy.content)
    stopped = chat(server).invoke(QUESTION, stop=[text[8:11]])
    assert stopped.content == text[: text.index(text[8:11])]


def test_structured_output_is_kept(server: Server) -> None:
    model = chat(server, max_tokens=100)
    for method in ("json_schema", "function_calling"):
        structured = model.with_structured_output(Place, method=method, strict=True)
        assert isinstance(structured.invoke(QUESTION), Place)


@pytest.mark.parametrize("choice", ["required", "Place"])
def test_a_tool_is_called_and_its_answer_taken(server: Server, choice: str) -> None:
    model = chat(server, max_tokens=200)
    asked: list[BaseMessage] = [HumanMessage(QUESTION)]
    answer = model.bind_tools([Place], tool_choice=choice, strict=True).invoke(asked)
    assert answer.tool_calls
    for call in answer.tool_calls:
        assert call["name"] == "Place"
        Place.model_validate(call["args"])
    results = [ToolMessage("found", tool_call_id=call["id"]) for call in answer.tool_calls]
    assert model.invoke([*asked, answer, *results]).content


def test_the_responses_api_answers(server: Server) -> None:
    model = chat(server, use_responses_api=True)
    whole = model.invoke(QUESTION)
    assert whole.text
    assert whole.response_metadata["model_name"] == ADAPTER
    assert "".join(chunk.text for chunk in model.stream(QUESTION)) == whole.text


def test_errors_are_those_of_the_openai_client(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="The model 'nobody' does not exist"):
        chat(server, "nobody").invoke(QUESTION)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat(server, temperature=-1).invoke(QUESTION)


def test_a_stream_that_is_left_ends_on_the_server(server: Server) -> None:
    model = chat(server, max_tokens=900, extra_body={"ignore_eos": True})
    stream: Any = model.stream(QUESTION)
    next(stream)
    assert requests_in_flight(server) == 1
    stream.close()
    assert ends_within(server, 5)
