"""What the header of an image says, and what is refused for it: before a single pixel is decoded.

How the bytes are laid out is read in `layout`; here it is held against the limits, and the memory that a decode will take is
worked out. What cannot be decoded row by row (a JPEG of several scans, an interlaced PNG, WebP, GIF, BMP) is reserved as a whole.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from PIL import Image

from ergo_server.errors import ImageAspect, ImageTooLarge, ImageUnreadable, ImageUnsupported
from ergo_server.imaging.file import ImageFile, Stop
from ergo_server.imaging.geometry import MAX_ASPECT, Size
from ergo_server.imaging.layout import LAYOUTS, Piece

MAX_PIXELS = 128_000_000
"""Largest image: the 108-megapixel photographs of telephones fit."""

MAX_SCANS = 64
"""Of a progressive JPEG. Encoders write about ten; each reads the whole image again."""

MAX_METADATA_BYTES = 16 << 20
"""Before the pixels: EXIF with a preview, XMP, profiles. The longest that cameras write have a few megabytes."""

MAGIC = ((b"\xff\xd8\xff", "jpeg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"GIF87a", "gif"), (b"GIF89a", "gif"), (b"BM", "bmp"))
"""First bytes of the formats that are let in, and WebP. Libraries know some forty; most are old code that no camera writes."""

SNIFF_BYTES = 512
"""Enough for the first bytes of every format, and for the beginning of an SVG."""

BASE_BYTES = 24 << 20
"""What any decode takes beside pixels: buffers of some rows, the view and its encoded form (15 MiB seen at 108 MP)."""

ROWS = 512
"""Rows that libvips keeps at most of an image that it reads in sequence."""

_ORIENTATION_TAG = 0x0112

PNG_BYTES = 1.0
"""A pixel, of a PNG that is decoded by the row: 0.7 seen."""

# Pillow's own bomb check warns above 89 MP and raises above 179 MP, whatever the settings say. Ours comes first.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What an image may be like."""

    max_pixels: int = MAX_PIXELS
    max_scans: int = MAX_SCANS
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
    """Scans after which the decoder is given no more of a JPEG."""
    pieces: tuple[Piece, ...]
    """What the decoder is given: the first frame alone, no compressed text."""

    @property
    def load_bytes(self) -> int:
        """Upper bound of the memory that decoding it as a whole takes, and keeping that."""
        return self.working_bytes + self.pixel_bytes

    @property
    def stored(self) -> Size:
        """Width and height as the pixels stand in the file, before they are turned upright."""
        return self.size if self.orientation < 5 else Size(*self.size[::-1])


def read_header(file: ImageFile, limits: Limits, stop: Stop) -> ImageHeader:
    """Read what the header says, waiting until enough of it has arrived. No pixels are decoded.

    Raises:
        ImageUnreadable: the bytes are no image, or the header is broken.
        ImageUnsupported: an image of a kind that is not let in.
        ImageTooLarge: more pixels or metadata than allowed.
        ImageAspect: an aspect ratio above 200.
        ImageTooSlow, Cancelled: see `Stop`.
    """
    name = _format(file.view(0, min(file.wait(stop, SNIFF_BYTES), SNIFF_BYTES)))
    found = LAYOUTS[name](file, limits.max_metadata_bytes, stop)
    width, height = found.size
    if found.size.area > limits.max_pixels:
        message = f"the image has {width} x {height} pixels; the limit is {limits.max_pixels:,} in all"
        raise ImageTooLarge(message, param="image")
    if min(found.size) < 1:
        raise ImageUnreadable("the image has no pixels", param="image")
    if found.size.aspect > MAX_ASPECT:
        raise ImageAspect(
            f"the image is {width} x {height} pixels; the longer side may be at most {MAX_ASPECT} times the shorter",
            param="image",
        )
    orientation = _orientation(found.exif)
    by_row = name in ("jpeg", "png") and not found.progressive
    held = found.held + (round(PNG_BYTES * found.size.area) if name == "png" and by_row else 0)
    return ImageHeader(
        size=found.size if orientation < 5 else Size(height, width),
        format=name,
        orientation=orientation,
        animated=found.animated,
        by_row=by_row,
        working_bytes=BASE_BYTES + ROWS * width * 4 + held,
        pixel_bytes=found.size.area * found.bands,
        max_scans=limits.max_scans,
        pieces=found.pieces,
    )


def _format(start: bytes) -> str:
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "webp"
    for magic, name in MAGIC:
        if start.startswith(magic):
            return name
    if _is_other_format(start):
        raise ImageUnsupported(f"the image is in a format other than {_names()}", param="image")
    raise ImageUnreadable(f"the bytes are not an image ({_names()})", param="image")


def _orientation(block: bytes) -> int:
    exif = Image.Exif()
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is broken in it
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
    return ", ".join(LAYOUTS)
