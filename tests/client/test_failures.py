"""What can go wrong between a client and its server, and what the client makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import email.utils
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support
from asking import scripted
from backend import (
    Asked,
    Backend,
    Blocking,
    Reply,
    answer,
    drips_a_body,
    drips_a_head,
    echoes,
    fails,
    gives,
    hangs_up,
    keeps_silent,
    serving,
    streams,
)
from outside import Authority
from PIL import Image

from ergo_client import (
    AnswerDelta,
    AsyncClient,
    Client,
    ClientError,
    Done,
    ImageExpired,
    InvalidImage,
    InvalidRequest,
    NotAllowed,
    RateLimited,
    RegionFound,
    ServerBusy,
    ServerFailed,
    TimedOut,
    UnexpectedResponse,
    Unreachable,
)
from ergo_client._calls import Call
from ergo_client._errors import failure
from ergo_client._exchange import BACKOFF_SECONDS, MAX_BACKOFF_SECONDS, Exchange, Server
from ergo_server import errors
from ergo_server.api.errors import envelope

SOON = 0.3
"""A deadline that passes while the server keeps silent."""

BOTH = pytest.mark.parametrize("kind", [Client, Blocking])

REMEDIES: dict[type[errors.ErgoError], type[ClientError]] = {
    errors.ErgoError: ServerFailed,
    errors.RequestError: InvalidRequest,
    errors.BodyTooLarge: InvalidRequest,
    errors.UnsupportedBody: InvalidRequest,
    errors.BodyTooSlow: TimedOut,
    errors.Unauthenticated: NotAllowed,
    errors.RateLimited: RateLimited,
    errors.NotFound: UnexpectedResponse,
    errors.UnknownModel: InvalidRequest,
    errors.UnknownImage: ImageExpired,
    errors.MethodNotAllowed: InvalidRequest,
    errors.ImageError: InvalidImage,
    errors.ImageUnreadable: InvalidImage,
    errors.ImageUnsupported: InvalidImage,
    errors.ImageTooLarge: InvalidImage,
    errors.ImageAspect: InvalidImage,
    errors.ImageTooSlow: InvalidImage,
    errors.ImageNotFetched: InvalidImage,
    errors.Overloaded: ServerBusy,
    errors.EngineError: ServerFailed,
    errors.EngineUnavailable: ServerBusy,
    errors.EngineBusy: ServerBusy,
    errors.EngineTimeout: TimedOut,
    errors.EngineRejected: ServerFailed,
    errors.ContextTooLong: InvalidRequest,
    errors.EngineFailed: ServerFailed,
}
"""What the client raises for each error of the server."""


def tree(kind: type[errors.ErgoError]) -> Iterator[type[errors.ErgoError]]:
    """Yield a class and all below it."""
    yield kind
    for below in kind.__subclasses__():
        yield from tree(below)


def test_no_error_of_the_server_is_left_out() -> None:
    """The table of what the client raises has every error that the server can name."""
    assert set(REMEDIES) == {kind for kind in tree(errors.ErgoError) if kind.__module__ == errors.__name__}


@BOTH
@pytest.mark.parametrize("error", REMEDIES, ids=lambda error: error.__name__)
def test_each_error_is_what_can_be_done_about_it(error: type[errors.ErgoError], kind: Any) -> None:
    """Every error of the server arrives as the class for its remedy, with all that the server says of it."""
    body = envelope(error("that is how it is", param="image"))
    with (
        serving(gives(error.status, body)) as server,
        kind(server.url, max_retries=0) as client,
        pytest.raises(REMEDIES[error], match="that is how it is") as caught,
    ):
        client.ask(b"x", "?")
    found = caught.value
    assert (type(found), str(found), found.message) == (REMEDIES[error], "that is how it is", "that is how it is")
    assert (found.status, found.code, found.param, found.request_id) == (error.status, error.code, "image", "req-7")


@BOTH
@pytest.mark.parametrize("error", REMEDIES, ids=lambda error: error.__name__)
def test_each_error_in_a_stream_is_the_same(error: type[errors.ErgoError], kind: Any) -> None:
    """An error after the first event of a stream is the same class, although the status was 200 by then; it is not retried."""
    events = streams(("answer.delta", {"text": "se"}), ("error", envelope(error("so it is"))))
    with serving(events) as server, kind(server.url) as client, client.stream(b"x", "?") as stream:
        assert next(stream) == AnswerDelta("se")
        with pytest.raises(REMEDIES[error], match="so it is") as caught:
            next(stream)
    assert (caught.value.status, caught.value.code, caught.value.request_id) == (200, error.code, "req-7")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (401, NotAllowed),
        (403, NotAllowed),
        (408, TimedOut),
        (413, InvalidRequest),
        (429, RateLimited),
        (500, ServerFailed),
        (502, ServerFailed),
        (503, ServerBusy),
        (504, TimedOut),
        (404, UnexpectedResponse),
        (418, UnexpectedResponse),
        (307, UnexpectedResponse),
    ],
)
@pytest.mark.parametrize("body", [b"<html>nginx</html>", b'"text"', b'{"error": "text"}', b'{"error": {"code": 7}}'])
def test_a_proxy_between_is_understood_by_its_status(status: int, expected: type[ClientError], body: bytes) -> None:
    """Where the body is not the server's, the status says what can be done."""
    with (
        serving(gives(status, body)) as server,
        Client(server.url, max_retries=0) as client,
        pytest.raises(expected, match=str(status)) as caught,
    ):
        client.ask(b"x", "?")
    assert (type(caught.value), caught.value.status, caught.value.code) == (expected, status, "")


