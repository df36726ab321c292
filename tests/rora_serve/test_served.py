"""What a real engine serves equals what PEFT computes."""

import http.client
import json
import shutil
import signal
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest

from adapters import AdapterConfig, AdapterStore, open_artifact, validate
from adapters.digest import read_provenance
from adapters.limits import MAX_DELTA_BOUND
from adapters.names import DEFAULT_MODEL_NAME as BASE
from tests.conftest import LINEAR
from tests.reference import ATOL
from tests.rora_serve.conftest import (
    CONFIGS,
    NUM_TOKENS,
    RANK_BEFORE_ALLOCATION,
    TOLERANCE,
    Gated,
    Oracle,
)
from tests.rora_serve.serving import (
    START_SECONDS,
    Server,
    ask_together,
    free_port,
    our_command,
    running,
)
from tests.workloads import make_random_adapter

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def differences(
    server: Server, oracle: Oracle, names: list[str], prompts: list[tuple[int, ...]]
) -> dict[str, float]:
    """Ask every name with every prompt in one batch; return the largest difference of each name."""
    requests = [(name, prompt) for prompt in prompts for name in names]
    found = ask_together(server, requests, num_tokens=NUM_TOKENS)
    largest = dict.fromkeys(names, 0.0)
    for (name, _), continuation in zip(requests, found, strict=True):
        assert len(continuation.tokens) == NUM_TOKENS
        assert all(len(top) >= 5 for top in continuation.top_log_probs)
        difference = oracle.largest_difference(name, continuation)
        largest[name] = max(largest[name], difference)
    return largest


@pytest.mark.parametrize(
    "names",
    [
        ["lora-8"],
        ["rora-32"],
        ["allocated"],
        ["lora-8", "rora-32"],
        [BASE, "lora-8", "rora-32", "allocated"],
        [BASE],
    ],
    ids=" + ".join,
)
def test_served_log_probs_equal_those_of_peft(
    server: Server,
    oracle: Oracle,
    names: list[str],
    prompts: list[tuple[int, ...]],
    record_property: Any,
) -> None:
    found = differences(server, oracle, names, prompts)
    record_property("largest_difference", found)
    print("largest difference of log-probs:", found)
    assert max(found.values()) <= TOLERANCE


def test_the_adapters_differ_from_the_base_and_from_each_other(
    server: Server, prompts: list[tuple[int, ...]]
) -> None:
    """The control of the test above: an adapter that did not apply would answer as the base."""
    names = [BASE, "allocated", *CONFIGS]
    found = ask_together(server, [(name, prompts[0]) for name in names], num_tokens=8)
    assert len({continuation.tokens for continuation in found}) == len(names)


def test_a_pruned_adapter_is_served_as_the_gated_model(
    server: Server, gated: Gated, adapters: dict[str, Path], prompts: list[tuple[int, ...]]
) -> None:
    ranks = {module.rank for module in open_artifact(adapters["pruned"]).modules.values()}
    assert len(ranks) > 5
    assert len(open_artifact(adapters["pruned"]).modules) < len(LINEAR) * 30
    found = ask_together(server, [("pruned", prompt) for prompt in prompts], num_tokens=NUM_TOKENS)
    difference = max(map(gated.largest_difference, found))
    print("largest difference of log-probs from the gated model:", difference)
    assert difference <= ATOL["logits-float32"]


def test_an_allocated_adapter_has_ranks_from_none_to_three_times_the_first(
    adapters: dict[str, Path], store: AdapterStore
) -> None:
    """What the tests of log-probs have as `allocated`: trained, validated, stored and served."""
    folder = adapters["allocated"]
    assert not validate(folder).problems
    ranks = [module.rank for module in open_artifact(folder).modules.values()]
    history = read_provenance(folder)["allocation"]
    assert len(ranks) == sum(rank > 0 for rank in history["rounds"][-1]["ranks"])
    assert len(ranks) < len(history["modules"])
    assert max(ranks) >= 3 * RANK_BEFORE_ALLOCATION
    assert sum(ranks) == RANK_BEFORE_ALLOCATION * len(history["modules"])
    assert store.record("allocated").versions


