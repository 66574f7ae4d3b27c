"""Harder scenes: textures like those of photographs, and answers that must be found before they can be read.

What `scenes` asks for is a plate in the middle of a landmark. Here a code may be on a *tag* beside a landmark, written with
strokes and rims that cancel from afar: the overview shows next to nothing where it is, and only the question says where to
look. A question may name a landmark by what it stands beside, or ask for the tag beside that one. Plates may carry dots to be
counted, among rings of the same mean darkness, so that a plate looks the same from afar however many there are.

Lengths are in the ``u`` of `scenes`, and seeds from `scenes.HELD_OUT` on are for evaluation here too.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from ergo_train import scenes
from ergo_train.scenes import BUDGET, COLOURS, FACES, PAPERS, SHAPES, Edges, Kind, Landmark, Point, Query, Scene, centre

HARD_SIZES = (
    (1120, 1120),
    (1600, 1200),
    (1200, 1600),
    (1920, 1080),
    (1080, 1920),
    (2048, 1536),
    (2340, 1080),
    (2560, 1440),
    (1824, 2736),
    (3000, 2000),
    (2800, 2800),
    (4000, 3000),
)
"""What `hard_scene` draws from by default, in pixels: 1.3 to 12 megapixels, square to 13 : 6, upright too."""

SIDES: dict[str, Point] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Sides as questions call them, and where they are."""

FORMS: dict[Kind, tuple[str, ...]] = {
    Kind.COUNT: ("How many dots are on the {}?", "Count the dots on the {}.", "How many dots does the {} show?"),
    Kind.BESIDE: (
        "What is the code on the tag {side} the {}?",
        "Which code is on the tag {side} the {}?",
        "Read the code on the tag {side} the {}.",
    ),
    Kind.RELATION: (
        "What is the code on the shape {side} the {}?",
        "Which code is on the shape {side} the {}?",
        "Read the code on the shape {side} the {}.",
    ),
    Kind.CHAIN: (
        "What is the code on the tag {side} the shape {other} the {}?",
        "Which code is on the tag {side} the shape {other} the {}?",
    ),
}

AWAY = {"left of": 27.0, "right of": 27.0, "above": 24.0, "below": 24.0}
"""From the middle of a landmark to that of its tag: clear of the largest diamond (19.2 u) by half a tag."""

APART = 43.0
"""Least distance of landmarks: with 38, as in `scenes`, hardly any side would have room for a tag."""

CONE, CLEAR = math.radians(30), math.radians(50)
"""A landmark is beside another if it lies within ``CONE`` of that direction, and it alone within ``CLEAR``."""

CONTRAST = 140
"""Of a tag's strokes to their rims, of 255: plain to read in the crop, over the worst texture here."""

RIM = 0.35
"""Width of the rims in u, as the deviation of a Gaussian: with 0.5 the writing was seen in the overview, with 0.3 hardly read."""


@dataclass(frozen=True, slots=True)
class Tag:
    """Hidden writing. Lengths in pixels of the image."""

    code: str
    plate: Edges
    digits: tuple[Point, ...]


