"""Writes the dashboards: ``python observability/grafana/build.py [FOLDER]``, into ``dashboards/`` beside this file unless told.

Grafana's JSON says the same dozen things of every panel; here each panel says only what is its own. Change a dashboard here, not
in the JSON; a test holds the two together. Only what Grafana 11 and 12 both read is used.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]

SCHEMA_VERSION = 39
"""Of Grafana 11.0; later ones migrate it when they load it."""
WIDTH = 24
"""Columns of Grafana's grid."""
EVALUATION_SECONDS = 15
"""Between two values of the recorded engine-seconds (group ergo-engine-seconds of the rules)."""

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
GATEWAY = 'job=~"$job", instance=~"$instance"'
VLLM = 'model_name=~"$model"'

NOW = "$__rate_interval"
RANGE = "$__range"

NO_VLLM = "no vLLM is scraped"

GREEN, YELLOW, RED, NEUTRAL = "green", "yellow", "red", "text"
Steps = Sequence[tuple[float | None, str]]
GOOD_ABOVE_QUARTER: Steps = ((None, RED), (0, YELLOW), (0.25, GREEN))
NO_JUDGEMENT: Steps = ((None, NEUTRAL),)


# --- PromQL ---------------------------------------------------------------------------------------------------------------------


def select(metric: str, where: str = "") -> str:
    """Return a selector of the chosen gateways, or of the chosen models of vLLM."""
    chosen = VLLM if metric.startswith("vllm:") else GATEWAY
    return f"{metric}{{{chosen}{', ' if where else ''}{where}}}"


def rate(metric: str, where: str = "", by: str = "") -> str:
    """Return a sum of rates a second, over the shortest window that holds enough scrapes."""
    return f"sum{_by(by)}(rate({select(metric, where)}[{NOW}]))"


def increase(metric: str, where: str = "", by: str = "") -> str:
    """Return a sum of what was added within the dashboard's time range."""
    return f"sum{_by(by)}(increase({select(metric, where)}[{RANGE}]))"


def ratio(part: str, whole: str) -> str:
    """Return a quotient of sums; no value, rather than NaN, where there was no traffic."""
    return f"{part} / ({whole} > 0)"


def share(parts: str, whole: str) -> str:
    """Return the quotient of each of several sums by one."""
    return f"{parts} / on () group_left () ({whole} > 0)"


def quantile(which: float, histogram: str, where: str = "", by: str = "") -> str:
    """Return a quantile of a histogram; no value, rather than NaN, where there was no traffic."""
    return f"histogram_quantile({which:g}, {rate(f'{histogram}_bucket', where, f'{by}, le' if by else 'le')}) >= 0"


def mean(histogram: str, where: str = "", by: str = "") -> str:
    """Return the mean of a histogram."""
    return ratio(rate(f"{histogram}_sum", where, by), rate(f"{histogram}_count", where, by))


def _by(labels: str) -> str:
    return f" by ({labels}) " if labels else ""


# --- Panels ---------------------------------------------------------------------------------------------------------------------

Query = tuple[str, str]
"""An expression, and the legend of its series."""


def panel(kind: str, title: str, description: str, queries: Sequence[Query] = (), **more: Any) -> Json:
    """Return a panel without its place; ``more`` is laid over what Grafana would assume."""
    targets = [
        {"refId": chr(ord("A") + number), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
        for number, (expression, legend) in enumerate(queries)
    ]
    return {"type": kind, "title": title, "description": description, "datasource": SOURCE, "targets": targets} | more


def field(unit: str, steps: Steps = NO_JUDGEMENT, **more: Any) -> Json:
    """Return how values are shown.

    Args:
        unit: Grafana's name of it.
        steps: colour from each value on; the first from None, that is from minus infinity.
        more: ``min``, ``max``, ``decimals``, ``noValue``, ``mappings``, ``custom``.
    """
    thresholds = {"mode": "absolute", "steps": [{"value": value, "color": colour} for value, colour in steps]}
    return {"defaults": {"unit": unit, "thresholds": thresholds, **more}, "overrides": []}


def stat(
    title: str,
    description: str,
    queries: Sequence[Query],
    unit: str,
    steps: Steps = NO_JUDGEMENT,
    *,
    named: bool = False,
    **more: Any,
) -> Json:
    """Return one number, or one a series; ``named`` shows the legend beside a single one too.

    What is asked over the whole range is asked once, at its end.
    """
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "none",
        "textMode": "value_and_name" if named else "auto",
    }
    made = panel("stat", title, description, queries, fieldConfig=field(unit, steps, **more), options=options)
    for target in made["targets"]:
        target["instant"] = RANGE in target["expr"]
    return made


def bars(title: str, description: str, queries: Sequence[Query], unit: str, steps: Steps = NO_JUDGEMENT, **more: Any) -> Json:
    """Return a horizontal bar for each series."""
    made = stat(title, description, queries, unit, steps, **more)
    options = {"reduceOptions": made["options"]["reduceOptions"], "orientation": "horizontal", "displayMode": "basic"}
    return made | {"type": "bargauge", "options": options}


