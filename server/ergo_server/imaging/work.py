"""Where decoding happens: in threads of its own, within a bound on memory and on time.

Threads, not processes: libvips lets go of Python's lock, two threads decoded as many 24-megapixel photographs a second as two
processes did, and stalled the event loop for 3 ms at most (research of this project). A thread cannot be killed; so every
decode is given a `Stop` that it obeys, and what cannot be stopped is bounded by its header before it begins.

The memory that a decode may take is known from the header. It is reserved before the decode begins and given back when its
thread has really ended, not when somebody stopped waiting for it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from ergo_server.errors import ImageTooLarge, Overloaded
from ergo_server.imaging.file import Stop
from ergo_server.imaging.header import Limits

T = TypeVar("T")

MEMORY_BYTES = 2 << 30
"""Four of the largest photographs (108 megapixels, 3 bytes each) decoded as a whole, or hundreds of usual ones by the row."""

ARRIVALS_SHARE = 0.25
"""Of the memory, for images that still arrive: who sends the beginning of a large image and then nothing must not keep it from
those whose image is there."""

WAIT_SECONDS = 10.0
"""For memory. Decodes take a tenth of a second each: who waited for 10 s stands before a hundred others."""

DECODE_SECONDS = 10.0
"""For one decode. The largest progressive photograph takes 1.3 s on one core; a loaded machine may be several times slower."""


def return_freed_memory() -> None:
    """Have the C library give large pieces of memory back to the system when they are freed; for the whole process.

    glibc learns from what is freed that such sizes are wanted, and keeps up to 32 MB of each: after twelve images of 100
    megapixels 1,670 MiB of them, with this 270. Does nothing where the C library is another.
    """
    m_mmap_threshold, size = -3, 1 << 20  # malloc.h; larger pieces are mapped, and unmapped when they are freed
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(m_mmap_threshold, size)


class Reserve:
    """Bytes of memory that may be in use at once. Whoever waits is served in the order of coming.

    Args:
        total: bytes.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.in_use = 0
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    async def take(self, count: int, seconds: float) -> Hold:
        """Reserve ``count`` bytes, waiting at most ``seconds``.

        Raises:
            ImageTooLarge: more than there are in all.
            Overloaded: others did not give them back in time.
        """
        if count > self.total:
            message = f"decoding the image takes {count:,} bytes of memory; the limit is {self.total:,}"
            raise ImageTooLarge(message, param="image")
        if hold := self.try_take(count):
            return hold
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (count, turn)
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(seconds):
                await turn
            return Hold(self, count)
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # it was this one's turn at the moment in which it stopped waiting
                self._give_back(count)
            else:
                with contextlib.suppress(ValueError):  # it was passed over already
                    self._waiting.remove(entry)
                self._serve()  # it may have stood in the way of smaller ones
            if isinstance(error, TimeoutError):
                raise Overloaded("the server is decoding as many images as its memory holds", retry_after=2) from None
            raise

    def try_take(self, count: int) -> Hold | None:
        """Reserve ``count`` bytes if that is possible at once and nobody waits."""
        if self._waiting or self.in_use + count > self.total:
            return None
        self.in_use += count
        return Hold(self, count)

    def _give_back(self, count: int) -> None:
        self.in_use -= count
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self.in_use + self._waiting[0][0] <= self.total:
            count, turn = self._waiting.popleft()
            if not turn.cancelled():
                self.in_use += count
                turn.set_result(None)


@dataclass(slots=True)
class Hold:
    """Reserved bytes."""

    _reserve: Reserve
    _count: int
    _also: Hold | None = None

    def release(self) -> None:
        """Give them back; once."""
        count, self._count = self._count, 0
        if count:
            self._reserve._give_back(count)
            if self._also is not None:
                self._also.release()


class ImageWork:
    """Runs decodes in threads.

    Args:
        threads: decodes at once; more than there are cores only makes each slower.
        arriving: decodes at once of images whose bytes still arrive. They mostly wait, so there may be more of them.
        memory_bytes: bound on what all decodes and kept pixels take.
        arrivals_share: of it, 0 to 1, the most that images take whose bytes still arrive.
        wait_seconds: longest wait for memory.
        decode_seconds: longest decode.
        limits: what an image may be like.
    """

    def __init__(
        self,
        *,
        threads: int,
        arriving: int = 0,
        memory_bytes: int = MEMORY_BYTES,
        arrivals_share: float = ARRIVALS_SHARE,
        wait_seconds: float = WAIT_SECONDS,
        decode_seconds: float = DECODE_SECONDS,
        limits: Limits = Limits(),
    ) -> None:
        self.limits = limits
        self.memory = Reserve(memory_bytes)
        self.busy = 0
        """Threads that have work."""
        self.most_busy = threads + arriving
        self._wait_seconds = wait_seconds
        self._decode_seconds = decode_seconds
        self._threads = ThreadPoolExecutor(threads, "decode")
        self._arrivals_left = arriving
        self._arrivals = ThreadPoolExecutor(max(1, arriving), "arrive")
        self._arrivals_memory = Reserve(int(memory_bytes * arrivals_share))

    async def reserve(self, count: int) -> Hold:
        """Reserve memory; see `Reserve.take`."""
        return await self.memory.take(count, self._wait_seconds)

    def reserve_for_arrival(self, count: int) -> Hold | None:
        """Reserve memory for an image that still arrives, if that is possible at once; it never stands in line before others."""
        share = self._arrivals_memory.try_take(count)
        if share is None:
            return None
        hold = self.memory.try_take(count)
        if hold is None:
            share.release()
            return None
        return Hold(self.memory, count, share)

    @contextlib.contextmanager
    def arrival(self) -> Iterator[ThreadPoolExecutor | None]:
        """Lend the threads for an image that still arrives; None where too many are arriving already."""
        if not self._arrivals_left:
            yield None
            return
        self._arrivals_left -= 1
        try:
            yield self._arrivals
        finally:
            self._arrivals_left += 1

    async def run(
        self,
        work: Callable[[Stop], T],
        hold: Hold | None = None,
        *,
        keep: bool = False,
        threads: ThreadPoolExecutor | None = None,
    ) -> T:
        """Run one piece of work in a thread. Cancelling the caller stops it.

        Args:
            work: called in a thread with what it must obey.
            hold: the memory it takes; given back when the thread has ended.
            keep: leave ``hold`` to the caller, who keeps the result; where there is no result it is given back all the same.
            threads: those of `arrival`, for an image that still arrives.

        Raises:
            ImageTooSlow: it took longer than it may.
        """
        loop = asyncio.get_running_loop()
        stop = Stop(self._decode_seconds)
        abandoned = False

        # Neither names `job`, which keeps its callbacks: a ring of references would keep its pixels until Python looks for rings.
        def ended(done: Future[T]) -> None:
            self.busy -= 1
            if hold is not None and (not keep or abandoned or done.cancelled() or done.exception()):
                hold.release()

        def tell(done: Future[T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: there is nobody left to count for
                loop.call_soon_threadsafe(ended, done)

        job = (threads or self._threads).submit(work, stop)
        self.busy += 1
        job.add_done_callback(tell)
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            abandoned = True
            stop.cancel()
            if job.done() and hold is not None:  # its result came too late to be kept
                hold.release()
            raise

    def close(self) -> None:
        """Let the threads go when their work is done."""
        for pool in (self._threads, self._arrivals):
            pool.shutdown(wait=False, cancel_futures=True)
