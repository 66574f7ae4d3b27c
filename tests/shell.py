"""``ergo-vqa`` as a shell runs it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys


def run(url: str, *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[str]:
    """Run a command against a server; its standard input is ``given``."""
    command = [sys.executable, "-m", "ergo_server", *arguments]
    done = subprocess.run(command, input=given, env=os.environ | {"ERGO_URL": url}, capture_output=True, check=False)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def on_a_terminal(url: str, *arguments: str, **environment: str) -> tuple[str, str]:
    """Run a command whose standard output and standard error are terminals of their own; returns what each showed."""
    shown = []
    (out, out_end), (err, err_end) = pty.openpty(), pty.openpty()
    env = (
        {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        | {"ERGO_URL": url, "TERM": "xterm"}
        | environment
    )
    with subprocess.Popen([sys.executable, "-m", "ergo_server", *arguments], env=env, stdout=out_end, stderr=err_end):
        os.close(out_end)
        os.close(err_end)
        for end in (out, err):
            text = b""
            while piece := _read(end):
                text += piece
            os.close(end)
            shown.append(text.decode())
    return shown[0], shown[1]


def _read(end: int) -> bytes:
    try:
        return os.read(end, 65536)
    except OSError:  # how Linux says that the other end of a terminal is closed
        return b""
