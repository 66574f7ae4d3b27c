"""Bodies while they are read: too long, encoded, or too slow. Time is a test's own where it matters, else sockets are real."""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest
import support
from asking import Meter, client, data_url, error, picture, scripted
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from ergo_server.api.pace import Pace
from ergo_server.api.receive import BodyLimits, LimitBody
from ergo_server.errors import BodyTooLarge, BodyTooSlow
from ergo_server.settings import Settings

QUESTION = json.dumps({"image": data_url(picture()), "question": "?"}).encode()

# --- in a time of their own ---------------------------------------------------------------------------------------------


class Skipping(selectors.DefaultSelector):
    """Waits for nothing: the clock moves instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready, and let the time pass that there was to wait."""
        if timeout is not None and timeout > 0:
            self.now += timeout
            timeout = 0
        return super().select(timeout)


class Timeless(asyncio.SelectorEventLoop):
    """An event loop in which an hour passes at once."""

    def __init__(self) -> None:
        self.clock = Skipping()
        super().__init__(self.clock)

    def time(self) -> float:
        """Return the clock's time."""
        return self.clock.now


Sender = Callable[[], AsyncIterator[bytes]]

DEFAULTS = BodyLimits(
    max_bytes=Settings.model_fields["max_body_bytes"].default,
    seconds=Settings.model_fields["body_seconds"].default,
    stall_seconds=Settings.model_fields["body_stall_seconds"].default,
    bytes_per_second=Settings.model_fields["min_bytes_per_second"].default,
)


def read(sender: Sender, limits: BodyLimits = DEFAULTS, busy_seconds: float = 0) -> tuple[int, float, Exception | None]:
    """Read a body to its end, pausing ``busy_seconds`` before each piece; returns its size, the time it took, and the error."""

    async def work() -> tuple[int, float, Exception | None]:
        size, failure = 0, None
        arrived, body, more_body = asyncio.Event(), bytearray(), True

        async def arrive() -> None:
            nonlocal more_body
            async for piece in sender():
                body.extend(piece)
                arrived.set()
            more_body = False
            arrived.set()

        async def receive() -> Message:  # as uvicorn's: who is interrupted while waiting loses nothing
            await arrived.wait()
            arrived.clear()
            message = {"type": "http.request", "body": bytes(body), "more_body": more_body}
            body.clear()
            return message

        async def app(scope: Any, receive: Any, send: Any) -> None:
            nonlocal size, failure
            try:
                more = True
                while more:
                    await asyncio.sleep(busy_seconds)
                    message = await receive()
                    size += len(message["body"])
                    more = message["more_body"]
            except (BodyTooLarge, BodyTooSlow) as caught:
                failure = caught

        async def send(message: Message) -> None:
            raise AssertionError("nothing is sent")

        scope = {"type": "http", "path": "/", "headers": []}
        arriving = asyncio.create_task(arrive())
        await LimitBody(app, lambda code: None, limits)(scope, receive, send)
        arriving.cancel()
        return size, asyncio.get_running_loop().time(), failure

    with asyncio.Runner(loop_factory=Timeless) as runner:
        return runner.run(work())


def sending(size: int, bytes_per_second: float, piece: int = 1400) -> Sender:
    """Send steadily."""

    async def pieces() -> AsyncIterator[bytes]:
        for sent in range(0, size, piece):
            length = min(piece, size - sent)
            await asyncio.sleep(length / bytes_per_second)
            yield bytes(length)

    return pieces


def test_a_phone_on_a_slow_network_may_send_a_photograph() -> None:
    """12 MB at 1 Mbit/s pass the default limits, though they take 96 s."""
    size, seconds, failure = read(sending(12_000_000, 125_000))
    assert (size, failure) == (12_000_000, None)
    assert 90 < seconds < 110


