from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import LimitExceededError, OverloadedError
from rora_serve.key_file import KeyFile
from rora_serve.limits import BodyRoom, Limiter
from rora_serve.tenants import EVERYBODY, Limits, Tenant, key_digest


def make_tenant(name: str = "acme", **limits: int) -> Tenant:
    return Tenant(name, limits=Limits(**limits))


def refusal(limiter: Limiter, tenant: Tenant, now: float) -> LimitExceededError:
    with pytest.raises(LimitExceededError) as caught:
        limiter.admit(tenant, now)
    return caught.value


def test_a_minute_holds_its_requests_and_refills_evenly() -> None:
    limiter, tenant = Limiter(), make_tenant(requests_per_minute=6)
    for _ in range(6):
        limiter.admit(tenant, 100.0)
    error = refusal(limiter, tenant, 100.0)
    assert error.retry_after_seconds == pytest.approx(10)
    assert str(error) == (
        "tenant 'acme': a minute's requests are used up, requests_per_minute is 6; "
        "come again in 10 s"
    )
    assert refusal(limiter, tenant, 107.5).retry_after_seconds == pytest.approx(2.5)
    limiter.admit(tenant, 110.0)
    refusal(limiter, tenant, 110.0)
    for _ in range(6):  # an hour later it is full, and no more than that
        limiter.admit(tenant, 3710.0)
    refusal(limiter, tenant, 3710.0)


def test_a_refused_request_costs_nothing() -> None:
    limiter, tenant = Limiter(), make_tenant(requests_per_minute=1, max_concurrent=1)
    limiter.admit(tenant, 0.0)
    for second in range(60):
        assert refusal(limiter, tenant, second).retry_after_seconds == pytest.approx(60 - second)
    limiter.done(tenant)
    limiter.admit(tenant, 60.0)


def test_what_is_refused_later_is_given_back() -> None:
    limiter, tenant = Limiter(), make_tenant(requests_per_minute=1)
    for _ in range(3):
        limiter.admit(tenant, 0.0)
        refusal(limiter, tenant, 0.0)
        limiter.give_back(tenant, 0.0)
        limiter.done(tenant)
    limiter.admit(tenant, 0.0)
    refusal(limiter, tenant, 0.0)


def test_bodies_have_room_as_long_as_they_are_read() -> None:
    room, free = BodyRoom(100, 60), 64 * 1024
    with room.of("a") as hold:
        hold(free - 1)
        hold(61)
        with pytest.raises(OverloadedError), room.of("a") as more:
            more(free + 1)
        with room.of("a") as ordinary:
            ordinary(free)
        with room.of("b") as other:
            other(free + 40)
            with pytest.raises(OverloadedError):
                other(1)
        with room.of("b") as other:
            other(free + 40)
    with room.of("a") as hold:
        hold(free + 60)


def test_tokens_are_spent_afterwards_and_may_leave_a_debt() -> None:
    limiter, tenant = Limiter(), make_tenant(tokens_per_minute=600)
    for _ in range(3):  # nobody knows yet what these will compute
        limiter.admit(tenant, 0.0)
    limiter.spend_tokens(tenant, 599, 0.0)
    limiter.admit(tenant, 0.0)
    limiter.spend_tokens(tenant, 1201, 0.0)
    error = refusal(limiter, tenant, 0.0)
    assert "a minute's tokens are used up, tokens_per_minute is 600; come again in 121 s" in str(
        error
    )
    assert error.retry_after_seconds == pytest.approx(120.1)  # 1200 of debt and the one it takes
    refusal(limiter, tenant, 120.0)
    limiter.admit(tenant, 120.1)


def test_places_are_given_back() -> None:
    limiter, tenant = Limiter(), make_tenant(max_concurrent=2)
    limiter.admit(tenant, 0.0)
    limiter.admit(tenant, 0.0)
    error = refusal(limiter, tenant, 0.0)
    assert str(error) == (
        "tenant 'acme': 2 requests are running, max_concurrent is 2; come again in 1 s"
    )
    assert error.retry_after_seconds == 1
    limiter.done(tenant)
    limiter.admit(tenant, 0.0)
    refusal(limiter, tenant, 0.0)


def test_the_limit_that_lasts_longest_is_named() -> None:
    tenant = make_tenant(requests_per_minute=30, tokens_per_minute=30, max_concurrent=1)
    limiter = Limiter()
    limiter.admit(tenant, 0.0)
    assert "max_concurrent" in str(refusal(limiter, tenant, 0.0))
    limiter.spend_tokens(tenant, 30, 0.0)
    error = refusal(limiter, tenant, 0.0)
    assert "tokens_per_minute" in str(error)
    assert error.retry_after_seconds == pytest.approx(2)


def test_tenants_do_not_share() -> None:
    limiter = Limiter()
    first, second = (make_tenant(name, requests_per_minute=1) for name in ("a", "b"))
    limiter.admit(first, 0.0)
    refusal(limiter, first, 0.0)
    limiter.admit(second, 0.0)


def test_without_limits_nothing_is_refused() -> None:
    limiter = Limiter()
    for _ in range(1000):
        limiter.admit(EVERYBODY, 0.0)
        limiter.spend_tokens(EVERYBODY, 10**9, 0.0)
    limiter.admit(EVERYBODY, 0.0)


