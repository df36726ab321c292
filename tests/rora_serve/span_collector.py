"""A collector of OpenTelemetry's spans, over HTTP."""

import time
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from rora_serve.api.asgi import Receive, Scope, Send

WAIT_SECONDS = 30


@dataclass(frozen=True)
class Span:
    """A span, and what it says of its request."""

    name: str
    trace_id: str
    parent_id: str
    attributes: dict[str, Any]


@dataclass
class SpanCollector:
    """An app that keeps what it is sent."""

    spans: list[Span] = field(default_factory=list)

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        body, is_more = b"", True
        while is_more:
            message = await receive()
            body += message.get("body", b"")
            is_more = message.get("more_body", False)
        self._keep(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def of_trace(self, trace_id: str) -> Span:
        """Return the span of a trace of one; wait for it."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not (found := [span for span in self.spans if span.trace_id == trace_id]):
            assert time.monotonic() < deadline, "no span came"
            time.sleep(0.1)
        (span,) = found
        return span

    def _keep(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += [
                    Span(
                        span.name,
                        span.trace_id.hex(),
                        span.parent_span_id.hex(),
                        {each.key: _value_of(each.value) for each in span.attributes},
                    )
                    for span in scope.spans
                ]


def _value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return None if kind is None else getattr(value, kind)
