"""What one request asked for and got, and its line in the log.

The front door begins a record and ends it; `rora_serve.observed` notes the tokens. Knows neither
HTTP's messages nor vLLM.
"""

import json
import logging
import re
import uuid
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TextIO

from rora_serve.host_tier import Tier

REQUEST_ID_HEADER = b"x-request-id"
# nginx's status for a client that hung up before the answer began.
HUNG_UP_STATUS = 499
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
_MAX_TEXT = 100  # of what clients choose: a model's name, a path

logger = logging.getLogger("rora_serve.requests")


@dataclass(slots=True)
class Choice:
    """One sequence of tokens that was generated for a request.

    Args:
        num_tokens: so far.
        first_at, last_at: when its first and its newest token were there, in seconds of a monotonic
            clock; None as long as there is none, or where vLLM does not tell.
    """

    num_tokens: int = 0
    first_at: float | None = None
    last_at: float | None = None

    @property
    def token_seconds(self) -> float | None:
        """TPOT: (last - first) / (n - 1) seconds; None for fewer than two tokens."""
        if self.first_at is None or self.last_at is None or self.num_tokens < 2:
            return None
        return (self.last_at - self.first_at) / (self.num_tokens - 1)


@dataclass(slots=True)
class RequestRecord:
    """One request, filled while it is served.

    Args:
        request_id: see `request_id`.
        method, path: of the request.
        arrived_at: seconds of a monotonic clock.
        tenant: whose key it brought.
        model: what it asked for, in its own words.
        adapter: the name that this meant, the base model's own name included.
        version: public id of the version; None for the base model.
        tier: where the adapter was found.
        queue_ms: from arrival to admission; None if it was not admitted.
        load_ms: until the adapter was in the engine.
        status: of the answer; None if the client hung up before it began.
        refusal: why it was refused, the code of our own error; None if it was not.
        finish: how generation ended, in vLLM's words (of several choices, the last): stop, length,
            abort for a client that hung up, error.
        prompt_tokens, cached_tokens: read, and those of them that vLLM's prefix cache had.
        choices: what was generated.
        unseen_tokens: an estimate of what an answer took whose client hung up before vLLM told
            anything of it: charged, and counted nowhere else.
    """

    request_id: str
    method: str
    path: str
    arrived_at: float
    tenant: str | None = None
    model: str | None = None
    adapter: str | None = None
    version: str | None = None
    tier: Tier | None = None
    queue_ms: float | None = None
    load_ms: float | None = None
    status: int | None = None
    refusal: str | None = None
    finish: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    choices: list[Choice] = field(default_factory=list)
    unseen_tokens: int = 0

    @property
    def charged_tokens(self) -> int:
        """Tokens that a tenant's limit is charged with."""
        return self.prompt_tokens + self.generated_tokens + self.unseen_tokens

    @property
    def generated_tokens(self) -> int:
        """Tokens of all choices."""
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def first_token_at(self) -> float | None:
        """When the first token of any choice was there."""
        return min((c.first_at for c in self.choices if c.first_at is not None), default=None)

    @property
    def last_token_at(self) -> float | None:
        """When the last token of any choice was there."""
        return max((c.last_at for c in self.choices if c.last_at is not None), default=None)

    @property
    def first_token_seconds(self) -> float | None:
        """TTFT: from arrival, waiting and loading included, to the first token."""
        first = self.first_token_at
        return None if first is None else first - self.arrived_at

    @property
    def token_seconds(self) -> list[float]:
        """TPOT of each choice that has one."""
        return [s for choice in self.choices if (s := choice.token_seconds) is not None]

    @property
    def shown_status(self) -> int:
        """The status that stands in metrics and log."""
        return HUNG_UP_STATUS if self.status is None else self.status


# The record of the request that this task serves.
current_record: ContextVar[RequestRecord | None] = ContextVar("current_record", default=None)


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return what a request is called in answer and log.

    Args: headers: of the request; the first x-request-id is kept if it is 1 to 128 visible ASCII
        characters.
    """
    for name, value in headers:
        if name == REQUEST_ID_HEADER:
            if _REQUEST_ID.fullmatch(value):
                return value.decode("ascii")
            break
    return uuid.uuid4().hex


def log_to(stream: TextIO) -> logging.Handler:
    """Write a line for each request to `stream`, as JSON and nothing else."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # whoever logs to the root gets lines of another form
    return handler


def warn_on(stream: TextIO) -> logging.Handler:
    """Write what we warn of to `stream`, whatever vLLM's parts set the root logger to."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s [%(name)s] %(message)s"))
    ours = logging.getLogger("rora_serve")
    ours.addHandler(handler)
    ours.setLevel(logging.WARNING)
    ours.propagate = False
    return handler


def log_request(record: RequestRecord, *, now: float) -> None:
    """Write a request's line.

    Args: now: seconds of the clock of `arrived_at`.
    """
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", json.dumps(_line(record, now, datetime.now(UTC))))


def _line(record: RequestRecord, now: float, at: datetime) -> dict[str, Any]:
    """Return what is written; docs/serving.md lists the keys, which stay."""
    seconds = record.token_seconds
    return {
        "time": at.isoformat(timespec="milliseconds"),
        "request_id": record.request_id,
        "tenant": record.tenant,
        "method": _shown(record.method),
        "path": _shown(record.path),
        "status": record.shown_status,
        "refusal": record.refusal,
        "finish": record.finish,
        "model": _shown(record.model),
        "version": record.version,
        "tier": record.tier,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "generated_tokens": record.generated_tokens,
        "queue_ms": _rounded(record.queue_ms),
        "load_ms": _rounded(record.load_ms),
        "ttft_ms": _rounded(_ms(record.first_token_seconds)),
        "tpot_ms": _rounded(_ms(sum(seconds) / len(seconds) if seconds else None)),
        "duration_ms": _rounded(_ms(now - record.arrived_at)),
    }


def _shown(text: str | None) -> str | None:
    return text if text is None or len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def _rounded(ms: float | None) -> float | None:
    return None if ms is None else round(ms, 3)