@BOTH
def test_a_redirect_is_not_followed(kind: Any) -> None:
    """Neither image nor key is sent to another address than the one given; the error names where it would have led."""
    with (
        serving(gives()) as elsewhere,
        serving(gives(307, b"", location=f"{elsewhere.url}/v1/vqa")) as server,
        kind(server.url, api_key="k") as client,
        pytest.raises(UnexpectedResponse, match=elsewhere.url),
    ):
        client.ask(b"x", "?")
    assert not elsewhere.requests


@BOTH
@pytest.mark.parametrize("body", [b"", b"hello", b"{}", b"[]", b"null", b'{"choices": [{"message": {}}]}', b'{"regions": []}'])
def test_an_answer_of_something_else(kind: Any, body: bytes) -> None:
    """An answer that is none of this server's is an error, not a crash, in every call."""
    with serving(gives(200, body)) as server, kind(server.url) as client:
        for call, given in ((client.ask, (b"x", "?")), (client.estimate, (b"x",)), (client.upload, (b"x",))):
            with pytest.raises(UnexpectedResponse, match="no ergo-vqa") as caught:
                call(*given)
            assert (caught.value.status, caught.value.request_id) == (200, "req-7")
        with pytest.raises(UnexpectedResponse), client.stream(b"x", "?"):
            pass


@BOTH
@pytest.mark.parametrize(("status", "code"), [(429, "rate_limit_exceeded"), (502, "engine_failed"), (503, "overloaded")])
def test_what_may_pass_is_tried_again(kind: Any, status: int, code: str) -> None:
    """A second attempt is made after 429, 502 and 503, and its answer is what the caller gets."""
    with serving(fails(status, code, retry_after_ms="1"), gives()) as server, kind(server.url) as client:
        assert client.ask(b"x", "?").text == answer()["answer"]
    assert len(server.requests) == 2
    ids = {asked.headers["x-request-id"] for asked in server.requests}
    assert len(ids) == 2


@BOTH
@pytest.mark.parametrize("status", [400, 401, 404, 408, 413, 422, 500, 504])
def test_what_will_not_pass_is_not_tried_again(kind: Any, status: int) -> None:
    """Nothing is sent twice that would fail, or take as long, again."""
    with (
        serving(fails(status, "x", retry_after_ms="1")) as server,
        kind(server.url) as client,
        pytest.raises(ClientError),
    ):
        client.ask(b"x", "?")
    assert len(server.requests) == 1