def test_a_new_version_under_an_old_name_is_never_answered_from_the_old_cache(
    server: Server,
    oracle: Oracle,
    store: AdapterStore,
    adapters: dict[str, Path],
    prompts: list[tuple[int, ...]],
) -> None:
    store.add(adapters["lora-8"], name="moving")
    for weights in ("lora-8", "rora-32", "lora-8"):
        store.add(adapters[weights], name="moving")
        (found,) = ask_together(server, [("moving", prompts[2])], num_tokens=NUM_TOKENS)
        assert oracle.largest_difference(weights, found) <= TOLERANCE


def test_the_largest_numbers_that_are_stored_leave_the_base_as_it_was(
    server: Server,
    oracle: Oracle,
    store: AdapterStore,
    default_model: Path,
    prompts: list[tuple[int, ...]],
    tmp_path: Path,
) -> None:
    """Not-a-number would stay in the blocks of the cache that the next requests get."""
    extreme = make_random_adapter(
        tmp_path / "extreme",
        default_model,
        config=AdapterConfig(8, 8e5, target_modules=LINEAR),
        modules=LINEAR,
        seed=9,
    )
    bounds = [
        module.scaling * float(np.linalg.norm(lora_a)) * float(np.linalg.norm(lora_b))
        for module, lora_a, lora_b in open_artifact(extreme).read_tensors()
    ]
    assert 0.5 * MAX_DELTA_BOUND < max(bounds) <= MAX_DELTA_BOUND
    store.add(extreme, name="extreme")
    for _ in range(3):
        requests = [(name, prompt) for prompt in prompts for name in (BASE, "extreme")]
        for (name, _), found in zip(
            requests, ask_together(server, requests, num_tokens=NUM_TOKENS), strict=True
        ):
            if name == BASE:
                assert oracle.largest_difference(BASE, found) <= TOLERANCE


def test_an_adapter_that_does_not_fit_fails_its_own_requests_only(
    server: Server, store: AdapterStore, tiny_model: Path, tmp_path: Path
) -> None:
    folder = make_random_adapter(
        tmp_path / "tiny", tiny_model, config=CONFIGS["lora-8"], modules=LINEAR, seed=0
    )
    store.add(folder, name="misfit")
    broken = store.add(_edited(folder, tmp_path / "cut"), name="cut")
    path = broken.folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        for name, reason in (("misfit", "does not fit the base model"), ("cut", "the file has")):
            with pytest.raises(openai.UnprocessableEntityError, match=reason) as caught:
                client.completions.create(model=name, prompt="Hi", max_tokens=1)
            assert str(store.root) not in str(caught.value)
        assert client.completions.create(model=BASE, prompt="Hi", max_tokens=1).choices


def test_what_is_preloaded_is_in_memory_when_the_server_is_ready(server: Server) -> None:
    """Both that brought a probe and those that did not."""
    with httpx.Client(base_url=server.url, timeout=120) as client:
        while client.get("/ready").status_code == 503:
            time.sleep(0.2)
        assert client.get("/ready").status_code == 200
        (pinned,) = client.get("/v1/adapters/pruned").json()["versions"]
        assert (pinned["tier"], pinned["is_pinned"]) == ("slot", True)
        for name in ("allocated", "rora-32"):
            (version,) = client.get(f"/v1/adapters/{name}").json()["versions"]
            assert (version["tier"] != "store", version["is_pinned"]) == (True, False)
    log = server.log.read_text(errors="replace")
    assert "rora-serve: ready; adapters in memory: 3, of which pinned: 1" in log


def _edited(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy)
    config = copy / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 15'))
    return copy


