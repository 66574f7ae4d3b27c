"""Images on their way in: refused as soon as they are known to be no use, looked at before they have ended, or fetched."""

from __future__ import annotations

import http.client
import http.server
import json
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from ipaddress import ip_address

import httpx2
import pytest
import support
from asking import picture, scripted, sizes

from ergo_server.api.app import create_app
from ergo_server.intake.fetch import Fetcher

HUGE = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
BOMB = (
    b"\x89PNG\r\n\x1a\n"
    + struct.pack(">I", 13)
    + HUGE
    + struct.pack(">I", zlib.crc32(HUGE))
    + struct.pack(">I", 1 << 30)
    + b"IDAT"
)


def beginning(form: str, image: bytes, length: int) -> bytes:
    """Return a question's head and the beginning of its body, of which ``length`` bytes are announced."""
    body, kind = image, "image/png"
    if form == "form":
        kind = "multipart/form-data; boundary=b"
        body = b'--b\r\ncontent-disposition: form-data; name="image"; filename="x"\r\n\r\n' + image
    head = f"POST /v1/vqa?question=What HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize("form", ["raw", "form"])
@pytest.mark.parametrize(
    ("image", "status", "code"),
    [(b"no image at all " * 40, 422, "image_unreadable"), (BOMB.ljust(2000, b"\0"), 413, "image_too_large")],
    ids=["no image", "a bomb"],
)
def test_an_image_that_is_no_use_is_refused_before_it_has_arrived(form: str, image: bytes, status: int, code: str) -> None:
    """With two kilobytes of an announced hundred megabytes sent, the answer is there: nobody has to send the rest."""
    with support.gateway(scripted()) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=support.START_SECONDS) as connection:
            connection.sendall(beginning(form, image, 100_000_000))
            # What is known is said with the next piece that comes.
            support.wait_until(lambda: _has_answered(connection), "it is refused")
            with http.client.HTTPResponse(connection) as answer:
                answer.begin()
                assert (answer.status, json.load(answer)["error"]["code"]) == (status, code)


def _has_answered(connection: socket.socket) -> bool:
    connection.sendall(b"\0" * 100)
    connection.settimeout(0.05)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False
    finally:
        connection.settimeout(support.START_SECONDS)


@pytest.mark.parametrize("budget_first", [True, False])
def test_a_budget_that_comes_after_the_image_counts(budget_first: bool) -> None:
    """The overview that was made on the way is used only where it has the budget that the form asks for in the end."""
    engine = scripted()
    image, budget = ("image", ("x.png", picture())), ("max_visual_tokens", (None, "20"))
    with support.gateway(engine) as url:
        files = [*((budget, image) if budget_first else (image, budget)), ("question", (None, "What?"))]
        assert httpx2.post(f"{url}/v1/vqa", files=files, trust_env=False).status_code == 200
    width, height = sizes(engine.calls[0][0])[0]
    assert 10 < width * height // 784 <= 20


class _Pictures(http.server.BaseHTTPRequestHandler):
    """A web server with one image, and one file that is none."""

    asked = 0

    def do_GET(self) -> None:
        """Answer."""
        type(self).asked += 1
        body = picture() if self.path == "/image" else b"<html>" * 1000
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def remote() -> Iterator[tuple[str, str]]:
    """URL of a gateway that may fetch from loopback, and of a web server there."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pictures) as server:
        threading.Thread(target=server.serve_forever).start()
        port = server.server_address[1]
        loopback = ip_address("127.0.0.1")
        fetcher = Fetcher(mode="public", http=True, ports=(port,), allowed=lambda address: address == loopback)
        try:
            with support.served(create_app(support.mini_settings(), scripted(), fetcher)) as url:
                yield url, f"http://127.0.0.1:{port}"
        finally:
            server.shutdown()


def test_a_remote_image_is_fetched_and_asked_about(remote: tuple[str, str]) -> None:
    """In /v1/vqa, in a chat and in an upload an address stands for the image that is there."""
    url, there = remote
    with httpx2.Client(base_url=url, timeout=support.START_SECONDS, trust_env=False) as http:
        question = {"image": f"{there}/image", "question": "What is written there?"}
        assert http.post("/v1/vqa", json=question).json()["answer"] == "seven"
        parts = [{"type": "image_url", "image_url": {"url": f"{there}/image"}}, {"type": "text", "text": "What?"}]
        chat = http.post("/v1/chat/completions", json={"model": "ergo", "messages": [{"role": "user", "content": parts}]})
        assert chat.json()["choices"][0]["message"]["content"] == "seven"
        assert http.post("/v1/images", json={"image": f"{there}/image"}).json()["width"] == 800


def test_a_remote_file_that_is_no_image_is_refused(remote: tuple[str, str]) -> None:
    """What an address answers with is trusted no more than what a client sends."""
    url, there = remote
    response = httpx2.post(f"{url}/v1/vqa", json={"image": f"{there}/page", "question": "?"}, trust_env=False)
    assert (response.status_code, response.json()["error"]["code"]) == (422, "image_unreadable")


def test_an_estimate_fetches_nothing(remote: tuple[str, str]) -> None:
    """The estimate of a remote image is refused without a look at it (CVE-2026-26013 was such a look)."""
    url, there = remote
    before = _Pictures.asked
    response = httpx2.post(f"{url}/v1/vqa/estimate", json={"image": f"{there}/image"}, trust_env=False)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "image")
    assert _Pictures.asked == before
