"""A server with adapters of every kind, shared by the tests of this folder, and PEFT beside it."""

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapters import AdapterConfig, AdapterStore, open_artifact, write_artifact
from adapters.names import DEFAULT_MODEL_NAME as BASE
from adapters.receipt import read_base_shapes
from rora_serve.launch import kernel_cache
from rora_serve.side_process import SideProcess
from tests.conftest import LINEAR
from tests.reference import ATOL
from tests.rora_serve.adapter_server import Place, make_place
from tests.rora_serve.node_client import NodeClient, install
from tests.rora_serve.reaching import listening
from tests.rora_serve.serving import (
    Continuation,
    Server,
    check_soft_stop,
    free_port,
    our_command,
    running,
    stock_command,
)
from tests.rora_serve.span_collector import SpanCollector
from tests.rora_serve.swapping import make_versions
from tests.rora_serve.tenant_table import (
    GRANTS,
    SPARING,
    SPARING_GRANT,
    KeyedServer,
    add_names,
    write_keys,
)
from tests.workloads import make_random_adapter
from trainer.allocation import trained_config
from trainer.config import (
    AdapterSettings,
    AllocationSettings,
    DataSettings,
    LoopSettings,
    TrainConfig,
)
from trainer.inject import inject_artifact
from trainer.model import load_base, load_tokenizer
from trainer.optim import RankAdamW
from trainer.run import train

# By what all of its sources are, as servers do: numba itself looks at one of them.
os.environ["NUMBA_CACHE_DIR"] = str(kernel_cache(Path(__file__).parent))

NUM_TOKENS = 32
TOLERANCE = ATOL["served-log-probs-float32"]
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Why is the sky blue? Answer in one sentence, for a child of six years.",
)
CONFIGS = {
    "lora-8": AdapterConfig(8, 16, target_modules=LINEAR),
    # q, k and v of unequal ranks, and no down_proj.
    "rora-32": AdapterConfig(
        32,
        16,
        use_rslora=True,
        rank_pattern={"q_proj": 5, "k_proj": 17},
        alpha_pattern={"o_proj": 4.0},
        target_modules=LINEAR[:-1],
    ),
}


RANK_BEFORE_ALLOCATION = 2
# Of an adapter "templated" with the weights of lora-8.
OWN_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<our-{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<our-answer>{% endif %}"
)
# Ranks from 0 to 128 in each module, 0 being a module that is not there.
NUM_RAGGED = 3
# Few tokens a step, so that long prompts come in pieces beside others' steps.
CHUNK = ("--max-num-batched-tokens", "256")
PRELOADED = ("--pin", "pruned", "--preload", "allocated@latest", "--preload", "rora-*")
# By which vLLM reads tools' calls; those that `tool_choice` asks for are structured output.
TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")


def make_ragged_adapter(folder: Path, base: Path, *, seed: int) -> Path:
    """Write an adapter with a rank of its own in each module; odd seeds: embedding and head too."""
    generator = np.random.default_rng(seed)
    shapes = read_base_shapes(base, name=BASE)
    wanted = {n: s for n, s in shapes.linear.items() if s and n.rpartition(".")[2] in LINEAR}
    embeddings: dict[str, tuple[int, int]] = {}
    if seed % 2:
        ((name, (vocabulary, hidden)),) = ((n, s) for n, s in shapes.embeddings.items() if s)
        embeddings = {name: (hidden, vocabulary)}
        wanted |= embeddings | {"lm_head": (vocabulary, hidden)}
    factors = {}
    for name, (out_features, in_features) in wanted.items():
        rank = int(
            generator.choice([0, 1, 2, 3, 8, 31, 128], p=[0.2, 0.2, 0.1, 0.1, 0.2, 0.1, 0.1])
        )
        if not rank and "layers." in name:
            continue
        rank = rank or 5
        scale = 1.0 if name in embeddings else in_features**-0.5
        factors[name] = (
            generator.normal(0, scale, (rank, in_features)).astype(np.float32),
            generator.normal(0, 0.03, (out_features, rank)).astype(np.float32),
        )
    config = AdapterConfig(
        8,
        8,
        use_rslora=seed % 3 > 0,
        rank_pattern={name: len(a) for name, (a, _) in factors.items() if len(a) != 8},
        target_modules=tuple(sorted({name.rpartition(".")[2] for name in factors})),
    )
    write_artifact(folder, config, factors, provenance={"format": 1}, embeddings=embeddings)
    return folder


