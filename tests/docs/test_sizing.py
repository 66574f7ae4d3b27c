"""The page about fleets says what the program reckons, and the program reckons what the formulas of the page say."""

from __future__ import annotations

import re
import runpy
import sys
from typing import Any

import pytest
from support import ROOT

from ergo_server.protocol.base import Question
from ergo_server.protocol.prompts import builtin_profile, fill

PROGRAM = ROOT / "docs" / "sizing.py"
PAGE = ROOT / "docs" / "scaling.md"


@pytest.fixture(scope="module")
def sizing() -> dict[str, Any]:
    """The program's names."""
    name = "sizing"
    sys.modules.pop(name, None)
    return runpy.run_path(str(PROGRAM), run_name=name)


def test_the_tables_are_up_to_date(sizing: dict[str, Any]) -> None:
    """Running docs/sizing.py --write again would change nothing."""
    assert sizing["page"](PAGE.read_text()) == PAGE.read_text()
    assert len(sizing["TABLES"]) == PAGE.read_text().count("<!-- end -->")


def test_the_cores_follow_what_was_measured(sizing: dict[str, Any]) -> None:
    """The processor time of an answer is that of the runs on the page of the load tests; cores are rounded up."""
    spent = sizing["measured"]()
    assert len(spent) == len(sizing["KINDS"])
    for run, ms in spent.items():
        row = re.search(rf"^\| {sizing['KINDS'][run]} \| (\d+) ms \| (\d+) \| (\d+) \|$", PAGE.read_text(), re.MULTILINE)
        assert row, run
        assert abs(int(row[1]) - ms) <= 0.5
        for cores, each in ((int(row[2]), 1), (int(row[3]), 0.65)):
            assert cores - 1 < 100 * ms / 1000 / each <= cores


def test_rate_and_cost_are_the_pages_formulas(sizing: dict[str, Any]) -> None:
    """R = busy / (computed / prefill + written / decode), and 1,000 images take 1000 / R seconds of a GPU."""
    words = {"zoom_text": 10, "answer_text": 7, "single_text": 5, "zoom_reply": 20, "answer_reply": 9, "single_reply": 8}
    load = sizing["Load"](overview=100, crop=50, baseline=1000, prefill=100, decode=10, price=36, busy=0.5, **words)
    assert load.computed("zoom") == (100 + 10 + 50 + 7, 29)
    assert load.computed("apart") == (2 * 110 + 20 + 57, 29)
    assert load.computed("whole") == (1005, 8)
    assert load.rate("zoom") == pytest.approx(0.5 / (1.67 + 2.9))
    assert load.cost("zoom") == pytest.approx(10 / load.rate("zoom"))
    assert load.longer.computed("apart") == (2 * 110 + 80 + 57, 116)


def test_the_figures_of_the_paper_are_its_own(sizing: dict[str, Any]) -> None:
    """1,025 visual tokens for both views at a budget of 640, 4,471 without zoom."""
    load = sizing["Load"]()
    assert (load.overview, load.overview + load.crop, load.baseline) == (640, 1025, 4471)


def test_words_were_counted_of_the_prompts_as_they_are(sizing: dict[str, Any]) -> None:
    """The counted tokens are those of the prompts as they are, 4.4 to 4.7 characters each; other prompts must be counted anew."""
    prompts, load = builtin_profile().prompts, sizing["Load"]()
    question = Question("What is the color of the woman's handbag?", ("red", "white", "blue", "black"))

    def turn(text: str) -> str:
        return f"<|im_start|>user\n<|vision_start|><|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"

    def begun(system: str) -> str:
        return f"<|im_start|>system\n{system}<|im_end|>\n"

    counted = {
        begun(prompts.zoom_system) + turn(fill(prompts.zoom_user, question, choices=False)): load.zoom_text,
        "<|im_end|>\n" + turn(fill(prompts.answer_user, question, choices=True)): load.answer_text,
        begun(prompts.single_system) + turn(fill(prompts.single_user, question, choices=True)): load.single_text,
    }
    assert [len(text) for text in counted] == [768, 347, 322]
    for text, tokens in counted.items():
        assert 4.4 < len(text) / tokens < 4.7


def test_the_weights_are_reckoned_from_the_models_shape(sizing: dict[str, Any]) -> None:
    """Qwen2.5-VL-7B has 8,292,166,656 parameters, 16.6 GB in bfloat16; its language model is that of Qwen2.5-7B."""
    assert sizing["parameters"]() == 8_292_166_656
    assert f"{sizing['parameters']():,}" in PAGE.read_text()
    assert f"{2 * sizing['parameters']() / 1e9:.1f} GB = {2 * sizing['parameters']() / 2**30:.1f} GiB" in PAGE.read_text()


def test_the_cache_is_reckoned_from_the_models_shape(sizing: dict[str, Any]) -> None:
    """A token of Qwen2.5-VL-7B takes 56 KiB of KV cache, as docs/docker.md says, too; a visual token 4,704 bytes of pixels."""
    assert sizing["KV_BYTES"] == 56 * 1024
    assert sizing["PIXEL_BYTES"] == 4704
    assert "56 KiB a token" in (ROOT / "docs" / "docker.md").read_text()
