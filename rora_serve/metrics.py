"""What Prometheus sees of adapters and tenants, on the page where vLLM shows its own metrics.

A store holds any number of names, so those used most have series of their own and the rest count as
"other". Prometheus computes rates series by series, takes a fall for a restart and a rise for work.
So that rates and their sums stay true while names come and go:

- Names take each other's places only when the page is read: it shows the last counts of the name
  that leaves, which is gone from the next page, and the one that comes begins at zero.
- What was counted under a name is not counted again: added to "other" when the name leaves, it
  would look like a burst of work.
"""

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import get_args

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from rora_serve.host_tier import Tier
from rora_serve.request_log import RequestRecord
from rora_serve.top_names import TopNames

MAX_NAMES = 50  # adapters with series of their own, and tenants
OTHER = "other"
NONE = "none"  # neither adapter nor base model, or no tenant

_TIERS: tuple[str, ...] = get_args(Tier)
# Upper bounds of buckets, in seconds.
_WAITS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKENS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)

# Metrics by their names after the prefix, which are attributes of _Counts too.
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "cached_prompt_tokens": "Tokens of prompts that the prefix cache had.",
    "generated_tokens": "Tokens generated.",
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": "From arrival to first token, queue and load included.",
    "time_per_output_token_seconds": "Mean time between the tokens of one choice.",
    "queue_seconds": "From arrival to admission.",
    "load_seconds": "To bring an adapter from the store into memory.",
}
_EVENTS = {
    "evictions": "Adapters that made room for others.",
    "quarantines": "Versions that failed their probe.",
}
_LEVELS = {
    "host_used_bytes": "Memory that adapters take, with what those that load and leave need.",
    "host_capacity_bytes": "Memory that adapters may take.",
    "adapters_held": "Adapters in memory.",
    "requests_waiting": "Requests that are not admitted yet.",
    "requests_in_flight": "Requests that were admitted and are not answered yet.",
}


@dataclass(frozen=True)
class Levels:
    """How things stand at the moment.

    Args:
        host_bytes: that adapters take in memory, by name.
        host_used_bytes: that all of them take, with what those that load and leave need.
        host_capacity_bytes: that they may take.
        adapters_held: in memory.
        requests_waiting, requests_in_flight: before and after admission.
    """

    host_bytes: Mapping[str, int]
    host_used_bytes: int
    host_capacity_bytes: int
    adapters_held: int
    requests_waiting: int
    requests_in_flight: int


