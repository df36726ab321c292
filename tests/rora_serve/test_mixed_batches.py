"""Random mixes of everything in one real engine: equal to PEFT, and to each request alone."""

import random
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest

from adapters import AdapterStore
from adapters.names import DEFAULT_MODEL_NAME as BASE
from tests.rora_serve.conftest import CHUNK, TOLERANCE, Oracle, Stock
from tests.rora_serve.serving import (
    Continuation,
    Server,
    ask_together,
    free_port,
    our_command,
    running,
)
from tests.workloads import set_alpha

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

NUM_REQUESTS, NUM_ANSWERED = 20, 10
# Several times what one step takes, so that it comes in pieces.
LONGEST_PROMPT = 700
# A step with other rows beside may round otherwise; nearer than this two tokens may change places.
NEAR = 2 * TOLERANCE

Request = tuple[str, tuple[int, ...]]


def random_requests(names: Sequence[str], seed: int) -> list[Request]:
    """Requests to any of the names, with prompts from one token to several steps' worth."""
    chooser = random.Random(seed)
    lengths = [1, 2, 15, 16, 17, 40, LONGEST_PROMPT]
    return [
        (
            chooser.choice([BASE, *names]),
            tuple(chooser.randrange(1000, 40_000) for _ in range(chooser.choice(lengths))),
        )
        for _ in range(NUM_REQUESTS)
    ]


def same_tokens(one: Continuation, other: Continuation) -> bool:
    """Tell whether two greedy answers are the same, up to where two tokens were nearly alike."""
    for step, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)):
        if a != b:
            first, second = sorted(one.top_log_probs[step].values(), reverse=True)[:2]
            return first - second <= NEAR
    return True


def largest_differences(
    oracle: Oracle, requests: Sequence[Request], answers: Sequence[Continuation]
) -> dict[str, float]:
    """Return how far each name's log-probs are from PEFT's."""
    largest = dict.fromkeys((name for name, _ in requests), 0.0)
    for (name, _), found in zip(requests, answers, strict=True):
        largest[name] = max(largest[name], oracle.largest_difference(name, found))
    print("largest difference of log-probs:", largest)
    return largest


def check_mix(server: Server, oracle: Oracle, names: Sequence[str], seed: int) -> None:
    requests = random_requests(names, seed)
    assert len({name for name, _ in requests}) > 4
    mixed = ask_together(server, requests, num_tokens=NUM_ANSWERED)
    assert max(largest_differences(oracle, requests, mixed).values()) <= TOLERANCE
    for request, found in zip(requests, mixed, strict=True):
        (alone,) = ask_together(server, [request], num_tokens=NUM_ANSWERED)
        assert same_tokens(alone, found), request[0]


@pytest.mark.parametrize("seed", range(3))
def test_any_mix_equals_peft_and_each_request_alone(
    server: Server, oracle: Oracle, adapters: dict[str, Path], seed: int
) -> None:
    check_mix(server, oracle, [name for name in adapters if name != "pruned"], seed)


def test_stock_vllm_fails_the_same_mix(
    stock: Stock, oracle: Oracle, adapters: dict[str, Path]
) -> None:
    """The control, and why our layers exist: what it takes it mixes up, and it does not take all.

    Its base is right alone.
    """
    names = [name for name in adapters if name != "pruned"]
    requests = random_requests(names, seed=0)
    base = [(name, prompt) for name, prompt in requests if name == BASE]
    alone = ask_together(stock.server, base, num_tokens=NUM_ANSWERED)
    assert largest_differences(oracle, base, alone)[BASE] <= TOLERANCE
    refused = {name for name in names if not stock.takes(name, adapters[name])}
    print("stock vLLM refuses", sorted(refused))
    requests = [(name, prompt) for name, prompt in requests if name not in refused]
    mixed = ask_together(stock.server, requests, num_tokens=NUM_ANSWERED)
    assert largest_differences(oracle, requests, mixed)[BASE] > 10 * TOLERANCE


