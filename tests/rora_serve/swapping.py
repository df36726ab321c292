"""One name whose meaning is moved to and fro under traffic: whose tokens does each answer have?"""

import asyncio
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from adapters import AdapterConfig, AdapterStore, ResolvedVersion
from adapters.base_model import cache_folder, find_model
from benchmarks.load import prompts
from tests.conftest import LINEAR
from tests.reference import ATOL
from tests.rora_serve.serving import (
    Server,
    ask_together,
    free_port,
    metric_total,
    our_command,
    running,
)
from tests.rora_serve.streaming import TIMEOUT, Outcome, ask, limits
from tests.workloads import make_random_adapter

NAME = "moving"
NUM_SHARED, NUM_OWN = 304, 8  # tokens of every prompt: the same in all, and each one's own
NUM_TOKENS = 8
NUM_CLIENTS = 32
NUM_CANDIDATES, NUM_PROMPTS = 24, 4
MOVES_PER_ROLLBACK = 4
MIN_HIT_RATE = 0.3  # of the prefix cache: without it there would be nothing that could be stale
# A slow machine takes longer, and shows as much as a fast one.
ANSWERS_PER_MOVE = 2
# The second most likely token must be this far behind, in log-probs, all along: engines in
# float32 differ by a tenth of it at most.
MIN_MARGIN = 10 * ATOL["served-log-probs-float32"]

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """Two versions of a name, and what each answers alone.

    Args:
        versions: by their public ids.
        digests: what aliases are moved to, in the same order.
        answers: the tokens after each prompt, by public id.
    """

    versions: tuple[str, str]
    digests: tuple[str, str]
    answers: dict[str, dict[Tokens, Tokens]]

    @property
    def prompts(self) -> list[Tokens]:
        return list(self.answers[self.versions[0]])


@dataclass(frozen=True)
class Move:
    """An alias was moved to a version some time between `sent` and `answered`."""

    version: str
    sent: float
    answered: float


@dataclass
class Swaps:
    """What was moved and asked, rolled back moves among the moves.

    Args: prefix_cache: tokens that were looked up in the prefix cache meanwhile, and found.
    """

    moves: list[Move] = field(default_factory=list)
    asked: list[tuple[Tokens, Outcome]] = field(default_factory=list)
    prefix_cache: tuple[float, float] = (0.0, 0.0)

    @property
    def hit_rate(self) -> float:
        looked_up, found = self.prefix_cache
        return round(found / looked_up, 3)


@dataclass(frozen=True)
class Verdict:
    """Counts of answers.

    Args:
        failed: why what is no whole answer is none.
        mixed: tokens that are not those of the version that the answer names.
        stale: a version that the name could not mean at any time between question and answer.
        strict: one version alone was right, since no move overlapped.
        by_version: answers that are right.
        overlapped: answers during which the name was moved, after they had begun.
    """

    failed: tuple[str, ...]
    mixed: int
    stale: int
    strict: int
    overlapped: int
    by_version: dict[str, int]


def make_versions(folder: Path, base: Path) -> list[Path]:
    """Write two adapters of one shape that answer differently."""
    config = AdapterConfig(8, 16, target_modules=LINEAR)
    return [
        make_random_adapter(folder / f"v{seed}", base, config=config, modules=LINEAR, seed=seed)
        for seed in (101, 102)
    ]


def candidates(count: int) -> list[Tokens]:
    """Return prompts that share most of their tokens, more than a block of the prefix cache."""
    (shared,) = prompts(1, 1, NUM_SHARED)
    return [tuple(shared + own) for own in prompts(2, count, NUM_OWN)]


def clear_answers(
    server: Server, models: Sequence[str], *, of: int = NUM_CANDIDATES, wanted: int = NUM_PROMPTS
) -> dict[str, dict[Tokens, Tokens]]:
    """Return what each model answers alone, where no token is a near-tie and the first differ.

    Args: of, wanted: prompts that are tried, and that are returned.

    Raises: RuntimeError: there are too few such prompts.
    """
    alone: dict[str, dict[Tokens, Tokens]] = {model: {} for model in models}
    asked = candidates(of)
    for model in models:
        for start in range(0, len(asked), 8):
            requests = [(model, prompt) for prompt in asked[start : start + 8]]
            for found in ask_together(server, requests, num_tokens=NUM_TOKENS):
                tops = [sorted(top.values(), reverse=True) for top in found.top_log_probs]
                if min(first - second for first, second, *_ in tops) > MIN_MARGIN:
                    alone[model][found.prompt] = found.tokens
    common = set.intersection(*(set(answers) for answers in alone.values()))
    clear = [
        prompt
        for prompt in asked
        if prompt in common and len({alone[model][prompt][0] for model in models}) == len(models)
    ]
    if len(clear) < wanted:
        raise RuntimeError(f"{len(clear)} prompts tell the versions apart, {wanted} needed")
    return {m: {prompt: alone[m][prompt] for prompt in clear[:wanted]} for m in models}


def make_subject(server: Server, versions: Sequence[ResolvedVersion]) -> Subject:
    """Ask both versions alone, each by its digest."""
    digests = [f"sha256:{resolved.version.digest}" for resolved in versions]
    by_digest = clear_answers(server, [f"{NAME}@{digest}" for digest in digests])
    ids = [resolved.public_id for resolved in versions]
    answers = dict(zip(ids, by_digest.values(), strict=True))
    return Subject((ids[0], ids[1]), (digests[0], digests[1]), answers)


def swap_under_traffic(server: Server, subject: Subject, *, num_moves: int, seed: int) -> Swaps:
    """Move `latest` of the name `num_moves` times under traffic, and roll it back after every four.

    As often as some answers take, by the time of those before the first move.
    """
    return asyncio.run(_run(server, subject, num_moves, random.Random(seed)))