@BOTH
@pytest.mark.parametrize("retries", [0, 1, 3])
def test_retries_are_bounded(kind: Any, retries: int) -> None:
    """A call makes one attempt more than its retries, then raises the last failure."""
    with (
        serving(fails(503, retry_after_ms="1")) as server,
        kind(server.url, max_retries=retries) as client,
        pytest.raises(ServerBusy) as caught,
    ):
        client.ask(b"x", "?")
    assert len(server.requests) == retries + 1
    assert caught.value.retry_after == 0.001


@BOTH
def test_a_connection_that_fails_before_an_answer_is_tried_again(kind: Any) -> None:
    """A server that closes the connection instead of answering is asked again."""
    with serving(hangs_up, gives()) as server, kind(server.url) as client:
        assert client.ask(b"x", "?").text == answer()["answer"]
    assert len(server.requests) == 2


@BOTH
def test_the_server_says_when_to_come_back(kind: Any) -> None:
    """The client waits as long as Retry-After says: in milliseconds where the server is so exact, otherwise in seconds."""
    replies = fails(429, retry_after="1"), fails(503, retry_after_ms="200", retry_after="9"), gives()
    with serving(*replies) as server, kind(server.url) as client:
        client.ask(b"x", "?")
    first, second, third = (asked.at for asked in server.requests)
    assert second - first >= 1
    assert 0.2 <= third - second < 9


@BOTH
def test_a_wait_beyond_the_deadline_is_not_begun(kind: Any) -> None:
    """Where the server's wait does not fit the call's time, its error is raised at once, with the wait."""
    with (
        serving(fails(429, "rate_limit_exceeded", retry_after="3600")) as server,
        kind(server.url, timeout=600) as client,
        pytest.raises(RateLimited) as caught,
    ):
        client.ask(b"x", "?")
    assert caught.value.retry_after == 3600
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "1"}, 1),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:09 GMT", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 9),
        ({"retry-after": "Wed, 99 Oct 2015 07:28:09 GMT"}, None),
    ],
)
def test_each_form_of_retry_after(headers: dict[str, str], expected: float | None) -> None:
    """Retry-After is read as a number or a date, a date by the server's own clock; what is neither counts as nothing."""
    assert failure(None, 503, headers, "").retry_after == expected


def test_a_date_without_the_servers_clock() -> None:
    """Without a Date header a date counts by this machine's clock."""
    then = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1), usegmt=True)
    found = failure(None, 503, {"retry-after": then}, "").retry_after
    assert found is not None
    assert 3000 < found <= 3600


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def exchange(timeout: float = 100.0, retries: int = 100, draw: float = 1.0) -> tuple[Exchange[Any], Clock]:
    """Return a call that asks nobody."""
    clock = Clock()
    call: Call[Any] = Call("", lambda *_: None)
    return Exchange(Server.of(None, None, timeout, retries), lambda: call, None, clock=clock, draw=lambda: draw), clock


def test_pauses_grow_and_are_spread() -> None:
    """Without Retry-After the longest pause doubles up to a bound, and the pause is anywhere between nothing and that."""
    longest, _ = exchange()
    shortest, _ = exchange(draw=0.0)
    error = ServerBusy("", status=503)
    pauses = [longest.pause(error) for _ in range(7)]
    assert pauses[0] == BACKOFF_SECONDS
    assert all(later == min(2 * earlier, MAX_BACKOFF_SECONDS) for earlier, later in itertools.pairwise(pauses))
    assert {shortest.pause(error) for _ in range(7)} == {0.0}


def test_a_pause_fits_the_deadline() -> None:
    """A pause is made only if time is left after it."""
    call, clock = exchange(timeout=10)
    error = ServerBusy("", status=503, retry_after=4)
    assert call.pause(error) == 4
    clock.now += 6
    with pytest.raises(ServerBusy):
        call.pause(error)


