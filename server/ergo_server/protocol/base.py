"""The interface of a policy: how a model that zooms is spoken to. No I/O, no pixels moved.

A policy is asked three things: what to say first, what a reply means, and what to say next. It answers in values; the
pipeline does the work. Replies name places in four different frames across the published policies (pixels of the seen view,
fractions, thousandths, and pixels of the original), so a policy only says which frame it means, and the one function `cut`
converts.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ergo_server.imaging.geometry import Box, Size
from ergo_server.imaging.view import View
from ergo_server.protocol.conversation import Conversation


@dataclass(frozen=True, slots=True)
class Question:
    """What the caller asks of one image."""

    text: str
    choices: tuple[str, ...] = ()
    instructions: str = ""
    labels: tuple[str, ...] = ()
    """Letters of the choices; A, B, C, … where the caller gave none."""

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.choices):
            object.__setattr__(self, "labels", tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(self.choices)]))


class Space(enum.Enum):
    """The frame that a reply's coordinates are in."""

    SEEN = "pixels of the view"
    UNIT = "fractions of the view"
    PER_MILLE = "thousandths of the view"


class MalformedReason(enum.StrEnum):
    """Why a reply of the zoom turn gives no region. Closed: it is a metric label."""

    MISSING = "missing"
    """no tag"""
    NOT_NUMBERS = "not_numbers"
    """a tag without four numbers"""
    INVERTED = "inverted"
    """the far edge is before the near edge"""
    EMPTY = "empty"
    """no width or no height"""
    OUTSIDE = "outside"
    """wholly outside the view"""


@dataclass(frozen=True, slots=True)
class Zoom:
    """The model wants to see a place closer."""

    edges: tuple[float, float, float, float]
    """x1, y1, x2, y2 as the model wrote them: untrusted."""
    space: Space
    view: int = 0
    """Which of the views so far the edges refer to."""
    lenient: bool = False
    """The reply was understood although it strayed from the form that the policy was trained on."""


@dataclass(frozen=True, slots=True)
class Resize:
    """The model wants the whole image again, larger."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The model has answered."""

    text: str
    reasoning: str = ""
    tagged: bool = True
    """False: there was no answer tag, and the whole reply was taken."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """The reply gives no region."""

    reason: MalformedReason


Action = Zoom | Resize | Answer | Malformed


@dataclass(frozen=True, slots=True)
class Seen:
    """A view that the model has been shown, and the region of the original that it shows."""

    view: View
    region: Box


@dataclass(frozen=True, slots=True)
class CropRule:
    """How a policy's box becomes a region, beyond conversion and clamping."""

    pad: float = 0.0
    """Added on each side, as a fraction of the image's own side (Pixel-Reasoner 0.1)."""
    min_side: int = 1
    """Shortest side of a region in original pixels; shorter ones are widened about their middle."""


@dataclass(frozen=True, slots=True)
class Region:
    """The part of the original that will be cropped."""

    box: Box
    """In upright original pixels, inside the image, never empty, aspect at most 200."""
    clamped: bool
    """A part of the model's box lay outside."""


def cut(zoom: Zoom, seen: Sequence[Seen], image: Size, rule: CropRule) -> Region | Malformed:
    """Turn a model's box into a region of the original: the one place where coordinates are converted.

    The box is mapped from its frame to whole pixels of the view (near edge floored, far edge ceiled), clamped to the view,
    mapped to the original with separate scales for x and y, and widened where the rule or the 200 : 1 limit asks for it.

    Args:
        zoom: the box as the model wrote it; any finite or infinite numbers.
        seen: the views so far, which ``zoom.view`` indexes.
        image: size of the original.
        rule: the policy's crop rule.

    Returns:
        The region; or Malformed, saying why there is none. Never raises on any box.
    """
    source = seen[zoom.view]
    size = source.view.size
    unit, parts = {Space.SEEN: ((1, 1), 1), Space.UNIT: (size, 1), Space.PER_MILLE: (size, 1000)}[zoom.space]
    x1, y1, x2, y2 = (edge * unit[i % 2] / parts for i, edge in enumerate(zoom.edges))
    if x1 != x1 or y1 != y1 or x2 != x2 or y2 != y2:
        return Malformed(MalformedReason.NOT_NUMBERS)
    if x2 < x1 or y2 < y1:
        return Malformed(MalformedReason.INVERTED)
    if x2 == x1 or y2 == y1:
        return Malformed(MalformedReason.EMPTY)
    if x2 <= 0 or y2 <= 0 or x1 >= size.width or y1 >= size.height:
        return Malformed(MalformedReason.OUTSIDE)
    clamped = x1 < 0 or y1 < 0 or x2 > size.width or y2 > size.height
    inside = Box(_floor(x1), _floor(y1), _ceil(x2, size.width), _ceil(y2, size.height))
    local = inside.rescale(seen=size, actual=source.region.size)
    box = Box(local.x1 + source.region.x1, local.y1 + source.region.y1, local.x2 + source.region.x1, local.y2 + source.region.y1)
    return Region(box.grown(round(rule.pad * image.width), round(rule.pad * image.height), rule.min_side, image), clamped)


def _floor(edge: float) -> int:
    return int(max(edge, 0.0))


def _ceil(edge: float, end: int) -> int:
    return -int(-min(edge, float(end)) // 1)


@dataclass(frozen=True, slots=True)
class Ask:
    """What to send to the engine in one turn."""

    conversation: Conversation
    stop: tuple[str, ...]
    """Generation ends after one of these; it stays in the reply, which is repeated word for word."""
    answers: bool
    """The reply is certain to be the answer, whatever it says, so its text may be passed on while it is written."""


class Policy(Protocol):
    """A model with its way of zooming. Stateless: all state is in the conversation and the views."""

    @property
    def name(self) -> str:
        """As metrics and logs call it."""

    @property
    def max_turns(self) -> int:
        """Most turns of one request."""

    @property
    def crop_rule(self) -> CropRule:
        """How a box becomes a region."""

    def first(self, question: Question, overview: View) -> Ask:
        """Return what to say in the first turn."""

    def parse(self, reply: str, turn: int) -> Action:
        """Say what a reply of turn 0, 1, … means. Accepts any text; never raises."""

    def next(self, ask: Ask, reply: str, question: Question, view: View) -> Ask:
        """Return what to say after ``reply``, with one more view."""

    def on_malformed(self, malformed: Malformed, image: Size) -> Box:
        """Return the region to show when the reply gave none."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The words of the two turns. ``{question}``, ``{choices}`` and ``{instructions}`` are filled in, nothing else."""

    zoom_system: str
    zoom_user: str
    answer_user: str
    single_system: str
    single_user: str


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """What a checkpoint brings along: its prompts, and the pixel budgets it works at."""

    prompts: Prompts
    default_visual_tokens: int
    max_visual_tokens: int
    source: str = field(default="", compare=False)
    """Where it was read from, for the log."""
