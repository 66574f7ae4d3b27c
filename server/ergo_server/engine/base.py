"""The engine: anything that continues a conversation. One method is enough.

What every engine guarantees (tests/engine/test_contract.py holds all three to it):
    * `Engine.generate` yields the reply as text deltas and then exactly one `Generation`, whose text is all deltas joined.
    * Generation ends after one of ``sampling.stop``, which stays in the text; at ``sampling.max_tokens``; or where the model
      ends it.
    * The same conversation and greedy sampling give the same text.
    * Closing the iterator, or cancelling the task that reads it, ends the work behind it.
    * Every failure is an `EngineError`; nothing of another library gets out.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

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


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished reply."""

    text: str
    finish_reason: FinishReason
    usage: Usage


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
        self, conversation: Conversation, sampling: Sampling, *, session: str = "", salt: str = ""
    ) -> AsyncGenerator[Delta | Generation, None]:
        """Continue a conversation; see the head of this module.

        Args:
            conversation: what has been said; the last message is the user's.
            sampling: how to generate.
            session: the same for all turns of one request; engines with several replicas route by it.
            salt: conversations of different salts share nothing in the prefix cache; empty shares with all that have none.

        Raises:
            EngineError: the engine is unreachable, busy, refuses, or breaks.
        """

    async def status(self) -> EngineStatus:
        """Say whether the engine can be asked now. Never raises."""

    async def aclose(self) -> None:
        """Give back what the engine holds. Generations in flight end with an error."""
