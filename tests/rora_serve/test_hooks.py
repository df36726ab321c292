"""Our layers see every layer's input and output, as it stands or in a compiled graph."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rora_serve.engine.compat import BaseLayer
from rora_serve.engine.hooks import AddDeltas, LayerHooks


class Layer(nn.Linear):
    """Returns its bias too, as vLLM's layers do."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 4)
        self.first = Layer(4, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.second(torch.relu(self.first(self.tokens(ids))[0]))
        return found


def hooked(seen: list[tuple[int, int]]) -> tuple[Model, LayerHooks]:
    """A model whose layers all give a little more, by which their order can be told."""
    model = Model()

    def adding(index: int) -> AddDeltas:
        def add(x: Tensor, y: Tensor) -> None:
            seen.append((index, x.shape[0]))
            y += 10.0**-index

        return add

    hooks = LayerHooks(
        (BaseLayer(name, module, "linear", 0, {}), adding(index))
        for index, (name, module) in enumerate(list(model.named_children()))
    )
    return model, hooks


@pytest.mark.parametrize("is_compiled", [False, True])
@torch.no_grad()
def test_each_layers_output_is_changed_in_place(is_compiled: bool) -> None:
    seen: list[tuple[int, int]] = []
    torch.manual_seed(0)
    model, _ = hooked(seen)
    run: Any = torch.compile(model, fullgraph=True, dynamic=True) if is_compiled else model
    for count in (2, 5, 7):
        ids = torch.arange(count)
        hidden = model.tokens.weight[ids] + 1
        hidden = torch.relu(hidden @ model.first.weight.T + model.first.bias + 0.1)
        expected = hidden @ model.second.weight.T + model.second.bias + 0.01
        seen.clear()
        torch.testing.assert_close(run(ids), expected)
        assert seen == [(0, count), (1, count), (2, count)], "once each, whatever the shapes"
    assert isinstance(model.first, Layer)
    assert type(model.first).__name__ == "Layer", "which vLLM's own code may look at"


@torch.no_grad()
def test_layers_are_vllms_own_while_they_are_switched_off() -> None:
    seen: list[tuple[int, int]] = []
    model, hooks = hooked(seen)
    ids = torch.arange(3)
    changed = model(ids)
    hooks.switch(on=False)
    assert type(model.first) is Layer
    seen.clear()
    plain = model(ids)
    assert not seen
    assert not torch.equal(plain, changed)
    hooks.switch(on=True)
    torch.testing.assert_close(model(ids), changed)
