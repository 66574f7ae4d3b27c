"""How much is worked on at a time: places, the queue for them, and bytes of bodies. Real sockets wherever callers meet."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
import support
from asking import Meter, data_url, picture, says, scripted, texts
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from ergo_server.api.admission import Gate
from ergo_server.api.limits import Refused
from ergo_server.engine.scripted import ScriptedEngine
from ergo_server.errors import EngineFailed

CHAT = "/v1/chat/completions"

LONG = "<answer>" + "why " * 2000
"""At a twentieth of a second a token, a hundred seconds: no test waits for its end."""

PATIENCE = 3600.0
"""A wait in the queue that no test waits for."""


def endless() -> ScriptedEngine:
    """Return an engine that does not come to an end until it is told to by `let_end`."""
    return scripted(zoom="<zoom>[1, 2, 30, 40]</zoom>", answer=LONG, seconds_per_token=0.05)


def let_end(engine: ScriptedEngine) -> None:
    """Let all that an endless engine generates come to its end."""
    engine.seconds_per_token = 0


class Caller:
    """One connection, and one request on it.

    Args:
        url: of the server.
        body: what is sent; JSON when it is not bytes. `CHAT` reads bytes as JSON, too; the other paths take them for an image.
        path: where to.
        length: the Content-Length that is claimed, where it is not the body's; ``"chunked"`` sends the body as a first chunk.
        headers: further ones.
    """

    def __init__(
        self, url: str, body: dict[str, Any] | bytes = b"", path: str = "/v1/vqa", *, length: int | str = "", headers: str = ""
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        framing = f"content-length: {len(data) if length == '' else length}"
        if length == "chunked":
            framing, data = "transfer-encoding: chunked", chunk(data)
        host = urlsplit(url)
        self.socket = socket.create_connection((host.hostname, host.port), timeout=support.START_SECONDS)
        self.send(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\n{framing}\r\n{headers}\r\n".encode() + data)

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send more."""
        self.socket.sendall(data)

    def read_until(self, mark: bytes) -> bytes:
        """Read until ``mark`` has been seen."""
        seen = b""
        while mark not in seen:
            piece = self.socket.recv(65536)
            assert piece, seen
            seen += piece
        return seen

    def answer(self) -> tuple[int, dict[str, str], Any]:
        """Read a response of known length: status, headers, JSON."""
        head, _, body = self.read_until(b"\r\n\r\n").partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        while len(body) < int(headers["content-length"]):
            body += self.socket.recv(65536)
        return int(first.split()[1]), headers, json.loads(body)


