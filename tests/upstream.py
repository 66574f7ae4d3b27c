"""An engine that speaks as vLLM does, and answers when the test wants it."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from typing import Any

from asking import ANSWER, ZOOM


class Upstream(http.server.ThreadingHTTPServer):
    """An engine that speaks as vLLM does: it begins each reply at once, and ends it when it is told to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Reply)
        self.asked = 0
        self.headers: list[dict[str, str]] = []
        """Of each question; their names in small letters."""
        self.left = 0
        """Callers who left before their reply had ended."""
        self.go_on = threading.Event()

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing."""


class _Reply(http.server.BaseHTTPRequestHandler):
    server: Upstream

    def do_GET(self) -> None:
        """Be healthy."""
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        """Answer, piece by piece."""
        asked = self.rfile.read(int(self.headers["content-length"]))
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        reply = ZOOM if "</zoom>" in json.loads(asked)["stop"] else ANSWER
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self._write(content=reply[:10])
        self.server.asked += 1
        while not self.server.go_on.wait(0.05):
            if self._gone():
                self.server.left += 1
                return
        self._write(content=reply[10:])
        self._write("stop")
        self.wfile.write(b"data: [DONE]\n\n")

    def _gone(self) -> bool:
        self.connection.setblocking(False)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except ConnectionError:
            return True
        finally:
            self.connection.setblocking(True)

    def _write(self, finish_reason: str | None = None, **delta: str) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        self.wfile.write(f"data: {json.dumps({'choices': [choice], 'usage': usage})}\n\n".encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
