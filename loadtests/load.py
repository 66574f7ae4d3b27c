"""Load tests of a running server, or of real vLLM with a gateway in front of it, started for the purpose.

    python -m loadtests.load closed --users 1 --users 4 --seconds 60
    python -m loadtests.load poisson --rate 2 --seconds 300 --url http://127.0.0.1:8000
    python -m loadtests.load compare

Run it in the repository. docs/load-tests.md says what each scenario is for and how to read the report.
"""

from __future__ import annotations

import locust  # isort: split

# Locust replaces sockets, threads and sleep by gevent's, and must do so before anybody has taken the old ones.

import argparse
import contextlib
import json
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import gevent
import support

from ergo_server.protocol.prompts import builtin_profile, load_profile
from loadtests import ROOT, report, scenarios, servers, soak
from loadtests.arrivals import poisson
from loadtests.compare import interleaved, lanes, ratios
from loadtests.pictures import QUESTIONS_EACH, Picture, pool
from loadtests.questions import Sample, Server
from loadtests.report import Run, Section

OBJECTIVE = 8.0
"""Seconds; that of the alerts in observability/prometheus."""

WARM_UP = 4
"""Questions before the first run: what a server loads when first asked is not what is measured."""

ROUNDS = 3
"""Of a comparison: as many as there are systems, so that each is first once."""

CROWD = 4
"""Users at a time of a comparison's closed loop: four images at full resolution fill the cache that vLLM is started with here."""

ENOUGH = 12.0
"""Questions a second that no server of this size answers: so many pictures are drawn for a closed loop, unless told otherwise."""


class Bench:
    """What all scenarios need.

    Args:
        options: of the command line.
        url: the gateway's.
        engine: the bare engine's, if there is one to compare with.
        prompts: the gateway's prompts file; None: those of ERGO-7B.
    """

    def __init__(self, options: argparse.Namespace, url: str, engine: str | None, prompts: Path | None) -> None:
        self.options = options
        self.server = Server(url, options.key)
        self.engine = Server(engine, options.engine_key) if engine else None
        self.profile = load_profile(prompts) if prompts else builtin_profile()
        self._pools = options.seed

    def pictures(self, mix: str, count: int) -> list[Picture]:
        """Draw pictures that no scenario before has used."""
        self._pools += 1
        return pool(mix, count, self._pools)

    def enough(self, seconds: float, mix: str = "usual") -> list[Picture]:
        """Draw pictures for a closed loop of so many seconds."""
        return self.pictures(mix, self.options.pictures or round(ENOUGH * seconds))

    def warm_up(self) -> None:
        """Ask a few questions that count for nothing.

        Raises:
            SystemExit: the server does not answer.
        """
        for request in scenarios.asked(self.pictures("usual", WARM_UP)):
            reply = self.server.send(request)
            if reply.status != 200:
                raise SystemExit(f"the server does not answer: {reply.status} {reply.code}")


# --- scenarios ------------------------------------------------------------------------------------------------------------


def closed(bench: Bench) -> Section:
    """Users who each wait for the answer before they ask again: what one alone waits, and what more of them gain."""
    runs = []
    for users in bench.options.users or [1, 4]:
        requests = scenarios.asked(bench.enough(bench.options.seconds))
        runs.append(scenarios.closed(f"{users} at a time", bench.server, requests, users, bench.options.seconds))
    return section("closed", closed, runs)


def open_loop(bench: Bench) -> Section:
    """Poisson arrivals of strangers who do not wait for each other; seconds count from when each was due."""
    schedule = poisson(bench.options.rate, bench.options.seconds, bench.options.seed)
    requests = scenarios.asked(bench.pictures("usual", len(schedule)))
    run = scenarios.open_loop(f"{bench.options.rate:g} a second", bench.server, requests, schedule)
    late = max((sample.late for sample in run.samples), default=0.0)
    return section("poisson", open_loop, [run], notes=[f"The load itself was late by at most {1000 * late:.0f} ms."])


