r"""Matching PEFT's patterns against module paths, in bounded time.

The keys of `rank_pattern` and `alpha_pattern` and a text in `target_modules` are regular
expressions in somebody else's file. Python's `re` can backtrack on one of them for ever, so most
keys, which are plain paths, are looked up, and the rest is matched by RE2, in linear time. What RE2
does not have (lookaround, backreferences) is refused.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import re2

from adapters.errors import ArtifactError
from adapters.folder import CONFIG_FILE
from adapters.limits import (
    MAX_EXPRESSIONS,
    MAX_PATTERN_LENGTH,
    MAX_PATTERN_STEPS,
    MAX_TENSORS,
)
from adapters.problems import Code, Problem, refusal, shown

_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")
# What both engines accept and read differently. No module path needs it.
_READ_DIFFERENTLY = re.compile(r"\{,|\[\[|\[:|--|&&|\|\||~~|\\\d|\(\?[aiLmsux-]|[^\x20-\x7e]")
_SHORT = 100  # characters of a pattern that Python compiles at once, whatever they are
_MAX_NAMED = 100  # keys without a match; more of them say nothing new
_MAX_PROGRAM_BYTES = 64 * 1024  # of one expression, compiled

_NOTHING: Mapping[tuple[int, ...], dict[str, int]] = {}

Value = TypeVar("Value")


class PatternTable:
    r"""Finds the first key that matches a module, by PEFT's rule: `(.*\.)?(key)$` from the start.

    A plain key of letters, digits, "_", "-" and "." matches the end of a path, after a dot or from
    its beginning, where a dot of the key stands for any character. Those keys are grouped by length
    and by where their dots are, so that a path is looked up once in each group that can match it.

    Args:
        keys: in the order of the configuration; each passes `check_key`.
    Source: peft 0.21 `utils/other.py: get_pattern_key`.
    Checked against: PEFT's own function, in tests/adapters/test_patterns.py.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys = tuple(keys)
        # {length: {positions of dots: {key with its dots left out: order}}}
        self._plain: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._regular: list[tuple[int, Any]] = []
        for order, key in enumerate(self.keys):
            if _PLAIN.fullmatch(key):
                dots = tuple(i for i, char in enumerate(key) if char == ".")
                group = self._plain.setdefault(len(key), {}).setdefault(dots, {})
                group.setdefault(_without(key, dots), order)
            else:
                self._regular.append((order, _compiled(rf"(?:.*\.)?(?:{key})$")))

    def first_match(self, module: str) -> str | None:
        """Return the first key that matches, or None."""
        found = min(self._matches(module), default=None)
        return None if found is None else self.keys[found]

    def unmatched(self, modules: Iterable[str]) -> list[str]:
        """Return the keys that match none of `modules`, in their order."""
        left = set(range(len(self.keys)))
        for module in modules:
            if not left:
                break
            left.difference_update(self._matches(module))
        return [self.keys[order] for order in sorted(left)]

    def steps(self, modules: Iterable[str]) -> int:
        """Return an upper bound of the steps that matching every module once can take."""
        num_groups = sum(map(len, self._plain.values()))
        each: int = num_groups + sum(program.programsize for _, program in self._regular)
        return each * sum(map(len, modules))

    def _matches(self, module: str) -> Iterator[int]:
        for start in _suffix_starts(module):
            for dots, group in self._plain.get(len(module) - start, _NOTHING).items():
                order = group.get(_without(module[start:], dots))
                if order is not None:
                    yield order
        for order, program in self._regular:
            if program.match(module):
                yield order


def check_keys(name: str, keys: Sequence[str]) -> list[Problem]:
    """Say which keys of `rank_pattern` or `alpha_pattern` can not be matched as PEFT would."""
    if len(keys) > MAX_TENSORS:
        message = f"{len(keys)} keys, at most {MAX_TENSORS} are expected"
        return [Problem(Code.PATTERN_TOO_COSTLY, name, message)]
    num_expressions = sum(not _PLAIN.fullmatch(key) for key in keys)
    if num_expressions > MAX_EXPRESSIONS:
        message = (
            f"{num_expressions} expressions, at most {MAX_EXPRESSIONS} are expected; write module "
            "paths instead"
        )
        return [Problem(Code.PATTERN_TOO_COSTLY, name, message)]
    return [problem for key in keys if (problem := check_key(name, key)) is not None]


def check_key(where: str, key: str) -> Problem | None:
    """Say why a key of `rank_pattern` or `alpha_pattern` can not be matched as PEFT would."""
    problem = check_pattern(where, key)
    if problem is not None or _PLAIN.fullmatch(key):
        return problem
    return _syntax_problem(where, rf"(.*\.)?({key})$")  # as PEFT puts it: no flags inside


