"""Two real vLLM servers behind one gateway: each question stays with one, and when one is killed the other takes over."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import support
from asking import data_url, events

pytestmark = pytest.mark.vllm

CLIENTS = 6
"""Asking all the time; three on each engine."""


@dataclass
class Fleet:
    """Two vLLM servers by address, and a gateway in front of them."""

    logs: Path
    engines: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    gateway: str = ""

    def start(self) -> None:
        """Start both servers, at the same time."""
        for _ in range(2):
            port = support.free_port()
            self.engines[f"127.0.0.1:{port}"] = support.start_vllm(port, self.logs / f"{port}")
        for address, process in self.engines.items():
            support.wait_until(
                lambda address=address, process=process: (
                    support.answers(f"http://{address}/health") or process.poll() is not None
                ),
                "vLLM has started",
            )

    def kill(self, address: str) -> None:
        """End a server without warning."""
        os.killpg(self.engines[address].pid, signal.SIGKILL)
        self.engines[address].wait()

    def turns(self, address: str) -> float:
        """Return how many requests a server has finished."""
        return support.metric(f"http://{address}", "vllm:request_success_total")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two servers and a gateway; its breakers and checks are as an operator gets them."""
    if reason := support.why_no_vllm():
        pytest.skip(reason)
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    try:
        made.start()
        urls = ",".join(f"http://{address}" for address in made.engines)
        with support.gateway(engine="vllm", engine_url=urls) as made.gateway:
            support.wait_until(lambda: support.metric(made.gateway, "ergo_engine_ready") == 2, "both have been looked at")
            yield made
    finally:
        for process in made.engines.values():
            support.stop(process)


def ask(fleet: Fleet, number: int, **more: Any) -> httpx2.Response:
    """Ask about a held-out scene."""
    scene = support.held_out(number)
    body = {"image": data_url(support.encode(scene), "jpeg"), "question": scene.question} | more
    return httpx2.post(f"{fleet.gateway}/v1/vqa", json=body, timeout=support.START_SECONDS, trust_env=False)


def answer(response: httpx2.Response) -> dict[str, Any]:
    """Return the answer object, of a stream as well."""
    assert response.status_code == 200, response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        name, done = events(response.text)[-1]
        assert name == "done", done
        return dict(done)
    return dict(response.json())


def test_the_answer_turn_lands_on_the_server_of_the_zoom_turn(fleet: Fleet) -> None:
    """Both turns of each of 16 questions are on one server, which has the prefix; and both servers get some."""
    before = {address: fleet.turns(address) for address in fleet.engines}
    turns = []
    for number in range(700, 716):
        asked = {address: fleet.turns(address) for address in fleet.engines}
        usage = answer(ask(fleet, number))["usage"]["turns"]
        turns.append({address: fleet.turns(address) - asked[address] for address in fleet.engines})
        zoom, last = usage
        assert last["cached_tokens"] >= 0.6 * zoom["prompt_tokens"]
    assert all(sorted(one.values()) == [0, 2] for one in turns)
    assert all(fleet.turns(address) > before[address] for address in fleet.engines)
    assert support.metric(fleet.gateway, "ergo_engine_failovers_total") == 0


def test_later_questions_about_an_image_reach_the_same_server(fleet: Fleet) -> None:
    """A second question about an image finds its overview in the prefix cache, whichever server that is."""
    for number in range(720, 726):
        ask(fleet, number)
        again = answer(ask(fleet, number, question="What is the code on the blue square?"))
        zoom, _ = again["usage"]["turns"]
        assert zoom["cached_tokens"] >= again["visual_tokens"]["overview"] // 32 * 32


def test_a_server_that_is_killed_costs_no_request(fleet: Fleet) -> None:
    """Under load one of two is killed without warning: every request, streamed or not, is answered as it would be else."""
    scenes = [750 + number for number in range(12)]
    expected = {number: answer(ask(fleet, number))["answer"] for number in scenes}
    victim = max(fleet.engines, key=fleet.turns)

    def client(which: int) -> list[tuple[int, str]]:
        found = []
        for step in range(10):
            number = scenes[(which * 2 + step) % len(scenes)]
            found.append((number, answer(ask(fleet, number, stream=which % 2 == 0))["answer"]))
            done[which] += 1
        return found

    done: Counter[int] = Counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        asked: list[Future[list[tuple[int, str]]]] = [pool.submit(client, which) for which in range(CLIENTS)]
        support.wait_until(
            lambda: sum(done.values()) >= CLIENTS and support.metric(f"http://{victim}", "vllm:num_requests_running") > 0,
            "it is busy",
        )
        fleet.kill(victim)
        found = [pair for future in asked for pair in future.result(support.START_SECONDS)]
    assert len(found) == CLIENTS * 10
    assert [(number, said) for number, said in found if said != expected[number]] == []
    assert support.metric(fleet.gateway, "ergo_engine_failovers_total") > 0
    assert support.answers(f"{fleet.gateway}/readyz")
    support.wait_until(lambda: support.metric(fleet.gateway, "ergo_engine_ready", victim) == 0, "the health check has noticed")
    moved = support.metric(fleet.gateway, "ergo_engine_failovers_total")
    assert [answer(ask(fleet, number))["answer"] for number in scenes] == list(expected.values())
    assert support.metric(fleet.gateway, "ergo_engine_failovers_total") <= moved + 1
