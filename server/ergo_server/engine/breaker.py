"""A circuit breaker: an engine that keeps failing is left alone for a while, and its callers are told so at once.

    closed ── failures in a row ──→ open ── its time is over, or the engine came back ──→ half open
      ↑                              ↑                                                      │  │
      └── the probe hears from it ───┼──────────────────────────────────────────────────────┘  │
                                     └───────────────────────── the probe fails ───────────────┘

While half open, one request at a time is let through as a probe. Without the breaker every request to a dead engine would wait
for its deadline, holding its place in the queue and its image in memory, and an engine that is starting again would meet the
whole backlog.

What counts as a failure: the engine cannot be reached, breaks, or says nothing until the deadline. What does not: a refusal or a
full queue (it answers), a caller who leaves, and a deadline that passes after the first token, since whoever reads slowly could
bring that about.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Literal

from ergo_server.engine.base import Delta, Engine, EngineStatus, Generation, Sampling
from ergo_server.errors import EngineFailed, EngineRejected, EngineTimeout, EngineUnavailable
from ergo_server.protocol.conversation import Conversation

State = Literal["closed", "open", "half_open"]

FAILURES = 5
"""In a row, until the engine is left alone: vllm-router's default. Fewer would take an accident for an outage."""

OPEN_SECONDS = 30.0
"""For which it then is: vllm-router's default. Half of what a request waits for an engine that hangs."""

LONGEST_RETRY_AFTER = 120
"""Seconds; openai-python does not retry at all when it is told more."""

log = logging.getLogger("ergo_server")


class Breaker:
    """An engine behind a circuit breaker; itself one.

    Args:
        engine: the engine.
        failures: how many in a row, with no whole reply among them, open the breaker.
        seconds: how long it stays open.
        clock: returns seconds.
        told: told whenever it is asked whether the engine is ready, what it said.
        called: the engine in the log.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        failures: int = FAILURES,
        seconds: float = OPEN_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        told: Callable[[bool], None] = lambda ready: None,
        called: str = "the engine",
    ) -> None:
        self.engine = engine
        self._told = told
        self._called = called
        self.name = engine.name
        self._most = failures
        self._seconds = seconds
        self._clock = clock
        self._failed = 0
        self._opens: float | None = None
        """When the first probe may go; None while closed."""
        self._probing = False
        # Counts how often it opened. A request that began before that says nothing about what is so now: those that a dead
        # engine left waiting reach their deadlines long after it came back.
        self._era = 0
        self._was_gone = False
        """Whether the health check has failed since the breaker opened."""

    @property
    def state(self) -> State:
        """Closed: all requests go through; open: none does; half open: one at a time, as a probe."""
        if self._opens is None:
            return "closed"
        return "open" if self._clock() < self._opens else "half_open"

    async def generate(
        self,
        conversation: Conversation,
        sampling: Sampling,
        *,
        session: str = "",
        salt: str = "",
        deadline: float | None = None,
    ) -> AsyncGenerator[Delta | Generation, None]:
        """Continue a conversation, if the engine may be asked.

        Raises:
            EngineUnavailable: it is left alone; nothing was sent. ``retry_after`` says for how long.
            EngineError: as the engine's own.
        """
        era = self._admit()
        begun = False
        pieces = self.engine.generate(conversation, sampling, session=session, salt=salt, deadline=deadline)
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    if not begun:
                        begun = True
                        self._close()
                    if isinstance(piece, Generation):
                        self._failed = 0
                    yield piece
        except (EngineFailed, EngineUnavailable):
            self._fail(era)
            raise
        except EngineTimeout:
            if not begun:
                self._fail(era)
            raise
        except EngineRejected:
            self._close()
            raise
        except asyncio.CancelledError:
            # The request's own deadline may be the same as the engine's, and strike first.
            if not begun and deadline is not None and asyncio.get_running_loop().time() >= deadline:
                self._fail(era)
            raise
        finally:
            if era == self._era:
                self._probing = False  # a probe that ends without a verdict: the next request is one

    async def status(self) -> EngineStatus:
        """Ready where the engine is and the breaker would let a request through.

        A health check that failed while the breaker was open and succeeds now ends its time: the engine was gone and came back.
        One that never failed does not: an engine that hangs may well answer it.
        """
        status = await self._status()
        self._told(status.ready)
        return status

    async def _status(self) -> EngineStatus:
        status = await self.engine.status()
        if self.state == "closed":
            return status
        if not status.ready:
            self._was_gone = True
            return status
        if self._was_gone and self.state == "open":
            self._opens = self._clock()
        if self.state == "open":
            return replace(status, ready=False, detail=f"keeps failing; left alone for {self._left()} s more")
        if self._probing:
            return replace(status, ready=False, detail="keeps failing; one request is trying it")
        return status

    async def aclose(self) -> None:
        """Close the engine."""
        await self.engine.aclose()

    def _admit(self) -> int:
        """Return the era in which a request begins, or refuse it."""
        if self.state == "closed":
            return self._era
        if self.state == "open" or self._probing:
            raise EngineUnavailable("the engine keeps failing and is left alone for a while", retry_after=self._left())
        self._probing = True
        return self._era

    def _left(self) -> int:
        """Return whole seconds until it makes sense to ask again."""
        left = 0.0 if self._opens is None else self._opens - self._clock()
        return min(LONGEST_RETRY_AFTER, max(1, math.ceil(left)))

    def _fail(self, era: int) -> None:
        if era != self._era:
            return
        self._failed += 1
        if self._probing or self._failed >= self._most:
            self._opens = self._clock() + self._seconds
            self._probing = self._was_gone = False
            self._era += 1
            log.warning("%s failed %d times in a row and is left alone for %g s", self._called, self._failed, self._seconds)

    def _close(self) -> None:
        if self._opens is not None:
            self._opens = None
            self._probing = False
            self._failed = 0
            log.warning("%s answers again", self._called)
