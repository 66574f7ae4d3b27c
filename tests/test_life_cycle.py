"""What clients see while the gateway or its engine is started, replaced and stopped under load: real vLLM, real processes."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest
import support
from asking import chunks, data_url, encoded, error, events
from support import Process

from ergo_client import Client, ServerBusy, ServerFailed, TimedOut

pytestmark = pytest.mark.vllm

CLIENTS = 4
"""That ask without a pause. The engine has one core here: more only wait."""

SCENES = [support.held_out(number) for number in (1, 2, 3)]
"""ergo-mini answers them rightly; the first test sees to that."""

PHOTOS = [support.encode(scene) for scene in SCENES]

PIECES = 8
"""That a slow upload is sent in."""

PATIENCE = support.START_SECONDS
"""Seconds that a gateway has to finish what is under way, and a sender may pause; what happens when such times are over is in
test_drain.py and tests/api."""

STALL_SECONDS = 15
"""By which a question may outlast its deadline: the gateway counts from when it has the question, and two processes of vLLM that
spin can keep all others of a small machine waiting for ten (`support.start_vllm`). What else ends a wait takes longer: a turn's
60 s, the engine's silence of 120."""


@dataclass(frozen=True, slots=True)
class Told:
    """What became of a question."""

    form: str
    began: float
    status: int
    """0: there was no connection, so that nothing was asked."""
    code: str = ""
    """Of the error, if it was one; ``lost`` where the connection broke before the answer was whole."""
    right: bool = True
    """Whether the answer is the scene's."""
    seconds: float = 0.0

    @property
    def answered(self) -> bool:
        """Whether there is a whole answer."""
        return self.status == 200 and not self.code


Ask = Callable[[httpx2.Client, str, int], httpx2.Response]


def vqa(http: httpx2.Client, url: str, number: int, **more: object) -> httpx2.Response:
    """Ask in JSON."""
    body = {"image": {"data": encoded(PHOTOS[number])}, "question": SCENES[number].question}
    return http.post(f"{url}/v1/vqa", json=body | more)


def form(http: httpx2.Client, url: str, number: int) -> httpx2.Response:
    """Ask with a form."""
    files = {"image": ("scene.jpg", PHOTOS[number], "image/jpeg")}
    return http.post(f"{url}/v1/vqa", data={"question": SCENES[number].question}, files=files)


def chat(http: httpx2.Client, url: str, number: int, **more: object) -> httpx2.Response:
    """Ask as an OpenAI client does."""
    image = {"type": "image_url", "image_url": {"url": data_url(PHOTOS[number], "jpeg")}}
    content = [image, {"type": "text", "text": SCENES[number].question}]
    body = {"model": "ergo", "messages": [{"role": "user", "content": content}]}
    return http.post(f"{url}/v1/chat/completions", json=body | more)


def breathe(piece: int) -> None:
    """Wait before a piece of an upload is sent."""
    time.sleep(0.03)


