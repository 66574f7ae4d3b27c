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
import http.client
import json
import math
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import gevent
import support

from ergo_server.protocol.prompts import builtin_profile, load_profile
from loadtests import ROOT, report, scenarios, servers, soak, verdicts
from loadtests.arrivals import poisson
from loadtests.compare import after, interleaved, lanes, ratios, work
from loadtests.pictures import MEGAPIXELS, QUESTIONS_EACH, Picture, pool
from loadtests.questions import Sample, Server
from loadtests.report import Run, Section

OBJECTIVE = 8.0
"""Seconds; that of the alerts in observability/prometheus."""

READINGS = 200
"""Of a soak: 53 in each of the thirds that are compared, of which some meet a server at rest."""

USUAL, PEAK = 2, 20
"""Users before and after a spike, and in it."""

WARM_UP = 4
"""Questions before the first run: what a server loads when first asked is not what is measured."""

ROUNDS = 3
"""Of a comparison: as many as there are systems, so that each is first once."""

CROWD = 4
"""Users at a time of a comparison's closed loop: four images at full resolution fill the cache that vLLM is started with here."""

ENOUGH = 12.0
"""Questions a second that no server of this size answers: so many pictures are drawn for a closed loop, unless told otherwise."""

LARGE_ENOUGH = 2.0
"""Likewise of large images: one of 50 megapixels has 10 MB, and takes a second to draw."""

SHORT = {"closed": 0, "poisson": 0, "mix": 16, "sizes": 6, "repeat": 0, "hostile": 0, "spike": 0, "compare": 0}
"""Scenarios of `make load`, and how many pictures a run of each has there; 0: as always. Large images take long to draw, and on
two cores to answer."""


class Bench:
    """What all scenarios need.

    Args:
        options: of the command line.
        url: the gateway's.
        key: its API key, if it wants one.
        engine: the bare engine's, if there is one to compare with.
        prompts: the gateway's prompts file; None: those of ERGO-7B.
        narrow: returns the URL of a gateway with room for few, which takes the same key; None: there is none.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        url: str,
        key: str | None,
        engine: str | None,
        prompts: Path | None,
        narrow: Callable[[], str] | None,
    ) -> None:
        self.options = options
        self.server = Server(url, key)
        self.engine = Server(engine, options.engine_key) if engine else None
        self.profile = load_profile(prompts) if prompts else builtin_profile()
        self.few = 0
        """Pictures of a run, where neither the command line nor the time decides; 0: the time does."""
        self._narrow = narrow
        self._key = key
        self._pools = options.seed

    def pictures(self, mix: str, count: int) -> list[Picture]:
        """Draw pictures that no scenario before has used."""
        self._pools += 1
        return pool(mix, count, self._pools)

    def enough(self, seconds: float, mix: str = "usual", rate: float = ENOUGH) -> list[Picture]:
        """Draw pictures for a closed loop of so many seconds."""
        return self.pictures(mix, self.options.pictures or self.few or round(rate * seconds))

    def narrow(self) -> Server | None:
        """Return the gateway with room for few, if there is one."""
        if self._narrow is None:
            return None
        found = Server(self._narrow(), self._key)
        self.warm_up(found)
        return found

    def warm_up(self, server: Server) -> None:
        """Ask a few questions that count for nothing.

        Raises:
            SystemExit: the server does not answer.
        """
        for request in scenarios.asked(self.pictures("usual", WARM_UP)):
            reply = server.send(request)
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
        requests = scenarios.asked(bench.enough(bench.options.seconds, name, LARGE_ENOUGH), kind=None)
        runs.append(scenarios.closed(name, bench.server, requests, 2, bench.options.seconds))
    return section("mix", mix, runs)


def sizes(bench: Bench) -> Section:
    """Images of 1 to 50 megapixels, each size by itself, one at a time: what a question costs the gateway's processor."""
    runs = []
    for name in MEGAPIXELS:
        requests = scenarios.asked(bench.enough(bench.options.seconds, name, LARGE_ENOUGH), budget=bench.options.budget)
        runs.append(scenarios.closed(name, bench.server, requests, 1, bench.options.seconds))
    return section("sizes", sizes, runs)


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
    notes = [f"Good questions take {slower[1] / slower[0]:.2f} times as long beside harm (medians)."]
    return section("hostile", hostile, [alone, good, beside], notes=notes, failures=verdicts.turned_away(good.samples))


