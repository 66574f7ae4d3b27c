"""Prometheus metrics, all declared here.

Closed label sets only: no label takes a value from a request. Every series exists from the start, so that ``rate()`` works
from the first event on. Processed and baseline visual tokens are two counters, never one of "saved" tokens: savings can be
negative, and a counter cannot fall. One process by design: the gateway scales by replicas.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from ergo_server import __version__, errors
from ergo_server.engine.breaker import State
from ergo_server.engine.replicas import FAILOVER_REASONS, FailoverReason
from ergo_server.engine.retries import RetryOutcome
from ergo_server.imaging.original import ImageSource
from ergo_server.imaging.work import ImageWork
from ergo_server.intake.fetch import FETCH_OUTCOMES, FetchOutcome
from ergo_server.intake.store import ImageStore
from ergo_server.pipeline import STAGES, ZOOM_OUTCOMES, EngineCall, Record, Result, TurnName
from ergo_server.protocol.rewards import box_reward, format_reward
from ergo_server.verification import VERIFICATIONS, Verification

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 60, 120)
AREA_RATIOS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.6, 1)
"""0.6 is the paper's γ: a box above it earns no reward in training."""
HIT_RATIOS = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
MAGNIFICATIONS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)
TOKENS = (64, 128, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 2560, 4096, 8192, 16384)
"""1280 and 2560 are ERGO's larger budget, one view and two; 16384 is where the model's own default ends."""
PIXELS = (5e4, 1e5, 2.5e5, 5e5, 1e6, 2e6, 4e6, 8e6, 1.6e7, 3.2e7, 6.4e7, 1.28e8)
BYTES = (1e4, 5e4, 1e5, 5e5, 1e6, 2.5e6, 5e6, 1e7, 2.5e7, 5e7, 1e8)

SIZES = {"to_2mp": 2e6, "to_8mp": 8e6, "to_32mp": 3.2e7, "above_32mp": float("inf")}
"""Most pixels of an original by the name of its class: a screen, a telephone of old, a camera, and what is larger."""

POLICIES = ("ergo", "single")
NO_POLICY = "none"
"""Label of a question that was refused before a policy had it."""

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series of each counter, holding its birthday, which no query here uses


CODE_CLASSES = ("2xx", "4xx", "5xx")


def _codes(error: type[errors.ErgoError]) -> Iterable[str]:
    yield error.code
    for below in error.__subclasses__():
        yield from _codes(below)


OUTCOMES = ("ok", "cancelled", *dict.fromkeys(_codes(errors.ErgoError)))
ENGINE_OUTCOMES = ("ok", "cancelled", *dict.fromkeys(_codes(errors.EngineError)), "other")
IMAGE_REJECTIONS = tuple(dict.fromkeys(_codes(errors.ImageError)))
STATUSES = ("200", "400", "401", "404", "405", "408", "413", "415", "422", "429", "499", "500", "502", "503", "504")
METHODS = ("GET", "POST", "DELETE", "other")

Rejection = Literal["queue_full", "queue_timeout", "bytes_in_flight", "rate_limit", "token_budget", "concurrency", "draining"]
"""Why a request was not let in; ``rate_limit``, ``token_budget`` and ``concurrency`` are limits of its tenant."""


Refusal = Literal["too_many", "displaced", "bad_head", "slow_head", "slow_reader"]
"""Why a connection was turned away or cut off; ``displaced`` made room for another while it was doing nothing."""

DISCONNECT_STAGES = ("receive", "zoom_turn", "answer_turn", "other")
_DISCONNECTS = {"zoom": "zoom_turn", "answer": "answer_turn", "single": "answer_turn"}

