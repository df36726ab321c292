"""A server whose engine is killed while it answers, and what everybody sees of that, and when."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
import psutil

from benchmarks.load import prompts
from tests.rora_serve.serving import Server
from tests.rora_serve.streaming import TIMEOUT, Outcome, ask, limits

NUM_CLIENTS, NUM_TOKENS = 8, 800  # answers that take long on any machine
SECONDS_BEFORE, SECONDS_AFTER = 3.0, 30.0
READY_EVERY = 0.02

Statuses = list[tuple[float, int | str]]


@dataclass
class Death:
    """What was seen; all times are seconds since the kill.

    Args:
        ready: when `/ready` was asked, and its status, or the kind of error.
        health: the same of `/health`.
        running: requests that were sent before the kill and had not ended.
        later: requests that were sent after it.
        exited: when the server's process was gone, None if it stayed.
        code: of its exit.
        left: processes of the server that were alive a while after it.
    """

    ready: Statuses = field(default_factory=list)
    health: Statuses = field(default_factory=list)
    running: list[tuple[float, Outcome]] = field(default_factory=list)
    later: list[tuple[float, Outcome]] = field(default_factory=list)
    exited: float | None = None
    code: int | None = None
    left: list[str] = field(default_factory=list)

    def told(self) -> str:
        """Return the whole as lines."""
        lines = [f"exit code {self.code} after {self.exited} s; left: {self.left}"]
        for name, seen in (("/ready", self.ready), ("/health", self.health)):
            lines.append(f"{name}: {_runs(seen)}")
        for name, requests in (("running", self.running), ("later", self.later)):
            kinds = Counter(kind_of(outcome) for _, outcome in requests)
            lines.append(f"{name}: {dict(kinds)}")
            ends = sorted(at for at, _ in requests)
            lines.append(f"{name} ended at: {[round(at, 3) for at in ends[:12]]}")
        return "\n".join(lines)


def kind_of(outcome: Outcome) -> str:
    """Say in a few words how a request ended."""
    if outcome.is_whole:
        return "whole"
    if outcome.status is None:
        return f"no answer: {outcome.error}"
    if outcome.status != 200:
        return f"{outcome.status}: {outcome.body}"
    return f"broken after {'some' if outcome.tokens else 'no'} tokens: {outcome.error}"


def engine_processes(server: Server) -> dict[str, psutil.Process]:
    """Return the processes of vLLM's engine core and of its worker, by `core` and `worker`."""
    found = {}
    for process in psutil.Process(server.process.pid).children(recursive=True):
        title = " ".join(process.cmdline())
        if "EngineCore" in title:
            found["core"] = process
        elif "Worker" in title:
            found["worker"] = process
    return found


def kill_under_traffic(server: Server, models: Sequence[str], which: str) -> Death:
    """Kill the engine's `core` or `worker` under traffic; every other client streams."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    death = asyncio.run(_run(server, models, engine_processes(server)[which]))
    _, alive = psutil.wait_procs(family, timeout=5)
    death.left = [" ".join(process.cmdline())[:80] for process in alive]
    return death


async def _run(server: Server, models: Sequence[str], victim: psutil.Process) -> Death:
    death, asked = Death(), list[Outcome]()
    killed_at = float("inf")
    is_over = asyncio.Event()

    async def client_loop(client: httpx.AsyncClient, number: int) -> None:
        prompt = prompts(number, 1, 12)[0]
        while not is_over.is_set():
            model, stream = models[number % len(models)], number % 2 == 0
            outcome = await ask(client, model, prompt, NUM_TOKENS, stream=stream)
            asked.append(outcome)
            if not outcome.is_whole:
                await asyncio.sleep(0.05)

    async def watch(client: httpx.AsyncClient, path: str, seen: Statuses) -> None:
        while not is_over.is_set():
            at = time.monotonic()
            try:
                status: int | str = (await client.get(path)).status_code
            except httpx.HTTPError as error:
                status = type(error).__name__
            seen.append((at, status))
            await asyncio.sleep(READY_EVERY)

    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT, limits=limits()) as client:
        tasks = [asyncio.create_task(client_loop(client, n)) for n in range(NUM_CLIENTS)]
        tasks.append(asyncio.create_task(watch(client, "/ready", death.ready)))
        tasks.append(asyncio.create_task(watch(client, "/health", death.health)))
        await asyncio.sleep(SECONDS_BEFORE)
        killed_at = time.monotonic()
        victim.kill()
        while time.monotonic() < killed_at + SECONDS_AFTER:
            death.code = server.process.poll()
            if death.code is not None:
                death.exited = round(time.monotonic() - killed_at, 2)
                break
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)
        is_over.set()
        await asyncio.wait(tasks, timeout=10)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    death.ready = [(at - killed_at, status) for at, status in death.ready]
    death.health = [(at - killed_at, status) for at, status in death.health]
    for outcome in asked:
        if outcome.ended > killed_at:
            kind = death.running if outcome.sent < killed_at else death.later
            kind.append((outcome.ended - killed_at, outcome))
    return death


def _runs(seen: Statuses) -> str:
    """Shorten what was seen to its changes."""
    parts: list[str] = []
    last: int | str | None = None
    for at, status in seen:
        if status != last:
            parts.append(f"{status} from {at:.2f}")
            last = status
    return ", ".join(parts)
