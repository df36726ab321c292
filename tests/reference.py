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


def lora_gradients_loop(
    x: Array, weight: Array, factors: tuple[Array, Array], scaling: float, grad_y: Array
) -> tuple[Array, Array, Array]:
    """Return the gradients in x, A and B of sum(grad_y * (x Wᵀ + scaling * (x Aᵀ) Bᵀ)).

    The chain rule, y[t, o] has terms scaling * B[o, r] * A[r, i] * x[t, i].
    """
    lora_a, lora_b = factors
    grad_x, grad_a, grad_b = np.zeros_like(x), np.zeros_like(lora_a), np.zeros_like(lora_b)
    for token in range(x.shape[0]):
        for output in range(weight.shape[0]):
            g = grad_y[token, output]
            for column in range(x.shape[1]):
                grad_x[token, column] += g * weight[output, column]
                for rank in range(lora_a.shape[0]):
                    a, b = lora_a[rank, column], lora_b[output, rank]
                    grad_x[token, column] += g * scaling * b * a
                    grad_a[rank, column] += g * scaling * b * x[token, column]
                    grad_b[output, rank] += g * scaling * a * x[token, column]
    return grad_x, grad_a, grad_b


def adamw_loop(
    weights: Sequence[float],
    gradients: Sequence[Sequence[float]],
    *,
    learning_rate: float,
    weight_decay: float,
) -> list[float]:
    """Return each number after AdamW's steps (arXiv 1711.05101), from its own gradients alone."""
    result = []
    for start, course in zip(weights, gradients, strict=True):
        w, m, v = start, 0.0, 0.0
        for step, g in enumerate(course, start=1):
            m = 0.9 * m + 0.1 * g
            v = 0.999 * v + 0.001 * g * g
            w -= learning_rate * weight_decay * w
            w -= learning_rate * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.999**step)) + 1e-8)
        result.append(w)
    return result


def cross_entropy_loop(logits: Array, targets: Sequence[int]) -> list[float]:
    """Return -log softmax(logits[t])[targets[t]] for each t."""
    losses = []
    for row, target in zip(logits, targets, strict=True):
        highest = max(row)
        total = sum(math.exp(value - highest) for value in row)
        losses.append(-(row[target] - highest - math.log(total)))
    return losses
