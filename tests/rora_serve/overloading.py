"""Four times as much as a server can do: who is let in, who waits how long, who is refused how."""

import asyncio
import json
import os
import random
import ssl
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import numpy as np

from adapters import AdapterStore
from adapters.base_model import cache_folder, find_model
from benchmarks.fleet import add_fleet, zipf_weights
from benchmarks.load import prompts
from tests.rora_serve.serving import Server, free_port, our_command, running
from tests.rora_serve.streaming import TIMEOUT, Outcome, ask, limits

NUM_ADAPTERS = 16
NUM_QUARTER = NUM_ADAPTERS // 4
OVERLOAD = 4.0
PROMPT, NUM_TOKENS = 12, 16
WARM_UP_SECONDS, MEASURING_SECONDS = 5, 20
LOG_SECONDS = 1.0  # until the last answers are in the log, which comes after them
MIN_ADMITTED = 40  # of each adapter in a whole soak
MAX_RATIO = 3.0  # of the rarest quarter's waits to those of the most popular one
# Of the time that sending takes, to what it should take: a client that falls behind on the cores
# that it shares with the server would offer less than it says.
MAX_LAG = 1.05
# Clients that take turns: a pool of httpx looks through all its connections for each request.
NUM_CLIENTS = 64


def overload(folder: Path, minutes: int, seed: int) -> dict[str, object]:
    """Offer 4 times what a server can do; the k-th of 16 adapters is as popular as 1 / k.

    Fails on a crash, on a refusal that is no 429 with Retry-After, and if rare adapters wait long.
    """
    base = find_model(None, cache=cache_folder(os.environ))
    store = AdapterStore(folder / "store")
    names = add_fleet(store, folder / "made", base, count=NUM_ADAPTERS, max_rank=8)
    port = free_port()
    command = our_command(store.root, port)
    with running(command, port, folder / "log") as server:
        capacity = asyncio.run(measure_capacity(server, names, MEASURING_SECONDS))
        print(f"{capacity:.1f} requests/s can be served", file=sys.stderr, flush=True)
        time.sleep(LOG_SECONDS)
        log_size = server.log.stat().st_size
        outcomes, sent_in = asyncio.run(
            offer(server, names, per_second=OVERLOAD * capacity, seconds=60 * minutes, seed=seed)
        )
        assert server.process.poll() is None, "the server ended under load"
        with httpx.Client(base_url=server.url) as client:
            assert client.get("/ready").status_code == 200
        time.sleep(LOG_SECONDS)
        waits = read_waits(server, names, log_size)
    assert sent_in < MAX_LAG * 60 * minutes, f"the client was too slow, it sent for {sent_in:.0f} s"
    return {
        "can_serve_per_second": round(capacity, 1),
        "offered_per_second": round(len(outcomes) / sent_in, 1),
        **judge(names, outcomes, waits, minutes),
    }


async def measure_capacity(server: Server, names: Sequence[str], seconds: float) -> float:
    """Return the requests per second that as many clients as places get answered."""
    weights = zipf_weights(len(names))
    begun = end = 0.0
    count = 0

    async def client_loop(client: httpx.AsyncClient, number: int) -> None:
        nonlocal count
        chooser = random.Random(number)
        while time.monotonic() < end:
            prompt = prompts(chooser.randrange(1 << 30), 1, PROMPT)[0]
            (name,) = chooser.choices(names, weights)
            outcome = await ask(client, name, prompt, NUM_TOKENS)
            assert outcome.is_whole, outcome
            count += begun < outcome.ended < end

    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT, limits=limits()) as client:
        for name in names:  # so that all are loaded before the clock runs
            await ask(client, name, [1, 2, 3], 1)
        begun = time.monotonic() + WARM_UP_SECONDS
        end = begun + seconds
        await asyncio.gather(*(client_loop(client, number) for number in range(32)))
    return count / seconds