class Metrics:
    """A collector for a Prometheus registry.

    Requests are counted in the event loop; the page is made in another thread.

    Args:
        base_name: of the base model.
        read_levels: tells them, in any thread.
    """

    def __init__(self, base_name: str, read_levels: Callable[[], Levels]) -> None:
        self._read_levels = read_levels
        self._lock = threading.Lock()
        self._adapters = _Breakdown(base_name)
        self._tenants = _Breakdown()
        self._refusals: Counter[str] = Counter()

    def count_request(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        with self._lock:
            self._adapters.add(record.adapter, record)
            self._tenants.add(record.tenant, record)
            if record.refusal is not None:
                self._refusals[record.refusal] += 1

    def count_eviction(self, adapter: str) -> None:
        """Count an adapter that makes room for others."""
        with self._lock:
            self._adapters.of(adapter).evictions += 1

    def count_quarantine(self, adapter: str) -> None:
        """Count a version that failed its probe."""
        with self._lock:
            self._adapters.of(adapter).quarantines += 1

    def collect(self) -> Iterator[Metric]:
        """Return all families; what a registry calls."""
        levels = self._read_levels()
        with self._lock:
            adapters, tenants = self._adapters.page(), self._tenants.page()
            refusals = self._refusals.copy()
        yield from _families(adapters, "rora_", "adapter", _COUNTERS | _EVENTS)
        yield from _families(tenants, "rora_tenant_", "tenant", _COUNTERS)
        yield _keyed("rora_refusals", "Requests refused.", ["reason"], refusals.items())
        yield _host_bytes(levels.host_bytes, adapters)
        for name, text in _LEVELS.items():
            yield GaugeMetricFamily(f"rora_{name}", text, getattr(levels, name))


class _Histogram:
    """Counts by bucket, and the sum of what was counted."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def copy(self) -> "_Histogram":
        other = _Histogram(self._bounds)
        other._counts, other._sum = self._counts.copy(), self._sum
        return other

    def add_to(self, family: HistogramMetricFamily, label: str) -> None:
        bounds = [*map(str, self._bounds), "+Inf"]
        buckets = [*zip(bounds, map(float, accumulate(self._counts)), strict=True)]
        family.add_metric([label], buckets, self._sum)


class _Counts:
    """What the requests of one adapter or tenant came to, and what became of the adapter."""

    def __init__(self) -> None:
        # The commonest status and all tiers begin at zero: the first request is a rise.
        self.requests: Counter[int] = Counter({200: 0})
        self.tiers: Counter[str] = Counter(dict.fromkeys(_TIERS, 0))
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.generated_tokens = 0
        self.evictions = 0
        self.quarantines = 0
        self.time_to_first_token_seconds = _Histogram(_WAITS)
        self.time_per_output_token_seconds = _Histogram(_TOKENS)
        self.queue_seconds = _Histogram(_WAITS)
        self.load_seconds = _Histogram(_WAITS)

    def add(self, record: RequestRecord) -> None:
        self.requests[record.shown_status] += 1
        self.prompt_tokens += record.prompt_tokens
        self.cached_prompt_tokens += record.cached_tokens
        self.generated_tokens += record.generated_tokens
        if (ttft := record.first_token_seconds) is not None:
            self.time_to_first_token_seconds.add(ttft)
        for seconds in record.token_seconds:
            self.time_per_output_token_seconds.add(seconds)
        if record.queue_ms is not None:
            self.queue_seconds.add(record.queue_ms / 1000)
        if record.tier is not None:
            self.tiers[record.tier] += 1
        # An adapter in memory has nothing to load; counted, it would hide how long loads take.
        if record.tier == "store" and record.load_ms is not None:
            self.load_seconds.add(record.load_ms / 1000)

    def copy(self) -> "_Counts":
        other = _Counts()
        for name, value in vars(self).items():
            setattr(other, name, value if isinstance(value, int) else value.copy())
        return other


_Page = dict[str, _Counts]


class _Breakdown:
    """Counts by name: of `fixed` names, of those of the others that are used most, of the rest."""

    def __init__(self, *fixed: str) -> None:
        self._fixed = fixed
        self._top = TopNames(MAX_NAMES, reserved=(OTHER, NONE))
        self._counts: _Page = {name: _Counts() for name in (*fixed, OTHER, NONE)}

    def add(self, name: str | None, record: RequestRecord) -> None:
        if name is not None and name not in self._fixed:
            self._top.use(name)
        self.of(name).add(record)

    def of(self, name: str | None) -> _Counts:
        """Return what is counted under a name, or with the rest."""
        label = NONE
        if name is not None:
            label = name if name in self._fixed or name in self._top else OTHER
        if label not in self._counts:
            self._counts[label] = _Counts()
        return self._counts[label]

    def page(self) -> _Page:
        """Return all counts as they are; names change places behind it."""
        changes = self._top.renew()
        self._counts |= {new: _Counts() for _, new in changes}
        page = {name: counts.copy() for name, counts in self._counts.items()}
        for old, _ in changes:
            del self._counts[old]
        return page


def _families(page: _Page, prefix: str, label: str, counters: dict[str, str]) -> Iterator[Metric]:
    """Return what is counted by adapter or by tenant."""
    yield _keyed(
        f"{prefix}requests",
        "Requests that ended, by HTTP status; 499: hung up before it was answered.",
        [label, "status"],
        ((name, str(status), n) for name, c in page.items() for status, n in c.requests.items()),
    )
    yield _keyed(
        f"{prefix}tier_hits",
        "Requests by where their adapter was found.",
        [label, "tier"],
        ((name, tier, n) for name, c in page.items() for tier, n in c.tiers.items()),
    )
    for metric, text in counters.items():
        numbers = ((name, getattr(counts, metric)) for name, counts in page.items())
        yield _keyed(f"{prefix}{metric}", text, [label], numbers)
    for metric, text in _HISTOGRAMS.items():
        family = HistogramMetricFamily(f"{prefix}{metric}", text, labels=[label])
        for name, counts in page.items():
            getattr(counts, metric).add_to(family, name)
        yield family


def _host_bytes(bytes_by_name: Mapping[str, int], page: _Page) -> Metric:
    """Return the memory of the page's adapters that have some, and of the rest."""
    shown: Counter[str] = Counter({OTHER: 0})
    for name, num_bytes in bytes_by_name.items():
        shown[name if name in page and name != NONE else OTHER] += num_bytes
    family = GaugeMetricFamily("rora_host_bytes", "Memory that adapters take.", labels=["adapter"])
    for name, num_bytes in shown.items():
        family.add_metric([name], num_bytes)
    return family


def _keyed(
    name: str, text: str, labels: Sequence[str], rows: Iterable[tuple[*tuple[str, ...], int]]
) -> Metric:
    """Return a counter with a series for each row of label values and number."""
    family = CounterMetricFamily(name, text, labels=labels)
    for *values, number in rows:
        family.add_metric(values, number)
    return family
