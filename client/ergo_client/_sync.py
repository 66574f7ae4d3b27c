"""The client for threads."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import httpx2

from ergo_client import _calls
from ergo_client._answers import Answer, Estimate, Event, Progress, UploadedImage
from ergo_client._batch import Batch, Result
from ergo_client._calls import Call, Include, Question, Zoom
from ergo_client._errors import ClientError
from ergo_client._exchange import TIMEOUT_SECONDS, Events, Exchange, Server
from ergo_client._images import ImageLike

T = TypeVar("T")


class Client:
    """Asks an ergo-vqa server. Close it, or use it as a context manager. Threads may share one.

    Every call raises a `ClientError` of the tree in ``ergo_client._errors``; ``OSError`` for a file that cannot be read;
    ``TypeError``, ``ValueError`` or ``ImportError`` for an image that cannot be sent. A connection that fails before an answer is
    tried again, and so are the statuses 429, 502 and 503, after the time that the server names.

    Args:
        url: the server's base URL, without ``/v1``; None takes ``ERGO_URL``, or else http://127.0.0.1:8000.
        api_key: sent to that URL only, as redirects are not followed; None takes ``ERGO_API_KEY``, or else none is sent.
        timeout: seconds that a whole call may take, its retries and waits included.
        max_retries: of one call.
        transport: replaces httpx2's own, which follows the proxies of the environment except to this machine. The client closes
            it. What runs on it cannot be ended from another thread, so that deadlines are as exact as its own timeouts.

    Raises:
        ValueError: the URL, the key or a number cannot be used.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = TIMEOUT_SECONDS,
        max_retries: int = 2,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._server = Server.of(url, api_key, timeout, max_retries)
        self._lines = _Lines(self._server.options(), transport)
        self._open = _Calls()

    def ask(
        self,
        image: ImageLike,
        question: str,
        *,
        choices: Sequence[str] = (),
        instructions: str = "",
        model: str = "ergo",
        max_visual_tokens: int | None = None,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        zoom: Zoom = "auto",
        include: Sequence[Include] = (),
        timeout: float | None = None,
    ) -> Answer:
        """Ask about an image. `ImageLike` says what that may be, `Question` what the options mean."""
        asked = Question(
            image,
            question,
            choices=choices,
            instructions=instructions,
            model=model,
            max_visual_tokens=max_visual_tokens,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            zoom=zoom,
            include=include,
        )
        return self._call(lambda: _calls.asking(asked), timeout, self._open)

    def stream(
        self,
        image: ImageLike,
        question: str,
        *,
        choices: Sequence[str] = (),
        instructions: str = "",
        model: str = "ergo",
        max_visual_tokens: int | None = None,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        zoom: Zoom = "auto",
        include: Sequence[Include] = (),
        timeout: float | None = None,
    ) -> AbstractContextManager[Iterator[Event]]:
        """Ask about an image and see the answer being found: ``with client.stream(...) as events``. The last event is `Done`.

        Leaving the context early ends the server's work. Arguments are those of `ask`; the reader's own time counts against the
        deadline. Nothing is retried after the first event.
        """
        asked = Question(
            image,
            question,
            choices=choices,
            instructions=instructions,
            model=model,
            max_visual_tokens=max_visual_tokens,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            zoom=zoom,
            include=include,
        )
        return self._streamed(asked, timeout)

    def estimate(
        self,
        image: ImageLike,
        *,
        model: str = "ergo",
        max_visual_tokens: int | None = None,
        zoom: Zoom = "auto",
        timeout: float | None = None,
    ) -> Estimate:
        """Say what a question about an image would cost; the model is not asked, and no URL fetched."""
        return self._call(lambda: _calls.estimating(image, model, max_visual_tokens, zoom), timeout, self._open)

    def upload(self, image: ImageLike, *, max_visual_tokens: int | None = None, timeout: float | None = None) -> UploadedImage:
        """Have the server keep an image for a while, so that many questions cost one upload.

        Args:
            image: what to keep.
            max_visual_tokens: pixel budget of the overview that is made on the way; questions of the same budget save that, too.
            timeout: seconds; None takes the client's.
        """
        return self._call(lambda: _calls.uploading(image, max_visual_tokens), timeout, self._open)

    def delete(self, uploaded: UploadedImage | str, *, timeout: float | None = None) -> None:
        """Have the server forget an upload before its time. `ImageExpired` says that it had."""
        self._call(lambda: _calls.deleting(uploaded), timeout, self._open)

    def ask_many(
        self, questions: Iterable[Question], *, concurrency: int = 4, progress: Callable[[Progress], None] | None = None
    ) -> Generator[Result, None, None]:
        """Ask many questions, and yield their answers in the order of the questions.

        A question that fails yields its `ClientError` in its place; so does one whose image cannot be read or is none, as
        `InvalidImage` with the reason as its cause. Questions are taken while a result is waited for, at most ``2 × concurrency``
        more than were yielded. If taking one raises, what was taken is answered first. Close the generator, or leave it, to end
        what is under way. Answers do not keep bytes and pixels for `Answer.draw`, and nothing that a question names may change
        before its answer is there.

        Args:
            questions: taken in this thread.
            concurrency: questions worked on at a time, each by a thread.
            progress: called in this thread, before each result is yielded.

        Raises:
            ValueError: ``concurrency`` is less than 1.
        """
        return self._many(iter(questions), Batch(concurrency, progress))

    def close(self) -> None:
        """Close the connections. Calls of other threads end with an error."""
        self._lines.close()
        self._open.end()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._server.shown!r})"

    def _call(self, prepare: Callable[[], Call[T]], timeout: float | None, calls: _Calls) -> T:
        exchange = Exchange(self._server, prepare, timeout)
        with self._answered(exchange, calls) as response:
            with exchange.translating(response):
                response.read()
            return exchange.result(response)

    @contextlib.contextmanager
    def _streamed(self, question: Question, timeout: float | None) -> Iterator[Iterator[Event]]:
        exchange = Exchange(self._server, lambda: _calls.asking(question, stream=True), timeout)
        with self._answered(exchange, self._open) as response:
            yield self._events(Events(exchange, response))

    def _events(self, events: Events) -> Iterator[Event]:
        with events.following():
            for sse in events.source:
                if (event := events.read(sse)) is not None:
                    yield event
        yield events.end()

    @contextlib.contextmanager
    def _answered(self, exchange: Exchange[Any], calls: _Calls) -> Iterator[httpx2.Response]:
        """Yield the response that is no failure, with its body still to come."""
        exchange.begin()
        while True:
            with contextlib.ExitStack() as stack:
                try:
                    response = stack.enter_context(self._sent(exchange, calls))
                except ClientError as error:
                    seconds = exchange.pause(error)
                else:
                    yield response
                    return
            calls.wait(seconds)

    @contextlib.contextmanager
    def _sent(self, exchange: Exchange[Any], calls: _Calls) -> Iterator[httpx2.Response]:
        """Make one attempt."""
        with self._lines.take() as line, line.until(exchange.left), calls.on(line):
            with exchange.request(line.http, **line.extensions) as request, exchange.translating():
                response = line.http.send(request, stream=True)
            with contextlib.closing(response):
                if not response.is_success:
                    with exchange.translating(response):
                        response.read()
                    raise exchange.failure(response)
                yield response

    def _many(self, questions: Iterator[Question], batch: Batch) -> Generator[Result, None, None]:
        calls, window, broken = _Calls(), deque[Future[Result]](), None
        threads = ThreadPoolExecutor(batch.concurrency, thread_name_prefix="ergo-client")
        try:
            while broken is None:
                try:
                    question = next(questions)
                except StopIteration:
                    break
                except Exception as error:
                    broken = error
                    break
                window.append(threads.submit(self._one, question, batch, calls))
                while window and (window[0].done() or len(window) >= batch.window):
                    yield batch.counted(window.popleft().result())
            while window:
                yield batch.counted(window.popleft().result())
            if broken is not None:
                raise broken
        finally:
            calls.end()
            threads.shutdown(cancel_futures=True)

    def _one(self, question: Question, batch: Batch, calls: _Calls) -> Result:
        try:
            with _calls.spared(OSError):  # a file that is gone when it is opened
                return self._call(lambda: _calls.one_of_many(question, batch.reading), question.timeout, calls)
        except ClientError as error:
            return error


