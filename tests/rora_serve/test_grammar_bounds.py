"""Grammars that would take the server's memory are refused, and only those."""

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm.config import StructuredOutputsConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.structured_output import backend_outlines

from rora_serve.api.grammar_bounds import MAX_ITEMS, check_grammar
from rora_serve.engine.compat import refuse_outlines_unasked
from tests.rora_serve.grammars import FOR_OUTLINES, answer_of

LARGE = {"type": "array", "minItems": 1_000_000_000}
HALVES = {key: {"type": "array", "maxItems": MAX_ITEMS // 2 + 1} for key in "ab"}


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (answer_of(LARGE), "response_format"),
        (answer_of({"anyOf": [{"items": LARGE}]}), "response_format"),
        (answer_of({"properties": HALVES}), "response_format"),
        (answer_of({"minItems": 10**400}), "response_format"),
        (answer_of({"minItems": float("nan")}), "response_format"),
        (answer_of({"minItems": float("inf")}), "response_format"),
        (answer_of([{"minItems": -(10**9)}, {"maxItems": MAX_ITEMS + 1}]), "response_format"),
        ({"text": {"format": {"type": "json_schema", "schema": LARGE}}}, "text"),
        ({"tools": [{"type": "function", "function": {"parameters": LARGE}}]}, "tools"),
        ({"structured_outputs": {"json": LARGE}}, "structured_outputs"),
        ({"structured_outputs": {"json": json.dumps(LARGE)}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": json.dumps([LARGE])}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: A{1, 1000000000}"}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: A ~ 1..1000000000"}}, "structured_outputs"),
        (
            {"structured_outputs": {"grammar": f"start: %json {json.dumps(LARGE)}"}},
            "structured_outputs",
        ),
    ],
)
def test_more_items_than_an_answer_has_are_refused(body: dict[str, Any], place: str) -> None:
    with pytest.raises(ValueError, match=f"^{place}: arrays of more than 100000 items in all"):
        check_grammar(body)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"response_format": None, "tools": "all", "text": 5, "structured_outputs": [1]},
        answer_of({"type": "array", "minItems": 2, "maxItems": 1000}),
        answer_of({"type": "string", "minLength": 10**9, "maxLength": 10**9}),
        {"tools": [{"function": {"description": "minItems: 1000000000, {1000000000}"}}]},
        {"structured_outputs": {"regex": "a{1000000}", "choice": ["x,1000000000"]}},
        {"structured_outputs": {"grammar": 'root ::= "a"{1,99999} "20261127"'}},
        {"structured_outputs": {"json": '{"minItems": 3}', "grammar": None}},
        {"messages": [{"role": "user", "content": json.dumps(LARGE)}]},
    ],
)
def test_what_costs_nothing_is_let_through(body: dict[str, Any]) -> None:
    check_grammar(body)


def test_the_largest_that_is_let_through_takes_little_memory() -> None:
    """By vLLM's own check, in a process of its own, since that is where it would end one."""
    schema = {"type": "array", "uniqueItems": True, "minItems": MAX_ITEMS}
    program = (
        "import json, resource, sys; from llguidance import LLMatcher\n"
        "def megabytes(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = megabytes()\n"
        "LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(sys.argv[1]), None)\n"
        "print(megabytes() - before)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, json.dumps(schema)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert int(found.stdout) < 64


def test_no_grammar_goes_to_outlines_unless_the_server_is_set_to_it(
    monkeypatch: pytest.MonkeyPatch, default_model: Any
) -> None:
    name = "validate_structured_output_request_outlines"
    monkeypatch.setattr(backend_outlines, name, getattr(backend_outlines, name))
    tokenizer: Any = AutoTokenizer.from_pretrained(default_model)

    def backend_for(config: StructuredOutputsConfig) -> str | None:
        params = SamplingParams(structured_outputs=StructuredOutputsParams(json=FOR_OUTLINES))
        model: Any = SimpleNamespace(is_diffusion=False)
        params._validate_structured_outputs(model, config, tokenizer)
        assert params.structured_outputs is not None
        return params.structured_outputs._backend

    automatic = StructuredOutputsConfig(backend="auto")
    assert backend_for(automatic) == "outlines", "else there is nothing to refuse any more"
    refuse_outlines_unasked()
    with pytest.raises(VLLMValidationError, match="leave out patternProperties"):
        backend_for(automatic)
    assert backend_for(StructuredOutputsConfig(backend="outlines")) == "outlines"
