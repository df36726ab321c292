"""Batches of samples of similar length under a token budget, in an order that the seed decides."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.data import Sample

IGNORED_LABEL = -100
# Samples are sorted by length within this many batches' worth, so that little of a batch is padding
# while the order of an epoch stays random.
_WINDOW_BATCHES = 32


@dataclass(frozen=True)
class Batch:
    """Padded samples.

    Args:
        token_ids: [num_samples, num_tokens], int64, padded on the right.
        attention_mask: [num_samples, num_tokens], int64, 0 where padded.
        labels: [num_samples, num_tokens], int64: the token itself where it carries loss, else -100.
    """

    token_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.attention_mask.sum())


def plan_epoch(lengths: Sequence[int], *, batch_tokens: int, seed: int) -> list[list[int]]:
    """Return the batches of one epoch as indices of samples; every sample is in exactly one.

    A batch's longest sample times its samples is at most `batch_tokens`, unless one sample alone is
    longer.
    Args: seed: of this epoch; the same seed gives the same plan.
    """
    order = list(range(len(lengths)))
    shuffler = random.Random(seed)  # noqa: S311  (an order, not a secret)
    shuffler.shuffle(order)
    mean_length = sum(lengths) / len(lengths)
    window = max(1, int(_WINDOW_BATCHES * batch_tokens / mean_length))
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        current: list[int] = []
        for index in sorted(order[start : start + window], key=lambda index: lengths[index]):
            # Sorted: the newest is the longest.
            if current and lengths[index] * (len(current) + 1) > batch_tokens:
                batches.append(current)
                current = []
            current.append(index)
        batches.append(current)
    shuffler.shuffle(batches)
    return batches


def make_batch(samples: Sequence[Sample], *, pad_token_id: int) -> Batch:
    """Pad samples on the right to the longest one."""
    longest = max(len(sample) for sample in samples)
    token_ids = torch.full((len(samples), longest), pad_token_id)
    attention_mask = torch.zeros(len(samples), longest, dtype=torch.int64)
    labels = torch.full((len(samples), longest), IGNORED_LABEL)
    for row, sample in enumerate(samples):
        ids = torch.tensor(sample.token_ids)
        token_ids[row, : len(sample)] = ids
        attention_mask[row, : len(sample)] = 1
        with_loss = torch.tensor(sample.has_loss)
        labels[row, : len(sample)] = torch.where(with_loss, ids, IGNORED_LABEL)
    return Batch(token_ids, attention_mask, labels)


def batches_of_length_order(
    samples: Sequence[Sample], *, batch_tokens: int, pad_token_id: int
) -> Iterator[tuple[list[int], Batch]]:
    """Yield batches of all samples for evaluation: their indices, and the padded batch."""
    lengths = [len(sample) for sample in samples]
    for indices in plan_epoch(lengths, batch_tokens=batch_tokens, seed=0):
        yield indices, make_batch([samples[i] for i in indices], pad_token_id=pad_token_id)
