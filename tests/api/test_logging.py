"""Logs: one line for each request, with the figures of its response; and `Server-Timing`, which has them too."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import socket
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx2
import pytest
import support
from asking import chat, client, encoded, picture, post_json, says, scripted, vqa
from collector import collecting

from ergo_server.engine.base import Delta, Generation, Sampling
from ergo_server.engine.scripted import ScriptedEngine
from ergo_server.errors import EngineBusy, EngineFailed
from ergo_server.protocol.conversation import Conversation
from ergo_server.telemetry.logging import Format, Level, configure

TIMED = re.compile(r"[a-z_]+;dur=[0-9.e+-]+(, [a-z_]+;dur=[0-9.e+-]+)*")


@pytest.fixture(autouse=True)
def written() -> Iterator[io.StringIO]:
    """What the server writes, as JSON; logging is as it was afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("ergo_server")
    before = root.handlers[:], root.level, ours.level
    root.handlers = []
    stream = io.StringIO()
    configure("info", "json", stream)
    yield stream
    root.handlers, root.level = before[:2]
    ours.setLevel(before[2])


def lines(written: io.StringIO) -> list[dict[str, Any]]:
    """Return the lines of requests."""
    found = [json.loads(line) for line in written.getvalue().splitlines()]
    return [line for line in found if line["logger"] == "ergo_server.access"]


def timed(response: httpx2.Response) -> dict[str, float]:
    """Return what `Server-Timing` says, in milliseconds."""
    assert TIMED.fullmatch(response.headers["server-timing"])
    return {name: float(value) for name, value in re.findall(r"([a-z_]+);dur=([0-9.e+-]+)", response.headers["server-timing"])}


def test_a_line_says_what_the_response_says(written: io.StringIO) -> None:
    """Ids, image, outcome, visual tokens, tokens of the turns and times are those of the response."""
    response = vqa(client())
    said = response.json()
    (line,) = lines(written)
    assert (line["request_id"], line["tenant"]) == (response.headers["x-request-id"], "anonymous")
    assert (line["method"], line["route"], line["status"], line["outcome"]) == ("POST", "/v1/vqa", 200, "ok")
    assert line["image"] == {"source": "json", "bytes": len(picture()), "format": "png", "width": 800, "height": 600}
    assert (line["policy"], line["zoom"]) == ("ergo", said["regions"][0]["outcome"])
    assert line["visual_tokens"] == {name: said["visual_tokens"][name] for name in line["visual_tokens"]}
    assert {"overview", "crop", "total", "baseline"} <= line["visual_tokens"].keys()
    for turn, shown in zip(line["turns"], said["usage"]["turns"], strict=True):
        assert {name: turn[name] for name in ("turn", "prompt_tokens", "completion_tokens")} == {
            name: shown[name] for name in ("turn", "prompt_tokens", "completion_tokens")
        }
        assert (turn["outcome"], turn["finish_reason"]) == ("ok", "stop")
    stages = ("receive", "overview", "zoom_turn", "crop", "answer_turn")
    assert {name: line["timings_ms"][name] for name in stages} == {name: said["timings"][f"{name}_ms"] for name in stages}
    assert line["ms"] >= line["timings_ms"]["total"] > 0
    assert "trace_id" not in line


