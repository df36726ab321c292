"""Samples -> batches: one packed row whose samples share their common prefix, or padded rows.

Owns the order of an epoch and the tensors of a batch; both kinds of batch give the same losses.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.attention import PackedLayout, lay_out
from trainer.data import Sample, num_common_tokens

# Samples to be padded are sorted by length within this many batches' worth, so that little of a
# batch is padding while the order of an epoch stays random.
_WINDOW_BATCHES = 32
# With less padding than this leaves, gathering the other rows costs what it saves.
_MOSTLY_REAL = 0.95


@dataclass(frozen=True)
class Batch:
    """Tokens of some samples as the model takes them, and which of its outputs carry loss.

    Args:
        token_ids, position_ids: [num_rows, num_columns], int64.
        layout: of each packed row; None if padded.
        loss_places: [num_loss], int64: places in the flattened [num_rows * num_columns] whose
            output predicts a token that carries loss.
        targets: [num_loss], int64: these tokens.
        owners: [num_loss], int64: the sample that each belongs to, as an index of those given.
        sample_lengths: [num_rows, num_columns], int64: of the sample that each token belongs to.
        num_samples: in the batch.
        real_rows: [num_real], int64: places in the flattened tokens that are no padding; None if
            all are, or nearly.
    """

    token_ids: Tensor
    position_ids: Tensor
    layout: PackedLayout | None
    loss_places: Tensor
    targets: Tensor
    owners: Tensor
    sample_lengths: Tensor
    num_samples: int
    real_rows: Tensor | None = None


def plan_epoch(
    lengths: Sequence[int], *, batch_tokens: int, seed: int, packed: bool
) -> list[list[int]]:
    """Return the steps of one epoch as indices of samples; every sample is in exactly one.

    A packed step's samples have at most `batch_tokens` tokens, in an order that is random alone. A
    padded step's longest sample times its samples is at most that, samples of similar length are
    together. A sample that is longer stands alone.
    Args: seed: of this epoch; the same seed gives the same plan.
    """
    order = list(range(len(lengths)))
    shuffler = random.Random(seed)  # noqa: S311  (an order, not a secret)
    shuffler.shuffle(order)
    if packed:
        return _fill(order, lengths, batch_tokens, packed=True)
    mean_length = sum(lengths) / len(lengths)
    window = max(1, int(_WINDOW_BATCHES * batch_tokens / mean_length))
    steps: list[list[int]] = []
    for start in range(0, len(order), window):
        by_length = sorted(order[start : start + window], key=lambda index: lengths[index])
        steps += _fill(by_length, lengths, batch_tokens, packed=False)
    shuffler.shuffle(steps)
    return steps


def split_step(
    step: Sequence[int],
    lengths: Sequence[int],
    *,
    num_processes: int,
    max_tokens: int,
    packed: bool,
) -> list[list[list[int]]]:
    """Return for each process the batches of a step that it computes, of at most `max_tokens` each.

    The processes get about the same number of tokens; with fewer samples than processes some get
    none. However a step is split, it is the same step.
    """
    shares: list[list[int]] = [[] for _ in range(num_processes)]
    loads = [0] * num_processes
    by_length = sorted(step, key=lambda index: lengths[index], reverse=True)
    for index in by_length:
        lightest = loads.index(min(loads))
        shares[lightest].append(index)
        loads[lightest] += lengths[index]
    return [_fill(share[::-1], lengths, max_tokens, packed=packed) for share in shares]


def _fill(
    order: Sequence[int], lengths: Sequence[int], max_tokens: int, *, packed: bool
) -> list[list[int]]:
    """Cut an order into batches within a budget; a padded batch counts its longest for each."""
    batches: list[list[int]] = []
    current: list[int] = []
    used = longest = 0
    for index in order:
        length = lengths[index]
        longest = max(longest, length)
        used = used + length if packed else longest * (len(current) + 1)
        if current and used > max_tokens:
            batches.append(current)
            current, used, longest = [], length, length
        current.append(index)
    return [*batches, current] if current else batches


def pack(samples: Sequence[Sample], *, share_prefix: bool, device: torch.device) -> Batch:
    """Put samples one after the other into one row, without padding.

    The tokens that all samples begin with are computed once: a causal model gives them the same
    values in each. Args: share_prefix: false where that does not hold, as with dropout.
    """
    order = sorted(range(len(samples)), key=lambda index: -len(samples[index]))
    num_prefix = _num_shared(samples) if share_prefix else 0
    token_ids = list(samples[0].token_ids[:num_prefix])
    position_ids = list(range(num_prefix))
    sample_lengths = [len(samples[order[0]])] * num_prefix
    places, targets, owners = [], [], []
    for index in order:
        sample = samples[index]
        # Where this sample's tokens would begin in the row if it had its own prefix.
        start = len(token_ids) - num_prefix
        token_ids += sample.token_ids[num_prefix:]
        position_ids += range(num_prefix, len(sample))
        sample_lengths += [len(sample)] * (len(sample) - num_prefix)
        # The token before one with loss predicts it.
        places += [start + place - 1 for place in sample.loss_places]
        targets += [sample.token_ids[place] for place in sample.loss_places]
        owners += [index] * len(sample.loss_places)
    return Batch(
        token_ids=torch.tensor([token_ids], device=device),
        position_ids=torch.tensor([position_ids], device=device),
        layout=lay_out(num_prefix, [len(samples[i]) - num_prefix for i in order], device),
        loss_places=torch.tensor(places, dtype=torch.int64, device=device),
        targets=torch.tensor(targets, dtype=torch.int64, device=device),
        owners=torch.tensor(owners, dtype=torch.int64),
        sample_lengths=torch.tensor([sample_lengths], device=device),
        num_samples=len(samples),
    )


def pad(samples: Sequence[Sample], *, pad_token_id: int, device: torch.device) -> Batch:
    """Pad samples on the right to the longest one, a row each.

    No mask is needed: what stands behind a token can not change a causal model's output for it.
    """
    longest = max(map(len, samples))
    token_ids = torch.full((len(samples), longest), pad_token_id)
    places, targets, owners = [], [], []
    for row, sample in enumerate(samples):
        token_ids[row, : len(sample)] = torch.tensor(sample.token_ids)
        places += [row * longest + place - 1 for place in sample.loss_places]
        targets += [sample.token_ids[place] for place in sample.loss_places]
        owners += [row] * len(sample.loss_places)
    lengths = torch.tensor([len(sample) for sample in samples], device=device)
    real_rows = None
    if int(lengths.sum()) < _MOSTLY_REAL * token_ids.numel():
        is_real = torch.arange(longest, device=device) < lengths[:, None]
        real_rows = is_real.flatten().nonzero().squeeze(1)
    return Batch(
        token_ids=token_ids.to(device),
        position_ids=torch.arange(longest, device=device).expand(len(samples), -1),
        layout=None,
        loss_places=torch.tensor(places, dtype=torch.int64, device=device),
        targets=torch.tensor(targets, dtype=torch.int64, device=device),
        owners=torch.tensor(owners, dtype=torch.int64),
        sample_lengths=lengths[:, None].expand(-1, longest),
        num_samples=len(samples),
        real_rows=real_rows,
    )


def repeat(batch: Batch, times: int) -> Batch:
    """Return copies of a batch, one under the other: rows, losses and owners copy by copy."""
    if times == 1:
        return batch
    copies = torch.arange(times)

    def shifted(places: Tensor, size: int) -> Tensor:
        """Let each copy's places count from where it begins."""
        starts = copies.to(places.device)[:, None] * size
        return (starts + places).flatten()

    num_tokens = batch.token_ids.numel()
    return Batch(
        token_ids=batch.token_ids.repeat(times, 1),
        position_ids=batch.position_ids.repeat(times, 1),
        layout=batch.layout,
        loss_places=shifted(batch.loss_places, num_tokens),
        targets=batch.targets.repeat(times),
        owners=shifted(batch.owners, batch.num_samples),
        sample_lengths=batch.sample_lengths.repeat(times, 1),
        num_samples=batch.num_samples * times,
        real_rows=None if batch.real_rows is None else shifted(batch.real_rows, num_tokens),
    )


def _num_shared(samples: Sequence[Sample]) -> int:
    """Return how many tokens all samples begin with, none of which predicts a token with loss."""
    if len(samples) == 1:
        return 0
    # Every sample keeps a token of its own, and the prefix's last token predicts only prefixes.
    first_losses = (sample.loss_places[:1] or (len(sample),) for sample in samples)
    return max(0, min(num_common_tokens(samples), *(places[0] - 1 for places in first_losses)))
