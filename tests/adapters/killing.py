"""A writer that changes a store in every way until it is killed, and what must hold then.

python -m tests.adapters.killing STORE ADAPTERS SEED
"""

import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from adapters import AdapterStore
from adapters.errors import AdapterNotFoundError, StoreError
from adapters.store import verify

NAMES = ("a", "b", "c")
ALIASES = ("latest", "stable", "canary")


def write_for_ever(root: Path, adapters: list[Path], rng: random.Random) -> None:
    """Add, alias, roll back, remove and collect garbage at random, and say that it began."""
    store = AdapterStore(root)
    print("writing", flush=True)
    while True:
        name, alias = rng.choice(NAMES), rng.choice(ALIASES)
        action = rng.randrange(10)
        # What is not there, or is needed, can not be changed: that is no failure.
        with suppress(AdapterNotFoundError, StoreError):
            if action < 4:
                store.add(rng.choice(adapters), name=name, alias=alias)
            elif action < 6:
                store.set_alias(name, alias)
            elif action == 6:
                store.rollback(name, alias)
            elif action == 7:
                version = rng.choice(store.record(name).versions)
                store.remove(f"{name}@sha256:{version.digest}", force=rng.random() < 0.5)
            elif action == 8:
                store.remove(name, force=True)
            else:
                store.collect_garbage(keep_versions=rng.choice((None, 1, 2)))


def kill_once(root: Path, adapters: Path, seed: int) -> int:
    """Start a writer, kill it at a random moment, and check the store; return what it holds.

    Raises: what the store raises, or AssertionError, if it is not whole.
    """
    rng = random.Random(seed)
    command = [sys.executable, "-m", __name__, str(root), str(adapters), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        time.sleep(rng.uniform(0, 0.15))
        writer.kill()
    assert writer.returncode == -signal.SIGKILL
    return check(root)


def check(root: Path) -> int:
    """See that every version of every name is whole, twice: as it is, and after a clean-up."""
    for _ in range(2):
        store = AdapterStore(root)
        records = store.names()
        assert {f"{record.name}.json" for record in records} == {
            path.name for path in (root / "names").glob("[!.]*.json")
        }
        for record in records:
            for alias in record.aliases:
                verify(store.resolve(f"{record.name}@{alias}"))
            for version in record.versions:
                verify(store.resolve(f"{record.name}@sha256:{version.digest}"))
        store.collect_garbage()
        for folder in ("incoming", "trash", "leases"):
            assert not (root / folder).exists() or not list((root / folder).iterdir())
    held = {version.digest for record in records for version in record.versions}
    assert {path.name for path in (root / "objects").iterdir()} == held
    return len(held)


if __name__ == "__main__":
    seed = int(sys.argv[3])
    folders = sorted(Path(sys.argv[2]).iterdir())
    write_for_ever(Path(sys.argv[1]), folders, random.Random(seed + 1_000_000))
