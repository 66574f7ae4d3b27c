"""Open-loop arrivals: who asks does not wait for those before, so a server that stalls cannot slow its own load down.

Latency then counts from the moment a request was due, not from when it could be sent; else a stall of ten seconds would show as
one slow request, and the hundred that were due meanwhile not at all (coordinated omission).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import gevent

Schedule = tuple[float, ...]
"""Seconds after the start at which requests are due, ascending."""


def poisson(rate: float, seconds: float, seed: int) -> Schedule:
    """Return arrivals with exponential gaps, the same for the same seed.

    Args:
        rate: a second, on average.
        seconds: none is due later than that.
        seed: of the gaps.
    """
    draw, due, schedule = random.Random(seed), 0.0, []
    while (due := due + draw.expovariate(rate)) < seconds:
        schedule.append(due)
    return tuple(schedule)


def keep(schedule: Schedule, start: float, ask: Sequence[Callable[[float], object]]) -> None:
    """Call each of ``ask`` in a greenlet of its own when it is due; returns when all have returned.

    Args:
        schedule: when; as long as ``ask``.
        start: `time.perf_counter` at the schedule's zero.
        ask: told the moment it was due, as `time.perf_counter` counts.
    """
    under_way = []
    for due, one in zip(schedule, ask, strict=True):
        gevent.sleep(max(0.0, start + due - time.perf_counter()))
        under_way.append(gevent.spawn(one, start + due))
    gevent.joinall(under_way, raise_error=True)
