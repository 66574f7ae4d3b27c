"""Does a server keep what it should give back? Its own /metrics, read every few seconds under steady load, tell."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from prometheus_client.parser import text_string_to_metric_families

WARM_UP = 0.2
"""Share of the readings that are left out: thread pools, allocators and caches fill up when a server is first used."""

MEMORY_SHARE, MEMORY_BYTES = 0.05, 10 << 20
"""Rise of the memory that counts as a leak: above both. Allocators of several threads grow in steps of some megabytes for as long
as fragments find no better place. An image that happens to be decoded at the moment is another 10, but not in a median."""

FILES = 2
"""Rise of the least of the open files that does: more than a request that is under way whenever one counts, and its connection to
the engine. How many are under way on the whole goes up and down with the load; what is not given back stays in the least, too."""

SERIES = 0
"""Rise of the number of series that does: all are there from the start, whatever names callers think of."""

FAILED_SHARE = 0.05
"""Share of the readings that may fail: a server under load may now and then have no connection left, and a sick one has none."""

GAP_SHARE, GAP_READINGS = 0.1, 5
"""Longest time without a reading: a share of the run, or so many times the pause between two, whichever is longer. Of each third
that is compared the most then has been read; and a server that is busy answers a reading late, not never."""

GAP_SECONDS = 3.0
"""A gap that is no longer is no hole in however short a run: the machine may have been busy with something else."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a server held at a moment."""

    at: float
    """Seconds after the start."""
    memory: float
    """Resident bytes."""
    files: int
    """Open files, sockets included."""
    series: int
    """Samples on /metrics."""


def read(at: float, exposition: str) -> Reading:
    """Read an exposition.

    Raises:
        KeyError: it has no ``process_resident_memory_bytes`` or ``process_open_fds``.
        ValueError: it is none.
    """
    found = values(exposition)
    lines = sum(1 for line in exposition.splitlines() if line and not line.startswith("#"))
    return Reading(at, found["process_resident_memory_bytes"], int(found["process_open_fds"]), lines)


def values(exposition: str) -> dict[str, float]:
    """Return the values of an exposition by name; one of several series of a name.

    Raises:
        ValueError: it is none.
    """
    return {sample.name: sample.value for family in text_string_to_metric_families(exposition) for sample in family.samples}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was watched: in the first third after the warm-up, and in the last."""

    what: str
    first: float
    last: float
    allowed: float
    """Largest rise that is no leak."""

    @property
    def leaks(self) -> bool:
        """Whether it rose by more than is allowed."""
        return self.last - self.first > self.allowed

    def __str__(self) -> str:
        rise = f"{self.last - self.first:+,.1f}, allowed {self.allowed:,.1f}"
        return f"{self.what}: {self.first:,.1f} -> {self.last:,.1f} ({rise}): {'LEAK' if self.leaks else 'flat'}"


def holes(readings: Sequence[Reading], failed: Sequence[str], seconds: float, every: float) -> list[str]:
    """Return why the readings do not tell of a whole run.

    Args:
        readings: what there is.
        failed: what became of each of the others.
        seconds: of the run.
        every: seconds between two readings.
    """
    found = []
    if len(failed) > FAILED_SHARE * (len(readings) + len(failed)):
        found.append(f"{len(failed)} of {len(readings) + len(failed)} readings failed: {', '.join(sorted(set(failed)))}")
    moments = [0.0, *(reading.at for reading in readings), seconds]
    longest = max(GAP_SHARE * seconds, GAP_READINGS * every, GAP_SECONDS)
    gaps = [(before, after) for before, after in pairwise(moments) if after - before > longest]
    return found + [f"no reading from {before:.0f} to {after:.0f} s" for before, after in gaps]


def findings(readings: Sequence[Reading]) -> list[Finding]:
    """Compare the first and the last third of the readings, without the warm-up: medians of memory, the least of the files, the
    most of the series.

    Raises:
        ValueError: fewer than 15 readings, from which nothing can be said.
    """
    if len(readings) < 15:
        raise ValueError(f"{len(readings)} readings are too few")
    steady = readings[int(WARM_UP * len(readings)) :]
    third = len(steady) // 3
    first, last = steady[:third], steady[-third:]
    mib = 1 / 2**20
    memory, later_memory = (statistics.median(reading.memory for reading in part) * mib for part in (first, last))
    files, later_files = (min(reading.files for reading in part) for part in (first, last))
    series, later_series = (max(reading.series for reading in part) for part in (first, last))
    return [
        Finding("memory, MiB", memory, later_memory, max(MEMORY_SHARE * memory, MEMORY_BYTES * mib)),
        Finding("open files", files, later_files, FILES),
        Finding("series", series, later_series, SERIES),
    ]
