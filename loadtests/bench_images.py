"""The image path beside the naive one, in one run: ``make bench-images``.

Naive is what a reference script does: Pillow opens the file, decodes all of it, resizes bicubically, writes a PNG as Pillow
does by default, and encodes it in base64; the crop is cut from the decoded image, resized with Lanczos, written and encoded
alike. Ours is what the server does. Both are given the bytes and end with the text that goes into the engine's request.

Times are processor time, medians of rounds in which both take turns; peak memory is that of a process of its own for each.
Compare the ratios, not the milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ergo_server.imaging import decode, view
from ergo_server.imaging.file import ImageFile, Stop
from ergo_server.imaging.geometry import Box, PixelBudget, Size
from ergo_server.imaging.header import Limits, read_header
from ergo_server.imaging.original import Original
from ergo_server.imaging.work import ImageWork

BUDGET = PixelBudget(640)
"""ERGO-7B's."""

SIZES = {2: (1632, 1224), 12: (4032, 3024), 24: (6000, 4000), 50: (8192, 6144), 108: (12000, 9000)}
"""Megapixels: what a screen, a telephone, a camera, a good camera and the largest telephone take."""

FORMS = {
    "JPEG": {"format": "JPEG", "quality": 90},
    "progressive JPEG": {"format": "JPEG", "quality": 90, "progressive": True},
    "PNG": {"format": "PNG", "compress_level": 1},
    "WebP": {"format": "WEBP", "quality": 75, "method": 2},
}

BARS = {"JPEG": {2: 8, 12: 5.5, 24: 4.5, 50: 4.5, 108: 4}, "progressive JPEG": {24: 1.8}, "PNG": {24: 2.3}, "WebP": {24: 2.0}}
"""Least ratio of the time to the overview, by megapixels (research of this project)."""

UPLOAD_BITS = 300e6
"""A second: a good connection. The bar: the overview at most 10 ms after the last byte."""

PATIENCE = 600.0