def hard_scene(seed: int, *, size: tuple[int, int] | None = None, kind: Kind | None = None) -> Scene:
    """Draw the hard scene of ``seed``.

    Args:
        seed: any integer; `scenes.HELD_OUT` and above are for evaluation.
        size: width and height in pixels, at least 400 a side; drawn from `HARD_SIZES` when not given.
        kind: what its question asks, where the scene has it; drawn when not given.
    """
    rng = random.Random(f"hard {seed}")
    width, height = size or rng.choice(HARD_SIZES)
    u = math.sqrt(width * height / BUDGET) / 28
    image = texture(rng, width, height)
    spots = scenes.spots_of(rng, width / u, height / u, rng.randint(2, 5), apart=APART)
    scenes.distractors(rng, ImageDraw.Draw(image), u, width, height, spots)
    kinds = rng.sample([(c, s) for c in COLOURS for s in SHAPES], len(spots))
    marks: list[Landmark] = []
    queries: list[Query] = []
    for (x, y), (colour, shape) in zip(spots, kinds, strict=True):
        if rng.random() < 0.3:
            mark, query = _counted(rng, image, u, x * u, y * u, colour, shape)
        else:
            mark = scenes.draw_landmark(rng, image, u, x, y, colour, shape)
            query = scenes.code_query(mark)
        marks.append(mark)
        queries.append(query)
    tags = {(i, side): _tag(rng, image, u, marks[i], side) for i, side in _free_sides(rng, u, (width, height), marks)}
    queries += _relations(marks, tags)
    present = sorted({query.kind for query in queries})
    asked = kind if kind in present else rng.choice(present)
    query = rng.choice([query for query in queries if query.kind == asked])
    target = next(mark for mark in marks if mark.name == query.name)
    return Scene(seed, image, tuple(marks), query.asked(rng), query.answer, target, tuple(queries), query)


def close_up(rng: random.Random) -> tuple[Image.Image, Query]:
    """Draw what a crop of a hard scene shows: a tag, or a plate of dots on its landmark, somewhat off the middle.

    Three in four are tags: dots were read by the time that half of the codes on tags were not.
    """
    u = scenes.log_uniform(rng, *scenes.CLOSE_UP)
    width, height = (30 * u * (rng.uniform(0.8, 1.0) if rng.random() < 0.2 else 1.0) for _ in range(2))
    image = texture(rng, round(width), round(height))
    x, y = width / 2 + rng.uniform(-7.5, 7.5) * u, height / 2 + rng.uniform(-7.5, 7.5) * u
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    drawn = rng.choice((Kind.COUNT, Kind.BESIDE, Kind.BESIDE, Kind.BESIDE))
    if drawn == Kind.COUNT:
        return image, _counted(rng, image, u, x, y, colour, shape)[1]
    side = rng.choice(list(SIDES))
    dx, dy = SIDES[side]
    owner = (x - dx * AWAY[side] * u, y - dy * AWAY[side] * u)
    scenes.paint(rng, image, *owner, rng.uniform(26, 32) * u, colour, shape)
    tag = _hidden(rng, image, u, x, y)
    return image, _query(Kind.BESIDE, f"{colour} {shape}", tag, (centre(tag.plate),), side)


# --- what can be asked ----------------------------------------------------------------------------------------------------


def _query(kind: Kind, name: str, plate: Landmark | Tag, path: tuple[Point, ...], side: str, other: str = "") -> Query:
    forms = tuple(form.format("{}", side=side, other=other) for form in FORMS[kind])
    return Query(kind, forms, name, plate.code, path, plate.plate, plate.code, plate.digits)


def _relations(marks: Sequence[Landmark], tags: dict[tuple[int, str], Tag]) -> Iterator[Query]:
    for (i, side), tag in tags.items():
        yield _query(Kind.BESIDE, marks[i].name, tag, (centre(marks[i].plate), centre(tag.plate)), side)
    for i, mark in enumerate(marks):
        for side in SIDES:
            j = _neighbour(marks, i, side)
            if j is None:
                continue
            path = (centre(mark.plate), centre(marks[j].plate))
            if marks[j].code:
                yield _query(Kind.RELATION, mark.name, marks[j], path, side)
            for (owner, where), tag in tags.items():
                if owner == j:
                    yield _query(Kind.CHAIN, mark.name, tag, (*path, centre(tag.plate)), where, side)


def _neighbour(marks: Sequence[Landmark], i: int, side: str) -> int | None:
    """Return the landmark that is on this side of another beyond doubt."""
    dx, dy = SIDES[side]
    near: list[tuple[int, float]] = []
    for j, other in enumerate(marks):
        if j != i:
            x, y = other.x - marks[i].x, other.y - marks[i].y
            off = math.acos(max(-1.0, min(1.0, (x * dx + y * dy) / math.hypot(x, y))))
            if off < CLEAR:
                near.append((j, off))
    return near[0][0] if len(near) == 1 and near[0][1] < CONE else None


