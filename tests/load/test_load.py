"""Load tests, tested: their arithmetic, their honesty, and a short run of each scenario against the real gateway."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest
import support
from loadtests.arrivals import poisson
from loadtests.compare import after, interleaved, lanes, ratios, work
from loadtests.pictures import MEGAPIXELS, MIXES, draw, pool
from loadtests.questions import (
    LEFT,
    Line,
    Reply,
    Request,
    Sample,
    Server,
    Turn,
    about_image,
    about_upload,
    ask,
    chat,
    forget,
    upload,
)
from loadtests.report import COLUMNS, Run, Section, percentile, summarize, text, write
from loadtests.servers import NARROW
from loadtests.soak import Reading, findings, holes
from loadtests.verdicts import not_recovered, turned_away, unexpected
from support import ROOT

from ergo_server.protocol.base import Prompts

TURNS = [
    {"turn": "zoom", "prompt_tokens": 109, "completion_tokens": 20, "cached_tokens": 0, "image_tokens": 49},
    {"turn": "answer", "prompt_tokens": 180, "completion_tokens": 12, "cached_tokens": 129, "image_tokens": 89},
]
TOLD: dict[str, Any] = {
    "visual_tokens": {"total": 10, "baseline": 100},
    "timings": {"zoom_turn_ms": 1.0, "answer_turn_ms": 1.0},
    "turns": TURNS,
}
ANSWER = {"answer": "1", "usage": {"completion_tokens": 1, "turns": TURNS}, **TOLD}


def load(*words: str, status: int = 0) -> str:
    """Run the command in a process of its own, which Locust changes for good; returns what it printed."""
    command = [sys.executable, "-m", "loadtests.load", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def row(printed: str, name: str) -> dict[str, str]:
    """Return a row of a printed table by the names of its columns."""
    table = cells(printed, len(COLUMNS))
    (found,) = (row for row in table if row[0] == name)
    return dict(zip(table[0], found, strict=True))


def cells(printed: str, columns: int) -> list[list[str]]:
    """Return the rows of all tables of so many columns."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("|")]
    return [row for row in rows if len(row) == columns]


def sample(seconds: float, *, right: bool = True, status: int = 200, due: float = 0.0, kind: str = "question") -> Sample:
    """Return a question and what became of it."""
    reply = Reply(status, "" if status == 200 else "overloaded", "7" if right else "8", 91, 5041)
    return Sample(kind, due, due, due + seconds, reply, "7")


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
    """2K, 4K and 8K come as 70, 20 and 10 %; the wide mix goes from 1 to 50 megapixels, and has forms that are dear to decode."""
    assert {name: share for name, (_, share) in MIXES["2K 4K 8K"].items()} == {"2K": 70, "4K": 20, "8K": 10}
    sizes = sorted(width * height / 1e6 for width, height in MEGAPIXELS.values())
    assert (round(sizes[0]), round(sizes[-1])) == (1, 50)
    png = draw("12 MP PNG", 1, (64, 64))
    assert (png.data[1:4], png.content_type) == (b"PNG", "image/png")
    progressive = draw("24 MP progressive", 1, (64, 64))
    assert (progressive.data[:2], b"\xff\xc2" in progressive.data, progressive.content_type) == (b"\xff\xd8", True, "image/jpeg")


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


def test_what_is_no_answer_to_a_question_counts_for_nothing_in_means_of_tokens() -> None:
    """An upload is answered and timed, and has no visual tokens: the mean is that of the questions."""
    stored = Sample("upload", 0, 0, 3, Reply(201, text="img_1"), None)
    found = summarize([sample(1), stored], objective=2)
    assert (found.answered, found.right, found.goodput, found.visual_tokens) == (2, 1, 1.0, 91)
    assert found.percentiles[99] == 3


def test_the_gateways_processor_time_is_told_by_the_answer() -> None:
    """Half a second for two answers is 250 ms each; a server that does not say has none, nor has a part of a run."""
    answered = [sample(1), sample(1, kind="again"), sample(1, status=503)]
    told = text(Section("n", "About.", [Run("all", answered, 0.5), Run("other", answered[:1])]), 8)
    assert row(told, "all")["gateway CPU ms"] == "250.0"
    assert row(told, "all: again")["gateway CPU ms"] == row(told, "other")["gateway CPU ms"] == "–"


