"""Reading an adapter folder into the factors that layers use."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adapters import LoraModule, open_artifact
from adapters.errors import AdapterMismatchError
from adapters.limits import MAX_LORA_RANK
from adapters.tensors import Array
from adapters.validation import checked_tensors
from rora_serve.engine.ragged_layers import Factors


@dataclass(frozen=True)
class Target:
    """A place in the running model that an adapter's module can match.

    Args:
        layer: name of vLLM's layer.
        start: first output column of the module in that layer.
        in_features, out_features: of the module.
    """

    layer: str
    start: int
    in_features: int
    out_features: int


def load_factors(
    folder: Path, targets: Mapping[str, Target], *, rename: Callable[[str], str]
) -> dict[str, tuple[Factors, ...]]:
    """Read an adapter and lay it out by layer.

    Args:
        folder: an adapter folder.
        targets: by vLLM's path of a module.
        rename: from the Hugging Face model's path of a module to vLLM's.
    Returns: the factors of each layer that the adapter touches.

    Raises:
        ArtifactError: the folder breaks the format, or its numbers could not be served.
        AdapterMismatchError: a module that the running model lacks or whose sizes differ, or a rank
            above 512; all are named, and nothing is loaded.
    Cost: reads the adapter once.
    """
    artifact = open_artifact(folder)
    renamed = {name: rename(name) for name in artifact.modules}
    problems = [
        problem
        for name, module in artifact.modules.items()
        if (problem := _mismatch(module, targets.get(renamed[name]))) is not None
    ]
    if problems:
        shown = "; ".join(problems[:5])
        more = f"; and {len(problems) - 5} more modules" if len(problems) > 5 else ""
        raise AdapterMismatchError(f"the adapter does not fit the base model: {shown}{more}")
    by_layer: dict[str, list[Factors]] = {}
    for module, lora_a, lora_b in checked_tensors(artifact):
        target = targets[renamed[module.name]]
        factors = Factors(_to_torch(lora_a), _to_torch(lora_b), module.scaling, target.start)
        by_layer.setdefault(target.layer, []).append(factors)
    return {layer: tuple(factors) for layer, factors in by_layer.items()}


def _mismatch(module: LoraModule, target: Target | None) -> str | None:
    if module.kind == "embedding":
        return f"{module.name}: adapters of embeddings are not served yet"
    if target is None:
        return f"{module.name}: the base model has no such linear layer"
    if (module.in_features, module.out_features) != (target.in_features, target.out_features):
        return (
            f"{module.name}: the adapter is for [{module.out_features}, {module.in_features}], the "
            f"base model has [{target.out_features}, {target.in_features}]"
        )
    if module.rank > MAX_LORA_RANK:
        return f"{module.name}: rank {module.rank}, at most {MAX_LORA_RANK} is served"
    return None


def _to_torch(array: Array) -> Tensor:
    if array.dtype.name == "bfloat16":  # ml_dtypes' type, which torch does not know
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