async def _run(server: Server, subject: Subject, num_moves: int, chooser: random.Random) -> Swaps:
    found = Swaps()
    is_over = False

    async def ask_one(client: httpx.AsyncClient) -> tuple[Tokens, Outcome]:
        prompt = chooser.choice(subject.prompts)
        model = chooser.choice((NAME, f"{NAME}@latest"))
        return prompt, await ask(client, model, prompt, NUM_TOKENS)

    async def client_loop(client: httpx.AsyncClient) -> None:
        while not is_over:
            found.asked.append(await ask_one(client))

    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT, limits=limits()) as client:
        now = 0
        found.moves.append(await _move(client, subject, now))
        for _ in range(2):  # the first time the prompts are new
            begin = time.monotonic()
            early = await asyncio.gather(*(ask_one(client) for _ in range(NUM_CLIENTS)))
            assert all(outcome.is_whole for _, outcome in early), early
        pause = (time.monotonic() - begin) / NUM_CLIENTS * ANSWERS_PER_MOVE
        before = await _prefix_cache(client)
        clients = [asyncio.create_task(client_loop(client)) for _ in range(NUM_CLIENTS)]
        for number in range(1, num_moves + 1):
            for by_rollback in (False, True) if number % MOVES_PER_ROLLBACK == 0 else (False,):
                await asyncio.sleep(pause * chooser.uniform(0.5, 1.5))
                now = 1 - now
                found.moves.append(await _move(client, subject, now, by_rollback=by_rollback))
        is_over = True
        await asyncio.gather(*clients)
        after = await _prefix_cache(client)
    found.prefix_cache = (after[0] - before[0], after[1] - before[1])
    return found


async def _prefix_cache(client: httpx.AsyncClient) -> tuple[float, float]:
    """Return tokens that were looked up in the prefix cache so far, and found."""
    page = (await client.get("/metrics")).text
    looked_up, hits = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
    return metric_total(page, looked_up), metric_total(page, hits)


async def _move(
    client: httpx.AsyncClient, subject: Subject, to: int, *, by_rollback: bool = False
) -> Move:
    sent = time.monotonic()
    if by_rollback:  # what it meant before is the other one, since every move is to the other
        response = await client.post(f"/v1/adapters/{NAME}/rollback")
    else:
        response = await client.put(
            f"/v1/adapters/{NAME}/aliases/latest", json={"version": subject.digests[to]}
        )
    assert response.status_code == 200, response.text
    assert response.json()["aliases"]["latest"] == subject.digests[to]
    return Move(subject.versions[to], sent, time.monotonic())


def judge(subject: Subject, swaps: Swaps) -> Verdict:
    """Compare each answer with the version that it names, and that with the moves."""
    failed: list[str] = []
    mixed = stale = strict = overlapped = 0
    by_version = dict.fromkeys(subject.versions, 0)
    for prompt, outcome in swaps.asked:
        if not outcome.is_whole or outcome.version not in by_version:
            failed.append(f"{outcome.status} {outcome.error} {outcome.version} {outcome.body}")
            continue
        possible = possible_versions(swaps.moves, outcome.sent, outcome.begun)
        strict += len(possible) == 1
        overlapped += any(outcome.begun < m.sent < outcome.ended for m in swaps.moves)
        if tuple(outcome.tokens) != subject.answers[outcome.version][prompt]:
            mixed += 1
        elif outcome.version not in possible:
            stale += 1
        else:
            by_version[outcome.version] += 1
    return Verdict(tuple(failed), mixed, stale, strict, overlapped, by_version)


def possible_versions(moves: Sequence[Move], sent: float, begun: float) -> set[str]:
    """Return what a name may mean to a request that was resolved between `sent` and `begun`."""
    before = [move for move in moves if move.answered <= sent]
    during = [move for move in moves if move.answered > sent and move.sent < begun]
    return {move.version for move in (*before[-1:], *during)}


def swap(folder: Path, count: int, seed: int) -> dict[str, object]:
    """Flip a name `count` times under traffic. Fails on one wrong answer."""
    base = find_model(None, cache=cache_folder(os.environ))
    store = AdapterStore(folder / "store")
    versions = [store.add(path, name=NAME) for path in make_versions(folder, base)]
    port = free_port()
    with running(our_command(store.root, port), port, folder / "log") as server:
        subject = make_subject(server, versions)
        swaps = swap_under_traffic(server, subject, num_moves=count, seed=seed)
    verdict = judge(subject, swaps)
    check(swaps, verdict, num_moves=count)
    return {
        "moves": count,
        "rollbacks": len(swaps.moves) - 1 - count,
        "answers": len(swaps.asked),
        "failures": len(verdict.failed),
        "mixed": verdict.mixed,
        "stale": verdict.stale,
        "strict": verdict.strict,
        "moved_while_streaming": verdict.overlapped,
        "by_version": list(verdict.by_version.values()),
        "prefix_cache_hit_rate": swaps.hit_rate,
    }


def check(swaps: Swaps, verdict: Verdict, *, num_moves: int) -> None:
    """Fail on a wrong answer, and if the traffic could not have shown one."""
    assert (verdict.failed, verdict.mixed, verdict.stale) == ((), 0, 0), verdict
    assert min(verdict.by_version.values()) >= num_moves // 2, verdict
    assert verdict.strict >= num_moves // 2, verdict
    assert verdict.overlapped >= num_moves // 2, verdict
    assert swaps.hit_rate > MIN_HIT_RATE, swaps.prefix_cache