def mix(bench: Bench) -> Section:
    """Images of several sizes, two users at a time: first 2K, 4K and 8K as 70, 20 and 10 %, then 1 to 50 megapixels alike."""
    runs = []
    for name in ("2K 4K 8K", "1 to 50 MP"):
        requests = scenarios.asked(bench.enough(bench.options.seconds, name), kind=None)
        runs.append(scenarios.closed(name, bench.server, requests, 2, bench.options.seconds))
    return section("mix", mix, runs)


def repeat(bench: Bench) -> Section:
    """Several questions about one image, which is uploaded once: the first beside those that come again to what is known."""
    images = bench.enough(bench.options.seconds / QUESTIONS_EACH)
    run = scenarios.repeat("uploads", bench.server, images, 2, bench.options.seconds)
    turns = [zoom_turn(run, kind) for kind in ("first", "again")]
    notes = [f"Zoom turn of a question again by that of a first one: {turns[1] / turns[0]:.2f} (medians)."] if all(turns) else []
    return section("repeat", repeat, [run], notes=notes)


def zoom_turn(run: Run, kind: str) -> float:
    """Return the median milliseconds of the zoom turns of a kind; 0 where there are none."""
    took = [sample.reply.timings["zoom_turn"] for sample in run.samples if sample.kind == kind and sample.answered]
    return statistics.median(took) if took else 0.0


def hostile(bench: Bench) -> Section:
    """Two good users alone, then beside broken images, bombs, bodies too large, slow senders and people who leave."""
    seconds = bench.options.seconds
    alone = scenarios.closed("alone", bench.server, scenarios.asked(bench.enough(seconds / 2)), 2, seconds / 2)
    beside = scenarios.hostile("beside harm", bench.server, scenarios.asked(bench.enough(seconds)), 2, seconds)
    good = Run("beside harm, good", [sample for sample in beside.samples if sample.answer is not None])
    slower = [report.percentile((sample.seconds for sample in run.samples if sample.answered), 50) for run in (alone, good)]
    failures = [f"{fault(sample)}: a good question" for sample in good.samples if not sample.answered]
    failures += [f"{fault(s)}: {s.kind}" for s in beside.samples if s.answer is None and s.reply.status in (500, 502, 504)]
    notes = [f"Good questions take {slower[1] / slower[0]:.2f} times as long beside harm (medians)."]
    return section("hostile", hostile, [alone, good, beside], notes=notes, failures=failures)


def spike(bench: Bench) -> Section:
    """As many users as usual, ten times as many for a while, and as many as usual again."""
    seconds = bench.options.seconds
    run = scenarios.spike("users 2, 20, 2", bench.server, scenarios.asked(bench.enough(seconds)), 2, 20, seconds)
    medians = {
        phase: report.percentile((s.seconds for s in run.samples if s.kind == phase and s.answered), 50)
        for phase in ("before", "after")
    }
    notes = [f"After the spike a question takes {medians['after'] / medians['before']:.2f} times as long as before (medians)."]
    return section("spike", spike, [run], notes=notes)


def soaked(bench: Bench) -> Section:
    """The same load for a long time, broken images, bodies too large and leavers among it: nothing may grow."""
    options, readings = bench.options, [soak.read(0, bench.server.get("/metrics"))]
    requests = scenarios.asked(bench.pictures("usual", options.pictures or 300))
    started = time.perf_counter()

    def watch() -> None:
        while True:
            gevent.sleep(options.read_every)
            with contextlib.suppress(OSError):
                readings.append(soak.read(time.perf_counter() - started, bench.server.get("/metrics")))

    watching = gevent.spawn(watch)
    run = scenarios.soak(f"{options.seconds:g} s", bench.server, requests, 2, options.seconds)
    watching.kill()
    found = soak.findings(readings)
    failures = [str(finding) for finding in found if finding.leaks] + unexpected([run])
    about = [
        f"{len(requests)} pictures in turns; {len(readings)} readings, the first {soak.WARM_UP:.0%} left out; medians of thirds:"
    ]
    notes = about + [str(finding) for finding in found]
    return Section("soak", said(soaked), [run], notes, failures, readings)


