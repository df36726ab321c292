"""Simulated hours of overload: who gets how much, and who waits how long."""

import asyncio
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable
from itertools import count, pairwise

import pytest

from rora_serve.admission import Admission
from rora_serve.fair_order import COLD_SHARE
from tests.rora_serve.traffic import Flow, Place, Seconds, Traffic, about, first_come, p95
from tests.rora_serve.virtual_time import run_in_virtual_time

Script = Callable[[Traffic], Awaitable[None] | None]


def fair(max_in_flight: int, *, queue_per_tenant: int | None = 1_000_000) -> Place:
    clock = asyncio.get_running_loop().time
    return Admission(max_in_flight, queue_per_tenant=queue_per_tenant, clock=clock).place


def simulate(place: Callable[[], Place], seconds: float, script: Script) -> Traffic:
    """Start clients, and hang up after some time."""

    async def run() -> Traffic:
        traffic = Traffic(place())
        steps = script(traffic)
        if steps is not None:
            await steps
        await asyncio.sleep(seconds)
        await traffic.stop()
        return traffic

    return run_in_virtual_time(run())


@pytest.mark.parametrize("num_places", [1, 16])
@pytest.mark.parametrize("lengths", [(5, 5), (1, 20)], ids=["alike", "20 times as long"])
def test_tenants_of_weight_2_and_1_get_service_2_to_1(
    num_places: int, lengths: tuple[float, float]
) -> None:
    twice, once = Flow(tenant="twice", weight=2.0), Flow(tenant="once")

    def script(traffic: Traffic) -> None:
        traffic.connect(twice, about(lengths[0]), connections=4 * num_places)
        traffic.connect(once, about(lengths[1]), connections=4 * num_places)

    used = simulate(lambda: fair(num_places), 20_000 / num_places, script).used()
    assert used[twice] / used[once] == pytest.approx(2.0, rel=0.04)


@pytest.mark.parametrize("num_places", [1, 16])
def test_adapters_get_alike_though_the_requests_of_one_are_100_times_as_long(
    num_places: int,
) -> None:
    long, short = Flow("long"), Flow("short")

    def share_of_short(place: Callable[[int], Place]) -> float:
        def script(traffic: Traffic) -> None:
            traffic.connect(long, about(100), connections=3 * num_places)
            traffic.connect(short, about(1), connections=3 * num_places)

        return simulate(lambda: place(num_places), 40_000 / num_places, script).used()[short]

    assert share_of_short(fair) == pytest.approx(0.5, abs=0.03)
    assert share_of_short(first_come) < 0.05


def test_one_connection_can_not_leave_its_debt_behind_between_two_requests() -> None:
    """It has nothing waiting and no place for a moment, while others wait."""
    long, short = Flow("long"), Flow("short")

    async def pauses(traffic: Traffic) -> None:
        while True:
            await traffic.ask(long, 100)
            await asyncio.sleep(0.01)

    def script(traffic: Traffic) -> None:
        traffic.start(pauses(traffic))
        traffic.connect(short, about(1), connections=3)

    used = simulate(lambda: fair(1), 10_000, script).used()
    assert used[short] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("seed", range(2))
def test_every_adapter_that_waits_is_let_in_within_the_bound(seed: int) -> None:
    """Of 16 adapters one sends from 50 times as many connections as the others."""
    num_places, longest = 4, 10.0
    flows = [Flow(str(number)) for number in range(16)]

    def length_of(flow: Flow) -> Seconds:
        """Return lengths of which a share, the adapter's own, is 100 times the others."""
        share = 0.5 if flow == flows[0] else random.Random(f"{seed} {flow.adapter}").random()
        return lambda chooser: longest if chooser.random() < share else longest / 100

    def longest_gap(place: Callable[[int], Place]) -> float:
        """Return the time between two turns of an adapter, as a part of the bound."""

        def script(traffic: Traffic) -> None:
            traffic.chooser.seed(seed)
            for flow in flows:
                connections = 400 if flow == flows[0] else 8
                traffic.connect(flow, length_of(flow), connections=connections)

        traffic = simulate(lambda: place(num_places), 2_000, script)
        worst = 0.0
        for flow in flows:
            visits = sorted((v for v in traffic.visits if v.flow == flow), key=lambda v: v.start)
            assert len(visits) > 1
            for visit, following in pairwise(visits):
                held = sum(v.start <= visit.start < v.end for v in visits)
                bound = 2 * longest * (1 + held * (len(flows) - 1) / num_places)
                worst = max(worst, (following.start - visit.start) / bound)
        return worst

    assert longest_gap(fair) <= 1.0
    assert longest_gap(first_come) > 1.5


def test_a_tenant_that_sends_10_times_its_share_leaves_the_waits_of_another_as_they_were() -> None:
    num_places, length = 16, 8.0
    hog, other = Flow(tenant="hog"), Flow(tenant="other")
    capacity = num_places / length

    def wait(place: Callable[[], Place], times: float) -> float:
        def script(traffic: Traffic) -> None:
            traffic.send(hog, about(length), per_second=times * capacity / 2)
            traffic.send(other, about(length), per_second=0.4 * capacity)

        return p95(simulate(place, 2_000, script).waits(other))

    modest = wait(lambda: fair(num_places, queue_per_tenant=None), 1)
    assert wait(lambda: fair(num_places, queue_per_tenant=None), 10) < modest + length / 2
    assert wait(lambda: first_come(num_places, max_waiting=128), 10) > modest + 3 * length


