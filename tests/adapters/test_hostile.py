"""Malformed adapters: each is refused with its own code, cheaply, and nothing else goes wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapters import Code, validate
from tests.adapters.hostile.build import CASES, right

# What only a base model, or the conversion of another layout, can bring up; and a race.
ELSEWHERE = {
    "base-other", "file-changed", "file-unreadable", "layout-ambiguous", "layout-needs-base",
    "layout-unknown", "module-shape", "module-unmatched",
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of each case, each checked in a process of its own."""
    folder = tmp_path_factory.mktemp("hostile")
    command = [sys.executable, "-m", "tests.adapters.hostile.measure", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    return {row["case"]: row for row in rows}


def test_the_adapter_that_they_are_made_from_is_right(tmp_path: Path) -> None:
    assert validate(right(tmp_path / "right")).problems == ()


def test_there_is_a_case_for_every_code() -> None:
    assert {one.code for one in CASES} == {str(code) for code in Code} - ELSEWHERE
    assert len({one.name for one in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize("name", [one.name for one in CASES])
def test_each_is_refused_with_its_own_code(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    outcome = outcomes[name]
    assert "crash" not in outcome
    assert set(outcome["codes"]) == {outcome["code"]}


def test_none_costs_much(outcomes: dict[str, dict[str, Any]]) -> None:
    """Time is the process's own, so a busy machine does not count."""
    assert max(row["cpu_seconds"] for row in outcomes.values()) < 2
    assert max(row["peak_mb"] for row in outcomes.values()) < 100
