"""One HTTP exchange: what its log line, its trace and its ``Server-Timing`` header are made from.

The pipeline's listeners are told of a question, not of the request that it came with. The two meet here: each request has a
context of its own, in which whatever is done for it runs.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from ergo_server.pipeline import STAGES, EngineCall, Record

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Any other is a text of the caller's."""

OTHER = "other"
"""Stands for what is not in a closed set: no text of the caller's is repeated."""


@dataclass(slots=True)
class Exchange:
    """What is known of an HTTP exchange; filled in on its way."""

    request_id: str
    method: str
    started: float = field(default_factory=time.perf_counter)
    """On the clock of `time.perf_counter`, as are the record's times."""
    began: int = field(default_factory=time.time_ns)
    """The same moment in nanoseconds since 1970."""
    trace_id: str = ""
    """In hexadecimal; empty where nothing is traced."""
    route: str = OTHER
    """Its template."""
    status: int = 0
    seconds: float = 0.0
    tenant: str = ""
    """Empty where it was refused before anybody asked."""
    error: str | None = None
    """The code of what was answered, or ``cancelled``."""
    at_fault: bool = False
    """Whether that was the server's doing, or the engine's."""
    record: Record | None = None
    """Of the question, where a pipeline had it."""
    passed: list[EngineCall] = field(default_factory=list)
    """What was passed through to the engine."""

    @property
    def calls(self) -> tuple[EngineCall, ...]:
        """What the engine was asked, in its order."""
        return self.record.calls if self.record else tuple(self.passed)

    @property
    def outcome(self) -> str:
        """``ok``, ``cancelled``, or an error's code."""
        if self.record is not None and self.record.error:
            return self.record.error
        if self.error:
            return self.error
        failed = next((call.error for call in self.calls if call.error), None)
        return failed or ("ok" if self.status < 400 else OTHER)


_current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


def begin(exchange: Exchange) -> None:
    """Say which exchange all belongs to that is done in this context from now on."""
    _current.set(exchange)


def observe(record: Record) -> None:
    """Listen to a question's end."""
    if (exchange := _current.get()) is not None:
        exchange.record = record


def observe_passed(call: EngineCall) -> None:
    """Listen to the end of a turn that was passed through."""
    if (exchange := _current.get()) is not None:
        exchange.passed.append(call)


def milliseconds(seconds: float) -> float:
    """Return seconds as the responses show them."""
    return round(seconds * 1000, 3)


def server_timing(record: Record) -> str:
    """Return the value of a ``Server-Timing`` header: each stage that ran, and the total, in milliseconds."""
    return ", ".join(
        f"{name};dur={milliseconds(record.timings[name]):g}" for name in (*STAGES, "total") if name in record.timings
    )
