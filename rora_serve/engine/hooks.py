"""Where our layers hang on vLLM's: behind products or forward; an operator in compiled graphs."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rora_serve.engine.compat import BaseLayer, wrap_head

if TYPE_CHECKING:
    from rora_serve.engine.products import Addition, Product

# Adds the step's deltas to what a layer made of x, in place.
AddDeltas = Callable[[Tensor, Tensor], None]

# torch.compile traces the model once for all batches. To it a layer's step is one operator that
# changes y and is looked at no further; what it does depends on the batch of the moment.
_OPERATORS = torch.library.Library("rora_serve", "DEF")
# By its name, since a graph from vLLM's cache may be older than the order of our layers.
_OPERATORS.define("add_deltas(Tensor x, Tensor(a!) y, str layer) -> ()")
_in_use: dict[str, AddDeltas] = {}


def _add_deltas(x: Tensor, y: Tensor, layer: str) -> None:
    _in_use[layer](x, y)


_OPERATORS.impl("add_deltas", _add_deltas, "CPU")
torch.library.register_fake("rora_serve::add_deltas", lambda *_: None, lib=_OPERATORS)


class LayerHooks:
    """Functions that see what layers got and returned, and change the latter.

    One model a process: the operator knows layers by name.

    Args:
        layers: of the model, each with its function.
        products: of its other layers, each with what is added to it.
    """

    def __init__(
        self,
        layers: Iterable[tuple[BaseLayer, AddDeltas]],
        products: Iterable[tuple["Product", "Addition"]] = (),
    ) -> None:
        _in_use.clear()
        self._products = tuple(products)
        self._classes: list[tuple[nn.Module, type, type]] = []
        for base, add in layers:
            _in_use[base.name] = add
            if base.is_head:
                wrap_head(base.module, add)
            else:
                # Not by a forward hook of torch's, which makes calls slower (docs/decisions/0002).
                plain = type(base.module)
                self._classes.append((base.module, plain, _hooked(plain, base.name, add)))
        self._are_on = False
        self.switch(on=True)

    def switch(self, *, on: bool) -> None:
        """Let layers be vLLM's own or ours; the head always looks by itself.

        Not for a model that is compiled: its graph stays what it was when it was traced.
        """
        if on != self._are_on:
            self._are_on = on
            for module, plain, hooked in self._classes:
                module.__class__ = hooked if on else plain
            for product, addition in self._products:
                product.add(addition if on else None)


def _hooked(layer_class: Any, name: str, add: AddDeltas) -> Any:
    """Return a layer's class with our part behind its forward."""

    def forward(self: Any, x: Tensor, *more: Any, **options: Any) -> Any:
        output = layer_class.forward(self, x, *more, **options)
        y = output[0] if isinstance(output, tuple) else output  # some layers return (output, bias)
        if torch.compiler.is_compiling():
            torch.ops.rora_serve.add_deltas(x, y, name)
        else:
            add(x, y)
        return output

    return type(layer_class.__name__, (layer_class,), {"forward": forward})
