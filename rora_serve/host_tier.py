"""HostTier: which adapters the engine holds in memory, by bytes; the least recently used goes."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from adapters.errors import AdapterMismatchError

# Pinned adapters leave at least this share of the memory to those that come and go.
MAX_PINNED_SHARE = 0.5


@dataclass
class _Resident:
    """An adapter in the engine, or on its way there."""

    num_bytes: int
    leases: int = 0
    is_pinned: bool = False
    arrival: "asyncio.Task[None] | None" = field(default=None, repr=False)

    @property
    def may_go(self) -> bool:
        has_arrived = self.arrival is not None and self.arrival.done()
        return has_arrived and self.leases == 0 and not self.is_pinned


class HostTier:
    """Keeps adapters in the engine as long as requests need them, and then while there is room.

    Adapters are told apart by a key, their weights digest. Single-threaded: all calls come from one
    event loop.

    Args:
        capacity: bytes.
        drop: takes adapters out of the engine, given their keys.
    """

    def __init__(self, capacity: int, drop: Callable[[list[str]], Awaitable[None]]) -> None:
        self.capacity = capacity
        self._drop = drop
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._used = 0
        self._making_room = asyncio.Lock()
        self._released = asyncio.Event()

    @property
    def num_bytes(self) -> int:
        """Bytes of what is held, and of what room was made for."""
        return self._used

    def holds(self, key: str) -> bool:
        """Tell whether an adapter is in the engine or on its way."""
        return key in self._residents

    async def lease(self, key: str, num_bytes: int, load: Callable[[], Awaitable[int]]) -> None:
        """Have an adapter in the engine until `release`; whoever comes while it loads waits too.

        Args:
            key: of the adapter.
            num_bytes: what it will take, to make room beforehand.
            load: brings it into the engine and returns the bytes that it takes.
        Raises: AdapterMismatchError: it is larger than all the memory for adapters; and whatever
            `load` raises.
        """
        resident = self._residents.get(key)
        if resident is None:
            left = self.capacity - self._pinned_bytes
            if num_bytes > left:
                raise AdapterMismatchError(
                    f"takes {num_bytes} bytes, adapters that are not pinned have {left}; start the "
                    "server with a larger --adapter-memory-bytes"
                )
            resident = _Resident(num_bytes)
            self._residents[key] = resident
            resident.arrival = asyncio.create_task(self._bring_in(key, resident, load))
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
        """Keep an adapter that is leased now, whatever else comes.

        Raises: AdapterMismatchError: pinned adapters would take more than half of the memory.
        """
        resident = self._residents[key]
        pinned = self._pinned_bytes + resident.num_bytes
        if not resident.is_pinned and pinned > MAX_PINNED_SHARE * self.capacity:
            raise AdapterMismatchError(
                f"pinned adapters would take {pinned} of {self.capacity} bytes, at most "
                f"{MAX_PINNED_SHARE:.0%} may be pinned; unpin another one"
            )
        resident.is_pinned = True

    def unpin(self, key: str) -> None:
        """Let a pinned adapter go like others; one that is not pinned stays as it is."""
        resident = self._residents.get(key)
        if resident is not None:
            resident.is_pinned = False
            self._released.set()

    @property
    def _pinned_bytes(self) -> int:
        return sum(r.num_bytes for r in self._residents.values() if r.is_pinned)

    def _let_go(self, resident: _Resident) -> None:
        resident.leases -= 1
        assert resident.leases >= 0
        self._released.set()

    async def _bring_in(
        self, key: str, resident: _Resident, load: Callable[[], Awaitable[int]]
    ) -> None:
        reserved = 0
        try:
            # In the order in which they came: a large one is not overtaken for ever. What goes is
            # gone before this returns, so that a load never meets the drop of its own adapter.
            async with self._making_room:
                await self._make_room(resident.num_bytes)
                reserved = resident.num_bytes
                self._used += reserved
            resident.num_bytes = await load()
            self._used += resident.num_bytes - reserved
        except BaseException:
            self._used -= reserved
            del self._residents[key]
            self._released.set()
            raise

    async def _make_room(self, num_bytes: int) -> None:
        while self._used + num_bytes > self.capacity:
            leaving = []
            left = self._used
            for key, resident in self._residents.items():
                if left + num_bytes <= self.capacity:
                    break
                if resident.may_go:
                    leaving.append(key)
                    left -= resident.num_bytes
            if not leaving:
                self._released.clear()
                await self._released.wait()
                continue
            gone = [self._residents.pop(key).num_bytes for key in leaving]
            await self._drop(leaving)
            self._used -= sum(gone)
