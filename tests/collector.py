"""A collector of traces, which takes OTLP over HTTP as a real one does."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(http.server.ThreadingHTTPServer):
    """Keeps what it is sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Export)
        self.status = 200
        """How it answers."""
        self.answering = threading.Event()
        self.answering.set()
        self.sent: list[tuple[str, bytes]] = []
        """Path and body of each request."""

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def spans(self) -> list[Span]:
        """All spans, in the order in which they began."""
        found = [span for request in self.requests for scope in request.scope_spans for span in scope.spans]
        return sorted(found, key=lambda span: span.start_time_unix_nano)

    @property
    def requests(self) -> list[Any]:
        """The spans of each server and batch, with what they say of the server."""
        return [part for path, body in self.sent for part in ExportTraceServiceRequest.FromString(body).resource_spans]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing."""


class _Export(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        """Take spans."""
        self.server.sent.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.server.answering.wait(600)
        self.send_response(self.server.status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector."""
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.answering.set()
            server.shutdown()
            thread.join()


def attributes(of: Any) -> dict[str, Any]:
    """Return the attributes of a span, or of a server."""
    found = {}
    for pair in of.attributes:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        found[pair.key] = [part.string_value for part in value.values] if kind == "array_value" else value
    return found
