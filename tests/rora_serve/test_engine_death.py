"""A server whose engine is killed says so, ends, and serves every name when started again."""

from pathlib import Path

import httpx
import pytest

from adapters import AdapterStore
from benchmarks.fleet import add_fleet
from tests.rora_serve.engine_death import NUM_CLIENTS, Death, kill_under_traffic
from tests.rora_serve.serving import Server, free_port, our_command, running
from tests.rora_serve.streaming import Outcome

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

NUM_ADAPTERS = 4
NOTICED_SECONDS = 2.0  # until the first is told
EXIT_SECONDS = 10.0


def check(death: Death) -> None:
    """Fail if anybody was told that all is well."""
    told = death.told()
    print(told)
    assert death.code == 1, told
    assert death.exited is not None, told
    assert death.exited < EXIT_SECONDS, told
    assert death.left == [], told
    # Every request that ran was told in an answer: a stream by its last event, all others by 503.
    assert len(death.running) == NUM_CLIENTS, told
    assert {outcome.status for _, outcome in death.running} == {200, 503}, told
    for _, outcome in death.running:
        assert is_answer_of_the_dead(outcome), told
        assert outcome.status != 200 or str(outcome.error).startswith("the stream says"), told
    for _, outcome in death.later:  # after a while nobody listens any more
        assert outcome.status is None or is_answer_of_the_dead(outcome), told
    # Ready before; from the first that was told on, never again.
    noticed = min(at for at, _ in death.running)
    assert noticed < NOTICED_SECONDS, told
    for seen in (death.ready, death.health):
        assert {status for at, status in seen if at < -1} == {200}, told
        after = {status for at, status in seen if at > noticed}
        assert after, told
        assert all(status == 503 or isinstance(status, str) for status in after), told


def is_answer_of_the_dead(outcome: Outcome) -> bool:
    """Tell whether an answer says that the engine died."""
    if outcome.status == 200:
        return outcome.error is not None
    return outcome.status == 503 and outcome.body["error"]["code"] == "engine_died"


def test_a_killed_engine_ends_the_server_and_a_restart_serves_every_name(
    tmp_path: Path, default_model: Path
) -> None:
    store = AdapterStore(tmp_path / "store")
    names = add_fleet(store, tmp_path / "made", default_model, count=NUM_ADAPTERS, max_rank=4)
    port = free_port()
    command = our_command(store.root, port)
    before = None
    for which in ("core", "worker"):  # the second start is the restart of the first
        with running(command, port, tmp_path / f"log-{which}") as server:
            answers = [answer_of(server, name) for name in names]
            assert len(set(answers)) == len(names)
            assert before in (None, answers), "the restarted server answers otherwise"
            before = answers
            check(kill_under_traffic(server, names, which))


def answer_of(server: Server, name: str) -> str:
    body = {"model": name, "prompt": "Hi", "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])
