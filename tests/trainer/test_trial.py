"""Which models can be given packed samples: tried on tiny random ones of many families."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    StableLmConfig,
)

from tests.trainer.test_loss import LIKE, losses_by_loop
from trainer.model import BaseModel, load_tokenizer
from trainer.trial import find_model_loss

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip
ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        "rope_theta": 1e4, "original_max_position_embeddings": 64}  # fmt: skip
# Configuration, why it is not packed, whether its logits are the output layer's alone.
FAMILIES: dict[str, tuple[Callable[[], PreTrainedConfig], str | None, bool]] = {
    "llama": (lambda: LlamaConfig(**SIZES), None, True),
    "qwen3": (lambda: Qwen3Config(**SIZES), None, True),
    "qwen3_moe": (lambda: Qwen3MoeConfig(**SIZES, **EXPERTS), None, True),
    "gpt2": (lambda: GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4), None, True),
    "granite": (lambda: GraniteConfig(**SIZES, logits_scaling=3.0), None, False),
    # Attention that looks back far enough for the samples to come, and not far enough.
    "gemma3": (lambda: Gemma3TextConfig(**SIZES, sliding_window=64), None, True),
    "mistral": (lambda: MistralConfig(**SIZES, sliding_window=4), "looks back 4 tokens", True),
    # Capped attention and logits; sinks; chunks; positions by ALiBi; partial rotary in own code.
    "gemma2": (lambda: Gemma2Config(**SIZES), "uses softcap", False),
    "gpt_oss": (
        lambda: GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
        "uses s_aux",
        True,
    ),
    "llama4": (
        lambda: Llama4TextConfig(
            **SIZES, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=32
        ),
        "chunk",
        False,
    ),
    "bloom": (
        lambda: BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4),
        "does not take them",
        True,
    ),
    "stablelm": (lambda: StableLmConfig(**SIZES), "2 of its 2 layers do not attend", True),
    "longrope": (lambda: Phi3Config(**SIZES, rope_parameters=ROPE), "rotary positions", True),
    # States that go from token to token: convolutions, linear attention beside gated attention.
    "lfm2": (
        lambda: Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]), "layers of conv", True
    ),
    "qwen3_next": (
        lambda: Qwen3NextConfig(
            **SIZES, **EXPERTS, linear_num_key_heads=2, linear_num_value_heads=2,
            linear_key_head_dim=8, linear_value_head_dim=8, shared_expert_intermediate_size=16,
        ),
        "layers of linear_attention",
        True,
    ),
    "mamba": (
        lambda: MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2),
        "layers of linear_attention",
        True,
    ),
}  # fmt: skip


def random_base(
    config: PreTrainedConfig, tokenizer_from: Path, dtype: torch.dtype = torch.float32
) -> BaseModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        weight.data.mul_(4)  # so that what a sample sees matters
    return BaseModel(
        config.model_type, tokenizer_from, model.to(dtype), load_tokenizer(tokenizer_from)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_packed_only_where_each_computes_what_it_does_alone(
    default_model: Path, family: str
) -> None:
    make_config, why_padded, plain_head = FAMILIES[family]
    # A state that goes through every token adds roundings up, on some processors beyond the bound.
    dtype = torch.float64 if family == "mamba" else torch.float32
    base = random_base(make_config(), default_model, dtype)
    own_attention = base.model.config._attn_implementation
    loss, reason = find_model_loss(base, longest=max(map(len, LIKE)), packing=True)
    assert (loss.packs, loss.plain_head) == (why_padded is None, plain_head), reason
    assert (why_padded or "") in (reason or "")
    if not loss.packs:
        assert base.model.config._attn_implementation == own_attention
    expected = [sum(losses_by_loop(base, sample)) for sample in LIKE]
    np.testing.assert_allclose(loss.sample_losses(LIKE)[0], expected, atol=1e-4)
    # A prefix that is not shared, as with dropout, is packed as exactly.
    apart = replace(loss, shares_prefix=False)
    np.testing.assert_allclose(apart.sample_losses(LIKE)[0], expected, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "lfm2", "qwen3_next", "mistral"])
def test_sixteen_bits_change_no_verdict(default_model: Path, family: str) -> None:
    make_config, why_padded, _ = FAMILIES[family]
    base = random_base(make_config(), default_model, torch.bfloat16)
    loss, reason = find_model_loss(base, longest=60, packing=True)
    assert loss.packs == (why_padded is None), reason


def test_neighbours_that_leak_are_noticed_without_a_name_for_it(default_model: Path) -> None:
    """A layer that adds the token before, as a convolution does, in a model of another name."""
    base = random_base(LlamaConfig(**SIZES), default_model)
    layer = base.model.get_submodule("model.layers.0.mlp")
    layer.register_forward_hook(lambda _, __, out: out + 0.1 * out.roll(1, dims=1))
    loss, reason = find_model_loss(base, longest=60, packing=True)
    assert not loss.packs
    assert reason is not None


@pytest.mark.parametrize(
    ("config", "is_random"),
    [
        (LlamaConfig(**SIZES), False),
        (LlamaConfig(**SIZES, attention_dropout=0.1), True),
        (GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4), True),
        (
            OPTConfig(
                vocab_size=128, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                num_attention_heads=4, word_embed_proj_dim=32,
            ),
            True,
        ),
    ],
)  # fmt: skip
def test_a_prefix_is_shared_unless_the_model_draws_in_training(
    default_model: Path, config: PreTrainedConfig, is_random: bool
) -> None:
    base = random_base(config, default_model)
    before = torch.get_rng_state()
    loss, _ = find_model_loss(base, longest=60, packing=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert loss.packs
    assert loss.shares_prefix == (not is_random)


def test_a_longer_sample_than_was_foreseen_is_padded(default_model: Path) -> None:
    base = random_base(MistralConfig(**SIZES, sliding_window=25), default_model)
    loss, _ = find_model_loss(base, longest=25, packing=True)
    assert loss.packs
    expected = [sum(losses_by_loop(base, sample)) for sample in LIKE]
    np.testing.assert_allclose(loss.sample_losses(LIKE)[0], expected, atol=1e-4)
