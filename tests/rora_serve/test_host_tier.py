"""What is needed stays, the rest goes in the order in which it was used, nothing overflows."""

import asyncio
import random
from contextlib import suppress

import pytest

from adapters.errors import AdapterMismatchError, ResidencyError
from rora_serve.host_tier import HostTier


class Engine:
    """Holds what the tier loads, and sees that a load never meets the drop of the same adapter."""

    def __init__(self, capacity: int) -> None:
        self.held: dict[str, int] = {}
        self.num_loads = 0
        self.gone: list[str] = []
        self.evicted: list[str] = []
        self.tier = HostTier(capacity, self.drop, self.note_gone, self.evicted.append)

    async def lease(self, key: str, num_bytes: int = 10) -> None:
        async def load() -> int:
            assert key not in self.held
            await asyncio.sleep(0.001)
            self.held[key] = num_bytes
            self.num_loads += 1
            assert sum(self.held.values()) <= self.tier.capacity
            return num_bytes

        await self.tier.lease(key, num_bytes, load)

    async def note_gone(self, key: str) -> None:
        self.gone.append(key)

    async def drop(self, keys: list[str]) -> None:
        await asyncio.sleep(0.001)
        for key in keys:
            del self.held[key]


def test_the_least_recently_used_goes_first() -> None:
    async def run() -> None:
        engine = Engine(30)
        for key in ("a", "b", "c", "a"):
            await engine.lease(key)
            engine.tier.release(key)
        await engine.lease("d")
        assert set(engine.held) == {"a", "c", "d"}
        assert engine.num_loads == 4
        await engine.lease("e", 20)
        assert set(engine.held) == {"d", "e"}
        assert engine.tier.num_bytes == 30
        assert engine.tier.sizes() == {"d": 10, "e": 20}
        assert engine.evicted == ["b", "c", "a"]

    asyncio.run(run())


def test_what_is_leased_or_pinned_stays_and_the_rest_waits_in_order() -> None:
    async def run() -> None:
        engine = Engine(30)
        await engine.lease("pinned")
        engine.tier.pin("pinned")
        engine.tier.release("pinned")
        await engine.lease("leased")
        large = asyncio.create_task(engine.lease("large", 20))
        await asyncio.sleep(0.01)
        small = asyncio.create_task(engine.lease("small"))
        await asyncio.sleep(0.01)
        assert set(engine.held) == {"pinned", "leased"}
        engine.tier.release("leased")
        await large
        assert set(engine.held) == {"pinned", "large"}
        assert not small.done()
        engine.tier.unpin("pinned")
        await small
        assert set(engine.held) == {"large", "small"}

    asyncio.run(run())


def test_steady_use_of_others_keeps_nobody_out_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rora_serve.host_tier._PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr("rora_serve.host_tier._TURN_SECONDS", 0.02)

    async def run() -> None:
        engine = Engine(20)
        is_over = False

        async def use(key: str) -> None:
            """Hold it always: a lease begins before the one before it ends."""
            await engine.lease(key)
            while not is_over:
                again = asyncio.create_task(engine.lease(key))
                await asyncio.sleep(0.005)
                engine.tier.release(key)
                await again
            engine.tier.release(key)

        users = [asyncio.create_task(use(key)) for key in ("a", "b")]
        await asyncio.sleep(0.01)
        assert set(engine.held) == {"a", "b"}
        async with asyncio.timeout(2):
            for key in ("c", "d", "c"):
                await engine.lease(key)
                await asyncio.sleep(0.02)
                engine.tier.release(key)
        is_over = True
        async with asyncio.timeout(2):
            await asyncio.gather(*users)  # who were put out come in again
        assert engine.num_loads >= 5

    asyncio.run(run())


