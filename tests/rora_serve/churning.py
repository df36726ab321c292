"""Many adapters through little memory, under traffic, for as long as one likes."""

import asyncio
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from adapters import AdapterStore
from adapters.base_model import cache_folder, find_model
from benchmarks.fleet import add_fleet, zipf_weights
from benchmarks.load import TIMEOUT_SECONDS, prompts
from tests.rora_serve.serving import Server, free_port, metric_total, our_command, running
from tests.rora_serve.swapping import MIN_MARGIN

NUM_ADAPTERS, NUM_HELD = 1000, 100
NUM_CLIENTS, NUM_WATCHED = 8, 40
WATCHED_SHARE = 0.1  # of the requests, which ask again what was asked before
PROMPT, NUM_TOKENS = 12, 6
WARM_UP_SECONDS = 120
MAX_SLOPE = 1.0  # MB a minute after that


def churn(folder: Path, minutes: int, seed: int) -> dict[str, object]:
    """Serve 1,000 adapters from memory for 100, the k-th as popular as 1 / k.

    Fails on any error, if an adapter's answer is another one under traffic or at the end, and if
    memory grows.
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
        before = {name: answer_alone(server, name) for name in watched}
        clear = {name: text for name, (text, is_clear) in before.items() if is_clear}
        found = asyncio.run(_traffic(server, names, clear, chooser, 60 * minutes))
        after = {name: answer_alone(server, name) for name in watched}
        assert after == before, "an adapter answers otherwise than at the start"
        assert len({text for text, _ in before.values()}) > NUM_WATCHED // 2, "they hardly differ"
        assert len(set(clear.values())) > NUM_WATCHED // 4, "few answers are clear"
    assert found["memory_slope_mb_per_minute"] < MAX_SLOPE, found
    assert found["evictions"] > NUM_HELD, found
    return {"adapters": NUM_ADAPTERS, "held": NUM_HELD, "failures": 0, **found}


def answer_alone(server: Server, name: str) -> tuple[str, bool]:
    """Return an adapter's greedy answer, and whether no token of it was nearly another one."""
    # By ids, since two tokens can be the same text.
    body = _body(name, seed=1) | {"logprobs": 2, "return_tokens_as_token_ids": True}
    with httpx.Client(base_url=server.url, timeout=TIMEOUT_SECONDS) as client:
        response = client.post("/v1/completions", json=body)
    text = _answer(response)
    tops = response.json()["choices"][0]["logprobs"]["top_logprobs"]
    margins = [first - second for first, second in (sorted(top.values())[::-1] for top in tops)]
    return text, min(margins) > MIN_MARGIN


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
    server: Server,
    names: Sequence[str],
    watched: Mapping[str, str],
    chooser: random.Random,
    seconds: float,
) -> dict[str, Any]:
    """Args: watched: answers that are known, by adapter."""
    weights = zipf_weights(len(names))
    end = time.monotonic() + seconds
    asked: Counter[str] = Counter()
    compared = 0

    async def client_loop(client: httpx.AsyncClient) -> None:
        nonlocal compared
        while time.monotonic() < end:
            is_watched = chooser.random() < WATCHED_SHARE
            (name,) = chooser.choices([*watched]) if is_watched else chooser.choices(names, weights)
            body = _body(name, seed=1 if is_watched else chooser.randrange(1 << 30))
            answer = _answer(await client.post("/v1/completions", json=body))
            assert not is_watched or answer == watched[name], f"{name} answers otherwise"
            compared += is_watched
            asked[name] += 1

    async def watch() -> list[tuple[float, float]]:
        begin, seen = time.monotonic(), []
        while time.monotonic() < end:
            await asyncio.sleep(5)
            seen.append((time.monotonic() - begin, _memory_mb(server)))
        return seen

    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_SECONDS) as client:
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(client_loop(client) for _ in range(NUM_CLIENTS)))
        memory = await watching
        page = (await client.get("/metrics")).text
    warm = [(at, mb) for at, mb in memory if at > min(WARM_UP_SECONDS, seconds / 2)]
    slope = np.polyfit([at / 60 for at, _ in warm], [mb for _, mb in warm], 1)[0]
    return {
        "requests": asked.total(),
        "asked_for": len(asked),
        "compared": compared,
        "evictions": round(metric_total(page, "rora_evictions_total")),
        "minutes": round(seconds / 60, 1),
        "memory_mb": [round(warm[0][1]), round(warm[-1][1])],
        "memory_slope_mb_per_minute": round(float(slope), 3),
    }


def _memory_mb(server: Server) -> float:
    """Return what all of the server's processes hold of the system's memory, without files on disk.

    Pages of such files, as of libraries, count for one process or for several by who else runs
    them. Slots, which processes share while one of them lays them out, count once.
    """
    parent = psutil.Process(server.process.pid)
    total = 0
    for process in (parent, *parent.children(recursive=True)):
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                total += int(line.split()[1])
    return total * 1024 / 1e6