@BOTH
@pytest.mark.parametrize("reply", [keeps_silent, drips_a_head, drips_a_body, streams(then=keeps_silent)])
def test_the_deadline_holds_whatever_the_server_does(kind: Any, reply: Reply) -> None:
    """A server that is silent, or sends a byte now and then, before or within its answer, is left when the time is over."""
    with serving(gives(), reply) as server, kind(server.url) as client:
        client.ask(b"x", "?")  # so that the connection is an old one
        with pytest.raises(TimedOut, match=r"no answer within 0\.3 s") as caught:
            client.ask(b"x", "?", timeout=SOON)
        assert caught.value.request_id in (server.requests[1].headers["x-request-id"], "req-7")
        assert caught.value.status == 0
        with server.lock:
            assert server.lock.wait_for(lambda: server.left == 1, 30)


@BOTH
def test_the_deadline_of_a_stream(kind: Any) -> None:
    """A stream that stops in its middle ends with the deadline."""
    reply = streams(("answer.delta", {"text": "se"}), then=keeps_silent)
    with serving(reply) as server, kind(server.url, timeout=SOON) as client, client.stream(b"x", "?") as stream:
        assert next(stream) == AnswerDelta("se")
        with pytest.raises(TimedOut):
            next(stream)


@BOTH
def test_the_deadline_holds_while_sending(kind: Any) -> None:
    """A server that does not read the request is left when the time is over."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with kind(url, timeout=SOON) as client, pytest.raises(TimedOut):
            client.ask(bytes(32 << 20), "?")


@BOTH
def test_a_call_can_have_a_deadline_of_its_own(kind: Any) -> None:
    """The time given to a call replaces the client's."""
    with serving(keeps_silent) as server, kind(server.url, timeout=600) as client:
        for call in (client.estimate, client.upload):
            with pytest.raises(TimedOut):
                call(b"x", timeout=SOON)
        with pytest.raises(TimedOut), client.stream(b"x", "?", timeout=SOON):
            pass


@BOTH
def test_retries_share_one_deadline(kind: Any) -> None:
    """Attempts and pauses together take no longer than the call may."""
    with (
        serving(fails(503, retry_after_ms="100")) as server,
        kind(server.url, max_retries=1000, timeout=1) as client,
        pytest.raises((ServerBusy, TimedOut)),
    ):
        client.ask(b"x", "?")
    assert 1 < len(server.requests) <= 10


@BOTH
@pytest.mark.parametrize("cut", [True, False])
def test_a_stream_that_is_cut(kind: Any, cut: bool) -> None:
    """A stream that ends without its last event is an error, whether or not its end looks regular; it is not retried."""
    region = {**answer()["regions"][0], "crop": None}
    events = streams(("region", region), ("answer.delta", {"text": "se"}), cut=cut)
    with serving(events) as server, kind(server.url) as client, client.stream(b"x", "?") as stream:
        assert isinstance(next(stream), RegionFound)
        assert next(stream) == AnswerDelta("se")
        with pytest.raises(Unreachable, match="in the middle") as caught:
            next(stream)
    assert (caught.value.status, caught.value.request_id) == (200, "req-7")
    assert len(server.requests) == 1


@BOTH
def test_what_breaks_after_the_answer_does_not_matter(kind: Any) -> None:
    """A stream whose connection breaks after its last event is complete; events that are not known are passed over."""
    events = streams(("weather", {"rain": 1}), ("done", answer()), cut=True)
    with serving(events) as server, kind(server.url) as client, client.stream(b"x", "?") as stream:
        (done,) = stream
    assert isinstance(done, Done)
    assert done.answer.text == answer()["answer"]


def breaks_off(asked: Asked) -> None:
    """Announce more than is sent."""
    asked.send(200, b'{"answer"', {"content-length": "100"})
    asked.close_connection = True


