"""Hooks of schemathesis: what no schema can say of a sound request, and two checks of our own.

Any bytes satisfy a schema that asks for an image, and only refusals would be tried. So requests that are meant to be sound get
a real image. Those that are meant to be wrong are left as they are.
"""

from __future__ import annotations

import os
import zlib
from typing import Any

import schemathesis
from asking import data_url, encoded, picture
from schemathesis import Case, CheckContext, GenerationMode, HookContext, Response

FILES = (picture(60, 60), picture(120, 90, "JPEG", orientation=6), picture(8, 8, "GIF"))
MOST_IMAGES = 8
"""Of a conversation; the server's default."""


def number(*drawn: object) -> int:
    """Return a number that depends on what was drawn only, so that the same run sends the same."""
    return zlib.crc32(repr(drawn).encode())


def files(drawn: object) -> bytes:
    """Return one of the files."""
    return FILES[number(drawn) % len(FILES)]


def image(drawn: object) -> Any:
    """Return one of the ways in which JSON brings an image."""
    ways: list[Any] = [data_url(files(drawn)), {"data": encoded(files(drawn))}]
    if uploaded := os.environ.get("ERGO_TEST_UPLOAD"):
        ways.append(uploaded)
    return ways[number(drawn) // len(FILES) % len(ways)]


@schemathesis.hook
def before_call(context: HookContext, case: Case[Any], kwargs: dict[str, Any]) -> None:
    """Make a request that is meant to be sound a sound one; every third question is answered as a stream."""
    if case.meta is None or case.meta.generation.mode is not GenerationMode.POSITIVE or case.media_type is None:
        return
    fields: dict[str, Any] = dict(case.body if isinstance(case.body, dict) else case.query)
    drawn = repr(fields)
    if case.path in ("/v1/vqa", "/v1/chat/completions") and number(drawn) % 3 == 0:
        fields["stream"] = True
    if case.path == "/v1/chat/completions":
        case.body = fields | {"messages": conversation(fields["messages"])}
    elif case.media_type == "application/json":
        case.body = fields | {"image": image(drawn)}
    elif case.media_type == "multipart/form-data":
        case.body = fields | {"image": files(drawn)}
    else:
        case.query = fields | ({"question": "?"} if case.path == "/v1/vqa" else {})
        case.body = files(drawn)


def conversation(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose images are images, and not too many, and the last of which asks."""
    left = MOST_IMAGES - 1
    sound = []
    for message in messages[:511]:
        content = message.get("content")
        if isinstance(content, list):
            images = [part for part in content if isinstance(part, dict) and part["type"] == "image_url"]
            left -= len(images)
            content = [{**part, "image_url": {"url": data_url(files(part))}} if part in images else part for part in content]
        sound.append({**message, "content": content if left >= 0 else None})
    asking = [{"type": "image_url", "image_url": {"url": data_url(files(messages))}}, {"type": "text", "text": "?"}]
    return [*sound, {"role": "user", "content": asking}]


@schemathesis.check
def documented_code(context: CheckContext, response: Response, case: Case[Any]) -> None:
    """An error's code is among those that the document names for its status."""
    if response.status_code < 400 or "error" not in response.json():
        return
    shown = case.operation.responses.find_by_status_code(response.status_code)
    if shown is not None:
        code = response.json()["error"]["code"]
        assert code in shown.definition["content"]["application/json"]["examples"], f"{code} is not documented"


@schemathesis.check
class Answered:
    """Every operation was answered with success at least once: else only its refusals were tried."""

    def __init__(self) -> None:
        self.tried: set[str] = set()
        self.answered: set[str] = set()

    def after_response(self, context: CheckContext, response: Response, case: Case[Any]) -> None:
        """Take note."""
        self.tried.add(case.operation.label)
        if response.status_code < 300:
            self.answered.add(case.operation.label)

    def after_run(self, context: CheckContext) -> None:
        """Say what never was."""
        assert self.tried == self.answered, f"never answered: {sorted(self.tried - self.answered)}"
