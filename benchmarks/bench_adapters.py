"""What it costs to look at an adapter, to list a store, and to make an adapter smaller.

    python -m benchmarks.bench_adapters

Figures:
    inspect_ms, inspect_peak_mb: `rora-adapters inspect` of an adapter of 50 MB, after the imports,
        in a process of its own; the peak is of the whole process.
    list_ms: 10,000 names by a new store object from a warm disk; list_first_ms without the listing.
    add_ms, compact_ms: of the same adapter.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from adapters import AdapterConfig, AdapterStore, open_artifact, write_artifact
from adapters.compact import compact_to_error
from adapters.name_files import NameFiles
from adapters.names import NameHistory
from benchmarks.row import spread, write_row

NUM_NAMES = 10_000
HIDDEN, KEY_VALUE, INTERMEDIATE, NUM_LAYERS = 576, 192, 1536, 30  # SmolLM2-135M
RANKS = range(1, 76)  # drawn by module; 50 MB in float32

INSPECT = """
import contextlib, io, sys, time
from adapters.cli import main
import adapters.artifact, adapters.display, adapters.sources
started = time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()):
    assert main(["inspect", sys.argv[1]]) == 0
seconds = time.perf_counter() - started
# Not ru_maxrss, which counts what the parent had when it forked.
status = open("/proc/self/status").read()
print(1000 * seconds, int(status.partition("VmHWM:")[2].split()[0]) / 1024)
"""


def make_adapter(folder: Path) -> Path:
    """Write an adapter of 50 MB with another rank in each module."""
    generator = np.random.default_rng(0)
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KEY_VALUE, HIDDEN),
        "self_attn.v_proj": (KEY_VALUE, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    factors, ranks = {}, {}
    for layer in range(NUM_LAYERS):
        for kind, (out_features, in_features) in shapes.items():
            name = f"model.layers.{layer}.{kind}"
            ranks[name] = int(generator.choice(RANKS))
            lora_a = generator.normal(size=(ranks[name], in_features)).astype(np.float32)
            lora_b = generator.normal(size=(out_features, ranks[name])).astype(np.float32)
            factors[name] = (lora_a, lora_b / 100)
    config = AdapterConfig(max(RANKS), 16, use_rslora=True, rank_pattern=ranks)
    write_artifact(folder, config, factors, provenance={"format": 1})
    return folder


def inspect(adapter: Path) -> tuple[float, float]:
    """Return milliseconds and peak megabytes of one inspection in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", INSPECT, str(adapter)], capture_output=True, text=True, check=True
    )
    milliseconds, megabytes = map(float, result.stdout.split())
    return milliseconds, megabytes


def fill(store: AdapterStore, adapter: Path) -> None:
    """Let ten thousand names mean one version."""
    resolved = store.add(adapter, name="first")
    record, names = store.record("first"), NameFiles(store.root)
    events = store.history("first")
    for number in range(1, NUM_NAMES):
        copied = replace(record, name=f"customer-{number:05}")
        names.write(NameHistory(copied, events))
    assert resolved.version == store.record("customer-00001").latest


def milliseconds_to_list(root: Path) -> float:
    """Return how long a new store object takes to list all names."""
    started = time.perf_counter()
    records = AdapterStore(root).names()
    seconds = time.perf_counter() - started
    assert len(records) == NUM_NAMES
    return 1000 * seconds


def timed_compact(adapter: Path, output: Path) -> float:
    """Return milliseconds of one compaction."""
    started = time.perf_counter()
    compact_to_error(open_artifact(adapter), output, max_error=0.1)
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    """Measure, and write one row."""
    parser = argparse.ArgumentParser(prog="bench_adapters", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory(prefix="rora-bench-") as temporary:
        root = Path(temporary)
        adapter = make_adapter(root / "adapter")
        num_bytes = open_artifact(adapter).num_bytes
        inspections = [inspect(adapter) for _ in range(repeats)]
        adds = []
        for number in range(repeats):
            started = time.perf_counter()
            AdapterStore(root / f"store-{number}").add(adapter, name="a")
            adds.append(1000 * (time.perf_counter() - started))
        compactions = [timed_compact(adapter, root / f"small-{n}") for n in range(repeats)]
        store = AdapterStore(root / "store")
        fill(store, adapter)
        lists = [milliseconds_to_list(store.root) for _ in range(repeats)]
        first = []
        for _ in range(repeats):
            (store.root / "listing.tsv").unlink(missing_ok=True)
            first.append(milliseconds_to_list(store.root))
    figures: dict[str, object] = {
        "inspect_ms": spread([milliseconds for milliseconds, _ in inspections]),
        "inspect_peak_mb": spread([megabytes for _, megabytes in inspections]),
        "list_ms": spread(lists),
        "list_first_ms": spread(first),
        "add_ms": spread(adds),
        "compact_ms": spread(compactions),
        "adapter_mb": round(num_bytes / 1e6, 1),
        "num_names": NUM_NAMES,
        "repeats": repeats,
    }
    write_row("bench_adapters", figures, ["numpy", "safetensors", "google-re2"])


if __name__ == "__main__":
    main()
