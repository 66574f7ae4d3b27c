"""The OpenAPI document at ``/openapi.json``, and Swagger UI at ``/docs``: all of it from packages, nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable

from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles

from ergo_server.api.openapi import document

_FOLDER = "/static/docs"
"""Below the page's files, which are open to those without a key."""

_POLICY = (
    "default-src 'none'; script-src 'self' 'sha256-{script}'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def install(app: FastAPI, routers: Iterable[APIRouter]) -> None:
    """Add the document of some routers, the page that shows it, and the page's files."""
    described = document(routers)
    app.openapi = lambda: described  # type: ignore[method-assign]  # FastAPI's way to bring a document of one's own
    page = _page()

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return JSONResponse(described)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return page

    app.mount(_FOLDER, StaticFiles(packages=[("fastapi_offline", "static")]))


def _page() -> Response:
    """Return FastAPI's page around Swagger UI, with a policy that lets the one script in it run."""
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="ergo-vqa: the interface",
        swagger_js_url=f"{_FOLDER}/swagger-ui-bundle.js",
        swagger_css_url=f"{_FOLDER}/swagger-ui.css",
        swagger_favicon_url="data:,",
        swagger_ui_parameters={"validatorUrl": None, "defaultModelsExpandDepth": 0},
    )
    script = bytes(page.body).rpartition(b"<script>")[2].partition(b"</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    page.headers["content-security-policy"] = _POLICY.format(script=digest)
    page.headers["x-content-type-options"] = "nosniff"
    page.headers["referrer-policy"] = "no-referrer"
    return page
