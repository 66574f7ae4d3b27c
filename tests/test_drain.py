"""How the server ends: a process of its own that is told to stop, in front of an engine that answers when the test wants it."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
import support
from asking import ANSWER, data_url, encoded, error, picture

QUESTION = {"image": {"data": encoded(picture())}, "question": "What is written there?", "zoom": "never"}


class Upstream(http.server.ThreadingHTTPServer):
    """An engine that speaks as vLLM does: it begins each reply at once, and ends it when it is told to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Reply)
        self.asked = 0
        self.left = 0
        """Callers who left before their reply had ended."""
        self.go_on = threading.Event()

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing."""


class _Reply(http.server.BaseHTTPRequestHandler):
    server: Upstream

    def do_GET(self) -> None:
        """Be healthy."""
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        """Answer, piece by piece."""
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self._write(content=ANSWER[:10])
        self.server.asked += 1
        while not self.server.go_on.wait(0.05):
            if self._gone():
                self.server.left += 1
                return
        self._write(content=ANSWER[10:])
        self._write("stop")
        self.wfile.write(b"data: [DONE]\n\n")

    def _gone(self) -> bool:
        self.connection.setblocking(False)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except ConnectionError:
            return True
        finally:
            self.connection.setblocking(True)

    def _write(self, finish_reason: str | None = None, **delta: str) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        self.wfile.write(f"data: {json.dumps({'choices': [choice], 'usage': usage})}\n\n".encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    """An engine."""
    with Upstream() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.go_on.set()
            server.shutdown()
            thread.join()


class Process:
    """A server of its own."""

    def __init__(self, running: subprocess.Popen[str]) -> None:
        self._running = running
        assert running.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+", running.stdout.readline())
        assert address is not None
        self.url = address[0]
        support.wait_until(lambda: support.answers(f"{self.url}/readyz"), "the server is ready")

    def get(self, path: str) -> httpx2.Response:
        """Ask."""
        return httpx2.get(f"{self.url}{path}", trust_env=False, timeout=60)

    def ask(self, **more: Any) -> httpx2.Response:
        """Ask a question."""
        return httpx2.post(f"{self.url}/v1/vqa", json=QUESTION | more, trust_env=False, timeout=60)

    def signal(self, which: signal.Signals = signal.SIGTERM) -> None:
        """Tell it to stop."""
        self._running.send_signal(which)

    def accepts(self) -> bool:
        """Say whether it still takes connections."""
        host, port = self.url.removeprefix("http://").split(":")
        try:
            socket.create_connection((host, int(port)), timeout=60).close()
        except ConnectionError:
            return False
        return True

    def end(self) -> tuple[int, str]:
        """Wait until it has ended; returns its exit status, and what it complained of."""
        _, complaints = self._running.communicate(timeout=60)
        return self._running.returncode, complaints


@contextlib.contextmanager
def process(upstream: Upstream | None = None, **settings: object) -> Iterator[Process]:
    """Run ``ergo-vqa serve``, in front of an engine or of the embedded one."""
    given: dict[str, object] = {"prompts": support.PROMPTS, **settings}
    if upstream is not None:
        given |= {"engine": "vllm", "engine_url": upstream.url, "engine_model": "m"}
    environment = {f"ERGO_{name.upper()}": str(value) for name, value in given.items()}
    command = [sys.executable, "-m", "ergo_server", "serve", "--port", "0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ | environment) as running:
        try:
            yield Process(running)
        finally:
            running.kill()


@pytest.fixture
def aside() -> Iterator[Callable[[Callable[[], httpx2.Response]], Future[httpx2.Response]]]:
    """Ask in another thread."""
    with ThreadPoolExecutor() as pool:
        yield pool.submit


Aside = Callable[[Callable[[], httpx2.Response]], "Future[httpx2.Response]"]


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_what_is_under_way_finishes(upstream: Upstream, aside: Aside, which: signal.Signals) -> None:
    """A question that is being answered when the signal comes is answered; nobody else gets in, and the exit status is 0."""
    with process(upstream) as server:
        asked = aside(server.ask)
        support.wait_until(lambda: upstream.asked == 1, "the engine is asked")
        server.signal(which)
        support.wait_until(lambda: not server.accepts(), "no connection is taken any more")
        upstream.go_on.set()
        response = asked.result(60)
        assert (response.status_code, response.json()["answer"]) == (200, "seven")
        assert server.end() == (0, "")


def test_the_embedded_engine_finishes_too(aside: Aside) -> None:
    """Questions to ergo-mini in the server's own memory are answered after the signal, too; also those that wait their turn."""
    made = support.held_out(7)
    body = {"image": data_url(support.encode(made), "jpeg"), "question": made.question}
    with process() as server:
        asked = [aside(lambda: httpx2.post(f"{server.url}/v1/vqa", json=body, trust_env=False, timeout=60)) for _ in range(2)]
        support.wait_until(lambda: support.metric(server.url, "ergo_requests_in_flight") == 2, "the questions are there")
        server.signal()
        assert [answer.result(60).json()["regions"][0]["outcome"] for answer in asked] == ["zoomed"] * 2
        assert server.end() == (0, "")


