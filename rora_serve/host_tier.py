"""HostTier: which adapters the engine holds in memory, by bytes; the least recently used goes."""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from adapters.errors import AdapterMismatchError, ResidencyError

# Where an adapter is: in the engine and needed there; in the engine and free to go; on disk.
Tier = Literal["slot", "host", "store"]

# Pinned adapters leave at least this share of the memory to those that come and go.
MAX_PINNED_SHARE = 0.5
# How long an adapter waits for room that others' requests leave by themselves.
_PATIENCE_SECONDS = 5.0
_TURN_SECONDS = 1.0  # the same, if it waited as long for its turn to get room


def check_fits(num_bytes: int, left: int) -> None:
    """See that an adapter fits the memory that pinned ones leave.

    Raises: AdapterMismatchError: it never will.
    """
    if num_bytes > left:
        raise AdapterMismatchError(
            f"takes {num_bytes} bytes, adapters that are not pinned have {left}; start the server "
            "with a larger --adapter-memory-bytes"
        )


@dataclass
class _Resident:
    """An adapter in the engine, or on its way there."""

    num_bytes: int
    leases: int = 0
    pins: int = 0
    is_due: bool = False  # to go as soon as its requests have ended; new ones wait for that
    arrival: "asyncio.Task[None] | None" = field(default=None, repr=False)

    @property
    def is_needed(self) -> bool:
        return self.leases > 0 or self.pins > 0

    @property
    def has_arrived(self) -> bool:
        return self.arrival is not None and self.arrival.done()

    @property
    def may_go(self) -> bool:
        return self.has_arrived and not self.is_needed


