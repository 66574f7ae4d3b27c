"""One call from its first attempt to its end, without sending: both clients do what is decided here."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import re
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Generic, TypeVar

import httpx2

from ergo_client import _reading
from ergo_client._answers import Answer, Done, Event
from ergo_client._calls import Call
from ergo_client._errors import ClientError, InvalidImage, TimedOut, UnexpectedResponse, Unreachable, failure

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
"""Where ``ergo-vqa serve`` listens."""

TIMEOUT_SECONDS = 180.0
"""Longer than the server's own deadline for a request (120 s), so that its error arrives rather than ours."""

CONNECT_SECONDS = 10.0
"""For a connection to be there: a lost first packet is sent again after 1, 3 and 7 seconds (RFC 6298)."""

IDLE_SECONDS = 4.0
"""How long an idle connection is used again. The server closes one after 5 s by default, and a request must not meet that."""

BACKOFF_SECONDS = 0.5
"""Longest pause before the second attempt, where the server names none; twice as long before each further one."""

MAX_BACKOFF_SECONDS = 8.0
"""Longest of these pauses."""

AGAIN = (429, 502, 503)
"""Statuses after which the same request may succeed. Not 500 and 504: the same question would break, or take as long, again."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where the server is, and how it is to be spoken to: what the clients were given."""

    url: str = field(repr=False)
    timeout: float
    max_retries: int
    api_key: str | None = field(repr=False)

    @classmethod
    def of(cls, url: str | None, api_key: str | None, timeout: float, max_retries: int) -> Server:
        """Take what is not given from the environment.

        Raises:
            ValueError: the URL is no http(s) URL, the key cannot be one, or a number is out of bounds.
        """
        url = (url or os.environ.get("ERGO_URL") or DEFAULT_URL).strip()
        key = (api_key if api_key is not None else os.environ.get("ERGO_API_KEY", "")).strip()
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ValueError(f"the URL cannot be read: {error}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
            raise ValueError("the URL must begin with http:// or https:// and a host, and have no query")
        if not re.fullmatch(r"[\x21-\x7e]*", key):
            raise ValueError("the API key has characters that a header cannot carry")
        if max_retries < 0:
            raise ValueError("max_retries cannot be negative")
        return cls(url, checked(timeout), max_retries, key or None)

    @property
    def shown(self) -> str:
        """The URL without a password that may be in it."""
        parsed = httpx2.URL(self.url)
        return f"{parsed.scheme}://{parsed.netloc.decode()}{parsed.path.rstrip('/')}"

    def options(self) -> dict[str, Any]:
        """Return httpx2's options, for both kinds of client."""
        parsed = httpx2.URL(self.url)
        # Reading the certificates takes 30 ms. Without TLS a context that knows none, and so trusts nobody, is enough.
        tls = httpx2.create_ssl_context() if parsed.scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        headers = {"user-agent": "ergo-client"} | ({"authorization": f"Bearer {self.api_key}"} if self.api_key else {})
        return {
            "base_url": self.url,
            "headers": headers,
            "follow_redirects": False,
            "limits": httpx2.Limits(max_connections=None, keepalive_expiry=IDLE_SECONDS),
            "verify": tls,
            "trust_env": not _is_here(parsed.host),  # no proxy leads back to this machine, whatever HTTP_PROXY says
        }


def _is_here(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def checked(timeout: float) -> float:
    """Return a number of seconds.

    Raises:
        ValueError: it is none that a call could take.
    """
    if not 0 < timeout < math.inf:
        raise ValueError("timeout must be a number of seconds above 0")
    return timeout


class Exchange(Generic[T]):
    """One call: its deadline, its attempts, and what its failures are.

    Args:
        server: whom it asks.
        prepare: makes the call; may take as long as an image takes to be encoded, and counts against the deadline.
        timeout: seconds for everything; None takes the server's.
        clock: monotonic seconds.
        draw: from 0 to 1; spreads the moments at which clients come back.

    Attributes:
        call: what is asked, once `begin` has run.
    """

    call: Call[T]

    def __init__(
        self,
        server: Server,
        prepare: Callable[[], Call[T]],
        timeout: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._server = server
        self._prepare = prepare
        self._clock = clock
        self._draw = draw
        self._timeout = server.timeout if timeout is None else checked(timeout)
        self._end = clock() + self._timeout
        self._failed = 0
        self._request_id = ""

    @property
    def left(self) -> float:
        """Seconds until the deadline; 0 when it has passed."""
        return max(0.0, self._end - self._clock())

    def begin(self) -> None:
        """Prepare the call. Blocks. Errors are those of ``prepare``."""
        self.call = self._prepare()

    def check(self) -> None:
        """Stop what has taken too long.

        Raises:
            TimedOut: the deadline has passed.
        """
        if not self.left:
            raise self._late()

    @contextlib.contextmanager
    def request(self, http: httpx2.Client | httpx2.AsyncClient, **extensions: Any) -> Iterator[httpx2.Request]:
        """Open the next attempt's request; its file is open within. Blocks.

        Raises:
            OSError: the file cannot be opened.
            TimedOut: there is no time left.
        """
        self.check()
        self._request_id = uuid.uuid4().hex  # ours, so that it is known even where no answer comes
        timeouts = {"connect": min(CONNECT_SECONDS, self.left), "write": self.left, "read": self.left, "pool": self.left}
        with self.call.body() as body:
            request = http.build_request(
                self.call.method,
                self.call.path,
                headers={"x-request-id": self._request_id},
                extensions={"timeout": timeouts, **extensions},
                **body,
            )
            assert isinstance(request.stream, Iterable)
            length = int(request.headers.get("content-length", "0"))
            request.stream = _Body(request.stream, length, self, timeouts)
            yield request

    @contextlib.contextmanager
    def translating(self, response: httpx2.Response | None = None) -> Iterator[None]:
        """Turn what the network raises into a `ClientError`.

        Args:
            response: what has begun to come, if something has.
        """
        try:
            yield
        except (httpx2.HTTPError, TimeoutError) as error:
            raise self._lost(error, response) from error

    def pause(self, error: ClientError) -> float:
        """Return for how many seconds to wait before the next attempt.

        Raises:
            ClientError: ``error``, where another attempt cures nothing, is one too many, or would come too late.
        """
        lost = isinstance(error, Unreachable) and not error.status
        self._failed += 1
        if not (lost or error.status in AGAIN) or self._failed > self._server.max_retries:
            raise error
        seconds = error.retry_after
        if seconds is None:
            seconds = self._draw() * min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2 ** (self._failed - 1))
        if seconds >= self.left:
            raise error
        return seconds

    def failure(self, response: httpx2.Response) -> ClientError:
        """Return the error that a response, which has been read, stands for."""
        try:
            body = response.json()
        except ValueError:
            body = None
        return failure(body, response.status_code, response.headers, self.id_of(response))

    def result(self, response: httpx2.Response) -> T:
        """Read a response that has been read.

        Raises:
            UnexpectedResponse: it is no ergo-vqa's.
        """
        with self.reading(response):
            return self.call.read(response.json(), self.id_of(response), self.image)

    @contextlib.contextmanager
    def reading(self, response: httpx2.Response) -> Iterator[None]:
        """Turn what reading something else raises into `UnexpectedResponse`."""
        try:
            yield
        except _reading.WRONG as error:
            text = f"what answers at {self._server.shown} is no ergo-vqa, or a much newer one"
            raise UnexpectedResponse(text, status=response.status_code, request_id=self.id_of(response)) from error

    @property
    def image(self) -> Any:
        """What was asked about, where it can be looked at again."""
        return self.call.image.again if self.call.image else None

    def id_of(self, response: httpx2.Response) -> str:
        """Return the id under which the server knows a request; a proxy may have given it another."""
        return str(response.headers.get("x-request-id", self._request_id))

    def _late(self) -> TimedOut:
        return TimedOut(f"no answer within {self._timeout:g} s", request_id=self._request_id)

    def _lost(self, error: Exception, response: httpx2.Response | None) -> ClientError:
        slow = isinstance(error, httpx2.TimeoutException | TimeoutError) and not isinstance(error, httpx2.ConnectTimeout)
        if slow or not self.left:
            return self._late()
        if isinstance(error, httpx2.DecodingError):
            return UnexpectedResponse("the answer's Content-Encoding is broken", request_id=self._request_id)
        if response is not None:
            return cut_off(response.status_code, self.id_of(response))
        reason = str(error) or type(error).__name__
        return Unreachable(f"no answer from {self._server.shown}: {reason}", request_id=self._request_id)


def cut_off(status: int, request_id: str) -> Unreachable:
    """Return the error for an answer that ends in its middle."""
    return Unreachable("the connection broke in the middle of the answer", status=status, request_id=request_id)


class Events:
    """The events of one stream, as they come.

    Args:
        exchange: the call.
        response: what streams.

    Raises:
        UnexpectedResponse: it is no stream of events.
    """

    def __init__(self, exchange: Exchange[Answer], response: httpx2.Response) -> None:
        self._exchange = exchange
        self._response = response
        self._done: Done | None = None
        with exchange.reading(response):
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise ValueError("no stream of events")
        self.source = httpx2.EventSource(response, max_event_size=None)  # views come in one event each

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Turn what the network raises into a `ClientError`, as long as the answer is not there."""
        try:
            with self._exchange.translating(self._response):
                yield
        except ClientError:
            if self._done is None:
                raise

    def read(self, sse: httpx2.ServerSentEvent) -> Event | None:
        """Read one event; None for one that is nothing yet.

        Raises:
            ClientError: the answer has failed in its middle.
        """
        exchange, response = self._exchange, self._response
        request_id = exchange.id_of(response)
        with exchange.reading(response):
            data = sse.json()
            if sse.event == "error":
                raise failure(data, response.status_code, response.headers, request_id)
            event = _reading.event(sse.event, data, request_id, exchange.image)
        if isinstance(event, Done):
            # Kept until the response has ended: then its connection can be used again, even by who reads no further.
            self._done = event
            return None
        return event

    def end(self) -> Done:
        """Return the last event.

        Raises:
            Unreachable: the stream ended without it.
        """
        if self._done is None:
            raise cut_off(self._response.status_code, self._exchange.id_of(self._response))
        return self._done


class _Body(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """The body of a request on its way out: in time, and for an event loop read in a thread.

    Args:
        pieces: the body.
        length: what was announced; a file may have changed since.
        exchange: whose deadline holds.
        timeouts: of the request. How long an answer is waited for counts from the end of the body.
    """

    def __init__(self, pieces: Iterable[bytes], length: int, exchange: Exchange[Any], timeouts: dict[str, float]) -> None:
        self._pieces = pieces
        self._length = length
        self._exchange = exchange
        self._timeouts = timeouts

    def __iter__(self) -> Iterator[bytes]:
        left = self._length
        for piece in self._pieces:
            self._exchange.check()
            left -= len(piece)
            if left < 0:
                raise self._changed()
            yield piece
        if left:
            raise self._changed()
        self._timeouts["read"] = max(self._exchange.left, 0.001)  # 0 would mean not to wait at all

    def _changed(self) -> InvalidImage:
        return InvalidImage("the file changed while it was sent", code="image_unreadable", param="image")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        pieces = iter(self)
        while (piece := await to_its_end(asyncio.to_thread(next, pieces, None))) is not None:
            yield piece


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Await what a thread does, to its end even when cancelled: what the thread works on is closed afterwards."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not complain that nobody did
        raise
