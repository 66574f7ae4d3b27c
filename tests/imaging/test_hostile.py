"""Files made to do harm: bombs of every kind, structures that lie, and thousands of mutations of valid files.

What is proven of each: it becomes a view or one of the errors that name what was wrong, and takes no more memory than the header
had reserved. Memory is that of a process of its own, because the decoders' is not Python's.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hostile import BOMBS, bmp_of_runs, chunk, encoded, gif_of_frames, jpeg_of_scans, png_with, progressive_of_scans, soft, zipped
from PIL import Image

from ergo_server.errors import ImageError, ImageTooLarge, ImageTooSlow, ImageUnreadable
from ergo_server.imaging.file import ImageFile, Stop
from ergo_server.imaging.geometry import Box, PixelBudget, Size
from ergo_server.imaging.header import ImageHeader, Limits, read_header
from ergo_server.imaging.view import View, crop, overview

MUTATIONS = 3000
BUDGET = PixelBudget(16)


def header(data: bytes, **limits: int) -> ImageHeader:
    """Read a whole file's header."""
    return read_header(ImageFile.of(data), replace(Limits(), **limits), Stop(60))


def seen(data: bytes, seconds: float = 60, **limits: int) -> View:
    """Return the overview of a whole file."""
    file = ImageFile.of(data)
    return overview(file, read_header(file, replace(Limits(), **limits), Stop(seconds)), BUDGET, Stop(seconds))


# --- files that lie -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_takes_no_more_memory_than_its_header_reserves(name: str, tmp_path: Path) -> None:
    """Header, overview and a crop at full size of every bomb, and of an honest file of every kind, grow the process by no more
    than ``working_bytes``; where the header is refused, by no more than any decode takes."""
    file = tmp_path / "bomb"  # made here: what making it takes would hide what reading it takes
    file.write_bytes(BOMBS[name]())
    found = apart("bomb", str(file), tmp_path)
    assert found["grown"] <= found["reserve"]


@pytest.mark.parametrize("name", [name for name in BOMBS if "0" in name or "beyond" in name])
def test_a_bomb_is_done_with_quickly(name: str) -> None:
    """No bomb takes the time of its contents: it is refused, or seen, within the limit on one decode."""
    with contextlib.suppress(ImageError):
        seen(BOMBS[name](), seconds=10)


@pytest.mark.parametrize("data", [jpeg_of_scans(22, 64, 64), progressive_of_scans(65)], ids=["sequential", "progressive"])
def test_a_jpeg_of_too_many_scans_is_refused(data: bytes) -> None:
    """More than 64 scans are a 413 that names the limit, whether or not the JPEG calls itself progressive."""
    with pytest.raises(ImageTooLarge, match="64"):
        seen(data)


@pytest.mark.parametrize("data", [jpeg_of_scans(21, 64, 64), progressive_of_scans(64)], ids=["sequential", "progressive"])
def test_a_jpeg_of_many_scans_is_read(data: bytes) -> None:
    """63 sequential scans and 64 progressive ones are within the limit."""
    assert seen(data).visual_tokens <= 16


def test_what_looks_like_a_scan_in_metadata_or_behind_the_end_is_none() -> None:
    """The marker's two bytes, which 6 MB of any profile or preview hold by chance more often than the limit, count only where
    they begin a scan; nor do they in a film that is appended to a photograph."""
    data = encoded(soft(64, 64), "JPEG", progressive=True)
    blocks = b"".join(b"\xff\xeb\xff\xff" + random.Random(n).randbytes(65_533) for n in range(92))
    assert blocks.count(b"\xff\xda") > 64
    assert seen(data + b"\xff\xda" * 1000).visual_tokens <= 16
    assert seen(data[:2] + blocks + data[2:]).visual_tokens <= 16


def test_the_time_limit_ends_the_decode_of_many_scans() -> None:
    """A JPEG of 60 sequential scans is cut off between them: what it takes after a limit of a tenth of its time is a part."""
    data = jpeg_of_scans(20, 3000, 3000)
    start = time.perf_counter()
    seen(data)
    whole = time.perf_counter() - start
    start = time.perf_counter()
    with pytest.raises(ImageTooSlow):
        seen(data, seconds=whole / 10)
    assert time.perf_counter() - start < 0.6 * whole


