"""A request's figures, its line in the log, and what it is called."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from rora_serve.request_log import (
    Choice,
    RequestRecord,
    current_record,
    log_request,
    log_to,
    logger,
    request_id,
    warn_on,
)

KEYS = [
    "time",
    "request_id",
    "tenant",
    "method",
    "path",
    "status",
    "refusal",
    "finish",
    "model",
    "version",
    "tier",
    "prompt_tokens",
    "cached_tokens",
    "generated_tokens",
    "queue_ms",
    "load_ms",
    "ttft_ms",
    "tpot_ms",
    "duration_ms",
]


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = log_to(stream)
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


def written(log: io.StringIO) -> dict[str, object]:
    (line,) = log.getvalue().splitlines()
    parsed: dict[str, object] = json.loads(line)
    return parsed


def test_a_line_holds_all_keys_in_their_order(log: io.StringIO) -> None:
    record = RequestRecord("id", "POST", "/v1/completions", 10.0, tenant="acme", model="a@stable")
    record.adapter, record.version, record.tier = "a", "a@sha256:0123456789ab", "store"
    record.queue_ms, record.load_ms, record.status, record.finish = 1.23456, 20.0, 200, "stop"
    record.prompt_tokens, record.cached_tokens = 7, 4
    record.choices = [Choice(3, 10.5, 10.9), Choice(2, 10.4, 10.8)]
    log_request(record, now=11.0)
    line = written(log)
    assert list(line) == KEYS
    assert str(line.pop("time")).endswith("+00:00")
    assert line == {
        "request_id": "id",
        "tenant": "acme",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "refusal": None,
        "finish": "stop",
        "model": "a@stable",
        "version": "a@sha256:0123456789ab",
        "tier": "store",
        "prompt_tokens": 7,
        "cached_tokens": 4,
        "generated_tokens": 5,
        "queue_ms": 1.235,
        "load_ms": 20.0,
        "ttft_ms": 400.0,
        "tpot_ms": 300.0,
        "duration_ms": 1000.0,
    }


def test_a_client_that_hung_up_before_its_answer_has_a_line_too(log: io.StringIO) -> None:
    log_request(RequestRecord("id", "GET", "/", 1.0), now=1.5)
    line = written(log)
    assert list(line) == KEYS
    assert line["status"] == 499
    unknown = ("tenant", "model", "version", "tier", "queue_ms", "load_ms", "ttft_ms", "tpot_ms")
    assert all(line[key] is None for key in unknown)


def test_what_a_client_chooses_is_cut_and_stays_on_one_line(log: io.StringIO) -> None:
    text = 'x\n\u2028{"forged": 1}' + "y" * 10_000
    log_request(RequestRecord("id", text, text, 0.0, model=text), now=0.0)
    line = written(log)
    for key in ("method", "path", "model"):
        assert line[key] == text[:100] + "…"
    assert len(log.getvalue()) < 1000
    assert log.getvalue().isascii()


def test_lines_go_nowhere_else(log: io.StringIO) -> None:
    elsewhere = logging.StreamHandler(io.StringIO())
    logging.getLogger().addHandler(elsewhere)
    try:
        log_request(RequestRecord("id", "GET", "/", 1.0), now=1.5)
        assert log.getvalue()
        assert not elsewhere.stream.getvalue()
        logging.getLogger("rora_serve.models").error("for all")
        assert elsewhere.stream.getvalue()
    finally:
        logging.getLogger().removeHandler(elsewhere)


def test_nothing_is_written_unless_it_was_asked_for() -> None:
    assert not logger.isEnabledFor(logging.INFO)
    log_request(RequestRecord("id", "GET", "/", 1.0), now=1.5)
    assert not logger.handlers


@pytest.mark.parametrize(
    ("choice", "seconds"),
    [
        (Choice(), None),
        (Choice(1, 5.0, 5.0), None),
        (Choice(5), None),
        (Choice(2, 5.0, 5.5), 0.5),
        (Choice(5, 5.0, 7.0), 0.5),
    ],
)
def test_time_per_token_needs_two_tokens(choice: Choice, seconds: float | None) -> None:
    assert choice.token_seconds == seconds


def test_a_record_knows_its_first_and_last_token() -> None:
    record = RequestRecord("id", "POST", "/", 2.0)
    assert (record.first_token_at, record.last_token_at) == (None, None)
    assert record.first_token_seconds is None
    record.choices = [Choice(2, 4.0, 6.0), Choice(), Choice(1, 3.0, 3.0)]
    assert (record.first_token_at, record.last_token_at) == (3.0, 6.0)
    assert record.first_token_seconds == 1.0
    assert record.generated_tokens == 3
    assert record.token_seconds == [2.0]


@pytest.mark.parametrize("given", [b"a", b"!~", b"x" * 128, b'{"id":1}'])
def test_a_clients_request_id_is_kept(given: bytes) -> None:
    headers = [(b"host", b"h"), (b"x-request-id", given), (b"x-request-id", b"second")]
    assert request_id(headers) == given.decode()


@pytest.mark.parametrize("given", [b"", b"x" * 129, b"a b", b"a\n", b"a\x00", b"\xc3\xa9", b"\x7f"])
def test_a_request_id_that_is_no_plain_text_is_replaced(given: bytes) -> None:
    made = {request_id([(b"x-request-id", given), (b"x-request-id", b"second")]) for _ in range(2)}
    assert len(made) == 2
    for name in made:
        assert len(name) == 32
        assert set(name) <= set("0123456789abcdef")


def test_a_request_without_an_id_gets_one_of_its_own() -> None:
    assert request_id([(b"host", b"h")]) != request_id([])


def test_no_request_is_served_at_first() -> None:
    assert current_record.get() is None


def test_warnings_are_told_even_if_the_root_logger_tells_errors_only() -> None:
    ours, root, stream = logging.getLogger("rora_serve"), logging.getLogger(), io.StringIO()
    before = root.level, ours.level, ours.propagate
    handler = warn_on(stream)
    try:
        root.setLevel(logging.ERROR)
        logging.getLogger("rora_serve.probing").warning("its probe is asked at each start")
    finally:
        ours.removeHandler(handler)
        root.setLevel(before[0])
        ours.setLevel(before[1])
        ours.propagate = before[2]
    assert "[rora_serve.probing] its probe is asked at each start" in stream.getvalue()
