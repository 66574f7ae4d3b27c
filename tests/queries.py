"""Every PromQL expression of the dashboards and the rules, where it stands, and what it names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from support import ROOT

OBSERVABILITY = ROOT / "observability"
DASHBOARDS = sorted((OBSERVABILITY / "grafana" / "dashboards").glob("*.json"))
PROMETHEUS = OBSERVABILITY / "prometheus"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))

Kind = Literal["panel", "annotation", "variable", "record", "alert"]


@dataclass(frozen=True, slots=True)
class Query:
    """An expression as it is written, Grafana's variables included."""

    kind: Kind
    file: Path
    name: str
    """Title of the panel, or name of the variable, the annotation, the recorded series or the alert."""
    expression: str

    def __str__(self) -> str:
        return f"{self.file.name}: {self.kind} {self.name}"

    def filled(self, *, rate: str = "5m", over: str = "1h") -> str:
        """Return the expression with values for Grafana's variables; those that filter let everything through.

        Args:
            rate: what ``$__rate_interval`` becomes.
            over: what ``$__range`` becomes.
        """
        values = {"__rate_interval": rate, "__range": over, "job": ".*", "instance": ".*", "model": ".*"}
        return re.sub(r"\$(\w+)", lambda variable: values[variable[1]], self.expression)


@dataclass(frozen=True, slots=True)
class Selector:
    """A metric in an expression, and what is asked of its labels."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...]
    """Label, operator, value."""


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the panels of a dashboard that show something: all but the titles of rows."""
    yield from (panel for panel in dashboard["panels"] if panel["type"] != "row")


def of_dashboards() -> Iterator[Query]:
    """Yield what the panels, the annotations and the variables of every dashboard ask."""
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text())
        for panel in panels(dashboard):
            for target in panel.get("targets", ()):
                yield Query("panel", path, panel["title"], target["expr"])
        for annotation in dashboard["annotations"]["list"]:
            yield Query("annotation", path, annotation["name"], annotation["expr"])
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
                assert asked is not None, variable
                yield Query("variable", path, variable["name"], f"count by ({asked[2]}) ({asked[1]})")


def of_rules() -> Iterator[Query]:
    """Yield what the recording rules and the alerts ask."""
    for path in RULES:
        for rule in rules(path):
            kind: Kind = "alert" if "alert" in rule else "record"
            yield Query(kind, path, rule[kind], rule["expr"])


def rules(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rules of a file."""
    for group in yaml.safe_load(path.read_text())["groups"]:
        yield from group["rules"]


_STRING = r'"[^"]*"'
_GROUPING = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_SELECTOR = re.compile(rf"(?<![\w:.$])([A-Za-z_:][\w:]*)\s*(\((?!\?))?(\{{(?:[^{{}}\"]|{_STRING})*\}})?")
_MATCHER = re.compile(rf"(\w+)\s*(=~|!~|!=|=)\s*({_STRING})")
_WORDS = {"and", "or", "unless", "bool", "offset"}


def selectors(expression: str) -> list[Selector]:
    """Return the metrics that an expression names."""
    plain = re.sub(r"\[[^\]]*\]", "", _GROUPING.sub("", expression))
    found = []
    for name, call, matchers in _SELECTOR.findall(plain):
        if not call and name not in _WORDS:
            asked = tuple((label, operator, value[1:-1]) for label, operator, value in _MATCHER.findall(matchers))
            found.append(Selector(name, asked))
    return found


def grouped(expression: str) -> set[str]:
    """Return the labels that an expression groups or joins by."""
    return {label.strip() for _, labels in _GROUPING.findall(expression) for label in labels.split(",") if label.strip()}


def promtool(*arguments: str | Path, folder: Path = PROMETHEUS) -> str:
    """Run promtool and return what it wrote; fails where it finds fault, skips the test where it is not there."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool here: tests/observability/install.sh installs it")
    ran = subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout
