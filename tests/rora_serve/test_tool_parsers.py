"""Tool calls are read by the parser of the format that the chat template writes."""

import importlib
import inspect

import pytest
from vllm.tool_parsers import ToolParserManager

from rora_serve import tool_parsers
from rora_serve.tool_parsers import PARSERS, tool_parser

TOOLS = "{% if tools %}Use these: {{ tools }}{% endif %}"


@pytest.mark.parametrize(
    ("model_type", "calls", "expected"),
    [
        ("qwen2", "<tool_call>\n{{ call | tojson }}\n</tool_call>", "hermes"),
        ("qwen3_moe", "<tool_call>\n<function={{ name }}>", "qwen3_xml"),
        ("glm4_moe", "<tool_call>{{ name }}<arg_key>{{ key }}</arg_key>", "glm45"),
        ("minimax_m2", "<minimax:tool_call>", "minimax_m2"),
        ("seed_oss", "<seed:tool_call><function={{ name }}>", "seed_oss"),
        ("kimi_k2", "<|tool_calls_section_begin|>", "kimi_k2"),
        ("lfm2", "<|tool_call_start|>[{{ call }}]", "lfm2"),
        ("mistral", "[TOOL_CALLS]{{ calls | tojson }}", "mistral"),
        ("llama", "{{ '<|python_tag|>' + call }}", "llama3_json"),
        ("granite", "<|tool_call|>{{ calls }}", "granite"),
        ("jamba", "<tool_calls>{{ calls }}</tool_calls>", "jamba"),
        ("gpt_oss", "<|channel|>commentary to={{ name }}", "openai"),
        ("llama4", "<|python_start|>{{ call }}", "llama4_pythonic"),
        ("phi3", "some other way", None),
    ],
)
def test_the_mark_of_a_call_tells_the_parser(
    model_type: str, calls: str, expected: str | None
) -> None:
    assert tool_parser(model_type, TOOLS + calls) == expected


@pytest.mark.parametrize("template", [None, "", "{{ messages }} <tool_call>"])
def test_a_template_that_knows_no_tools_gets_no_parser(template: str | None) -> None:
    assert tool_parser("llama", template) is None


def test_every_parser_that_we_name_is_one_of_vllms() -> None:
    assert set(ToolParserManager.list_registered()) >= PARSERS


@pytest.mark.parametrize(("mark", "name"), tool_parsers._BY_MARK)
def test_every_mark_is_looked_for_by_its_parser(mark: str, name: str) -> None:
    parser = ToolParserManager.get_tool_parser(name)
    # Newer ones hand over to a class of the same format in a module of its own.
    own = [value for base in parser.__mro__ for value in vars(base).values()]
    classes = [parser, *(value for value in own if inspect.isclass(value))]
    sources = [inspect.getsource(importlib.import_module(each.__module__)) for each in classes]
    assert any(mark in source for source in sources), classes
