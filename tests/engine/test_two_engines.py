"""Two real vLLM servers behind one gateway: each question stays with one; where that is stopped or killed, the other is asked."""

from __future__ import annotations

import functools
import itertools
import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import support
from asking import data_url, error, events

pytestmark = pytest.mark.vllm

CLIENTS = 6
"""Asking all the time, each about images of both engines."""


@dataclass
class Fleet:
    """Two vLLM servers by address, and a gateway in front of them."""

    logs: Path
    engines: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    gateway: str = ""

    def start(self, *addresses: str) -> None:
        """Start servers, at the same time."""
        for address in addresses:
            port = int(address.rpartition(":")[2])
            self.engines[address] = support.start_vllm(port, self.logs / f"{port}", "--shutdown-timeout", "30")
        for address in addresses:
            support.wait_until(functools.partial(self.healthy, address), "vLLM has started")

    def healthy(self, address: str) -> bool:
        """Say whether a server answers; fails where it has ended."""
        assert self.engines[address].poll() is None, (self.logs / address.rpartition(":")[2]).read_text()[-4000:]
        return support.answers(f"http://{address}/health")

    def terminate(self, address: str) -> None:
        """Tell a server to stop, and wait until it has."""
        self.engines[address].terminate()
        self.engines[address].wait(support.START_SECONDS)

    def kill(self, address: str) -> None:
        """End a server without warning."""
        os.killpg(self.engines[address].pid, signal.SIGKILL)
        self.engines[address].wait()

    def ready(self) -> float:
        """Return how many servers the gateway takes for ready."""
        return support.metric(self.gateway, "ergo_engine_ready")

    def failovers(self) -> float:
        """Return how many turns the gateway has moved from one server to the other."""
        return support.metric(self.gateway, "ergo_engine_failovers_total")

    def busy(self, address: str) -> bool:
        """Say whether a server is writing a reply."""
        return support.metric(f"http://{address}", "vllm:num_requests_running") > 0

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
        made.start(*(f"127.0.0.1:{support.free_port()}" for _ in range(2)))
        urls = ",".join(f"http://{address}" for address in made.engines)
        with support.gateway(engine="vllm", engine_url=urls) as made.gateway:
            support.wait_until(lambda: made.ready() == 2, "both have been looked at")
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
    assert fleet.failovers() == 0


def test_later_questions_about_an_image_reach_the_same_server(fleet: Fleet) -> None:
    """A second question about an image finds its overview in the prefix cache, whichever server that is."""
    for number in range(720, 726):
        ask(fleet, number)
        again = answer(ask(fleet, number, question="What is the code on the blue square?"))
        zoom, _ = again["usage"]["turns"]
        assert zoom["cached_tokens"] >= again["visual_tokens"]["overview"] // 32 * 32


@dataclass
class Crowd:
    """Clients that ask on and on, half of them for streams."""

    fleet: Fleet
    expected: dict[int, str]
    """What is answered about each scene, undisturbed."""
    answered: Counter[int] = field(default_factory=Counter)
    """By client."""
    refused: Counter[str] = field(default_factory=Counter)
    """By the error's code."""
    clients: list[Future[None]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self, which: int) -> None:
        """Be one of the clients; fails at what is neither the right answer nor a refusal that says when to come back."""
        for number in itertools.islice(itertools.cycle(self.expected), which * 3, None):
            if self.over.is_set():
                return
            response = ask(self.fleet, number, stream=which % 2 == 0)
            if response.status_code == 503:
                self.refused[error(response)[1]] += 1
                assert int(response.headers["retry-after"]) >= 1
                self.over.wait(1)
            else:
                assert answer(response)["answer"] == self.expected[number]
                self.answered[which] += 1

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something; fails where a client has."""

        def so() -> bool:
            for client in self.clients:
                assert not client.done(), client.result()
            return condition()

        support.wait_until(so, what)

    def go_on(self) -> None:
        """Wait until every client has had two answers more."""
        least = {which: self.answered[which] + 2 for which in range(CLIENTS)}
        self.until(lambda: all(self.answered[which] >= least[which] for which in least), "everybody is answered")


def restart(fleet: Fleet, address: str, crowd: Crowd) -> None:
    """Stop a server amid its replies, start it again, and wait until it has its images back."""
    crowd.go_on()
    crowd.until(lambda: fleet.busy(address), "it is busy")
    fleet.terminate(address)
    crowd.until(lambda: fleet.ready() == 1, "the gateway has noticed")
    crowd.go_on()
    fleet.start(address)
    crowd.until(lambda: fleet.ready() == 2, "both are ready again")
    begun = fleet.turns(address)
    crowd.until(lambda: fleet.turns(address) > begun, "its images are its own again")


def test_servers_are_restarted_one_by_one_and_nobody_loses_a_question(fleet: Fleet) -> None:
    """Under load one of two is told to stop, is gone, and is started again on its port; once both are ready, the other is. Every
    question, streamed or not, is answered as it would be else, or refused with a time to come back."""
    crowd = Crowd(fleet, {number: answer(ask(fleet, number))["answer"] for number in range(700, 716)})
    moved = fleet.failovers()
    with ThreadPoolExecutor(CLIENTS) as pool:
        crowd.clients = [pool.submit(crowd.run, which) for which in range(CLIENTS)]
        try:
            for address in list(fleet.engines):
                restart(fleet, address, crowd)
            crowd.go_on()
        finally:
            crowd.over.set()
    for client in crowd.clients:
        client.result()
    print(crowd.answered, crowd.refused, fleet.failovers() - moved)
    assert crowd.refused.keys() <= {"engine_unavailable", "engine_busy", "overloaded"}
    assert crowd.answered.total() >= 10 * CLIENTS
    assert fleet.failovers() > moved


def test_a_server_that_is_killed_costs_no_request(fleet: Fleet) -> None:
    """Under load one of two is killed without warning: every request, streamed or not, is answered as it would be else."""
    scenes = [750 + number for number in range(12)]
    expected = {number: answer(ask(fleet, number))["answer"] for number in scenes}
    victim = max(fleet.engines, key=fleet.turns)
    moved = fleet.failovers()

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
            lambda: sum(done.values()) >= CLIENTS and fleet.busy(victim),
            "it is busy",
        )
        fleet.kill(victim)
        found = [pair for future in asked for pair in future.result(support.START_SECONDS)]
    assert len(found) == CLIENTS * 10
    assert [(number, said) for number, said in found if said != expected[number]] == []
    assert fleet.failovers() > moved
    assert support.answers(f"{fleet.gateway}/readyz")
    support.wait_until(lambda: support.metric(fleet.gateway, "ergo_engine_ready", victim) == 0, "the health check has noticed")
    moved = fleet.failovers()
    assert [answer(ask(fleet, number))["answer"] for number in scenes] == list(expected.values())
    assert fleet.failovers() <= moved + 1
