"""Adapters and models to test with: made here, deterministic, small."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adapters import AdapterConfig, open_artifact, write_artifact
from adapters.header import read_header

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make_tiny_model(folder: Path, tokenizer_from: Path) -> Path:
    """Write a random two-layer Llama with grouped-query attention and a real tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer_from / name, folder / name)
    return folder


def make_random_adapter(
    folder: Path, base: Path, *, config: AdapterConfig, modules: tuple[str, ...], seed: int
) -> Path:
    """Write a random adapter of every linear layer of `base` whose last name is listed.

    The factors are large enough that every answer differs clearly from the base model's.
    """
    generator = np.random.default_rng(seed)
    factors = {}
    for tensor in read_header(next(base.glob("*.safetensors"))).values():
        module = tensor.name.removesuffix(".weight")
        if module.rpartition(".")[2] not in modules:
            continue
        out_features, in_features = tensor.shape
        matching = [r for key, r in config.rank_pattern.items() if module.endswith(key)]
        rank = matching[0] if matching else config.rank
        lora_a = generator.normal(0, in_features**-0.5, (rank, in_features))
        lora_b = generator.normal(0, 0.03, (out_features, rank))
        factors[module] = (lora_a.astype(np.float32), lora_b.astype(np.float32))
    write_artifact(folder, config, factors, provenance={"format": 1, "method": "random"})
    return folder


def formed_deltas(folder: Path) -> dict[str, NDArray[np.float64]]:
    """Return scaling * B @ A of every module of an adapter, formed."""
    return {
        module.name: module.scaling * b.astype(np.float64) @ a.astype(np.float64)
        for module, a, b in open_artifact(folder).read_tensors()
    }


@torch.no_grad()
def pefts_logits(base: Path, adapter: Path) -> torch.Tensor:
    """Return what PEFT computes for 40 tokens from an adapter folder, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
    logits: torch.Tensor = adapted(torch.arange(20, 60)[None]).logits
    return logits


def write_lines(path: Path, lines: list[object]) -> Path:
    """Write a JSON-lines file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def chat(question: str, completion: str, /, **more: object) -> dict[str, object]:
    """Return one line of data."""
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": completion},
    ]
    return {"messages": messages, **more}


def set_alpha(folder: Path, alpha: float) -> None:
    """Let an adapter have another lora_alpha, and so other weights to whoever serves it."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": alpha}))