def _free_sides(rng: random.Random, u: float, size: tuple[int, int], marks: Sequence[Landmark]) -> Iterator[tuple[int, str]]:
    """Sides of landmarks on which a tag has room, at most two of each landmark."""
    for i, mark in enumerate(marks):
        free = []
        for side, (dx, dy) in SIDES.items():
            x, y = mark.x + dx * AWAY[side] * u, mark.y + dy * AWAY[side] * u
            inside = 9 * u < x < size[0] - 9 * u and 7 * u < y < size[1] - 7 * u
            if inside and all(math.dist((x, y), (other.x, other.y)) > 28 * u for j, other in enumerate(marks) if j != i):
                free.append(side)
        for side in rng.sample(free, min(len(free), rng.choice((0, 1, 1, 2)))):
            yield i, side


# --- what is drawn --------------------------------------------------------------------------------------------------------


def _tag(rng: random.Random, image: Image.Image, u: float, mark: Landmark, side: str) -> Tag:
    dx, dy = SIDES[side]
    x = mark.x + (dx * AWAY[side] + rng.uniform(-1, 1)) * u
    return _hidden(rng, image, u, x, mark.y + (dy * AWAY[side] + rng.uniform(-1, 1)) * u)


def _hidden(rng: random.Random, image: Image.Image, u: float, x: float, y: float) -> Tag:
    """Write a code on what is there, without the part of it that a resized image keeps: each stroke has a bright or dark rim that
    cancels it from afar."""
    code = f"{rng.randrange(1000):03d}"
    plate = scenes.plate_about(x, y, rng.uniform(2.8, 3.1) * u, pitch := rng.uniform(2.5, 2.8) * u, 0.9 * u)
    height = plate[3] - plate[1] - 1.8 * u
    left, top, right, bottom = (round(edge) for edge in plate)
    left, top, right, bottom = max(0, left), max(0, top), min(image.width, right), min(image.height, bottom)
    ink = Image.new("L", (right - left, bottom - top))
    digits = tuple((x + (i - 1) * pitch, y) for i in range(3))
    write = rng.choice(FACES)
    for digit, (dx, dy) in zip(code, digits, strict=True):
        write(ink, digit, dx - left, dy - top, height, (255,))
    coarse = ink.filter(ImageFilter.GaussianBlur(RIM * u))
    fine = (np.asarray(coarse, np.float32) - np.asarray(ink, np.float32))[..., None] / 255
    there = np.asarray(image.crop((left, top, right, bottom)), np.float32)
    sign = 1 if there.mean() > 110 else -1  # dark strokes on what is light, light ones on what is dark
    image.paste(Image.fromarray(np.clip(there + sign * CONTRAST * fine, 0, 255).astype(np.uint8)), (left, top))
    return Tag(code, plate, digits)


