"""Admission: who is let in to the engine, who waits, and who is told to come back later.

At most as many sequences are let in as the engine runs at once, so that nothing waits inside it,
where the order is first come, first served. What waits here is let in by a FairOrder. Knows neither
HTTP nor the engine. Single-threaded: all calls come from one event loop.

A tenant may have `queue_per_tenant` requests waiting, an adapter of it as many as the tenant has
room for besides, and a tenant as many bytes as all have room for besides: one alone gets half of
the room, n get an (n + 1)th each, and who waits seldom finds room whatever the others send. Source:
dynamic thresholds (Choudhury and Hahne 1998).
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from adapters.errors import DeadlineError, OverloadedError
from rora_serve.fair_order import Claim, FairOrder

# Requests of one tenant that may wait, for each place: the last one waits about 4 requests long.
QUEUE_PER_PLACE = 4
MAX_WAITING_BYTES = 256 * 1024**2
# What the server keeps of a request that waits besides its body: connection, task, headers.
_REQUEST_BYTES = 64 * 1024
# Clients do not wait longer: OpenAI's own take a longer Retry-After for a mistake.
_MAX_RETRY_SECONDS = 60


@dataclass
class _Waiter:
    """What stands behind a claim while it waits: who is told, and what that keeps in memory."""

    turn: asyncio.Future[None]
    num_bytes: int


class Admission:
    """Places in the engine, and the requests that wait for them.

    Args:
        max_in_flight: sequences that the engine runs at once.
        queue_per_tenant: requests of a tenant that may wait; none: 4 for each place.
        max_waiting_bytes: memory for all requests that wait.
        clock: seconds; deadlines are in its time.
    """

    def __init__(
        self,
        max_in_flight: int,
        *,
        queue_per_tenant: int | None = None,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_in_flight = max_in_flight
        self.queue_per_tenant = queue_per_tenant or QUEUE_PER_PLACE * max_in_flight
        self._max_waiting_bytes = max_waiting_bytes
        self._clock = clock
        self._order = FairOrder()
        self._free = max_in_flight
        self._in_flight = 0
        # It has all places that were free, and gets those that become free, until it has enough.
        # Nobody overtakes it, and it pays for what it holds.
        self._gathering: Claim | None = None
        self._waiters: dict[Claim, _Waiter] = {}
        # Their places and bytes; their number and bytes by tenant, their number by adapter of it.
        self._num_places = 0
        self._num_bytes = 0
        self._of_tenant: Counter[str] = Counter()
        self._bytes_of_tenant: Counter[str] = Counter()
        self._of_adapter: Counter[tuple[str, str]] = Counter()

    @property
    def in_flight(self) -> int:
        """Sequences that were let in and have not left."""
        return self._in_flight

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiters)

    def waiting_by_adapter(self) -> dict[str, int]:
        """Requests that wait, of all tenants; adapters without any are left out."""
        waiting: Counter[str] = Counter()
        for (_, adapter), number in self._of_adapter.items():
            waiting[adapter] += number
        return dict(waiting)

    @asynccontextmanager
    async def place(
        self,
        *,
        tenant: str,
        adapter: str,
        weight: float = 1.0,
        cost: int = 1,
        is_cold: bool = False,
        body_bytes: int = 0,
        deadline: float | None = None,
    ) -> AsyncIterator[float]:
        """Wait for a request's turn, and hold its place as long as the body of the `with` runs.

        Whatever ends it, waiting or not, gives its places on.

        Args:
            tenant: whose request it is.
            adapter: by name, so that versions of one share its turns; the base model is one too.
            weight: of the tenant against others.
            cost: sequences that it runs, as n times its prompts; above `max_in_flight` it has all.
            is_cold: whether the adapter has to be loaded, which is done in its place.
            body_bytes: that are kept while it waits.
            deadline: when it is given up if it still waits.

        Returns: the seconds that it waited.

        Raises:
            OverloadedError: too much waits already.
            DeadlineError: its deadline came before its turn.
        """
        came = self._clock()
        if deadline is not None and deadline <= came:
            raise DeadlineError(
                f"{adapter}: the deadline passed {came - deadline:.3g} s before the request was "
                "read, a later one is expected; allow more time"
            )
        cost = min(cost, self.max_in_flight)
        claim = Claim(tenant, adapter, weight=weight, cost=cost, is_cold=is_cold)
        turn = self._join(claim, body_bytes + _REQUEST_BYTES, came)
        let_in = None
        try:
            await self._wait(turn, claim, came=came, deadline=deadline)
            let_in = self._clock()
            yield let_in - came
        finally:
            if let_in is not None:
                self._order.note(self._clock() - let_in)
            self._leave(claim)

    def _join(self, claim: Claim, num_bytes: int, now: float) -> asyncio.Future[None]:
        """Let a claim wait, and in if it is its turn. Returns: what is done when it is let in."""
        waiter = _Waiter(asyncio.get_running_loop().create_future(), num_bytes)
        if self._waiters or claim.cost > self._free:
            self._check_room(claim, num_bytes)
        self._waiters[claim] = waiter
        self._count_waiting(claim, waiter, 1)
        self._order.add(claim, now)
        self._let_in()
        return waiter.turn

    async def _wait(
        self, turn: asyncio.Future[None], claim: Claim, *, came: float, deadline: float | None
    ) -> None:
        try:
            async with asyncio.timeout(None if deadline is None else deadline - came):
                await turn
        except TimeoutError:
            raise DeadlineError(
                f"{claim.adapter}: no place in {self._clock() - came:.3g} s; allow more time or "
                "send fewer requests at once"
            ) from None

    def _check_room(self, claim: Claim, num_bytes: int) -> None:
        """Refuse a request that would have to wait where too many do.

        Raises: OverloadedError: they do.
        """
        of_adapter = self._of_adapter[claim.tenant, claim.adapter]
        of_tenant = self._of_tenant[claim.tenant]
        if of_adapter >= self.queue_per_tenant - of_tenant:
            raise self._overloaded(
                f"{claim.adapter}: {of_adapter} requests wait for it and {of_tenant - of_adapter} "
                "for its tenant's others, at most as many as are left of "
                f"{self.queue_per_tenant} are expected"
            )
        own = self._bytes_of_tenant[claim.tenant]
        left = self._max_waiting_bytes - self._num_bytes
        if own + num_bytes > left:
            raise self._overloaded(
                f"{claim.adapter}: {num_bytes} bytes more than the {own} that its tenant's "
                f"requests wait with, at most the {left} that are left are expected"
            )

    def _overloaded(self, reason: str) -> OverloadedError:
        # As places came free of late: all of them once in the mean time for which they are held.
        seconds = self._num_places * self._order.mean_seconds / self.max_in_flight
        retry_after = min(max(1, math.ceil(seconds)), _MAX_RETRY_SECONDS)
        error = OverloadedError(f"{reason}; try again in {retry_after} s")
        error.retry_after_seconds = retry_after
        return error

    def _let_in(self) -> None:
        """Give free places to those whose turn it is."""
        now = self._clock()
        while self._free:
            claim = self._gathering or self._order.next(now)
            if claim is None:
                return
            taken = min(self._free, claim.cost - claim.places)
            self._free -= taken
            self._order.take(claim, taken, now)
            if claim.places < claim.cost:
                self._gathering = claim
                return
            self._gathering = None
            self._in_flight += claim.cost
            turn = self._end_wait(claim).turn
            # One that was cancelled and does not know it yet leaves as soon as it does.
            if not turn.done():
                turn.set_result(None)

    def _leave(self, claim: Claim) -> None:
        """Take back what a request has, whether it was let in or still waits."""
        if claim not in self._waiters:
            self._in_flight -= claim.cost
        else:
            self._end_wait(claim)
            if claim is self._gathering:
                self._gathering = None
            else:
                self._order.remove(claim)
        self._free += claim.places
        self._order.take(claim, -claim.places, self._clock())
        self._let_in()

    def _end_wait(self, claim: Claim) -> _Waiter:
        waiter = self._waiters.pop(claim)
        self._count_waiting(claim, waiter, -1)
        return waiter

    def _count_waiting(self, claim: Claim, waiter: _Waiter, change: int) -> None:
        self._num_places += change * claim.cost
        self._num_bytes += change * waiter.num_bytes
        _add(self._of_tenant, claim.tenant, change)
        _add(self._bytes_of_tenant, claim.tenant, change * waiter.num_bytes)
        _add(self._of_adapter, (claim.tenant, claim.adapter), change)


_Key = TypeVar("_Key", bound=Hashable)


def _add(counter: Counter[_Key], key: _Key, number: int) -> None:
    """Add to a count; who comes to nothing is not kept."""
    counter[key] += number
    if not counter[key]:
        del counter[key]
