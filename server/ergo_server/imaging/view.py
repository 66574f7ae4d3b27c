"""Views: what the model sees. The overview of the whole image, and crops of it, both within the pixel budget.

A view is encoded once, losslessly, and its bytes are kept: vLLM's prefix and image caches are keyed by the encoded bytes, so
the answer turn finds the zoom turn's work only if it sends the very same ones (measured: other bytes of the same pixels give
0 cached tokens).
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import pybase64
import pyvips
from PIL import Image, ImageCms

from ergo_server.imaging.decode import Cut, Kernel, Pixels, cut
from ergo_server.imaging.file import ImageFile, Stop
from ergo_server.imaging.geometry import Box, PixelBudget, Size, visual_tokens
from ergo_server.imaging.header import ImageHeader, Limits, read_header

# Transpositions that make an image upright, by EXIF orientation (CIPA DC-008, 4.6.5.1.6).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class View:
    """An image as the model sees it."""

    data: bytes
    """The encoded file; never encoded a second time."""
    size: Size
    """As the model sees it: both sides are multiples of 28, so that the engine's processor leaves it as it is."""
    format: str = "png"
    """png for what is made here; another only for images that `ergo-raw` passes through as given."""

    @property
    def visual_tokens(self) -> int:
        """What the view costs."""
        return visual_tokens(self.size)

    @property
    def data_url(self) -> str:
        """The same bytes as a ``data:`` URL."""
        return f"data:image/{self.format};base64," + pybase64.b64encode_as_string(self.data)


def overview(source: ImageFile | Pixels, header: ImageHeader, budget: PixelBudget, stop: Stop) -> View:
    """Return the whole image within the budget, resized bicubically as ERGO does.

    Args:
        source: the file, whole or still arriving, or its pixels.
        header: of the file.
        budget: visual tokens the view may cost.
        stop: what ends the work early.

    Raises:
        ImageUnreadable: the file is truncated or corrupt.
        ImageTooLarge: a progressive JPEG has too many scans.
        ImageTooSlow, Cancelled: see `Stop`.
    """
    return _view(source, header, Box.whole(header.size), budget, "cubic", stop)


def crop(source: ImageFile | Pixels, header: ImageHeader, region: Box, budget: PixelBudget, stop: Stop) -> View:
    """Return a region of the original within the budget, resized with Lanczos as ERGO does; never enlarged, but for the next
    multiple of 28 and the processor's minimum of four visual tokens.

    Args:
        source: the file, or its pixels.
        header: of the file.
        region: in upright original pixels, inside the image, with an aspect ratio of at most 200.
        budget: visual tokens the view may cost.
        stop: what ends the work early.

    Raises:
        ValueError: the region is not inside the image.
        ImageUnreadable, ImageTooLarge, ImageTooSlow, Cancelled: as `overview`.
    """
    if region.clamp(header.size) != region:
        raise ValueError(f"{region.edges} is not inside the image")
    return _view(source, header, region, budget, "lanczos3", stop)


def pixels(data: bytes, limits: Limits, stop: Stop) -> Image.Image:
    """Return all pixels of an encoded image, upright, in sRGB: what an engine in this process is given.

    Raises:
        ImageError: the bytes are no image, or none that is let in.
        ImageTooSlow, Cancelled: see `Stop`.
    """
    file = ImageFile.of(data)
    header = read_header(file, limits, stop)
    whole = cut(file, header, Box.whole(header.stored), header.stored, "cubic", stop)
    return _upright(whole, header.orientation)


def to_srgb(pixels: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert pixels of mode L, RGB or CMYK to sRGB through their ICC profile, or plainly where that is missing or broken."""
    if profile is not None:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(pixels, source, target, outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # a broken profile, or one for another mode, says nothing about the colours: treated as absent
    return pixels if pixels.mode == "RGB" else pixels.convert("RGB")


def _view(source: ImageFile | Pixels, header: ImageHeader, region: Box, budget: PixelBudget, kernel: Kernel, stop: Stop) -> View:
    size = budget.view_size(region.size)
    stored = size if header.orientation < 5 else Size(*size[::-1])
    seen = cut(source, header, _as_stored(region, header), stored, kernel, stop)
    return View(_encoded(seen, header.orientation), size)


def _as_stored(box: Box, header: ImageHeader) -> Box:
    """Return where a box of the upright image lies in the file."""
    x1, y1, x2, y2 = box.edges
    width, height = header.size
    # Turned upright, left and right, top and bottom may have changed places, and the axes each other.
    if header.orientation in (2, 3, 6, 7):
        x1, x2 = width - x2, width - x1
    if header.orientation in (3, 4, 7, 8):
        y1, y2 = height - y2, height - y1
    return Box(x1, y1, x2, y2) if header.orientation < 5 else Box(y1, x1, y2, x2)


def _upright(seen: Cut, orientation: int) -> Image.Image:
    image = seen.image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else seen.image
    return to_srgb(image, seen.profile)


def _encoded(seen: Cut, orientation: int) -> bytes:
    """Return a view's PNG, lossless: the same pixels give the same bytes, and nothing but pixels is in them."""
    pixels, size = seen.pixels, seen.size
    if orientation in _UPRIGHT or seen.mode != "RGB" or seen.profile is not None:  # else Pillow would only copy them, twice
        image = _upright(seen, orientation)
        pixels, size = image.tobytes(), Size(*image.size)
    picture = pyvips.Image.new_from_memory(pixels, *size, 3, "uchar").copy(interpretation="srgb")
    # Not compressed: 2 ms for half a megapixel where Pillow's default level takes 119 and its level 0 takes 19, and the larger
    # bytes cross a local network only.
    file: bytes = picture.pngsave_buffer(compression=0, filter="none", keep="none")
    # libvips writes the resolution, always: a chunk of 21 bytes behind the header's 33.
    return file[:33] + file[54:] if file[37:41] == b"pHYs" else file
