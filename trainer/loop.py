"""The training loop, top to bottom: plan -> batches -> steps -> checkpoints."""

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from adapters.errors import TrainingError
from trainer.allocation import Allocation, extra_tokens, plan_rounds
from trainer.allocation_record import all_scores, in_words, record
from trainer.batching import plan_epoch, split_step
from trainer.checkpoint import TrainingState, digest_of, save_checkpoint
from trainer.config import TrainConfig
from trainer.data import Sample
from trainer.distributed import Processes
from trainer.importance import Measure
from trainer.log import LogWriter
from trainer.loss import ModelLoss
from trainer.optim import RankAdamW, learning_rate_factor

# Nothing is kept for a backward pass, so more fits than in a step.
EVAL_BATCH_TOKENS = 2048
_SLOW_SCORES = {"exact", "screened"}


# Of each step: passes over the data after it, and indices of its samples.
Plan = Sequence[tuple[float, Sequence[int]]]


@dataclass
class Run:
    """All that a running training needs.

    Args:
        folder: of the run.
        samples: to train on; eval_samples: held out, by the name of their set.
        optimizer: holds the trained layers; state: where the run stands.
        log: None in all processes but the first.
        plan: every step from the first.
        signals: to stop that this process received.
        allocation: of ranks, if they move.
    """

    config: TrainConfig
    folder: Path
    loss: ModelLoss
    samples: Sequence[Sample]
    eval_samples: Mapping[str, Sequence[Sample]]
    optimizer: RankAdamW
    state: TrainingState
    processes: Processes
    log: LogWriter | None
    plan: Plan = ()
    signals: Sequence[int] = ()
    allocation: Allocation | None = None

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [len(sample) for sample in self.samples]

    @property
    def weights(self) -> list[torch.nn.Parameter]:
        """A and B of every layer."""
        layers = self.optimizer.layers.values()
        return [weight for layer in layers for weight in (layer.lora_a, layer.lora_b)]

    def batch_tokens(self, num_tokens: int) -> int:
        """Return the most tokens of one forward, where `num_tokens` are to be computed."""
        return min(num_tokens, self.config.train.micro_batch_tokens or num_tokens)


def run_steps(run: Run) -> None:
    """Take the run's remaining steps; then the best evaluation's weights, if any, are in place.

    Raises:
        TrainingError: a loss, a gradient or a held-out loss is not finite.
        KeyboardInterrupt: stopped by a signal, after a checkpoint.
    """
    run.loss.base.model.train()
    progress = tqdm(
        total=len(run.plan),
        initial=run.state.step,
        desc="training",
        unit="step",
        file=sys.stderr,
        disable=not run.processes.is_first,
    )
    with progress, _stopped_by_signals() as signals:
        run.signals = signals
        if run.state.is_pending:
            _after_step(run, stops=False)
        while run.state.step < len(run.plan) and not _is_over(run):
            stops = _next_step(run, progress, stop=bool(signals))
            _after_step(run, stops=stops)
        # One that came too late to stop a step.
        if run.processes.any(truth=bool(signals)):
            raise KeyboardInterrupt
    for name, factors in run.state.best_factors.items():
        run.optimizer.layers[name].set_factors(factors)


def _next_step(run: Run, progress: Any, *, stop: bool) -> bool:
    """Take the next step, count and tell it; return whether any process was asked to stop."""
    settings, state = run.config.train, run.state
    assert settings.learning_rate != "auto"
    epoch, indices = run.plan[state.step]
    learning_rate = settings.learning_rate * learning_rate_factor(
        state.step,
        num_steps=len(run.plan),
        warmup_ratio=settings.warmup_ratio,
        schedule=settings.schedule,
    )
    started = time.perf_counter()
    loss, gradient_norm, stops = take_step(run, indices, learning_rate, stop=stop)
    num_tokens = sum(run.lengths[index] for index in indices)
    state.seconds += time.perf_counter() - started
    state.step += 1
    state.num_tokens += num_tokens
    previous = loss if state.smoothed_loss is None else state.smoothed_loss
    state.smoothed_loss = 0.9 * previous + 0.1 * loss
    if run.log is not None:
        run.log.step(
            step=state.step,
            epoch=epoch,
            loss=loss,
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            num_tokens=num_tokens,
            seconds=round(state.seconds, 3),
        )
    speed = state.num_tokens / state.seconds
    progress.set_postfix_str(f"loss {state.smoothed_loss:.3f}, {speed:.0f} tok/s", refresh=False)
    progress.update()
    return stops


