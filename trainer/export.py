"""Trained layers -> adapter folder."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adapters import AdapterConfig, open_artifact, weights_digest, write_artifact
from adapters.errors import TrainingError
from adapters.patterns import targeted
from trainer.config import TrainConfig
from trainer.lora_linear import LoraLinear
from trainer.model import BaseModel


def adapter_config(config: TrainConfig, base_name: str, target_modules: list[str]) -> AdapterConfig:
    """Return what adapter_config.json will say of an adapter with one rank for all modules."""
    return AdapterConfig(
        rank=config.adapter.rank,
        lora_alpha=config.adapter.alpha,
        use_rslora=config.adapter.method == "rora",
        target_modules=tuple(target_modules),
        base_model_name_or_path=base_name,
    )


def peft_targets(base: BaseModel, modules: list[str]) -> list[str]:
    """Return PEFT's `target_modules` for just these modules: last names or, if need be, paths."""
    last_names = sorted({module.rpartition(".")[2] for module in modules})
    matched = targeted(last_names, [name for name, _ in base.model.named_modules()])
    return last_names if matched == set(modules) else sorted(modules)


def export(
    folder: Path,
    config: AdapterConfig,
    layers: dict[str, LoraLinear],
    *,
    provenance: dict[str, Any],
) -> str:
    """Write the adapter folder and return its weights digest.

    Raises: TrainingError: a weight is not finite, or B is zero everywhere, so that the adapter does
        nothing.
    """
    factors = {
        name: (layer.lora_a.detach().cpu().numpy(), layer.lora_b.detach().cpu().numpy())
        for name, layer in layers.items()
    }
    for name, layer in layers.items():
        if not (layer.lora_a.isfinite().all() and layer.lora_b.isfinite().all()):
            raise TrainingError(
                f"{name}: trained weights are not finite; try a lower train.learning_rate"
            )
    if not any(layer.lora_b.any() for layer in layers.values()):
        raise TrainingError(
            "every lora_B is zero, the adapter would do nothing; train for more steps or with a "
            "higher train.learning_rate"
        )
    write_artifact(folder, config, factors, provenance=provenance)
    return weights_digest(open_artifact(folder))


def provenance(
    config: TrainConfig,
    base: BaseModel,
    *,
    base_fingerprint: str,
    data_sha256: str,
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """Return the content of rora.json: where the adapter comes from."""
    return {
        "format": 1,
        "method": config.adapter.method,
        "base_model": {"name": base.name, "fingerprint": base_fingerprint},
        "training": {
            "config": config.model_dump(mode="json"),
            "data_sha256": data_sha256,
            "seed": config.train.seed,
            "metrics": metrics,
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("rora-serve", "torch", "transformers")},
            },
        },
    }