def lines(
    title: str,
    description: str,
    queries: Sequence[Query],
    unit: str,
    steps: Steps = NO_JUDGEMENT,
    *,
    stack: str = "none",
    axis: str = "",
    dashed: str = "",
    right: tuple[str, str] | None = None,
    **more: Any,
) -> Json:
    """Return series over time.

    Args:
        stack: ``none``, ``normal`` or ``percent``.
        axis: label of the axis.
        dashed: the series that is drawn as a dashed line beside the stack.
        right: the series that has an axis of its own, and its unit.
        title, description, queries, unit, steps, more: as of `panel` and `field`.
    """
    custom = {
        "lineWidth": 1,
        "fillOpacity": 10 if stack == "none" else 60,
        "showPoints": "never",
        "stacking": {"mode": stack, "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if len(steps) > 1 else "off"},
        "axisLabel": axis,
    }
    options = {
        "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["mean", "lastNotNull"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    config = field(unit, steps, custom=custom, color={"mode": "palette-classic"}, **{"min": 0, **more})
    if dashed:
        line = {"fill": "dash", "dash": [10, 10]}
        apart = {"stacking": {"mode": "none", "group": "A"}, "fillOpacity": 0, "lineWidth": 2, "lineStyle": line}
        config["overrides"] += [_override(dashed, {f"custom.{name}": value for name, value in apart.items()})]
    if right:
        config["overrides"] += [_override(right[0], {"unit": right[1], "custom.axisPlacement": "right"})]
    return panel("timeseries", title, description, queries, fieldConfig=config, options=options)


def _override(series: str, values: Json) -> Json:
    properties = [{"id": name, "value": value} for name, value in values.items()]
    return {"matcher": {"id": "byName", "options": series}, "properties": properties}


def heat(title: str, description: str, histogram: str, unit: str, where: str = "") -> Json:
    """Return a histogram over time: how many observations fell into each bucket."""
    made = panel(
        "heatmap",
        title,
        description,
        [(f"sum by (le) (increase({select(f'{histogram}_bucket', where)}[{NOW}]))", "{{le}}")],
        fieldConfig=field("short", custom={"scaleDistribution": {"type": "linear"}}),
        options={
            "calculate": False,
            "cellGap": 1,
            "color": {"mode": "scheme", "scheme": "Blues", "steps": 64, "exponent": 0.5, "fill": "dark-blue"},
            "filterValues": {"le": 1e-9},
            "legend": {"show": True},
            "rowsFrame": {"layout": "le"},
            "tooltip": {"mode": "single", "yHistogram": False},
            "yAxis": {"axisPlacement": "left", "unit": unit},
        },
    )
    made["targets"][0]["format"] = "heatmap"
    return made


def states(title: str, description: str, queries: Sequence[Query], names: Sequence[tuple[str, str]]) -> Json:
    """Return what state each series was in over time; ``names`` has the name and colour of each, from 0 on."""
    told = {str(number): {"text": name, "color": colour, "index": number} for number, (name, colour) in enumerate(names)}
    return panel(
        "state-timeline",
        title,
        description,
        queries,
        fieldConfig=field("short", mappings=[{"type": "value", "options": told}], custom={"fillOpacity": 70, "lineWidth": 0}),
        options={"showValue": "never", "mergeValues": True, "legend": {"displayMode": "list", "placement": "bottom"}},
    )


def note(title: str, description: str, markdown: str) -> Json:
    """Return a panel of text."""
    return {"type": "text", "title": title, "description": description, "options": {"mode": "markdown", "content": markdown}}


# --- Dashboards -----------------------------------------------------------------------------------------------------------------

DASHBOARDS = {
    "savings": ("ergo-savings", "ERGO: savings"),
    "zoom-quality": ("ergo-zoom-quality", "ERGO: zoom quality"),
    "latency": ("ergo-latency", "ERGO: latency"),
    "reliability": ("ergo-reliability", "ERGO: reliability and capacity"),
}
"""File, uid and title."""


class Board:
    """A dashboard in the making.

    Args:
        name: of its file.
        description: what it is for.
    """

    def __init__(self, name: str, description: str) -> None:
        uid, title = DASHBOARDS[name]
        self._y = 0
        self._height = 0
        self._panels: list[Json] = []
        self.made: Json = {
            "id": None,
            "uid": uid,
            "title": title,
            "description": description,
            "tags": ["ergo-vqa"],
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "editable": False,
            "graphTooltip": 1,
            "time": {"from": "now-6h", "to": "now"},
            "refresh": "30s",
            "timezone": "",
            "links": [_link(*other) for file, other in DASHBOARDS.items() if file != name],
            "templating": {"list": _variables()},
            "annotations": {"list": [_alerts()]},
            "panels": self._panels,
        }

    def row(self, title: str, height: int) -> None:
        """Begin a row whose panels have this height."""
        self._height = height
        self._place({"type": "row", "title": title, "collapsed": False, "panels": []}, 0, WIDTH, 1)
        self._y += 1

    def shelf(self, *panels: Json) -> None:
        """Put panels beside each other; they share the width."""
        width = WIDTH // len(panels)
        for number, content in enumerate(panels):
            self._place(content, number * width, width, self._height)
        self._y += self._height

    def _place(self, content: Json, x: int, width: int, height: int) -> None:
        self._panels.append({"id": len(self._panels) + 1, "gridPos": {"x": x, "y": self._y, "w": width, "h": height}} | content)


def _link(uid: str, title: str) -> Json:
    return {"type": "link", "title": title, "url": f"/d/{uid}", "icon": "dashboard", "keepTime": True, "includeVars": True}


def _variables() -> list[Json]:
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1}
    return [
        source,
        _variable("job", "Job", "label_values(ergo_build_info, job)"),
        _variable("instance", "Gateway", 'label_values(ergo_build_info{job=~"$job"}, instance)'),
        _variable("model", "Model of vLLM", "label_values(vllm:num_requests_running, model_name)"),
    ]


def _variable(name: str, label: str, query: str) -> Json:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        # Else "all" is the list of those that there are, which is empty where there are none.
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _alerts() -> Json:
    return {
        "name": "Alerts",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": 'ALERTS{alertname=~"(Ergo|Vllm).*", alertstate="firing"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{severity}}",
        "step": "60s",
    }


# --- Savings --------------------------------------------------------------------------------------------------------------------

BASELINE = "than the same model without zoom, at most 16,384 an image"
PROCESSED_TOKENS = "ergo_visual_tokens_total"
BASELINE_TOKENS = "ergo_visual_tokens_baseline_total"
LARGE = 'size!="to_2mp"'
SAVED_SECONDS = f"sum_over_time(all:ergo_saved:engine_seconds_rate5m[{RANGE}]) * {EVALUATION_SECONDS}"

SIZES = "Sizes are those of the original: to 2, 8, 32 megapixels, and above."


def saved_now(where: str = "") -> str:
    """Return the part of the baseline that is not spent now."""
    return f"1 - {ratio(rate(PROCESSED_TOKENS, where), rate(BASELINE_TOKENS, where))}"


def saved_over_range(by: str = "") -> str:
    """Return the part of the baseline that was not spent within the range."""
    return f"1 - {ratio(increase(PROCESSED_TOKENS, by=by), increase(BASELINE_TOKENS, by=by))}"


def per_question(kind: str) -> str:
    """Return the mean visual tokens of a question within the range."""
    where = f'kind="{kind}"'
    name = "ergo_visual_tokens_per_request"
    return ratio(increase(f"{name}_sum", where), increase(f"{name}_count", where))


ESTIMATE = """\
**saved = p × (B − V) − d × Z**, in engine-seconds a second

| | |
|---|---|
| B, V | visual tokens a second: baseline, and processed |
| Z | tokens a second that zoom turns generate |
| p | engine-seconds of prefill by prompt token computed |
| d | engine-seconds of decode by token generated |

p and d are vLLM's own times of its requests, divided by how many it worked on at once (at least 1), so that an engine never
works more than one second a second. With one GPU an engine these are GPU-seconds.

Assumed: a token of the baseline would have cost what a token costs now (attention makes long prompts dearer: the estimate is
low); the overview is computed once (see prefix reuse); these gateways are the engines' only clients.
"""


def savings() -> Json:
    """Return what zoom saves, and what it costs."""
    board = Board(
        "savings",
        f"Visual tokens spent beside the baseline: what the same model would have spent, {BASELINE.removeprefix('than ')}.",
    )

    board.row("In short", height=5)
    board.shelf(
        stat(
            "Saved now",
            f"Part of the visual tokens that is not spent, {BASELINE}: one minus the ratio of the sums, over the last "
            "scrapes with traffic. Good: above 50 % where images have 4 megapixels or more. Below 0, zoom costs more "
            "than it saves.",
            [(saved_now(), "saved")],
            "percentunit",
            GOOD_ABOVE_QUARTER,
            max=1,
        ),
        stat(
            "Saved over the range",
            f"The same over the whole time range, {BASELINE}. Good: steady from day to day; it moves with the images "
            "that are asked about and with the budget.",
            [(saved_over_range(), "saved")],
            "percentunit",
            GOOD_ABOVE_QUARTER,
            max=1,
        ),
        stat(
            "Tokens not spent",
            f"Baseline less processed over the range: fewer visual tokens {BASELINE}. Good: positive, and growing with traffic.",
            [(f"{increase(BASELINE_TOKENS)} - {increase(PROCESSED_TOKENS)}", "tokens")],
            "short",
            ((None, RED), (0, GREEN)),
        ),
        stat(
            "Tokens a question",
            "Mean visual tokens of a question over the range: processed, each view once, and baseline. Good: processed "
            "at most twice the budget, plus the images of the conversation.",
            [(per_question("total"), "processed"), (per_question("baseline"), "baseline")],
            "short",
            decimals=0,
        ),
        stat(
            "GPU-seconds saved",
            "Estimated over the range, one GPU an engine, net of what zoom turns generate; formula and assumptions are "
            "beside the graph below. Good: positive. Negative: replies of zoom turns cost more than the tokens they "
            "save, as with small images.",
            [(SAVED_SECONDS, "saved")],
            "s",
            ((None, RED), (0, GREEN)),
            noValue=NO_VLLM,
        ),
    )

    board.row("Visual tokens", height=9)
    board.shelf(
        lines(
            "Baseline against processed",
            f"Visual tokens a second: what was shown to the model, by view, stacked; dashed what it would have been "
            f"without zoom (at most 16,384 an image). Good: the stack well below the line. {SIZES}",
            [
                (rate(PROCESSED_TOKENS, by="kind"), "{{kind}}"),
                (rate(BASELINE_TOKENS), "baseline"),
            ],
            "short",
            stack="normal",
            axis="tokens/s",
            dashed="baseline",
        ),
        lines(
            "Part saved",
            f"Of the visual tokens, {BASELINE}: of all images, and of those above 2 megapixels, below which there is "
            "little to save. Good: large images above 50 %; the alert ErgoTokenSavingsLow is at 25 %.",
            [(saved_now(), "all images"), (saved_now(LARGE), "above 2 megapixels")],
            "percentunit",
            GOOD_ABOVE_QUARTER,
            min=None,
            max=1,
        ),
    )
    board.shelf(
        heat(
            "Processed, a question",
            "How many questions took how many visual tokens, all views together. Good: nothing above twice the budget "
            "(2,560 where it is 1,280), unless conversations bring further images.",
            "ergo_visual_tokens_per_request",
            "short",
            'kind="total"',
        ),
        heat(
            "Baseline, a question",
            "How many questions would have taken how many visual tokens without zoom, at most 16,384 an image. What "
            "lies above the picture to the left is what can be saved. There is no good or bad in it.",
            "ergo_visual_tokens_per_request",
            "short",
            'kind="baseline"',
        ),
    )
    board.shelf(
        bars(
            "Part saved, by size of the image",
            f"Over the range, {BASELINE}. {SIZES} Good: the larger the image, the more; above 8 megapixels more than "
            "80 %. Images to 2 megapixels may be below 0.",
            [(saved_over_range("size"), "{{size}}")],
            "percentunit",
            GOOD_ABOVE_QUARTER,
            min=0,
            max=1,
        ),
        bars(
            "Baseline, by size of the image",
            f"Where the tokens would have gone over the range: the part of each size in the baseline. {SIZES} It "
            "explains a change of the part saved. There is no good or bad in it.",
            [
                (
                    share(increase(BASELINE_TOKENS, by="size"), increase(BASELINE_TOKENS)),
                    "{{size}}",
                )
            ],
            "percentunit",
            min=0,
            max=1,
        ),
    )

    board.row("What the engine computes", height=9)
    board.shelf(
        lines(
            "Prompt tokens, computed and cached",
            "Prompt tokens a second that the engine computed, and those that its prefix cache held: the answer turn says "
            "again what the zoom turn said. Good: cached at least the prompts of the zoom turns. An engine that does not "
            "report its cache shows none.",
            [
                (rate("ergo_engine_prompt_tokens_total", 'cached="false"'), "computed"),
                (rate("ergo_engine_prompt_tokens_total", 'cached="true"'), "cached"),
            ],
            "short",
            stack="normal",
            axis="tokens/s",
        ),
        lines(
            "Prompt tokens computed, by turn",
            "Good: the answer turn computes about the crop and the question, not the overview again; so it is not much "
            "above the zoom turn.",
            [(rate("ergo_engine_prompt_tokens_total", 'cached="false"', by="turn"), "{{turn}}")],
            "short",
            stack="normal",
            axis="tokens/s",
        ),
        lines(
            "Prefix reuse",
            "Cached tokens of the answer turn by prompt tokens of the zoom turn. Good: a median above 0.9. Lower: the two "
            "turns reach different replicas, or the cache is too small; the alert ErgoPrefixReuseLow is at 0.5.",
            [
                (quantile(0.5, "ergo_prefix_reuse_ratio"), "median"),
                (quantile(0.1, "ergo_prefix_reuse_ratio"), "lowest tenth"),
            ],
            "percentunit",
            ((None, RED), (0.5, GREEN)),
            max=1,
        ),
    )
    board.shelf(
        lines(
            "Engine-seconds saved a second (estimate)",
            "What the visual tokens not spent would have cost in prefill, less what zoom turns cost in decode, beside what "
            "the engines spend on each. Formula and assumptions are in the panel to the right. Good: saved above 0. Of all "
            "gateways and engines of this Prometheus.",
            [
                ("all:ergo_saved:engine_seconds_rate5m", "saved"),
                ("all:vllm_prefill:engine_seconds_rate5m", "spent on prefill"),
                ("all:vllm_decode:engine_seconds_rate5m", "spent on decode"),
            ],
            "short",
            axis="s/s",
            min=None,
            noValue=NO_VLLM,
        ),
        note(
            "How it is estimated",
            "The formula of the panel to the left and of GPU-seconds saved, and what it takes for granted. Good: to have "
            "read it before the number is quoted.",
            ESTIMATE,
        ),
    )
    return board.made


# --- Zoom quality ---------------------------------------------------------------------------------------------------------------

ZOOMS = "ergo_zoom_total"
ATTEMPTED = 'outcome!="skipped"'
AREA = "ergo_zoom_area_ratio"
MAGNIFICATION = "ergo_zoom_magnification"
REGION_REWARD = "ergo_reward_region_total"


def zoom_quality() -> Json:
    """Return whether zooming works as trained."""
    found, lost = 'outcome=~"zoomed|clamped"', 'outcome=~"no_box|invalid_box"'
    board = Board("zoom-quality", "What becomes of the zoom: boxes, regions, magnification, and answers that can be read.")

    board.row("In short", height=5)
    board.shelf(
        stat(
            "Usable boxes",
            "Zoom turns over the range whose box could be cropped. Good: above 99 %; a trained checkpoint with its own "
            "prompts rarely fails. The alert ErgoZoomFailureHigh is at 90 %.",
            [(ratio(increase(ZOOMS, found), increase(ZOOMS, ATTEMPTED)), "usable")],
            "percentunit",
            ((None, RED), (0.9, YELLOW), (0.98, GREEN)),
            max=1,
        ),
        stat(
            "Zoom left out",
            "Questions over the range without a zoom turn: the image fits the budget, or the caller wanted none. Good: as "
            "many as there are small images; most of them means that zoom is not what these images need.",
            [(ratio(increase(ZOOMS, 'outcome="skipped"'), increase(ZOOMS)), "left out")],
            "percentunit",
            max=1,
        ),
        stat(
            "Median area",
            "Half of the regions are smaller than this part of the image. Good: well below 0.6, the paper's γ: a larger "
            "box earns no reward in training.",
            [(quantile(0.5, AREA), "area")],
            "percentunit",
            ((None, GREEN), (0.6, YELLOW)),
            max=1,
        ),
        stat(
            "Median magnification",
            "Crop pixels by overview pixel, linear: what the second look adds. Good: 2 and more; 1 shows nothing new.",
            [(quantile(0.5, MAGNIFICATION), "magnification")],
            "suffix: ×",
            ((None, RED), (1.2, YELLOW), (2, GREEN)),
            decimals=1,
        ),
        stat(
            "Tagged answers",
            "Answers over the range in the form that the model was trained to give. Good: above 99 %.",
            [(ratio(increase("ergo_answers_total", 'parse="tagged"'), increase("ergo_answers_total")), "tagged")],
            "percentunit",
            ((None, RED), (0.9, YELLOW), (0.98, GREEN)),
            max=1,
        ),
    )

    board.row("Boxes", height=9)
    board.shelf(
        lines(
            "What became of the zoom",
            "Part of each outcome among the questions. Good: zoomed nearly all; clamped (partly outside of the image) few; "
            "no_box and invalid_box next to none: those are answered from the whole image within the budget.",
            [(rate(ZOOMS, by="outcome"), "{{outcome}}")],
            "short",
            stack="percent",
        ),
        lines(
            "Zoom turns without a usable box",
            "Part of the zoom turns, questions without one left out. Good: below 1 %; above 10 % for 15 minutes the alert "
            "ErgoZoomFailureHigh fires.",
            [(ratio(rate(ZOOMS, lost), rate(ZOOMS, ATTEMPTED)), "no usable box")],
            "percentunit",
            ((None, GREEN), (0.1, RED)),
        ),
        lines(
            "Answers by how they could be read",
            "Good: tagged nearly all. Untagged: other prompts than the checkpoint was trained with. Empty or truncated: "
            "the reply ran into its token limit.",
            [(rate("ergo_answers_total", by="parse"), "{{parse}}")],
            "short",
            stack="percent",
        ),
    )

    board.row("Regions", height=9)
    board.shelf(
        heat(
            "Area of the region",
            "Of the image's area, for every question with a zoom turn. Good: most below 0.25; the row that ends in 1 is "
            "the whole image, where there was no usable box.",
            AREA,
            "percentunit",
        ),
        lines(
            "Area of the region, quantiles",
            "Good: the median steady and far below the dashed 0.6 (the paper's γ). A drift upwards: the model hedges, and "
            "looks closer at nothing.",
            [(quantile(q, AREA), name) for q, name in ((0.1, "lowest tenth"), (0.5, "median"), (0.9, "highest tenth"))],
            "percentunit",
            ((None, GREEN), (0.6, RED)),
            max=1,
        ),
        lines(
            "Regions above 0.6",
            "Part of the zooms whose region is larger than γ = 0.6 of the image. Good: below 10 %.",
            [("1 - " + ratio(rate(f"{AREA}_bucket", 'le="0.6"'), rate(f"{AREA}_count")), "above γ")],
            "percentunit",
            ((None, GREEN), (0.1, YELLOW)),
        ),
    )
    board.shelf(
        heat(
            "Magnification",
            "Crop pixels by overview pixel, linear. Good: most between 2 and 8. Above 16 the crop is of a few pixels.",
            MAGNIFICATION,
            "short",
        ),
        lines(
            "Magnification, quantiles",
            "Good: the median above the dashed 2. Near 1 the images are hardly larger than the budget, or the boxes are "
            "as large as the image.",
            [(quantile(q, MAGNIFICATION), name) for q, name in ((0.1, "lowest tenth"), (0.5, "median"), (0.9, "highest tenth"))],
            "short",
            ((None, YELLOW), (2, GREEN)),
        ),
        lines(
            "Pixels of the views, median",
            "Original, overview and crop. Good: overview and crop at or below the budget (784 pixels a visual token: 1.0 "
            "million at 1,280); the original far above, or there is nothing to zoom into.",
            [(quantile(0.5, "ergo_image_pixels", by="kind"), "{{kind}}")],
            "short",
        ),
    )

    board.row("Rewards", height=9)
    board.shelf(
        lines(
            "The paper's rewards",
            "Of the zoomed questions: the region within 0.6 of the image (box), both replies of the right tags (format); of "
            "those asked again with the crop alone (ERGO_VERIFY_FRACTION) the answer that was served (region). Good: box and "
            "format near 1. Region is an agreement, not a score: watch whether it falls, not how high it stands.",
            [
                (ratio(rate("ergo_reward_box_total", 'value="1"'), rate("ergo_reward_box_total")), "box"),
                (ratio(rate("ergo_reward_format_total", 'value="1"'), rate("ergo_reward_format_total")), "format"),
                (ratio(rate(REGION_REWARD, 'outcome="agrees"'), rate(REGION_REWARD, 'outcome=~"agrees|differs"')), "region"),
            ],
            "percentunit",
            max=1,
        ),
        lines(
            "Questions asked again with the crop alone",
            "A second, by what came of it. Good: dropped only under load. Nothing without ERGO_VERIFY_FRACTION.",
            [(rate(REGION_REWARD, by="outcome"), "{{outcome}}")],
            "reqps",
            stack="normal",
        ),
    )

    board.row("Images", height=9)
    board.shelf(
        lines(
            "Images by source",
            "Images of questions a second, by how they came. There is no good or bad in it, but a change explains others.",
            [(rate("ergo_images_total", by="source"), "{{source}}")],
            "short",
            stack="normal",
            axis="images/s",
        ),
        lines(
            "Images by format",
            "Likewise by format. JPEG can be decoded at reduced size for the overview, PNG cannot: more PNG is more work. "
            "There is no good or bad in it.",
            [(rate("ergo_images_total", by="format"), "{{format}}")],
            "short",
            stack="normal",
            axis="images/s",
        ),
        heat(
            "Bytes of an image",
            "As sent. Good: below the limit of the body by a wide margin; a row near the top foretells image_too_large.",
            "ergo_image_bytes",
            "decbytes",
        ),
    )
    return board.made


# --- Latency --------------------------------------------------------------------------------------------------------------------

QUESTION = "ergo_request_duration_seconds"
FIRST_TOKEN = "ergo_time_to_first_token_seconds"
TURN = "ergo_engine_request_duration_seconds"
OBJECTIVE: Steps = ((None, GREEN), (8, RED))
PERCENTILES = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))


