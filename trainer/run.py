"""A training run from its settings to a proved adapter folder; and going on with one that stopped.

Owns the run's folder: config.json, log.jsonl, checkpoints/, adapter/, report.html.
"""

import hashlib
import os
import sys
from array import array
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from adapters import AdapterConfig, resolve_scalings
from adapters.base_model import fingerprint
from adapters.digest import canonical_json
from adapters.errors import ConfigError, RoraError
from adapters.writer import replace_file, write_provenance
from trainer.checkpoint import TrainingState, load_checkpoint
from trainer.config import TrainConfig
from trainer.data import tokenize
from trainer.dataset import TrainingData, load_data
from trainer.distributed import Processes
from trainer.evaluate import compared, evaluate_both
from trainer.export import adapter_config, export, peft_targets, provenance
from trainer.inject import check_ranks, inject, target_modules
from trainer.log import LOG_FILE, LogWriter, read_log
from trainer.loop import EVAL_BATCH_TOKENS, Run, run_steps
from trainer.lora_linear import LoraLinear
from trainer.loss import ModelLoss, drops_out, find_model_loss
from trainer.model import BaseModel
from trainer.optim import RankAdamW, default_learning_rate
from trainer.report import write_report
from trainer.tracking import open_trackers

ADAPTER_FOLDER = "adapter"
CONFIG_FILE = "config.json"
ALONE = Processes()


def check_output(output: Path) -> None:
    """Refuse an output folder that can not be used, before any time is spent.

    Raises: ConfigError: it holds something already, or something above it is no folder.
    """
    if (output / CONFIG_FILE).exists() and (output / LOG_FILE).exists():
        raise ConfigError(
            f"output: {output} holds a run already, a new or empty folder is expected; go on with "
            f"it by `rora-train resume {output}`, or choose another"
        )
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


def read_run_config(run_folder: Path) -> TrainConfig:
    """Return the settings of a run that was begun.

    Raises: ConfigError: the folder is no run's.
    """
    path = run_folder / CONFIG_FILE
    try:
        return TrainConfig.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"{run_folder}: no {CONFIG_FILE} in it, the output folder of a run is expected"
        ) from None
    except (OSError, ValidationError) as error:
        raise ConfigError(f"{path}: not the settings of a run ({error})") from error


def train(config: TrainConfig, base: BaseModel, processes: Processes = ALONE) -> Path:
    """Train one adapter and return its folder, `config.output`/adapter.

    The same settings, data and base model on the same machine with the same threads give the same
    weights, also when the run was stopped and resumed.
    Raises: TrainingError: a loss or a weight is not finite, the adapter would do nothing, or what
        was written does not compute what was trained.
    """
    if processes.is_first:
        check_output(config.output)
    config = _with_learning_rate(config)
    data = load_data(config, base.tokenizer)
    if processes.is_first:
        config.output.mkdir(parents=True, exist_ok=True)
        text = _from_anywhere(config).model_dump_json(indent=2) + "\n"
        replace_file(config.output / CONFIG_FILE, text.encode())
    return _run(config, base, data, processes)


def resume(run_folder: Path, base: BaseModel, processes: Processes = ALONE) -> Path:
    """Go on with a run where its last checkpoint stands and return the adapter's folder.

    Raises: ConfigError, DataError, TrainingError: as `train`; or settings, data or base model are
        not those that the run began with.
    """
    config = read_run_config(run_folder).model_copy(update={"output": run_folder})
    rows = read_log(run_folder)
    if rows and "finished" in rows[-1]:
        print(f"{run_folder}: finished already", file=sys.stderr)
        return run_folder / ADAPTER_FOLDER
    return _run(config, base, load_data(config, base.tokenizer), processes)


def _run(config: TrainConfig, base: BaseModel, data: TrainingData, processes: Processes) -> Path:
    base_fingerprint = fingerprint(base.folder)
    model_loss, layers, description = _prepare(config, base, data, processes)
    optimizer = RankAdamW(layers, weight_decay=config.train.weight_decay)
    digest = _run_digest(config, data, base_fingerprint)
    state = load_checkpoint(config.output, optimizer, run_digest=digest)
    state = state or TrainingState(run_digest=digest)
    log = None
    if processes.is_first:
        trackers = open_trackers(config.tracking, config.output, config.model_dump_json())
        log = LogWriter(config.output, trackers, after_step=state.step)
    run = Run(
        config=config,
        folder=config.output,
        loss=model_loss,
        samples=data.samples,
        eval_samples={
            name: [tokenize(example, base.tokenizer) for example in examples]
            for name, examples in data.eval_sets.items()
        },
        optimizer=optimizer,
        state=state,
        processes=processes,
        log=log,
    )
    folder = config.output / ADAPTER_FOLDER
    try:
        if log is not None:
            _say_what_runs(run, data)
            log.samples(len(data.samples))
        run_steps(run)
        if log is not None:
            _finish(run, data, description, base_fingerprint)
            log.finished()
    except RoraError as error:
        if log is not None:
            log.failed(str(error))
            write_report(config.output, folder)
        raise
    except KeyboardInterrupt:
        if log is not None:
            print(
                f"stopped after step {state.step}; `rora-train resume {config.output}` goes on",
                file=sys.stderr,
            )
        raise
    finally:
        if log is not None:
            log.close()
    return folder


