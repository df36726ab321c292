"""One request, and whatever became of it: tokens with their times, an error, a hang-up."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

TIMEOUT = httpx.Timeout(120)
_NO_HEADERS: Mapping[str, str] = {}


@dataclass
class Outcome:
    """What a client saw of one request; times are seconds of `time.monotonic`.

    Args:
        model: that it asked for.
        sent, ended: when the request began and when nothing more came.
        begun: when the answer's status came.
        status: of the answer; None: there was none.
        version: its x-rora-adapter.
        retry_after: its Retry-After.
        tokens, came: ids of the tokens, and when each came.
        body: of an answer that is no stream.
        error: why it is no whole answer: what the stream said, or how the connection ended.
    """

    model: str
    sent: float
    begun: float = 0.0
    ended: float = 0.0
    status: int | None = None
    version: str | None = None
    retry_after: str | None = None
    tokens: list[int] = field(default_factory=list)
    came: list[float] = field(default_factory=list)
    body: Any = None
    error: str | None = None

    @property
    def is_whole(self) -> bool:
        return self.status == 200 and self.error is None

    @property
    def token_seconds(self) -> float:
        """Mean from one token to the next."""
        return (self.came[-1] - self.came[0]) / (len(self.came) - 1)


def limits() -> httpx.Limits:
    """Return limits of a client that never waits for itself."""
    return httpx.Limits(max_connections=None, max_keepalive_connections=256)


async def ask(
    client: httpx.AsyncClient,
    model: str,
    prompt: Sequence[int],
    num_tokens: int,
    *,
    headers: Mapping[str, str] = _NO_HEADERS,
    stream: bool = True,
) -> Outcome:
    """Ask for a greedy continuation of exactly `num_tokens`; nothing that happens is raised."""
    body = {
        "model": model, "prompt": list(prompt), "max_tokens": num_tokens, "temperature": 0,
        "ignore_eos": True, "stream": stream, "return_token_ids": True,
    }  # fmt: skip
    found = Outcome(model, time.monotonic())
    try:
        async with client.stream(
            "POST", "/v1/completions", json=body, headers=dict(headers)
        ) as response:
            found.begun = time.monotonic()
            found.status = response.status_code
            found.version = response.headers.get("x-rora-adapter")
            found.retry_after = response.headers.get("retry-after")
            if response.status_code == 200 and stream:
                await _read(response, found, num_tokens)
            else:
                found.body = _parsed(await response.aread())
                if response.status_code == 200:
                    found.tokens = found.body["choices"][0]["token_ids"]
    except httpx.HTTPError as error:
        found.error = repr(error)
    found.ended = time.monotonic()
    return found


async def _read(response: httpx.Response, found: Outcome, num_tokens: int) -> None:
    found.error = "the stream ended without [DONE]"
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            if found.error == "the stream ended without [DONE]":
                is_right = len(found.tokens) == num_tokens
                found.error = None if is_right else f"{len(found.tokens)} tokens came"
        elif line.startswith("data: "):
            event = json.loads(line[6:])
            if "error" in event:
                found.error = f"the stream says {event['error']}"
            for choice in event.get("choices", ()):
                ids = choice.get("token_ids") or []
                found.tokens += ids
                found.came += [time.monotonic()] * len(ids)


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode(errors="replace")
