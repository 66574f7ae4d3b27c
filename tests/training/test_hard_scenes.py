"""Hard scenes: what is asked is true of them, and cannot be seen from afar."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from ergo_server.imaging.geometry import Box, Size
from ergo_train import hard_scenes
from ergo_train.hard_scenes import AWAY, HARD_SIZES, SIDES, hard_scene
from ergo_train.samples import Picture, View
from ergo_train.scenes import BUDGET, HELD_OUT, Edges, Kind, Scene, centre

SIZE = (1280, 1100)


def _unit(scene: Scene) -> float:
    return math.sqrt(scene.image.width * scene.image.height / BUDGET) / 28


def test_a_seed_is_a_hard_scene() -> None:
    """The same seed gives the same pixels, question and answer, and not those of the plain scene of that seed."""
    first, second = hard_scene(7), hard_scene(7)
    assert first.image.tobytes() == second.image.tobytes()
    assert (first.question, first.answer) == (second.question, second.answer)


def test_every_kind_is_asked_at_every_size_of_the_list() -> None:
    """Two hundred scenes ask all five kinds of questions, each in a tenth of the cases; sizes are of 1 to 12 megapixels."""
    made = [hard_scene(HELD_OUT + number, size=SIZE) for number in range(200)]
    asked = Counter(scene.query.kind for scene in made)
    assert set(asked) == set(Kind)
    assert min(asked.values()) >= 20
    areas = [width * height / 1e6 for width, height in HARD_SIZES]
    assert min(areas) < 1.3
    assert max(areas) == 12
    assert {width > height for width, height in HARD_SIZES} == {True, False}


@pytest.mark.parametrize("number", range(25))
def test_a_relation_is_true_and_of_one_landmark_only(number: int) -> None:
    """The landmark that a question finds lies on the side that it names, and no other landmark does by the same measure."""
    scene = hard_scene(number, size=SIZE)
    by_name = {mark.name: mark for mark in scene.landmarks}
    for query in scene.queries:
        if query.kind not in (Kind.RELATION, Kind.CHAIN):
            continue
        asked = query.forms[0]
        side = asked.split(" the shape ")[1].removesuffix(" the {}?")
        dx, dy = SIDES[side]
        here = by_name[query.name]
        there = [
            m
            for m in scene.landmarks
            if (m.x - here.x) * dx + (m.y - here.y) * dy > abs((m.x - here.x) * dy + (m.y - here.y) * dx)
        ]
        assert [centre(mark.plate) for mark in there] == [query.path[1]]


@pytest.mark.parametrize("number", range(25))
def test_a_tag_is_where_the_question_says(number: int) -> None:
    """A tag lies on the named side of its landmark, clear of every landmark, inside the image, and has the code asked for."""
    scene = hard_scene(number, size=SIZE)
    u = _unit(scene)
    for query in scene.queries:
        if query.kind != Kind.BESIDE:
            continue
        side = query.forms[0].split(" the tag ")[1].removesuffix(" the {}?")
        owner = next(mark for mark in scene.landmarks if mark.name == query.name)
        x, y = centre(query.plate)
        dx, dy = SIDES[side]
        assert math.dist((x, y), (owner.x + dx * AWAY[side] * u, owner.y + dy * AWAY[side] * u)) < 1.5 * u
        assert 0 < query.plate[0] < query.plate[2] < scene.image.width
        assert 0 < query.plate[1] < query.plate[3] < scene.image.height
        assert all(math.dist((x, y), (mark.x, mark.y)) > 22 * u for mark in scene.landmarks)
        assert query.answer == query.read


def test_questions_have_one_answer() -> None:
    """No two queries of a scene have the same words and different answers."""
    for number in range(60):
        answers: dict[str, str] = {}
        for query in hard_scene(number, size=SIZE).queries:
            for form in query.forms:
                assert answers.setdefault(form.format(query.name), query.answer) == query.answer


def test_tags_are_hidden_in_the_overview_and_plain_in_the_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing on a tag moves the overview by about what its texture varies there, and the crop's strokes ten times as much."""
    far, near = [], []
    for number in range(12):
        scene = hard_scene(HELD_OUT + number, size=SIZE)
        with monkeypatch.context() as patch:
            patch.setattr(hard_scenes, "CONTRAST", 0)
            blank = hard_scene(HELD_OUT + number, size=SIZE)
        pictures = [Picture(scene.image), Picture(blank.image)]
        for query in scene.queries:
            if query.kind == Kind.BESIDE:
                far.append(np.sqrt(np.mean(_moved([picture.overview() for picture in pictures], query.plate) ** 2)))
                near.append(
                    np.percentile(_moved([picture.crop(_box(query.plate, SIZE)) for picture in pictures], query.plate), 98)
                )
    assert len(far) > 10
    assert np.mean(far) < 6
    assert np.mean(near) > 60


def _moved(views: list[View], plate: Edges) -> NDArray[np.float64]:
    """Return by how many levels the pixels of a plate differ."""
    (x1, y1), (x2, y2) = views[0].at(*plate[:2]), views[0].at(*plate[2:])
    one, other = (view.pixels[int(y1) : math.ceil(y2), int(x1) : math.ceil(x2)].astype(np.float64) for view in views)
    moved: NDArray[np.float64] = np.abs(one - other)
    return moved


def _box(plate: Edges, size: tuple[int, int]) -> Box:
    x, y = centre(plate)
    box = Box(int(x) - 85, int(y) - 85, int(x) + 85, int(y) + 85).clamp(Size(*size))
    assert box is not None
    return box


def test_a_plate_of_dots_is_as_dark_however_many_there_are() -> None:
    """A ring darkens its place as much as a dot, within a twentieth, at every size that scenes have."""
    for side in range(8, 40):
        masks = [np.asarray(hard_scenes.dot(side, ring=ring), float).mean() for ring in (False, True)]
        assert masks[0] == pytest.approx(masks[1], rel=0.05)


@pytest.mark.parametrize("number", range(40))
def test_counts_are_what_is_drawn(number: int) -> None:
    """The answer to a count is the number of dots, one to nine, and what is read off tells where they are."""
    for query in hard_scene(number, size=SIZE).queries:
        if query.kind == Kind.COUNT:
            assert int(query.answer) == len(query.dots) == sum(map(int, query.read))
            assert 1 <= len(query.dots) <= 9
            assert [mark for mark, one in zip(query.marks, query.read, strict=True) if one == "1"] == list(query.dots)


def test_a_close_up_holds_what_it_asks_about() -> None:
    """A close-up's digits or dots have places, and its plate is near the middle."""
    for seed in range(40):
        image, query = hard_scenes.close_up(random.Random(seed))
        x, y = centre(query.plate)
        assert 0 < x < image.width
        assert 0 < y < image.height
        assert len(query.marks) == len(query.read) == (9 if query.kind == Kind.COUNT else 3)
