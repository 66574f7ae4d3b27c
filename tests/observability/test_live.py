"""Every query of dashboards and rules, against a real Prometheus that scrapes the real gateway on real vLLM under mixed load."""

from __future__ import annotations

import json
import math
import os
import runpy
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import support
from asking import data_url, picture
from prometheus import SCRAPE_SECONDS, Prometheus, Target, prometheus
from queries import Query, grouped, of_dashboards, of_rules, selectors
from support import ROOT

from ergo_server.api.keys import new_key

pytestmark = pytest.mark.vllm

RATE = "20s"
"""What ``$__rate_interval`` becomes: long enough for a rate of what happened once, at a scrape a second."""

QUESTION = "What is the code on the red circle?"


@dataclass(slots=True)
class Live:
    """What runs, and what its responses said."""

    prometheus: Prometheus
    started: float
    ended: float = 0.0
    answers: list[dict[str, Any]] = field(default_factory=list)
    """Responses of ``/v1/vqa`` with status 200."""
    statuses: list[int] = field(default_factory=list)

    def filled(self, query: Query) -> str:
        """Put values in the place of Grafana's variables."""
        # From before the load: what is counted before a range's first sample is not in its increase.
        return query.filled(rate=RATE, over=f"{math.ceil(self.ended - self.started) + SCRAPE_SECONDS}s")


RENDER = runpy.run_path(str(ROOT / "observability" / "render.py"))


@dataclass(frozen=True, slots=True)
class Load:
    """Sends questions."""

    http: httpx2.Client
    live: Live
    """Where the responses go."""

    def ask(self, image: bytes | str, **fields: Any) -> None:
        """Ask one question."""
        named = image if isinstance(image, str) else data_url(image, "jpeg")
        response = self.http.post("/v1/vqa", json={"image": named, "question": QUESTION, **fields})
        self.live.statuses.append(response.status_code)
        if response.status_code == 200 and not fields.get("stream"):
            self.live.answers.append(response.json())

    def mixed(self) -> None:
        """Zoomed, skipped, malformed, uploaded, streamed, too large, wrong, in every class of size."""
        for number in range(6):
            made = support.held_out(number)
            self.ask(support.encode(made), question=made.question)
            self.ask(support.encode(made), question=made.question)
        self.ask(picture(6000, 6000, "JPEG"))
        self.ask(picture(3000, 3000, "JPEG"), zoom="never")
        self.ask(picture(100, 100, "JPEG"))
        for seed in range(8):  # so hot that some replies hold no box that can be used
            self.ask(support.encode(support.held_out(7)), temperature=2.0, seed=seed)
        upload = self.http.post("/v1/images", files={"image": support.encode(support.held_out(8))}).json()
        self.ask(upload["id"])
        self.ask(b"no image")
        self.ask("https://images.example/scene.jpg")
        self.ask(picture(), max_visual_tokens=9999)


def _client(url: str, key: str) -> httpx2.Client:
    return httpx2.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, trust_env=False, timeout=300)


