"""Scores of ranks against a loop that masks one rank at a time, one sample at a time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import OPTConfig

from adapters import AdapterConfig
from tests.trainer.test_loss import LIKE, losses_by_loop
from tests.trainer.test_trial import FAMILIES, random_base
from trainer.distributed import Processes
from trainer.importance import (
    Measure,
    exact_scores,
    gradient_scores,
    random_scores,
    screened_scores,
)
from trainer.inject import inject, target_modules
from trainer.lora_linear import LoraLinear
from trainer.model import BaseModel
from trainer.trial import find_model_loss

SAMPLES = LIKE[:4]
# Packed; packed without a shared beginning is within it; padded; Conv1D; scaled and capped logits;
# other things than attention.
SCORED = ("llama", "gpt2", "granite", "mistral", "gemma2", "qwen3_moe", "lfm2")


def make_measure(
    base: BaseModel, *, size_of_b: float = 0.3, rank: int = 2, max_tokens: int = 10_000
) -> Measure:
    """Random adapters of every linear layer, one of them without a rank, beside a model's loss."""
    loss, _ = find_model_loss(base, longest=max(map(len, SAMPLES)), packing=True)
    modules = target_modules(base.model, ("all-linear",))
    config = AdapterConfig(rank, 3.0, use_rslora=True, target_modules=tuple(modules))
    generator = torch.Generator().manual_seed(0)
    layers = inject(base.model, modules, config, dropout=0.5, generator=generator)
    for layer in layers.values():
        layer.lora_b.data.normal_(std=size_of_b, generator=generator)
    first = next(iter(layers.values()))
    first.resize([], 0, scaling=0.0, generator=generator)
    base.model.train()
    return Measure(loss, layers, SAMPLES, max_tokens, max_tokens, Processes())


def loss_by_loop(base: BaseModel) -> float:
    """The mean over tokens with loss of all samples, one unpadded sample at a time."""
    losses = [loss for sample in SAMPLES for loss in losses_by_loop(base, sample)]
    return sum(losses) / len(losses)


def scores_by_loop(base: BaseModel, layers: dict[str, LoraLinear]) -> dict[str, list[float]]:
    """CS(r) = L(M without r) - L(M with r alone), by zeroing columns of B; nothing is reused."""
    base.model.eval()
    kept = {name: layer.lora_b.data.clone() for name, layer in layers.items()}
    scores: dict[str, list[float]] = {}
    for name, layer in layers.items():
        scores[name] = []
        for rank in range(layer.rank):
            layer.lora_b.data[:, rank] = 0
            without = loss_by_loop(base)
            for other in layers.values():
                other.lora_b.data.zero_()
            layer.lora_b.data[:, rank] = kept[name][:, rank]
            alone = loss_by_loop(base)
            for other_name, other in layers.items():
                other.lora_b.data.copy_(kept[other_name])
            scores[name].append(without - alone)
    base.model.train()
    return scores


