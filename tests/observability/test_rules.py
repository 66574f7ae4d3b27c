"""The rules: sound, tested alert by alert, and explained in the runbook."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import queries
import yaml
from queries import OBSERVABILITY, PROMETHEUS

from ergo_server import errors
from ergo_server.telemetry.metrics import OUTCOMES, Metrics

ALERTS = [rule for rule in queries.rules(PROMETHEUS / "rules" / "alerts.yml") if "alert" in rule]
KINDS = {"fires", "silent at low traffic", "survives a restart"}
TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))

RUNBOOK = (OBSERVABILITY / "RUNBOOK.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", RUNBOOK, re.MULTILINE | re.DOTALL))


def key(rule: dict[str, Any]) -> str:
    """Return what tells an alert from others: its name and, where several share that, its long window."""
    return " ".join([rule["alert"], *([rule["labels"]["long"]] if "long" in rule["labels"] else [])])


alerts = pytest.mark.parametrize("rule", ALERTS, ids=map(key, ALERTS))


def test_prometheus_takes_the_configuration() -> None:
    """promtool finds no fault with prometheus.yml and the rules that it names."""
    said = queries.promtool("check", "config", "prometheus.yml")
    assert f"{len(queries.RULES)} rule files found" in said


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_rules_do_as_their_tests_say(path: Any) -> None:
    """Prometheus' own evaluation of the rules gives what the file expects."""
    queries.promtool("test", "rules", path.relative_to(PROMETHEUS))


@alerts
def test_every_alert_can_be_acted_upon(rule: dict[str, Any]) -> None:
    """An alert says how soon it matters, waits before it fires, tells what is wrong, and leads to its section of the runbook."""
    name = rule["alert"]
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["for"]
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"]
    assert rule["annotations"]["runbook_url"] == f"observability/RUNBOOK.md#{name.lower()}"
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}


@alerts
def test_an_alert_names_only_labels_that_it_has(rule: dict[str, Any]) -> None:
    """The labels in an alert's text survive its expression's grouping; where there is none, the metric has them."""
    named = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
    recorded = "job:" in rule["expr"]
    left = re.split(r"\n(?:unless|and) ", rule["expr"])[0]
    kept = queries.grouped(left) | ({"job"} if recorded else set())
    if "absent(" in rule["expr"]:
        assert not named
    elif kept:
        assert named <= kept
    else:
        metrics = Metrics(())
        metrics.watch("engine:8001", lambda: "closed")
        collected = metrics.registry.collect()
        its = {label for metric in collected if metric.name in left for sample in metric.samples for label in sample.labels}
        assert named <= {"job", "instance"} | its


def test_the_runbook_has_a_section_for_every_alert() -> None:
    """Every alert, and nothing else, has a section that says what it means, what users notice, where to look and what to do."""
    assert {name for name in SECTIONS if name.startswith(("Ergo", "Vllm"))} == {rule["alert"] for rule in ALERTS}
    for name, text in SECTIONS.items():
        if name.startswith(("Ergo", "Vllm")):
            assert re.findall(r"^\*\*(.+?)\*\*", text, re.MULTILINE) == ["Means.", "Users notice.", "Look at.", "Do."], name


def alert_tests() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield alert, kind and test of every test of an alert."""
    for path in TESTS:
        for test in yaml.safe_load(path.read_text())["tests"]:
            alert, _, kind = test["name"].partition(": ")
            if kind in KINDS:
                yield alert, kind, test


def expected(test: dict[str, Any], alert: str) -> list[int]:
    """Return how many firing alerts a test expects at each of its moments; fails where it asks for another alert."""
    name, _, long = alert.partition(" ")
    asked = f'ALERTS{{alertname="{name}", alertstate="firing"' + (f', long="{long}"}}' if long else "}")
    assert all(asked in check["expr"] for check in test["promql_expr_test"]), test["name"]
    return [len(check["exp_samples"]) for check in test["promql_expr_test"]]


def test_every_alert_is_tested_three_ways() -> None:
    """Each alert has a test in which it fires in its time, one in which low traffic leaves it silent, and one with a restart."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for alert, kind, test in alert_tests():
        found[alert].add(kind)
        firing = expected(test, alert)
        values = [series["values"] for series in test["input_series"]]
        if kind == "fires":
            assert firing[0] == 0, test["name"]
            assert any(firing), test["name"]
        elif kind == "silent at low traffic":
            assert not any(firing), test["name"]
        else:
            assert any(firing), test["name"]
            # An instance that restarts is one that cannot be scraped, and whose other series then are not there.
            assert all("stale" in value or alert == "ErgoGatewayDown" for value in values), test["name"]
    assert dict(found) == {key(rule): KINDS for rule in ALERTS}


def test_the_objective_counts_what_is_the_servers_fault() -> None:
    """A question has failed exactly if its error is of 500 or above; what the caller must change counts on neither side."""
    ours = {error.code for error in _tree(errors.ErgoError) if error.status >= 500}
    for query in queries.of_rules():
        if query.name.startswith("job:ergo_requests_failed:"):
            failed, owed = (set(_chosen(selector)) for selector in queries.selectors(query.expression))
            assert failed == ours
            assert owed == ours | {"ok"}


def _tree(error: type[errors.ErgoError]) -> Iterator[type[errors.ErgoError]]:
    yield error
    for below in error.__subclasses__():
        yield from _tree(below)


def _chosen(selector: queries.Selector) -> Iterator[str]:
    """Yield the outcomes that a selector lets through."""
    ((label, operator, value),) = selector.matchers
    assert (label, operator) == ("outcome", "=~")
    yield from (outcome for outcome in OUTCOMES if re.fullmatch(value, outcome))
