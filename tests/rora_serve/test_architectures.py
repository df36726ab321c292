"""Base models of other architectures answer as PEFT does, whichever code vLLM runs them by."""

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adapters import AdapterStore
from tests.rora_serve.conftest import TOLERANCE, differences_of_log_probs
from tests.rora_serve.serving import Continuation, ask_together, free_port, our_command, running

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

HIDDEN = {
    "vocab_size": 49_152, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
LLAMA = HIDDEN | {"num_key_value_heads": 2, "intermediate_size": 192}
HEADS = LLAMA | {"head_dim": 32}
GPT = {"vocab_size": 49_152, "n_embd": 128, "n_layer": 2, "n_head": 4, "eos_token_id": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
# Whose steps of decoding do nothing but what has a compiled function.
REPLAYED = {"Mistral", "Phi3", "Qwen2", "Qwen3"}
NUM_TOKENS = 6


class Architecture(NamedTuple):
    """Of a tiny model: what Transformers calls it, its sizes, and what its adapter changes."""

    name: str
    sizes: Mapping[str, Any]
    modules: str | list[str] = "all-linear"


TESTED = [
    Architecture("Gemma2", HEADS),
    Architecture("Phi3", LLAMA),
    # PEFT's factors of experts are no pairs of two matrices, and refused before they are served.
    Architecture("Qwen3Moe", HEADS | EXPERTS, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    # In Transformers' own code. Rows of its one matrix for q, k and v go from head to head.
    Architecture("GPTNeoX", HIDDEN | {"intermediate_size": 192}),
]
SOAKED = [
    Architecture("Cohere", LLAMA),
    Architecture("Gemma3Text", HEADS),
    Architecture("Granite", LLAMA),
    Architecture("Mistral", LLAMA),
    Architecture("OPT", HIDDEN | {"ffn_dim": 192, "word_embed_proj_dim": 128}),
    Architecture("Qwen2", LLAMA),
    Architecture("Qwen3", HEADS),
    # From here on by Transformers' own code.
    Architecture("GPTBigCode", GPT),
    Architecture("Glm", HEADS),
    Architecture("Olmo2", LLAMA),
    Architecture("Phi", LLAMA),
    Architecture("SmolLM3", LLAMA),
    Architecture("Starcoder2", LLAMA),
]


def make_model(folder: Path, name: str, sizes: Mapping[str, Any], default_model: Path) -> Any:
    """Write a random model with the default one's tokenizer, and return it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)  # so that layers change what comes in
    model.save_pretrained(folder)
    for file in default_model.glob("*token*"):
        shutil.copy(file, folder)
    return model


def make_adapter(folder: Path, model: Any, modules: str | list[str]) -> Any:
    """Write what PEFT saves of a random adapter, and return PEFT's model with it."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, config)
    with torch.no_grad():
        for name, factor in adapted.named_parameters():
            if "lora_B" in name:
                factor.normal_(0, 0.05)
    adapted.save_pretrained(folder)
    return adapted.eval()


@torch.no_grad()
def largest_difference(adapted: Any, found: Continuation) -> float:
    logits = adapted(torch.tensor([found.prompt + found.tokens])).logits[0]
    return max(differences_of_log_probs(logits.log_softmax(-1), found))


@pytest.mark.parametrize(
    ("name", "sizes", "modules"),
    [
        *(pytest.param(*tested, id=tested.name) for tested in TESTED),
        *(pytest.param(*soaked, id=soaked.name, marks=pytest.mark.soak) for soaked in SOAKED),
    ],
)
def test_base_and_adapter_answer_as_in_peft(
    name: str,
    sizes: Mapping[str, Any],
    modules: str | list[str],
    default_model: Path,
    tmp_path: Path,
) -> None:
    model = make_model(tmp_path / "model", name, sizes, default_model)
    adapted = make_adapter(tmp_path / "adapter", model, modules)
    store = AdapterStore(tmp_path / "store")
    store.add(tmp_path / "adapter", name="adapter")
    port = free_port()
    own = ["--model", str(tmp_path / "model")]
    cache = ["--kv-cache-memory-bytes", "200000000", "--max-model-len", "256"]
    chooser = random.Random(0)
    prompts = [
        tuple(chooser.randrange(1000, 40_000) for _ in range(chooser.choice([1, 5, 17, 60])))
        for _ in range(12)
    ]
    names = ["adapter", "model", "adapter"] * 4
    with running(
        our_command(store.root, port, own, vllm_options=cache), port, tmp_path / "log"
    ) as server:
        requests = list(zip(names, prompts, strict=True))
        answers = ask_together(server, requests, num_tokens=NUM_TOKENS)
    of_adapter = [a for a, n in zip(answers, names, strict=True) if n == "adapter"]
    of_base = [a for a, n in zip(answers, names, strict=True) if n == "model"]
    found = max(largest_difference(adapted, answer) for answer in of_adapter)
    with adapted.disable_adapter():
        found_of_base = max(largest_difference(adapted, answer) for answer in of_base)
        moved = max(largest_difference(adapted, answer) for answer in of_adapter)
    print("largest difference of log-probs:", found, found_of_base, "by the adapter:", moved)
    assert max(found, found_of_base) <= TOLERANCE
    assert moved > 10 * TOLERANCE
    log = (tmp_path / "log").read_text()
    assert "are refused" not in log, "every module can be adapted"
    assert ("decoding by whole steps" in log) == (name in REPLAYED)


def test_a_model_that_takes_no_adapters_is_refused_in_one_line(
    default_model: Path, tmp_path: Path
) -> None:
    """Bloom's fused layer lies in memory in another order of rows than in its file."""
    sizes = {"vocab_size": 49_152, "hidden_size": 128, "n_layer": 1, "n_head": 4}
    make_model(tmp_path / "model", "Bloom", sizes, default_model)
    command = our_command(tmp_path / "store", free_port(), ["--model", str(tmp_path / "model")])
    with pytest.raises(RuntimeError, match="exit 1"), running(command, 1, tmp_path / "log"):
        pass
    said = "vLLM does not support adapters of this model; a base model of another architecture"
    line = f"rora-serve: BloomForCausalLM: {said} is expected"
    assert line in (tmp_path / "log").read_text().splitlines()
