"""Limiter: how much each tenant may ask for in a minute and at once.

Counts by the tenant's name, so that a key file that is read again resets nobody. Knows no clock:
every call says what time it is. Single-threaded: all calls come from one event loop.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from adapters.errors import LimitExceededError, OverloadedError
from rora_serve.tenants import Tenant

_MINUTE_SECONDS = 60.0
# After which a place may be free again; nobody knows how long the running requests take.
_BUSY_SECONDS = 1.0
# Of times as numbers, so that whoever comes after the told time is let in.
_ROUNDING_SECONDS = 1e-6
_FREE_BYTES = 64 * 1024  # of each body


class Limiter:
    """Counts requests and tokens of tenants against their limits.

    Requests and tokens each have a bucket that holds a minute's worth, begins full and refills
    evenly. A request is let in while there is one request and one token in them. What it computes
    is known only afterwards, so the bucket of tokens may go below zero; then the tenant is refused
    until it has refilled. Over time that is the limit; within a minute the requests that run at
    once may go above it by what they compute, and `max_concurrent` bounds that.
    """

    def __init__(self) -> None:
        self._uses: dict[str, _Use] = {}

    def admit(self, tenant: Tenant, now: float) -> None:
        """Take one request and one place, until `done`.

        Args: now: seconds, of a clock that never goes back.
        Raises: LimitExceededError: a limit is reached, the one that lasts longest is named; nothing
            was taken, so that coming too early makes no one wait longer.
        """
        use = self._uses.setdefault(tenant.name, _Use())
        limits = tenant.limits
        refusals = []
        if limits.max_concurrent is not None and use.running >= limits.max_concurrent:
            message = f"{use.running} requests are running, max_concurrent is"
            refusals.append((_BUSY_SECONDS, f"{message} {limits.max_concurrent}"))
        for bucket, limit, what in (
            (use.requests, limits.requests_per_minute, "requests"),
            (use.tokens, limits.tokens_per_minute, "tokens"),
        ):
            wait = 0.0 if limit is None else bucket.wait(limit, now)
            if wait > 0:
                message = f"a minute's {what} are used up, {what}_per_minute is {limit}"
                refusals.append((wait, message))
        if refusals:
            seconds, message = max(refusals)
            error = LimitExceededError(
                f"tenant {tenant.name!r}: {message}; come again in {math.ceil(seconds)} s"
            )
            error.retry_after_seconds = seconds
            raise error
        if limits.requests_per_minute is not None:
            use.requests.take(1, limits.requests_per_minute, now)
        use.running += 1

    def spend_tokens(self, tenant: Tenant, count: int, now: float) -> None:
        """Take tokens that were read or written, after the fact: as many as they are."""
        limit = tenant.limits.tokens_per_minute
        if limit is not None:
            self._uses.setdefault(tenant.name, _Use()).tokens.take(count, limit, now)

    def give_back(self, tenant: Tenant, now: float) -> None:
        """Return the request that `admit` took for one that was refused after it."""
        limit = tenant.limits.requests_per_minute
        if limit is not None:
            self._uses[tenant.name].requests.take(-1, limit, now)

    def done(self, tenant: Tenant) -> None:
        """Give back the place of a request that `admit` let in."""
        use = self._uses[tenant.name]
        use.running -= 1
        assert use.running >= 0


class BodyRoom:
    """Counts the bytes of bodies that are on their way in, before any other limit can see them.

    The first 64 KiB of each are free, so that few large ones do not keep ordinary ones out.

    Args: most, most_of_tenant: bytes at once, of all and of one tenant.
    """

    def __init__(self, most: int, most_of_tenant: int) -> None:
        self._most = most
        self._most_of_tenant = most_of_tenant
        self._held: Counter[str] = Counter()

    @contextmanager
    def of(self, tenant: str) -> Iterator[Callable[[int], None]]:
        """Return what counts bytes of one body, which are given back at the end of the `with`.

        It raises OverloadedError if there is no room for them.
        """
        held, free = 0, _FREE_BYTES

        def hold(num_bytes: int) -> None:
            nonlocal held, free
            num_bytes, free = max(num_bytes - free, 0), max(free - num_bytes, 0)
            if not num_bytes:
                return
            is_full = self._held.total() + num_bytes > self._most
            if is_full or self._held[tenant] + num_bytes > self._most_of_tenant:
                raise OverloadedError("too many large bodies are being read; try again in 1 s")
            held += num_bytes
            self._held[tenant] += num_bytes

        try:
            yield hold
        finally:
            self._held[tenant] -= held
            if not self._held[tenant]:
                del self._held[tenant]


@dataclass
class _Bucket:
    """level(now) = min(limit, level + (now - at) * limit / 60); the limit is whatever it is now."""

    level: float = math.inf  # at first it is full, whatever it holds
    at: float = -math.inf

    def wait(self, limit: int, now: float) -> float:
        """Return the seconds until there is one in it, 0 if there is."""
        self._refill(limit, now)
        seconds = (1 - self.level) * _MINUTE_SECONDS / limit
        return seconds if seconds > _ROUNDING_SECONDS else 0.0

    def take(self, count: int, limit: int, now: float) -> None:
        """Take so many, also below zero."""
        self._refill(limit, now)
        self.level -= count

    def _refill(self, limit: int, now: float) -> None:
        now = max(now, self.at)
        self.level = min(limit, self.level + (now - self.at) * limit / _MINUTE_SECONDS)
        self.at = now


@dataclass
class _Use:
    """What a tenant has left, and what runs of it."""

    requests: _Bucket = field(default_factory=_Bucket)
    tokens: _Bucket = field(default_factory=_Bucket)
    # Counted without a limit too: one may be set while they run.
    running: int = 0