def spike(bench: Bench) -> Section:
    """As many users as usual, ten times as many for a while, and as many as usual again; then at a gateway with room for few."""
    runs, notes, failures = [], [], []
    for name, server in (("users {}", bench.server), ("users {}, little room", bench.narrow())):
        if server is None:
            continue
        title, requests = name.format(f"{USUAL}, {PEAK}, {USUAL}"), scenarios.asked(bench.enough(bench.options.seconds))
        run = scenarios.spike(title, server, requests, USUAL, PEAK, bench.options.seconds)
        medians, refused = verdicts.medians(run.samples), verdicts.refused(run.samples)
        ratio = medians["after"] / medians["before"]
        notes.append(f"{title}: {refused} refused; a question takes {ratio:.2f} times as long after as before (medians).")
        failures += verdicts.not_recovered(run.samples)
        if server is not bench.server and not refused:
            failures.append("the gateway with room for few has refused nobody: the run says nothing of refusals")
        runs.append(run)
    return section("spike", spike, runs, notes=notes, failures=failures)


def soaked(bench: Bench) -> Section:
    """Every kind of request for a long time, hostile ones and ever new names among them: nothing may grow."""
    options, server = bench.options, bench.server
    every = options.read_every or options.seconds / READINGS
    pictures = bench.pictures("usual", options.pictures or 300)
    readings: list[soak.Reading] = []
    failed: list[str] = []
    started = time.perf_counter()

    def watch() -> None:
        while True:
            at = time.perf_counter() - started
            try:
                readings.append(soak.read(at, server.get("/metrics")))
            except (OSError, http.client.HTTPException, LookupError, ValueError) as error:
                failed.append(type(error).__name__)
            gevent.sleep(every)

    watching = gevent.spawn(watch)
    run = scenarios.soak(f"{options.seconds:g} s", server, pictures, 2, options.seconds)
    lasted = time.perf_counter() - started
    if watching.ready():
        watching.get()  # raises what ended it
    watching.kill()
    failures = soak.holes(readings, failed, lasted, every)
    notes = [f"{len(pictures)} pictures in turns; {len(readings)} readings, {soak.WARM_UP:.0%} left out; first and last third:"]
    try:
        found = soak.findings(readings)
    except ValueError as error:
        failures.append(str(error))
    else:
        failures += [str(finding) for finding in found if finding.leaks]
        notes += [str(finding) for finding in found]
    return section("soak", soaked, [run], notes=notes, failures=failures, readings=readings)


def compared(bench: Bench) -> Section:
    """The same pictures, questions and arrivals: the gateway with zoom, at full resolution without, and the bare engine."""
    if bench.engine is None:
        raise SystemExit("compare needs a bare engine: --engine-url, or none of --url and --embedded")
    options = bench.options
    model = options.engine_model or json.loads(bench.engine.get("/v1/models"))["data"][0]["id"]
    all_lanes = lanes(bench.server, bench.engine, model, bench.profile.prompts)
    paced: dict[str, list[Sample]] = {lane.name: [] for lane in all_lanes}
    crowded: dict[str, list[Sample]] = {lane.name: [] for lane in all_lanes}
    # vLLM's own /metrics tells of one of its processes only.
    taken = {lane.name: 0.0 if lane.server is bench.server else math.nan for lane in all_lanes}
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
        taken[lane.name] += run.cpu
    open_runs = [Run(f"open, {name}", samples) for name, samples in paced.items()]
    closed_runs = [Run(f"{CROWD} at a time, {name}", samples, taken[name]) for name, samples in crowded.items()]
    found = [work(run.samples) for run in open_runs]
    notes = [
        f"{ROUNDS} rounds, each system in turn. Open: {options.compare_rate:g} a second; answers/s are then the load's own.",
        *ratios(open_runs, options.slo),
        *ratios(closed_runs, options.slo),
        *(f"The work of a question, for docs/sizing.py: {options}" for options in found if options),
        "Right answers are those of the model that was loaded: ergo-mini was never trained at full resolution. With 2 million "
        "parameters on a CPU the ratios show the work on tokens and what the gateway adds, not ERGO-7B's times on a GPU.",
    ]
    return section("compare", compared, open_runs + closed_runs, notes=notes)


