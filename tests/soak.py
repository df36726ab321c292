"""What takes too long for CI: `scripts/soak NAME`. The last line is a row of results, in JSON.

fuzz    mutated headers, configurations and archives: no error outside our tree
kill    a store's writer killed at random points: whole every time
churn   1,000 adapters through a server's memory for 100, for 10 minutes
swap    a name that is moved 500 times under 32 streams
unload  200 rounds of loading and unloading, 200 of uploading and deleting
tenants a tenant at its limit and at ten times that, 4 times in turn, beside another
overload  4 times what a server can do, for 5 minutes
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from benchmarks.row import write_row
from tests.adapters.fuzzing import run
from tests.adapters.killing import kill_once
from tests.adapters.test_killing import several_adapters
from tests.rora_serve.churning import churn
from tests.rora_serve.isolation import isolate
from tests.rora_serve.overloading import overload
from tests.rora_serve.swapping import swap
from tests.rora_serve.unloading import unload

Item = TypeVar("Item")


def fuzz(folder: Path, count: int, first: int) -> dict[str, object]:
    """Check the inputs of `count` seeds; a failure names its seed."""
    accepted = 0
    for seed in progress(range(first, first + count)):
        try:
            accepted += run(folder, seed)
        except Exception as error:
            raise SystemExit(
                f"seed {seed}: {error!r}; add it to tests/adapters/fuzzing.py"
            ) from error
    return {"inputs": count, "first_seed": first, "accepted": accepted, "failures": 0}


def kill(folder: Path, count: int, first: int) -> dict[str, object]:
    """Kill a writer `count` times, each on the store that the last one left."""
    adapters = several_adapters(folder / "adapters")
    held = []
    for seed in progress(range(first, first + count)):
        held.append(kill_once(folder / "store", adapters, seed))
    return {"points": count, "first_seed": first, "most_versions": max(held), "failures": 0}


SOAKS: dict[str, tuple[Callable[[Path, int, int], dict[str, object]], int]] = {
    "fuzz": (fuzz, 100_000),
    "kill": (kill, 200),
    "churn": (churn, 10),
    "swap": (swap, 500),
    "unload": (unload, 200),
    "tenants": (isolate, 4),
    "overload": (overload, 5),
}


def main() -> None:
    """Run one soak and append its row to benchmarks/results/soak.jsonl."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SOAKS)
    parser.add_argument(
        "--count", type=int, help="how many inputs, points, moves, rounds or minutes"
    )
    parser.add_argument("--first", type=int, default=0, help="first seed; default: 0")
    arguments = parser.parse_args()
    soak, count = SOAKS[arguments.name]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rora-soak-") as folder:
        found = soak(Path(folder), arguments.count or count, arguments.first)
    figures = {"soak": arguments.name, **found, "seconds": round(time.monotonic() - started, 1)}
    write_row("soak", figures, ["filelock", "google-re2", "numpy"])


def progress(items: Iterable[Item]) -> Iterator[Item]:
    """Yield items and say how many every ten seconds."""
    said = time.monotonic()
    for number, item in enumerate(items):
        yield item
        if time.monotonic() - said > 10:
            said = time.monotonic()
            print(f"{number + 1} done", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
