"""References that are made from the code say what the code says."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

PAGES = [ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)


def test_the_reference_of_the_client_is_up_to_date() -> None:
    """Running docs/python_client.py again would change nothing."""
    assert (ROOT / "docs" / "python-client.md").read_text() == runpy.run_path(str(ROOT / "docs" / "python_client.py"))["page"]()


def links(page: Path) -> Iterator[str]:
    """Yield where a page points to within the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_to_is_there(page: Path) -> None:
    """Links and pictures within the repository lead to files, and to headings, that exist."""
    for target in links(page):
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target
