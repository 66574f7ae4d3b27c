"""Several engines that serve the same model, as one: each image has one that keeps its cache, and the others stand in for it.

Who is asked: rendezvous hashing (Thaler and Ravishankar, 1998). Every engine gets a number for a session, the highest is asked;
so both turns of a question, and all questions of one session, meet one prefix cache; an engine that leaves takes only its own
sessions along, and every gateway that knows the same addresses, in whatever order, decides alike without a word to the others.

Who is not: an engine whose health check failed twice in a row is asked only after all others, until one check succeeds. Twice,
because vLLM's one API process answers late while it reads large images.

When an engine fails:
    * Unreachable, left alone by its circuit breaker, or with a full queue: it has done nothing, and the next is asked, and so on.
    * Broken while it answered: one other engine begins the reply anew, and only one, so that a question which brings engines down
      does not bring down all. What the caller has of the reply is not sent twice: greedy decoding mostly repeats it, and then the
      reply goes on where it stopped. If it does not repeat it, a delta says ``anew``.
    * Ejected by its health check before the first word of a reply, while another is well: as one that broke. Whoever hangs says
      nothing until the deadline; and a question that makes engines hang is one that brings them down. After the first word the
      reply goes on: an engine that still writes is slow, not gone.
    * A deadline, a refusal: the next would do no better.

Larger fleets have routers of their own; see docs/scaling.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from ergo_server.engine.base import Delta, Engine, EngineStatus, Generation, Sampling
from ergo_server.errors import EngineBusy, EngineError, EngineFailed, EngineUnavailable
from ergo_server.protocol.conversation import Conversation

FailoverReason = Literal["unavailable", "busy", "failed"]
"""Why another engine was asked."""

FAILOVER_REASONS: tuple[FailoverReason, ...] = get_args(FailoverReason)

CHECK_SECONDS = 2.0
"""Between two health checks. An engine that is gone costs those who ask it before that an extra connection, refused at once."""

FAILED_CHECKS = 2
"""In a row, until an engine is asked last."""

log = logging.getLogger("ergo_server")


@dataclass(slots=True)
class _Replica:
    """One engine, and what its health checks said."""

    name: str
    engine: Engine
    status: EngineStatus = field(default_factory=lambda: EngineStatus(False, detail="not asked yet"))
    failed_checks: int = 0

    @property
    def ejected(self) -> bool:
        return self.failed_checks >= FAILED_CHECKS

    def rank(self, session: str) -> tuple[bool, bytes]:
        """Return what the replica is chosen by for a session; the highest comes first."""
        return not self.ejected, hashlib.blake2b(f"{self.name}\0{session}".encode(), digest_size=16).digest()

    async def check(self) -> None:
        """Ask whether it can be asked."""
        was_ejected = self.ejected
        try:
            self.status = await self.engine.status()
        except Exception:
            # None is raised, says `Engine.status`. If one is all the same, it must not end the checks, which nobody would see:
            # for the rest of the gateway's life the engine would be what it was last.
            log.exception("the health check of engine %s broke", self.name)
            self.status = EngineStatus(False, detail="its health check broke")
        self.failed_checks = 0 if self.status.ready else self.failed_checks + 1
        if self.ejected != was_ejected:
            log.warning("engine %s %s", self.name, "is asked last: it is not ready" if self.ejected else "is ready again")


@dataclass(eq=False, slots=True)
class _Wait:
    """A turn that waits for the first piece of its reply."""

    replica: _Replica
    others: Sequence[_Replica]
    """Who may be asked instead."""
    patience: asyncio.Timeout

    @property
    def vain(self) -> bool:
        return self.replica.ejected and any(other.status.ready for other in self.others)


class Replicas:
    """Several engines as one.

    Args:
        engines: by a name that is the same on every gateway: the address.
        seconds: between two health checks of each.
        told: told of each turn that another engine was asked for, why.

    Raises:
        ValueError: there are none.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        *,
        seconds: float = CHECK_SECONDS,
        told: Callable[[FailoverReason], None] = lambda reason: None,
    ) -> None:
        if not engines:
            raise ValueError("no engines")
        self._replicas = [_Replica(name, engine) for name, engine in engines.items()]
        self.name = self._replicas[0].engine.name
        self._seconds = seconds
        self._told = told
        self._checks: list[asyncio.Task[None]] = []
        self._waits: set[_Wait] = set()

    async def generate(
        self,
        conversation: Conversation,
        sampling: Sampling,
        *,
        session: str = "",
        salt: str = "",
        deadline: float | None = None,
    ) -> AsyncGenerator[Delta | Generation, None]:
        """Continue a conversation on the session's engine, or on one that stands in; without a session, on any.

        Raises:
            EngineBusy: no engine could be asked, and a queue was full. ``retry_after`` is the least that any of them named.
            EngineError: as the engine's own, where no other could be asked, or would help.
        """
        self._watch()
        reply = _Reply()
        errors: list[EngineError] = []
        order = self.order(session)
        for number, replica in enumerate(order):
            if errors:
                self._told(_reason(errors[-1]))
            reply.begin()
            others: Sequence[_Replica] = () if _broken(errors) else order[number + 1 :]
            pieces = replica.engine.generate(conversation, sampling, session=session, salt=salt, deadline=deadline)
            try:
                async with contextlib.aclosing(self._heard(pieces, replica, others)) as heard:
                    async for piece in heard:
                        for passed in reply.end(piece) if isinstance(piece, Generation) else reply.feed(piece):
                            yield passed
                return
            except (EngineBusy, EngineUnavailable) as error:
                errors.append(error)
            except EngineFailed as error:
                if _broken(errors):
                    raise
                errors.append(error)
        final = next((error for error in errors if isinstance(error, EngineBusy)), errors[-1])
        if final.retry_after is not None:
            final.retry_after = min(error.retry_after for error in errors if error.retry_after is not None)
        raise final

    def order(self, session: str) -> Sequence[_Replica]:
        """Return the engines in the order in which they are asked for a session."""
        key = session or secrets.token_hex()
        return sorted(self._replicas, key=lambda replica: replica.rank(key), reverse=True)

    async def status(self) -> EngineStatus:
        """Ready where one engine is, as the last checks saw it; probes of the gateway cause none."""
        self._watch()
        ready = [replica.status for replica in self._replicas if replica.status.ready]
        if not ready:
            return self._replicas[0].status
        some = "" if len(ready) == len(self._replicas) else f"{len(ready)} of {len(self._replicas)} engines are ready"
        return replace(ready[0], detail=some)

    async def aclose(self) -> None:
        """Close all engines."""
        for check in self._checks:
            check.cancel()
        await asyncio.gather(*self._checks, return_exceptions=True)
        await asyncio.gather(*(replica.engine.aclose() for replica in self._replicas))

    def _watch(self) -> None:
        """Begin the health checks, which need a running loop."""
        if not self._checks:
            self._checks = [asyncio.create_task(self._check(replica)) for replica in self._replicas]

    async def _check(self, replica: _Replica) -> None:
        while True:
            await replica.check()
            self._give_up()
            await asyncio.sleep(self._seconds)

    def _give_up(self) -> None:
        """End the waits that are in vain."""
        for wait in [wait for wait in self._waits if wait.vain]:
            self._waits.remove(wait)
            wait.patience.reschedule(asyncio.get_running_loop().time())

    async def _heard(
        self, pieces: AsyncGenerator[Delta | Generation, None], replica: _Replica, others: Sequence[_Replica]
    ) -> AsyncGenerator[Delta | Generation, None]:
        """Pass on a reply.

        Raises:
            EngineFailed: before it began, its engine was ejected, and one of the others was well.
        """
        async with contextlib.aclosing(pieces):
            try:
                async with asyncio.timeout(None) as patience:
                    wait = _Wait(replica, others, patience)
                    self._waits.add(wait)
                    try:
                        first = await anext(pieces)
                    finally:
                        self._waits.discard(wait)
            except TimeoutError:
                raise EngineFailed("the engine fell silent before it answered") from None
            yield first
            async for piece in pieces:
                yield piece


