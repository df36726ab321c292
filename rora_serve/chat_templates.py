"""Adapters' own chat templates: programs of others, in a process that may be ended.

jinja2's sandbox keeps a template from the server's objects, not from its time and memory, and what
a template will take can not be read off its text. So it runs where it has seconds and bytes, and
the server goes on without it when they are used up.
"""

import logging
import multiprocessing
import resource
import signal
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from adapters.errors import AdapterMismatchError
from rora_serve.side_process import follow_parent

logger = logging.getLogger(__name__)

MAX_SECONDS = 2.0  # for one chat
MAX_BYTES = 512 << 20  # that a chat may take
MAX_CHARACTERS = 1 << 24  # that come of it
_REST_SECONDS = 30.0
_START_SECONDS = 120.0
_SAID = "rora"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_MAX_REASON = 300

Chat = Mapping[str, Any]


class ChatTemplateError(Exception):
    """A template does not write a chat; the message says why."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template that writes what a user says.

    Args:
        text: of it, jinja2's.
        content_format: what it takes as a message's content: text, or a list of parts.
    """

    text: str
    content_format: Literal["string", "openai"]


class TemplateProcess:
    """Writes chats by templates, one after the other, in a process that starts with the first.

    Args:
        seconds, num_bytes: that one chat may take; above them the process is ended. The template is
            not tried again for half a minute, so that others' chats are written meanwhile.
    """

    def __init__(self, *, seconds: float = MAX_SECONDS, num_bytes: int = MAX_BYTES) -> None:
        self._seconds = seconds
        self._num_bytes = num_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chat-templates")
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None
        self._resting: dict[str, float] = {}

    def write(self, template: str, chat: Chat) -> "Future[str]":
        """Return the text of a chat.

        Args: chat: what transformers' apply_chat_template takes: `messages`, `tools`, `documents`,
            `add_generation_prompt`, `continue_final_message`, and what else the template reads.
        Raises: ChatTemplateError: the template refuses it, fails, or takes too much.
        """
        return self._thread.submit(self._write, template, chat)

    def read(self, content: bytes) -> "Future[ChatTemplate]":
        """Return the template of an adapter, that was tried.

        Raises: AdapterMismatchError: it does not write what a user says.
        """
        return self._thread.submit(self._read, content)

    def close(self) -> None:
        """End the process."""
        self._thread.shutdown(cancel_futures=True)
        self._end()

    def _read(self, content: bytes) -> ChatTemplate:
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise AdapterMismatchError("its chat template is not UTF-8") from error
        reason = "it does not write what the user says"
        for said, content_format in (
            (_SAID, "string"),
            ([{"type": "text", "text": _SAID}], "openai"),
        ):
            chat = {
                "messages": [{"role": "user", "content": said}],
                "add_generation_prompt": True,
                **dict.fromkeys(_SPECIAL_TOKENS, ""),
            }
            try:
                if _SAID in self._write(text, chat):
                    return ChatTemplate(text, content_format)  # type: ignore[arg-type]
            except ChatTemplateError as error:
                reason = str(error)
        raise AdapterMismatchError(f"its chat template is not served: {reason}")

    def _write(self, template: str, chat: Chat) -> str:
        now = time.monotonic()
        self._resting = {text: until for text, until in self._resting.items() if until > now}
        if template in self._resting:
            raise ChatTemplateError(self._too_long())
        try:
            connection = self._started()
            connection.send((template, dict(chat)))
            if not connection.poll(self._seconds):
                self._resting[template] = time.monotonic() + _REST_SECONDS
                self._end()
                raise ChatTemplateError(self._too_long())
            text, reason = connection.recv()
        except (EOFError, OSError) as error:
            self._end()
            raise ChatTemplateError("it ended the process that writes it") from error
        if text is None:
            raise ChatTemplateError(reason)
        return str(text)

    def _too_long(self) -> str:
        return f"it takes more than {self._seconds:g} s"

    def _started(self) -> Connection:
        if self._connection is not None:
            return self._connection
        context = multiprocessing.get_context("spawn")
        self._connection, others = context.Pipe()
        self._process = context.Process(
            target=_write_all, args=(others, self._num_bytes), name="chat-templates", daemon=True
        )
        self._process.start()
        others.close()
        if not self._connection.poll(_START_SECONDS):
            self._end()
            raise ChatTemplateError("the process that writes it did not start")
        self._connection.recv()
        return self._connection

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._connection = None


def _write_all(connection: Connection, num_bytes: int) -> None:
    """Write what is asked for until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow_parent()
    from transformers.utils.chat_template_utils import (  # noqa: PLC0415  (seconds)
        render_jinja_template,
    )

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    connection.send(None)
    while True:
        try:
            template, chat = connection.recv()
        except EOFError:
            return
        answer: tuple[str | None, str] = (None, "")
        try:
            conversation = chat.pop("messages")
            # Texts, and where in them tokens to be trained on are; not a text, as it is annotated.
            written: Any = render_jinja_template([conversation], chat_template=template, **chat)
            text = written[0][0]
            answer = (text, "")
            if len(text) > MAX_CHARACTERS:
                answer = (None, f"it writes {len(text)} characters, at most {MAX_CHARACTERS}")
        except MemoryError:
            answer = (None, f"it takes more than {num_bytes >> 20} MiB")
        except Exception as error:
            answer = (None, _reason(error))
        connection.send(answer)


def _reason(error: BaseException) -> str:
    """Return a line; what a template raises itself is the innermost error's."""
    while error.__cause__ is not None:
        error = error.__cause__
    number = getattr(error, "lineno", None)
    line = f"line {number}: " if isinstance(number, int) else ""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{line}{text}"[:_MAX_REASON]
