"""Bytes to pixels: every kind of file that is let in, and every way in which bytes can be wrong. All files are made here."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import support
from hostile import encoded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageCms, ImageDraw, ImageFont, ImageOps, ImageStat

from ergo_server.errors import (
    BodyTooSlow,
    ImageAspect,
    ImageError,
    ImageTooLarge,
    ImageTooSlow,
    ImageUnreadable,
    ImageUnsupported,
)
from ergo_server.imaging.decode import Pixels, load
from ergo_server.imaging.file import Cancelled, ImageFile, Stop
from ergo_server.imaging.geometry import Box, PixelBudget, Size
from ergo_server.imaging.header import MAX_PIXELS, Limits, read_header
from ergo_server.imaging.view import View, crop, overview, pixels

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def exif(orientation: int) -> bytes:
    """Return an EXIF block that holds an orientation."""
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


@functools.cache
def photo(width: int = 1200, height: int = 800) -> Image.Image:
    """Return an image that compresses like a photograph: gradients, soft shapes, a little grain."""
    soft = [Image.effect_noise((width // 40, height // 40), 120).resize((width, height), Image.Resampling.BICUBIC) for _ in "rgb"]
    grain = Image.effect_noise((width, height), 20)
    return Image.merge("RGB", [Image.blend(band, grain, 0.1) for band in soft])


def pixel(data: bytes, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    """Return the sRGB colour of one decoded pixel."""
    colour = decoded(data).getpixel(at)
    assert isinstance(colour, tuple)
    return tuple(int(part) for part in colour)


def patience() -> Stop:
    """Return what lets a decode take its time."""
    return Stop(support.START_SECONDS)


def decoded(data: bytes) -> Image.Image:
    """Return all pixels of a file, upright, in sRGB."""
    return pixels(data, Limits(), patience())


def kept(data: bytes) -> Pixels:
    """Return all pixels of a file as they are kept for crops."""
    return load(ImageFile.of(data), support.header(data), patience())


def found(data: bytes) -> tuple[Size, str, int]:
    """Return what the header says of size, format and orientation."""
    header = support.header(data)
    return header.size, header.format, header.orientation


def close(found: tuple[int, ...], wanted: tuple[int, ...], within: int = 12) -> bool:
    """Say whether two colours are about the same."""
    return all(abs(a - b) <= within for a, b in zip(found, wanted, strict=True))


def psnr(view: View, wanted: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of a view in decibels."""
    difference = ImageChops.difference(Image.open(io.BytesIO(view.data)), wanted)
    mean_square = sum(rms**2 for rms in ImageStat.Stat(difference).rms) / 3
    return 10 * math.log10(255**2 / mean_square) if mean_square else math.inf


# --- orientation --------------------------------------------------------------------------------------------------------------