def compared(bench: Bench) -> Section:
    """The same pictures, questions and arrivals: the gateway with zoom, at full resolution without, and the bare engine."""
    if bench.engine is None:
        raise SystemExit("compare needs a bare engine: --engine-url, or none of --url and --embedded")
    options = bench.options
    model = options.engine_model or json.loads(bench.engine.get("/v1/models"))["data"][0]["id"]
    all_lanes = lanes(bench.server, bench.engine, model, bench.profile.prompts)
    paced: dict[str, list[Sample]] = {lane.name: [] for lane in all_lanes}
    crowded: dict[str, list[Sample]] = {lane.name: [] for lane in all_lanes}
    seconds = max(options.seconds, ROUNDS * CROWD / options.compare_rate)  # enough for four arrivals a round
    draws = []
    for number in range(ROUNDS):
        schedule = poisson(options.compare_rate, seconds / ROUNDS, options.seed + number)
        strangers = bench.pictures("full resolution", len(schedule))
        draws.append((schedule, strangers, bench.pictures("full resolution", max(CROWD, len(schedule)))))
    for lane in all_lanes:
        lane.server.send(lane.asks(bench.pictures("full resolution", 1)[0]))
    for number, lane in interleaved(ROUNDS, all_lanes):
        schedule, strangers, crowd = draws[number]
        run = scenarios.open_loop(lane.name, lane.server, lane.requests(strangers), schedule)
        paced[lane.name] += after(paced[lane.name], run.samples)
        run = scenarios.closed(lane.name, lane.server, lane.requests(crowd), CROWD, 86_400)
        crowded[lane.name] += after(crowded[lane.name], run.samples)
    open_runs = [Run(f"open, {name}", samples) for name, samples in paced.items()]
    closed_runs = [Run(f"{CROWD} at a time, {name}", samples) for name, samples in crowded.items()]
    notes = [
        f"{ROUNDS} rounds, each system in turn. Open: {options.compare_rate:g} a second; answers/s are then the load's own.",
        *ratios(open_runs, options.slo),
        *ratios(closed_runs, options.slo),
        "Right answers are those of the model that was loaded: ergo-mini was never trained at full resolution. With 2 million "
        "parameters on a CPU the ratios show the work on tokens and what the gateway adds, not ERGO-7B's times on a GPU.",
    ]
    return section("compare", compared, open_runs + closed_runs, notes=notes)


def after(before: Sequence[Sample], samples: Sequence[Sample]) -> list[Sample]:
    """Return samples moved behind those of the round before, so that the pause between the rounds counts for nothing."""
    shift = max((sample.ended for sample in before), default=0.0) - min((sample.due for sample in samples), default=0.0)
    return [replace(s, due=s.due + shift, sent=s.sent + shift, ended=s.ended + shift) for s in samples]


SCENARIOS: dict[str, Callable[[Bench], Section]] = {
    "closed": closed,
    "poisson": open_loop,
    "mix": mix,
    "repeat": repeat,
    "hostile": hostile,
    "spike": spike,
    "soak": soaked,
    "compare": compared,
}
SHORT = ("closed", "poisson", "repeat", "hostile", "spike", "compare")


def section(
    name: str,
    scenario: Callable[[Bench], Section],
    runs: Sequence[Run],
    *,
    notes: Sequence[str] = (),
    failures: Sequence[str] = (),
) -> Section:
    """Return a section with what fails any scenario: a question that gets neither an answer nor a refusal for want of room."""
    found = failures if name == "hostile" else [*failures, *unexpected(runs)]
    return Section(name, said(scenario), runs, notes, found)


def said(scenario: Callable[[Bench], Section]) -> str:
    """Return the sentence that describes a scenario."""
    return " ".join((scenario.__doc__ or "").split())


