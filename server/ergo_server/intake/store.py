"""Uploaded images, kept for a while so that many questions cost one upload and one decode.

Bounded in three ways: how long, how many bytes in all, how many bytes of one tenant. When there is no room a new image is
refused, and no other is dropped for it: an id is good until the time that came with it. Everything is in the memory of this
process, and gone when it ends.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field

from ergo_server.errors import Overloaded, RateLimited, UnknownImage
from ergo_server.imaging.original import Original

SECONDS = 600.0
"""How long: a person who looks at an image and asks about it, rarely longer."""

MAX_BYTES = 1 << 30
"""In all. A photograph of 12 megapixels has 4 MB."""

TENANT_BYTES = 256 << 20
"""Of one tenant: a fourth of everything, so that no one tenant can fill the store."""

RETRY_SECONDS = 120
"""Longest Retry-After: openai-python gives up at once when told to wait longer."""

ID_BYTES = 18
"""144 random bits: nobody guesses one."""


@dataclass(slots=True)
class Stored:
    """One kept image."""

    id: str
    tenant: str
    original: Original
    bytes: int
    """The file and the overview that was made of it."""
    expires_at: float
    """Unix time."""
    timer: asyncio.TimerHandle = field(repr=False)


class ImageStore:
    """Keeps images.

    Args:
        seconds: how long.
        max_bytes: of all images, their files and overviews together.
        tenant_bytes: of one tenant's.
    """

    def __init__(self, *, seconds: float = SECONDS, max_bytes: int = MAX_BYTES, tenant_bytes: int = TENANT_BYTES) -> None:
        self.seconds = seconds
        self.max_bytes = max_bytes
        self.tenant_bytes = tenant_bytes
        self._kept: dict[str, Stored] = {}

    @property
    def count(self) -> int:
        """Images kept now."""
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """Bytes kept now."""
        return sum(stored.bytes for stored in self._kept.values())

    def put(self, tenant: str, original: Original) -> Stored:
        """Keep an image.

        Raises:
            RateLimited: the tenant keeps as much as it may.
            Overloaded: all tenants together do.
        """
        size = original.stored_bytes
        own = [stored for stored in self._kept.values() if stored.tenant == tenant]
        if size + sum(stored.bytes for stored in own) > self.tenant_bytes:
            message = f"your uploaded images would be more than {self.tenant_bytes:,} bytes; delete some, or wait"
            raise RateLimited(message, retry_after=_wait(own))
        if size + self.bytes > self.max_bytes:
            raise Overloaded("the server keeps as many uploaded images as it can", retry_after=_wait(list(self._kept.values())))
        name = f"img_{secrets.token_urlsafe(ID_BYTES)}"
        timer = asyncio.get_running_loop().call_later(self.seconds, self._kept.pop, name, None)
        self._kept[name] = Stored(name, tenant, original, size, time.time() + self.seconds, timer)
        return self._kept[name]

    def get(self, tenant: str, name: str) -> Stored:
        """Return a kept image of a tenant.

        Raises:
            UnknownImage: never there, not any more, or another tenant's: nobody can tell which.
        """
        stored = self._kept.get(name)
        if stored is None or stored.tenant != tenant:
            raise UnknownImage("there is no such image, or no longer", param="image")
        return stored

    def delete(self, tenant: str, name: str) -> None:
        """Forget an image. Questions that are being answered about it go on.

        Raises:
            UnknownImage: as `get`.
        """
        self.get(tenant, name).timer.cancel()
        del self._kept[name]

    def clear(self) -> None:
        """Forget all."""
        for stored in self._kept.values():
            stored.timer.cancel()
        self._kept.clear()


def _wait(stored: list[Stored]) -> int:
    """Seconds until the first of them goes."""
    first = min((one.expires_at for one in stored), default=time.time())
    return max(1, min(RETRY_SECONDS, round(first - time.time())))
