"""What the front door reads of a request for a model, and what of it is not for clients to say."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rora_serve.api.allowed import GENERATING_ROUTES
from rora_serve.api.asgi import Header
from rora_serve.api.grammar_bounds import check_grammar
from rora_serve.tenants import Tenant

DEADLINE_HEADER = b"x-rora-deadline-ms"
MAX_DEADLINE_MS = 24 * 3600 * 1000
# Settings of vLLM's scheduler, transfers and logs, which are the server's.
NOT_FOR_CLIENTS = ("priority", "kv_transfer_params", "vllm_xargs", "session_id", "request_id")
_HEADERS_NOT_FOR_CLIENTS = frozenset(
    {
        b"x-vllm-priority",
        b"x-data-parallel-rank",
        b"x-session-id",
        # Asks for the server's load, and for all metrics to be collected meanwhile.
        b"endpoint-load-metrics-format",
        b"x-request-id",  # the record's takes its place
    }
)
_INTEGER = TypeAdapter(int)  # reads what vLLM's bodies read: 64.0, "64", "64.0"
MAX_SEQUENCES = 128  # of one request, which has its places until all have ended
_COMPLETION_TOKENS = 16  # of an answer of /v1/completions that says nothing; OpenAI's and vLLM's
# How many tokens may be generated; the first is what the route takes if nothing is said.
_MAX_TOKENS = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
}


@dataclass(frozen=True)
class ModelRequest:
    """A request's body, as vLLM's handlers get it.

    Args:
        body: of it.
        model: what it asks for; None if that is no text or the body no object, which vLLM refuses.
        num_sequences: that it runs, its choices times its prompts.
    """

    body: bytes
    model: str | None
    num_sequences: int


def read_model_request(
    body: bytes, path: str, tenant: Tenant, *, max_model_len: int
) -> ModelRequest:
    """Return a request with the tenant's cap and salt in it, and without what is not its to say.

    A body that is no JSON object is left to vLLM, which refuses it.

    Args: max_model_len: tokens of a prompt and its answer at most; vLLM refuses to be asked for
        more.
    Raises: ValueError: it can not be read, which FastAPI would answer past vLLM's errors; it names
        no model, or asks for too many sequences or too large a grammar.
    """
    try:
        content = json.loads(body)
    except json.JSONDecodeError:
        return ModelRequest(body, None, 1)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            "body: no UTF-8, nested too deep or with a number of too many digits; JSON that can be "
            "read is expected"
        ) from error
    if not isinstance(content, dict):
        return ModelRequest(body, None, 1)
    model = content.get("model")
    if model in (None, ""):
        # vLLM would take the base model, and whoever lost an adapter's name would not notice.
        raise ValueError(
            "model: found nothing, the name of an adapter or of the base model is expected"
        )
    check_grammar(content)
    for key in NOT_FOR_CLIENTS:
        content.pop(key, None)
    _drop_names_of_media(content)
    if path in GENERATING_ROUTES:
        # Numbers that vLLM would read out of text or fractions, as it would.
        for key in ("n", *_MAX_TOKENS[path]):
            number = _whole(content.get(key))
            if number is not None:
                content[key] = number
        if path == "/v1/responses":
            # One in the background would go on without its place, its limits and its adapter.
            content["store"] = False
        _cap_tokens(content, path, tenant.limits.max_tokens, max_model_len)
        _salt(content, tenant.cache_salt)
    num_sequences = _num_sequences(content)
    if num_sequences > MAX_SEQUENCES:
        raise ValueError(
            f"n times prompts: {num_sequences} sequences, at most {MAX_SEQUENCES} are expected; "
            "send several requests"
        )
    return ModelRequest(
        # Written anew always: of two values of one key, this is the one that was looked at.
        json.dumps(content).encode(),
        model if isinstance(model, str) else None,
        num_sequences,
    )


def _whole(value: object) -> int | None:
    try:
        return None if value is None else _INTEGER.validate_python(value)
    except ValidationError:  # which vLLM answers
        return None


def _cap_tokens(content: dict[str, Any], path: str, most: int | None, max_model_len: int) -> None:
    if most is None:
        return
    most = min(most, max_model_len)
    keys = _MAX_TOKENS[path]
    given = [key for key in keys if content.get(key) is not None]
    for key in given:
        if isinstance(content[key], int) and content[key] > most:
            content[key] = most
    if not given:
        # The rest of the context is what vLLM takes, but for completions.
        content[keys[0]] = min(most, _COMPLETION_TOKENS) if path == "/v1/completions" else most


def _salt(content: dict[str, Any], salt: str | None) -> None:
    """Keep a tenant's prefixes apart in the cache, and those that it wants apart besides."""
    if salt is not None:
        own = content.get("cache_salt")
        content["cache_salt"] = f"{salt}.{own}" if isinstance(own, str) else salt


def _drop_names_of_media(content: dict[str, Any]) -> None:
    """Let media be known by their contents alone.

    vLLM keeps an image under a `uuid` that stands beside it, and takes one for which only that is
    said from there: another tenant's.
    """
    for key in ("messages", "input"):
        given = content.get(key)
        for message in given if isinstance(given, list) else ():
            if not isinstance(message, dict):
                continue
            for parts in (message.get("content"), message.get("output")):
                for part in parts if isinstance(parts, list) else ():
                    if isinstance(part, dict):
                        part.pop("uuid", None)


def _num_sequences(content: dict[str, Any]) -> int:
    choices = content.get("n")  # a number by now
    prompts = content.get("prompt")
    is_several = isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list)
    number = len(prompts) if is_several and isinstance(prompts, list) else 1
    return number * (choices if isinstance(choices, int) and choices > 0 else 1)


def deadline_seconds(headers: Sequence[Header]) -> float | None:
    """Return the seconds from its arrival in which a request wants to be let in.

    Raises: ValueError: the header says no number from 1 to a day.
    """
    values = [value for name, value in headers if name == DEADLINE_HEADER]
    if not values:
        return None
    text = values[0].decode("latin-1")
    if len(values) == 1 and text.isascii() and text.isdigit() and len(text) <= 8:
        milliseconds = int(text)
        if 1 <= milliseconds <= MAX_DEADLINE_MS:
            return milliseconds / 1000
    raise ValueError(
        f"{DEADLINE_HEADER.decode()}: found {text[:20]!r}, one whole number of milliseconds from 1 "
        f"to {MAX_DEADLINE_MS} is expected"
    )


def headers_for_vllm(headers: Sequence[Header], request_id: str) -> list[Header]:
    """Return a request's headers with our id of it, without what would steer vLLM."""
    kept = [header for header in headers if header[0].lower() not in _HEADERS_NOT_FOR_CLIENTS]
    return [*kept, (b"x-request-id", request_id.encode())]