class HostTier:
    """Keeps adapters in the engine as long as requests need them, and then while there is room.

    Adapters are told apart by a key, their weights digest. Single-threaded: all calls come from one
    event loop.

    Args:
        capacity: bytes.
        drop: takes adapters out of the engine, given their keys.
        gone: told of an adapter that did not come in.
        evicted: told of one that has to make room for others.
    """

    def __init__(
        self,
        capacity: int,
        drop: Callable[[list[str]], Awaitable[None]],
        gone: Callable[[str], Awaitable[None]],
        evicted: Callable[[str], None],
    ) -> None:
        self.capacity = capacity
        self._drop = drop
        self._gone = gone
        self._evicted = evicted
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        # What is being taken out: it is loaded again only after that.
        self._leaving: dict[str, asyncio.Task[None]] = {}
        # Who waits for an adapter to go, to have it come in again.
        self._awaiting: Counter[str] = Counter()
        self._used = 0
        self._making_room = asyncio.Lock()
        self._released = asyncio.Event()

    @property
    def num_bytes(self) -> int:
        """Bytes of what is held, and of what room was made for."""
        return self._used

    @property
    def num_held(self) -> int:
        """Adapters in the engine or on their way."""
        return len(self._residents)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each adapter that is in the engine; from any thread."""
        # Copied in one go, which no other thread comes between.
        return {
            key: held.num_bytes for key, held in list(self._residents.items()) if held.has_arrived
        }

    def holds(self, key: str) -> bool:
        """Tell whether an adapter is in the engine or on its way."""
        return key in self._residents

    def is_ready(self, key: str) -> bool:
        """Tell whether a lease would not have to wait for others, once what loads has loaded."""
        resident = self._residents.get(key)
        return resident is not None and not resident.is_due

    def is_awaited(self, key: str) -> bool:
        """Tell whether an adapter will come in again as soon as it has gone."""
        return key in self._awaiting

    def is_needed(self, key: str) -> bool:
        """Tell whether somebody leases or pins an adapter."""
        resident = self._residents.get(key)
        return resident is not None and resident.is_needed

    def tier_of(self, key: str) -> Tier:
        """Return where an adapter is; one that is on its way is still in the store."""
        resident = self._residents.get(key)
        if resident is None or not resident.has_arrived:
            return "store"
        return "slot" if resident.is_needed else "host"

    async def lease(self, key: str, num_bytes: int, load: Callable[[], Awaitable[int]]) -> None:
        """Have an adapter in the engine until `release`; whoever comes while it loads waits too.

        Adapters in steady use keep others out for some seconds only: then those that were used
        least recently take no more leases until there is room for who waits.

        Args:
            key: of the adapter.
            num_bytes: what it will take, to make room beforehand.
            load: brings it into the engine and returns the bytes that it takes.
        Raises: AdapterMismatchError: it is larger than all the memory for adapters; and whatever
            `load` raises.
        """
        self._awaiting[key] += 1
        try:
            while (resident := self._residents.get(key)) is not None and resident.is_due:
                self._released.clear()
                await self._released.wait()
        finally:
            self._awaiting[key] -= 1
            if not self._awaiting[key]:
                del self._awaiting[key]
        if resident is None:
            self._check_fits(num_bytes)
            resident = _Resident(num_bytes)
            self._residents[key] = resident
            resident.arrival = asyncio.create_task(self._bring_in(key, resident, load))
            # Those who wait for it may be gone by then.
            resident.arrival.add_done_callback(self._note_arrival)
        resident.leases += 1
        assert resident.arrival is not None
        try:
            # One client that hangs up must not cancel what others wait for.
            await asyncio.shield(resident.arrival)
        except BaseException:
            self._let_go(resident)
            raise
        if self._residents.get(key) is resident:
            self._residents.move_to_end(key)

    def release(self, key: str) -> None:
        """End one lease."""
        self._let_go(self._residents[key])

    def pin(self, key: str) -> None:
        """Keep an adapter that is leased now, whatever else comes, until as many `unpin`.

        Raises: ResidencyError: pinned adapters would take more than half of the memory.
        """
        resident = self._residents[key]
        pinned = self._pinned_bytes + resident.num_bytes
        if not resident.pins and pinned > MAX_PINNED_SHARE * self.capacity:
            raise ResidencyError(
                f"pinned adapters would take {pinned} of {self.capacity} bytes, at most "
                f"{MAX_PINNED_SHARE:.0%} may be pinned; unpin another one"
            )
        resident.pins += 1
        resident.is_due = False
        self._released.set()  # whoever waits for room may not get it any more

    def unpin(self, key: str) -> None:
        """Take one pin off an adapter; without any it goes like others."""
        resident = self._residents[key]
        resident.pins -= 1
        assert resident.pins >= 0
        self._released.set()

    async def unload(self, key: str, *, within: float | None = None) -> bool:
        """Take an adapter out of the engine once nobody leases it; one that is pinned stays.

        Args: within: seconds to wait for leases; None waits for ever.
        Returns: whether nobody leased it any more.
        """
        try:
            async with asyncio.timeout(within):
                while self._is_busy(key):
                    self._released.clear()
                    await self._released.wait()
        except TimeoutError:
            return False
        resident = self._residents.get(key)
        if resident is not None and resident.may_go:
            self._take_out([key])
        leaving = self._leaving.get(key)
        if leaving is not None:
            await asyncio.shield(leaving)
        return True

    def _is_busy(self, key: str) -> bool:
        resident = self._residents.get(key)
        return resident is not None and (resident.leases > 0 or not resident.has_arrived)

    @property
    def _pinned_bytes(self) -> int:
        return sum(r.num_bytes for r in self._residents.values() if r.pins)

    def _let_go(self, resident: _Resident) -> None:
        resident.leases -= 1
        assert resident.leases >= 0
        self._released.set()

    async def _bring_in(
        self, key: str, resident: _Resident, load: Callable[[], Awaitable[int]]
    ) -> None:
        reserved = 0
        patient_until = asyncio.get_running_loop().time() + _PATIENCE_SECONDS
        try:
            leaving = self._leaving.get(key)
            if leaving is not None:
                await leaving
            # In the order in which they came: a large one is not overtaken for ever.
            async with self._making_room:
                await self._make_room(resident, patient_until)
                reserved = resident.num_bytes
                self._used += reserved
            resident.num_bytes = await load()
            self._used += resident.num_bytes - reserved
        except BaseException:
            self._used -= reserved
            del self._residents[key]
            self._released.set()
            await self._gone(key)
            raise

    def _note_arrival(self, arrival: "asyncio.Task[None]") -> None:
        if not arrival.cancelled():
            arrival.exception()  # seen, also if nobody waited for it
        self._released.set()

    def _check_fits(self, num_bytes: int) -> None:
        check_fits(num_bytes, self.capacity - self._pinned_bytes)

    async def _make_room(self, coming: _Resident, patient_until: float) -> None:
        """Wait until an adapter has room, and after some time see that others leave it.

        Raises: asyncio.CancelledError: nobody waits for it any more; and as `_check_fits`.
        """
        loop, num_bytes = asyncio.get_running_loop(), coming.num_bytes
        patient_until = max(patient_until, loop.time() + _TURN_SECONDS)
        try:
            while True:
                if not coming.leases:
                    raise asyncio.CancelledError
                if self._used + num_bytes <= self.capacity:
                    return
                self._check_fits(num_bytes)  # others may have been pinned while it waited
                leaving = self._least_recent(num_bytes, lambda resident: resident.may_go)
                if leaving:
                    for key in leaving:
                        self._evicted(key)
                    await self._take_out(leaving)
                    continue
                is_patient = loop.time() < patient_until
                if not is_patient:
                    for key in self._least_recent(num_bytes, lambda resident: not resident.pins):
                        self._residents[key].is_due = True
                self._released.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(patient_until if is_patient else None):
                        await self._released.wait()
        finally:
            for resident in self._residents.values():
                resident.is_due = False
            self._released.set()

    def _least_recent(self, num_bytes: int, may: Callable[[_Resident], bool]) -> list[str]:
        """Return adapters that may go, as many as make room, or all if that is not enough."""
        keys: list[str] = []
        left = self._used
        for key, resident in self._residents.items():
            if left + num_bytes <= self.capacity:
                break
            if resident.has_arrived and may(resident):
                keys.append(key)
                left -= resident.num_bytes
        return keys

    def _take_out(self, keys: list[str]) -> "asyncio.Task[None]":
        """Begin to take adapters out of the engine that may go."""
        num_bytes = sum(self._residents.pop(key).num_bytes for key in keys)
        task = asyncio.create_task(self._leave(keys, num_bytes))
        self._leaving |= dict.fromkeys(keys, task)
        return task

    async def _leave(self, keys: list[str], num_bytes: int) -> None:
        try:
            await self._drop(keys)
            self._used -= num_bytes
        finally:
            for key in keys:
                del self._leaving[key]
            self._released.set()