class _Reply:
    """What the caller has of a reply, however many engines it takes."""

    def __init__(self) -> None:
        self._passed = ""
        self._passed_tokens = 0

    def begin(self) -> None:
        """Say that an engine begins it, for the first time or anew."""
        self._text = ""
        self._tokens = 0
        self._repeats = bool(self._passed)

    def feed(self, delta: Delta) -> list[Delta]:
        """Take a delta of the engine that writes now; returns what the caller gets."""
        self._text += delta.text
        self._tokens += delta.tokens
        if not self._repeats:
            self._passed, self._passed_tokens = self._text, self._tokens
            return [delta]
        if self._passed.startswith(self._text):
            return []  # the caller has it
        if self._text.startswith(self._passed):
            rest = Delta(self._text[len(self._passed) :], max(0, self._tokens - self._passed_tokens))
        else:
            rest = Delta(self._text, self._tokens, anew=True)
        self._repeats = False
        self._passed, self._passed_tokens = self._text, self._tokens
        return [rest]

    def end(self, generation: Generation) -> list[Delta | Generation]:
        """Take the end of the reply; returns what the caller gets."""
        if self._repeats and self._text != self._passed:
            return [Delta(self._text, self._tokens, anew=True), generation]
        return [generation]


def _broken(errors: Sequence[EngineError]) -> bool:
    """Say whether an engine broke over the reply."""
    return any(isinstance(error, EngineFailed) for error in errors)


def _reason(error: EngineError) -> FailoverReason:
    if isinstance(error, EngineBusy):
        return "busy"
    return "failed" if isinstance(error, EngineFailed) else "unavailable"
