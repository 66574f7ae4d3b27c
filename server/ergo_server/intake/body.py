"""Request bodies: JSON, multipart forms, raw images.

An image that is sent as bytes is passed on while it arrives, and never copied into a form or a string. Parsing a 20-MB JSON
body stalls an event loop for tens of milliseconds, so that happens in a thread.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from starlette.requests import Request

from ergo_server.errors import RequestError, UnsupportedBody
from ergo_server.intake.form import Texts, read_form
from ergo_server.intake.images import Arriving

LISTS = ("choices", "include")
"""Fields that may stand several times in a form or a query."""

Opener = Callable[[dict[str, Any]], Arriving]
"""Opens the image whose bytes come next, knowing the fields that came before it."""


async def read_json(request: Request) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RequestError: not JSON, or no object.
    """
    body = await request.body()
    try:
        value = await asyncio.to_thread(json.loads, body)
    except (ValueError, RecursionError) as error:
        raise RequestError("the body is not JSON") from error
    if not isinstance(value, dict):
        raise RequestError("the body is not a JSON object")
    return value


async def read_fields(request: Request, opened: Opener) -> dict[str, Any]:
    """Read a question in any of its three forms into one dictionary; a sent image is an `Original` under ``image``.

    * ``application/json``: as it is.
    * ``multipart/form-data``: text fields and the file ``image``; ``choices`` and ``include`` may stand several times.
    * ``image/*`` or ``application/octet-stream``: the body is the image, the query holds the fields.

    Raises:
        RequestError: the body cannot be read.
        UnsupportedBody: another content type.
        ImageError: the image that arrives is none, or none that is let in.
    """
    content_type = request.headers.get("content-type", "")
    kind = content_type.split(";")[0].strip().lower()
    if kind == "application/json":
        return await read_json(request)
    if kind == "multipart/form-data":
        return await _read_form(request, content_type, opened)
    if kind.startswith("image/") or kind == "application/octet-stream":
        fields = _flat({name: request.query_params.getlist(name) for name in request.query_params})
        arriving = opened(fields)
        size = 0
        async for chunk in request.stream():
            if chunk:
                size += len(chunk)
                arriving.write(chunk)
        arriving.end()
        return fields | {"image": arriving.original if size else None}
    raise UnsupportedBody(f"content type {kind or 'missing'!r}; send application/json, multipart/form-data or image/*")


async def _read_form(request: Request, content_type: str, opened: Opener) -> dict[str, Any]:
    def open_file(name: str, texts: Texts) -> Arriving:
        if name != "image":
            raise RequestError(f"{name[:64]}: no file is expected there", param=name[:64])
        return opened(_flat(texts))

    texts, file = await read_form(request.stream(), content_type, open_file)
    fields = _flat(texts)
    if isinstance(file, Arriving):
        fields["image"] = file.original if file.original.file.size else None
    return fields


def _flat(texts: Texts) -> dict[str, Any]:
    return {name: values if name in LISTS else values[-1] for name, values in texts.items()}