def test_only_a_refusal_that_says_when_to_come_back_is_none_of_a_servers_faults() -> None:
    """Questions must be answered, or refused with retry-after; nothing may end in a reset, a silence, 500, 502 or 504, unless
    the sender left."""

    def ended(status: int, code: str = "x", *, asked: bool = True, retry_after: float | None = None) -> Sample:
        return Sample("bomb", 0, 0, 1, Reply(status, code, retry_after=retry_after), "7" if asked else None)

    fine = [ended(200, ""), ended(429, retry_after=1), ended(503, retry_after=1), ended(422, asked=False)]
    fine += [ended(0, LEFT, asked=False), ended(503, asked=False, retry_after=2)]
    assert unexpected(fine) == []
    for status in (0, 500, 502, 504):
        assert unexpected([ended(status)]) == [f"{status} x after 1.0 s: a question"]
        assert unexpected([ended(status, asked=False)]) == [f"{status} x after 1.0 s: bomb"]
    assert unexpected([ended(422)]) == ["422 x after 1.0 s: a question"]
    assert unexpected([ended(200, "not_understood")]) == ["200 not_understood after 1.0 s: a question"]
    assert unexpected([ended(503)]) == ["503 x after 1.0 s, without retry-after: a question"]
    assert turned_away(fine[:3]) == ["429 x after 1.0 s: a good question", "503 x after 1.0 s: a good question"]


@pytest.mark.parametrize(
    ("before", "later", "recovered"), [(1, 2.0, True), (1, 2.1, False), (0.1, 0.6, True), (0.1, 0.7, False), (1, None, False)]
)
def test_a_spike_is_over_when_questions_take_what_they_took(before: float, later: float | None, recovered: bool) -> None:
    """Twice as long as before, or half a second more, is allowed; no answer at all afterwards is no recovery."""
    samples = [sample(before, kind="before"), sample(9, kind="spike")]
    samples += [] if later is None else [sample(later, kind="after")]
    assert (not_recovered(samples) == []) is recovered


def test_rounds_of_a_comparison_follow_each_other_without_a_pause() -> None:
    """What was due first in a round is moved to the end of the round before; durations and lateness stay."""
    first = [sample(2, due=1), sample(4, due=2)]
    second = [replace(sample(3, due=100), sent=101), sample(1, due=102)]
    moved = after(first, second)
    assert [(s.due, s.sent, s.ended) for s in moved] == [(6, 7, 9), (8, 8, 9)]
    assert [s.seconds for s in moved] == [s.seconds for s in second]
    assert after([], first)[0].due == 0


def test_ratios_are_those_of_the_figures() -> None:
    """p50, p95, answers a second and visual tokens by those of the first, goodput as a difference in points."""
    slow = [replace(s, reply=replace(s.reply, visual_tokens=910)) for s in (sample(3), sample(4, right=False, due=4))]
    lines = ratios([Run("a", [sample(1), sample(2, due=2)]), Run("b", slow), Run("c", [sample(1, status=503)])], 8)
    assert "ratio to a" in lines[0]
    assert lines[2] == "| b | 3.00 | 2.00 | 0.50 | 10.00 | -50 | 1 of 2 against 2 of 2 |"
    assert lines[3] == "| c | – | – | 0.00 | – | -100 | 0 of 1 against 2 of 2 |"


def test_the_work_of_a_question_is_the_mean_of_its_turns() -> None:
    """Of the answer turn's prompt only what the zoom turn and its reply have not brought is counted; each as an option."""

    def asked(*turns: Turn) -> Sample:
        return replace(sample(1), reply=Reply(200, turns=turns))

    zoomed = [
        asked(Turn("zoom", 100, 20, 40), Turn("answer", 200, 10, 90)),
        asked(Turn("zoom", 120, 30, 50), Turn("answer", 210, 20, 90)),
    ]
    options = "--overview 45 --zoom-text 65 --zoom-reply 25 --crop 45 --answer-text 25 --answer-reply 15"
    assert work(zoomed) == options
    assert work([asked(Turn("single", 1000, 7, 900))]) == "--baseline 900 --single-text 100 --single-reply 7"
    assert work([sample(1)]) is None


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


