"""What Prometheus reads is what happened, in bounded space, however many names there are."""

import random
import threading
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from rora_serve import metrics as metrics_module
from rora_serve.host_tier import Tier
from rora_serve.metrics import MAX_NAMES, NONE, OTHER, Levels, Metrics
from rora_serve.request_log import Choice, RequestRecord

BASE = "smollm2-135m-instruct"
LEVELS = Levels(
    host_bytes={"a": 10, "unheard-of": 5, NONE: 1},
    host_used_bytes=20,
    host_capacity_bytes=100,
    adapters_held=1,
    requests_waiting=2,
    requests_in_flight=3,
)

Series = tuple[str, frozenset[tuple[str, str]]]
Page = dict[Series, float]


def read(metrics: Metrics) -> Page:
    """Return every sample of the page, as Prometheus would parse it."""
    registry = CollectorRegistry()
    registry.register(metrics)
    text = generate_latest(registry).decode()
    page: Page = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in page
            page[key] = sample.value
    return page


def value(page: Page, name: str, **labels: str) -> float:
    return page[name, frozenset(labels.items())]


def names(page: Page, label: str = "adapter") -> set[str]:
    return {text for _, labels in page for key, text in labels if key == label}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(BASE, lambda: LEVELS)


def ended(adapter: str | None, tenant: str | None = None, *, status: int = 200) -> RequestRecord:
    record = RequestRecord("id", "POST", "/v1/completions", 0.0, tenant=tenant, adapter=adapter)
    record.status = status
    return record


def test_a_request_stands_on_the_page_with_all_that_it_was(metrics: Metrics) -> None:
    record = ended("a", "acme")
    record.tier, record.queue_ms, record.load_ms = "store", 20.0, 300.0
    record.prompt_tokens, record.cached_tokens = 40, 30
    record.choices = [Choice(11, 2.0, 3.0), Choice(1, 1.5, 1.5)]
    metrics.count_request(record)
    page = read(metrics)
    for prefix, label in (("rora_", {"adapter": "a"}), ("rora_tenant_", {"tenant": "acme"})):
        assert value(page, f"{prefix}requests_total", status="200", **label) == 1
        assert value(page, f"{prefix}prompt_tokens_total", **label) == 40
        assert value(page, f"{prefix}cached_prompt_tokens_total", **label) == 30
        assert value(page, f"{prefix}generated_tokens_total", **label) == 12
        ttft = f"{prefix}time_to_first_token_seconds"
        assert value(page, f"{ttft}_sum", **label) == 1.5
        assert value(page, f"{ttft}_bucket", le="1.0", **label) == 0
        assert value(page, f"{ttft}_bucket", le="2.5", **label) == 1
        assert value(page, f"{ttft}_bucket", le="+Inf", **label) == 1
        tpot = f"{prefix}time_per_output_token_seconds"
        assert value(page, f"{tpot}_count", **label) == 1
        assert value(page, f"{tpot}_sum", **label) == pytest.approx(0.1)
        assert value(page, f"{tpot}_bucket", le="0.1", **label) == 1
        assert value(page, f"{tpot}_bucket", le="0.075", **label) == 0
        assert value(page, f"{prefix}queue_seconds_sum", **label) == pytest.approx(0.02)
        assert value(page, f"{prefix}load_seconds_sum", **label) == pytest.approx(0.3)
        assert value(page, f"{prefix}tier_hits_total", tier="store", **label) == 1
        assert value(page, f"{prefix}tier_hits_total", tier="slot", **label) == 0


def test_only_what_was_loaded_counts_as_a_load(metrics: Metrics) -> None:
    for tier in ("slot", "host", "store"):
        record = ended("a")
        record.tier, record.load_ms = tier, 5.0
        metrics.count_request(record)
    assert value(read(metrics), "rora_load_seconds_count", adapter="a") == 1


def test_counts_of_the_whole_server_and_levels_stand_there(metrics: Metrics) -> None:
    for reason in ("queue_full", "queue_full", "deadline"):
        record = ended("a", status=429)
        record.refusal = reason
        metrics.count_request(record)
    page = read(metrics)
    assert value(page, "rora_refusals_total", reason="queue_full") == 2
    assert value(page, "rora_refusals_total", reason="deadline") == 1
    assert value(page, "rora_requests_total", adapter="a", status="429") == 3
    assert value(page, "rora_host_bytes", adapter="a") == 10
    assert value(page, "rora_host_bytes", adapter=OTHER) == 6
    assert value(page, "rora_host_used_bytes") == 20
    assert value(page, "rora_host_capacity_bytes") == 100
    assert value(page, "rora_adapters_held") == 1
    assert value(page, "rora_requests_waiting") == 2
    assert value(page, "rora_requests_in_flight") == 3


