"""Requests in load: token prompts sent together to a server, and when each answer's tokens came.

The client computes on the cores that the server computes on, and what it takes for a token counts
as the server's. aiohttp takes a third of what httpx does.
"""

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

VOCABULARY = (1_000, 40_000)  # plain tokens of the default model
TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Answer:
    """One streamed answer: seconds on one clock at which it was asked for and its tokens came."""

    asked: float
    tokens: tuple[float, ...]

    @property
    def first_token_seconds(self) -> float:
        """From the question to the first token."""
        return self.tokens[0] - self.asked

    @property
    def token_seconds(self) -> float:
        """Mean from one token to the next."""
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1)


def prompts(seed: int, count: int, length: int) -> list[list[int]]:
    """Return random prompts, of which no two share a prefix that a cache could use."""
    found: list[list[int]] = (
        np.random.default_rng(seed).integers(*VOCABULARY, (count, length)).tolist()
    )
    return found


def open_client(url: str) -> aiohttp.ClientSession:
    """Return a client of a server with as many connections as it has requests at a time."""
    return aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(TIMEOUT_SECONDS),
    )


async def ask(
    client: aiohttp.ClientSession, model: str, prompt: Sequence[int], num_tokens: int
) -> Answer:
    """Ask for a greedy continuation of exactly `num_tokens` and note when each token comes."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    asked = time.perf_counter()
    came: list[float] = []
    async with client.post("/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{model}: {response.status} {await response.read()!r}")
        async for line in response.content:
            if line.startswith(b"data: {"):
                # Servers put several tokens into one event when they fall behind.
                for choice in json.loads(line[6:]).get("choices", ()):
                    came += [time.perf_counter()] * len(choice.get("token_ids") or ())
    if len(came) != num_tokens:
        raise RuntimeError(f"{model}: {len(came)} tokens came, {num_tokens} were asked for")
    return Answer(asked, tuple(came))


def ask_together(
    url: str, models: Sequence[str], *, seed: int, prompt_length: int, num_tokens: int
) -> list[Answer]:
    """Send one request a model, all at once."""

    async def run() -> list[Answer]:
        async with open_client(url) as client:
            each = zip(models, prompts(seed, len(models), prompt_length), strict=True)
            return await asyncio.gather(
                *(ask(client, model, prompt, num_tokens) for model, prompt in each)
            )

    return asyncio.run(run())


def decode_rate(answers: Sequence[Answer]) -> float:
    """Return tokens per second of all answers together, while all of them were running."""
    begin = max(answer.tokens[1] for answer in answers)
    end = min(answer.tokens[-1] for answer in answers)
    count = sum(begin < came <= end for answer in answers for came in answer.tokens)
    if count < len(answers):
        raise RuntimeError("the answers hardly ran together; ask for more tokens")
    return count / (end - begin)


def prefill_rate(answers: Sequence[Answer], prompt_length: int) -> float:
    """Return tokens of prompts per second, until every answer had its first token."""
    seconds = max(a.tokens[0] for a in answers) - min(a.asked for a in answers)
    return len(answers) * prompt_length / seconds


def latencies(answers: Sequence[Answer]) -> dict[str, float]:
    """Return milliseconds to the first token and from token to token, at p50 and p95."""
    found = {}
    for name, values in (
        ("ttft_ms", [1000 * a.first_token_seconds for a in answers]),
        ("tpot_ms", [1000 * a.token_seconds for a in answers]),
    ):
        found[f"{name}_p50"] = round(statistics.median(values), 1)
        found[f"{name}_p95"] = round(float(np.percentile(values, 95)), 1)
    return found
