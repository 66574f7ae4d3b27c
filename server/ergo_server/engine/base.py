"""The engine: anything that continues a conversation. One method is enough.

What every engine guarantees (tests/engine/test_contract.py holds all three to it, and the circuit breaker):
    * `Engine.generate` yields the reply as text deltas and then exactly one `Generation`, whose text is all deltas joined, from
      the last one on that says ``anew``.
    * Generation ends after one of ``sampling.stop``, which stays in the text; at ``sampling.max_tokens``; or where the model
      ends it.
    * The same conversation and greedy sampling give the same text.
    * Closing the iterator, or cancelling the task that reads it, ends the work behind it; so does the deadline, which is an
      `EngineTimeout`.
    * Conversations of different salts share nothing in the prefix cache.
    * Every failure is an `EngineError`; nothing of another library gets out.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol
from urllib.parse import urlsplit

from ergo_server.errors import EngineTimeout
from ergo_server.protocol.conversation import Conversation

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to generate. Sent in full on every call: vLLM would fill gaps from the model's own generation_config."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one generation, as the engine counted them. None: the engine does not say."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None
    """Of the prompt, those whose keys and values came from the prefix cache."""
    image_tokens: int | None = None
    """Of the prompt, visual tokens."""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the reply."""

    text: str
    tokens: int = 1
    """How many tokens it was made of."""
    anew: bool = False
    """The reply begins anew with this, all deltas before are void: the engine broke, and another writes other words."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished reply."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    queue_seconds: float | None = None
    """How long it waited in the engine, as the engine reports it; None where it does not."""
    first_token_seconds: float | None = None
    """From its arrival in the engine to its first token, likewise."""
    model: str = ""
    """The name under which the engine serves the model; empty where it goes by none."""
    server: str = ""
    """Host and port of the server that wrote it; empty where that is this process."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Whether the engine can be asked now."""

    ready: bool
    model: str | None = None
    detail: str = ""


class Engine(Protocol):
    """Continues conversations."""

    name: str
    """vllm, embedded or scripted."""

    def generate(
        self,
        conversation: Conversation,
        sampling: Sampling,
        *,
        session: str = "",
        salt: str = "",
        deadline: float | None = None,
    ) -> AsyncGenerator[Delta | Generation, None]:
        """Continue a conversation; see the head of this module.

        Args:
            conversation: what has been said; the last message is the user's.
            sampling: how to generate.
            session: the same for all turns of one request; engines with several replicas route by it.
            salt: conversations of different salts share nothing in the prefix cache; empty shares with all that have none.
                At most 128 characters, none of them ``@``, ``/``, ``\\`` or NUL: what vLLM takes.
            deadline: time of the event loop, in seconds, by which the reply must be over; None: whenever it is.

        Raises:
            EngineTimeout: the deadline passed. If it had before the first piece was asked for, nothing was begun.
            EngineError: the engine is unreachable, busy, refuses, or breaks.
        """

    async def status(self) -> EngineStatus:
        """Say whether the engine can be asked now. Never raises."""

    async def aclose(self) -> None:
        """Give back what the engine holds. Generations in flight end with an error."""


def address(url: str) -> str:
    """Return host and port of an engine's URL: what it is called by. User and password in it are secrets, and name nobody."""
    return urlsplit(url).netloc.rpartition("@")[2]


async def within(
    deadline: float | None, pieces: AsyncGenerator[Delta | Generation, None]
) -> AsyncGenerator[Delta | Generation, None]:
    """Pass on a reply until the deadline, and close it then. For engines: each owes `Engine.generate` this.

    The time that the reader takes between two pieces counts, but the deadline never strikes in the reader's code: whoever is busy
    when it passes meets it at the next piece.

    Raises:
        EngineTimeout: the deadline passed; the message says how long the reply was given.
    """
    loop = asyncio.get_running_loop()
    end = math.inf if deadline is None else deadline
    given = end - loop.time()
    if given <= 0:
        raise EngineTimeout("the deadline had passed before the engine was asked")
    late = f"the engine did not finish within {round(given, 2):g} s"
    async with contextlib.aclosing(pieces):
        while True:
            if loop.time() >= end:
                raise EngineTimeout(late)
            try:
                async with asyncio.timeout_at(deadline):
                    piece = await anext(pieces)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise EngineTimeout(late) from None
            yield piece
