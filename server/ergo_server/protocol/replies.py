"""What the model's replies mean. Any text is accepted; every outcome is a value; nothing raises.

A zoom reply, as the checkpoints are trained to write it:  ``<think>…</think><zoom>[x1, y1, x2, y2]</zoom>``
An answer:                                                 ``<think>…</think><answer>…</answer>``

The form is read leniently (floats, signs, spaces, other brackets, a missing closing tag), because a stray space says nothing
about where the model looked; what was lenient is said, since the paper's own code would have fallen back there.

The reader of answers works on text as it arrives, so that streaming and not streaming cannot disagree: `parse_answer` feeds
it the whole reply. In one of the paper's two prompt versions the thinking ends with a second ``<think>``; the answer tag
therefore also ends the thinking.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ergo_server.protocol.base import Answer, Malformed, MalformedReason, Space, Zoom

_EXACT = re.compile(r"<zoom>\[(\d{1,9}), ?(\d{1,9}), ?(\d{1,9}), ?(\d{1,9})\]</zoom>")
_TAG = re.compile(r"<zoom>(.{0,400}?)(?:</zoom>|\Z)", re.DOTALL | re.IGNORECASE)
# At most 12 digits either side of the point: enough for any image, and no number that takes long to convert.
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,12}(?:\.\d{0,12})?|\.\d{1,12})(?![\w.])")


def parse_zoom(reply: str) -> Zoom | Malformed:
    """Read the box of a zoom reply, in pixels of the first view.

    The first ``<zoom>`` tag counts. Exactly four numbers must stand in it; their order is checked when the box is cut.

    >>> parse_zoom("<think>left</think><zoom>[10, 20, 30, 40]</zoom>").edges
    (10.0, 20.0, 30.0, 40.0)
    >>> parse_zoom("I see it.")
    Malformed(reason=<MalformedReason.MISSING: 'missing'>)
    """
    exact = _EXACT.search(reply)
    tag = _TAG.search(reply)
    if tag is None:
        return Malformed(MalformedReason.MISSING)
    if exact is not None and exact.start() == tag.start():
        x1, y1, x2, y2 = (float(group) for group in exact.groups())
        return Zoom((x1, y1, x2, y2), Space.SEEN)
    numbers = [float(number) for number in _NUMBER.findall(tag[1])]
    if len(numbers) != 4:
        return Malformed(MalformedReason.NOT_NUMBERS)
    return Zoom((numbers[0], numbers[1], numbers[2], numbers[3]), Space.SEEN, lenient=True)


Kind = Literal["reasoning", "answer"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the reply that is certain to belong to the reasoning, or to the answer."""

    kind: Kind
    text: str


class AnswerReader:
    """Splits a reply into reasoning and answer while it arrives.

    Feed it the reply in any pieces; it returns what has become certain, and `finish` returns the rest. All answer pieces
    joined are the answer, without white space around it; likewise the reasoning.

    Text outside every tag is held back: it is reasoning if an answer tag follows, and the answer if none ever does.
    """

    _OPEN_THINK, _CLOSE_THINK, _OPEN, _CLOSE = "<think>", "</think>", "<answer>", "</answer>"

    def __init__(self) -> None:
        self.tagged = False
        self._state: Literal["outside", "thinking", "answering", "done"] = "outside"
        self._buffer = ""
        self._held = ""
        self._text: dict[Kind, str] = {"reasoning": "", "answer": ""}
        self._space: dict[Kind, str] = {"reasoning": "", "answer": ""}

    def feed(self, text: str) -> list[Piece]:
        """Take the next piece of the reply."""
        self._buffer += text
        pieces: list[Piece] = []
        while self._advance(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """Say that the reply is over."""
        pieces: list[Piece] = []
        match self._state:
            case "thinking":
                self._emit(pieces, "reasoning", self._buffer)
            case "answering":
                self._emit(pieces, "answer", self._buffer)
            case "outside":
                self._held += self._buffer
        if not self.tagged:
            self._emit(pieces, "answer", self._held)
        self._buffer = self._held = ""
        self._state = "done"
        return pieces

    @property
    def answer(self) -> Answer:
        """What has been read so far; complete after `finish`."""
        return Answer(self._text["answer"], self._text["reasoning"], self.tagged)

    def _advance(self, pieces: list[Piece]) -> bool:
        """Consume up to and including the next tag; False when more text is needed."""
        tags: tuple[str, ...]
        match self._state:
            case "outside":
                tags = (self._OPEN, self._OPEN_THINK, self._CLOSE_THINK)
            case "thinking":
                tags = (self._OPEN, self._CLOSE_THINK, self._OPEN_THINK)
            case "answering":
                tags = (self._CLOSE,)
            case _:
                self._buffer = ""
                return False
        before, tag, self._buffer = _split(self._buffer, tags)
        if self._state == "outside":
            self._held += before
        else:
            self._emit(pieces, "answer" if self._state == "answering" else "reasoning", before)
        if tag is None:
            return False
        if tag == self._OPEN:
            self._emit(pieces, "reasoning", self._held)
            self._held = ""
            self.tagged = True
            self._state = "answering"
        elif tag == self._CLOSE:
            self._state = "done"
        else:
            self._state = "thinking" if tag == self._OPEN_THINK and self._state == "outside" else "outside"
        return True

    def _emit(self, pieces: list[Piece], kind: Kind, text: str) -> None:
        """Pass text on, holding white space back until something follows it, and dropping it at the start."""
        text = self._space[kind] + text
        if not self._text[kind]:
            text = text.lstrip()
        solid = text.rstrip()
        self._space[kind] = text[len(solid) :]
        if solid:
            self._text[kind] += solid
            pieces.append(Piece(kind, solid))


def _split(buffer: str, tags: Sequence[str]) -> tuple[str, str | None, str]:
    """Split at the first tag. Without one, what could be the beginning of a tag is kept back as the rest."""
    found = re.search("|".join(tags), buffer)  # one pass, however many tags follow
    if found is not None:
        return buffer[: found.start()], found[0], buffer[found.end() :]
    for length in range(min(len(buffer), max(map(len, tags)) - 1), 0, -1):
        if any(tag.startswith(buffer[-length:]) for tag in tags):
            return buffer[:-length], None, buffer[-length:]
    return buffer, None, ""


def parse_answer(reply: str) -> Answer:
    """Read the answer and the reasoning of a whole reply.

    >>> parse_answer("<think>It is blue.</think> <answer> B </answer>")
    Answer(text='B', reasoning='It is blue.', tagged=True)
    >>> parse_answer("B")
    Answer(text='B', reasoning='', tagged=False)
    """
    reader = AnswerReader()
    reader.feed(reply)
    reader.finish()
    return reader.answer
