"""The socket that the server listens on."""

from __future__ import annotations

import asyncio
import socket

import pytest

from ergo_server.api.listen import listen


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_connections_do_not_wait_for_acknowledgements(host: str) -> None:
    """On what is accepted Nagle's algorithm is off: a response's body does not wait until its head was acknowledged."""

    async def work() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listening = listen(host, 0)
        async with await asyncio.start_server(accepted, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname()[:2])
            writer.close()
            return await found

    assert asyncio.run(work()) == 1


def test_an_address_in_use_is_an_error() -> None:
    """The second who wants a port is told."""
    with listen("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(OSError, match="in use"):
            listen("127.0.0.1", first.getsockname()[1])
