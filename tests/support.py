"""Parts that several tests need: servers in threads and processes, scenes as files."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import httpx2
from fastapi import FastAPI

import ergo_mini
from ergo_server.api.app import create_app
from ergo_server.api.listen import listen, server
from ergo_server.engine.base import Engine
from ergo_server.imaging.file import ImageFile, Stop
from ergo_server.imaging.geometry import PixelBudget
from ergo_server.imaging.header import ImageHeader, Limits, read_header
from ergo_server.imaging.view import View, overview
from ergo_server.settings import Settings
from ergo_train.hard_scenes import hard_scene
from ergo_train.scenes import HELD_OUT, Scene, scene

ROOT = Path(__file__).parents[1]
CHECKPOINT = ergo_mini.FOLDER / "checkpoint"
PROMPTS = ergo_mini.FOLDER / "prompts.toml"
VLLM = ROOT / ".venv-vllm" / "bin" / "vllm"

START_SECONDS = 600
"""Patience with a part that starts; a shared machine can be many times slower than an idle one."""


def held_out(number: int, *, size: tuple[int, int] | None = None) -> Scene:
    """Return a scene that training never draws."""
    return scene(HELD_OUT + number, size=size)


def held_out_hard(number: int) -> Scene:
    """Return a hard scene that training never draws."""
    return hard_scene(HELD_OUT + number)


def encode(made: Scene, form: str = "JPEG") -> bytes:
    """Return a scene as a file."""
    with io.BytesIO() as file:
        made.image.save(file, form, quality=92)
        return file.getvalue()


def header(data: bytes, **limits: int) -> ImageHeader:
    """Return the header of a file."""
    return read_header(ImageFile.of(data), Limits(**limits), Stop(START_SECONDS))


def look(data: bytes, tokens: int = 49) -> View:
    """Return the overview of a file."""
    return overview(ImageFile.of(data), header(data), PixelBudget(tokens), Stop(START_SECONDS))


def mini_settings(**given: object) -> Settings:
    """Return settings for ergo-mini on any engine, whatever the environment says."""
    return Settings(**{"prompts": PROMPTS, "port": 0, **given})  # type: ignore[arg-type]


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve an app on a free port of loopback, in a thread; yields its URL."""
    listening, running = listen("127.0.0.1", 0), server(app)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        wait_until(lambda: running.started or not thread.is_alive(), "the server has started")
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()
        listening.close()


