"""RoraCpuPlatform sets what vLLM leaves to a platform, and nothing that somebody asked for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import (
    CacheConfig,
    CompilationConfig,
    CompilationMode,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.platforms.cpu import CpuPlatform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.selector import AttentionSelectorConfig

from rora_serve.engine.platform import DECODE_BACKEND, RoraCpuPlatform


@pytest.mark.parametrize(("asked_for", "expected"), [(None, 64), (32, 32), (128, 128)], ids=str)
def test_blocks_are_smaller_than_vllms_unless_a_size_was_asked_for(
    asked_for: int | None, expected: int
) -> None:
    cache = CacheConfig() if asked_for is None else CacheConfig(block_size=asked_for)
    config = VllmConfig(cache_config=cache)
    assert config.cache_config.block_size == (asked_for or 128), "vLLM's own"
    RoraCpuPlatform.check_and_update_config(config)
    assert config.cache_config.block_size == expected


@pytest.mark.parametrize("needed", [16, 256])
def test_blocks_that_a_model_needs_are_left_as_they_are(
    needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = VllmConfig()

    def set_up(vllm_config: VllmConfig) -> None:
        vllm_config.cache_config.block_size = needed

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", set_up)
    RoraCpuPlatform.check_and_update_config(config)
    assert config.cache_config.block_size == needed


UNASKED: Any = None  # no backend is selected; vLLM calls it so
PLAIN = AttentionSelectorConfig(
    head_size=64, dtype=torch.float32, kv_cache_dtype="auto", block_size=None
)


def test_layers_get_our_backend_by_a_path_that_leads_to_it() -> None:
    assert RoraCpuPlatform.get_attn_backend_cls(UNASKED, PLAIN) == DECODE_BACKEND
    assert resolve_obj_by_qualname(DECODE_BACKEND).get_name() == "CPU_ATTN", "as vLLM's"


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.bfloat16},
        {"kv_cache_dtype": "fp8"},
        {"attn_type": AttentionType.ENCODER},
        {"has_sink": True},
        {"has_sliding_window": True},
        {"use_kv_connector": True},
        {"use_mla": True},
    ],
    ids=str,
)
def test_layers_whose_decoding_is_not_ours_get_vllms_backend(changes: dict[str, Any]) -> None:
    asked = PLAIN._replace(**changes)
    theirs = CpuPlatform.get_attn_backend_cls(UNASKED, asked)
    assert RoraCpuPlatform.get_attn_backend_cls(UNASKED, asked) == theirs != DECODE_BACKEND


@pytest.mark.parametrize("mode", [CompilationMode.NONE, CompilationMode.DYNAMO_TRACE_ONCE])
@pytest.mark.parametrize("use_mla", [False, True])
def test_attention_is_an_operator_in_compiled_graphs_and_where_it_is_latent(
    mode: CompilationMode, *, use_mla: bool
) -> None:
    config: Any = VllmConfig(compilation_config=CompilationConfig(mode=mode))
    config.model_config = SimpleNamespace(use_mla=use_mla)
    with set_current_vllm_config(config, check_compile=False):
        is_operator = RoraCpuPlatform.opaque_attention_op()
    assert is_operator == (use_mla or mode != CompilationMode.NONE)
    assert RoraCpuPlatform.opaque_attention_op(), "nothing is known"