def latency() -> Json:
    """Return where the time goes."""
    board = Board("latency", "How long questions take, and where the time goes; the engine's own times beside the gateway's.")

    board.row("In short", height=5)
    board.shelf(
        stat(
            "Median",
            "Half of the questions are answered within this time, the body's arrival and the wait for a place left out. "
            "Good: about the sum of the two turns below.",
            [(quantile(0.5, QUESTION), "p50")],
            "s",
        ),
        stat(
            "95th percentile",
            "All but one question in twenty are answered within this time. Good: below 8 s, the objective.",
            [(quantile(0.95, QUESTION), "p95")],
            "s",
            OBJECTIVE,
        ),
        stat(
            "First token, 95th percentile",
            "From the start to the first visible piece of the answer: zoom turn and reasoning included. Good: below 6 s.",
            [(quantile(0.95, FIRST_TOKEN), "p95")],
            "s",
            ((None, GREEN), (6, YELLOW)),
        ),
        stat(
            "Within 8 s",
            "Questions over the range that took at most 8 s. Good: 95 %, the objective.",
            [(ratio(increase(f"{QUESTION}_bucket", 'le="8.0"'), increase(f"{QUESTION}_count")), "within 8 s")],
            "percentunit",
            ((None, RED), (0.95, GREEN)),
            max=1,
        ),
    )

    board.row("Questions", height=9)
    board.shelf(
        lines(
            "End to end",
            "Time to answer a question, well or not; without the body's arrival and the wait for a place. Good: p95 below "
            "the dashed 8 s, and p99 not far from it.",
            [(quantile(q, QUESTION), name) for q, name in PERCENTILES],
            "s",
            OBJECTIVE,
        ),
        lines(
            "With zoom and without",
            "End to end by policy: ergo looks twice, single once. Good: the zoom costs its turn and little more.",
            [(quantile(q, QUESTION, by="policy"), f"{{{{policy}}}} {name}") for q, name in PERCENTILES[:2]],
            "s",
        ),
        heat(
            "End to end, all questions",
            "How many questions took how long. Good: one band, or two where some are asked without zoom; what lies above 8 s "
            "(where a bucket ends) is slow by the objective.",
            QUESTION,
            "s",
        ),
    )
    board.shelf(
        lines(
            "First token",
            "From the start to the first visible piece of the answer; streaming or not. Good: the shape of end to end, "
            "less the time in which the answer is written.",
            [(quantile(q, FIRST_TOKEN), name) for q, name in PERCENTILES],
            "s",
        ),
        lines(
            "Stages",
            "Mean seconds that a question spends in each, stacked. Good: zoom_turn and answer_turn are nearly all of it; "
            "decode, overview and crop stay thin. What can be done while the body arrives or the engine works, is.",
            [
                (
                    share(rate("ergo_stage_duration_seconds_sum", by="stage"), rate(f"{QUESTION}_count")),
                    "{{stage}}",
                )
            ],
            "s",
            stack="normal",
        ),
        lines(
            "HTTP, 95th percentile by route",
            "From the head of the request to the last byte of the answer: what a caller sees, slow senders included. Good: "
            "close to end to end; far above, bodies come slowly or wait for a place.",
            [
                (
                    quantile(0.95, "ergo_http_request_duration_seconds", 'code_class="2xx", route=~"/v1/.+"', "route"),
                    "{{route}}",
                )
            ],
            "s",
        ),
    )

    board.row("Turns, as the gateway sees them", height=9)
    board.shelf(
        lines(
            "Zoom turn against answer turn",
            "One exchange with the engine, from the request to the last token. Good: the answer turn hardly longer than the "
            "zoom turn, as its overview comes from the prefix cache.",
            [(quantile(q, TURN, by="turn"), f"{{{{turn}}}} {name}") for q, name in PERCENTILES[:2]],
            "s",
        ),
        lines(
            "Tokens generated, a turn",
            "Mean completion tokens of a turn: time follows them. Good: steady. Near 1,024 replies run into their limit.",
            [
                (
                    ratio(
                        rate("ergo_engine_completion_tokens_total", by="turn"),
                        rate("ergo_engine_requests_total", 'outcome="ok"', "turn"),
                    ),
                    "{{turn}}",
                )
            ],
            "short",
        ),
        lines(
            "Queue and first token, by the engine's report",
            "Means by turn, of what the engine says of each request (vLLM with --enable-per-request-metrics; empty with an "
            "engine that says nothing). Good: queue near 0; the first token of the answer turn no later than the zoom turn's.",
            [
                (mean("ergo_engine_queue_seconds", by="turn"), "{{turn}}: queue"),
                (mean("ergo_engine_first_token_seconds", by="turn"), "{{turn}}: first token"),
            ],
            "s",
            noValue="the engine reports none",
        ),
    )

    board.row("Turns, as vLLM sees them", height=9)
    board.shelf(
        lines(
            "Queue, prefill and decode",
            "Mean seconds of a request in each phase, stacked. Good: queue next to nothing. Prefill grows with the budget, "
            "decode with the reasoning.",
            [(mean(f"vllm:request_{phase}_time_seconds"), phase) for phase in ("queue", "prefill", "decode")],
            "s",
            stack="normal",
            noValue=NO_VLLM,
        ),
        lines(
            "vLLM end to end",
            "Time of one request within vLLM. Good: close to the turns above; the difference is spent on the way, and on "
            "images before vLLM's queue.",
            [(quantile(q, "vllm:e2e_request_latency_seconds"), name) for q, name in PERCENTILES],
            "s",
            noValue=NO_VLLM,
        ),
        lines(
            "vLLM first token",
            "Time to the first token of one request. Good: below a second, and steady: it rises first when the engine fills.",
            [(quantile(q, "vllm:time_to_first_token_seconds"), name) for q, name in PERCENTILES],
            "s",
            noValue=NO_VLLM,
        ),
    )
    return board.made