@pytest.fixture(scope="module")
def live(vllm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A gateway on vLLM, one whose engine is not there, a Prometheus, and what came of a load on both."""
    folder = tmp_path_factory.mktemp("prometheus")
    (key, line), (limited, few) = new_key("team"), new_key("others")
    keys = f"{line}\n{few} requests_per_minute=1"
    with ExitStack() as stack:
        open_keys: dict[str, Any] = {"api_keys": keys, "open_metrics": True}
        good = stack.enter_context(support.gateway(engine="vllm", engine_url=vllm, verify_fraction=1, **open_keys))
        lost = f"http://127.0.0.1:{support.free_port()}"
        bad = stack.enter_context(support.served(support.app(engine="vllm", engine_url=lost, breaker_failures=2, **open_keys)))
        rules = sorted((ROOT / "observability/prometheus/rules").glob("*.yml"))
        targets = [Target("ergo-vqa", good), Target("ergo-vqa", bad), Target("vllm", vllm)]
        running = stack.enter_context(prometheus(folder, targets, rules))
        state = Live(running, running.wait_for_scrape())
        load, failing, refused = (
            Load(stack.enter_context(_client(url, its)), state) for url, its in ((good, key), (bad, key), (good, limited))
        )
        while not state.ended:
            load.mixed()
            for _ in range(4):
                failing.ask(picture(300, 300, "JPEG"))
            for _ in range(2):
                refused.ask(picture(300, 300, "JPEG"))
            httpx2.post(f"{good}/v1/vqa", trust_env=False)
            for url in (good, bad):
                httpx2.get(f"{url}/readyz", trust_env=False)
            if time.time() - state.started > 30 * SCRAPE_SECONDS:
                state.ended = running.wait_for_scrape()
        yield state


def finite(series: list[dict[str, Any]]) -> bool:
    """Say whether there is a number among the values."""
    values = [value for one in series for _, value in one.get("values", [one.get("value", (0, "nan"))])]
    return any(math.isfinite(float(value)) for value in values)


def test_the_load_was_mixed(live: Live) -> None:
    """Among the questions were zoomed and skipped ones, malformed zooms, refusals and failures."""
    outcomes = {answer["regions"][0]["outcome"] for answer in live.answers}
    assert {"zoomed", "skipped"} <= outcomes
    assert outcomes & {"no_box", "invalid_box", "clamped"}
    assert {200, 400, 422, 429, 503} <= set(live.statuses)


@pytest.mark.parametrize("query", [query for query in of_dashboards() if query.kind == "panel"], ids=str)
def test_no_panel_is_empty(live: Live, query: Query) -> None:
    """Each query of each panel gives numbers for the time of the load."""
    asked = live.filled(query)
    assert finite(live.prometheus.range(asked, live.started, live.ended)), asked


@pytest.mark.parametrize("query", [*of_rules()], ids=str)
def test_every_rule_can_be_evaluated(live: Live, query: Query) -> None:
    """Each rule's expression is understood; that it is empty may mean that all is well."""
    live.prometheus.query(live.filled(query), live.ended)


def test_prometheus_itself_evaluates_the_rules(live: Live) -> None:
    """The rules are loaded, each was evaluated without an error, and the recorded series are there."""
    groups = live.prometheus.get("rules")["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    assert len(found) == len(list(of_rules()))
    assert [rule["name"] for rule in found if rule["health"] != "ok"] == []
    for rule in found:
        if rule["type"] == "recording":
            assert live.prometheus.query(f"count({rule['name']})", live.ended), rule["name"]


@pytest.mark.parametrize("query", [*of_dashboards(), *of_rules()], ids=str)
def test_no_metric_or_label_is_unknown(live: Live, query: Query) -> None:
    """Each metric that is named was scraped or recorded, and each label that is named is on one of the query's metrics."""
    known = set(live.prometheus.get("label/__name__/values"))
    all_labels: set[str] = set()
    for selector in selectors(live.filled(query)):
        assert selector.metric in known, selector.metric
        labels = {label for series in live.prometheus.get("series", **{"match[]": selector.metric}) for label in series}
        assert {label for label, _, _ in selector.matchers} <= labels
        all_labels |= labels
    assert grouped(query.expression) <= all_labels


def test_the_savings_are_what_the_responses_said(live: Live) -> None:
    """Tokens spent, the baseline, and the ratio on the savings panels are the sums over all responses."""
    spent = sum(answer["visual_tokens"]["total"] for answer in live.answers)
    baseline = sum(answer["visual_tokens"]["baseline"] for answer in live.answers)
    assert live.prometheus.value("sum(ergo_visual_tokens_total)", live.ended) == spent
    assert live.prometheus.value("sum(ergo_visual_tokens_baseline_total)", live.ended) == baseline
    (panel,) = (query for query in of_dashboards() if query.name == "Saved over the range")
    assert live.prometheus.value(live.filled(panel), live.ended) == pytest.approx(1 - spent / baseline, rel=1e-6)


def test_the_dashboards_can_be_drawn(live: Live, tmp_path: Path) -> None:
    """observability/render.py draws each of them; ERGO_PICTURES names a folder that keeps the pictures."""
    out = Path(os.environ.get("ERGO_PICTURES", tmp_path))
    with RENDER["Source"](live.prometheus.url, RENDER["Window"](live.started, live.ended, RATE)) as source:
        for path in sorted(RENDER["DASHBOARDS"].glob("*.json")):
            file = out / f"dashboard-{path.stem}.png"
            RENDER["picture"](json.loads(path.read_text()), source).savefig(file, dpi=80)
            assert file.stat().st_size > 20_000
