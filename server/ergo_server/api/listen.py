"""The socket that the server listens on, and the server on it: how it begins and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from ergo_server.api.connection import Config, Connection, ConnectionLimits

TICK_SECONDS = 0.05
"""How often a server that ends looks whether all is done."""

CANCEL_SECONDS = 2.0
"""For cancelled requests to give back what they hold: closing a connection to the engine takes milliseconds."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address, for `server`; port 0 takes a free one.

    Raises:
        OSError: the host is unknown, or the address in use.
    """
    # With its protocol named: asyncio switches Nagle's algorithm off only for sockets that say they are TCP, and one made from
    # family and type alone does not. A response's head and body then wait for each other's acknowledgement: 44 ms instead of 1
    # for every request on loopback.
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError:
        listening.close()
        raise
    return listening


@dataclass(frozen=True, slots=True)
class Ending:
    """How a server ends. The settings of the same names give the reasons for their defaults."""

    grace_seconds: float
    """Connections are still accepted, and refused what they ask."""
    drain_seconds: float
    """What is under way may finish."""
    begin: Callable[[], None]
    """Called once on the event loop: from now on the app says that it is not ready, and refuses new questions."""


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT, then drains.

    Readiness turns false, and each response says that its connection ends; for the grace time connections are still accepted, so
    that load balancers come to notice; then none are, and what is under way may finish; then it is cut off, with its work on the
    engine. A second signal ends the process at once, as if nobody had caught it: the kernel closes the connections, by which the
    engine learns.
    """

    def __init__(self, app: ASGIApp, limits: ConnectionLimits, ending: Ending) -> None:
        config = Config(app, limits)
        super().__init__(config)
        self._config = config
        self._ending = ending
        self.cut_off = 0
        """Requests that had to be cut off in the end."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end. uvicorn's own raises the signal again afterwards, and a clean end would not exit with 0."""
        if self.should_exit:
            # The signal itself, raised again, would not end a container's process 1. The number is a shell's for it.
            os._exit(128 + sig)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, and give back what the app holds."""
        self._ending.begin()
        self._config.ending = True
        await self._until(lambda: False, self._ending.grace_seconds)
        await self._stop_listening(sockets or [])
        await self._until(self._done, self._ending.drain_seconds)
        left = list(self.server_state.tasks)
        self.cut_off = len(left)
        for task in left:
            task.cancel()
        await self._until(self._done, CANCEL_SECONDS)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await self.lifespan.shutdown()

    async def _stop_listening(self, sockets: list[socket.socket]) -> None:
        """Take no connection any more, but for those that wait to be taken: the kernel would reset them."""
        waiting = []
        for listening in sockets:
            with contextlib.suppress(OSError):  # nobody is there any more
                while True:
                    waiting.append(listening.accept()[0])
        for server in self.servers:
            server.close()
        for connection in waiting:
            connection.setblocking(False)
            await asyncio.get_running_loop().connect_accepted_socket(self._connection, connection)

    def _connection(self) -> Connection:
        return Connection(self._config, self.server_state, self.lifespan.state)

    def _done(self) -> bool:
        for connection in list(self.server_state.connections):
            connection.shutdown()
        return not (self.server_state.tasks or self.server_state.connections)

    async def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        while not condition() and clock() < end:
            await self.on_tick(0)  # keeps the Date header right
            await asyncio.sleep(TICK_SECONDS)


def server(app: FastAPI) -> Server:
    """Return the server for an app of `create_app`, which carries its limits; run it with the sockets of `listen`."""
    return Server(app, app.state.connection_limits, app.state.ending)
