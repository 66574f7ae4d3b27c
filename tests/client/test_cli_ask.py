"""``ergo-vqa ask`` and ``estimate``, as a shell runs them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import support
from asking import picture, scripted
from PIL import Image
from shell import on_a_terminal, run

SCENE = support.held_out(0)
PHOTO = support.encode(SCENE)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A scene as a file."""
    path = tmp_path / "scene.jpg"
    path.write_bytes(PHOTO)
    return path


def test_the_answer_goes_to_standard_output_and_the_rest_to_standard_error(embedded: str, photo: Path) -> None:
    """In a pipe there is the answer alone; where it was seen, what was saved and the time are told beside it, without colour."""
    done = run(embedded, "ask", str(photo), SCENE.question)
    assert (done.returncode, done.stdout) == (0, f"{SCENE.answer}\n")
    names = [line.split()[0] for line in done.stderr.splitlines()]
    assert names == ["region", "seen", "time"]
    assert f"{SCENE.image.width} × {SCENE.image.height}" in done.stderr
    assert "% saved" in done.stderr
    assert "\x1b" not in done.stderr


def opened(path: Path) -> Image.Image:
    """Return the picture in a file."""
    with Image.open(path) as image:
        return image.convert("RGB")


def test_an_image_from_standard_input(embedded: str, tmp_path: Path) -> None:
    """``-`` is an image from a pipe, which can be drawn on, too; --quiet prints nothing but the answer."""
    drawn = tmp_path / "drawn.png"
    done = run(embedded, "ask", "-", SCENE.question, "--quiet", "--draw", str(drawn), given=PHOTO)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{SCENE.answer}\n", "")
    assert opened(drawn).size == SCENE.image.size


def test_json_is_the_whole_response(embedded: str, photo: Path) -> None:
    """--json prints one object with the answer, the region and the request's id."""
    body = json.loads(run(embedded, "ask", str(photo), SCENE.question, "--json").stdout)
    assert body["answer"] == SCENE.answer
    assert body["regions"][0]["outcome"] == "zoomed"
    assert body["request_id"]


def test_the_crop_is_saved_and_the_region_drawn(embedded: str, photo: Path, tmp_path: Path) -> None:
    """--save-crop writes the pixels that the model saw, --draw the image with the edges of the region painted on it."""
    crop, drawn = tmp_path / "crop.png", tmp_path / "drawn.png"
    body = json.loads(
        run(embedded, "ask", str(photo), SCENE.question, "--json", "--save-crop", str(crop), "--draw", str(drawn)).stdout
    )
    (region,) = body["regions"]
    assert opened(crop).size == (region["crop"]["width"], region["crop"]["height"])
    assert region["crop"]["data"] is None
    x1, y1, x2, y2 = region["box"]
    before, after = Image.open(io.BytesIO(PHOTO)), opened(drawn)
    assert after.size == before.size
    middle = ((x1 + x2) // 2, (y1 + y2) // 2)
    assert after.getpixel(middle) == before.getpixel(middle)
    assert any(
        after.getpixel((x1 + step, (y1 + y2) // 2)) != before.getpixel((x1 + step, (y1 + y2) // 2)) for step in range(-9, 10)
    )


def test_options_reach_the_server(embedded: str, photo: Path) -> None:
    """Zoom, budget and choices are sent as given."""
    choices = [word for mark in SCENE.landmarks for word in ("--choice", mark.code)]
    done = run(embedded, "ask", str(photo), SCENE.question, "--json", "--zoom", "never", "--max-visual-tokens", "16", *choices)
    body = json.loads(done.stdout)
    assert (body["regions"][0]["outcome"], body["regions"][0]["reason"]) == ("skipped", "requested")
    assert body["visual_tokens"]["overview"] <= 16
    told = run(embedded, "ask", str(photo), SCENE.question, "--zoom", "never").stderr
    assert "no zoom (requested)" in told


FAILURES = {
    "no server": (["scene.jpg", "?", "--url", "http://127.0.0.1:9"], "127.0.0.1:9"),
    "no file": (["nowhere.jpg", "?"], "nowhere.jpg"),
    "no image": (["text.jpg", "?"], "request "),
    "no question": (["scene.jpg", " "], "question"),
    "no such model": (["scene.jpg", "?", "--model", "gpt-5"], "gpt-5"),
}


@pytest.mark.parametrize(("arguments", "says"), FAILURES.values(), ids=FAILURES)
def test_a_failure_is_one_line_and_status_1(embedded: str, photo: Path, arguments: list[str], says: str) -> None:
    """What went wrong is said on standard error in one line without a traceback, standard output stays empty."""
    (photo.parent / "text.jpg").write_text("hello")
    name, *rest = arguments
    done = run(embedded, "ask", str(photo.parent / name), *rest)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("ergo-vqa: ")
    assert says in done.stderr


@pytest.mark.parametrize("arguments", [[], ["ask"], ["ask", "x.jpg", "?", "--max-visual-tokens", "many"], ["batch", "x.jsonl"]])
def test_a_wrong_command_line_is_status_2(arguments: list[str]) -> None:
    """What the parser cannot read is status 2, with the usage."""
    done = run("http://127.0.0.1:9", *arguments)
    assert done.returncode == 2
    assert "usage: ergo-vqa" in done.stderr


@pytest.mark.parametrize("command", ["ask", "batch", "estimate"])
def test_help_tells_the_exit_statuses_and_where_the_server_is(command: str) -> None:
    """Each command's help names ERGO_URL, ERGO_API_KEY and its exit statuses."""
    text = " ".join(run("", command, "--help").stdout.split())
    assert all(word in text for word in ("ERGO_URL", "ERGO_API_KEY", "Exit status: 0"))


def test_an_estimate_is_a_line_an_image(embedded: str, photo: Path) -> None:
    """Each image has its size, the most a question can cost, and the baseline; one that fails is named, the others are told."""
    done = run(embedded, "estimate", str(photo), str(photo.parent / "nowhere.jpg"), str(photo))
    first, second = done.stdout.splitlines()
    assert first == second
    assert first.startswith(f"{photo}: {SCENE.image.width} × {SCENE.image.height}, at most 98 visual tokens instead of ")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    body = json.loads(run(embedded, "estimate", "--json", str(photo)).stdout)
    assert (body["source"], body["visual_tokens"]["total_max"]) == (str(photo), 98)


def test_a_key_is_sent(tmp_path: Path) -> None:
    """With ERGO_API_KEY the command may ask a server that wants keys; without it the complaint says so."""
    command = [sys.executable, "-m", "ergo_server", "keys", "new", "somebody"]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    image = tmp_path / "image.png"
    image.write_bytes(picture())
    with support.gateway(scripted(), api_keys=made.stdout, open_metrics=True) as url:
        refused = run(url, "ask", str(image), "?")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "key" in refused.stderr
        asked = [sys.executable, "-m", "ergo_server", "ask", str(image), "?", "--url", url]
        key = {"ERGO_API_KEY": made.stderr.split()[0]}
        assert subprocess.run(asked, env=os.environ | key, capture_output=True, text=True, check=True).stdout == "seven\n"


def test_colour_on_a_terminal_only(embedded: str, photo: Path) -> None:
    """On a terminal the answer stands out, unless NO_COLOR is set or the terminal is a dumb one."""
    assert on_a_terminal(embedded, "ask", str(photo), SCENE.question)[0] == f"\x1b[1m{SCENE.answer}\x1b[0m\r\n"
    for plain in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        out, err = on_a_terminal(embedded, "ask", str(photo), SCENE.question, **plain)
        assert out == f"{SCENE.answer}\r\n"
        assert "\x1b" not in err
