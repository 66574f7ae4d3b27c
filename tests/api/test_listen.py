"""The socket that the server listens on, and the connections to it: what is slow, malformed or too much ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import select
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import pytest
import support
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse

from ergo_server.api.connection import ConnectionLimits
from ergo_server.api.listen import Ending, listen

# --- the socket ---------------------------------------------------------------------------------------------------------


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


TCP_CLOSE = 7
"""The state of a connection that is no more, as Linux counts them (tcp_states.h)."""

# --- connections --------------------------------------------------------------------------------------------------------


class Served:
    """A small app behind the server's connections.

    Args:
        given: limits other than the generous ones.
    """

    def __init__(self, **given: Any) -> None:
        limits = {
            "head_seconds": 600,
            "max_head_bytes": 16_384,
            "keep_alive_seconds": 600,
            "linger_seconds": 600,
            "reader_stall_seconds": 600,
            "bytes_per_second": 1000,
            "max_connections": 100,
        }
        self.streaming = 0
        """Streams that are being written."""
        self.hanging = 0
        """Requests that wait for `release`."""
        self.release = threading.Event()
        self.left = 0
        """Readers of a body who were told that its sender had left."""
        self.refusals: list[str] = []
        """Why connections were turned away or cut off."""
        self.app = FastAPI()
        self.app.state.connection_limits = ConnectionLimits(self.refusals.append, **limits | given)
        self.app.state.ending = Ending(0, 0, lambda: None)
        self.app.get("/")(self._hello)
        self.app.get("/endless")(self._endless)
        self.app.get("/big")(self._big)
        self.app.get("/hang")(self._hang)
        self.app.post("/refuse")(self._refuse)
        self.app.post("/count")(self._count)
        self.url = ""

    async def _hello(self) -> Response:
        return PlainTextResponse("hello")

    async def _endless(self) -> Response:
        async def body() -> AsyncIterator[bytes]:
            self.streaming += 1
            try:
                while True:
                    yield bytes(65_536)
                    await asyncio.sleep(0)
            finally:
                self.streaming -= 1

        return StreamingResponse(body())

    async def _big(self) -> Response:
        return Response(bytes(32 * 1024**2))

    async def _hang(self) -> Response:
        self.hanging += 1
        await asyncio.to_thread(self.release.wait)
        return PlainTextResponse("released")

    async def _refuse(self) -> Response:
        return PlainTextResponse("no", status_code=413)

    async def _count(self, request: Request) -> Response:
        try:
            return PlainTextResponse(str(len(await request.body())))
        except Exception:
            self.left += 1
            raise

    @contextlib.contextmanager
    def running(self) -> Iterator[Served]:
        """Serve."""
        with support.served(self.app) as self.url:
            try:
                yield self
            finally:
                self.release.set()

    def connect(self, *lines: str, receive_bytes: int | None = None) -> socket.socket:
        """Connect, and send lines of a head."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.socket()
        connection.settimeout(60)
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.connect((host, int(port)))
        connection.sendall("".join(f"{line}\r\n" for line in lines).encode())
        return connection

    def get(self, path: str = "/") -> httpx2.Response:
        """Ask as everybody does."""
        return httpx2.get(f"{self.url}{path}", trust_env=False, timeout=60)


def served(**given: Any) -> contextlib.AbstractContextManager[Served]:
    """Serve the small app."""
    return Served(**given).running()


def to_the_end(connection: socket.socket) -> bytes:
    """Receive until the other side ends."""
    received = b""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while piece := connection.recv(65_536):
            received += piece
    return received


def until(connection: socket.socket, mark: bytes) -> bytes:
    """Receive until ``mark`` ends what has come."""
    received = b""
    while not received.endswith(mark):
        piece = connection.recv(65_536)
        assert piece, received
        received += piece
    return received


