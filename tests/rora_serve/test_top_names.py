"""The names used most are found, whatever else is used, and they do not change without reason."""

from collections import Counter
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from rora_serve.top_names import RecentUses, TopNames

uses_of_names = st.lists(st.sampled_from("abcdefghij"), max_size=120)


@settings(deadline=None)
@given(names=uses_of_names, capacity=st.integers(1, 12), half_life=st.integers(1, 50))
def test_uses_lie_between_their_bounds(names: list[str], capacity: int, half_life: int) -> None:
    counted = RecentUses(capacity, half_life)
    exact: dict[str, Fraction] = dict.fromkeys("abcdefghij", Fraction())
    for number, name in enumerate(names, start=1):
        counted.add(name)
        exact[name] += 1
        if number % half_life == 0:
            exact = {used: uses / 2 for used, uses in exact.items()}
        assert len(list(counted)) <= capacity
        for used, uses in exact.items():
            assert counted.lower(used) <= uses <= counted.upper(used)


@given(names=uses_of_names)
def test_bounds_are_exact_while_there_is_room(names: list[str]) -> None:
    counted = RecentUses(10, 1000)
    for name in names:
        counted.add(name)
    exact = Counter(names)
    for name in "abcdefghij":
        assert counted.lower(name) == counted.upper(name) == exact[name]


@given(names=uses_of_names, capacity=st.integers(1, 12))
def test_a_name_with_more_than_its_share_is_held(names: list[str], capacity: int) -> None:
    counted = RecentUses(capacity, 1000)
    for name in names:
        counted.add(name)
    often = {name for name, uses in Counter(names).items() if uses > len(names) / capacity}
    assert often <= set(counted)


def test_a_free_place_is_taken_at_once_and_another_ones_only_when_asked() -> None:
    top = TopNames(2)
    for name in ("a", "b", "c", "c", "c"):
        top.use(name)
    assert [name for name in "abc" if name in top] == ["a", "b"]
    assert top.renew() == [("a", "c")]
    assert [name for name in "abc" if name in top] == ["b", "c"]


def test_a_place_is_kept_against_a_name_that_is_not_clearly_used_more() -> None:
    top = TopNames(1)
    for name in ("a", "b", "b"):
        top.use(name)
    assert top.renew() == []
    top.use("b")
    assert top.renew() == [("a", "b")]
    assert top.renew() == []


def test_those_used_least_leave_for_those_used_most() -> None:
    top = TopNames(3)
    for name, uses in {"a": 1, "b": 20, "c": 2, "d": 9, "e": 8, "f": 3}.items():
        for _ in range(uses):
            top.use(name)
    assert top.renew() == [("a", "d"), ("c", "e")]


def test_what_was_used_long_ago_counts_for_little() -> None:
    top = TopNames(1, half_life=50)
    for _ in range(500):
        top.use("old")
    for _ in range(150):
        top.use("new")
    assert top.renew() == [("old", "new")]
    lasting = TopNames(1, half_life=10_000)
    for name in ["old"] * 500 + ["new"] * 150:
        lasting.use(name)
    assert lasting.renew() == []


def test_a_reserved_name_never_gets_a_place() -> None:
    top = TopNames(3, reserved=("other",))
    top.use("other")
    assert "other" not in top
    assert top.renew() == []
