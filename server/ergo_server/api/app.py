"""The assembly: every part is made here from the settings, and handed to those that need it."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from fastapi.telemetry import TelemetryConfig
from pydantic import SecretStr
from starlette.responses import JSONResponse, Response

from ergo_server import __version__
from ergo_server.api import chat, docs, errors, images, playground, vqa
from ergo_server.api.admission import Admission, Gate
from ergo_server.api.connection import ConnectionLimits
from ergo_server.api.keys import Keys, Limits, salt
from ergo_server.api.limits import TenantLimits
from ergo_server.api.listen import Ending
from ergo_server.api.middleware import Observe
from ergo_server.api.openapi import KEYED, answer, operation
from ergo_server.api.receive import BodyLimits, LimitBody
from ergo_server.api.schemas import Health, Readiness, ServerVersion
from ergo_server.api.service import Service
from ergo_server.engine.base import Engine, address
from ergo_server.engine.breaker import Breaker
from ergo_server.engine.replicas import Replicas
from ergo_server.engine.retries import RetryBudget, RetryOutcome
from ergo_server.imaging.header import Limits as ImageLimits
from ergo_server.imaging.work import ImageWork
from ergo_server.intake.body import RequestLimits
from ergo_server.intake.fetch import Fetcher, FetchLimits
from ergo_server.intake.form import FormLimits
from ergo_server.intake.store import ImageStore
from ergo_server.pipeline import Deadlines, Pipeline, Record
from ergo_server.protocol.base import ModelProfile
from ergo_server.protocol.ergo import ErgoPolicy
from ergo_server.protocol.prompts import builtin_profile, load_profile
from ergo_server.protocol.single import SinglePolicy
from ergo_server.settings import Settings
from ergo_server.telemetry import exchange
from ergo_server.telemetry.metrics import Metrics
from ergo_server.verification import Verifier

if TYPE_CHECKING:
    from ergo_server.telemetry.tracing import Tracing


def create_engines(
    settings: Settings, retry: Callable[[RetryOutcome], None], trace_headers: Callable[[], Mapping[str, str]] = dict
) -> dict[str, Engine]:
    """Make the engines that the settings name, by what metrics and logs call them: their addresses, or ``embedded``.

    Args:
        settings: the configuration.
        retry: told of each failure that a second attempt may cure.
        trace_headers: returns the headers by which an engine behind HTTP joins a request's trace.

    Raises:
        OSError: the file with the API key cannot be read.
    """
    if settings.engine == "vllm":
        from ergo_server.engine.vllm import VllmEngine

        key = _secret(settings.engine_api_key, settings.engine_api_key_file)
        return {
            address(url): VllmEngine(
                url,
                model=settings.engine_model,
                api_key=key,
                session_headers=settings.session_headers,
                retries=RetryBudget(settings.retry_share, settings.retry_burst, retry),
                trace_headers=trace_headers,
            )
            for url in settings.engine_urls
        }
    from ergo_server.engine.embedded import EmbeddedEngine

    if settings.checkpoint:
        return {"embedded": EmbeddedEngine(settings.checkpoint, device=settings.device, threads=settings.threads)}
    # ergo-mini's matrices are too small to be shared out: two threads on a busy machine take many times as long as one.
    return {"embedded": EmbeddedEngine(_ergo_mini("checkpoint"), device=settings.device, threads=settings.threads or 1)}


def create_profile(settings: Settings) -> ModelProfile:
    """Find the checkpoint's prompts and budgets: named by the settings, its own, or those of ERGO-7B.

    Raises:
        PromptsError: the file is not usable.
    """
    if settings.prompts is not None:
        return load_profile(settings.prompts)
    if settings.engine == "embedded" and not settings.checkpoint:
        return load_profile(_ergo_mini("prompts.toml"))
    return builtin_profile()


def create_app(settings: Settings, engine: Engine | None = None, fetcher: Fetcher | None = None) -> FastAPI:
    """Assemble the server.

    Args:
        settings: the configuration.
        engine: replaces the engine that the settings name; the app closes it in the end.
        fetcher: replaces the one that the settings describe, likewise.

    Raises:
        KeysError: the API keys cannot be used.
        PromptsError: the prompts cannot be used.
        OSError: the file of a secret cannot be read.
    """
    profile = create_profile(settings)
    keys, limits, gate = _keys(settings), TenantLimits(), _gate(settings)
    metrics, tracing = Metrics(_ROUTES), _tracing(settings, engine)
    engines = {engine.name: engine} if engine else create_engines(settings, metrics.retry, tracing.headers if tracing else dict)
    engine = _guarded(engines, settings, metrics)
    metrics.watch_admission(lambda: gate.queued, lambda: gate.bytes, gate.max_bytes)
    given_secret = _secret(settings.session_secret, settings.session_secret_file)
    secret = given_secret.encode() if given_secret else secrets.token_bytes(32)
    largest = settings.max_visual_tokens or profile.max_visual_tokens
    default = settings.default_visual_tokens or min(profile.default_visual_tokens, largest)
    single = SinglePolicy(profile.prompts)
    verification = _verification(settings, engine, single, gate, metrics)
    pipeline = Pipeline(
        engine=engine,
        policy=ErgoPolicy(profile.prompts),
        single=single,
        session_secret=secret,
        session_scope=settings.session_scope,
        deadlines=Deadlines(settings.turn_seconds, settings.request_seconds),
        listeners=(metrics.observe, lambda record: _charge(limits, record), exchange.observe),
        passed=(exchange.observe_passed,),
        finished=(verification.offer,) if verification else (),
    )
    work, store = _image_work(settings), _image_store(settings)
    metrics.watch_images(work, store)
    metrics.configured(engine.name, default, largest)
    service = Service(
        engine=engine,
        zooming=pipeline,
        default_visual_tokens=default,
        max_visual_tokens=largest,
        created=int(time.time()),
        refused=metrics.refuse,
        work=work,
        store=store,
        fetcher=fetcher or _fetcher(settings, metrics),
        limits=RequestLimits(
            settings.max_text_chars, settings.max_images, FormLimits(settings.max_form_fields, settings.max_form_field_bytes)
        ),
        salted=lambda tenant: salt(secret, tenant),
        charge=limits.charge,
    )
    app = FastAPI(lifespan=_lifespan(service, tracing, verification), openapi_url=None, telemetry=_NO_TELEMETRY)
    probes = _probes(engine, metrics, lambda: gate.draining)
    routers = (vqa.router(service), images.router(service), chat.router(service), probes)
    for router in routers:
        app.include_router(router)
    docs.install(app, routers)
    playground.install(app)
    errors.install(app, routers)
    app.add_middleware(Admission, keys=keys, limits=limits, gate=gate, metrics=metrics, open_metrics=settings.open_metrics)
    app.add_middleware(LimitBody, refused=metrics.refuse, limits=_body_limits(settings))
    app.add_middleware(Observe, metrics=metrics, tracing=tracing)
    app.state.connection_limits = _connection_limits(settings, metrics)
    app.state.ending = Ending(settings.drain_grace_seconds, settings.drain_seconds, gate.drain)
    return app


_NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""FastAPI's own, which any provider in the process switches on, tells queries, with the questions in them, and exceptions."""

