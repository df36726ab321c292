"""Who loses and gets ranks, when, and what happens to a layer and its moments then."""

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from adapters import AdapterConfig, resolve_scalings
from adapters.errors import ConfigError, DataError, TrainingError
from trainer.allocation import (
    Allocation,
    Move,
    check_num_moved,
    choose_move,
    extra_tokens,
    plan_rounds,
    set_apart,
    trained_config,
)
from trainer.config import (
    AdapterSettings,
    AllocationSettings,
    DataSettings,
    LoopSettings,
    TrainConfig,
)
from trainer.data import Sample
from trainer.loop import plan_run
from trainer.lora_linear import LoraLinear
from trainer.optim import RankAdamW


def make_config(*, method: Literal["lora", "rora"] = "rora", **allocation: Any) -> TrainConfig:
    return TrainConfig(
        output=Path("unused"),
        data=DataSettings(train="unused"),
        adapter=AdapterSettings(method=method, rank=4, alpha=6.0),
        allocation=AllocationSettings(**{"enabled": True, "score_samples": 4} | allocation),
        train=LoopSettings(epochs=3, batch_tokens=64),
    )


def make_layer(
    rank: int, *, scaling: float = 3.0, size_in: int = 6, size_out: int = 5
) -> LoraLinear:
    layer = LoraLinear(
        nn.Linear(size_in, size_out).requires_grad_(False), size_in, size_out,
        rank=rank, scaling=scaling, dropout=0.0, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    layer.lora_b.data.normal_(generator=torch.Generator().manual_seed(1))
    return layer


def scores_of(**values: list[float]) -> dict[str, Tensor]:
    return {name: torch.tensor(scores, dtype=torch.float64) for name, scores in values.items()}


def no_limit(scores: dict[str, Tensor]) -> dict[str, int]:
    return dict.fromkeys(scores, 10_000)


def test_the_papers_example_is_dealt_out_3_3_2() -> None:
    """8 ranks over three modules that lost none, m1 before m2 before m3 by average importance."""
    scores = scores_of(low=[0.0] * 8, m3=[5.0, 1.0], m1=[9.0, 9.0], m2=[4.0, 4.0])
    move = choose_move(scores, num_moved=8, max_ranks=no_limit(scores))
    assert move == Move({"low": tuple(range(8))}, {"m1": 3, "m2": 3, "m3": 2})


def test_if_every_module_lost_a_rank_none_is_added() -> None:
    scores = scores_of(a=[0.0, 5.0], b=[1.0, 6.0])
    move = choose_move(scores, num_moved=2, max_ranks=no_limit(scores))
    assert move == Move({"a": (0,), "b": (0,)}, {})


def test_the_least_important_ranks_go_and_ties_go_by_module_and_index() -> None:
    scores = scores_of(a=[2.0, 1.0], b=[1.0, 0.5], c=[1.0])
    move = choose_move(scores, num_moved=3, max_ranks=no_limit(scores))
    assert move.pruned == {"a": (1,), "b": (0, 1)}
    assert move.grown == {"c": 3}


def test_a_negative_score_is_less_than_a_small_one() -> None:
    """S is minus the loss: masking what has a negative score helps more than keeping it alone."""
    scores = scores_of(a=[0.01, -3.0], b=[1.0, 1.0])
    move = choose_move(scores, num_moved=1, max_ranks=no_limit(scores))
    assert move.pruned == {"a": (1,)}


def test_a_module_without_ranks_gets_one_last() -> None:
    scores = scores_of(low=[0.0, 0.0], none=[], high=[1.0, 1.0])
    assert choose_move(scores, num_moved=1, max_ranks=no_limit(scores)).grown == {"high": 1}
    move = choose_move(scores, num_moved=2, max_ranks=no_limit(scores))
    assert move.grown == {"high": 1, "none": 1}


def test_limits_are_kept() -> None:
    scores = scores_of(a=[0.0, 0.1, 0.2], b=[0.3, 0.4], c=[8.0], d=[9.0])
    move = choose_move(scores, num_moved=4, max_ranks=no_limit(scores) | {"d": 2}, min_rank=1)
    assert move == Move({"a": (0, 1), "b": (0,)}, {"c": 2, "d": 1})
    spared = {"a": torch.tensor([True, False, False])} | {
        name: torch.zeros(len(scores[name]), dtype=torch.bool) for name in "bcd"
    }
    move = choose_move(scores, num_moved=1, max_ranks=no_limit(scores), spared=spared)
    assert move.pruned == {"a": (1,)}


def test_a_score_that_is_no_number_is_told_with_its_place() -> None:
    scores = scores_of(a=[0.0, math.nan])
    with pytest.raises(TrainingError, match="a: the score of rank 1 is not a number"):
        choose_move(scores, num_moved=1, max_ranks=no_limit(scores))


@given(
    st.lists(
        st.tuples(st.lists(st.integers(-3, 3), max_size=5), st.integers(0, 4)),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 12),
    st.integers(0, 2),
)
def test_what_algorithm_1_promises_holds_for_all_scores(
    modules: list[tuple[list[int], int]], num_moved: int, min_rank: int
) -> None:
    scores = {
        f"m{place}": torch.tensor([float(value) for value in values], dtype=torch.float64)
        for place, (values, _) in enumerate(modules)
    }
    max_ranks = {
        name: len(scores[name]) + room for name, (_, room) in zip(scores, modules, strict=True)
    }
    move = choose_move(scores, num_moved=num_moved, max_ranks=max_ranks, min_rank=min_rank)

    # The ranks that go, found by a loop over all of them in the order of their scores.
    left = {name: len(of_module) for name, of_module in scores.items()}
    gone: list[tuple[str, int, float]] = []
    for score, place, index in sorted(
        (float(score), place, index)
        for place, of_module in enumerate(scores.values())
        for index, score in enumerate(of_module)
    ):
        name = f"m{place}"
        if len(gone) < num_moved and left[name] > min_rank:
            left[name] -= 1
            gone.append((name, index, score))
    assert {(name, i) for name, indices in move.pruned.items() for i in indices} == {
        (name, index) for name, index, _ in gone
    }
    assert not move.pruned.keys() & move.grown.keys()
    unpruned = [name for name in scores if name not in move.pruned]
    room = {name: max_ranks[name] - len(scores[name]) for name in unpruned}
    assert all(count <= room[name] for name, count in move.grown.items())
    assert sum(move.grown.values()) == min(len(gone), sum(room.values()))
    # Even: who got less than another had no room, or is no more important and got one less.
    for one in unpruned:
        for other in unpruned:
            difference = move.grown.get(other, 0) - move.grown.get(one, 0)
            if move.grown.get(one, 0) < room[one]:
                assert difference <= 1
                if difference == 1 and len(scores[one]):
                    assert len(scores[other])
                    assert scores[other].mean() >= scores[one].mean()


def allocation_of(config: TrainConfig, num_modules: int = 2) -> Allocation:
    return Allocation(config, num_modules, rounds_after=(3, 5, 7), score_samples=())


@pytest.mark.parametrize("scale_rank", ["current", "initial"])
@pytest.mark.parametrize("method", ["lora", "rora"])
def test_what_the_other_ranks_compute_stays_when_ranks_move(
    method: Literal["lora", "rora"], scale_rank: str
) -> None:
    allocation = allocation_of(make_config(method=method, scale_rank=scale_rank))
    layers = {name: make_layer(4, scaling=allocation.scaling(4)) for name in "ab"}
    optimizer = RankAdamW(layers, weight_decay=0.0)
    x = torch.randn(7, 6)
    layers["a"].lora_b.data[:, [1, 3]] = 0  # what goes had no part in the output
    expected = {name: layer(x) for name, layer in layers.items()}
    allocation.apply(Move({"a": (1, 3)}, {"b": 2}), optimizer, 1)
    assert (layers["a"].rank, layers["b"].rank) == (2, 6)
    for name, layer in layers.items():
        torch.testing.assert_close(layer(x), expected[name], atol=1e-5, rtol=0)
        adapter = allocation.config.adapter
        rank = 4 if scale_rank == "initial" else layer.rank
        power = 0.5 if method == "rora" else 1.0
        assert layer.scaling == pytest.approx(adapter.alpha / rank**power)
    config = AdapterConfig(4, 6.0, use_rslora=method == "rora")
    written = resolve_scalings(trained_config(config, layers), list(layers))
    for name, layer in layers.items():
        assert written[name].rank == layer.rank
        assert written[name].scaling == pytest.approx(layer.scaling, rel=1e-9)


def test_new_rows_of_a_are_drawn_like_the_first_and_by_seed_and_round() -> None:
    drawn = []
    for number in (1, 1, 2):
        allocation = allocation_of(make_config())
        layers = {name: make_layer(4, size_in=4096) for name in "ab"}
        move = Move({"a": (0, 1, 2, 3)}, {"b": 4})
        allocation.apply(move, RankAdamW(layers, weight_decay=0.0), number)
        drawn.append(layers["b"].lora_a[4:].detach())
        assert not layers["b"].lora_b[:, 4:].any()
        # Uniform within 1/sqrt(in_features), whatever the rank: Kaiming's with a = sqrt(5).
        assert float(drawn[-1].abs().max()) == pytest.approx(1 / 64, rel=1e-3)
        assert float(drawn[-1].std()) == pytest.approx(1 / 64 / 3**0.5, rel=0.03)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_moments_follow_their_ranks_and_survivors_step_as_if_nothing_moved() -> None:
    """With the scaling fixed, whoever stays takes the very steps it would have taken."""
    moved, still = {"a": make_layer(4)}, {"a": make_layer(4)}
    optimizers = [RankAdamW(layers, weight_decay=0.01) for layers in (moved, still)]
    generator = torch.Generator().manual_seed(3)

    def step_all(kept: list[int]) -> None:
        gradient_a = torch.randn(4, 6, generator=generator)
        gradient_b = torch.randn(5, 4, generator=generator)
        still["a"].lora_a.grad, still["a"].lora_b.grad = gradient_a, gradient_b
        num_new = moved["a"].rank - len(kept)
        moved["a"].lora_a.grad = torch.cat([gradient_a[kept], torch.ones(num_new, 6)])
        moved["a"].lora_b.grad = torch.cat([gradient_b[:, kept], torch.ones(5, num_new)], dim=1)
        for optimizer in optimizers:
            optimizer.step(1e-2)

    for _ in range(3):
        step_all([0, 1, 2, 3])
    optimizers[0].resize("a", [0, 2], 3, scaling=3.0, generator=generator)
    fresh = moved["a"].lora_a[2:].detach().clone()
    for number in range(1, 4):
        step_all([0, 2])
        torch.testing.assert_close(moved["a"].lora_a[:2], still["a"].lora_a[[0, 2]])
        torch.testing.assert_close(moved["a"].lora_b[:, :2], still["a"].lora_b[:, [0, 2]])
        if number == 1:
            # Bias correction by their own age: with a constant gradient a full step at once.
            step = fresh * (1 - 1e-2 * 0.01) - moved["a"].lora_a[2:].detach()
            torch.testing.assert_close(step, torch.full_like(step, 1e-2), atol=1e-6, rtol=1e-4)
    assert optimizers[0].state["a"]["num_steps"].tolist() == [6, 6, 3, 3, 3]


def test_a_compensated_b_takes_the_steps_of_its_own_scale() -> None:
    """Scaling halved and B doubled after two steps, or from the start with gradients as they are:
    the same moments, and so the same steps from there on."""
    changed, from_start = make_layer(1, scaling=4.0), make_layer(1, scaling=2.0)
    from_start.base = changed.base
    from_start.lora_b.data.mul_(2)
    optimizers = [RankAdamW({"a": layer}, weight_decay=0.0) for layer in (changed, from_start)]
    x = torch.randn(9, 6)

    def gradients(layer: LoraLinear) -> None:
        layer.lora_a.grad = layer.lora_b.grad = None
        layer(x).square().sum().backward()

    for _ in range(2):
        gradients(changed)
        optimizers[0].step(1e-3)
        # The other layer stands where this one does, so that its gradients are of the same point.
        gradients(from_start)
        optimizers[1].step(0.0)
        from_start.lora_a.data.copy_(changed.lora_a)
        from_start.lora_b.data.copy_(2 * changed.lora_b)
    optimizers[0].resize("a", [0], 0, scaling=2.0, generator=torch.Generator())
    torch.testing.assert_close(changed.lora_b, from_start.lora_b)
    for key, moment in optimizers[0].state["a"].items():
        torch.testing.assert_close(moment, optimizers[1].state["a"][key])
    for layer, optimizer in zip((changed, from_start), optimizers, strict=True):
        gradients(layer)
        optimizer.step(1e-3)
    torch.testing.assert_close(changed.lora_a, from_start.lora_a)
    torch.testing.assert_close(changed.lora_b, from_start.lora_b)


def test_a_layer_without_ranks_is_its_base_and_can_come_back() -> None:
    allocation = allocation_of(make_config())
    layers = {name: make_layer(4) for name in "ab"}
    optimizer = RankAdamW(layers, weight_decay=0.1)
    allocation.apply(Move({"a": (0, 1, 2, 3)}, {"b": 4}), optimizer, 1)
    x = torch.randn(3, 6)
    assert torch.equal(layers["a"](x), layers["a"].base(x))
    assert layers["a"].scaling == 0
    layers["b"](x).sum().backward()
    layers["a"].lora_a.grad = torch.zeros(0, 6)
    layers["a"].lora_b.grad = torch.zeros(5, 0)
    optimizer.step(1e-3)
    allocation.apply(Move({"b": (0,)}, {"a": 1}), optimizer, 2)
    assert layers["a"].scaling == pytest.approx(6.0)
    layers["a"](x).sum().backward()
    assert layers["a"].lora_b.grad is not None
    assert layers["a"].lora_b.grad.any()


def test_new_ranks_are_spared_for_the_rounds_of_grace() -> None:
    spared = {}
    for grace in (0, 1):
        allocation = allocation_of(make_config(grace_rounds=grace, ranks_per_round=1))
        layers = {name: make_layer(4) for name in "ab"}
        optimizer = RankAdamW(layers, weight_decay=0.0)
        optimizer.state["a"]["num_steps"] += 3
        optimizer.state["b"]["num_steps"] += 3
        allocation.apply(Move({"a": (0,)}, {"b": 1}), optimizer, 1)
        for state in optimizer.state.values():
            state["num_steps"] += 2

        class AsMeasured:
            by_module = scores_of(a=[1.0, 1.0, 1.0], b=[0.5, 1.0, 1.0, 1.0, 0.0])

        by_age = allocation.spared(optimizer, 2)
        move = allocation.choose(AsMeasured, by_age, optimizer)  # type: ignore[arg-type]
        spared[grace] = move.pruned
    assert spared == {0: {"b": (4,)}, 1: {"b": (0,)}}


@pytest.mark.parametrize(
    ("settings", "num_modules", "message"),
    [
        ({"ranks_per_round": 8}, 2, "8 moves 8 ranks, fewer than the 8 that may go from 2 modules"),
        ({"ranks_per_round": 0.999}, 50, "0.999 moves 200 ranks, fewer than the 200"),
        ({"ranks_per_round": 2, "min_rank": 3}, 2, "2 moves 2 ranks, fewer than the 2"),
        ({"ranks_per_round": 1}, 1, "one module is adapted, two at least are expected"),
    ],
)
def test_moves_that_can_not_be_are_refused(
    settings: dict[str, Any], num_modules: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_num_moved(make_config(**settings), num_modules)
    check_num_moved(make_config(ranks_per_round=7), num_modules=2)


def test_a_round_leaves_a_rank() -> None:
    """Also where rounds before it took more than they gave."""
    allocation = allocation_of(make_config(ranks_per_round=7))
    layers = {"a": make_layer(1), "b": make_layer(1)}
    optimizer = RankAdamW(layers, weight_decay=0.0)

    class AsMeasured:
        by_module = scores_of(a=[1.0], b=[2.0])

    move = allocation.choose(AsMeasured, allocation.spared(optimizer, 1), optimizer)  # type: ignore[arg-type]
    assert move == Move({"a": (0,)}, {"b": 1})


def test_both_readings_of_how_many_ranks_move() -> None:
    """7, for the seven kinds of module, or an eighth of all ranks."""
    assert allocation_of(make_config(ranks_per_round=7), num_modules=210).num_moved == 7
    of_all = allocation_of(make_config(ranks_per_round=0.125), num_modules=210)
    assert (of_all.budget, of_all.num_moved) == (840, 105)


SAMPLES = [Sample((1, 2, 3 + n), (False, False, True)) for n in range(40)]


def test_rounds_follow_the_passes_that_were_asked_for() -> None:
    config = make_config(warmup_epochs=1.0, rounds=4, epochs_per_round=0.5)
    plan = plan_run(config, [3] * 40, packed=True)  # 2 steps a pass
    assert plan_rounds(config, [epochs for epochs, _ in plan]) == (2, 3, 4, 5)
    none = make_config(warmup_epochs=1.0, rounds=4, epochs_per_round=0.5, score="off")
    assert plan_rounds(none, [epochs for epochs, _ in plan]) == ()


def test_rounds_without_steps_between_them_are_refused() -> None:
    config = make_config(warmup_epochs=1.0, rounds=8, epochs_per_round=0.25)
    plan = plan_run(config, [3] * 40, packed=True)
    with pytest.raises(ConfigError, match="rounds 2 and 3 both follow step 3"):
        plan_rounds(config, [epochs for epochs, _ in plan])


def test_a_round_behind_the_last_step_is_refused() -> None:
    config = make_config(warmup_epochs=1.0, rounds=2, epochs_per_round=0.9)
    plan = plan_run(config, [30] * 6, packed=True)  # 3 steps a pass
    epochs = [epochs for epochs, _ in plan]
    assert plan_rounds(config, epochs) == (3, 6)
    with pytest.raises(ConfigError, match="round 2 would follow the last step, 6"):
        plan_rounds(config, epochs[:6])


def test_what_ranks_are_measured_on_is_not_trained_on() -> None:
    config = make_config(score_samples=8)
    twice = [*SAMPLES, *SAMPLES]
    kept, apart = set_apart(config, twice)
    assert len(apart) == len(set(apart)) == 8
    assert len(kept) == 2 * (40 - 8)
    assert not set(kept) & set(apart)
    assert set_apart(config, twice) == (kept, apart)
    disabled = config.model_copy(update={"allocation": AllocationSettings()})
    assert set_apart(disabled, SAMPLES) == (tuple(SAMPLES), ())
    with pytest.raises(DataError, match="15 different samples, at least 16 are expected"):
        set_apart(config, SAMPLES[:15] * 4)


def test_the_control_without_moves_trains_for_the_time_that_scores_take() -> None:
    """Eight rounds, each two passes over the 4 samples of 3 tokens: 192 tokens, 4 steps of 63."""
    settings: dict[str, Any] = {"warmup_epochs": 1.0, "rounds": 8, "epochs_per_round": 0.25}
    plans = {
        score: plan_run(
            make_config(score=score, **settings),
            [3] * 420,
            packed=True,
            extra_tokens=extra_tokens(make_config(score=score, **settings), SAMPLES[:4]),
        )
        for score in ("gradient", "off")
    }
    assert len(plans["gradient"]) == 60
    assert len(plans["off"]) == 60 + math.ceil(192 / 63)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks_per_round": 0}, "whole number from 1"),
        ({"ranks_per_round": 1.5}, "whole number from 1"),
        ({"ranks_per_round": 1.0}, "whole number from 1"),
        ({"ranks_per_round": "1.0"}, "whole number from 1"),
        ({"ranks_per_round": "nan"}, "whole number from 1"),
        ({"ranks_per_round": True}, "whole number from 1"),
        ({"rounds": 9}, "train.epochs is 3, at least .* = 3.25 is expected"),
        ({"min_rank": 4}, "allocation.min_rank is 4, below adapter.rank = 4 is expected"),
        ({"warmup_epochs": 0}, "greater than 0"),
    ],
)
def test_settings_that_can_not_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_config(**settings)