def test_a_long_first_frame_is_not_metadata() -> None:
    """A GIF whose pixels are longer than the limit on metadata is read, and found to be no animation."""
    image = Image.frombytes("P", (600, 400), random.Random(1).randbytes(240_000))
    image.putpalette(bytes(range(256)) * 3)
    data = encoded(image, "GIF")
    assert len(data) > 200_000
    found = header(data, max_metadata_bytes=100_000)
    assert (found.size, found.animated) == ((600, 400), False)


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif"])
def test_too_much_metadata_is_refused(kind: str) -> None:
    """Comments longer than the limit are a 413 that names the limit; those within it are no reason to refuse."""
    data, at, block = {
        "jpeg": (encoded(soft(64, 64), "JPEG"), 2, b"\xff\xfe" + struct.pack(">H", 60_002) + bytes(60_000)),
        "png": (encoded(soft(64, 64), "PNG"), 33, chunk(b"tEXt", b"k\0" + b"x" * 60_000)),
        "gif": (gif_of_frames(1), 19, b"\x21\xfe" + (b"\xff" + bytes(255)) * 240 + b"\0"),
    }[kind]
    longer = data[:at] + block + data[at:]
    assert header(longer, max_metadata_bytes=70_000).size == (64, 64)
    with pytest.raises(ImageTooLarge, match="50,000"):
        header(longer, max_metadata_bytes=50_000)


def test_run_lengths_are_not_decoded_in_python() -> None:
    """A run-length encoded BMP is refused, or costs no more than ten times the same pixels without runs."""
    took = []
    for data in (encoded(soft(2000, 2000).quantize(256), "BMP"), bmp_of_runs(2000)):
        start = time.perf_counter()
        with contextlib.suppress(ImageError):
            seen(data)
        took.append(time.perf_counter() - start)
    assert took[1] < 10 * took[0]


@pytest.mark.parametrize("size", [(30_000, 30_000), (100_000, 100_000)])
def test_a_bomb_of_pixels_is_refused_from_its_header(size: tuple[int, int]) -> None:
    """A 1-bit PNG of 900 megapixels and more is refused when its first 41 bytes have arrived, naming the limit."""
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 1, 0, 0, 0, 0))
    file = ImageFile()
    file.write(b"\x89PNG\r\n\x1a\n" + ihdr + struct.pack(">I", 1 << 20) + b"IDAT" + bytes(600))
    with pytest.raises(ImageTooLarge, match="128,000,000"):
        read_header(file, Limits(), Stop(60))


# --- mutations ----------------------------------------------------------------------------------------------------------------


@functools.cache
def valid_files() -> tuple[bytes, ...]:
    """Return small files of every format and of several modes."""
    image = soft(48, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [Image.new("RGB", (48, 40), "red")]}
    return (
        *(encoded(image, kind, exif=exif.tobytes()) for kind in ("JPEG", "PNG", "WEBP")),
        *(encoded(image, kind, **frames) for kind in ("GIF", "WEBP", "PNG", "MPO")),
        encoded(image, "JPEG", progressive=True),
        encoded(image.convert("CMYK"), "JPEG"),
        jpeg_of_scans(1, 48, 40),
        encoded(image, "WEBP", lossless=True),
        encoded(image.convert("RGBA"), "WEBP"),
        *(encoded(image.convert(mode), "BMP") for mode in ("RGB", "P", "L", "1")),
        encoded(image.convert("P"), "PNG", transparency=3),
        encoded(image.convert("I").convert("I;16"), "PNG", transparency=7),
        encoded(image.convert("LA"), "PNG"),
        png_with(chunk(b"zTXt", b"k\0\0" + zipped(10_000))),
    )


