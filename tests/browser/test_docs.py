"""Swagger UI at ``/docs``, in a real browser: under its policy, and without the internet."""

from __future__ import annotations

import support
from asking import scripted
from playwright.sync_api import expect
from visits import Visits


def test_the_interface_can_be_read_and_tried(visit: Visits) -> None:
    """Every operation is listed, and a question can be asked from there as it stands; nothing is loaded from elsewhere."""
    with support.gateway(scripted()) as url:
        page = visit(url)
        page.goto(f"{url}/docs")
        expect(page.locator(".opblock")).to_have_count(12)
        asking = page.locator("#operations-questions-ask")
        asking.locator(".opblock-summary-control").click()
        asking.get_by_role("button", name="Try it out").click()
        asking.get_by_role("button", name="Execute").click()
        expect(asking.locator(".live-responses-table").first).to_contain_text('"answer": "seven"')