def photograph(width: int, height: int) -> Image.Image:
    """Draw something as dear to decode as a telephone's photograph, 2 to 3 bits a pixel: softer than its pixels, with a sensor's
    grain, shapes and text."""
    draw = np.random.default_rng(7)
    side = 2048
    across = np.fft.fftfreq(side)
    scale = 1 / np.maximum(np.hypot(across[:, None], across[None, :]), 1 / side) ** 1.8

    def wave() -> NDArray[np.float64]:
        """Return noise with most of its contrast in the coarse, as photographs have."""
        made: NDArray[np.float64] = np.fft.ifft2(np.fft.fft2(draw.normal(size=(side, side))) * scale).real
        return made / float(made.std())

    light, grain = wave(), draw.normal(scale=4, size=(side, side))
    layers = [128 + 45 * light + 12 * wave() + grain for _ in range(3)]
    tile = Image.fromarray(np.stack(layers, axis=-1).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(tile)
    for number in range(60):
        x, y, size = (int(draw.integers(0, side)) for _ in range(3))
        colour = tuple(int(c) for c in draw.integers(0, 256, 3))
        pen.ellipse((x, y, x + size // 12, y + size // 12), fill=colour)
        pen.text((y, x), f"No. {number}", fill=colour, font=ImageFont.load_default(12 + size // 20))
    tile = tile.transpose(Image.Transpose.ROTATE_90)
    whole = Image.new("RGB", (width, height))
    for number, (x, y) in enumerate((x, y) for y in range(0, height, side) for x in range(0, width, side)):
        whole.paste(tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if number % 2 else tile, (x, y))
    return whole


def encoded(image: Image.Image, form: str) -> bytes:
    """Write an image in one of the forms."""
    with io.BytesIO() as file:
        image.save(file, **FORMS[form])  # type: ignore[arg-type]
        return file.getvalue()


def middle(size: Size) -> Box:
    """Return the tenth of an image that is in its middle."""
    share = 0.1**0.5
    width, height = round(size.width * share), round(size.height * share)
    left, top = (size.width - width) // 2, (size.height - height) // 2
    return Box(left, top, left + width, top + height)


class Naive:
    """Pillow, as a script would use it."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def overview(self) -> bytes:
        """Return the overview as base64."""
        self.image = Image.open(io.BytesIO(self.data)).convert("RGB")
        return self._sent(self.image.resize(BUDGET.view_size(Size(*self.image.size)), Image.Resampling.BICUBIC))

    def crop(self) -> bytes:
        """Return the crop as base64, cut from the image that `overview` has decoded."""
        box = middle(Size(*self.image.size))
        return self._sent(self.image.crop(box.edges).resize(BUDGET.view_size(box.size), Image.Resampling.LANCZOS))

    def _sent(self, seen: Image.Image) -> bytes:
        with io.BytesIO() as file:
            seen.save(file, "PNG")
            return base64.b64encode(file.getvalue())


class Ours:
    """The server's path."""

    def __init__(self, data: bytes) -> None:
        self.file = ImageFile.of(data)
        self.source: ImageFile | decode.Pixels = self.file

    def overview(self) -> bytes:
        """Return the overview as a ``data:`` URL."""
        self.header = read_header(self.file, Limits(), Stop(PATIENCE))
        return view.overview(self.file, self.header, BUDGET, Stop(PATIENCE)).data_url.encode()

    def load(self) -> None:
        """Decode the whole where the server does so beside the zoom turn; nobody waits for that."""
        if decode.keeps(self.header):
            self.source = decode.load(self.file, self.header, Stop(PATIENCE))

    def crop(self) -> bytes:
        """Return the crop as a ``data:`` URL."""
        return view.crop(self.source, self.header, middle(self.header.size), BUDGET, Stop(PATIENCE)).data_url.encode()


def timed(work: Callable[[], bytes]) -> tuple[float, int]:
    """Return seconds of processor time, of all threads, and the bytes that came out."""
    started = time.process_time()
    size = len(work())
    return time.process_time() - started, size


def compare(data: bytes, rounds: int) -> dict[str, float]:
    """Return the medians of both paths' times, and the bytes that they send."""
    seconds: dict[str, list[float]] = {"naive overview": [], "naive crop": [], "overview": [], "crop": []}
    sent = {"naive": 0, "ours": 0}
    for _ in range(rounds):
        naive, ours = Naive(data), Ours(data)
        for name, work in (("naive overview", naive.overview), ("overview", ours.overview)):
            took, size = timed(work)
            seconds[name].append(took)
            sent["naive" if "naive" in name else "ours"] = size
        ours.load()
        for name, work in (("naive crop", naive.crop), ("crop", ours.crop)):
            took, size = timed(work)
            seconds[name].append(took)
            sent["naive" if "naive" in name else "ours"] += size
    return {name: statistics.median(times) for name, times in seconds.items()} | {f"{k} sent": float(v) for k, v in sent.items()}


def peak(path: Path, whose: str) -> int:
    """Return the bytes by which one overview raises the peak memory of a fresh process."""
    command = [sys.executable, __file__, "--peak", whose, str(path)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(whose: str, path: Path) -> None:
    """Print how far the peak memory of this process rises; warmed up with a small image, so that only pixels count."""
    small = encoded(Image.new("RGB", (300, 200)), "PNG")
    data = path.read_bytes()
    for warm, given in ((True, small), (False, data)):
        before = highest()
        (Naive(given) if whose == "naive" else Ours(given)).overview()
        if not warm:
            print(highest() - before)


def highest() -> int:
    """Return the most memory that this process ever had, in bytes. Not getrusage's: that begins with the parent's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


async def after_the_last_byte(data: bytes, *, streamed: bool) -> float:
    """Upload at `UPLOAD_BITS`; returns seconds from the last byte to the overview."""
    work = ImageWork(threads=2, arriving=2)
    file = ImageFile()
    original = Original(file, work)
    if streamed:
        original.expect(BUDGET)
    ended = 0.0

    def upload() -> None:
        nonlocal ended
        started, chunk = time.perf_counter(), 65536
        for at in range(0, len(data), chunk):
            ahead = at * 8 / UPLOAD_BITS - (time.perf_counter() - started)
            if ahead > 0:
                time.sleep(ahead)
            loop.call_soon_threadsafe(file.write, data[at : at + chunk])
        loop.call_soon_threadsafe(file.end)
        ended = time.perf_counter()

    loop = asyncio.get_running_loop()
    sender = threading.Thread(target=upload)
    sender.start()
    await asyncio.to_thread(sender.join)
    await original.overview(BUDGET)
    took = time.perf_counter() - ended
    await original.aclose()
    work.close()
    return took


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megapixels", type=int, nargs="*", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--forms", nargs="*", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=5, help="at 24 megapixels; smaller images get more (%(default)s)")
    parser.add_argument("--peak", nargs=2, metavar=("WHOSE", "FILE"), help="print one process's peak memory (used by itself)")
    args = parser.parse_args()
    if args.peak:
        print_peak(args.peak[0], Path(args.peak[1]))
        return
    print("Ratios are naive ÷ ours: above 1, ours is faster, or smaller. Bar: least ratio of the time to the overview.\n")
    print("| image | file | overview | ratio | bar | crop of a tenth | ratio | sent | peak memory | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        for megapixels in args.megapixels:
            picture = photograph(*SIZES[megapixels])
            for form in args.forms:
                path = Path(folder) / "image"
                try:
                    path.write_bytes(encoded(picture, form))
                except ValueError as error:  # libwebp bounds the first part of a lossy file; this picture has too many details
                    print(f"| {megapixels} MP {form} | cannot be written: {error} |" + " |" * 8, flush=True)
                    continue
                data = path.read_bytes()
                found = compare(data, max(1, min(5 * args.rounds, 120 // megapixels)))
                ratio = found["naive overview"] / found["overview"]
                memory = {whose: max(1, peak(path, whose)) for whose in ("naive", "ours")}
                bar = BARS[form].get(megapixels)
                if bar and ratio < bar:
                    missed.append(f"{megapixels} MP {form}: {ratio:.1f} < {bar}")
                cells = [
                    f"{megapixels} MP {form}",
                    f"{len(data) / 1e6:.1f} MB",
                    f"{1000 * found['overview']:.0f} ms",
                    f"{ratio:.1f}",
                    f"{bar or '–'}",
                    f"{1000 * found['crop']:.0f} ms",
                    f"{found['naive crop'] / found['crop']:.1f}",
                    f"{found['naive sent'] / found['ours sent']:.2f}",
                    f"{memory['ours'] / 2**20:.0f} MiB",
                    f"{memory['naive'] / memory['ours']:.1f}",
                ]
                print("| " + " | ".join(cells) + " |", flush=True)
    if 24 in args.megapixels:
        data = encoded(photograph(*SIZES[24]), "JPEG")
        after, before = ([asyncio.run(after_the_last_byte(data, streamed=s)) for _ in range(5)] for s in (False, True))
        print(f"\n24 MP JPEG uploaded at {UPLOAD_BITS / 1e6:.0f} Mbit/s, from the last byte to the overview:")
        print(f"decoded while it arrives {1000 * statistics.median(before):.1f} ms (bar 10), ", end="")
        print(f"decoded afterwards {1000 * statistics.median(after):.1f} ms")
        if statistics.median(before) > 0.01:
            missed.append(f"24 MP JPEG after the last byte: {1000 * statistics.median(before):.1f} ms > 10")
    print("\nbars missed: " + ("; ".join(missed) or "none"))


if __name__ == "__main__":
    main()
