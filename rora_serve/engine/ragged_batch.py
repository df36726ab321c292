"""RaggedBatch: the rows of one engine step, grouped by adapter once for all layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

NO_ADAPTER = 0  # vLLM's lora_int_id of a request without an adapter

Rows = slice | Tensor


class RaggedBatch:
    """Which rows of a step belong to which adapter.

    Rows without an adapter are in no group, so that no layer can touch them.
    """

    def __init__(self) -> None:
        self.groups: list[tuple[int, Rows]] = []
        self.num_rows = 0

    def set_rows(self, lora_int_ids: Sequence[int]) -> None:
        """Group the rows of the next step.

        Args: lora_int_ids: [num_rows], the adapter of each row, 0 for none.
        Cost: one pass over the rows.
        """
        positions: dict[int, list[int]] = {}
        for row, lora_int_id in enumerate(lora_int_ids):
            if lora_int_id != NO_ADAPTER:
                positions.setdefault(lora_int_id, []).append(row)
        self.num_rows = len(lora_int_ids)
        self.groups = [(key, _as_rows(rows)) for key, rows in positions.items()]


def _as_rows(rows: list[int]) -> Rows:
    """Return rows as a slice if they are neighbours: a slice is read without a copy."""
    first, last = rows[0], rows[-1]
    if last - first + 1 == len(rows):
        return slice(first, last + 1)
    return torch.tensor(rows)