class Listening(ThreadingHTTPServer):
    """Takes twenty who come at once; of more than five, the default, the kernel turns some away."""

    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Be quiet: people who leave are a part of the load."""


@contextmanager
def small_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on loopback."""
    with Listening(("127.0.0.1", 0), handler) as server:
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

    def say(self, body: bytes, status: int = 200, **headers: str) -> None:
        """Send a body."""
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status: int, code: str, **headers: str) -> None:
        """Send an error in the server's form."""
        self.say(json.dumps({"error": {"code": code}}).encode(), status, **headers)

    def log_message(self, *_: object) -> None:
        """Be quiet."""


class Whole(Small):
    """Answers all that a soak asks, on connections that are kept, in each of the ways; keeps nothing."""

    protocol_version = "HTTP/1.1"
    served = 0
    """Requests on this connection."""

    def __getattr__(self, name: str) -> Any:
        """Take every method, of whatever name."""
        if name.startswith("do_"):
            return self.any
        raise AttributeError(name)

    def do_POST(self) -> None:
        """Answer."""
        self.any()

    def any(self) -> None:
        """Answer a request."""
        self.served += 1
        length = int(self.headers.get("content-length", 0))
        if length > 2**30:
            self.close_connection = True
            self.error(413, "request_too_large")
            return
        self.asked(self.rfile.read(length))

    def asked(self, body: bytes) -> None:
        """Answer a request whose body is read."""
        url = urlsplit(self.path)
        raw = self.headers.get("content-type", "").startswith("image/")
        said = json.loads(body or b"{}") if not raw else {name: values[0] for name, values in parse_qs(url.query).items()}
        self.heard(url.path, said)
        if url.path == "/metrics":
            self.say(self.exposition().encode())
        elif url.path == "/v1/images":
            self.say(json.dumps({"id": "img_1"}).encode(), 201)
        elif url.path == "/v1/images/img_1":
            self.say(json.dumps({"deleted": True}).encode())
        elif url.path == "/v1/vqa" and said.get("image", "img_1") == "img_1" and "question" in said:
            done = f"event: region\ndata: {{}}\n\nevent: done\ndata: {json.dumps(ANSWER)}\n\n"
            self.say(done.encode() if said.get("stream") else json.dumps(ANSWER).encode())
        elif url.path == "/v1/chat/completions" and said.get("model") in ("ergo", "ergo-single", "m"):
            self.say(completion(said).encode())
        else:
            self.error(404, "not_found")

    def heard(self, path: str, said: dict[str, Any]) -> None:
        """Take notice of a request."""

    def exposition(self) -> str:
        """Return the metrics."""
        return exposition()


def exposition(*more: str, memory: int = 2**27, files: int = 20) -> str:
    """Return metrics."""
    return "\n".join([f"process_resident_memory_bytes {memory}", f"process_open_fds {files}", *more, ""])


def completion(said: dict[str, Any]) -> str:
    """Return the answer to a chat, whole or as events."""
    usage = {"completion_tokens": 1}
    if said.get("stream"):
        pieces: list[dict[str, Any]] = [{"choices": [{"delta": {"content": letter}}], "usage": None} for letter in "1 "]
        chunks = [*pieces, {"choices": [{"delta": {}}], "ergo": TOLD}, {"choices": [], "usage": usage}]
        return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    return json.dumps({"choices": [{"message": {"content": "1"}}], "usage": usage, "ergo": TOLD})


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
    assert int(row(printed, "uploads: upload")["answered"]) > 0
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


def test_what_an_image_costs_the_gateway_is_told_by_size(embedded: str, tmp_path: Path) -> None:
    """Each size, and each form that is dear to decode, has a row with the processor time of an answer."""
    printed = load("sizes", "--url", embedded, "--seconds", "2", "--pictures", "2", "--report", str(tmp_path))
    for name in MEGAPIXELS:
        assert float(row(printed, name)["gateway CPU ms"]) > 0


