"""Visits of the page in a real browser, in which nothing may go wrong unnoticed."""

from __future__ import annotations

import re
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Page

QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
)
"""Without a sandbox, because tests run as root in containers; and the browser asks nobody for anything."""

PATIENCE_MS = 60_000
"""Longest wait for something to show; what takes a second here may take many on a busy machine."""


class Visits:
    """Opens the page, each time in a browser profile of its own, and watches it.

    Args:
        browser: what it is opened in.
    """

    def __init__(self, browser: Browser) -> None:
        self.expected: list[str] = []
        """Patterns of what the console may complain of: the browser itself logs every response that is an error."""
        self._browser = browser
        self._contexts: list[BrowserContext] = []
        self._complaints: list[str] = []

    def __call__(self, url: str, *, before: str = "", **options: Any) -> Page:
        """Open the page of a server.

        Args:
            url: the server's.
            before: a script that runs before those of the page.
            options: of the browser's context: size of the window, colour scheme, …
        """
        context = self._browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(PATIENCE_MS)
        self._contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: self._complain(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self._complain(f"uncaught: {error}"))
        page.on("request", lambda request: self._ours(request.url, url))
        if before:
            page.add_init_script(before)
        page.goto(url)
        return page

    def end(self) -> None:
        """Close everything; fails where the page complained of something, or asked another server than its own."""
        for context in self._contexts:
            context.close()
        assert self._complaints == []

    def _complain(self, text: str) -> None:
        if not any(re.search(pattern, text) for pattern in self.expected):
            self._complaints.append(text)

    def _ours(self, asked: str, url: str) -> None:
        if not asked.startswith((f"{url}/", "blob:", "data:")):
            self._complaints.append(f"asked {asked}")
