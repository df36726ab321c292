"""What every row of results holds beside its figures, and where rows are kept."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median of repeats with the least and the largest."""
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "largest": round(max(values), 4),
    }


def write_row(name: str, figures: dict[str, object], packages: Sequence[str]) -> None:
    """Append a row to results/<name>.jsonl and print it as the last line."""
    row = {
        "benchmark": name,
        **figures,
        "commit": commit(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
    }
    RESULTS.mkdir(exist_ok=True)
    line = json.dumps(row)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line)


def kept(path: Path, key: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
    """Return what `measure` sees, now, or in a run of this commit that was cut short.

    Args: path: file of rows, to which what is seen is appended at once. key: names it in there.
    """
    key = {**key, "commit": commit()}
    lines = path.read_text().splitlines() if path.exists() else []
    for row in map(json.loads, lines):
        # What was not committed can be anything.
        if row["key"] == key and not key["commit"].endswith("+"):
            return row["seen"]
    print(*key.values(), file=sys.stderr, flush=True)
    seen = measure()
    with path.open("a") as file:
        file.write(json.dumps({"key": key, "seen": seen}) + "\n")
    print(json.dumps(seen), file=sys.stderr, flush=True)
    return seen


def commit() -> str:
    """Return the commit that is measured, with a + if the tree, results aside, differs from it."""

    def git(*arguments: str) -> str:
        command = ["/usr/bin/env", "git", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", ":/", f":(exclude){RESULTS}")
    return git("describe", "--always") + ("+" if changed else "")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
