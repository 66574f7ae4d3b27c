"""Memory is reserved before a decode and given back when its thread has ended, whoever stopped waiting meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
import support
from hypothesis import given, settings
from hypothesis import strategies as st

from ergo_server.errors import ImageTooLarge, ImageTooSlow, Overloaded
from ergo_server.imaging.file import Stop
from ergo_server.imaging.work import Hold, ImageWork, Reserve

PATIENCE = 60.0


def test_more_than_there_is_will_never_be_there() -> None:
    """What no waiting can satisfy is refused at once, and the text names both figures."""
    with pytest.raises(ImageTooLarge, match=r"11 bytes.*limit is 10"):
        asyncio.run(Reserve(10).take(11, PATIENCE))


def test_who_waits_too_long_is_told_so() -> None:
    """After its time the waiting one gets an error that says when to come back, and leaves nothing behind."""

    async def work() -> None:
        reserve = Reserve(10)
        first = await reserve.take(8, PATIENCE)
        with pytest.raises(Overloaded) as raised:
            await reserve.take(5, 0.01)
        assert raised.value.retry_after
        assert (reserve.in_use, reserve.waiting) == (8, 0)
        first.release()
        assert reserve.in_use == 0

    asyncio.run(work())


def test_the_first_who_waits_is_the_first_who_is_served() -> None:
    """A small request does not overtake a large one that waits; when the large one gives up, it is served."""

    async def work() -> None:
        reserve = Reserve(10)
        first = await reserve.take(6, PATIENCE)
        large = asyncio.create_task(reserve.take(8, PATIENCE))
        await asyncio.sleep(0)
        assert reserve.try_take(1) is None
        small = asyncio.create_task(reserve.take(2, PATIENCE))
        await asyncio.sleep(0)
        assert not small.done()
        large.cancel()
        hold = await small
        assert reserve.in_use == 8
        first.release()
        hold.release()
        hold.release()
        assert reserve.in_use == 0

    asyncio.run(work())


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 16), st.booleans()), max_size=30))
def test_no_bytes_are_lost_or_made(steps: list[tuple[int, bool]]) -> None:
    """Whatever is taken, given back, waited for and given up, never more than all is in use, and in the end nothing is."""

    async def work() -> None:
        reserve = Reserve(16)
        tasks: list[asyncio.Task[Hold]] = []
        for count, gives_up in steps:
            tasks.append(asyncio.create_task(reserve.take(count, PATIENCE)))
            await asyncio.sleep(0)
            if gives_up:
                tasks[0].cancel()  # without effect on one that has its bytes already
            else:
                give_back(tasks)
            assert 0 <= reserve.in_use <= reserve.total
        for _ in range(len(steps) + 2):
            give_back(tasks)
            await asyncio.sleep(0)
        assert (reserve.in_use, reserve.waiting, tasks) == (0, 0, [])

    def give_back(tasks: list[asyncio.Task[Hold]]) -> None:
        for task in [task for task in tasks if task.done()]:
            tasks.remove(task)
            if not task.cancelled():
                task.result().release()

    asyncio.run(work())


async def soon(condition: Callable[[], bool]) -> None:
    """Wait until something is so, while the event loop goes on."""
    await asyncio.to_thread(support.wait_until, condition, "it is so")


def test_memory_is_held_until_the_thread_has_ended() -> None:
    """Cancelling the one who waits tells the decode to stop; the bytes are free when it has, not before."""

    async def work() -> None:
        images, go, stopped = ImageWork(threads=1), threading.Event(), threading.Event()

        def decode(stop: Stop) -> None:
            while not stop.cancelled:
                pass
            stopped.set()
            go.wait(PATIENCE)

        task = asyncio.create_task(images.run(decode, await images.reserve(1000)))
        await soon(lambda: images.busy == 1)
        task.cancel()
        await asyncio.wait({task})
        await asyncio.to_thread(stopped.wait, PATIENCE)
        assert (images.memory.in_use, images.busy) == (1000, 1)
        go.set()
        await soon(lambda: not images.busy)
        assert images.memory.in_use == 0
        images.close()

    asyncio.run(work())


@pytest.mark.parametrize("fails", [False, True])
def test_kept_memory_is_the_callers(fails: bool) -> None:
    """With a result to keep, the bytes stay reserved; a decode that failed gives them back."""

    async def work() -> None:
        images = ImageWork(threads=1)
        hold = await images.reserve(1000)

        def decode(stop: Stop) -> int:
            return 1 // (not fails)

        if fails:
            with pytest.raises(ZeroDivisionError):
                await images.run(decode, hold, keep=True)
        else:
            await images.run(decode, hold, keep=True)
        await soon(lambda: not images.busy)
        assert images.memory.in_use == (0 if fails else 1000)
        hold.release()
        assert images.memory.in_use == 0
        images.close()

    asyncio.run(work())


def test_a_decode_that_takes_too_long_is_told_to_stop() -> None:
    """The time limit reaches the thread, and the caller learns which limit it was."""

    async def work() -> None:
        images = ImageWork(threads=1, decode_seconds=0.05)

        def decode(stop: Stop) -> None:
            while True:
                stop.check()

        with pytest.raises(ImageTooSlow, match=r"0\.05 s"):
            await images.run(decode)
        images.close()

    asyncio.run(work())


def test_what_arrives_takes_its_share_of_the_memory_only() -> None:
    """Images that still arrive are given no more than their part, nor what others have taken; all of it comes back."""

    async def work() -> None:
        images = ImageWork(threads=1, memory_bytes=10, arrivals_share=0.4)
        first = images.reserve_for_arrival(3)
        assert first is not None
        assert images.reserve_for_arrival(2) is None
        rest = await images.reserve(7)
        assert images.reserve_for_arrival(1) is None
        rest.release()
        second = images.reserve_for_arrival(1)
        assert second is not None
        first.release()
        second.release()
        assert images.memory.in_use == 0
        assert images.reserve_for_arrival(4) is not None
        images.close()

    asyncio.run(work())
