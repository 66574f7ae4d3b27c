"""ergo_client against the real gateway."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import support

from ergo_client import Client, RequestFailed

SCENE = support.held_out(0)
PHOTO = support.encode(SCENE)


@pytest.fixture
def client(real: str) -> Iterator[Client]:
    """A client of the real gateway."""
    with Client(real) as connected:
        yield connected


def test_the_client_reads_the_code(client: Client) -> None:
    """A user of the Python client is told a code that only zooming can read."""
    assert client.ask(PHOTO, SCENE.question).text == SCENE.answer


def test_an_answer_says_how_it_was_found(client: Client) -> None:
    """The answer carries the region in pixels of the image, what was spent on seeing, and the whole response."""
    answer = client.ask(PHOTO, SCENE.question)
    x1, y1, x2, y2 = answer.box
    assert 0 <= x1 < x2 <= SCENE.image.width
    assert 0 <= y1 < y2 <= SCENE.image.height
    assert answer.outcome in ("zoomed", "clamped")
    assert answer.visual_tokens.total == answer.visual_tokens.overview + answer.visual_tokens.crop
    assert answer.visual_tokens.saved_ratio > 0.9
    assert answer.raw["answer"] == answer.text


@pytest.mark.parametrize("kind", [str, Path, bytes])
def test_an_image_is_a_path_or_bytes(client: Client, tmp_path: Path, kind: type) -> None:
    """A path, as text or as Path, and the bytes of the file are the same image."""
    path = tmp_path / "scene.jpg"
    path.write_bytes(PHOTO)
    image = PHOTO if kind is bytes else kind(path)
    assert client.ask(image, SCENE.question).text == client.ask(PHOTO, SCENE.question).text


def test_choices_come_back_as_an_index(client: Client) -> None:
    """With choices, the index points at the choice that was meant, or at none."""
    answer = client.ask(PHOTO, SCENE.question, choices=[mark.code for mark in SCENE.landmarks])
    assert answer.choice is None or 0 <= answer.choice < len(SCENE.landmarks)
    assert answer.raw["choice"] == answer.choice


def test_options_reach_the_server(client: Client) -> None:
    """Model, budget and extras are sent as given."""
    answer = client.ask(PHOTO, SCENE.question, model="ergo-single", max_visual_tokens=16, include=["replies", "reasoning"])
    assert answer.outcome == "skipped"
    assert answer.visual_tokens.overview <= 16
    assert len(answer.raw["replies"]) == 1
    assert "reasoning" in answer.raw


@pytest.mark.parametrize(
    ("image", "question", "model", "status", "code"),
    [
        (b"hello", "?", "ergo", 422, "image_unreadable"),
        (PHOTO, " ", "ergo", 400, "invalid_request"),
        (PHOTO, "?", "gpt-5", 404, "model_not_found"),
    ],
)
def test_a_refusal(client: Client, image: bytes, question: str, model: str, status: int, code: str) -> None:
    """A refusal is raised with its status, code, message and the request's id."""
    with pytest.raises(RequestFailed, match=r"\w+ \w+") as caught:
        client.ask(image, question, model=model)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert caught.value.request_id


def test_a_server_that_is_not_there() -> None:
    """Where nothing listens, the failure has status 0."""
    with Client(f"http://127.0.0.1:{support.free_port()}") as client, pytest.raises(RequestFailed) as caught:
        client.ask(PHOTO, "?")
    assert (caught.value.status, caught.value.code) == (0, "")


def test_a_server_of_another_kind(real: str) -> None:
    """An answer that is none of this server's is a failure with its status, not a crash."""
    with Client(f"{real}/docs") as client, pytest.raises(RequestFailed) as caught:
        client.ask(PHOTO, "?")
    assert caught.value.status == 404


def test_a_missing_file(client: Client) -> None:
    """A path that cannot be read is the caller's OSError, and nothing is sent."""
    with pytest.raises(FileNotFoundError):
        client.ask("/nowhere/scene.jpg", "?")


def test_an_answer_is_frozen(client: Client) -> None:
    """An answer cannot be changed by accident, and its repr stays short."""
    answer = client.ask(PHOTO, SCENE.question)
    assert dataclasses.is_dataclass(answer)
    assert "timings" not in repr(answer)
    with pytest.raises(dataclasses.FrozenInstanceError):
        answer.text = "x"  # type: ignore[misc]