def _after_step(run: Run, *, stops: bool) -> None:
    """Move ranks, evaluate and write a checkpoint where they are due."""
    settings, state = run.config.train, run.state
    is_last = state.step == len(run.plan)
    _move_ranks_if_due(run, stops=stops)
    evaluates = settings.eval_steps is not None and bool(run.eval_samples)
    if evaluates and (is_last or state.step % (settings.eval_steps or 1) == 0):
        evaluate_step(run)
    if is_last or stops or _is_over(run) or state.step % settings.checkpoint_steps == 0:
        _write_checkpoint(run)
    if stops:
        raise KeyboardInterrupt


def _write_checkpoint(run: Run) -> None:
    if run.processes.count > 1:  # alone there is nothing to hash them for
        run.processes.agree({"the weights": digest_of(run.weights)})
    if run.processes.is_first:
        save_checkpoint(run.folder, run.state, run.optimizer)
    run.processes.wait()


def _move_ranks_if_due(run: Run, *, stops: bool) -> None:
    allocation, state = run.allocation, run.state
    if allocation is not None and allocation.is_due(state.step, len(state.rounds)):
        if run.config.allocation.score in _SLOW_SCORES:
            # So that a run that is stopped meanwhile goes on from here.
            state.is_pending = True
            _write_checkpoint(run)
            if stops:
                raise KeyboardInterrupt
        move_ranks(run, allocation)
    state.is_pending = False


def take_step(
    run: Run, indices: Sequence[int], learning_rate: float, *, stop: bool = False
) -> tuple[float, float, bool]:
    """Train on the samples `indices`, shared between the processes.

    The loss is the mean over all tokens with loss of the step, however it is split into batches
    and processes.
    Args: stop: this process was asked to stop.
    Returns: loss; gradient norm before clipping; whether any process was asked to stop.
    Raises: TrainingError: loss or gradient norm is not finite; no weight was changed.
    """
    settings, state, processes = run.config.train, run.state, run.processes
    # Random numbers of a step follow from the seed, the step and the process: a resumed run has
    # the same ones.
    torch.manual_seed((settings.seed * 1_000_003 + state.step) * 1_009 + processes.rank)
    num_loss = sum(len(run.samples[index].loss_places) for index in indices)
    share = split_step(
        indices,
        run.lengths,
        num_processes=processes.count,
        max_tokens=run.batch_tokens(settings.batch_tokens),
        packed=run.loss.packs,
    )[processes.rank]
    for weight in run.weights:
        weight.grad = None
    total = torch.zeros(2, device=run.loss.base.model.device)
    for batch_indices in share:
        batch = run.loss.make_batch([run.samples[index] for index in batch_indices])
        loss = run.loss.token_losses(batch).sum() / num_loss
        loss.backward()
        total[0] += loss.detach()
    total[1] += stop
    gradients = [_gradient(weight) for weight in run.weights]
    processes.sum([*gradients, total])
    gradient_norm = float(torch.nn.utils.clip_grad_norm_(run.weights, settings.max_grad_norm))
    loss_value = float(total[0])
    if not math.isfinite(loss_value) or not math.isfinite(gradient_norm):
        raise TrainingError(
            f"step {state.step + 1}: loss {loss_value}, gradient norm {gradient_norm}, finite "
            "numbers are expected; try a lower train.learning_rate"
        )
    run.optimizer.step(learning_rate)
    return loss_value, gradient_norm, bool(total[1])


def evaluate_step(run: Run) -> None:
    """Measure the loss on every held-out set; keep the weights if their mean is the best so far."""
    losses = {name: _held_out_loss(run, samples) for name, samples in run.eval_samples.items()}
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise TrainingError(
                f"step {run.state.step}: the held-out loss of {name} is {loss}, a finite number is "
                "expected; try a lower train.learning_rate"
            )
    state, mean = run.state, sum(losses.values()) / len(losses)
    is_best = state.best_loss is None or mean < state.best_loss
    if is_best:
        state.best_loss, state.best_step, state.num_worse = mean, state.step, 0
        state.best_factors = {name: layer.factors for name, layer in run.optimizer.layers.items()}
    else:
        state.num_worse += 1
    if run.log is not None:
        run.log.evaluation_in_training(state.step, losses, best=is_best)
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        tqdm.write(
            f"step {state.step}: held-out loss {shown}{' (best)' if is_best else ''}",
            file=sys.stderr,
        )


