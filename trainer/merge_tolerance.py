"""How far a merged model may be from the unmerged one; owns the table, measures nothing.

Differences are of log-probs, in nats, absolute, of the tokens that the unmerged model finds most
likely at every place of a few texts; the unmerged model computes in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean and largest difference of log-probs."""

    mean: float
    largest: float


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest values allowed of a Difference."""

    mean: float
    largest: float

    def allows(self, difference: Difference) -> bool:
        """Tell whether a difference is allowed; one that is not a number is not."""
        return difference.mean <= self.mean and difference.largest <= self.largest


# float32: only the order of sums differs, through 30 layers; measured on the default model: a mean
# of 1e-5 and 3e-4 at most, also for adapters that move every answer by 10 nats.
# bfloat16: the default model itself has a mean of 0.07 there, and of 0.06 to 0.12 with an adapter,
# beside it or merged alike. So the mean tells right from wrong; single tokens swing by arithmetic
# alone (by 6.6 with a large adapter beside the base model, by 5.1 with it merged), and the bound on
# the largest only keeps out what has become another answer.
# float16: three more bits than bfloat16, so an eighth; single tokens swung by 1.7.
TOLERANCES: Mapping[Dtype, Tolerance] = {
    "float32": Tolerance(mean=1e-4, largest=2e-3),
    "bfloat16": Tolerance(mean=0.25, largest=8),
    "float16": Tolerance(mean=0.25 / 8, largest=4),
}
# Times the mean that the base model itself loses in that dtype; 3 was seen of right merges.
BASE_FACTOR = 4
# Part of the table's mean that is allowed however little the base model loses: one that finds all
# tokens alike loses next to nothing, and an adapter may end that.
_ALWAYS = 0.1


def tolerance_for(dtype: Dtype, base: Difference | None) -> Tolerance:
    """Return what is allowed in `dtype`, given what the base model itself loses in it.

    min(table, max(table / 10, 4 * base)) for the mean.
    Args: base: between the base model in `dtype` and in float32; None if that is the same.
    """
    table = TOLERANCES[dtype]
    if base is None:
        return table
    mean = min(table.mean, max(_ALWAYS * table.mean, BASE_FACTOR * base.mean))
    return Tolerance(mean, table.largest)


def tolerance_table() -> str:
    """Return the table as text, a line for each dtype."""
    return "\n".join(
        f"  {dtype:9} mean {tolerance.mean:<8g} largest {tolerance.largest:g}"
        for dtype, tolerance in TOLERANCES.items()
    )