def test_what_was_used_while_nobody_waited_is_neither_owed_nor_credited() -> None:
    first, second = Flow(tenant="first"), Flow(tenant="second")

    async def script(traffic: Traffic) -> None:
        traffic.connect(first, about(5), connections=8)  # as many as there are places
        await asyncio.sleep(5_000)
        traffic.connect(first, about(5), connections=24)
        traffic.connect(second, about(5), connections=32)

    used = simulate(lambda: fair(8), 500, script).used(since=5_020)
    assert used[second] == pytest.approx(0.5, abs=0.05)


def test_a_tenant_that_was_away_has_no_credit() -> None:
    present, away = Flow(tenant="present"), Flow(tenant="away")
    third = Flow(tenant="third")

    async def script(traffic: Traffic) -> None:
        traffic.connect(away, about(5), connections=32)
        await asyncio.sleep(100)
        await traffic.stop()
        traffic.connect(present, about(5), connections=32)
        traffic.connect(third, about(5), connections=32)
        await asyncio.sleep(5_000)
        traffic.connect(away, about(5), connections=32)

    used = simulate(lambda: fair(8), 500, script).used(since=5_120)
    assert used[present] == pytest.approx(1 / 3, abs=0.05)


def ever_new(traffic: Traffic, *, is_cold: bool) -> None:
    async def strangers() -> None:
        for number in count():
            flow = Flow(f"new-{number}", is_cold=is_cold)
            traffic.start(traffic.ask(flow, traffic.chooser.expovariate(1 / 8)))
            await asyncio.sleep(traffic.chooser.expovariate(4.0))

    traffic.start(strangers())


def evicted_between_requests(traffic: Traffic, *, is_cold: bool) -> None:
    for number in range(50):
        traffic.connect(Flow(f"evicted-{number}", is_cold=is_cold), about(8), connections=1)


@pytest.mark.parametrize("others", [ever_new, evicted_between_requests])
@pytest.mark.parametrize("num_loaded", [1, 20])
def test_adapters_to_load_do_not_crowd_out_those_that_are_loaded(
    num_loaded: int, others: Callable[..., None]
) -> None:
    loaded = [Flow(f"loaded-{number}") for number in range(num_loaded)]

    def share_of_loaded(*, is_cold: bool) -> float:
        def script(traffic: Traffic) -> None:
            for flow in loaded:
                traffic.connect(flow, about(5), connections=16)
            others(traffic, is_cold=is_cold)

        used = simulate(lambda: fair(8), 1_000, script).used()
        return sum(used[flow] for flow in loaded)

    assert share_of_loaded(is_cold=True) == pytest.approx(1 - COLD_SHARE, abs=0.05)
    assert share_of_loaded(is_cold=False) < 0.5


def test_requests_of_many_sequences_have_their_turn_and_pay_for_what_they_keep_empty() -> None:
    large, small = Flow(tenant="large", cost=16), Flow(tenant="small")

    def script(traffic: Traffic) -> None:
        traffic.connect(large, about(5), connections=3)
        traffic.connect(small, about(5), connections=100)

    traffic = simulate(lambda: fair(16), 5_000, script)
    seconds = {
        flow: sum(v.flow.cost * (v.end - v.start) for v in traffic.visits if v.flow == flow)
        for flow in (large, small)
    }
    assert seconds[small] == pytest.approx(16 * 5_000 / 2, rel=0.1)
    assert seconds[large] > 16 * 5_000 / 10
    assert max(traffic.waits(large)) < 500


def test_overloaded_4_times_by_16_adapters_the_rarest_wait_no_longer_than_the_most_popular() -> (
    None
):
    num_places, length, minutes = 16, 4.0, 20
    capacity = num_places / length
    flows = [Flow(str(number)) for number in range(16)]
    weights = [1 / (1 + number) for number in range(16)]

    def served(place: Callable[[], Place]) -> tuple[float, float, dict[Flow, float]]:
        """Return p95 waits of the most popular and the rarest quarter, and the rate of each."""

        def script(traffic: Traffic) -> None:
            for flow, weight in zip(flows, weights, strict=True):
                traffic.send(flow, about(length), per_second=4 * capacity * weight / sum(weights))

        traffic = simulate(place, 60 * minutes, script)
        assert sum(traffic.refused.values()) > len(traffic.visits)
        counts: defaultdict[Flow, float] = defaultdict(float)
        for visit in traffic.visits:
            counts[visit.flow] += 1 / (60 * minutes)
        return p95(traffic.waits(*flows[:4])), p95(traffic.waits(*flows[-4:])), counts

    popular, rare, rates = served(lambda: fair(num_places, queue_per_tenant=None))
    assert rare < 3 * popular
    assert popular < 6 * 4 * length
    assert all(rate * 60 * 5 >= 40 for rate in rates.values())
    # All send more than a 16th of what can be served, and get that; first come, first served gives
    # the rarest a quarter of the little that they send.
    assert rates[flows[0]] / rates[flows[-1]] < 1.4
    _, _, rates = served(lambda: first_come(num_places, max_waiting=64))
    assert rates[flows[0]] / rates[flows[-1]] > 8
