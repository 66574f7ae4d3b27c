"""A canary: secrets in every place of a request and of the engine's replies are in none of the server's outputs.

Every error that there is gets provoked, with all loggers at DEBUG. What is searched: log records with all that they carry, the
process's own outputs, the traces, the metrics.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import itertools
import json
import logging
import traceback
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import httpx2
import pytest
import support
from asking import client, data_url, scripted
from collector import Collector, collecting
from PIL import Image, PngImagePlugin
from starlette.responses import StreamingResponse

from ergo_server.api.openapi import kinds
from ergo_server.engine.base import Delta, Engine, Generation, Sampling
from ergo_server.engine.scripted import ScriptedEngine
from ergo_server.engine.vllm import VllmEngine
from ergo_server.errors import ErgoError
from ergo_server.protocol.conversation import Conversation

KEY = b"ergo-whisperkey"


def key_line(name: str, key: bytes) -> str:
    """Return the line that makes a key known."""
    return f"{name} {hashlib.sha256(key).hexdigest()}"


def secret(place: str) -> str:
    """Return the secret of one place; of letters that no encoding of a text changes."""
    return f"whisper{place}"


def _in_base64(word: bytes) -> Iterator[str]:
    """Yield the letters by which base64 spells a word: three spellings, by where in a group of three bytes the word begins."""
    for shift in range(3):
        letters = base64.b64encode(bytes(shift) + word).decode()
        yield letters[-(-8 * shift // 6) : 8 * (shift + len(word)) // 6]


LEAKS = ("whisper", *_in_base64(b"whisper"))


def photo(width: int = 300, height: int = 200, form: str = "PNG") -> bytes:
    """Return an image with secrets in its metadata."""
    exif, text = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x010E] = exif[0x9286] = secret("exif")
    text.add_text("Comment", secret("text"))
    with io.BytesIO() as file:
        more = {"pnginfo": text} if form == "PNG" else {"comment": secret("comment")}
        Image.new("RGB", (width, height), "green").save(file, form, exif=exif, **more)
        return file.getvalue()


HEADERS = {
    "authorization": f"Bearer {KEY.decode()}",
    "x-request-id": f"{secret('id')} not of the form",
    "traceparent": secret("traceparent"),
    "tracestate": f"a={secret('tracestate')}",
    "baggage": f"a={secret('baggage')}",
    "user-agent": secret("agent"),
    "referer": f"https://{secret('referer')}.example/",
    "cookie": f"a={secret('cookie')}",
    "x-forwarded-for": secret("forwarded"),
}

Ask = Callable[[httpx2.Client], httpx2.Response]


def asks(path: str, **fields: Any) -> Ask:
    """Return a request in JSON with secrets in all of its texts."""
    vqa: dict[str, Any] = {"image": data_url(photo()), "instructions": secret("instructions")}
    vqa |= {"question": secret("question"), "choices": [secret("choice"), secret("other")]}
    earlier = {"role": "system", "content": secret("system")}
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(photo())}},
        {"type": "text", "text": secret("chat")},
    ]
    chat = {"messages": [earlier, {"role": "user", "content": parts}], "stop": [secret("stop")], "user": secret("user")}
    body = json.dumps((chat if "chat" in path else vqa) | fields)
    kind = {"content-type": "application/json"}
    return lambda http: http.post(path, content=body, headers=kind)


def uploads(image: bytes, kind: str = "image/png", path: str = "/v1/vqa") -> Ask:
    """Return a request whose body is an image, with the rest in the query."""
    query = {"question": secret("query"), "instructions": secret("asked")}
    return lambda http: http.post(path, params=query if path == "/v1/vqa" else {}, content=image, headers={"content-type": kind})


def fills_in(image: bytes, **fields: str) -> Ask:
    """Return a request in a form."""
    files = {"image": (f"{secret('file')}.png", image, f"image/{secret('kind')}")}
    return lambda http: http.post("/v1/vqa", data={"question": secret("form"), **fields}, files=files)


VQA, CHAT = asks("/v1/vqa"), asks("/v1/chat/completions")
STREAMS = (asks("/v1/vqa", stream=True), asks("/v1/chat/completions", stream=True))
RAW = (asks("/v1/chat/completions", model="ergo-raw"), asks("/v1/chat/completions", model="ergo-raw", stream=True))
ALL = (VQA, CHAT, *STREAMS, *RAW)

BROKEN = (
    b"whisper of no image",
    photo()[:300],
    photo(form="JPEG")[:500],
    photo(form="JPEG").replace(b"Exif\0\0", b"Exif\0\0whisper"),
    b"%PDF-1.7 whisper",
    b"<svg>whisper</svg>",
    photo(2010, 10),
)
URL = f"https://{secret('host')}.example/{secret('path')}?signature={secret('signature')}"
WRONG = (
    *(uploads(image) for image in BROKEN),
    *(fills_in(image) for image in BROKEN),
    *(asks("/v1/vqa", image=data_url(image)) for image in BROKEN),
    *(asks("/v1/vqa", image=image) for image in (secret("image"), f"img_{secret('upload')}", f"data:x;{secret('data')}", URL)),
    *(asks(path, model=secret("model")) for path in ("/v1/vqa", "/v1/chat/completions")),
    asks("/v1/chat/completions", messages=[{"role": secret("role"), "content": secret("content")}]),
    asks("/v1/vqa", **{secret("field"): secret("value")}),
    asks("/v1/vqa", temperature=secret("number")),
    fills_in(photo(), seed=secret("seed")),
    fills_in(photo(), **{secret("name"): secret("value")}),
    uploads(photo(), f"text/{secret('type')}"),
    uploads(b"--x\r\nwhisper", f"multipart/form-data; boundary={secret('boundary')}"),
    uploads(b'{"question": "whisper', "application/json"),
    uploads(b"x", "application/json; charset=whisper"),
    lambda http: http.get(f"/{secret('page')}?a={secret('query')}"),
    lambda http: http.get(f"/v1/models/{secret('model')}"),
    lambda http: http.get(f"/static/{secret('static')}"),
    lambda http: http.delete(f"/v1/images/{secret('upload')}"),
    lambda http: http.request("WHISPER", "/v1/vqa"),
    lambda http: http.get("/v1/vqa"),
    lambda http: http.post("/v1/vqa", content=photo(), headers={"content-encoding": "whisper"}),
)


# --- engines that tell secrets ------------------------------------------------------------------------------------------

Network = Callable[[httpx2.Request], httpx2.Response]


def vllm(network: Network) -> VllmEngine:
    """Return the engine for vLLM, on another network."""
    return VllmEngine("http://engine", model="served", api_key=secret("enginekey"), transport=httpx2.MockTransport(network))


def refuses(status: int, message: str = "") -> Network:
    """Reply with an error that quotes the prompt."""
    body = {"error": {"message": f"{secret('message')} {message}", "code": status}}
    return lambda request: httpx2.Response(status, json=body)


def says(*pieces: str, end: str = "stop") -> Network:
    """Reply with pieces of text."""
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    events = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}], "usage": usage} for piece in pieces]
    events += [{"choices": [{"index": 0, "delta": {}, "finish_reason": end}], "usage": usage}]
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    return lambda request: httpx2.Response(200, text=text)


def breaks(error: type[httpx2.TransportError]) -> Network:
    """Break the connection."""

    def network(request: httpx2.Request) -> httpx2.Response:
        raise error(secret("transport"))

    return network


def writes(text: str) -> Network:
    """Reply with what is no reply."""
    return lambda request: httpx2.Response(200, text=text)


REPLIES = (
    says(f"<think>{secret('thought')}</think><zoom>[10, 20, 60, 60]</zoom>", f"<answer>{secret('reply')}</answer>"),
    says(secret("untagged")),
    says(secret("broken"), end=secret("reason")),
    writes(f"data: {{{secret('json')}\n\n"),
    writes(f'data: {{"choices": [{{"delta": {{"content": "{secret("begun")}"}}}}], "usage": "{secret("usage")}"}}\n\n'),
    writes('data: {"choices": [{"delta": {"content": "whisper"}}]}\n\ndata: {"error": {"message": "whisper"}}\n\n'),
    refuses(400),
    refuses(400, "is longer than the maximum model length"),
    refuses(404),
    refuses(401),
    refuses(500),
    refuses(503),
    refuses(504),
    breaks(httpx2.ConnectError),
    breaks(httpx2.ReadError),
    breaks(httpx2.ReadTimeout),
    breaks(httpx2.PoolTimeout),
)


class Mistaken(ScriptedEngine):
    """An engine with a mistake in it, which quotes the conversation; at once, or amid a reply."""

    begun = ""

    async def generate(
        self,
        conversation: Conversation,
        sampling: Sampling,
        *,
        session: str = "",
        salt: str = "",
        deadline: float | None = None,
    ) -> AsyncGenerator[Delta | Generation, None]:
        """Fail."""
        if self.begun:
            yield Delta(self.begun)
        raise RuntimeError(f"{secret('mistake')}: {conversation}")


class MistakenLate(Mistaken):
    """Amid a reply."""

    begun = f"<answer>{secret('late')}"


def nothing(conversation: Conversation, sampling: Sampling) -> str:
    """Reply with nothing."""
    return ""


Case = tuple[Callable[[], Engine], dict[str, Any], tuple[Ask, ...]]

KEYS = key_line("alice", KEY)

CASES: dict[str, Case] = {
    "wrong requests": (
        scripted,
        {"max_body_bytes": 200_000},
        (*WRONG, *ALL, lambda http: http.post("/v1/vqa", content=bytes(200_001))),
    ),
    **{f"vLLM {number}": (lambda network=network: vllm(network), {}, ALL) for number, network in enumerate(REPLIES)},  # type: ignore[misc]
    "a mistake": (lambda: Mistaken(nothing), {}, ALL),
    "a mistake amid a reply": (lambda: MistakenLate(nothing), {}, ALL),
    "an engine that hangs": (lambda: scripted(seconds_per_token=60), {"turn_seconds": 0.05}, ALL),
    "an engine that is left alone": (lambda: vllm(refuses(500)), {"breaker_failures": 1}, ALL),
    "a key that is not known": (scripted, {"api_keys": key_line("bob", b"bob")}, (VQA, lambda http: http.get("/v1/models"))),
    "a share used up": (scripted, {"api_keys": KEYS, "requests_per_minute": 1}, (VQA, VQA, CHAT)),
    "a key": (scripted, {"api_keys": KEYS}, ALL),
    "too many pixels": (scripted, {"max_pixels": 100}, (VQA, uploads(photo()))),
    "too slow to decode": (scripted, {"decode_seconds": 1e-9}, (VQA, uploads(photo()))),
    "no memory": (scripted, {"image_memory_bytes": 1}, (VQA, CHAT, fills_in(photo()))),
    "no place to keep": (scripted, {"image_store_bytes": 1}, (uploads(photo(), path="/v1/images"),)),
    "addresses": (
        scripted,
        {"fetch": "public", "fetch_http": True, "fetch_seconds": 2},
        tuple(
            asks("/v1/vqa", image=url)
            for url in (URL, f"http://127.0.0.1/{secret('path')}", f"http://{secret('user')}@x/", f"http://[{secret('v6')}]/")
        ),
    ),
}


def late(url: str) -> str:
    """Send half of a body, and wait; returns the error's code."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    with contextlib.closing(connection):
        body = f'{{"question": "{secret("half")}'
        connection.request("POST", "/v1/vqa", body, {"content-length": "999", "content-type": "application/json"})
        return str(json.loads(connection.getresponse().read())["error"]["code"])


