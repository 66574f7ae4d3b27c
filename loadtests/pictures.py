"""Synthetic images whose questions have known answers, drawn ahead of the clock so that drawing does not slow the load down."""

from __future__ import annotations

import functools
import io
import itertools
import random
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageChops

from ergo_train.scenes import HELD_OUT, QUESTIONS, scene

Size = tuple[int, int]

USUAL = {"1.3 MP": (1120, 1120), "2 MP": (1680, 1260), "3 MP": (2016, 1512)}
"""What ergo-mini's own scenes are like."""

RESOLUTIONS = {"2K": (2048, 1536), "4K": (3840, 2160), "8K": (7680, 4320)}

MEGAPIXELS = {
    "1 MP": (1120, 1120),
    "2 MP": (1680, 1260),
    "6 MP": (2912, 2072),
    "12 MP": (4032, 3024),
    "24 MP": (6000, 4000),
    "50 MP": (8192, 6144),
    "12 MP PNG": (4032, 3024),
    "24 MP progressive": (6000, 4000),
}

FORMS: dict[str, dict[str, Any]] = {
    "12 MP PNG": {"format": "PNG", "compress_level": 1},
    "24 MP progressive": {"format": "JPEG", "quality": 90, "progressive": True},
}
"""How images of a kind are written, if not as the JPEGs that telephones write: those are dear to decode."""

MIXES: dict[str, dict[str, tuple[Size, float]]] = {
    "usual": {name: (size, 1) for name, size in USUAL.items()},
    "2K 4K 8K": {name: (size, share) for (name, size), share in zip(RESOLUTIONS.items(), (70, 20, 10), strict=True)},
    "1 to 50 MP": {name: (size, 1) for name, size in MEGAPIXELS.items()},
    **{name: {name: (size, 1)} for name, size in MEGAPIXELS.items()},
    "full resolution": {"2 MP": ((1680, 1260), 1)},  # 2,700 visual tokens: a context of 4,096 holds them with question and reply
}
"""Kinds of images by name, with the share of each: 70, 20 and 10 % are of screens, televisions, and cameras' best."""

GRAIN = 6
"""Standard deviation of a sensor's noise, of 255. As JPEG these images have 1.7 to 2 bits a pixel, about what telephones write;
without it a scene's plain surfaces make files of a tenth of that, which cost next to nothing to send and to decode."""

QUESTIONS_EACH = 6
"""Questions about one image: as many as there are ways to ask."""

_SEEDS_OF_ONE_RUN = 100_000
"""More than the pictures of any run, so that no two runs draw the same."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as a file, and one or more questions about it with their answers."""

    name: str
    """The kind of image in its mix: "4K"."""
    seed: int
    size: Size
    data: bytes
    """The file."""
    asked: tuple[tuple[str, str], ...]
    """`QUESTIONS_EACH` questions, all different, each with the only right answer."""
    content_type: str = "image/jpeg"

    @property
    def question(self) -> str:
        """The first question."""
        return self.asked[0][0]

    @property
    def answer(self) -> str:
        """Its answer."""
        return self.asked[0][1]


def draw(name: str, seed: int, size: Size) -> Picture:
    """Draw the picture of a seed; the same seed and size give the same file."""
    made = scene(HELD_OUT + seed, size=size)
    in_turns = zip(QUESTIONS, itertools.cycle(made.landmarks), strict=False)
    more = {question.format(its.name): its.code for question, its in in_turns}
    asked = tuple(({made.question: made.answer} | more).items())[:QUESTIONS_EACH]
    form = FORMS.get(name, {"format": "JPEG", "quality": 90})
    with io.BytesIO() as file:
        _grained(made.image, seed).save(file, **form)
        return Picture(name, seed, size, file.getvalue(), asked, f"image/{form['format'].lower()}")


def pool(mix: str, count: int, seed: int) -> list[Picture]:
    """Draw ``count`` pictures of a mix, all different; the same arguments give the same pictures.

    Args:
        mix: one of `MIXES`.
        count: at most 100,000.
        seed: numbers the run; pools of different seeds have no picture in common.
    """
    kinds = MIXES[mix]
    chosen = random.Random(seed).choices(list(kinds), [share for _, share in kinds.values()], k=count)
    return [draw(name, seed * _SEEDS_OF_ONE_RUN + n, kinds[name][0]) for n, name in enumerate(chosen)]


@functools.cache
def _grain() -> Image.Image:
    """Return a square of noise around 128."""
    return Image.merge("RGB", [Image.effect_noise((512, 512), GRAIN) for _ in "rgb"])


def _grained(image: Image.Image, seed: int) -> Image.Image:
    """Add grain: the same square all over, turned by the seed."""
    square, layer = _grain().rotate(90 * (seed % 4)), Image.new("RGB", image.size)
    for x in range(0, image.width, square.width):
        for y in range(0, image.height, square.height):
            layer.paste(square, (x, y))
    return ImageChops.add(image, layer, 1, -128)
