"""What comes back: frozen records, and the events of a stream.

Boxes are in pixels of the upright image, x to the right and y down; times are milliseconds; ratios are fractions.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ergo_client._images import ImageLike, painted

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

Outcome = Literal["zoomed", "clamped", "no_box", "invalid_box", "skipped"]


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """The image as the server understood it."""

    width: int
    """Of the upright image, in pixels."""
    height: int
    format: str
    """``jpeg``, ``png``, ``webp``, ``gif`` or ``bmp``."""
    orientation: int
    """EXIF orientation of the file, 1 to 8."""
    animated: bool = False
    """It has more frames than the first, which alone is looked at."""


@dataclass(frozen=True, slots=True)
class UploadedImage:
    """An image that the server keeps for a while. Give it as the image of questions."""

    id: str
    """``img_…``; stands for the image wherever one is asked about, as text, too."""
    width: int
    """Of the upright image, in pixels."""
    height: int
    format: str
    orientation: int
    bytes: int
    """Length of the file."""
    expires_at: int
    """Unix time, by the server's clock, at which it is forgotten."""
    expires_in: float
    """Seconds from the upload until then."""
    animated: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """An image as the model saw it: the overview, or the crop."""

    width: int
    height: int
    data: bytes | None = field(default=None, repr=False)
    """The PNG, if ``include`` named this view."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the PNG.

        Raises:
            ValueError: the view came without its pixels.
            OSError: the file cannot be written.
        """
        if self.data is None:
            raise ValueError('the view came without its pixels; ask with include=["crop"] or include=["overview"]')
        Path(path).write_bytes(self.data)


@dataclass(frozen=True, slots=True)
class Region:
    """Where the model looked closer, and what became of the zoom."""

    box: tuple[int, int, int, int]
    """x1, y1, x2, y2 in pixels of the upright image, x2 and y2 exclusive; the whole image where there was no zoom."""
    normalized: tuple[float, float, float, float]
    """The box as fractions of the image's width and height."""
    seen: tuple[float, float, float, float] | None
    """The box as the model wrote it, in pixels of the overview."""
    area_ratio: float
    """Area of the box by that of the image."""
    magnification: float
    """Pixels of the crop per pixel of the overview, linear."""
    outcome: Outcome
    """``zoomed``; ``clamped``: a part of the box was outside; ``no_box`` or ``invalid_box``: the whole image within the budget
    took the crop's place; ``skipped``: there was no zoom turn."""
    reason: str | None = None
    """Why it was skipped, or the box was not used."""
    lenient: bool = False
    """The box was read although its form strayed from the trained one."""

    @property
    def zoomed(self) -> bool:
        """Whether the model looked at a region of its choice."""
        return self.outcome in ("zoomed", "clamped")


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """What was spent on seeing."""

    overview: int
    crop: int
    extra: int
    """Of other images; 0 with one image."""
    total: int
    baseline: int
    """What the same model would have spent without zoom, at most 16,384."""
    saved_ratio: float
    """1 - total / baseline; negative where zoom cost more."""
    source: Literal["engine", "formula"]
    """Who counted."""


@dataclass(frozen=True, slots=True)
class EstimatedTokens:
    """What would be spent on seeing."""

    overview: int
    crop_max: int
    """The most that a crop can cost; 0 where there would be no zoom."""
    total_max: int
    baseline: int
    """What the same model would spend without zoom, at most 16,384."""
    saved_ratio_min: float
    """1 - total_max / baseline."""


@dataclass(frozen=True, slots=True)
class TurnUsage:
    """Tokens of one turn, as the engine counted them; None where it does not say."""

    turn: Literal["zoom", "answer", "single"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None
    image_tokens: int | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, summed over the turns: what the engine computed, or found in its cache."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    """Of the prompts, what was found computed."""
    image_tokens: int
    """Of the prompts, visual tokens. What was sent again in the second turn is counted again."""
    reasoning_tokens: int
    """Of the completions, what is not the visible answer."""
    turns: tuple[TurnUsage, ...]


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds at the server. Stages overlap, so that they may exceed the total."""

    receive_ms: float
    decode_ms: float
    overview_ms: float
    zoom_turn_ms: float
    crop_ms: float
    answer_turn_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class Rewards:
    """Those of the paper's rewards that need no right answer, 0 or 1; None where there was no zoom turn to judge."""

    box: float | None
    """1 where the region covers at most 0.6 of the image."""
    format: float | None
    """1 where both replies are of the right tags, each once and in order."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, and how it was found."""

    text: str
    choice: int | None
    """Index of the choice that is meant; None without choices, or if it is none of them."""
    finish_reason: Literal["stop", "length"]
    region: Region
    crop: View | None
    """The region as the model saw it; None where there was no second view. Its pixels are there with ``include=["crop"]``."""
    overview: View | None
    """The whole image as the model saw it, with ``include=["overview"]``."""
    image: ImageInfo
    visual_tokens: VisualTokens
    usage: Usage
    timings: Timings
    reasoning: str | None
    """With ``include=["reasoning"]``."""
    replies: tuple[str, ...] | None
    """What the model wrote, turn by turn, with ``include=["replies"]``."""
    rewards: Rewards | None
    """What the paper's training would have given, with ``include=["rewards"]``."""
    model: str
    id: str
    request_id: str
    """Names the request in the server's log."""
    raw: dict[str, Any] = field(repr=False)
    """The whole response."""
    _image: ImageLike | None = field(default=None, repr=False, compare=False)
    """What was asked about, where it can be looked at again."""

    def draw(self, image: ImageLike | None = None) -> PilImage:
        """Return the image, upright, with the box painted on it. Nothing is painted where there was no zoom.

        Args:
            image: the image again; needed where it was asked about as an upload, by URL or as a file object, and for the bytes,
                Pillow images and arrays of `Client.ask_many`, whose answers do not keep them.

        Raises:
            ImportError: Pillow is not installed.
            OSError: the file cannot be read.
            ValueError: there is no image to paint on, or its size is another than that of the one asked about.
        """
        box = self.region.box if self.region.zoomed else None
        return painted(self._image if image is None else image, (self.image.width, self.image.height), box)

    def show(self, image: ImageLike | None = None) -> None:
        """Open what `draw` returns in the viewer of the desktop. Arguments and errors are those of `draw`."""
        self.draw(image).show()


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a question would cost."""

    model: str
    image: ImageInfo
    zoom: bool
    """Whether there would be a zoom turn."""
    overview: View
    visual_tokens: EstimatedTokens
    request_id: str
    """Names the request in the server's log."""
    raw: dict[str, Any] = field(repr=False)
    """The whole response."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a batch has come: sums over the results that were yielded, and the one that is about to be."""

    done: int
    """Results, errors among them."""
    failed: int
    """Errors."""
    visual_tokens: int
    """Spent on the answers. What a failed question may have cost is not known."""
    baseline: int
    """What the same answers would have cost without zoom."""


@dataclass(frozen=True, slots=True)
class OverviewMade:
    """The model looks at the whole image. Comes with ``include=["overview"]``."""

    view: View


@dataclass(frozen=True, slots=True)
class RegionFound:
    """It is known where the model looks closer. Comes once, before any text."""

    region: Region
    crop: View | None
    """As `Answer.crop`."""


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """The next piece of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """The next piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The last event: the whole answer."""

    answer: Answer


Event = OverviewMade | RegionFound | ReasoningDelta | AnswerDelta | Done
"""What a stream yields."""
