"""Fixtures that several packages' tests share."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapters import AdapterConfig
from adapters.base_model import cache_folder, find_model
from tests.workloads import make_random_adapter, make_tiny_model

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The folder of the embedded default model, built if need be."""
    return find_model(None, cache=cache_folder(os.environ))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Path:
    """A random model of two layers with the default model's tokenizer."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", default_model)


@pytest.fixture
def adapter(tmp_path: Path, tiny_model: Path) -> Path:
    """A random RoRA adapter of the tiny model."""
    return make_random_adapter(
        tmp_path / "adapter",
        tiny_model,
        config=AdapterConfig(rank=4, lora_alpha=8, use_rslora=True, target_modules=LINEAR),
        modules=LINEAR,
        seed=1,
    )


@contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    """Let no file of this process grow above some bytes, which a full disk is like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