def test_who_breaks_a_connection_of_a_hostile_caller_fails_the_run(tmp_path: Path) -> None:
    """Good questions are answered; a broken image makes the server drop the connection: status 1, and a sentence that says so."""

    class Drops(Small):
        def do_POST(self) -> None:
            if int(self.headers["content-length"]) < 10_000:  # shorter than any picture
                return
            super().do_POST()

    with small_server(Drops) as url:
        words = ("hostile", "--url", url, "--seconds", "2", "--pictures", "6", "--report", str(tmp_path))
        printed = load(*words, status=1)
    assert re.search(r"^FAILED: 0 RemoteDisconnected after .* s: broken image$", printed, re.MULTILINE)
    assert row(printed, "beside harm, good")["not answered"] == "–"


# --- spikes ---------------------------------------------------------------------------------------------------------------


class Crowded(Small):
    """Has room for four at a time."""

    places: ClassVar[threading.Semaphore]
    seconds: ClassVar[list[float]]
    """That a question takes; when the place is full, it may become another."""
    after_full: ClassVar[float] = 0.05
    refusal: ClassVar[dict[str, str]] = {"retry_after": "1"}

    def do_POST(self) -> None:
        """Answer if there is room."""
        self.rfile.read(int(self.headers["content-length"]))
        if not self.places.acquire(blocking=False):
            self.seconds[0] = self.after_full
            self.error(503, "overloaded", **self.refusal)
            return
        try:
            time.sleep(self.seconds[0])
        finally:
            self.places.release()
        self.say(json.dumps(ANSWER).encode())


def crowded(after_full: float = 0.05, **refusal: str) -> type[Crowded]:
    """Return a server with room for four.

    Args:
        after_full: seconds that a question takes once it was full.
        refusal: headers of a refusal.
    """
    names = {"places": threading.Semaphore(4), "seconds": [0.05], "after_full": after_full, "refusal": refusal}
    return type("CrowdedNow", (Crowded,), names)


@pytest.mark.parametrize(
    ("small", "complaint"),
    [
        (lambda: crowded(retry_after="1"), None),
        (crowded, "503 overloaded after .* s, without retry-after: a question"),
        (lambda: crowded(2.0, retry_after="1"), "not recovered: a question took .* s before the spike and .* s after it"),
        (lambda: Small, "the gateway with room for few has refused nobody: the run says nothing of refusals"),
    ],
)
def test_a_spike_must_be_refused_cleanly_and_be_over(small: Any, complaint: str | None, tmp_path: Path) -> None:
    """A server that refuses with retry-after and is then as before passes; one that names no time to come back, stays slow, or
    has refused nobody, does not."""
    with small_server(Small) as wide, small_server(small()) as narrow:
        words = ("spike", "--url", wide, "--narrow-url", narrow, "--seconds", "3", "--pictures", "20", "--report", str(tmp_path))
        printed = load(*words, status=int(complaint is not None))
    failed = re.findall("^FAILED: (.*)$", printed, re.MULTILINE)
    assert bool(failed) is (complaint is not None)
    assert all(re.fullmatch(complaint or "", line) for line in failed), failed


def test_the_real_gateway_refuses_a_spike_cleanly_and_recovers(embedded: str, tmp_path: Path) -> None:
    """With room for two at a time and a short queue it refuses some of twenty, says when to come back, and is then as before."""
    with support.gateway(prompts=None, **NARROW) as narrow:
        words = ("--narrow-url", narrow, "--seconds", "6", "--pictures", "40", "--report", str(tmp_path))
        printed = load("spike", "--url", embedded, *words)
    found = row(printed, "users 2, 20, 2, little room: spike")
    assert re.fullmatch(r"\d+ x 503 overloaded", found["not answered"])
    assert int(found["answered"]) > 0


# --- comparison -----------------------------------------------------------------------------------------------------------