@BOTH
def test_an_answer_that_is_cut(kind: Any) -> None:
    """An answer that breaks off is an error and not retried: the server has done the work."""
    with (
        serving(breaks_off) as server,
        kind(server.url) as client,
        pytest.raises(Unreachable, match="in the middle") as caught,
    ):
        client.ask(b"x", "?")
    assert caught.value.status == 200
    assert len(server.requests) == 1


@BOTH
def test_a_stream_is_tried_again_before_it_begins(kind: Any) -> None:
    """A stream that is refused at first is asked for again, as any call."""
    events = streams(("done", answer()))
    with (
        serving(fails(503, retry_after_ms="1"), events) as server,
        kind(server.url) as client,
        client.stream(b"x", "?") as stream,
    ):
        assert [type(event) for event in stream] == [Done]


@BOTH
def test_a_file_that_changes_while_it_is_sent(tmp_path: Path, kind: Any) -> None:
    """A file that is not as long as it was when it was opened is an error about the image."""
    path = tmp_path / "growing"
    path.write_bytes(bytes(1 << 20))

    class Growing:
        """Has more to read than it said."""

        def __init__(self) -> None:
            self._file = path.open("rb")
            self.read, self.tell = self._file.read, self._file.tell
            self.seekable = self._file.seekable

        def seek(self, offset: int, whence: int = 0) -> int:
            """Seek; the end is nearer than it is."""
            return self._file.seek(offset, whence) - (1000 if whence == 2 else 0)

    growing = Growing()
    with (
        serving(gives()) as server,
        kind(server.url) as client,
        growing._file,
        pytest.raises(InvalidImage, match="changed while it was sent"),
    ):
        client.ask(growing, "?")


@BOTH
def test_connections_are_used_again(kind: Any) -> None:
    """Calls, refusals and whole streams of one client run over one connection."""
    replies = [gives(), fails(422, "image_unreadable"), streams(("done", answer())), gives()]
    with serving(*replies) as server, kind(server.url) as client:
        client.ask(b"x", "?")
        with pytest.raises(InvalidImage):
            client.ask(b"x", "?")
        with client.stream(b"x", "?") as stream:
            for _ in stream:
                pass
        client.ask(b"x", "?")
    assert (server.connections, len(server.requests)) == (1, 4)


def test_threads_share_a_client() -> None:
    """Threads that use one client at a time get each its own answer, over as many connections as threads."""
    with serving(echoes) as server, Client(server.url) as client:
        found: list[tuple[str, str]] = []

        def ask(name: str) -> None:
            for number in range(20):
                question = f"{name}-{number}"
                found.append((question, client.ask(b"x", question).text))

        threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 80
    assert all(question == text for question, text in found)
    assert server.connections <= 4


@BOTH
def test_leaving_a_stream_ends_the_servers_work(kind: Any) -> None:
    """Who leaves a stream early closes its connection, by which the server learns."""
    reply = streams(("answer.delta", {"text": "se"}), then=keeps_silent)
    with serving(reply) as server, kind(server.url) as client:
        with client.stream(b"x", "?") as stream:
            next(stream)
        with server.lock:
            assert server.lock.wait_for(lambda: server.left == 1, 30)


@BOTH
def test_leaving_a_stream_stops_the_engine(kind: Any) -> None:
    """At the real gateway, leaving a stream ends the generation."""
    engine = scripted(answer="<think>" + 4000 * "word ", seconds_per_token=0.01)
    with support.gateway(engine) as url, kind(url) as client:
        with client.stream(support.encode(support.held_out(0)), "?") as stream:
            next(stream)
            next(stream)
            assert engine.running == 1
        support.wait_until(lambda: engine.running == 0, "the engine has stopped")


def test_closing_a_client_ends_the_calls_of_other_threads() -> None:
    """A thread that waits for an answer gets an error as soon as the client is closed."""
    ended: list[BaseException] = []
    with serving(gives(), keeps_silent) as server:
        client = Client(server.url, timeout=600)
        client.ask(b"x", "?")

        def ask() -> None:
            try:
                client.ask(b"x", "?")
            except (ClientError, RuntimeError) as error:
                ended.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        with server.lock:
            assert server.lock.wait_for(lambda: server.in_flight == 1, 30)
        client.close()
        thread.join(30)
        assert len(ended) == 1


