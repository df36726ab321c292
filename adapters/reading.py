"""Reading somebody else's files: bounded, regular files only, never through a link.

Every function raises ArtifactError with one problem, named by the file.
"""

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from adapters.errors import ArtifactError
from adapters.limits import (
    MAX_JSON_BYTES,
    MAX_JSON_DEPTH,
    MAX_JSON_VALUES,
    MAX_UNESCAPED_BYTES,
)
from adapters.problems import Code, Problem, refusal, shown


def refuse(code: Code, path: Path, message: str, *, where: str | None = None) -> ArtifactError:
    """Return the error for one broken rule of the file at `path`."""
    return refusal(ArtifactError, path.parent, [Problem(code, where or path.name, message)])


@contextmanager
def open_regular(path: Path, *, max_bytes: int) -> Iterator[BinaryIO]:
    """Open a regular file of at most `max_bytes`; a link, pipe, device or folder is refused.

    Raises:
        FileNotFoundError: there is none.
        ArtifactError: it is something else, too large, or may not be read.
    """
    try:
        # Without O_NONBLOCK a pipe would wait for somebody to write.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            message = "a symbolic link, a file is expected; copy what it points to"
            raise refuse(Code.FILE_LINK, path, message) from error
        code = Code.FILE_NOT_REGULAR if error.errno == errno.ENXIO else Code.FILE_UNREADABLE
        raise refuse(code, path, f"can not be read ({error.strerror})") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        message = "no regular file, one with content is expected"
        raise refuse(Code.FILE_NOT_REGULAR, path, message)
    with os.fdopen(descriptor, "rb") as file:
        if found.st_size > max_bytes:
            message = f"{found.st_size} bytes, at most {max_bytes} are expected"
            raise refuse(Code.FILE_TOO_LARGE, path, message)
        yield file


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system says against reading `path` inside the block into ArtifactError."""
    try:
        yield
    except OSError as error:
        message = f"can not be read ({error.strerror})"
        raise refuse(Code.FILE_UNREADABLE, path, message) from error


def read_json_file(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises: FileNotFoundError; ArtifactError: as in `open_regular` and `parse_json_object`.
    """
    with open_regular(path, max_bytes=MAX_JSON_BYTES) as file, reading(path):
        content = file.read(MAX_JSON_BYTES + 1)
    return parse_json_object(content, path=path, where=path.name)


def parse_json_object(content: bytes, *, path: Path, where: str) -> dict[str, Any]:
    """Return the object that a JSON text holds, having bounded what it can cost.

    Raises: ArtifactError: not UTF-8, above 1 MiB and not ASCII, not JSON, more than 500,000 values
        or 100 levels, a key twice in one object, NaN, infinity or half a character, which Python
        reads and others do not, or no object.
    Cost: at most about 100 bytes of memory for each value.
    """
    # Counted in bytes, so text is counted too: an upper bound, which is what a bound needs.
    num_values = sum(content.count(opening) for opening in (b"[", b"{", b","))
    if num_values > MAX_JSON_VALUES:
        message = f"about {num_values} values, at most {MAX_JSON_VALUES} are expected"
        raise refuse(Code.JSON_TOO_MANY_VALUES, path, message, where=where)
    if len(content) > MAX_UNESCAPED_BYTES and not content.isascii():
        message = (
            f"{len(content)} bytes that are not all ASCII, which a text above "
            f"{MAX_UNESCAPED_BYTES} is expected to be; write other characters as escapes"
        )
        raise refuse(Code.JSON_NOT_TEXT, path, message, where=where)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"not UTF-8 ({error.reason} at byte {error.start}); write it again"
        raise refuse(Code.JSON_NOT_TEXT, path, message, where=where) from error
    try:
        parsed = json.loads(
            text,
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        if num_values > MAX_JSON_DEPTH:
            _check_depth(parsed)
    except _DuplicateKeyError as error:
        message = f"key {shown(error.args[0])!r} stands twice in one object, once is expected"
        raise refuse(Code.JSON_DUPLICATE_KEY, path, message, where=where) from error
    except (ValueError, RecursionError) as error:
        message = f"not JSON ({shown(str(error))}); write it again"
        raise refuse(Code.JSON_SYNTAX, path, message, where=where) from error
    if not isinstance(parsed, dict):
        message = f"holds a {type(parsed).__name__}, a JSON object is expected"
        raise refuse(Code.JSON_NOT_OBJECT, path, message, where=where)
    if "\\u" in text:
        _refuse_lone_surrogates(parsed, path, where)
    return parsed


class _DuplicateKeyError(ValueError):
    """A key that stands twice in one object."""


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKeyError(key)
        found[key] = value
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (math.inf, -math.inf):
        raise ValueError(f"{shown(text)} is above any number of 64 bits")
    return value


def _check_depth(parsed: Any) -> None:
    level = [parsed]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            part
            for container in level
            for part in (container.values() if isinstance(container, dict) else container)
            if isinstance(part, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"more than {MAX_JSON_DEPTH} levels deep")


def _refuse_lone_surrogates(parsed: dict[str, Any], path: Path, where: str) -> None:
    """Half a surrogate pair passes as JSON and fails wherever the text is used."""
    try:
        for text in _texts(parsed):
            text.encode()
    except UnicodeEncodeError as error:
        message = "an escape that is half of a character; write it again"
        raise refuse(Code.JSON_NOT_TEXT, path, message, where=where) from error


def _texts(value: Any) -> Iterator[str]:
    """Yield every key and text in parsed JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
