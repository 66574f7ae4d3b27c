"""Traces: a span of every request, one of each of its stages, sent to an OpenTelemetry collector.

Imported only where a collector is configured: the SDK costs memory and half a second of start.

The stages' spans are made from the pipeline's record when the request has ended. One thing must be known before: the id of the
span that is the parent of the engine's own. It is drawn when the engine is asked, and given to that turn's span afterwards.

Attributes follow OpenTelemetry's conventions for HTTP and for generative AI, what those have no name for is ``ergo.…``. None of
them holds a text of the caller's; ``tracestate`` and ``baggage``, which are such texts, are left where they are.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from ergo_server import __version__
from ergo_server.pipeline import EngineCall, Record
from ergo_server.telemetry.exchange import OTHER, Exchange

EXPORT_SECONDS = 5.0
"""For one batch, second attempts included; a collector on the same network takes milliseconds."""

CLOSE_SECONDS = 2.0
"""For what is left when the server ends; what a collector has not taken by then is lost."""

LONGEST_TRACEPARENT = 512
"""Letters; 55 are in use, and a later version of the standard may append some."""

log = logging.getLogger("ergo_server")

Attributes = dict[str, AttributeValue]


@dataclass(frozen=True, slots=True)
class AskedEngine:
    """Whom the turns are asked, for their spans."""

    name: str
    model: str = ""
    """As configured; empty where the engine's first is taken."""
    server: str = ""
    """Its host and port; empty: it runs in this process, or is one of several."""


@dataclass(slots=True)
class _Trace:
    """A request's trace until it ends."""

    root: Span
    drawn: list[tuple[float, int]] = field(default_factory=list)
    """When the engine was asked, and under which span."""


_current: ContextVar[_Trace | None] = ContextVar("trace", default=None)