class Ended(RuntimeError):
    """The call was ended from another thread."""


class _Line:
    """One connection at a time, which another thread can cut.

    Args:
        http: what it runs on.
        own: nothing else runs on that; otherwise its sockets are not known here, and cannot be cut.
    """

    def __init__(self, http: httpx2.Client, own: bool) -> None:
        self.http = http
        self.extensions: dict[str, Any] = {"trace": self._watch} if own else {}
        self._socket: socket.socket | None = None
        self._cut = False

    @contextlib.contextmanager
    def until(self, seconds: float) -> Iterator[None]:
        """Cut what is done within when the time is over.

        httpx2's timeouts are for single reads and writes, and start again with each: a peer that drips outlives them.
        """
        self._cut = False
        timer = threading.Timer(seconds, self.cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def cut(self) -> None:
        """End the connection; who reads or writes on it in another thread gets an error at once."""
        self._cut = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it is closed already
                # The plain socket's: that of TLS would also forget its state, which the other thread is using.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _watch(self, event: str, info: dict[str, Any]) -> None:
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self._socket = info["return_value"].get_extra_info("socket")
            if self._cut:
                self.cut()


class _Lines:
    """Connections, as many as are used at a time.

    httpx2 has a pool of its own, but does not tell which of its connections a request is on until the response begins: so each
    of these is a client with one connection.

    Args:
        options: of httpx2's client.
        transport: the caller's, if it is not httpx2's own; all lines then share it.
    """

    def __init__(self, options: dict[str, Any], transport: httpx2.BaseTransport | None) -> None:
        self._options = options
        self._shared = httpx2.Client(**options, transport=transport) if transport else None
        self._idle: list[_Line] = []
        self._all: list[_Line] = []
        self._closed = False

    @contextlib.contextmanager
    def take(self) -> Iterator[_Line]:
        """Yield a line that nobody uses; the one used last, whose connection is open still if any is.

        Raises:
            Ended: they are closed.
        """
        if self._closed:
            raise Ended("the client is closed")
        try:
            line = self._idle.pop()
        except IndexError:
            line = self._made()
        try:
            yield line
        finally:
            self._idle.append(line)

    def close(self) -> None:
        """Close all. Who uses one in another thread gets an error at once."""
        self._closed = True
        for line in self._all:
            line.cut()
            line.http.close()
        if self._shared:
            self._shared.close()

    def _made(self) -> _Line:
        line = _Line(self._shared or httpx2.Client(**self._options), own=self._shared is None)
        self._all.append(line)
        return line


class _Calls:
    """What is under way and may be ended together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._lines: set[_Line] = set()

    @contextlib.contextmanager
    def on(self, line: _Line) -> Iterator[None]:
        """Use a line for one of the calls.

        Raises:
            Ended: they have been ended.
        """
        with self._lock:
            self.wait(0)
            self._lines.add(line)
        try:
            yield
        finally:
            with self._lock:
                self._lines.discard(line)

    def wait(self, seconds: float) -> None:
        """Wait.

        Raises:
            Ended: they have been ended, or are meanwhile.
        """
        if self._ended.wait(seconds):
            raise Ended("the call was ended from another thread")

    def end(self) -> None:
        """End them all, and let none begin."""
        self._ended.set()
        with self._lock:
            for line in self._lines:
                line.cut()
