"""Prometheus metrics, all declared here.

Closed label sets only: no label takes a value from a request. Every series exists from the start, so that ``rate()`` works
from the first event on. Processed and baseline visual tokens are two counters, never one of "saved" tokens: savings can be
negative, and a counter cannot fall. One process by design: the gateway scales by replicas.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from ergo_server import errors
from ergo_server.pipeline import STAGES, ZOOM_OUTCOMES, Record, Result, TurnName

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 60, 120)
AREA_RATIOS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.6, 1)
"""0.6 is the paper's γ: a box above it earns no reward in training."""
HIT_RATIOS = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)

POLICIES = ("ergo", "single")
NO_POLICY = "none"
"""Label of a question that was refused before a policy had it."""

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series of each counter, holding its birthday, which no query here uses


def _codes(error: type[errors.ErgoError]) -> Iterable[str]:
    yield error.code
    for below in error.__subclasses__():
        yield from _codes(below)


OUTCOMES = ("ok", "cancelled", *dict.fromkeys(_codes(errors.ErgoError)))
STATUSES = ("200", "400", "404", "405", "413", "415", "422", "499", "500", "502", "503", "504")
METHODS = ("GET", "POST", "other")


class Metrics:
    """The metrics of one server, in a registry of their own."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, routes: Sequence[str]) -> None:
        self.registry = CollectorRegistry()
        self.routes = frozenset(routes)
        new = self.registry
        self.http_requests = Counter(
            "ergo_http_requests", "HTTP requests by route template, method and status.", ("route", "method", "code"), registry=new
        )
        self.http_seconds = Histogram(
            "ergo_http_request_duration_seconds",
            "Time to the last byte of the response.",
            ("route",),
            registry=new,
            buckets=REQUEST_SECONDS,
        )
        self.in_flight = Gauge("ergo_requests_in_flight", "HTTP requests being answered, probes excluded.", registry=new)
        self.requests = Counter(
            "ergo_requests", "Questions about images, by policy and outcome.", ("policy", "outcome"), registry=new
        )
        self.request_seconds = Histogram(
            "ergo_request_duration_seconds",
            "Time to answer a question, reading the body excluded.",
            ("policy",),
            registry=new,
            buckets=REQUEST_SECONDS,
        )
        self.stage_seconds = Histogram("ergo_stage_duration_seconds", "Time by stage.", ("stage",), registry=new, buckets=SECONDS)
        self.visual_tokens = Counter(
            "ergo_visual_tokens", "Visual tokens shown to the model, each view once.", ("kind",), registry=new
        )
        self.baseline = Counter(
            "ergo_visual_tokens_baseline",
            "Visual tokens the same model would have spent without zoom, at most 16384 an image.",
            registry=new,
        )
        self.mismatches = Counter(
            "ergo_visual_token_mismatch",
            "Requests in which the engine counted other visual tokens than the formula.",
            registry=new,
        )
        self.zooms = Counter("ergo_zoom", "Questions by what became of the zoom.", ("outcome",), registry=new)
        self.area_ratio = Histogram(
            "ergo_zoom_area_ratio", "Area of the region by that of the image.", registry=new, buckets=AREA_RATIOS
        )
        self.prompt_tokens = Counter(
            "ergo_engine_prompt_tokens",
            "Prompt tokens by turn, and whether the prefix cache held them.",
            ("turn", "cached"),
            registry=new,
        )
        self.completion_tokens = Counter("ergo_engine_completion_tokens", "Tokens generated, by turn.", ("turn",), registry=new)
        self.prefix_reuse = Histogram(
            "ergo_prefix_reuse_ratio",
            "Cached tokens of the answer turn by prompt tokens of the zoom turn.",
            registry=new,
            buckets=HIT_RATIOS,
        )
        self.answers = Counter("ergo_answers", "Answers by how they could be read.", ("parse",), registry=new)
        self._initialise()

    def observe(self, record: Record) -> None:
        """Listen to a request's end."""
        policy = record.policy if record.policy in POLICIES else "ergo"
        outcome = record.error or "ok"
        self.requests.labels(policy, outcome if outcome in OUTCOMES else errors.ErgoError.code).inc()
        self.request_seconds.labels(policy).observe(record.seconds)
        for stage in STAGES:
            if stage in record.timings:
                self.stage_seconds.labels(stage).observe(record.timings[stage])
        if record.result is not None:
            self._observe_result(record.result)

    def refuse(self, outcome: str) -> None:
        """Count a question that ended before a pipeline had it: its body is wrong, or its caller left while sending."""
        self.requests.labels(NO_POLICY, outcome if outcome in OUTCOMES else errors.ErgoError.code).inc()

    def observe_http(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one HTTP exchange; what is not in the closed sets becomes ``other``."""
        route = route if route in self.routes else "other"
        code = str(status) if str(status) in STATUSES else "other"
        self.http_requests.labels(route, method if method in METHODS else "other", code).inc()
        self.http_seconds.labels(route).observe(seconds)

    def expose(self) -> bytes:
        """Return everything in the text exposition format."""
        return generate_latest(self.registry)

    def _observe_result(self, result: Result) -> None:
        tokens = result.visual_tokens
        for kind, count in (("overview", tokens.overview), ("crop", tokens.crop), ("extra", tokens.extra)):
            self.visual_tokens.labels(kind).inc(count)
        self.baseline.inc(tokens.baseline)
        self.mismatches.inc(tokens.mismatch)
        self.zooms.labels(result.region.outcome).inc()
        if result.region.outcome != "skipped":
            self.area_ratio.observe(result.region.area_ratio)
        for turn in result.turns:
            usage = turn.generation.usage
            cached = usage.cached_tokens or 0
            self.prompt_tokens.labels(turn.name, "true").inc(cached)
            self.prompt_tokens.labels(turn.name, "false").inc(usage.prompt_tokens - cached)
            self.completion_tokens.labels(turn.name).inc(usage.completion_tokens)
        if len(result.turns) > 1 and (cached_last := result.turns[-1].generation.usage.cached_tokens) is not None:
            self.prefix_reuse.observe(min(1.0, cached_last / result.turns[0].generation.usage.prompt_tokens))
        self.answers.labels(_parse(result)).inc()

    def _initialise(self) -> None:
        for route in (*self.routes, "other"):
            self.http_seconds.labels(route)
            for method in METHODS:
                for code in (*STATUSES, "other"):
                    self.http_requests.labels(route, method, code)
        for policy in POLICIES:
            self.request_seconds.labels(policy)
            for outcome in OUTCOMES:
                self.requests.labels(policy, outcome)
        for outcome in OUTCOMES:
            self.requests.labels(NO_POLICY, outcome)
        for stage in STAGES:
            self.stage_seconds.labels(stage)
        for zoom in ZOOM_OUTCOMES:
            self.zooms.labels(zoom)
        for kind in ("overview", "crop", "extra"):
            self.visual_tokens.labels(kind)
        for turn in get_args(TurnName):
            self.completion_tokens.labels(turn)
            for cached in ("true", "false"):
                self.prompt_tokens.labels(turn, cached)
        for parse in ("tagged", "untagged", "empty", "truncated"):
            self.answers.labels(parse)


def _parse(result: Result) -> str:
    if result.truncated:
        return "truncated"
    if not result.answer.text:
        return "empty"
    return "tagged" if result.answer.tagged else "untagged"
