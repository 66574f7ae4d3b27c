"""Scenes that ask for zoom: landmarks one can see from afar, each with a code one can only read up close.

One seed makes one scene, always the same: training, tests, the page and the README share them. Held-out scenes are those
with seeds from `HELD_OUT` on; training never draws one of them.

Lengths are in units of ``u``: one ``u`` is one pixel of the overview at ergo-mini's budget, so ``1 u`` is
``sqrt(width · height ÷ (49 · 28²))`` pixels of the image. A landmark is 26–32 u across and plain to see in the overview. The
digits of its code are 2.8–3.1 u high and about 2 u wide: less in the overview than any typeface can be drawn in (a readable
digit takes 3 × 5 pixels), and about nineteen pixels in a crop 30 u a side.
"""

from __future__ import annotations

import enum
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

BUDGET = 49
"""Visual tokens of one view that the scenes, and ergo-mini, are made for."""

HELD_OUT = 1_000_000_000
"""Seeds from here on are for evaluation only."""

ABSENT = "none"
"""The right answer to a question about a landmark that is not in the scene."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (240, 215, 40),
    "green": (40, 160, 70),
    "blue": (40, 90, 210),
    "purple": (140, 60, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond")

PAPERS: tuple[tuple[tuple[int, int, int], tuple[int, int, int]], ...] = (
    ((250, 250, 248), (15, 15, 20)),
    ((255, 255, 255), (40, 30, 30)),
    ((238, 240, 244), (0, 0, 60)),
)
"""Plates and their ink."""

SIZES = (
    (1120, 1120),
    (1400, 1400),
    (1400, 1050),
    (1050, 1400),
    (1680, 1260),
    (1512, 2016),
    (2016, 1512),
    (1920, 1080),
    (2000, 2000),
    (2240, 1680),
)
"""What `scene` draws from by default, in pixels: square, 4:3, 3:4 and 16:9."""

CLOSE_UP = (5.5, 13.0)
"""Least and greatest u of close-ups, drawn evenly in its logarithm: of images of 1.2 to 6.5 megapixels."""

QUESTIONS = (
    "What is the code on the {}?",
    "Which code is on the {}?",
    "What code does the {} show?",
    "Read the code on the {}.",
    "What number is on the {}?",
    "What does the {} say?",
)


Point = tuple[float, float]
Edges = tuple[float, float, float, float]
"""x1, y1, x2, y2."""


@dataclass(frozen=True, slots=True)
class Landmark:
    """A coloured shape with a code in its middle. Lengths in pixels of the image."""

    colour: str
    shape: str
    code: str
    """Empty where the plate shows dots."""
    x: float
    y: float
    diameter: float
    plate: Edges
    """The plate that carries the code."""
    digits: tuple[Point, ...]
    """Centre of each digit."""

    @property
    def name(self) -> str:
        """As questions call it: "red circle"."""
        return f"{self.colour} {self.shape}"


class Kind(enum.StrEnum):
    """What a question asks for. All but the first are asked about the scenes of `hard_scenes` only."""

    CODE = "code"
    """the code on a landmark"""
    COUNT = "count"
    """how many dots a landmark carries"""
    BESIDE = "beside"
    """the code on a tag beside a landmark"""
    RELATION = "relation"
    """the code on the landmark beside a landmark"""
    CHAIN = "chain"
    """the code on a tag beside the landmark beside a landmark"""


@dataclass(frozen=True, slots=True)
class Query:
    """Something to ask about a scene, and all that is true of its answer. Lengths in pixels of the image."""

    kind: Kind
    forms: tuple[str, ...]
    """Ways to ask it, with ``{}`` for ``name``."""
    name: str
    """The landmark that the question names."""
    answer: str
    path: tuple[Point, ...]
    """The places that lead to the answer, from the landmark that is named to the middle of the plate."""
    plate: Edges
    """The plate that the answer is on."""
    read: str
    """The digits that are read off the plate: the three of the code, or nine, row by row, 1 for a dot and 0 for a ring."""
    marks: tuple[Point, ...]
    """Where each of them is read."""
    dots: tuple[Point, ...] = ()
    """Centres of what is counted."""

    def asked(self, rng: random.Random, name: str | None = None) -> str:
        """Return one wording, of another landmark if ``name`` is given."""
        return rng.choice(self.forms).format(name or self.name)


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture and what is true of it."""

    seed: int
    image: Image.Image
    landmarks: tuple[Landmark, ...]
    question: str
    answer: str
    target: Landmark
    """The landmark that the question names."""
    queries: tuple[Query, ...]
    """All that can be asked."""
    query: Query
    """What ``question`` asks."""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The plate that answers the question, as x1, y1, x2, y2 in whole pixels of the image."""
        x1, y1, x2, y2 = self.query.plate
        return (math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2))


def scene(seed: int, *, size: tuple[int, int] | None = None) -> Scene:
    """Draw the scene of ``seed``.

    Args:
        seed: any integer; `HELD_OUT` and above are for evaluation.
        size: width and height in pixels, at least 400 a side; drawn from `SIZES` when not given.
    """
    rng = random.Random(seed)
    width, height = size or rng.choice(SIZES)
    u = math.sqrt(width * height / BUDGET) / 28
    image = background(rng, width, height)
    draw = ImageDraw.Draw(image)
    spots = spots_of(rng, width / u, height / u, rng.randint(2, 5))
    distractors(rng, draw, u, width, height, spots)
    kinds = rng.sample([(c, s) for c in COLOURS for s in SHAPES], len(spots))
    landmarks = tuple(draw_landmark(rng, image, u, x, y, *kind) for (x, y), kind in zip(spots, kinds, strict=True))
    target = rng.choice(landmarks)
    query = code_query(target)
    return Scene(
        seed, image, landmarks, query.asked(rng), query.answer, target, tuple(code_query(mark) for mark in landmarks), query
    )


def unlisted_size(rng: random.Random, spread: float) -> tuple[int, int]:
    """Return a size in pixels for training, that no list holds, as `scene` takes one.

    From 1.2 megapixels, where a crop of 30 u is smaller than the budget and is sent as it is, to 5, where it is shrunk: a
    checkpoint that saw hardly any crop of the full budget read 68 % of the tags in those that have it, and 88 % in the smaller.

    Args:
        rng: where chance comes from.
        spread: greatest logarithm of width ÷ height, either way.
    """
    return sized(rng, log_uniform(rng, 1.2e6, 5e6), spread)


def sized(rng: random.Random, area: float, spread: float) -> tuple[int, int]:
    """Return a width and height of about this area, as far from square as `unlisted_size` says."""
    aspect = math.exp(rng.uniform(-spread, spread))
    return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))


def log_uniform(rng: random.Random, low: float, high: float) -> float:
    """Draw a number whose logarithm is even between those of ``low`` and ``high``."""
    return low * math.pow(high / low, rng.random())


def code_query(landmark: Landmark) -> Query:
    """Return the question for the code on a landmark."""
    return Query(
        Kind.CODE,
        QUESTIONS,
        landmark.name,
        landmark.code,
        (centre(landmark.plate),),
        landmark.plate,
        landmark.code,
        landmark.digits,
    )


def centre(edges: Edges) -> Point:
    """Return the middle of a rectangle."""
    return (edges[0] + edges[2]) / 2, (edges[1] + edges[3]) / 2


def close_up(rng: random.Random) -> tuple[Image.Image, Landmark]:
    """Draw what a crop of a scene shows: one landmark with its plate somewhat off the middle. Cheap, for learning to read."""
    u = log_uniform(rng, *CLOSE_UP)
    width, height = (30 * u * (rng.uniform(0.8, 1.0) if rng.random() < 0.2 else 1.0) for _ in range(2))
    image = background(rng, round(width), round(height))
    middle = (width / u / 2 + rng.uniform(-7.5, 7.5), height / u / 2 + rng.uniform(-7.5, 7.5))
    return image, draw_landmark(rng, image, u, *middle, rng.choice(list(COLOURS)), rng.choice(SHAPES))


def absent_name(rng: random.Random, landmarks: tuple[Landmark, ...]) -> str:
    """Return the name of a landmark that is not among ``landmarks``."""
    present = {landmark.name for landmark in landmarks}
    return rng.choice([name for c in COLOURS for s in SHAPES if (name := f"{c} {s}") not in present])


def spots_of(rng: random.Random, width: float, height: float, count: int, apart: float = 38) -> list[Point]:
    """Centres in u, at least ``apart`` u apart and 18 u from the border; fewer than ``count`` where there is no room."""
    spots: list[Point] = []
    for _ in range(200):
        spot = (rng.uniform(18, width - 18), rng.uniform(18, height - 18))
        if all(math.dist(spot, other) > apart for other in spots):
            spots.append(spot)
        if len(spots) == count:
            break
    return spots


# --- backgrounds and distractors: muted or thin, so that only landmarks are large and saturated -----------------------


def muted(rng: random.Random, low: int = 60, high: int = 215) -> tuple[int, int, int]:
    grey = rng.randint(low, high)
    r, g, b = (max(0, min(255, grey + rng.randint(-18, 18))) for _ in range(3))
    return (r, g, b)


def background(rng: random.Random, width: int, height: int) -> Image.Image:
    kind = rng.choice(("plain", "gradient", "clouds", "clouds", "stripes", "tiles"))
    if kind == "plain":
        return Image.new("RGB", (width, height), muted(rng))
    if kind in ("gradient", "clouds"):
        cells = (2, 2) if kind == "gradient" else (rng.randint(4, 9), rng.randint(4, 9))
        seed = Image.new("RGB", cells)
        centre = rng.randint(90, 185)
        seed.putdata([muted(rng, centre - 35, centre + 35) for _ in range(cells[0] * cells[1])])
        return seed.resize((width, height), Image.Resampling.BILINEAR)
    image = Image.new("RGB", (width, height), muted(rng))
    draw = ImageDraw.Draw(image)
    other, step = muted(rng), max(width, height) / rng.randint(6, 24)
    for i in range(math.ceil(width / step)):
        for j in range(math.ceil(height / step) if kind == "tiles" else 1):
            if (i + j) % 2:
                bottom = (j + 1) * step if kind == "tiles" else height
                draw.rectangle((i * step, j * step, (i + 1) * step, bottom), fill=other)
    return image


def distractors(
    rng: random.Random,
    draw: ImageDraw.ImageDraw,
    u: float,
    width: int,
    height: int,
    spots: list[tuple[float, float]],
) -> None:
    """Thin lines in any colour, grey shapes, and small blank plates; none of them near a landmark's middle."""
    for _ in range(rng.randint(0, 5)):
        points = [(rng.uniform(0, width), rng.uniform(0, height)) for _ in range(2)]
        draw.line(points, fill=rng.choice([*COLOURS.values(), muted(rng)]), width=max(1, round(rng.uniform(0.5, 1.5) * u)))
    for _ in range(rng.randint(0, 6)):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(3, 13) * u
        if any(math.dist((x, y), (sx * u, sy * u)) < r + 18 * u for sx, sy in spots):
            continue
        if rng.random() < 0.3:
            draw.rectangle((x - 5 * u, y - 3 * u, x + 5 * u, y + 3 * u), fill=(245, 245, 245))
        else:
            draw_shape(draw, rng.choice(SHAPES), x, y, 2 * r, muted(rng, 20, 235))


