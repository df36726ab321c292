"""How much each rank of each module matters: AB-LoRA's ablation score, exact or to first order.

CS(r) = L(M without r) - L(M with r alone), larger is more important. L is the mean cross-entropy of
one fixed set of samples, M the model with all ranks, and "r alone" switches off every other rank of
the whole network. Scalings stay as they are: ranks are masked, not removed.

Two ways to it, and a mixture:
- `exact_scores`: two forwards a rank. Only what lies at and above the masked layer is computed; the
  hidden states below it are those of M, or of the base model, and are kept. Several masks go
  through the model at once, as gates of their own copies of the samples.
- `gradient_scores`: with a gate g_r on each rank, L(M without r) = L(1) - dL/dg_r at all gates 1
  and L(M with r alone) = L(0) + dL/dg_r at all gates 0, to first order. Two backward passes give
  every rank's score.
- `screened_scores`: by gradients, and exactly for those near the cut.

Source: arXiv 2403.16187, equation 6, with S = -cross-entropy; the gradients and the reuse are ours.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.batching import Batch, repeat, split_step
from trainer.data import Sample
from trainer.distributed import Processes
from trainer.inject import adapters_off
from trainer.lora_linear import LoraLinear
from trainer.loss import ModelLoss

ScoreKind = Literal["gradient", "screened", "exact", "random"]
# Largest relative change of a loss when the layers below are taken from memory. They are the same
# numbers; products of another size may round otherwise.
_SAME = {torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 0.002}
Layers = Mapping[str, LoraLinear]
Rank = tuple[str, int]  # module path and index


@dataclass(frozen=True)
class Scores:
    """Importance of every rank.

    Args:
        by_module: [rank], float64, on the CPU, by module path; larger is more important.
        loss: mean over tokens with loss, of the model with all ranks; base_loss: with none.
        kind: how they were measured.
    """

    by_module: dict[str, Tensor]
    loss: float
    base_loss: float
    kind: ScoreKind


@dataclass(frozen=True)
class Measure:
    """What scores are measured with.

    Args:
        loss: of samples, by the model that `layers` are in.
        layers: by module path.
        samples: the fixed set.
        max_tokens: of one forward.
        processes: that share the work; all of them get the same scores.
    """

    loss: ModelLoss
    layers: Layers
    samples: Sequence[Sample]
    max_tokens: int
    processes: Processes

    @property
    def num_loss(self) -> int:
        """Tokens with loss of all samples."""
        return sum(len(sample.loss_places) for sample in self.samples)

    def batches(self, share: Processes) -> Iterator[Batch]:
        """Yield one process's share of the samples."""
        lengths = [len(sample) for sample in self.samples]
        for indices in split_step(
            range(len(lengths)),
            lengths,
            num_processes=share.count,
            max_tokens=self.max_tokens,
            packed=self.loss.packs,
        )[share.rank]:
            yield self.loss.make_batch([self.samples[index] for index in indices])


def gradient_scores(measure: Measure) -> Scores:
    """Return CS to first order: L(1) - L(0) - (dL/dg_r at all gates 1 + dL/dg_r at all gates 0).

    Cost: two passes over the samples, forward and backward, whatever the number of ranks.
    Checked against: a loop over finite differences, in tests/trainer/test_importance.py.
    """
    layers = measure.layers
    losses, slopes = [], []
    with _measuring(measure.loss, layers):
        for value in (1.0, 0.0):
            gates = {
                name: torch.full(
                    (layer.rank,), value, device=layer.lora_a.device, requires_grad=True
                )
                for name, layer in layers.items()
            }
            total = torch.zeros(1, dtype=torch.float64)
            with _gated(layers, gates):
                for batch in measure.batches(measure.processes):
                    loss = measure.loss.token_losses(batch).sum() / measure.num_loss
                    loss.backward()
                    total += loss.detach().double().cpu()
            slope = _flat(
                {
                    name: torch.zeros_like(gate) if gate.grad is None else gate.grad
                    for name, gate in gates.items()
                }
            )
            measure.processes.sum([total, slope])
            losses.append(float(total))
            slopes.append(slope)
    scores = losses[0] - losses[1] - (slopes[0] + slopes[1])
    return Scores(_by_module(scores, layers), losses[0], losses[1], kind="gradient")


