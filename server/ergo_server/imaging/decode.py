"""Bytes to pixels: upright, bounded, one frame.

What comes out is defined for every kind of file that is let in:

    ==================  ================================================================================================
    orientation         EXIF's eight orientations are applied first; every coordinate afterwards is in the upright frame
    alpha, tRNS         composited on white (a transparent pixel's hidden colour is never seen)
    palette, 1 bit      expanded before anything is resized
    16 bit grey         scaled to 8 bit, not truncated
    CMYK, ICC profile   converted to sRGB through the profile; CMYK without one by Pillow's plain formula
    animation           the first frame
    ==================  ================================================================================================

Size and format are read from the header, and limits are checked there, before a single pixel is decoded. A JPEG can be
decoded at a half, a quarter or an eighth of its size (DCT scaling, libjpeg), which is what makes the overview of a large
photograph cheap; the full decode can then run while the engine is busy with the zoom turn.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageCms

from ergo_server.errors import ImageAspect, ImageTooLarge, ImageUnreadable, ImageUnsupported
from ergo_server.imaging.geometry import MAX_ASPECT, Size

MAX_PIXELS = 128_000_000
"""Largest image: the 108-megapixel photographs of telephones fit, and 384 MB of decoded RGB are the bound on memory."""

FORMATS = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
"""Pillow's decoders that hostile bytes may reach. Pillow knows some forty; most are old code that nobody's camera writes."""

_ORIENTATION_TAG = 0x0112

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

# Pillow's own bomb check warns above 89 MP and raises above 179 MP, whatever max_pixels says. Ours is made from the same header
# right after, with a message that names the limit.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the header alone says of an image."""

    size: Size
    """Upright width and height."""
    format: str
    """jpeg, png, webp, gif or bmp; found from the bytes, whatever the sender called them."""
    orientation: int
    """EXIF orientation, 1 to 8."""


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """Upright pixels of an image, in its own colours: `view` converts what it cuts to sRGB, not the whole."""

    header: ImageHeader
    pixels: Image.Image
    """Mode L, RGB or CMYK; smaller than ``header.size`` when decoded at reduced size."""
    profile: bytes | None
    """The ICC profile, if the file has one."""


def read_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Read size, format and orientation without decoding pixels.

    Raises:
        ImageUnreadable: the bytes are no image, or the header is broken.
        ImageUnsupported: an image of a format outside `FORMATS`.
        ImageTooLarge: more than ``max_pixels`` pixels.
        ImageAspect: an aspect ratio above 200.
    """
    with _opened(data) as image:
        return _header(image, max_pixels)


def decode_image(data: bytes, *, at_least: Size | None = None, max_pixels: int = MAX_PIXELS) -> DecodedImage:
    """Decode an image, upright.

    Args:
        data: the file.
        at_least: upright size that the caller will shrink to. A JPEG is then decoded at the largest DCT reduction that still
            leaves both sides at or above it; other formats ignore it.
        max_pixels: limit on width × height, checked from the header.

    Raises:
        ImageError: as `read_header`, and ImageUnreadable for truncated or corrupt pixels.
    """
    with _opened(data) as image:
        header = _header(image, max_pixels)
        try:
            if at_least is not None and header.format == "jpeg":
                image.draft(None, at_least if header.orientation < 5 else at_least[::-1])
            image.load()
            profile = image.info.get("icc_profile")
            pixels = _plain(image)
            if header.orientation in _UPRIGHT:
                pixels = pixels.transpose(_UPRIGHT[header.orientation])
        except Exception as error:  # decoders of hostile bytes raise anything: OSError, ValueError, struct.error, …
            raise ImageUnreadable("the image is truncated or corrupt", param="image") from error
        return DecodedImage(header, pixels, profile if isinstance(profile, bytes) else None)


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


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name != "MPO"])  # opened as JPEG
    except Exception as error:
        if _is_other_format(data):
            raise ImageUnsupported(f"the image is in a format other than {_names()}", param="image") from error
        raise ImageUnreadable(f"the bytes are not an image ({_names()})", param="image") from error


def _is_other_format(data: bytes) -> bool:
    """Say whether the first bytes are those of a known image format outside the allowlist; nothing is decoded."""
    start = data[:16]
    magic = (b"II*\0", b"MM\0*", b"8BPS", b"\0\0\x01\0", b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51", b"%PDF", b"P5", b"P6", b"qoif")
    return start.startswith(magic) or start[4:12] in (b"ftypavif", b"ftypheic", b"ftypmif1", b"ftypheix") or b"<svg" in data[:512]


def _header(image: Image.Image, max_pixels: int) -> ImageHeader:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageTooLarge(f"the image has {width} x {height} pixels; the limit is {max_pixels:,} in all", param="image")
    orientation = _orientation(image)
    size = Size(width, height) if orientation < 5 else Size(height, width)
    if min(size) < 1:
        raise ImageUnreadable("the image has no pixels", param="image")
    if size.aspect > MAX_ASPECT:
        raise ImageAspect(
            f"the image is {width} x {height} pixels; the longer side may be at most {MAX_ASPECT} times the shorter",
            param="image",
        )
    return ImageHeader(size, FORMATS[image.format or ""], orientation)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation from what opening alone has read; ``getexif`` on a PNG would decode the whole image."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        orientation = exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # a malformed EXIF block says nothing about the orientation; the pixels are still good
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _plain(image: Image.Image) -> Image.Image:
    """Return mode L, RGB or CMYK: palettes and bits expanded, 16 bit scaled, transparency on white."""
    if image.mode.startswith("I"):
        return _eight_bit(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode in ("1", "L"):
        return image.convert("L")
    if image.mode in ("RGB", "CMYK"):
        return image
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16 bit grey to mode L, white where the file says transparent; ``convert`` would clip at 255 in both."""
    deep = image.convert("I")
    grey = deep.point(lambda value: value * (255 / 65535) + 0.5).convert("L")
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):
        above, below = deep.point(lambda value: value - hidden), deep.point(lambda value: value * -1 + hidden)
        shown = ImageChops.lighter(above.convert("L"), below.convert("L"))  # 0 where both clip to 0: the hidden value itself
        grey.paste(255, mask=shown.point([255] + [0] * 255))
    return grey


def _names() -> str:
    return ", ".join(dict.fromkeys(FORMATS.values()))