FORMATS = ("jpeg", "png", "webp", "gif", "bmp")


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
            ("route", "code_class"),
            registry=new,
            buckets=REQUEST_SECONDS,
        )
        self.disconnects = Counter(
            "ergo_client_disconnects",
            "Questions whose caller left, by what was being done for them.",
            ("stage",),
            registry=new,
        )
        self.connections_refused = Counter(
            "ergo_connections_refused",
            "Connections that were turned away or cut off, by what they did.",
            ("reason",),
            registry=new,
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
        self.first_token_seconds = Histogram(
            "ergo_time_to_first_token_seconds",
            "Time to the first visible piece of an answer, reading the body excluded.",
            ("policy",),
            registry=new,
            buckets=REQUEST_SECONDS,
        )
        self.stage_seconds = Histogram("ergo_stage_duration_seconds", "Time by stage.", ("stage",), registry=new, buckets=SECONDS)
        self.visual_tokens = Counter(
            "ergo_visual_tokens", "Visual tokens shown to the model, each view once.", ("kind", "size"), registry=new
        )
        self.baseline = Counter(
            "ergo_visual_tokens_baseline",
            "Visual tokens the same model would have spent without zoom, at most 16384 an image.",
            ("size",),
            registry=new,
        )
        self.tokens_per_request = Histogram(
            "ergo_visual_tokens_per_request",
            "Visual tokens of a question: what was spent in all, and the baseline.",
            ("kind",),
            registry=new,
            buckets=TOKENS,
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
        self.magnification = Histogram(
            "ergo_zoom_magnification",
            "Pixels of the crop per pixel of the overview, linear.",
            registry=new,
            buckets=MAGNIFICATIONS,
        )
        self.region_rewards = Counter(
            "ergo_reward_region",
            "Zoomed questions asked again with the crop alone, by whether the answer was the one that was served.",
            ("outcome",),
            registry=new,
        )
        self.box_rewards = Counter(
            "ergo_reward_box",
            "Zoomed questions by whether the region was within the paper's share.",
            ("value",),
            registry=new,
        )
        self.format_rewards = Counter(
            "ergo_reward_format", "Zoomed questions by whether both replies kept to their tags.", ("value",), registry=new
        )
        self.engine_requests = Counter(
            "ergo_engine_requests", "Turns by how they went on the engine.", ("turn", "outcome"), registry=new
        )
        self.engine_seconds = Histogram(
            "ergo_engine_request_duration_seconds",
            "Time of one turn on the engine, as this server sees it.",
            ("turn",),
            registry=new,
            buckets=REQUEST_SECONDS,
        )
        self.engine_queue_seconds = Histogram(
            "ergo_engine_queue_seconds",
            "Time that a turn waited in the engine, as the engine reports it.",
            ("turn",),
            registry=new,
            buckets=SECONDS,
        )
        self.engine_first_token_seconds = Histogram(
            "ergo_engine_first_token_seconds",
            "Time from a turn's arrival in the engine to its first token, as the engine reports it.",
            ("turn",),
            registry=new,
            buckets=SECONDS,
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
        self.engine_ready = Gauge(
            "ergo_engine_ready",
            "Whether an engine could be asked when readiness was last looked at; NaN before.",
            ("engine",),
            registry=new,
        )
        self.breaker = Gauge(
            "ergo_circuit_breaker_state",
            "1 at the state of an engine's circuit breaker, 0 at the others.",
            ("engine", "state"),
            registry=new,
        )
        self.failovers = Counter(
            "ergo_engine_failovers",
            "Turns that another engine was asked for, by what was wrong with the one before.",
            ("reason",),
            registry=new,
        )
        self.retries = Counter(
            "ergo_engine_retries",
            "Requests that the engine failed before any token, by whether they were sent again.",
            ("outcome",),
            registry=new,
        )
        self.rejections = Counter(
            "ergo_admission_rejections",
            "Requests that were not let in, by the limit that was reached.",
            ("reason",),
            registry=new,
        )
        self.queued = Gauge("ergo_requests_queued", "Requests that wait for a place.", registry=new)
        self.body_bytes = Gauge(
            "ergo_body_bytes_in_flight", "Bytes of request bodies: announced, being read, or worked on.", registry=new
        )
        self.body_bytes_limit = Gauge("ergo_body_bytes_in_flight_limit_bytes", "Most bytes of request bodies.", registry=new)
        self.auth_failures = Counter(
            "ergo_auth_failures", "Requests without a known API key, by whether they brought one.", ("reason",), registry=new
        )
        self.images = Counter(
            "ergo_images", "Images asked about, by how they came and their format.", ("source", "format"), registry=new
        )
        self.image_pixels = Histogram(
            "ergo_image_pixels", "Pixels of images and of their views.", ("kind",), registry=new, buckets=PIXELS
        )
        self.image_bytes = Histogram("ergo_image_bytes", "Bytes of the images asked about.", registry=new, buckets=BYTES)
        self.image_rejections = Counter(
            "ergo_image_rejections", "Questions refused for their image, by code.", ("reason",), registry=new
        )
        self.image_memory = Gauge("ergo_image_memory_bytes", "Memory reserved for decoding and kept pixels.", registry=new)
        self.image_memory_limit = Gauge("ergo_image_memory_limit_bytes", "Most that may be reserved.", registry=new)
        self.image_threads = Gauge("ergo_image_threads_busy", "Threads that decode, or wait for bytes to decode.", registry=new)
        self.image_threads_limit = Gauge("ergo_image_threads_limit", "Most of them.", registry=new)
        self.stored_images = Gauge("ergo_stored_images", "Uploaded images kept.", registry=new)
        self.stored_image_bytes = Gauge("ergo_stored_image_bytes", "Bytes of the uploaded images kept.", registry=new)
        self.answers = Counter("ergo_answers", "Answers by how they could be read.", ("parse",), registry=new)
        self.image_fetches = Counter(
            "ergo_image_fetches",
            "Remote images by how the fetch ended: ok, why it was refused, or how it failed.",
            ("outcome",),
            registry=new,
        )
        self.build = Gauge("ergo_build_info", "1, with the server's and Python's version.", ("version", "python"), registry=new)
        self.config = Gauge(
            "ergo_config_info",
            "1, with what the server was started with.",
            ("engine", "default_visual_tokens", "max_visual_tokens"),
            registry=new,
        )
        self.build.labels(__version__, platform.python_version()).set(1)
        for collect in (ProcessCollector, PlatformCollector, GCCollector):
            collect(registry=new)
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
        if record.first_token_seconds is not None:
            self.first_token_seconds.labels(policy).observe(record.first_token_seconds)
        for call in record.calls:
            self._observe_call(call)
        if outcome == "cancelled":
            under_way = record.calls[-1] if record.calls and record.calls[-1].error == "cancelled" else None
            self.disconnects.labels(_DISCONNECTS.get(under_way.turn, "other") if under_way else "other").inc()
        self._reject_image(outcome)
        if record.result is not None:
            self._observe_result(record.result)
            self.images.labels(record.source, record.result.header.format).inc()
            self.image_bytes.observe(record.image_bytes)

    def refuse(self, outcome: str) -> None:
        """Count a question that ended before a pipeline had it: its body is wrong, or its caller left while sending."""
        self.requests.labels(NO_POLICY, outcome if outcome in OUTCOMES else errors.ErgoError.code).inc()
        if outcome == "cancelled":
            self.disconnects.labels("receive").inc()
        self._reject_image(outcome)

    def configured(self, engine: str, default_visual_tokens: int, max_visual_tokens: int) -> None:
        """Show what the server was started with."""
        self.config.labels(engine, str(default_visual_tokens), str(max_visual_tokens)).set(1)

    def ready(self, engine: str, ready: bool) -> None:
        """Show whether an engine could be asked when readiness was looked at last."""
        self.engine_ready.labels(engine).set(ready)

    def verified(self, outcome: Verification) -> None:
        """Count a question that was asked again with the crop alone, or was to be."""
        self.region_rewards.labels(outcome).inc()

    def failover(self, reason: FailoverReason) -> None:
        """Count a turn that another engine was asked for."""
        self.failovers.labels(reason).inc()

    def refuse_connection(self, reason: Refusal) -> None:
        """Count a connection that was turned away or cut off."""
        self.connections_refused.labels(reason).inc()

    def _reject_image(self, outcome: str) -> None:
        if outcome in IMAGE_REJECTIONS:
            self.image_rejections.labels(outcome).inc()

    def _observe_call(self, call: EngineCall) -> None:
        outcome = call.error or "ok"
        self.engine_requests.labels(call.turn, outcome if outcome in ENGINE_OUTCOMES else "other").inc()
        self.engine_seconds.labels(call.turn).observe(call.seconds)
        if call.generation is None:
            return
        for histogram, seconds in (
            (self.engine_queue_seconds, call.generation.queue_seconds),
            (self.engine_first_token_seconds, call.generation.first_token_seconds),
        ):
            if seconds is not None:
                histogram.labels(call.turn).observe(seconds)

    def watch(self, engine: str, state: Callable[[], State]) -> None:
        """Show an engine: its circuit breaker's state is asked for whenever the metrics are, as open becomes half open by itself.

        Args:
            engine: as the operator configured it; the only label whose values are not listed here.
            state: returns the state.
        """
        self.engine_ready.labels(engine).set(math.nan)  # 0 would be an alert about a server that nobody probes
        for name in get_args(State):
            self.breaker.labels(engine, name).set_function(partial(_is, state, name))

    def watch_admission(self, queued: Callable[[], float], body_bytes: Callable[[], float], limit: int) -> None:
        """Show who waits, and what bodies hold, as they are whenever the metrics are asked for.

        Args:
            queued: returns the number of requests that wait.
            body_bytes: returns the bytes reserved.
            limit: most of them.
        """
        self.queued.set_function(queued)
        self.body_bytes.set_function(body_bytes)
        self.body_bytes_limit.set(limit)

    def retry(self, outcome: RetryOutcome) -> None:
        """Count a request that the engine failed before any token."""
        self.retries.labels(outcome).inc()

    def watch_images(self, work: ImageWork, store: ImageStore) -> None:
        """Show what decoding and the kept images hold, asked for whenever the metrics are."""
        self.image_memory_limit.set(work.memory.total)
        self.image_memory.set_function(lambda: work.memory.in_use)
        self.image_threads.set_function(lambda: work.busy)
        self.image_threads_limit.set(work.most_busy)
        self.stored_images.set_function(lambda: store.count)
        self.stored_image_bytes.set_function(lambda: store.bytes)

    def fetched(self, outcome: FetchOutcome) -> None:
        """Count the end of a fetch."""
        self.image_fetches.labels(outcome).inc()

    def observe_http(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one HTTP exchange; what is not in the closed sets becomes ``other``."""
        route = route if route in self.routes else "other"
        code = str(status) if str(status) in STATUSES else "other"
        self.http_requests.labels(route, method if method in METHODS else "other", code).inc()
        code_class = f"{status // 100}xx"
        self.http_seconds.labels(route, code_class if code_class in CODE_CLASSES else "2xx").observe(seconds)

    def expose(self) -> bytes:
        """Return everything in the text exposition format."""
        return generate_latest(self.registry)

    def _observe_result(self, result: Result) -> None:
        tokens, original, region = result.visual_tokens, result.header.size, result.region
        size = next(name for name, most in SIZES.items() if original.area <= most)
        seen = {"original": original, "overview": result.overview.size} | ({"crop": region.crop.size} if region.crop else {})
        for kind, view in seen.items():
            self.image_pixels.labels(kind).observe(view.area)
        for kind, count in (("overview", tokens.overview), ("crop", tokens.crop), ("extra", tokens.extra)):
            self.visual_tokens.labels(kind, size).inc(count)
        self.baseline.labels(size).inc(tokens.baseline)
        self.tokens_per_request.labels("total").observe(tokens.total)
        self.tokens_per_request.labels("baseline").observe(tokens.baseline)
        self.mismatches.inc(tokens.mismatch)
        self.zooms.labels(region.outcome).inc()
        if region.outcome != "skipped":
            self.area_ratio.observe(region.area_ratio)
            self.magnification.observe(region.magnification)
            first, *_, last = (turn.generation.text for turn in result.turns)
            self.box_rewards.labels(f"{box_reward(region.box, original):.0f}").inc()
            self.format_rewards.labels(f"{format_reward(first, last):.0f}").inc()
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
            for code_class in CODE_CLASSES:
                self.http_seconds.labels(route, code_class)
            for method in METHODS:
                for code in (*STATUSES, "other"):
                    self.http_requests.labels(route, method, code)
        for policy in POLICIES:
            self.request_seconds.labels(policy)
            self.first_token_seconds.labels(policy)
            for outcome in OUTCOMES:
                self.requests.labels(policy, outcome)
        for outcome in OUTCOMES:
            self.requests.labels(NO_POLICY, outcome)
        for stage in STAGES:
            self.stage_seconds.labels(stage)
        for zoom in ZOOM_OUTCOMES:
            self.zooms.labels(zoom)
        for size in SIZES:
            self.baseline.labels(size)
            for kind in ("overview", "crop", "extra"):
                self.visual_tokens.labels(kind, size)
        for kind in ("total", "baseline"):
            self.tokens_per_request.labels(kind)
        for kind in ("original", "overview", "crop"):
            self.image_pixels.labels(kind)
        for source in get_args(ImageSource):
            for form in FORMATS:
                self.images.labels(source, form)
        for reason in IMAGE_REJECTIONS:
            self.image_rejections.labels(reason)
        for under_way in DISCONNECT_STAGES:
            self.disconnects.labels(under_way)
        for refusal in get_args(Refusal):
            self.connections_refused.labels(refusal)
        for turn in get_args(TurnName):
            self.completion_tokens.labels(turn)
            for timed in (self.engine_seconds, self.engine_queue_seconds, self.engine_first_token_seconds):
                timed.labels(turn)
            for outcome in ENGINE_OUTCOMES:
                self.engine_requests.labels(turn, outcome)
            for cached in ("true", "false"):
                self.prompt_tokens.labels(turn, cached)
        for verification in VERIFICATIONS:
            self.region_rewards.labels(verification)
        for value in ("0", "1"):
            self.box_rewards.labels(value)
            self.format_rewards.labels(value)
        for failover in FAILOVER_REASONS:
            self.failovers.labels(failover)
        for retry in get_args(RetryOutcome):
            self.retries.labels(retry)
        for reason in get_args(Rejection):
            self.rejections.labels(reason)
        for failure in ("missing", "invalid"):
            self.auth_failures.labels(failure)
        for parse in ("tagged", "untagged", "empty", "truncated"):
            self.answers.labels(parse)
        for fetch in FETCH_OUTCOMES:
            self.image_fetches.labels(fetch)


def _is(state: Callable[[], State], name: State) -> float:
    return float(state() == name)


def _parse(result: Result) -> str:
    if result.truncated:
        return "truncated"
    if not result.answer.text:
        return "empty"
    return "tagged" if result.answer.tagged else "untagged"