def _counted(
    rng: random.Random, image: Image.Image, u: float, x: float, y: float, colour: str, shape: str
) -> tuple[Landmark, Query]:
    """Draw a landmark with one to nine dots on a grid of three by three, rings in the other places. Lengths in pixels."""
    diameter = rng.uniform(28, 32) * u
    scenes.paint(rng, image, x, y, diameter, colour, shape)
    cx, cy = x + rng.uniform(-1, 1) * u, y + rng.uniform(-1, 1) * u + (1.5 * u if shape == "triangle" else 0)
    pitch = rng.uniform(2.2, 2.4) * u
    half = 1.5 * pitch + 0.3 * u
    plate = (cx - half, cy - half, cx + half, cy + half)
    paper, ink = rng.choice(PAPERS)
    draw = ImageDraw.Draw(image)
    draw.rectangle(plate, fill=paper)
    filled = rng.sample(range(9), rng.randint(1, 9))
    marks = tuple((cx + (place % 3 - 1) * pitch, cy + (place // 3 - 1) * pitch) for place in range(9))
    for place, (px, py) in enumerate(marks):
        mark = dot(round(2 * u), ring=place not in filled)
        image.paste(ink, (round(px - mark.width / 2), round(py - mark.height / 2)), mark)
    seen = "".join("1" if place in filled else "0" for place in range(9))
    dots = tuple(mark for mark, one in zip(marks, seen, strict=True) if one == "1")
    landmark = Landmark(colour, shape, "", x, y, diameter, plate, ())
    answer = str(len(filled))
    return landmark, Query(Kind.COUNT, FORMS[Kind.COUNT], landmark.name, answer, (centre(plate),), plate, seen, marks, dots)


@functools.lru_cache(64)
def dot(side: int, *, ring: bool) -> Image.Image:
    """Return the mask of a dot of 0.7 of the side, or of a ring of the whole side with the same area: 1 - 0.71² is 0.7²."""
    large = 8 * side
    mask = Image.new("L", (large, large))
    draw = ImageDraw.Draw(mask)
    edge = 0 if ring else 0.15 * large
    draw.ellipse((edge, edge, large - 1 - edge, large - 1 - edge), fill=255)
    if ring:
        hole = (1 - math.sqrt(1 - 0.7**2)) / 2 * large
        draw.ellipse((hole, hole, large - 1 - hole, large - 1 - hole), fill=0)
    return mask.resize((side, side), Image.Resampling.BOX)


def texture(rng: random.Random, width: int, height: int) -> Image.Image:
    """Draw a surface: noise of several scales between two colours, unevenly lit, with the grain of a sensor.

    Made at half the size: grain apart, nothing in it is finer than two pixels.
    """
    noise = np.random.default_rng(rng.getrandbits(32))
    half = (width // 2 + 1, height // 2 + 1)
    rough, stretch, coarse = rng.uniform(0.35, 0.75), rng.choice((1.0, 1.0, 3.0, 6.0)), rng.uniform(3, 10)
    value = np.zeros((2, 2), np.float32)
    for octave in range(5):
        across = coarse * 2.2**octave
        cells = (max(2, round(across / stretch)), max(2, round(across * height / width)))
        layer = noise.standard_normal((cells[1], cells[0]), np.float32)
        size = half if octave == 4 else (half[0] // 4 + 1, half[1] // 4 + 1)  # the coarse ones need no more pixels than these
        value = _enlarged(value, size) + rough**octave * _enlarged(layer, size)
    value = np.clip(value * (56 / (value.std() + 1e-6)) + 128, 0, 255)
    first = scenes.muted(rng, 75, 200)
    red, green, blue = (max(a - 70, min(a + 70, b)) for a, b in zip(first, scenes.muted(rng, 75, 200), strict=True))
    mask = Image.fromarray(value.astype(np.uint8))
    image = Image.composite(Image.new("RGB", half, (red, green, blue)), Image.new("RGB", half, first), mask)
    light = Image.fromarray(noise.integers(195, 256, (2, 2), np.uint8)).resize(half, Image.Resampling.BILINEAR)
    image = ImageChops.multiply(image, Image.merge("RGB", [light] * 3)).resize((width, height), Image.Resampling.BILINEAR)
    grain = rng.uniform(0, 7)
    if grain < 1:
        return image
    # The grain is a tile: a sensor's is not, but nothing here is as large as to notice.
    tile = Image.fromarray(np.clip(noise.standard_normal((256, 256), np.float32) * grain + 128, 0, 255).astype(np.uint8))
    tiles = Image.new("L", (width, height))
    for x in range(0, width, 256):
        for y in range(0, height, 256):
            tiles.paste(tile, (x, y))
    return ImageChops.add(image, Image.merge("RGB", [tiles] * 3), offset=-128)


def _enlarged(values: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    enlarged: NDArray[np.float32] = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BILINEAR))
    return enlarged
