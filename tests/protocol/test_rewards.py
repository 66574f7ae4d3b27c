"""The rewards: their ranges, what raises and lowers them, and the answers that match."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ergo_server.imaging.geometry import Box, Size
from ergo_server.protocol import rewards
from ergo_server.protocol.base import Question
from ergo_server.protocol.rewards import (
    Rewards,
    accuracy_reward,
    box_reward,
    exact,
    format_reward,
    letter,
    numeric,
    region_reward,
    target_coverage,
    tce_reward,
)

IMAGE = Size(400, 300)
SIDES = st.tuples(st.integers(0, 399), st.integers(0, 299), st.integers(1, 400), st.integers(1, 300))
BOXES = SIDES.filter(lambda s: s[0] < s[2] and s[1] < s[3]).map(lambda s: Box(*s))
BITS = st.sampled_from([0.0, 1.0])
ZOOM, ANSWER = "<think>left</think><zoom>[1, 2, 3, 4]</zoom>", "<think>red</think>\n<answer>B</answer>"


def test_the_examples_in_the_docstrings_hold() -> None:
    """What the docstrings show is what comes out."""
    assert doctest.testmod(rewards).failed == 0


@given(BOXES, BOXES, st.text(max_size=40), st.text(max_size=40))
def test_every_reward_is_between_0_and_1(region: Box, target: Box, one: str, other: str) -> None:
    """Whatever was said and wherever was looked: rewards are 0 or 1, coverage is a share; nothing raises."""
    for value in (accuracy_reward(one, other), region_reward(one, other), box_reward(region, IMAGE), format_reward(one, other)):
        assert value in (0.0, 1.0)
    assert 0 <= target_coverage(region, target) <= 1


@given(BOXES, BOXES, st.floats(0.01, 1))
def test_a_smaller_region_never_loses_the_box_reward(one: Box, other: Box, gamma: float) -> None:
    """The box reward only falls as the region grows."""
    small, large = sorted((one, other), key=lambda box: box.size.area)
    assert box_reward(small, IMAGE, gamma) >= box_reward(large, IMAGE, gamma)


def test_the_whole_image_loses_the_box_reward() -> None:
    """Cropping everything gets nothing; exactly γ still does."""
    assert box_reward(Box.whole(IMAGE), IMAGE) == 0
    assert box_reward(Box(0, 0, 240, 300), IMAGE) == 1
    assert box_reward(Box(0, 0, 241, 300), IMAGE) == 0


@given(BOXES, BOXES)
def test_a_larger_region_never_covers_less(region: Box, target: Box) -> None:
    """Coverage only rises as the region grows, and is 1 exactly where the target is inside."""
    grown = Box(max(0, region.x1 - 5), max(0, region.y1 - 5), region.x2 + 5, region.y2 + 5)
    assert target_coverage(grown, target) >= target_coverage(region, target)
    inside = region.x1 <= target.x1 and region.y1 <= target.y1 and region.x2 >= target.x2 and region.y2 >= target.y2
    assert (target_coverage(region, target) == 1) is inside
    assert target_coverage(Box.whole(IMAGE), target) == 1


@given(BITS, BITS, BITS, BITS)
def test_the_total_is_the_paper_s_sum(accuracy: float, region: float, box: float, form: float) -> None:
    """R = 1 · r_region + 0.5 · r_box + r_acc + r_format, so at most 3.5."""
    made = Rewards(accuracy, region, box, form)
    assert made.total == region + 0.5 * box + accuracy + form == tce_reward(region, box) + accuracy + form
    assert Rewards(1, 1, 1, 1, alpha=2, beta=0).total == 4


@pytest.mark.parametrize(
    ("zoom", "answer"),
    [
        (ZOOM.replace("</zoom>", ""), ANSWER),
        (ZOOM.replace("<think>", ""), ANSWER),
        (f"{ZOOM} more", ANSWER),
        (f"more {ZOOM}", ANSWER),
        (ZOOM + ZOOM, ANSWER),
        ("<zoom>[1, 2, 3, 4]</zoom><think>left</think>", ANSWER),
        (ZOOM, ""),
        (ZOOM, "B"),
        (ZOOM, ANSWER.replace("</think>", "<think>")),
        (ZOOM, ANSWER.replace("</think>", "</think> so ")),
        (ANSWER, ZOOM),
        (ZOOM, "<think><answer>A</answer></think><answer>B</answer>"),
    ],
)
def test_tags_stand_once_and_in_order(zoom: str, answer: str) -> None:
    """A tag that is missing, doubled, nested or out of order, and words outside the tags, lose the format reward."""
    assert format_reward(ZOOM, ANSWER) == 1
    assert format_reward(f"\n{ZOOM} ", f" {ANSWER}\n") == 1
    assert format_reward(zoom, answer) == 0


@given(st.text(max_size=60))
def test_thinking_is_free(thought: str) -> None:
    """What stands in the tags does not matter, as long as it is no tag."""
    assume(not any(f"{slash}{tag}>" in thought for slash in ("<", "</") for tag in ("think", "zoom", "answer")))
    assume("<" not in thought)
    assert (
        format_reward(f"<think>{thought}</think><zoom>{thought}</zoom>", f"<think>{thought}</think><answer>{thought}</answer>")
        == 1
    )


@pytest.mark.parametrize(
    ("match", "answer", "truth", "right"),
    [
        (exact, "472", "472", True),
        (exact, "**472**", "472", True),
        (exact, "473", "472", False),
        (exact, "", "", False),
        (letter(Question("?", ("red", "blue"))), "b", "B", True),
        (letter(Question("?", ("red", "blue"))), "It is blue.", "B", True),
        (letter(Question("?", ("red", "blue"))), "A", "B", False),
        (letter(Question("?", ("red", "blue"))), "neither", "B", False),
        (numeric(), "12", "12.0", True),
        (numeric(), "12 or 13", "12", False),
        (numeric(0.1), "110", "100", True),
        (numeric(0.1), "111", "100", False),
        (numeric(0.1), "none", "100", False),
        (numeric(0.1), "-95", "-100", True),
        (lambda answer, truth: truth in answer, "the red door", "red", True),
    ],
)
def test_what_matches(match: rewards.Matcher, answer: str, truth: str, right: bool) -> None:
    """Words, letters, numbers within a tolerance, or whatever a caller's own function says."""
    assert accuracy_reward(answer, truth, match) == region_reward(answer, truth, match) == float(right)