def test_what_becomes_of_an_adapter_counts_under_its_name_or_with_the_rest(
    metrics: Metrics,
) -> None:
    metrics.count_request(ended("a"))
    assert value(read(metrics), "rora_evictions_total", adapter="a") == 0
    for name in ("a", "a", "unheard-of"):
        metrics.count_eviction(name)
    page = read(metrics)
    assert value(page, "rora_evictions_total", adapter="a") == 2
    assert value(page, "rora_evictions_total", adapter=OTHER) == 1
    assert "unheard-of" not in names(page), "it is use that earns a name its series"
    metrics.count_quarantine("a")
    metrics.count_quarantine("upload-that-failed")
    page = read(metrics)
    assert value(page, "rora_quarantines_total", adapter="a") == 1
    assert value(page, "rora_quarantines_total", adapter=OTHER) == 1


def test_the_base_a_missing_name_and_the_words_for_the_rest_have_labels_of_their_own(
    metrics: Metrics,
) -> None:
    for adapter in (BASE, None, OTHER, NONE):
        metrics.count_request(ended(adapter))
    page = read(metrics)
    assert names(page) == {BASE, OTHER, NONE}
    assert value(page, "rora_requests_total", adapter=BASE, status="200") == 1
    assert value(page, "rora_requests_total", adapter=NONE, status="200") == 1
    # Adapters may have these two names; they can not be told from the rest.
    assert value(page, "rora_requests_total", adapter=OTHER, status="200") == 2


def test_what_a_client_asked_for_is_no_label(metrics: Metrics) -> None:
    record = ended(None, status=404)
    record.model, record.request_id = "invented", "made-up"
    metrics.count_request(record)
    assert not [labels for _, labels in read(metrics) if "invented" in str(labels)]


def test_a_client_that_hung_up_early_is_counted(metrics: Metrics) -> None:
    record = ended("a")
    record.status = None
    metrics.count_request(record)
    assert value(read(metrics), "rora_requests_total", adapter="a", status="499") == 1


def test_ten_thousand_names_leave_few_series_and_little_memory(metrics: Metrics) -> None:
    def use(first: int, number: int) -> None:
        for index in range(first, first + number):
            metrics.count_request(ended(f"adapter-{index}", f"tenant-{index}"))
            if index % 2_500 == 0:
                read(metrics)

    use(0, 1_000)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    use(1_000, 10_000)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 10_000 * 50  # less than their texts would take
    page = read(metrics)
    assert len(names(page)) == MAX_NAMES + 3
    assert len(names(page, "tenant")) == MAX_NAMES + 2
    assert len(page) < 9_000


@pytest.fixture(params=[1, 2, 4])
def few_names(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(metrics_module, "MAX_NAMES", request.param)
    return int(request.param)


def test_a_name_that_leaves_shows_its_last_counts_and_the_one_that_comes_a_zero(
    few_names: int, metrics: Metrics
) -> None:
    def requests(page: Page) -> dict[str, float]:
        found = {}
        for (name, labels), number in page.items():
            if name == "rora_requests_total":
                found[dict(labels)["adapter"]] = number
        return found

    for index in range(few_names):
        metrics.count_request(ended(f"a{index}"))
    read(metrics)
    metrics.count_request(ended("a0"))
    for _ in range(5):
        metrics.count_request(ended("new"))
    page = requests(read(metrics))
    leaver = "a0" if few_names == 1 else "a1"
    assert page[leaver] == (2 if few_names == 1 else 1)
    assert page["new"] == 0
    assert page[OTHER] == 5
    metrics.count_request(ended("new"))
    metrics.count_request(ended(leaver))
    page = requests(read(metrics))
    assert leaver not in page
    assert page["new"] == 1
    assert page[OTHER] == 6


@st.composite
def requests_and_reads(draw: st.DrawFn) -> list[RequestRecord | None]:
    """Requests for names of changing popularity; None is a look at the page."""
    rng = random.Random(draw(st.integers()))
    steps: list[RequestRecord | None] = []
    for favourite in draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6)):
        for _ in range(rng.randrange(40)):
            if rng.random() < 0.1:
                steps.append(None)
                continue
            adapter = rng.choice([favourite, favourite, *"abcdefgh", BASE, None])
            record = ended(adapter, rng.choice(["x", "y", "z", None]))
            record.status = rng.choice([200, 200, 200, 404, 429, None])
            record.tier = rng.choice(["slot", "host", "store", None])
            record.queue_ms = rng.choice([None, 0.0, 8.0, 4000.0])
            record.load_ms = rng.choice([None, 0.0, 80.0])
            record.prompt_tokens, record.cached_tokens = rng.randrange(100), rng.randrange(10)
            record.choices = [
                Choice(rng.randrange(1, 9), (first := rng.random() * 9), first + rng.random())
                for _ in range(rng.randrange(3))
            ]
            steps.append(record)
    return [*steps, None]


