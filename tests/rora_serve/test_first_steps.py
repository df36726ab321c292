"""What the next load waits for: the first step of what came in last, if steps are made at all."""

import pytest

from rora_serve.engine import first_steps
from rora_serve.engine.first_steps import FirstSteps


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> FirstSteps:
    monkeypatch.setattr(first_steps, "_IDLE_SECONDS", 60.0)
    return FirstSteps()


def test_a_first_step_is_over_when_the_step_that_has_the_adapter_ends(steps: FirstSteps) -> None:
    steps.begin({1})
    first = steps.expect(7)
    steps.end()
    steps.begin({1})
    steps.end()
    assert not first.is_set(), "this step was without it"
    steps.begin({1, 7})
    assert not first.is_set()
    steps.end()
    assert first.is_set()


def test_without_steps_nothing_is_waited_for(
    steps: FirstSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert steps.expect(7).is_set(), "none was ever made"
    steps.begin(set())
    assert not steps.expect(8).is_set(), "one is being made"
    steps.end()
    assert not steps.expect(9).is_set(), "one was made just now"
    monkeypatch.setattr(first_steps, "_IDLE_SECONDS", 0.0)
    assert steps.expect(10).is_set()


def test_one_that_is_not_in_the_steps_that_follow_is_not_waited_for(steps: FirstSteps) -> None:
    steps.begin({1})
    first = steps.expect(7)  # as --preload and uploads have it
    steps.end()
    for _ in range(2):
        assert not first.is_set()
        steps.begin({1})
        steps.end()
    assert first.is_set()


def test_the_last_that_came_in_is_waited_for(steps: FirstSteps) -> None:
    steps.begin(set())
    replaced, last = steps.expect(7), steps.expect(8)
    steps.end()
    steps.begin({7})
    steps.end()
    assert not replaced.is_set()
    assert not last.is_set()
    steps.begin({8})
    steps.end()
    assert last.is_set()