# Where the first pixel of the file ends up, by orientation (CIPA DC-008: "the 0th row is at the visual … of the image").
CORNERS = {
    1: ("left", "top"),
    2: ("right", "top"),
    3: ("right", "bottom"),
    4: ("left", "bottom"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def marked(kind: str, orientation: int) -> bytes:
    """Return a file of 64 × 48 stored pixels with a red mark of 16 × 16 in its first corner."""
    image = Image.new("RGB", (64, 48), WHITE)
    image.paste(RED, (0, 0, 16, 16))
    return encoded(image, kind, exif=exif(orientation), quality=95, subsampling=0, lossless=True)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_made_upright(kind: str, orientation: int) -> None:
    """The mark in the file's first corner is seen where EXIF says, the size is upright, and header and decode agree."""
    data = marked(kind, orientation)
    size = Size(64, 48) if orientation < 5 else Size(48, 64)
    assert found(data) == (size, kind.lower(), orientation)
    assert decoded(data).size == size
    side, end = CORNERS[orientation]
    x = {"left": 8, "right": size.width - 9}
    y = {"top": 8, "bottom": size.height - 9}
    for column in x:
        for row in y:
            assert close(pixel(data, (x[column], y[row])), RED if (column, row) == (side, end) else WHITE), (column, row)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_upright(orientation: int) -> None:
    """Values outside 1 to 8 are taken for 1."""
    assert support.header(marked("PNG", orientation)).orientation == 1


@pytest.mark.parametrize(
    "block", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\0" * 40, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_a_broken_exif_block_is_upright(block: bytes) -> None:
    """A malformed EXIF block leaves the image readable, with orientation 1."""
    assert found(encoded(Image.new("RGB", (4, 2)), exif=block)) == ((4, 2), "png", 1)


def test_the_orientation_of_a_png_is_read_without_its_pixels() -> None:
    """The eXIf chunk before the pixels counts, and the header can be read where the pixels are cut off."""
    data = marked("PNG", 6)
    assert found(data[: data.index(b"IDAT") + 8]) == ((48, 64), "png", 6)


# --- modes --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_shows_white_and_not_the_hidden_colour(kind: str) -> None:
    """A fully transparent red pixel is white, and a half transparent one is half red."""
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 128))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = encoded(image, kind, **options)
    assert (pixel(data), pixel(data, (1, 0))) == (WHITE, (255, 127, 127))


def test_grey_with_alpha_is_composited_on_white() -> None:
    """A transparent black pixel of mode LA is white, an opaque one black."""
    image = Image.new("LA", (2, 1), (0, 0))
    image.putpixel((1, 0), (0, 255))
    assert (pixel(encoded(image)), pixel(encoded(image), (1, 0))) == (WHITE, BLACK)


def test_the_transparent_colour_of_an_opaque_mode_is_white() -> None:
    """A colour that a tRNS chunk names is white in modes RGB and L, and its neighbours keep theirs."""
    for mode, hidden, shown in (("RGB", (1, 2, 3), (1, 2, 4)), ("L", 10, 11)):
        image = Image.new(mode, (2, 1), hidden)
        image.putpixel((1, 0), shown)
        data = encoded(image, transparency=hidden)
        assert pixel(data) == WHITE
        assert pixel(data, (1, 0)) == (shown if isinstance(shown, tuple) else (shown,) * 3)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palettes_are_expanded(kind: str) -> None:
    """A palette image has the palette's colours; the transparent entry, where there is one, is white."""
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 255, 0, 0])
    image.putpixel((1, 0), 1)
    assert (pixel(encoded(image, kind)), pixel(encoded(image, kind), (1, 0))) == ((10, 20, 30), RED)
    clear = encoded(image, kind, transparency=0)
    assert (pixel(clear), pixel(clear, (1, 0))) == (WHITE, RED)
    assert kept(encoded(image, kind)).image.bands == 3


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_bits_are_expanded(kind: str) -> None:
    """A one-bit image becomes black and white in mode L, so that resizing it gives greys."""
    image = Image.new("1", (2, 1), 0)
    image.putpixel((1, 0), 1)
    data = encoded(image, kind)
    assert kept(data).image.bands == 1
    assert (pixel(data), pixel(data, (1, 0))) == (BLACK, WHITE)


@pytest.mark.parametrize(("deep", "grey"), [(0, 0), (200, 1), (257, 1), (300, 1), (32_768, 128), (51_400, 200), (65_535, 255)])
def test_sixteen_bit_grey_is_scaled(deep: int, grey: int) -> None:
    """A value of 16 bit becomes the nearest of 8 bit; truncation or clipping would give black or white."""
    assert pixel(encoded(Image.new("I;16", (2, 2), deep))) == (grey,) * 3


def test_the_transparent_value_of_sixteen_bit_grey_is_white() -> None:
    """The value that a tRNS chunk names is white; the values next to it, and all others, are scaled."""
    image = Image.new("I;16", (4, 1))
    for x, deep in enumerate((999, 1000, 1001, 51_400)):
        image.putpixel((x, 0), deep)
    data = encoded(image, transparency=1000)
    assert [pixel(data, (x, 0))[0] for x in range(4)] == [4, 255, 4, 200]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_grey_stays_grey(kind: str) -> None:
    """A grey image has three equal bands of its value."""
    assert close(pixel(encoded(Image.new("L", (16, 16), 100), kind)), (100, 100, 100), within=2)


