"""What is sent to a server, and what is read from its answer."""

from __future__ import annotations

import base64
import http.client
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode, urlsplit

from ergo_server.protocol.base import Prompts, Question
from ergo_server.protocol.prompts import fill
from ergo_server.protocol.replies import parse_answer
from loadtests.pictures import Picture

PATIENCE = 180.0
"""Seconds without a byte after which a request counts as lost; the server's own deadlines are shorter."""

ANSWER_TOKENS = 64
"""Longest reply where systems are compared. ergo-mini's have under 30; shown an image at full resolution, which it was never
trained on, it would go on until it is stopped, and the comparison would be one of its rambling."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request that is made but not sent, so that making it costs the load nothing."""

    path: str
    body: bytes
    kind: str
    """What it is counted under."""
    answer: str | None = None
    """What is right; None where nothing is asked."""
    content_type: str = "application/json"
    engine: bool = False
    """Whether it goes to the bare engine, whose reply is still to be parsed."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back."""

    status: int
    """0: the connection broke, or nothing came."""
    code: str = ""
    """Of the error; empty when answered."""
    text: str = ""
    visual_tokens: int = 0
    baseline: int = 0
    """Visual tokens that the same image costs without zoom; 0 where the server does not say."""
    cached_tokens: int = 0
    completion_tokens: int = 0
    timings: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds by stage, as the server says."""


def about_image(picture: Picture, kind: str) -> Request:
    """Ask /v1/vqa with the image as the body."""
    path = "/v1/vqa?" + urlencode({"question": picture.question, "temperature": 0})
    return Request(path, picture.data, kind, picture.answer, "image/jpeg")


def about_upload(upload: str, question: str, answer: str, kind: str) -> Request:
    """Ask /v1/vqa about an image that was sent before."""
    body = {"image": upload, "question": question, "temperature": 0}
    return Request("/v1/vqa", json.dumps(body).encode(), kind, answer)


def chat(picture: Picture, model: str, budget: int | None = None) -> Request:
    """Ask the gateway's /v1/chat/completions, with the original as a ``data:`` URL.

    Args:
        picture: what about.
        model: ``ergo`` or ``ergo-single``.
        budget: visual tokens of a view; None: the model's own.
    """
    body: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": ANSWER_TOKENS}
    body["messages"] = [_message(picture, picture.question)]
    if budget is not None:
        body["ergo"] = {"max_visual_tokens": budget}
    return Request("/v1/chat/completions", json.dumps(body).encode(), "question", picture.answer)


def bare(picture: Picture, model: str, prompts: Prompts) -> Request:
    """Ask the engine itself, with the words that the gateway would use for one turn, and the original as a ``data:`` URL."""
    words = fill(prompts.single_user, Question(picture.question), choices=True)
    body = {
        "model": model,
        "temperature": 0,
        "max_tokens": ANSWER_TOKENS,
        "stop": ["</answer>"],
        "include_stop_str_in_output": True,
        "messages": [{"role": "system", "content": prompts.single_system}, _message(picture, words)],
    }
    return Request("/v1/chat/completions", json.dumps(body).encode(), "question", picture.answer, engine=True)


def _message(picture: Picture, words: str) -> dict[str, Any]:
    url = f"data:image/jpeg;base64,{base64.b64encode(picture.data).decode()}"
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": words}]}


class Server:
    """A server under load. Each request has a connection of its own, as those of different people have.

    Args:
        url: its base URL.
        key: API key, if it wants one.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url)
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname or "", parts.port
        self._prefix = parts.path.rstrip("/")
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection that is not open yet."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=PATIENCE)

    def head(self, path: str, **headers: str) -> bytes:
        """Return the head of a POST, for who does not mean to send all of it."""
        lines = {"host": self._host, **self._headers, **{name.replace("_", "-"): text for name, text in headers.items()}}
        said = "".join(f"{name}: {text}\r\n" for name, text in lines.items())
        return f"POST {self._prefix}{path} HTTP/1.1\r\n{said}\r\n".encode()

    def get(self, path: str) -> str:
        """Return what a GET is answered with.

        Raises:
            OSError, http.client.HTTPException: it is not answered.
        """
        return self._exchange("GET", path, None, {})[1].decode()

    def post(self, path: str, body: bytes, content_type: str) -> tuple[int, Any]:
        """Send a body; returns the status, and the JSON of the answer (None where it is none).

        Raises:
            OSError, http.client.HTTPException: it is not answered.
        """
        status, said = self._exchange("POST", path, body, {"content-type": content_type})
        try:
            return status, json.loads(said)
        except ValueError:
            return status, None

    def send(self, request: Request) -> Reply:
        """Send a request, and read all of the answer. Never raises for what a server does."""
        try:
            status, said = self.post(request.path, request.body, request.content_type)
        except (OSError, http.client.HTTPException) as error:
            return Reply(0, type(error).__name__)
        try:
            return _read(status, said, request.engine)
        except (LookupError, TypeError, ValueError):
            return Reply(status, "not_understood")

    def _exchange(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> tuple[int, bytes]:
        connection = self.connect()
        try:
            connection.request(method, self._prefix + path, body, {**self._headers, **headers, "connection": "close"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def _read(status: int, said: Any, engine: bool) -> Reply:
    """Read the answer of /v1/vqa, or a completion of the gateway or of the engine.

    Raises:
        LookupError, TypeError, ValueError: it has another form.
    """
    if status not in (200, 201):
        return Reply(status, str(said["error"]["code"]))
    if "choices" not in said:
        return _told(status, str(said["answer"]), said["usage"], said["visual_tokens"], said["timings"])
    text = str(said["choices"][0]["message"]["content"])
    if engine:
        details = said["usage"].get("prompt_tokens_details") or {}
        seen = int((details.get("multimodal_tokens") or {}).get("image") or 0)
        return _told(status, parse_answer(text).text, said["usage"], {"total": seen, "baseline": seen}, {})
    return _told(status, text, said["usage"], said["ergo"]["visual_tokens"], said["ergo"]["timings"])


def _told(status: int, text: str, usage: Any, visual: Any, timings: Any) -> Reply:
    return Reply(
        status,
        text=text.strip(),
        visual_tokens=int(visual["total"]),
        baseline=int(visual["baseline"]),
        cached_tokens=int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
        completion_tokens=int(usage["completion_tokens"]),
        timings={name.removesuffix("_ms"): float(took) for name, took in timings.items()},
    )


@dataclass(frozen=True, slots=True)
class Sample:
    """One request and what became of it. Moments are seconds after the start of the run."""

    kind: str
    due: float
    """When it should have been sent; with closed loops when it was."""
    sent: float
    ended: float
    reply: Reply
    answer: str | None
    """What is right; None where nothing is asked."""

    @property
    def seconds(self) -> float:
        """From the moment it was due to the last byte."""
        return self.ended - self.due

    @property
    def late(self) -> float:
        """Seconds by which the load itself was late."""
        return self.sent - self.due

    @property
    def answered(self) -> bool:
        """Whether an answer came, right or wrong."""
        return self.reply.status == 200 and not self.reply.code

    @property
    def right(self) -> bool:
        """Whether the right answer came."""
        return self.answered and self.reply.text == self.answer


def ask(server: Server, request: Request, start: float, due: float | None = None) -> Sample:
    """Send a request now.

    Args:
        server: to whom.
        request: what.
        start: of the run, as `time.perf_counter` counts.
        due: when it should have been sent, likewise; None: now.
    """
    sent = time.perf_counter()
    reply = server.send(request)
    ended = time.perf_counter()
    return Sample(request.kind, (sent if due is None else due) - start, sent - start, ended - start, reply, request.answer)
