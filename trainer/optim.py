"""The optimizer's schedule."""

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate_factor(
    step: int, *, num_steps: int, warmup_ratio: float, schedule: Schedule
) -> float:
    """Return what multiplies the highest learning rate in `step`, counted from 0.

    Rises linearly to 1 over the first warmup_ratio * num_steps steps, then falls to 0 at
    `num_steps` by half a cosine or a line, or stays.
    """
    num_warmup = math.ceil(warmup_ratio * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if schedule == "linear" else 1.0
