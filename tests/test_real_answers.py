"""What the server is for: right answers about details that only a zoom can read, for a fraction of the visual tokens."""

from __future__ import annotations

import base64
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import httpx2
import pytest
import support

from ergo_train.scenes import Scene

SCENES = range(500, 520)

Draw = Callable[[int], Scene]


@pytest.fixture(params=[support.held_out, support.held_out_hard], ids=["plain", "hard"])
def draw(request: pytest.FixtureRequest) -> Draw:
    """Draw scenes of one sort."""
    drawn: Draw = request.param
    return drawn


@cache
def answered(url: str, model: str, draw: Draw) -> list[dict[str, Any]]:
    """Ask the question of every scene through ``/v1/vqa``."""

    def ask(number: int) -> dict[str, Any]:
        made = draw(number)
        fields = {"question": made.question, "model": model, "image": {"data": base64.b64encode(support.encode(made)).decode()}}
        response = httpx2.post(f"{url}/v1/vqa", json=fields, timeout=support.START_SECONDS, trust_env=False)
        assert response.status_code == 200, response.text
        return dict(response.json())

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(ask, SCENES))


def right(answers: list[dict[str, Any]], draw: Draw) -> list[bool]:
    """Say of each scene whether its answer is right."""
    return [reply["answer"] == draw(number).answer for number, reply in zip(SCENES, answers, strict=True)]


def test_with_zoom_the_answers_are_right(real: str, draw: Draw) -> None:
    """Of twenty held-out scenes of each sort at least seventeen are answered right, on either engine."""
    assert sum(right(answered(real, "ergo", draw), draw)) >= 17


def test_without_zoom_the_answers_are_guessed(real: str, draw: Draw) -> None:
    """From the overview alone at most six are right: it is the zoom that reads, not the memory of the model."""
    assert sum(right(answered(real, "ergo-single", draw), draw)) <= 6


def test_the_region_covers_what_was_asked_for(real: str, draw: Draw) -> None:
    """At least seventeen regions hold all of what is to be read, and none of those is much of the image."""
    covered = 0
    for number, reply in zip(SCENES, answered(real, "ergo", draw), strict=True):
        x1, y1, x2, y2 = reply["regions"][0]["box"]
        left, top, right_, bottom = draw(number).box
        covered += x1 <= left and y1 <= top and right_ <= x2 and bottom <= y2 and reply["regions"][0]["area_ratio"] < 0.2
    assert covered >= 17


def test_the_visual_tokens_are_a_fraction_of_the_baseline(real: str) -> None:
    """Both views together cost at most 15 % of what the model would spend on the image, counted by the engine itself."""
    for reply in answered(real, "ergo", support.held_out):
        tokens = reply["visual_tokens"]
        assert tokens["source"] == "engine"
        assert tokens["overview"] + tokens["crop"] == tokens["total"] <= 0.15 * tokens["baseline"]
        assert [turn["turn"] for turn in reply["usage"]["turns"]] == ["zoom", "answer"]


def test_an_openai_client_gets_the_same_answer(real: str) -> None:
    """Both turns run behind ``/v1/chat/completions`` too, with the region and the answer that ``/v1/vqa`` gives."""
    for number, reply in list(zip(SCENES, answered(real, "ergo", support.held_out), strict=True))[:3]:
        made = support.held_out(number)
        image = "data:image/jpeg;base64," + base64.b64encode(support.encode(made)).decode()
        parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": made.question}]
        body = {"model": "ergo", "messages": [{"role": "user", "content": parts}], "max_tokens": 16, "temperature": 0}
        chat = httpx2.post(f"{real}/v1/chat/completions", json=body, timeout=support.START_SECONDS, trust_env=False).json()
        assert chat["choices"][0]["message"]["content"] == reply["answer"]
        assert chat["ergo"]["regions"] == reply["regions"]
        assert [turn["turn"] for turn in chat["ergo"]["turns"]] == ["zoom", "answer"]