def test_a_model_in_transformers_own_code_answers_the_same(
    store: AdapterStore, oracle: Oracle, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """By which vLLM runs SmolLM3, Olmo and others; its layers' rows lie behind a batch axis."""
    port = free_port()
    command = our_command(store.root, port, vllm_options=[*CHUNK, "--model-impl", "transformers"])
    with running(command, port, tmp_path / "log") as server:
        check_mix(server, oracle, [name for name in adapters if name != "pruned"], seed=4)


@pytest.mark.soak
def test_a_compiled_model_answers_the_same_until_its_engine_dies(
    store: AdapterStore, oracle: Oracle, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """vLLM's own server ends with 0 then, so that what restarts it sees nothing wrong."""
    port = free_port()
    command = our_command(store.root, port, ["--compile"], vllm_options=CHUNK)
    with running(command, port, tmp_path / "log") as server:
        check_mix(server, oracle, [name for name in adapters if name != "pruned"], seed=3)
        children = psutil.Process(server.process.pid).children(recursive=True)
        (core,) = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
        core.kill()
        assert server.process.wait(60) == 1
    assert "the engine died" in (tmp_path / "log").read_text()


def test_base_rows_are_those_of_a_base_only_run(server: Server, adapters: dict[str, Path]) -> None:
    requests = random_requests(list(adapters), seed=11)
    prompts = [prompt for name, prompt in requests if name == BASE]
    prompts += [(1000 + number, 2000, 3000) for number in range(4)]
    among = [*requests, *((BASE, prompt) for prompt in prompts[-4:])]
    alone = ask_together(server, [(BASE, p) for p in prompts], num_tokens=NUM_ANSWERED)
    mixed = ask_together(server, among, num_tokens=NUM_ANSWERED)
    found = [answer for (name, _), answer in zip(among, mixed, strict=True) if name == BASE]
    for one, other in zip(alone, found, strict=True):
        assert same_tokens(one, other)
        for a, b in zip(one.top_log_probs[:1], other.top_log_probs[:1], strict=True):
            assert max(abs(a[token] - b[token]) for token in a.keys() & b.keys()) <= TOLERANCE


def test_log_probs_of_a_prompt_are_the_adapters_own(
    server: Server, oracle: Oracle, adapters: dict[str, Path]
) -> None:
    """They are computed from other rows than samples are, which an adapted head must tell apart."""
    assert "ragged-1" in adapters  # which has one
    prompt = tuple(range(1000, 1040))
    names = ["ragged-1", BASE, "lora-8", "ragged-1"]

    def ask(name: str) -> list[dict[int, float] | None]:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            answer = client.completions.create(
                model=name, prompt=list(prompt), max_tokens=1, temperature=0,
                extra_body={"prompt_logprobs": 3},
            )  # fmt: skip
        found = answer.choices[0].model_extra
        assert found is not None
        return [
            None if top is None else {int(t): value["logprob"] for t, value in top.items()}
            for top in found["prompt_logprobs"]
        ]

    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(ask, names))
    for name, tops in zip(names, answers, strict=True):
        assert tops[0] is None
        # As if the prompt had been one token and the rest its continuation.
        told = Continuation(prompt[:1], prompt[1:], tuple(top for top in tops[1:] if top))
        assert len(told.top_log_probs) == len(prompt) - 1
        assert oracle.largest_difference(name, told) <= TOLERANCE, name


@pytest.mark.parametrize("fault", ["truncated", "deleted", "swapped"])
def test_a_file_that_changes_under_traffic_fails_its_own_requests_only(
    server: Server, store: AdapterStore, adapters: dict[str, Path], tmp_path: Path, fault: str
) -> None:
    """What is in memory goes on as it was; what is not is refused by name."""
    held, cold = f"{fault}-held", f"{fault}-cold"
    for number, name in enumerate((held, cold)):
        copy = tmp_path / name
        shutil.copytree(adapters["lora-8"], copy)
        # Weights of its own, whichever fault was tried before.
        set_alpha(copy, 16 + len(fault) / 8 + number)
        store.add(copy, name=name)
    prompt = (1001, 1002, 1003)
    others = [(name, prompt) for name in (BASE, "rora-32", "ragged-0", held)] * 2
    before = ask_together(server, others, num_tokens=NUM_ANSWERED)
    for name in (held, cold):
        path = store.resolve(name).folder / "adapter_model.safetensors"
        if fault == "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        elif fault == "deleted":
            path.unlink()
        else:
            shutil.copy(adapters["lora-8"].with_name("rora-32") / path.name, path)

    def refused(_: int) -> str:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            try:
                client.completions.create(model=cold, prompt="Hi", max_tokens=1)
            except openai.UnprocessableEntityError as error:
                return str(error)
        return "answered"

    with ThreadPoolExecutor(4) as pool:
        refusals = pool.map(refused, range(4))
        during = ask_together(server, others, num_tokens=NUM_ANSWERED)
    for refusal in refusals:
        assert f"{cold}@sha256:" in refusal
        assert str(store.root) not in refusal
    for one, other in zip(before, during, strict=True):
        assert same_tokens(one, other)
    store.remove(held, force=True)
    store.remove(cold, force=True)
