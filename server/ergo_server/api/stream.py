"""Server-sent events, and callers who go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse

from ergo_server.api.errors import envelope, unforeseen
from ergo_server.errors import ErgoError

T = TypeVar("T")

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""Neither a cache nor nginx may hold events back."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run ``work``, and cancel it when the caller closes the connection: Starlette does that for streams only.

    Raises:
        ClientDisconnect: the caller has gone; there is nobody to answer.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for other in (task, watch):
            other.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def event_stream(
    request: Request, events: AsyncGenerator[T, None], write: Callable[[T], str], failed: Callable[[ErgoError], str]
) -> StreamingResponse:
    """Answer with events. What fails before the first of them is raised, so that it gets its status.

    Args:
        request: the caller's.
        events: where the events come from; closed when the caller goes away.
        write: turns an event into the text of one or more server-sent events.
        failed: turns an error into the text that ends the stream.
    """
    try:
        first = await unless_gone(request, anext(events))
    except BaseException:
        await events.aclose()
        raise

    async def body() -> AsyncIterator[str]:
        async with contextlib.aclosing(events):
            try:
                yield write(first)
                async for event in events:
                    yield write(event)
            except Exception as error:
                failure = error if isinstance(error, ErgoError) else unforeseen(error, request.scope)
                request.scope["failure"] = failure
                yield failed(failure)

    return StreamingResponse(body(), media_type="text/event-stream", headers=HEADERS)


def sse(data: object, event: str | None = None) -> str:
    """Format one event on one ``data:`` line; several lines confuse simple clients."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return (f"event: {event}\n" if event else "") + f"data: {text}\n\n"


def sse_error(error: ErgoError) -> str:
    """Format an error that came after the first event."""
    return sse(envelope(error), "error")
