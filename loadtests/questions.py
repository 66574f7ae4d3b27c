"""What is sent to a server, and what is read from its answer."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode, urlsplit

from ergo_server.protocol.base import Prompts, Question
from ergo_server.protocol.prompts import fill
from ergo_server.protocol.replies import parse_answer
from loadtests import soak
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
    stream: bool = False
    """Whether the answer comes as server-sent events."""
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=dict)
    """Beside the content type; they take the place of the server's own."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Tokens of one turn, as the server says."""

    name: str
    prompt: int
    completion: int
    image: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back."""

    status: int
    """0: the connection broke, or nothing came."""
    code: str = ""
    """Of the error; empty when answered. `LEFT` where whoever asked did not want to know."""
    text: str = ""
    """The visible answer, or the name of an upload."""
    visual_tokens: int = 0
    baseline: int = 0
    """Visual tokens that the same image costs without zoom; 0 where the server does not say."""
    cached_tokens: int = 0
    completion_tokens: int = 0
    timings: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds by stage, as the server says."""
    turns: Sequence[Turn] = ()
    retry_after: float | None = None
    """Seconds after which the server wants to be asked again; None: it does not say."""


LEFT = "left"
"""Code of a reply that nobody waited for."""


def about_image(picture: Picture, kind: str, *, budget: int | None = None, stream: bool = False) -> Request:
    """Ask /v1/vqa with the image as the body.

    Args:
        picture: what about.
        kind: what it is counted under.
        budget: visual tokens of a view; None: the model's own.
        stream: have the answer as server-sent events.
    """
    fields = {"question": picture.question, "temperature": 0}
    fields |= ({} if budget is None else {"max_visual_tokens": budget}) | ({"stream": "true"} if stream else {})
    path = "/v1/vqa?" + urlencode(fields)
    return Request(path, picture.data, kind, picture.answer, picture.content_type, stream=stream)


def upload(picture: Picture) -> Request:
    """Give an image to /v1/images; the text of the reply is its name."""
    return Request("/v1/images", picture.data, "upload", content_type=picture.content_type)


def forget(name: str) -> Request:
    """Have the server forget an upload."""
    return Request(f"/v1/images/{name}", b"", "delete", method="DELETE")


def about_upload(name: str, question: str, answer: str, kind: str) -> Request:
    """Ask /v1/vqa about an image that was sent before."""
    body = {"image": name, "question": question, "temperature": 0}
    return Request("/v1/vqa", json.dumps(body).encode(), kind, answer)


def chat(picture: Picture, model: str, budget: int | None = None, *, kind: str = "question", stream: bool = False) -> Request:
    """Ask the gateway's /v1/chat/completions, with the original as a ``data:`` URL.

    Args:
        picture: what about.
        model: ``ergo`` or ``ergo-single``.
        budget: visual tokens of a view; None: the model's own.
        kind: what it is counted under.
        stream: have the answer as server-sent events.
    """
    body: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": ANSWER_TOKENS}
    body["messages"] = [_message(picture, picture.question)]
    if budget is not None:
        body["ergo"] = {"max_visual_tokens": budget}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return Request("/v1/chat/completions", json.dumps(body).encode(), kind, picture.answer, stream=stream)


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
    url = f"data:{picture.content_type};base64,{base64.b64encode(picture.data).decode()}"
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": words}]}


class Server:
    """A server under load. Each request has a connection of its own, as those of different people have, except on a `Line`.

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
        """Return what a GET is answered with, whatever its status.

        Raises:
            OSError, http.client.HTTPException: it is not answered.
        """
        connection = self.connect()
        try:
            return self.exchange(connection, Request(path, b"", "", method="GET", headers={"connection": "close"}))[1].decode()
        finally:
            connection.close()

    def cpu(self) -> float:
        """Return the seconds of processor time that the server's process has taken so far; NaN where its /metrics do not say."""
        try:
            return soak.values(self.get("/metrics"))["process_cpu_seconds_total"]
        except (OSError, http.client.HTTPException, LookupError, ValueError):
            return math.nan

    def send(self, request: Request, line: Line | None = None) -> Reply:
        """Send a request, and read all of the answer. Never raises for what a server does.

        Args:
            request: what.
            line: on which connection; None: on one of its own.
        """
        try:
            response, said = line.exchange(request) if line else self._alone(request)
        except (OSError, http.client.HTTPException) as error:
            return Reply(0, type(error).__name__)
        try:
            found = _read(response.status, said, request)
        except (LookupError, TypeError, ValueError):
            found = Reply(response.status, "not_understood")
        with contextlib.suppress(TypeError, ValueError):  # no such header, or a date
            found = replace(found, retry_after=float(response.headers["retry-after"]))
        return found

    def exchange(self, connection: http.client.HTTPConnection, request: Request) -> tuple[http.client.HTTPResponse, bytes]:
        """Send a request on a connection, and read all of the answer.

        Raises:
            OSError, http.client.HTTPException: it is not answered.
        """
        headers = {"content-type": request.content_type} if request.body else {}
        connection.request(
            request.method, self._prefix + request.path, request.body or None, {**self._headers, **headers, **request.headers}
        )
        response = connection.getresponse()
        return response, response.read()

    def _alone(self, request: Request) -> tuple[http.client.HTTPResponse, bytes]:
        connection = self.connect()
        try:
            return self.exchange(connection, replace(request, headers={**request.headers, "connection": "close"}))
        finally:
            connection.close()