def chunk(data: bytes) -> bytes:
    """Return one chunk of a chunked body."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def question(text: str = "?", **fields: Any) -> dict[str, Any]:
    """Return the body of a question that takes one turn."""
    return {"image": data_url(picture()), "question": text, "zoom": "never", **fields}


@contextlib.contextmanager
def metered(engine: ScriptedEngine, **given: Any) -> Iterator[tuple[str, Meter]]:
    """Serve with these settings, and meter quickly: on one connection, and parsing no more than what happened and the gauges."""
    with support.gateway(engine, **given) as url, httpx2.Client(base_url=url, trust_env=False) as client:

        def text() -> str:
            lines = client.get("/metrics").text.splitlines(keepends=True)
            return "".join(
                each for each in lines if "_bucket{" not in each and not (each[:10] == "ergo_http_" and each[-5:] == " 0.0\n")
            )

        yield url, Meter(text)


@contextlib.contextmanager
def serving(engine: ScriptedEngine, **given: Any) -> Iterator[tuple[str, Meter]]:
    """Serve with these bounds; fails where anything is still held when all callers have been answered or have left."""
    with metered(engine, **{"max_concurrent": 1, "max_queued": 0, "queue_seconds": PATIENCE, **given}) as (url, meter):
        yield url, meter
        support.wait_until(lambda: idle(meter) and engine.running == 0, "all is free")
        with Caller(url, question()) as last:
            let_end(engine)
            assert last.answer()[0] == 200


def idle(meter: Meter) -> bool:
    """Say whether nothing is under way, waits, or holds bytes."""
    return not any(meter(f"ergo_{name}") for name in ("requests_in_flight", "requests_queued", "body_bytes_in_flight"))


@contextlib.contextmanager
def holding(url: str, engine: ScriptedEngine) -> Iterator[Caller]:
    """Have one question run."""
    before = engine.running
    with Caller(url, question("the first")) as caller:
        support.wait_until(lambda: engine.running == before + 1, "the question runs")
        yield caller


def refused(caller: Caller, meter: Meter, reason: str) -> dict[str, str]:
    """Return the headers of a 503; fails unless it is one for this reason, the only refusal so far."""
    status, headers, body = caller.answer()
    assert (status, body["error"]["code"], body["error"]["type"]) == (503, "overloaded", "overloaded_error")
    assert 1 <= int(headers["retry-after"]) <= 120
    assert 0 < int(headers["retry-after-ms"]) <= 1000 * int(headers["retry-after"])
    assert meter("ergo_admission_rejections_total", reason=reason) == meter("ergo_admission_rejections_total") == 1
    assert meter("ergo_requests_total", policy="none", outcome="overloaded") == meter("ergo_requests_total", policy="none") == 1
    return headers


# --- places and the queue -----------------------------------------------------------------------------------------------


def test_the_queue_is_first_in_first_out() -> None:
    """Who waits is served in the order of asking, one at a time where there is one place, and all are answered."""
    engine = endless()
    with serving(engine, max_queued=5) as (url, meter), holding(url, engine) as first, contextlib.ExitStack() as callers:
        waiting = []
        for number in range(5):
            waiting.append(callers.enter_context(Caller(url, question(f"number {number}"))))
            support.wait_until(lambda: meter("ergo_requests_queued") == len(waiting), "it waits")
        assert len(engine.calls) == 1
        let_end(engine)
        assert [caller.answer()[0] for caller in (first, *waiting)] == [200] * 6
        order = [next(n for n in range(5) if f"number {n}" in texts(call[0])) for call in engine.calls[1:]]
    assert order == [0, 1, 2, 3, 4]


def test_no_more_run_than_there_are_places() -> None:
    """Of ten questions at once three run and seven wait, and while these take their turns there are never more than three."""
    engine = endless()
    with serving(engine, max_concurrent=3, max_queued=7) as (url, meter), contextlib.ExitStack() as callers:
        asked = [callers.enter_context(Caller(url, question())) for _ in range(10)]
        support.wait_until(lambda: engine.running == 3 and meter("ergo_requests_queued") == 7, "the places are taken")
        most, script = 0, engine.script

        def watched(*call: Any) -> Any:
            nonlocal most
            most = max(most, engine.running + 1)
            return script(*call)

        engine.script = watched
        let_end(engine)
        assert [caller.answer()[0] for caller in asked] == [200] * 10
    assert 0 < most <= 3


def test_a_full_queue_refuses_before_the_body() -> None:
    """Where too many wait already, the refusal comes at once, while nobody else is served, and no body is asked for."""
    engine = endless()
    with serving(engine, max_queued=1) as (url, meter), holding(url, engine), Caller(url, question("waits")):
        support.wait_until(lambda: meter("ergo_requests_queued") == 1, "one waits")
        with Caller(url, length=1_000_000, headers="expect: 100-continue\r\n") as third:
            refused(third, meter, "queue_full")
        assert meter("ergo_http_requests_total", route="/v1/vqa", code="503") == 1


@pytest.mark.parametrize(
    "asked",
    [
        {"body": question()},
        {"body": question(stream=True)},
        {"body": picture(), "path": "/v1/vqa?question=x"},
        {"body": {"messages": [says(picture(), "?")]}, "path": CHAT},
    ],
    ids=["JSON", "a stream", "the image itself", "chat"],
)
def test_who_waits_too_long_is_refused(asked: dict[str, Any]) -> None:
    """After the deadline in the queue comes a refusal, counted once, that says when to come back; the place in it is free."""
    engine = endless()
    with serving(engine, max_queued=1, queue_seconds=0.2) as (url, meter), holding(url, engine):
        held = meter("ergo_body_bytes_in_flight")
        with Caller(url, **asked) as second:
            refused(second, meter, "queue_timeout")
            support.wait_until(lambda: meter("ergo_body_bytes_in_flight") == held, "its bytes are free")
        assert meter("ergo_requests_queued") == 0
        assert meter("ergo_http_requests_total", code="503") == 1
        assert len(engine.calls) == 1


def test_a_full_queue_refuses_after_the_body_too() -> None:
    """Who finds room when it begins to send, and none when it ends, is refused then, and counted once."""
    engine = endless()
    with serving(engine, max_queued=1) as (url, meter), holding(url, engine):
        body = json.dumps(question()).encode()
        with Caller(url, body[:9], CHAT, length=len(body)) as second, Caller(url, question()):
            support.wait_until(lambda: meter("ergo_requests_queued") == 1, "another one waits")
            second.send(body[9:])
            refused(second, meter, "queue_full")


def test_a_refusal_costs_the_tenant_nothing() -> None:
    """A tenant that may ask once a minute may ask again after it has waited for a place in vain."""
    engine = endless()
    keys = "\n".join(f"{name} {hashlib.sha256(name.encode()).hexdigest()} requests_per_minute=1" for name in ("alice", "bob"))
    bounds = {"max_concurrent": 1, "max_queued": 1, "queue_seconds": 0.2, "api_keys": keys, "open_metrics": True}
    with metered(engine, **bounds) as (url, meter):
        alice, bob = (f"authorization: Bearer {name}\r\n" for name in ("alice", "bob"))
        with Caller(url, question(), headers=bob):
            support.wait_until(lambda: engine.running == 1, "the place is taken")
            with Caller(url, question(), headers=alice) as second:
                refused(second, meter, "queue_timeout")
        let_end(engine)
        support.wait_until(lambda: idle(meter), "all is free")
        with Caller(url, question(), headers=alice) as again, Caller(url, question(), headers=alice) as more:
            assert sorted(caller.answer()[0] for caller in (again, more)) == [200, 429]


BODIES: dict[str, tuple[bytes, str, int | str]] = {
    "by length": (json.dumps(question()).encode(), CHAT, ""),
    "in chunks": (json.dumps(question()).encode(), CHAT, "chunked"),
    "an image": (picture(), "/v1/vqa?question=x", ""),
    "an image that is large": (picture(1500, 1000, "BMP"), "/v1/vqa?question=x", ""),
}


@pytest.mark.parametrize(("body", "path", "length"), BODIES.values(), ids=BODIES)
def test_who_hangs_up_while_waiting_is_forgotten(body: bytes, path: str, length: int | str) -> None:
    """Who has sent all, waits, and leaves, frees its place in the queue and its bytes at once; the engine never hears of it."""
    engine = endless()
    with serving(engine, max_queued=1) as (url, meter), holding(url, engine):
        held = meter("ergo_body_bytes_in_flight")
        with Caller(url, body, path, length=length) as second:
            if length == "chunked":
                second.send(b"0\r\n\r\n")
            support.wait_until(lambda: meter("ergo_requests_queued") == 1, "it waits")
            assert meter("ergo_body_bytes_in_flight") == held + len(body)
        support.wait_until(lambda: meter("ergo_requests_in_flight") == 1, "it is forgotten")
        assert meter("ergo_requests_queued") == 0
        assert meter("ergo_body_bytes_in_flight") == held
        assert meter("ergo_requests_total", outcome="cancelled") == meter("ergo_requests_total") == 1
        assert meter("ergo_http_requests_total", code="499") == 1
        assert len(engine.calls) == 1


def test_turns_go_by_the_end_of_the_body() -> None:
    """Of three who wait, the first to have sent all is the first to be served, whoever began to send first."""
    engine = endless()
    ends = {"slow": 2, "quick": 0, "between": 1}
    with serving(engine, max_queued=3) as (url, meter), holding(url, engine) as first, contextlib.ExitStack() as callers:
        asked = {name: {"messages": [says(picture(), name)], "model": "ergo-single"} for name in ends}
        bodies = {name: json.dumps(body).encode() for name, body in asked.items()}
        waiting = {}
        for name, body in bodies.items():
            waiting[name] = callers.enter_context(Caller(url, body[:-9], CHAT, length=len(body)))
            support.wait_until(lambda: meter("ergo_requests_in_flight") == 1 + len(waiting), "it has begun")
        assert meter("ergo_requests_queued") == 0
        for place, name in enumerate(sorted(ends, key=ends.__getitem__)):
            waiting[name].send(bodies[name][-9:])
            support.wait_until(lambda: meter("ergo_requests_queued") == place + 1, "it waits")  # noqa: B023
        let_end(engine)
        assert [caller.answer()[0] for caller in (first, *waiting.values())] == [200] * 4
        order = [next(name for name in ends if name in texts(call[0])) for call in engine.calls[1:]]
    assert order == ["quick", "between", "slow"]


def test_a_body_that_waited_is_whole() -> None:
    """Of a body that comes in parts and then waits, nothing is lost, by length and in chunks."""
    engine, image = endless(), picture(3000, 2000, "BMP")
    with serving(engine, max_queued=2) as (url, meter), holding(url, engine), contextlib.ExitStack() as callers:
        half = len(image) // 2
        held = meter("ergo_body_bytes_in_flight")
        path = "/v1/vqa/estimate"
        by_length = callers.enter_context(Caller(url, image[:half], path, length=len(image)))
        in_chunks = callers.enter_context(Caller(url, image[:half], path, length="chunked"))
        support.wait_until(lambda: meter("ergo_body_bytes_in_flight") == held + 2 * half, "what was sent has arrived")
        by_length.send(image[half:])
        in_chunks.send(chunk(image[half:]) + b"0\r\n\r\n")
        support.wait_until(lambda: meter("ergo_requests_queued") == 2, "they wait")
        let_end(engine)
        found = [caller.answer() for caller in (by_length, in_chunks)]
    assert [(status, body["image"]["width"], body["image"]["format"]) for status, _, body in found] == [(200, 3000, "bmp")] * 2


# --- who sends slowly, or never -----------------------------------------------------------------------------------------

HALVES: dict[str, tuple[bytes, str, int | str, bytes]] = {
    "nothing at all": (b"", CHAT, 50_000, b""),
    "half a question": (b'{"messages": [', CHAT, 50_000, b""),
    "half an image": (picture(600, 400, "BMP")[:90_000], "/v1/vqa?question=x", 720_054, b""),
    "half an upload": (picture(600, 400, "BMP")[:90_000], "/v1/images", 720_054, b""),
    "drips": (b'{"messages": [', CHAT, 50_000, b" "),
    "drips of chunks": (b'{"messages": [', CHAT, "chunked", b"1\r\n \r\n"),
    "all but the end": (b'{"messages": []}', CHAT, "chunked", b""),
}


@pytest.mark.parametrize(("body", "path", "length", "drip"), HALVES.values(), ids=HALVES)
def test_unfinished_bodies_hold_no_place(body: bytes, path: str, length: int | str, drip: bytes) -> None:
    """With two places and no queue, a question is answered beside twenty senders that are silent, or drip; they leave nothing."""
    engine = scripted()
    with serving(engine, max_concurrent=2) as (url, meter), contextlib.ExitStack() as callers:
        senders = [callers.enter_context(Caller(url, body, path, length=length)) for _ in range(20)]
        support.wait_until(lambda: meter("ergo_body_bytes_in_flight") == 20 * len(body), "they have begun")
        support.wait_until(lambda: meter("ergo_requests_in_flight") == 20, "all of them")
        for _ in range(3):
            for sender in senders:
                sender.send(drip)
            with Caller(url, question()) as healthy:
                assert healthy.answer()[0] == 200
        assert meter("ergo_requests_in_flight") == 20
        assert meter("ergo_admission_rejections_total") == 0


def test_announcements_keep_nobody_out() -> None:
    """Sixteen who announce as much as there is room for, and send little, take up no more than what they send."""
    engine = scripted()
    bounds = {"max_concurrent": 2, "max_body_bytes": 100_000, "max_bytes_in_flight": 100_000}
    with serving(engine, **bounds) as (url, meter), contextlib.ExitStack() as callers:
        for number in range(16):
            callers.enter_context(Caller(url, b"{", CHAT, length=100_000 - number))
            support.wait_until(lambda: meter("ergo_body_bytes_in_flight") == number + 1, "it has begun")  # noqa: B023
        with Caller(url, question()) as healthy:
            assert healthy.answer()[0] == 200
        assert meter("ergo_admission_rejections_total") == 0


def test_a_stream_holds_its_place_to_the_end() -> None:
    """While events of a stream are being sent its place is taken; after the last it is free."""
    engine = endless()
    with serving(engine) as (url, meter), Caller(url, question(stream=True)) as streaming:
        streaming.read_until(b"why")
        with Caller(url, question()) as second:
            refused(second, meter, "queue_full")
        let_end(engine)
        assert b"event: done" in streaming.read_until(b"\r\n0\r\n\r\n")
        with Caller(url, question()) as third:
            assert third.answer()[0] == 200


def test_what_needs_no_place_is_answered() -> None:
    """With every place taken, probes, the models, and bodies that are too long all the same are answered at once."""
    engine = endless()
    with serving(engine, max_body_bytes=100_000, max_bytes_in_flight=200_000) as (url, meter), holding(url, engine):
        assert meter("ergo_requests_in_flight") == 1
        for path in ("/readyz", "/v1/models", "/"):
            assert support.answers(url + path)
        with Caller(url, length=100_001) as caller:
            assert caller.answer()[0] == 413
        assert meter("ergo_admission_rejections_total") == 0


def test_a_tenants_limit_comes_first() -> None:
    """Who has used up its own share is told so with 429, be the server full or not, and takes no place in the queue."""
    engine = endless()
    keys = f"alice {hashlib.sha256(b'alice').hexdigest()} concurrent_requests=1"
    bounds = {"max_concurrent": 1, "max_queued": 1, "queue_seconds": PATIENCE, "api_keys": keys, "open_metrics": True}
    with metered(engine, **bounds) as (url, meter):
        key = "authorization: Bearer alice\r\n"
        with Caller(url, question(), headers=key), Caller(url, question(), headers=key) as second:
            status, headers, body = second.answer()
            assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
            assert headers["x-ratelimit-remaining-requests"] == "239"
            assert meter("ergo_requests_queued") == 0
            assert meter("ergo_admission_rejections_total", reason="concurrency") == 1
        support.wait_until(lambda: idle(meter), "all is free")


# --- bytes --------------------------------------------------------------------------------------------------------------

BYTES = {"max_concurrent": 9, "max_body_bytes": 100_000, "max_bytes_in_flight": 100_000}


def test_bytes_count_as_they_arrive() -> None:
    """What was sent counts, not what was announced; who does not fit beside it is refused from the head; its end makes room."""
    engine = scripted()
    with serving(engine, **BYTES) as (url, meter):
        with Caller(url, b"x" * 60_000, CHAT, length=80_000):
            support.wait_until(lambda: meter("ergo_body_bytes_in_flight") == 60_000, "the bytes are there")
            assert meter("ergo_body_bytes_in_flight_limit_bytes") == 100_000
            with Caller(url, length=40_001) as second:
                refused(second, meter, "bytes_in_flight")
            with Caller(url, question()) as third:
                assert third.answer()[0] == 200
        support.wait_until(lambda: idle(meter), "the bytes are free")
        with Caller(url, b"x" * 100_000, CHAT) as fourth:
            assert fourth.answer()[0] == 400


@pytest.mark.parametrize("length", [40_000, "chunked"], ids=["by length", "in chunks"])
def test_bytes_that_run_out_amid_a_body(length: int | str) -> None:
    """A body that fitted when it began is refused amid it when the bytes run out, and its own are free again."""
    engine = scripted()
    with serving(engine, **BYTES) as (url, meter), Caller(url, b"x" * 20_000, CHAT, length=length) as first:
        support.wait_until(lambda: meter("ergo_body_bytes_in_flight") == 20_000, "the one has begun")
        with Caller(url, b"x" * 70_000, CHAT, length=80_000):
            support.wait_until(lambda: meter("ergo_body_bytes_in_flight") == 90_000, "the other as well")
            first.send(chunk(b"x" * 20_000) if length == "chunked" else b"x" * 20_000)
            refused(first, meter, "bytes_in_flight")
            support.wait_until(lambda: meter("ergo_body_bytes_in_flight") == 70_000, "its own are free")


def test_the_largest_body_must_fit() -> None:
    """A bound on all bodies below that on one is refused at start: the largest could never be sent."""
    with pytest.raises(ValidationError, match="max_bytes_in_flight must be at least max_body_bytes"):
        support.mini_settings(max_body_bytes=1001, max_bytes_in_flight=1000)


# --- every way out gives back what was held -----------------------------------------------------------------------------


def broken(*_: object) -> str:
    """Make a mistake."""
    raise RuntimeError


ENDS: dict[str, tuple[ScriptedEngine, dict[str, Any], int]] = {
    "answered": (scripted(), {"body": question()}, 200),
    "not JSON": (scripted(), {"body": b"{", "path": CHAT}, 400),
    "no image": (scripted(), {"body": b"x", "path": "/v1/vqa?question=x"}, 422),
    "the engine failed": (scripted(answer=EngineFailed("it broke")), {"body": question()}, 502),
    "a mistake of ours": (ScriptedEngine(broken), {"body": question()}, 500),
    "a chunked body that is too long": (scripted(), {"body": b"x" * 100_001, "length": "chunked"}, 413),
}


@pytest.mark.parametrize(("engine", "request_", "status"), ENDS.values(), ids=ENDS)
def test_whatever_the_end_all_is_given_back(engine: ScriptedEngine, request_: dict[str, Any], status: int) -> None:
    """With one place and no queue, three requests one after the other get the same answer: each freed what it held."""
    bounds = {"max_concurrent": 1, "max_queued": 0, "max_body_bytes": 100_000, "max_bytes_in_flight": 150_000}
    with metered(engine, **bounds) as (url, meter):
        for _ in range(3):
            with Caller(url, **request_) as caller:
                assert caller.answer()[0] == status
            support.wait_until(lambda: idle(meter), "all is free")
        assert meter("ergo_admission_rejections_total") == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_who_hangs_up_gives_all_back(stream: bool) -> None:
    """Callers who leave amid the answer free the one place, one after the other."""
    engine = endless()
    with serving(engine) as (url, meter):
        for _ in range(2):
            with Caller(url, question(stream=stream)) as caller:
                support.wait_until(lambda: engine.running == 1, "it runs")
                if stream:
                    caller.read_until(b"why")
            support.wait_until(lambda: idle(meter) and engine.running == 0, "all is free")
        assert meter("ergo_admission_rejections_total") == 0


# --- the end of the server ----------------------------------------------------------------------------------------------


def test_drain_lets_the_old_finish_and_refuses_the_new() -> None:
    """From then on readiness is false and new questions are refused; who runs, waits or sends is answered."""
    engine = endless()
    app = support.app(engine, max_concurrent=1, max_queued=5, queue_seconds=PATIENCE)
    with support.served(app) as url:
        meter = Meter.of(url)
        with holding(url, engine) as first, Caller(url, question()) as second, contextlib.ExitStack() as callers:
            support.wait_until(lambda: meter("ergo_requests_queued") == 1, "one waits")
            body = json.dumps({"messages": [says(picture(), "?")]}).encode()
            fourth = callers.enter_context(Caller(url, body[:9], CHAT, length=len(body)))
            support.wait_until(lambda: meter("ergo_requests_in_flight") == 3, "one sends")
            assert support.answers(f"{url}/readyz")
            app.state.ending.begin()
            assert not support.answers(f"{url}/readyz")
            assert support.answers(f"{url}/healthz")
            with Caller(url, question()) as third:
                assert int(refused(third, meter, "draining")["retry-after"]) <= 2
            fourth.send(body[9:])
            let_end(engine)
            assert [caller.answer()[0] for caller in (first, second, fourth)] == [200] * 3
        support.wait_until(lambda: idle(meter), "all is free")


# --- the gate by itself -------------------------------------------------------------------------------------------------


def gate(places: int = 1, queued: int = 9, seconds: float = PATIENCE, count: int = 100) -> Gate:
    """Return a gate."""
    return Gate(max_concurrent=places, max_queued=queued, queue_seconds=seconds, max_bytes=count)


async def never() -> None:
    """A caller who stays."""
    await asyncio.Event().wait()


async def settled() -> None:
    """Let all that can run do so."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_nobody_overtakes() -> None:
    """A place that becomes free belongs to the first in the queue, even if another asks before that one has noticed."""

    async def work() -> None:
        it = gate()
        await it.enter(never)
        waiting = asyncio.create_task(it.enter(never))
        await settled()
        it.leave()
        late = asyncio.create_task(it.enter(never))
        await settled()
        assert (waiting.done(), late.done(), it.queued) == (True, False, 1)
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)

    asyncio.run(work())


