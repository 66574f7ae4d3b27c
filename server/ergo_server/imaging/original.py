"""The image of a question on its way through a request: its file, its header, and the views that were made of it.

The overview of an image that still arrives is made while it arrives, so that it is there when the last byte is. Formats that
are dear to decode again are decoded as a whole, if there is memory to spare: at once where the overview takes as much, else
while the engine is busy with the zoom turn. Of a plain JPEG the crop is decoded from the file once the box is known, down to
its lower edge.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

from ergo_server.imaging import decode, view
from ergo_server.imaging.file import ImageFile
from ergo_server.imaging.geometry import Box, PixelBudget
from ergo_server.imaging.header import ImageHeader, read_header
from ergo_server.imaging.view import View
from ergo_server.imaging.work import Hold, ImageWork

ImageSource = Literal["body", "json", "stored", "remote"]
"""How an image came: as bytes of the body, in base64 within JSON, as an upload's id, by its address."""


class Original:
    """One image. Belongs to one event loop; close it.

    Args:
        file: the encoded bytes, whole or still arriving.
        work: where it is decoded.
        source: how it came.
    """

    def __init__(self, file: ImageFile, work: ImageWork, source: ImageSource = "body") -> None:
        self.file = file
        self.source: ImageSource = source
        self.load_seconds = 0.0
        """What decoding it as a whole took; 0 where that was not done."""
        self.load_started = 0.0
        """When that began, on the clock of `time.perf_counter`."""
        self._work = work
        self._header: ImageHeader | None = None
        self._views: dict[PixelBudget, View] = {}
        self._arriving: asyncio.Task[None] | None = None
        self._loading: asyncio.Task[decode.Pixels] | None = None
        self._kept: Hold | None = None

    @property
    def stored_bytes(self) -> int:
        """What keeping it takes: the file, and the views made so far."""
        return self.file.size + sum(len(seen.data) for seen in self._views.values())

    def again(self) -> Original:
        """Return the same image for another request, with the views made so far; what that one makes and holds is its own."""
        other = Original(self.file, self._work, "stored")
        other._header, other._views = self._header, dict(self._views)
        return other

    def expect(self, budget: PixelBudget) -> None:
        """Make the overview while the bytes arrive, unless too many images are arriving already, or hold too much memory."""
        self._arriving = asyncio.create_task(self._arrive(budget))

    def check(self) -> None:
        """Raise what is known to be wrong with an image of which more is still to come.

        Raises:
            ErgoError: as `header` and `overview`.
        """
        if self._arriving is not None and self._arriving.done():
            self._arriving.result()

    async def header(self) -> ImageHeader:
        """Return what the header alone says.

        Raises:
            ImageError: the bytes are no image, or none that is let in.
        """
        if self._arriving is not None:
            await self._arriving
        if self._header is None:
            self._header = await self._work.run(partial(read_header, self.file, self._work.limits))
        return self._header

    async def overview(self, budget: PixelBudget) -> View:
        """Return the whole image within the budget.

        Raises:
            ImageError: the image cannot be decoded.
            Overloaded: there was no memory for it in time.
        """
        header = await self.header()
        if budget not in self._views:
            self._views[budget] = await self._look(header, budget)
        return self._views[budget]

    async def prepare(self) -> None:
        """Begin to decode it as a whole, where that is worth it and there is memory to spare."""
        header = await self.header()
        if decode.keeps(header):
            self._load_if_possible(header)

    async def crop(self, region: Box, budget: PixelBudget) -> View:
        """Return a region, in upright pixels of the image, within the budget.

        Raises:
            ImageError: the image cannot be decoded.
            Overloaded: there was no memory for it in time.
        """
        header = await self.header()
        if self._loading is not None:
            pixels = await self._loading
            return await self._work.run(partial(view.crop, pixels, header, region, budget))
        hold = await self._work.reserve(header.working_bytes)
        return await self._work.run(partial(view.crop, self.file, header, region, budget), hold)

    async def release(self) -> None:
        """Let go of the pixels: nothing more is cropped."""
        loading, self._loading = self._loading, None
        await _end(loading)
        if self._kept is not None:
            self._kept.release()
            self._kept = None

    async def aclose(self) -> None:
        """End what is being done with it, and give back what is held."""
        await _end(self._arriving)
        await self.release()

    async def _arrive(self, budget: PixelBudget) -> None:
        with self._work.arrival() as threads:
            if threads is None:
                return
            header = await self._work.run(partial(read_header, self.file, self._work.limits), threads=threads)
            reduces = decode.reduces(header)
            hold = self._work.reserve_for_arrival(header.working_bytes if reduces else header.load_bytes)
            if hold is not None and not reduces:
                self._loading = asyncio.create_task(self._load(header, hold, threads))
                self._views[budget] = await self._overview(await self._loading, header, budget, None, threads)
            elif hold is not None:
                self._views[budget] = await self._overview(self.file, header, budget, hold, threads)
            self._header = header

    async def _look(self, header: ImageHeader, budget: PixelBudget) -> View:
        """Make the overview; from all pixels, which are then kept, where that takes no longer."""
        if not decode.reduces(header):
            self._load_if_possible(header)
            if self._loading is not None:
                return await self._overview(await self._loading, header, budget)
        return await self._overview(self.file, header, budget, await self._work.reserve(header.working_bytes))

    async def _overview(
        self,
        source: ImageFile | decode.Pixels,
        header: ImageHeader,
        budget: PixelBudget,
        hold: Hold | None = None,
        threads: ThreadPoolExecutor | None = None,
    ) -> View:
        return await self._work.run(partial(view.overview, source, header, budget), hold, threads=threads)

    def _load_if_possible(self, header: ImageHeader) -> None:
        """Begin to decode it as a whole, unless that has begun or there is no memory to spare."""
        if self._loading is None and (hold := self._work.memory.try_take(header.load_bytes)):
            self._loading = asyncio.create_task(self._load(header, hold))

    async def _load(self, header: ImageHeader, hold: Hold, threads: ThreadPoolExecutor | None = None) -> decode.Pixels:
        started = time.perf_counter()
        pixels = await self._work.run(partial(decode.load, self.file, header), hold, keep=True, threads=threads)
        self._kept = hold
        self.load_started, self.load_seconds = started, time.perf_counter() - started
        return pixels


async def _end(task: asyncio.Task[object] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # whoever wanted the result was told
