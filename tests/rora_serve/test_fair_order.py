"""Whose turn it is, step by step."""

from typing import Any

import pytest

from rora_serve.fair_order import COLD_SHARE, Claim, FairOrder


class Line:
    """An order with a clock, from which turns are taken by hand."""

    def __init__(self, *, mean_seconds: float) -> None:
        self.order = FairOrder()
        self.order.mean_seconds = mean_seconds
        self.now = 0.0
        self.inside: list[Claim] = []

    def come(self, adapter: str, number: int = 1, **terms: Any) -> None:
        """Let requests wait."""
        terms = {"tenant": "t", "weight": 1.0, "cost": 1, "is_cold": False, **terms}
        for _ in range(number):
            self.order.add(Claim(adapter=adapter, **terms), self.now)

    def let_in(self, number: int) -> str:
        """Return the adapters of the next requests, which take their places."""
        adapters = ""
        for _ in range(number):
            claim = self.order.next(self.now)
            assert claim is not None
            self.order.take(claim, claim.cost, self.now)
            self.inside.append(claim)
            adapters += claim.adapter
        return adapters

    def go(self, adapter: str) -> None:
        """Let the oldest request of an adapter leave."""
        claim = next(claim for claim in self.inside if claim.adapter == adapter)
        self.inside.remove(claim)
        self.order.take(claim, -claim.places, self.now)

    def turn_over(self, number: int, *, seconds: float) -> str:
        """Return who gets the places of the oldest requests, which leave one by one.

        Each adapter that leaves sends another request.
        """
        adapters = ""
        for _ in range(number):
            self.now += seconds
            leaving = self.inside[0].adapter
            self.go(leaving)
            self.come(leaving)
            adapters += self.let_in(1)
        return adapters

    def accounts(self) -> list[str]:
        """Return the names of tenants, their halves and their adapters that are remembered."""
        names, nodes = [], [self.order._root]
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            names += list(node.children)
        return names


def test_adapters_take_turns_and_have_nothing_left_in_the_end() -> None:
    line = Line(mean_seconds=1)
    for adapter, number in (("a", 4), ("b", 2), ("c", 1)):
        line.come(adapter, number)
    assert line.let_in(7) == "abcabaa"
    assert line.order.next(line.now) is None
    for adapter in "abcabaa":
        line.go(adapter)
    assert line.accounts() == []


def test_a_newcomer_shares_what_becomes_free_and_does_not_take_it_all() -> None:
    """Without the estimate, b would have all that becomes free for as long as a had all."""
    line = Line(mean_seconds=800)
    line.come("a", 100)
    line.let_in(8)
    line.turn_over(80, seconds=100)
    line.come("b", 100)
    assert line.turn_over(8, seconds=100).count("b") in (3, 4, 5)
    line.turn_over(80, seconds=100)
    assert line.turn_over(80, seconds=100).count("b") in range(38, 43)


def test_places_that_are_held_for_longer_than_was_estimated_count_before_they_are_free() -> None:
    line = Line(mean_seconds=1)
    line.come("a", 3)
    line.come("b", 1)
    assert sorted(line.let_in(4)) == ["a", "a", "a", "b"]
    line.come("a", 5)
    for _ in range(20):
        line.now += 5
        line.go("b")
        line.come("b")
        assert line.let_in(1) == "b"


def test_what_was_used_while_nobody_waited_is_not_owed() -> None:
    line = Line(mean_seconds=10)
    line.come("a", 8)
    line.let_in(8)
    line.now = 1000
    line.come("a", 100)
    line.come("b", 100)
    assert line.turn_over(80, seconds=1).count("a") in range(35, 46)


def test_one_long_request_saves_no_credit_for_its_adapter() -> None:
    """a uses 1 of 8 places for 1000 seconds, in which it might have used 4."""
    line = Line(mean_seconds=8)
    line.come("b", 100)
    line.let_in(7)
    line.come("a")
    while line.inside[-1].adapter != "a":
        line.turn_over(1, seconds=1)
    line.inside.remove(long := line.inside[-1])
    line.turn_over(1000, seconds=1)
    line.inside.append(long)
    line.come("a", 100)
    assert line.turn_over(80, seconds=1).count("a") in range(35, 46)


def test_adapters_to_load_share_a_quarter_and_count_as_loaded_after_their_first_turn() -> None:
    line = Line(mean_seconds=4)
    line.come("w", 100)
    line.let_in(4)
    line.come("c", 100, is_cold=True)
    line.come("d", 1, is_cold=True)
    turns = line.turn_over(100, seconds=1)
    assert turns.index("d") > turns.index("c") + 1 / COLD_SHARE - 1
    assert turns.count("c") == pytest.approx(turns.count("w"), abs=5)


def test_an_adapter_with_a_place_is_remembered_though_its_half_has_caught_up() -> None:
    line = Line(mean_seconds=1)
    line.come("w")
    for number in range(9):
        line.come(f"c{number}", is_cold=True)
    assert line.let_in(1) == "w"
    line.now += 3
    line.go("w")
    for number in range(9):
        assert line.let_in(1) == f"c{number}"
        assert f"c{number}" in line.accounts()
        line.now += 1
    assert {f"c{number}" for number in range(9)} < set(line.accounts())
    for number in range(9):
        line.go(f"c{number}")
    assert line.accounts() == []


@pytest.mark.parametrize("is_cold", [False, True])
def test_a_debt_is_remembered_until_others_have_used_as_much(is_cold: bool) -> None:
    line = Line(mean_seconds=1)
    line.come("w", 50)
    line.come("c", is_cold=is_cold)
    line.let_in(2)
    line.now += 10
    line.go("c")
    assert "c" in line.accounts()
    line.turn_over(5, seconds=5)
    assert "c" not in line.accounts()


def test_debts_are_forgotten_when_nobody_waits() -> None:
    line = Line(mean_seconds=1)
    line.come("w", 2)
    line.come("c")
    assert line.let_in(2) == "wc"
    line.now += 10
    line.go("c")
    assert "c" in line.accounts()
    line.let_in(1)
    assert "c" not in line.accounts()


@pytest.mark.parametrize("level", ["adapter", "tenant"])
def test_debts_of_at_most_1024_are_remembered(level: str) -> None:
    line = Line(mean_seconds=1)
    line.come("w", 10)
    for number in range(3_000):
        name = f"n{number}"
        line.come(name, tenant=name if level == "tenant" else "t")
        while not line.let_in(1).startswith("n"):
            line.come("w")
        line.now += 1000
        line.go(name)
    assert 1024 <= len(line.accounts()) <= 1030