def test_a_phone_may_change_cells() -> None:
    """A sender of the usual speed may be silent for 14 s, again and again."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(8):
            await asyncio.sleep(14)
            yield bytes(100_000)

    assert read(pieces) == (800_000, 8 * 14, None)


@pytest.mark.parametrize("pause", [0.001, 0.1, 1, 10, 14.9])
def test_drips_are_cut_off(pause: float) -> None:
    """Who sends a byte now and then has the time that a silent sender has, and hardly more."""

    async def pieces() -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(pause)
            yield b"x"

    size, seconds, failure = read(pieces)
    assert isinstance(failure, BodyTooSlow)
    assert 15 <= seconds <= 15 + (1 + size) / 4096 + 0.01


def test_silence_is_cut_off() -> None:
    """A sender who says nothing has ``body_stall_seconds``."""

    async def pieces() -> AsyncIterator[bytes]:
        await asyncio.sleep(3600)
        yield b""

    size, seconds, failure = read(pieces)
    assert (size, seconds) == (0, 15)
    assert isinstance(failure, BodyTooSlow)
    assert str(failure) == "the body did not arrive within 300 s, at 4,096 bytes/s or more"


def test_a_body_has_a_time_as_a_whole() -> None:
    """A sender just fast enough does not go on for ever: the whole body has ``body_seconds``."""
    size, seconds, failure = read(sending(10_000_000, 5_000))
    assert isinstance(failure, BodyTooSlow)
    assert (size // 10_000, round(seconds, 3)) == (149, 300)


def test_what_the_server_does_meanwhile_does_not_count() -> None:
    """A server that takes an hour before it reads on blames nobody for it."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(10):
            await asyncio.sleep(3590)
            yield b"x"

    size, _, failure = read(pieces, busy_seconds=3600)
    assert (size, failure) == (10, None)


def test_a_busy_event_loop_does_not_count() -> None:
    """What has arrived by the time that a late timer runs is read."""

    async def pieces() -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Timeless)

        def stall() -> None:
            loop.clock.now += 1000

        for _ in range(3):
            loop.call_later(1, stall)  # nothing else runs meanwhile: not the timer of the limit, nor
            await asyncio.sleep(5)  # the arrival of the bytes
            yield bytes(100_000)

    size, _, failure = read(pieces, BodyLimits(max_bytes=10**9, seconds=1e9, stall_seconds=15, bytes_per_second=100))
    assert (size, failure) == (300_000, None)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 10**6)), max_size=30))
def test_patience_is_bounded(steps: list[tuple[float, int]]) -> None:
    """However a peer behaves, it never has more patience left than at first, and waiting that long without a byte ends it."""
    pace = Pace(15, 4096)
    for seconds, count in steps:
        pace.waited(seconds)
        before = pace.left
        pace.moved(count)
        assert before <= pace.left <= 15
    pace.waited(15)
    assert pace.left <= 0
    pace.restart()
    assert pace.left == 15


# --- on real sockets ----------------------------------------------------------------------------------------------------

QUICK = {"body_stall_seconds": 0.5, "min_bytes_per_second": 1000}


