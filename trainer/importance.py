"""How much each rank of each module matters: AB-LoRA's ablation score, exact or to first order.

CS(r) = L(M without r) - L(M with r alone), larger is more important. L is the mean cross-entropy of
one fixed set of samples, M the model with all ranks, and "r alone" switches off every other rank of
the whole network. Scalings stay as they are: ranks are masked, not removed.

Two ways to it, and a mixture:
- `exact_scores`: two forwards a rank. Only what lies at and above the masked layer is computed; the
  hidden states below it are those of M, or of the base model, and are kept. Several masks of a
  layer go through the model at once, as gates of their own copies of the samples. Whether a model
  can be computed so is tried first.
- `gradient_scores`: with a gate g_r on each rank, L(M without r) = L(1) - dL/dg_r at all gates 1
  and L(M with r alone) = L(0) + dL/dg_r at all gates 0, to first order. Two backward passes give
  every rank's score.
- `screened_scores`: by gradients, and exactly for those near the cut.

Source: arXiv 2403.16187, equation 6, with S = -cross-entropy; the gradients and the reuse are ours.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.batching import Batch, repeat, split_step
from trainer.data import Sample
from trainer.distributed import Processes
from trainer.inject import adapters_off
from trainer.lora_linear import LoraLinear
from trainer.loss import ModelLoss

ScoreKind = Literal["gradient", "screened", "exact", "random"]
# Of all masks that share a forward; nothing is kept for a backward pass. A CPU is no faster with
# more, and its caches hold less of them.
_MASKED_TOKENS, _MASKED_TOKENS_CPU = 16_384, 2048
# Largest relative change of a loss when masks share a forward and layers below come from memory.
# They are the same numbers; products of another size may round otherwise.
_SAME = {torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 0.002}
Layers = Mapping[str, LoraLinear]
Rank = tuple[str, int]  # module path and index


@dataclass(frozen=True)
class Scores:
    """Importance of every rank.

    Args:
        by_module: [rank], float64, on the CPU, by module path; larger is more important.
        loss: mean over tokens with loss, of the model with all ranks; base_loss: with none; None:
            not measured.
        kind: how they were measured.
    """

    by_module: dict[str, Tensor]
    loss: float | None
    base_loss: float | None
    kind: ScoreKind


@dataclass(frozen=True)
class Measure:
    """What scores are measured with.

    Args:
        loss: of samples, by the model that `layers` are in.
        layers: by module path.
        samples: the fixed set.
        max_tokens: of one pass forward and backward.
        max_forward_tokens: of one batch that goes forward only.
        processes: that share the work; all of them get the same scores.
        is_stopped: asked now and then while exact scores are measured.
    """

    loss: ModelLoss
    layers: Layers
    samples: Sequence[Sample]
    max_tokens: int
    max_forward_tokens: int
    processes: Processes
    is_stopped: Callable[[], bool] = lambda: False

    @property
    def num_loss(self) -> int:
        """Tokens with loss of all samples."""
        return sum(len(sample.loss_places) for sample in self.samples)

    def summed(self, values: Tensor) -> Tensor:
        """Return the sum of all processes' values, on the CPU."""
        values = values.to(self.loss.base.model.device)  # where processes exchange them
        self.processes.sum([values])
        return values.cpu()

    def batches(self, share: Processes, max_tokens: int) -> Iterator[Batch]:
        """Yield one process's share of the samples."""
        lengths = [len(sample) for sample in self.samples]
        for indices in split_step(
            range(len(lengths)),
            lengths,
            num_processes=share.count,
            max_tokens=max_tokens,
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
    with _measuring(measure.loss, layers), _checkpointed(measure.loss.base.model):
        for value in (1.0, 0.0):
            gates = {
                name: torch.full((layer.rank,), value, device=layer.lora_a.device)
                for name, layer in layers.items()
            }
            for gate in gates.values():
                gate.requires_grad_()
            total = torch.zeros(1, dtype=torch.float64)
            with _gated(layers, gates):
                for batch in measure.batches(measure.processes, measure.max_tokens):
                    loss = measure.loss.token_losses(batch).sum() / measure.num_loss
                    loss.backward()
                    total += loss.detach().double().cpu()
            losses.append(float(measure.summed(total)))
            found = [torch.zeros_like(g) if g.grad is None else g.grad for g in gates.values()]
            slopes.append(measure.summed(torch.cat(found).double()))
    scores = losses[0] - losses[1] - (slopes[0] + slopes[1])
    return Scores(_by_module(scores, layers), losses[0], losses[1], kind="gradient")


def exact_scores(measure: Measure, wanted: Mapping[str, Sequence[int]] | None = None) -> Scores:
    """Return CS by ablation.

    Args: wanted: indices of ranks by module; none: all. The scores of others are not-a-number.
    Cost: two forwards a rank, of the layers at and above the masked one; 0.52 of the whole model's
        on average. Memory: every layer's output for one batch.
    Raises: KeyboardInterrupt: asked to stop.
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
    losses = {False: 0.0, True: 0.0}
    with _measuring(measure.loss, layers), torch.no_grad():
        batches = list(measure.batches(Processes(), measure.max_forward_tokens))
        found = _find_stack(measure.loss.base.model, layers)
        stack = found if _is_sequential(measure, found, batches[0]) else None
        progress = tqdm(
            total=2 * len(batches) * len(own),
            desc="measuring ranks",
            unit="mask",
            file=sys.stderr,
            leave=False,
            disable=not processes.is_first,
        )
        with progress:
            for batch in batches:
                for alone in (False, True):
                    ablation = _Ablation(measure, stack, batch, alone=alone)
                    losses[alone] += ablation.whole_loss
                    for rank, loss in ablation.losses(own):
                        scores[rank] += -loss if alone else loss
                        progress.update()
                        if measure.is_stopped():
                            raise KeyboardInterrupt
    values = measure.summed(torch.tensor(list(scores.values()), dtype=torch.float64))
    by_module = {
        name: torch.full((layer.rank,), torch.nan, dtype=torch.float64)
        for name, layer in layers.items()
    }
    for (name, index), value in zip(ranks, values, strict=True):
        by_module[name][index] = value
    return Scores(by_module, losses[False], losses[True], kind="exact")


def screened_scores(
    measure: Measure, num_moved: int, may_go: Mapping[str, Tensor] | None = None
) -> Scores:
    """Return CS by gradients, and exactly for the `num_moved` ranks around the cut.

    The cut is behind the `num_moved` lowest. The exact scores put those ranks in order among
    themselves, in the places that gradients gave them: the two kinds are never compared.
    Args: may_go: [rank], bool, by module: ranks that can be pruned; none: all.
    """
    scores = gradient_scores(measure)
    ordered = sorted(
        (score, place, index, name)
        for place, (name, of_module) in enumerate(scores.by_module.items())
        for index, score in enumerate(of_module.tolist())
        if may_go is None or may_go[name][index]
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
    return Scores(_by_module(drawn, measure.layers), None, None, kind="random")


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
    """Losses of one batch with ranks masked.

    Args:
        stack: the model's layers, if those below a masked one can be left out, and several masks
            can share a forward; None: each mask goes through the whole model.
        batch: of samples.
        alone: a masked model is the base model with that rank alone; else all ranks without it.
    """

    def __init__(
        self, measure: Measure, stack: _Stack | None, batch: Batch, *, alone: bool
    ) -> None:
        self._measure = measure
        self._stack = stack
        self._batch = batch
        self._alone = alone
        # What each layer gives with no rank masked.
        self._outputs: list[Any] = []
        hooks = [
            layer.register_forward_hook(lambda _, __, output: self._outputs.append(output))
            for layer in (stack.layers if stack else ())
        ]
        try:
            with adapters_off(measure.layers if alone else {}):
                (self.whole_loss,) = self._batch_losses(1)
        finally:
            for hook in hooks:
                hook.remove()

    def losses(self, ranks: Sequence[Rank]) -> Iterator[tuple[Rank, float]]:
        """Yield each rank with the loss, of this batch's share of the mean, that masking gives."""
        if self._stack is None:
            for rank in ranks:
                yield rank, self._masked_losses([rank])[0]
            return
        on_cpu = self._batch.token_ids.device.type == "cpu"
        num_tokens = _MASKED_TOKENS_CPU if on_cpu else _MASKED_TOKENS
        num_copies = max(1, num_tokens // self._batch.token_ids.numel())
        by_depth: dict[int, list[Rank]] = {}
        for rank in ranks:
            by_depth.setdefault(self._stack.depth[rank[0]], []).append(rank)
        for of_layer in by_depth.values():
            for start in range(0, len(of_layer), num_copies):
                chunk = of_layer[start : start + num_copies]
                yield from zip(chunk, self._masked_losses(chunk), strict=True)

    def _masked_losses(self, ranks: Sequence[Rank]) -> list[float]:
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
            self._from_memory(ranks[0][0], len(ranks)),
        ):
            return self._batch_losses(len(ranks))

    def _batch_losses(self, num_copies: int) -> list[float]:
        losses = self._measure.loss.token_losses(repeat(self._batch, num_copies))
        sums = losses.double().view(num_copies, -1).sum(dim=1)
        shares: list[float] = (sums / self._measure.num_loss).tolist()
        return shares

    @contextmanager
    def _from_memory(self, module: str, num_copies: int) -> Iterator[None]:
        """Let the layers below a module's give what the last of them gave the whole model."""
        depth = self._stack.depth[module] if self._stack is not None else 0
        if self._stack is None or depth == 0:
            yield
            return
        output = _repeated(self._outputs[depth - 1], num_copies)
        with ExitStack() as below:
            for layer in self._stack.layers[:depth]:
                below.enter_context(_replaced_forward(layer, lambda *_, **__: output))
            yield


def _is_sequential(measure: Measure, stack: _Stack, batch: Batch) -> bool:
    """Tell whether layers below can be left out and masks share a forward: tried on a few ranks.

    Some models pass more from layer to layer than hidden states, or see their rows in another
    order. Asked in the middle and at the last layer, with two masks each.
    """
    try:
        ablation = _Ablation(measure, stack, batch, alone=False)
        if len(ablation._outputs) != len(stack.layers) or not stack.layers:
            return False
        whole = _Ablation(measure, None, batch, alone=False)
        for depth in {len(stack.layers) // 2, len(stack.layers) - 1}:
            names = [
                name
                for name, layer in measure.layers.items()
                if stack.depth[name] == depth and layer.rank
            ]
            ranks = [(name, 0) for name in dict.fromkeys([*names[:1], *names[-1:]])]
            for (_, loss), (_, other) in zip(
                ablation.losses(ranks), whole.losses(ranks), strict=True
            ):
                if not abs(loss - other) <= _SAME[measure.loss.base.model.dtype] * abs(other):
                    return False
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError):
        return False
    return True


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
    for weight in weights:
        weight.requires_grad = False
    gpus = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        for weight in weights:
            weight.requires_grad = True
        model.train(was_training)


@contextmanager
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Let layers that compute twice in training do so in a model that is being measured."""
    layers = [
        module
        for module in (model.modules() if model.is_gradient_checkpointing else ())
        if isinstance(module, GradientCheckpointingLayer)
    ]
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_replaced_forward(layer, partial(_as_measured, layer)))
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False


def _as_measured(layer: nn.Module, *arguments: Any, **more: Any) -> Any:
    """Return what a layer gives outside of training: some apply dropout by that word alone."""
    layer.training = False
    try:
        return type(layer).forward(layer, *arguments, **more)
    finally:
        layer.training = True


@contextmanager
def _replaced_forward(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a layer compute something else inside the block."""
    before = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before


def _by_module(values: Tensor, layers: Layers) -> dict[str, Tensor]:
    parts = values.split([layer.rank for layer in layers.values()])
    return dict(zip(layers, parts, strict=True))
