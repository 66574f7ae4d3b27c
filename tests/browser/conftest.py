"""The browser, and the page opened in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect, sync_playwright
from visits import PATIENCE_MS, QUIET, Visits


# Of the module, not of the session: while it runs, Playwright has an event loop in this thread, and others could start none.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, without a window."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium; tests/browser/install.sh puts it on a Debian machine")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=list(QUIET))
        yield running
        running.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visits]:
    """Opens the page; in the end nobody complained: no error, no violation of the policy, no request to elsewhere."""
    visits = Visits(browser)
    yield visits
    visits.end()
