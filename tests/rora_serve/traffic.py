"""Requests of many clients against an Admission in virtual time, and what became of them."""

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from adapters.errors import OverloadedError
from rora_serve.admission import Admission

Place = Callable[..., AbstractAsyncContextManager[float]]
Seconds = Callable[[random.Random], float]


@dataclass(frozen=True)
class Flow:
    """Alike requests of one tenant for one adapter."""

    adapter: str = "x"
    tenant: str = "t"
    weight: float = 1.0
    cost: int = 1
    is_cold: bool = False

    @property
    def terms(self) -> dict[str, Any]:
        return self.__dict__


@dataclass(frozen=True)
class Visit:
    """A request that was let in."""

    flow: Flow
    waited: float
    start: float
    end: float


def about(mean: float) -> Seconds:
    """Return lengths that differ as those of requests do: exponentially distributed."""
    return lambda chooser: chooser.expovariate(1 / mean)


@dataclass
class Traffic:
    """Clients, and notes of their requests."""

    place: Place
    chooser: random.Random = field(default_factory=lambda: random.Random(0))
    visits: list[Visit] = field(default_factory=list)
    refused: Counter[Flow] = field(default_factory=Counter)
    _tasks: set["asyncio.Task[None]"] = field(default_factory=set)

    async def ask(self, flow: Flow, seconds: float) -> None:
        """Send one request, which runs for `seconds`."""
        loop = asyncio.get_running_loop()
        try:
            async with self.place(**flow.terms) as waited:
                start = loop.time()
                try:
                    await asyncio.sleep(seconds)
                finally:
                    self.visits.append(Visit(flow, waited, start, loop.time()))
        except OverloadedError:
            self.refused[flow] += 1

    def start(self, client: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(client)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def connect(self, flow: Flow, seconds: Seconds, *, connections: int) -> None:
        """Start connections that send a request as soon as the last one is answered."""

        async def client() -> None:
            while True:
                await self.ask(flow, seconds(self.chooser))

        for _ in range(connections):
            self.start(client())

    def send(self, flow: Flow, seconds: Seconds, *, per_second: float) -> None:
        """Start sending requests at a rate, whatever becomes of them."""

        async def sender() -> None:
            while True:
                await asyncio.sleep(self.chooser.expovariate(per_second))
                self.start(self.ask(flow, seconds(self.chooser)))

        self.start(sender())

    async def stop(self) -> None:
        """Hang up, everywhere."""
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def used(self, *, since: float = 0.0) -> dict[Flow, float]:
        """Return each flow's share of the place-seconds that all had from a time on."""
        seconds: defaultdict[Flow, float] = defaultdict(float)
        for visit in self.visits:
            seconds[visit.flow] += visit.flow.cost * max(0.0, visit.end - max(visit.start, since))
        total = sum(seconds.values())
        return {flow: used / total for flow, used in seconds.items()}

    def waits(self, *flows: Flow) -> list[float]:
        """Return how long the requests of some flows waited."""
        return [visit.waited for visit in self.visits if visit.flow in flows]


def p95(values: list[float]) -> float:
    """Return the 95th percentile."""
    return sorted(values)[int(0.95 * len(values))]


def first_come(max_in_flight: int, *, max_waiting: int = 1_000_000) -> Place:
    """Return what there would be without fairness: one queue, first come, first served."""
    places = asyncio.Semaphore(max_in_flight)
    waiting = [0]

    @asynccontextmanager
    async def place(**_: Any) -> AsyncIterator[float]:
        if waiting[0] >= max_waiting:
            raise OverloadedError("full")
        loop = asyncio.get_running_loop()
        came = loop.time()
        waiting[0] += 1
        try:
            await places.acquire()
        finally:
            waiting[0] -= 1
        try:
            yield loop.time() - came
        finally:
            places.release()

    return place


def is_empty(admission: Admission) -> bool:
    """Tell whether nothing is left of all requests, accounts included."""
    root = admission._order._root
    left = [root.children, root.waiting, root.owing]
    left += [admission._of_tenant, admission._of_adapter, admission._bytes_of_tenant]
    counts = [admission.in_flight, admission.num_waiting, admission._num_bytes]
    counts += [admission._num_places, admission.max_in_flight - admission._free]
    return not any(left) and not any(counts) and admission._gathering is None