def test_a_line_names_the_trace(written: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where requests are traced, the line bears the trace's id."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with collecting() as collector, client(otlp_endpoint=collector.url) as http:
        http.get("/v1/models")
        http.__exit__()
        (line,) = lines(written)
        assert line["trace_id"] == collector.spans[0].trace_id.hex()


def test_each_request_is_a_line_and_no_probe_is(written: io.StringIO) -> None:
    """Answers, streams, refusals and unknown paths have one line each; what machines ask every few seconds has none."""
    http = client(max_body_bytes=50_000)
    vqa(http)
    vqa(http, stream=True)
    vqa(http, b"no image")
    chat(http)
    chat(http, model="gpt-secret")
    http.get("/v1/models/gpt-secret")
    http.get("/secret")
    http.request("SECRET", "/v1/vqa")
    http.post("/v1/vqa", content=bytes(50_001))
    for path in ("/healthz", "/health", "/readyz", "/metrics"):
        http.get(path)
    assert [(line["method"], line["route"], line["status"], line["outcome"]) for line in lines(written)] == [
        ("POST", "/v1/vqa", 200, "ok"),
        ("POST", "/v1/vqa", 200, "ok"),
        ("POST", "/v1/vqa", 422, "image_unreadable"),
        ("POST", "/v1/chat/completions", 200, "ok"),
        ("POST", "/v1/chat/completions", 404, "model_not_found"),
        ("GET", "/v1/models/{model_id}", 404, "model_not_found"),
        ("GET", "other", 404, "not_found"),
        ("other", "/v1/vqa", 405, "method_not_allowed"),
        ("POST", "/v1/vqa", 413, "request_too_large"),
    ]
    assert "secret" not in written.getvalue().lower()


def test_a_refusal_names_its_tenant_if_it_has_one(written: io.StringIO) -> None:
    """Who has no key is nobody; who has used up its share is named."""
    key = "alice 9a3a45d01531a20e89ac6ae10b0b0beb0492acd7216a368aa062d1a5fecaf9cd"
    http = client(api_keys=key, requests_per_minute=1)
    http.get("/v1/models")
    (line,) = lines(written)
    assert (line["status"], line["outcome"], "tenant" in line) == (401, "invalid_api_key", False)


@pytest.mark.parametrize("ask", [vqa, chat])
def test_a_failure_has_what_was_known(written: io.StringIO, ask: Any) -> None:
    """Of a stream that the engine fails, the line has the error's code, the image's size and the turns so far."""
    status = ask(client(scripted(answer=EngineFailed("it broke"))), stream=True).status_code
    (line,) = lines(written)
    assert line["outcome"] == line["turns"][1]["outcome"] == "engine_failed"
    assert (line["status"], line["image"]["width"], line["turns"][0]["outcome"]) == (status, 800, "ok")
    assert "visual_tokens" not in line


def test_a_failure_of_what_is_passed_through(written: io.StringIO) -> None:
    """So it is where a conversation is passed through, and the engine breaks off amid its reply."""

    class Breaking(ScriptedEngine):
        async def _replay(self, *args: Any) -> AsyncGenerator[Delta | Generation, None]:
            yield Delta("sev")
            raise EngineFailed("it broke")

    chat(client(Breaking(lambda conversation, sampling: "")), model="ergo-raw", stream=True)
    (line,) = lines(written)
    assert (line["status"], line["outcome"], line["turns"][0]["outcome"]) == (200, "engine_failed", "engine_failed")


def test_a_conversation_that_is_passed_through_has_its_tokens(written: io.StringIO) -> None:
    """What goes to the engine as it is has one turn, with the tokens of the response."""
    usage = chat(client(), model="ergo-raw").json()["usage"]
    (line,) = lines(written)
    (turn,) = line["turns"]
    assert (turn["prompt_tokens"], turn["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert (line["outcome"], "policy" in line) == ("ok", False)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["ergo", "ergo-raw"])
def test_who_leaves_is_a_line(written: io.StringIO, model: str, stream: bool) -> None:
    """A caller who hangs up amid an answer leaves a line that says so."""
    body = {"model": model, "stream": stream, "messages": [says(picture(), "?")]}
    engine = scripted(zoom="<think>" + "why " * 2000, answer="why " * 2000, seconds_per_token=0.05)
    with support.gateway(engine) as url:
        host, port = url.removeprefix("http://").split(":")
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n"
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + data)
            support.wait_until(lambda: engine.running, "the engine works")
        support.wait_until(lambda: lines(written), "the line is written")
    (line,) = lines(written)
    assert line["outcome"] == line["turns"][-1]["outcome"] == "cancelled"
    assert line["status"] in ((200, 499) if stream else (499,))


def test_an_unforeseen_exception_names_its_places(written: io.StringIO) -> None:
    """Of a mistake of ours the kind, the places it came through and the request are written, and not its text."""

    def script(conversation: Conversation, sampling: Sampling) -> str:
        raise RuntimeError("the secret question")

    response = vqa(client(ScriptedEngine(script)))
    mistake, line = [json.loads(text) for text in written.getvalue().splitlines()]
    assert mistake["request_id"] == line["request_id"] == response.headers["x-request-id"]
    assert (mistake["level"], mistake["exception"], line["outcome"]) == ("error", "RuntimeError", "internal_error")
    assert re.fullmatch(r".*test_logging\.py:\d+ script", mistake["places"][0])
    assert len(mistake["places"]) > 3
    assert "secret" not in written.getvalue()


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception_of_a_library_is_written_without_its_text(form: Format) -> None:
    """Whatever is logged with an exception is one line with its kind and places; what stands in further lines is left out."""
    stream = io.StringIO()
    configure("info", form, stream)
    try:
        raise ValueError("the secret question")
    except ValueError as error:
        logging.getLogger("asyncio").error("never retrieved\nfuture: %r", error, exc_info=error)
    assert "never retrieved" in stream.getvalue()
    assert "ValueError" in stream.getvalue()
    assert "test_logging.py" in stream.getvalue()
    assert "secret" not in stream.getvalue()
    assert stream.getvalue().count("\n") == 1


@pytest.mark.parametrize(("level", "count"), [("info", 1), ("warning", 0), ("error", 0)])
def test_lines_of_requests_can_be_left_out(level: Level, count: int) -> None:
    """Above the level info, requests have no lines."""
    stream = io.StringIO()
    configure(level, "json", stream)
    client().get("/v1/models")
    assert len(lines(stream)) == count


def test_libraries_write_warnings_only() -> None:
    """What libraries tell below a warning, addresses and headers among it, is not written."""
    stream = io.StringIO()
    configure("info", "json", stream)
    for name in ("httpx2", "httpcore2", "uvicorn", "PIL", "multipart"):
        logging.getLogger(name).info("told")
        logging.getLogger(name).debug("told")
    assert stream.getvalue() == ""


def test_text_is_for_people() -> None:
    """As text, a request is one short line that names it."""
    stream = io.StringIO()
    configure("info", "text", stream)
    response = vqa(client())
    tokens = response.json()["visual_tokens"]
    (line,) = stream.getvalue().splitlines()
    assert re.fullmatch(
        rf"\d\d:\d\d:\d\d POST /v1/vqa 200 ok, \d+ ms, zoomed, {tokens['total']} visual tokens "
        rf"\(baseline {tokens['baseline']}\), request {response.headers['x-request-id']}",
        line,
    )


def test_a_terminal_gets_text_and_a_program_json() -> None:
    """Left to itself, the server writes text to a terminal, and JSON to a file."""
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        for stream in (terminal, file := io.StringIO()):
            configure("info", "auto", stream)
            client().get("/v1/models")
        terminal.flush()
        shown = os.read(reader, 4096).decode()
    os.close(reader)
    assert re.match(r"\d\d:\d\d:\d\d GET /v1/models 200 ok", shown)
    assert json.loads(file.getvalue())["route"] == "/v1/models"


def test_serve_writes_lines_to_standard_error() -> None:
    """``ergo-vqa serve`` writes a line of JSON for each request to its standard error, and nothing else."""
    with support.process(log_level="info") as server:
        server.get("/v1/models")
        server.get("/")
        server.signal()
        status, written = server.end()
    assert status == 0
    assert [json.loads(line)["route"] for line in written.splitlines()] == ["/v1/models", "/"]


# --- Server-Timing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/vqa", "/v1/chat/completions"])
@pytest.mark.parametrize("zoom", ["always", "never"])
def test_server_timing_has_the_stages(path: str, zoom: str) -> None:
    """An answer's header has the time of each stage that ran, and of all, as its body has them."""
    http = client()
    response = vqa(http, zoom=zoom) if path == "/v1/vqa" else chat(http, ergo={"zoom": zoom})
    said = (response.json() if path == "/v1/vqa" else response.json()["ergo"])["timings"]
    told = timed(response)
    assert ("zoom_turn" in told) == ("crop" in told) == (zoom == "always")
    for name in set(told) - {"total"}:
        assert told[name] == pytest.approx(said[f"{name}_ms"], rel=1e-4)
    assert {f"{name}_ms" for name in told} >= {name for name, value in said.items() if value}


def test_a_stream_and_what_is_no_answer_have_no_server_timing() -> None:
    """A stream begins before its times are known; refusals, estimates and what is passed through have no stages."""
    http = client()
    busy = client(scripted(zoom=EngineBusy("full")))
    estimate = {"image": encoded(picture())}
    others = [
        vqa(http, stream=True),
        chat(http, stream=True),
        chat(http, model="ergo-raw"),
        vqa(http, temperature=9),
        vqa(busy),
        post_json(http, "/v1/vqa/estimate", estimate),
        http.get("/v1/models"),
    ]
    assert not [response for response in others if "server-timing" in response.headers]
    assert all(response.headers["x-request-id"] for response in others)