def _prepare(
    config: TrainConfig, base: BaseModel, data: TrainingData, processes: Processes
) -> tuple[ModelLoss, dict[str, LoraLinear], AdapterConfig]:
    """Put fresh layers into the model; the seed alone decides their weights."""
    settings = config.train
    torch.use_deterministic_algorithms(mode=True, warn_only=base.model.device.type != "cpu")
    # That mode also fills all fresh memory, which only helps code that reads what it never wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    model_loss, why_padded = find_model_loss(base, data.samples, packing=settings.packing)
    if why_padded is not None and processes.is_first:
        print(f"samples are padded, not packed: {why_padded}", file=sys.stderr)
    random_in_training = (
        config.adapter.dropout > 0 or settings.neftune_alpha > 0 or drops_out(base.model)
    )
    model_loss = replace(
        model_loss,
        # What is shared must be alike in all samples.
        shares_prefix=model_loss.shares_prefix and not random_in_training,
        neftune_alpha=settings.neftune_alpha,
    )
    if settings.gradient_checkpointing:
        if not base.model.supports_gradient_checkpointing:
            raise ConfigError("train.gradient_checkpointing: this base model does not support it")
        base.model.gradient_checkpointing_enable({"use_reentrant": False})
    modules = target_modules(base.model, config.adapter.target_modules)
    description = adapter_config(config, base.name, peft_targets(base, list(modules)))
    check_ranks(modules, description)
    layers = inject(
        base.model,
        modules,
        description,
        dropout=config.adapter.dropout,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    return model_loss, layers, description


def _finish(
    run: Run, data: TrainingData, description: AdapterConfig, base_fingerprint: str
) -> None:
    """Export and prove the adapter, measure it, and draw the report."""
    assert run.log is not None
    config, base, state = run.config, run.loss.base, run.state
    metrics: dict[str, Any] = {
        "train_loss": state.smoothed_loss,
        "num_steps": state.step,
        "num_tokens": state.num_tokens,
        "seconds": round(state.seconds, 1),
    }
    if state.best_step is not None:
        metrics |= {"best_step": state.best_step, "best_eval_loss": state.best_loss}
    origin = provenance(
        config,
        base,
        base_fingerprint=base_fingerprint,
        data_sha256=data.data_sha256,
        metrics=metrics,
    )
    folder = config.output / ADAPTER_FOLDER
    layers = run.optimizer.layers
    digest = export(folder, description, base, layers, provenance=origin, samples=run.samples)
    print(f"weights sha256:{digest}", file=sys.stderr)
    # After the export: whoever stops a long evaluation keeps the adapter.
    if data.eval_sets:
        metrics["eval_sets"] = _evaluate_sets(run, data)
        run.log.evaluation(metrics["eval_sets"])
        write_provenance(folder, origin)
    write_report(config.output, folder)


def _evaluate_sets(run: Run, data: TrainingData) -> dict[str, Any]:
    """Measure every held-out set with and without the adapter."""
    results = {}
    for name, examples in data.eval_sets.items():
        adapter, alone = evaluate_both(
            run.loss,
            examples,
            run.optimizer.layers,
            batch_tokens=run.batch_tokens(EVAL_BATCH_TOKENS),
        )
        results[name] = {"adapter": asdict(adapter), "base": asdict(alone)}
        print(f"held out, {name}: {compared(adapter, alone)}", file=sys.stderr)
    return results


def _with_learning_rate(config: TrainConfig) -> TrainConfig:
    """Return the settings with a number for `auto`."""
    if config.train.learning_rate != "auto":
        return config
    every = "any module"
    of_each = resolve_scalings(adapter_config(config, "", [every]), [every])[every]
    settings = {"learning_rate": default_learning_rate(of_each.rank, of_each.scaling)}
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})


def _from_anywhere(config: TrainConfig) -> TrainConfig:
    """Return the settings with absolute paths, so that a run can be resumed from any folder."""

    def absolute(source: str | None) -> str | None:
        is_local = source is not None and Path(source).exists()
        return str(Path(source or "").absolute()) if is_local else source

    data = config.data
    sets: Any = data.eval
    sets = (
        {name: absolute(source) for name, source in sets.items()}
        if isinstance(sets, dict)
        else absolute(sets)
    )
    return config.model_copy(
        update={
            "data": data.model_copy(update={"train": absolute(data.train), "eval": sets}),
            "model": absolute(config.model),
            "output": config.output.absolute(),
        }
    )


def _run_digest(config: TrainConfig, data: TrainingData, base_fingerprint: str) -> str:
    """Return a digest of all that decides the weights: settings, samples and base model."""
    settings = config.model_dump(mode="json", include={"adapter", "train"})
    settings["train"].pop("checkpoint_steps")
    digest = hashlib.sha256(canonical_json(settings) + base_fingerprint.encode())
    for samples in (data.samples, *data.eval_sets.values()):
        digest.update(str(len(samples)).encode())
    for sample in data.samples:
        digest.update(array("q", (*sample.token_ids, -1, *sample.loss_places, -2)).tobytes())
    return digest.hexdigest()


def _say_what_runs(run: Run, data: TrainingData) -> None:
    config, base, layers = run.config, run.loss.base, run.optimizer.layers.values()
    num_parameters = sum(layer.lora_a.numel() + layer.lora_b.numel() for layer in layers)
    shared = " (common prefix once)" if run.loss.shares_prefix else ""
    print(
        f"{config.adapter.method} of rank {config.adapter.rank} on {len(layers)} modules of "
        f"{base.name} ({num_parameters / 1e6:.2f} M parameters), {len(run.samples)} samples, "
        f"{'packed' if run.loss.packs else 'padded'}{shared}, "
        f"learning rate {config.train.learning_rate:g}, "
        f"{base.model.dtype} on {base.model.device.type}".replace("torch.", ""),
        file=sys.stderr,
    )
    for remark in data.remarks():
        print(remark, file=sys.stderr)
    if run.processes.count > 1:
        print(f"{run.processes.count} processes", file=sys.stderr)
    if run.state.step:
        print(f"going on after step {run.state.step}", file=sys.stderr)
