"""What wraps every request: its id, its count and time."""

from __future__ import annotations

import re
import time
import uuid
from contextlib import AsyncExitStack

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ergo_server.api.errors import respond, unforeseen
from ergo_server.telemetry.metrics import Metrics

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

PROBES = frozenset({"/metrics", "/healthz", "/health", "/readyz"})
"""Asked every few seconds by machines; left out of the request metrics, which are about people's requests."""

QUESTIONS = frozenset({"/v1/vqa", "/v1/chat/completions"})
"""Where questions are asked: what is refused there counts as one."""


CLIENT_GONE = 499
"""nginx's status for a caller who left before the answer; nobody receives it, metrics count it."""


class Observe:
    """Gives each request an id, counts it, and answers where a mistake of ours got through.

    The framework's own handler of unforeseen exceptions would stand outside of this, and raises them again for the server to
    log with their text.

    Args:
        app: what is wrapped.
        metrics: where requests are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["request_id"] = request_id
        scope["received_at"] = started = time.perf_counter()
        status = 0
        watched = scope["path"] not in PROBES

        async def labelled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                named = [(name, value) for name, value in message["headers"] if name != b"x-request-id"]
                message["headers"] = [*named, (b"x-request-id", request_id.encode())]
            await send(message)

        if watched:
            self.metrics.in_flight.inc()
        try:
            # What a request opens is closed when its last byte was sent or nobody wants it any more, whichever way it ends.
            async with AsyncExitStack() as scope["closing"]:
                await self.app(scope, receive, labelled)
        except ClientDisconnect:
            status = status or CLIENT_GONE
        except Exception as error:
            failure = unforeseen(error, scope)
            if status:
                raise  # the response has begun: breaking the connection is all that is left to say
            await respond(failure, Request(scope))(scope, receive, labelled)
        finally:
            if watched:
                self.metrics.in_flight.dec()
                # What was refused before it was routed has its path: the closed set of routes knows those that count.
                path: str = scope["path"]
                route = getattr(scope.get("route"), "path", path)
                self.metrics.observe_http(route, scope["method"], status or 500, time.perf_counter() - started)
