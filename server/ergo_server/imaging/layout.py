"""Where things lie in a file: the structure of JPEG, PNG, WebP, GIF and BMP, without a decoder.

Read here and not by a library, because the libraries do more than a stranger's bytes should make them do before any limit has
been checked. Measured: Pillow's WebP reader allocates the animation's canvas on opening; its PNG reader inflates every text
chunk, 60 MB in all; libpng inflates each text chunk before the pixels to up to 8 MB (770 KB of them: 0.5 s); libvips reads all
frames of an animation for the first one (5.6 MB of 56-byte WebP frames: 58 s), and lets a GIF's frame enlarge its canvas (a file
of 35 bytes: 1.4 GB); a JPEG that does not call itself progressive may have a scan for each component, as often as it likes.

What a decoder is then given is only what the first frame needs: `Layout.pieces`.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from ergo_server.errors import ImageTooLarge, ImageUnreadable, ImageUnsupported
from ergo_server.imaging.file import Cursor, ImageFile, Stop
from ergo_server.imaging.geometry import Size

# A stretch of the file from … to (None: to its end, wherever that is), or bytes that take its place.
Piece = tuple[int, int | None] | bytes

WHOLE: tuple[Piece, ...] = ((0, None),)
"""The file as it is."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What the structure of a file says of its first frame."""

    size: Size
    """As stored: before the orientation is applied."""
    bands: int
    """Of the decoded pixels, once palettes are expanded and transparency is gone: 1, 3, or 4 (CMYK)."""
    held: int
    """Most bytes that a decoder of the format keeps for the whole image while it decodes a part or all of it."""
    pieces: tuple[Piece, ...] = WHOLE
    """What the decoder is given, in this order."""
    exif: bytes = b""
    """The EXIF block, if there is one where the format puts it."""
    animated: bool = False
    """More than one frame."""
    progressive: bool = False
    """No row is ready before the last byte: a JPEG of several scans, an interlaced PNG."""


def _unreadable() -> ImageUnreadable:
    return ImageUnreadable("the image is truncated or corrupt", param="image")


class _Metadata:
    """Counts the bytes in front of, between and behind the pixels."""

    def __init__(self, limit: int) -> None:
        self._limit, self._found = limit, 0

    def add(self, length: int) -> None:
        self._found += length
        if self._found > self._limit:
            raise ImageTooLarge(f"the image has more than {self._limit:,} bytes of metadata; that is the limit", param="image")


# --- JPEG (ITU-T T.81) --------------------------------------------------------------------------------------------------------

_STANDALONE = {0x01, *range(0xD0, 0xD8)}
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive: what libjpeg decodes
_OTHER_FRAMES = {0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)}  # lossless, hierarchical, arithmetic