def test_what_nobody_waits_for_any_more_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rora_serve.host_tier._PATIENCE_SECONDS", 0.02)
    monkeypatch.setattr("rora_serve.host_tier._TURN_SECONDS", 0.02)

    async def run() -> None:
        engine = Engine(10)
        await engine.lease("a")
        left = [asyncio.create_task(engine.lease(key)) for key in ("b", "c", "d")]
        await asyncio.sleep(0.01)
        for task in left:
            task.cancel()
        await asyncio.sleep(0.05)
        assert engine.gone == ["b", "c", "d"]
        assert engine.tier.is_ready("a")
        engine.tier.release("a")
        await engine.lease("a")  # which is still there
        assert engine.num_loads == 1
        # Who waits for it to come in again is known, while it goes and it is not held.
        other = asyncio.create_task(engine.lease("b"))
        await asyncio.sleep(0.05)
        again = asyncio.create_task(engine.lease("a"))
        await asyncio.sleep(0.01)
        assert not engine.tier.is_ready("a")
        assert engine.tier.is_awaited("a")
        engine.tier.release("a")
        await other
        engine.tier.release("b")
        await again
        assert not engine.tier.is_awaited("a")
        assert engine.held == {"a": 10}

    asyncio.run(run())


def test_pins_leave_room_for_what_comes_and_goes() -> None:
    async def run() -> None:
        engine = Engine(40)
        for key in ("a", "b", "c"):
            await engine.lease(key)
        engine.tier.pin("a")
        engine.tier.pin("b")
        engine.tier.pin("b")
        with pytest.raises(ResidencyError, match="30 of 40 bytes, at most 50% may be pinned"):
            engine.tier.pin("c")
        engine.tier.unpin("a")
        engine.tier.pin("c")
        engine.tier.unpin("b")
        with pytest.raises(ResidencyError, match="30 of 40"):
            engine.tier.pin("a")  # one of two pins is left
        engine.tier.unpin("b")
        engine.tier.pin("a")

    asyncio.run(run())


def test_where_an_adapter_is() -> None:
    async def run() -> None:
        engine = Engine(30)
        assert engine.tier.tier_of("a") == "store"
        coming = asyncio.create_task(engine.lease("a"))
        await asyncio.sleep(0)
        assert (engine.tier.tier_of("a"), engine.tier.is_needed("a")) == ("store", True)
        await coming
        assert engine.tier.tier_of("a") == "slot"
        engine.tier.pin("a")
        engine.tier.release("a")
        assert engine.tier.tier_of("a") == "slot"
        engine.tier.unpin("a")
        assert (engine.tier.tier_of("a"), engine.tier.is_needed("a")) == ("host", False)

    asyncio.run(run())


def test_an_unload_waits_for_leases_frees_the_room_and_spares_the_pinned() -> None:
    async def run() -> None:
        engine = Engine(30)
        assert await engine.tier.unload("nobody")
        await engine.lease("a")
        assert not await engine.tier.unload("a", within=0.01)
        assert engine.held == {"a": 10}
        unload = asyncio.create_task(engine.tier.unload("a"))
        await asyncio.sleep(0.01)
        assert not unload.done()
        engine.tier.pin("a")
        engine.tier.release("a")
        assert await unload
        assert engine.tier.holds("a")
        engine.tier.unpin("a")
        assert await engine.tier.unload("a")
        assert (engine.held, engine.tier.num_bytes) == ({}, 0)

    asyncio.run(run())


def test_what_is_leaving_is_loaded_again_only_when_it_is_out() -> None:
    """The engine's asserts see a load of what is still there, and one too many."""

    async def run() -> None:
        engine = Engine(10)
        await engine.lease("a")
        engine.tier.release("a")
        unloads = [asyncio.create_task(engine.tier.unload("a")) for _ in range(3)]
        await asyncio.sleep(0)
        await engine.lease("a")
        assert all(await asyncio.gather(*unloads))
        assert engine.held == {"a": 10}
        # One who no longer waits for its unload does not stop it.
        engine.tier.release("a")
        unload = asyncio.create_task(engine.tier.unload("a"))
        await asyncio.sleep(0)
        unload.cancel()
        await engine.lease("b")
        assert engine.held == {"b": 10}

    asyncio.run(run())


