"""The probe of an adapter: what base model and adapter answered where the adapter was trained.

Owns its form in rora.json; adapters/verdict.py compares it with what an engine answers.
"""

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from adapters.digest import read_provenance
from adapters.folder import PROVENANCE_FILE
from adapters.limits import (
    MAX_PROBE_ANSWER_TOKENS,
    MAX_PROBE_NATS,
    MAX_PROBE_PROMPT_TOKENS,
    MAX_PROBE_PROMPTS,
)
from adapters.problems import Code, shown
from adapters.reading import refuse
from adapters.tolerance import Dtype, Form

_QUANTIZATIONS = ("nf4",)
_DTYPES: tuple[Dtype, ...] = get_args(Dtype)
_ENDLESS_TOKEN_ID = 2**31  # token ids are int32 in engines


@dataclass(frozen=True, slots=True)
class Answer:
    """The likeliest next tokens after a prompt, with their log-probs over the whole vocabulary."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ProbePrompt:
    """A prompt as token ids, and what both answered."""

    token_ids: tuple[int, ...]
    base: Answer
    adapter: Answer


@dataclass(frozen=True, slots=True)
class Probe:
    """What rora.json holds as `probe`.

    Args:
        dtype: that the base model was computed in.
        is_quantized: whether its weights were in 4 bits.
        prompts: at least one.
    """

    dtype: Dtype
    is_quantized: bool
    prompts: tuple[ProbePrompt, ...]

    @property
    def form(self) -> Form:
        """What decides how exactly it can be answered again."""
        return "quantized" if self.is_quantized else self.dtype


def read_probe(folder: Path) -> Probe | None:
    """Return an adapter's probe, or None if it brings none.

    Raises: ArtifactError: it breaks the form that docs/format.md gives, or its limits; or as
        `read_provenance`.
    """
    content = read_provenance(folder).get("probe")
    if content is None:
        return None
    try:
        return _probe(content)
    except _MalformedError as error:
        where, message = error.args
        path = folder / PROVENANCE_FILE
        raise refuse(Code.PROBE_FORM, path, message, where=f"{PROVENANCE_FILE}: {where}") from error


class _MalformedError(ValueError):
    """A part of a probe that is not what it should be: where it stands, what was found."""


def _probe(content: object) -> Probe:
    keys = _fields(content, "probe", {"dtype", "prompts"}, optional={"quantization"})
    if keys["dtype"] not in _DTYPES:
        raise _unlike("probe.dtype", keys["dtype"], f"one of {', '.join(_DTYPES)}")
    is_quantized = "quantization" in keys
    if is_quantized and keys["quantization"] not in _QUANTIZATIONS:
        expected = f"one of {', '.join(_QUANTIZATIONS)}"
        raise _unlike("probe.quantization", keys["quantization"], expected)
    prompts = _list(keys["prompts"], "probe.prompts", "prompts", MAX_PROBE_PROMPTS)
    read = [_prompt(prompt, f"probe.prompts[{at}]") for at, prompt in enumerate(prompts)]
    return Probe(keys["dtype"], is_quantized, tuple(read))


def _prompt(content: object, where: str) -> ProbePrompt:
    keys = _fields(content, where, {"token_ids", "base", "adapter"})
    ids = _token_ids(keys["token_ids"], f"{where}.token_ids", MAX_PROBE_PROMPT_TOKENS)
    base, adapter = (_answer(keys[side], f"{where}.{side}") for side in ("base", "adapter"))
    return ProbePrompt(ids, base, adapter)


def _answer(content: object, where: str) -> Answer:
    keys = _fields(content, where, {"token_ids", "log_probs"})
    ids = _token_ids(keys["token_ids"], f"{where}.token_ids", MAX_PROBE_ANSWER_TOKENS)
    if len(set(ids)) < len(ids):
        raise _unlike(f"{where}.token_ids", list(ids), "each token once")
    values = _list(keys["log_probs"], f"{where}.log_probs", "log-probs", MAX_PROBE_ANSWER_TOKENS)
    if len(values) != len(ids):
        found = f"{len(ids)} tokens and {len(values)} log-probs"
        raise _MalformedError(where, f"{found}, as many are expected")
    for value in values:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not -MAX_PROBE_NATS <= value <= 0:
            raise _unlike(f"{where}.log_probs", value, f"a number of {-MAX_PROBE_NATS:g} to 0")
    return Answer(ids, tuple(map(float, values)))


def _token_ids(content: object, where: str, most: int) -> tuple[int, ...]:
    ids = _list(content, where, "token ids", most)
    for token in ids:
        if type(token) is not int or not 0 <= token < _ENDLESS_TOKEN_ID:
            raise _unlike(where, token, "an integer from 0 to below 2^31")
    return tuple(ids)


def _fields(
    content: object, where: str, required: Set[str], *, optional: Set[str] = frozenset()
) -> dict[str, Any]:
    """Return an object that has these keys and no others."""
    if not isinstance(content, dict):
        raise _unlike(where, content, "an object")
    if not required <= content.keys() <= required | optional:
        raise _unlike(where, sorted(content), f"the keys {', '.join(sorted(required))}")
    return content


def _list(content: object, where: str, of: str, most: int) -> list[Any]:
    if not isinstance(content, list):
        raise _unlike(where, content, f"a list of {of}")
    if not 1 <= len(content) <= most:
        raise _MalformedError(where, f"{len(content)} {of}, 1 to {most} are expected")
    return content


def _unlike(where: str, found: object, expected: str) -> _MalformedError:
    return _MalformedError(where, f"found {shown(found)}, {expected} is expected")
