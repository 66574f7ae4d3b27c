"""Who is let in, and when: the key, the tenant's limits, and a place among those that are worked on.

All of it is decided before the body is read, so that saying no costs next to nothing. What is refused here is 401 without a known
key, 429 where the tenant has used up its share, and 503 where the server as a whole has as much work as it takes. While a request
waits for a place its body is read ahead, within the bytes reserved for it: otherwise nobody would notice that its caller has gone
(uvicorn stops reading the socket while the body is not asked for, and does not see the end of the connection then).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ergo_server.api.errors import respond
from ergo_server.api.keys import Keys, Tenant, bearer
from ergo_server.api.limits import Refused, TenantLimits
from ergo_server.api.middleware import PROBES, QUESTIONS
from ergo_server.errors import ErgoError, Overloaded, Unauthenticated
from ergo_server.telemetry.metrics import Metrics, Rejection

ADMITTED = QUESTIONS | {"/v1/vqa/estimate", "/v1/images"}
"""Where a POST brings a body that makes work."""

OPEN = PROBES | {"/", "/version", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}
"""Answered without a key, as is `OPEN_FOLDER`. Whatever is not named here needs one, so that no route is open by oversight."""

OPEN_FOLDER = "/static/"

DRAIN_RETRY_SECONDS = 1.0
"""After which to try again at a server that is stopping: another replica can take the request at once."""


class Gate:
    """Bounds what is worked on at a time: requests, requests that wait for that, and bytes of their bodies.

    Places are given in the order of asking, and nobody overtakes. Belongs to one event loop.

    Args:
        max_concurrent: requests that are worked on at a time.
        max_queued: requests that wait for that.
        queue_seconds: how long they do.
        max_bytes: bytes of request bodies that are waited for, or held.
        jitter: draws from 0 to 1; spreads the moments at which those who were refused come back.
    """

    def __init__(
        self,
        *,
        max_concurrent: int,
        max_queued: int,
        queue_seconds: float,
        max_bytes: int,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.draining = False
        """Whether nobody is let in any more."""
        self.max_bytes = max_bytes
        self.bytes = 0
        """Bytes of request bodies that are reserved."""
        self._free = max_concurrent
        self._max_queued = max_queued
        self._queue: deque[asyncio.Future[None]] = deque()
        self._queue_seconds = queue_seconds
        self._jitter = jitter

    @property
    def queued(self) -> int:
        """Requests that wait for a place."""
        return len(self._queue)

    def drain(self) -> None:
        """Let nobody in from now on. Who is in, or waits, is served."""
        self.draining = True

    def reserve(self, count: int) -> None:
        """Reserve bytes of a body; give them back with `release`.

        Raises:
            Refused: there are not so many left.
        """
        if self.bytes + count > self.max_bytes:
            raise self._refused("bytes_in_flight", f"the request bodies under way fill the {self.max_bytes:,} bytes for them")
        self.bytes += count

    def release(self, count: int) -> None:
        """Give reserved bytes back."""
        self.bytes -= count

    async def enter(self, gone: Callable[[], Awaitable[None]]) -> None:
        """Take a place, when it is one's turn; give it back with `leave`.

        Args:
            gone: awaited while waiting; returns when the caller has left.

        Raises:
            Refused: the server is stopping, too many wait already, or it took too long.
            ClientDisconnect: the caller has left.
        """
        if self.draining:
            raise self._refused("draining", "the server is stopping", DRAIN_RETRY_SECONDS)
        if self._free:  # nobody waits then: a place that becomes free goes to the first of them
            self._free -= 1
            return
        if self.queued >= self._max_queued:
            raise self._refused("queue_full", "the server has as much work as it takes, and as many requests waiting")
        place = asyncio.get_running_loop().create_future()
        self._queue.append(place)
        watch = asyncio.ensure_future(gone())
        entered = False
        try:
            await asyncio.wait({place, watch}, timeout=self._queue_seconds, return_when=asyncio.FIRST_COMPLETED)
            watch.cancel()
            await asyncio.wait({watch})  # it reads from the connection; two must not do that
            if not watch.cancelled():
                watch.result()
                raise ClientDisconnect
            if not place.done():
                raise self._refused("queue_timeout", f"no place became free within {self._queue_seconds:g} s")
            entered = True
        finally:
            watch.cancel()
            if not entered:
                if place.done():
                    self.leave()
                else:
                    self._queue.remove(place)

    def leave(self) -> None:
        """Give a place back."""
        if self._queue:
            self._queue.popleft().set_result(None)
        else:
            self._free += 1

    def _refused(self, reason: Rejection, message: str, seconds: float | None = None) -> Refused:
        seconds = self._queue_seconds if seconds is None else seconds
        return Refused(reason, Overloaded, message, max(1.0, seconds * (0.5 + self._jitter())))


class _Body:
    """A request's body on its way in: counted against the gate's bytes, and read ahead while the request waits.

    Args:
        receive: where it comes from.
        gate: whose bytes it takes.
        max_bytes: read ahead no further; a longer body is refused by who reads it.
    """

    def __init__(self, receive: Receive, gate: Gate, max_bytes: int) -> None:
        self._receive = receive
        self._gate = gate
        self._max_bytes = max_bytes
        self._reserved = 0
        self._read = 0
        self._ahead: deque[Message] = deque()

    def reserve(self, count: int) -> None:
        """Reserve bytes, until `close`. Raises `Refused`."""
        self._gate.reserve(count)
        self._reserved += count

    async def receive(self) -> Message:
        """Return the next message, as the server underneath does. Raises `Refused` where a chunked body grows too big."""
        return self._ahead.popleft() if self._ahead else await self._next()

    async def gone(self) -> None:
        """Read ahead, and return when the caller has left. May be cancelled at any time; nothing is lost."""
        while self._read <= self._max_bytes:
            message = await self._next()
            self._ahead.append(message)
            if message["type"] == "http.disconnect":
                return
        await asyncio.Event().wait()

    def close(self) -> None:
        """Give back all that was reserved."""
        self._gate.release(self._reserved)

    async def _next(self) -> Message:
        message = await self._receive()
        self._read += len(message.get("body", b""))
        if self._read > self._reserved:
            self.reserve(self._read - self._reserved)
        return message


class Admission:
    """Asks for the key, and lets requests in as the tenant's limits and the gate allow. Names the tenant in ``scope["tenant"]``.

    Args:
        app: what is wrapped.
        keys: who may ask.
        limits: what each tenant may use.
        gate: what the server as a whole takes on.
        metrics: where refusals are counted.
        max_body_bytes: a body that says that it is longer needs no place: whoever reads it refuses it unread.
        open_metrics: answer ``/metrics`` without a key.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        limits: TenantLimits,
        gate: Gate,
        metrics: Metrics,
        *,
        max_body_bytes: int,
        open_metrics: bool,
    ) -> None:
        self.app = app
        self.keys = keys
        self.limits = limits
        self.gate = gate
        self.metrics = metrics
        self.max_body_bytes = max_body_bytes
        self.open = OPEN if open_metrics else OPEN - {"/metrics"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self.open or scope["path"].startswith(OPEN_FOLDER):
            await self.app(scope, receive, send)
            return
        key = bearer(scope["headers"])
        tenant = self.keys.tenant(key)
        if tenant is None:
            self.metrics.auth_failures.labels("invalid" if key else "missing").inc()
            error = Unauthenticated("a known API key is needed, as Authorization: Bearer KEY")
            await self._refuse(error, {"www-authenticate": "Bearer"}, scope, receive, send)
            return
        scope["tenant"] = tenant
        if scope["method"] == "POST" and scope["path"] in ADMITTED:
            await self._admit(tenant, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _admit(self, tenant: Tenant, scope: Scope, receive: Receive, send: Send) -> None:
        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self.limits.headers(tenant)]
            await send(message)

        try:
            with self.limits.entered(tenant):
                await self._pass(scope, receive, labelled)
        except Refused as refused:
            self.metrics.rejections.labels(refused.reason).inc()
            await self._refuse(refused.error, {"retry-after-ms": str(refused.retry_ms)}, scope, receive, labelled)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, with its bytes and its place held until the last byte of the response is sent."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_body_bytes:
            await self.app(scope, receive, send)
            return
        with contextlib.closing(_Body(receive, self.gate, self.max_body_bytes)) as body:

            async def counted() -> Message:
                try:
                    return await body.receive()
                except Refused as refused:  # amid the body: for whoever reads it, an error like any other
                    self.metrics.rejections.labels(refused.reason).inc()
                    raise refused.error from None

            body.reserve(int(length))
            try:
                await self.gate.enter(body.gone)
            except ClientDisconnect:
                if scope["path"] in QUESTIONS:
                    self.metrics.refuse("cancelled")
                raise
            try:
                await self.app(scope, counted, send)
            finally:
                self.gate.leave()

    async def _refuse(self, error: ErgoError, headers: Mapping[str, str], scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST" and scope["path"] in QUESTIONS:
            self.metrics.refuse(error.code)
        response = respond(error, Request(scope))
        response.headers.update(headers)
        await response(scope, receive, send)