def test_a_place_that_nobody_took_is_our_own_mistake() -> None:
    limiter, tenant = Limiter(), make_tenant()
    limiter.admit(tenant, 0.0)
    limiter.done(tenant)
    with pytest.raises(AssertionError):
        limiter.done(tenant)


def test_a_clock_read_before_another_call_takes_nothing_back() -> None:
    limiter, tenant = Limiter(), make_tenant(requests_per_minute=2)
    limiter.admit(tenant, 100.0)
    limiter.admit(tenant, 99.0)
    refusal(limiter, tenant, 100.0)


def test_limits_survive_a_reload_of_the_file(tmp_path: Path) -> None:
    path, now = tmp_path / "keys.toml", [0.0]
    line = f'keys = ["sha256:{key_digest("k").hex()}"]'
    lines = f"[tenants.acme]\n{line}\nrequests_per_minute = 2\nmax_concurrent = 3\n"
    path.write_text(lines)
    keys = KeyFile(path, cache_secret=b"s", clock=lambda: now[0])

    def tenant() -> Tenant:
        now[0] += 1  # so that the file is looked at
        found = keys.tenant_of("k")
        assert found is not None
        return found

    limiter, before = Limiter(), tenant()
    limiter.admit(before, 0.0)
    limiter.admit(before, 0.0)
    path.write_text(f"{lines}weight = 2\n")
    after = tenant()
    assert after != before
    assert "requests_per_minute is 2" in str(refusal(limiter, after, 0.0))
    path.write_text(lines.replace("minute = 2", "minute = 1000"))
    limiter.admit(tenant(), 1.0)  # a higher limit helps soon
    assert "3 requests are running" in str(refusal(limiter, tenant(), 1.0))
    limiter.done(before)  # a request ends with the tenant that it began with
    limiter.admit(tenant(), 1.0)


def test_a_lower_limit_holds_at_once_and_a_new_one_counts_what_runs() -> None:
    limiter, tenant = Limiter(), make_tenant(requests_per_minute=1000)
    limiter.admit(tenant, 0.0)
    lower = replace(tenant, limits=Limits(requests_per_minute=2))
    limiter.admit(lower, 0.0)
    limiter.admit(lower, 0.0)
    refusal(limiter, lower, 0.0)
    busy = replace(tenant, limits=Limits(max_concurrent=3))
    assert "3 requests are running" in str(refusal(limiter, busy, 0.0))


class Loop:
    """Oracle: exact buckets, one unit of time after the other."""

    def __init__(self, limits: Limits, units: int) -> None:
        self.limits, self.units = limits, units  # a second has so many units of time
        self.now = self.running = 0
        self.requests = Fraction(limits.requests_per_minute or 0)
        self.tokens = Fraction(limits.tokens_per_minute or 0)

    def pass_time(self, num_units: int) -> None:
        for _ in range(num_units):
            self.now += 1
            for name in ("requests", "tokens"):
                limit = getattr(self.limits, f"{name}_per_minute")
                if limit is not None:
                    refilled = getattr(self, name) + Fraction(limit, 60 * self.units)
                    setattr(self, name, min(Fraction(limit), refilled))

    def may_come(self) -> bool:
        limits = self.limits
        return (
            (limits.max_concurrent is None or self.running < limits.max_concurrent)
            and (limits.requests_per_minute is None or self.requests >= 1)
            and (limits.tokens_per_minute is None or self.tokens >= 1)
        )


maybe_a_limit = st.none() | st.integers(1, 40)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("pass"), st.integers(1, 200)),
        st.tuples(st.just("admit"), st.just(1)),
        st.tuples(st.just("spend"), st.integers(0, 60)),
        st.tuples(st.just("done"), st.just(1)),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(
    maybe_a_limit, maybe_a_limit, st.none() | st.integers(1, 4), steps, st.sampled_from([1, 4, 7])
)
def test_buckets_are_those_of_a_loop(
    requests: int | None,
    tokens: int | None,
    concurrent: int | None,
    steps: list[tuple[str, int]],
    units: int,
) -> None:
    limits = Limits(
        requests_per_minute=requests, tokens_per_minute=tokens, max_concurrent=concurrent
    )
    limiter, loop, tenant = Limiter(), Loop(limits, units), Tenant("t", limits=limits)
    start = 1e6  # as of a machine that has run for days
    for step, count in steps:
        now = start + loop.now / units
        if step == "pass":
            loop.pass_time(count)
        elif step == "spend":
            limiter.spend_tokens(tenant, count, now)
            loop.tokens -= count
        elif step == "done" and loop.running:
            limiter.done(tenant)
            loop.running -= 1
        elif step == "admit" and loop.may_come():
            limiter.admit(tenant, now)
            loop.running += 1
            loop.requests -= 1
        elif step == "admit":
            refusal(limiter, tenant, now)


@given(st.integers(1, 10**6), st.integers(0, 10**7), st.floats(0, 10**7))
def test_who_comes_after_the_told_time_is_let_in_and_just_before_it_is_not(
    limit: int, spent: int, start: float
) -> None:
    limiter, tenant = Limiter(), make_tenant(tokens_per_minute=limit)
    limiter.spend_tokens(tenant, limit + spent, start)
    wait = refusal(limiter, tenant, start).retry_after_seconds
    assert wait > 0
    refusal(limiter, tenant, start + wait - min(0.01, wait / 2))
    limiter.admit(tenant, start + wait)
