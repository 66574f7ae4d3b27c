"""What a request may hold is set by the operator, in every form of the body, and the refusal names the limit."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from asking import chat, client, error, picture, says, vqa
from starlette.testclient import TestClient


def form(http: TestClient, **fields: Any) -> httpx2.Response:
    """Ask /v1/vqa with a form."""
    return http.post("/v1/vqa", data=fields, files={"image": picture()})


FIELDS = {
    "a question": {"question": "x" * 21},
    "its choices": {"question": "x?", "choices": ["y" * 10, "z" * 9]},
    "its instructions": {"question": "x?", "instructions": "y" * 19},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_text(fields: dict[str, Any]) -> None:
    """A question's text, choices and instructions count together, as a form and as JSON; one character less is answered."""
    for limit, status in ((21, 200), (20, 400)):
        http = client(max_text_chars=limit)
        for response in (form(http, **fields), vqa(http, **fields)):
            assert response.status_code == status
            if status == 400:
                assert error(response) == (400, "invalid_request", "question")
                assert "at most 20 characters" in response.json()["error"]["message"]


def test_text_of_a_conversation() -> None:
    """All messages count."""
    said = says("x" * 10), says("y" * 5, role="assistant")
    assert chat(client(max_text_chars=20), *said, says(picture(), "z" * 5)).status_code == 200
    assert error(chat(client(max_text_chars=20), *said, says(picture(), "z" * 6))) == (400, "invalid_request", "messages")


def test_images_of_a_conversation() -> None:
    """One image more than the limit is refused."""
    assert chat(client(max_images=2), says(picture(), picture(), "x?")).status_code == 200
    assert error(chat(client(max_images=2), says(*[picture()] * 3, "x?"))) == (400, "invalid_request", "messages")


def test_fields_of_a_form() -> None:
    """Fields are counted with the image, and each text has a length."""
    fields = {"question": "x?", "choices": ["a", "b"]}
    assert form(client(max_form_fields=4), **fields).status_code == 200
    assert error(form(client(max_form_fields=3), **fields)) == (400, "invalid_request", None)
    assert form(client(max_form_field_bytes=2), question="x?").status_code == 200
    assert error(form(client(max_form_field_bytes=1), question="x?")) == (400, "invalid_request", "question")