def test_a_comparison_tells_what_each_system_takes(tmp_path: Path) -> None:
    """Against small servers: each system gets the same number of questions, the ratios are those of what the servers say, and the
    work of a question is that of the turns."""

    class Gateway(Whole):
        def asked(self, body: bytes) -> None:
            if self.path == "/v1/chat/completions" and json.loads(body)["model"] == "ergo-single":
                time.sleep(0.3)
                single = {
                    "turn": "single",
                    "prompt_tokens": 2750,
                    "completion_tokens": 9,
                    "cached_tokens": 0,
                    "image_tokens": 2700,
                }
                told = TOLD | {"visual_tokens": {"total": 100, "baseline": 100}, "turns": [single]}
                self.say(json.dumps(json.loads(completion({})) | {"ergo": told}).encode())
                return
            super().asked(body)

        def exposition(self) -> str:
            return exposition(f"process_cpu_seconds_total {time.monotonic()}")

    class Engine(Whole):
        def asked(self, body: bytes) -> None:
            if self.path == "/v1/models":
                self.say(json.dumps({"data": [{"id": "m"}]}).encode())
                return
            time.sleep(0.2)
            usage = {"completion_tokens": 3, "prompt_tokens_details": {"multimodal_tokens": {"image": 50}}}
            self.say(json.dumps({"choices": [{"message": {"content": "<answer>1</answer>"}}], "usage": usage}).encode())

    with small_server(Gateway) as url, small_server(Engine) as engine:
        words = ("--engine-url", engine, "--compare-rate", "4", "--seconds", "3", "--report", str(tmp_path))
        printed = load("compare", "--url", url, *words)
    for way in ("open, {}", "4 at a time, {}"):
        rows = [row(printed, way.format(name)) for name in ("ergo", "ergo-single, full", "bare engine, full")]
        assert len({found["sent"] for found in rows}) == len({found["answered"] for found in rows}) == 1
        assert [found["visual tokens"] for found in rows] == ["10", "100", "50"]
    assert [found["gateway CPU ms"] != "–" for found in rows] == [True, True, False]
    for name, tokens in (("ergo-single, full", "10.00"), ("bare engine, full", "5.00")):
        found_ratios = [line for line in cells(printed, 7) if line[0].endswith(name)]
        assert [line[4] for line in found_ratios] == [tokens, tokens]
        assert all(float(line[1]) > 1 for line in found_ratios)  # p50: both take longer, whatever the machine
    options = "--overview 49 --zoom-text 60 --zoom-reply 20 --crop 40 --answer-text 11 --answer-reply 12"
    assert f"docs/sizing.py: {options}\n" in printed
    assert "docs/sizing.py: --baseline 2700 --single-text 50 --single-reply 9\n" in printed


# --- on the wire ----------------------------------------------------------------------------------------------------------


def test_every_way_to_ask_is_understood(embedded: str) -> None:
    """The real gateway's answers, whole and as events, of both interfaces, of uploads and on kept connections, are read alike."""
    server, picture = Server(embedded), draw("1.3 MP", 77, (1120, 1120))
    kept = server.send(upload(picture))
    assert (kept.status, kept.code, kept.text[:4]) == (201, "", "img_")
    line = Line(server)
    replies = [
        server.send(about_image(picture, "")),
        server.send(about_image(picture, "", stream=True)),
        server.send(chat(picture, "ergo")),
        server.send(chat(picture, "ergo", stream=True)),
        server.send(about_upload(kept.text, picture.question, picture.answer, "")),
        server.send(about_image(picture, ""), line),
        server.send(about_image(picture, "", stream=True), line),
    ]
    line.close()
    assert len({reply.text for reply in replies}) == 1
    for reply in replies:
        assert (reply.status, reply.code) == (200, "")
        assert reply.visual_tokens == replies[0].visual_tokens > 0
        assert [turn.name for turn in reply.turns] == ["zoom", "answer"]
        assert sum(turn.completion for turn in reply.turns) == reply.completion_tokens > 0
    assert server.send(forget(kept.text)).status == 200
    assert server.send(forget(kept.text)).code == "image_not_found"
    assert server.cpu() > 0


