"""RaggedBatch: the rows of one engine step, grouped by adapter once for all layers."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rora_serve.engine.slots import Slot

if TYPE_CHECKING:
    from rora_serve.engine.kernels import Job


class RowTables:
    """What the compiled loop reads of a step: rows by group, and the slots' tables side by side.

    Args: groups: slots, and the rows of each.

    `number` tells tables of one process apart.
    """

    _numbers = itertools.count(1)

    def __init__(self, groups: Sequence[tuple[Slot, NDArray[np.int64]]]) -> None:
        self.number = next(self._numbers)
        slots = [slot for slot, _ in groups]
        lengths = [len(rows) for _, rows in groups]
        self._rows = np.concatenate([rows for _, rows in groups])
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._elements = np.array([int(slot.element) for slot in slots])
        # By layer and group.
        self._blocks = np.stack([slot.addresses for slot in slots], axis=1)
        self._ranks = np.stack([slot.ranks for slot in slots], axis=1)
        self._scalings = np.stack([slot.scalings for slot in slots], axis=1)
        largest = int(self._ranks.sum(axis=2).max())
        self._shrunk = np.empty((sum(lengths), max(largest, 1)), np.float32)
        self._fields = {
            "num_groups": len(slots),
            "rows": self._rows.ctypes.data,
            "starts": self._starts.ctypes.data,
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

    def fill_all(
        self, column: Callable[[str], NDArray[np.int64]], layers: NDArray[np.int64]
    ) -> None:
        """Do the same for many layers' jobs.

        Args:
            column: returns a field of all jobs, to be written.
            layers: [num_jobs], of each.
        """
        for name, value in self._fields.items():
            column(name)[:] = value
        for name, (address, stride) in self._tables.items():
            column(name)[:] = address + layers * stride


@dataclass(frozen=True)
class Groups:
    """Rows by adapter. Rows without one are in no group, so that no layer can touch them.

    Args:
        num_rows: of the step, with and without adapters.
        by_slot: each slot with rows in the step, which it keeps in memory, and [n] int64, these
            rows.
        tables: the same as the loop reads it; None without any group.
        is_touched: [num_layers], whether any of these adapters changes a layer.
    """

    num_rows: int
    by_slot: tuple[tuple[Slot, NDArray[np.int64]], ...]
    tables: RowTables | None
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
        by_slot = tuple(
            (slot, rows)
            for rows in np.split(order, starts[1:])
            if (slot := slots.get(int(ids[rows[0]]))) is not None
        )
        is_touched = np.zeros(len(self._nothing.is_touched), bool)
        for slot, _ in by_slot:
            is_touched |= slot.addresses > 0
        tables = RowTables(by_slot) if by_slot else None
        return Groups(len(ids), by_slot, tables, is_touched.tolist())
