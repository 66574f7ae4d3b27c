"""Scenes: always the same, and as hard as they claim to be."""

from __future__ import annotations

import math
import random
import re

import pytest

from ergo_train import scenes
from ergo_train.scenes import HELD_OUT, scene


def test_a_seed_is_a_scene() -> None:
    """The same seed gives the same pixels, question and answer."""
    first, second = scene(7), scene(7)
    assert first.image.tobytes() == second.image.tobytes()
    assert (first.question, first.answer) == (second.question, second.answer)


def test_seeds_differ() -> None:
    """Other seeds give other questions, sizes and codes."""
    made = [scene(seed) for seed in range(40)]
    assert len({(s.question, s.answer) for s in made}) > 35
    assert len({s.image.size for s in made}) >= 6


@pytest.mark.parametrize("number", range(20))
def test_digits_are_too_small_for_the_overview_and_large_enough_for_the_crop(number: int) -> None:
    """In the overview a digit is about three pixels high; the plate lies inside the image and its landmark."""
    made = scene(HELD_OUT + number)
    u = math.sqrt(made.image.width * made.image.height / scenes.BUDGET) / 28
    for landmark in made.landmarks:
        x1, y1, x2, y2 = landmark.plate
        assert 0 <= x1 < x2 <= made.image.width
        assert 0 <= y1 < y2 <= made.image.height
        assert (y2 - y1) / u <= 3.1 + 2 * 0.8 + 0.01
        assert math.dist(((x1 + x2) / 2, (y1 + y2) / 2), (landmark.x, landmark.y)) < landmark.diameter / 4


def test_a_question_has_one_answer() -> None:
    """No two landmarks of a scene share a name, and the answer is the code of the one that is asked about."""
    for seed in range(60):
        made = scene(seed)
        names = [landmark.name for landmark in made.landmarks]
        assert len(set(names)) == len(names)
        assert [landmark.code for landmark in made.landmarks if landmark.name in made.question] == [made.answer]
        assert re.fullmatch(r"\d{3}", made.answer)


def test_any_size_can_be_asked_for() -> None:
    """A scene is drawn at the size that is asked for."""
    assert scene(1, size=(400, 1200)).image.size == (400, 1200)


def test_an_absent_landmark_is_absent() -> None:
    """The name for questions about nothing is of no landmark in the scene."""
    made = scene(3)
    assert scenes.absent_name(random.Random(0), made.landmarks) not in [landmark.name for landmark in made.landmarks]
