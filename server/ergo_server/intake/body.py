"""Request bodies: JSON, multipart forms, raw images.

An image that is sent as bytes is passed on while it arrives, and never copied into a form or a string. Parsing a 20-MB JSON
body stalls an event loop for tens of milliseconds, so that happens in a thread.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from ergo_server.errors import RequestError, UnsupportedBody
from ergo_server.intake.form import FormLimits, Texts, read_form
from ergo_server.intake.images import Arriving

LISTS = ("choices", "include")
"""Fields that may stand several times in a form or a query."""

Opener = Callable[[dict[str, Any]], Arriving]
"""Opens the image whose bytes come next, knowing the fields that came before it."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a request may hold, whatever its form."""

    text_chars: int = 1 << 18
    """Of a question with its choices and instructions, or of a conversation; at four a token twice the 32,768 tokens of ERGO-7B's
    context, so that the engine's own refusal, which counts, comes first for all but nonsense."""
    images: int = 8
    """Of a conversation; more would not fit the engine's context beside the target's two views."""
    form: FormLimits = FormLimits()

    def check_text(self, texts: Iterable[str], param: str) -> None:
        """Refuse too much text.

        Raises:
            RequestError: it is more than `text_chars`.
        """
        if sum(map(len, texts)) > self.text_chars:
            raise RequestError(f"{param}: at most {self.text_chars:,} characters of text", param=param)


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


async def read_fields(request: Request, opened: Opener, limits: FormLimits) -> dict[str, Any]:
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
        return await _read_form(request, content_type, opened, limits)
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


async def _read_form(request: Request, content_type: str, opened: Opener, limits: FormLimits) -> dict[str, Any]:
    def open_file(name: str, texts: Texts) -> Arriving:
        if name != "image":
            raise RequestError(f"{name[:64]}: no file is expected there", param=name[:64])
        return opened(_flat(texts))

    texts, file = await read_form(request.stream(), content_type, open_file, limits)
    fields = _flat(texts)
    if isinstance(file, Arriving):
        fields["image"] = file.original if file.original.file.size else None
    return fields


def _flat(texts: Texts) -> dict[str, Any]:
    return {name: values if name in LISTS else values[-1] for name, values in texts.items()}
