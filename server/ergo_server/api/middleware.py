"""What wraps every request: its id, its count and time, its trace and its log line."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ergo_server.api.errors import respond, unforeseen
from ergo_server.errors import ErgoError
from ergo_server.telemetry import exchange, logging
from ergo_server.telemetry.exchange import METHODS, OTHER, Exchange, server_timing
from ergo_server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from ergo_server.telemetry.tracing import Tracing

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

PROBES = frozenset({"/metrics", "/healthz", "/health", "/readyz"})
"""Asked every few seconds by machines; left out of the request metrics, which are about people's requests, of traces and logs."""

QUESTIONS = frozenset({"/v1/vqa", "/v1/chat/completions"})
"""Where questions are asked: what is refused there counts as one."""


CLIENT_GONE = 499
"""nginx's status for a caller who left before the answer; nobody receives it, metrics count it."""


class ResponseBroken(Exception):
    """A response that has begun cannot be finished. Its cause is logged already, and its text is for nobody."""


class Observe:
    """Gives each request an id, counts, traces and logs it, and answers where a mistake of ours got through.

    The framework's own handler of unforeseen exceptions would stand outside of this, and raises them again for the server to
    log with their text.

    Args:
        app: what is wrapped.
        metrics: where requests are counted.
        tracing: where they are traced, if they are.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self.app = app
        self.metrics = metrics
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = [(name.lower(), value) for name, value in scope["headers"]]
        given = dict(headers).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        told = Exchange(request_id, scope["method"] if scope["method"] in METHODS else OTHER)
        exchange.begin(told)
        scope["request_id"] = request_id
        scope["received_at"] = told.started
        watched = scope["path"] not in PROBES

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                told.status = message["status"]
                message["headers"] = _labelled(message["headers"], told)
            await send(message)

        if watched:
            self.metrics.in_flight.inc()
            if self.tracing is not None:
                self.tracing.begin(told, headers)
        try:
            # What a request opens is closed when its last byte was sent or nobody wants it any more, whichever way it ends.
            async with AsyncExitStack() as scope["closing"]:
                await self.app(scope, receive, labelled)
        except ClientDisconnect:
            told.status = told.status or CLIENT_GONE
            told.error = "cancelled"
        except asyncio.CancelledError:  # the server ends, and does not wait any longer
            told.error = "cancelled"
            raise
        except Exception as error:
            scope["failure"] = failure = unforeseen(error, scope)
            if told.status:  # the response has begun: breaking the connection is all that is left to say
                raise ResponseBroken from None
            await respond(failure, Request(scope))(scope, receive, labelled)
        finally:
            if watched:
                self.metrics.in_flight.dec()
                self._tell(told, scope)

    def _tell(self, told: Exchange, scope: Scope) -> None:
        told.seconds = time.perf_counter() - told.started
        # What was refused before it was routed has its path: the closed set of routes knows those that count.
        path: str = scope["path"]
        route = getattr(scope.get("route"), "path", path if path in self.metrics.routes else OTHER)
        told.route = route
        told.status = told.status or 500
        told.tenant = scope["tenant"].name if "tenant" in scope else ""
        failure: ErgoError | None = scope.get("failure")
        if failure is not None:
            told.error = failure.code
        told.at_fault = max(told.status, failure.status if failure else 0) >= 500
        self.metrics.observe_http(route, scope["method"], told.status, told.seconds)
        if self.tracing is not None:
            self.tracing.end(told)
        logging.write(told)


def _labelled(headers: list[tuple[bytes, bytes]], told: Exchange) -> list[tuple[bytes, bytes]]:
    """Add what every response says of its request."""
    labelled = [(name, value) for name, value in headers if name != b"x-request-id"]
    labelled.append((b"x-request-id", told.request_id.encode()))
    whole = any(name == b"content-length" for name, _ in headers)  # a stream begins before its times are known
    if whole and told.status == 200 and told.record is not None:
        labelled.append((b"server-timing", server_timing(told.record).encode()))
    return labelled