@pytest.mark.parametrize("how", ["cancelled", "gone"])
def test_a_place_given_to_one_who_just_left_is_not_lost(how: str) -> None:
    """Who is given a place in the same moment in which it is cancelled, or its caller leaves, gives it back."""

    async def work() -> None:
        it, leaves = gate(), asyncio.Event()

        async def gone() -> None:
            await leaves.wait()

        await it.enter(never)
        waiting = asyncio.create_task(it.enter(gone))
        await settled()
        it.leave()
        leaves.set() if how == "gone" else waiting.cancel()
        (outcome,) = await asyncio.gather(waiting, return_exceptions=True)
        assert isinstance(outcome, ClientDisconnect if how == "gone" else asyncio.CancelledError)
        await asyncio.wait_for(it.enter(never), support.START_SECONDS)

    asyncio.run(work())


ACTIONS = st.lists(st.tuples(st.sampled_from(["enter", "leave", "cancel", "gone"]), st.integers(0, 20)), max_size=60)


@given(st.integers(1, 3), st.integers(0, 4), ACTIONS)
def test_places_are_never_lost_nor_given_twice(places: int, queued: int, actions: list[tuple[str, int]]) -> None:
    """In any order of asking, leaving, cancelling and hanging up: bounds hold, turns go by age, and in the end all is free."""

    async def work() -> None:
        it = gate(places, queued)
        waiting: list[tuple[asyncio.Task[None], asyncio.Event]] = []
        inside = 0
        for action, number in actions:
            if action == "enter":
                leaves = asyncio.Event()
                waiting.append((asyncio.create_task(it.enter(leaves.wait)), leaves))  # type: ignore[arg-type]
            elif action == "leave" and inside:
                it.leave()
                inside -= 1
            elif waiting and action in ("cancel", "gone"):
                task, leaves = waiting[number % len(waiting)]
                task.cancel() if action == "cancel" else leaves.set()
            if number % 2:
                await settled()  # at times several things happen in one moment
            done = [task.done() and not task.cancelled() and task.exception() is None for task, _ in waiting]
            inside += sum(done)
            waiting = [entry for entry, entered in zip(waiting, done, strict=True) if not entered and not entry[0].done()]
            assert inside <= places
            assert it.queued <= queued
        await settled()
        results = await asyncio.gather(*(finish(it, task, leaves) for task, leaves in waiting))
        for _ in range(inside + sum(results)):
            it.leave()
        for _ in range(places):
            await asyncio.wait_for(it.enter(never), support.START_SECONDS)
        assert it.queued == 0

    async def finish(it: Gate, task: asyncio.Task[None], leaves: asyncio.Event) -> bool:
        leaves.set()
        try:
            await task
        except (ClientDisconnect, Refused, asyncio.CancelledError):
            return False
        return True

    asyncio.run(work())


@given(st.floats(0.01, 1000), st.floats(0, 1))
def test_when_to_come_back(seconds: float, drawn: float) -> None:
    """Whatever the wait and the draw, Retry-After is whole seconds from 1 to 120, spread about the wait in the queue."""
    it = Gate(max_concurrent=1, max_queued=0, queue_seconds=seconds, max_bytes=0, jitter=lambda: drawn)
    with pytest.raises(Refused) as caught:
        it.reserve(1)
    after = caught.value.error.retry_after
    assert after is not None
    assert 1 <= after <= 120
    assert min(119, 0.5 * seconds) <= after <= 1.5 * seconds + 2
