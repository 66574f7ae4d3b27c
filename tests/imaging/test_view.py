"""Views: what the model sees."""

from __future__ import annotations

import base64
import io
import math
import time

import pytest
import support
from hostile import encoded
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageCms, ImageStat

from ergo_server.imaging import view
from ergo_server.imaging.file import ImageFile, Stop
from ergo_server.imaging.geometry import Box, PixelBudget, Size
from ergo_server.imaging.view import View


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Return an image of noise, in which any resampling or loss shows."""
    return Image.merge("RGB", [Image.effect_noise((width, height), 90) for _ in "rgb"]).convert(mode)


def overview(image: Image.Image, budget: PixelBudget) -> View:
    """Return the overview of an image's file."""
    return support.look(encoded(image), budget.max_visual_tokens)


def crop(image: Image.Image, region: Box, budget: PixelBudget) -> View:
    """Return a crop of an image's file."""
    data = encoded(image)
    return view.crop(ImageFile.of(data), support.header(data), region, budget, Stop(support.START_SECONDS))


def opened(seen: View) -> Image.Image:
    """Return the image in a view's file."""
    return Image.open(io.BytesIO(seen.data), formats=["PNG"])


def noise_of(one: Image.Image, other: Image.Image) -> float:
    """Return how far two images differ, as the root of the mean square of all bands."""
    return max(ImageStat.Stat(ImageChops.difference(one, other)).rms)


def srgb_profile() -> bytes:
    """Return the profile that most photographs carry, stamped with the second it was made in."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_primaries() -> bytes:
    """Return an RGB profile whose red is green and whose green is red."""
    return srgb_profile().replace(b"rXYZ", b"----").replace(b"gXYZ", b"rXYZ").replace(b"----", b"gXYZ")


@given(st.integers(1, 300), st.integers(1, 300), st.integers(4, 64))
@settings(deadline=None, max_examples=50)
def test_a_view_has_the_size_that_the_budget_gives(width: int, height: int, tokens: int) -> None:
    """Overview and whole crop are PNG in RGB, of the budget's size, whose tokens they count."""
    assume(max(width, height) <= 200 * min(width, height))
    image, budget = noise(width, height), PixelBudget(tokens)
    for seen in (overview(image, budget), crop(image, Box(0, 0, width, height), budget)):
        assert seen.size == opened(seen).size == budget.view_size(Size(width, height))
        assert (opened(seen).mode, seen.format) == ("RGB", "png")
        assert seen.visual_tokens == seen.size.area // 784 <= tokens


def test_an_overview_is_resized_bicubically() -> None:
    """The overview's pixels are those of Pillow's bicubic filter, with noise of less than a fortieth of its contrast."""
    image, budget = noise(300, 200), PixelBudget(16)
    wanted = image.resize(budget.view_size(Size(300, 200)), Image.Resampling.BICUBIC)
    assert noise_of(opened(overview(image, budget)), wanted) < 2


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_a_crop_is_pillows_crop_resized_with_lanczos(data: st.DataObject) -> None:
    """A crop's pixels are those of Pillow's own crop and Lanczos filter, with noise of less than a twentieth of its contrast."""
    image, budget = noise(230, 170), PixelBudget(data.draw(st.integers(8, 32)))
    x1, y1 = data.draw(st.integers(0, 228)), data.draw(st.integers(0, 168))
    region = Box(x1, y1, data.draw(st.integers(x1 + 2, 230)), data.draw(st.integers(y1 + 2, 170)))
    wanted = image.crop(region.edges).resize(budget.view_size(region.size), Image.Resampling.LANCZOS)
    assert noise_of(opened(crop(image, region, budget)), wanted) < 4


@given(st.integers(1, 200), st.integers(1, 200))
@settings(deadline=None, max_examples=50)
def test_a_crop_is_not_enlarged(width: int, height: int) -> None:
    """Each side is at most one token larger than the region's, scaled only where the processor's 56 × 56 pixels ask for it."""
    seen = crop(noise(200, 200), Box(0, 0, width, height), PixelBudget(640)).size
    scale = max(1.0, math.sqrt(56 * 56 / (width * height)))
    assert seen.width <= width * scale + 28
    assert seen.height <= height * scale + 28


def test_a_view_at_its_own_size_keeps_every_pixel() -> None:
    """A region whose sides are multiples of 28 and that fits the budget is shown exactly as it is."""
    image = noise(280, 280)
    region = Box(10, 20, 10 + 140, 20 + 84)
    assert opened(crop(image, region, PixelBudget(640))).tobytes() == image.crop(region.edges).tobytes()


@pytest.mark.parametrize("region", [Box(0, 0, 101, 50), Box(0, 0, 50, 101), Box(100, 0, 110, 10), Box(200, 200, 300, 300)])
def test_a_region_outside_the_image_is_refused(region: Box) -> None:
    """A region that is not wholly inside raises, as Pillow would fill the rest with black."""
    with pytest.raises(ValueError, match="is not inside the image"):
        crop(noise(100, 100), region, PixelBudget(16))


def test_a_region_too_long_for_the_engine_is_refused() -> None:
    """A region above 200 : 1 raises."""
    with pytest.raises(ValueError, match="aspect ratio"):
        crop(noise(402, 10), Box(0, 0, 402, 2), PixelBudget(16))


def test_the_bytes_of_a_view_are_the_same_a_second_later() -> None:
    """Decoding and viewing a file again gives the same bytes, which is what the engine's caches are keyed by."""
    data = encoded(noise(120, 90), icc_profile=srgb_profile())
    first = support.look(data, 8)
    time.sleep(1.01)  # a profile embedded by Pillow is stamped with the second
    assert support.look(data, 8) == first


@pytest.mark.parametrize("profile", [None, srgb_profile(), b"rubbish"])
def test_a_view_carries_no_metadata(profile: bytes | None) -> None:
    """No profile, EXIF block or text of the file reaches the engine."""
    data = encoded(noise(56, 56), "JPEG", icc_profile=profile, exif=Image.Exif().tobytes(), comment=b"secret")
    assert opened(support.look(data, 4)).info == {}


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_every_decoded_mode_has_a_view_in_rgb(mode: str) -> None:
    """Grey, RGB and CMYK pixels are all sent as RGB."""
    assert opened(support.look(encoded(noise(64, 64, mode), "JPEG"), 4)).mode == "RGB"


def test_colours_are_converted_to_srgb() -> None:
    """Overview and crop of a red image with swapped primaries are green."""
    data = encoded(Image.new("RGB", (56, 56), "red"), icc_profile=swapped_primaries())
    part = view.crop(ImageFile.of(data), support.header(data), Box(0, 0, 30, 30), PixelBudget(4), Stop(support.START_SECONDS))
    for seen in (support.look(data, 4), part):
        red, green, blue = opened(seen).convert("RGB").split()
        assert (red.getextrema()[1], green.getextrema()[0], blue.getextrema()[1]) == (0, 255, 0)


@given(st.binary(max_size=100), st.sampled_from(["png", "jpeg", "webp"]))
def test_a_data_url_holds_the_very_bytes(data: bytes, kind: str) -> None:
    """The data URL names the format and decodes to the view's bytes."""
    head, _, body = View(data, Size(28, 28), kind).data_url.partition(",")
    assert head == f"data:image/{kind};base64"
    assert base64.b64decode(body, validate=True) == data
