"""One connection of a client: uvicorn's HTTP/1.1 protocol, with limits on what it leaves to a proxy in front.

uvicorn 0.54 waits for ever for the rest of a request's head, for a reader who never reads, and for the end of a body that
nobody wants; what is no HTTP it answers in plain text. Here all of these end, and everything has the one envelope. It closes
connections on which a request, or the rest of one, is on its way: the kernel then resets them, and their clients lose what they
were to read. Here they are told first.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import h11
import uvicorn
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from ergo_server.api.errors import respond
from ergo_server.api.pace import Pace
from ergo_server.errors import BodyTooSlow, ErgoError, Overloaded, RequestError
from ergo_server.telemetry.metrics import Refusal

LOOK_SECONDS = 0.25
"""Each connection is looked at this often. Its limits count looks, not time: while the event loop is busy nobody is late."""

QUIET_LOOKS = 2
"""A server that ends closes an unused connection once nothing has come on it from one look to the next."""

AGAIN_SECONDS = 1
"""``Retry-After`` of one whom the server has no room for: another replica may have, or a moment later this one."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What a connection may do. The settings of the same names give the reasons for their defaults."""

    refused: Callable[[Refusal], None]
    """Told of each connection that is turned away or cut off for one of these."""

    head_seconds: float
    """For a request's head to arrive."""
    max_head_bytes: int
    """Of a head, and of each line that frames a chunk."""
    keep_alive_seconds: int
    """Between two requests."""
    linger_seconds: float
    """The rest of a body that nobody reads is taken in, so that its sender comes to read the answer."""
    reader_stall_seconds: float
    """A reader may take nothing; below `bytes_per_second` this is used up."""
    bytes_per_second: float
    """The slowest average of a reader."""
    max_connections: int
    """Open at once."""


class Config(uvicorn.Config):
    """uvicorn's configuration for `Connection`. It writes nothing but warnings."""

    def __init__(self, app: ASGIApp, limits: ConnectionLimits) -> None:
        super().__init__(
            app,
            http=Connection,
            ws="none",
            log_config=None,  # its own writes exceptions with their text; see telemetry/logging.py
            log_level="warning",
            server_header=False,
            access_log=False,
            h11_max_incomplete_event_size=limits.max_head_bytes,
            timeout_keep_alive=limits.keep_alive_seconds,
        )
        self.limits = limits
        self.ending = False
        """Whether the server ends: each response then says that its connection is at an end, too."""


