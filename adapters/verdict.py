"""Whether an engine answers a probe as it was trained: the comparison and its outcome.

Arithmetic only: the server asks its engine, the trainer its own model, and both are judged here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adapters.limits import MAX_PROBE_NATS
from adapters.probe import Answer, Probe
from adapters.tolerance import Difference, Form, Tolerance, rounding, tolerance_between

LogProbs = Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Found:
    """What an engine answered to one prompt: the likeliest next tokens with their log-probs.

    A token that is not there had at most the least of them. Both are empty if it was not asked.
    """

    base: LogProbs
    adapter: LogProbs


@dataclass(frozen=True, slots=True)
class Seen:
    """What an engine gave the stored tokens of one prompt; empty if it was not asked."""

    base: tuple[float, ...]
    adapter: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ProbeVerdict:
    """What came of comparing a probe with an engine.

    Args:
        passed: whether the engine applies what was trained, as far as the probe tells.
        reason: why, in one line.
        base, adapter: differences of the stored tokens' log-probs from the stored ones.
        tolerance: what was allowed of each.
        seen: of each prompt of the probe, what was compared.
    """

    passed: bool
    reason: str
    base: Difference
    adapter: Difference
    tolerance: Tolerance
    seen: tuple[Seen, ...]


def compare(probe: Probe, found: Sequence[Found], form: Form) -> ProbeVerdict:
    """Return whether an engine that computes in `form` answers a probe as it was trained.

    Base and adapter are each held to the tolerance between the two forms. Where the adapter does
    more than rounding, the engine's answers must also be nearer to the stored ones than to its base
    model's: those of an adapter that is not applied, or of another one, are not, however wide the
    tolerance is.

    Args: found: of each prompt of the probe.
    """
    numbers = [Found(_numbers(one.base), _numbers(one.adapter)) for one in found]
    seen = tuple(
        Seen(_given(prompt.base, one.base), _given(prompt.adapter, one.adapter))
        for prompt, one in zip(probe.prompts, numbers, strict=True)
    )
    pairs = list(zip(probe.prompts, seen, strict=True))
    base = _difference([(prompt.base, one.base) for prompt, one in pairs])
    adapter = _difference([(prompt.adapter, one.adapter) for prompt, one in pairs])
    allowed = tolerance_between(probe.form, form)
    fault = None
    if not allowed.allows(base):
        fault = (
            f"without the adapter log-probs differ by {_told(base)} from those of the training, at "
            f"most {_told(allowed)} is expected: this is another base model, or one that computes "
            "otherwise; serve the one that it was trained on"
        )
    elif not allowed.allows(adapter):
        fault = (
            f"the base model answers as in training, the adapter's log-probs differ by "
            f"{_told(adapter)}, at most {_told(allowed)} is expected: it is not what was trained; "
            "add it again as it was"
        )
    elif _is_as_the_base(probe, numbers, noise=rounding(allowed, base)):
        fault = (
            "the adapter's log-probs are nearer to the base model's than to those of the training: "
            "it is not applied, or not what was trained; add it again as it was"
        )
    right = "base model and adapter answer as in training"
    if not any(one.adapter for one in found):
        right = "every prompt of the probe is longer than what the engine takes"
    reason = f"trained in {probe.form}, computed in {form}: {fault or right}"
    return ProbeVerdict(fault is None, reason, base, adapter, allowed, seen)


def to_json(verdict: ProbeVerdict) -> dict[str, Any]:
    """Return a verdict as it stands in JSON."""
    return asdict(verdict)


def from_json(content: Any) -> ProbeVerdict:
    """Return the verdict that JSON holds.

    Raises: ValueError, TypeError, KeyError, AttributeError: it holds none.
    """
    if type(content["passed"]) is not bool or not isinstance(content["reason"], str):
        raise ValueError("a verdict is not what it should be")
    base, adapter, tolerance = (
        _floats([content[part]["mean"], content[part]["largest"]])
        for part in ("base", "adapter", "tolerance")
    )
    return ProbeVerdict(
        content["passed"],
        content["reason"],
        Difference(*base),
        Difference(*adapter),
        Tolerance(*tolerance),
        tuple(Seen(_floats(one["base"]), _floats(one["adapter"])) for one in content["seen"]),
    )


def _floats(values: Any) -> tuple[float, ...]:
    if not all(isinstance(value, float) and math.isfinite(value) for value in values):
        raise ValueError("a number is none")
    return tuple(values)


def _numbers(log_probs: LogProbs) -> dict[int, float]:
    """Return log-probs with what is no number as far off as can be."""
    return {
        token: value if math.isfinite(value) else -MAX_PROBE_NATS
        for token, value in log_probs.items()
    }


def _given(answer: Answer, found: LogProbs) -> tuple[float, ...]:
    """Return what was found for the stored tokens; for one that is missing, the nearest it can be.

    Its log-prob is at most the least of those that were found.
    """
    if not found:
        return ()
    least = min(found.values())
    return tuple(
        found.get(token, min(stored, least))
        for token, stored in zip(answer.token_ids, answer.log_probs, strict=True)
    )


def _difference(pairs: Sequence[tuple[Answer, tuple[float, ...]]]) -> Difference:
    distances = [
        abs(here - stored)
        for answer, seen in pairs
        if seen
        for here, stored in zip(seen, answer.log_probs, strict=True)
    ]
    return Difference(sum(distances) / max(len(distances), 1), max(distances, default=0.0))


def _is_as_the_base(probe: Probe, found: Sequence[Found], *, noise: float) -> bool:
    """Tell whether the adapter's answers are nearer to the base model's here than to the stored.

    Where the adapter's effect is not above `noise`, a mean of log-probs, nothing can be told.
    """
    own = others = effect = 0.0
    num_tokens = 0
    for prompt, one in zip(probe.prompts, found, strict=True):
        if not one.adapter:
            continue
        answer, least = prompt.adapter, min(one.adapter.values())
        here = _given(answer, one.adapter)
        without = [one.base.get(token, min(one.base.values())) for token in answer.token_ids]
        for token, stored, value, base in zip(
            answer.token_ids, answer.log_probs, here, without, strict=True
        ):
            if token not in one.adapter and stored <= least:
                continue  # it may be anything below
            own += (value - stored) ** 2
            others += (value - base) ** 2
            effect += abs(stored - base)
            num_tokens += 1
    return num_tokens > 0 and effect / num_tokens > noise and own >= others


def _told(part: Difference | Tolerance) -> str:
    return f"mean {part.mean:.2g}, largest {part.largest:.2g}"
