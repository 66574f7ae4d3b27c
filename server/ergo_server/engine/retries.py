"""How often a failed request may be sent again.

One retry cures a passing failure. When nothing works, one retry for every request doubles the load on an engine that is
already in trouble, and callers that retry by themselves multiply that again. So retries are paid from a budget that requests
earn: in an outage it is spent within seconds, and from then on the share bounds what is sent beyond the requests themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

RetryOutcome = Literal["retried", "budget_exhausted"]

SHARE = 0.1
"""Retries that one request earns: in the long run at most one request in ten is sent twice. The figure is that of the chapter on
overload in Google's book on site reliability."""

BURST = 10
"""Most retries that can be saved up, and what there is at the start. The one-time error of vLLM's image cache meets whoever asks
about an image after a reader who left: ten such questions in a row are cured, and in an outage ten requests more are nothing."""


class RetryBudget:
    """Counts what may still be sent again. Of one engine; used from one event loop.

    Args:
        share: retries that one request earns, 0 to 1.
        burst: most retries that can be saved up; 0: nothing is ever sent again.
        told: told of each request that failed in a way that a retry may cure, whether it was sent again.
    """

    def __init__(
        self, share: float = SHARE, burst: int = BURST, told: Callable[[RetryOutcome], None] = lambda outcome: None
    ) -> None:
        self._share = share
        self._burst = burst
        self._told = told
        self._left = float(burst)

    def earn(self) -> None:
        """Take note of a request."""
        self._left = min(self._burst, self._left + self._share)

    def take(self) -> bool:
        """Say whether a failed request may be sent again; if so, that retry is spent."""
        if self._left < 1:
            self._told("budget_exhausted")
            return False
        self._left -= 1
        self._told("retried")
        return True
