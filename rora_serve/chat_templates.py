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
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from adapters.errors import AdapterMismatchError
from rora_serve.side_process import follow_parent
from rora_serve.tenants import EVERYBODY

logger = logging.getLogger(__name__)

MAX_SECONDS = 2.0  # for one chat
MAX_BYTES = 512 << 20  # that a chat may take
MAX_CHARACTERS = 1 << 24  # that come of it
# Of processor time that a user's chats may take, by one template and by all of them.
_BUDGET_SECONDS, _BUDGET_WINDOW_SECONDS = 5.0, 30.0
_BUDGET_SECONDS_OF_USER = 10.0
_KEPT_BYTES = 64 << 20  # that the process may have grown by before another one takes its place
_START_SECONDS = 120.0
_RESTART_SECONDS = 2.0
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


@dataclass(frozen=True)
class _Written:
    """What became of a chat.

    Args:
        text: of it, or None and the `reason`.
        is_bad: whether it took too much.
        is_last: whether the process ends after it.
        seconds: of computing.
    """

    text: str | None
    reason: str = ""
    is_bad: bool = False
    is_last: bool = True
    seconds: float = 0.0


class TemplateProcess:
    """Writes chats by templates, one after the other, in a process that starts with the first.

    Args: seconds, num_bytes: that one chat may take; above them the process is ended.

    All chats that a user has written by a template may take 5 s of computing in any 30, those by
    all templates 10 s, and none by a template for 30 s after one that took too much, so that
    others' are written meanwhile.
    """

    def __init__(self, *, seconds: float = MAX_SECONDS, num_bytes: int = MAX_BYTES) -> None:
        self._seconds = seconds
        self._num_bytes = num_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chat-templates")
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None
        # By user and template, and by user, until when what they used of their budget lasts.
        self._used_until: dict[tuple[str, str | None], float] = {}

    def write(self, template: str, chat: Chat, *, user: str = "") -> "Future[str]":
        """Return the text of a chat.

        Args:
            chat: what transformers' apply_chat_template takes: `messages`, `tools`, `documents`,
                `add_generation_prompt`, `continue_final_message`, and what else the template reads.
            user: whose chat it is.
        Raises: ChatTemplateError: the template refuses it, fails, or takes too much.
        """
        return self._thread.submit(self._write, template, chat, user)

    def read(self, content: bytes, *, user: str = "") -> "Future[ChatTemplate]":
        """Return the template of an adapter, that was tried.

        Args: user: who brought it; "": somebody's first request did not bring it, so nobody.
        Raises: AdapterMismatchError: it does not write what a user says.
        """
        return self._thread.submit(self._read, content, user)

    def close(self) -> None:
        """End the process."""
        self._thread.shutdown(cancel_futures=True)
        self._end()

    def _read(self, content: bytes, user: str) -> ChatTemplate:
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
                if _SAID in self._write(text, chat, user):
                    return ChatTemplate(text, content_format)  # type: ignore[arg-type]
            except ChatTemplateError as error:
                reason = str(error)
        raise AdapterMismatchError(f"its chat template is not served: {reason}")

    def _write(self, template: str, chat: Chat, user: str = "") -> str:
        begun = time.monotonic()
        self._used_until = {k: until for k, until in self._used_until.items() if until > begun}
        budgets: dict[tuple[str, str | None], float] = {(user, template): _BUDGET_SECONDS}
        if user not in ("", EVERYBODY.name):  # who are many
            budgets[user, None] = _BUDGET_SECONDS_OF_USER
        for key, budget in budgets.items():
            if self._used_until.get(key, begun) - begun >= _BUDGET_WINDOW_SECONDS:
                who = "it" if key[1] else "this tenant's chat templates"
                raise ChatTemplateError(
                    f"{who} computed for {budget:g} of the last {_BUDGET_WINDOW_SECONDS:g} s, or "
                    "was ended; send the request again later"
                )
        connection = self._sent((template, dict(chat)))
        written = _Written(None, f"it takes more than {self._seconds:g} s", is_bad=True)
        try:
            if connection.poll(self._seconds):
                written = connection.recv()
        except (EOFError, OSError):
            written = replace(written, reason="it ended the process that writes it")
        seconds = written.seconds
        if written.is_bad:
            logger.warning("a chat template was ended: %s", written.reason)
            seconds = max(seconds, self._seconds)
        if written.is_last:
            self._end()
            seconds += _RESTART_SECONDS
        for key, budget in budgets.items():
            # After a bad one nothing more by this template for the whole of a window.
            charged = 2 * budget if written.is_bad and key[1] else seconds
            used_until = self._used_until.get(key, begun)
            self._used_until[key] = used_until + charged * _BUDGET_WINDOW_SECONDS / budget
        if written.text is None:
            raise ChatTemplateError(written.reason)
        return written.text

    def _sent(self, request: tuple[str, dict[str, Any]]) -> Connection:
        """Send a request to the process, which may have been ended since it was last asked."""
        for _ in range(2):
            try:
                connection = self._started()
                connection.send(request)
            except (EOFError, OSError):
                self._end()
            else:
                return connection
        raise ChatTemplateError("the process that writes it did not start; see the server's log")

    def _started(self) -> Connection:
        if self._connection is not None:
            return self._connection
        context = multiprocessing.get_context("spawn")
        ours, others = context.Pipe()
        try:
            process = context.Process(
                target=_write_all,
                args=(others, self._seconds, self._num_bytes),
                name="chat-templates",
                daemon=True,
            )
            process.start()
        finally:
            others.close()
        self._process, self._connection = process, ours
        if not ours.poll(_START_SECONDS):
            raise EOFError
        ours.recv()
        return ours

    def _end(self) -> None:
        connection, process = self._connection, self._process
        self._connection = self._process = None
        if connection is not None:
            connection.close()
        if process is not None:
            process.kill()
            process.join()


