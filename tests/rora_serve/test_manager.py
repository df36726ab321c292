"""The worker's manager learns which layers it can serve, and tells rows of logits apart."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from adapters.errors import EngineSeamError
from rora_serve.engine.manager import RaggedLoraManager
from tests.reference import ATOL
from tests.rora_serve.slots import make_slot

pytestmark = pytest.mark.usefixtures("one_process")

VOCABULARY, HIDDEN = 20, 8
NUM_ROWS = 7


class Model(nn.Module):
    """Calls one layer with the step's rows, one with others, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = VocabParallelEmbedding(VOCABULARY, HIDDEN)
        self.plain: Any = ReplicatedLinear(HIDDEN, HIDDEN)
        self.pooled: Any = ReplicatedLinear(HIDDEN, HIDDEN)
        self.idle = ReplicatedLinear(HIDDEN, HIDDEN)
        self.lm_head: Any = ParallelLMHead(VOCABULARY, HIDDEN)
        self.logits_processor = LogitsProcessor(VOCABULARY)
        for weight in self.parameters():
            nn.init.normal_(weight)
        for layer in self.children():
            method: Any = getattr(layer, "quant_method", None)
            if method is not None:
                method.process_weights_after_loading(layer)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.plain(x)[0]
        pooled: Tensor = self.pooled(hidden.mean(0, keepdim=True))[0]
        return hidden + pooled

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.logits_processor(self.lm_head, 2 * hidden)
        return logits


def make_manager(model: nn.Module) -> RaggedLoraManager:
    return RaggedLoraManager(model, torch.float32, is_compiled=False)


def set_rows(manager: RaggedLoraManager, tokens: list[int], samples: list[int]) -> None:
    requests = {LoRARequest(f"of {key}", key, "nowhere") for key in {*tokens} - {0}}
    mapping = LoRAMapping(tuple(tokens), tuple(samples), is_prefill=True)
    manager.set_active_adapters(requests, mapping)


def rehearse(manager: RaggedLoraManager, model: nn.Module) -> Tensor:
    """What vLLM's dummy run does."""
    with manager.rehearsal(), manager.dummy_lora_cache():
        manager.add_dummy_lora(LoRARequest("dummy", 1, "nowhere"), 8)
        set_rows(manager, [1] * NUM_ROWS, [1] * NUM_ROWS)
        found: Tensor = model(torch.ones(NUM_ROWS, HIDDEN))
        manager.remove_all_adapters()
    return found


def test_layers_that_can_not_be_served_are_found_before_any_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Model()
    expected = model(torch.ones(NUM_ROWS, HIDDEN))
    manager = make_manager(model)
    names = ("tokens", "plain", "pooled", "idle", "lm_head")
    assert all(manager.site(name) is not None for name in names)
    with caplog.at_level(logging.WARNING):
        found = rehearse(manager, model)
    assert torch.equal(found, expected), "a dummy adapter adds nothing"
    assert [name for name in names if manager.site(name) is None] == ["pooled", "idle"]
    (message,) = caplog.messages
    assert "2 modules are refused: pooled (pooled: input [1, 8] and output" in message
    assert "idle (the model does not call it)" in message
    assert manager.list_adapters() == set()


def test_after_the_rehearsal_rows_that_do_not_fit_end_the_step() -> None:
    """Which no request brings about, as its adapter would have been refused."""
    model = Model()
    manager = make_manager(model)
    rehearse(manager, model)
    index = next(i for i, layer in enumerate(manager._layers) if layer.name == "pooled")
    factors = np.ones((1, HIDDEN), np.float32), np.ones((HIDDEN, 1), np.float32), 1.0
    slot = make_slot({(index, 0): factors}, num_layers=manager.num_layers, num_parts=1)
    manager.publish(1, slot)
    set_rows(manager, [1] * NUM_ROWS, [1] * NUM_ROWS)
    with pytest.raises(EngineSeamError, match=r"pooled: input \[1, 8\] and .* step of 7 rows"):
        model(torch.ones(NUM_ROWS, HIDDEN))


def test_logits_are_of_the_rows_that_were_asked_for() -> None:
    """Though the model changes them before its head sees them: samples, then a prompt's."""
    model = Model()
    manager = make_manager(model)
    rehearse(manager, model)
    index = next(i for i, layer in enumerate(manager._layers) if layer.name == "lm_head")
    generator = np.random.default_rng(0)
    deltas = {}
    for key in (1, 2):
        a = generator.normal(size=(3, HIDDEN)).astype(np.float32)
        b = generator.normal(size=(VOCABULARY, 3)).astype(np.float32)
        slot = make_slot({(index, 0): (a, b, 0.5)}, num_layers=manager.num_layers, num_parts=1)
        manager.publish(key, slot)
        deltas[key] = torch.from_numpy(0.5 * (b @ a).T)
    deltas[0] = torch.zeros(HIDDEN, VOCABULARY)
    weight: Tensor = model.lm_head.weight.detach()[:VOCABULARY]
    tokens = [0, 0, 1, 1, 1, 2, 2]
    samples = [1, 4, 6]  # as many as the part of a prompt below
    hidden = torch.randn(NUM_ROWS, HIDDEN)
    set_rows(manager, tokens, [tokens[row] for row in samples])
    for asked, rows in ((hidden[torch.tensor(samples)], samples), (hidden[3:6], [3, 4, 5])):
        found = model.compute_logits(asked)
        for row, logits in zip(rows, found, strict=True):
            expected = 2 * hidden[row] @ (weight.T + deltas[tokens[row]])
            np.testing.assert_allclose(logits, expected, atol=ATOL["float32"])
