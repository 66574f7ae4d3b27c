"""The socket that the server listens on, and the server on it."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI


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


def server(app: FastAPI) -> uvicorn.Server:
    """Return the server for an app; run it with the sockets of `listen`. It writes nothing but warnings."""
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False, access_log=False))
