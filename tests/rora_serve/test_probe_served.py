"""A real engine is asked each version's probe, and what answers otherwise is quarantined."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from adapters import AdapterStore, ResolvedVersion
from adapters.cli import main
from adapters.digest import read_provenance
from adapters.names import DEFAULT_MODEL_NAME as BASE
from adapters.probe import read_probe
from adapters.tolerance import TOLERANCES
from tests.rora_serve.conftest import NUM_TOKENS, TOLERANCE, Oracle
from tests.rora_serve.serving import Server, ask_together
from tests.workloads import set_alpha

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

Add = Callable[[str, Path], ResolvedVersion]


@pytest.fixture
def add(store: AdapterStore) -> Iterator[Add]:
    """Adds an adapter to the server's store for the time of a test."""
    names = []

    def add_under(name: str, folder: Path) -> ResolvedVersion:
        names.append(name)
        return store.add(folder, name=name)

    yield add_under
    for name in names:
        store.remove(name, force=True)


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, model: str) -> str:
    return client.completions.create(model=model, prompt="Hi", max_tokens=1).choices[0].text


def refusal(client: openai.OpenAI, model: str) -> Any:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        ask(client, model)
    return caught.value.body


def cli(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def with_probe_of(weights: Path, probed: Path, folder: Path) -> Path:
    """Write the weights of one adapter with the rora.json of another."""
    shutil.copytree(weights, folder)
    shutil.copy(probed / "rora.json", folder / "rora.json")
    return folder


def test_a_trained_adapter_passes_its_probe(
    client: openai.OpenAI, store: AdapterStore, adapters: dict[str, Path]
) -> None:
    ask(client, "allocated")
    verdicts = store.probe_record(store.resolve("allocated").version.digest).verdicts
    assert verdicts
    for build, verdict in verdicts.items():  # a compiled server may have asked it too
        print("differences of a probe:", build, verdict.base, verdict.adapter)
        assert verdict.passed
        assert verdict.tolerance == TOLERANCES["float32"]
        assert "cpu, float32" in build
        assert all(len(one.adapter) == 8 for one in verdict.seen)
    probe = read_probe(adapters["allocated"])
    assert probe is not None
    # The control: it would not pass as the base model, by far.
    (first, *_) = probe.prompts
    base = dict(zip(first.base.token_ids, first.base.log_probs, strict=True))
    effects = [
        abs(value - base.get(token, min(base.values())))
        for token, value in zip(first.adapter.token_ids, first.adapter.log_probs, strict=True)
    ]
    assert max(effects) > 100 * TOLERANCES["float32"].largest


def test_an_adapter_without_a_probe_is_served(client: openai.OpenAI, store: AdapterStore) -> None:
    ask(client, "lora-8")
    assert store.probe_record(store.resolve("lora-8").version.digest).verdicts == {}


def test_swapped_weights_are_quarantined_until_that_is_lifted(
    client: openai.OpenAI,
    store: AdapterStore,
    adapters: dict[str, Path],
    add: Add,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = with_probe_of(adapters["lora-8"], adapters["allocated"], tmp_path / "swapped")
    version = add("swapped", folder)
    for _ in range(2):
        error = refusal(client, "swapped")
        assert error["code"] == "adapter_quarantined"
        assert version.public_id in error["message"]
        assert "the base model answers as in training, the adapter's log-probs" in error["message"]
        assert str(store.root) not in error["message"]
    # The very weights, without that probe, and the base model are served beside it.
    ask(client, "lora-8")
    ask(client, BASE)
    where = ["swapped", "--store", str(store.root)]
    assert "quarantined" in cli(["store", "show", *where], capsys)
    cli(["store", "lift", *where], capsys)
    raw = client.completions.with_raw_response.create(model="swapped", prompt="Hi", max_tokens=1)
    assert raw.headers["x-rora-adapter"] == version.public_id


def test_another_scaling_than_the_trained_one_is_quarantined(
    client: openai.OpenAI, adapters: dict[str, Path], add: Add, tmp_path: Path
) -> None:
    folder = tmp_path / "scaled"
    shutil.copytree(adapters["allocated"], folder)
    set_alpha(folder, 11)
    add("scaled", folder)
    assert refusal(client, "scaled")["code"] == "adapter_quarantined"


def test_a_probe_that_can_not_be_asked_is_refused_and_harms_nobody(
    client: openai.OpenAI, adapters: dict[str, Path], add: Add, tmp_path: Path
) -> None:
    folder = with_probe_of(adapters["lora-8"], adapters["allocated"], tmp_path / "strange")
    content = read_provenance(folder)
    content["probe"]["prompts"][0]["token_ids"] = [1, 49152]
    (folder / "rora.json").write_text(json.dumps(content))
    add("strange", folder)
    error = refusal(client, "strange")
    assert error["code"] == "adapter_not_servable"
    assert "its probe can not be asked here" in error["message"]
    ask(client, BASE)


def test_a_probe_leaves_the_log_probs_of_others_in_its_steps_alone(
    server: Server,
    oracle: Oracle,
    adapters: dict[str, Path],
    prompts: list[tuple[int, ...]],
    add: Add,
    tmp_path: Path,
) -> None:
    """Versions of the same weights, each of which has its own probe to be asked."""
    names = []
    for number in range(3):
        folder = tmp_path / f"fresh-{number}"
        shutil.copytree(adapters["allocated"], folder)
        content = read_provenance(folder)
        probe = content["probe"]["prompts"]
        content["probe"]["prompts"] = probe[number:] + probe[:number]
        content["probe"]["prompts"].pop()
        (folder / "rora.json").write_text(json.dumps(content))
        add(f"fresh-{number}", folder)
        names.append(f"fresh-{number}")
    requests = [(name, prompt) for prompt in prompts for name in (BASE, "lora-8", *names)]
    found = ask_together(server, requests, num_tokens=NUM_TOKENS)
    for (name, _), continuation in zip(requests, found, strict=True):
        weights = "allocated" if name in names else name
        assert oracle.largest_difference(weights, continuation) <= TOLERANCE
