"""RaggedBatch: the rows of one engine step, grouped by adapter once for all layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rora_serve.engine.slots import Slot

if TYPE_CHECKING:
    from rora_serve.engine.kernels import Job

# Rows of a group from which it goes through matrix products instead of the compiled loop.
LONG_GROUP = 16

Rows = slice | Tensor


class ShortGroups:
    """Groups of few rows, with their slots' tables side by side, layer by layer.

    Args: groups: slots, and the rows of each.
    """

    def __init__(self, groups: Sequence[tuple[Slot, NDArray[np.int64]]]) -> None:
        slots = [slot for slot, _ in groups]
        lengths = [len(rows) for _, rows in groups]
        self.rows = np.concatenate([rows for _, rows in groups])
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._elements = np.array([int(slot.element) for slot in slots])
        # By layer and group.
        self._blocks = np.stack([slot.addresses for slot in slots], axis=1)
        self._ranks = np.stack([slot.ranks for slot in slots], axis=1)
        self._scalings = np.stack([slot.scalings for slot in slots], axis=1)
        largest = int(self._ranks.sum(axis=2).max())
        self._shrunk = np.empty((len(self.rows), max(largest, 1)), np.float32)
        self._fields = {
            "num_groups": len(slots),
            "rows": self.rows.ctypes.data,
            "starts": self.starts.ctypes.data,
            "elements": self._elements.ctypes.data,
            "ranks_stride": self._ranks.shape[2],
            "shrunk": self._shrunk.ctypes.data,
            "shrunk_stride": self._shrunk.shape[1],
        }
        self._tables = {
            name: (table.ctypes.data, table.strides[0])
            for name, table in (
                ("blocks", self._blocks),
                ("ranks", self._ranks),
                ("scalings", self._scalings),
            )
        }

    def fill(self, job: "Job", layer: int) -> None:
        """Point a layer's job at these rows; valid as long as this object lives."""
        for name, value in self._fields.items():
            setattr(job, name, value)
        for name, (address, stride) in self._tables.items():
            setattr(job, name, address + layer * stride)


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
            len(ids), tuple(long), ShortGroups(short) if short else None, is_touched.tolist()
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
