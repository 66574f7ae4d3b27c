"""How long a slow peer is waited for."""

from __future__ import annotations


class Pace:
    """Patience with a peer that sends or reads: waiting uses it up, bytes earn it back.

    So one number bounds the longest silence, and with the rate the slowest average: who moves fewer bytes a second than the
    rate runs out of patience sooner or later, who moves more can fall silent at any time for all of it.

    Args:
        patience: seconds; there is never more of it.
        bytes_per_second: what earns a second.
    """

    def __init__(self, patience: float, bytes_per_second: float) -> None:
        self._whole = self.left = patience
        self._rate = bytes_per_second

    def waited(self, seconds: float) -> None:
        """The peer was waited for."""
        self.left -= seconds

    def moved(self, count: int) -> None:
        """The peer sent or took ``count`` bytes."""
        self.left = min(self._whole, self.left + count / self._rate)

    def restart(self) -> None:
        """Nothing is expected of the peer any more."""
        self.left = self._whole