def move_ranks(run: Run, allocation: Allocation) -> None:
    """Measure every rank, prune the least important ones and grow others.

    Raises: TrainingError: a score is not a number, or processes come to different ends.
    """
    state, optimizer = run.state, run.optimizer
    started = time.perf_counter()
    measure = Measure(
        loss=run.loss,
        layers=optimizer.layers,
        samples=allocation.score_samples,
        # What is kept for a backward pass takes no more memory than in a step.
        max_tokens=run.batch_tokens(
            min(EVAL_BATCH_TOKENS, max(1, run.config.train.batch_tokens // run.processes.count))
        ),
        max_forward_tokens=run.batch_tokens(EVAL_BATCH_TOKENS),
        processes=run.processes,
        # Several processes would have to agree on it.
        is_stopped=lambda: run.processes.count == 1 and bool(run.signals),
    )
    number = len(state.rounds) + 1
    spared = allocation.spared(optimizer, number)
    scores = allocation.measure(measure, spared, number)
    move = allocation.choose(scores, spared, optimizer)
    num_undone = allocation.count_undone(move, optimizer, number)
    allocation.apply(move, optimizer, number)
    if run.processes.count > 1:
        run.processes.agree({"the ranks": repr(move), "the weights": digest_of(run.weights)})
    seconds = time.perf_counter() - started
    state.scoring_seconds += seconds
    row = record(
        scores,
        move,
        optimizer,
        number=number,
        step=state.step,
        num_undone=num_undone,
        seconds=seconds,
    )
    state.rounds.append(row)
    if run.log is not None:
        run.log.round(state.step, row | {"scores": all_scores(scores)})
        tqdm.write(in_words(row), file=sys.stderr)


def plan_run(
    config: TrainConfig, lengths: Sequence[int], *, packed: bool, extra_tokens: int = 0
) -> Plan:
    """Return each step of a run.

    Args: extra_tokens: trained on beyond train.epochs.
    """
    epochs = config.train.epochs + extra_tokens / sum(lengths)
    plan = []
    for epoch in range(math.ceil(epochs)):
        steps = plan_epoch(
            lengths,
            batch_tokens=config.train.batch_tokens,
            # Distinct for every seed and epoch.
            seed=config.train.seed * 1_000_003 + epoch,
            packed=packed,
        )
        share = min(1.0, epochs - epoch)
        for position, indices in enumerate(steps[: math.ceil(share * len(steps))], start=1):
            plan.append((round(epoch + position / len(steps), 4), indices))
    return plan


def plan_with_rounds(
    config: TrainConfig,
    samples: Sequence[Sample],
    score_samples: Sequence[Sample],
    *,
    num_modules: int,
    packed: bool,
) -> tuple[Plan, Allocation | None]:
    """Return each step of a run, and how its ranks move, if they do.

    Raises: ConfigError: the rounds of allocation do not fit into the steps.
    """
    lengths = [len(sample) for sample in samples]
    more = extra_tokens(config, score_samples)
    plan = plan_run(config, lengths, packed=packed, extra_tokens=more)
    if not config.allocation.enabled:
        return plan, None
    rounds_after = plan_rounds(config, [epochs for epochs, _ in plan])
    return plan, Allocation(config, num_modules, rounds_after, score_samples)


def _is_over(run: Run) -> bool:
    """Tell whether early stopping ends the run here."""
    patience = run.config.train.early_stopping_patience
    return patience is not None and run.state.num_worse >= patience


def _held_out_loss(run: Run, samples: Sequence[Sample]) -> float:
    """Return the mean loss of a set's tokens, its samples shared between the processes."""
    model = run.loss.base.model
    model.eval()
    share = split_step(
        range(len(samples)),
        [len(sample) for sample in samples],
        num_processes=run.processes.count,
        max_tokens=run.batch_tokens(EVAL_BATCH_TOKENS),
        packed=run.loss.packs,
    )[run.processes.rank]
    totals = torch.zeros(2, dtype=torch.float64)
    for indices in share:
        sums, counts = run.loss.sample_losses([samples[index] for index in indices])
        totals += torch.stack([sums.sum(), counts.sum()])
    totals = totals.to(model.device)
    run.processes.sum([totals])
    model.train()
    return float(totals[0] / totals[1])


def _gradient(weight: torch.nn.Parameter) -> Tensor:
    """Return a weight's gradient: zero where this process had no sample."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


@contextmanager
def _stopped_by_signals() -> Iterator[list[int]]:
    """Collect the first Ctrl-C or SIGTERM in the list yielded; a second one acts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # signals reach the main thread alone
        return
    previous: dict[signal.Signals, Any] = {}

    def receive(number: int, _: FrameType | None) -> None:
        received.append(number)
        for other, handler in previous.items():
            signal.signal(other, handler)
        tqdm.write("stopping after this step; again to stop at once", file=sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
