"""What each tenant may use: requests a minute, requests at once, visual tokens a minute.

Requests and visual tokens are token buckets that hold one minute's worth and fill continuously. A request takes from the first
when it begins. How many visual tokens it costs is known only when it ends, so that one begins as long as there are any, and
the true figure is taken afterwards: the bucket may then owe, and nothing begins until that is filled up again.

The headers are OpenAI's (``x-ratelimit-limit-requests`` and so on). Under ``tokens`` they tell of *visual* tokens, the ones that
are limited here. Unlimited is shown by no header.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from ergo_server.api.keys import Limits, Tenant
from ergo_server.errors import ErgoError, RateLimited
from ergo_server.telemetry.metrics import Rejection

MAX_RETRY_SECONDS = 120
"""openai-python does not retry at all when it is told to wait for longer (3.54, ``MAX_RETRY_AFTER_DELAY``)."""

CONCURRENCY_RETRY_SECONDS = 1.0
"""After which to try again where too many run at once: when one of them ends is not known, but that takes seconds."""


class Refused(Exception):
    """A request is not let in.

    Args:
        reason: which limit it was, for the metrics.
        kind: the error that the caller is told.
        message: its text.
        seconds: until it makes sense to try again.
    """

    def __init__(self, reason: Rejection, kind: type[ErgoError], message: str, seconds: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_ms = min(max(_ms(seconds), 1), 1000 * MAX_RETRY_SECONDS)
        self.error = kind(message, retry_after=math.ceil(self.retry_ms / 1000))


class Bucket:
    """A token bucket: full at first, filled continuously, with room for one minute's worth.

    Args:
        per_minute: how much it holds, and how much flows in during a minute.
        clock: monotonic seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._at = clock()

    @property
    def level(self) -> float:
        """What is in it now; below 0, what it owes."""
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return self._level

    def take(self, amount: int) -> None:
        """Take out any amount, whether it is there or not; a negative one puts it back."""
        self._level = min(self.per_minute, self.level - amount)

    def seconds_until(self, level: float) -> float:
        """Return the seconds until it has filled up to a level."""
        return max(0.0, (level - self.level) * 60 / self.per_minute)


class _Account:
    """What one tenant has used lately."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self.running = 0
        self.adopt(limits, clock)

    def adopt(self, limits: Limits, clock: Callable[[], float]) -> None:
        """Begin anew with these limits; what runs goes on, and counts."""
        self.limits = limits
        self.requests = Bucket(limits.requests_per_minute, clock) if limits.requests_per_minute else None
        self.tokens = Bucket(limits.visual_tokens_per_minute, clock) if limits.visual_tokens_per_minute else None

    @property
    def blank(self) -> bool:
        """Whether a fresh one would be no different."""
        buckets = (self.requests, self.tokens)
        return not self.running and all(bucket is None or bucket.level >= bucket.per_minute for bucket in buckets)


class TenantLimits:
    """Keeps each tenant within its limits. Holds no more than one small account for each tenant that has asked lately.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    @contextlib.contextmanager
    def entered(self, tenant: Tenant) -> Iterator[None]:
        """Let a request of a tenant run. One that is `Refused` within, by the server as a whole, costs the tenant nothing.

        Raises:
            Refused: one of the tenant's limits is reached; the first of them is named.
        """
        account = self._account(tenant)
        if account.limits != tenant.limits:  # the keys were read again
            account.adopt(tenant.limits, self._clock)
        self._check(account)
        account.running += 1
        if account.requests:
            account.requests.take(1)
        try:
            yield
        except Refused:
            if account.requests:
                account.requests.take(-1)
            raise
        finally:
            account.running -= 1

    def charge(self, name: str, visual_tokens: int) -> None:
        """Take what a tenant's request has cost, before the request leaves `entered`."""
        account = self._accounts.get(name)
        if account is not None and account.tokens is not None:
            account.tokens.take(visual_tokens)

    def headers(self, tenant: Tenant) -> list[tuple[bytes, bytes]]:
        """Return the limits, what is left, and when all of it is there again, for a response."""
        account = self._account(tenant)
        found: list[tuple[bytes, bytes]] = []
        for kind, bucket in (("requests", account.requests), ("tokens", account.tokens)):
            if bucket is not None:
                reset = _duration(bucket.seconds_until(bucket.per_minute))
                values = (("limit", bucket.per_minute), ("remaining", max(0, math.floor(bucket.level))), ("reset", reset))
                found += ((f"x-ratelimit-{name}-{kind}".encode(), str(value).encode()) for name, value in values)
        return found

    def _check(self, account: _Account) -> None:
        limits = account.limits
        if 0 < limits.concurrent_requests <= account.running:
            text = f"the limit of {limits.concurrent_requests} requests at once for this key is reached"
            raise Refused("concurrency", RateLimited, text, CONCURRENCY_RETRY_SECONDS)
        if account.requests and (wait := account.requests.seconds_until(1)):
            text = f"the limit of {limits.requests_per_minute} requests a minute for this key is reached"
            raise Refused("rate_limit", RateLimited, text, wait)
        if account.tokens and (wait := account.tokens.seconds_until(1)):
            text = f"the limit of {limits.visual_tokens_per_minute} visual tokens a minute for this key is reached"
            raise Refused("token_budget", RateLimited, text, wait)

    def _account(self, tenant: Tenant) -> _Account:
        account = self._accounts.get(tenant.name)
        if account is None:
            # Whoever has not asked for a minute need not be remembered, be it a tenant that exists no more.
            self._accounts = {name: kept for name, kept in self._accounts.items() if not kept.blank}
            account = self._accounts[tenant.name] = _Account(tenant.limits, self._clock)
        return account


def _ms(seconds: float) -> int:
    """Return whole milliseconds, none too few; a nanosecond is an error of floating point."""
    return math.ceil(round(1000 * seconds, 6))


def _duration(seconds: float) -> str:
    """Write a time as OpenAI's headers do: ``0s``, ``20ms``, ``8.64s``, ``1m30s``."""
    ms = _ms(seconds)
    if 0 < ms < 1000:
        return f"{ms}ms"
    minutes, ms = divmod(ms, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{ms / 1000:g}s"