class Ear(logging.Handler):
    """Hears everything: messages, what they were made of, exceptions with their texts, and the fields beside them."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Hear."""
        if record.name == "httpx2" and "http://testserver/" in record.getMessage():
            return  # the test's own client
        told = [record.getMessage(), repr({name: value for name, value in vars(record).items() if name != "exc_info"})]
        if record.exc_info:
            told += traceback.format_exception(*record.exc_info)
        self.heard.append(f"{record.name}: " + "\n".join(told))


@pytest.fixture
def ear() -> Iterator[Ear]:
    """Hears what every logger says, at DEBUG."""
    root, ours, handler = logging.getLogger(), logging.getLogger("ergo_server"), Ear()
    before = root.level, ours.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    ours.setLevel(logging.DEBUG)
    yield handler
    root.removeHandler(handler)
    root.setLevel(before[0])
    ours.setLevel(before[1])


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector; the environment asks all that can to send to it."""
    with collecting() as server:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.url)
        monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
        yield server


def leaks(text: str) -> list[str]:
    """Return the surroundings of each secret in a text."""
    places = (text.find(found) for found in LEAKS), (text.lower().find(LEAKS[0]),)
    return [text[max(0, at - 120) : at + 120] for at in itertools.chain(*places) if at >= 0]


def hold(ear: Ear, collector: Collector, outputs: str, exposition: str) -> None:
    """Fail where a secret is in any output."""
    assert ear.heard
    assert {path for path, _ in collector.sent} == {"/v1/traces"}
    for told in (*ear.heard, outputs, exposition, *(body.decode("latin-1") for _, body in collector.sent)):
        assert leaks(told) == []


def code_of(response: httpx2.Response) -> set[str]:
    """Return the codes of the errors in a response or a stream."""
    texts = [line.removeprefix("data: ") for line in response.text.splitlines() if '"error"' in line]
    return {json.loads(text)["error"]["code"] for text in texts if text.startswith('{"error"')}


MET: set[str] = set()
"""Codes that the cases brought about."""


@pytest.mark.parametrize("case", CASES)
def test_no_secret_is_told(case: str, ear: Ear, collector: Collector, capfd: pytest.CaptureFixture[str]) -> None:
    """None of a case's secrets is in a log record, an output of the process, a span or a metric."""
    engine, settings, requests = CASES[case]
    with client(engine(), otlp_endpoint=collector.url, **settings) as http:
        http.headers.update(HEADERS)
        for ask in requests:
            MET.update(code_of(ask(http)))
        exposition = http.get("/metrics").text
    out, err = capfd.readouterr()
    hold(ear, collector, out + err, exposition)
    assert len([line for line in ear.heard if line.startswith("ergo_server.access")]) == len(requests)


