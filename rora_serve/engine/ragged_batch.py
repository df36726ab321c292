"""RaggedBatch: the rows of one engine step, grouped by adapter once for all layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rora_serve.engine.slots import Slot

# Rows of a group from which it goes through matrix products instead of the compiled loop.
LONG_GROUP = 16

Rows = slice | Tensor


@dataclass(frozen=True)
class ShortGroups:
    """Groups of few rows, with their slots' tables side by side, layer by layer.

    Args:
        rows: [n] int64, group by group.
        starts: [num_groups + 1] int64, where each begins in `rows`.
        addresses: [num_layers, num_groups] int64; 0 where an adapter leaves a layer alone.
        elements: [num_groups] int64.
        ranks: [num_layers, num_groups, num_parts] int64.
        scalings: the same shape, float32.
        shrunk: [n, largest sum of ranks in a layer] float32, the loop's scratch.
    """

    rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    addresses: NDArray[np.int64]
    elements: NDArray[np.int64]
    ranks: NDArray[np.int64]
    scalings: NDArray[np.float32]
    shrunk: NDArray[np.float32]


@dataclass(frozen=True)
class Groups:
    """Rows by adapter. Rows without one are in no group, so that no layer can touch them.

    Args:
        num_rows: of the step, with and without adapters.
        long: slots with many rows each.
        short: the others.
        is_touched: [num_layers], whether any of these adapters changes a layer.
    """

    num_rows: int
    long: tuple[tuple[Slot, Rows], ...]
    short: ShortGroups | None
    is_touched: Sequence[bool]


class RaggedBatch:
    """Which rows of a step belong to which adapter: rows of tokens, and rows of logits.

    Args: num_layers: of the running model.
    """

    def __init__(self, num_layers: int) -> None:
        self._nothing = Groups(0, (), None, [False] * num_layers)
        self._rows: tuple[Sequence[int], Sequence[int]] = ((), ())
        self._slots: Mapping[int, Slot] = {}
        self.clear()

    def clear(self) -> None:
        """Forget the step, and what it keeps of slots."""
        self._rows = ((), ())
        self.tokens = self.samples = self._nothing

    def set_rows(
        self, tokens: Sequence[int], samples: Sequence[int], slots: Mapping[int, Slot]
    ) -> None:
        """Group the rows of the next step.

        Args:
            tokens: [num_tokens], lora_int_id of each row, 0 for none.
            samples: [num_logits], the same for the rows of which logits are wanted.
            slots: by lora_int_id. Ids without a slot have no group.
        Cost: nothing if all is as in the last step, as it mostly is; else a sort of the rows and
            a copy of the tables of the slots in it.
        """
        if (tokens, samples) == self._rows:
            return
        self.tokens = self._grouped(tokens, slots)
        self.samples = self.tokens if samples == tokens else self._grouped(samples, slots)
        self._rows = (tokens, samples)
        self._slots = slots

    def tokens_between(self, first: int, last: int) -> Groups:
        """Return the groups of some of the step's rows, counted from the first of these."""
        return self._grouped(self._rows[0][first:last], self._slots)

    def _grouped(self, lora_int_ids: Sequence[int], slots: Mapping[int, Slot]) -> Groups:
        ids = np.asarray(lora_int_ids, np.int64)
        if not ids.any():
            return Groups(len(ids), (), None, self._nothing.is_touched)
        order = np.argsort(ids, kind="stable")
        starts = np.flatnonzero(np.diff(ids[order], prepend=-1))
        long: list[tuple[Slot, Rows]] = []
        short: list[tuple[Slot, NDArray[np.int64]]] = []
        is_touched = np.zeros(len(self._nothing.is_touched), bool)
        for rows in np.split(order, starts[1:]):
            slot = slots.get(int(ids[rows[0]]))
            if slot is None:
                continue
            is_touched |= slot.addresses > 0
            runs, others = _runs(rows)
            long += [(slot, run) for run in runs]
            if len(others) >= LONG_GROUP:
                long.append((slot, torch.from_numpy(others)))
            elif len(others):
                short.append((slot, others))
        return Groups(
            len(ids), tuple(long), _side_by_side(short) if short else None, is_touched.tolist()
        )


def _side_by_side(groups: list[tuple[Slot, NDArray[np.int64]]]) -> ShortGroups:
    slots = [slot for slot, _ in groups]
    lengths = [len(rows) for _, rows in groups]
    ranks = np.stack([slot.ranks for slot in slots], axis=1)
    largest = int(ranks.sum(axis=2).max())
    return ShortGroups(
        rows=np.concatenate([rows for _, rows in groups]),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        addresses=np.stack([slot.addresses for slot in slots], axis=1),
        elements=np.array([int(slot.element) for slot in slots]),
        ranks=ranks,
        scalings=np.stack([slot.scalings for slot in slots], axis=1),
        shrunk=np.empty((sum(lengths), max(largest, 1)), np.float32),
    )


def _runs(rows: NDArray[np.int64]) -> tuple[list[slice], NDArray[np.int64]]:
    """Return each long run of neighbours as a slice, which is read without a copy, and the rest."""
    ends = np.flatnonzero(np.diff(rows, append=-1) != 1) + 1
    lengths = np.diff(ends, prepend=0)
    is_long = lengths >= LONG_GROUP
    first = rows[ends - lengths][is_long]
    last = rows[ends - 1][is_long]
    runs = [slice(a, b + 1) for a, b in zip(first.tolist(), last.tolist(), strict=True)]
    return runs, rows[~np.repeat(is_long, lengths)]
