"""Callers who hang up: what was under way ends at once, what was held is free, and it is counted. Real sockets throughout."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import support
from asking import ANSWER, Meter, data_url, picture, says, scripted
from PIL import Image

from ergo_server.api.app import create_app
from ergo_server.engine.scripted import ScriptedEngine
from ergo_server.intake.fetch import Fetcher, FetchLimits

LONG = "why " * 2000
"""At a twentieth of a second a token, a hundred seconds: no test waits for its end."""

ENDLESS_ZOOM = {"zoom": f"<think>{LONG}"}
ENDLESS_ANSWER = {"zoom": "<zoom>[1, 2, 30, 40]</zoom>", "answer": f"<answer>{LONG}"}

VQA = ("/v1/vqa", {"image": data_url(picture()), "question": "?"})
CHAT = ("/v1/chat/completions", {"messages": [says(picture(), "?")]})
RAW = ("/v1/chat/completions", {"messages": [says(picture(), "?")], "model": "ergo-raw"})


IMAGE = "/v1/vqa?question=x"
"""Where the body is the image itself."""


def connect(url: str, path: str, body: object, *, length: int | None = None, kind: str = "application/json") -> socket.socket:
    """Send a request and return the connection; a body that is not bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    host = urlsplit(url)
    connection = socket.create_connection((host.hostname, host.port), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {length or len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def read_until(connection: socket.socket, mark: bytes) -> None:
    """Read until ``mark`` has been seen."""
    seen = b""
    while mark not in seen:
        piece = connection.recv(65536)
        assert piece, seen
        seen += piece


HELD = ("requests_in_flight", "requests_queued", "body_bytes_in_flight", "image_memory_bytes", "image_threads_busy")
"""The gauges that show what requests hold."""


def held(meter: Meter) -> dict[str, float]:
    """Return what requests hold."""
    seen = meter.all()
    return {name: seen[f"ergo_{name}", ()] for name in HELD}


def free(engine: ScriptedEngine, meter: Meter) -> bool:
    """Say whether nothing is under way any more, nor held."""
    return engine.running == 0 and not any(held(meter).values())


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
        stage = "zoom_turn" if turns == 1 else "answer_turn"
        assert meter("ergo_client_disconnects_total", stage=stage) == meter("ergo_client_disconnects_total") == 1
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
            support.wait_until(lambda: meter("ergo_body_bytes_in_flight") > 0, "the body is being read")
        support.wait_until(lambda: free(engine, meter), "all is free")
        assert meter("ergo_requests_total", outcome="cancelled") == 1
        assert meter("ergo_client_disconnects_total", stage="receive") == 1
    assert not engine.calls


# --- the image ----------------------------------------------------------------------------------------------------------


@functools.cache
def photograph(form: str, side: int = 1500, **options: Any) -> bytes:
    """Return the file of a grey image that no format makes small: one patch of noise, again and again."""
    patch = Image.effect_noise((500, 500), 60)
    image = Image.new("L", (side, side))
    for at in range((side // 500) ** 2):
        image.paste(patch, (500 * (at % (side // 500)), 500 * (at // (side // 500))))
    with io.BytesIO() as file:
        image.save(file, form, **options)
        return file.getvalue()


def slow() -> bytes:
    """Return the file of a progressive JPEG that takes a good second to decode (measured: 1.0 s on an idle core)."""
    return photograph("JPEG", 8000, progressive=True, quality=50)


FORMS: dict[str, dict[str, Any]] = {
    "JPEG": {},
    "progressive": {"form": "JPEG", "progressive": True},
    "PNG": {},
    "WEBP": {"lossless": True, "method": 0},
    "BMP": {},
}


@pytest.mark.parametrize(
    ("path", "form"), [*((IMAGE, form) for form in FORMS), ("/v1/images", "PNG"), ("form", "JPEG"), ("form", "PNG")]
)
def test_hanging_up_while_the_image_arrives(path: str, form: str) -> None:
    """A caller who leaves amid an image, whose decode waits for the rest, ends that decode and frees its thread and memory."""
    engine, image = scripted(), photograph(**{"form": form, **FORMS[form]})
    kind, head = "image/x", b""
    if path == "form":
        kind = "multipart/form-data; boundary=b"
        head = b'--b\r\ncontent-disposition: form-data; name="image"; filename="x"\r\n\r\n'
    with support.gateway(engine) as url:
        meter = Meter.of(url)
        sent = head + image[: len(image) // 2]
        with connect(url, "/v1/vqa" if path == "form" else path, sent, length=len(image) + 200, kind=kind):
            support.wait_until(lambda: meter("ergo_body_bytes_in_flight") == len(sent), "half of it is there")
            support.wait_until(lambda: meter("ergo_image_threads_busy") == 1, "it is being decoded")
        support.wait_until(lambda: free(engine, meter), "all is free")
        assert meter("ergo_requests_total", outcome="cancelled") == (path != "/v1/images")
    assert not engine.calls


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_hanging_up_while_queued(form: str) -> None:
    """A caller who leaves while its image waits, the last bytes with it, leaves the server as it was before it came."""
    engine, image = scripted(**ENDLESS_ANSWER, seconds_per_token=0.05), photograph(form)
    with support.gateway(engine, max_concurrent=1, queue_seconds=3600) as url:
        meter = Meter.of(url)
        with connect(url, *VQA):
            support.wait_until(lambda: len(engine.calls) == 2 and engine.running == 1, "the one place is taken")
            before = held(meter)
            with connect(url, IMAGE, image, kind="image/x"):
                support.wait_until(lambda: meter("ergo_requests_queued") == 1, "another waits")
                assert meter("ergo_body_bytes_in_flight") == before["body_bytes_in_flight"] + len(image)
            support.wait_until(lambda: held(meter) == before, "it is forgotten")
            assert meter("ergo_requests_total", outcome="cancelled") == 1
        support.wait_until(lambda: free(engine, meter), "all is free")
    assert len(engine.calls) == 2


@pytest.mark.parametrize("path", [IMAGE, f"{IMAGE}&stream=true", "/v1/images"], ids=["whole", "stream", "an upload"])
def test_hanging_up_while_the_image_is_decoded(path: str) -> None:
    """A caller who leaves while its image, all of it there, is being decoded ends that; the engine is never asked."""
    engine, image = scripted(), slow()
    with support.gateway(engine) as url:
        meter = Meter.of(url)
        with connect(url, path, image, kind="image/x"):
            support.wait_until(lambda: meter("ergo_body_bytes_in_flight") == len(image), "all of it is there")
            assert meter("ergo_image_threads_busy") == 1
        support.wait_until(lambda: free(engine, meter), "all is free")
        assert meter("ergo_http_requests_total", code="499") == 1
        assert meter("ergo_requests_total", outcome="cancelled") == (path != "/v1/images")
    assert not engine.calls


def test_hanging_up_while_it_is_decoded_beside_the_zoom_turn() -> None:
    """What is decoded for the crop while the engine looks for the region ends with its caller, as the turn does."""
    engine = scripted(**ENDLESS_ZOOM, seconds_per_token=0.05)
    with support.gateway(engine) as url:
        meter = Meter.of(url)
        with connect(url, IMAGE, slow(), kind="image/x"):
            support.wait_until(lambda: engine.running == 1, "the zoom turn runs")
            assert meter("ergo_image_threads_busy") == 1
        support.wait_until(lambda: free(engine, meter), "all is free")
        assert meter("ergo_requests_total", outcome="cancelled") == meter("ergo_requests_total") == 1


def test_hanging_up_between_the_turns() -> None:
    """A caller who leaves while the crop is being made ends that; the engine is not asked a second time."""
    engine = scripted(zoom=ENDLESS_ANSWER["zoom"])
    with support.gateway(engine) as url:
        meter = Meter.of(url)
        with connect(url, IMAGE, slow(), kind="image/x"):
            support.wait_until(lambda: len(engine.calls) == 1 and engine.running == 0, "the zoom turn is over")
            assert meter("ergo_image_threads_busy") == 1
        support.wait_until(lambda: free(engine, meter), "all is free")
        assert meter("ergo_requests_total", outcome="cancelled") == meter("ergo_requests_total") == 1
    assert len(engine.calls) == 1


# --- a remote image -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fetching(engine: ScriptedEngine) -> Iterator[tuple[str, socket.socket, str]]:
    """Serve a gateway that fetches from one port of loopback; yields its URL, who listens there, and an image's address there."""
    with socket.create_server(("127.0.0.1", 0)) as remote:
        remote.settimeout(60)
        port = remote.getsockname()[1]
        patient = FetchLimits(seconds=3600, idle_seconds=3600, rate_seconds=3600)
        fetcher = Fetcher(mode="public", http=True, ports=[port], limits=patient, allowed=lambda address: True)
        with support.served(create_app(support.mini_settings(), engine, fetcher)) as url:
            yield url, remote, f"http://127.0.0.1:{port}/image"


@pytest.mark.parametrize("begun", [False, True], ids=["no answer", "half of the image"])
@pytest.mark.parametrize("path", ["/v1/vqa", "/v1/chat/completions"], ids=["vqa", "chat"])
def test_hanging_up_while_a_remote_image_is_fetched(path: str, begun: bool) -> None:
    """A caller who leaves while another server is slow to send its image ends that connection, and the decode that waits."""
    engine, image = scripted(), photograph("PNG")
    with fetching(engine) as (url, remote, address):
        meter = Meter.of(url)
        part = {"type": "image_url", "image_url": {"url": address}}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]
        asked = {"image": address, "question": "?"} if path == "/v1/vqa" else {"messages": messages}
        with connect(url, path, asked):
            other, _ = remote.accept()
            other.settimeout(60)
            read_until(other, b"\r\n\r\n")
            if begun:
                head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(image)}\r\n\r\n"
                other.sendall(head.encode() + image[: len(image) // 2])
                support.wait_until(lambda: meter("ergo_image_threads_busy") == 1, "what came is being decoded")
            assert meter("ergo_requests_in_flight") == 1
        with other, contextlib.suppress(ConnectionResetError):
            assert other.recv(1) == b""
        support.wait_until(lambda: free(engine, meter), "all is free")
        assert meter("ergo_requests_total", outcome="cancelled") == meter("ergo_requests_total") == 1
    assert not engine.calls


# --- afterwards ---------------------------------------------------------------------------------------------------------


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
