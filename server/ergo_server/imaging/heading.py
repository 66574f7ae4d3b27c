"""What the header of an image says, and what is refused for it: before a single pixel is decoded.

Pillow reads the headers of JPEG, PNG, GIF and BMP. Not those of WebP: its decoder makes room for the whole canvas when it opens
a file, 2 GiB for the largest; the few bytes that matter are read here (RFC 9649).

What a file can do to its decoder beside being large, and what bounds it (each seen on the libraries used here):

    ==========================  ========================================================================================
    scans of a progressive      883 of them in 39 KB took 3 s: their number is limited; so is the time
    JPEG
    frames of an animated WebP  100,000 of them in 5.6 MB took 87 s to find the first: their number is limited
    GIF frame beyond its        20,000 × 20,000 pixels behind a header of 10 × 10 took 1.4 GB: sizes are compared before
    canvas                      pixels are read
    compressed text, profiles   Pillow's bounds of 1 MB a text and 64 MB in all; nothing before the pixels is longer than
                                `Limits.max_metadata_bytes`
    interlaced PNG,             cannot be decoded row by row: the whole is reserved
    progressive JPEG, GIF,
    lossless WebP
    ==========================  ========================================================================================
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, cast

from PIL import Image

from ergo_server.errors import ErgoError, ImageAspect, ImageTooLarge, ImageUnreadable, ImageUnsupported
from ergo_server.imaging.encoded import Cancelled, ImageFile, Reader, Stop
from ergo_server.imaging.geometry import MAX_ASPECT, Size

MAX_PIXELS = 128_000_000
"""Largest image: the 108-megapixel photographs of telephones fit."""

MAX_SCANS = 64
"""Of a progressive JPEG. Encoders write about ten; each reads the whole image again."""

MAX_FRAMES = 1000
"""Of an animated WebP: 10 ms; the time grows with the square of their number."""

MAX_METADATA_BYTES = 16 << 20
"""Before the pixels: EXIF with a preview, XMP, profiles. The longest that cameras write have a few megabytes."""

FORMATS = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
"""Formats that are let in, by Pillow's names. Pillow knows some forty; most are old code that nobody's camera writes."""

SNIFF_BYTES = 512
"""Enough for the first bytes of every format, and for the beginning of an SVG."""

BASE_BYTES = 24 << 20
"""What any decode takes beside pixels: buffers of some rows, the view, its encoded form (15 MiB seen at 108 megapixels)."""

ROWS = 512
"""Rows that libvips keeps at most of an image that it reads in sequence."""

_ORIENTATION_TAG = 0x0112

# Pillow's own bomb check warns above 89 MP and raises above 179 MP, whatever the settings say. Ours is made from the same header
# right after, with a message that names the limit.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What an image may be like."""

    max_pixels: int = MAX_PIXELS
    max_scans: int = MAX_SCANS
    max_frames: int = MAX_FRAMES
    max_metadata_bytes: int = MAX_METADATA_BYTES


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the header alone says of an image."""

    size: Size
    """Upright width and height."""
    format: str
    """jpeg, png, webp, gif or bmp; found from the bytes, whatever the sender called them."""
    orientation: int
    """EXIF orientation, 1 to 8."""
    animated: bool
    """There are more frames than the first, which alone is looked at."""
    by_row: bool
    """It can be decoded from top to bottom; not progressive, not interlaced, not of a format that needs the whole."""
    working_bytes: int
    """Upper bound of the memory that a decode into a view takes, beside the file itself."""
    pixel_bytes: int
    """What all its pixels take, 8 bit each."""
    max_scans: int
    """Scans after which the decoder is given no more of a progressive JPEG."""

    @property
    def stored(self) -> Size:
        """Width and height as the pixels stand in the file, before they are turned upright."""
        return self.size if self.orientation < 5 else Size(*self.size[::-1])


@dataclass(frozen=True, slots=True)
class _Found:
    """What a format's own reader has found."""

    format: str
    width: int
    height: int
    exif: bytes
    animated: bool
    by_row: bool
    channels: float
    """Bytes of a decoded pixel."""
    share: float
    """Bytes a pixel that the decoder needs beside rows: coefficients of a progressive JPEG, the whole of an interlaced PNG."""


def read_header(file: ImageFile, limits: Limits, stop: Stop) -> ImageHeader:
    """Read what the header says, waiting until enough of it has arrived. No pixels are decoded.

    Raises:
        ImageUnreadable: the bytes are no image, or the header is broken.
        ImageUnsupported: an image of a format outside `FORMATS`.
        ImageTooLarge: more pixels, scans, frames or metadata than allowed.
        ImageAspect: an aspect ratio above 200.
        ImageTooSlow, Cancelled: see `Stop`.
    """
    start = Reader(file, stop).read(SNIFF_BYTES)
    found = _webp(file, limits, stop) if start[:4] == b"RIFF" and start[8:12] == b"WEBP" else _opened(file, start, limits, stop)
    width, height = found.width, found.height
    if width * height > limits.max_pixels:
        message = f"the image has {width} x {height} pixels; the limit is {limits.max_pixels:,} in all"
        raise ImageTooLarge(message, param="image")
    if min(width, height) < 1:
        raise ImageUnreadable("the image has no pixels", param="image")
    if Size(width, height).aspect > MAX_ASPECT:
        raise ImageAspect(
            f"the image is {width} x {height} pixels; the longer side may be at most {MAX_ASPECT} times the shorter",
            param="image",
        )
    orientation = _orientation(found.exif)
    pixels = width * height
    return ImageHeader(
        size=Size(width, height) if orientation < 5 else Size(height, width),
        format=found.format,
        orientation=orientation,
        animated=found.animated,
        by_row=found.by_row,
        working_bytes=round(BASE_BYTES + ROWS * width * found.channels + pixels * found.share),
        pixel_bytes=round(pixels * found.channels),
        max_scans=limits.max_scans,
    )


