"""How the server ends: a process of its own that is told to stop, in front of an engine that answers when the test wants it."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
import support
from asking import data_url, encoded, error, picture
from support import Process
from upstream import Upstream

QUESTION = {"image": {"data": encoded(picture())}, "question": "What is written there?", "zoom": "never"}


def process(upstream: Upstream, **settings: object) -> contextlib.AbstractContextManager[Process]:
    """Run a server in front of an engine."""
    return support.process(engine="vllm", engine_url=upstream.url, engine_model="m", **settings)


def ask(server: Process, **more: Any) -> httpx2.Response:
    """Ask a question."""
    return httpx2.post(f"{server.url}/v1/vqa", json=QUESTION | more, trust_env=False, timeout=60)


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
        asked = aside(lambda: ask(server))
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
    with support.process() as server:
        asked = [aside(lambda: httpx2.post(f"{server.url}/v1/vqa", json=body, trust_env=False, timeout=60)) for _ in range(2)]
        support.wait_until(lambda: support.metric(server.url, "ergo_requests_in_flight") == 2, "the questions are there")
        server.signal()
        assert [answer.result(60).json()["regions"][0]["outcome"] for answer in asked] == ["zoomed"] * 2
        assert server.end() == (0, "")


def test_load_balancers_have_time_to_notice(upstream: Upstream, aside: Aside) -> None:
    """In the grace time readiness is false, life goes on, new questions are refused and told when to come back."""
    with process(upstream, drain_grace_seconds=600) as server:
        asked = aside(lambda: ask(server))
        support.wait_until(lambda: upstream.asked == 1, "the engine is asked")
        server.signal()
        support.wait_until(lambda: server.get("/readyz").status_code == 503, "readiness is false")
        assert server.get("/readyz").json()["status"] == "draining"
        assert server.get("/healthz").status_code == 200
        refused = ask(server)
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


@pytest.mark.parametrize("grace", [0, 0.5])
def test_requests_on_their_way_are_answered(upstream: Upstream, grace: float) -> None:
    """What the kernel has taken and the server has not read when the signal comes, connections that nobody has accepted yet
    included, is answered or refused with 503, and told that its connection ends; nothing is reset."""
    body = json.dumps(QUESTION).encode()
    head = "POST /v1/vqa HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n"
    request = head.format(len(body)).encode() + body
    with process(upstream, drain_grace_seconds=grace) as server, contextlib.ExitStack() as stack:
        kept = stack.enter_context(socket.create_connection(server.address, timeout=60))
        kept.sendall(b"HEAD /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert kept.recv(65_536).endswith(b"\r\n\r\n")
        server.signal(signal.SIGSTOP)
        others = [stack.enter_context(socket.create_connection(server.address, timeout=60)) for _ in range(4)]
        for connection in (kept, *others):
            connection.sendall(request)
        server.signal()
        server.signal(signal.SIGCONT)
        support.wait_until(lambda: not server.accepts(), "no connection is taken any more")
        upstream.go_on.set()
        for connection in (kept, *others):
            began, _, said = _all(connection).partition(b"\r\n\r\n")
            assert began.split()[1] in (b"200", b"503")
            assert b"connection: close" in began
            assert json.loads(said)
        assert server.end() == (0, "")


def test_who_is_refused_amid_an_upload_reads_that(upstream: Upstream) -> None:
    """An upload that begins while the server stops is refused at once; its sender may go on to the end, and is not reset."""
    with process(upstream, drain_grace_seconds=600) as server:
        server.signal()
        support.wait_until(lambda: server.get("/readyz").status_code == 503, "readiness is false")
        with socket.create_connection(server.address, timeout=60) as connection:
            connection.sendall(b"POST /v1/vqa HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ncontent-length: 8000000\r\n\r\n")
            connection.sendall(bytes(1_000_000))
            head, _, said = _all(connection).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert b"connection: close" in head
            assert json.loads(said)["error"]["code"] == "overloaded"
            for _ in range(7):
                connection.sendall(bytes(1_000_000))


def _all(connection: socket.socket) -> bytes:
    """Read until the server has said all."""
    found = b""
    while piece := connection.recv(65_536):
        found += piece
    return found


def test_a_hung_question_is_cut_off(upstream: Upstream, aside: Aside) -> None:
    """What does not finish in the drain time is told so in the envelope, its request to the engine ends, and the status is 1."""
    with process(upstream, drain_seconds=0.5) as server:
        asked = aside(lambda: ask(server))
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
        asked = aside(lambda: ask(server, stream=True))
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
        for beginning in (b"", b"GET /healthz HTTP/1.1\r\nhost: x\r\n", b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"):
            connection = stack.enter_context(socket.create_connection(server.address, timeout=60))
            connection.sendall(beginning)
        assert connection.recv(65_536)
        server.signal()
        assert server.end() == (0, "")


def test_a_second_signal_ends_at_once(upstream: Upstream, aside: Aside) -> None:
    """Who does not want to wait sends the signal again; the engine is left alone then, too."""
    with process(upstream, drain_seconds=600) as server:
        asked = aside(lambda: ask(server))
        support.wait_until(lambda: upstream.asked == 1, "the engine is asked")
        server.signal()
        support.wait_until(lambda: not server.accepts(), "it is stopping")
        server.signal()
        assert server.end() == (128 + signal.SIGTERM, "")
        with pytest.raises(httpx2.RemoteProtocolError):
            asked.result(60)
    support.wait_until(lambda: upstream.left == 1, "the engine is left alone")
