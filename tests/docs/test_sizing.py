"""The page about fleets says what the program reckons, and the program reckons what the formulas of the page say."""

from __future__ import annotations

import runpy
import sys
from typing import Any

import pytest
from support import ROOT

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


def test_the_tables_follow_what_was_measured(sizing: dict[str, Any]) -> None:
    """The cores come from the rows of docs/measurements.md: 45, 37 and 10.6 ms for a photograph of 12 megapixels today."""
    views, rest = sizing["measured"]()
    assert f"| 12 MP JPEG | {views['12 MP JPEG'][0]} + {views['12 MP JPEG'][1]} + {rest:.0f} ms |" in PAGE.read_text()


def test_rate_and_cost_are_the_pages_formulas(sizing: dict[str, Any]) -> None:
    """R = busy / (computed / prefill + written / decode), and 1,000 images take 1000 / R seconds of a GPU."""
    load = sizing["Load"](overview=100, crop=50, text=10, reply=20, baseline=1000, prefill=100, decode=10, price=36, busy=0.5)
    assert load.computed("zoom") == (100 + 10 + 50 + 10, 40)
    assert load.computed("apart") == (2 * 110 + 20 + 60, 40)
    assert load.computed("whole") == (1010, 20)
    assert load.rate("zoom") == pytest.approx(0.5 / (1.7 + 4))
    assert load.cost("zoom") == pytest.approx(10 / load.rate("zoom"))


def test_the_cache_is_reckoned_from_the_models_shape(sizing: dict[str, Any]) -> None:
    """A token of Qwen2.5-VL-7B takes 56 KiB of KV cache, as docs/docker.md says, too; a visual token 4,704 bytes of pixels."""
    assert sizing["KV_BYTES"] == 56 * 1024
    assert sizing["PIXEL_BYTES"] == 4704
    assert "56 KiB a token" in (ROOT / "docs" / "docker.md").read_text()
