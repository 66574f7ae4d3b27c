"""A scene becomes one training sample: several conversations about one image, packed so that the image is encoded once.

    [system, overview] ── question 1 ── zoom reply ── crop ── answer
                       ├─ question 2 ── zoom reply ── crop ── answer
                       ├─ question 3 ── zoom reply
                       └─ question 4 ── answer without zoom

Each branch sees the shared beginning and itself, and continues its positions, so that every branch is token for token what
the engine computes for that conversation alone (tests/training/test_training.py compares with transformers). Asking several
questions about one image is what teaches binding: the same pixels, another landmark.

Beside the tokens a sample holds *hints* that training uses and then throws away: what each visual token shows, and which
visual token a reply token should look at.
"""

from __future__ import annotations

import bisect
import io
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyvips
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from ergo_server.imaging import view
from ergo_server.imaging.decode import Pixels
from ergo_server.imaging.file import Stop
from ergo_server.imaging.geometry import FACTOR, Box, PixelBudget, Size
from ergo_server.imaging.header import ImageHeader
from ergo_server.imaging.layout import WHOLE
from ergo_train import hard_scenes, scenes
from ergo_train.scenes import Edges, Kind, Landmark, Point, Query, Scene, centre

LENGTH = 448
"""Tokens of one packed sample; branches that do not fit are left out."""

BRANCHES = 4
"""Conversations about one scene, at most."""

VIEWS = 3
"""The overview and at most two crops."""

BUDGET = PixelBudget(scenes.BUDGET)
SLOTS = scenes.BUDGET
"""Visual tokens of one view, at most."""

CELL = FACTOR // 2
"""Positions are written in half tokens: ``row 3`` is the patch row from 42 to 56 pixels of the view."""

REACH = 15
"""The zoom box is 30 pixels a side, centred on the half token that the plate's middle lies in. A plate is about 10 pixels
wide, so a box one and a half pixels off still holds it."""

DIGIT_WEIGHT = 4.0
"""Weight of digits in the loss: the words of a reply are learned at once and would drown them."""

NO_CLASS = len(scenes.COLOURS) * len(scenes.SHAPES)
NO_DIGIT, DOT = 10, 11
"""What a patch of a crop may show beside the digits 0 to 9."""

Look = tuple[int, int]
"""(attention head, position of the visual token to look at)."""

Part = tuple[str, Sequence[Look]]
"""A piece of a reply, and where its digits look: each at its own, or all at the only one."""

INSTRUCTION = "\nReply with the code only."


