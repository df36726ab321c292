"""Where our layers hang on vLLM's: forward hooks, and one opaque operator for compiled graphs."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from rora_serve.engine.compat import BaseLayer, wrap_head


class AddDeltas(Protocol):
    """Adds the step's deltas to what layer `index` returned, in place."""

    def __call__(self, x: Tensor, y: Tensor, index: int, *, is_head: bool) -> None:
        """Change `y`."""


# torch.compile traces the model once for all batches. To it a layer's step is one operator that
# changes y and is looked at no further; what it does depends on the batch of the moment.
_OPERATORS = torch.library.Library("rora_serve", "DEF")
# By its name, since a graph from vLLM's cache may be older than the order of our layers.
_OPERATORS.define("add_deltas(Tensor x, Tensor(a!) y, str layer) -> ()")
_in_use: dict[str, Callable[[Tensor, Tensor], None]] = {}


def _add_deltas(x: Tensor, y: Tensor, layer: str) -> None:
    _in_use[layer](x, y)


_OPERATORS.impl("add_deltas", _add_deltas, "CPU")
torch.library.register_fake("rora_serve::add_deltas", lambda *_: None, lib=_OPERATORS)


def hook_layers(layers: list[BaseLayer], add_deltas: AddDeltas) -> None:
    """Let `add_deltas` see each layer's input and output; its index is the place in the list.

    One model a process: the operator knows layers by name.
    """
    _in_use.clear()
    for index, base in enumerate(layers):
        _in_use[base.name] = partial(add_deltas, index=index, is_head=False)
        if isinstance(base.module, LogitsProcessor):
            wrap_head(base.module, _head(add_deltas, index))
        else:
            base.module.register_forward_hook(_hook(_in_use[base.name], base.name))


def _hook(add: Callable[[Tensor, Tensor], None], layer: str) -> Any:
    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output  # some layers return (output, bias)
        if torch.compiler.is_compiling():
            torch.ops.rora_serve.add_deltas(inputs[0], y, layer)
        else:
            add(inputs[0], y)

    return hook


def _head(add_deltas: AddDeltas, index: int) -> Any:
    def hook(hidden: Tensor, logits: Tensor) -> None:
        add_deltas(hidden, logits, index, is_head=True)

    return hook