def train_allocated(folder: Path, base: Path) -> Path:
    """Train an adapter whose ranks move so much that some modules lose all of theirs."""
    lines = Path("examples/banking77/train.jsonl").read_text().splitlines(keepends=True)[:120]
    folder.mkdir()
    data = folder / "data.jsonl"
    data.write_text("".join(lines))
    config = TrainConfig(
        output=folder / "run",
        data=DataSettings(train=data),
        adapter=AdapterSettings(rank=RANK_BEFORE_ALLOCATION),
        allocation=AllocationSettings(
            enabled=True, warmup_epochs=0.4, rounds=1, epochs_per_round=0.4,
            ranks_per_round=0.6, score_samples=8,
        ),
        train=LoopSettings(epochs=0.8, batch_tokens=256, learning_rate=2e-3),
    )  # fmt: skip
    return train(config, load_base(BASE, base, dtype="float32"))


class Gated:
    """A model with an adapter of rank 8, some of whose ranks are switched off by gates."""

    def __init__(self, base: Path, adapter: Path) -> None:
        self._base = load_base(BASE, base, dtype="float32").model
        self._config = open_artifact(adapter).config
        self._layers = inject_artifact(self._base, open_artifact(adapter))
        chooser = torch.Generator().manual_seed(0)
        for number, layer in enumerate(self._layers.values()):
            open_gates = torch.rand(8, generator=chooser) < (number % 4) / 3
            layer.gates = open_gates.float()

    def write_pruned(self, folder: Path) -> Path:
        """Remove what is switched off, as a round does, and write the folder."""
        optimizer = RankAdamW(self._layers, weight_decay=0.0)
        gates = {name: layer.gates for name, layer in self._layers.items()}
        before = {name: layer.factors for name, layer in self._layers.items()}
        for name, layer in self._layers.items():
            gate = gates[name]
            assert gate is not None
            kept = gate.nonzero().flatten().tolist()
            scaling = 16 / len(kept) if kept else 0.0  # of LoRA with alpha 16
            layer.gates = None
            optimizer.resize(name, kept, 0, scaling=scaling, generator=torch.Generator())
        config = trained_config(self._config, self._layers)
        factors = {
            name: (layer.lora_a.detach().numpy(), layer.lora_b.detach().numpy())
            for name, layer in self._layers.items()
            if layer.rank
        }
        write_artifact(folder, config, factors, provenance={"format": 1})
        for name, layer in self._layers.items():
            layer.set_factors(before[name])
            layer.gates = gates[name]
        return folder

    @torch.no_grad()
    def largest_difference(self, found: Continuation) -> float:
        """Over the top log-probs of every generated token; the served tokens are the context."""
        logits = self._base(torch.tensor([found.prompt + found.tokens])).logits[0]
        return max(differences_of_log_probs(logits.log_softmax(-1), found))


