"""A tenant that sends ten times what it may, and how fast another one's tokens come meanwhile."""

import asyncio
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

from adapters import AdapterStore
from adapters.base_model import cache_folder, find_model
from benchmarks.fleet import add_fleet
from benchmarks.row import spread
from tests.rora_serve.serving import Server, free_port, our_command, running
from tests.rora_serve.streaming import TIMEOUT, Outcome, ask, limits
from tests.rora_serve.tenant_table import write_keys

PER_MINUTE = 120  # requests of the noisy tenant
NUM_QUIET, QUIET_TOKENS = 4, 24
NOISY_TOKENS = 24
PROMPT = 12
PHASE_SECONDS = 20.0
SETTLING_SECONDS = 4.0  # at the begin of a phase, which are not counted
DRAIN_SECONDS = 12.0
MAX_RATIO = 1.3
MAX_LATE_SECONDS = 1.0  # of the last request of a phase: a client that falls behind sends no rate
GRANTS = {
    "quiet": 'use = ["adapter-0"]',
    "noisy": f'use = ["adapter-1"]\nrequests_per_minute = {PER_MINUTE}',
    # The control: what the limit keeps away.
    "unlimited": 'use = ["adapter-1"]',
}


@dataclass
class Phase:
    """What the quiet tenant got while another one sent at a rate."""

    quiet: list[Outcome] = field(default_factory=list)
    noisy: list[Outcome] = field(default_factory=list)

    @property
    def tpot_ms_p95(self) -> float:
        return 1000 * float(np.percentile([one.token_seconds for one in self.quiet], 95))

    @property
    def statuses(self) -> Counter[int | None]:
        return Counter(outcome.status for outcome in self.noisy)


def isolate(folder: Path, rounds: int, seed: int) -> dict[str, object]:
    """Let a tenant send what it may and ten times that in turn; another streams all along.

    Fails if the other's p95 time per token grows by more than 30 %, and if it does not where the
    first has no limit.
    """
    base = find_model(None, cache=cache_folder(os.environ))
    store = AdapterStore(folder / "store")
    add_fleet(store, folder / "made", base, count=2, max_rank=8)
    keys = write_keys(folder / "keys.toml", GRANTS)
    port = free_port()
    command = our_command(store.root, port, ["--keys", str(folder / "keys.toml")])
    with running(command, port, folder / "log") as server:
        return compare(server, keys, rounds=rounds, seconds=PHASE_SECONDS, seed=seed)


def compare(
    server: Server, keys: dict[str, str], *, rounds: int, seconds: float, seed: int
) -> dict[str, object]:
    """Measure phases in turn, and the control once."""
    rate = PER_MINUTE / 60
    chooser = random.Random(seed)

    def phase(tenant: str, per_second: float, seconds: float) -> Phase:
        found = asyncio.run(_phase(server, keys, tenant, per_second, seconds, chooser))
        print(
            f"{tenant} at {per_second:.1f}/s: {found.tpot_ms_p95:.1f} ms, {dict(found.statuses)}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return found

    phase("noisy", 10 * rate, DRAIN_SECONDS)  # takes what its bucket held at first
    at_limit, above = [], []
    for _ in range(rounds):
        at_limit.append(phase("noisy", rate, seconds))
        above.append(phase("noisy", 10 * rate, seconds))
    control = phase("unlimited", 10 * rate, seconds)
    for found in (*at_limit, *above, control):
        assert all(outcome.is_whole for outcome in found.quiet), "the quiet tenant was refused"
        assert set(found.statuses) <= {200, 429}, found.statuses
        assert all(outcome.is_whole for outcome in found.noisy if outcome.status == 200)
        assert all(o.retry_after for o in found.noisy if o.status == 429)
    assert all(found.statuses[429] > 5 * found.statuses[200] for found in above)
    assert all(found.statuses[200] > 0.7 * rate * seconds for found in above)
    assert all(found.statuses[200] > 0.9 * rate * seconds for found in at_limit)
    ratios = [b.tpot_ms_p95 / a.tpot_ms_p95 for a, b in zip(at_limit, above, strict=True)]
    whole = _p95(above) / _p95(at_limit)
    control_ratio = control.tpot_ms_p95 / _p95(at_limit)
    figures: dict[str, object] = {
        "rounds": rounds,
        "limit_per_second": rate,
        "quiet_answers": sum(len(found.quiet) for found in (*at_limit, *above)),
        "tpot_ms_p95_at_limit": spread([found.tpot_ms_p95 for found in at_limit]),
        "tpot_ms_p95_above": spread([found.tpot_ms_p95 for found in above]),
        "ratio": round(whole, 3),
        "ratio_by_round": spread(ratios),
        "ratio_without_limit": round(control_ratio, 3),
        "refused": sum(found.statuses[429] for found in above),
        "failures": 0,
    }
    assert whole <= MAX_RATIO, figures
    assert control_ratio > MAX_RATIO, figures
    return figures


def _p95(phases: Sequence[Phase]) -> float:
    return Phase(quiet=[one for found in phases for one in found.quiet]).tpot_ms_p95


async def _phase(
    server: Server,
    keys: dict[str, str],
    tenant: str,
    per_second: float,
    seconds: float,
    chooser: random.Random,
) -> Phase:
    found = Phase()
    begun = time.monotonic()
    end = begun + SETTLING_SECONDS + seconds
    sending: set[asyncio.Task[None]] = set()

    def prompt() -> list[int]:
        return [chooser.randrange(1000, 40000) for _ in range(PROMPT)]

    async def one(client: httpx.AsyncClient, of: str, model: str, num_tokens: int) -> None:
        headers = {"authorization": f"Bearer {keys[of]}"}
        outcome = await ask(client, model, prompt(), num_tokens, headers=headers)
        if outcome.sent > begun + SETTLING_SECONDS:
            (found.quiet if of == "quiet" else found.noisy).append(outcome)

    async def stream(client: httpx.AsyncClient) -> None:
        while time.monotonic() < end:
            await one(client, "quiet", "adapter-0", QUIET_TOKENS)

    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT, limits=limits()) as client:
        quiet = [asyncio.create_task(stream(client)) for _ in range(NUM_QUIET)]
        due = begun
        while due < end:  # evenly, since whoever is exactly at its limit is
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due += 1 / per_second
            late = time.monotonic() - due
            task = asyncio.create_task(one(client, tenant, "adapter-1", NOISY_TOKENS))
            sending.add(task)
            task.add_done_callback(sending.discard)
        await asyncio.gather(*quiet, *sending)
    assert late < MAX_LATE_SECONDS, f"the client was too slow, by {late:.1f} s at the end"
    return found
