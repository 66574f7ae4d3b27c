"""Parts for tests of the HTTP interface: scripted replies, requests in each form, and readers of events and metrics."""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx2
import support
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from ergo_server.engine.base import Engine, Sampling
from ergo_server.engine.scripted import ScriptedEngine
from ergo_server.errors import EngineError
from ergo_server.protocol.conversation import Conversation

ZOOM = "<think>left</think><zoom>[10, 20, 60, 60]</zoom>"
ANSWER = "<think>It is a seven.</think><answer>seven</answer>"


def scripted(zoom: str | EngineError = ZOOM, answer: str | EngineError = ANSWER, seconds_per_token: float = 0) -> ScriptedEngine:
    """Return an engine with one reply for zoom turns, and one for all others."""

    def script(conversation: Conversation, sampling: Sampling) -> str | EngineError:
        return zoom if "</zoom>" in sampling.stop else answer

    return ScriptedEngine(script, seconds_per_token)


def client(engine: Engine | None = None, **given: object) -> TestClient:
    """Return a client of a server in this process; it raises what the server does not catch."""
    return TestClient(support.app(engine or scripted(), **given))


@functools.cache
def picture(width: int = 800, height: int = 600, form: str = "PNG", orientation: int = 1, red: bool = False) -> bytes:
    """Return the file of a plain image; ``red`` gives one that differs in nothing but its colour."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    with io.BytesIO() as file:
        Image.new("RGB", (width, height), "red" if red else "green").save(file, form, exif=exif)
        return file.getvalue()


def encoded(image: bytes) -> str:
    """Return an image in base64."""
    return base64.b64encode(image).decode()


def data_url(image: bytes, kind: str = "png") -> str:
    """Return an image as a data: URL."""
    return f"data:image/{kind};base64,{encoded(image)}"


def post_json(http: TestClient, path: str, body: object) -> httpx2.Response:
    """Send any JSON, also what only its escapes can spell."""
    return http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})


def vqa(http: TestClient, photo: bytes | None = None, /, **fields: Any) -> httpx2.Response:
    """Ask /v1/vqa in JSON."""
    body = {"image": data_url(photo or picture()), "question": "What is written there?", **fields}
    return post_json(http, "/v1/vqa", body)


def says(*parts: str | bytes, role: str = "user") -> dict[str, Any]:
    """Return a message of OpenAI's form."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in parts
    ]
    return {"role": role, "content": content}


def chat(http: TestClient, *messages: dict[str, Any], **fields: Any) -> httpx2.Response:
    """Ask /v1/chat/completions; about the usual picture where no messages are given."""
    given = list(messages) or [says(picture(), "What is written there?")]
    return post_json(http, "/v1/chat/completions", {"model": "ergo", "messages": given, **fields})


def events(text: str) -> list[tuple[str, Any]]:
    """Return name and data of each server-sent event; fails where an event is not one ``data:`` line, named or not."""
    found = []
    assert text.endswith("\n\n")
    for block in text[:-2].split("\n\n"):
        *named, data = block.split("\n")
        assert data.startswith("data: ")
        assert len(named) <= 1
        name = named[0].removeprefix("event: ") if named else ""
        found.append((name, data[6:] if data[6:] == "[DONE]" else json.loads(data[6:])))
    return found


def chunks(text: str) -> list[dict[str, Any]]:
    """Return the chunks of a streamed completion, which must end with [DONE]."""
    *body, (_, last) = events(text)
    assert last == "[DONE]"
    return [data for _, data in body]


def error(response: httpx2.Response) -> tuple[int, str, str | None]:
    """Return status, code and param of an error; fails where it is not exactly the envelope."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert response.headers["x-request-id"]
    return response.status_code, body["error"]["code"], body["error"]["param"]


Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def series(text: str) -> Series:
    """Return every sample of an exposition by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Meter:
    """Reads /metrics.

    Args:
        get: returns the exposition.
    """

    def __init__(self, get: Callable[[], str]) -> None:
        self._get = get

    @classmethod
    def of(cls, http: TestClient | str) -> Meter:
        """Read from a client, or from a URL."""
        if isinstance(http, str):
            return cls(lambda: httpx2.get(f"{http}/metrics", trust_env=False).text)
        return cls(lambda: http.get("/metrics").text)

    def all(self) -> Series:
        """Return every sample."""
        return series(self._get())

    def __call__(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of a name that carry these labels."""
        found = [value for (its, given), value in self.all().items() if its == name and labels.items() <= dict(given).items()]
        assert found, f"no series {name} {labels}"
        return sum(found)


def texts(conversation: Conversation) -> str:
    """Return all text of a conversation."""
    return "\n".join(part for message in conversation.messages for part in message.parts if isinstance(part, str))


def sizes(conversation: Conversation) -> Sequence[tuple[int, int]]:
    """Return the sizes of the views in a conversation."""
    return [(view.size.width, view.size.height) for view in conversation.views]