def mutations(count: int) -> Iterator[bytes]:
    """Yield valid files with bytes changed, cut off, taken out, repeated, or joined to another file's; always the same ones."""
    draw = random.Random(3)
    for _ in range(count):
        data = bytearray(draw.choice(valid_files()))
        for _ in range(draw.choice((1, 1, 2, 4, 12))):
            if len(data) < 2:
                break
            at = draw.randrange(min(len(data), draw.choice((64, 200, len(data)))))
            end = min(len(data), at + draw.choice((1, 4, 16, 200)))
            match draw.randrange(7):
                case 0 | 1:
                    data[at] = draw.randrange(256)
                case 2:
                    data[at:end] = draw.choice((b"\0", b"\xff", b"\x7f")) * (end - at)
                case 3:
                    del data[at : end if draw.random() < 0.7 else len(data)]
                case 4:
                    data[at:at] = data[at:end] * draw.choice((1, 2, 50))
                case 5:
                    other = draw.choice(valid_files())
                    data[at:end] = other[draw.randrange(len(other)) :][: end - at]
                case 6:
                    data[at] ^= 1 << draw.randrange(8)
        yield bytes(data)


def test_thousands_of_mutations_are_seen_or_refused(tmp_path: Path) -> None:
    """Each of 3,000 mutated files becomes views, or an ImageError and nothing else; nothing lets the process grow beyond the
    largest reserve of any of them; some of them, but not all, are refused."""
    found = apart("mutations", str(MUTATIONS), tmp_path)
    assert found["others"] == []
    assert found["grown"] <= found["reserve"]
    assert 0.2 * MUTATIONS < found["refused"] < 0.98 * MUTATIONS


def test_arbitrary_bytes_are_refused() -> None:
    """Arbitrary bytes, also behind the signature of every format, raise ImageError and nothing else."""
    draw = random.Random(4)
    for start in (b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\x20\0\0\0WEBPVP8X", b"BM"):
        for length in (0, 1, 10, 100, 1000):
            with pytest.raises(ImageError):
                seen(start + draw.randbytes(length))


@pytest.mark.parametrize("number", range(len(valid_files())))
def test_a_file_cut_off_anywhere_is_seen_or_unreadable(number: int) -> None:
    """Cut off at any of forty places, a file is seen as far as it was meant to be, or is unreadable."""
    data = valid_files()[number]
    for length in range(0, len(data), max(1, len(data) // 40)):
        with contextlib.suppress(ImageUnreadable):
            seen(data[:length])


# --- a process of its own -----------------------------------------------------------------------------------------------------


def apart(what: str, which: str, folder: Path) -> dict[str, Any]:
    """Run this file in a process of its own and return what it found."""
    command = [sys.executable, __file__, what, which]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}  # where hostile.py is
    done = subprocess.run(command, capture_output=True, cwd=folder, timeout=600, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def grown() -> int:
    """Return the largest size that this process had, in bytes. Not getrusage's: that one begins with the size of the parent."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def views(data: bytes) -> int:
    """Make views of a file and return what its header reserves for that."""
    file = ImageFile.of(data)
    found = read_header(file, Limits(), Stop(60))
    with contextlib.suppress(ImageError):
        overview(file, found, PixelBudget(640), Stop(60))
        width, height = found.size
        corner = Box(max(0, width - 500), max(0, height - 400), width, height)
        crop(file, found, corner if corner.size.aspect <= 200 else Box.whole(Size(width, height)), PixelBudget(640), Stop(60))
    return found.working_bytes


def main(what: str, which: str) -> None:
    """Find out what this process grows by, beyond what a first small image takes, with a file or with many."""
    least = views(encoded(soft(300, 200), "JPEG"))
    files = [Path(which).read_bytes()] if what == "bomb" else list(mutations(int(which)))
    before, reserve, refused, others = grown(), least, 0, []
    for number, data in enumerate(files):
        try:
            reserve = max(reserve, views(data))
        except ImageError:
            refused += 1
        except Exception as error:  # whatever it is, it is a finding
            others.append(f"{number}: {error!r}")
    print(json.dumps({"grown": grown() - before, "reserve": reserve, "refused": refused, "others": others}))


if __name__ == "__main__":
    main(*sys.argv[1:])
