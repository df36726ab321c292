"""Places are given in turn and come back, queues have an end, deadlines are kept."""

import asyncio
from collections import defaultdict
from typing import Any

import pytest

from adapters.errors import DeadlineError, OverloadedError
from rora_serve.admission import Admission
from tests.rora_serve.traffic import is_empty
from tests.rora_serve.virtual_time import run_in_virtual_time


def admission(max_in_flight: int, **limits: Any) -> Admission:
    limits = {"queue_per_tenant": 100, **limits}
    return Admission(max_in_flight, clock=asyncio.get_running_loop().time, **limits)


class Guests:
    """Requests that stay until they are told to go, and the order in which they were let in."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.let_in: list[str] = []
        self.waited: dict[str, float] = {}
        self._leave: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, name: str, **terms: Any) -> None:
        """Bring a request, called like its adapter with a number: `a1`."""

        async def stay() -> None:
            arguments = {"tenant": "t", "adapter": name[0], **terms}
            async with self.admission.place(**arguments) as waited:
                self.let_in.append(name)
                self.waited[name] = waited
                await self._leave[name].wait()

        self._tasks[name] = asyncio.create_task(stay())
        await self.settle()

    async def go(self, *names: str) -> None:
        """Let requests leave that were let in."""
        for name in names:
            self._leave[name].set()
            await self._tasks.pop(name)
        await self.settle()

    async def finish(self) -> None:
        """Let all others go in turn, and see that they leave nothing behind."""
        for name in self._tasks:
            self._leave[name].set()
        await asyncio.gather(*self._tasks.values())
        assert is_empty(self.admission)

    async def hang_up(self, name: str) -> None:
        self._tasks[name].cancel()
        with pytest.raises(asyncio.CancelledError):
            await self._tasks.pop(name)
        await self.settle()

    async def outcome(self, name: str) -> None:
        """Raise what ended a request."""
        await self._tasks.pop(name)

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


def test_free_places_are_given_at_once_and_then_in_turn() -> None:
    async def run() -> None:
        guests = Guests(admission(2))
        for name in ("a1", "a2", "a3", "a4", "b1", "a5", "b2"):
            await guests.come(name)
        assert guests.let_in == ["a1", "a2"]
        assert guests.admission.in_flight == 2
        assert guests.admission.num_waiting == 5
        assert guests.admission.waiting_by_adapter() == {"a": 3, "b": 2}
        await asyncio.sleep(7)
        await guests.go("a1", "b1", "a2", "b2", "a3", "a4", "a5")
        # While a2 has a place, b has what it has not used.
        assert guests.let_in == ["a1", "a2", "b1", "b2", "a3", "a4", "a5"]
        assert guests.waited == {name: 0 if name in ("a1", "a2") else 7 for name in guests.waited}
        assert is_empty(guests.admission)

    run_in_virtual_time(run())


def test_requests_of_one_adapter_keep_their_order_while_it_is_loaded() -> None:
    """One that comes when the adapter is there does not overtake one that waits for its load."""

    async def run() -> None:
        guests = Guests(admission(1))
        await guests.come("b1")
        for name in ("a1", "a2"):
            await guests.come(name, is_cold=True)
        await guests.come("a3", is_cold=False)
        await guests.finish()
        assert guests.let_in == ["b1", "a1", "a2", "a3"]

    run_in_virtual_time(run())


def test_a_request_of_many_sequences_gathers_places_and_nobody_overtakes_it() -> None:
    async def run() -> None:
        guests = Guests(admission(3))
        for name in ("a1", "a2", "b1"):
            await guests.come(name)
        await guests.come("c1", cost=2)
        await guests.come("d1", cost=99)
        await guests.come("e1")
        await guests.go("a1")
        assert guests.admission.in_flight == 2
        assert guests.admission.num_waiting == 3
        await guests.go("a2")
        assert guests.let_in == ["a1", "a2", "b1", "c1"]
        await guests.go("c1")
        assert guests.let_in[-1] == "c1"
        await guests.go("b1")
        assert guests.let_in[-1] == "d1"
        assert guests.admission.in_flight == 3
        await guests.finish()
        assert guests.let_in[-1] == "e1"

    run_in_virtual_time(run())


def test_who_hangs_up_while_gathering_gives_its_places_on() -> None:
    async def run() -> None:
        guests = Guests(admission(2))
        for name in ("a1", "a2"):
            await guests.come(name)
        await guests.come("b1", cost=2)
        await guests.come("c1")
        await guests.go("a1")
        assert guests.let_in == ["a1", "a2"]
        await guests.hang_up("b1")
        assert guests.let_in == ["a1", "a2", "c1"]
        await guests.finish()

    run_in_virtual_time(run())


def test_a_place_that_comes_as_its_request_is_cancelled_goes_on_to_the_next() -> None:
    async def run() -> None:
        guests = Guests(admission(1))
        for name in ("a1", "a2", "a3", "a4"):
            await guests.come(name)
        # Before and after the place is given, and before the loop has told either of it.
        guests._tasks["a2"].cancel()
        guests._leave["a1"].set()
        await asyncio.sleep(0)
        guests._tasks["a3"].cancel()
        await guests.settle()
        assert guests.let_in == ["a1", "a4"]
        assert guests._tasks["a2"].cancelled()
        assert guests._tasks["a3"].cancelled()
        for name in ("a1", "a2", "a3"):
            del guests._tasks[name]
        await guests.finish()

    run_in_virtual_time(run())


def test_a_request_that_fails_in_its_place_leaves_it() -> None:
    async def run() -> None:
        door = admission(1)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                async with door.place(tenant="t", adapter="a"):
                    raise ZeroDivisionError
        assert is_empty(door)

    run_in_virtual_time(run())


def test_10_000_adapters_that_came_and_went_are_forgotten() -> None:
    async def run() -> None:
        door = admission(2)
        async with door.place(tenant="t", adapter="always"):
            for number in range(10_000):
                async with door.place(tenant="t", adapter=f"a{number}", is_cold=number % 2 == 0):
                    await asyncio.sleep(1)
            loaded = door._order._root.children["t"].children["loaded"]
            assert list(loaded.children) == ["always"]
        assert is_empty(door)

    run_in_virtual_time(run())


def test_an_adapter_may_have_as_many_waiting_as_leave_room_for_others() -> None:
    async def run() -> None:
        guests = Guests(admission(1, queue_per_tenant=6))
        await guests.come("x0")
        for name in ("a1", "a2", "a3", "a4"):
            await guests.come(name)
        expected = "a: 3 requests wait for it and 0 for its tenant's others, at most as many as "
        with pytest.raises(OverloadedError, match=f"^{expected}are left of 6 are expected; try"):
            await guests.outcome("a4")
        for name in ("b1", "b2", "b3"):
            await guests.come(name)
        with pytest.raises(OverloadedError, match="b: 2 requests wait for it and 3 for"):
            await guests.outcome("b3")
        await guests.come("c1")
        await guests.come("d1")
        with pytest.raises(OverloadedError, match="d: 0 requests wait for it and 6 for"):
            await guests.outcome("d1")
        await guests.come("d2", tenant="u")
        assert guests.admission.num_waiting == 7
        await guests.finish()

    run_in_virtual_time(run())


def test_memory_of_what_waits_is_bounded_and_no_tenant_takes_all_of_it() -> None:
    async def run() -> None:
        mebibyte = 1024**2
        guests = Guests(admission(1, queue_per_tenant=1000, max_waiting_bytes=8 * mebibyte))
        await guests.come("x0", body_bytes=32 * mebibyte)
        for number in range(5):
            await guests.come(f"a{number}", body_bytes=mebibyte)
        with pytest.raises(OverloadedError, match=r"^a: 1114112 bytes more than the 4456448 that"):
            await guests.outcome("a4")
        for number in range(3):
            await guests.come(f"b{number}", body_bytes=mebibyte, tenant="u")
        with pytest.raises(OverloadedError, match="at most the 1703936 that are left are expected"):
            await guests.outcome("b2")
        await guests.finish()

    run_in_virtual_time(run())


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.01, 1), (2.0, 16), (600.0, 60)], ids=["short", "usual", "long"]
)
def test_a_refusal_says_when_to_come_again_by_how_fast_places_came_free(
    seconds: float, expected: int
) -> None:
    """16 requests wait for 2 places: that takes 8 requests' time."""

    async def run() -> None:
        door = admission(2, queue_per_tenant=32)

        async def use(stay: float) -> None:
            async with door.place(tenant="t", adapter="a"):
                await asyncio.sleep(stay)

        for _ in range(200):
            await use(seconds)
        tasks = [asyncio.create_task(use(seconds)) for _ in range(18)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="try again in") as refusal:
            await use(seconds)
        assert refusal.value.retry_after_seconds == pytest.approx(expected, abs=1)
        assert f"try again in {refusal.value.retry_after_seconds} s" in str(refusal.value)
        await asyncio.gather(*tasks)
        assert is_empty(door)

    run_in_virtual_time(run())