def test_a_stream_that_breaks_off_is_no_answer() -> None:
    """Events without an end, or with an error among them, are not taken for the answer; nor is a closed connection, unless it was
    kept: that one is made anew."""
    said = [b"event: region\ndata: {}\n\n", b'event: error\ndata: {"error": {"code": "engine_failed"}}\n\n']
    said += [b'data: {"choices": []}\n\n', b'data: {"error": {"code": "engine_failed"}}\n\ndata: [DONE]\n\n']
    turns = iter(said)

    class Breaks(Whole):
        def asked(self, body: bytes) -> None:
            if self.path == "/v1/models":
                self.say(b"{}")
                self.connection.shutdown(socket.SHUT_RDWR)  # without a word
            elif self.path == "/gone":
                self.close_connection = True
            else:
                self.say(next(turns))

    with small_server(Breaks) as url:
        server = Server(url)
        asking = Request("/v1/vqa", b"{}", "question", "1", stream=True)
        assert [server.send(asking).code for _ in said] == ["not_understood", "engine_failed"] * 2
        line = Line(server)
        models = Request("/v1/models", b"", "stranger", method="GET")
        assert [server.send(models, line).status for _ in range(3)] == [200, 200, 200]
        assert server.send(replace(models, path="/gone"), line) == Reply(0, "RemoteDisconnected")
        assert server.send(replace(models, path="/gone"), line) == Reply(0, "RemoteDisconnected")
        line.close()


# --- soak -----------------------------------------------------------------------------------------------------------------


def readings(memory: float = 0, files: float = 0, series: float = 0, busy: float = 0) -> list[Reading]:
    """Return a hundred readings that rise by so many MiB, files and series each, and by files of requests under way but for every
    fifth."""
    opened = [20 + n * files + n * busy * (n % 5 > 0) for n in range(100)]
    return [Reading(n, (200 + n * memory) * 2**20, int(opened[n]), int(2000 + n * series)) for n in range(100)]


