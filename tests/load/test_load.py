"""Load tests, tested: their arithmetic, their honesty, and a short run of each scenario against the real gateway."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import pytest
from loadtests.arrivals import poisson
from loadtests.compare import interleaved, lanes
from loadtests.pictures import MEGAPIXELS, MIXES, pool
from loadtests.questions import Reply, Request, Sample, Server, ask
from loadtests.report import Run, Section, percentile, summarize, text, write
from loadtests.soak import Reading, findings
from support import ROOT

from ergo_server.protocol.base import Prompts

ANSWER = {
    "answer": "1",
    "usage": {"completion_tokens": 1},
    "visual_tokens": {"total": 10, "baseline": 100},
    "timings": {"zoom_turn_ms": 1.0, "answer_turn_ms": 1.0},
}


def load(*words: str, status: int = 0) -> str:
    """Run the command in a process of its own, which Locust changes for good; returns what it printed."""
    command = [sys.executable, "-m", "loadtests.load", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def row(printed: str, name: str) -> dict[str, str]:
    """Return a row of a printed table by the names of its columns."""
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("|")]
    (found,) = (cells for cells in table if cells[0] == name)
    return dict(zip(table[0], found, strict=True))


def sample(seconds: float, *, right: bool = True, status: int = 200, due: float = 0.0) -> Sample:
    """Return a question and what became of it."""
    reply = Reply(status, "" if status == 200 else "overloaded", "7" if right else "8", 91, 5041)
    return Sample("question", due, due, due + seconds, reply, "7")


# --- arrivals and pictures ------------------------------------------------------------------------------------------------


def test_arrivals_are_a_poisson_process() -> None:
    """The gaps of a schedule have the exponential distribution of its rate (Kolmogorov, Smirnov); the seed decides them."""
    schedule = poisson(5, 2000, 3)
    gaps = sorted(after - before for before, after in pairwise((0.0, *schedule)))
    count = len(gaps)
    distance = max(abs((n + 0.5) / count - (1 - math.exp(-5 * gap))) for n, gap in enumerate(gaps)) + 0.5 / count
    assert distance < 1.63 / math.sqrt(count)  # what chance exceeds once in a hundred seeds; this seed stays the same
    assert statistics.stdev(gaps) == pytest.approx(1 / 5, rel=0.05)
    assert poisson(5, 2000, 3) == schedule
    assert poisson(5, 2000, 4) != schedule


def test_pictures_are_the_same_for_the_same_seed_and_all_different() -> None:
    """A pool is drawn alike again, shares no picture with one of another seed, and knows the answers to its questions."""
    first, again, other = pool("usual", 6, 1), pool("usual", 6, 1), pool("usual", 6, 2)
    assert [picture.data for picture in first] == [picture.data for picture in again]
    assert len({picture.data for picture in first + other}) == 12
    for picture in first:
        assert len(dict(picture.asked)) == len(picture.asked) == 6
        assert all(re.fullmatch(r"\d{3}", answer) for _, answer in picture.asked)


def test_mixes_keep_their_shares_and_sizes() -> None:
    """2K, 4K and 8K come as 70, 20 and 10 %; the wide mix goes from 1 to 50 megapixels."""
    assert {name: share for name, (_, share) in MIXES["2K 4K 8K"].items()} == {"2K": 70, "4K": 20, "8K": 10}
    sizes = sorted(width * height / 1e6 for width, height in MEGAPIXELS.values())
    assert (round(sizes[0]), round(sizes[-1])) == (1, 50)


def test_all_systems_of_a_comparison_get_the_same() -> None:
    """The bodies for the three differ in the model, the budget and the engine's own words; image and question are the same."""
    prompts = Prompts("", "", "", "", "{question}")
    server = Server("http://127.0.0.1:1")
    systems = lanes(server, server, "m", prompts)
    pictures = pool("full resolution", 2, 1)
    for number, picture in enumerate(pictures):
        bodies = [json.loads(lane.requests(pictures)[number].body) for lane in systems]
        said = [body["messages"][-1]["content"] for body in bodies]
        assert said[0] == said[1] == said[2]
        assert said[0][1]["text"] == picture.question
        assert len({(body["temperature"], body["max_tokens"]) for body in bodies}) == 1
    order = [lane.name for _, lane in interleaved(3, systems)]
    assert Counter(order[::3]) == Counter({lane.name: 1 for lane in systems})  # each is first once
    assert [number for number, _ in interleaved(3, systems)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


# --- arithmetic -----------------------------------------------------------------------------------------------------------


def test_goodput_is_the_share_of_right_answers_in_time() -> None:
    """Late, wrong and refused questions all count against it; percentiles are of answers, wrong ones included."""
    samples = [sample(1), sample(2), sample(3), sample(9), sample(1, right=False), sample(0.1, status=503)]
    found = summarize(samples, objective=2)
    assert found.goodput == pytest.approx(2 / 6)
    assert (found.sent, found.answered, found.right) == (6, 5, 4)
    assert (found.percentiles[50], found.percentiles[99]) == (2, 9)
    assert found.rate == pytest.approx(5 / 9)
    assert found.of_baseline == pytest.approx(91 / 5041)
    assert found.errors == {"503 overloaded": 1}


def test_percentiles_are_values_that_were_measured() -> None:
    """The nearest rank: at least so many percent do not exceed it, and it is one of the values."""
    assert [percentile(range(1, 101), p) for p in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert percentile([4], 99) == 4
    assert math.isnan(percentile([], 50))


def test_the_report_stands_alone(tmp_path: Path) -> None:
    """The HTML names no address outside itself and runs no script; what it shows of a run is escaped; there is a PNG."""
    section = Section("closed", "About <b>.", [Run("1 & 2", [sample(1)])], ["note <i>"], ["bad <u>"])
    whole = write(tmp_path, "Title", ["fact"], [section], 8).read_text()
    assert set(re.findall(r'(?:src|href)="(.{22})', whole)) == {"data:image/png;base64,"}
    assert not re.search(r"https?:|<script|@import|url\(", whole)
    assert not re.search("<[biu]>", whole)
    assert (tmp_path / "closed.png").read_bytes()[1:4] == b"PNG"
    assert row(text(section, 8), "1 & 2")["p50 s"] == "1.00"


# --- against servers ------------------------------------------------------------------------------------------------------


@contextmanager
def small_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on loopback."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class Small(BaseHTTPRequestHandler):
    """Answers every question with a one."""

    def do_POST(self) -> None:
        """Answer, unless the body is too large."""
        if (length := int(self.headers["content-length"])) > 2**30:
            self.send_error(413)
            return
        self.rfile.read(length)
        self.say(json.dumps(ANSWER).encode())

    def say(self, body: bytes) -> None:
        """Send a body."""
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Be quiet."""


def test_a_stall_shows_in_every_question_that_was_due(tmp_path: Path) -> None:
    """A server that answers one at a time and stalls once for two seconds gives many long latencies, not one: they count from
    when each question was due."""
    turn, first = threading.Lock(), []

    class Stalls(Small):
        def do_POST(self) -> None:
            with turn:
                first.append(time.monotonic())
                if len(first) == 8:  # after the warm-up
                    time.sleep(2)
                super().do_POST()

    with small_server(Stalls) as url:
        printed = load("poisson", "--url", url, "--rate", "10", "--seconds", "4", "--slo", "0.5", "--report", str(tmp_path))
    found = row(printed, "10 a second")
    assert int(found["sent"]) == int(found["answered"]) == len(poisson(10, 4, 1))
    # twenty of forty are due while it stalls; of these all but the last five wait for more than half a second
    assert float(found["p50 s"]) < 1.5 <= float(found["p95 s"])
    assert float(found["p90 s"]) > 0.5


def test_a_request_that_is_sent_late_counts_from_when_it_was_due() -> None:
    """Where the load itself is five seconds late, the latency has them, and the report says how late it was."""
    with small_server(Small) as url:
        now = time.perf_counter()
        found = ask(Server(url), Request("/v1/vqa", b"", "question", "1"), start=now - 10, due=now - 5)
    assert found.right
    assert found.due == pytest.approx(5)
    assert found.seconds >= found.late >= 5


def test_a_short_run_of_each_scenario_gives_right_answers(embedded: str, tmp_path: Path) -> None:
    """Against the real gateway every scenario ends well, its questions get right answers, and each is in the report."""
    scenarios = ("closed", "poisson", "mix", "repeat", "hostile", "spike")
    words = ("--seconds", "2", "--users", "1", "--rate", "2", "--pictures", "6")
    printed = load(*scenarios, "--url", embedded, *words, "--report", str(tmp_path))
    runs = ("1 at a time", "2 a second", "2K 4K 8K", "1 to 50 MP", "uploads", "alone", "beside harm, good", "users 2, 20, 2")
    right = answered = 0
    for name in runs:
        found = row(printed, name)
        assert int(found["sent"]) == int(found["answered"]) > 0, found
        right, answered = right + int(found["right"]), answered + int(found["answered"])
    assert right / answered > 0.7  # ergo-mini reads 19 of 20
    page = (tmp_path / "report.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == list(scenarios)
    assert {path.stem for path in tmp_path.glob("*.png")} == set(scenarios)
    for kind, expected in (("broken image", "422"), ("oversized body", "413"), ("leaver", "0 left"), ("slow sender", "0 left")):
        assert expected in row(printed, f"beside harm: {kind}")["not answered"]


def test_a_comparison_without_an_engine_is_refused(embedded: str, tmp_path: Path) -> None:
    """Nothing is compared with nothing: the command says what it needs."""
    command = [sys.executable, "-m", "loadtests.load", "compare", "--url", embedded, "--report", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "--engine-url" in done.stderr


# --- soak -----------------------------------------------------------------------------------------------------------------


def readings(memory: float = 0, files: float = 0, series: float = 0) -> list[Reading]:
    """Return a hundred readings that rise by so many MiB, files and series each."""
    return [Reading(n, (200 + n * memory) * 2**20, int(20 + n * files), int(2000 + n * series)) for n in range(100)]


@pytest.mark.parametrize(
    ("grown", "leaking"),
    [
        ({}, set()),
        ({"memory": 0.1}, set()),  # noise of allocators
        ({"memory": 1}, {"memory, MiB"}),
        ({"files": 0.1}, {"open files"}),
        ({"series": 0.05}, {"series"}),
    ],
)
def test_a_soak_tells_growth_from_noise(grown: dict[str, float], leaking: set[str]) -> None:
    """What rises from the first to the last third by more than is allowed is a leak."""
    assert {finding.what for finding in findings(readings(**grown)) if finding.leaks} == leaking


def test_growth_while_a_server_warms_up_is_no_leak() -> None:
    """The first fifth is left out; too few readings say nothing."""
    steady = readings()
    cold = [Reading(n, 0, 0, 0) for n in range(20)]
    assert not any(finding.leaks for finding in findings(cold + steady[:80]))
    with pytest.raises(ValueError, match="too few"):
        findings(steady[:14])


def test_a_soak_fails_on_a_server_that_leaks(tmp_path: Path) -> None:
    """A server that keeps a file and a series for every question makes the command end with status 1 and say which grew."""
    kept: list[int] = []

    class Leaks(Small):
        def do_POST(self) -> None:
            kept.append(os.open(os.devnull, os.O_RDONLY))
            super().do_POST()

        def do_GET(self) -> None:
            lines = [f"process_resident_memory_bytes {2**27}", f"process_open_fds {len(os.listdir('/proc/self/fd'))}"]
            lines += [f'questions_total{{number="{number}"}} 1' for number in kept]
            self.say("\n".join([*lines, ""]).encode())

    try:
        with small_server(Leaks) as url:
            words = ("soak", "--url", url, "--seconds", "5", "--read-every", "0.2", "--pictures", "4", "--report", str(tmp_path))
            printed = load(*words, status=1)
    finally:
        for number in kept:
            os.close(number)
    assert re.search(r"^FAILED: open files: .*LEAK$", printed, re.MULTILINE)
    assert re.search(r"^FAILED: series: .*LEAK$", printed, re.MULTILINE)
    assert re.search(r"^memory, MiB: .*flat$", printed, re.MULTILINE)


def test_a_soak_passes_the_real_server(tmp_path: Path) -> None:
    """The gateway in its own process keeps nothing in a few seconds of mixed load."""
    words = ("--embedded", "soak", "--seconds", "8", "--read-every", "0.3", "--pictures", "8", "--report", str(tmp_path))
    printed = load(*words)
    assert re.search(r"^open files: .*flat$", printed, re.MULTILINE)
