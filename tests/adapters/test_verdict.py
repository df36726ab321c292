"""Pure numbers: an engine's answers beside what is stored."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from adapters.probe import Answer, Probe, ProbePrompt
from adapters.tolerance import TOLERANCES, Difference, Form, tolerance_between
from adapters.verdict import Found, compare, from_json, to_json

BASE = Answer((1, 2, 3, 4), (-0.5, -1.5, -2.5, -4.0))
# It moves two of the base's tokens and brings two others.
ADAPTER = Answer((3, 5, 1, 6), (-0.3, -1.9, -3.0, -5.0))
PROBE = Probe(
    "float32",
    is_quantized=False,
    prompts=tuple(ProbePrompt((7, 8, number), BASE, ADAPTER) for number in range(3)),
)
BASE_ANSWER = {1: -0.5, 2: -1.5, 3: -2.5, 4: -4.0, 5: -7.0, 6: -8.0, 9: -9.0}
ADAPTER_ANSWER = {3: -0.3, 5: -1.9, 1: -3.0, 6: -5.0, 2: -6.0, 9: -9.0}


def found(
    base: Mapping[int, float] = BASE_ANSWER, adapter: Mapping[int, float] = ADAPTER_ANSWER
) -> list[Found]:
    return [Found(base, adapter) for _ in PROBE.prompts]


def moved(answer: Mapping[int, float], by: float, tokens: Sequence[int] = ()) -> dict[int, float]:
    """Every log-prob, or those of some tokens, moved up and down in turn."""
    chosen = [token for token in answer if not tokens or token in tokens]
    shift = {token: by if place % 2 else -by for place, token in enumerate(chosen)}
    return {token: value + shift.get(token, 0.0) for token, value in answer.items()}


def mixed(share: float) -> dict[int, float]:
    """What an adapter answers of which only a share of its effect arrives."""
    return {
        token: (1 - share) * BASE_ANSWER[token] + share * value
        for token, value in ADAPTER_ANSWER.items()
    }


def with_effect(size: float) -> tuple[Probe, dict[int, float]]:
    """A probe whose adapter moves each of the base's log-probs by `size`, and its answers."""
    answer = moved({token: BASE_ANSWER[token] for token in BASE.token_ids}, size)
    adapter = Answer(BASE.token_ids, tuple(answer.values()))
    prompts = tuple(replace(prompt, adapter=adapter) for prompt in PROBE.prompts)
    return replace(PROBE, prompts=prompts), answer


def test_the_same_answers_pass_and_so_do_those_that_rounding_moves() -> None:
    same = compare(PROBE, found(), "float32")
    assert same.passed
    assert same.base == same.adapter == Difference(0.0, 0.0)
    assert same.tolerance == TOLERANCES["float32"]
    assert same.reason == (
        "trained in float32, computed in float32: base model and adapter answer as in training"
    )
    rounded = compare(
        PROBE, found(moved(BASE_ANSWER, 5e-5), moved(ADAPTER_ANSWER, 9e-5)), "float32"
    )
    assert rounded.passed
    assert rounded.base == Difference(pytest.approx(5e-5), pytest.approx(5e-5))  # type: ignore[arg-type]
    assert rounded.adapter == Difference(pytest.approx(9e-5), pytest.approx(9e-5))  # type: ignore[arg-type]


@pytest.mark.parametrize(("by", "passes"), [(0.2, True), (0.3, False)])
def test_what_is_allowed_is_for_the_pair_of_forms(by: float, passes: bool) -> None:
    answers = found(moved(BASE_ANSWER, by), moved(ADAPTER_ANSWER, by))
    assert compare(PROBE, answers, "bfloat16").passed is passes
    assert not compare(PROBE, answers, "float32").passed
    assert not compare(PROBE, answers, "float16").passed
    assert compare(PROBE, answers, "quantized").passed
    quantized = replace(PROBE, is_quantized=True)
    assert compare(quantized, answers, "float32").passed


def test_two_roundings_are_allowed_more_than_one() -> None:
    forms: tuple[Form, ...] = ("float32", "bfloat16", "float16", "quantized")
    for form in forms:
        assert tolerance_between("float32", form) == TOLERANCES[form]
        assert tolerance_between(form, "float32") == TOLERANCES[form]
    both = tolerance_between("bfloat16", "bfloat16")
    assert both.mean == pytest.approx(math.sqrt(2) * TOLERANCES["bfloat16"].mean)
    assert both.largest == pytest.approx(math.sqrt(2) * TOLERANCES["bfloat16"].largest)


def test_another_base_is_told_in_other_words_than_another_adapter() -> None:
    base = compare(PROBE, found(base=moved(BASE_ANSWER, 0.01)), "float32")
    assert not base.passed
    assert "without the adapter log-probs differ by mean 0.01, largest 0.01" in base.reason
    assert "this is another base model, or one that computes otherwise" in base.reason
    adapter = compare(PROBE, found(adapter=moved(ADAPTER_ANSWER, 0.01)), "float32")
    assert not adapter.passed
    assert "the base model answers as in training, the adapter's log-probs" in adapter.reason
    assert "mean 0.01, largest 0.01, at most mean 0.0001, largest 0.002" in adapter.reason
    assert adapter.base == Difference(0.0, 0.0)
    both = compare(PROBE, found(moved(BASE_ANSWER, 0.01), moved(ADAPTER_ANSWER, 0.01)), "float32")
    assert both.reason == base.reason