SCENARIOS: dict[str, Callable[[Bench], Section]] = {
    "closed": closed,
    "poisson": open_loop,
    "mix": mix,
    "sizes": sizes,
    "repeat": repeat,
    "hostile": hostile,
    "spike": spike,
    "soak": soaked,
    "compare": compared,
}


def section(
    name: str,
    scenario: Callable[[Bench], Section],
    runs: Sequence[Run],
    *,
    notes: Sequence[str] = (),
    failures: Sequence[str] = (),
    readings: Sequence[soak.Reading] = (),
) -> Section:
    """Return a section with what fails any scenario, beside its own failures.

    Args:
        name: of the scenario.
        scenario: its sentence is its docstring.
        runs: all that was sent; one may be a part of another.
        notes: what else there is to say.
        failures: what must not be.
        readings: of a soak.
    """
    samples = {id(sample): sample for run in runs for sample in run.samples}
    return Section(name, said(scenario), runs, notes, [*failures, *verdicts.unexpected(samples.values())], readings)


def said(scenario: Callable[[Bench], Section]) -> str:
    """Return the sentence that describes a scenario."""
    return " ".join((scenario.__doc__ or "").split())


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
    made.add_argument("--budget", type=int, help="sizes: visual tokens of a view; none: the model's own")
    made.add_argument(
        "--compare-rate", type=float, default=0.4, help="compare: likewise; full resolution must keep up (%(default)s)"
    )
    made.add_argument("--read-every", type=float, help="soak: seconds between two readings (a 200th of the run)")
    made.add_argument(
        "--slo", type=float, default=OBJECTIVE, help="seconds within which a right answer counts as good (%(default)s)"
    )
    made.add_argument("--pictures", type=int, help="drawn for a run; a closed loop ends when all were asked about")
    made.add_argument("--seed", type=int, default=1, help="of pictures and arrivals (%(default)s)")
    made.add_argument("--url", help="base URL of a running gateway; none: one is started, with real vLLM behind")
    made.add_argument("--key", help="its API key")
    made.add_argument("--narrow-url", help="spike with --url: another gateway, with room for few, with the same key")
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
        narrow = (lambda: cast(str, options.narrow_url)) if options.narrow_url else None
        yield Bench(options, options.url.rstrip("/"), options.key, options.engine_url, options.prompts, narrow)
        return
    if not options.embedded and (reason := support.why_no_vllm()):
        raise SystemExit(reason)
    with servers.started("embedded" if options.embedded else "vllm", options.report) as found:
        yield Bench(options, found.gateway, found.key, found.engine, support.PROMPTS, found.narrow)


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
    names = {name: few for given in options.scenario for name, few in (SHORT if given == "short" else {given: 0}).items()}
    sections: list[Section] = []
    with bench_of(options) as bench:
        bench.warm_up(bench.server)
        for name, bench.few in names.items():
            sections.append(SCENARIOS[name](bench))
            print(report.text(sections[-1], options.slo), flush=True)
    whole = report.write(options.report, "Load test", facts(options), sections, options.slo)
    print(f"report: {whole}")
    return int(any(section.failures for section in sections))


if __name__ == "__main__":
    sys.exit(main())
