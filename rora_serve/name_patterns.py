"""Patterns of adapter names, in which `*` stands for any text: in the key file and in settings."""

import re
from collections.abc import Sequence

from adapters.names import is_name

# Of the characters that names have. With others a pattern would match nothing, without a word.
_PATTERN = re.compile(r"[a-z0-9._*-]+")


def check_pattern(pattern: str) -> str:
    """Return `pattern` if it may match a name. Raises: ValueError: it holds other characters."""
    if not _PATTERN.fullmatch(pattern):
        raise ValueError(
            "letters in lower case, digits, '.', '_' and '-' of adapter names are expected, and "
            "'*' for any text"
        )
    return pattern


def check_reference(text: str) -> str:
    """Return `text` if it may mean versions: a name or pattern, and perhaps `@` an alias or digest.

    Raises: ValueError: it may not.
    """
    pattern, at, wanted = text.partition("@")
    check_pattern(pattern)
    if at and not is_name(wanted.removeprefix("sha256:")):
        raise ValueError("after '@' an alias, or 'sha256:' and digits, is expected")
    return text


def matches_any(patterns: Sequence[str], name: str) -> bool:
    """Tell whether one of the patterns stands for `name`."""
    return any(matches(pattern, name) for pattern in patterns)


def matches(pattern: str, name: str) -> bool:
    """Tell whether a pattern stands for all of `name`, character by character but for `*`.

    What stands between two `*` is looked for from left to right: no name makes that slow, as it
    may a regular expression.
    """
    first, *rest = pattern.split("*")
    if not rest:
        return pattern == name
    *between, last = rest
    if not name.startswith(first):
        return False
    at = len(first)
    for part in between:
        found = name.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return name.endswith(last, at)