def wait_until(condition: object, what: str, seconds: float = START_SECONDS) -> None:
    """Wait until ``condition()`` is true, or fail saying what did not happen."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > end:
            raise TimeoutError(f"not so within {seconds:g} s: {what}")
        time.sleep(0.05)


def answers(url: str) -> bool:
    """Say whether a GET of ``url`` is answered with 200."""
    try:
        return httpx2.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


def app(instead: Engine | None = None, **given: object) -> FastAPI:
    """Return the gateway for ergo-mini, on another engine than the settings name if one is given."""
    return create_app(mini_settings(**given), instead)


@contextlib.contextmanager
def gateway(instead: Engine | None = None, **given: object) -> Iterator[str]:
    """Serve the gateway for ergo-mini, on another engine than the settings name if one is given; yields its URL once ready."""
    with served(app(instead, **given)) as url:
        wait_until(lambda: answers(f"{url}/readyz"), "the gateway is ready")
        yield url


class Process:
    """A server in a process of its own, once it is ready.

    Args:
        running: ``ergo-vqa serve``.
        complaints: what it writes to its standard error.
        ready: the path that answers 200 then.
    """

    def __init__(self, running: subprocess.Popen[str], complaints: IO[str], ready: str = "/readyz") -> None:
        self._running = running
        self._complaints = complaints
        assert running.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+", running.stdout.readline())
        assert address is not None, self.complaints()
        self.url = address[0]
        self.pid = running.pid
        wait_until(lambda: answers(f"{self.url}{ready}"), "the server is ready")

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def get(self, path: str) -> httpx2.Response:
        """Ask."""
        return httpx2.get(f"{self.url}{path}", trust_env=False, timeout=60)

    def signal(self, which: signal.Signals = signal.SIGTERM) -> None:
        """Send it a signal: to stop, unless another is given."""
        self._running.send_signal(which)

    def accepts(self) -> bool:
        """Say whether it still takes connections."""
        try:
            socket.create_connection(self.address, timeout=60).close()
        except ConnectionError:
            return False
        return True

    def complaints(self) -> str:
        """Return what it has complained of so far."""
        self._complaints.seek(0)
        return self._complaints.read()

    def end(self, seconds: float = 60) -> tuple[int, str]:
        """Wait until it has ended; returns its exit status, and what it complained of."""
        return self._running.wait(seconds), self.complaints()


@contextlib.contextmanager
def process(ready: str = "/readyz", /, **settings: object) -> Iterator[Process]:
    """Run ``ergo-vqa serve`` for ergo-mini, on the embedded engine unless the settings name another; yields it once it is ready.

    It complains, but does not write a line for each request, unless the settings say so.
    """
    given = {"prompts": PROMPTS, "log_level": "warning", **settings}
    environment = {f"ERGO_{name.upper()}": str(value) for name, value in given.items()}
    command = [sys.executable, "-m", "ergo_server", "serve", "--port", "0"]
    with (
        tempfile.TemporaryFile("a+") as complaints,  # not a pipe, which stops its writer when nobody reads
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True, env=os.environ | environment) as running,
    ):
        try:
            yield Process(running, complaints, ready)
        finally:
            running.kill()


def free_port() -> int:
    """Return a port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_vllm(port: int, log: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start real vLLM with ergo-mini on loopback; wait for ``/health`` with `wait_until`."""
    command = [
        str(VLLM),
        "serve",
        str(CHECKPOINT),
        "--served-model-name",
        "ergo-mini",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--dtype", "float32", "--max-model-len", "4096", "--enforce-eager", "--block-size", "32", "--max-num-seqs", "8"]
    command += ["--kv-cache-memory-bytes", "64M", "--limit-mm-per-prompt", '{"image":8,"video":0}']
    command += ["--mm-processor-cache-gb", "0.25", "--enable-prompt-tokens-details", "--enable-per-request-metrics"]
    command += ["--uvicorn-log-level", "warning"]
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    with log.open("ab") as out:
        process = subprocess.Popen([*command, *more], env=os.environ | quiet, stdout=out, stderr=out, start_new_session=True)
    # While it writes, vLLM's engine core and its worker each spin on a shared buffer, yielding between the looks. Two of them on
    # two cores kept every other process of the machine waiting for up to ten seconds (Linux 6.18), vLLM's own API server and the
    # client that wants to leave included. On all cores but one they spin as they like.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(process.pid, cores[: max(1, len(cores) - 1)])
    return process


@contextlib.contextmanager
def vllm(log: Path, *more: str) -> Iterator[str]:
    """Serve ergo-mini with real vLLM on a free port, with further flags; yields its URL once it answers."""
    port = free_port()
    process = start_vllm(port, log, *more)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(f"{url}/health") or process.poll() is not None, "vLLM has started")
        assert process.poll() is None, log.read_text()[-4000:]
        yield url
    finally:
        stop(process)


def metric(url: str, *words: str) -> float:
    """Return a metric: the sum of the series whose line holds all words."""
    lines = httpx2.get(f"{url}/metrics", trust_env=False, timeout=START_SECONDS).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line[0] != "#" and all(word in line for word in words))


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()


def why_no_vllm() -> str | None:
    """Say why real vLLM cannot be run here, or None."""
    if VLLM.exists():
        return None
    where = f"{sys.platform}, Python {sys.version_info.major}.{sys.version_info.minor}"
    return f"vLLM for CPU is not installed in {VLLM.parents[1].name} ({where}); `make test` installs it where its wheel runs"
