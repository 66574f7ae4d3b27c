"""``ergo-vqa batch``, as a shell runs it: every kind of input, and nothing lost or done twice when it is killed."""

from __future__ import annotations

import collections
import csv
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
from asking import ANSWER, ZOOM, picture, texts
from shell import on_a_terminal, run

from ergo_client.cli.batch import MOST_WAITING
from ergo_server.engine.base import Sampling
from ergo_server.engine.scripted import ScriptedEngine
from ergo_server.errors import ContextTooLong, EngineError
from ergo_server.protocol.conversation import Conversation

SCENES = [support.held_out(number) for number in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three scenes."""
    made = tmp_path_factory.mktemp("scenes")
    for number, scene in enumerate(SCENES):
        (made / f"scene{number}.jpg").write_bytes(support.encode(scene))
    return made


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of an output."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[Any]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [{"image": f"scene{n}.jpg", "question": scene.question, "label": scene.answer} for n, scene in enumerate(SCENES)]


def as_jsonl(folder: Path) -> Path:
    """The rows as JSON lines."""
    return write(folder / "in.jsonl", ROWS)


def as_csv(folder: Path) -> Path:
    """The rows as a spreadsheet writes them."""
    path = folder / "in.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def as_parquet(folder: Path) -> Path:
    """The rows as a data set, with the images inside."""
    import pyarrow
    from pyarrow import parquet

    path = folder / "in.parquet"
    rows = [{**row, "image": {"bytes": (folder / row["image"]).read_bytes(), "path": None}} for row in ROWS]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("made", [as_jsonl, as_csv, as_parquet])
def test_each_kind_of_input_is_answered_in_its_order(
    embedded: str, folder: Path, made: Callable[[Path], Path], tmp_path: Path
) -> None:
    """JSON lines, CSV and Parquet with images in it give one line a row, with the answer and the row's own columns."""
    out = tmp_path / "out.jsonl"
    done = run(embedded, "batch", str(made(folder)), str(out))
    assert (done.returncode, done.stdout) == (0, "")
    found = lines(out)
    assert [line["row"] for line in found] == [0, 1, 2]
    assert [line["answer"] for line in found] == [line["input"]["label"] for line in found] == [scene.answer for scene in SCENES]
    assert all(line["error"] is None and line["request_id"] and line["visual_tokens"]["saved_ratio"] > 0.9 for line in found)
    assert done.stderr.startswith("3/3  ")
    assert "% saved" in done.stderr


def test_a_folder_with_one_question(embedded: str, folder: Path, tmp_path: Path) -> None:
    """All images below a folder are asked the same question; other files are left alone."""
    out = tmp_path / "out.jsonl"
    (folder / "notes.txt").write_text("x")
    assert run(embedded, "batch", str(folder), str(out), "--question", SCENES[0].question).returncode == 0
    assert [line["input"] for line in lines(out)] == [{"image": f"scene{n}.jpg"} for n in range(3)]
    assert lines(out)[0]["answer"] == SCENES[0].answer
    assert run(embedded, "batch", str(folder), str(tmp_path / "x.jsonl")).returncode == 1


def test_rows_from_a_pipe(embedded: str, folder: Path, tmp_path: Path) -> None:
    """``-`` reads JSON lines from standard input."""
    out = tmp_path / "out.jsonl"
    rows = "".join(json.dumps({**row, "image": str(folder / row["image"])}) + "\n" for row in ROWS)
    assert run(embedded, "batch", "-", str(out), given=rows.encode()).returncode == 0
    assert [line["answer"] for line in lines(out)] == [scene.answer for scene in SCENES]


BAD = [
    {"question": "?"},
    {"image": "scene0.jpg"},
    {"image": "nowhere.jpg", "question": "?"},
    {"image": "notes.txt", "question": "?"},
    {"image": "scene0.jpg", "question": "?", "max_visual_tokens": 10_000},
    {"image": "scene0.jpg", "question": "?", "choices": [1]},
    "no object",
]


def test_errors_stand_in_their_rows(embedded: str, folder: Path, tmp_path: Path) -> None:
    """A row that cannot be read, sent or answered holds an error with a code, the others their answers; the status is 3."""
    (folder / "notes.txt").write_text("x")
    source, out = folder / "bad.jsonl", tmp_path / "out.jsonl"
    write(source, [ROWS[0], *BAD, ROWS[1]])
    with source.open("a") as file:
        file.write("{broken\n")
    done = run(embedded, "batch", str(source), str(out))
    assert done.returncode == 3
    assert "8 failed" in done.stderr
    found = lines(out)
    assert [line["row"] for line in found] == list(range(10))
    assert [line.get("answer") for line in found if line["error"] is None] == [SCENES[0].answer, SCENES[1].answer]
    codes = [line["error"]["code"] for line in found if line["error"]]
    assert codes == [*["row_unreadable"] * 2, *["image_unreadable"] * 2, "invalid_request", *["row_unreadable"] * 3]
    assert all(line["error"]["message"] for line in found if line["error"])
    assert "nowhere.jpg" in found[3]["error"]["message"]


class Asked:
    """An engine that notes which rows it was asked about, and can be made to fail some.

    Args:
        seconds_per_token: how slow it is.
    """

    def __init__(self, seconds_per_token: float = 0) -> None:
        self.rows: collections.Counter[int] = collections.Counter()
        self.broken: set[int] = set()
        self.engine = ScriptedEngine(self._reply, seconds_per_token)

    def _reply(self, conversation: Conversation, sampling: Sampling) -> str | EngineError:
        if "</zoom>" in sampling.stop:
            return ZOOM
        number = int(re.findall(r"row (\d+)", texts(conversation))[-1])
        self.rows[number] += 1
        return ContextTooLong("broken") if number in self.broken else ANSWER


def numbered(path: Path, count: int) -> Path:
    """Write rows that ask the same picture for their number."""
    (path.parent / "image.png").write_bytes(picture(300, 200))
    return write(path, [{"image": "image.png", "question": f"row {number}?"} for number in range(count)])


def started(url: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a batch that Ctrl-C ends, also where these tests run in the background of a shell, which has it ignored."""
    command = [sys.executable, "-c", _INTERRUPTIBLE, "batch", *arguments]
    return subprocess.Popen(command, env=os.environ | {"ERGO_URL": url}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


_INTERRUPTIBLE = """
import signal, sys
from ergo_server.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""


def test_killed_again_and_again_nothing_is_lost_or_written_twice(tmp_path: Path) -> None:
    """Killed in the middle three times, with a line half written, the same command ends with every row once, in order; only what
    was under way at a kill was asked a second time."""
    count, at_once, kills = 120, 4, 3
    source, out, asked = numbered(tmp_path / "in.jsonl", count), tmp_path / "out.jsonl", Asked(0.02)
    with support.gateway(asked.engine) as url:
        for kill in range(1, kills + 1):
            batch = started(url, str(source), str(out), "--concurrency", str(at_once))
            enough = 20 * kill
            support.wait_until(
                lambda enough=enough: out.exists() and out.read_bytes().count(b"\n") >= enough, "some rows are answered"
            )
            batch.kill()
            batch.communicate()
            assert out.read_bytes().count(b"\n") < count
            with out.open("ab") as file:
                file.write(b'{"row": 7, "inp')
        asked.engine.seconds_per_token = 0
        done = run(url, "batch", str(source), str(out), "--concurrency", str(at_once))
    assert done.returncode == 0
    assert [line["row"] for line in lines(out)] == list(range(count))
    assert all(line["answer"] == "seven" for line in lines(out))
    assert set(asked.rows) == set(range(count))
    # A killed run had at most so many rows under way, and as many answered ones that waited for an earlier one.
    assert asked.rows.total() - count <= kills * 3 * at_once
    assert max(asked.rows.values()) <= 1 + kills


def test_an_interrupt_is_status_130_and_can_be_taken_up(tmp_path: Path) -> None:
    """Ctrl-C ends a batch with one line that says how to go on, and going on completes it."""
    source, out, asked = numbered(tmp_path / "in.jsonl", 60), tmp_path / "out.jsonl", Asked(0.1)
    with support.gateway(asked.engine) as url:
        batch = started(url, str(source), str(out))
        support.wait_until(lambda: out.exists() and out.read_bytes().count(b"\n") >= 5, "some rows are answered")
        batch.send_signal(signal.SIGINT)
        _, complaints = batch.communicate()
        assert (batch.returncode, b"Traceback" in complaints) == (130, False)
        assert b"goes on" in complaints
        asked.engine.seconds_per_token = 0
        assert run(url, "batch", str(source), str(out)).returncode == 0
    assert [line["row"] for line in lines(out)] == list(range(60))


def test_failed_rows_are_asked_again_when_that_is_wanted(tmp_path: Path) -> None:
    """A finished batch asks nothing more; with --retry-errors it asks the failed rows alone, and survives a kill then."""
    count = 30
    source, out, asked = numbered(tmp_path / "in.jsonl", count), tmp_path / "out.jsonl", Asked()
    asked.broken = {3, 4, 17, 29}
    with support.gateway(asked.engine) as url:
        assert run(url, "batch", str(source), str(out)).returncode == 3
        assert {line["row"] for line in lines(out) if line["error"]} == asked.broken
        before = asked.rows.copy()
        assert run(url, "batch", str(source), str(out)).returncode == 3
        assert asked.rows == before

        # As it is left by a kill during the retry: the output renamed, and its new form begun.
        previous = out.with_name("out.jsonl.previous")
        out.rename(previous)
        out.write_bytes(b"".join(previous.read_bytes().splitlines(keepends=True)[:3]))
        asked.broken = {17}
        assert run(url, "batch", str(source), str(out), "--retry-errors").returncode == 3
        assert asked.rows - before == collections.Counter({3: 1, 4: 1, 17: 1, 29: 1})
        assert not previous.exists()

        asked.broken = set()
        assert run(url, "batch", str(source), str(out), "--retry-errors").returncode == 0
        assert asked.rows[17] == 3
    assert [(line["row"], line["answer"]) for line in lines(out)] == [(number, "seven") for number in range(count)]


def test_many_known_rows_between_two_failed_ones(tmp_path: Path) -> None:
    """However many good rows lie between those that are asked again, all are copied in their places."""
    count = 2 * MOST_WAITING + 5
    source, out, asked = numbered(tmp_path / "in.jsonl", count), tmp_path / "out.jsonl", Asked()
    failed = {0, count - 1}
    write(out, [_line(row, {"image": "image.png", "question": f"row {row}?"}, row in failed) for row in range(count)])
    with support.gateway(asked.engine) as url:
        assert run(url, "batch", str(source), str(out), "--retry-errors").returncode == 0
    assert [line["row"] for line in lines(out)] == list(range(count))
    assert asked.rows == collections.Counter(failed)


def _line(row: int, given: dict[str, Any], failed: bool) -> dict[str, Any]:
    return {"row": row, "input": given, "error": {"code": "engine_failed", "message": "x"} if failed else None, "answer": "old"}


def test_a_server_that_is_not_there_stops_the_batch(tmp_path: Path) -> None:
    """Without a server no row is written as failed: the batch stops with status 1, and goes on when there is one."""
    source, out = numbered(tmp_path / "in.jsonl", 5), tmp_path / "out.jsonl"
    done = run("http://127.0.0.1:9", "batch", str(source), str(out), "--timeout", "1")
    assert (done.returncode, lines(out)) == (1, [])
    assert "row 0: " in done.stderr
    with support.gateway(Asked().engine) as url:
        assert run(url, "batch", str(source), str(out)).returncode == 0
    assert len(lines(out)) == 5


def test_outputs_that_are_not_to_be_touched(tmp_path: Path) -> None:
    """An output that answers another input, was written by something else, or is being written is refused and left as it is."""
    source, out = numbered(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    line = {"row": 0, "input": {"image": "image.png", "question": "row 0?"}, "error": None, "answer": "x"}
    for text in (json.dumps({**line, "input": {}}) + "\n", "my notes\n", json.dumps({**line, "row": 5}) + "\n", "[1]\n"):
        out.write_text(text)
        done = run("http://127.0.0.1:9", "batch", str(source), str(out))
        assert (done.returncode, out.read_text()) == (1, text)
        assert str(out) in done.stderr
    with out.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run("http://127.0.0.1:9", "batch", str(source), str(out))
        assert done.returncode == 1
        assert "another batch" in done.stderr


UNREADABLE: dict[str, bytes] = {
    "rows.txt": b"x",
    "rows.csv": b'image,question\n"\xff\xfe',
    "rows.jsonl": b"\xff\xfe\n",
    "rows.parquet": b"PAR1 and no more",
}


@pytest.mark.parametrize("name", [*UNREADABLE, "nowhere.jsonl", "empty"])
def test_an_input_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    """An unknown ending, a broken file, a missing one and an empty folder are status 1 and one line."""
    (tmp_path / "empty").mkdir()
    if name in UNREADABLE:
        (tmp_path / name).write_bytes(UNREADABLE[name])
    done = run("http://127.0.0.1:9", "batch", str(tmp_path / name), str(tmp_path / "out.jsonl"), "--question", "?")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "Traceback" not in done.stderr


def test_memory_does_not_grow_with_the_batch(tmp_path: Path) -> None:
    """Ten times as many rows, each with an image of a megabyte in it, take no more memory."""
    import pyarrow
    from pyarrow import parquet

    peaks, asked = [], Asked()
    image = picture(300, 200) + bytes(1_000_000)
    with support.gateway(asked.engine) as url:
        for count in (30, 300):
            source = tmp_path / f"{count}.parquet"
            table = pyarrow.table({"image": [image] * count, "question": [f"row {n}?" for n in range(count)]})
            parquet.write_table(table, source, row_group_size=10, use_dictionary=False, compression="none")
            batch = [sys.executable, "-c", _PEAK, "batch", str(source), str(tmp_path / f"{count}.jsonl"), "--url", url]
            done = subprocess.run(batch, capture_output=True, text=True, check=True)
            peaks.append(int(done.stdout))
    assert len(lines(tmp_path / "300.jsonl")) == 300
    assert peaks[1] - peaks[0] < 100_000_000


_PEAK = """
import pathlib, sys
from ergo_server.__main__ import main
assert main(sys.argv[1:]) == 0
(line,) = (l for l in pathlib.Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
print(int(line.split()[1]) * 1024)
"""


def test_progress_on_a_terminal_is_one_line_that_is_drawn_again(tmp_path: Path) -> None:
    """On a terminal a bar shows rows, rate, saving and the time left; --quiet shows nothing."""
    source, asked = numbered(tmp_path / "in.jsonl", 40), Asked(0.005)
    with support.gateway(asked.engine) as url:
        _, shown = on_a_terminal(url, "batch", str(source), str(tmp_path / "out.jsonl"), "--concurrency", "2")
        _, quiet = on_a_terminal(url, "batch", str(source), str(tmp_path / "quiet.jsonl"), "--quiet")
    states = shown.strip().split("\r")
    assert len(states) > 3
    assert shown.count("\n") == 1
    assert re.match(r"\[#+\.+\]  \d+/40  [\d.]+/s  [\d.]+ % \w+ of [\d,]+ visual tokens  \d+:\d\d left", states[len(states) // 2])
    assert states[-1].startswith("[" + "#" * 24 + "]  40/40  ")
    assert quiet == ""
