"""A server that answers as a test wants it, for what the real one cannot be made to do.

And `Blocking`, an AsyncClient for tests that put the same questions to both clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.server
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator
from typing import Any, TypeVar

import asking

from ergo_client import Answer, AsyncClient, ClientError, Event, Progress, Question

T = TypeVar("T")

LONG = 60.0
"""Seconds that a reply waits at most for something that will not come."""


@functools.cache
def answer() -> dict[str, Any]:
    """Return an answer of the real gateway, about a picture of 800 × 600 pixels."""
    with asking.client() as http:
        body: dict[str, Any] = asking.vqa(http, include=["crop"]).json()
        return body


class Backend(http.server.ThreadingHTTPServer):
    """Answers the requests with ``replies`` in turn, and with the last of them from then on."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *replies: Reply) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.replies = replies
        self.lock = threading.Condition()
        self.connections = 0
        self.requests: list[Asked] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.left = 0
        """Callers who left before their reply had ended."""

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def get_request(self) -> tuple[socket.socket, Any]:
        """Count a connection."""
        self.connections += 1
        return super().get_request()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing."""


class Asked(http.server.BaseHTTPRequestHandler):
    """One request; made anew for each connection, and changed by each request on it."""

    protocol_version = "HTTP/1.1"
    server: Backend
    body: bytes
    at: float

    def do_POST(self) -> None:
        """Answer."""
        self.body, self.at = self.rfile.read(int(self.headers["content-length"])), time.monotonic()
        server = self.server
        with server.lock:
            number = len(server.requests)
            server.requests.append(self._kept())
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            server.lock.notify_all()
        try:
            server.replies[min(number, len(server.replies) - 1)](self)
        finally:
            with server.lock:
                server.in_flight -= 1
                server.lock.notify_all()

    def _kept(self) -> Asked:
        kept = Asked.__new__(Asked)
        kept.body, kept.at, kept.headers, kept.path = self.body, self.at, self.headers, self.path
        return kept

    @property
    def question(self) -> str:
        """The text of the question."""
        if self.headers["content-type"] == "application/json":
            return str(json.loads(self.body)["question"])
        return self.field("question")

    def field(self, name: str) -> str:
        """Return a field of the form."""
        found = re.search(rb'name="' + name.encode() + rb'"\r\n\r\n(.*?)\r\n--', self.body, re.DOTALL)
        assert found is not None
        return found[1].decode()

    @property
    def file(self) -> bytes:
        """The file in the form."""
        found = re.search(rb'filename="image"\r\n.*?\r\n\r\n(.*)\r\n--\w+--\r\n$', self.body, re.DOTALL)
        assert found is not None
        return found[1]

    def wait(self, condition: Callable[[], object]) -> None:
        """Wait for something that other requests bring about."""
        with self.server.lock:
            assert self.server.lock.wait_for(condition, LONG)

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """Send a response."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name in headers):
            self.send_header("content-length", str(len(body)))
        with contextlib.suppress(OSError):  # a caller who has left already is counted by `until_left`
            self.end_headers()
            self.wfile.write(body)

    def until_left(self, drip: bytes = b"") -> None:
        """Wait until the caller leaves, sending something now and then."""
        self.close_connection = True
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            try:
                # The plain socket's: that of TLS cannot peek.
                if not socket.socket.recv(self.connection, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    break
            except BlockingIOError:
                pass
            except ConnectionError:
                break
            with contextlib.suppress(OSError):
                self.wfile.write(drip)
            time.sleep(0.01)
        else:
            return
        with self.server.lock:
            self.server.left += 1
            self.server.lock.notify_all()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


Reply = Callable[[Asked], None]


def gives(status: int = 200, body: object = None, **headers: str) -> Reply:
    """Reply with JSON or bytes; with the answer to everything where no body is given."""
    content = body if isinstance(body, bytes) else json.dumps(answer() if body is None else body).encode()
    named = {"content-type": "application/json", "x-request-id": "req-7"} | {k.replace("_", "-"): v for k, v in headers.items()}
    return lambda asked: asked.send(status, content, named)


def fails(status: int, code: str = "overloaded", **headers: str) -> Reply:
    """Reply with an error of the server's form."""
    return gives(status, {"error": {"message": "it cannot be", "type": "t", "param": None, "code": code}}, **headers)


def echoes(asked: Asked) -> None:
    """Answer with the question."""
    asked.send(200, json.dumps({**answer(), "answer": asked.question}).encode(), {"content-type": "application/json"})


def hangs_up(asked: Asked) -> None:
    """Close the connection instead of answering."""
    asked.close_connection = True


def keeps_silent(asked: Asked) -> None:
    """Never answer."""
    asked.until_left()


def drips_a_head(asked: Asked) -> None:
    """Send a response's head for ever, slowly."""
    with contextlib.suppress(OSError):  # likewise, as in `Asked.send`
        asked.wfile.write(b"HTTP/1.1 200 OK\r\nx-pad: ")
    asked.until_left(b"x")


def drips_a_body(asked: Asked) -> None:
    """Send a response's body for ever, slowly."""
    asked.send(200, b"", {"content-type": "application/json", "content-length": "1000000000"})
    asked.until_left(b" ")


def streams(*events: tuple[str, object], cut: bool = False, then: Callable[[Asked], None] | None = None) -> Reply:
    """Reply with server-sent events.

    Args:
        events: name and data of each.
        cut: close the connection after them as if more were to come.
        then: what is done after them.
    """
    text = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events).encode()
    length = {"content-length": str(len(text) + 1)} if cut or then else {}

    def reply(asked: Asked) -> None:
        asked.send(200, text, {"content-type": "text/event-stream", "x-request-id": "req-7", **length})
        if then:
            then(asked)
        asked.close_connection = cut or then is not None

    return reply


@contextlib.contextmanager
def serving(*replies: Reply) -> Iterator[Backend]:
    """Run a `Backend`."""
    with Backend(*replies) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Blocking:
    """An `AsyncClient` on an event loop of its own, called as `ergo_client.Client` is."""

    def __init__(self, *args: Any, **given: Any) -> None:
        self._client = AsyncClient(*args, **given)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def __enter__(self) -> Blocking:
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._client.aclose())
        self._run(self._loop.shutdown_asyncgens())
        self._run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **given: self._run(getattr(self._client, name)(*args, **given))

    @contextlib.contextmanager
    def stream(self, *args: Any, **given: Any) -> Iterator[Iterator[Event]]:
        """Stream."""
        stream = self._client.stream(*args, **given)
        events = self._run(stream.__aenter__())
        try:
            yield self._each(events)
        finally:
            self._run(stream.__aexit__(None, None, None))

    def ask_many(
        self, questions: Iterable[Question], *, concurrency: int = 4, progress: Callable[[Progress], None] | None = None
    ) -> Generator[Answer | ClientError, None, None]:
        """Ask many."""
        results = self._client.ask_many(questions, concurrency=concurrency, progress=progress)
        try:
            yield from self._each(results)
        finally:
            self._run(results.aclose())

    def _each(self, source: Any) -> Iterator[Any]:
        async def following() -> Any:
            return await anext(source, None)

        while (item := self._run(following())) is not None:
            yield item

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(LONG)