def test_every_error_was_met(ear: Ear, collector: Collector, capfd: pytest.CaptureFixture[str]) -> None:
    """The cases above, and a body that never ends, bring about every error that there is."""
    with support.gateway(scripted(), body_stall_seconds=0.2, otlp_endpoint=collector.url) as url:
        MET.add(late(url))
        exposition = httpx2.get(f"{url}/metrics", trust_env=False).text
    out, err = capfd.readouterr()
    hold(ear, collector, out + err, exposition)
    assert {kind.code for kind in kinds(ErgoError)} - MET == set()


def test_a_response_that_breaks_off_tells_no_secret(ear: Ear, capfd: pytest.CaptureFixture[str]) -> None:
    """A mistake of ours after a response has begun breaks the connection; its text is in no log, the HTTP server's included."""

    async def broken() -> AsyncGenerator[str, None]:
        yield "begun"
        raise RuntimeError(secret("text"))

    app = support.app(scripted())
    app.add_api_route("/broken", lambda: StreamingResponse(broken()))
    with support.served(app) as url, pytest.raises(httpx2.RemoteProtocolError):
        httpx2.get(f"{url}/broken", trust_env=False)
    out, err = capfd.readouterr()
    assert any(told.startswith("ergo_server: unforeseen RuntimeError") for told in ear.heard)
    assert any(told.startswith("uvicorn.error: ") for told in ear.heard)
    assert [leaks(told) for told in (*ear.heard, out, err) if leaks(told)] == []


def test_a_process_tells_no_secret(collector: Collector) -> None:
    """As a shell starts it, on its real engine, the server writes a line for each request to its outputs, and no secret."""
    settings = {"log_level": "info", "api_keys": KEYS, "otlp_endpoint": collector.url}
    with support.process(**settings) as server, httpx2.Client(base_url=server.url, trust_env=False, timeout=60) as http:
        http.headers.update(HEADERS)
        for ask in (*WRONG, *ALL):
            ask(http)
        exposition = http.get("/metrics").text
        server.signal()
        status, written = server.end()
    assert status == 0
    assert len(written.splitlines()) == len(WRONG) + len(ALL)
    for told in (written, exposition, *(body.decode("latin-1") for _, body in collector.sent)):
        assert leaks(told) == []
    assert {path for path, _ in collector.sent} == {"/v1/traces"}


@pytest.mark.parametrize("text", [secret("question"), data_url(photo()), "THE WHISPER"])
def test_the_canary_sings(ear: Ear, text: str) -> None:
    """Were a question or an image logged, even at DEBUG and by a library, it would be found."""
    logging.getLogger("some.library").debug("told %s", text)
    assert leaks(ear.heard[-1])
