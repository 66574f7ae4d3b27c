"""The dashboards: complete, readable by Grafana, and asking for what the server really tells."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import asking
import httpx2
import pytest
import queries
import yaml
from queries import DASHBOARDS, OBSERVABILITY, PROMETHEUS, RULES, Query, Selector

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
TARGET_LABELS = {"job", "instance"}
"""What Prometheus itself adds to every series that it scrapes."""
BUILT_IN = {"up", "ALERTS"}
"""Series of Prometheus' own."""

ALL = [*queries.of_dashboards(), *queries.of_rules()]
READ = {path.stem: json.loads(path.read_text()) for path in DASHBOARDS}
RECORDED = {query.name for query in queries.of_rules() if query.kind == "record"}

dashboards = pytest.mark.parametrize("dashboard", READ.values(), ids=READ)


def test_the_dashboards_are_what_the_program_writes(tmp_path: Path) -> None:
    """Each file is, to the byte, what build.py writes, and there is none beside them."""
    subprocess.run([sys.executable, OBSERVABILITY / "grafana" / "build.py", tmp_path], check=True)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text() for path in DASHBOARDS}


@dashboards
def test_every_panel_says_what_it_shows(dashboard: dict[str, Any]) -> None:
    """Every panel has a title of its own, and a description that says what good looks like."""
    panels = list(queries.panels(dashboard))
    assert len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        shows, good, what = re.split("(Good: |There is no good or bad in it)", panel["description"], maxsplit=1)
        assert good, panel["title"]
        assert len(shows + what) > 30, panel["title"]


@dashboards
def test_every_query_goes_where_the_reader_chooses(dashboard: dict[str, Any]) -> None:
    """Panels, annotations and variables name no data source but the variable's, and every panel but text asks something."""
    first, *others = dashboard["templating"]["list"]
    assert {"name": "datasource", "type": "datasource", "query": "prometheus"}.items() <= first.items()
    asking_panels = [panel for panel in queries.panels(dashboard) if panel["type"] != "text"]
    assert all(panel["targets"] for panel in asking_panels)
    targets = [target for panel in asking_panels for target in panel["targets"]]
    for part in (*asking_panels, *targets, *dashboard["annotations"]["list"], *others):
        assert part["datasource"] == SOURCE
    assert "__inputs" not in dashboard


@dashboards
def test_provisioning_can_replace_a_dashboard(dashboard: dict[str, Any]) -> None:
    """A dashboard has a fixed uid and schema version, and no id, which belongs to one Grafana's database."""
    assert dashboard["id"] is None
    assert re.fullmatch("ergo-[a-z-]+", dashboard["uid"])
    assert dashboard["schemaVersion"] == 39
    assert (dashboard["time"]["from"], dashboard["refresh"]) == ("now-6h", "30s")


def test_dashboards_lead_to_each_other() -> None:
    """Each dashboard links to all others by their uids."""
    uids = {dashboard["uid"] for dashboard in READ.values()}
    assert len(uids) == len(READ)
    for dashboard in READ.values():
        assert {link["url"] for link in dashboard["links"]} == {f"/d/{uid}" for uid in uids - {dashboard["uid"]}}


@dashboards
def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    """Every panel, titles of rows included, has a number and cells of Grafana's grid to itself, within the 24 columns."""
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        x, y, w, h = (panel["gridPos"][side] for side in "xywh")
        assert x + w <= 24
        own = set(itertools.product(range(x, x + w), range(y, y + h)))
        assert not own & cells, panel["title"]
        cells |= own


def test_promtool_reads_every_expression(tmp_path: Path) -> None:
    """promtool parses every expression once Grafana's variables have values."""
    rules = [{"record": f"query:{number}", "expr": query.filled()} for number, query in enumerate(ALL)]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    assert f"{len(ALL)} rules found" in queries.promtool("check", "rules", path)


@pytest.mark.parametrize("query", [query for query in ALL if query.kind == "panel"], ids=str)
def test_windows_fit_the_scrapes_and_the_range(query: Query) -> None:
    """Panels take rates over $__rate_interval and sums over $__range, never over a window that somebody guessed."""
    windows = re.findall(r"(\w+)\([^()]*\[([^\]]+)\]\)", query.expression)
    assert len(windows) == query.expression.count("[")
    for function, window in windows:
        assert window == "$__rate_interval" if function == "rate" else window in ("$__rate_interval", "$__range")


# --- What is asked for, and what there is ---------------------------------------------------------------------------------------


Exposed = Mapping[str, Mapping[str, set[str]]]
"""The values of each label of each metric."""


def exposed(text: str) -> Exposed:
    """Read an exposition."""
    found: dict[str, dict[str, set[str]]] = {}
    for name, labels in asking.series(text):
        for label, value in (("", ""), *labels):
            found.setdefault(name, {}).setdefault(label, set()).add(value)
    return found


