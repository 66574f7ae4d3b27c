"""Any error becomes the one envelope: ``{"error": {"message", "type", "param", "code"}}`` with its status."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from ergo_server.errors import ErgoError, MethodNotAllowed, NotFound, RequestError
from ergo_server.telemetry.logging import places

log = logging.getLogger("ergo_server")


def envelope(error: ErgoError) -> dict[str, Any]:
    """Return the body for an error."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def respond(error: ErgoError, request: Request) -> JSONResponse:
    """Return the response for an error, and note it for the request's log line."""
    request.scope["failure"] = error
    headers = {"x-request-id": str(request.scope.get("request_id", ""))}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    return JSONResponse(envelope(error), status_code=error.status, headers=headers)


def from_validation(errors: RequestValidationError | ValidationError) -> RequestError:
    """Name the first field that is wrong. The value is not repeated: it may be the image."""
    first = errors.errors()[0]
    where = ".".join(str(part)[:64] for part in first["loc"] if part not in ("body", "query"))
    message = first["msg"].removeprefix("Value error, ")
    return RequestError(f"{where}: {message}" if where else message, param=where or None)


def unforeseen(error: Exception, scope: Scope) -> ErgoError:
    """Log a mistake of ours, and return what the caller is told of it.

    The text of such an exception may quote the request: only its kind and its places are for the log, nothing for the caller.
    """
    kind, found, request_id = type(error).__name__, places(error.__traceback__), scope.get("request_id")
    told = {"request_id": request_id, "exception": kind, "places": found}
    log.error("unforeseen %s at %s in request %s", kind, ", ".join(found), request_id, extra={"fields": told})
    return ErgoError("the server made a mistake; the request id names it in its log")


def install(app: FastAPI, routers: Iterable[APIRouter]) -> None:
    """Answer every error of ``app`` with the envelope, those of the framework included; `Observe` sees to the unforeseen ones."""
    methods: dict[str, set[str]] = {}
    for route in (route for router in routers for route in router.routes if isinstance(route, APIRoute)):
        methods.setdefault(route.path, set()).update(route.methods or ())

    @app.exception_handler(ErgoError)
    async def ours(request: Request, error: ErgoError) -> JSONResponse:
        return respond(error, request)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return respond(from_validation(error), request)

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404:
            return respond(NotFound(f"there is no {request.url.path}"), request)
        if error.status_code == 405:
            response = respond(MethodNotAllowed(f"{request.url.path} does not answer {request.method}"), request)
            response.headers.update(error.headers or {})
            path = getattr(request.scope.get("route"), "path", "")
            if path in methods:  # the framework knows those of one route only, and a path may have several
                response.headers["allow"] = ", ".join(sorted(methods[path]))
            return response
        translated = RequestError(str(error.detail))
        response = respond(translated, request)
        response.status_code = error.status_code
        return response
