"""A name that moves under traffic is never stale nor mixed; stock vLLM, reloaded, is both."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from adapters import AdapterStore, ResolvedVersion
from tests.rora_serve.conftest import Stock
from tests.rora_serve.serving import Server, ask_together
from tests.rora_serve.swapping import (
    NAME,
    NUM_TOKENS,
    Move,
    Tokens,
    check,
    clear_answers,
    judge,
    make_subject,
    make_versions,
    possible_versions,
    swap_under_traffic,
)

NUM_MOVES = 30


@pytest.fixture
def versions(
    store: AdapterStore, default_model: Path, tmp_path: Path
) -> Iterator[list[ResolvedVersion]]:
    yield [store.add(path, name=NAME) for path in make_versions(tmp_path, default_model)]
    store.remove(NAME, force=True)


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_every_answer_under_moves_is_whole_of_its_version_and_of_a_right_one(
    server: Server, versions: list[ResolvedVersion]
) -> None:
    subject = make_subject(server, versions)
    swaps = swap_under_traffic(server, subject, num_moves=NUM_MOVES, seed=0)
    verdict = judge(subject, swaps)
    print(len(swaps.asked), "answers:", verdict)
    check(swaps, verdict, num_moves=NUM_MOVES)


@pytest.mark.engine
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_stock_vllm_is_stale_when_files_change_and_mixed_when_it_reloads_them(
    stock: Stock,
) -> None:
    """The control: one name and one path, as vLLM's own routes have it."""
    # Stock vLLM takes a second for each of these prompts.
    alone = clear_answers(stock.server, [stock.moving, stock.moved_to], of=8, wanted=1)
    old, new = alone.values()
    assert answers(stock.server, stock.moving, list(old)) == old
    for path in stock.folder_of(stock.moved_to).iterdir():
        shutil.copy(path, stock.folder_of(stock.moving) / path.name)
    assert answers(stock.server, stock.moving, list(old)) == old, "files changed: it did not notice"
    name = {"lora_name": stock.moving}
    whole = name | {"lora_path": str(stock.folder_of(stock.moving))}
    for route, body in (("unload", name), ("load", whole)):
        answer = httpx.post(f"{stock.server.url}/v1/{route}_lora_adapter", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
    found = answers(stock.server, stock.moving, list(old))
    wrong = [prompt for prompt in old if found[prompt] != new[prompt]]
    print("stock vLLM, reloaded:", len(wrong), "of", len(old), "answers are not the new version's")
    assert wrong, "new weights on the old prefix: not one answer differs"


def answers(server: Server, model: str, prompts: list[Tokens]) -> dict[Tokens, Tokens]:
    found = ask_together(server, [(model, prompt) for prompt in prompts], num_tokens=NUM_TOKENS)
    return {continuation.prompt: continuation.tokens for continuation in found}


@pytest.mark.parametrize(
    ("sent", "begun", "expected"),
    [
        (1.5, 1.9, {"a"}),
        (2.2, 2.3, {"a", "b"}),
        (1.5, 2.1, {"a", "b"}),
        (2.6, 2.9, {"b"}),
        (2.6, 4.5, {"b", "a"}),
        (2.4, 4.5, {"a", "b"}),
    ],
)
def test_what_a_name_may_mean_follows_from_the_moves_around_a_question(
    sent: float, begun: float, expected: set[str]
) -> None:
    moves = [Move("a", 0.0, 1.0), Move("b", 2.0, 2.5), Move("a", 4.0, 4.4)]
    assert possible_versions(moves, sent, begun) == expected
