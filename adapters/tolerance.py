"""How far apart log-probs may be that should be the same; owns the table, measures nothing.

Differences are of log-probs, in nats, absolute, of the tokens that one of the two sides finds most
likely. Both a merged model and a served adapter are held to this table.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]
# What a model's weights are kept in: a dtype that it computes in, or fewer bits than that.
Form = Literal[Dtype, "quantized"]


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


# Each row is of that form beside float32; the default model's numbers, which is small and so loses
# most.
# float32: only the order of sums differs, through 30 layers; measured: a mean of 1e-5 and 3e-4 at
# most, also for adapters that move every answer by 10 nats, and 6e-5 at most between two engines.
# bfloat16: the default model itself has a mean of 0.07 there, and of 0.06 to 0.12 with an adapter,
# beside it or merged alike (of probes: 0.05 and 0.08). So the mean tells right from wrong; single
# tokens swing by arithmetic alone (by 6.6 with a large adapter beside the base model, by 5.1 with
# it merged), and the bound on the largest only keeps out what has become another answer.
# float16: three more bits than bfloat16, so an eighth; single tokens swung by 1.7.
# quantized: of probes in 4 bits (NF4), a mean of 0.7 to 0.9 with adapters and without, and 9 at
# most; 8 bits have an eighth. Another adapter than the trained one had a mean of 6.
TOLERANCES: Mapping[Form, Tolerance] = {
    "float32": Tolerance(mean=1e-4, largest=2e-3),
    "bfloat16": Tolerance(mean=0.25, largest=8),
    "float16": Tolerance(mean=0.25 / 8, largest=4),
    "quantized": Tolerance(mean=2, largest=16),
}
# Times the mean that the base model itself loses in that dtype; 3 was seen of right merges, and 1.4
# of right probes.
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
    return Tolerance(min(table.mean, rounding(table, base)), table.largest)


def tolerance_between(first: Form, second: Form) -> Tolerance:
    """Return what is allowed between two forms.

    The table's row if one of them is float32, else sqrt(row² + row²): what two roundings do is
    independent.
    """
    rounded = [TOLERANCES[form] for form in (first, second) if form != "float32"]
    rows = rounded or [TOLERANCES["float32"]]
    return Tolerance(
        math.hypot(*(row.mean for row in rows)), math.hypot(*(row.largest for row in rows))
    )


def rounding(table: Tolerance, base: Difference) -> float:
    """Return the mean that rounding may have with an adapter: max(table / 10, 4 * base).

    Args: base: what it has without one.
    """
    return max(_ALWAYS * table.mean, BASE_FACTOR * base.mean)
