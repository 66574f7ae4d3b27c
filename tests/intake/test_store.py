"""Uploaded images: kept for a time, within bounds, each for the one who sent it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import support

from ergo_server.errors import Overloaded, RateLimited, UnknownImage
from ergo_server.imaging.file import ImageFile
from ergo_server.imaging.original import Original
from ergo_server.imaging.work import ImageWork
from ergo_server.intake.store import RETRY_SECONDS, ImageStore


def within(work: Callable[[Callable[[int], Original]], Awaitable[None]]) -> None:
    """Run ``work`` with a maker of images of so many bytes."""

    async def opened() -> None:
        images = ImageWork(threads=1)
        await work(lambda size: Original(ImageFile.of(b"x" * size), images))
        images.close()

    asyncio.run(opened())


def test_an_image_is_found_by_its_id() -> None:
    """What was put is what is got, by the one who put it; ids are long, and no two are alike."""

    async def work(image: Callable[[int], Original]) -> None:
        store = ImageStore()
        kept = [store.put("a", image(10)) for _ in range(50)]
        assert len({stored.id for stored in kept}) == 50
        assert all(stored.id.startswith("img_") and len(stored.id) >= 28 for stored in kept)
        assert all(store.get("a", stored.id) is stored for stored in kept)
        store.clear()

    within(work)


def test_another_tenants_image_does_not_exist() -> None:
    """To another tenant the id says just what an id that never was says, for reading and for deleting."""

    async def work(image: Callable[[int], Original]) -> None:
        store = ImageStore()
        name = store.put("a", image(10)).id
        texts = set()
        for find in (store.get, store.delete):
            for tenant, wanted in (("b", name), ("b", "img_never")):
                with pytest.raises(UnknownImage) as raised:
                    find(tenant, wanted)
                texts.add(raised.value.message)
        assert len(texts) == 1
        assert store.count == 1
        store.clear()

    within(work)


def test_an_image_is_forgotten_in_time() -> None:
    """When its time is over an image is gone, without anybody asking for it, and its bytes are free."""

    async def work(image: Callable[[int], Original]) -> None:
        store = ImageStore(seconds=0.05)
        name = store.put("a", image(10)).id
        await asyncio.to_thread(support.wait_until, lambda: not store.count, "it is forgotten")
        assert store.bytes == 0
        with pytest.raises(UnknownImage):
            store.get("a", name)

    within(work)


def test_a_deleted_image_is_gone() -> None:
    """Deleting frees its bytes; a second time there is nothing to delete."""

    async def work(image: Callable[[int], Original]) -> None:
        store = ImageStore()
        name = store.put("a", image(10)).id
        store.delete("a", name)
        assert (store.count, store.bytes) == (0, 0)
        with pytest.raises(UnknownImage):
            store.delete("a", name)

    within(work)


def test_a_full_store_refuses_and_drops_nothing() -> None:
    """Beyond its share a tenant is told to wait, beyond the whole everybody is; what is kept stays."""

    async def work(image: Callable[[int], Original]) -> None:
        store = ImageStore(max_bytes=100, tenant_bytes=60)
        kept = [store.put("a", image(30)), store.put("a", image(30)), store.put("b", image(30))]
        with pytest.raises(RateLimited, match="60 bytes") as own:
            store.put("a", image(1))
        with pytest.raises(Overloaded) as whole:
            store.put("c", image(11))
        for error in (own, whole):
            assert 1 <= (error.value.retry_after or 0) <= RETRY_SECONDS
        assert [store.get(stored.tenant, stored.id) for stored in kept] == kept
        store.delete("b", kept[2].id)
        store.put("c", image(11))
        store.clear()

    within(work)