def exact_scores(measure: Measure, wanted: Mapping[str, Sequence[int]] | None = None) -> Scores:
    """Return CS by ablation.

    Args: wanted: indices of ranks by module; none: all. The scores of others are not-a-number.
    Cost: two forwards a rank, of the layers at and above the masked one; 0.52 of the whole model's
        on average.
    Checked against: a loop that masks one rank at a time, in tests/trainer/test_importance.py.
    """
    layers = measure.layers
    if wanted is None:
        wanted = {name: range(layer.rank) for name, layer in layers.items()}
    # Processes share the ranks, not the samples: each sees whole losses.
    ranks = [(name, index) for name in layers for index in wanted.get(name, ())]
    processes = measure.processes
    own = ranks[processes.rank :: processes.count]
    scores = dict.fromkeys(ranks, 0.0)
    loss, base_loss = 0.0, 0.0
    with _measuring(measure.loss, layers), torch.no_grad():
        stack = _find_stack(measure.loss.base.model, layers)
        for batch in measure.batches(Processes()):
            without = _Ablation(measure, stack, batch, alone=False)
            alone = _Ablation(measure, stack, batch, alone=True)
            loss += without.whole_loss
            base_loss += alone.whole_loss
            for rank, masked_loss in without.losses(own):
                scores[rank] += masked_loss
            for rank, masked_loss in alone.losses(own):
                scores[rank] -= masked_loss
    values = torch.tensor(list(scores.values()), dtype=torch.float64)
    processes.sum([values])
    by_module = {
        name: torch.full((layer.rank,), torch.nan, dtype=torch.float64)
        for name, layer in layers.items()
    }
    for (name, index), value in zip(ranks, values, strict=True):
        by_module[name][index] = value
    return Scores(by_module, loss, base_loss, kind="exact")


