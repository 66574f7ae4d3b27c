"""Sizes, boxes and the pixel budget: integers only, no image library.

Facts this file rests on
    * One visual token of Qwen2.5-VL covers 28 × 28 pixels: patches of 14, merged 2 × 2.
    * The Qwen processors resize every image to sides that are multiples of 28, with an area between 56 × 56 (4 tokens) and a
      maximum (16,384 tokens in the published checkpoints), and refuse an aspect ratio above 200.
    * They *floor* when they shrink. The paper's evaluation code rounds instead and overshoots its own budget by up to 20 %.

Two frames are in play, and every box says which one it is in::

      overview (seen)                     image (actual)
      ┌──────────────┐                    ┌────────────────────────────┐
      │    ┌──┐      │   × actual/seen    │        ┌─────┐             │
      │    │  │ box  │  ───────────────▶  │        │     │ region      │
      │    └──┘      │   per axis         │        └─────┘             │
      └──────────────┘                    └────────────────────────────┘

The two axes have scales of their own, because both sides were rounded to multiples of 28. Near edges are floored and far
edges are ceiled, so that the region always covers what the model pointed at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

FACTOR = 28
"""Pixels a side of one visual token: patch size 14 × spatial merge size 2 (Qwen2.5-VL's preprocessor_config.json)."""

MIN_VISUAL_TOKENS = 4
"""The processor's ``min_pixels`` of 56 × 56: a smaller view would be enlarged by the engine, out of our sight."""

MAX_VISUAL_TOKENS = 16_384
"""The processor's default ``max_pixels`` of 16,384 × 28 × 28: what the model spends at most on one image."""

MAX_ASPECT = 200
"""``smart_resize`` of transformers and of vLLM raises ValueError above this ratio of the sides."""


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int

    @property
    def area(self) -> int:
        """Pixels."""
        return self.width * self.height

    @property
    def aspect(self) -> float:
        """Longer side ÷ shorter side, at least 1."""
        return max(self) / min(self)


def visual_tokens(size: Size) -> int:
    """Return the visual tokens of a view whose sides are multiples of 28.

    >>> visual_tokens(Size(840, 588))
    630
    """
    return (size.width // FACTOR) * (size.height // FACTOR)


def smart_resize(size: Size, *, max_visual_tokens: int = MAX_VISUAL_TOKENS) -> Size:
    """Return the size at which a view of an image of ``size`` is sent: multiples of 28, within the budget, ratio kept.

    The same arithmetic as the Qwen processors (round, and floor when shrinking), then three bounds that they lack: an image so
    long that even one token's height exceeds the budget is shortened to it, no result is longer than 200 : 1, and none is below
    4 tokens. The engine's processor therefore leaves a view of this size as it is.

    Raises:
        ValueError: the aspect ratio is above 200, a side is below 1, or the budget is below 4 visual tokens.

    >>> smart_resize(Size(4032, 3024), max_visual_tokens=640)
    Size(width=812, height=588)
    """
    width, height = size
    if min(size) < 1:
        raise ValueError(f"an image of {width} x {height} pixels has no area")
    if size.aspect > MAX_ASPECT:
        raise ValueError(f"aspect ratio {size.aspect:.0f} is above {MAX_ASPECT}")
    if max_visual_tokens < MIN_VISUAL_TOKENS:
        raise ValueError(f"a budget of {max_visual_tokens} visual tokens is below {MIN_VISUAL_TOKENS}")

    columns, rows = round(width / FACTOR), round(height / FACTOR)
    if columns * rows > max_visual_tokens:
        shrink = math.sqrt(size.area / (max_visual_tokens * FACTOR**2))
        columns, rows = math.floor(width / shrink / FACTOR), math.floor(height / shrink / FACTOR)
    elif columns * rows < MIN_VISUAL_TOKENS:
        grow = math.sqrt(MIN_VISUAL_TOKENS * FACTOR**2 / size.area)
        columns, rows = math.ceil(width * grow / FACTOR), math.ceil(height * grow / FACTOR)
    columns, rows = max(1, columns), max(1, rows)
    if columns >= rows:
        columns = min(columns, max_visual_tokens // rows, MAX_ASPECT * rows)
    else:
        rows = min(rows, max_visual_tokens // columns, MAX_ASPECT * columns)
    if columns * rows < MIN_VISUAL_TOKENS:  # budgets below 8 only: 2 × 2 or 4 × 1, as the engine would enlarge anything less
        longer = 2 if size.aspect < 2 else MIN_VISUAL_TOKENS
        columns, rows = longer, MIN_VISUAL_TOKENS // longer
        if width < height:
            columns, rows = rows, columns
    return Size(columns * FACTOR, rows * FACTOR)


@dataclass(frozen=True, slots=True)
class PixelBudget:
    """How many visual tokens one view may cost.

    >>> PixelBudget(640).view_size(Size(4032, 3024))
    Size(width=812, height=588)
    >>> PixelBudget(640).view_size(Size(280, 140))       # smaller than the budget: as it is
    Size(width=280, height=140)
    >>> PixelBudget(49).view_size(Size(2000, 1500))
    Size(width=224, height=168)
    """

    max_visual_tokens: int

    def __post_init__(self) -> None:
        if not MIN_VISUAL_TOKENS <= self.max_visual_tokens <= MAX_VISUAL_TOKENS:
            raise ValueError(f"max_visual_tokens must be between {MIN_VISUAL_TOKENS} and {MAX_VISUAL_TOKENS}")

    def view_size(self, size: Size) -> Size:
        """Return the size at which an image or a region of ``size`` is sent. See `smart_resize`."""
        return smart_resize(size, max_visual_tokens=self.max_visual_tokens)

    def holds(self, size: Size) -> bool:
        """Say whether an image of ``size`` fits the budget at full resolution, so that zooming could add nothing.

        Rounding to a multiple of 28 takes up to half of that from a side; more is a loss.
        """
        return all(2 * (side - seen) <= FACTOR for side, seen in zip(size, self.view_size(size), strict=True))


def baseline_visual_tokens(size: Size) -> int:
    """Return what the same model would spend on an image of ``size`` without zoom, capped at its default 16,384."""
    return visual_tokens(smart_resize(size))


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels; ``x2`` and ``y2`` lie just outside, so width is ``x2 - x1``. Never empty, never negative.

    Raises:
        ValueError: an edge is negative, or the far edge is not beyond the near edge.
    """

    x1: int
    y1: int
    x2: int
    y2: int

    def __post_init__(self) -> None:
        if not (0 <= self.x1 < self.x2 and 0 <= self.y1 < self.y2):
            raise ValueError(f"{self.edges} is no box")

    @classmethod
    def whole(cls, size: Size) -> Box:
        """Return the box that covers everything."""
        return cls(0, 0, size.width, size.height)

    @property
    def edges(self) -> tuple[int, int, int, int]:
        """x1, y1, x2, y2."""
        return (self.x1, self.y1, self.x2, self.y2)

    @property
    def size(self) -> Size:
        """Width and height."""
        return Size(self.x2 - self.x1, self.y2 - self.y1)

    def area_ratio(self, size: Size) -> float:
        """Return the share of an image of ``size`` that the box covers; the paper's γ bounds it at 0.6."""
        return self.size.area / size.area

    def normalized(self, size: Size) -> tuple[float, float, float, float]:
        """Return the edges as fractions of an image of ``size``."""
        return (self.x1 / size.width, self.y1 / size.height, self.x2 / size.width, self.y2 / size.height)

    def rescale(self, *, seen: Size, actual: Size) -> Box:
        """Map a box from the frame of ``seen`` to that of ``actual``: near edges floored, far edges ceiled.

        Integer arithmetic, because a float would move an edge that lies exactly on a pixel.
        """
        return Box(
            self.x1 * actual.width // seen.width,
            self.y1 * actual.height // seen.height,
            -(-self.x2 * actual.width // seen.width),
            -(-self.y2 * actual.height // seen.height),
        )

    def clamp(self, size: Size) -> Box | None:
        """Return the part inside an image of ``size``, or None where they do not meet."""
        x1, y1, x2, y2 = self.x1, self.y1, min(self.x2, size.width), min(self.y2, size.height)
        return Box(x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None

    def grown(self, pad_x: int, pad_y: int, min_side: int, size: Size) -> Box:
        """Return the box padded on each side, inside an image of ``size``, with sides of at least ``min_side`` and an aspect
        ratio of at most 200.

        A model may point at a line one pixel high; the engine's processor refuses to see it that way. Widening is about the
        middle, moved inwards where the image ends. An image within 200 : 1 always has room for it.
        """
        x1, x2 = max(0, self.x1 - pad_x), min(size.width, self.x2 + pad_x)
        y1, y2 = max(0, self.y1 - pad_y), min(size.height, self.y2 + pad_y)
        least = max(min_side, -(-max(x2 - x1, y2 - y1) // MAX_ASPECT))
        x1, x2 = _widen(x1, x2, least, size.width)
        y1, y2 = _widen(y1, y2, least, size.height)
        return Box(x1, y1, x2, y2)


def _widen(near: int, far: int, least: int, end: int) -> tuple[int, int]:
    """Return near and far at least ``least`` apart, within 0 … ``end`` (or all of it where ``end`` is shorter)."""
    length = min(end, max(least, far - near))
    near = min(max(0, near - (length - (far - near)) // 2), end - length)
    return near, near + length