def _write_all(connection: Connection, seconds: float, num_bytes: int) -> None:
    """Write what is asked for until the parent is gone, or this process has grown."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow_parent()
    from transformers.utils.chat_template_utils import (  # noqa: PLC0415  (seconds)
        render_jinja_template,
    )

    most = _address_bytes() + num_bytes
    grown = _address_bytes() + _KEPT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send(None)
    while True:
        try:
            template, chat = connection.recv()
        except EOFError:
            return
        # Also where the parent is gone, and one long operation lets no thread see that.
        begun = time.process_time()
        cpu_seconds = int(begun + seconds) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, resource.RLIM_INFINITY))
        text: str | None = None
        reason, is_bad = "", False
        try:
            # Texts, and where in them tokens to be trained on are; not a text, as it is annotated.
            written: Any = render_jinja_template(
                [chat.pop("messages")], chat_template=template, **chat
            )
            found = str(written[0][0])
            if len(found) <= MAX_CHARACTERS:
                text = found
            else:
                reason = f"it writes {len(found)} characters, at most {MAX_CHARACTERS}"
            del written, found, chat
        except MemoryError:
            text, reason, is_bad = None, f"it takes more than {num_bytes >> 20} MiB", True
        except Exception as error:
            reason = _reason(error)
        is_last = is_bad or _address_bytes() > grown
        used = time.process_time() - begun
        connection.send(_Written(text, reason, is_bad=is_bad, is_last=is_last, seconds=used))
        if is_last:
            return


def _address_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _reason(error: BaseException) -> str:
    """Return a line; what a template raises itself is the innermost error's."""
    while error.__cause__ is not None:
        error = error.__cause__
    number = getattr(error, "lineno", None)
    line = f"line {number}: " if isinstance(number, int) else ""
    try:
        text = " ".join(str(error)[: 4 * _MAX_REASON].split())
    except MemoryError:
        text = ""
    return f"{line}{text or type(error).__name__}"[:_MAX_REASON]
