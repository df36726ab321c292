"""Whoever comes, waits, hangs up: no place is lost and everyone comes to an end."""

import asyncio
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from rora_serve.admission import Admission
from tests.rora_serve.traffic import is_empty
from tests.rora_serve.virtual_time import run_in_virtual_time


@dataclass(frozen=True)
class Visit:
    """A request of the schedules below; times in seconds."""

    tenant: str
    adapter: str
    comes: int
    stays: int
    cost: int
    is_cold: bool
    weight: float
    patience: int | None
    hangs_up: int | None


visits = st.builds(
    Visit,
    tenant=st.sampled_from("tu"),
    adapter=st.sampled_from("abc"),
    comes=st.integers(0, 12),
    stays=st.integers(0, 8),
    cost=st.integers(1, 5),
    is_cold=st.booleans(),
    weight=st.sampled_from([0.5, 1.0, 3.0]),
    patience=st.none() | st.integers(-1, 10),
    hangs_up=st.none() | st.integers(0, 10),
)


@settings(max_examples=300, deadline=None)
@given(
    schedule=st.lists(visits, min_size=1, max_size=40),
    max_in_flight=st.integers(1, 4),
    queue_per_tenant=st.integers(1, 12),
)
def test_whatever_comes_everyone_comes_to_an_end_and_no_place_is_lost(
    schedule: list[Visit], max_in_flight: int, queue_per_tenant: int
) -> None:
    outcomes = live_through(schedule, max_in_flight, queue_per_tenant)
    assert set(outcomes) <= {"NoneType", "OverloadedError", "DeadlineError", "CancelledError"}


def test_schedules_reach_every_end() -> None:
    """What the test above sees is not only requests that are let in."""
    chooser = random.Random(0)
    schedule = [
        Visit(
            tenant=chooser.choice("tu"),
            adapter=chooser.choice("abc"),
            comes=chooser.randrange(12),
            stays=chooser.randrange(8),
            cost=chooser.randrange(1, 5),
            is_cold=chooser.random() < 0.5,
            weight=1.0,
            patience=chooser.choice([None, 0, 1, 8]),
            hangs_up=chooser.choice([None, None, 0, 1, 8]),
        )
        for _ in range(200)
    ]
    outcomes = live_through(schedule, 4, 12)
    assert set(outcomes) == {"NoneType", "OverloadedError", "DeadlineError", "CancelledError"}


def live_through(schedule: list[Visit], max_in_flight: int, queue_per_tenant: int) -> Counter[str]:
    """Let all come, see that what must hold does at every step, and count how they ended."""

    async def run() -> Counter[str]:
        loop = asyncio.get_running_loop()
        door = Admission(max_in_flight, queue_per_tenant=queue_per_tenant, clock=loop.time)
        inside, numbers = 0, count()
        let_in: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)

        def check() -> None:
            assert inside <= door.in_flight <= max_in_flight
            # Places are free only when nobody waits.
            assert not door.num_waiting or door._free == 0
            assert sum(door.waiting_by_adapter().values()) == door.num_waiting

        async def live(visit: Visit) -> None:
            nonlocal inside
            number = next(numbers)
            deadline = None if visit.patience is None else loop.time() + visit.patience
            async with door.place(
                tenant=visit.tenant,
                adapter=visit.adapter,
                weight=visit.weight,
                cost=visit.cost,
                is_cold=visit.is_cold,
                deadline=deadline,
            ) as waited:
                places = min(visit.cost, max_in_flight)
                inside += places
                let_in[visit.tenant, visit.adapter].append((number, loop.time()))
                assert loop.time() == visit.comes + waited
                assert visit.patience is None or waited <= visit.patience
                check()
                try:
                    await asyncio.sleep(visit.stays)
                finally:
                    inside -= places
            check()

        def arrive(visit: Visit) -> None:
            task = loop.create_task(live(visit))
            tasks.append(task)
            if visit.hangs_up is not None:
                loop.call_later(visit.hangs_up, task.cancel)

        tasks: list[asyncio.Task[None]] = []
        for visit in schedule:
            loop.call_at(visit.comes, arrive, visit)
        await asyncio.sleep(13)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert is_empty(door)
        assert len(outcomes) == len(schedule)
        for turns in let_in.values():
            # By number as they came, so by time as they were let in.
            times = [time for _, time in sorted(turns)]
            assert times == sorted(times)
        return Counter(type(outcome).__name__ for outcome in outcomes)

    return run_in_virtual_time(run())
