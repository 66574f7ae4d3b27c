"""The ablation and the occlusion test: the start that looks astray, what is covered, and the tables."""

from __future__ import annotations

import itertools
import json
import random
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from support import PROMPTS
from tokenizers import Tokenizer

from ergo_train import ablation, occlusion
from ergo_train.ablation import ARMS, CHECKPOINT, SIDES, WANDER
from ergo_train.assess import Assessment
from ergo_train.hard_scenes import hard_scene
from ergo_train.samples import Packer, Picture
from ergo_train.scenes import HELD_OUT, scene

SPOKEN = re.compile(r"<think>row \d+ column \d+(</think>)?<zoom>\[(\d+), (\d+), (\d+), (\d+)\]</zoom>")


def test_the_start_is_taught_boxes_about_the_right_place() -> None:
    """They lie within the view, wander about the target, most do not hold it well, and three in ten replies do not end their
    thinking; where the question names something else, the way from there is the right one."""
    rng = random.Random(1)
    made = scene(3, size=(1200, 1200))
    view = Picture(made.image).overview()
    place = made.query.path[-1]
    said = [SPOKEN.fullmatch(ablation.astray(rng, view, [place])) for _ in range(400)]
    found = [match for match in said if match]
    assert len(found) == 400
    assert 0.6 < sum(match[1] is not None for match in found) / 400 < 0.8
    boxes = np.array([[int(edge) for edge in match.groups()[1:]] for match in found])
    assert boxes.min() >= 0
    assert boxes.max() <= 196
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes[:, 2:] - boxes[:, :2]).max() <= SIDES[1] + 1
    x, y = view.at(*place)
    assert np.abs(np.median((boxes[:, 0] + boxes[:, 2]) / 2) - x) < WANDER / 2
    assert np.abs(np.median((boxes[:, 1] + boxes[:, 3]) / 2) - y) < WANDER / 2
    good = np.abs(boxes - np.array([x - 15, y - 15, x + 15, y + 15])).max(1) < 6
    assert 0.01 < good.mean() < 0.4
    far = (40.0, 60.0)
    row, column = view.cell(far)
    assert ablation.astray(rng, view, [far, place]).startswith(f"<think>row {row} column {column}, row ")


def test_where_the_start_is_taught_to_look_astray_its_reading_is_left_alone() -> None:
    """A conversation that goes on to the answer shows the right crop, and of it only the answer is learned; one that does not
    teaches the wrong box."""
    tokens = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    wrong = "<think>row 1 column 1</think><zoom>[0, 0, 30, 30]</zoom>"
    prompts = tomllib.loads(PROMPTS.read_text(encoding="utf-8"))
    astray, right = Packer(tokens, prompts, lambda *_: wrong), Packer(tokens, prompts)
    taught = set()
    for seed in range(6):
        made = scene(seed, size=(1200, 1050))
        sample = astray.sample(random.Random(seed), made)
        assert [view.data for view in sample.views] == [v.data for v in right.sample(random.Random(seed), made).views]
        for branch in range(1, max(sample.branch) + 1):
            learned = [t for t, b, w in zip(sample.ids, sample.branch, sample.weights, strict=True) if b == branch and w > 0]
            taught.add(tokens.decode(learned, skip_special_tokens=False))
    boxes = {text for text in taught if "<zoom>" in text}
    assert boxes == {f"{wrong}<|im_end|>"} or boxes == {
        f"{wrong}<|im_end|>",
        *(text for text in boxes if text.startswith("<think>unseen")),
    }
    assert sum("<answer>" in text for text in taught) > 6


@pytest.mark.parametrize("number", range(6))
def test_boxes_cover_the_target_and_the_landmarks(number: int) -> None:
    """Over the target all is black; without context over every landmark too; and no other pixel has changed."""
    made = next(itertools.islice(occlusion.contextual(10), number, None))
    pixels = np.asarray(made.image)
    for context in (True, False):
        hidden = occlusion.covered(made, context=context)
        after = np.asarray(hidden.image)
        x1, y1, x2, y2 = (round(edge) for edge in made.query.plate)
        assert not after[y1:y2, x1:x2].any()
        changed = (after != pixels).any(-1)
        assert not after[changed].any()
        for mark in made.landmarks:
            black = not after[int(mark.y), int(mark.x)].any()
            assert black == (not context or mark.plate == made.query.plate)
        assert changed.mean() < (0.06 if context else 0.3)
        assert (hidden.question, hidden.answer, hidden.box) == (made.question, made.answer, made.box)


def test_only_questions_with_surroundings_are_asked() -> None:
    """The kinds take turns, and every scene is a held-out one."""
    made = list(itertools.islice(occlusion.contextual(), 6))
    assert [one.query.kind for one in made] == list(occlusion.CONTEXTUAL) * 2
    assert all(one.seed >= HELD_OUT for one in made)
    assert (np.asarray(made[0].image) == np.asarray(hard_scene(made[0].seed, kind=made[0].query.kind).image)).all()


def test_a_row_shows_means_and_their_spread() -> None:
    """Over several seeds each figure has its standard deviation beside it; over one it has none."""

    def one(accuracy: float) -> Assessment:
        return Assessment(10, accuracy, 0.5, 1.0, 1.0, 0.03, 0.9, 94.5)

    assert ablation.row("A", [one(0.5)]) == "| A | 50.0 | 90.0 | 3.0 | 100.0 | 100.0 | 94.5 |"
    assert ablation.row("A", [one(0.5), one(0.7)]).startswith("| A | 60.0 ± 14.1 | 90.0 ± 0.0 |")


def test_an_arm_is_trained_asked_and_drawn_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of it in miniature: a start, one arm, the table and the plot; run again, nothing is done twice."""
    plot = tmp_path / "plot.png"
    args = ["--start-steps", "1", "--steps", "1", "--arm", "full", "--seeds", "1", "--scenes", "4", "--plot", str(plot)]
    given = ablation.arguments([str(tmp_path), *args])
    ablation.run(given)
    first = capsys.readouterr().out
    assert f"{ARMS['full'].title}, seed 0" in first
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file() and file != plot}
    [line] = (tmp_path / "full" / "0" / "log.jsonl").read_text().splitlines()
    assert set(json.loads(line)) >= {"reward", "accuracy", "region", "box", "format", "area", "visual_tokens", "kl"}
    assert plot.stat().st_size > 10_000
    ablation.run(given)
    again = capsys.readouterr().out
    assert again == first[first.index(ablation.HEADER) :]
    assert {file: file.read_bytes() for file in files} == files