class Tracing:
    """Makes the traces of one server. Belongs to one event loop; close it.

    Args:
        endpoint: base URL of the collector, which listens on ``/v1/traces`` below it (OTLP over HTTP).
        share: of the requests, 0 to 1, that are traced where the caller has not decided that already.
        engine: whom the turns are asked.
    """

    def __init__(self, endpoint: str, share: float, engine: AskedEngine) -> None:
        self._engine = engine
        self._ids = _Ids()
        self._w3c = TraceContextTextMapPropagator()
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS)
        self._processor = BatchSpanProcessor(_Collector(exporter))
        # It writes several lines for each batch, and one for each span that is dropped; `_Collector` writes one for all.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        about = {"service.name": "ergo-vqa", "service.version": __version__, "service.instance.id": str(uuid.uuid4())}
        provider = TracerProvider(
            resource=Resource.create().merge(Resource(about)).merge(OTELResourceDetector().detect()),
            sampler=ParentBasedTraceIdRatio(share),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        provider.add_span_processor(self._processor)
        self._tracer = provider.get_tracer("ergo_server", __version__)

    def begin(self, exchange: Exchange, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Begin the trace of a request, or go on with its caller's.

        Args:
            exchange: is given the trace's id.
            headers: the request's, as they came; their names in small letters.
        """
        parent = self._parent(headers)
        root = self._tracer.start_span(exchange.method, parent, SpanKind.SERVER, start_time=exchange.began)
        exchange.trace_id = format_trace_id(root.get_span_context().trace_id)
        _current.set(_Trace(root))

    def headers(self) -> Mapping[str, str]:
        """Return the headers by which the engine joins the trace of the request that it is asked for."""
        trace = _current.get()
        if trace is None:
            return {}
        root, drawn = trace.root.get_span_context(), self._ids.generate_span_id()
        trace.drawn.append((time.perf_counter(), drawn))
        headers: dict[str, str] = {}
        turn = SpanContext(root.trace_id, drawn, is_remote=False, trace_flags=root.trace_flags)
        self._w3c.inject(headers, set_span_in_context(NonRecordingSpan(turn)))
        return headers

    def end(self, exchange: Exchange) -> None:
        """End the trace of a request, with a span for each of its stages."""
        trace = _current.get()
        if trace is None or not trace.root.is_recording():
            return
        within = set_span_in_context(trace.root)
        for stage in exchange.record.stages if exchange.record else ():
            if stage.name not in ("zoom_turn", "answer_turn"):
                span = self._tracer.start_span(
                    stage.name, within, attributes={"ergo.stage": stage.name}, start_time=_at(exchange, stage.started)
                )
                span.end(_at(exchange, stage.ended))
        for call in exchange.calls:
            self._turn(trace, within, exchange, call)
        root = trace.root
        root.update_name(" ".join(part for part in (_method(exchange, "HTTP"), exchange.route) if part != OTHER))
        root.set_attributes(_request(exchange))
        if exchange.outcome != "ok":
            _fail(root, exchange.outcome, exchange.at_fault)
        root.end(_at(exchange, exchange.started + exchange.seconds))

    def close(self) -> None:
        """Send what is left, and give up on it soon. Blocks."""
        # The processor itself would wait for half a minute.
        closing = threading.Thread(target=self._processor.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)

    def _parent(self, headers: Sequence[tuple[bytes, bytes]]) -> Context:
        found = [value.decode("latin-1") for name, value in headers if name == b"traceparent"]
        if len(found) != 1 or len(found[0]) > LONGEST_TRACEPARENT:  # as the standard has it: two are none
            return Context()
        return self._w3c.extract({"traceparent": found[0]}, Context())

    def _turn(self, trace: _Trace, within: Context, exchange: Exchange, call: EngineCall) -> None:
        ended = call.started + call.seconds
        # Of several engines asked for a turn, the last has answered.
        self._ids.next = next((drawn for at, drawn in reversed(trace.drawn) if call.started <= at <= ended), None)
        attributes = _turn_attributes(self._engine, call)
        span = self._tracer.start_span(
            f"chat {attributes.get('gen_ai.request.model', '')}".rstrip(),
            within,
            SpanKind.CLIENT if self._engine.name == "vllm" else SpanKind.INTERNAL,
            attributes,
            start_time=_at(exchange, call.started),
        )
        if call.error is not None:
            _fail(span, call.error)
        span.end(_at(exchange, ended))


class _Ids(RandomIdGenerator):
    """Draws ids, or gives the next span the one that was drawn for it before."""

    def __init__(self) -> None:
        self.next: int | None = None

    def generate_span_id(self) -> int:
        """Return an id."""
        chosen, self.next = self.next, None
        return chosen or super().generate_span_id()


class _Collector(SpanExporter):
    """Sends batches to the collector, in the processor's thread; says once that it cannot, and once that it can again."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch."""
        result = self._exporter.export(spans)
        failing = result is not SpanExportResult.SUCCESS
        if failing != self._failing:
            log.warning("the collector takes %s", "no traces; they are dropped until it does" if failing else "traces again")
        self._failing = failing
        return result

    def shutdown(self) -> None:
        """Send nothing more."""
        self._exporter.shutdown()


def _at(exchange: Exchange, moment: float) -> int:
    """Return a moment of `time.perf_counter` in nanoseconds since 1970."""
    return exchange.began + int((moment - exchange.started) * 1e9)


def _method(exchange: Exchange, instead: str) -> str:
    return instead if exchange.method == OTHER else exchange.method


def _fail(span: Span, error: str, at_fault: bool = True) -> None:
    """Say why something did not end well. What the caller must mend is no error of the server's, by the conventions for HTTP."""
    span.set_attribute("error.type", error)
    if at_fault:
        span.set_status(StatusCode.ERROR)


def _request(exchange: Exchange) -> Attributes:
    found: Attributes = {
        "http.request.method": _method(exchange, "_OTHER"),
        "http.response.status_code": exchange.status,
        "ergo.request_id": exchange.request_id,
        "ergo.outcome": exchange.outcome,
    }
    if exchange.route != OTHER:
        found["http.route"] = exchange.route
    if exchange.tenant:
        found["ergo.tenant"] = exchange.tenant
    return found | (_question(exchange.record) if exchange.record else {})


def _question(record: Record) -> Attributes:
    found: Attributes = {
        "ergo.policy": record.policy,
        "ergo.image.source": record.source,
        "ergo.image.bytes": record.image_bytes,
    }
    if record.header is not None:
        found |= {
            "ergo.image.format": record.header.format,
            "ergo.image.width": record.header.size.width,
            "ergo.image.height": record.header.size.height,
        }
    if record.first_token_seconds is not None:
        found["ergo.first_token_seconds"] = record.first_token_seconds
    if record.result is not None:
        tokens, region = record.result.visual_tokens, record.result.region
        found |= {
            "ergo.zoom.outcome": region.outcome,
            "ergo.zoom.area_ratio": region.area_ratio,
            "ergo.zoom.magnification": region.magnification,
            "ergo.visual_tokens.overview": tokens.overview,
            "ergo.visual_tokens.crop": tokens.crop,
            "ergo.visual_tokens.extra": tokens.extra,
            "ergo.visual_tokens.total": tokens.total,
            "ergo.visual_tokens.baseline": tokens.baseline,
        }
    return found


def _turn_attributes(engine: AskedEngine, call: EngineCall) -> Attributes:
    generation = call.generation
    server = urlsplit("//" + ((generation.server if generation else "") or engine.server))
    found: dict[str, AttributeValue | None] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": engine.name,
        "gen_ai.output.type": "text",
        "gen_ai.request.model": (generation.model if generation else "") or engine.model or None,
        "server.address": server.hostname,
        "server.port": server.port,
        "ergo.turn": call.turn,
        "ergo.stage": "zoom_turn" if call.turn == "zoom" else "answer_turn",
    }
    if generation is not None:
        usage = generation.usage
        found |= {
            "gen_ai.response.model": generation.model or None,
            "gen_ai.response.finish_reasons": (generation.finish_reason,),
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
            "gen_ai.usage.image.input_tokens": usage.image_tokens,
            "ergo.engine.queue_seconds": generation.queue_seconds,
            "ergo.engine.first_token_seconds": generation.first_token_seconds,
        }
    return {name: value for name, value in found.items() if value is not None}
