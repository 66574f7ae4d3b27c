"""The client for asyncio."""

# ruff: noqa: ASYNC109 (a timeout is the deadline of the whole call, retries included; asyncio's are set from it)

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import httpx2

from ergo_client import _calls
from ergo_client._answers import Answer, Estimate, Event, Progress, UploadedImage
from ergo_client._batch import Batch, Result
from ergo_client._calls import Call, Include, Question, Zoom
from ergo_client._errors import ClientError
from ergo_client._exchange import TIMEOUT_SECONDS, Events, Exchange, Server, to_its_end
from ergo_client._images import ImageLike

T = TypeVar("T")


class AsyncClient:
    """`Client` for asyncio: the same calls, to be awaited. Files are read, and pixels encoded, in threads.

    Args:
        url: as for `Client`.
        api_key: as for `Client`.
        timeout: as for `Client`.
        max_retries: as for `Client`.
        transport: replaces httpx2's own. The client closes it.

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
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._server = Server.of(url, api_key, timeout, max_retries)
        self._http = httpx2.AsyncClient(**self._server.options(), transport=transport)

    async def ask(
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
        """As `Client.ask`."""
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
        return await self._call(lambda: _calls.asking(asked), timeout)

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
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """As `Client.stream`: ``async with client.stream(...) as events``, and ``async for event in events``."""
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

    async def estimate(
        self,
        image: ImageLike,
        *,
        model: str = "ergo",
        max_visual_tokens: int | None = None,
        zoom: Zoom = "auto",
        timeout: float | None = None,
    ) -> Estimate:
        """As `Client.estimate`."""
        return await self._call(lambda: _calls.estimating(image, model, max_visual_tokens, zoom), timeout)

    async def upload(
        self, image: ImageLike, *, max_visual_tokens: int | None = None, timeout: float | None = None
    ) -> UploadedImage:
        """As `Client.upload`."""
        return await self._call(lambda: _calls.uploading(image, max_visual_tokens), timeout)

    async def delete(self, uploaded: UploadedImage | str, *, timeout: float | None = None) -> None:
        """As `Client.delete`."""
        await self._call(lambda: _calls.deleting(uploaded), timeout)

    def ask_many(
        self,
        questions: Iterable[Question] | AsyncIterable[Question],
        *,
        concurrency: int = 4,
        progress: Callable[[Progress], None] | None = None,
    ) -> AsyncGenerator[Result, None]:
        """As `Client.ask_many`. What is finished is yielded while the next question is waited for.

        To end what is under way at a known moment, close the generator (``contextlib.aclosing``); one that is merely left is
        closed by the event loop, soon.

        Args:
            questions: taken in the event loop, which an iterable that blocks would stop.
            concurrency: questions worked on at a time, each by a task.
            progress: called before each result is yielded.

        Raises:
            ValueError: ``concurrency`` is less than 1.
        """
        return self._many(_each(questions), Batch(concurrency, progress))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._server.shown!r})"

    async def _call(self, prepare: Callable[[], Call[T]], timeout: float | None) -> T:
        exchange = Exchange(self._server, prepare, timeout)
        async with self._answered(exchange) as response:
            with exchange.translating(response):
                async with asyncio.timeout(exchange.left):
                    await response.aread()
            return exchange.result(response)

    @contextlib.asynccontextmanager
    async def _streamed(self, question: Question, timeout: float | None) -> AsyncIterator[AsyncIterator[Event]]:
        exchange = Exchange(self._server, lambda: _calls.asking(question, stream=True), timeout)
        async with (
            self._answered(exchange) as response,
            contextlib.aclosing(self._events(exchange, Events(exchange, response))) as events,
        ):
            yield events

    async def _events(self, exchange: Exchange[Answer], events: Events) -> AsyncGenerator[Event, None]:
        source = aiter(events.source)
        with events.following():
            while True:
                async with asyncio.timeout(exchange.left):
                    sse = await anext(source, None)
                if sse is None:
                    break
                if (event := events.read(sse)) is not None:
                    yield event
        yield events.end()

    @contextlib.asynccontextmanager
    async def _answered(self, exchange: Exchange[Any]) -> AsyncIterator[httpx2.Response]:
        """Yield the response that is no failure, with its body still to come."""
        await asyncio.to_thread(exchange.begin)
        while True:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    response = await stack.enter_async_context(self._sent(exchange))
                except ClientError as error:
                    seconds = exchange.pause(error)
                else:
                    yield response
                    return
            await asyncio.sleep(seconds)

    @contextlib.asynccontextmanager
    async def _sent(self, exchange: Exchange[Any]) -> AsyncIterator[httpx2.Response]:
        """Make one attempt."""
        with contextlib.ExitStack() as stack:
            request = await to_its_end(asyncio.to_thread(stack.enter_context, exchange.request(self._http)))
            with exchange.translating():
                async with asyncio.timeout(exchange.left):
                    response = await self._http.send(request, stream=True)
        async with contextlib.aclosing(response):
            if not response.is_success:
                with exchange.translating(response):
                    async with asyncio.timeout(exchange.left):
                        await response.aread()
                raise exchange.failure(response)
            yield response

    async def _many(self, questions: AsyncGenerator[Question, None], batch: Batch) -> AsyncGenerator[Result, None]:
        room, window = asyncio.Semaphore(batch.concurrency), deque[asyncio.Task[Result]]()
        taking: asyncio.Task[Question | None] | None = None
        broken: Exception | None = None
        more = True
        try:
            while True:
                if more and taking is None and len(window) < batch.window:
                    taking = asyncio.create_task(_next(questions))
                waiting = {task for task in (taking, window[0] if window else None) if task is not None}
                if not waiting:
                    break
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if taking is not None and taking.done():
                    try:
                        question = taking.result()
                    except Exception as error:
                        question, broken = None, error
                    taking, more = None, question is not None
                    if question is not None:
                        window.append(asyncio.create_task(self._one(question, batch, room)))
                while window and window[0].done():
                    yield batch.counted(window.popleft().result())
            if broken is not None:
                raise broken
        finally:
            left = [*window, taking] if taking else [*window]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _one(self, question: Question, batch: Batch, room: asyncio.Semaphore) -> Result:
        try:
            async with room:
                with _calls.spared(OSError):  # a file that is gone when it is opened
                    return await self._call(lambda: _calls.one_of_many(question, batch.reading), question.timeout)
        except ClientError as error:
            return error


async def _each(questions: Iterable[Question] | AsyncIterable[Question]) -> AsyncGenerator[Question, None]:
    if isinstance(questions, AsyncIterable):
        async for question in questions:
            yield question
    else:
        for question in questions:
            yield question


async def _next(questions: AsyncGenerator[Question, None]) -> Question | None:
    return await anext(questions, None)
