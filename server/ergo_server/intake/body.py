"""Request bodies and the images in them: JSON with base64, multipart forms, raw images.

Parsing a 20-MB JSON body or decoding its base64 stalls an event loop for tens of milliseconds, so both happen in a thread.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from ergo_server.errors import ImageNotFetched, ImageUnreadable, RequestError, UnsupportedBody

MAX_FIELD_BYTES = 1024 * 1024
"""Longest text field of a form; a question is at most a few kilobytes."""


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


async def read_fields(request: Request) -> dict[str, Any]:
    """Read a question in any of its three forms into one dictionary; an uploaded image is ``bytes`` under ``image``.

    * ``application/json``: as it is.
    * ``multipart/form-data``: text fields and the file ``image``; ``choices`` and ``include`` may stand several times.
    * ``image/*`` or ``application/octet-stream``: the body is the image, the query holds the fields.

    Raises:
        RequestError: the body cannot be read.
        UnsupportedBody: another content type.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "application/json":
        return await read_json(request)
    if kind == "multipart/form-data":
        return await _read_form(request)
    if kind.startswith("image/") or kind == "application/octet-stream":
        return _flat(dict.fromkeys(request.query_params), request.query_params.getlist) | {"image": await request.body()}
    raise UnsupportedBody(f"content type {kind or 'missing'!r}; send application/json, multipart/form-data or image/*")


async def _read_form(request: Request) -> dict[str, Any]:
    try:
        async with request.form(max_files=1, max_fields=64, max_part_size=MAX_FIELD_BYTES) as form:
            texts = {key: None for key, value in form.multi_items() if isinstance(value, str)}
            fields = _flat(texts, lambda key: [value for value in form.getlist(key) if isinstance(value, str)])
            for key, value in form.multi_items():
                if isinstance(value, UploadFile):
                    fields[key] = await value.read()
            return fields
    except HTTPException as error:  # what Starlette makes of its MultiPartException
        raise RequestError(f"the form cannot be read: {error.detail}") from error


def _flat(names: Mapping[str, None], values: Any) -> dict[str, Any]:
    lists = ("choices", "include")
    return {name: values(name) if name in lists else values(name)[-1] for name in names}


async def image_bytes(image: object) -> bytes:
    """Return the bytes of an image as a request names it: uploaded bytes, a ``data:`` URL, or ``{"data": base64}``.

    Raises:
        ImageUnreadable: the base64 is broken.
        ImageNotFetched: an address of a remote image; this server fetches none.
        RequestError: none of these.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, dict) and isinstance(image.get("data"), str):
        return await asyncio.to_thread(_decode_base64, image["data"])
    if isinstance(image, str):
        if image[:5].lower() == "data:":
            head, comma, data = image[5:].partition(",")
            if not comma or not head.lower().endswith(";base64"):
                raise ImageUnreadable("a data: URL of an image must be base64", param="image")
            return await asyncio.to_thread(_decode_base64, data)
        if image[:8].lower().startswith(("http://", "https://")):
            raise ImageNotFetched("this server fetches no remote images; send the bytes, or a data: URL", param="image")
    raise RequestError('the image must be a data: URL, {"data": base64}, or an uploaded file', param="image")


def _decode_base64(data: str) -> bytes:
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageUnreadable("the image is not valid base64", param="image") from error