def test_a_request_is_given_up_at_its_deadline_if_it_still_waits() -> None:
    async def run() -> None:
        guests = Guests(admission(2))
        loop = asyncio.get_running_loop()
        await asyncio.sleep(100)
        for name in ("a1", "a2"):
            await guests.come(name, deadline=loop.time() + 5)
        await guests.come("b1", deadline=loop.time() + 2, cost=2)
        await guests.come("c1", deadline=loop.time() + 3)
        await guests.go("a1")
        await asyncio.sleep(2.5)
        with pytest.raises(DeadlineError, match=r"b: no place in 2 s; allow more"):
            await guests.outcome("b1")
        assert guests.let_in == ["a1", "a2", "c1"]
        await asyncio.sleep(100)  # deadlines are for waiting
        await guests.finish()

    run_in_virtual_time(run())


@pytest.mark.parametrize("late", [0.0, 1.5])
def test_a_deadline_that_has_passed_is_refused_at_once(late: float) -> None:
    async def run() -> None:
        door = admission(1)
        await asyncio.sleep(10)
        with pytest.raises(DeadlineError, match=f"a: the deadline passed {late:.3g} s before"):
            async with door.place(tenant="t", adapter="a", deadline=10 - late):
                raise AssertionError("it was let in")
        assert is_empty(door)

    run_in_virtual_time(run())
