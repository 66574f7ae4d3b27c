"""Conversations: what has been said so far, to be said again word for word.

The answer turn repeats the zoom turn exactly and goes on from there, so a conversation only ever grows, and every method
returns a new one. Text from outside is made harmless here, the one place through which all of it passes: a chat template
would take ``<|im_end|>`` in a question for the end of the turn, and ``<|image_pad|>`` for the place of the image (measured
on vLLM 0.32: the visual tokens landed in the text).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ergo_server.imaging.view import View

Role = Literal["system", "user", "assistant"]
Part = str | View


def neutralise(text: str) -> str:
    """Break every ``<|`` with a space, so that no special token can be spelled. All other text stays as it is."""
    return text.replace("<|", "< |")


@dataclass(frozen=True, slots=True)
class Message:
    """One message: text and views, in order."""

    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order.

    >>> Conversation().system("Look.").user("What is < |this| >?").messages[1].parts
    ('What is < |this| >?',)
    """

    messages: tuple[Message, ...] = ()

    def system(self, text: str) -> Conversation:
        """Append a system message."""
        return self.say("system", text)

    def user(self, *parts: Part) -> Conversation:
        """Append a user message."""
        return self.say("user", *parts)

    def assistant(self, text: str) -> Conversation:
        """Append a reply of the model, verbatim but for special tokens that it spelled out."""
        return self.say("assistant", text)

    def say(self, role: Role, *parts: Part) -> Conversation:
        """Append a message of any role."""
        safe: list[Part] = []
        before = ""  # the end of the text so far: templates join the texts of a message, where "<" and "|" could meet
        for part in parts:
            if isinstance(part, str):
                joined = neutralise(before + part)
                safe.append(joined[len(before) :])
                before = joined[-1:]
            else:
                safe.append(part)
                before = ""
        return Conversation((*self.messages, Message(role, tuple(safe))))

    @property
    def views(self) -> Iterator[View]:
        """Every view, in order."""
        return (part for message in self.messages for part in message.parts if isinstance(part, View))
