"""The encoded bytes of an image, whole or still arriving, and what ends a decode of them early."""

from __future__ import annotations

import io
import threading
import time
from bisect import bisect_right

from ergo_server.errors import ErgoError, ImageTooSlow


class Cancelled(Exception):
    """The decode is not wanted any more. Never seen outside the threads of `ImageWork`: nobody waits for its result."""


class Stop:
    """Tells a decode when to end. Made in one thread, obeyed in another.

    Args:
        seconds: how long the decode may take. Waiting for bytes that have not arrived yet is not counted: whoever sends them
            slowly is cut off elsewhere.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.cancelled = False
        self._end = time.monotonic() + seconds
        self._waiting: threading.Condition | None = None

    @property
    def over(self) -> bool:
        """Whether the decode must end."""
        return self.cancelled or time.monotonic() > self._end

    def check(self) -> None:
        """Raise if the decode must end.

        Raises:
            ImageTooSlow: it took too long.
            Cancelled: it is not wanted any more.
        """
        if self.cancelled:
            raise Cancelled
        if time.monotonic() > self._end:
            raise ImageTooSlow(f"decoding the image took longer than {self.seconds:g} s", param="image")

    def cancel(self) -> None:
        """End the decode. It notices at its next step, and at once if it waits for bytes."""
        self.cancelled = True
        if (waiting := self._waiting) is not None:
            with waiting:
                waiting.notify_all()

    def wait(self, arrival: threading.Condition) -> None:
        """Wait for bytes, holding ``arrival``."""
        self._waiting = arrival
        started = time.monotonic()
        try:
            if not self.cancelled:  # set before `_waiting` was: the one who set it could not notify
                arrival.wait()
        finally:
            self._waiting = None
            self._end += time.monotonic() - started


class ImageFile:
    """Encoded bytes. Written in the event loop, which never waits; read in threads, which wait for what has not arrived."""

    def __init__(self) -> None:
        self.size = 0
        self.whole = False
        """Whether all bytes are there."""
        self._arrival = threading.Condition()
        self._chunks: list[bytes] = []
        self._starts: list[int] = []
        self._failure: ErgoError | None = None

    @classmethod
    def of(cls, data: bytes) -> ImageFile:
        """Return a file all of whose bytes are there; they are not copied."""
        file = cls()
        file.write(data)
        file.end()
        return file

    @property
    def data(self) -> bytes:
        """All bytes, once they are there."""
        with self._arrival:
            assert self.whole
            if len(self._chunks) != 1:
                self._chunks, self._starts = [b"".join(self._chunks)], [0]
            return self._chunks[0]

    def write(self, chunk: bytes) -> None:
        """Add what has arrived."""
        with self._arrival:
            self._starts.append(self.size)
            self._chunks.append(chunk)
            self.size += len(chunk)
            self._arrival.notify_all()

    def end(self) -> None:
        """Say that nothing more will arrive."""
        with self._arrival:
            self.whole = True
            self._arrival.notify_all()

    def fail(self, error: ErgoError) -> None:
        """Say that the rest will not arrive; readers that need it raise ``error``."""
        with self._arrival:
            self._failure = error
            self._arrival.notify_all()

    def read_at(self, offset: int, count: int, stop: Stop) -> bytes:
        """Return up to ``count`` bytes from ``offset`` on; none at the end. Waits until there are some.

        Raises:
            ImageTooSlow, Cancelled: see `Stop.check`.
            ErgoError: that of `fail`.
        """
        with self._arrival:
            while self.size <= offset and not self.whole:
                if self._failure is not None:
                    raise self._failure
                stop.check()
                stop.wait(self._arrival)
            stop.check()
            if self.size <= offset:
                return b""
            number = bisect_right(self._starts, offset) - 1
            chunk, at = self._chunks[number], offset - self._starts[number]
        return chunk[at : at + count]

    def wait(self, stop: Stop) -> None:
        """Wait until all bytes are there. Raises as `read_at`."""
        with self._arrival:
            while not self.whole:
                if self._failure is not None:
                    raise self._failure
                stop.check()
                stop.wait(self._arrival)


class Reader:
    """A file object over an `ImageFile`: what Pillow needs of one.

    Args:
        file: what is read.
        stop: what ends the reading early.
        limit: bytes after which it ends with `io.UnsupportedOperation`; None: no limit.
    """

    def __init__(self, file: ImageFile, stop: Stop, limit: int | None = None) -> None:
        self.limited = False
        """Whether more was wanted than ``limit``."""
        self._file = file
        self._stop = stop
        self._limit = limit
        self._at = 0

    def read(self, count: int = -1) -> bytes:
        """Read ``count`` bytes, or to the end."""
        if count < 0:
            self._file.wait(self._stop)
            count = max(0, self._file.size - self._at)
        if self._limit is not None and self._at + count > self._limit and self._at < self._file.size:
            self.limited = True
            raise io.UnsupportedOperation("more than may be read")
        pieces = []
        while count > 0 and (piece := self._file.read_at(self._at, count, self._stop)):
            pieces.append(piece)
            self._at += len(piece)
            count -= len(piece)
        return b"".join(pieces)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; from the end only once the end is there."""
        if whence == io.SEEK_END:
            self._file.wait(self._stop)
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence])
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at