# --- landmarks ----------------------------------------------------------------------------------------------------------


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, diameter: float, fill: tuple[int, int, int]) -> None:
    r = diameter / 2
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        draw.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - 1.15 * r), (x - 1.15 * r, y + 0.85 * r), (x + 1.15 * r, y + 0.85 * r)], fill=fill)
    else:
        draw.polygon([(x, y - 1.2 * r), (x + 1.2 * r, y), (x, y + 1.2 * r), (x - 1.2 * r, y)], fill=fill)


def draw_landmark(rng: random.Random, image: Image.Image, u: float, x: float, y: float, colour: str, shape: str) -> Landmark:
    """Draw a landmark with its code; ``x`` and ``y`` in u."""
    x, y, diameter = x * u, y * u, rng.uniform(26, 32) * u
    paint(rng, image, x, y, diameter, colour, shape)
    code = f"{rng.randrange(1000):03d}"
    cx, cy = x + rng.uniform(-1.5, 1.5) * u, y + rng.uniform(-1.5, 1.5) * u + (1.5 * u if shape == "triangle" else 0)
    height, pitch = rng.uniform(2.8, 3.1) * u, rng.uniform(2.5, 3.0) * u
    plate = plate_about(cx, cy, height, pitch, 0.8 * u)
    paper, ink = rng.choice(PAPERS)
    ImageDraw.Draw(image).rectangle(plate, fill=paper)
    write = rng.choice(FACES)
    digits = tuple((cx + (i - 1) * pitch, cy) for i in range(3))
    for digit, (dx, dy) in zip(code, digits, strict=True):
        write(image, digit, dx, dy, height, ink)
    return Landmark(colour, shape, code, x, y, diameter, plate, digits)


