"""RoraCpuPlatform sets what vLLM leaves to a platform, and nothing that somebody asked for."""

import pytest
from vllm.config import CacheConfig, VllmConfig
from vllm.platforms.cpu import CpuPlatform

from rora_serve.engine.platform import RoraCpuPlatform


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
