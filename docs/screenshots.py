"""Takes the pictures of the page. ``python docs/screenshots.py URL`` asks a running server, with the Chromium of this machine."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, ViewportSize, expect, sync_playwright

IMAGES = Path(__file__).parent / "images"
DESKTOP: ViewportSize = {"width": 1280, "height": 900}
PHONE: ViewportSize = {"width": 390, "height": 844}


def take(
    browser: Browser, url: str, name: str, size: ViewportSize, *samples: int, dark: bool = False, compare: bool = False
) -> None:
    """Ask about sample scenes in turn, and write what the page then looks like, from top to bottom."""
    context = browser.new_context(viewport=size, color_scheme="dark" if dark else "light", reduced_motion="reduce")
    page = context.new_page()
    page.goto(url)
    page.get_by_role("switch").set_checked(compare)
    for asked, sample in enumerate(samples, start=1):
        page.locator(".sample").nth(sample).click()
        expect(page.locator("#image")).to_be_visible()
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator("#entries li")).to_have_count(asked)
        expect(page.get_by_role("status")).to_contain_text("instead of")
    page.click("#replies summary" if compare else "#code summary")
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.mouse.move(0, 0)
    Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB").save(IMAGES / f"page-{name}.png", optimize=True)
    context.close()


def main() -> None:
    """Take all pictures."""
    url = sys.argv[1]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        take(browser, url, "desktop", DESKTOP, 3, 2, 1, 0)
        take(browser, url, "dark", DESKTOP, 0, 1, dark=True)
        take(browser, url, "compare", DESKTOP, 1, 3, compare=True)
        take(browser, url, "phone", PHONE, 0, 2)
        browser.close()


if __name__ == "__main__":
    main()