def paint(rng: random.Random, image: Image.Image, x: float, y: float, diameter: float, colour: str, shape: str) -> None:
    """Paint a landmark without its plate, in a shade of its colour. Lengths in pixels of the image."""
    tint = tuple(max(0, min(255, c + rng.randint(-12, 12))) for c in COLOURS[colour])
    draw_shape(ImageDraw.Draw(image), shape, x, y, diameter, (tint[0], tint[1], tint[2]))


def plate_about(x: float, y: float, height: float, pitch: float, margin: float) -> Edges:
    """Return the plate of three digits about a point."""
    return (x - 1.5 * pitch - margin, y - height / 2 - margin, x + 1.5 * pitch + margin, y + height / 2 + margin)


# --- typefaces: Pillow's own outline font in four cuts, and one drawn from strokes, so that no font file is needed ------

_STROKES: dict[str, tuple[tuple[float, float], ...]] = {
    "0": ((0.5, 0), (1, 0.25), (1, 0.75), (0.5, 1), (0, 0.75), (0, 0.25), (0.5, 0)),
    "1": ((0.15, 0.25), (0.55, 0), (0.55, 1)),
    "2": ((0, 0.22), (0.3, 0), (0.8, 0), (1, 0.25), (0.9, 0.5), (0, 1), (1, 1)),
    "3": ((0, 0.05), (0.7, 0), (1, 0.22), (0.75, 0.47), (0.4, 0.48), (0.75, 0.5), (1, 0.77), (0.7, 1), (0, 0.95)),
    "4": ((0.75, 1), (0.75, 0), (0, 0.7), (1, 0.7)),
    "5": ((0.95, 0), (0.1, 0), (0.05, 0.45), (0.7, 0.42), (1, 0.7), (0.7, 1), (0, 0.95)),
    "6": ((0.9, 0), (0.3, 0.25), (0, 0.7), (0.3, 1), (0.75, 1), (1, 0.75), (0.75, 0.5), (0.05, 0.6)),
    "7": ((0, 0), (1, 0), (0.4, 1)),
    "8": ((0.5, 0.47), (0.1, 0.25), (0.5, 0), (0.9, 0.25), (0.5, 0.47), (0, 0.75), (0.5, 1), (1, 0.75), (0.5, 0.47)),
    "9": ((0.95, 0.4), (0.25, 0.5), (0, 0.25), (0.25, 0), (0.7, 0), (1, 0.3), (0.7, 0.75), (0.1, 1)),
}