def total(sums: Mapping[Series, float], name: str, **wanted: str) -> float:
    """Return the sum over all series of a metric that have these labels."""
    return sum(
        number
        for (found, labels), number in sums.items()
        if found == name and wanted.items() <= dict(labels).items()
    )


def rises_of(steps: Sequence[RequestRecord | None], max_names: int) -> Page:
    """Return what each series rose by over all reads, by the rule of Prometheus' rate().

    A series rises from what it was; from zero if it is new, or if it fell.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_module, "MAX_NAMES", max_names)
        metrics = Metrics(BASE, lambda: LEVELS)
    rises: Page = {}
    before: Page = {}
    for step in steps:
        if step is not None:
            metrics.count_request(step)
            continue
        page = read(metrics)
        for key, number in page.items():
            previous = before.get(key, 0.0)
            rise = number - previous if number >= previous else number
            rises[key] = rises.get(key, 0.0) + rise
        # Those that come stand beside those that leave.
        assert len(names(page)) <= 2 * max_names + 3
        before = page
    return rises


@settings(max_examples=60, deadline=None)
@given(steps=requests_and_reads(), max_names=st.integers(1, 3))
def test_rates_and_their_sums_are_what_happened(
    steps: list[RequestRecord | None], max_names: int
) -> None:
    rises = rises_of(steps, max_names)
    records = [step for step in steps if step is not None]
    for prefix, label in (("rora_", "adapter"), ("rora_tenant_", "tenant")):
        for status in ("200", "404", "429", "499"):
            expected = sum(str(record.shown_status) == status for record in records)
            assert total(rises, f"{prefix}requests_total", status=status) == expected
        expected = sum(record.prompt_tokens for record in records)
        assert total(rises, f"{prefix}prompt_tokens_total") == expected
        expected = sum(record.generated_tokens for record in records)
        assert total(rises, f"{prefix}generated_tokens_total") == expected
        waits = [record.queue_ms / 1000 for record in records if record.queue_ms is not None]
        for bound in (0.005, 0.01, 5.0):
            expected = sum(seconds <= bound for seconds in waits)
            assert total(rises, f"{prefix}queue_seconds_bucket", le=str(bound)) == expected
        assert total(rises, f"{prefix}queue_seconds_sum") == pytest.approx(sum(waits))
        firsts = [s for r in records if (s := r.first_token_seconds) is not None]
        assert total(rises, f"{prefix}time_to_first_token_seconds_count") == len(firsts)
        per_token = [s for record in records for s in record.token_seconds]
        assert total(rises, f"{prefix}time_per_output_token_seconds_count") == len(per_token)
        expected = sum(getattr(record, label) is None for record in records)
        assert total(rises, f"{prefix}requests_total", **{label: NONE}) == expected
    expected = sum(record.adapter == BASE for record in records)
    assert total(rises, "rora_requests_total", adapter=BASE) == expected
    tiers: tuple[Tier, ...] = ("slot", "host", "store")
    for tier in tiers:
        expected = sum(record.tier == tier for record in records)
        assert total(rises, "rora_tier_hits_total", tier=tier) == expected


def test_counts_that_move_to_the_rest_would_be_seen_as_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Why they do not, and that the test above would notice."""
    steps = [*map(ended, "aabbbbbbb"), None, *map(ended, "bb"), None]
    assert total(rises_of(steps, 1), "rora_requests_total") == 11

    class Folding(metrics_module._Breakdown):
        def page(self) -> dict[str, metrics_module._Counts]:
            page = super().page()
            for left in page.keys() - self._counts.keys():
                self._counts[OTHER].requests += page[left].requests
            return page

    monkeypatch.setattr(metrics_module, "_Breakdown", Folding)
    assert total(rises_of(steps, 1), "rora_requests_total") == 13


def test_the_page_can_be_read_while_requests_are_counted(metrics: Metrics) -> None:
    num_requests = 3_000
    done = threading.Event()
    failures: list[BaseException] = []

    def read_on() -> None:
        try:
            while not done.is_set():
                read(metrics)
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read_on)
    reader.start()
    for index in range(num_requests):
        metrics.count_request(ended(f"a{index % 20}", status=200 + index % 300))
    done.set()
    reader.join()
    assert not failures
    assert total(read(metrics), "rora_requests_total") == num_requests


@pytest.fixture
def vllm_page(metrics: Metrics) -> Iterator[TestClient]:
    from vllm.entrypoints.serve.instrumentator.metrics import attach_router

    app = FastAPI()
    attach_router(app)
    REGISTRY.register(metrics)
    with TestClient(app) as client:
        yield client
    REGISTRY.unregister(metrics)


def test_ours_stand_on_vllms_page(vllm_page: TestClient, metrics: Metrics) -> None:
    metrics.count_request(ended("a"))
    answer = vllm_page.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert 'rora_requests_total{adapter="a",status="200"} 1.0' in answer.text
    assert "python_info" in answer.text
