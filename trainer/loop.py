"""The training loop, top to bottom: data -> batches -> steps -> adapter folder."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from adapters import AdapterConfig
from adapters.base_model import fingerprint
from adapters.errors import ConfigError, TrainingError
from adapters.writer import write_provenance
from trainer.batching import Batch, make_batch, plan_epoch
from trainer.config import TrainConfig
from trainer.data import Example
from trainer.dataset import TrainingData, load_data
from trainer.evaluate import Evaluation, compared, evaluate
from trainer.export import adapter_config, export, peft_targets, provenance
from trainer.inject import adapters_off, check_ranks, inject, target_modules
from trainer.lora_linear import LoraLinear
from trainer.loss import mean_loss
from trainer.model import BaseModel
from trainer.optim import learning_rate_factor

ADAPTER_FOLDER = "adapter"
LOG_FILE = "log.jsonl"
CONFIG_FILE = "config.json"
EVAL_BATCH_TOKENS = 2048


def check_output(output: Path) -> None:
    """Refuse an output folder that can not be used, before any time is spent.

    Raises: ConfigError: it holds something already, or something above it is no folder.
    """
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(
            f"output: {output} holds something already, a new or empty folder is expected; "
            "choose another or remove it"
        )
    standing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise ConfigError(
            f"output: {output} can not be made, {standing} is no folder that can be written; "
            "choose another"
        )


def train(config: TrainConfig, base: BaseModel) -> Path:
    """Train one adapter and return its folder, `config.output`/adapter.

    Writes config.json and log.jsonl beside it while it runs. The same configuration, seed, machine
    and thread count give the same weights.
    Raises: TrainingError: a loss or a weight is not finite, or the adapter would do nothing.
    """
    check_output(config.output)
    config.output.mkdir(parents=True, exist_ok=True)
    data = load_data(config, base.tokenizer)
    layers, description = _prepare(config, base)
    base_fingerprint = fingerprint(base.folder)
    (config.output / CONFIG_FILE).write_text(config.model_dump_json(indent=2) + "\n")
    _say_what_runs(config, base, data, layers)
    with (config.output / LOG_FILE).open("x", encoding="utf-8") as log:
        origin = provenance(
            config,
            base,
            base_fingerprint=base_fingerprint,
            data_sha256=data.data_sha256,
            metrics=_run_steps(config, base, data, layers, log),
        )
        folder = config.output / ADAPTER_FOLDER
        digest = export(folder, description, layers, provenance=origin)
        print(f"weights sha256:{digest}", file=sys.stderr)
        # After the export: whoever stops a long evaluation keeps the adapter.
        if data.eval_sets:
            origin["training"]["metrics"] |= _evaluate_both(config, base, data, layers, log)
            write_provenance(folder, origin)
    return folder


def _prepare(config: TrainConfig, base: BaseModel) -> tuple[dict[str, LoraLinear], AdapterConfig]:
    """Put fresh layers into the model; the seed alone decides their weights."""
    torch.manual_seed(config.train.seed)  # dropout's source
    torch.use_deterministic_algorithms(mode=True, warn_only=base.model.device.type != "cpu")
    modules = target_modules(base.model, config.adapter.target_modules)
    description = adapter_config(config, base.name, peft_targets(base, list(modules)))
    check_ranks(modules, description)
    layers = inject(
        base.model,
        modules,
        description,
        dropout=config.adapter.dropout,
        generator=torch.Generator().manual_seed(config.train.seed),
    )
    return layers, description


def _run_steps(
    config: TrainConfig,
    base: BaseModel,
    data: TrainingData,
    layers: dict[str, LoraLinear],
    log: TextIO,
) -> dict[str, Any]:
    settings = config.train
    batches = list(_plan(config, data))
    parameters = [weight for layer in layers.values() for weight in (layer.lora_a, layer.lora_b)]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    base.model.train()
    started = time.perf_counter()
    num_tokens, smoothed = 0, math.nan
    progress = tqdm(total=len(batches), desc="training", unit="step", file=sys.stderr)
    for step, (epoch, indices) in enumerate(batches):
        batch = make_batch(
            [data.samples[index] for index in indices], pad_token_id=base.pad_token_id
        )
        learning_rate = settings.learning_rate * learning_rate_factor(
            step,
            num_steps=len(batches),
            warmup_ratio=settings.warmup_ratio,
            schedule=settings.schedule,
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        loss, gradient_norm = _step(base, batch, optimizer, parameters, settings.max_grad_norm)
        if not math.isfinite(loss) or not math.isfinite(gradient_norm):
            progress.close()
            raise TrainingError(
                f"step {step + 1}: loss {loss}, gradient norm {gradient_norm}, finite numbers are "
                "expected; try a lower train.learning_rate"
            )
        num_tokens += batch.num_tokens
        seconds = time.perf_counter() - started
        smoothed = loss if math.isnan(smoothed) else 0.9 * smoothed + 0.1 * loss
        progress.set_postfix_str(
            f"loss {smoothed:.3f}, {num_tokens / seconds:.0f} tok/s", refresh=False
        )
        progress.update()
        _log(
            log,
            step=step + 1,
            epoch=epoch,
            loss=loss,
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            num_tokens=batch.num_tokens,
            seconds=round(seconds, 3),
        )
    progress.close()
    return {"train_loss": smoothed, "num_steps": len(batches)}


def _step(
    base: BaseModel,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    max_grad_norm: float,
) -> tuple[float, float]:
    """Take one step; return loss and gradient norm before clipping."""
    optimizer.zero_grad(set_to_none=True)
    loss = mean_loss(base.model, batch)
    loss.backward()
    gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    return float(loss.detach()), float(gradient_norm)


def _plan(config: TrainConfig, data: TrainingData) -> Iterator[tuple[float, list[int]]]:
    """Yield (passes over the data so far, indices of a batch) for the whole run."""
    lengths = [len(sample) for sample in data.samples]
    for epoch in range(math.ceil(config.train.epochs)):
        # Distinct for every seed and epoch.
        plan = plan_epoch(
            lengths,
            batch_tokens=config.train.batch_tokens,
            seed=config.train.seed * 1_000_003 + epoch,
        )
        share = min(1.0, config.train.epochs - epoch)
        for position, indices in enumerate(plan[: math.ceil(share * len(plan))], start=1):
            yield round(epoch + position / len(plan), 4), indices


def _evaluate_both(
    config: TrainConfig,
    base: BaseModel,
    data: TrainingData,
    layers: dict[str, LoraLinear],
    log: TextIO,
) -> dict[str, Any]:
    """Measure the held-out sets with and without the adapter."""
    # Nothing is kept for a backward pass, so more fits than in a step.
    batch_tokens = max(config.train.batch_tokens, EVAL_BATCH_TOKENS)
    measured: dict[str, Any] = {}
    for name, examples in data.eval_sets.items():
        adapter, alone = evaluate_both(base, examples, layers, batch_tokens=batch_tokens)
        measured[name] = {"adapter": asdict(adapter), "base": asdict(alone)}
        _log(log, evaluation={"set": name, **measured[name]})
        print(f"held out, {name}: {compared(adapter, alone)}", file=sys.stderr)
    return {"eval_sets": measured}


def evaluate_both(
    base: BaseModel,
    examples: Sequence[Example],
    layers: dict[str, LoraLinear],
    *,
    batch_tokens: int,
) -> tuple[Evaluation, Evaluation]:
    """Return the evaluation with the adapter in `layers`, and that of the base model alone."""
    with tqdm(total=2 * len(examples), desc="evaluating", unit="sample", file=sys.stderr) as bar:
        adapter = evaluate(base, examples, batch_tokens=batch_tokens, progress=bar.update)
        with adapters_off(layers):
            alone = evaluate(base, examples, batch_tokens=batch_tokens, progress=bar.update)
    return adapter, alone


def _say_what_runs(
    config: TrainConfig, base: BaseModel, data: TrainingData, layers: dict[str, LoraLinear]
) -> None:
    num_parameters = sum(layer.lora_a.numel() + layer.lora_b.numel() for layer in layers.values())
    print(
        f"{config.adapter.method} of rank {config.adapter.rank} on {len(layers)} modules of "
        f"{base.name} "
        f"({num_parameters / 1e6:.2f} M parameters), {len(data.samples)} samples, "
        f"{base.model.dtype} on {base.model.device.type}".replace("torch.", ""),
        *data.remarks(),
        sep="\n",
        file=sys.stderr,
    )


def _log(file: TextIO, **values: Any) -> None:
    file.write(json.dumps(values) + "\n")
    file.flush()
