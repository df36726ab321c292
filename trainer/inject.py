"""Putting LoraLinear layers into a model, from settings or from an adapter folder."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters import AdapterArtifact, AdapterConfig, resolve_scalings
from adapters.base_model import fingerprint
from adapters.config import ALL_LINEAR
from adapters.digest import base_claim
from adapters.errors import AdapterMismatchError, ConfigError
from adapters.patterns import check_pattern, targeted
from adapters.problems import describe
from adapters.validation import checked_tensors
from trainer.lora_linear import LoraLinear

# A path or the end of one; anything else is a regular expression.
_NAME = re.compile(r"[\w.-]+")


def target_modules(model: PreTrainedModel, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """Return the linear layers that `targets` names.

    Args: targets: `all-linear`, which is all but the output layer; names of layers, or what their
        paths end with; regular expressions that match whole paths.
    Raises: ConfigError: a target that names no linear layer, or can not be matched.
    """
    linear: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings()
    }
    if targets == (ALL_LINEAR,):
        return linear
    if ALL_LINEAR in targets:
        raise ConfigError(f"adapter.target_modules: {ALL_LINEAR} stands alone, without other names")
    chosen: set[str] = set()
    for target in targets:
        is_name = _NAME.fullmatch(target) is not None
        problem = None if is_name else check_pattern("adapter.target_modules", target)
        if problem is not None:
            raise ConfigError(describe([problem]))
        matched = targeted((target,) if is_name else target, list(linear))
        if not matched:
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"adapter.target_modules: no linear layer matches {target!r}; "
                f"this model has {', '.join(ends)}"
            )
        chosen.update(matched)
    return {name: module for name, module in linear.items() if name in chosen}


def inject(
    model: PreTrainedModel,
    modules: dict[str, nn.Module],
    config: AdapterConfig,
    *,
    dropout: float,
    generator: torch.Generator,
) -> dict[str, LoraLinear]:
    """Freeze `model` and replace each of `modules` by a LoraLinear around it.

    Returns: the new layers by module path, in the model's order.
    """
    sizes = {name: linear_sizes(module) for name, module in modules.items()}
    model.requires_grad_(requires_grad=False)
    layers = {}
    scalings = resolve_scalings(config, list(modules))
    for name, module in modules.items():
        layers[name] = LoraLinear(
            module,
            *sizes[name],
            rank=scalings[name].rank,
            scaling=scalings[name].scaling,
            dropout=dropout,
            generator=generator,
        )
        model.set_submodule(name, layers[name])
    return layers


def check_ranks(modules: dict[str, nn.Module], config: AdapterConfig) -> None:
    """Refuse to train more ranks than a module's weight has.

    Raises: ConfigError: a rank above a module's smaller side.
    """
    scalings = resolve_scalings(config, list(modules))
    for name, module in modules.items():
        in_features, out_features = linear_sizes(module)
        if scalings[name].rank > min(in_features, out_features):
            raise ConfigError(
                f"adapter.rank: {scalings[name].rank} is above "
                f"{min(in_features, out_features)}, the smaller side of {name} "
                f"[{out_features}, {in_features}]; choose a lower rank"
            )


def check_base(adapter: Path, base_folder: Path, base_name: str) -> None:
    """Refuse an adapter that says it was trained on another base model, before one is loaded.

    Raises: AdapterMismatchError: name and fingerprint are another model's.
    """
    claim, found = base_claim(adapter), fingerprint(base_folder)
    if claim is not None and claim.is_of_another(found, [base_name]):
        raise AdapterMismatchError(
            f"{adapter}: was trained on {str(claim.name)!r:.80} with fingerprint "
            f"{claim.fingerprint!s:.12}, {base_name} has {found[:12]}; name its own base model "
            "with --model"
        )


def inject_artifact(model: PreTrainedModel, artifact: AdapterArtifact) -> dict[str, LoraLinear]:
    """Put an adapter folder's weights into `model`, without gradients.

    Raises:
        AdapterMismatchError: a module that the model lacks, or whose sizes differ; all are named.
        ArtifactError: numbers that can not be served.
    """
    available = target_modules(model, (ALL_LINEAR,))
    problems = []
    by_name = dict(model.named_modules())
    head = model.get_output_embeddings()
    for name, module in artifact.modules.items():
        if module.kind == "linear" and head is not None and by_name.get(name) is head:
            problems.append(f"{name} is the output layer, which is not adapted here")
        elif module.kind != "linear" or name not in available:
            problems.append(f"the model has no linear layer {name}")
        elif linear_sizes(available[name]) != (module.in_features, module.out_features):
            problems.append(
                f"{name} is [{module.out_features}, {module.in_features}] in the adapter and "
                f"{list(reversed(linear_sizes(available[name])))} in the model"
            )
    if problems:
        raise AdapterMismatchError(f"{artifact.folder}: {'; '.join(problems)}")
    layers = inject(
        model,
        {name: available[name] for name in available if name in artifact.modules},
        artifact.config,
        dropout=0.0,
        generator=torch.Generator(),
    )
    load_factors(layers, artifact)
    return layers


def load_factors(layers: Mapping[str, LoraLinear], artifact: AdapterArtifact) -> None:
    """Give each layer the factors and the scaling that an adapter folder has for it.

    Raises: ArtifactError: numbers that can not be served.
    """
    for module, lora_a, lora_b in checked_tensors(artifact):
        layer = layers[module.name]
        layer.lora_a.data.copy_(torch.from_numpy(lora_a.astype(np.float32)))
        layer.lora_b.data.copy_(torch.from_numpy(lora_b.astype(np.float32)))
        layer.scaling = module.scaling


@contextmanager
def adapters_off(layers: Mapping[str, LoraLinear]) -> Iterator[None]:
    """Let the model compute as its base inside the block."""
    scalings = {name: layer.scaling for name, layer in layers.items()}
    for layer in layers.values():
        layer.scaling = 0.0
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.scaling = scalings[name]


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear layer."""
    if isinstance(module, Conv1D):  # GPT-2's, whose weight is [in_features, out_features]
        return module.weight.shape[0], module.weight.shape[1]
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features
