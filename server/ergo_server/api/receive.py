"""Limits on a request's body while it is read: its size, its encoding, and the time its sender takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ergo_server.api.errors import respond
from ergo_server.api.middleware import QUESTIONS
from ergo_server.api.pace import Pace
from ergo_server.errors import BodyTooLarge, BodyTooSlow, RequestError, UnsupportedBody


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """What a body may be. The settings of the same names give the reasons for their defaults."""

    max_bytes: int
    seconds: float
    """The server may wait for a whole body."""
    stall_seconds: float
    """The sender may be silent; below `bytes_per_second` this is used up."""
    bytes_per_second: float
    """The slowest average."""


class LimitBody:
    """Raises through ``receive`` what is wrong with a body, so that its readers end. Stands outside of `Admission`, whose waiting
    is no fault of the sender's.

    What a request's head shows is refused before anything is read. Only time spent waiting for the sender counts against it:
    while the server does not ask for more (it is busy, or the request waits for its turn) no limit runs.

    Args:
        app: what is wrapped.
        refused: told the error's code of a question that is refused by its head; the routes tell of their own refusals.
        limits: of every body.
    """

    def __init__(self, app: ASGIApp, refused: Callable[[str], None], limits: BodyLimits) -> None:
        self.app = app
        self.refused = refused
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if error := self._wrong_head(scope):
            if scope["path"] in QUESTIONS:
                self.refused(error.code)
            await respond(error, Request(scope))(scope, receive, send)
            return
        body = _Body(receive, self.limits)

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and body.late:
                # RFC 9110 §15.5.9: whoever answers 408 closes. uvicorn does where a response says so.
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await self.app(scope, body.receive, closing)

    def _wrong_head(self, scope: Scope) -> RequestError | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return RequestError("Content-Length is not a number")
        if int(length) > self.limits.max_bytes:
            return _too_large(self.limits)
        # A compressed body is a bomb by design, and images are compressed already.
        if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
            return UnsupportedBody("the body has a Content-Encoding; send it as it is")
        return None


class _Body:
    """One body on its way in."""

    def __init__(self, receive: Receive, limits: BodyLimits) -> None:
        self.late = False
        self._receive = receive
        self._limits = limits
        self._pace = Pace(limits.stall_seconds, limits.bytes_per_second)
        self._seconds = limits.seconds
        self._read = 0
        self._ended = False

    async def receive(self) -> Message:
        """Receive the next piece.

        Raises:
            BodyTooLarge: with this piece the body is longer than the limit.
            BodyTooSlow: the sender has used up its time.
        """
        if self._ended:  # what comes now is the caller's leaving, and nobody is in a hurry
            return await self._receive()
        message = await self._in_time()
        size = len(message.get("body", b""))
        self._pace.moved(size)
        self._read += size
        self._ended = not message.get("more_body", False)
        if self._read > self._limits.max_bytes:
            raise _too_large(self._limits)
        return message

    async def _in_time(self) -> Message:
        clock = asyncio.get_running_loop().time
        since = clock()
        try:
            async with asyncio.timeout(min(self._pace.left, self._seconds)):
                return await self._receive()
        except TimeoutError:
            return await self._at_once()
        finally:
            waited = clock() - since
            self._pace.waited(waited)
            self._seconds -= waited

    async def _at_once(self) -> Message:
        """Take what has come in the meantime: a busy event loop runs a timer late, with the sender's bytes already there."""
        try:
            async with asyncio.timeout(0):
                return await self._receive()
        except TimeoutError:
            self.late = True
            limits = self._limits
            bounds = f"within {limits.seconds:g} s, at {limits.bytes_per_second:,g} bytes/s or more"
            raise BodyTooSlow(f"the body did not arrive {bounds}") from None


def _too_large(limits: BodyLimits) -> BodyTooLarge:
    return BodyTooLarge(f"the body is longer than {limits.max_bytes:,} bytes")
