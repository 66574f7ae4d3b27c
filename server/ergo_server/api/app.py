"""The assembly: every part is made here from the settings, and handed to those that need it."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from ergo_server import __version__
from ergo_server.api import chat, errors, playground, vqa
from ergo_server.api.middleware import Observe
from ergo_server.api.service import Service
from ergo_server.engine.base import Engine
from ergo_server.pipeline import Deadlines, Pipeline
from ergo_server.protocol.base import ModelProfile
from ergo_server.protocol.ergo import ErgoPolicy
from ergo_server.protocol.prompts import builtin_profile, load_profile
from ergo_server.protocol.single import SinglePolicy
from ergo_server.settings import Settings
from ergo_server.telemetry.metrics import Metrics

log = logging.getLogger("ergo_server")


def create_engine(settings: Settings) -> Engine:
    """Make the engine that the settings name."""
    if settings.engine == "vllm":
        from ergo_server.engine.vllm import VllmEngine

        key = settings.engine_api_key
        return VllmEngine(
            settings.engine_url,
            model=settings.engine_model,
            api_key=key.get_secret_value() if key else None,
            session_headers=settings.session_headers,
        )
    from ergo_server.engine.embedded import EmbeddedEngine

    if settings.checkpoint:
        return EmbeddedEngine(settings.checkpoint, device=settings.device, threads=settings.threads)
    # ergo-mini's matrices are too small to be shared out: two threads on a busy machine take many times as long as one.
    return EmbeddedEngine(_ergo_mini("checkpoint"), device=settings.device, threads=settings.threads or 1)


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


def create_app(settings: Settings, engine: Engine | None = None) -> FastAPI:
    """Assemble the server.

    Args:
        settings: the configuration.
        engine: replaces the engine that the settings name; the app closes it in the end.
    """
    profile = create_profile(settings)
    engine = engine or create_engine(settings)
    secret = settings.session_secret
    largest = settings.max_visual_tokens or profile.max_visual_tokens
    default = settings.default_visual_tokens or min(profile.default_visual_tokens, largest)
    app = FastAPI(title="ergo-vqa", version=__version__, description=_ABOUT, lifespan=_lifespan(engine))
    metrics = Metrics(_ROUTES)
    pipeline = Pipeline(
        engine=engine,
        policy=ErgoPolicy(profile.prompts),
        single=SinglePolicy(profile.prompts),
        session_secret=secret.get_secret_value().encode() if secret else secrets.token_bytes(32),
        deadlines=Deadlines(settings.turn_seconds, settings.request_seconds),
        max_pixels=settings.max_pixels,
        listeners=(metrics.observe,),
    )
    service = Service(engine, pipeline, default, largest, settings.max_pixels, int(time.time()), metrics.refuse)
    app.include_router(vqa.router(service))
    app.include_router(chat.router(service))
    _add_probes(app, engine, metrics)
    playground.install(app)
    errors.install(app)
    app.add_middleware(Observe, metrics=metrics, max_body_bytes=settings.max_body_bytes)
    return app


_ABOUT = "Answers questions about high-resolution images by zooming in once. Every error has the form of `ErrorEnvelope`."

_ROUTES = ("/v1/vqa", "/v1/vqa/estimate", "/v1/chat/completions", "/v1/models", "/v1/models/{model_id}", "/version", "/")


def _ergo_mini(name: str) -> Any:
    import ergo_mini

    return ergo_mini.FOLDER / name


def _lifespan(engine: Engine) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.aclose()

    return lifespan


def _add_probes(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    @app.get("/healthz", tags=["operation"], summary="Is the process alive?")
    @app.get("/health", include_in_schema=False)
    async def health() -> dict[str, str]:
        """The process answers; says nothing of the engine."""
        return {"status": "ok"}

    @app.get(
        "/readyz", tags=["operation"], summary="Can it answer now?", responses={503: {"description": "the engine is not ready"}}
    )
    async def ready() -> Response:
        """The engine can be asked now."""
        status = await engine.status()
        body = {"status": "ready" if status.ready else "waiting", "engine": engine.name, "detail": status.detail}
        return JSONResponse(body, status_code=200 if status.ready else 503)

    @app.get("/version", tags=["operation"], summary="Version")
    async def version() -> dict[str, str]:
        """The server's version."""
        return {"version": __version__}

    @app.get("/metrics", tags=["operation"], summary="Prometheus metrics", response_class=Response)
    async def exposition() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(metrics.expose(), media_type=metrics.content_type)
