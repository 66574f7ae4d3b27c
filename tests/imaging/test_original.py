"""The image of a question: looked at while it arrives, kept where that pays, and nothing held when it is over."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable

import pytest
import support
from hostile import encoded
from PIL import Image

from ergo_server.errors import ImageError, ImageUnreadable, Overloaded
from ergo_server.imaging.file import ImageFile
from ergo_server.imaging.geometry import Box, PixelBudget
from ergo_server.imaging.original import Original
from ergo_server.imaging.work import ImageWork

BUDGET = PixelBudget(64)
PART = Box(100, 100, 300, 250)


@functools.cache
def picture(kind: str, width: int = 1600, height: int = 1200) -> bytes:
    """Return the file of an image of some noise."""
    bands = [Image.effect_noise((width // 8, height // 8), 90).resize((width, height)) for _ in "rgb"]
    options = {"progressive": True} if kind == "progressive" else {}
    return encoded(Image.merge("RGB", bands), "JPEG" if options else kind, **options)


def run(work: Callable[[ImageWork], Awaitable[None]], **given: int) -> None:
    """Run ``work`` with threads of its own; in the end no memory is held, and no thread busy."""

    async def opened() -> None:
        images = ImageWork(**{"threads": 2, "arriving": 2, **given})  # type: ignore[arg-type]
        await work(images)
        await asyncio.to_thread(support.wait_until, lambda: not images.busy, "all threads have ended")
        await asyncio.sleep(0)
        assert (images.memory.in_use, images.memory.waiting) == (0, 0)
        images.close()

    asyncio.run(opened())


KINDS = ("JPEG", "progressive", "PNG", "WEBP", "GIF", "BMP")


@pytest.mark.parametrize("kind", KINDS)
def test_views_are_the_same_whole_arriving_or_kept(kind: str) -> None:
    """Overview and crop have the same bytes whether the file was there, came in pieces, was kept as pixels, or there was no
    memory to keep it."""
    data = picture(kind)

    async def whole(images: ImageWork, keep: bool) -> tuple[bytes, bytes]:
        original = Original(ImageFile.of(data), images)
        if keep:
            await original.prepare()
        found = (await original.overview(BUDGET)).data, (await original.crop(PART, BUDGET)).data
        await original.aclose()
        return found

    async def arriving(images: ImageWork) -> tuple[bytes, bytes]:
        original = Original(ImageFile(), images)
        original.expect(BUDGET)
        for at in range(0, len(data), 20_000):
            original.file.write(data[at : at + 20_000])
            await asyncio.sleep(0)
            original.check()
        original.file.end()
        found = (await original.overview(BUDGET)).data, (await original.crop(PART, BUDGET)).data
        await original.aclose()
        return found

    async def work(images: ImageWork) -> None:
        assert await whole(images, True) == await whole(images, False) == await arriving(images)

    run(work)
    run(work, arriving=0)
    run(work, memory_bytes=support.header(data).working_bytes)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "progressive"])
def test_the_overview_is_there_when_the_last_byte_is(kind: str) -> None:
    """When the file has ended, asking for the overview takes no decode any more: the one that ran while it arrived is used."""
    data = picture(kind)

    async def work(images: ImageWork) -> None:
        original = Original(ImageFile(), images)
        original.expect(BUDGET)
        original.file.write(data[: len(data) // 2])
        await asyncio.to_thread(support.wait_until, lambda: images.busy == 1, "it is looked at")
        assert images.memory.in_use > 0
        original.file.write(data[len(data) // 2 :])
        original.file.end()
        await asyncio.to_thread(support.wait_until, lambda: not images.busy, "the overview is made")
        images._threads.shutdown()  # no decode can begin any more
        assert (await original.overview(BUDGET)).data == support.look(data, 64).data
        await original.aclose()

    run(work)


def test_what_is_no_image_is_known_before_its_end() -> None:
    """The first bytes suffice to refuse: whoever writes the rest is told."""

    async def work(images: ImageWork) -> None:
        original = Original(ImageFile(), images)
        original.expect(BUDGET)
        original.file.write(b"no image " * 1000)
        await asyncio.to_thread(support.wait_until, lambda: not images.busy, "the header is read")
        await asyncio.sleep(0.05)
        with pytest.raises(ImageUnreadable):
            original.check()
        await original.aclose()

    run(work)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sent", [0.0, 0.001, 0.5, 1.0])
def test_a_sender_who_leaves_frees_everything(kind: str, sent: float) -> None:
    """Closed at any point of its arrival, an image leaves no thread waiting and no memory reserved."""

    async def work(images: ImageWork) -> None:
        original = Original(ImageFile(), images)
        original.expect(BUDGET)
        original.file.write(picture(kind)[: int(len(picture(kind)) * sent)])
        await asyncio.sleep(0.05)
        await original.aclose()

    run(work)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_given_back(kind: str) -> None:
    """Pixels are kept for what is dear to decode again, not for a plain JPEG, and given back when they are not needed."""

    async def work(images: ImageWork) -> None:
        original = Original(ImageFile.of(picture(kind)), images)
        await original.prepare()
        await original.overview(BUDGET)
        await asyncio.to_thread(support.wait_until, lambda: not images.busy, "it is decoded")
        await asyncio.sleep(0)
        assert (images.memory.in_use > 0) == (kind != "JPEG")
        await original.release()
        assert images.memory.in_use == 0

    run(work)


def test_two_images_that_do_not_fit_wait_for_each_other() -> None:
    """With memory for one decode, several are made one after the other; whoever waits too long is told to come back."""
    data = picture("JPEG")
    need = support.header(data).working_bytes

    async def work(images: ImageWork) -> None:
        originals = [Original(ImageFile.of(data), images) for _ in range(4)]
        views = await asyncio.gather(*(original.overview(BUDGET) for original in originals))
        assert {view.data for view in views} == {support.look(data, 64).data}
        hold = await images.reserve(need)
        images._wait_seconds = 0.01
        with pytest.raises(Overloaded):
            await Original(ImageFile.of(data), images).overview(BUDGET)
        hold.release()

    run(work, memory_bytes=need)


def test_a_broken_end_is_found_by_the_one_who_asks() -> None:
    """An image that breaks off half-way raises when its overview is asked for, and again for a crop from its lower half."""
    low = Box(100, 1000, 300, 1190)

    async def work(images: ImageWork) -> None:
        for kind in KINDS:
            original = Original(ImageFile.of(picture(kind)[: len(picture(kind)) // 2]), images)
            for ask in (original.overview(BUDGET), original.crop(low, BUDGET)):
                with pytest.raises(ImageError):
                    await ask
            await original.aclose()

    run(work)


def test_images_that_do_not_arrive_keep_out_none_that_has() -> None:
    """Beginnings of large images, whose rest never comes, hold a fourth of the memory at most, and nobody waits behind them."""
    data, small = picture("PNG", 3000, 3000), picture("JPEG")
    memory = 8 * support.header(data).working_bytes

    async def work(images: ImageWork) -> None:
        stuck = [Original(ImageFile(), images) for _ in range(16)]
        for original in stuck:
            original.expect(BUDGET)
            original.file.write(data[:5000])
        await asyncio.to_thread(support.wait_until, lambda: images.memory.in_use > 0, "some are looked at")
        await asyncio.sleep(0.2)
        assert (images.memory.in_use <= memory // 4, images.memory.waiting) == (True, 0)
        assert (await Original(ImageFile.of(small), images).overview(BUDGET)).data == support.look(small, 64).data
        for original in stuck:
            await original.aclose()

    run(work, memory_bytes=memory, arriving=16)
