"""Draws the dashboards from a running Prometheus, without Grafana: what a reader will get, before installing anything.

``python observability/render.py http://127.0.0.1:9090 --out docs/images`` writes one picture for each dashboard. It knows the
kinds of panels that these dashboards use, their units and their places on the grid; it is no Grafana.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.use("agg")

DASHBOARDS = Path(__file__).parent / "grafana" / "dashboards"

COLUMNS = 24
"""Of Grafana's grid."""

INCHES = 0.62
"""Of a column; a row is as high as 0.55 of it is wide."""

COLOURS = ("#3274d9", "#e0752d", "#2f9e62", "#a352cc", "#c4162a", "#7a8a99", "#c9a227", "#1f8a9e")

STEPS = 120
"""Points of a line."""

Series = list[dict[str, Any]]
Query = Callable[[str], Series]


@dataclass(frozen=True, slots=True)
class Window:
    """The time that is shown, in Unix seconds."""

    start: float
    end: float
    rate: str
    """What ``$__rate_interval`` becomes."""

    def filled(self, expression: str) -> str:
        """Put values in the place of Grafana's variables; a variable that filters matches everything."""
        known = {"__rate_interval": self.rate, "__interval": self.rate, "__range": f"{max(1, round(self.end - self.start))}s"}
        for name, value in known.items():
            expression = expression.replace(f"${{{name}}}", value).replace(f"${name}", value)
        return re.sub(r"\$\{?\w+\}?", ".*", expression)


