"""What vLLM is told, on CPUs and on GPUs, where our layers step aside."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from adapters import AdapterConfig, AdapterStore
from adapters.errors import ConfigError
from rora_serve import vllm_options
from rora_serve.config import ServeConfig
from tests.conftest import LINEAR
from tests.workloads import make_random_adapter


@pytest.fixture
def store(tmp_path: Path, tiny_model: Path) -> AdapterStore:
    store = AdapterStore(tmp_path / "store")
    for rank in (3, 20):
        folder = make_random_adapter(
            tmp_path / f"rank-{rank}",
            tiny_model,
            config=AdapterConfig(rank, 8, target_modules=LINEAR),
            modules=LINEAR,
            seed=rank,
        )
        store.add(folder, name=folder.name)
    return store


def options(store: AdapterStore, model: Path, **settings: Any) -> dict[str, str | None]:
    config = ServeConfig(store=store.root, **settings)
    given = vllm_options.engine_options(config, model, "base", [])
    flags = [part for part in given if part.startswith("--")]
    return {
        flag: None if index + 1 == len(given) or given[index + 1] in flags else given[index + 1]
        for index, flag in ((given.index(flag), flag) for flag in flags)
    }


@pytest.mark.parametrize("given", [["--dtype", "float32"], ["--dtype=float32"], []])
def test_on_cpus_the_cache_takes_what_the_served_dtype_leaves(
    store: AdapterStore, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    asked = []

    def free_memory(model: Path, *, dtype: str | None = None) -> int:
        asked.append((model, dtype))
        return 400_000

    monkeypatch.setattr(vllm_options, "free_memory", free_memory)
    more = [*given, "--max-model-len", "64", "--seed=-1"]
    config = ServeConfig(store=store.root)
    told = vllm_options.engine_options(config, tiny_model, "base", more)
    assert asked == [(tiny_model, "float32" if given else None)]
    assert told[told.index("--kv-cache-memory-bytes") + 1] == "100000"
    assert ("--dtype" in told) is not bool(given), "the user's own comes after ours"
    vllm_options.engine_options(config, tiny_model, "base", ["--dtype"])  # vLLM refuses it


@pytest.mark.parametrize("is_compiled", [False, True])
def test_on_cpus_slots_and_ranks_are_nobodys_business(
    store: AdapterStore, tiny_model: Path, is_compiled: bool
) -> None:
    told = options(store, tiny_model, max_num_seqs=32, compile=is_compiled)
    assert told["--max-loras"] == told["--max-num-seqs"] == "32"
    assert told["--max-lora-rank"] == "512"
    assert ("--enforce-eager" in told) is not is_compiled
    assert told["--max-model-len"] == "auto"


def test_on_gpus_limits_come_from_the_store_and_padding_is_told(
    store: AdapterStore,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(vllm_options, "is_cpu_build", lambda: False)
    told = options(store, tiny_model, max_num_seqs=32)
    assert (told["--max-loras"], told["--max-lora-rank"]) == ("2", "32")
    assert "--enforce-eager" not in told
    assert "--dtype" not in told
    # Into and out of the linear layers of two layers, and of the head, in two bytes a number.
    features = 2 * (2 * 96 + 2 * 72 + 3 * 128) + 48 + 49_152
    padded = 2 * 32 * features * 2
    said = capsys.readouterr().err
    assert "2 adapters take 0 MiB at their own ranks" in said
    assert f"pad 2 slots to rank 32, {padded >> 20} MiB" in said
    empty = AdapterStore(store.root / "empty")
    told = options(empty, tiny_model)
    assert (told["--max-loras"], told["--max-lora-rank"]) == ("1", "16"), "for what is uploaded"


def test_on_gpus_every_version_counts_that_an_alias_means(
    store: AdapterStore, tmp_path: Path
) -> None:
    config = ServeConfig(store=store.root)
    first = store.resolve("rank-20")
    store.add(tmp_path / "rank-3", name="rank-20")
    assert vllm_options.padded_slots(config, store).rank == 16
    store.set_alias(first.public_id, "stable")
    assert vllm_options.padded_slots(config, store).rank == 32


def test_a_rank_that_vllm_does_not_take_is_refused_at_the_start(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_options, "MAX_LORA_RANK", 16)
    with pytest.raises(ConfigError, match="an adapter has rank 20, 16 is served at most"):
        vllm_options.padded_slots(ServeConfig(store=store.root), store)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (["--max-loras", "3"], "max-loras"),
        (["--lora-mod", "x=/nowhere"], "lora-modules"),  # argparse takes abbreviations
        (["--no-enable-lora"], "enable-lora"),
        (["--api-key", "secret"], "api-key"),
    ],
)
def test_what_we_set_ourselves_is_refused(
    store: AdapterStore, tiny_model: Path, given: list[str], name: str
) -> None:
    config = ServeConfig(store=store.root)
    own = vllm_options.engine_options(config, tiny_model, "base", given)
    with pytest.raises(ConfigError, match=f"--{name}: set by rora-serve itself"):
        vllm_options.parse_options(own, given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size: 2, adapters are served by one"),
        (["-pp", "2"], "--pipeline-parallel-size: 2, adapters are served by one worker"),
        (["--data-parallel-size", "2"], "--data-parallel-size: 2, adapters are served by one"),
        (["--kv-sharing-fast-prefill"], "--kv-sharing-fast-prefill: layers that leave tokens out"),
        (
            ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'],
            "--speculative-config: guessing tokens ahead is not served",
        ),
    ],
)
def test_what_our_layers_do_not_serve_is_refused_in_words(
    tiny_model: Path, given: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        vllm_options.parse_options(["--model", str(tiny_model)], given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--dtype", "float33"], "after `--`: argument --dtype: invalid choice: 'float33'"),
        (["--dtype"], "after `--`: argument --dtype: expected one argument"),
        (["--no-such-option"], "after `--`: unrecognized arguments: --no-such-option"),
    ],
)
def test_what_vllm_does_not_understand_is_refused_in_one_line(
    tiny_model: Path, given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        vllm_options.parse_options(["--model", str(tiny_model)], given)
    assert "\n" not in str(caught.value)
    assert "usage" not in capsys.readouterr().err


def test_logits_in_the_place_of_log_probs_are_refused(tiny_model: Path) -> None:
    """No probe could be compared with them; log-probs in another way can."""
    own = ["--model", str(tiny_model)]
    parsed = vllm_options.parse_options(own, ["--logprobs-mode", "processed_logprobs"])
    assert parsed.logprobs_mode == "processed_logprobs"
    for mode in ("raw_logits", "processed_logits"):
        with pytest.raises(ConfigError, match=f"--logprobs-mode {mode}: log-probs are expected"):
            vllm_options.parse_options(own, ["--logprobs-mode", mode])


def test_tools_are_called_by_themselves_where_the_models_format_is_known(
    store: AdapterStore, tiny_model: Path, tmp_path: Path
) -> None:
    assert "--tool-call-parser" not in options(store, tiny_model)
    model = tmp_path / "with tools"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").write_text("{{ tools }}<tool_call>{{ messages }}")
    told = options(store, model)
    assert told["--tool-call-parser"] == "hermes"
    assert "--enable-auto-tool-choice" in told
    for given in (["--tool-call-parser=mistral"], ["--chat_template", "another.jinja"]):
        config = ServeConfig(store=store.root)
        listed = vllm_options.engine_options(config, model, "base", given)
        assert "--tool-call-parser" not in listed
        assert "--enable-auto-tool-choice" not in listed