def faults(selector: Selector, there: Exposed) -> Iterable[str]:
    """Yield what a selector asks of a metric that can never be: its name, a label, or a label's value."""
    if selector.metric not in there:
        yield f"no metric {selector.metric}"
        return
    labels = there[selector.metric]
    for label, operator, value in selector.matchers:
        if label in TARGET_LABELS or "$" in value:
            continue
        if label not in labels:
            yield f"{selector.metric} has no label {label}"
            continue
        for wanted in value.split("|") if "~" in operator else [re.escape(value)]:
            if not any(re.fullmatch(wanted, real) for real in labels[label]):
                yield f"no {selector.metric} has {label}={wanted}"


@pytest.fixture(scope="module")
def gateway() -> Exposed:
    """What a gateway exposes that has answered nothing yet."""
    return exposed(asking.client().get("/metrics").text)


def test_every_metric_is_one_of_the_gateway(gateway: Exposed) -> None:
    """Each metric in dashboards and rules, each of its labels and of their values, is on /metrics from the start."""
    found = []
    for query in ALL:
        for selector in queries.selectors(query.expression):
            if selector.metric not in BUILT_IN | RECORDED and not selector.metric.startswith("vllm:"):
                found += [f"{query}: {fault}" for fault in faults(selector, gateway)]
    assert not found, "\n".join(found)


def test_every_grouping_is_by_a_label_that_there_is(gateway: Exposed) -> None:
    """What an expression groups by is a label of one of its metrics, and what a legend names is grouped by."""
    for query in ALL:
        metrics = [selector.metric for selector in queries.selectors(query.expression)]
        known = TARGET_LABELS.union(*(gateway.get(metric, {}) for metric in metrics))
        if any(metric.startswith("vllm:") for metric in metrics):
            known |= {"model_name", "engine", "le"}
        assert queries.grouped(query.expression) <= known, query
    for path in DASHBOARDS:
        for panel in queries.panels(json.loads(path.read_text())):
            for target in panel.get("targets", ()):
                named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
                assert named <= queries.grouped(target["expr"]), f"{path.name}: {panel['title']}"


@pytest.mark.vllm
def test_every_metric_of_vllm_is_one_of_vllm(vllm: str) -> None:
    """Each metric of vLLM's in dashboards and rules, with its labels, is on /metrics of the real vLLM."""
    there = exposed(httpx2.get(f"{vllm}/metrics", trust_env=False, timeout=60).text)
    found = []
    for query in ALL:
        for selector in queries.selectors(query.expression):
            if selector.metric.startswith("vllm:") and selector.metric not in RECORDED:
                found += [f"{query}: {fault}" for fault in faults(selector, there)]
    assert not found, "\n".join(found)


def test_a_name_that_is_not_there_is_found(gateway: Exposed) -> None:
    """The check above sees a metric, a label, a value and a bucket that are not there, and is content with what is."""
    wrong = 'rate(ergo_zooms_total[5m]) + ergo_zoom_total{result="zoomed"} / ergo_zoom_area_ratio_bucket{le="0.7"}'
    wrong += ' + sum by (job) (ergo_zoom_total{outcome=~"zoomed|lost"})'
    found = [fault for selector in queries.selectors(wrong) for fault in faults(selector, gateway)]
    assert [fault.split()[-1] for fault in found] == ["ergo_zooms_total", "result", r"le=0\.7", "outcome=lost"]
    assert not list(faults(Selector("ergo_zoom_area_ratio_bucket", (("le", "=", "0.6"),)), gateway))


def test_every_recorded_series_is_used_and_defined() -> None:
    """What dashboards and alerts read is recorded by the rules, and the rules record nothing that nobody reads."""
    named = {selector.metric for query in ALL for selector in queries.selectors(query.expression)}
    assert {name for name in named if name.startswith(("job:", "all:"))} == RECORDED


def test_recorded_seconds_are_added_up_at_the_pace_of_their_recording() -> None:
    """The saved engine-seconds of a range are the recorded values times the seconds between them."""
    groups = {group["name"]: group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]}
    seconds = groups["ergo-engine-seconds"]["interval"].removesuffix("s")
    sums = [query.expression for query in ALL if "sum_over_time" in query.expression]
    assert sums == [f"sum_over_time(all:ergo_saved:engine_seconds_rate5m[$__range]) * {seconds}"]


def test_grafana_knows_how_often_prometheus_scrapes() -> None:
    """The provisioned data source has the uid that is provisioned, and Prometheus' own scrape interval."""
    (source,) = yaml.safe_load((OBSERVABILITY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    scrape = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert (source["uid"], source["isDefault"], source["jsonData"]["timeInterval"]) == ("prometheus", True, scrape)