def check_pattern(where: str, pattern: str) -> Problem | None:
    """Say why a regular expression of `target_modules` can not be matched as PEFT would."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        message = f"{len(pattern)} characters, at most {MAX_PATTERN_LENGTH} are expected"
        return Problem(Code.PATTERN_TOO_LONG, where, message)
    if _PLAIN.fullmatch(pattern):
        return None
    difference = _READ_DIFFERENTLY.search(pattern)
    if difference is not None:
        reason = f"{shown(difference[0])}, which engines read differently"
    else:
        try:
            _compiled(pattern)
        except re2.error as error:
            text = error.args[0]
            reason = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
        else:
            return _syntax_problem(where, pattern)
    problem = _syntax_problem(where, pattern) if len(pattern) < _SHORT else None
    if problem is not None:
        return problem  # the plainer words
    message = (
        f"{shown(pattern)!r} can not be matched in bounded time ({shown(reason)}); "
        "write module paths instead"
    )
    return Problem(Code.PATTERN_TOO_COSTLY, where, message)


def _syntax_problem(where: str, pattern: str) -> Problem | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what warns is refused, see _READ_DIFFERENTLY
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        message = f"{shown(pattern)!r} is no regular expression ({error})"
        return Problem(Code.PATTERN_SYNTAX, where, message)
    return None


def match_modules(
    name: str, pattern: Mapping[str, Value], modules: Sequence[str]
) -> tuple[dict[str, Value], list[Problem]]:
    """Return the value of the first key that matches, for every module that one matches.

    Args:
        name: of the pattern, in problems.
        pattern: values by key.
        modules: paths.
    Returns: the values by module; and the keys that match no module, if there is any.
    Raises: ArtifactError: it would take more than 100 million steps.
    """
    if not modules or not pattern:
        return {}, []
    table = PatternTable(pattern)
    check_steps(name, table.steps(modules))
    matched = {module: table.first_match(module) for module in modules}
    unmatched = []
    if len({key for key in matched.values() if key is not None}) < len(table.keys):
        idle = table.unmatched(modules)
        unmatched = [
            Problem(
                Code.PATTERN_WITHOUT_MATCH,
                f"{name}: {shown(key)}",
                "matches no module; take it out, or convert the adapter",
            )
            for key in idle[:_MAX_NAMED]
        ]
        if len(idle) > _MAX_NAMED:
            message = f"{len(idle) - _MAX_NAMED} more keys match no module"
            unmatched.append(Problem(Code.PATTERN_WITHOUT_MATCH, name, message))
    return {m: pattern[key] for m, key in matched.items() if key is not None}, unmatched


def targeted(targets: Sequence[str] | str, modules: Sequence[str]) -> set[str]:
    """Return those of `modules` that PEFT adapts for these `target_modules`.

    Args:
        targets: names, each a whole path or the end of one after a dot; or one regular expression
            that matches whole paths.
    Raises: ArtifactError: matching would take more than 100 million steps.
    Source: peft 0.21 `tuners/tuners_utils.py: check_target_module_exists`.
    """
    if isinstance(targets, str):
        program = _compiled(targets)
        check_steps("target_modules", program.programsize * sum(map(len, modules)))
        return {module for module in modules if program.fullmatch(module)}
    wanted = frozenset(targets)
    return {
        module
        for module in modules
        if any(module[start:] in wanted for start in _suffix_starts(module))
    }


def idle_targets(targets: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Return those of the names in `target_modules` that choose none of `modules`."""
    ends = {module[start:] for module in modules for start in _suffix_starts(module)}
    return [target for target in targets if target not in ends]


def check_steps(name: str, steps: int) -> None:
    """Refuse patterns whose matching could take longer than a second or so.

    Raises: ArtifactError: more than 100 million steps.
    """
    if steps > MAX_PATTERN_STEPS:
        message = (
            f"matching takes up to {steps} steps, at most {MAX_PATTERN_STEPS} are expected; "
            "write module paths instead"
        )
        problem = Problem(Code.PATTERN_TOO_COSTLY, name, message)
        raise refusal(ArtifactError, CONFIG_FILE, [problem])


def _suffix_starts(module: str) -> Iterator[int]:
    """Yield where the path and its ends after each dot begin."""
    yield 0
    at = module.find(".")
    while at >= 0:
        yield at + 1
        at = module.find(".", at + 1)


def _without(text: str, positions: tuple[int, ...]) -> str:
    """Return `text` without the characters at `positions`."""
    parts, start = [], 0
    for position in positions:
        parts.append(text[start:position])
        start = position + 1
    return "".join([*parts, text[start:]])


@cache
def _options() -> Any:
    options = re2.Options()
    options.max_mem = _MAX_PROGRAM_BYTES
    options.log_errors = False
    return options


def _compiled(pattern: str) -> Any:
    return re2.compile(pattern, _options())
