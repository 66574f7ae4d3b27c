"""The paper's rewards, as functions of what was said and where was looked: one home for training, evaluation and production.

    R = r_TCE + r_acc + r_format        r_TCE = α · r_region + β · r_box        (the paper, research notes; α 1, β 0.5, γ 0.6)

`region_reward` is of an answer that was given from the crop and the question *alone*: who may see the original as well can answer
in spite of a bad crop. `box_reward` keeps the policy from cropping everything, which would satisfy that. Every reward is 0 or 1.

Not from the paper: `target_coverage`. The paper reports a Target Coverage Score in its occlusion test, but its formula was not in
the sources that this project could read; the name suggests the share of the target that the region covers, and so it is here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ergo_server.imaging.geometry import Box, Size
from ergo_server.protocol.base import Question
from ergo_server.protocol.choices import choose

GAMMA = 0.6
"""Largest share of the image that a region may cover for `box_reward`: the paper's, from TreeVGR, VisCoT, V* and VGR."""

ALPHA, BETA = 1.0, 0.5
"""Weights of `region_reward` and `box_reward`: the best of the paper's four pairs."""

Matcher = Callable[[str, str], bool]
"""Says whether an answer (first) means the right one (second)."""

_NUMBER = re.compile(r"[-+]?(?:\d{1,12}(?:\.\d{0,12})?|\.\d{1,12})")


def exact(answer: str, truth: str) -> bool:
    """Match what is the same but for case, white space, and punctuation at its ends.

    >>> exact(" The  Cat. ", "the cat")
    True
    """
    return _plain(answer) == _plain(truth) != ""


def letter(question: Question) -> Matcher:
    """Return a matcher for a multiple-choice question: both mean the same choice, by its letter or its text.

    >>> letter(Question("?", ("red", "blue")))("(B)", "blue")
    True
    """

    def same_choice(answer: str, truth: str) -> bool:
        chosen = choose(answer, question)
        return chosen is not None and chosen == choose(truth, question)

    return same_choice


def numeric(tolerance: float = 0.0) -> Matcher:
    """Return a matcher for numbers: the only one in the answer is within ``tolerance`` of the right one, relative to that.

    >>> numeric(0.05)("about 104 km", "100")
    True
    """

    def near(answer: str, truth: str) -> bool:
        said, right = _NUMBER.findall(answer), _NUMBER.findall(truth)
        if len(said) != 1 or len(right) != 1:
            return False
        return abs(float(said[0]) - float(right[0])) <= tolerance * abs(float(right[0]))

    return near


def accuracy_reward(answer: str, truth: str, match: Matcher = exact) -> float:
    """Return 1 where the answer is right."""
    return float(match(answer, truth))


def region_reward(answer_from_crop: str, truth: str, match: Matcher = exact) -> float:
    """Return 1 where an answer from the crop and the question alone is right."""
    return float(match(answer_from_crop, truth))


def box_reward(region: Box, image: Size, gamma: float = GAMMA) -> float:
    """Return 1 where the region covers at most ``gamma`` of the image."""
    return float(region.area_ratio(image) <= gamma)


def format_reward(zoom_reply: str, answer_reply: str) -> float:
    """Return 1 where both replies are of their tags, each once and in order, with nothing but white space around them.

    >>> format_reward("<think>left</think><zoom>[1, 2, 3, 4]</zoom>", "<think>red</think><answer>B</answer>")
    1.0
    """
    return float(_tagged("zoom", zoom_reply) and _tagged("answer", answer_reply))


def tce_reward(region: float, box: float, alpha: float = ALPHA, beta: float = BETA) -> float:
    """Return the paper's r_TCE."""
    return alpha * region + beta * box


def target_coverage(region: Box, target: Box) -> float:
    """Return the share of the target's area that the region covers, 0 to 1; see the head of this module."""
    width = min(region.x2, target.x2) - max(region.x1, target.x1)
    height = min(region.y2, target.y2) - max(region.y1, target.y1)
    return max(0, width) * max(0, height) / target.size.area


@dataclass(frozen=True, slots=True)
class Rewards:
    """All rewards of one question."""

    accuracy: float
    region: float
    box: float
    format: float
    alpha: float = ALPHA
    beta: float = BETA

    @property
    def total(self) -> float:
        """R = r_TCE + r_acc + r_format."""
        return tce_reward(self.region, self.box, self.alpha, self.beta) + self.accuracy + self.format


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'*`")


def _tagged(last: str, reply: str) -> bool:
    """Say whether a reply is ``<think>…</think><last>…</last>``."""
    tags = re.findall(r"</?(?:think|zoom|answer)>", reply)
    if tags != ["<think>", "</think>", f"<{last}>", f"</{last}>"]:
        return False
    return re.fullmatch(rf"\s*<think>.*</think>\s*<{last}>.*</{last}>\s*", reply, re.DOTALL) is not None
