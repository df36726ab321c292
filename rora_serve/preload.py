"""Preload: adapters that are in memory, or kept there, before the server says that it is ready.

Which ones is planned from the settings and the store before anything starts; the plan is carried
out while the server answers already.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from adapters import AdapterStore, NameRecord, ResolvedVersion
from adapters.errors import AdapterNotFoundError, PreloadError, RoraError, StoreError
from rora_serve.host_tier import MAX_PINNED_SHARE
from rora_serve.models import ModelDirectory
from rora_serve.name_patterns import matches
from rora_serve.residency import Residents

logger = logging.getLogger(__name__)

_AT_ONCE = 8  # that are read and asked: the probes of several share the engine's steps


@dataclass(frozen=True)
class Wanted:
    """A version that is to be in memory.

    Args:
        resolved: which one.
        is_pinned: whether it is to stay there.
        is_named: whether its name was written out. Then the server is not ready without it; what a
            pattern matches may be left out.
    """

    resolved: ResolvedVersion
    is_pinned: bool
    is_named: bool


@dataclass(frozen=True)
class PreloadPlan:
    """What is to be in memory.

    Args:
        wanted: versions; those that are named come first.
        problems: what is named and not there, or does not fit; the server does not start with one.
        num_left_out: versions that patterns match and for which there is no room.
        idle: patterns that match nothing.
    """

    wanted: tuple[Wanted, ...] = ()
    problems: tuple[str, ...] = ()
    num_left_out: int = 0
    idle: tuple[str, ...] = ()

    @property
    def pinned_bytes(self) -> int:
        """Bytes that can not make room for others."""
        room = _Room(0)
        for wanted in self.wanted:
            room.take(wanted)
        return room.pinned_bytes


def make_plan(
    store: AdapterStore,
    *,
    preload: Sequence[str],
    pin: Sequence[str],
    base_names: Sequence[str],
    capacity: int,
) -> PreloadPlan:
    """Return what `preload` and `pin` mean, as far as the store tells.

    What is named comes first and has to fit, pinned adapters in half of the memory. Then patterns
    get what is left, those of `pin` first, each the versions that were added last first.

    Args:
        preload, pin: names or patterns, perhaps with `@` and an alias or digest.
        base_names: what requests call the base model.
        capacity: bytes that adapters may take.
    Cost: one small read for each name; as `AdapterStore.names` if there is a pattern.
    """
    settings = [("pin", text) for text in pin] + [("preload", text) for text in preload]
    room = _Room(capacity)
    wanted: list[Wanted] = []
    problems: list[str] = []
    for setting, text in settings:
        if "*" in text:
            continue
        try:
            found = Wanted(_named(store, text, base_names), setting == "pin", is_named=True)
        except (AdapterNotFoundError, StoreError) as error:
            problems.append(f"--{setting} {text}: {error}")
        else:
            if room.take(found):
                wanted.append(found)
    problems += room.shortages()
    patterns = [(setting, text) for setting, text in settings if "*" in text]
    records = store.names() if patterns else []
    num_left_out, idle = 0, []
    for setting, text in patterns:
        matched = sorted(_matched(store, records, text), key=lambda one: -one.version.added)
        if not matched:
            idle.append(f"--{setting} {text}")
        for resolved in matched:
            found = Wanted(resolved, setting == "pin", is_named=False)
            if not room.fits(found):
                num_left_out += 1
            elif room.take(found):
                wanted.append(found)
    return PreloadPlan(tuple(wanted), tuple(problems), num_left_out, tuple(idle))


def _named(store: AdapterStore, text: str, base_names: Sequence[str]) -> ResolvedVersion:
    if text.partition("@")[0] in base_names:
        raise AdapterNotFoundError("the base model, which is always there; name adapters only")
    return store.resolve(text)


def _matched(
    store: AdapterStore, records: Iterable[NameRecord], text: str
) -> Iterator[ResolvedVersion]:
    pattern, at, wanted = text.partition("@")
    for record in records:
        if not matches(pattern, record.name):
            continue
        try:
            version = record.find(wanted) if at else record.latest
        except AdapterNotFoundError:  # it has no such alias
            continue
        yield store.resolved(record.name, version)


class _Room:
    """Adds up what versions take: those that share weights take them once."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._num_bytes = 0
        self.pinned_bytes = 0
        self._weights: set[str] = set()  # digests
        self._pinned_weights: set[str] = set()
        self._taken: dict[tuple[str, str], bool] = {}  # whether it is pinned, by name and digest

    def fits(self, wanted: Wanted) -> bool:
        """Tell whether there is room for one more."""
        more, more_pinned = self._more(wanted)
        return self._is_enough(self._num_bytes + more, self.pinned_bytes + more_pinned)

    def take(self, wanted: Wanted) -> bool:
        """Count one more. Returns: whether it is not the same as one before."""
        version = wanted.resolved.version
        key = (wanted.resolved.name, version.digest)
        if key in self._taken and (self._taken[key] or not wanted.is_pinned):
            return False
        self._taken[key] = wanted.is_pinned
        more, more_pinned = self._more(wanted)
        self._num_bytes += more
        self.pinned_bytes += more_pinned
        self._weights.add(version.weights_digest)
        if wanted.is_pinned:
            self._pinned_weights.add(version.weights_digest)
        return True

    def shortages(self) -> list[str]:
        """Say of what was taken so far that it does not fit."""
        found = []
        if not self._is_enough(0, self.pinned_bytes):
            found.append(
                f"--pin: what is named takes {self.pinned_bytes} of {self._capacity} bytes of "
                f"memory for adapters, at most {MAX_PINNED_SHARE:.0%} may be pinned; pin fewer or "
                "give a larger --adapter-memory-bytes"
            )
        if not self._is_enough(self._num_bytes, 0):
            found.append(
                f"--preload and --pin: what is named takes {self._num_bytes} bytes, adapters may "
                f"take {self._capacity}; name fewer or give a larger --adapter-memory-bytes"
            )
        return found

    def _more(self, wanted: Wanted) -> tuple[int, int]:
        """Return what one more adds to all bytes, and to those that are pinned."""
        version = wanted.resolved.version
        is_new = version.weights_digest not in self._weights
        is_newly_pinned = wanted.is_pinned and version.weights_digest not in self._pinned_weights
        return version.num_bytes * is_new, version.num_bytes * is_newly_pinned

    def _is_enough(self, num_bytes: int, pinned_bytes: int) -> bool:
        may_be_pinned = pinned_bytes <= MAX_PINNED_SHARE * self._capacity
        return num_bytes <= self._capacity and may_be_pinned


