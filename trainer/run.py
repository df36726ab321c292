"""A training run from its settings to a proved adapter folder; and going on with one that stopped.

Owns the order of things; the loop itself is loop.py's.
"""

import hashlib
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from adapters import AdapterConfig, validate
from adapters.base_model import fingerprint
from adapters.digest import canonical_json
from adapters.errors import ConfigError, RoraError
from adapters.writer import write_provenance
from trainer.allocation import check_num_moved, set_apart, trained_config
from trainer.allocation_record import history_of
from trainer.checkpoint import TrainingState, load_checkpoint, newest_checkpoint
from trainer.config import TrainConfig
from trainer.data import Sample
from trainer.dataset import TrainingData, load_data
from trainer.distributed import Processes
from trainer.evaluate import compared, evaluate_both
from trainer.export import adapter_config, export, peft_targets, provenance
from trainer.inject import check_ranks, inject, target_modules
from trainer.log import LogWriter, read_log
from trainer.loop import EVAL_BATCH_TOKENS, Run, plan_with_rounds, run_steps
from trainer.lora_linear import LoraLinear
from trainer.loss import ModelLoss
from trainer.model import BaseModel, max_positions
from trainer.module_grid import grid_in_words
from trainer.optim import RankAdamW
from trainer.report import write_report
from trainer.run_folder import (
    check_output,
    owned,
    read_run_config,
    with_learning_rate,
    write_run_config,
)
from trainer.tracking import open_trackers
from trainer.trial import find_model_loss

ADAPTER_FOLDER = "adapter"
ALONE = Processes()


def train(config: TrainConfig, base: BaseModel, processes: Processes = ALONE) -> Path:
    """Train one adapter and return its folder, `config.output`/adapter.

    The same settings, data and base model on the same machine with the same threads give the same
    weights, also when the run was stopped and resumed.
    Raises: TrainingError: a loss or a weight is not finite, the adapter would do nothing, or what
        was written does not compute what was trained.
    """
    if processes.is_first:
        check_output(config.output)
    config = with_learning_rate(config)
    with owned(config.output) if processes.is_first else nullcontext():
        return _run(config, base, processes, begins=True)


def resume(run_folder: Path, base: BaseModel, processes: Processes = ALONE) -> Path:
    """Go on with a run where its last checkpoint stands and return the adapter's folder.

    Raises: ConfigError, DataError, TrainingError: as `train`; or settings, data or base model are
        not those that the run began with.
    """
    config = read_run_config(run_folder).model_copy(update={"output": run_folder})
    rows = read_log(run_folder)
    if rows and "finished" in rows[-1]:
        folder = run_folder / ADAPTER_FOLDER
        if folder.exists() and not validate(folder).problems:
            print(f"{run_folder}: finished already", file=sys.stderr)
            return folder
        print(f"{run_folder}: finished, but without a whole adapter; again", file=sys.stderr)
    with owned(run_folder) if processes.is_first else nullcontext():
        return _run(config, base, processes, begins=False)


def _run(config: TrainConfig, base: BaseModel, processes: Processes, *, begins: bool) -> Path:
    data = load_data(config, base.tokenizer, max_positions=max_positions(base.model))
    samples, score_samples = set_apart(config, data.samples)
    base_fingerprint = fingerprint(base.folder)
    model_loss, layers, description = _prepare(config, base, data, processes)
    optimizer = RankAdamW(layers, weight_decay=config.train.weight_decay)
    plan, allocation = plan_with_rounds(
        config, samples, score_samples, num_modules=len(layers), packed=model_loss.packs
    )
    origin = _origin(config, data, base_fingerprint, model_loss)
    state = None if begins else load_checkpoint(config.output, optimizer, origin=origin)
    state = state or TrainingState(origin)
    processes.agree(origin | {"the step": str(state.step)})
    log = None
    if processes.is_first:
        if begins:
            write_run_config(config)
        trackers = open_trackers(config.tracking, config.output, config.model_dump_json())
        log = LogWriter(config.output, trackers, after_step=state.step, is_pending=state.is_pending)
    run = Run(
        config=config,
        folder=config.output,
        loss=model_loss,
        samples=samples,
        eval_samples=data.eval_samples,
        optimizer=optimizer,
        state=state,
        processes=processes,
        log=log,
        plan=plan,
        allocation=allocation,
    )
    with _told(run):
        _say_what_runs(run, data)
        run_steps(run)
        _finish(run, data, description, base_fingerprint)
    return config.output / ADAPTER_FOLDER