def test_one_token_that_is_far_off_is_enough() -> None:
    """The mean over many tokens would hide it."""
    prompts = tuple(replace(PROBE.prompts[0], token_ids=(n,)) for n in range(16))
    probe = replace(PROBE, prompts=prompts)
    answers = [Found(BASE_ANSWER, ADAPTER_ANSWER) for _ in prompts]
    answers[5] = Found(BASE_ANSWER, moved(ADAPTER_ANSWER, 0.003, [5]))
    verdict = compare(probe, answers, "float32")
    assert verdict.adapter.mean < verdict.tolerance.mean
    assert not verdict.passed


@pytest.mark.parametrize("form", ["float32", "bfloat16", "float16"])
def test_an_adapter_that_is_not_applied_never_passes(form: Form) -> None:
    """Also where its effect is below what 16 bits may move an answer; the control passes."""
    for size in (0.2, 1.0):
        probe, answer = with_effect(size)
        drift = 0.02 if form == "bfloat16" else 0.0
        base, right = moved(BASE_ANSWER, drift), moved(answer, drift)
        control = compare(probe, found(base, right), form)
        assert control.passed or form == "float16"
        verdict = compare(probe, found(base, base), form)
        assert not verdict.passed
        small = size < tolerance_between("float32", form).mean
        assert ("nearer to the base model's than to those of the training" in verdict.reason) is (
            small
        )


def test_another_adapter_of_the_same_strength_is_not_this_one() -> None:
    probe, answer = with_effect(0.15)
    other = {token: 2 * BASE_ANSWER[token] - value for token, value in answer.items()}
    assert compare(probe, found(adapter=answer), "bfloat16").passed
    assert not compare(probe, found(adapter=other), "bfloat16").passed


def test_an_effect_below_rounding_tells_nothing_and_passes() -> None:
    probe, answer = with_effect(0.05)
    noisy_base, noisy = moved(BASE_ANSWER, 0.05, [1, 3]), moved(answer, 0.06, [1, 2])
    assert compare(probe, found(noisy_base, noisy), "bfloat16").passed
    assert compare(probe, found(noisy_base, noisy_base), "bfloat16").passed
    # In an engine whose base model does not move it tells.
    assert not compare(probe, found(BASE_ANSWER, BASE_ANSWER), "bfloat16").passed


@pytest.mark.parametrize(("share", "passes"), [(1.0, True), (0.5, False), (2.0, False)])
def test_an_effect_of_another_size_is_not_the_trained_one(share: float, passes: bool) -> None:
    """As of alpha / rank in the place of alpha / sqrt(rank)."""
    assert compare(PROBE, found(adapter=mixed(share)), "bfloat16").passed is passes


def test_a_token_outside_of_the_engines_list_had_at_most_its_least() -> None:
    short = {token: value for token, value in ADAPTER_ANSWER.items() if value > -3.5}
    verdict = compare(PROBE, found(adapter=short), "float32")
    assert verdict.passed
    assert verdict.seen[0].adapter == (-0.3, -1.9, -3.0, -5.0)
    # It should have been in this list, and was not.
    long = {token: value for token, value in ADAPTER_ANSWER.items() if token != 6}
    verdict = compare(PROBE, found(adapter=long), "float32")
    assert not verdict.passed
    assert verdict.seen[0].adapter[3] == -9.0
    assert verdict.adapter.largest == 4.0


def test_what_the_engine_could_not_be_asked_counts_for_nothing() -> None:
    some = [Found({}, {}), *found()[1:]]
    verdict = compare(PROBE, some, "float32")
    assert verdict.passed
    assert verdict.seen[0].base == ()
    assert not compare(PROBE, [Found({}, {}), *found(adapter=BASE_ANSWER)[1:]], "float32").passed
    none = compare(PROBE, [Found({}, {})] * 3, "float32")
    assert none.passed
    assert "every prompt of the probe is longer than what the engine takes" in none.reason


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", ["float32", "quantized"])
def test_answers_that_are_no_numbers_never_pass(value: float, form: Form) -> None:
    for side in ("base", "adapter"):
        answer: dict[str, Any] = {side: {**getattr(found()[0], side), 3: value}}
        verdict = compare(PROBE, found(**answer), form)
        assert not verdict.passed
        assert from_json(json.loads(json.dumps(to_json(verdict), allow_nan=False))) == verdict


def test_a_verdict_is_written_and_read() -> None:
    for answers in (found(), found(adapter=BASE_ANSWER), [Found({}, {})] * 3):
        verdict = compare(PROBE, answers, "bfloat16")
        assert from_json(json.loads(json.dumps(to_json(verdict)))) == verdict