def cell(x: float, y: float) -> tuple[int, int]:
    """Return the row and column, in half tokens, of a point of a view."""
    return int(y // CELL), int(x // CELL)


def zoom_box(row: int, column: int, seen: Size) -> Box:
    """Return the box, in overview pixels, that the model is taught for a landmark at ``row`` and ``column``."""
    x, y = column * CELL + CELL // 2, row * CELL + CELL // 2
    return Box(max(0, x - REACH), max(0, y - REACH), min(seen.width, x + REACH), min(seen.height, y + REACH))


def places(cells: Sequence[tuple[int, int]]) -> str:
    """Return how a reply names half tokens, one after the other."""
    return ", ".join(f"row {row} column {column}" for row, column in cells)


def where_reply(cells: Sequence[tuple[int, int]], box: Box) -> str:
    """Return the reply of the zoom turn."""
    return f"<think>{places(cells)}</think><zoom>[{box.x1}, {box.y1}, {box.x2}, {box.y2}]</zoom>"


def answer_reply(cells: Sequence[tuple[int, int]], query: Query) -> str:
    """Return the reply of the answer turn, or of the only turn."""
    counted = f", dots {query.read}" if query.kind == Kind.COUNT else ""
    return f"<think>{places(cells)}{counted}</think><answer>{query.answer}</answer>"


@dataclass(slots=True)
class View:
    """One view of the image with what it shows."""

    data: bytes
    """The file that the server would send."""
    pixels: NDArray[np.uint8]
    rows: int
    columns: int
    origin: tuple[float, float]
    scale: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Map a point of the image into the view."""
        return (x - self.origin[0]) * self.scale[0], (y - self.origin[1]) * self.scale[1]

    @property
    def size(self) -> Size:
        """Width and height in pixels."""
        return Size(self.columns * FACTOR, self.rows * FACTOR)

    def cell(self, place: Point) -> tuple[int, int]:
        """Return the row and column, in half tokens, of a point of the image, clipped to the view."""
        return self.cell_of(*self.at(*place))

    def cell_of(self, x: float, y: float) -> tuple[int, int]:
        """Return the row and column, in half tokens, of a point of the view, clipped to it."""
        return cell(min(max(x, 0), self.size.width - 1), min(max(y, 0), self.size.height - 1))

    def token(self, x: float, y: float) -> int:
        """Return the visual token that shows a point of the image, clipped to the view."""
        vx, vy = self.at(x, y)
        column = min(self.columns - 1, max(0, int(vx // FACTOR)))
        return min(self.rows - 1, max(0, int(vy // FACTOR))) * self.columns + column


class Picture:
    """A drawn image, from which the server's own code cuts views: pixel for pixel what the engine is sent."""

    def __init__(self, image: Image.Image) -> None:
        self.size = Size(*image.size)
        self._pixels = Pixels(pyvips.Image.new_from_array(np.asarray(image), interpretation="srgb"), None)
        # What a file of these pixels would say of itself; only the size and the orientation matter once they are decoded.
        self._header = ImageHeader(
            self.size,
            "png",
            orientation=1,
            animated=False,
            by_row=True,
            working_bytes=0,
            pixel_bytes=3 * self.size.area,
            max_scans=0,
            pieces=WHOLE,
        )

    def overview(self) -> View:
        """Return the whole within the budget."""
        return self._view(view.overview(self._pixels, self._header, BUDGET, _unhurried()), Box.whole(self.size))

    def crop(self, region: Box) -> View:
        """Return a region within the budget."""
        return self._view(view.crop(self._pixels, self._header, region, BUDGET, _unhurried()), region)

    def close_up(self, region: Box) -> View:
        """Return a region as the overview of an image that shows nothing else."""
        x1, y1, x2, y2 = region.edges
        alone = Picture(Image.fromarray(self._pixels.image.numpy()[y1:y2, x1:x2])).overview()
        return View(alone.data, alone.pixels, alone.rows, alone.columns, (x1, y1), alone.scale)

    def _view(self, made: view.View, region: Box) -> View:
        with Image.open(io.BytesIO(made.data)) as file:
            pixels = np.asarray(file)
        scale = (made.size.width / region.size.width, made.size.height / region.size.height)
        return View(made.data, pixels, made.size.height // FACTOR, made.size.width // FACTOR, (region.x1, region.y1), scale)


def _unhurried() -> Stop:
    return Stop(math.inf)


@dataclass(slots=True)
class Sample:
    """Tokens of one packed sample, and the hints for it. Filled by `Packer`."""

    views: list[View] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    """Loss weight of each token as a target; 0 for what the model does not write."""
    slots: list[int] = field(default_factory=list)
    """Index into views × SLOTS of each visual token, -1 for text."""
    looks: list[tuple[int, int, int]] = field(default_factory=list)
    """(head, position of the token that must look, position of the visual token to look at)."""
    landmarks: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(view, visual token, class, half token that holds the plate's middle: 0–3, or -1 for 'not in this one')."""
    digits: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(view, visual token, patch 0–3, digit)."""


Wrong = Callable[[random.Random, View, Sequence[Point]], str]
"""Writes a zoom reply, given the overview and the places in the image that lead to the right one."""


class Packer:
    """Builds samples with one tokenizer and one set of prompts.

    Args:
        tokenizer: of the checkpoint.
        prompts: the tables of its prompts file.
        wrong: writes the zoom replies that are taught instead of the right ones; crops are cut at the right place all the same.
    """

    def __init__(self, tokenizer: Tokenizer, prompts: dict[str, dict[str, str]], wrong: Wrong | None = None) -> None:
        self.tokenizer = tokenizer
        self._wrong = wrong
        self.prompts = prompts
        self.image_pad: Any = tokenizer.token_to_id("<|image_pad|>")
        self._is_digit = [t.isdigit() for t in (tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size()))]

    def sample(self, rng: random.Random, scene: Scene) -> Sample:
        """Pack up to four branches about ``scene``: two with both turns, the rest with one."""
        sample = Sample()
        picture = Picture(scene.image)
        close = rng.random() < 0.1
        # Only the first two branches read a crop: what is hard to read goes first. Codes on plates are read in plain scenes.
        chosen = sorted(_chosen(rng, scene.queries), key=lambda query: query.kind in (Kind.CODE, Kind.RELATION))
        if close:  # a close-up as the whole image: fits the budget, so it is read without zoom
            query = chosen[0]
            view = picture.close_up(self._around(picture.size, query.plate, rng))
        else:
            view = picture.overview()
        self._text(sample, 0, f"<|im_start|>system\n{self.prompts['zoom']['system']}<|im_end|>\n<|im_start|>user\n", 0)
        self._image(sample, 0, view, sample.positions[-1][0] + 1)
        start = sample.positions[-1][0] + max(view.rows, view.columns)
        self._text(sample, 0, "<|vision_end|>", start)
        if close:
            self._hint_marks(sample, view, 0, query)
            self._single(sample, 1, rng, view, query, start + 1, path=query.path[-1:])
            return sample
        self._hint_landmarks(sample, view, scene.landmarks)
        for number, query in enumerate(chosen, start=1):
            mark = len(sample.ids)
            if number <= 2:
                self._zoom(sample, number, rng, scene, picture, query, start + 1, both=True)
            elif number == BRANCHES and rng.random() < 0.3:
                self._single(sample, number, rng, view, query, start + 1, path=query.path)
            else:
                self._zoom(sample, number, rng, scene, picture, query, start + 1, both=False)
            if len(sample.ids) > LENGTH:
                self._forget(sample, mark)
        return sample

    def sight(self, rng: random.Random, scene: Scene | None) -> Sample:
        """Return views and hints alone, for the vision part: the overview of ``scene``, if there is one, and close-ups."""
        sample = Sample()
        if scene is not None:
            sample.views.append(Picture(scene.image).overview())
            self._hint_landmarks(sample, sample.views[0], scene.landmarks)
        for number in range(len(sample.views), VIEWS):
            if rng.random() < 0.25:
                image, landmark = scenes.close_up(rng)
                query = scenes.code_query(landmark)
            else:
                image, query = hard_scenes.close_up(rng)
            picture = Picture(image)
            sample.views.append(picture.crop(Box.whole(picture.size)))
            self._hint_marks(sample, sample.views[number], number, query)
        return sample

    # --- branches ---------------------------------------------------------------------------------------------------

    def _zoom(
        self,
        sample: Sample,
        branch: int,
        rng: random.Random,
        scene: Scene,
        picture: Picture,
        query: Query,
        position: int,
        *,
        both: bool,
    ) -> None:
        view = sample.views[0]
        absent = rng.random() < 0.05
        question = query.asked(rng, scenes.absent_name(rng, scene.landmarks) if absent else None)
        jitter = 2.0 if both and rng.random() < 0.3 else 0.0
        seen = view.size
        cells = [view.cell(place) for place in query.path]
        if jitter:
            x, y = view.at(*query.path[-1])
            cells[-1] = view.cell_of(x + rng.gauss(0, jitter), y + rng.gauss(0, jitter))
        box = Box.whole(seen) if absent else zoom_box(*cells[-1], seen)
        # Of a conversation that goes on, the zoom reply is then not learned: its crop is not cut where it should say.
        learn = jitter == 0 and (self._wrong is None or not both)
        position = self._text(sample, branch, self.prompts["zoom"]["user"].format(question=question) + ASK, position)
        # A jittered place is not what the model should say, only what it should be able to read on from.
        if absent:
            parts: list[Part] = [(f"<think>unseen</think><zoom>[0, 0, {seen.width}, {seen.height}]</zoom>", ())]
        else:
            parts = self._paths(sample, view, 0, query.path, cells)
            parts.append((where_reply(cells, box).removeprefix(f"<think>{places(cells)}"), ()))
            if self._wrong is not None and not both:
                parts = [(self._wrong(rng, view, query.path), ())]
        position = self._reply(sample, branch, parts, position, learn=learn)
        if not both:
            return
        crop = picture.crop(box.rescale(seen=seen, actual=picture.size))
        position = self._text(sample, branch, "<|im_start|>user\n", position)
        number = len(sample.views)
        first = self._image(sample, branch, crop, position)
        position = self._text(sample, branch, "<|vision_end|>", position + 1 + max(crop.rows, crop.columns))
        text = self.prompts["answer"]["user"].format(question=question, **self._extras(rng, query)) + ASK
        position = self._text(sample, branch, text, position)
        if absent:
            self._reply(sample, branch, [(f"<think>unseen</think><answer>{scenes.ABSENT}</answer>", ())], position, learn=True)
            return
        self._hint_marks(sample, crop, number, query)
        self._read(sample, branch, crop, query, first, position, query.path[-1:])

    def _single(
        self,
        sample: Sample,
        branch: int,
        rng: random.Random,
        view: View,
        query: Query,
        position: int,
        *,
        path: tuple[Point, ...],
    ) -> None:
        text = self.prompts["single"]["user"].format(question=query.asked(rng), **self._extras(rng, query)) + ASK
        position = self._text(sample, branch, text, position)
        self._read(sample, branch, view, query, self._slot(sample, 0, 0), position, path)

    def _read(
        self, sample: Sample, branch: int, view: View, query: Query, first: int, position: int, path: tuple[Point, ...]
    ) -> None:
        cells = [view.cell(place) for place in path]
        parts = self._paths(sample, view, first, path, cells)
        rest = answer_reply(cells, query).removeprefix(f"<think>{places(cells)}")
        marks = [(1, first + view.token(*mark)) for mark in query.marks]
        if query.kind == Kind.COUNT:
            counted, rest = rest.split("</think>")
            parts += [(counted, marks), ("</think>" + rest, ())]
        else:
            parts.append((rest, marks))
        self._reply(sample, branch, parts, position, learn=True)

    def _paths(
        self, sample: Sample, view: View, first: int, path: Sequence[Point], cells: Sequence[tuple[int, int]]
    ) -> list[Part]:
        """Return the thinking of a reply: each place with the token that shows it."""
        first = first or self._slot(sample, 0, 0)
        parts: list[Part] = [("<think>", ())]
        for number, (place, at) in enumerate(zip(path, cells, strict=True)):
            parts.append((", " * (number > 0) + places([at]), [(0, first + view.token(*place))]))
        return parts

    def _extras(self, rng: random.Random, query: Query) -> dict[str, str]:
        choices = ""
        if rng.random() < 0.15:
            count = query.kind == Kind.COUNT
            others = rng.sample([n for n in range(1, 10) if str(n) != query.answer], 3) if count else rng.sample(range(1000), 3)
            answers = [query.answer, *(str(n) if count else f"{n:03d}" for n in others[: rng.randint(1, 3)])]
            rng.shuffle(answers)
            choices = "".join(f"\n({letter}) {answer}" for letter, answer in zip("ABCD", answers, strict=False))
        wanted = rng.random() < 0.04 and query.kind != Kind.COUNT
        return {"choices": choices, "instructions": INSTRUCTION if wanted else ""}

    def _around(self, size: Size, plate: Edges, rng: random.Random) -> Box:
        """A square of 28–38 u about a plate, somewhat off its middle, inside the image."""
        u = math.sqrt(size.area / scenes.BUDGET) / FACTOR
        half = rng.uniform(14, 19) * u
        x, y = (m + rng.uniform(-6, 6) * u for m in centre(plate))
        x1, y1 = int(max(0, x - half)), int(max(0, y - half))
        return Box(x1, y1, int(min(size.width, x + half)), int(min(size.height, y + half)))

    # --- tokens -----------------------------------------------------------------------------------------------------

    def _text(self, sample: Sample, branch: int, text: str, position: int) -> int:
        for token in self.tokenizer.encode(text).ids:
            self._token(sample, branch, token, (position, position, position))
            position += 1
        return position

    def _image(self, sample: Sample, branch: int, view: View, position: int) -> int:
        """Append ``<|vision_start|>`` and the visual tokens; return the index of the first of them."""
        number = len(sample.views)
        sample.views.append(view)
        self._text(sample, branch, "<|vision_start|>", position)
        position += 1
        first = len(sample.ids)
        for slot in range(view.rows * view.columns):
            place = (position, position + slot // view.columns, position + slot % view.columns)
            self._token(sample, branch, self.image_pad, place, slot=number * SLOTS + slot)
        return first

    def _reply(self, sample: Sample, branch: int, parts: Sequence[Part], position: int, *, learn: bool) -> int:
        """Append a reply with its loss weights, and what its digits look at."""
        text = "".join(part for part, _ in parts) + "<|im_end|>"
        encoding = self.tokenizer.encode(text)
        ends = list(itertools.accumulate(len(part) for part, _ in parts))
        read = [0] * len(parts)
        for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
            digit = self._is_digit[token]
            if digit and learn:
                number = bisect.bisect_right(ends, start)
                looks = parts[number][1]
                if looks:
                    head, there = looks[0] if len(looks) == 1 else looks[read[number]]
                    sample.looks.append((head, len(sample.ids) - 1, there))
                    read[number] += 1
            self._token(sample, branch, token, (position,) * 3, weight=(DIGIT_WEIGHT if digit else 1.0) * learn)
            position += 1
        return self._text(sample, branch, "\n", position)

    def _token(
        self, sample: Sample, branch: int, token: int, place: tuple[int, int, int], *, weight: float = 0.0, slot: int = -1
    ) -> None:
        sample.ids.append(token)
        sample.branch.append(branch)
        sample.positions.append(place)
        sample.weights.append(weight)
        sample.slots.append(slot)

    def _slot(self, sample: Sample, view: int, token: int) -> int:
        return sample.slots.index(view * SLOTS + token)

    def _forget(self, sample: Sample, mark: int) -> None:
        """Drop the branch that begins at ``mark``; its view stays, and its hints about the view stay true."""
        for column in (sample.ids, sample.branch, sample.positions, sample.weights, sample.slots):
            del column[mark:]
        sample.looks = [look for look in sample.looks if look[1] < mark]

    # --- hints ------------------------------------------------------------------------------------------------------

    def _hint_landmarks(self, sample: Sample, view: View, landmarks: Sequence[Landmark]) -> None:
        names = [f"{c} {s}" for c in scenes.COLOURS for s in scenes.SHAPES]
        for landmark in landmarks:
            middle = view.token(*centre(landmark.plate))
            x, y = view.at(*centre(landmark.plate))
            half = (int(y % FACTOR) // CELL) * 2 + int(x % FACTOR) // CELL
            cx, cy = view.at(landmark.x, landmark.y)
            reach = landmark.diameter * view.scale[0] * 0.4
            for token in range(view.rows * view.columns):
                tx, ty = (token % view.columns + 0.5) * FACTOR, (token // view.columns + 0.5) * FACTOR
                if token == middle or math.hypot(tx - cx, ty - cy) < reach:
                    sample.landmarks.append((0, token, names.index(landmark.name), half if token == middle else -1))

    def _hint_marks(self, sample: Sample, view: View, number: int, query: Query) -> None:
        shown = [(place, DOT) for place in query.dots]
        if query.kind != Kind.COUNT:
            shown = [(place, int(digit)) for place, digit in zip(query.marks, query.read, strict=True)]
        for place, kind in shown:
            x, y = view.at(*place)
            if 0 <= x < view.size.width and 0 <= y < view.size.height:
                patch = (int(y % FACTOR) // CELL) * 2 + int(x % FACTOR) // CELL
                sample.digits.append((number, view.token(*place), patch, kind))


ASK = "<|im_end|>\n<|im_start|>assistant\n"


def _chosen(rng: random.Random, queries: Sequence[Query]) -> list[Query]:
    """Return `BRANCHES` queries to ask: each kind as often as any other, and none twice before all were asked."""
    chosen: list[Query] = []
    while len(chosen) < BRANCHES:
        left = [query for query in queries if query not in chosen] or list(queries)
        kind = rng.choice(sorted({query.kind for query in left}))
        chosen.append(rng.choice([query for query in left if query.kind == kind]))
    return chosen