@BOTH
def test_a_call_without_an_answer_has_a_request_id(kind: Any) -> None:
    """The request id of a call that never got an answer is the one that was sent."""
    with serving(hangs_up) as server, kind(server.url, max_retries=0) as client, pytest.raises(Unreachable) as caught:
        client.ask(b"x", "?")
    assert caught.value.request_id == server.requests[0].headers["x-request-id"]


def test_the_event_loop_is_not_held_up(tmp_path: Path) -> None:
    """While the asynchronous client encodes pixels and reads a file, other tasks run."""
    path = tmp_path / "large"
    path.write_bytes(bytes(8 << 20))
    main = threading.get_ident()
    where: list[int] = []

    class Pixels(Image.Image):
        """An image that notes where it is encoded."""

        def save(self, *args: Any, **given: Any) -> None:
            where.append(threading.get_ident())
            super().save(*args, **given)

    class File:
        """A file that notes where it is read."""

        def __init__(self) -> None:
            self._file = path.open("rb")
            self.seek, self.tell, self.seekable = self._file.seek, self._file.tell, self._file.seekable

        def read(self, size: int) -> bytes:
            """Read."""
            where.append(threading.get_ident())
            return self._file.read(size)

    async def ask(url: str) -> None:
        async with AsyncClient(url) as client:
            image = Image.new("RGB", (60, 40))
            image.__class__ = Pixels
            await client.ask(image, "?")
            file = File()
            with file._file:
                await client.ask(file, "?")  # type: ignore[arg-type]

    with serving(gives()) as server:
        asyncio.run(ask(server.url))
    assert len(where) > 100
    assert main not in where


def slow(asked: Asked) -> None:
    """Answer after a while."""
    time.sleep(0.05)
    gives()(asked)


def test_cancelling_a_task_ends_its_call(tmp_path: Path) -> None:
    """A task that is cancelled at any moment of its call leaves no file open and no connection in use."""
    path = tmp_path / "file"
    path.write_bytes(bytes(4 << 20))

    async def ask(server: Backend) -> None:
        async with AsyncClient(server.url) as client:
            for moment in range(40):
                task = asyncio.create_task(client.ask(path, "?"))
                await asyncio.sleep(moment * 0.001)
                task.cancel()
                await asyncio.wait([task])
            assert (await client.ask(path, "?")).text == answer()["answer"]

    with serving(slow) as server:
        asyncio.run(ask(server))


@contextlib.contextmanager
def serving_tls(authority: Authority, *replies: Reply) -> Iterator[tuple[Backend, str]]:
    """Run a `Backend` with a certificate; yields it with its URL."""
    with serving(*replies) as server:
        server.socket = authority.server("127.0.0.1").wrap_socket(server.socket, server_side=True)
        yield server, server.url.replace("http:", "https:")


@BOTH
def test_deadlines_and_reuse_over_tls(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over TLS, with the certificates of SSL_CERT_FILE, connections are used again, and cut when the time is over."""
    authority = Authority()
    (tmp_path / "authorities.pem").write_text(authority.certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authorities.pem"))
    with serving_tls(authority, gives(), gives(), drips_a_head) as (server, url), kind(url) as client:
        for _ in range(2):
            assert client.ask(b"x", "?").text == answer()["answer"]
        with pytest.raises(TimedOut):
            client.ask(b"x", "?", timeout=SOON)
        with server.lock:
            assert server.lock.wait_for(lambda: server.left == 1, 30)
    assert server.connections == 1


@BOTH
def test_a_server_that_is_not_trusted(kind: Any) -> None:
    """Nothing is sent to a server whose certificate is not trusted."""
    with (
        serving_tls(Authority(), gives()) as (server, url),
        kind(url, max_retries=0) as client,
        pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        client.ask(b"x", "?")
    assert not server.requests