def slowly(http: httpx2.Client, url: str, number: int, pause: Callable[[int], None] = breathe) -> httpx2.Response:
    """Send the image piece by piece."""
    photo = PHOTOS[number]
    step = -(-len(photo) // PIECES)

    def body() -> Iterator[bytes]:
        for piece in range(PIECES):
            pause(piece)
            yield photo[piece * step : (piece + 1) * step]

    headers = {"content-type": "image/jpeg", "content-length": str(len(photo))}
    return http.post(f"{url}/v1/vqa", params={"question": SCENES[number].question}, content=body(), headers=headers)


FORMS: dict[str, Ask] = {
    "vqa": vqa,
    "vqa, streamed": lambda http, url, number: vqa(http, url, number, stream=True),
    "chat": chat,
    "chat, streamed": lambda http, url, number: chat(http, url, number, stream=True),
    "form": form,
    "slow upload": slowly,
}


def read(response: httpx2.Response) -> tuple[str, str]:
    """Return the answer and the error's code, one of them empty; fails where the response is neither whole nor an error."""
    if response.status_code != 200:
        status, code, _ = error(response)
        assert status != 503 or int(response.headers["retry-after"]) >= 1
        return "", code
    if not response.headers["content-type"].startswith("text/event-stream"):
        body = response.json()
        return (body["answer"] if "answer" in body else body["choices"][0]["message"]["content"]), ""
    if '"chat.completion.chunk"' in response.text:
        said = chunks(response.text)
        if "error" in said[-1]:
            return "", said[-1]["error"]["code"]
        assert any(choice["finish_reason"] for chunk in said for choice in chunk["choices"])
        return "".join(choice["delta"].get("content") or "" for chunk in said for choice in chunk["choices"]), ""
    name, last = events(response.text)[-1]
    assert name in ("done", "error")
    return ("", last["error"]["code"]) if name == "error" else (last["answer"], "")


def ask(http: httpx2.Client, url: str, number: int, which: str, how: Ask | None = None) -> Told:
    """Ask a question in one of the forms."""
    began = time.monotonic()
    try:
        response = (how or FORMS[which])(http, url, number)
    except httpx2.ConnectError:
        return Told(which, began, 0)
    except httpx2.TransportError as failure:
        return Told(which, began, 0, f"lost: {failure!r}")
    answer, code = read(response)
    seconds = time.monotonic() - began
    return Told(which, began, response.status_code, code, bool(code) or answer == SCENES[number].answer, seconds)


def connections(keep: bool = True) -> httpx2.Client:
    """Return a client that uses its connections again, or takes a new one for each request."""
    limits = httpx2.Limits(max_keepalive_connections=None if keep else 0)
    return httpx2.Client(trust_env=False, timeout=support.START_SECONDS, limits=limits)


@dataclass
class Crowd:
    """Clients that ask on and on, each in all forms in turn; half of them on connections that they keep.

    They begin at different gateways, and go on to the next where they are refused or find nobody.
    """

    urls: list[str]
    told: list[Told] = field(default_factory=list)
    failed: list[BaseException] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self, number: int) -> None:
        """Be one of the clients."""
        try:
            with connections(keep=bool(number % 2)) as http:
                turn = number
                for count, which in enumerate(itertools.islice(itertools.cycle(FORMS), number, None)):
                    if self.over.is_set():
                        return
                    told = ask(http, self.urls[turn % len(self.urls)], count % len(SCENES), which)
                    self.told.append(told)
                    if told.status in (0, 503):
                        turn += 1
                        time.sleep(0.2)
        except BaseException as failure:
            self.failed.append(failure)

    def outcomes(self) -> Counter[tuple[int, str]]:
        """Count what became of the questions, by status and code."""
        return Counter((told.status, told.code) for told in self.told)

    def go_on(self) -> None:
        """Wait until questions in all forms have been answered that were asked from now on."""
        now = time.monotonic()

        def answered() -> bool:
            assert not self.failed, self.failed
            return {told.form for told in self.told if told.answered and told.began > now} == set(FORMS)

        support.wait_until(answered, "questions in all forms are answered")