def screened_scores(measure: Measure, num_moved: int) -> Scores:
    """Return CS by gradients, and exactly for the `num_moved` ranks around the cut.

    The cut is behind the `num_moved` lowest. The exact scores put those ranks in order among
    themselves, in the places that gradients gave them: the two kinds are never compared.
    """
    scores = gradient_scores(measure)
    ordered = sorted(
        (score, place, index, name)
        for place, (name, of_module) in enumerate(scores.by_module.items())
        for index, score in enumerate(of_module.tolist())
    )
    near = ordered[num_moved - (num_moved + 1) // 2 :][:num_moved]
    wanted: dict[str, list[int]] = {}
    for _, _, index, name in near:
        wanted.setdefault(name, []).append(index)
    exact = exact_scores(measure, wanted).by_module
    by_exact = sorted(near, key=lambda rank: (float(exact[rank[3]][rank[2]]), *rank[1:]))
    for (score, *_), (_, _, index, name) in zip(near, by_exact, strict=True):
        scores.by_module[name][index] = score
    return Scores(scores.by_module, scores.loss, scores.base_loss, kind="screened")


def random_scores(measure: Measure, seed: int) -> Scores:
    """Return scores that mean nothing: the control of whatever the others are good for."""
    generator = torch.Generator().manual_seed(seed)
    num_ranks = sum(layer.rank for layer in measure.layers.values())
    drawn = torch.rand(num_ranks, generator=generator, dtype=torch.float64)
    return Scores(_by_module(drawn, measure.layers), 0.0, 0.0, kind="random")


@dataclass(frozen=True)
class _Stack:
    """The layers that hidden states pass one after the other.

    Args: depth: of the layer that holds each adapted module; 0 for what is outside of them.
    """

    layers: Sequence[nn.Module]
    depth: Mapping[str, int]


def _find_stack(model: nn.Module, names: Collection[str]) -> _Stack:
    """Return the list of layers that holds the most adapted modules, the outermost of such."""
    found = _Stack((), {})
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            inside = (name for name in names if name.startswith(f"{path}."))
            depth = {name: int(name[len(path) + 1 :].partition(".")[0]) for name in inside}
            if len(depth) > len(found.depth):
                found = _Stack(tuple(module), depth)
    return _Stack(found.layers, dict.fromkeys(names, 0) | dict(found.depth))


class _Ablation:
    """Losses of one batch with ranks masked, computed from the layer that holds them upwards.

    Args:
        stack: the model's layers.
        batch: of samples.
        alone: a masked model is the base model with that rank alone; else all ranks without it.
    """

    def __init__(self, measure: Measure, stack: _Stack, batch: Batch, *, alone: bool) -> None:
        self._measure = measure
        self._stack = stack
        self._batch = batch
        self._alone = alone
        outputs: list[Any] = []
        hooks = [
            layer.register_forward_hook(lambda _, __, output: outputs.append(output))
            for layer in stack.layers
        ]
        self._outputs: Sequence[Any] = outputs
        with adapters_off(measure.layers if alone else {}):
            (self.whole_loss,) = self._batch_losses(1)
            for hook in hooks:
                hook.remove()
            if not self._keeps_to_memory():
                self._outputs = ()

    def losses(self, ranks: Sequence[Rank]) -> Iterator[tuple[Rank, float]]:
        """Yield each rank with the loss, of this batch's share of the mean, that masking gives."""
        num_copies = max(1, self._measure.max_tokens // self._batch.token_ids.numel())
        by_depth: dict[int, list[Rank]] = {}
        for rank in ranks:
            by_depth.setdefault(self._stack.depth[rank[0]], []).append(rank)
        for depth, of_layer in by_depth.items():
            for start in range(0, len(of_layer), num_copies):
                chunk = of_layer[start : start + num_copies]
                yield from zip(chunk, self._masked_losses(chunk, depth), strict=True)

    def _masked_losses(self, ranks: Sequence[Rank], depth: int) -> list[float]:
        """Return the loss of one copy of the batch for each of some ranks of one layer."""
        layers = self._measure.layers
        gates: dict[str, Tensor] = {}
        for copy, (name, index) in enumerate(ranks):
            if name not in gates:
                size = (len(ranks), layers[name].rank)
                device = layers[name].lora_a.device
                gates[name] = torch.full(size, float(not self._alone), device=device)
            gates[name][copy, index] = float(self._alone)
        others = {name: layer for name, layer in layers.items() if name not in gates}
        with (
            adapters_off(others if self._alone else {}),
            _gated(layers, gates),
            self._from_memory(depth, len(ranks)),
        ):
            return self._batch_losses(len(ranks))

    def _batch_losses(self, num_copies: int) -> list[float]:
        losses = self._measure.loss.token_losses(repeat(self._batch, num_copies))
        sums = losses.double().view(num_copies, -1).sum(dim=1)
        shares: list[float] = (sums / self._measure.num_loss).tolist()
        return shares

    def _keeps_to_memory(self) -> bool:
        """Tell whether the model takes a layer's recorded output for the layers below."""
        num_layers = len(self._stack.layers)
        if len(self._outputs) != num_layers or num_layers == 0:
            return False
        with self._from_memory((num_layers + 1) // 2, 1):
            (loss,) = self._batch_losses(1)
        same = _SAME[self._measure.loss.base.model.dtype]
        return abs(loss - self.whole_loss) <= same * abs(self.whole_loss)

    @contextmanager
    def _from_memory(self, depth: int, num_copies: int) -> Iterator[None]:
        """Let the layers below `depth` give what the last of them gave the whole model."""
        if depth == 0 or not self._outputs:
            yield
            return
        output = _repeated(self._outputs[depth - 1], num_copies)
        below = self._stack.layers[:depth]
        for layer in below:
            layer.forward = lambda *_, **__: output
        try:
            yield
        finally:
            for layer in below:
                del layer.forward


def _repeated(output: Any, times: int) -> Any:
    """Repeat a layer's hidden states [rows, ...]; some models put them first in a tuple."""
    if isinstance(output, tuple):
        return (_repeated(output[0], times), *output[1:])
    return output.repeat(times, *[1] * (output.dim() - 1))


@contextmanager
def _gated(layers: Layers, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Let gates multiply the ranks of some layers inside the block."""
    for name, gate in gates.items():
        layers[name].gates = gate
    try:
        yield
    finally:
        for name in gates:
            layers[name].gates = None


@contextmanager
def _measuring(loss: ModelLoss, layers: Layers) -> Iterator[None]:
    """Let the model compute without dropout, noise and gradients of A and B inside the block."""
    model = loss.base.model
    weights = [weight for layer in layers.values() for weight in (layer.lora_a, layer.lora_b)]
    was_training = model.training
    model.eval()
    if model.is_gradient_checkpointing:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # what makes it checkpoint; its parts stay as they are
    for weight in weights:
        weight.requires_grad = False
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for weight in weights:
            weight.requires_grad = True
        model.train(was_training)


def _flat(values: Mapping[str, Tensor]) -> Tensor:
    """Return all modules' values one after the other, float64, on the CPU."""
    return torch.cat([value.detach().double().cpu() for value in values.values()])


def _by_module(values: Tensor, layers: Layers) -> dict[str, Tensor]:
    parts = values.split([layer.rank for layer in layers.values()])
    return dict(zip(layers, parts, strict=True))
