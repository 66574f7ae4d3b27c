"""The page at ``/``: plain HTML, CSS and JavaScript modules from the package, nothing from elsewhere."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.responses import FileResponse, Response
from starlette.staticfiles import NotModifiedResponse, StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # kept, and asked about each time: all files of the page are then of one version
}


class _Files(StaticFiles):
    """Files whose ETag comes from what is in them. Starlette's comes from time and length, and images built to be
    reproducible give every version of a file the same time."""

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        digest = hashlib.sha256(Path(full_path).read_bytes()).hexdigest()
        headers = _HEADERS | {"etag": f'"{digest}"'}
        response = FileResponse(full_path, status_code=status_code, headers=headers, stat_result=stat_result)
        if self.is_not_modified(response.headers, Headers(scope=scope)):
            return NotModifiedResponse(response.headers)
        return response


def install(app: FastAPI) -> None:
    """Add the page and its files."""
    files = _Files(directory=FOLDER / "static")
    index = FOLDER / "index.html"

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return files.file_response(index, index.stat(), request.scope)

    app.mount("/static", files)
