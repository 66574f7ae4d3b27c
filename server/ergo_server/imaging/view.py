"""Views: what the model sees. The overview of the whole image, and crops of it, both within the pixel budget.

A view is encoded once, losslessly, and its bytes are kept: vLLM's prefix and image caches are keyed by the encoded bytes, so
the answer turn finds the zoom turn's work only if it sends the very same ones (measured: other bytes of the same pixels give
0 cached tokens).
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

from ergo_server.imaging.decode import DecodedImage, to_srgb
from ergo_server.imaging.geometry import Box, PixelBudget, Size, visual_tokens


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
        return f"data:image/{self.format};base64," + base64.b64encode(self.data).decode("ascii")


def overview(image: DecodedImage, budget: PixelBudget) -> View:
    """Return the whole image within the budget, resized bicubically as ERGO does.

    Args:
        image: decoded at any size that is not below the view's.
        budget: visual tokens the view may cost.
    """
    return _view(image.pixels, budget.view_size(image.header.size), Image.Resampling.BICUBIC, image.profile)


def crop(image: DecodedImage, region: Box, budget: PixelBudget) -> View:
    """Return a region of the original within the budget, resized with Lanczos as ERGO does; never enlarged, but for the next
    multiple of 28 and the processor's minimum of four visual tokens.

    Args:
        image: decoded at full size.
        region: in upright original pixels, inside the image, with an aspect ratio of at most 200.
        budget: visual tokens the view may cost.

    Raises:
        ValueError: the image was decoded at reduced size, or the region is not inside it.
    """
    if image.pixels.size != tuple(image.header.size):
        raise ValueError("a crop is cut from the image at full size")
    if region.clamp(image.header.size) != region:
        raise ValueError(f"{region.edges} is not inside the image")
    return _view(image.pixels.crop(region.edges), budget.view_size(region.size), Image.Resampling.LANCZOS, image.profile)


def _view(pixels: Image.Image, size: Size, resample: Image.Resampling, profile: bytes | None) -> View:
    seen = to_srgb(pixels.resize(size, resample), profile)
    # Level 0: 2 ms for half a megapixel where the default level takes 119, and the larger bytes cross a local network only.
    # No profile: Pillow would embed the one it made for sRGB, whose header holds the second it was made in.
    with io.BytesIO() as file:
        seen.save(file, "PNG", compress_level=0, icc_profile=None)
        return View(file.getvalue(), size)
