"""One turn, no zoom: for comparison, and for images that fit the budget anyway."""

from __future__ import annotations

from dataclasses import dataclass

from ergo_server.imaging.geometry import Box, Size
from ergo_server.imaging.view import View
from ergo_server.protocol.base import Action, Ask, CropRule, Malformed, Prompts, Question
from ergo_server.protocol.conversation import Conversation
from ergo_server.protocol.prompts import fill
from ergo_server.protocol.replies import parse_answer


@dataclass(frozen=True, slots=True)
class SinglePolicy:
    """What is there, from the overview alone."""

    prompts: Prompts
    name: str = "single"
    max_turns: int = 1
    crop_rule: CropRule = CropRule()

    def first(self, question: Question, overview: View) -> Ask:
        """Ask for the answer."""
        text = fill(self.prompts.single_user, question, choices=True)
        conversation = Conversation().system(self.prompts.single_system).user(overview, text)
        return Ask(conversation, stop=("</answer>",), answers=True)

    def parse(self, reply: str, turn: int) -> Action:
        """Every reply is an answer."""
        return parse_answer(reply)

    def next(self, ask: Ask, reply: str, question: Question, view: View) -> Ask:
        """Never reached: the only reply is an answer."""
        raise AssertionError("a single turn has no next one")

    def on_malformed(self, malformed: Malformed, image: Size) -> Box:
        """Never reached: the only reply is an answer."""
        raise AssertionError("an answer is never malformed")