def test_an_unload_goes_on_beside_one_that_waits_for_room() -> None:
    async def run() -> None:
        engine = Engine(30)
        await engine.lease("a")
        await engine.lease("b")
        large = asyncio.create_task(engine.lease("large", 30))
        await asyncio.sleep(0.01)
        unload = asyncio.create_task(engine.tier.unload("a"))
        engine.tier.release("a")
        async with asyncio.timeout(1):
            assert await unload
        assert not large.done()
        engine.tier.release("b")
        await large

    asyncio.run(run())


def test_whoever_waits_for_room_is_told_of_what_nobody_waits_for_any_more() -> None:
    async def run() -> None:
        engine = Engine(10)
        leaving = asyncio.create_task(engine.lease("a"))
        await asyncio.sleep(0)
        leaving.cancel()
        async with asyncio.timeout(1):
            await engine.lease("b")

    asyncio.run(run())


def test_a_load_that_fails_leaves_its_room_and_is_tried_again() -> None:
    async def run() -> None:
        engine = Engine(10)

        async def fail() -> int:
            raise OSError("lost")

        waiting = [asyncio.create_task(engine.tier.lease("a", 10, fail)) for _ in range(3)]
        assert all(
            isinstance(e, OSError) for e in await asyncio.gather(*waiting, return_exceptions=True)
        )
        assert engine.tier.num_bytes == 0
        assert not engine.tier.holds("a")
        await engine.lease("a")
        assert engine.held == {"a": 10}

    asyncio.run(run())


def test_what_does_not_fit_beside_the_pinned_is_refused_and_blocks_nobody() -> None:
    async def run() -> None:
        engine = Engine(100)
        await engine.lease("pinned", 40)
        engine.tier.pin("pinned")
        with pytest.raises(AdapterMismatchError, match="not pinned have 60"):
            await engine.lease("large", 70)
        await engine.lease("small", 5)

    asyncio.run(run())


def test_what_never_fits_is_refused_at_once() -> None:
    async def run() -> None:
        engine = Engine(10)
        with pytest.raises(AdapterMismatchError, match=r"takes 11 bytes, adapters .* have 10"):
            await engine.lease("a", 11)

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(5))
def test_many_tasks_that_come_leave_and_are_cancelled(seed: int) -> None:
    """The engine's asserts see every overflow and every load of what is there or still leaving."""

    async def run() -> None:
        chooser = random.Random(seed)
        engine = Engine(50)
        sizes = {str(number): chooser.randint(1, 25) for number in range(12)}

        async def use() -> None:
            key = chooser.choice(list(sizes))
            await engine.lease(key, sizes[key])
            try:
                assert key in engine.held
                await asyncio.sleep(chooser.random() * 0.01)
                assert key in engine.held
            finally:
                engine.tier.release(key)

        async def use_or_leave() -> None:
            await asyncio.sleep(chooser.random() * 0.5)
            try:
                async with asyncio.timeout(chooser.choice([0.002, 5])):
                    await use()
            except TimeoutError:
                pass

        async def unload() -> None:
            await asyncio.sleep(chooser.random() * 0.5)
            await engine.tier.unload(chooser.choice(list(sizes)))

        async def pin() -> None:
            await asyncio.sleep(chooser.random() * 0.5)
            key = chooser.choice(list(sizes))
            await engine.lease(key, sizes[key])
            with suppress(ResidencyError):
                engine.tier.pin(key)
                await asyncio.sleep(0.002)
                assert key in engine.held
                engine.tier.unpin(key)
            engine.tier.release(key)

        uses = [use_or_leave() for _ in range(400)]
        await asyncio.gather(*uses, *(unload() for _ in range(100)), *(pin() for _ in range(100)))
        assert engine.tier.num_bytes == sum(engine.held.values()) <= 50

    asyncio.run(run())