def test_adapters_are_managed_while_they_are_served(
    server: Server, adapters: dict[str, Path], prompts: list[tuple[int, ...]], oracle: Oracle
) -> None:
    files = {
        name: (adapters["rora-32"] / name).read_bytes()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    with httpx.Client(base_url=server.url, timeout=120) as client:
        answer = client.post(
            "/v1/adapters", data={"name": "sent", "alias": "latest"}, files=_parts(files)
        )
        assert answer.status_code == 201, answer.text
        first = client.get("/v1/adapters/sent").json()
        assert first["aliases"]["latest"] == first["versions"][0]["version"]
        assert first["versions"][0]["quarantine"] is None
        (found,) = ask_together(server, [("sent", prompts[0])], num_tokens=NUM_TOKENS)
        assert oracle.largest_difference("rora-32", found) <= TOLERANCE
        assert client.put("/v1/adapters/sent/pin").status_code == 200
        assert client.delete("/v1/adapters/sent/pin").status_code == 200
        assert client.post("/v1/adapters/sent/unload").status_code == 200
        assert client.get("/v1/adapters/sent").json()["versions"][0]["tier"] in ("host", "store")
        page = client.get("/metrics").text
        assert 'rora_generated_tokens_total{adapter="sent"} 32.0' in page
        assert "vllm:lora_requests_info{" not in page
        assert client.delete("/v1/adapters/sent").status_code == 200
        body = {"model": "sent", "prompt": "Hi", "max_tokens": 1}
        assert client.post("/v1/completions", json=body).status_code == 404


def _parts(files: dict[str, bytes]) -> dict[str, tuple[str, bytes]]:
    return {name: (name, content) for name, content in files.items()}


def test_an_idle_connection_outlives_those_of_clients(server: Server) -> None:
    """A request on one that the server is closing fails; 5 s, as vLLM has it, is what httpx has."""
    with closing(http.client.HTTPConnection(server.url.removeprefix("http://"))) as connection:
        for pause in (0, 6):
            time.sleep(pause)
            connection.request("GET", "/health")
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200
            assert connection.sock is not None, "the server said that it would close"


def test_the_engine_normalizes_by_compiled_kernels(server: Server) -> None:
    """What vLLM says of its own lists is all that shows which code it runs."""
    log = server.log.read_text(errors="replace")
    norms = "['vllm_cpu', 'native']"
    assert f"rms_norm={norms}, fused_add_rms_norm={norms}" in log


def test_steps_of_decoding_are_replayed(server: Server) -> None:
    """Else they take a tenth longer, and nothing shows it; answers are compared in all tests."""
    log = server.log.read_text(errors="replace")
    assert "decoding by whole steps\n" in log


def test_a_signal_during_the_start_ends_it_at_once(store: AdapterStore, tmp_path: Path) -> None:
    """Whatever the processes are doing by then; none of them is left."""
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            our_command(store.root, free_port()), stdout=output, stderr=subprocess.STDOUT
        )
    while b"Starting to load model" not in log.read_bytes():
        assert process.poll() is None
        time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(10) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def test_a_server_that_is_killed_leaves_no_process(store: AdapterStore, tmp_path: Path) -> None:
    port = free_port()
    with running(our_command(store.root, port), port, tmp_path / "log") as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        server.process.kill()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert alive == []


def test_a_server_without_our_layers_never_starts(store: AdapterStore) -> None:
    """vLLM told to leave our plug-in out would serve with its own layers."""
    command = our_command(store.root, free_port())
    result = subprocess.run(
        ["env", "VLLM_PLUGINS=none", *command],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "rora-serve's platform is expected" in result.stderr.splitlines()[-1]


def test_a_start_that_can_not_have_what_it_names_fails(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    """With a line that says which adapter and why, the last of ours."""
    foreign = tmp_path / "foreign"
    shutil.copytree(adapters["rora-32"], foreign)
    claim = {"name": "another", "fingerprint": "0"}
    (foreign / "rora.json").write_text(json.dumps({"format": 1, "base_model": claim}))
    store = AdapterStore(tmp_path / "store")
    store.add(adapters["lora-8"], name="good")
    version = store.add(foreign, name="foreign")
    result = subprocess.run(
        our_command(store.root, free_port(), ["--preload", "good", "--pin", "foreign"]),
        capture_output=True, text=True, timeout=START_SECONDS, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    *_, last = (line for line in result.stderr.splitlines() if line.startswith("rora-serve: "))
    assert last.startswith("rora-serve: --preload and --pin: 1 of 2 adapters can not be served: ")
    assert f"{version.public_id}: it was trained on 'another'" in last
