"""Adapters that come and go for long: what the server's processes hold afterwards."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from adapters import AdapterConfig, AdapterStore
from adapters.base_model import cache_folder, find_model
from tests.conftest import LINEAR
from tests.rora_serve.serving import Server, free_port, our_command, running
from tests.workloads import make_random_adapter, set_alpha

NAME = "coming"
RANK = 16
ROUNDS_FIRST = 5  # after which "the first" is measured: pools and caches have grown by then
MAX_GROWTH = 0.05
KINDS = ("load and unload", "upload and delete")


@dataclass(frozen=True)
class Memory:
    """Bytes: that the server's processes hold by themselves, and that it says adapters take."""

    processes: int
    adapters: int


def measure(server: Server) -> Memory:
    """Add up the server's processes; what they share counts once for each that shares it."""
    parent = psutil.Process(server.process.pid)
    processes = [parent, *parent.children(recursive=True)]
    total = sum(process.memory_full_info().pss for process in processes)
    page = httpx.get(f"{server.url}/metrics").text
    (line,) = (line for line in page.splitlines() if line.startswith("rora_host_used_bytes "))
    return Memory(total, int(float(line.rpartition(" ")[2])))


class Visitor:
    """An adapter of 20 MB that comes to a server and goes, by either of two ways."""

    def __init__(self, server: Server, folder: Path, base: Path) -> None:
        self._server = server
        self._folder = make_random_adapter(
            folder,
            base,
            config=AdapterConfig(RANK, RANK, target_modules=LINEAR),
            modules=LINEAR,
            seed=301,
        )
        self.num_bytes = (folder / "adapter_model.safetensors").stat().st_size
        self._client = httpx.Client(base_url=server.url, timeout=120)

    def close(self) -> None:
        self._client.close()

    def come(self, number: int) -> None:
        """Upload it with other weights than ever before, and have it answer."""
        set_alpha(self._folder, RANK + number / 1000)
        files = {
            name: (name, (self._folder / name).read_bytes())
            for name in ("adapter_config.json", "adapter_model.safetensors")
        }
        answer = self._client.post("/v1/adapters", data={"name": NAME}, files=files)
        assert answer.status_code == 201, answer.text
        self.ask()

    def ask(self) -> None:
        body = {"model": NAME, "prompt": "Hi", "max_tokens": 2}
        answer = self._client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text

    def delete(self) -> None:
        self._post("DELETE", "?force=true")

    def load(self) -> None:
        self._post("POST", "/load")

    def unload(self) -> None:
        self._post("POST", "/unload")

    def round(self, kind: str, number: int) -> None:
        """Let it come and go once, and see that the server counts it and no longer does."""
        before = measure(self._server).adapters
        if kind == KINDS[0]:
            self.load()
            self.ask()
        else:
            self.come(number)
        assert measure(self._server).adapters - before >= self.num_bytes * 0.9
        if kind == KINDS[0]:
            self.unload()
        else:
            self.delete()
        assert measure(self._server).adapters == before

    def _post(self, method: str, what: str) -> None:
        answer = self._client.request(method, f"/v1/adapters/{NAME}{what}")
        assert answer.status_code == 200, answer.text


def growth(server: Server, visitor: Visitor, kind: str, rounds: int, *, first: int) -> list[int]:
    """Return the processes' bytes after the first rounds and after all of them.

    Args: first: number of the first round, so that none has the weights of another.
    """
    seen = []
    if kind == KINDS[0]:
        visitor.come(first)
        visitor.unload()
    for number in range(1, rounds + 1):
        visitor.round(kind, first + number)
        if number in (ROUNDS_FIRST, rounds):
            seen.append(measure(server).processes)
            print(f"{kind}, {number}: {seen[-1] / 1e6:.0f} MB", file=sys.stderr, flush=True)
    if kind == KINDS[0]:
        visitor.delete()
    return seen


def held_without_unloading(server: Server, visitor: Visitor, count: int, *, first: int) -> int:
    """Return by how many bytes processes grow that keep `count` versions: the control."""
    before = measure(server).processes
    for number in range(count):
        visitor.come(first + number)
    grown = measure(server).processes - before
    visitor.delete()
    return grown


def unload(folder: Path, rounds: int, seed: int) -> dict[str, object]:
    """Load and unload, upload and delete an adapter; fails if the processes grow by 5 %."""
    base = find_model(None, cache=cache_folder(os.environ))
    store = AdapterStore(folder / "store")
    port = free_port()
    figures: dict[str, object] = {"rounds": rounds, "failures": 0}
    with running(our_command(store.root, port), port, folder / "log") as server:
        visitor = Visitor(server, folder / "made", base)
        for turn, kind in enumerate(KINDS):
            first, last = growth(server, visitor, kind, rounds, first=10_000 * turn + seed)
            figures[kind.replace(" ", "_")] = {
                "memory_mb": [round(first / 1e6), round(last / 1e6)],
                "growth": round(last / first - 1, 4),
            }
            assert last <= (1 + MAX_GROWTH) * first, figures
        # The control: as many bytes as 5 % are noticed.
        count = int(MAX_GROWTH * last / visitor.num_bytes) + 5
        grown = held_without_unloading(server, visitor, count, first=90_000)
        figures["control"] = {"kept": count, "growth": round(grown / last, 4)}
        assert grown > MAX_GROWTH * last, figures
        visitor.close()
    figures["adapter_mb"] = round(visitor.num_bytes / 1e6, 1)
    return figures