@contextmanager
def _told(run: Run) -> Iterator[None]:
    """Write into the log how the block ended, and close it."""
    if run.log is None:
        yield
        return
    try:
        yield
        run.log.finished()
    except KeyboardInterrupt:
        kept = newest_checkpoint(run.folder)
        where = f"from {kept.stem}" if kept is not None else "from the beginning"
        print(
            f"stopped after step {run.state.step}; `rora-train resume {run.folder}` goes on "
            f"{where}",
            file=sys.stderr,
        )
        raise
    except Exception as error:
        is_ours = isinstance(error, RoraError)
        with suppress(RoraError, OSError):  # the first error is what counts
            run.log.failed(str(error) if is_ours else f"{type(error).__name__}: {error}")
            write_report(run.folder, run.folder / ADAPTER_FOLDER)
        raise
    finally:
        run.log.close()


def _prepare(
    config: TrainConfig,
    base: BaseModel,
    data: TrainingData,
    processes: Processes,
) -> tuple[ModelLoss, dict[str, LoraLinear], AdapterConfig]:
    """Put fresh layers into the model; the seed alone decides their weights."""
    settings = config.train
    torch.use_deterministic_algorithms(mode=True, warn_only=base.model.device.type != "cpu")
    # That mode also fills all fresh memory, which only helps code that reads what it never wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    longest = max(map(len, chain(data.samples, *data.eval_samples.values())))
    model_loss, why_padded = find_model_loss(base, longest=longest, packing=settings.packing)
    if why_padded is not None and processes.is_first:
        print(f"samples are padded, not packed: {why_padded}", file=sys.stderr)
    draws = config.adapter.dropout > 0 or settings.neftune_alpha > 0
    model_loss = replace(
        model_loss,
        # What is shared must be alike in all samples.
        shares_prefix=model_loss.shares_prefix and not draws,
        neftune_alpha=settings.neftune_alpha,
    )
    if settings.gradient_checkpointing:
        if not base.model.supports_gradient_checkpointing:
            raise ConfigError("train.gradient_checkpointing: this base model does not support it")
        base.model.gradient_checkpointing_enable({"use_reentrant": False})
    modules = target_modules(base.model, config.adapter.target_modules)
    description = adapter_config(config, base.name, peft_targets(base, list(modules)))
    check_ranks(modules, description)
    check_num_moved(config, len(modules))
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
    """Export and prove the adapter, measure it, and draw the report; the first process does."""
    if run.log is None:
        return
    config, base, state = run.config, run.loss.base, run.state
    layers = run.optimizer.layers
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
    if state.rounds:
        description = trained_config(description, layers)
        targets = peft_targets(base, list(description.target_modules))
        description = replace(description, target_modules=tuple(targets))
        metrics["scoring_seconds"] = round(state.scoring_seconds, 1)
        kept_step = state.step if state.best_step is None else state.best_step
        history = history_of(state.rounds, config.adapter.rank, kept_step=kept_step)
        origin["allocation"] = history
        ranks = {name: layer.rank for name, layer in layers.items()}
        num_rounds = history["rounds_in_adapter"]
        title = f"ranks of step {kept_step}, after round {num_rounds} of {len(state.rounds)}:"
        print(grid_in_words(ranks, title), file=sys.stderr)
    folder = config.output / ADAPTER_FOLDER
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


def _origin(
    config: TrainConfig,
    data: TrainingData,
    base_fingerprint: str,
    loss: ModelLoss,
) -> dict[str, str]:
    """Return all that decides the weights, by name, in short."""
    settings = config.model_dump(mode="json", include={"adapter", "allocation", "train"})
    settings["train"].pop("checkpoint_steps")
    return {
        "settings": hashlib.sha256(canonical_json(settings)).hexdigest(),
        "the training data": _samples_digest([data.samples]),
        "the held-out data": _samples_digest(data.eval_samples.values()),
        "the base model": base_fingerprint,
        "the way of computing": f"{loss.base.model.dtype} on {loss.base.model.device.type}, "
        f"packed {loss.packs}, prefix {loss.shares_prefix}, torch {version('torch')}, "
        f"transformers {version('transformers')}",
    }


def _samples_digest(sets: Iterable[Sequence[Sample]]) -> str:
    digest = hashlib.sha256()
    for samples in sets:
        digest.update(array("q", [-3, len(samples)]).tobytes())
        for sample in samples:
            digest.update(array("q", (*sample.token_ids, -1, *sample.loss_places, -2)).tobytes())
    return digest.hexdigest()


def _say_what_runs(run: Run, data: TrainingData) -> None:
    if run.log is None:
        return
    run.log.samples(len(run.samples))
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
    if run.allocation is not None:
        print(f"allocation: {run.allocation.in_words()}", file=sys.stderr)
    for remark in data.remarks():
        print(remark, file=sys.stderr)
    if run.processes.count > 1:
        print(f"{run.processes.count} processes", file=sys.stderr)
    if run.state.step:
        print(f"going on after step {run.state.step}", file=sys.stderr)
