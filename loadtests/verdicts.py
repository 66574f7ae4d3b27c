"""What must not happen to anybody, whatever the load: each finding is a sentence, and fails the run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loadtests.questions import LEFT, Sample
from loadtests.report import percentile

REFUSALS = (429, 503)
"""For want of room. They must say when to come back, or all come back at once."""

FAULTS = (0, 500, 502, 504)
"""Statuses that no request may end with, whatever it is; 0 is a connection that was cut off, or on which nothing came."""

RECOVERED, RECOVERED_SECONDS = 2.0, 0.5
"""A server has recovered from a spike when a question takes at most so many times as long as before, or so many seconds more:
that is what other work on the machine makes of a median of few. One that has not recovered takes as long as in the spike."""


def fault(sample: Sample) -> str:
    """Return what became of a request that was not answered."""
    return f"{sample.reply.status} {sample.reply.code} after {sample.seconds:.1f} s"


def unexpected(samples: Iterable[Sample]) -> list[str]:
    """Return questions that got neither an answer nor a refusal that says when to come back, and other requests that broke."""
    found = []
    for sample in samples:
        what = "a question" if sample.answer is not None else sample.kind
        broken = sample.reply.status in FAULTS and sample.reply.code != LEFT
        refused = sample.reply.status in REFUSALS
        if refused and sample.reply.retry_after is None:
            found.append(f"{fault(sample)}, without retry-after: {what}")
        elif broken or (sample.answer is not None and not sample.answered and not refused):
            found.append(f"{fault(sample)}: {what}")
    return found


def turned_away(samples: Sequence[Sample]) -> list[str]:
    """Return the questions that were refused for want of room: beside harm nobody who means well may be."""
    return [f"{fault(sample)}: a good question" for sample in samples if sample.reply.status in REFUSALS]


def medians(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the median seconds of the answers before, in and after a spike; NaN where there are none."""
    phases = ("before", "spike", "after")
    return {phase: percentile((s.seconds for s in samples if s.kind == phase and s.answered), 50) for phase in phases}


def not_recovered(samples: Sequence[Sample]) -> list[str]:
    """Return whether questions after a spike took longer than before."""
    found = medians(samples)
    allowed = max(RECOVERED * found["before"], found["before"] + RECOVERED_SECONDS)
    if found["after"] <= allowed:  # not so where either is NaN
        return []
    return [f"not recovered: a question took {found['before']:.2f} s before the spike and {found['after']:.2f} s after it"]


def refused(samples: Sequence[Sample]) -> int:
    """Return how many were refused for want of room."""
    return sum(sample.reply.status in REFUSALS for sample in samples)
