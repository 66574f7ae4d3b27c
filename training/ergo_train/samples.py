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

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from ergo_server.imaging.geometry import FACTOR, Box, PixelBudget, Size
from ergo_train import scenes
from ergo_train.scenes import Landmark, Scene

LENGTH = 448
"""Tokens of one packed sample; branches that do not fit are left out."""

VIEWS = 3
"""The overview and at most two crops."""

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
NO_DIGIT = 10
INSTRUCTION = "\nReply with the code only."


def cell(x: float, y: float) -> tuple[int, int]:
    """Return the row and column, in half tokens, of a point of a view."""
    return int(y // CELL), int(x // CELL)


def zoom_box(row: int, column: int, seen: Size) -> Box:
    """Return the box, in overview pixels, that the model is taught for a landmark at ``row`` and ``column``."""
    x, y = column * CELL + CELL // 2, row * CELL + CELL // 2
    return Box(max(0, x - REACH), max(0, y - REACH), min(seen.width, x + REACH), min(seen.height, y + REACH))


def where_reply(row: int, column: int, box: Box) -> str:
    """Return the reply of the zoom turn."""
    return f"<think>row {row} column {column}</think><zoom>[{box.x1}, {box.y1}, {box.x2}, {box.y2}]</zoom>"


def answer_reply(row: int, column: int, code: str) -> str:
    """Return the reply of the answer turn, or of the only turn."""
    return f"<think>row {row} column {column}</think><answer>{code}</answer>"


@dataclass(slots=True)
class View:
    """One view of the image with what it shows."""

    pixels: NDArray[np.uint8]
    rows: int
    columns: int
    origin: tuple[float, float]
    scale: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Map a point of the image into the view."""
        return (x - self.origin[0]) * self.scale[0], (y - self.origin[1]) * self.scale[1]

    def token(self, x: float, y: float) -> int:
        """Return the visual token that shows a point of the image, clipped to the view."""
        vx, vy = self.at(x, y)
        column = min(self.columns - 1, max(0, int(vx // FACTOR)))
        return min(self.rows - 1, max(0, int(vy // FACTOR))) * self.columns + column


def view_of(image: Image.Image, region: Box, resample: Image.Resampling) -> View:
    """Cut ``region`` and resize it into the budget, as the server does."""
    size = PixelBudget(scenes.BUDGET).view_size(region.size)
    pixels = np.asarray(image.resize(size, resample, box=region.edges, reducing_gap=None))
    scale = (size.width / region.size.width, size.height / region.size.height)
    return View(pixels, size.height // FACTOR, size.width // FACTOR, (region.x1, region.y1), scale)


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


class Packer:
    """Builds samples with one tokenizer and one set of prompts."""

    def __init__(self, tokenizer: Tokenizer, prompts: dict[str, dict[str, str]]) -> None:
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.image_pad: Any = tokenizer.token_to_id("<|image_pad|>")
        self._is_digit = [t.isdigit() for t in (tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size()))]

    def sample(self, rng: random.Random, scene: Scene) -> Sample:
        """Pack up to five branches about ``scene``: two with both turns, the rest with one."""
        sample = Sample()
        image = scene.image
        whole = Box.whole(Size(*image.size))
        close = rng.random() < 0.06
        if close:  # a close-up as the whole image: fits the budget, so it is read without zoom
            landmark = rng.choice(scene.landmarks)
            view = view_of(image, self._around(image, landmark, rng), Image.Resampling.BICUBIC)
        else:
            view = view_of(image, whole, Image.Resampling.BICUBIC)
        self._text(sample, 0, f"<|im_start|>system\n{self.prompts['zoom']['system']}<|im_end|>\n<|im_start|>user\n", 0)
        self._image(sample, 0, view, sample.positions[-1][0] + 1)
        start = sample.positions[-1][0] + max(view.rows, view.columns)
        self._text(sample, 0, "<|vision_end|>", start)
        if close:
            self._hint_digits(sample, view, 0, landmark)
            self._single(sample, 1, rng, scene, view, landmark, start + 1)
            return sample
        self._hint_landmarks(sample, view, scene.landmarks)
        order = [*rng.sample(scene.landmarks, len(scene.landmarks)), *rng.choices(scene.landmarks, k=4)]
        for number, landmark in enumerate(order[:4], start=1):
            mark = len(sample.ids)
            if number <= 2:
                self._zoom(sample, number, rng, scene, landmark, start + 1, both=True)
            elif number == 4 and rng.random() < 0.3:
                self._single(sample, number, rng, scene, view, landmark, start + 1)
            else:
                self._zoom(sample, number, rng, scene, landmark, start + 1, both=False)
            if len(sample.ids) > LENGTH:
                self._forget(sample, mark)
        return sample

    def sight(self, rng: random.Random, scene: Scene | None) -> Sample:
        """Return views and hints alone, for the vision part: the overview of ``scene``, if there is one, and close-ups."""
        sample = Sample()
        if scene is not None:
            sample.views.append(view_of(scene.image, Box.whole(Size(*scene.image.size)), Image.Resampling.BICUBIC))
            self._hint_landmarks(sample, sample.views[0], scene.landmarks)
        for number in range(len(sample.views), VIEWS):
            image, landmark = scenes.close_up(rng)
            sample.views.append(view_of(image, Box.whole(Size(*image.size)), Image.Resampling.LANCZOS))
            self._hint_digits(sample, sample.views[number], number, landmark)
        return sample

    # --- branches ---------------------------------------------------------------------------------------------------

    def _zoom(
        self, sample: Sample, branch: int, rng: random.Random, scene: Scene, landmark: Landmark, position: int, *, both: bool
    ) -> None:
        view, image = sample.views[0], scene.image
        absent = rng.random() < 0.05
        name = scenes.absent_name(rng, scene.landmarks) if absent else landmark.name
        question = rng.choice(scenes.QUESTIONS).format(name)
        x, y = view.at(*_middle(landmark))
        jitter = 2.0 if both and rng.random() < 0.3 else 0.0
        x, y = x + rng.gauss(0, jitter), y + rng.gauss(0, jitter)
        seen = Size(view.columns * FACTOR, view.rows * FACTOR)
        row, column = cell(min(max(x, 0), seen.width - 1), min(max(y, 0), seen.height - 1))
        box = Box.whole(seen) if absent else zoom_box(row, column, seen)
        unseen = f"<think>unseen</think><zoom>[0, 0, {seen.width}, {seen.height}]</zoom>"
        reply = unseen if absent else where_reply(row, column, box)
        position = self._text(sample, branch, self.prompts["zoom"]["user"].format(question=question) + ASK, position)
        # A jittered place is not what the model should say, only what it should be able to read on from.
        looks = [] if absent else [(0, self._slot(sample, 0, view.token(*_middle(landmark))))]
        position = self._reply(sample, branch, reply, position, looks, learn=jitter == 0)
        if not both:
            return
        crop = view_of(image, box.rescale(seen=seen, actual=Size(*image.size)), Image.Resampling.LANCZOS)
        position = self._text(sample, branch, "<|im_start|>user\n", position)
        number = len(sample.views)
        first = self._image(sample, branch, crop, position)
        position = self._text(sample, branch, "<|vision_end|>", position + 1 + max(crop.rows, crop.columns))
        text = self.prompts["answer"]["user"].format(question=question, **self._extras(rng, landmark.code)) + ASK
        position = self._text(sample, branch, text, position)
        if absent:
            self._reply(sample, branch, f"<think>unseen</think><answer>{scenes.ABSENT}</answer>", position, [], learn=True)
            return
        self._hint_digits(sample, crop, number, landmark)
        self._read(sample, branch, crop, landmark, first, position)

    def _single(
        self, sample: Sample, branch: int, rng: random.Random, scene: Scene, view: View, landmark: Landmark, position: int
    ) -> None:
        question = rng.choice(scenes.QUESTIONS).format(landmark.name)
        text = self.prompts["single"]["user"].format(question=question, **self._extras(rng, landmark.code)) + ASK
        position = self._text(sample, branch, text, position)
        self._read(sample, branch, view, landmark, self._slot(sample, 0, 0), position)

    def _read(self, sample: Sample, branch: int, view: View, landmark: Landmark, first: int, position: int) -> None:
        seen = Size(view.columns * FACTOR, view.rows * FACTOR)
        x, y = view.at(*_middle(landmark))
        row, column = cell(min(max(x, 0), seen.width - 1), min(max(y, 0), seen.height - 1))
        looks = [(0, first + view.token(*_middle(landmark)))] + [(1, first + view.token(*d)) for d in landmark.digits]
        self._reply(sample, branch, answer_reply(row, column, landmark.code), position, looks, learn=True)

    def _extras(self, rng: random.Random, code: str) -> dict[str, str]:
        choices = ""
        if rng.random() < 0.15:
            codes = [code, *(f"{rng.randrange(1000):03d}" for _ in range(rng.randint(1, 3)))]
            rng.shuffle(codes)
            choices = "".join(f"\n({letter}) {c}" for letter, c in zip("ABCD", codes, strict=False))
        return {"choices": choices, "instructions": INSTRUCTION if rng.random() < 0.04 else ""}

    def _around(self, image: Image.Image, landmark: Landmark, rng: random.Random) -> Box:
        """A square of 28–38 u about the landmark's plate, somewhat off its middle, inside the image."""
        u = math.sqrt(image.width * image.height / scenes.BUDGET) / FACTOR
        half = rng.uniform(14, 19) * u
        x, y = (m + rng.uniform(-6, 6) * u for m in _middle(landmark))
        x1, y1 = int(max(0, x - half)), int(max(0, y - half))
        return Box(x1, y1, int(min(image.width, x + half)), int(min(image.height, y + half)))

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

    def _reply(
        self, sample: Sample, branch: int, text: str, position: int, looks: Sequence[tuple[int, int]], *, learn: bool
    ) -> int:
        """Append a reply with its loss weights. Digits in the think part look at ``looks[0]``, those of a code at the rest."""
        ids = self.tokenizer.encode(text + "<|im_end|>").ids
        think = len(self.tokenizer.encode(text.split("</think>")[0]).ids)
        rest = list(looks[1:])
        for i, token in enumerate(ids):
            digit = self._is_digit[token]
            if digit and learn and looks:
                if i < think:
                    sample.looks.append((looks[0][0], len(sample.ids) - 1, looks[0][1]))
                elif rest:
                    head, target = rest.pop(0)
                    sample.looks.append((head, len(sample.ids) - 1, target))
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
            middle = view.token(*_middle(landmark))
            x, y = view.at(*_middle(landmark))
            half = (int(y % FACTOR) // CELL) * 2 + int(x % FACTOR) // CELL
            cx, cy = view.at(landmark.x, landmark.y)
            reach = landmark.diameter * view.scale[0] * 0.4
            for token in range(view.rows * view.columns):
                tx, ty = (token % view.columns + 0.5) * FACTOR, (token // view.columns + 0.5) * FACTOR
                if token == middle or math.hypot(tx - cx, ty - cy) < reach:
                    sample.landmarks.append((0, token, names.index(landmark.name), half if token == middle else -1))

    def _hint_digits(self, sample: Sample, view: View, number: int, landmark: Landmark) -> None:
        for digit, place in zip(landmark.code, landmark.digits, strict=True):
            x, y = view.at(*place)
            if 0 <= x < view.columns * FACTOR and 0 <= y < view.rows * FACTOR:
                patch = (int(y % FACTOR) // CELL) * 2 + int(x % FACTOR) // CELL
                sample.digits.append((number, view.token(*place), patch, int(digit)))


ASK = "<|im_end|>\n<|im_start|>assistant\n"


def _middle(landmark: Landmark) -> tuple[float, float]:
    x1, y1, x2, y2 = landmark.plate
    return (x1 + x2) / 2, (y1 + y2) / 2