@contextlib.contextmanager
def crowd(*urls: str) -> Iterator[Crowd]:
    """Have clients ask until the end of the block; checks that none was lost and that every answer was right."""
    made = Crowd(list(urls))
    threads = [threading.Thread(target=made.run, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        made.over.set()
        for thread in threads:
            thread.join()
    print(made.outcomes())
    assert not made.failed, made.failed
    assert not [told for told in made.told if told.code.startswith("lost")]
    assert all(told.right for told in made.told)


@dataclass
class Stage:
    """Real vLLM, on a port of its own."""

    port: int
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """vLLM's."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start vLLM, unless it runs, and wait for nothing."""
        if self.process is None:
            self.process = support.start_vllm(self.port, self.log, "--shutdown-timeout", "30")

    def healthy(self) -> bool:
        """Say whether vLLM answers; fails where it has ended."""
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        return support.answers(f"{self.url}/health")

    def ready(self) -> None:
        """Start vLLM, unless it runs, and wait until it answers."""
        self.start()
        support.wait_until(self.healthy, "vLLM has started")

    def terminate(self) -> None:
        """Tell vLLM to stop, and wait until it has."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(support.START_SECONDS)
        self.process = None

    def running(self) -> float:
        """Return how many requests vLLM works on.

        Its gauges are set with the next output of its engine, which a reply that ended at one of our stop strings may not have
        brought yet: a reply that ends at its length brings it along.
        """
        body = {"model": "ergo-mini", "messages": [{"role": "user", "content": "?"}], "max_tokens": 1}
        with connections() as http:
            assert http.post(f"{self.url}/v1/chat/completions", json=body).status_code == 200
        return support.metric(self.url, "vllm:num_requests_running") + support.metric(self.url, "vllm:num_requests_waiting{")

    def gateway(self, ready: str = "/readyz", /, **settings: object) -> contextlib.AbstractContextManager[Process]:
        """Run a gateway that knows vLLM's address, and nothing else of it."""
        return support.process(ready, engine="vllm", engine_url=self.url, **settings)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Return where vLLM will be."""
    if reason := support.why_no_vllm():
        pytest.skip(reason)
    made = Stage(support.free_port(), tmp_path_factory.mktemp("life") / "log")
    try:
        yield made
    finally:
        if made.process is not None:
            support.stop(made.process)


def test_it_starts_without_its_engine_and_takes_it_up_when_it_comes(stage: Stage) -> None:
    """Before vLLM runs the gateway is alive, says that it is not ready and why, and refuses questions with a time to come back;
    once vLLM is there it is ready by itself and answers."""
    with stage.gateway("/healthz") as server, connections() as http:
        waiting = server.get("/readyz")
        assert (waiting.status_code, waiting.json()["status"]) == (503, "waiting")
        assert waiting.json()["detail"]
        for how in FORMS.values():
            refused = how(http, server.url, 0)
            assert error(refused)[:2] == (503, "engine_unavailable")
            assert int(refused.headers["retry-after"]) >= 1
        assert server.get("/healthz").status_code == 200
        stage.start()
        support.wait_until(lambda: server.get("/readyz").status_code == 200, "the gateway is ready by itself")
        assert stage.healthy()
        told = [ask(http, server.url, number, which) for which in FORMS for number in range(len(SCENES))]
        assert all(one.answered and one.right for one in told), told
        server.signal()
        assert server.end()[0] == 0


def test_sigterm_under_load_loses_nothing_that_was_accepted(stage: Stage) -> None:
    """Told to stop amid questions in every form, the gateway answers what it has begun, half-sent uploads included, or refuses
    with 503 and a time to come back; nothing breaks off, the exit status is 0, and vLLM has nothing left to do."""
    stage.ready()
    half, rest = threading.Barrier(3), threading.Event()

    def pause(piece: int) -> None:
        if piece == PIECES // 2:
            half.wait(support.START_SECONDS)
            rest.wait(support.START_SECONDS)

    def upload(number: int) -> Told:
        with connections() as http:
            return ask(http, server.url, number, "half", lambda http, url, number: slowly(http, url, number, pause))

    patient = {f"{what}_seconds": PATIENCE for what in ("drain", "body", "body_stall")}
    with stage.gateway(**patient) as server, ThreadPoolExecutor() as pool, crowd(server.url) as clients:
        halves = [pool.submit(upload, number) for number in range(2)]
        half.wait(support.START_SECONDS)
        clients.go_on()
        signalled = time.monotonic()
        server.signal()
        support.wait_until(lambda: not server.accepts(), "no connection is taken any more")
        rest.set()
        answers = [told.result() for told in halves]
        assert all(told.answered and told.right for told in answers), answers
        assert server.end(PATIENCE) == (0, "")
    assert any(told.answered and told.began < signalled < told.began + told.seconds for told in clients.told)
    assert clients.outcomes().keys() <= {(200, ""), (503, "overloaded"), (0, "")}
    assert stage.running() == 0


def test_gateways_are_replaced_one_by_one_and_nobody_loses_a_question(stage: Stage) -> None:
    """Two gateways are replaced, one after the other; clients who go on to the other when they are refused, or find nobody, get
    every answer, and nothing that they had sent breaks off."""
    stage.ready()
    with contextlib.ExitStack() as stack:
        first, second, third = (
            stack.enter_context(stage.gateway(drain_grace_seconds=1, drain_seconds=PATIENCE)) for _ in range(3)
        )
        with crowd(first.url, second.url) as clients:
            for place, (old, new) in enumerate([(first, third), (second, first)]):
                clients.go_on()
                old.signal()
                assert old.end(PATIENCE) == (0, "")
                clients.go_on()
                clients.urls[place] = new.url
    assert clients.outcomes().keys() <= {(200, ""), (503, "overloaded"), (0, "")}
    assert stage.running() == 0


def test_the_engine_is_restarted_under_load_and_the_gateway_goes_on(stage: Stage) -> None:
    """While vLLM stops, is gone and comes back, each question is answered rightly, or with an error that says who failed, within
    its deadline; readiness turns false and true again; then all is answered, by the gateway as it was. A client of ours gives up
    with its usual two retries when vLLM is gone for longer than those wait; one that may try often enough sees nothing of it."""
    stage.ready()
    ready: list[int] = []
    deadline = 30
    usual, patient = Python(retries=2), Python(retries=50)
    with stage.gateway(request_seconds=deadline) as server, ThreadPoolExecutor() as pool, crowd(server.url) as clients:
        over = clients.over
        pool.submit(probe, server, ready, over)
        asking = [pool.submit(python.run, server.url, over) for python in (usual, patient)]
        clients.go_on()
        stage.terminate()
        support.wait_until(lambda: ready[-1] == 503, "the gateway is not ready")
        support.wait_until(lambda: usual.failed["ServerBusy"] or asking[0].done(), "the usual client has given up")
        stage.ready()
        support.wait_until(lambda: ready[-1] == 200, "the gateway is ready again")
        clients.go_on()
        back = time.monotonic()
        clients.go_on()
        over.set()
        for client in asking:
            client.result()
    print(usual, patient, f"the longest question took {max(told.seconds for told in clients.told):.1f} s")
    assert usual.answered > 0
    assert usual.failed.keys() <= {"ServerBusy", "ServerFailed"}
    assert patient.answered > 0
    assert not patient.failed
    assert clients.outcomes().keys() <= {
        (200, ""),
        (200, "engine_failed"),
        (200, "engine_unavailable"),
        (502, "engine_failed"),
        (503, "engine_unavailable"),
        (503, "engine_busy"),
        (504, "engine_timeout"),
    }
    assert all(told.answered for told in clients.told if told.began > back)
    assert max(told.seconds for told in clients.told) < deadline + STALL_SECONDS
    assert stage.running() == 0


def probe(server: Process, ready: list[int], over: threading.Event) -> None:
    """Ask whether a gateway is ready, as an orchestrator does, again and again."""
    while not over.wait(0.5):
        ready.append(server.get("/readyz").status_code)


@dataclass
class Python:
    """A client of ours that asks on and on, and what became of its questions."""

    retries: int
    answered: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    """By the exception."""

    def run(self, url: str, over: threading.Event) -> None:
        """Ask until it is over."""
        with Client(url, max_retries=self.retries, timeout=support.START_SECONDS) as client:
            while not over.is_set():
                try:
                    assert client.ask(PHOTOS[0], SCENES[0].question).text == SCENES[0].answer
                    self.answered += 1
                except (ServerBusy, ServerFailed, TimedOut) as failure:
                    self.failed[type(failure).__name__] += 1