class Source:
    """Asks Prometheus.

    Args:
        url: where it is.
        window: the time that is shown.
    """

    def __init__(self, url: str, window: Window) -> None:
        self._http = httpx2.Client(base_url=url, trust_env=False, timeout=60)
        self.window = window

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def now(self, expression: str) -> Series:
        """Return the series at the window's end."""
        return self._ask("query", query=self.window.filled(expression), time=self.window.end)

    def over(self, expression: str) -> Series:
        """Return the series over the window."""
        step = max(1.0, (self.window.end - self.window.start) / STEPS)
        return self._ask(
            "query_range", query=self.window.filled(expression), start=self.window.start, end=self.window.end, step=step
        )

    def _ask(self, path: str, **parameters: Any) -> Series:
        body = self._http.get(f"/api/v1/{path}", params=parameters).json()
        if body["status"] != "success":
            raise SystemExit(f"{parameters['query']}: {body.get('error')}")
        found = body["data"]["result"]
        return [{"metric": {}, "value": found}] if body["data"]["resultType"] == "scalar" else found


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the panels that show something, those of collapsed rows included."""
    for panel in dashboard["panels"]:
        yield from panel.get("panels") or ()
        if panel["type"] != "row":
            yield panel


def picture(dashboard: dict[str, Any], source: Source) -> Figure:
    """Draw a dashboard."""
    shown = [panel for panel in panels(dashboard) if panel["type"] != "text"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in shown)
    figure = Figure(figsize=(COLUMNS * INCHES, height * INCHES * 0.55 + 0.5), facecolor="white", layout=None)
    figure.text(0.008, 1 - 0.3 / figure.get_figheight(), dashboard["title"], fontsize=14, weight="bold", va="center")
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            _heading(figure, panel, height)
    for panel in shown:
        _panel(figure, panel, source, height)
    return figure


def _heading(figure: Figure, row: dict[str, Any], height: int) -> None:
    top = 1 - 0.5 / figure.get_figheight()
    middle = top * (1 - (row["gridPos"]["y"] + row["gridPos"]["h"] / 2) / height)
    figure.text(0.008, middle, row["title"], fontsize=10, color="#5c6670", va="center")


def _panel(figure: Figure, panel: dict[str, Any], source: Source, height: int) -> None:
    place, top = panel["gridPos"], 1 - 0.5 / figure.get_figheight()
    row = top / height
    left, width = place["x"] / COLUMNS, place["w"] / COLUMNS
    bottom, tall = top - (place["y"] + place["h"]) * row, place["h"] * row
    figure.patches.append(
        mpl.patches.FancyBboxPatch(
            (left + 0.003, bottom + 0.003),
            width - 0.006,
            tall - 0.006,
            boxstyle="round,pad=0,rounding_size=0.004",
            transform=figure.transFigure,
            facecolor="#fbfbfc",
            edgecolor="#d8dbe0",
            zorder=-1,
        )
    )
    head = 0.26 / figure.get_figheight()
    figure.text(left + 0.01, bottom + tall - 0.006 - head / 2, panel["title"], fontsize=9, weight="bold", va="center")
    margin = 0.0 if panel["type"] in ("stat", "gauge", "table") else 0.045
    foot = 0.0 if panel["type"] in ("stat", "gauge", "table") else 0.62 / figure.get_figheight()
    axes = figure.add_axes((left + 0.01 + margin, bottom + 0.008 + foot, width - 0.025 - margin, tall - 0.016 - head - foot))
    axes.tick_params(labelsize=7, length=0)
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    draw = {"timeseries": _lines, "heatmap": _heat, "bargauge": _bars, "barchart": _bars, "piechart": _bars, "table": _table}
    draw.get(panel["type"], _numbers)(axes, panel, source)


def _found(panel: dict[str, Any], ask: Query) -> list[tuple[str, dict[str, Any]]]:
    """Return each series of a panel with its name."""
    return [
        (_name(target, series["metric"], panel), series)
        for target in panel["targets"]
        if not target.get("hide")
        for series in ask(target["expr"])
    ]


def _name(target: dict[str, Any], labels: dict[str, str], panel: dict[str, Any]) -> str:
    legend = target.get("legendFormat") or ""
    if legend in ("", "__auto"):
        return " ".join(value for name, value in labels.items() if name != "__name__") or panel["title"]
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: labels.get(match[1], ""), legend)


def _lines(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    custom = panel["fieldConfig"]["defaults"].get("custom", {})
    stacked = custom.get("stacking", {}).get("mode", "none") != "none"
    below: dict[float, float] = {}
    shown = _found(panel, source.over)
    for number, (name, series) in enumerate(shown):
        points = [(float(at), float(value)) for at, value in series["values"]]
        points = [(at, value) for at, value in points if math.isfinite(value)]
        colour = COLOURS[number % len(COLOURS)]
        times = [(at - source.window.start) / 60 for at, _ in points]
        if stacked:
            low = [below.get(at, 0.0) for at, _ in points]
            high = [lower + value for lower, (_, value) in zip(low, points, strict=True)]
            axes.fill_between(times, low, high, color=colour, alpha=0.55, label=name, linewidth=0)
            below |= {at: value for (at, _), value in zip(points, high, strict=True)}
        else:
            axes.plot(times, [value for _, value in points], color=colour, linewidth=1.3, label=name)
    axes.set_xlim(0, (source.window.end - source.window.start) / 60)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    unit = _unit(panel)
    axes.yaxis.set_major_formatter(lambda value, _: unit(value))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} min")
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.6)
    if shown:
        columns = max(1, min(len(shown), panel["gridPos"]["w"] // 3))
        axes.legend(fontsize=6.5, frameon=False, ncols=columns, loc="upper left", bbox_to_anchor=(-0.02, -0.1), handlelength=1.2)


def _heat(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    """Draw a histogram over time: each cell is what lies in its bucket and not in the one below."""
    found = ((_edge(series["metric"]["le"]), series) for _, series in _found(panel, source.over))
    rows = sorted(found, key=lambda row: row[0])
    times = sorted({float(at) for _, series in rows for at, _ in series["values"]})
    table: list[list[float]] = []
    before = dict.fromkeys(times, 0.0)
    for _, series in rows:
        now = {float(at): float(value) for at, value in series["values"]}
        table.append([max(0.0, now.get(at, 0.0) - before[at]) for at in times])
        before |= now
    if table:
        minutes = [(at - source.window.start) / 60 for at in times]
        axes.pcolormesh(minutes, range(len(rows)), table, cmap="YlGnBu", shading="nearest")
    axes.set_yticks(range(len(rows)), ["∞" if math.isinf(edge) else f"{edge:g}" for edge, _ in rows])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} min")


def _edge(text: str) -> float:
    return math.inf if text == "+Inf" else float(text)


def _bars(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    found = [(name, float(series["value"][1])) for name, series in _found(panel, source.now)]
    found = [(name, value) for name, value in found if math.isfinite(value)]
    unit = _unit(panel)
    axes.barh(
        [name for name, _ in found], [value for _, value in found], color=[COLOURS[n % len(COLOURS)] for n in range(len(found))]
    )
    for row, (_, value) in enumerate(found):
        axes.text(value, row, f" {unit(value)}", va="center", fontsize=7)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda value, _: unit(value))
    axes.margins(x=0.18)


def _numbers(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    axes.axis("off")
    found, unit = _found(panel, source.now), _unit(panel)
    for number, (name, series) in enumerate(found):
        middle = (number + 0.5) / len(found)
        value = float(series["value"][1])
        axes.text(
            middle,
            0.55,
            unit(value),
            ha="center",
            va="center",
            fontsize=17 if len(found) < 3 else 12,
            color=_threshold(panel, value),
        )
        if len(found) > 1:
            axes.text(middle, 0.16, name, ha="center", va="center", fontsize=7, color="#5c6670")


def _table(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    axes.axis("off")
    unit = _unit(panel)
    for number, (name, series) in enumerate(_found(panel, source.now)[:12]):
        axes.text(0, 0.95 - 0.08 * number, name, fontsize=7, va="top")
        axes.text(1, 0.95 - 0.08 * number, unit(float(series["value"][1])), fontsize=7, va="top", ha="right")


def _threshold(panel: dict[str, Any], value: float) -> str:
    """Return the colour of the threshold that a value has reached."""
    steps = panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])
    names = {"green": "#2f9e62", "red": "#c4162a", "yellow": "#b8860b", "orange": "#c96a1b", "blue": "#3274d9", "text": "#1f2933"}
    reached = [step["color"] for step in steps if step["value"] is None or value >= step["value"]]
    return names.get(reached[-1], "#1f2933") if reached else "#1f2933"


def _unit(panel: dict[str, Any]) -> Callable[[float], str]:
    """Return what writes a value in the panel's unit."""
    name = panel["fieldConfig"]["defaults"].get("unit", "short")
    if name == "percentunit":
        return lambda value: f"{100 * value:.3g} %"
    if name in ("s", "dtdurations"):
        return lambda value: f"{value:.3g} s" if abs(value) >= 1 or not value else f"{1000 * value:.3g} ms"
    if name in ("bytes", "decbytes"):
        return lambda value: _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
    suffix = {"reqps": " req/s", "ops": " /s", "cps": " /s", "short": "", "none": ""}.get(
        name, f" {name.removeprefix('suffix:')}"
    )
    return lambda value: _scaled(value, 1000, ("", "k", "M", "G")) + suffix


def _scaled(value: float, base: int, names: Sequence[str]) -> str:
    if not math.isfinite(value):
        return "–"
    step = 0
    while abs(value) >= base and step + 1 < len(names):
        value, step = value / base, step + 1
    return f"{value:.3g} {names[step]}".rstrip()


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prometheus", help="base URL of Prometheus")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--minutes", type=float, default=60, help="how much of the past to show (%(default)g)")
    parser.add_argument("--rate", default="1m", help="what $__rate_interval becomes; four scrapes or more (%(default)s)")
    args = parser.parse_args()
    end = time.time()
    with Source(args.prometheus, Window(end - 60 * args.minutes, end, args.rate)) as source:
        for path in sorted(DASHBOARDS.glob("*.json")):
            out = args.out / f"dashboard-{path.stem}.png"
            picture(json.loads(path.read_text()), source).savefig(out, dpi=80)
            print(out)


if __name__ == "__main__":
    main()