_ROUTES = (
    "/v1/vqa",
    "/v1/vqa/estimate",
    "/v1/images",
    "/v1/images/{image_id}",
    "/v1/chat/completions",
    "/v1/models",
    "/v1/models/{model_id}",
    "/version",
    "/",
)


def _ergo_mini(name: str) -> Any:
    import ergo_mini

    return ergo_mini.FOLDER / name


def _guarded(engines: Mapping[str, Engine], settings: Settings, metrics: Metrics) -> Engine:
    """Return the engines, each behind a circuit breaker, as one."""
    breakers = {
        name: Breaker(
            engine,
            failures=settings.breaker_failures,
            seconds=settings.breaker_seconds,
            told=partial(metrics.ready, name),
            called="the engine" if len(engines) == 1 else f"engine {name}",
        )
        for name, engine in engines.items()
    }
    for name, breaker in breakers.items():
        metrics.watch(name, lambda breaker=breaker: breaker.state)  # type: ignore[misc]
    if len(breakers) == 1:
        return next(iter(breakers.values()))
    return Replicas(breakers, seconds=settings.engine_check_seconds, told=metrics.failover)


def _secret(given: SecretStr | None, file: Path | None) -> str | None:
    """Return a secret from its setting or its file."""
    if file is not None:
        return file.read_text(encoding="utf-8").strip()
    return given.get_secret_value() if given else None


def _keys(settings: Settings) -> Keys:
    given = settings.api_keys
    limits = Limits(settings.requests_per_minute, settings.concurrent_requests, settings.visual_tokens_per_minute)
    return Keys(given.get_secret_value() if given else "", settings.api_keys_file, limits)


def _gate(settings: Settings) -> Gate:
    return Gate(
        max_concurrent=settings.max_concurrent,
        max_queued=settings.max_queued,
        queue_seconds=settings.queue_seconds,
        max_bytes=settings.max_bytes_in_flight,
    )


def _body_limits(settings: Settings) -> BodyLimits:
    return BodyLimits(
        max_bytes=settings.max_body_bytes,
        seconds=settings.body_seconds,
        stall_seconds=settings.body_stall_seconds,
        bytes_per_second=settings.min_bytes_per_second,
    )


def _connection_limits(settings: Settings, metrics: Metrics) -> ConnectionLimits:
    return ConnectionLimits(
        refused=metrics.refuse_connection,
        head_seconds=settings.head_seconds,
        max_head_bytes=settings.max_head_bytes,
        keep_alive_seconds=settings.keep_alive_seconds,
        linger_seconds=settings.linger_seconds,
        reader_stall_seconds=settings.reader_stall_seconds,
        bytes_per_second=settings.min_bytes_per_second,
        max_connections=settings.max_connections,
    )