@pytest.mark.parametrize(("kind", "name"), [("JPEG", "jpeg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp")])
def test_the_format_is_found_from_the_bytes(kind: str, name: str) -> None:
    """Every allowed format is read, sized and named."""
    data = encoded(photo(120, 80), kind)
    assert found(data) == ((120, 80), name, 1)
    assert decoded(data).size == (120, 80)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "MPO"])
def test_the_first_frame_of_several_counts(kind: str) -> None:
    """Of an animation, or of a camera's multi-picture file, the first frame is decoded."""
    frames = [Image.new("RGB", (32, 32), colour) for colour in (RED, (0, 255, 0), (0, 0, 255))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert close(pixel(data, (16, 16)), RED)
    header = support.header(data)
    assert (header.format, header.animated) == (("jpeg", False) if kind == "MPO" else (kind.lower(), True))


# --- colour -------------------------------------------------------------------------------------------------------------------


def swapped_primaries() -> bytes:
    """Return an RGB profile whose red is green and whose green is red: whoever ignores it shows the wrong colour."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"----").replace(b"gXYZ", b"rXYZ").replace(b"----", b"gXYZ")


def cyan_only() -> bytes:
    """Return a CMYK profile of a press that prints cyan as black and the other three inks not at all."""
    identity = b"".join(struct.pack(">i", 65536 * (i % 4 == 0)) for i in range(9))
    ramp = bytes(range(256))
    grid = b"".join(bytes((0 if corner & 8 else 255, 128, 128)) for corner in range(16))  # Lab; the first ink varies slowest
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + ramp * 4 + grid + ramp * 3
    body = struct.pack(">I", 1) + b"A2B0" + struct.pack(">II", 144, len(table)) + table
    head = struct.pack(">I4sI4s4s4s12s4s", 128 + len(body), b"test", 0x02400000, b"prtr", b"CMYK", b"Lab ", b"", b"acsp")
    illuminant = struct.pack(">3i", 63190, 65536, 54061)
    return (head.ljust(68, b"\0") + illuminant).ljust(128, b"\0") + body


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_profile_is_applied(kind: str) -> None:
    """A red of swapped primaries is the green that the profile says it is."""
    options = {"lossless": True} if kind == "WEBP" else {}
    assert close(pixel(encoded(Image.new("RGB", (16, 16), RED), kind, icc_profile=swapped_primaries(), **options)), (0, 255, 0))


def test_cmyk_without_a_profile_is_converted_plainly() -> None:
    """Magenta ink without a profile is magenta."""
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 0, 0)), "JPEG")
    assert kept(data).image.bands == 4
    assert close(pixel(data), (255, 0, 255))


@pytest.mark.parametrize(("inks", "colour"), [((0, 255, 0, 0), WHITE), ((255, 0, 0, 0), BLACK)])
def test_cmyk_is_converted_through_its_profile(inks: tuple[int, int, int, int], colour: tuple[int, int, int]) -> None:
    """The profile of a press that prints only cyan, as black, turns magenta into paper and cyan into black."""
    assert close(pixel(encoded(Image.new("CMYK", (16, 16), inks), "JPEG", icc_profile=cyan_only())), colour)


@pytest.mark.parametrize("profile", [b"rubbish", b"\0" * 200, swapped_primaries()[:300], cyan_only()])
def test_a_broken_or_foreign_profile_is_ignored(profile: bytes) -> None:
    """A profile that cannot be read, or is for another mode, leaves the colours as they are."""
    assert pixel(encoded(Image.new("RGB", (4, 4), RED), icc_profile=profile)) == RED


# --- views of a file and of its pixels ------------------------------------------------------------------------------------------


def photograph(kind: str, orientation: int = 1, width: int = 2400, height: int = 1600) -> bytes:
    """Return a photograph as a file."""
    options = {"JPEG": {"quality": 90}, "progressive": {"quality": 90, "progressive": True}, "WEBP": {"quality": 90}}.get(
        kind, {}
    )
    name = "JPEG" if kind == "progressive" else kind
    return encoded(photo(width, height), name, exif=exif(orientation), **options)


KINDS = ("JPEG", "progressive", "PNG", "WEBP")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_overview_is_as_good_as_pillows(orientation: int, kind: str) -> None:
    """From a reduced decode, or from kept pixels, the overview is that of Pillow's full decode with 45 dB or less noise."""
    data, budget = photograph(kind, orientation), PixelBudget(64)
    header = support.header(data)
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    wanted = image.resize(budget.view_size(header.size), Image.Resampling.BICUBIC)
    for source in (ImageFile.of(data), kept(data)):
        assert psnr(overview(source, header, budget, patience()), wanted) >= 45


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_is_what_pillow_crops(orientation: int, kind: str) -> None:
    """Of any orientation, from the file or from kept pixels, small or large, a crop is Pillow's of the upright image."""
    data, budget = photograph(kind, orientation, 600, 400), PixelBudget(16)
    header = support.header(data)
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    width, height = header.size
    for region in (Box(7, 11, 90, 130), Box(0, 0, width, height), Box(1, height - 101, width, height), Box(5, 3, 6, 5)):
        wanted = image.crop(region.edges).resize(budget.view_size(region.size), Image.Resampling.LANCZOS)
        for source in (ImageFile.of(data), kept(data)):
            assert psnr(crop(source, header, region, budget, patience()), wanted) >= 38, region


def test_a_document_stays_readable() -> None:
    """Small text and hairlines, the hardest there is for a reduced decode, keep 45 dB against the full one."""
    page = Image.new("L", (6000, 4000), 255)
    pen, words = ImageDraw.Draw(page), "All that is written here is small, and must be legible. " * 3
    for line in range(60):
        pen.text((200, 100 + 64 * line), f"{line}. {words}", 0, ImageFont.load_default(40))
        pen.line((200, 155 + 64 * line, 5800, 155 + 64 * line), 128, 2)
    data, budget = encoded(page, "JPEG", quality=92), PixelBudget(640)
    wanted = Image.open(io.BytesIO(data)).convert("RGB").resize(budget.view_size(Size(6000, 4000)), Image.Resampling.BICUBIC)
    assert psnr(overview(ImageFile.of(data), support.header(data), budget, patience()), wanted) >= 45


@pytest.mark.parametrize("kind", [*KINDS, "GIF", "BMP"])
def test_an_arriving_file_gives_the_same_view(kind: str) -> None:
    """Fed in pieces from another thread, a file gives the very bytes that it gives as a whole."""
    data = photograph(kind, width=900, height=600)
    file, whole = ImageFile(), support.look(data, 64)

    def send() -> None:
        for at in range(0, len(data), 1000):
            file.write(data[at : at + 1000])
        file.end()

    sender = threading.Thread(target=send)
    sender.start()
    header = read_header(file, Limits(), patience())
    assert overview(file, header, PixelBudget(64), patience()) == whole
    sender.join()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pixels_are_decoded_before_the_last_byte_is_there(kind: str) -> None:
    """With the last tenth of the file still to come, the decoder has taken in all that is there: the header came long before."""
    data = photograph(kind)
    taken = 0

    class Watched(ImageFile):
        def read_at(self, offset: int, count: int, stop: Stop) -> bytes:
            nonlocal taken
            taken = max(taken, offset)
            return super().read_at(offset, count, stop)

    file = Watched()
    file.write(data[: len(data) * 9 // 10])
    header = read_header(file, Limits(), patience())
    with ThreadPoolExecutor() as pool:
        view = pool.submit(overview, file, header, PixelBudget(64), patience())
        support.wait_until(lambda: taken >= len(data) * 9 // 10, "the decoder waits for the rest")
        assert not view.done()
        file.write(data[len(data) * 9 // 10 :])
        file.end()
        assert view.result() == support.look(data, 64)


# --- what ends a decode early ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_decode_that_is_not_wanted_ends(kind: str) -> None:
    """Waiting for bytes that never come, a decode ends when it is cancelled, and so does one that has all its bytes."""
    data = photograph(kind)
    file, stop = ImageFile(), patience()
    file.write(data[: len(data) // 2])
    header = support.header(data)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(overview, file, header, PixelBudget(64), stop)
        time.sleep(0.1)
        assert not waiting.done()
        stop.cancel()
        with pytest.raises(Cancelled):
            waiting.result(support.START_SECONDS)
    with pytest.raises(Cancelled):
        overview(ImageFile.of(data), header, PixelBudget(64), stop)


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG"])
def test_a_decode_that_takes_too_long_ends_in_the_middle(kind: str) -> None:
    """When its time is over a running decode is stopped, with an error that names the limit."""
    data = photograph(kind, width=5000, height=4000)

    class Late(Stop):
        looks = 0

        @property
        def over(self) -> bool:
            self.looks += 1
            return self.looks > 3

        def check(self) -> None:
            if self.looks > 3:
                raise ImageTooSlow("late", param="image")
            self.looks += 1

    with pytest.raises(ImageTooSlow):
        load(ImageFile.of(data), support.header(data), Late(1))


def test_the_error_of_a_decode_that_is_too_slow_names_the_limit() -> None:
    """It is a 422 of its own, with the seconds that applied."""
    data = photograph("JPEG", width=120, height=80)
    with pytest.raises(ImageTooSlow, match="longer than 0 s") as raised:
        load(ImageFile.of(data), support.header(data), Stop(0))
    assert (raised.value.status, raised.value.code) == (422, "image_too_slow")


def test_a_sender_that_fails_ends_the_decode() -> None:
    """Where the rest of a file will not come, its decode ends with the reason."""
    data = photograph("JPEG")
    file = ImageFile()
    file.write(data[: len(data) // 2])
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(overview, file, support.header(data), PixelBudget(64), patience())
        file.fail(BodyTooSlow("too slow"))
        with pytest.raises(BodyTooSlow):
            waiting.result(support.START_SECONDS)


# --- what is refused ----------------------------------------------------------------------------------------------------------


def declared(width: int, height: int) -> bytes:
    """Return a tiny PNG whose header declares any size."""
    data = encoded(Image.new("1", (1, 1)))
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def check(data: bytes, error: type[ImageError], status: int, code: str) -> None:
    """Check that header and decode both refuse, with the same error."""
    for read in (support.header, decoded):
        with pytest.raises(error) as caught:
            read(data)
        assert (caught.value.status, caught.value.code, caught.value.param) == (status, code, "image")


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"hello, world" * 99, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF\0\0\0\0WEBP"]
)
def test_bytes_that_are_no_image_are_unreadable(data: bytes) -> None:
    """Text, nothing, and bare signatures are a 422 with code image_unreadable."""
    check(data, ImageUnreadable, 422, "image_unreadable")


def test_formats_outside_the_list_are_unsupported() -> None:
    """Files of known formats that are not let in are a 415 with code image_format_unsupported, and are not decoded."""
    small = Image.new("RGB", (16, 16))
    for data in (
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
        b"%PDF-1.7\n%rest",
        encoded(small, "TIFF"),
        encoded(small, "AVIF"),
        encoded(small, "ICO"),
        encoded(small, "PPM"),
        encoded(small, "JPEG2000"),
    ):
        check(data, ImageUnsupported, 415, "image_format_unsupported")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_truncated_file_is_unreadable(kind: str, kept: float) -> None:
    """A file that ends early is a 422, although its header can be read."""
    data = encoded(photo(120, 80), kind)
    data = data[: int(len(data) * kept)]
    with contextlib.suppress(ImageUnreadable):  # WebP has its length in the header
        assert support.header(data).size == (120, 80)
    with pytest.raises(ImageUnreadable) as caught:
        decoded(data)
    assert (caught.value.status, caught.value.code) == (422, "image_unreadable")


def test_a_truncated_jpeg_is_unreadable_at_reduced_size_too() -> None:
    """Decoding at reduced size finds the missing end as well."""
    data = encoded(photo(), "JPEG")
    with pytest.raises(ImageUnreadable):
        support.look(data[: len(data) // 2], 4)


@pytest.mark.parametrize("size", [(50_000, 50_000), (12_800, 10_001), (2_000_000_000, 2_000_000_000)])
def test_too_many_pixels_are_found_in_the_header(size: tuple[int, int]) -> None:
    """A file of a hundred bytes that declares more pixels than the limit is a 413 that names the limit; nothing is decoded."""
    check(declared(*size), ImageTooLarge, 413, "image_too_large")
    with pytest.raises(ImageTooLarge, match="128,000,000"):
        support.header(declared(*size))


def test_the_limit_on_pixels_is_the_callers_alone() -> None:
    """Just the limit passes, one pixel more does not, and a larger limit than Pillow's own holds as well."""
    assert support.header(declared(12_800, 10_000)).size.area == MAX_PIXELS
    assert support.header(declared(100, 50), max_pixels=5000).size == (100, 50)
    with pytest.raises(ImageTooLarge):
        support.header(declared(100, 51), max_pixels=5099)
    assert support.header(declared(30_000, 30_000), max_pixels=900_000_000).size == (30_000, 30_000)


@pytest.mark.parametrize("size", [(402, 2), (2, 402), (201, 1)])
def test_images_longer_than_the_processors_take_are_refused(size: tuple[int, int]) -> None:
    """An aspect ratio of 201 is a 422 with code image_aspect_unsupported."""
    check(encoded(Image.new("L", size)), ImageAspect, 422, "image_aspect_unsupported")


def test_the_longest_image_is_accepted() -> None:
    """An aspect ratio of exactly 200 is decoded."""
    assert decoded(encoded(Image.new("L", (400, 2)))).size == (400, 2)


# --- hostile bytes ------------------------------------------------------------------------------------------------------------


@functools.cache
def valid_files() -> tuple[bytes, ...]:
    """Return small files of every format and of several modes."""
    image = photo(40, 40)
    oriented = {"exif": exif(6), "icc_profile": swapped_primaries()}
    frames = {"save_all": True, "append_images": [Image.new("RGB", (40, 40), RED)]}
    return (
        *(encoded(image, kind, **oriented) for kind in ("JPEG", "PNG", "WEBP")),
        *(encoded(image, kind, **frames) for kind in ("GIF", "WEBP", "PNG", "MPO")),
        encoded(image, "JPEG", progressive=True),
        encoded(image.convert("CMYK"), "JPEG", icc_profile=cyan_only()),
        encoded(image.convert("RGBA"), "BMP"),
        encoded(image.convert("P"), "PNG", transparency=3),
        encoded(image.convert("I").convert("I;16"), "PNG", transparency=7),
    )


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Draw a valid file with some bytes changed, and perhaps its end cut off or something appended."""
    data = bytearray(draw(st.sampled_from(valid_files())))
    near_the_start = st.integers(0, min(len(data) - 1, 150))
    changes = st.tuples(near_the_start | st.integers(0, len(data) - 1), st.integers(0, 255))
    for position, value in draw(st.lists(changes, max_size=12)):
        data[position] = value
    return bytes(data[: draw(st.none() | st.integers(0, len(data)))]) + draw(st.binary(max_size=8))


@given(damaged(), st.integers(4, 64))
@settings(derandomize=True, deadline=None, max_examples=500)
def test_damaged_files_decode_or_are_refused(data: bytes, tokens: int) -> None:
    """Whatever is done to a file, it has an overview, crops and pixels, or raises ImageError and nothing else."""
    with contextlib.suppress(ImageError):
        header = support.header(data, max_pixels=1_000_000)
        file, budget = ImageFile.of(data), PixelBudget(tokens)
        assert overview(file, header, budget, patience()).size == budget.view_size(header.size)
        kept = load(file, header, patience())
        for source in (file, kept):
            width, height = header.size
            crop(source, header, Box(width // 2, height // 2, width // 2 + 1, height // 2 + 1), budget, patience())


@given(st.binary(max_size=200))
@settings(derandomize=True, deadline=None)
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    """Arbitrary bytes raise ImageError and nothing else."""
    with pytest.raises(ImageError):
        decoded(data)