def refusal(answer: bytes) -> tuple[int, str]:
    """Return status and code of a refusal; fails where it is not the envelope, or does not close the connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert "connection: close" in lines
    assert "content-type: application/json" in lines
    assert f"content-length: {len(body)}" in lines
    assert any(re.fullmatch(r"x-request-id: \w{32}", line) for line in lines)
    found = json.loads(body)
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    return int(lines[0].split()[1]), found["error"]["code"]


def answered(connection: socket.socket) -> bool:
    """Say whether something has come, the end of the connection included."""
    return bool(select.select([connection], [], [], 0)[0])


def reset(connection: socket.socket) -> bool:
    """Say whether the other side has broken the connection, without receiving anything."""
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE


def test_a_silent_connection_is_closed() -> None:
    """Who connects and says nothing is told nothing."""
    with served(head_seconds=0.5) as server, server.connect() as connection:
        assert to_the_end(connection) == b""


@pytest.mark.parametrize(
    "before", [(), ("GET / HTTP/1.1", "host: x", "")], ids=["at first", "after a request on the same connection"]
)
def test_a_slow_head_is_cut_off(before: tuple[str, ...]) -> None:
    """A head that arrives byte by byte is answered with 408 once its time is up; others are served meanwhile."""
    with served(head_seconds=1) as server, server.connect(*before) as connection:
        if before:
            until(connection, b"hello")
        for letter in b"GET / HTTP/1.1\r\nx: " + b"y" * 10_000:
            if answered(connection):
                break
            connection.send(bytes([letter]))
            time.sleep(0.02)
        assert server.get().text == "hello"
        assert refusal(to_the_end(connection)) == (408, "request_timeout")
        assert server.refusals == ["slow_head"]


def test_each_head_has_its_own_time() -> None:
    """A connection that asks again and again, each head in two parts, outlives the time of one head."""
    with served(head_seconds=1.2) as server, server.connect() as connection:
        for _ in range(8):
            connection.sendall(b"GET / HTTP/1.1\r\n")
            time.sleep(0.25)
            connection.sendall(b"host: x\r\n\r\n")
            until(connection, b"hello")


def test_an_answer_that_takes_long_is_not_a_slow_head() -> None:
    """A connection whose request is being answered is waited for."""
    with (
        served(head_seconds=0.5, linger_seconds=0.5) as server,
        server.connect("GET /hang HTTP/1.1", "host: x", "connection: close", "") as connection,
    ):
        time.sleep(1.5)
        server.release.set()
        assert to_the_end(connection).endswith(b"released")


def test_an_idle_connection_is_closed() -> None:
    """After an answer the connection stays open for the keep-alive time, and no longer."""
    with served(keep_alive_seconds=1) as server, server.connect("GET / HTTP/1.1", "host: x", "") as connection:
        assert to_the_end(connection).endswith(b"hello")


MALFORMED = {
    "no HTTP": b"\x00\xff\xfe garbage\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "an older protocol": b"GET /\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
    "a length that is no number": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: many\r\n\r\n",
    "an unknown transfer encoding": b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n",
    "a huge head": b"GET / HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * 500_000,
    "a huge line": b"GET /" + b"x" * 3_000_000,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """A server with limits that nobody reaches here."""
    with served() as running:
        yield running


@pytest.mark.parametrize("garbage", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("before", [False, True], ids=["alone", "pipelined"])
def test_what_is_no_http_has_the_envelope(server: Served, garbage: bytes, before: bool) -> None:
    """Whatever cannot be read is answered with 400 in the one envelope, and ends the connection; also behind a good request."""
    with server.connect() as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall((b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" if before else b"") + garbage)
        answer = to_the_end(connection)
        if before:
            good, hello, answer = answer.partition(b"hello")
            assert (good[:15], hello) == (b"HTTP/1.1 200 OK", b"hello")
        assert refusal(answer) == (400, "invalid_request")
        assert server.refusals[-1] == "bad_head"
        assert server.get().text == "hello"


def test_who_goes_on_sending_can_still_read_the_refusal(server: Served) -> None:
    """What comes after a refusal does not break the connection, which would take the refusal with it."""
    with server.connect("no HTTP", "") as connection:
        support.wait_until(lambda: answered(connection), "the refusal is there")
        for _ in range(3):
            connection.sendall(bytes(100_000))
            time.sleep(0.05)
        assert not reset(connection)
        assert refusal(to_the_end(connection)) == (400, "invalid_request")


def test_a_body_that_breaks_off_into_garbage_ends_its_reader(server: Served) -> None:
    """A chunk that is none is answered with 400, and who was reading the body is told that its sender left."""
    with server.connect("POST /count HTTP/1.1", "host: x", "transfer-encoding: chunked", "", "1", "x", "nonsense") as sender:
        assert refusal(to_the_end(sender)) == (400, "invalid_request")
        support.wait_until(lambda: server.left == 1, "the reader has ended")


def test_an_upgrade_is_not_made(server: Served) -> None:
    """An offer of another protocol is passed over, and the request answered as it is."""
    lines = ("GET / HTTP/1.1", "host: x", "connection: upgrade", "upgrade: websocket", "sec-websocket-version: 13")
    with server.connect(*lines, "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==", "") as connection:
        until(connection, b"hello")


@pytest.mark.parametrize("path", ["/endless", "/big"])
def test_a_reader_who_never_reads_is_cut_off(path: str) -> None:
    """A reader who takes nothing loses the connection, and the work behind a streamed answer ends."""
    with (
        served(reader_stall_seconds=0.5) as server,
        server.connect(f"GET {path} HTTP/1.1", "host: x", "", receive_bytes=4096) as connection,
    ):
        support.wait_until(lambda: reset(connection), "the connection is broken")
        support.wait_until(lambda: server.streaming == 0, "the stream has ended")
        assert server.refusals == ["slow_reader"]


@pytest.mark.parametrize("path", ["/endless", "/big"])
def test_a_slow_reader_is_not_cut_off(path: str) -> None:
    """A reader who takes little at a time, but takes it, keeps the connection for longer than one may take nothing."""
    with (
        served(reader_stall_seconds=1) as server,
        server.connect(f"GET {path} HTTP/1.1", "host: x", "", receive_bytes=65_536) as connection,
    ):
        for _ in range(20):
            for _ in range(8):
                assert connection.recv(65_536)
            time.sleep(0.1)
        if path == "/endless":
            assert server.streaming == 1


def test_the_rest_of_a_refused_body_is_dropped_for_a_while() -> None:
    """Who goes on sending slowly after the answer is cut off."""
    with (
        served(linger_seconds=1) as server,
        server.connect("POST /refuse HTTP/1.1", "host: x", "content-length: 1000000", "") as connection,
    ):
        assert b" 413 " in until(connection, b"no")
        for _ in range(1000):
            if reset(connection):
                break
            connection.send(b"x")
            time.sleep(0.05)
        assert reset(connection)


def test_a_refused_body_that_ends_leaves_the_connection() -> None:
    """After the rest of a refused body has come the connection can be used again, and is closed when it is not."""
    with (
        served(head_seconds=1) as server,
        server.connect("POST /refuse HTTP/1.1", "host: x", "content-length: 1000000", "") as connection,
    ):
        assert b" 413 " in until(connection, b"no")
        connection.sendall(bytes(1_000_000) + b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        until(connection, b"hello")
        connection.sendall(b"POST /refuse HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
        assert b" 413 " in until(connection, b"no")
        connection.sendall(bytes(1_000_000))
        assert to_the_end(connection) == b""


def test_idle_connections_make_room() -> None:
    """Silent connections beyond the limit displace each other, the longest silent first; who asks is answered."""
    with served(max_connections=10) as server, contextlib.ExitStack() as stack:
        silent = []
        for _ in range(30):
            silent.append(stack.enter_context(server.connect("GET / HTTP/1.1")))
            assert server.get().text == "hello"
        support.wait_until(lambda: sum(map(answered, silent)) >= 20, "the limit holds")
        assert answered(silent[0])
        assert not answered(silent[-1])
        assert set(server.refusals) == {"displaced"}


def test_where_all_connections_are_in_use_the_newest_is_refused() -> None:
    """With no connection to spare one more is answered with 503 in the envelope, and told to come again."""
    with served(max_connections=3) as server, contextlib.ExitStack() as stack:
        busy = [stack.enter_context(server.connect("GET /hang HTTP/1.1", "host: x", "connection: close", "")) for _ in range(3)]
        support.wait_until(lambda: server.hanging == 3, "all are in use")
        with server.connect("GET / HTTP/1.1", "host: x", "") as one_more:
            answer = to_the_end(one_more)
        assert refusal(answer) == (503, "overloaded")
        assert b"\r\nretry-after: 1\r\n" in answer
        assert server.refusals == ["too_many"]
        server.release.set()
        assert all(to_the_end(connection).endswith(b"released") for connection in busy)
        assert server.get().text == "hello"
