"""What a request's grammar may ask for, before vLLM takes it in.

vLLM reads the grammars of structured answers in the process that serves all requests, and one of
its libraries (llguidance, for what xgrammar does not do) takes 150 bytes for every item that an
array may have, so that a schema of two lines ends a server. Lengths of texts and repetitions in
regular expressions cost neither library more than their own size does.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

MAX_ITEMS = 100_000  # of all arrays in one place of a request together; 15 MB
_SCHEMAS = ("response_format", "structured_outputs", "text", "tools")
_COUNTS = ("minItems", "maxItems")
_TEXTS = ("json", "structural_tag", "grammar")  # in structured_outputs: JSON, or Lark's and EBNF
# In a grammar's text: x{2,3}, x~2..3, and schemas within it.
_REPEATED = re.compile(r'(?:[{,~]|\.\.|(?:min|max)Items"\s*:)\s*(\d{6,})')


def check_grammar(content: dict[str, Any]) -> None:
    """See that a request's body asks for no grammar that takes the server's memory.

    Raises: ValueError: its arrays may have too many items.
    Cost: a walk through its schemas.
    """
    for place in _SCHEMAS:
        value = content.get(place)
        total = sum(_counts(value))
        if place == "structured_outputs" and isinstance(value, dict):
            total += sum(count for key in _TEXTS for count in _counts_in_text(value.get(key)))
        if total > MAX_ITEMS:
            raise ValueError(
                f"{place}: arrays of more than {MAX_ITEMS} items in all (minItems, maxItems, "
                "repetitions), fewer are expected; leave out bounds that no answer reaches"
            )


def _counts(value: object) -> Iterator[int]:
    """Yield the numbers of items of all schemas below a value, cut where one is too large."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            left += value.values()
            for count in map(value.get, _COUNTS):
                if isinstance(count, int | float) and not count < 0:
                    # JSON of Python's has numbers without an end, and what is no number.
                    yield int(count) if count <= MAX_ITEMS else MAX_ITEMS + 1


def _counts_in_text(text: object) -> Iterator[int]:
    if not isinstance(text, str):
        return
    try:
        yield from _counts(json.loads(text))
    except (ValueError, RecursionError):  # no JSON, or what vLLM refuses
        for digits in _REPEATED.findall(text):
            yield min(int(digits[:10]), MAX_ITEMS + 1)
