"""Trained layers -> adapter folder, proved: read from disk again, it computes what was trained."""

import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from adapters import AdapterConfig, open_artifact, validate, weights_digest, write_artifact
from adapters.errors import TrainingError
from adapters.patterns import targeted
from adapters.problems import describe
from trainer.config import TrainConfig
from trainer.data import Sample
from trainer.inject import adapters_off, load_factors
from trainer.lora_linear import LoraLinear
from trainer.model import BaseModel
from trainer.probe import make_probe, probe_prompts, prompt_log_probs

# The same kernels on the same numbers; sums may be formed in another order by chance of memory.
_REPRODUCED = 1e-4


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
    base: BaseModel,
    layers: Mapping[str, LoraLinear],
    *,
    provenance: dict[str, Any],
    samples: Sequence[Sample],
) -> str:
    """Write the adapter folder with its probe and return its weights digest.

    The folder is read from disk again, by the rules that PEFT applies, and must give the trained
    layers' log-probs; only then it gets its name. A folder of that name is replaced.
    Args: samples: that it was trained on, for the probe. provenance: gains `probe`.
    Raises: TrainingError: the adapter would do nothing, its numbers are not finite, or what is on
        disk does not compute what was trained.
    """
    factors = {
        name: (layer.lora_a.detach().cpu().numpy(), layer.lora_b.detach().cpu().numpy())
        for name, layer in layers.items()
        if layer.rank
    }
    prompts = probe_prompts(base, samples)
    provenance["probe"], trained = make_probe(base, layers, prompts)
    unproved = folder.with_name(f".{folder.name}-unproved")
    shutil.rmtree(unproved, ignore_errors=True)
    write_artifact(unproved, config, factors, provenance=provenance)
    try:
        problems = validate(unproved).problems
        if problems:
            raise TrainingError(
                f"the trained adapter is not one to keep: {describe(problems)}; train for more "
                "steps or with another train.learning_rate"
            )
        _check_reproduced(unproved, base, layers, prompts, trained)
        digest = weights_digest(open_artifact(unproved))
        shutil.rmtree(folder, ignore_errors=True)
        unproved.rename(folder)
    finally:
        shutil.rmtree(unproved, ignore_errors=True)
    return digest


def _check_reproduced(
    folder: Path,
    base: BaseModel,
    layers: Mapping[str, LoraLinear],
    prompts: Sequence[tuple[int, ...]],
    trained: Sequence[torch.Tensor],
) -> None:
    """Raises: TrainingError: the folder's files do not give the log-probs `trained`."""
    with adapters_off(layers):  # puts the trained scalings back at the end
        weights = {name: (layer.lora_a.data, layer.lora_b.data) for name, layer in layers.items()}
        for layer in layers.values():
            # Whatever the file leaves out stays out.
            layer.lora_a.data, layer.lora_b.data = (
                torch.full_like(weight.data, torch.nan) for weight in (layer.lora_a, layer.lora_b)
            )
        try:
            load_factors(layers, open_artifact(folder))
            reloaded = prompt_log_probs(base.model, prompts)
        finally:
            for name, layer in layers.items():
                layer.lora_a.data, layer.lora_b.data = weights[name]
    # Not Python's max, which passes over NaN.
    difference = float((torch.stack(list(trained)) - torch.stack(reloaded)).abs().max())
    if not difference <= _REPRODUCED:
        raise TrainingError(
            f"{folder}: read from disk again the adapter's log-probs differ by {difference:.2g} "
            f"from those of the trained layers, at most {_REPRODUCED} is expected; nothing is kept "
            "but the checkpoint. Please report this"
        )


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
