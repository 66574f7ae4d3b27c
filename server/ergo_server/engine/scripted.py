"""An engine that replays replies: for what no real engine can be made to do on demand, and for measuring the gateway alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from ergo_server.engine.base import Delta, EngineStatus, FinishReason, Generation, Sampling, Usage, within
from ergo_server.errors import EngineError
from ergo_server.protocol.conversation import Conversation

Script = Callable[[Conversation, Sampling], str | EngineError]


@dataclass(slots=True)
class ScriptedEngine:
    """Replies with what ``script`` returns, or raises it. A token is four characters here.

    Args:
        script: called with each conversation and sampling.
        seconds_per_token: pause before each delta.
        ready: what `status` says.
    """

    script: Script
    seconds_per_token: float = 0.0
    ready: bool = True
    name: str = "scripted"
    calls: list[tuple[Conversation, Sampling, str]] = field(default_factory=list)
    """Every call: conversation, sampling, session."""
    running: int = 0
    """Generations under way."""

    def generate(
        self,
        conversation: Conversation,
        sampling: Sampling,
        *,
        session: str = "",
        salt: str = "",
        deadline: float | None = None,
    ) -> AsyncGenerator[Delta | Generation, None]:
        """Replay one reply. It has no cache that a salt could part."""
        return within(deadline, self._replay(conversation, sampling, session))

    async def status(self) -> EngineStatus:
        """Ready, as told."""
        return EngineStatus(self.ready, "scripted")

    async def aclose(self) -> None:
        """Nothing to give back."""

    async def _replay(
        self, conversation: Conversation, sampling: Sampling, session: str
    ) -> AsyncGenerator[Delta | Generation, None]:
        self.calls.append((conversation, sampling, session))
        reply = self.script(conversation, sampling)
        self.running += 1
        try:
            if isinstance(reply, EngineError):
                raise reply
            text, reason = _ended(reply, sampling)
            pieces = [text[i : i + 4] for i in range(0, len(text), 4)]
            for piece in pieces:
                await asyncio.sleep(self.seconds_per_token)
                yield Delta(piece)
            yield Generation(text, reason, _usage(conversation, len(pieces)))
        finally:
            self.running -= 1


def _ended(reply: str, sampling: Sampling) -> tuple[str, FinishReason]:
    ends = [at + len(stop) for stop in sampling.stop if (at := reply.find(stop)) >= 0]
    text = reply[: min(ends)] if ends else reply
    if len(text) > 4 * sampling.max_tokens:
        return text[: 4 * sampling.max_tokens], "length"
    return text, "stop"


def _usage(conversation: Conversation, completion_tokens: int) -> Usage:
    image_tokens = sum(view.visual_tokens for view in conversation.views)
    words = sum(len(part) // 4 + 1 for message in conversation.messages for part in message.parts if isinstance(part, str))
    return Usage(image_tokens + words, completion_tokens, cached_tokens=0, image_tokens=image_tokens)