def test_load_balancers_have_time_to_notice(upstream: Upstream, aside: Aside) -> None:
    """In the grace time readiness is false, life goes on, new questions are refused and told when to come back."""
    with process(upstream, drain_grace_seconds=600) as server:
        asked = aside(server.ask)
        support.wait_until(lambda: upstream.asked == 1, "the engine is asked")
        server.signal()
        support.wait_until(lambda: server.get("/readyz").status_code == 503, "readiness is false")
        assert server.get("/readyz").json()["status"] == "draining"
        assert server.get("/healthz").status_code == 200
        refused = server.ask()
        assert error(refused)[:2] == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        upstream.go_on.set()
        assert asked.result(60).status_code == 200
        assert upstream.asked == 1


def test_the_grace_time_ends(upstream: Upstream) -> None:
    """After the grace time the server stops by itself, with exit status 0."""
    with process(upstream, drain_grace_seconds=0.5) as server:
        server.signal()
        assert server.end() == (0, "")


def test_a_hung_question_is_cut_off(upstream: Upstream, aside: Aside) -> None:
    """What does not finish in the drain time is told so in the envelope, its request to the engine ends, and the status is 1."""
    with process(upstream, drain_seconds=0.5) as server:
        asked = aside(server.ask)
        support.wait_until(lambda: upstream.asked == 1, "the engine is asked")
        server.signal()
        response = asked.result(60)
        assert error(response) == (503, "overloaded", None)
        assert response.headers["retry-after"] == "1"
        assert server.end() == (1, "ergo-vqa: requests cut off, not finished in time: 1\n")
    support.wait_until(lambda: upstream.left == 1, "the engine is left alone")


def test_a_hung_stream_is_cut_off(upstream: Upstream, aside: Aside) -> None:
    """A stream that does not finish in the drain time breaks off, so that nobody takes it for whole."""
    with process(upstream, drain_seconds=0.5) as server:
        asked = aside(lambda: server.ask(stream=True))
        support.wait_until(lambda: upstream.asked == 1, "the engine is asked")
        server.signal()
        with pytest.raises(httpx2.RemoteProtocolError):
            asked.result(60)
        assert server.end()[0] == 1
    support.wait_until(lambda: upstream.left == 1, "the engine is left alone")


def test_who_only_sits_there_is_not_waited_for(upstream: Upstream) -> None:
    """Silent connections, idle ones and half a head do not hold the server up."""
    with (
        process(upstream, drain_seconds=600, keep_alive_seconds=600, head_seconds=600) as server,
        contextlib.ExitStack() as stack,
    ):
        host, port = server.url.removeprefix("http://").split(":")
        for beginning in (b"", b"GET /healthz HTTP/1.1\r\nhost: x\r\n", b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"):
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=60))
            connection.sendall(beginning)
        assert connection.recv(65_536)
        server.signal()
        assert server.end() == (0, "")


def test_a_second_signal_ends_at_once(upstream: Upstream, aside: Aside) -> None:
    """Who does not want to wait sends the signal again; the engine is left alone then, too."""
    with process(upstream, drain_seconds=600) as server:
        asked = aside(server.ask)
        support.wait_until(lambda: upstream.asked == 1, "the engine is asked")
        server.signal()
        support.wait_until(lambda: not server.accepts(), "it is stopping")
        server.signal()
        assert server.end() == (128 + signal.SIGTERM, "")
        with pytest.raises(httpx2.RemoteProtocolError):
            asked.result(60)
    support.wait_until(lambda: upstream.left == 1, "the engine is left alone")