class Preloader:
    """Carries out a plan, beside requests that come already.

    Args:
        directory: that serves adapters.
        residents: that are in memory.
        plan: without problems.

    is_done: whether all of it is there.
    """

    def __init__(self, directory: ModelDirectory, residents: Residents, plan: PreloadPlan) -> None:
        self.is_done = False
        self._tier = directory.tier
        self._residents = residents
        self._plan = plan
        self._task: asyncio.Task[None] | None = None
        self._failure: PreloadError | None = None

    def begin(self, give_up: Callable[[], object]) -> None:
        """Begin in the background.

        Args: give_up: called when an adapter that is named can not be served.
        """
        self.is_done = not self._plan.wanted
        if not self.is_done:
            self._task = asyncio.create_task(self._run(give_up))

    async def end(self) -> PreloadError | None:
        """Stop, and return why the server was given up, if it was."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        return self._failure

    async def _run(self, give_up: Callable[[], object]) -> None:
        began = time.monotonic()
        places = asyncio.Semaphore(_AT_ONCE)

        async def bring_in(wanted: Wanted) -> str | None:
            async with places:
                return await self._bring_in(wanted)

        plan = self._plan
        reasons = await asyncio.gather(*map(bring_in, plan.wanted))
        outcomes = list(zip(plan.wanted, reasons, strict=True))
        named = [reason for wanted, reason in outcomes if reason and wanted.is_named]
        if named:
            self._failure = PreloadError(
                f"--preload and --pin: {len(named)} of {len(plan.wanted)} adapters can not be "
                f"served: {'; '.join(named)}; leave them out or add them again as they should be"
            )
            give_up()
            return
        for reason in filter(None, reasons):
            _tell(f"left out of what --preload and --pin match: {reason}")
        self._tell_outcome([w for w, reason in outcomes if not reason], time.monotonic() - began)
        self.is_done = True

    async def _bring_in(self, wanted: Wanted) -> str | None:
        """Return why a version can not be served, or None when it is in memory."""
        resolved = wanted.resolved
        # The very version that was planned, wherever aliases have been moved meanwhile.
        reference = f"{resolved.name}@sha256:{resolved.version.digest}"
        bring_in = self._residents.pin if wanted.is_pinned else self._residents.load
        try:
            await bring_in(reference)
        except RoraError as error:
            text = str(error)
        except Exception as error:
            logger.exception("loading %s", resolved.public_id)
            text = f"{type(error).__name__}, the log above says more"
        else:
            return None
        return text if text.startswith(resolved.public_id) else f"{resolved.public_id}: {text}"

    def _tell_outcome(self, loaded: Sequence[Wanted], seconds: float) -> None:
        tier = self._tier
        num_pinned = sum(wanted.is_pinned for wanted in loaded)
        _tell(
            f"ready; adapters in memory: {len(loaded)}, of which pinned: {num_pinned}; "
            f"{tier.num_bytes / 1e6:.1f} of {tier.capacity / 1e6:.1f} MB, in {seconds:.1f} s"
        )
        if self._plan.num_left_out:
            _tell(f"no room for others that --preload and --pin match: {self._plan.num_left_out}")
        # A slot takes a little more than its tensors.
        gone = [
            wanted.resolved.public_id
            for wanted in loaded
            if wanted.is_named and not tier.holds(wanted.resolved.version.weights_digest)
        ]
        if gone:
            _tell(f"made room for others already: {', '.join(gone)}; see --adapter-memory-bytes")


def _tell(text: str) -> None:
    print(f"rora-serve: {text}", file=sys.stderr)