def connect(url: str, *headers: str, path: str = "/v1/vqa") -> socket.socket:
    """Send the head of a question; returns the connection."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", *headers, "", ""]
    connection.sendall("\r\n".join(lines).encode())
    return connection


def drip(connection: socket.socket, piece: bytes, pause: float) -> None:
    """Send pieces until the server has answered, or closed."""
    while True:
        readable, writable, _ = select.select([connection], [connection], [], 60)
        if readable:
            return
        assert writable
        connection.send(piece)
        time.sleep(pause)


def answer(connection: socket.socket) -> httpx2.Response:
    """Read a response until the server closes the connection."""
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionResetError:
        pass  # the server does not wait for the rest of what is sent here
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return httpx2.Response(int(status.split()[1]), headers=dict(line.split(": ", 1) for line in lines), content=body)


@pytest.mark.parametrize(
    ("path", "header", "piece"),
    [
        ("/v1/vqa", "content-length: 100000", b""),
        ("/v1/vqa", "content-length: 100000", b"{"),
        ("/v1/chat/completions", "content-length: 100000", b"{"),
        ("/v1/vqa", "transfer-encoding: chunked", b""),
        ("/v1/vqa", "transfer-encoding: chunked", b"1\r\n{\r\n"),
        ("/v1/vqa", "transfer-encoding: chunked", b"1"),
    ],
    ids=["silent", "drips", "drips to the other route", "silent, chunked", "drips of chunks", "a chunk's size that never ends"],
)
def test_slow_senders_are_told_and_cut_off(path: str, header: str, piece: bytes) -> None:
    """A slow body is answered with 408, its connection closed, the refusal counted; others are served meanwhile."""
    engine = scripted()
    with support.gateway(engine, **QUICK) as url:
        meter = Meter.of(url)
        with connect(url, header, path=path) as connection:
            support.wait_until(lambda: meter("ergo_requests_in_flight") == 1, "the body is being read")
            assert httpx2.get(f"{url}/v1/models", trust_env=False).status_code == 200
            if piece:
                drip(connection, piece, 0.01)
            response = answer(connection)
        assert error(response) == (408, "request_timeout", None)
        assert response.headers["connection"] == "close"
        support.wait_until(lambda: meter("ergo_requests_in_flight") == 0, "all is free")
        assert meter("ergo_requests_total", outcome="request_timeout") == meter("ergo_requests_total") == 1
    assert not engine.calls


def test_a_steady_sender_is_answered() -> None:
    """A body that takes longer than the time for silence, but keeps coming, is read and answered."""
    with support.gateway(scripted(), body_stall_seconds=2, min_bytes_per_second=100) as url:
        with connect(url, f"content-length: {len(QUESTION)}", "connection: close") as connection:
            for at in range(0, len(QUESTION), len(QUESTION) // 20):
                connection.sendall(QUESTION[at : at + len(QUESTION) // 20])
                time.sleep(0.15)
            response = answer(connection)
        assert response.status_code == 200
        assert response.json()["answer"] == "seven"


@pytest.mark.parametrize("piece", [b"a" * 1000, b"a"], ids=["pieces", "single bytes"])
def test_a_chunked_body_that_never_ends_is_cut_off(piece: bytes) -> None:
    """Chunks without an end are read up to the limit, and no further."""
    with support.gateway(scripted(), max_body_bytes=50_000) as url:
        meter = Meter.of(url)
        chunk = b"%x\r\n%b\r\n" % (len(piece), piece)
        with connect(url, "transfer-encoding: chunked", "connection: close") as connection:
            drip(connection, chunk * (2000 // len(piece)), 0.0)
            response = answer(connection)
        assert error(response) == (413, "request_too_large", None)
        support.wait_until(lambda: meter("ergo_requests_in_flight") == 0, "all is free")
        assert meter("ergo_requests_total", outcome="request_too_large") == 1


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "identity, gzip", "x"])
@pytest.mark.parametrize("path", ["/v1/vqa", "/v1/chat/completions", "/v1/vqa/estimate", "/"])
def test_encoded_bodies_are_refused(path: str, encoding: str) -> None:
    """A Content-Encoding is refused before the body is read, on every path."""
    http = client()
    response = http.post(path, content=QUESTION, headers={"content-type": "application/json", "content-encoding": encoding})
    assert error(response) == (415, "unsupported_media_type", None)
    counted = 1 if path in ("/v1/vqa", "/v1/chat/completions") else 0
    assert Meter.of(http)("ergo_requests_total", outcome="unsupported_media_type") == counted


@pytest.mark.parametrize("encoding", ["identity", "Identity ", ""])
def test_an_encoding_that_is_none_is_none(encoding: str) -> None:
    """``identity``, and no name at all, are bodies as they are."""
    headers = {"content-type": "application/json", "content-encoding": encoding}
    assert client().post("/v1/vqa", content=QUESTION, headers=headers).status_code == 200


# --- bodies that nobody reads -------------------------------------------------------------------------------------------


@pytest.fixture
def process(tmp_path: Path) -> Iterator[tuple[str, Callable[[], int]]]:
    """A server in a process of its own; its URL, and its memory in bytes, at most so far."""
    environment = {"ERGO_ENGINE": "vllm", "ERGO_ENGINE_URL": "http://127.0.0.1:9", "ERGO_LINGER_SECONDS": "60"}
    command = [sys.executable, "-m", "ergo_server", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment) as running:
        try:
            assert running.stdout is not None
            address = re.search(r"http://127\.0\.0\.1:\d+", running.stdout.readline())
            assert address is not None

            def most() -> int:
                found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{running.pid}/status").read_text())
                assert found is not None
                return 1024 * int(found[1])

            yield address[0], most
        finally:
            running.terminate()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_what_comes_after_a_refusal_takes_no_memory(process: tuple[str, Callable[[], int]]) -> None:
    """A gigabyte sent after its 413 is dropped: the server's memory stays where it was, and the connection can be used again."""
    url, most = process
    support.wait_until(lambda: support.answers(f"{url}/healthz"), "the server answers")
    size = 1024**3
    with connect(url, f"content-length: {size}") as connection, closing(connection.makefile("rb")) as reader:
        assert b" 413 " in reader.readline()
        before, piece = most(), bytes(1024**2)
        for _ in range(size // len(piece)):
            connection.sendall(piece)
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert reader.read().endswith(b'{"status":"ok"}')
    assert most() - before < 16 * len(piece)
