"""Callers who hang up: the engine is freed at once, whatever was under way, and it is counted. Real sockets throughout."""

from __future__ import annotations

import json
import logging
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest
import support
from asking import ANSWER, Meter, data_url, picture, says, scripted

from ergo_server.engine.scripted import ScriptedEngine

LONG = "why " * 2000
"""At a twentieth of a second a token, a hundred seconds: no test waits for its end."""

ENDLESS_ZOOM = {"zoom": f"<think>{LONG}"}
ENDLESS_ANSWER = {"zoom": "<zoom>[1, 2, 30, 40]</zoom>", "answer": f"<answer>{LONG}"}

VQA = ("/v1/vqa", {"image": data_url(picture()), "question": "?"})
CHAT = ("/v1/chat/completions", {"messages": [says(picture(), "?")]})
RAW = ("/v1/chat/completions", {"messages": [says(picture(), "?")], "model": "ergo-raw"})


def connect(url: str, path: str, body: object, *, length: int | None = None) -> socket.socket:
    """Send a request and return the connection."""
    data = json.dumps(body).encode()
    host = urlsplit(url)
    connection = socket.create_connection((host.hostname, host.port), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length or len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def read_until(connection: socket.socket, mark: bytes) -> None:
    """Read until ``mark`` has been seen."""
    seen = b""
    while mark not in seen:
        piece = connection.recv(65536)
        assert piece, seen
        seen += piece


def free(engine: ScriptedEngine, meter: Meter) -> bool:
    """Say whether nothing is under way any more."""
    return engine.running == 0 and meter("ergo_requests_in_flight") == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("path", "body"), [VQA, CHAT], ids=["vqa", "chat"])
@pytest.mark.parametrize(("replies", "turns"), [(ENDLESS_ZOOM, 1), (ENDLESS_ANSWER, 2)], ids=["zoom turn", "answer turn"])
def test_hanging_up_during_a_turn(
    path: str, body: dict[str, Any], stream: bool, replies: dict[str, Any], turns: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A caller who leaves during either turn frees the engine, streaming (before the first event, too) or not."""
    engine = scripted(**replies, seconds_per_token=0.05)
    with caplog.at_level(logging.WARNING), support.gateway(engine) as url:
        meter = Meter.of(url)
        with connect(url, path, {**body, "stream": stream}):
            support.wait_until(lambda: len(engine.calls) == turns and engine.running == 1, f"turn {turns} runs")
            assert meter("ergo_requests_in_flight") == 1
        support.wait_until(lambda: free(engine, meter), "all is free")
        assert meter("ergo_requests_total", outcome="cancelled") == meter("ergo_requests_total") == 1
    assert len(engine.calls) == turns
    assert not caplog.records  # people leave: no fault, and nothing for the log


@pytest.mark.parametrize(("path", "body"), [VQA, CHAT], ids=["vqa", "chat"])
def test_hanging_up_amid_a_stream(path: str, body: dict[str, Any]) -> None:
    """A caller who leaves after the answer began to arrive frees the engine."""
    engine = scripted(**ENDLESS_ANSWER, seconds_per_token=0.05)
    with support.gateway(engine) as url:
        meter = Meter.of(url)
        with connect(url, path, {**body, "stream": True}) as connection:
            read_until(connection, b"why")
        support.wait_until(lambda: free(engine, meter), "all is free")
        assert meter("ergo_requests_total", outcome="cancelled") == meter("ergo_requests_total") == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_hanging_up_on_the_engine_as_it_is(stream: bool) -> None:
    """A turn that is passed through ends with its caller, too."""
    engine = scripted(answer=LONG, seconds_per_token=0.05)
    path, body = RAW
    with support.gateway(engine) as url:
        meter = Meter.of(url)
        with connect(url, path, {**body, "stream": stream}) as connection:
            support.wait_until(lambda: engine.running == 1, "the turn runs")
            if stream:
                read_until(connection, b"why")
        support.wait_until(lambda: free(engine, meter), "all is free")


def test_a_caller_who_left_is_no_500() -> None:
    """What nobody waited for counts as 499, not as a fault of the server."""
    engine = scripted(**ENDLESS_ZOOM, seconds_per_token=0.05)
    with support.gateway(engine) as url:
        meter = Meter.of(url)
        with connect(url, *VQA):
            support.wait_until(lambda: engine.running == 1, "the turn runs")
        support.wait_until(lambda: free(engine, meter), "all is free")
        assert meter("ergo_http_requests_total", code="499", route="/v1/vqa") == 1
        assert meter("ergo_http_requests_total", code="500") == 0


def test_hanging_up_amid_the_body() -> None:
    """A caller who leaves before the request is complete is counted, and the engine is never asked."""
    engine = scripted()
    with support.gateway(engine) as url:
        meter = Meter.of(url)
        with connect(url, *VQA, length=1_000_000):
            support.wait_until(lambda: meter("ergo_requests_in_flight") == 1, "the body is being read")
        support.wait_until(lambda: free(engine, meter), "all is free")
        assert meter("ergo_requests_total", outcome="cancelled") == 1
    assert not engine.calls


def test_the_server_goes_on_after_many_who_left() -> None:
    """Ten callers who leave at once take nothing with them: the eleventh is answered."""
    engine = scripted(zoom=f"<think>{LONG}", seconds_per_token=0.05)
    with support.gateway(engine) as url:
        meter = Meter.of(url)
        connections = [connect(url, *VQA) for _ in range(10)]
        support.wait_until(lambda: engine.running == 10, "all turns run")
        for connection in connections:
            connection.close()
        support.wait_until(lambda: free(engine, meter), "all is free")
        engine.script, engine.seconds_per_token = lambda conversation, sampling: ANSWER, 0
        with connect(url, *VQA) as connection:
            read_until(connection, b'"answer":"seven"')
        assert meter("ergo_requests_total", outcome="cancelled") == 10