Ink = tuple[int, int, int] | tuple[int]
"""A colour in the bands of the image."""

Face = Callable[[Image.Image, str, float, float, float, Ink], None]
"""Writes a digit about a point: (image, digit, x, y, height, ink)."""


def _printed(bold: float, width: float) -> Face:
    def write(image: Image.Image, digit: str, x: float, y: float, height: float, ink: Ink) -> None:
        # 0.72: the digits of Pillow's built-in font are 0.72 em high. Drawn large, then fitted to the very height asked for.
        font = ImageFont.load_default(64)
        stroke = round(bold * 46)
        left, top, right, bottom = font.getbbox(digit, stroke_width=stroke)
        mask = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)), 0)
        ImageDraw.Draw(mask).text((-left, -top), digit, fill=255, font=font, stroke_width=stroke)
        size = (max(1, round(height * width * mask.width / mask.height)), max(1, round(height)))
        mask = mask.resize(size, Image.Resampling.LANCZOS, reducing_gap=None)
        image.paste(ink, (round(x - size[0] / 2), round(y - size[1] / 2)), mask)

    return write


def _stroked(image: Image.Image, digit: str, x: float, y: float, height: float, ink: Ink) -> None:
    scale = 4
    h, w, pen = scale * height, scale * height * 0.6, scale * height * 0.18
    mask = Image.new("L", (math.ceil(w + pen), math.ceil(h)), 0)
    points = [(pen / 2 + px * w, pen / 2 + py * (h - pen)) for px, py in _STROKES[digit]]
    ImageDraw.Draw(mask).line(points, fill=255, width=round(pen), joint="curve")
    mask = mask.resize((max(1, round(mask.width / scale)), max(1, round(height))), Image.Resampling.BOX)
    image.paste(ink, (round(x - mask.width / 2), round(y - mask.height / 2)), mask)


FACES: tuple[Face, ...] = (_printed(0.03, 1.0), _printed(0.045, 0.95), _printed(0.02, 1.1), _printed(0.03, 0.87), _stroked)