def _image_work(settings: Settings) -> ImageWork:
    return ImageWork(
        threads=settings.image_threads or os.cpu_count() or 1,
        arriving=settings.image_arrivals,
        memory_bytes=settings.image_memory_bytes,
        arrivals_share=settings.image_arrivals_share,
        wait_seconds=settings.image_memory_seconds,
        decode_seconds=settings.decode_seconds,
        limits=ImageLimits(
            max_pixels=settings.max_pixels,
            max_scans=settings.max_scans,
            max_metadata_bytes=settings.max_metadata_bytes,
        ),
    )


def _image_store(settings: Settings) -> ImageStore:
    return ImageStore(
        seconds=settings.image_store_seconds,
        max_bytes=settings.image_store_bytes,
        tenant_bytes=settings.image_store_tenant_bytes,
    )


def _fetcher(settings: Settings, metrics: Metrics) -> Fetcher:
    return Fetcher(
        mode=settings.fetch,
        hosts=settings.fetch_hosts,
        http=settings.fetch_http,
        ports=settings.fetch_ports,
        limits=FetchLimits(**{field.name: getattr(settings, f"fetch_{field.name}") for field in fields(FetchLimits)}),
        told=metrics.fetched,
    )


def _tracing(settings: Settings, instead: Engine | None) -> Tracing | None:
    """Return what makes traces, if they are wanted; without, nothing of OpenTelemetry's SDK is imported."""
    if settings.otlp_endpoint is None:
        return None
    from ergo_server.telemetry.tracing import AskedEngine, Tracing

    if instead is not None:
        engine = AskedEngine(instead.name)
    elif settings.engine == "vllm":
        urls = settings.engine_urls
        alone = address(urls[0]) if len(urls) == 1 else ""
        engine = AskedEngine("vllm", settings.engine_model or "", alone)
    else:
        engine = AskedEngine("embedded", settings.checkpoint or "ergo-mini")
    return Tracing(settings.otlp_endpoint, settings.trace_share, engine)


def _charge(limits: TenantLimits, record: Record) -> None:
    """Charge a tenant what its question has cost."""
    if record.result is not None:
        limits.charge(record.tenant, record.result.visual_tokens.total)


def _verification(settings: Settings, engine: Engine, single: SinglePolicy, gate: Gate, metrics: Metrics) -> Verifier | None:
    """Return what asks finished questions again, if that is wanted."""
    if not settings.verify_fraction:
        return None
    if settings.verify_engine is not None:
        from ergo_server.engine.vllm import VllmEngine

        key = _secret(settings.engine_api_key, settings.engine_api_key_file)
        engine = Breaker(VllmEngine(settings.verify_engine, api_key=key), called="the engine that verifies")
    return Verifier(
        engine,
        single,
        fraction=settings.verify_fraction,
        concurrent=settings.verify_concurrent,
        busy=lambda: gate.crowded,
        told=metrics.verified,
        seconds=settings.turn_seconds,
    )


def _lifespan(service: Service, tracing: Tracing | None, verification: Verifier | None) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.store.clear()
        await service.fetcher.aclose()
        if verification is not None:
            await verification.aclose()
        await service.engine.aclose()
        service.work.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    return lifespan


def _probes(engine: Engine, metrics: Metrics, draining: Callable[[], bool]) -> APIRouter:
    """Return the routes for machines."""
    routes = APIRouter(tags=["operation"])
    statuses = (
        answer("it can", Readiness),
        answer("it cannot: the engine is not ready, or the server is stopping", Readiness, status=503),
    )

    @routes.get("/healthz", **operation("get_health", "Is the process alive?", answer("it is", Health)))
    @routes.get("/health", include_in_schema=False)
    async def health() -> Health:
        """The process answers; says nothing of the engine."""
        return Health()

    @routes.get("/readyz", **operation("get_readiness", "Can it answer now?", *statuses))
    async def ready() -> Response:
        """The engine can be asked now, and the server is not about to stop."""
        if draining():
            stopping = Readiness(status="draining", engine=engine.name, detail="the server is stopping")
            return JSONResponse(stopping.model_dump(), status_code=503)
        status = await engine.status()
        shown = Readiness(status="ready" if status.ready else "waiting", engine=engine.name, detail=status.detail)
        return JSONResponse(shown.model_dump(), status_code=200 if status.ready else 503)

    @routes.get("/version", **operation("get_version", "Version", answer("of the server", ServerVersion)))
    async def version() -> ServerVersion:
        """The server's version."""
        return ServerVersion(version=__version__)

    @routes.get(
        "/metrics",
        response_class=Response,
        **operation("get_metrics", "Prometheus metrics", answer("all series", "text/plain"), errors=KEYED),
    )
    async def exposition() -> Response:
        """Metrics in Prometheus' text format. A key is asked for where the operator has set some, unless metrics are open."""
        return Response(metrics.expose(), media_type=metrics.content_type)

    return routes