@pytest.mark.parametrize(
    ("grown", "leaking"),
    [
        ({}, set()),
        ({"memory": 0.1}, set()),  # noise of allocators
        ({"busy": 1}, set()),  # ever more requests under way, now and then none
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


SOAK = ("soak", "--seconds", "6", "--read-every", "0.2", "--pictures", "4")


def soak(handler: type[BaseHTTPRequestHandler], folder: Path, status: int) -> tuple[str, list[str]]:
    """Soak a small server; returns what was printed, and what failed."""
    with small_server(handler) as url:
        printed = load(*SOAK, "--url", url, "--key", "right", "--report", str(folder), status=status)
    return printed, re.findall("^FAILED: (.*)$", printed, re.MULTILINE)


def test_a_soak_passes_a_server_that_keeps_nothing(tmp_path: Path) -> None:
    """Each way to ask gets its answers, nothing grows, and the readings tell of the whole run."""
    printed, failed = soak(Whole, tmp_path, 0)
    assert failed == []
    for kind in ("question", "streamed", "chat", "chat, streamed", "upload", "of an upload", "delete", "on a kept connection"):
        found = row(printed, f"6 s: {kind}")
        assert int(found["sent"]) == int(found["answered"]) > 0


@pytest.mark.parametrize("kept", ["memory", "files", "series"])
def test_a_soak_fails_on_a_server_that_leaks(kept: str, tmp_path: Path) -> None:
    """A server that keeps a mebibyte, a file or a series of every question makes the command end with status 1, and say so."""
    names = {"memory": "memory, MiB", "files": "open files", "series": "series"}
    opened: list[int] = []
    count = [0]

    class Leaks(Whole):
        def heard(self, path: str, said: dict[str, Any]) -> None:
            if "question" in said:
                count[0] += 1
                if kept == "files":
                    opened.append(os.open(os.devnull, os.O_RDONLY))

        def exposition(self) -> str:
            if kept == "files":
                return exposition(files=len(os.listdir("/proc/self/fd")))
            if kept == "memory":
                return exposition(memory=2**27 + count[0] * 2**20)
            return exposition(*(f'questions_total{{number="{number}"}} 1' for number in range(count[0])))

    try:
        printed, failed = soak(Leaks, tmp_path, 1)
    finally:
        for number in opened:
            os.close(number)
    assert [re.fullmatch(rf"{names[kept]}: .*LEAK", line) is not None for line in failed] == [True]
    for other in names.keys() - {kept}:
        assert re.search(rf"^{names[other]}: .*flat$", printed, re.MULTILINE)


def test_a_soak_uses_ever_new_names(tmp_path: Path) -> None:
    """A server that has a series for every path, method, model, key or request id that it hears of is found out; and connections
    are kept, so that one that keeps them longer would be."""
    heard: dict[str, set[str]] = {name: set() for name in ("path", "method", "model", "key", "request id")}
    kept: set[int] = set()

    class Labels(Whole):
        def heard(self, path: str, said: dict[str, Any]) -> None:
            if path == "/metrics":
                return
            if self.served > 1:
                kept.add(id(self))
            given = (path, self.command, said.get("model"), self.headers.get("authorization"), self.headers.get("x-request-id"))
            for name, value in zip(heard, given, strict=True):
                heard[name] |= {value} if value else set()

        def exposition(self) -> str:
            return exposition(*(f'{name.replace(" ", "_")}_total{{of="{of}"}} 1' for name in heard for of in sorted(heard[name])))

    _, failed = soak(Labels, tmp_path, 1)
    assert [re.fullmatch("series: .*LEAK", line) is not None for line in failed] == [True]
    for name, values in heard.items():
        assert len(values) > 5, name
    assert {"POST", "DELETE"} < heard["method"]
    assert "Bearer right" in heard["key"]
    assert kept


@pytest.mark.parametrize(
    ("breaks", "complaint"),
    [
        ("garbage", r"\d+ of \d+ readings failed: KeyError"),
        ("torn", r"\d+ of \d+ readings failed: IncompleteRead"),
        ("silent", r"no reading from \d+ to \d+ s"),
    ],
)
def test_a_soak_without_readings_fails(breaks: str, complaint: str, tmp_path: Path) -> None:
    """A server whose metrics stop making sense, are torn off, or do not come any more, is not passed for what was read before."""
    read: list[float] = []
    over = threading.Event()

    class Breaks(Whole):
        def exposition(self) -> str:
            read.append(time.monotonic())
            if len(read) < (8 if breaks == "silent" else 20):
                return exposition()
            if breaks == "silent":
                over.wait(60)
            return "other 1\n"

        def say(self, body: bytes, status: int = 200, **headers: str) -> None:
            if breaks != "torn" or body != b"other 1\n":
                super().say(body, status, **headers)
                return
            self.close_connection = True
            self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")

    threading.Timer(12, over.set).start()
    try:
        with small_server(Breaks) as url:
            printed = load(*SOAK, "--url", url, "--report", str(tmp_path), status=1)
            over.set()
    finally:
        over.set()
    assert re.search(f"^FAILED: {complaint}", printed, re.MULTILINE), printed


def test_readings_must_cover_the_whole_run() -> None:
    """A tenth of the run without a reading is a hole, at the beginning and the end as well, unless that is three seconds; one
    failure in twenty is none."""
    steady = readings()
    assert holes(steady, ["OSError"] * 5, 100, 1) == []
    assert holes(steady, ["OSError", "KeyError"] * 3, 100, 1) == ["6 of 106 readings failed: KeyError, OSError"]
    assert holes(steady[:60] + steady[75:], [], 100, 1) == ["no reading from 59 to 75 s"]
    assert holes(steady[15:], [], 100, 1) == ["no reading from 0 to 15 s"]
    assert holes(steady[:85], [], 100, 1) == ["no reading from 84 to 100 s"]
    assert holes(steady[:85], [], 100, 4) == []  # few readings, and none of them is missing
    assert holes(steady[:7], [], 9.5, 0.2) == ["no reading from 6 to 10 s"]
    assert holes(steady[:7], [], 9, 0.2) == []


def test_a_soak_passes_the_real_server(tmp_path: Path) -> None:
    """The gateway in its own process keeps nothing in a few seconds of mixed load."""
    words = ("--embedded", "soak", "--seconds", "8", "--read-every", "0.1", "--pictures", "8", "--report", str(tmp_path))
    printed = load(*words)
    assert re.search(r"^open files: .*flat$", printed, re.MULTILINE)
    assert re.search("401 invalid_api_key", row(printed, "8 s: stranger")["not answered"])


# --- the page -------------------------------------------------------------------------------------------------------------


def test_the_pages_tables_are_what_the_command_prints() -> None:
    """Every table of runs on the page has the columns of the report, in their order."""
    heads = re.findall(r"^\| run \| .*$", (ROOT / "docs" / "load-tests.md").read_text(), re.MULTILINE)
    assert heads
    assert set(heads) == {"| " + " | ".join(COLUMNS) + " |"}