class Line:
    """A connection that is kept between requests, and made anew where the server has closed it meanwhile.

    Args:
        server: to whom.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._connection = server.connect()

    def exchange(self, request: Request) -> tuple[http.client.HTTPResponse, bytes]:
        """Send a request, and read all of the answer.

        Raises:
            OSError, http.client.HTTPException: it is not answered.
        """
        used = self._connection.sock is not None
        try:
            return self._server.exchange(self._connection, request)
        except (ConnectionError, http.client.HTTPException):
            self.close()
            # A server may close a connection that says nothing just when the next request is on its way: every client that keeps
            # connections sends it once more. On a fresh one there is no such excuse.
            if not used:
                raise
            return self._server.exchange(self._connection, request)

    def close(self) -> None:
        """Close it; the next request opens another."""
        self._connection.close()


def _read(status: int, said: bytes, request: Request) -> Reply:
    """Read an answer of the gateway, or of the engine.

    Raises:
        LookupError, TypeError, ValueError: it has another form.
    """
    if status not in (200, 201):
        return Reply(status, str(json.loads(said)["error"]["code"]))
    if request.answer is None and status == 200:
        return Reply(status)
    whole = _end_of_stream(said.decode()) if request.stream else json.loads(said)
    if "error" in whole:  # after the first event there is no other status to be had
        return Reply(status, str(whole["error"]["code"]))
    if status == 201:
        return Reply(status, text=str(whole["id"]))
    if "choices" not in whole:
        usage = whole["usage"]
        return _told(status, str(whole["answer"]), usage, whole["visual_tokens"], whole["timings"], usage.get("turns", ()))
    text = str(whole["choices"][0]["message"]["content"])
    if request.engine:
        details = whole["usage"].get("prompt_tokens_details") or {}
        seen = int((details.get("multimodal_tokens") or {}).get("image") or 0)
        return _told(status, parse_answer(text).text, whole["usage"], {"total": seen, "baseline": seen}, {}, ())
    found = whole["ergo"]
    return _told(status, text, whole["usage"], found["visual_tokens"], found["timings"], found.get("turns", ()))


def _end_of_stream(said: str) -> Any:
    """Return what a stream of events says in the form of a single answer.

    Raises:
        LookupError: it breaks off.
        ValueError: it has another form.
    """
    named = [_event(block) for block in said.split("\n\n") if block]
    name, last = named[-1]
    if name in ("done", "error"):
        return json.loads(last)
    if last != "[DONE]":
        raise LookupError("the stream breaks off")
    chunks = [json.loads(data) for _, data in named[:-1]]
    if "error" in chunks[-1]:
        return chunks[-1]
    told = {name: chunk[name] for chunk in chunks for name in ("ergo", "usage") if chunk.get(name)}
    pieces = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    return {"choices": [{"message": {"content": "".join(pieces)}}], **told}


def _event(block: str) -> tuple[str, str]:
    """Return the name and the data of an event."""
    lines = dict(line.split(": ", 1) for line in block.splitlines())
    return lines.get("event", ""), lines["data"]


def _told(status: int, text: str, usage: Any, visual: Any, timings: Any, turns: Any) -> Reply:
    return Reply(
        status,
        text=text.strip(),
        visual_tokens=int(visual["total"]),
        baseline=int(visual["baseline"]),
        cached_tokens=int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
        completion_tokens=int(usage["completion_tokens"]),
        timings={name.removesuffix("_ms"): float(took) for name, took in timings.items()},
        turns=[
            Turn(turn["turn"], int(turn["prompt_tokens"]), int(turn["completion_tokens"]), int(turn["image_tokens"] or 0))
            for turn in turns
        ],
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
        return self.reply.status in (200, 201) and not self.reply.code

    @property
    def right(self) -> bool:
        """Whether the right answer came."""
        return self.answered and self.reply.text == self.answer


def ask(server: Server, request: Request, start: float, due: float | None = None, line: Line | None = None) -> Sample:
    """Send a request now.

    Args:
        server: to whom.
        request: what.
        start: of the run, as `time.perf_counter` counts.
        due: when it should have been sent, likewise; None: now.
        line: on which connection; None: on one of its own.
    """
    sent = time.perf_counter()
    reply = server.send(request, line)
    ended = time.perf_counter()
    return Sample(request.kind, (sent if due is None else due) - start, sent - start, ended - start, reply, request.answer)
