"""The encoded bytes of an image, whole or still arriving, and what ends a decode of them early."""

from __future__ import annotations

import threading
import time
from bisect import bisect_right

from ergo_server.errors import ErgoError, ImageTooSlow, ImageUnreadable

CHUNK_BYTES = 64 * 1024
"""What comes in smaller pieces is put together up to here: three million pieces of one byte took 46 bytes each."""


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
        self._chunks: list[bytes | bytearray] = []
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
            whole = bytes(self._chunks[0])  # no copy, unless it came in small pieces
            self._chunks[0] = whole
            return whole

    def write(self, chunk: bytes) -> None:
        """Add what has arrived."""
        with self._arrival:
            last = self._chunks[-1] if self._chunks else b""
            if isinstance(last, bytearray) and len(last) + len(chunk) <= CHUNK_BYTES:
                last += chunk
            else:
                self._starts.append(self.size)
                self._chunks.append(chunk if len(chunk) > CHUNK_BYTES // 4 else bytearray(chunk))
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
            at = offset - self._starts[number]
            return bytes(self._chunks[number][at : at + count])

    def view(self, start: int, end: int) -> bytes:
        """Return bytes that are there already."""
        pieces = []
        with self._arrival:
            while start < min(end, self.size):
                number = bisect_right(self._starts, start) - 1
                at = start - self._starts[number]
                pieces.append(self._chunks[number][at : at + end - start])
                start += len(pieces[-1])
        return b"".join(pieces)

    def wait(self, stop: Stop, count: int | None = None) -> int:
        """Wait until ``count`` bytes are there, or all; return how many are. Raises as `read_at`."""
        with self._arrival:
            while not self.whole and (count is None or self.size < count):
                if self._failure is not None:
                    raise self._failure
                stop.check()
                stop.wait(self._arrival)
            return self.size


class Cursor:
    """Reads through a file from its beginning, waiting for what has not arrived.

    Args:
        file: what is read.
        stop: what ends the reading early.
    """

    def __init__(self, file: ImageFile, stop: Stop) -> None:
        self.position = 0
        self._file = file
        self._stop = stop

    def take(self, count: int) -> bytes:
        """Return the next ``count`` bytes.

        Raises:
            ImageUnreadable: the file ends before.
        """
        end = self.position + count
        if self._file.wait(self._stop, end) < end:
            raise ImageUnreadable("the image is truncated or corrupt", param="image")
        taken = self._file.view(self.position, end)
        self.position = end
        return taken

    def skip(self, count: int) -> None:
        """Leave ``count`` bytes out, whether they are there or not."""
        self.position += count
