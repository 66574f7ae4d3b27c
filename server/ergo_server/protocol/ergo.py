"""ERGO's own protocol: one look at the whole, one at a region of it, then the answer. Always two turns.

Facts (from the published code and the paper): the box is in pixels of the overview; the crop is cut from the original without
padding; the first reply is repeated verbatim; the choices are first shown in the answer turn; a reply without a usable box is
followed by the whole image. Upstream sends that whole image at up to 16,384 visual tokens; here it stays within the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

from ergo_server.imaging.geometry import Box, Size
from ergo_server.imaging.view import View
from ergo_server.protocol.base import Action, Ask, CropRule, Malformed, Prompts, Question
from ergo_server.protocol.conversation import Conversation
from ergo_server.protocol.prompts import fill
from ergo_server.protocol.replies import parse_answer, parse_zoom


@dataclass(frozen=True, slots=True)
class ErgoPolicy:
    """Where to look, then what is there."""

    prompts: Prompts
    name: str = "ergo"
    max_turns: int = 2
    crop_rule: CropRule = CropRule()

    def first(self, question: Question, overview: View) -> Ask:
        """Ask where to look. The choices are not shown: they would be answered from the overview."""
        text = fill(self.prompts.zoom_user, question, choices=False)
        conversation = Conversation().system(self.prompts.zoom_system).user(overview, text)
        return Ask(conversation, stop=("</zoom>",), answers=False)

    def parse(self, reply: str, turn: int) -> Action:
        """The first reply is a box or malformed; the second is an answer, even if it holds another box."""
        return parse_zoom(reply) if turn == 0 else parse_answer(reply)

    def next(self, ask: Ask, reply: str, question: Question, view: View) -> Ask:
        """Show the crop and ask for the answer."""
        text = fill(self.prompts.answer_user, question, choices=True)
        return Ask(ask.conversation.assistant(reply).user(view, text), stop=("</answer>",), answers=True)

    def on_malformed(self, malformed: Malformed, image: Size) -> Box:
        """Show the whole image again: the overview alone decides."""
        return Box.whole(image)