# --- Reliability and capacity ---------------------------------------------------------------------------------------------------

FETCHES = "ergo_image_fetches_total"
BURN_WINDOWS = ("5m", "1h", "6h", "1d", "3d")
CHOSEN_JOB = '{job=~"$job"}'
FULL: Steps = ((None, GREEN), (0.7, YELLOW), (0.9, RED))
PAGES: Steps = ((None, GREEN), (1, YELLOW), (6, RED))


def burn(metric: str, budget: float) -> list[Query]:
    """Return how many times too fast an error budget is spent, over each window."""
    return [(f"max(job:{metric}:ratio_rate{window}{CHOSEN_JOB}) / {budget:g}", window) for window in BURN_WINDOWS]


def full(used: str, limit: str) -> str:
    """Return the part of a limit that is in use on the gateway where it is most."""
    return f"max({select(used)} / {select(limit)})"


def state(name: str) -> str:
    """Return by gateway and engine whether the breaker is in a state, 0 or 1."""
    selector = select("ergo_circuit_breaker_state", f'state="{name}"')
    return f"max by (instance, engine) ({selector})"


def reliability() -> Json:
    """Return whether questions are answered, and how much more could be asked."""
    board = Board("reliability", "Whether questions are answered, why not, and how near the limits are.")

    board.row("In short", height=5)
    board.shelf(
        stat(
            "Alerts that fire",
            "Of observability/prometheus/rules/alerts.yml; each has a section in observability/RUNBOOK.md. Good: 0.",
            [('count(ALERTS{alertname=~"(Ergo|Vllm).*", alertstate="firing"}) or vector(0)', "alerts")],
            "short",
            ((None, GREEN), (1, RED)),
        ),
        stat(
            "Answered, of a day",
            "Questions answered, of those that were the server's to answer, over the last day. Good: 99.5 %, the objective. "
            "Not counted: what the caller must change, a tenant's own limits, who left.",
            [(f"1 - max(job:ergo_requests_failed:ratio_rate1d{CHOSEN_JOB})", "answered")],
            "percentunit",
            ((None, RED), (0.995, GREEN)),
            max=1,
            decimals=2,
        ),
        stat(
            "Within 8 s, of a day",
            "Questions that took at most 8 s, over the last day. Good: 95 %, the objective.",
            [(f"1 - max(job:ergo_requests_slow:ratio_rate1d{CHOSEN_JOB})", "within 8 s")],
            "percentunit",
            ((None, RED), (0.95, GREEN)),
            max=1,
            decimals=2,
        ),
        stat(
            "Questions",
            "A second, however they ended. Good: what you expect at this hour.",
            [(rate("ergo_requests_total"), "questions/s")],
            "short",
        ),
        stat(
            "Gateways and version",
            "Instances that answer Prometheus, by version. Good: as many as were started, and one version but for the minutes "
            "of a roll-out.",
            [(f"count by (version) ({select('ergo_build_info')})", "{{version}}")],
            "short",
            named=True,
        ),
    )

    board.row("Objectives", height=9)
    board.shelf(
        lines(
            "Availability: how fast the error budget is spent",
            "Failed questions by the 0.5 % that may fail, over windows. Good: below 1 in the long run. A page at 14.4 (1 h and "
            "5 m) and 6 (6 h and 30 m), a ticket at 3 (1 d and 2 h) and 1 (3 d and 6 h). No line: no questions.",
            burn("ergo_requests_failed", 0.005),
            "suffix: ×",
            PAGES,
        ),
        lines(
            "Latency: how fast the budget of slow questions is spent",
            "Questions above 8 s by the 5 % that may be, over windows. Good: below 1 in the long run; alerts as for "
            "availability.",
            burn("ergo_requests_slow", 0.05),
            "suffix: ×",
            PAGES,
        ),
    )
    board.shelf(
        lines(
            "Questions by outcome",
            "A second; ok apart from each error's code. Good: ok nearly all. engine_*, overloaded and internal_error are the "
            "server's fault, all others the caller's.",
            [(rate("ergo_requests_total", by="outcome") + " > 0", "{{outcome}}")],
            "short",
            stack="normal",
            axis="questions/s",
        ),
        lines(
            "HTTP by status",
            "Requests a second, probes left out. Good: 200. 499 are callers who left.",
            [(rate("ergo_http_requests_total", by="code") + " > 0", "{{code}}")],
            "reqps",
            stack="normal",
        ),
        lines(
            "Callers who left",
            "Questions a second whose caller left, by what was being done for them. Good: few. Many in the turns: answers come "
            "too late for their callers' patience.",
            [(rate("ergo_client_disconnects_total", by="stage"), "{{stage}}")],
            "short",
            stack="normal",
            axis="questions/s",
        ),
    )

    board.row("Turned away", height=9)
    board.shelf(
        lines(
            "Not let in",
            "Requests a second, by the limit that was reached. queue_full, queue_timeout and bytes_in_flight are the server's, "
            "rate_limit, token_budget and concurrency a tenant's. Good: none of the first three.",
            [(rate("ergo_admission_rejections_total", by="reason"), "{{reason}}")],
            "reqps",
            stack="normal",
        ),
        lines(
            "Images refused",
            "A second, by the error's code. Good: few, and the same few; a new reason is often a new client.",
            [(rate("ergo_image_rejections_total", by="reason"), "{{reason}}")],
            "short",
            stack="normal",
            axis="images/s",
        ),
        lines(
            "Remote images",
            "Fetches a second, by how they ended; those that never occurred are left out. Good: ok, or nothing where fetching "
            "is off. private_address, port and redirects in numbers: somebody looks for a way in.",
            [
                (
                    f"{rate(FETCHES, by='outcome')} > 0 or " + rate(FETCHES, 'outcome="ok"', "outcome"),
                    "{{outcome}}",
                ),
            ],
            "short",
            stack="normal",
            axis="fetches/s",
        ),
        lines(
            "Keys and connections",
            "A second: requests with no key or an unknown one, and connections turned away or cut off. Good: next to none.",
            [
                (rate("ergo_auth_failures_total", by="reason"), "key {{reason}}"),
                (rate("ergo_connections_refused_total", by="reason"), "connection {{reason}}"),
            ],
            "short",
            stack="normal",
            axis="1/s",
        ),
    )

    board.row("The engine", height=9)
    board.shelf(
        states(
            "Ready",
            "What the last readiness check saw, by gateway and engine. Good: ready throughout; it is not, while a checkpoint is "
            "loaded. Of several engines one that is not is asked last.",
            [(f"max by (instance, engine) ({select('ergo_engine_ready')})", "{{instance}} {{engine}}")],
            [("not ready", RED), ("ready", GREEN)],
        ),
        states(
            "Circuit breaker",
            "Good: closed throughout. Open: the engine failed several requests in a row, and is left alone for half a "
            "minute; half open: one request at a time tries whether it is back.",
            [
                (
                    f"2 * {state('open')} + {state('half_open')}",
                    "{{instance}} {{engine}}",
                )
            ],
            [("closed", GREEN), ("half open", YELLOW), ("open", RED)],
        ),
    )
    board.shelf(
        lines(
            "Turns by outcome",
            "Exchanges with the engine a second. Good: ok; cancelled are callers who left.",
            [(rate("ergo_engine_requests_total", by="outcome") + " > 0", "{{outcome}}")],
            "reqps",
            stack="normal",
        ),
        lines(
            "Second attempts",
            "Requests a second that the engine failed before any token: sent again, or not for want of budget. Good: none; "
            "budget_exhausted means an outage.",
            [(rate("ergo_engine_retries_total", by="outcome"), "{{outcome}}")],
            "reqps",
            stack="normal",
        ),
        lines(
            "Turns taken over",
            "Turns a second that another of several engines was asked for, by what was wrong with the one before. Good: none; "
            "0 throughout with one engine.",
            [(rate("ergo_engine_failovers_total", by="reason"), "{{reason}}")],
            "reqps",
            stack="normal",
        ),
    )

    board.row("Capacity of the gateway", height=9)
    board.shelf(
        lines(
            "Requests in work and waiting",
            "All gateways together. Good: queued 0 but for moments; a queue that stands means that the engine or the image "
            "threads are the limit.",
            [
                (f"sum({select('ergo_requests_in_flight')})", "in flight"),
                (f"sum({select('ergo_requests_queued')})", "queued"),
            ],
            "short",
        ),
        lines(
            "How full",
            "Part of each limit that is in use, on the gateway where it is most. Good: below 70 %. Above 90 % of the memory "
            "the alert ErgoImageMemoryHigh fires; full bytes are refused, full threads make others wait.",
            [
                (full("ergo_image_memory_bytes", "ergo_image_memory_limit_bytes"), "memory for images"),
                (full("ergo_image_threads_busy", "ergo_image_threads_limit"), "threads for images"),
                (full("ergo_body_bytes_in_flight", "ergo_body_bytes_in_flight_limit_bytes"), "bytes of bodies"),
            ],
            "percentunit",
            FULL,
            max=1,
        ),
        lines(
            "Images kept",
            "Uploads that questions can name: how many, and their bytes (right). Good: well below the limit of the store "
            "(ERGO_IMAGE_STORE_BYTES); they go after ten minutes.",
            [
                (f"sum({select('ergo_stored_images')})", "images"),
                (f"sum({select('ergo_stored_image_bytes')})", "bytes"),
            ],
            "short",
            right=("bytes", "bytes"),
        ),
    )
    board.shelf(
        lines(
            "Processor",
            "Cores that each gateway uses. Good: below the cores that it has; at them, images are the limit: add gateways.",
            [(rate("process_cpu_seconds_total", by="instance"), "{{instance}}")],
            "short",
            axis="cores",
        ),
        lines(
            "Memory",
            "Resident memory of each gateway. Good: level from hour to hour, and below the container's limit; steps that never "
            "come down are a leak.",
            [(f"sum by (instance) ({select('process_resident_memory_bytes')})", "{{instance}}")],
            "bytes",
        ),
        lines(
            "Open files",
            "Part of the file descriptors that each gateway may have. Good: below 50 %; connections and image files need one "
            "each.",
            [
                (
                    f"max by (instance) ({select('process_open_fds')} / {select('process_max_fds')})",
                    "{{instance}}",
                )
            ],
            "percentunit",
            FULL,
        ),
    )

    board.row("Capacity of vLLM", height=9)
    board.shelf(
        lines(
            "Requests running and waiting",
            "All engines together. Good: waiting 0 but for moments; it does not count images that vLLM still prepares. Standing "
            "above 5 the alert VllmQueueNotDraining fires.",
            [
                (f"sum({select('vllm:num_requests_running')})", "running"),
                (f"sum({select('vllm:num_requests_waiting')})", "waiting"),
            ],
            "short",
            noValue=NO_VLLM,
        ),
        lines(
            "KV cache in use",
            "On the fullest engine. Good: below 90 %. Full, requests are thrown out and computed again.",
            [(f"max({select('vllm:kv_cache_usage_perc')})", "in use")],
            "percentunit",
            FULL,
            max=1,
            noValue=NO_VLLM,
        ),
        lines(
            "Thrown out",
            "Preemptions a second: requests that lost their place in the KV cache. Good: 0.",
            [(rate("vllm:num_preemptions_total"), "preemptions/s")],
            "short",
            noValue=NO_VLLM,
        ),
    )
    board.shelf(
        lines(
            "Cache hits",
            "Part of the prompt tokens that vLLM's prefix cache held, and of the images that it had prepared before. Good: "
            "prefix above a third, as every answer turn repeats its zoom turn; images near a half, for the same reason.",
            [
                (ratio(rate("vllm:prefix_cache_hits_total"), rate("vllm:prefix_cache_queries_total")), "prefix"),
                (ratio(rate("vllm:mm_cache_hits_total"), rate("vllm:mm_cache_queries_total")), "images"),
            ],
            "percentunit",
            max=1,
            noValue=NO_VLLM,
        ),
        lines(
            "Tokens",
            "Prompt and generated tokens a second. Good: generated levels off before waiting requests pile up; together they "
            "say what this engine can do.",
            [
                (rate("vllm:prompt_tokens_total"), "prompt"),
                (rate("vllm:generation_tokens_total"), "generated"),
            ],
            "short",
            axis="tokens/s",
            noValue=NO_VLLM,
        ),
    )
    return board.made


def main(folder: Path) -> None:
    """Write the dashboards into a folder."""
    for name, make in (("savings", savings), ("zoom-quality", zoom_quality), ("latency", latency), ("reliability", reliability)):
        (folder / f"{name}.json").write_text(json.dumps(make(), indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "dashboards")
