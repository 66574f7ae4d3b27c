"""Who is let in, and when: the key, the tenant's limits, and a place among those that are worked on.

What is refused here is 401 without a known key, 429 where the tenant has used up its share, and 503 where the server as a whole
has as much work as it takes: all that is known from the head is said before the body is read, so that saying no costs next to
nothing. A place is taken when the body has arrived, not before: who sends slowly, or never, holds a connection and no work. Its
bytes are counted as they come; meanwhile the routes may look at them.
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

OPEN = PROBES | {"/", "/version", "/docs", "/openapi.json"}
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
        self._places = self._free = max_concurrent
        self._max_queued = max_queued
        self._queue: deque[asyncio.Future[None]] = deque()
        self._queue_seconds = queue_seconds
        self._jitter = jitter

    @property
    def queued(self) -> int:
        """Requests that wait for a place."""
        return len(self._queue)

    @property
    def crowded(self) -> bool:
        """Whether callers may soon need what is left: half of the places are taken, or the server is stopping."""
        return self.draining or 2 * self._free < self._places

    def drain(self) -> None:
        """Let nobody in from now on. Who is in, or waits, is served."""
        self.draining = True

    def knock(self, length: int) -> None:
        """Refuse, before its body is read, what would not be let in now.

        Args:
            length: bytes of the body, as announced. Not reserved: else who announces much and sends little would keep others out.

        Raises:
            Refused: the server is stopping, too many wait already, or the bytes would not fit.
        """
        if self.draining:
            raise self._refused("draining", "the server is stopping", DRAIN_RETRY_SECONDS)
        if not self._free and self.queued >= self._max_queued:
            raise self._full()
        self._fits(length)

    def reserve(self, count: int) -> None:
        """Reserve bytes of a body; give them back with `release`.

        Raises:
            Refused: there are not so many left.
        """
        self._fits(count)
        self.bytes += count

    def release(self, count: int) -> None:
        """Give reserved bytes back."""
        self.bytes -= count

    async def enter(self, gone: Callable[[], Awaitable[None]]) -> None:
        """Take a place, when it is one's turn; give it back with `leave`.

        Args:
            gone: awaited while waiting; returns when the caller has left.

        Raises:
            Refused: too many wait already, or it took too long.
            ClientDisconnect: the caller has left.
        """
        if self._free:  # nobody waits then: a place that becomes free goes to the first of them
            self._free -= 1
            return
        if self.queued >= self._max_queued:
            raise self._full()
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

    def _fits(self, count: int) -> None:
        if self.bytes + count > self.max_bytes:
            raise self._refused("bytes_in_flight", f"the request bodies under way fill the {self.max_bytes:,} bytes for them")

    def _full(self) -> Refused:
        return self._refused("queue_full", "the server has as much work as it takes, and as many requests waiting")

    def _refused(self, reason: Rejection, message: str, seconds: float | None = None) -> Refused:
        seconds = self._queue_seconds if seconds is None else seconds
        return Refused(reason, Overloaded, message, max(1.0, seconds * (0.5 + self._jitter())))


class _Body:
    """A request's body on its way in: counted against the gate's bytes, and given a place at its end.

    Args:
        receive: where it comes from.
        gate: whose bytes and places it takes.
    """

    def __init__(self, receive: Receive, gate: Gate) -> None:
        self._receive = receive
        self._gate = gate
        self._reserved = 0
        self._entered = False
        self._left: Message | None = None

    async def receive(self) -> Message:
        """Return the next message, the last one of the body when there is a place for the request.

        Raises:
            Refused: the bytes have run out, or there is no place.
        """
        if self._left is not None:
            return self._left
        message = await self._receive()
        size = len(message.get("body", b""))
        self._gate.reserve(size)
        self._reserved += size
        if message["type"] == "http.request" and not message.get("more_body", False) and not self._entered:
            try:
                await self._gate.enter(self._gone)
            except ClientDisconnect:
                assert self._left is not None
                return self._left
            self._entered = True
        return message

    def close(self) -> None:
        """Give back all that was taken."""
        self._gate.release(self._reserved)
        if self._entered:
            self._gate.leave()

    async def _gone(self) -> None:
        """Return when the caller has left."""
        while (message := await self._receive())["type"] != "http.disconnect":
            pass  # nothing else is to come; taken for a leaving, it would let the request on without a place
        self._left = message


class Admission:
    """Asks for the key, and lets requests in as the tenant's limits and the gate allow. Names the tenant in ``scope["tenant"]``.

    Args:
        app: what is wrapped.
        keys: who may ask.
        limits: what each tenant may use.
        gate: what the server as a whole takes on.
        metrics: where refusals are counted.
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
        open_metrics: bool,
    ) -> None:
        self.app = app
        self.keys = keys
        self.limits = limits
        self.gate = gate
        self.metrics = metrics
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
        """Hand a request on, with its bytes and its place held until the last byte of the response is sent."""
        later: Refused | None = None

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self.limits.headers(tenant), *_retry_ms(later)]
            await send(message)

        async def counted() -> Message:
            nonlocal later
            try:
                return await body.receive()
            except Refused as refused:  # amid or after the body: for whoever reads it, an error like any other
                self.metrics.rejections.labels(refused.reason).inc()
                later = refused
                raise refused.error from None

        try:
            with self.limits.entered(tenant), contextlib.closing(_Body(receive, self.gate)) as body:
                self.gate.knock(int(dict(scope["headers"]).get(b"content-length", b"0")))
                await self.app(scope, counted, labelled)
                if later is not None:  # it has its answer; what is left is that it costs the tenant nothing
                    raise later
        except Refused as refused:
            if refused is later:
                return
            self.metrics.rejections.labels(refused.reason).inc()
            later = refused
            await self._refuse(refused.error, {}, scope, receive, labelled)

    async def _refuse(self, error: ErgoError, headers: Mapping[str, str], scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST" and scope["path"] in QUESTIONS:
            self.metrics.refuse(error.code)
        response = respond(error, Request(scope))
        response.headers.update(headers)
        await response(scope, receive, send)


def _retry_ms(refused: Refused | None) -> list[tuple[bytes, bytes]]:
    """The finer form of Retry-After that OpenAI's clients look at first."""
    return [(b"retry-after-ms", str(refused.retry_ms).encode())] if refused else []
