"""Bytes to pixels, with libvips: only as many as are needed, row by row where the format allows it.

What comes out is defined for every kind of file that is let in:

    ==================  ================================================================================================
    orientation         EXIF's eight orientations; every coordinate outside of this file is in the upright frame
    alpha, tRNS         composited on white before anything is resized (a hidden colour is never seen)
    palette, 1 bit      expanded before anything is resized
    16 bit              scaled to 8 bit, not truncated
    CMYK, ICC profile   kept until the view is made, and converted to sRGB there
    animation           the first frame
    ==================  ================================================================================================

A JPEG is decoded at a half, a quarter or an eighth of its size (DCT scaling, libjpeg) as long as that leaves twice what is
wanted: 52 dB on photographs against a full decode, where leaving once as much gives 44 (research of this project). A WebP
likewise. The loaders that take a *source* do not copy the file, nor hold Python's lock while they do.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyvips
from PIL import Image
from pyvips import voperation

from ergo_server.errors import ErgoError, ImageUnreadable
from ergo_server.imaging.file import Cancelled, ImageFile, Stop
from ergo_server.imaging.geometry import Box, Size
from ergo_server.imaging.header import ImageHeader
from ergo_server.imaging.layout import WHOLE, Piece, Scans

Kernel = Literal["cubic", "lanczos3"]

ENOUGH = 2
"""A reduced decode leaves at least so many times the size that is wanted, on both axes."""

_PILLOW = {"cubic": Image.Resampling.BICUBIC, "lanczos3": Image.Resampling.LANCZOS}

# Settings of the library for the whole process: one thread an operation, as there are as many operations at a time as cores; no
# cache of operations, which would keep strangers' pixels; and only the loaders that are named here, as most others are old code.
voperation.concurrency_set(1)
pyvips.cache_set_max(0)
for _kind, _blocked in (
    ("VipsForeignLoad", True),
    *((f"VipsForeignLoad{name}", False) for name in ("Jpeg", "Png", "Webp", "Nsgif")),
):
    pyvips.operation_block_set(_kind, _blocked)
logging.getLogger("pyvips").setLevel(logging.ERROR)  # below, it writes every call, and many lines for each broken file
logging.getLogger("PIL").setLevel(logging.INFO)  # below, it writes the values of EXIF tags


_MODES: dict[int, Literal["L", "RGB", "CMYK"]] = {1: "L", 3: "RGB", 4: "CMYK"}
"""By the number of bands."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """All pixels of an image as they stand in the file: 8 bit; L, RGB or CMYK. Decoded already, or when they are asked for."""

    image: pyvips.Image
    profile: bytes | None


@dataclass(frozen=True, slots=True)
class Cut:
    """A part of an image, resized; not upright yet, in the colours of its profile."""

    pixels: Any
    """A buffer, row by row, 8 bit."""
    size: Size
    mode: Literal["L", "RGB", "CMYK"]
    profile: bytes | None

    @property
    def image(self) -> Image.Image:
        """The same as an image, not copied."""
        return Image.frombuffer(self.mode, self.size, self.pixels, "raw", self.mode, 0, 1)


def keeps(header: ImageHeader) -> bool:
    """Say whether decoding the image as a whole, to keep it, is cheaper than decoding a part of it later.

    A JPEG that is written by the row is decoded again from its file: down to the part's lower edge, at reduced size, in 3 % of
    the memory. All others take as long for a part as for the whole.
    """
    return not (header.format == "jpeg" and header.by_row)


def reduces(header: ImageHeader) -> bool:
    """Say whether a small view takes less decoding than all pixels do. Where it does not, one decode serves all views."""
    return header.format in ("jpeg", "webp")


def load(file: ImageFile, header: ImageHeader, stop: Stop) -> Pixels:
    """Decode all pixels.

    Raises:
        ImageUnreadable: the file is truncated or corrupt.
        ImageTooLarge: a progressive JPEG has too many scans.
        ImageTooSlow, Cancelled: see `Stop`.
    """
    with _opened(file, header, 1, stop) as opened:
        image = opened.image
        pixels = _evaluated(image, stop)
        kept = pyvips.Image.new_from_memory(pixels, image.width, image.height, image.bands, "uchar")
        return Pixels(kept.copy(interpretation=image.interpretation), opened.profile)


def cut(source: ImageFile | Pixels, header: ImageHeader, box: Box, size: Size, kernel: Kernel, stop: Stop) -> Cut:
    """Cut a part out of an image and resize it.

    Args:
        source: the file, whole or still arriving, or its pixels.
        header: of the file.
        box: the part, in the frame of the file: before the image is turned upright; inside the image.
        size: of the result, in the same frame.
        kernel: of the resizing; antialiased.
        stop: what ends the work early.

    Raises:
        ImageUnreadable, ImageTooLarge, ImageTooSlow, Cancelled: as `load`.
    """
    if isinstance(source, Pixels):
        return _resized(source, header.stored, box, size, kernel, stop)
    with _opened(source, header, _reduction(header, box.size, size), stop) as opened:
        return _resized(opened, header.stored, box, size, kernel, stop)


def _reduction(header: ImageHeader, part: Size, size: Size) -> int:
    """How many times smaller the file may be decoded."""
    allowed = {"jpeg": (8, 4, 2), "webp": (8, 7, 6, 5, 4, 3, 2)}.get(header.format, ())
    return next((k for k in allowed if all(have >= k * ENOUGH * want for have, want in zip(part, size, strict=True))), 1)


def _resized(source: Pixels, stored: Size, box: Box, size: Size, kernel: Kernel, stop: Stop) -> Cut:
    """Cut ``box``, given in pixels of the full size, out of an image that may be decoded smaller, and resize it."""
    image = source.image
    across, down = image.width / stored.width, image.height / stored.height
    left, top, right, bottom = box.x1 * across, box.y1 * down, box.x2 * across, box.y2 * down
    x, y = int(left), int(top)
    width, height = min(image.width, -int(-right // 1)) - x, min(image.height, -int(-bottom // 1)) - y
    whole = (left, top, right - left, bottom - top) == (x, y, width, height)
    if (width, height) != (image.width, image.height):
        image = image.crop(x, y, width, height)
    if whole and width >= size.width and height >= size.height:
        image = image.resize(size.width / width, vscale=size.height / height, kernel=kernel, gap=0)
        return _cut(image, source.profile, stop)
    # libvips shifts what it enlarges by part of a pixel (38 to 42 dB), and knows no fractions of a pixel; Pillow does better.
    edges = (left - x, top - y, min(width, right - x), min(height, bottom - y))
    near = _cut(image, source.profile, stop)
    resized = near.image.resize(size, _PILLOW[kernel], box=edges)
    return Cut(resized.tobytes(), size, near.mode, near.profile)


def _cut(image: pyvips.Image, profile: bytes | None, stop: Stop) -> Cut:
    return Cut(_evaluated(image, stop), Size(image.width, image.height), _MODES[image.bands], profile)


def _evaluated(image: pyvips.Image, stop: Stop) -> Any:
    """Have the pixels made: until here nothing was decoded but the header. Returns a buffer."""

    def step(running: pyvips.Image, progress: object) -> None:
        if stop.over:
            running.set_kill(True)

    image.set_progress(True)
    image.signal_connect("eval", step)
    return image.write_to_memory()


@contextlib.contextmanager
def _opened(file: ImageFile, header: ImageHeader, reduction: int, stop: Stop) -> Iterator[Pixels]:
    """Open a file; what goes wrong within is an `ErgoError`."""
    feed = _Feed(file, Scans(file, header.max_scans) if _has_scans(header) else None, stop)
    try:
        stop.check()
        image = _bmp(file, stop) if header.format == "bmp" else _loaded(file, header, reduction, feed, stop)
        has_profile = image.get_typeof("icc-profile-data") != 0
        yield Pixels(_plain(image), bytes(image.get("icc-profile-data")) if has_profile else None)
    except (ErgoError, Cancelled):
        raise
    except Exception as error:  # libvips has one exception for all, Pillow any; what ended the decode is known elsewhere
        stop.check()
        raise feed.failure or ImageUnreadable("the image is truncated or corrupt", param="image") from error
    finally:
        feed.close()


def _has_scans(header: ImageHeader) -> bool:
    """Say whether it is a JPEG of several scans."""
    return header.format == "jpeg" and not header.by_row


def _loaded(file: ImageFile, header: ImageHeader, reduction: int, feed: _Feed, stop: Stop) -> pyvips.Image:
    options: dict[str, Any] = {"access": "sequential", "fail_on": "truncated"}
    if header.pieces != WHOLE:
        file.wait(stop)
        source = feed.source_of(b"".join(_piece(file, piece) for piece in header.pieces))
    elif file.whole and not _has_scans(header):
        source = feed.source_of(file.data)
    else:  # one of our own, which can be cut off in the middle; nothing else ends the start of a JPEG of several scans
        source = feed.source()
    stored = header.stored
    if header.format == "jpeg":
        image = pyvips.Image.jpegload_source(source, shrink=reduction, **options)
        expected = Size(stored.width // reduction, stored.height // reduction)
    elif header.format == "webp":
        image = pyvips.Image.webpload_source(source, scale=1 / reduction, **options)
        expected = Size(round(stored.width / reduction), round(stored.height / reduction))
    else:
        load = {"png": pyvips.Image.pngload_source, "gif": pyvips.Image.gifload_source}[header.format]
        image, expected = load(source, **options), stored
    if abs(image.width - expected.width) > (reduction > 1) or abs(image.height - expected.height) > (reduction > 1):
        raise ImageUnreadable("the image is larger than its header says", param="image")
    return image


def _piece(file: ImageFile, piece: Piece) -> bytes:
    return piece if isinstance(piece, bytes) else file.data[piece[0] : piece[1]]


def _bmp(file: ImageFile, stop: Stop) -> pyvips.Image:
    """Decode a BMP, which libvips does not read here, with Pillow."""
    file.wait(stop)
    with Image.open(io.BytesIO(file.data), formats=["BMP"]) as opened:
        opened.load()
        image = opened if opened.mode in ("L", "RGB") else opened.convert("L" if opened.mode == "1" else "RGB")
    return pyvips.Image.new_from_memory(image.tobytes(), image.width, image.height, len(image.getbands()), "uchar")


def _plain(image: pyvips.Image) -> pyvips.Image:
    """Put white behind transparency and scale 16 bit, before anything is resized."""
    largest = 65535 if image.format == "ushort" else 255
    if image.hasalpha():
        image = image.flatten(background=[largest] * (image.bands - 1))
    if largest != 255:
        image = image.linear(1 / 257, 0.5, uchar=True)  # 65535 = 255 × 257; rounded, as uchar truncates
    if image.format != "uchar" or image.bands not in (1, 3, 4) or (image.bands == 4) != (image.interpretation == "cmyk"):
        raise ImageUnreadable("the image has pixels of a kind that is not read", param="image")
    return image


class _Feed:
    """Gives libvips the bytes of a file as they arrive, and no more once the decode must end or has had enough scans."""

    def __init__(self, file: ImageFile, scans: Scans | None, stop: Stop) -> None:
        self.failure: ErgoError | None = None
        """Why it gave no more."""
        self._file = file
        self._stop = stop
        self._scans = scans
        self._at = 0
        self._lent: object = None
        """libvips reads from it, and does not keep it alive."""

    def source(self) -> pyvips.Source:
        """Return the file as it arrives."""
        source = pyvips.SourceCustom()
        source.on_read(self._read)
        self._lent = source
        return source

    def source_of(self, data: bytes) -> pyvips.Source:
        """Return bytes that are there, not copied."""
        self._lent = data
        return pyvips.Source.new_from_memory(data)

    def close(self) -> None:
        """Let go."""
        self._lent = None

    def _read(self, count: int) -> bytes:
        """Called by libvips; an exception would be lost on the way through C, so the end of the file stands for it."""
        if self.failure is not None:
            return b""
        try:
            piece = self._file.read_at(self._at, count, self._stop)
            self._at += len(piece)
            if self._scans is not None:
                self._scans.check(self._at)
        except (ErgoError, Cancelled) as error:
            self.failure = error if isinstance(error, ErgoError) else None
            return b""
        return piece