def _opened(file: ImageFile, start: bytes, limits: Limits, stop: Stop) -> _Found:
    """Read a header with Pillow."""
    reader = Reader(file, stop, limits.max_metadata_bytes)
    try:
        with Image.open(cast(IO[bytes], reader), formats=[name for name in FORMATS if name not in ("MPO", "WEBP")]) as image:
            return _found(image, start)
    except (ErgoError, Cancelled):
        raise
    except Exception as error:  # decoders of hostile bytes raise anything: OSError, ValueError, struct.error, …
        if reader.limited:
            message = f"the image has more than {limits.max_metadata_bytes:,} bytes of metadata before its pixels"
            raise ImageTooLarge(message, param="image") from error
        if _is_other_format(start):
            raise ImageUnsupported(f"the image is in a format other than {_names()}", param="image") from error
        raise ImageUnreadable(f"the bytes are not an image ({_names()})", param="image") from error


def _found(image: Image.Image, start: bytes) -> _Found:
    name = FORMATS[image.format or ""]
    width, height = image.size
    channels = {"1": 1, "L": 1, "I;16": 1, "I": 1, "LA": 2}.get(image.mode, 3 if image.mode in ("RGB", "P") else 4)
    if "transparency" in image.info:
        channels = 4
    by_row, share = True, 0.0
    if name == "jpeg" and image.info.get("progressive"):
        by_row, share = False, _coefficients(image)
    elif name == "png":
        by_row = not image.info.get("interlace")
        # Seen: 0.7 bytes a pixel by the row, whatever the mode. Interlaced, all of it, 16 bit (bit depth: IHDR, byte 24) twice.
        share = 1.0 if by_row else 2.5 * channels * (2 if start[24] == 16 else 1)
    elif name == "gif":
        by_row, share = False, 8.0  # two canvases of RGBA
    elif name == "bmp":
        by_row, share = False, 2.0 * channels  # decoded by Pillow as a whole, then copied
    animated = name in ("png", "gif") and bool(getattr(image, "is_animated", False))
    exif = image.info.get("exif", b"")
    return _Found(name, width, height, exif if isinstance(exif, bytes) else b"", animated, by_row, channels, share)


def _coefficients(image: Image.Image) -> float:
    """Bytes a pixel of a progressive JPEG's coefficients: 2 for each sample of each component (libjpeg)."""
    layers: list[tuple[object, int, int, object]] = getattr(image, "layer", [])
    across, down = max((h for _, h, _, _ in layers), default=1), max((v for _, _, v, _ in layers), default=1)
    return 2.2 * sum(h * v for _, h, v, _ in layers) / max(1, across * down)


def _webp(file: ImageFile, limits: Limits, stop: Stop) -> _Found:
    """Read a WebP header. The decoder needs the whole file, so this waits for it."""
    file.wait(stop)
    data = memoryview(file.data)
    exif, frames = b"", 0
    found: tuple[int, int, bool] | None = None
    for kind, body in _chunks(data):
        if kind == b"ANMF":
            frames += 1
        elif kind == b"EXIF":
            exif = bytes(body[: limits.max_metadata_bytes])
        elif found is None and kind == b"VP8X" and len(body) >= 10:
            found = 1 + _int24(body, 4), 1 + _int24(body, 7), True
        elif found is None and kind == b"VP8L" and len(body) >= 5 and body[0] == 0x2F:
            bits = struct.unpack_from("<I", body, 1)[0]
            found = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), True
        elif found is None and kind == b"VP8 " and len(body) >= 10 and bytes(body[3:6]) == b"\x9d\x01\x2a":
            width, height = struct.unpack_from("<HH", body, 6)
            found = width & 0x3FFF, height & 0x3FFF, False
    if found is None:
        raise ImageUnreadable(f"the bytes are not an image ({_names()})", param="image")
    if frames > limits.max_frames:
        raise ImageTooLarge(f"the image has {frames:,} frames; the limit is {limits.max_frames:,}", param="image")
    width, height, maybe_alpha = found
    # Lossy without alpha is decoded by the row. Else a canvas of RGBA, twice where frames are drawn onto it.
    share = 12.0 if frames else 8.0 if maybe_alpha else 1.5
    return _Found("webp", width, height, exif, frames > 1, False, 4 if maybe_alpha else 3, share)


def _chunks(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the chunks of a RIFF file as far as they are whole."""
    at = 12
    while at + 8 <= len(data):
        length = struct.unpack_from("<I", data, at + 4)[0]
        yield bytes(data[at : at + 4]), data[at + 8 : at + 8 + length]
        at += 8 + length + (length & 1)


def _int24(data: memoryview, at: int) -> int:
    return int.from_bytes(data[at : at + 3], "little")


def _orientation(block: bytes) -> int:
    exif = Image.Exif()
    try:
        exif.load(block)
        orientation = exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # a malformed EXIF block says nothing about the orientation; the pixels are still good
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _is_other_format(start: bytes) -> bool:
    """Say whether the first bytes are those of a known image format outside the allowlist; nothing is decoded."""
    magic = (b"II*\0", b"MM\0*", b"8BPS", b"\0\0\x01\0", b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51", b"%PDF", b"P5", b"P6", b"qoif")
    return start.startswith(magic) or start[4:12] in (b"ftypavif", b"ftypheic", b"ftypmif1", b"ftypheix") or b"<svg" in start


def _names() -> str:
    return ", ".join(dict.fromkeys(FORMATS.values()))
