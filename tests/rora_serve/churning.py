"""Many adapters through little memory, under traffic, for as long as one likes."""

import asyncio
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from adapters import AdapterStore
from adapters.base_model import cache_folder, find_model
from benchmarks.fleet import add_fleet
from benchmarks.load import TIMEOUT, prompts
from tests.rora_serve.serving import Server, free_port, our_command, running

NUM_ADAPTERS, NUM_HELD = 1000, 100
NUM_CLIENTS, NUM_WATCHED = 8, 40
PROMPT, NUM_TOKENS = 12, 6
WARM_UP_SECONDS = 120
MAX_SLOPE = 1.0  # MB a minute after that


def churn(folder: Path, minutes: int, seed: int) -> dict[str, object]:
    """Serve 1,000 adapters from memory for 100, the k-th as popular as 1 / k.

    Fails on any error, if an adapter's answer is another one at the end, and if memory grows.
    """
    store = AdapterStore(folder / "store")
    base = find_model(None, cache=cache_folder(os.environ))
    print(f"making {NUM_ADAPTERS} adapters", file=sys.stderr, flush=True)
    names = add_fleet(store, folder / "made", base, count=NUM_ADAPTERS, max_rank=3)
    sizes = [store.resolve(name).version.num_bytes for name in names]
    capacity = NUM_HELD * max(sizes)
    port = free_port()
    command = our_command(store.root, port, ["--adapter-memory-bytes", str(capacity)])
    chooser = random.Random(seed)
    chooser.shuffle(names)
    with running(command, port, folder / "log") as server:
        watched = names[:: NUM_ADAPTERS // NUM_WATCHED]
        before = [answer_alone(server, name) for name in watched]
        found = asyncio.run(_traffic(server, names, chooser, 60 * minutes))
        after = [answer_alone(server, name) for name in watched]
        assert after == before, "an adapter answers otherwise than at the start"
        assert len(set(before)) > NUM_WATCHED // 2, "the adapters hardly differ"
    assert found["memory_slope_mb_per_minute"] < MAX_SLOPE, found
    return {"adapters": NUM_ADAPTERS, "held": NUM_HELD, "failures": 0, **found}


def answer_alone(server: Server, name: str) -> str:
    """Return an adapter's greedy answer."""
    with httpx.Client(base_url=server.url, timeout=TIMEOUT) as client:
        return _answer(client.post("/v1/completions", json=_body(name, seed=1)))


def _body(name: str, *, seed: int) -> dict[str, object]:
    (prompt,) = prompts(seed, 1, PROMPT)
    return {
        "model": name, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0,
        "ignore_eos": True,
    }  # fmt: skip


def _answer(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


async def _traffic(
    server: Server, names: Sequence[str], chooser: random.Random, seconds: float
) -> dict[str, Any]:
    weights = [1 / rank for rank in range(1, len(names) + 1)]
    end = time.monotonic() + seconds
    count = 0

    async def client_loop(client: httpx.AsyncClient) -> None:
        nonlocal count
        while time.monotonic() < end:
            (name,) = chooser.choices(names, weights)
            body = _body(name, seed=chooser.randrange(1 << 30))
            _answer(await client.post("/v1/completions", json=body))
            count += 1

    async def watch() -> list[tuple[float, float]]:
        begin, seen = time.monotonic(), []
        while time.monotonic() < end:
            await asyncio.sleep(5)
            seen.append((time.monotonic() - begin, _memory_mb(server)))
        return seen

    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT) as client:
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(client_loop(client) for _ in range(NUM_CLIENTS)))
        memory = await watching
    warm = [(at, mb) for at, mb in memory if at > min(WARM_UP_SECONDS, seconds / 2)]
    slope = np.polyfit([at / 60 for at, _ in warm], [mb for _, mb in warm], 1)[0]
    return {
        "requests": count,
        "minutes": round(seconds / 60, 1),
        "memory_mb": [round(warm[0][1]), round(warm[-1][1])],
        "memory_slope_mb_per_minute": round(float(slope), 3),
    }


def _memory_mb(server: Server) -> float:
    """Return what all of the server's processes hold by themselves."""
    parent = psutil.Process(server.process.pid)
    processes = [parent, *parent.children(recursive=True)]
    return sum(float(process.memory_full_info().uss) for process in processes) / 1e6