async def offer(
    server: Server, names: Sequence[str], *, per_second: float, seconds: float, seed: int
) -> tuple[list[Outcome], float]:
    """Send requests by the clock, whatever becomes of them. Returns: them, and seconds of sending.

    A client that falls behind makes up for it as fast as it can.
    """
    chooser = random.Random(seed)
    weights = zipf_weights(len(names))
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as requests:
        trusted = ssl.create_default_context()  # once: each client would read all certificates
        clients = [
            await stack.enter_async_context(
                httpx.AsyncClient(
                    base_url=server.url, timeout=TIMEOUT, limits=limits(), verify=trusted
                )
            )
            for _ in range(NUM_CLIENTS)
        ]
        tasks: list[asyncio.Task[Outcome]] = []
        begun = due = time.monotonic()
        while due < begun + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due += chooser.expovariate(per_second)
            (name,) = chooser.choices(names, weights)
            prompt = [chooser.randrange(1000, 40000) for _ in range(PROMPT)]
            client = clients[len(tasks) % NUM_CLIENTS]
            tasks.append(requests.create_task(ask(client, name, prompt, NUM_TOKENS)))
        sent_in = time.monotonic() - begun
    return [task.result() for task in tasks], sent_in


def read_waits(server: Server, names: Sequence[str], begin: int) -> dict[str, list[float]]:
    """Return the milliseconds that requests waited to be let in, by adapter, as the log says.

    Args: begin: where in the log these requests begin.
    """
    waits = defaultdict(list)
    for line in server.log.read_bytes()[begin:].decode(errors="replace").splitlines():
        if not line.startswith('{"time"'):
            continue
        record = json.loads(line)
        if record["model"] in names and record["status"] == 200 and record["queue_ms"] is not None:
            waits[record["model"]].append(float(record["queue_ms"]))
    return waits


def judge(
    names: Sequence[str],
    outcomes: Sequence[Outcome],
    waits: dict[str, list[float]],
    minutes: float,
) -> dict[str, object]:
    """Check every answer; return how long whom waited, seen by the client and told by the log."""
    answered = defaultdict(list)
    refused: Counter[str] = Counter()
    for outcome in outcomes:
        if outcome.status == 429:
            assert outcome.retry_after is not None, outcome
            assert 1 <= int(outcome.retry_after) <= 60, outcome
            assert outcome.body["error"]["code"] == "overloaded", outcome
            refused[outcome.model] += 1
        else:
            assert outcome.is_whole, outcome
            answered[outcome.model].append(outcome)
    admitted = [len(answered[name]) for name in names]
    assert admitted == [len(waits[name]) for name in names], "the log tells of other answers"
    assert min(admitted) >= MIN_ADMITTED * min(1.0, minutes / 5), admitted
    assert refused, "nothing was refused: this was no overload"
    to_start = {
        name: [1000 * (outcome.begun - outcome.sent) for outcome in answered[name]]
        for name in names
    }
    figures: dict[str, object] = {}
    for what, by_name in (("wait", waits), ("to_first_byte", to_start)):
        popular, rare = (
            _p95(by_name, quarter) for quarter in (names[:NUM_QUARTER], names[-NUM_QUARTER:])
        )
        figures[f"{what}_ms_p95"] = {"popular_quarter": popular, "rare_quarter": rare}
        figures[f"{what}_ratio"] = round(rare / popular, 2)
        assert rare <= MAX_RATIO * popular, figures
    retries = [int(outcome.retry_after) for outcome in outcomes if outcome.retry_after]
    return {
        "minutes": minutes,
        "offered": len(outcomes),
        "admitted": len(outcomes) - sum(refused.values()),
        "refused": sum(refused.values()),
        "admitted_by_adapter": admitted,
        "retry_after_seconds": [min(retries), statistics.median(retries), max(retries)],
        "failures": 0,
        **figures,
    }


def _p95(by_name: dict[str, list[float]], names: Sequence[str]) -> float:
    values = [value for name in names for value in by_name[name]]
    return round(float(np.percentile(values, 95)), 1)
