"""``ergo-vqa``, as a shell runs it."""

from __future__ import annotations

import functools
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import support
from PIL import Image
from shell import run

from ergo_server.protocol.prompts import load_profile

_run = functools.partial(run, "")
"""None of these asks a server."""


def test_scene_writes_a_picture_and_says_what_is_in_it(tmp_path: Path) -> None:
    """``scene`` writes the picture of its seed, and prints question, answer and box as JSON."""
    out = tmp_path / "scene.png"
    done = _run("scene", "--seed", "1000000003", str(out))
    facts = json.loads(done.stdout)
    made = support.held_out(3)
    assert (facts["question"], facts["answer"], facts["box"]) == (made.question, made.answer, list(made.box))
    assert Image.open(out).tobytes() == made.image.tobytes()


def test_a_scene_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """An impossible path or ending gives status 1 and one line on standard error."""
    for out in (tmp_path / "no" / "scene.png", tmp_path / "scene.unknown"):
        done = _run("scene", str(out))
        assert done.returncode == 1
        assert done.stderr.startswith("ergo-vqa: ")
        assert done.stderr.count("\n") == 1


def test_prompts_are_imported_without_running_the_file(tmp_path: Path) -> None:
    """``prompts import`` turns string constants of a Python file into a usable prompts file, and runs none of it."""
    source, ran, made = tmp_path / "const.py", tmp_path / "ran", tmp_path / "prompts.toml"
    source.write_text(
        f'open({str(ran)!r}, "w")\nSYSTEM_PROMPT = ("look " "here")\nQUESTION_TEMPLATE1 = "{{Question}} where?"\n'
        'QUESTION_TEMPLATE2 = "{Question}\\nwhat?"\n'
    )
    done = _run("prompts", "import", str(source))
    made.write_text(done.stdout)
    prompts = load_profile(made).prompts
    assert (prompts.zoom_system, prompts.zoom_user) == ("look here", "{question} where?")
    assert prompts.answer_user == "{question}{choices}{instructions}\nwhat?"
    assert not ran.exists()


def test_prompts_that_are_not_there_are_named(tmp_path: Path) -> None:
    """A file without the constants gives status 1 and names them."""
    source = tmp_path / "const.py"
    source.write_text("OTHER = 'x'\n")
    done = _run("prompts", "import", str(source))
    assert done.returncode == 1
    assert "SYSTEM_PROMPT" in done.stderr


def test_serve_says_where_it_listens_and_ends_on_an_interrupt() -> None:
    """``serve`` prints its address and what to try, answers there, ends on Ctrl-C with status 0; its log has requests only."""
    command = [sys.executable, "-m", "ergo_server", "serve", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert address is not None
        support.wait_until(lambda: support.answers(f"{address[0]}/readyz"), "the server is ready")
        assert "ergo-vqa" in httpx2.get(address[0], trust_env=False).text
    finally:
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=60)
    assert (process.returncode, [json.loads(line)["route"] for line in complaints.splitlines()]) == (0, ["/"])


def test_a_wrong_setting_is_named() -> None:
    """A setting out of bounds gives status 1 and names the setting."""
    done = _run("serve", "--port", "70000")
    assert done.returncode == 1
    assert "port" in done.stderr