def differences_of_log_probs(log_probs: torch.Tensor, found: Continuation) -> list[float]:
    """Return how far apart they are; log_probs: [tokens, vocabulary] of prompt and answer."""
    first = len(found.prompt) - 1
    return [
        abs(float(log_probs[first + step, token]) - value)
        for step, top in enumerate(found.top_log_probs)
        for token, value in top.items()
    ]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What vLLM's layers ask before they are made."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(rank_in_group=0, world_size=1))
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture(scope="package")
def gated(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Gated:
    adapter = make_random_adapter(
        tmp_path_factory.mktemp("gated") / "whole",
        default_model,
        config=CONFIGS["lora-8"],
        modules=LINEAR,
        seed=5,
    )
    return Gated(default_model, adapter)


@pytest.fixture(scope="package")
def adapters(
    tmp_path_factory: pytest.TempPathFactory, default_model: Path, gated: Gated
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return (
        {
            "allocated": train_allocated(root / "training", default_model),
            "pruned": gated.write_pruned(root / "pruned"),
        }
        | {
            name: make_random_adapter(
                root / name,
                default_model,
                config=config,
                modules=tuple(config.target_modules),
                seed=seed,
            )
            for seed, (name, config) in enumerate(CONFIGS.items())
        }
        | {
            f"ragged-{seed}": make_ragged_adapter(root / f"ragged-{seed}", default_model, seed=seed)
            for seed in range(NUM_RAGGED)
        }
    )


@pytest.fixture(scope="package")
def store(tmp_path_factory: pytest.TempPathFactory, adapters: dict[str, Path]) -> AdapterStore:
    store = AdapterStore(tmp_path_factory.mktemp("serving") / "store")
    for name, folder in adapters.items():
        store.add(folder, name=name)
    templated = tmp_path_factory.mktemp("templated") / "adapter"
    shutil.copytree(adapters["lora-8"], templated)
    (templated / "chat_template.jinja").write_text(OWN_TEMPLATE)
    store.add(templated, name="templated")
    return store


@pytest.fixture(scope="package")
def server(store: AdapterStore) -> Iterator[Server]:
    port = free_port()
    own = (*PRELOADED, "--drain-seconds", "300")
    command = our_command(store.root, port, own, vllm_options=(*CHUNK, *TOOLS))
    with running(command, port, store.root.with_name("log")) as server:
        yield server
        check_soft_stop(server, "lora-8")
    assert server.process.returncode == 0, "a server that a signal stops exits with 0"


@dataclass(frozen=True)
class Stock:
    """vLLM's own server: what must fail where ours must not.

    Args:
        folders: of its adapters: those of CONFIGS, and two that answer differently.
        moving, moved_to: the names of those two.
    """

    server: Server
    folders: Mapping[str, Path]
    moving: str = "moving"
    moved_to: str = "moved-to"

    def folder_of(self, name: str) -> Path:
        return self.folders[name]

    def takes(self, name: str, folder: Path) -> bool:
        """Tell whether it serves an adapter, which is loaded if it was not."""
        if name in self.folders:
            return True
        body = {"lora_name": name, "lora_path": str(folder)}
        answer = httpx.post(f"{self.server.url}/v1/load_lora_adapter", json=body, timeout=60)
        return answer.status_code == 200


@pytest.fixture(scope="package")
def stock(
    tmp_path_factory: pytest.TempPathFactory, adapters: dict[str, Path], default_model: Path
) -> Iterator[Stock]:
    root = tmp_path_factory.mktemp("stock")
    moving, moved_to = make_versions(root, default_model)
    folders = {name: adapters[name] for name in CONFIGS}
    folders |= {Stock.moving: moving, Stock.moved_to: moved_to}
    port = free_port()
    command = stock_command(default_model, folders, port, "qkv_proj o_proj gate_up_proj down_proj")
    reloading = ["env", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", *command]
    with running(reloading, port, root / "log") as server:
        yield Stock(server, folders)


@pytest.fixture(scope="package")
def keyed_server(
    tmp_path_factory: pytest.TempPathFactory, default_model: Path
) -> Iterator[KeyedServer]:
    """A server with tenants, an adapter for each name of their table, in bfloat16, with traces."""
    root = tmp_path_factory.mktemp("keyed")
    store = AdapterStore(root / "store")
    add_names(store, root / "made", default_model)
    keys = write_keys(root / "keys.toml", GRANTS | {SPARING: SPARING_GRANT})
    port, collector = free_port(), SpanCollector()
    own = ["--keys", str(root / "keys.toml")]
    with listening(collector) as traces:
        page = ["--allowed-origins", '["http://page"]']
        vllm_options = ["--dtype", "bfloat16", "--otlp-traces-endpoint", traces, *page]
        command = our_command(store.root, port, own, vllm_options=vllm_options)
        exporting = ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/protobuf"]
        exporting += ["OTEL_BSP_SCHEDULE_DELAY=200"]  # milliseconds, not 5 s
        with running(["env", *exporting, *command], port, root / "log") as server:
            yield KeyedServer(server, store, collector, keys)


@pytest.fixture(scope="package")
def prompts(default_model: Path) -> list[tuple[int, ...]]:
    tokenizer = load_tokenizer(default_model)

    def encode(question: str) -> tuple[int, ...]:
        messages = [{"role": "user", "content": question}]
        encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return tuple(encoded["input_ids"])

    return [encode(question) for question in QUESTIONS]


class Oracle:
    """The same adapters, loaded by PEFT into transformers."""

    def __init__(self, base: Path, adapters: dict[str, Path]) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        first, *others = adapters
        with warnings.catch_warnings():
            # An adapter of the head of a model with tied weights is what this is about.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            self._model = PeftModel.from_pretrained(model, str(adapters[first]), adapter_name=first)
            for name in others:
                self._model.load_adapter(str(adapters[name]), adapter_name=name)
        self._model.eval()

    def largest_difference(self, name: str, found: Continuation) -> float:
        """Over the top log-probs of every generated token; the served tokens are the context."""
        return max(self.differences(name, found))

    @torch.no_grad()
    def differences(self, name: str, found: Continuation) -> list[float]:
        """Return those of the top log-probs of every generated token."""
        ids = torch.tensor([found.prompt + found.tokens])
        model: Any = self._model
        if name == BASE:
            with model.disable_adapter():
                logits = model(ids).logits[0]
        else:
            model.set_adapter(name)
            logits = model(ids).logits[0]
        return differences_of_log_probs(logits.log_softmax(-1), found)


@pytest.fixture(scope="package")
def oracle(default_model: Path, adapters: dict[str, Path]) -> Oracle:
    return Oracle(default_model, adapters)


@pytest.fixture(scope="package")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> NodeClient:
    return install(tmp_path_factory.mktemp("node") / "clients")


@pytest.fixture(scope="module")
def side_process() -> Iterator[SideProcess]:
    """For tests that ask one thing at a time; each has a loop of its own."""
    process = SideProcess()
    yield process
    process.close()


@pytest.fixture
def place(tmp_path: Path, side_process: SideProcess) -> Place:
    return make_place(tmp_path, side_process)
