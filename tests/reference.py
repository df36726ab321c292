"""Oracles: loops that a reader can check by eye, in float32 or wider, sharing no code with ours."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Largest difference allowed by the dtype that a path computes in, and why.
ATOL = {
    "float32": 1e-5,  # sums of a few hundred products of size 1
    "bfloat16": 0.1,  # outputs of size 5 to 10, whose last bit is worth 0.03
    "logits-float32": 1e-4,  # through 30 layers
    "served-log-probs-float32": 2e-3,  # two engines with other kernels, through 30 layers
}


def linear_loop(x: Array, weight: Array) -> Array:
    """y[t, o] = sum over i of x[t, i] * weight[o, i]."""
    y = np.zeros((x.shape[0], weight.shape[0]))
    for row in range(x.shape[0]):
        for output in range(weight.shape[0]):
            for column in range(x.shape[1]):
                y[row, output] += x[row, column] * weight[output, column]
    return y


def ragged_delta_loop(
    x: Array,
    y: Array,
    lora_int_ids: Sequence[int],
    factors: dict[int, Sequence[tuple[Array, Array, float, int]]],
) -> Array:
    """Return y with each row's own adapter added: y[t, start + o] += scaling * (B A x[t])[o].

    factors: per adapter, (lora_a, lora_b, scaling, start) of each part of the layer.
    """
    result = y.copy()
    for row, lora_int_id in enumerate(lora_int_ids):
        for lora_a, lora_b, scaling, start in factors.get(lora_int_id, ()):
            shrunk = linear_loop(x[row : row + 1], lora_a)
            delta = linear_loop(shrunk, lora_b)[0]
            for output in range(delta.shape[0]):
                result[row, start + output] += scaling * delta[output]
    return result


def cross_entropy_loop(logits: Array, targets: Sequence[int]) -> list[float]:
    """Return -log softmax(logits[t])[targets[t]] for each t."""
    losses = []
    for row, target in zip(logits, targets, strict=True):
        highest = max(row)
        total = sum(math.exp(value - highest) for value in row)
        losses.append(-(row[target] - highest - math.log(total)))
    return losses
