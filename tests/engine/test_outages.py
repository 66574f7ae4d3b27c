"""What clients of the gateway see while vLLM is slow, dies, is gone, and comes back. One vLLM of their own, started twice."""

from __future__ import annotations

import base64
import functools
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import support
from asking import Meter

from ergo_server.engine.breaker import FAILURES
from ergo_server.engine.vllm import VllmEngine

pytestmark = pytest.mark.vllm


class Rambling(httpx2.AsyncHTTPTransport):
    """The network; on its way, the answer turn of a question about ramblers is told to go on to the end of the context."""

    begun = 0
    """How many such turns vLLM has begun to write."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request."""
        if b"rambler" in request.content and (body := json.loads(request.content))["messages"][2:]:
            request = httpx2.Request("POST", request.url, json=body | {"ignore_eos": True, "stop": [], "max_tokens": 3500})
            response = await super().handle_async_request(request)
            self.begun += 1
            return response
        return await super().handle_async_request(request)


@dataclass
class Stage:
    """A vLLM that can be stopped and started on its port, and a gateway that knows nothing of it."""

    port: int
    log: Path
    network: Rambling
    process: subprocess.Popen[bytes] | None = None
    gateway: str = ""

    @property
    def url(self) -> str:
        """vLLM's."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start vLLM, unless it runs."""
        if self.process is None:
            self.process = support.start_vllm(self.port, self.log)
            support.wait_until(lambda: support.answers(f"{self.url}/health") or self.died, "vLLM has started")
            assert not self.died, self.log.read_text()[-4000:]

    @property
    def died(self) -> bool:
        """Whether it ended by itself."""
        return self.process is None or self.process.poll() is not None

    def signal(self, what: signal.Signals) -> None:
        """Send a signal to all of vLLM's processes."""
        assert self.process is not None
        os.killpg(self.process.pid, what)

    def kill(self) -> None:
        """End vLLM without warning, if it runs."""
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """vLLM and a gateway that outlives it."""
    if reason := support.why_no_vllm():
        pytest.skip(reason)
    made = Stage(support.free_port(), tmp_path_factory.mktemp("outages") / "log", Rambling())
    try:
        made.start()
        engine = VllmEngine(made.url, transport=made.network)
        # The breaker would stay open for an hour: what is used again before that is so because it was seen to be back.
        limits = {"turn_seconds": 200, "request_seconds": 200, "breaker_failures": FAILURES, "breaker_seconds": 3600}
        with support.gateway(engine, **limits) as made.gateway:
            yield made
    finally:
        made.kill()


def ask(gateway: str, question: str = "", **more: object) -> httpx2.Response:
    """Ask about a held-out scene."""
    scene = support.held_out(400)
    fields = {"question": question or scene.question, "image": "data:;base64," + base64.b64encode(support.encode(scene)).decode()}
    return httpx2.post(f"{gateway}/v1/vqa", json=fields | more, timeout=support.START_SECONDS, trust_env=False)


def error(response: httpx2.Response) -> dict[str, Any]:
    """Return the error of the one envelope."""
    assert response.headers["x-request-id"]
    (found,) = response.json().values()
    assert found.keys() == {"message", "type", "param", "code"}
    return dict(found)


def test_a_stopped_engine_meets_the_deadline_and_is_used_again_afterwards(stage: Stage) -> None:
    """While vLLM's processes stand still a turn ends with 504, streaming or not; once they go on it is answered."""
    stage.start()
    assert ask(stage.gateway).status_code == 200
    with support.gateway(engine="vllm", engine_url=stage.url, engine_model="ergo-mini", turn_seconds=2) as impatient:
        stage.signal(signal.SIGSTOP)
        try:
            late = [ask(impatient, stream=streaming) for streaming in (False, True)]
        finally:
            stage.signal(signal.SIGCONT)
    assert [(response.status_code, error(response)["code"]) for response in late] == [(504, "engine_timeout")] * 2
    assert ask(stage.gateway).status_code == 200


def test_an_engine_killed_in_the_middle_ends_the_request(stage: Stage) -> None:
    """Whoever waits gets 502 or 503; whoever has read events gets the error as the last of them. Nobody is left waiting."""
    stage.start()
    with ThreadPoolExecutor() as pool:
        waiting, streaming = (pool.submit(ask, stage.gateway, "What do ramblers read?", stream=s) for s in (False, True))
        support.wait_until(lambda: stage.network.begun == 2, "both answers are being written")
        time.sleep(0.5)  # some tokens of thousands
        stage.kill()
        whole, events = waiting.result(), streaming.result()
    assert whole.status_code in (502, 503)
    assert error(whole)["code"] in ("engine_failed", "engine_unavailable")
    assert events.status_code == 200
    assert events.text.startswith("event: region\n")
    name, data = events.text.strip().split("\n\n")[-1].split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] in ("engine_failed", "engine_unavailable")


def test_a_missing_engine_is_told_at_once_and_its_return_needs_no_restart(stage: Stage) -> None:
    """Without vLLM the answer is 503 with a time to come back and the gateway is not ready; with vLLM back, all is as before.

    By then the circuit breaker is open: the health check that fails, and later does not, is what ends that.
    """
    state = functools.partial(Meter.of(stage.gateway), "ergo_circuit_breaker_state")
    stage.kill()
    for number in range(2 * FAILURES):
        gone = ask(stage.gateway, stream=bool(number % 2))
        assert (gone.status_code, error(gone)["code"]) == (503, "engine_unavailable")
        assert int(gone.headers["retry-after"]) > 0
    assert state(state="open") == 1
    assert not support.answers(f"{stage.gateway}/readyz")
    assert support.answers(f"{stage.gateway}/healthz")
    stage.start()
    support.wait_until(lambda: support.answers(f"{stage.gateway}/readyz"), "the gateway is ready again")
    assert state(state="half_open") == 1
    assert ask(stage.gateway).status_code == 200
    assert state(state="closed") == 1