class Connection(H11Protocol):
    """Answers the requests of one connection, and ends it where the client does not do its part.

    A client owes the rest of a ``head`` that it has begun, or of the first one at all; nothing while ``idle`` between requests,
    where uvicorn's own timer runs; and the ``rest`` of a request that was answered early.
    """

    config: Config

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = config.limits
        self._app: ASGIApp = self.app
        self.app = self._answer
        self._look_again: asyncio.TimerHandle | None = None
        self._refused = False
        self._owed: tuple[object, ...] = ()
        self._looks = 0
        self._sent = 0
        """Bytes of bodies handed to the transport."""
        self._taken = 0
        """Of these, what the client's side had taken at the last look."""
        self._pace = Pace(self._limits.reader_stall_seconds, self._limits.bytes_per_second)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, if there is room."""
        super().connection_made(transport)
        self._look()
        self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        if self._look_again is not None:
            self._look_again.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on; what comes after a refusal is dropped."""
        if not self._refused:
            super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._limits.refused("bad_head")
        size = f"{self._limits.max_head_bytes:,}"
        self._refuse(RequestError(f"this is not HTTP/1.1, or the head is longer than {size} bytes"))

    def shutdown(self) -> None:
        """Close, if nobody is there who would notice; a server that ends calls it again and again.

        A request may be on its way while its connection seems unused: it is answered, and then told that this was the last.
        """
        quiet = self._looks >= QUIET_LOOKS and (self._owes(), self.cycle) == self._owed
        if quiet and self._owes() != "rest" and self._unused:
            self.transport.close()

    def on_response_complete(self) -> None:
        """Go on to the next request."""
        super().on_response_complete()
        if self._refused:  # the rest of the body has its own time
            self._unset_keepalive_if_required()

    def _should_upgrade(self) -> bool:
        """Never, and without uvicorn's warning: anybody could fill the log with it."""
        return False

    @property
    def _unused(self) -> bool:
        """No request is under way, and no answer."""
        answered = self.cycle is None or self.cycle.response_complete or self._refused
        return answered and not self.transport.get_write_buffer_size()

    def _make_room(self) -> None:
        """Close the connection that has done nothing for longest where one more than the limit is open, as nginx does.

        So those who hold connections and send nothing displace each other, and not the ones who ask. Where every connection is
        in use, the newest is refused.
        """
        there = [other for other in self.connections if isinstance(other, Connection) and not other.transport.is_closing()]
        if len(there) <= self._limits.max_connections:
            return
        unused = [other for other in there if other is not self and other._unused]
        if unused:
            self._limits.refused("displaced")
            max(unused, key=lambda other: other._looks).transport.abort()
        else:
            self._limits.refused("too_many")
            self._refuse(Overloaded("the server has as many connections as it takes", retry_after=AGAIN_SECONDS))

    def _look(self) -> None:
        """See whether the client does its part."""
        self._look_again = self.loop.call_later(LOOK_SECONDS, self._look)
        if not self._reads():
            self._limits.refused("slow_reader")
            self._reset()
            return
        owed = self._owes()
        if (owed, self.cycle) != self._owed:
            self._owed, self._looks = (owed, self.cycle), 0
        self._looks += 1
        waited = self._looks * LOOK_SECONDS
        if owed == "rest" and waited > self._limits.linger_seconds:
            self._reset()
        elif owed == "head" and waited > self._limits.head_seconds:
            if self.conn.trailing_data[0]:
                self._limits.refused("slow_head")
                self._refuse(BodyTooSlow(f"the request's head did not arrive within {self._limits.head_seconds:g} s"))
            else:
                self.transport.close()

    def _reset(self) -> None:
        """Close, and forget at once what was still to be sent: the kernel would keep megabytes for a reader who never reads."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _owes(self) -> Literal["head", "idle", "rest"] | None:
        if self._refused or (self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY):
            return "rest"
        if self.conn.their_state is h11.IDLE:
            return "head" if self.timeout_keep_alive_task is None else "idle"
        return None

    def _reads(self) -> bool:
        """Say whether the client takes what it is sent, fast enough.

        The rate is seen through the kernel's buffer, which takes a third of its size at a time: hence the long patience.
        """
        waiting = self.transport.get_write_buffer_size()
        taken = self._sent - waiting
        if waiting:
            self._pace.waited(LOOK_SECONDS)
            self._pace.moved(max(0, taken - self._taken))
        else:
            self._pace.restart()
        self._taken = taken
        return self._pace.left > 0

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app on one request."""
        cycle = self.cycle
        cycle.transport = _Ending(self.transport, self._end)  # type: ignore[assignment]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and self.config.ending:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)
            self._sent += len(message.get("body", b""))

        try:
            await self._app(scope, receive, counted)
        except asyncio.CancelledError:  # by nobody but the server that ends, see `listen.Server`; it is told by the task's end
            if cycle.response_started:
                cycle.disconnected = True
                self.transport.abort()
            else:
                stopping = Overloaded("the server is stopping", retry_after=AGAIN_SECONDS)
                await respond(stopping, Request(scope))(scope, receive, counted)

    def _end(self) -> None:
        """Close after a response; where the request's body still comes, once its sender has read that."""
        if self.conn.their_state is h11.SEND_BODY:
            self._refused = True
            self.transport.write_eof()
        else:
            self.transport.close()

    def _refuse(self, error: ErgoError) -> None:
        """Answer what never became a request for the app, and take no more; closed by the client, or after a while."""
        self._refused = True
        if self.cycle is not None and not self.cycle.response_complete:  # its body broke off into garbage
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # amid a response, or after one: nothing can be said any more
            return
        response = respond(error, Request({"type": "http", "request_id": uuid.uuid4().hex}))
        headers = [*self.server_state.default_headers, *response.raw_headers, (b"connection", b"close")]
        head = h11.Response(status_code=error.status, headers=headers, reason=STATUS_PHRASES[error.status])
        for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write_eof()


class _Ending:
    """A transport as the responses of uvicorn use it.

    Args:
        transport: the connection's.
        end: called instead of closing it.
    """

    def __init__(self, transport: asyncio.Transport, end: Callable[[], None]) -> None:
        self.write = transport.write
        self.close = end
