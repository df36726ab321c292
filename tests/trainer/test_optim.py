import numpy as np
import pytest
import torch
from torch import nn

from tests.reference import ATOL, adamw_loop
from trainer.lora_linear import LoraLinear
from trainer.optim import RankAdamW, default_learning_rate, learning_rate_factor


def make_layers() -> dict[str, LoraLinear]:
    layers = {}
    for name, (size_in, size_out, rank) in {"a": (6, 5, 2), "b.c": (4, 9, 3)}.items():
        layers[name] = LoraLinear(
            nn.Linear(size_in, size_out).requires_grad_(False), size_in, size_out,
            rank=rank, scaling=1.0, dropout=0.0, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    return layers


def draw_gradients(layers: dict[str, LoraLinear], generator: torch.Generator) -> None:
    for layer in layers.values():
        for weight in (layer.lora_a, layer.lora_b):
            weight.grad = torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_torchs_adamw_when_all_ranks_are_of_one_age(weight_decay: float) -> None:
    ours, theirs = make_layers(), make_layers()
    optimizer = RankAdamW(ours, weight_decay=weight_decay)
    weights = [w for layer in theirs.values() for w in (layer.lora_a, layer.lora_b)]
    reference = torch.optim.AdamW(weights, lr=1e-2, weight_decay=weight_decay)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for _ in range(30):
        draw_gradients(ours, generators[0])
        draw_gradients(theirs, generators[1])
        optimizer.step(1e-2)
        reference.step()
    for name, layer in ours.items():
        torch.testing.assert_close(layer.lora_a, theirs[name].lora_a, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(layer.lora_b, theirs[name].lora_b, atol=1e-6, rtol=1e-6)


def test_a_rank_that_begins_later_is_corrected_by_its_own_age() -> None:
    """Rank 1 has zero gradients' history wiped after three steps, as if it were new."""
    layers = {"a": make_layers()["a"]}
    layer, optimizer = layers["a"], RankAdamW(layers, weight_decay=0.05)
    generator = torch.Generator().manual_seed(2)
    courses = []
    for step in range(5):
        if step == 3:
            state = optimizer.state["a"]
            state["num_steps"][1] = 0
            for key in ("exp_avg_a", "exp_avg_sq_a"):
                state[key][1] = 0
            for key in ("exp_avg_b", "exp_avg_sq_b"):
                state[key][:, 1] = 0
            starts = [layer.lora_a[1].tolist(), layer.lora_b[:, 1].tolist()]
        draw_gradients(layers, generator)
        assert layer.lora_a.grad is not None
        assert layer.lora_b.grad is not None
        courses.append([layer.lora_a.grad[1].tolist(), layer.lora_b.grad[:, 1].tolist()])
        optimizer.step(1e-2)
    for side, weights in enumerate((layer.lora_a[1], layer.lora_b[:, 1])):
        gradients = list(zip(*(course[side] for course in courses[3:]), strict=True))
        expected = adamw_loop(starts[side], gradients, learning_rate=1e-2, weight_decay=0.05)
        np.testing.assert_allclose(weights.detach(), expected, atol=ATOL["float32"])
    # The control: by the tensor's age the new rank's first step would be larger.
    gradients = [(0.0, 0.0, 0.0, *g) for g in zip(*(c[0] for c in courses[3:]), strict=True)]
    aged = adamw_loop(starts[0], gradients, learning_rate=1e-2, weight_decay=0.05)
    assert np.abs(layer.lora_a[1].detach().numpy() - aged).max() > 1e-3


@pytest.mark.parametrize(("rank", "best"), [(2, 5e-3), (8, 1.9e-3), (32, 1.8e-3), (128, 1.7e-3)])
def test_the_default_rate_is_below_the_best_measured_and_near_it(rank: int, best: float) -> None:
    """The best rates of benchmarks/results/bench_learning_rate.jsonl, RoRA with alpha 16."""
    rate = default_learning_rate(rank, 16 / rank**0.5)
    assert 0.4 < rate / best < 0.8


def test_schedules_rise_and_fall() -> None:
    def course(schedule: str) -> list[float]:
        return [
            learning_rate_factor(step, num_steps=10, warmup_ratio=0.2, schedule=schedule)  # type: ignore[arg-type]
            for step in range(10)
        ]

    assert course("constant") == [0.5, 1.0] + [1.0] * 8
    assert course("linear") == pytest.approx([0.5, 1.0] + [1 - n / 8 for n in range(8)])
    cosine = course("cosine")
    assert cosine[2] == 1.0
    assert cosine[6] == pytest.approx(0.5)
    assert cosine == sorted(cosine[:2]) + sorted(cosine[2:], reverse=True)
