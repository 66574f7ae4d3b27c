"""From what a request says of an image to the image: sent bytes, base64, an uploaded image's id, an address."""

from __future__ import annotations

import asyncio
import re
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pybase64

from ergo_server.errors import ImageUnreadable, RequestError
from ergo_server.imaging.file import ImageFile
from ergo_server.imaging.geometry import PixelBudget
from ergo_server.imaging.original import ImageSource, Original
from ergo_server.imaging.work import ImageWork
from ergo_server.intake.fetch import Fetcher
from ergo_server.intake.store import ImageStore

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,15}:")
"""Begins like a URL; which of them are fetched is for the fetcher to say."""


@dataclass(frozen=True, slots=True)
class Arriving:
    """An image whose bytes are still coming in. Takes them, and refuses as soon as it is known that they are no use."""

    original: Original

    def write(self, chunk: bytes) -> None:
        """Take some more.

        Raises:
            ImageError: what came so far is no image, or none that is let in.
        """
        self.original.file.write(chunk)
        self.original.check()

    def end(self) -> None:
        """There are no more."""
        self.original.file.end()


@dataclass(frozen=True, slots=True)
class Images:
    """Where the images of one request come from.

    Args:
        work: where they are decoded.
        store: uploaded images.
        fetcher: remote images.
        tenant: who asks.
        closing: closes what is opened here when the request is over.
    """

    work: ImageWork
    store: ImageStore
    fetcher: Fetcher
    tenant: str
    closing: AsyncExitStack

    def arriving(self, budget: PixelBudget | None, source: ImageSource = "body") -> Arriving:
        """Open an image whose bytes are about to come; its overview is made meanwhile, if a budget is given."""
        original = self._opened(ImageFile(), source)
        if budget is not None:
            original.expect(budget)
        return Arriving(original)

    def whole(self, data: bytes) -> Original:
        """Open an image of which all bytes are there: decoded from JSON."""
        return self._opened(ImageFile.of(data), "json")

    async def named(self, image: object, *, budget: PixelBudget | None = None, fetch: bool = True) -> Original:
        """Find the image that a JSON body names: a ``data:`` URL, ``{"data": base64}``, ``img_…``, or an address.

        Args:
            image: what the body says.
            budget: for the overview of a remote image, made while it arrives.
            fetch: whether an address may be asked.

        Raises:
            ImageUnreadable: the base64 is broken.
            UnknownImage: no uploaded image of that id.
            ImageNotFetched: the remote image could not, or may not, be fetched.
            RequestError: none of these.
        """
        if isinstance(image, dict) and isinstance(image.get("data"), str):
            return self.whole(await asyncio.to_thread(_decode_base64, image["data"]))
        if isinstance(image, str):
            if image[:5].lower() == "data:":
                head, comma, data = image[5:].partition(",")
                if not comma or not head.lower().endswith(";base64"):
                    raise ImageUnreadable("a data: URL of an image must be base64", param="image")
                return self.whole(await asyncio.to_thread(_decode_base64, data))
            if image.startswith("img_"):
                return self._closed(self.store.get(self.tenant, image).original.again())
            if _ADDRESS.match(image):
                if not fetch:
                    raise RequestError("no remote image is fetched here; send the bytes, or a data: URL", param="image")
                arriving = self.arriving(budget, "remote")
                await self.fetcher.fetch(image, arriving.write)
                arriving.end()
                return arriving.original
        forms = 'a data: URL, {"data": base64}, the id of an uploaded image, an address, or an uploaded file'
        raise RequestError(f"the image must be {forms}", param="image")

    def _opened(self, file: ImageFile, source: ImageSource) -> Original:
        return self._closed(Original(file, self.work, source))

    def _closed(self, original: Original) -> Original:
        self.closing.push_async_callback(original.aclose)
        return original


def _decode_base64(data: str) -> bytes:
    try:
        # The plain alphabet is the fast path; what is left of line breaks, which RFC 2045 allows, takes a second attempt.
        return pybase64.b64decode(data, validate=True)
    except ValueError:
        pass
    try:
        return pybase64.b64decode("".join(data.split()), validate=True)
    except ValueError as error:
        raise ImageUnreadable("the image is not valid base64", param="image") from error
