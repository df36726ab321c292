"""Which of vLLM's tool parsers reads what a base model writes when it calls tools.

A chat template that knows tools writes earlier calls as the model is to write new ones, so the
marks in it tell the format. Nothing is guessed: a model without a known mark gets no parser.
"""

import json
from pathlib import Path

from adapters.base_model import chat_template

# First those that hold another one's mark too.
_BY_MARK = (
    ("<minimax:tool_call>", "minimax_m2"),
    ("<seed:tool_call>", "seed_oss"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<|tool_call_start|>", "lfm2"),
    ("[TOOL_CALLS]", "mistral"),
    ("<arg_key>", "glm45"),
    ("<function=", "qwen3_xml"),
    ("<tool_calls>", "jamba"),
    ("<tool_call>", "hermes"),
    ("<|tool_call|>", "granite"),
    ("<|python_tag|>", "llama3_json"),
)
# By the model_type of config.json, where the template has no mark or one that is not its own.
_BY_TYPE = {"gpt_oss": "openai", "llama4": "llama4_pythonic"}
PARSERS = frozenset(_BY_TYPE.values()) | {parser for _, parser in _BY_MARK}


def tool_parser_of(model: Path) -> str | None:
    """Return the parser for a model folder, or None. Cost: reads its small files."""
    try:
        config = json.loads((model / "config.json").read_bytes())
    except (OSError, ValueError):  # vLLM says what is wrong with it
        return None
    model_type = config.get("model_type") if isinstance(config, dict) else None
    return tool_parser(model_type, chat_template(model))


def tool_parser(model_type: str | None, template: str | None) -> str | None:
    """Return the name of vLLM's parser, or None if the format is not known.

    Args:
        model_type: as config.json says.
        template: chat template of the base model; one that does not mention `tools` knows none.
    """
    if template is None or "tools" not in template:
        return None
    if model_type in _BY_TYPE:
        return _BY_TYPE[model_type]
    return next((parser for mark, parser in _BY_MARK if mark in template), None)
