"""Stopping waits for what runs, and a dead engine is told at once; in a loop whose clock jumps."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from adapters import AdapterStore
from adapters.errors import EngineDiedError, StoppingError
from rora_serve.lifetime import NOTICE_SECONDS, Lifetime
from tests.rora_serve.echo_server import Server
from tests.rora_serve.virtual_time import run_in_virtual_time as run

DRAIN_SECONDS = 20.0
FAULT = 500


@pytest.fixture
def store(tmp_path: Path, adapter: Path) -> AdapterStore:
    store = AdapterStore(tmp_path / "store")
    store.add(adapter, name="one")
    return store


def now() -> float:
    return asyncio.get_running_loop().time()


async def visit(lifetime: Lifetime, seconds: float) -> None:
    with lifetime.visit():
        await asyncio.sleep(seconds)


async def spend(lifetime: Lifetime, seconds: float) -> asyncio.Task[None]:
    task = asyncio.create_task(visit(lifetime, seconds))
    await asyncio.sleep(0)
    return task


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        pytest.param((), NOTICE_SECONDS, id="nothing"),
        pytest.param((1.0,), NOTICE_SECONDS, id="something short"),
        pytest.param((1.0, 11.0, 6.0), 11.0, id="several"),
        pytest.param((30.0,), DRAIN_SECONDS, id="something too long"),
    ],
)
def test_a_stop_waits_for_what_runs(runs: tuple[float, ...], expected: float) -> None:
    async def test() -> None:
        lifetime = Lifetime(lambda: True)
        tasks = [await spend(lifetime, seconds) for seconds in runs]
        await lifetime.drain(DRAIN_SECONDS)
        assert now() == pytest.approx(expected)
        assert [task.done() for task in tasks] == [seconds <= expected for seconds in runs]
        for task in tasks:
            task.cancel()

    run(test())


def test_readiness_goes_first_and_requests_are_taken_a_little_longer() -> None:
    async def test() -> None:
        lifetime = Lifetime(lambda: True)
        assert lifetime.is_ready
        await spend(lifetime, 10.0)
        stop = asyncio.create_task(lifetime.drain(DRAIN_SECONDS))
        await asyncio.sleep(0.9 * NOTICE_SECONDS)
        assert not lifetime.is_ready
        late = await spend(lifetime, 12.0)
        await asyncio.sleep(0.2 * NOTICE_SECONDS)
        with pytest.raises(StoppingError):
            await visit(lifetime, 0.0)
        await stop
        assert late.done()
        assert now() == pytest.approx(0.9 * NOTICE_SECONDS + 12.0)

    run(test())


@pytest.mark.parametrize("after", [0.5, NOTICE_SECONDS + 3.0])
def test_whoever_asks_twice_waits_no_longer(after: float) -> None:
    async def test() -> None:
        lifetime = Lifetime(lambda: True)
        running = await spend(lifetime, 15.0)
        asyncio.get_running_loop().call_later(after, lifetime.hurry)
        await lifetime.drain(DRAIN_SECONDS)
        assert now() == pytest.approx(after)
        running.cancel()

    run(test())


def test_what_is_given_up_ends_and_nothing_begins() -> None:
    async def test() -> None:
        lifetime = Lifetime(lambda: True)
        running = await spend(lifetime, 15.0)
        lifetime.give_up()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not lifetime.is_ready
        with pytest.raises(StoppingError):
            await visit(lifetime, 0.0)
        assert now() == 0.0

    run(test())


def test_without_time_to_drain_a_stop_waits_for_nothing() -> None:
    async def test() -> None:
        lifetime = Lifetime(lambda: True)
        running = await spend(lifetime, 15.0)
        await lifetime.drain(0.0)
        assert now() == 0.0
        running.cancel()

    run(test())


def test_a_death_gives_up_what_waits_and_ends_in_the_end() -> None:
    async def test() -> None:
        alive = True
        ended_at: list[float] = []
        lifetime = Lifetime(lambda: alive)
        lifetime.watch(lambda: ended_at.append(now()), within=7.0)
        never = asyncio.Event()
        waiting = asyncio.create_task(lifetime.while_alive(wait_for(never)))
        await asyncio.sleep(3.0)
        assert lifetime.is_ready
        assert not waiting.done()
        alive = False
        assert not lifetime.is_ready
        with pytest.raises(EngineDiedError):
            await visit(lifetime, 0.0)
        with pytest.raises(EngineDiedError):
            await waiting
        assert now() < 3.5
        await asyncio.sleep(10.0)
        assert ended_at == [pytest.approx(10.0, abs=0.5)]

    async def wait_for(event: asyncio.Event) -> None:
        await event.wait()

    run(test())


def test_what_waits_in_life_ends_as_it_does() -> None:
    async def value() -> int:
        await asyncio.sleep(1.0)
        return 7

    async def fault() -> None:
        raise KeyError("own")

    async def test() -> None:
        lifetime = Lifetime(lambda: True)
        assert await lifetime.while_alive(value()) == 7
        with pytest.raises(KeyError, match="own"):
            await lifetime.while_alive(fault())

    run(test())


def ask(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def test_while_the_server_stops_clients_are_told_to_ask_another(store: AdapterStore) -> None:
    async def test() -> None:
        server = Server(store)
        server.gate.clear()
        running = asyncio.create_task(server.ask("one"))
        await asyncio.wait_for(_until(lambda: server.num_inside == 1), 5)
        stop = asyncio.create_task(server.lifetime.drain(NOTICE_SECONDS + 30))
        await asyncio.sleep(NOTICE_SECONDS + 0.2)
        answer = await server.ask("one")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "stopping"
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["connection"] == "close"
        # Whoever watches still may.
        assert await server.get("/metrics") == await server.get("/v1/models") == 200
        assert not stop.done()
        server.gate.set()
        assert (await running).status_code == 200
        await asyncio.wait_for(stop, 5)

    ask(test())


def test_after_a_death_every_request_is_503_also_one_whose_handler_fails(
    store: AdapterStore,
) -> None:
    async def test() -> None:
        server = Server(store, places=1)
        server.gate.clear()
        server.lifetime.watch(lambda: None, within=60)
        inside = asyncio.create_task(server.ask("one"))
        await asyncio.wait_for(_until(lambda: server.num_inside == 1), 5)
        waiting = asyncio.create_task(server.ask("base"))
        await asyncio.wait_for(_until(lambda: server.reception.admission.num_waiting == 1), 5)
        server.is_alive = False
        late = await server.ask("base")
        waited = await asyncio.wait_for(waiting, 5)
        server.gate.set()
        failed = await asyncio.wait_for(inside, 5)
        for answer in (late, waited, failed):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_died"
            assert answer.headers["retry-after"] == "1"

    ask(test())


def test_faults_of_a_living_engine_stay_as_they_are(store: AdapterStore) -> None:
    async def test() -> None:
        server = Server(store)
        server.fails = True
        answer = await server.ask("base")
        assert answer.status_code == FAULT
        assert "connection" not in answer.headers

    ask(test())


async def _until(holds: Any) -> None:
    while not holds():
        await asyncio.sleep(0.01)