def flat(scores: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.concatenate([np.asarray(of_module, np.float64) for of_module in scores.values()])


@pytest.mark.parametrize("max_tokens", [10_000, 40])
@pytest.mark.parametrize("family", SCORED)
def test_exact_scores_equal_a_loop(default_model: Path, family: str, max_tokens: int) -> None:
    """With all masks of a layer at once, and with batches and masks apart."""
    base = random_base(FAMILIES[family][0](), default_model)
    measure = make_measure(base, max_tokens=max_tokens)
    expected = scores_by_loop(base, dict(measure.layers))
    scores = exact_scores(measure)
    assert [len(s) for s in scores.by_module.values()] == [len(s) for s in expected.values()]
    np.testing.assert_allclose(flat(scores.by_module), flat(expected), atol=2e-4)
    assert np.abs(flat(expected)).max() > 0.01
    base.model.eval()
    assert scores.loss == pytest.approx(loss_by_loop(base), abs=1e-4)


@pytest.mark.parametrize("family", SCORED)
def test_gradient_scores_are_the_loops_to_first_order(default_model: Path, family: str) -> None:
    """With a B so small that the loss is a plane between all gates 1 and all gates 0."""
    base = random_base(FAMILIES[family][0](), default_model)
    measure = make_measure(base, size_of_b=2e-4)
    scores = gradient_scores(measure)
    expected = flat(exact_scores(measure).by_module)
    spread = float(np.std(expected))
    assert spread > 2e-5
    np.testing.assert_allclose(flat(scores.by_module), expected, atol=0.1 * spread)


def test_gradients_are_those_of_finite_differences(default_model: Path) -> None:
    """At full size, where the loss is no plane: each slope by a small step of one gate."""
    base = random_base(FAMILIES["llama"][0](), default_model)
    measure = make_measure(base)
    layers = dict(measure.layers)
    scores = gradient_scores(measure)
    base.model.eval()
    step = 2e-3
    kept = {name: layer.lora_b.data.clone() for name, layer in layers.items()}
    for name in list(layers)[1::5]:
        slopes = []
        for at in (1.0, 0.0):
            for other, layer in layers.items():
                layer.lora_b.data.copy_(at * kept[other])
            losses = []
            for gate in (at - step, at + step):
                layers[name].lora_b.data[:, 0] = gate * kept[name][:, 0]
                losses.append(loss_by_loop(base))
            slopes.append((losses[1] - losses[0]) / (2 * step))
        expected = (scores.loss or 0) - (scores.base_loss or 0) - sum(slopes)
        assert float(scores.by_module[name][0]) == pytest.approx(expected, abs=1e-3)


def test_what_lies_below_a_layer_is_not_computed_again(default_model: Path) -> None:
    """Each layer's calls while all ranks of the second are measured, and while one more is."""
    base = random_base(FAMILIES["llama"][0](), default_model)
    measure = make_measure(base)
    counts = [0, 0]
    for depth, layer in enumerate(base.model.model.layers):

        def count(*_: Any, depth: int = depth) -> None:
            counts[depth] += 1

        layer.self_attn.register_forward_hook(count)
    in_second = [name for name in measure.layers if ".layers.1." in name]
    exact_scores(measure, {in_second[0]: [0]})
    few = list(counts)
    counts[:] = [0, 0]
    exact_scores(measure, {name: [0, 1] for name in in_second})
    # No call of the first layer more, and of the second none: all masks share two forwards.
    assert counts == few


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_that_passes_more_than_hidden_states_is_computed_whole(
    default_model: Path, fails: bool
) -> None:
    """A layer that reads what the one below left beside them, and does without it or not."""
    base = random_base(FAMILIES["llama"][0](), default_model)
    first, second = base.model.model.layers
    left: list[Tensor] = []

    def leave(_: Any, __: Any, output: Tensor) -> None:
        left[:] = [output]

    def read(_: Any, __: Any, output: Tensor) -> Tensor:
        if fails:
            return output + left.pop()
        return output + left.pop() if left else output

    first.mlp.register_forward_hook(leave)
    second.mlp.register_forward_hook(read)
    measure = make_measure(base)
    expected = scores_by_loop(base, dict(measure.layers))
    scores = exact_scores(measure)
    np.testing.assert_allclose(flat(scores.by_module), flat(expected), atol=2e-4)


@pytest.mark.parametrize("kind", [gradient_scores, exact_scores])
def test_measuring_leaves_no_trace(default_model: Path, kind: Any) -> None:
    base = random_base(FAMILIES["llama"][0](), default_model)
    measure = make_measure(base)
    # A model that draws, whatever mode it is in.
    base.model.model.norm.register_forward_hook(lambda *_: torch.rand(1) and None)
    before = {name: layer.factors for name, layer in measure.layers.items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = kind(measure)
    assert torch.equal(torch.rand(3), expected)
    # Dropout of 0.5 would make every measurement another.
    assert all(map(torch.equal, first.by_module.values(), kind(measure).by_module.values()))
    assert base.model.training
    for name, layer in measure.layers.items():
        assert layer.gates is None
        assert layer.training
        assert layer.lora_a.requires_grad
        assert layer.lora_b.requires_grad
        assert layer.lora_a.grad is None
        assert layer.scaling == before[name].scaling
        assert torch.equal(layer.lora_b, before[name].lora_b)


def test_gradient_checkpointing_changes_no_score(default_model: Path) -> None:
    base = random_base(FAMILIES["llama"][0](), default_model)
    measure = make_measure(base)
    plain = flat(gradient_scores(measure).by_module)
    base.model.gradient_checkpointing_enable({"use_reentrant": False})
    calls: list[int] = []
    base.model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    np.testing.assert_allclose(flat(gradient_scores(measure).by_module), plain, atol=1e-6)
    assert len(calls) == 4, "each pass computes a layer twice: it was checkpointed"


def test_layers_with_dropout_of_their_own_measure_without_it(default_model: Path) -> None:
    """OPT's layers read their own training mode, which is what lets them be checkpointed."""
    config = OPTConfig(
        vocab_size=128, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=32, dropout=0.5, pad_token_id=0,
    )  # fmt: skip
    base = random_base(config, default_model)
    measure = make_measure(base)
    plain = flat(gradient_scores(measure).by_module)
    base.model.gradient_checkpointing_enable({"use_reentrant": False})
    np.testing.assert_allclose(flat(gradient_scores(measure).by_module), plain, atol=1e-6)


def test_a_screened_score_orders_the_ranks_at_the_cut_by_ablation(default_model: Path) -> None:
    base = random_base(FAMILIES["llama"][0](), default_model)
    measure = make_measure(base)
    by_gradient = flat(gradient_scores(measure).by_module)
    exact = flat(exact_scores(measure).by_module)
    screened = flat(screened_scores(measure, num_moved=8).by_module)
    order = np.argsort(by_gradient, kind="stable")
    near = order[4:12]
    assert sorted(screened) == pytest.approx(sorted(by_gradient))
    others = np.delete(np.arange(len(order)), near)
    np.testing.assert_array_equal(screened[others], by_gradient[others])
    assert list(np.argsort(screened[near])) == list(np.argsort(exact[near]))
    # The control: by gradients alone these ranks stand in another order.
    assert list(np.argsort(by_gradient[near])) != list(np.argsort(exact[near]))
    # What may not go is not looked at: the ranks around the cut are those above it.
    names = list(measure.layers)
    sizes = np.cumsum([0, *(layer.rank for layer in measure.layers.values())])
    goes = np.ones(len(order), dtype=bool)
    goes[order[:5]] = False
    may_go = {
        name: torch.tensor(goes[start:stop])
        for name, start, stop in zip(names, sizes, sizes[1:], strict=False)
    }
    above = flat(screened_scores(measure, 8, may_go).by_module)
    near = order[9:17]
    assert list(np.argsort(above[near])) == list(np.argsort(exact[near]))
    others = np.delete(np.arange(len(order)), near)
    np.testing.assert_array_equal(above[others], by_gradient[others])


def test_random_scores_follow_the_seed_alone(default_model: Path) -> None:
    measure = make_measure(random_base(FAMILIES["llama"][0](), default_model))
    one, same, other = (flat(random_scores(measure, seed).by_module) for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).all()
