"""Multipart forms with the files of an adapter, written to disk as they come.

Starlette's own parser keeps files in memory or in the system's temporary folder and bounds none of
them, so the parser below it is used here.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from adapters.errors import ArtifactError
from adapters.folder import MAX_FILE_BYTES, PICKLED_WEIGHTS_FILE
from adapters.names import LATEST
from adapters.problems import Code, Problem, refusal, shown
from rora_serve.api.errors import Refusal, bad_request

_FIELDS = ("name", "alias")
_MAX_FIELD_BYTES = 256

Event = tuple[Literal["part", "data", "end"], bytes]


async def receive_form(
    chunks: AsyncIterator[bytes],
    content_type: str,
    folder: Path,
    check: Callable[[str, str], None],
) -> tuple[str, str]:
    """Write the files of a form into `folder`; return the adapter's name and alias.

    Args:
        chunks: of the body.
        content_type: its header, with the boundary.
        folder: empty.
        check: told name and alias before the first file; what it raises ends the form.

    Raises:
        Refusal: no form, or one with other parts than an adapter has.
        ArtifactError: a file above its limit.
        OSError: a file could not be written.
    """
    parser = _Parser(content_type)
    form = _Form(folder, check)
    try:
        async for chunk in chunks:
            for event in parser.feed(chunk):
                await form.take(*event)
    finally:
        await form.close()
    if not parser.is_complete:
        _refuse(None, "the form ends before its last boundary")
    return form.checked()


class _Parser:
    """Turns chunks of a body into events: a part's disposition, pieces of its data, its end."""

    def __init__(self, content_type: str) -> None:
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            _refuse(None, "multipart/form-data without a boundary")
        self.is_complete = False
        self._events: list[Event] = []
        self._header = self._value = self._disposition = b""
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._add_header,
                    "on_header_value": self._add_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._add_data,
                    "on_part_end": lambda: self._events.append(("end", b"")),
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            _refuse(None, str(error))

    def feed(self, chunk: bytes) -> list[Event]:
        """Return the events of a chunk, with the pieces of each part's data in one."""
        self._events = []
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            _refuse(None, f"not a multipart form ({shown(str(error))})")
        joined: list[Event] = []
        for kind, value in self._events:
            if kind == "data" and joined and joined[-1][0] == "data":
                joined[-1] = (kind, joined[-1][1] + value)
            else:
                joined.append((kind, value))
        return joined

    def _begin(self) -> None:
        self._header = self._value = self._disposition = b""

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _end_headers(self) -> None:
        self._events.append(("part", self._disposition))

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self._events.append(("data", data[start:end]))

    def _end(self) -> None:
        self.is_complete = True


class _Form:
    """Takes the parts of a form: names first, then files, each by its own name."""

    def __init__(self, folder: Path, check: Callable[[str, str], None]) -> None:
        self._folder = folder
        self._check = check
        self._names: tuple[str, str] | None = None
        self._fields: dict[str, bytes] = {}
        self._files: set[str] = set()
        self._part = ""
        self._num_bytes = 0
        self._file: BinaryIO | None = None

    async def take(self, kind: Literal["part", "data", "end"], value: bytes) -> None:
        """Take one event."""
        if kind == "part":
            await self._begin(value)
        elif kind == "end":
            await self.close()
        elif self._part in _FIELDS:
            self._fields[self._part] += value
            if len(self._fields[self._part]) > _MAX_FIELD_BYTES:
                _refuse(self._part, f"above {_MAX_FIELD_BYTES} bytes")
        elif self._file is not None:
            self._num_bytes += len(value)
            limit = MAX_FILE_BYTES[self._part]
            if self._num_bytes > limit:
                message = f"more than {limit} bytes, at most as many are expected"
                problem = Problem(Code.FILE_TOO_LARGE, self._part, message)
                raise refusal(ArtifactError, "adapter", [problem])
            await asyncio.to_thread(self._file.write, value)

    async def close(self) -> None:
        """End the part."""
        if self._file is not None:
            file, self._file = self._file, None
            await asyncio.to_thread(file.close)

    def checked(self) -> tuple[str, str]:
        """Return name and alias, checked."""
        if self._names is None:
            texts = {field: self._text(field) for field in self._fields}
            if "name" not in texts:
                _refuse("name", "missing; name the adapter before its files")
            names = (texts["name"], texts.get("alias", LATEST))
            self._check(*names)
            self._names = names
        return self._names

    async def _begin(self, disposition: bytes) -> None:
        part = parse_options_header(disposition)[1].get(b"name", b"")
        self._part = part.decode("utf-8", errors="replace")
        if self._part in _FIELDS:
            if self._names is not None or self._part in self._fields:
                _refuse(self._part, "once, and before the files, is expected")
            self._fields[self._part] = b""
            return
        if self._part not in (*MAX_FILE_BYTES, PICKLED_WEIGHTS_FILE):
            expected = ", ".join((*_FIELDS, *MAX_FILE_BYTES))
            _refuse(shown(self._part), f"no part of an adapter, which are {expected}")
        self.checked()
        if self._part in self._files:
            _refuse(self._part, "stands twice in the form, once is expected")
        self._files.add(self._part)
        self._num_bytes = 0
        # Of pickled weights the name is enough to refuse them with the right words.
        file = await asyncio.to_thread((self._folder / self._part).open, "wb")
        if self._part in MAX_FILE_BYTES:
            self._file = file
        else:
            file.close()

    def _text(self, field: str) -> str:
        try:
            return self._fields[field].decode()
        except UnicodeDecodeError:
            _refuse(field, "not UTF-8")


def _refuse(param: str | None, message: str) -> NoReturn:
    raise Refusal(bad_request(param, f"{param or 'body'}: {message}"))