def unexpected(runs: Sequence[Run]) -> list[str]:
    """Return questions that got neither an answer nor 429 or 503."""
    asked = [sample for run in runs for sample in run.samples if sample.answer is not None and not sample.answered]
    return [f"{fault(sample)}: a question" for sample in asked if sample.reply.status not in (429, 503)]


def fault(sample: Sample) -> str:
    """Return what became of a request that was not answered."""
    return f"{sample.reply.status} {sample.reply.code} after {sample.seconds:.1f} s"


# --- the command ----------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(
        prog="python -m loadtests.load", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("scenario", nargs="+", choices=[*SCENARIOS, "short"], help=f"short: {', '.join(SHORT)}")
    made.add_argument("--seconds", type=float, default=20, help="of each run (%(default)s)")
    made.add_argument("--users", type=int, action="append", help="closed: users at a time; may stand several times (1 and 4)")
    made.add_argument("--rate", type=float, default=1.0, help="poisson: arrivals a second (%(default)s)")
    made.add_argument(
        "--compare-rate", type=float, default=0.4, help="compare: likewise; full resolution must keep up (%(default)s)"
    )
    made.add_argument("--read-every", type=float, default=3.0, help="soak: seconds between two readings (%(default)s)")
    made.add_argument(
        "--slo", type=float, default=OBJECTIVE, help="seconds within which a right answer counts as good (%(default)s)"
    )
    made.add_argument("--pictures", type=int, help="drawn for a run; a closed loop ends when all were asked about")
    made.add_argument("--seed", type=int, default=1, help="of pictures and arrivals (%(default)s)")
    made.add_argument("--url", help="base URL of a running gateway; none: one is started, with real vLLM behind")
    made.add_argument("--key", help="its API key")
    made.add_argument("--embedded", action="store_true", help="start the gateway on the embedded engine instead")
    made.add_argument("--engine-url", help="compare with --url: base URL of the engine behind it, without /v1")
    made.add_argument("--engine-key", help="its API key")
    made.add_argument("--engine-model", help="name of its model; the first that it lists")
    made.add_argument("--prompts", type=Path, help="compare with --url: the gateway's prompts file, if it has one")
    made.add_argument("--report", type=Path, default=ROOT / ".cache" / "load", help="folder of the report (.cache/load)")
    return made


@contextlib.contextmanager
def bench_of(options: argparse.Namespace) -> Iterator[Bench]:
    """Start what is to be started."""
    if options.url:
        yield Bench(options, options.url.rstrip("/"), options.engine_url, options.prompts)
        return
    if not options.embedded and (reason := support.why_no_vllm()):
        raise SystemExit(reason)
    with servers.started("embedded" if options.embedded else "vllm", options.report) as found:
        yield Bench(options, found.gateway, found.engine, support.PROMPTS)


def facts(options: argparse.Namespace) -> list[str]:
    """Return what somebody who reads the report later wants to know."""
    where = options.url or (
        "a gateway on the embedded engine, ergo-mini" if options.embedded else "a gateway on vLLM for CPUs, ergo-mini"
    )
    return [
        f"Server: {where}",
        f"Goodput: the right answer within {options.slo:g} s",
        f"Command: {' '.join(options.scenario)}, {options.seconds:g} s each, seed {options.seed}",
        f"Load by Locust {locust.__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d %H:%M')}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run scenarios, print what they found and write the report; returns 1 if anything happened that must not."""
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers that were started are ended, too
    names = dict.fromkeys(name for given in options.scenario for name in (SHORT if given == "short" else (given,)))
    sections: list[Section] = []
    with bench_of(options) as bench:
        bench.warm_up()
        for name in names:
            sections.append(SCENARIOS[name](bench))
            print(report.text(sections[-1], options.slo), flush=True)
    whole = report.write(options.report, "Load test", facts(options), sections, options.slo)
    print(f"report: {whole}")
    return int(any(section.failures for section in sections))


if __name__ == "__main__":
    sys.exit(main())