def jpeg(file: ImageFile, limit: int, stop: Stop) -> Layout:
    """Read a JPEG up to its first scan."""
    at, metadata = Cursor(file, stop), _Metadata(limit)
    at.skip(2)
    exif, frame = b"", b""
    while True:
        if at.take(1) != b"\xff":
            raise _unreadable()
        while (code := at.take(1)[0]) == 0xFF:
            metadata.add(1)  # any number of fill bytes may precede a marker
        if code in _STANDALONE:
            metadata.add(2)
            continue
        (length,) = struct.unpack(">H", at.take(2))
        if length < 2:
            raise _unreadable()
        if code == 0xDA:
            break
        metadata.add(length + 2)
        if code in _FRAMES and not frame:
            frame = bytes((code,)) + at.take(length - 2)
        elif code in _OTHER_FRAMES:
            raise ImageUnsupported(
                "the JPEG is lossless, hierarchical or arithmetic; baseline and progressive are read", param="image"
            )
        elif code == 0xE1 and not exif and length >= 8:
            start = at.take(6)
            if start == b"Exif\0\0":
                exif = at.take(length - 8)
            else:
                at.skip(length - 8)
        else:
            at.skip(length - 2)
    in_scan = at.take(1)[0]
    if len(frame) < 7 or len(frame) < 7 + 3 * frame[6] or frame[6] not in (1, 3, 4):
        raise _unreadable()
    code, _, height, width, components = struct.unpack(">BBHHB", frame[:7])
    sampling = [(frame[8 + 3 * i] >> 4, frame[8 + 3 * i] & 15) for i in range(components)]
    if not all(1 <= across <= 4 and 1 <= down <= 4 for across, down in sampling):
        raise _unreadable()
    progressive = code == 0xC2 or in_scan < components
    widest, tallest = max(across for across, _ in sampling), max(down for _, down in sampling)
    held = 0
    if progressive:  # libjpeg keeps two bytes per coefficient, of whole blocks of 8 × 8 and whole units of blocks
        across, down = -(-width // (8 * widest)), -(-height // (8 * tallest))
        held = sum(128 * h * v for h, v in sampling) * across * down
    return Layout(Size(width, height), components, held, exif=exif, progressive=progressive)


class Scans:
    """Counts the scans of a JPEG as far as its bytes are there.

    A legal JPEG may have hundreds of scans, and every one costs a pass over all pixels (39 KB with 883 scans at 10 megapixels:
    3 s in any library). Only real markers count: what looks like one in a segment or behind the end of the image does not.

    Args:
        file: a JPEG.
        limit: most scans.
    """

    def __init__(self, file: ImageFile, limit: int) -> None:
        self._file, self._limit = file, limit
        self._position, self._found = 2, 0
        self._marker = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")  # others are data, fill bytes or restarts, and have no length

    def check(self, there: int) -> None:
        """Count on, in the first ``there`` bytes.

        Raises:
            ImageTooLarge: more scans than the limit.
        """
        while self._position + 4 <= there:
            window = self._file.view(self._position, min(there, self._position + 2**20))  # the GIL is free between windows
            found = self._marker.search(window)
            if found is None:
                self._position += len(window) - 1  # the last byte may be the first of a marker
                continue
            start, code = self._position + found.start(), found[0][1]
            if code == 0xD9:
                self._position = 1 << 62
                return
            if start + 4 > there:
                self._position = start
                return
            self._found += code == 0xDA
            if self._found > self._limit:
                raise ImageTooLarge(f"the JPEG has more than {self._limit} scans; that is the limit", param="image")
            self._position = start + 2 + int.from_bytes(self._file.view(start + 2, start + 4))


# --- PNG (W3C PNG, third edition) ---------------------------------------------------------------------------------------------

_PNG_BANDS = {0: 1, 2: 3, 3: 3, 4: 1, 6: 3}  # by colour type: grey, RGB, palette, grey with alpha, RGB with alpha
_PNG_DECODED = {0: 2, 2: 4, 3: 4, 4: 2, 6: 4}  # the same with a tRNS chunk's alpha: what an interlaced one is decoded to


def png(file: ImageFile, limit: int, stop: Stop) -> Layout:
    """Read a PNG up to its first pixels. Compressed text is left out of the pieces: libpng would inflate it."""
    at, metadata = Cursor(file, stop), _Metadata(limit)
    at.skip(8)
    length, kind = struct.unpack(">I4s", at.take(8))
    if (length, kind) != (13, b"IHDR"):
        raise _unreadable()
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", at.take(13))
    at.skip(4)
    if colour not in _PNG_BANDS:
        raise _unreadable()
    exif, animated, kept, pieces = b"", False, 0, list[Piece]()
    while True:
        start = at.position
        length, kind = struct.unpack(">I4s", at.take(8))
        if kind == b"IDAT":
            break
        metadata.add(length + 12)
        if kind == b"eXIf" and not exif:
            exif = at.take(length)
        elif kind == b"acTL" and length == 8:
            animated = struct.unpack(">I", at.take(4))[0] > 1
            at.skip(4)
        else:
            at.skip(length)
        at.skip(4)
        if kind in (b"zTXt", b"iTXt"):
            pieces.append((kept, start))
            kept = at.position
    held = width * height * _PNG_DECODED[colour] * (2 if depth == 16 else 1) if interlaced else 0
    size, bands = Size(width, height), _PNG_BANDS[colour]
    return Layout(size, bands, held, (*pieces, (kept, None)), exif, animated, bool(interlaced))


# --- WebP (RFC 9649) ----------------------------------------------------------------------------------------------------------


def webp(file: ImageFile, limit: int, stop: Stop) -> Layout:
    """Read a WebP; one in the extended format to its end, where its EXIF block is."""
    at, metadata = Cursor(file, stop), _Metadata(limit)
    at.skip(12)
    kind, length = struct.unpack("<4sI", at.take(8))
    if kind == b"VP8 ":
        start = at.take(10)
        if start[3:6] != b"\x9d\x01\x2a":
            raise _unreadable()
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", start[6:]))
        return Layout(Size(width, height), 3, _webp_held(width, height))
    if kind == b"VP8L":
        signature, bits = struct.unpack("<BI", at.take(5))
        if signature != 0x2F:
            raise _unreadable()
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        return Layout(Size(width, height), 3, _webp_held(width, height))
    if kind != b"VP8X" or length < 10:
        raise _unreadable()
    flags, *sides = struct.unpack("<B3x3s3s", at.take(10))
    width, height = (int.from_bytes(side, "little") + 1 for side in sides)
    at.skip(length - 10 + (length & 1))
    kept, exif, frames = [(12, at.position)], b"", 0
    there = file.wait(stop)
    while at.position + 8 <= there:
        begin = at.position
        kind, length = struct.unpack("<4sI", at.take(8))
        if kind == b"EXIF" and not exif and begin + 8 + length <= there:
            exif = at.take(length)
            at.skip(length & 1)
        else:
            at.skip(length + (length & 1))
        if kind == b"ANMF":
            frames += 1
            if frames == 2:
                break
        elif kind not in (b"VP8 ", b"VP8L", b"ALPH"):
            metadata.add(length + 8)
        if kind in (b"ICCP", b"ANIM", b"ANMF"):
            kept.append((begin, min(at.position, there)))
    pieces = WHOLE
    if flags & 0x02:  # animated: the container, and the first frame alone
        length = 4 + sum(end - begin for begin, end in kept)
        pieces = (b"RIFF" + struct.pack("<I", length) + b"WEBP", *kept)
    return Layout(Size(width, height), 3, _webp_held(width, height), pieces, exif, frames > 1)


def _webp_held(width: int, height: int) -> int:
    """libwebp's own pixels and those of libvips, 4 bytes each, and the lossless decoder's of as many."""
    return 12 * width * height


# --- GIF (GIF89a) -------------------------------------------------------------------------------------------------------------


def gif(file: ImageFile, limit: int, stop: Stop) -> Layout:
    """Read a GIF up to its second frame; later ones are left out of the pieces."""
    at, metadata = Cursor(file, stop), _Metadata(limit)
    at.skip(6)
    width, height, flags = struct.unpack("<HHB2x", at.take(7))
    if flags & 0x80:
        at.skip(6 << (flags & 7))
    end = None
    while True:
        kind = at.take(1) if end is None or file.wait(stop, at.position + 1) > at.position else b";"
        if kind == b"\x21":
            at.skip(1)
            metadata.add(2 + _sub_blocks(at))
        elif kind == b"\x2c" and end is None:
            left, top, across, down, flags = struct.unpack("<HHHHB", at.take(9))
            if flags & 0x80:
                at.skip(6 << (flags & 7))
            at.skip(1)
            _sub_blocks(at)
            end = at.position
            width, height = max(width, left + across), max(height, top + down)  # as libnsgif and Pillow do
        elif end is None:
            raise _unreadable()
        else:
            break
    size = Size(width, height)
    return Layout(size, 3, 16 * size.area, ((0, end), b";"), animated=kind == b"\x2c")


def _sub_blocks(at: Cursor) -> int:
    """Go to the end of a chain of blocks of up to 255 bytes; return its length."""
    start = at.position
    while length := at.take(1)[0]:
        at.skip(length)
    return at.position - start


# --- BMP ----------------------------------------------------------------------------------------------------------------------


def bmp(file: ImageFile, limit: int, stop: Stop) -> Layout:
    """Read a BMP's header, which is at most 4 KB long, with Pillow."""
    head = file.view(0, min(file.wait(stop, 4096), 4096))
    if len(head) >= 34 and head[14] >= 40 and head[30] in (1, 2):  # decoded by Pillow in Python, byte by byte
        raise ImageUnsupported("the BMP is run-length encoded; only uncompressed ones are read", param="image")
    try:
        with Image.open(io.BytesIO(head), formats=["BMP"]) as image:
            size, mode = Size(*image.size), image.mode
    except Exception as error:  # parsers of hostile bytes raise anything
        raise _unreadable() from error
    bands = 1 if mode in ("1", "L") else 3
    return Layout(size, bands, size.area * (12 if bands == 3 else 4))


LAYOUTS: dict[str, Callable[[ImageFile, int, Stop], Layout]] = {"jpeg": jpeg, "png": png, "webp": webp, "gif": gif, "bmp": bmp}
"""By format: what reads a file of it. Each is given the file, the most bytes of metadata and the stop, and raises ImageUnreadable
where the structure is broken, ImageUnsupported for kinds that are not decoded, and ImageTooLarge for too much metadata."""
