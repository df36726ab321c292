"""Schemas that answers are to keep to, for tests."""

from typing import Any

# What xgrammar lacks and what llguidance lacks in one, so that vLLM would take outlines.
FOR_OUTLINES = {
    "type": "object",
    "properties": {"a": {"type": "number", "multipleOf": 2}},
    "patternProperties": {"^b$": {"type": "string"}},
}


def answer_of(schema: object) -> dict[str, Any]:
    """Options of a request whose answer keeps to a schema."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return {"response_format": form}
