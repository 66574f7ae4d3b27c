"""The circuit breaker: around an engine that fails on command, and in the gateway."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import asking
import pytest
import support
from asking import Meter
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from ergo_server.api.app import create_app
from ergo_server.engine.base import Delta, EngineStatus, Generation, Sampling, within
from ergo_server.engine.breaker import FAILURES, OPEN_SECONDS, Breaker
from ergo_server.engine.scripted import ScriptedEngine
from ergo_server.errors import (
    ContextTooLong,
    EngineBusy,
    EngineError,
    EngineFailed,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
)
from ergo_server.protocol.conversation import Conversation

PATIENCE = 60
"""Seconds that no test here needs."""

ASK = Conversation().user("?")
BRIEF = Sampling(8)
FAILS = (EngineFailed("broken"), EngineUnavailable("gone"), EngineTimeout("silent"))
ANSWERS = (EngineRejected("no"), ContextTooLong("too long"), EngineBusy("full"))


@dataclass
class Clock:
    """A clock that stands until it is moved."""

    now: float = 1000.0

    def __call__(self) -> float:
        """Return seconds."""
        return self.now


@dataclass
class Stage:
    """An engine that does what it is told; the breaker around it, and its clock."""

    reply: str | EngineError | None = "Hello there"
    """None: silence, until there is a text again, the reader leaves, or the deadline passes."""
    deaf: bool = False
    """Whether deadlines mean nothing to it."""
    ready: bool = True
    name: str = "scripted"
    asked: int = 0
    gate: asyncio.Event | None = None
    """Where there is one, the rest of a reply waits for it after its first piece."""
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.breaker = Breaker(self, clock=self.clock)

    def generate(
        self,
        conversation: Conversation,
        sampling: Sampling,
        *,
        session: str = "",
        salt: str = "",
        deadline: float | None = None,
    ) -> AsyncGenerator[Delta | Generation, None]:
        """Do as told."""
        return within(None if self.deaf else deadline, self._generate(conversation, sampling))

    async def _generate(self, conversation: Conversation, sampling: Sampling) -> AsyncGenerator[Delta | Generation, None]:
        self.asked += 1
        reply = self.reply
        while reply is None:
            await asyncio.sleep(0.001)
            reply = self.reply if isinstance(self.reply, str) else None
        async for piece in ScriptedEngine(lambda said, sampling: reply).generate(conversation, sampling):
            yield piece
            if self.gate is not None:
                await self.gate.wait()

    async def status(self) -> EngineStatus:
        """As told."""
        return EngineStatus(self.ready, "scripted", "" if self.ready else "no answer")

    async def aclose(self) -> None:
        """Nothing to give back."""

    async def ask(self, deadline: float | None = None) -> EngineError | None:
        """Ask through the breaker; returns how it failed."""
        try:
            async with contextlib.aclosing(self.breaker.generate(ASK, BRIEF, deadline=deadline)) as pieces:
                async for _ in pieces:
                    pass
        except EngineError as error:
            return error
        return None

    async def open(self, error: EngineError = FAILS[0]) -> None:
        """Fail as often in a row as opens the breaker."""
        self.reply = error
        for _ in range(FAILURES):
            assert await self.ask() is error
        assert self.breaker.state == "open"
        self.asked = 0


def run(work: Callable[[Stage], Awaitable[None]]) -> None:
    """Run ``work`` on a stage of its own; an engine that is silent for ever fails it."""

    async def made() -> None:
        async with asyncio.timeout(PATIENCE):
            await work(Stage())

    asyncio.run(made())


@pytest.mark.parametrize("error", FAILS, ids=lambda error: error.code)
def test_failures_in_a_row_open_it(error: EngineError) -> None:
    """After the last of them nothing reaches the engine, and callers are told at once when to come back."""

    async def work(stage: Stage) -> None:
        stage.reply = error
        for number in range(FAILURES):
            assert (stage.breaker.state, stage.asked) == ("closed", number)
            assert await stage.ask() is error
        assert stage.breaker.state == "open"
        stage.clock.now += 10.5
        for _ in range(20):
            told = await stage.ask()
            assert type(told) is EngineUnavailable
            assert told.retry_after == OPEN_SECONDS - 10
        assert stage.asked == FAILURES

    run(work)


@pytest.mark.parametrize("error", ANSWERS, ids=lambda error: error.code)
def test_an_engine_that_refuses_or_is_busy_is_there(error: EngineError) -> None:
    """A refusal and a full queue are answers: all requests go on reaching the engine."""

    async def work(stage: Stage) -> None:
        stage.reply = error
        assert [await stage.ask() for _ in range(3 * FAILURES)] == [error] * 3 * FAILURES
        assert (stage.breaker.state, stage.asked) == ("closed", 3 * FAILURES)

    run(work)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["answers", "fails", "is busy", "time passes"]), min_size=20, max_size=60))
def test_any_history_asks_the_engine_only_when_it_should(history: list[str]) -> None:
    """One request after the other: an engine is asked unless it failed too often in a row, or as a probe, not long enough ago."""

    async def work(stage: Stage) -> None:
        replies: dict[str, str | EngineError] = {"answers": "Hello", "fails": FAILS[0], "is busy": ANSWERS[2]}
        failed, since, asked = 0, -1e9, 0
        for event in history:
            if event == "time passes":
                stage.clock.now += 0.6 * OPEN_SECONDS
                continue
            stage.reply = replies[event]
            left_alone = failed >= FAILURES and stage.clock.now - since < OPEN_SECONDS
            told = await stage.ask()
            if left_alone:
                assert isinstance(told, EngineUnavailable)
            else:
                asked += 1
                if event == "answers":
                    failed = 0
                elif event == "fails":
                    failed, since = failed + 1, stage.clock.now
            assert stage.asked == asked

    run(work)


@pytest.mark.parametrize("when", ["before the first piece", "after it"])
@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_caller_who_leaves_says_nothing(when: str, how: str) -> None:
    """However many leave, and whenever: the breaker stays closed, and what was done for them is over."""

    async def leave(stage: Stage) -> None:
        pieces = stage.breaker.generate(ASK, BRIEF, deadline=asyncio.get_running_loop().time() + 1000)
        if when == "after it":
            await anext(pieces)
            if how == "close":
                await pieces.aclose()
                return
        reader = asyncio.ensure_future(anext(pieces))
        await asyncio.sleep(0.005)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await pieces.aclose()

    async def work(stage: Stage) -> None:
        stage.gate = asyncio.Event()
        stage.reply = None if when == "before the first piece" else "Hello there"
        for _ in range(3 * FAILURES):
            await leave(stage)
        assert (stage.breaker.state, stage.asked) == ("closed", 3 * FAILURES)

    run(work)


@pytest.mark.parametrize("whose", ["the engine's", "the caller's"])
def test_a_silent_engine_is_left_alone(whose: str) -> None:
    """Deadlines that pass without a word from the engine open the breaker, also where the caller's time-out strikes first."""

    async def work(stage: Stage) -> None:
        stage.reply, stage.deaf = None, whose == "the caller's"
        for _ in range(FAILURES):
            assert stage.breaker.state == "closed"
            deadline = asyncio.get_running_loop().time() + 0.01
            if stage.deaf:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout_at(deadline):
                        await stage.ask(deadline)
            else:
                assert isinstance(await stage.ask(deadline), EngineTimeout)
        assert stage.breaker.state == "open"

    run(work)


def test_a_deadline_after_the_first_piece_says_nothing() -> None:
    """Whoever reads slowly reaches any deadline: that is no reason to leave the engine alone."""

    async def work(stage: Stage) -> None:
        stage.gate = asyncio.Event()
        late = await asyncio.gather(*(stage.ask(asyncio.get_running_loop().time() + 0.2) for _ in range(3 * FAILURES)))
        assert {type(error) for error in late} == {EngineTimeout}
        assert stage.breaker.state == "closed"

    run(work)


def test_one_probe_at_a_time() -> None:
    """When its time is over one request of many goes through, the others are told to come back; when it is answered, all do."""

    async def work(stage: Stage) -> None:
        await stage.open()
        stage.clock.now += OPEN_SECONDS
        assert stage.breaker.state == "half_open"
        stage.reply = None
        asking = [asyncio.create_task(stage.ask()) for _ in range(50)]
        await asyncio.sleep(0.02)
        assert (stage.asked, stage.breaker.state) == (1, "half_open")
        stage.reply = "Hello"
        told = await asyncio.gather(*asking)
        assert (stage.asked, stage.breaker.state) == (1, "closed")
        assert sum(error is None for error in told) == 1
        assert {error.retry_after for error in told if error} == {1}
        assert await asyncio.gather(*(stage.ask() for _ in range(50))) == [None] * 50
        assert stage.asked == 51

    run(work)


def test_a_request_from_before_the_outage_is_no_probe() -> None:
    """When its caller leaves while a probe is out, that makes no room for another."""

    async def work(stage: Stage) -> None:
        stage.reply = None
        old = asyncio.create_task(stage.ask())
        await asyncio.sleep(0.005)
        await stage.open()
        stage.clock.now += OPEN_SECONDS
        stage.reply = None
        probe = asyncio.create_task(stage.ask())
        await asyncio.sleep(0.005)
        old.cancel()
        await asyncio.gather(old, return_exceptions=True)
        assert isinstance(await stage.ask(), EngineUnavailable)
        stage.reply = "Hello"
        assert await probe is None
        assert stage.asked == 1

    run(work)


@pytest.mark.parametrize("error", FAILS, ids=lambda error: error.code)
def test_a_probe_that_fails_opens_it_again(error: EngineError) -> None:
    """For the whole time, however many failures in a row it would take when closed."""

    async def work(stage: Stage) -> None:
        await stage.open()
        for _ in range(3):
            stage.clock.now += OPEN_SECONDS
            stage.reply = error
            assert await stage.ask() is error
            stage.clock.now += OPEN_SECONDS - 1
            assert stage.breaker.state == "open"
            assert await stage.ask() is not error
            stage.clock.now -= OPEN_SECONDS - 1
        assert stage.asked == 3

    run(work)


def test_the_first_piece_of_a_probe_closes_it() -> None:
    """Nobody waits for the probe's reply to be over."""

    async def work(stage: Stage) -> None:
        await stage.open()
        stage.clock.now += OPEN_SECONDS
        stage.reply, stage.gate = "Hello there", asyncio.Event()
        probe = asyncio.create_task(stage.ask())
        await asyncio.to_thread(support.wait_until, lambda: stage.breaker.state == "closed", "the probe has been heard from")
        assert not probe.done()
        stage.gate.set()
        assert await probe is None

    run(work)


def test_a_whole_reply_forgets_the_failures_before_it() -> None:
    """Only failures with no whole reply among them count, however many there are in all."""

    async def work(stage: Stage) -> None:
        for _ in range(3):
            stage.reply = FAILS[0]
            for _ in range(FAILURES - 1):
                await stage.ask()
            stage.reply = "Hello"
            await stage.ask()
            assert stage.breaker.state == "closed"
        assert stage.asked == 3 * FAILURES

    run(work)


def test_after_a_probe_it_takes_as_many_failures_as_ever() -> None:
    """What failed before the probe is forgotten with its first piece, while its reply is not over yet."""

    async def work(stage: Stage) -> None:
        await stage.open()
        stage.clock.now += OPEN_SECONDS
        stage.reply = "Hello"
        async with contextlib.aclosing(stage.breaker.generate(ASK, BRIEF)) as probe:
            await anext(probe)
            stage.reply = FAILS[0]
            for _ in range(FAILURES):
                assert stage.breaker.state == "closed"
                await stage.ask()
            assert stage.breaker.state == "open"

    run(work)


def test_a_reply_that_ends_meanwhile_leaves_it_open() -> None:
    """Its first piece came before the outage, so its last says little: the time is waited for, and one failed probe renews it."""

    async def work(stage: Stage) -> None:
        stage.gate = asyncio.Event()
        async with contextlib.aclosing(stage.breaker.generate(ASK, BRIEF)) as old:
            await anext(old)
            await stage.open()
            stage.gate.set()
            async for _ in old:
                pass
        assert (stage.breaker.state, stage.asked) == ("open", 0)
        stage.clock.now += OPEN_SECONDS
        assert await stage.ask() is FAILS[0]
        assert stage.breaker.state == "open"

    run(work)


def test_a_refused_probe_closes_it_and_a_busy_one_leaves_the_question() -> None:
    """A refusal shows that the engine is there; a full queue may be that of a router with nothing behind it: try again."""

    async def work(stage: Stage) -> None:
        await stage.open()
        stage.clock.now += OPEN_SECONDS
        for error, after in ((ANSWERS[2], "half_open"), (ANSWERS[0], "closed")):
            stage.reply = error
            assert await stage.ask() is error
            assert stage.breaker.state == after

    run(work)


def test_a_probe_whose_caller_leaves_makes_room_for_the_next() -> None:
    """Nothing was learnt, so the next request is the probe, at once."""

    async def work(stage: Stage) -> None:
        await stage.open()
        stage.clock.now += OPEN_SECONDS
        stage.reply = None
        for number in range(1, 4):
            probe = asyncio.create_task(stage.ask())
            await asyncio.sleep(0.005)
            assert stage.asked == number
            probe.cancel()
            await asyncio.gather(probe, return_exceptions=True)
            assert stage.breaker.state == "half_open"
        stage.reply = "Hello"
        assert await stage.ask() is None
        assert stage.breaker.state == "closed"

    run(work)


def test_a_mistake_of_ours_is_no_failure_of_the_engine() -> None:
    """An exception that no engine raises passes through, in a probe too, which makes room for the next."""

    def script(said: Conversation, sampling: Sampling) -> str:
        raise RuntimeError("ours")

    async def work(stage: Stage) -> None:
        await stage.open()
        stage.clock.now += OPEN_SECONDS
        stage.breaker.engine = ScriptedEngine(script)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="ours"):
                await stage.ask()
        assert stage.breaker.state == "half_open"

    run(work)


def test_what_began_before_the_outage_says_nothing_of_what_follows() -> None:
    """Requests that a hanging engine left waiting fail at their deadlines: an engine that is back is not blamed for it."""

    async def work(stage: Stage) -> None:
        stage.reply = None
        deadline = asyncio.get_running_loop().time() + 1
        waiting = [asyncio.create_task(stage.ask(deadline)) for _ in range(3 * FAILURES)]
        await asyncio.sleep(0.01)
        await stage.open()
        stage.clock.now += OPEN_SECONDS
        stage.breaker.engine = ScriptedEngine(lambda said, sampling: "Hello")
        assert await stage.ask() is None
        assert stage.breaker.state == "closed"
        assert {type(error) for error in await asyncio.gather(*waiting)} == {EngineTimeout}
        assert stage.breaker.state == "closed"

    run(work)


@settings(deadline=None)
@given(seconds=st.floats(0.001, 1e6), passed=st.floats(0, 1))
def test_the_time_to_come_back_is_one_that_clients_use(seconds: float, passed: float) -> None:
    """Whole seconds from 1 to 120, whatever the setting: openai-python does not retry when it is told more."""

    async def work(stage: Stage) -> None:
        stage.breaker = Breaker(stage, failures=1, seconds=seconds, clock=stage.clock)
        stage.reply = FAILS[0]
        await stage.ask()
        stage.clock.now += passed * seconds
        stage.reply = None if stage.breaker.state == "half_open" else "never said"
        probe = asyncio.create_task(stage.ask())
        await asyncio.sleep(0)
        told = await stage.ask()
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
        assert isinstance(told, EngineUnavailable)
        assert type(told.retry_after) is int
        assert 1 <= told.retry_after <= 120

    run(work)


# --- what operators see ---------------------------------------------------------------------------------------------------


def test_the_status_says_whether_a_request_would_be_let_through() -> None:
    """Closed: the engine's own. Open: not ready, though the engine's health check is fine. Half open: until a probe is out."""

    async def work(stage: Stage) -> None:
        assert await stage.breaker.status() == await stage.status()
        stage.ready = False
        assert await stage.breaker.status() == await stage.status()
        stage.ready = True
        await stage.open()
        status = await stage.breaker.status()
        assert (status.ready, str(int(OPEN_SECONDS)) in status.detail) == (False, True)
        stage.clock.now += OPEN_SECONDS
        assert (await stage.breaker.status()).ready
        stage.reply = None
        probe = asyncio.create_task(stage.ask())
        await asyncio.sleep(0.005)
        status = await stage.breaker.status()
        assert (status.ready, bool(status.detail)) == (False, True)
        stage.reply = "Hello"
        assert await probe is None
        assert (await stage.breaker.status()).ready

    run(work)


def test_an_engine_that_came_back_is_tried_at_once() -> None:
    """A health check that failed while the breaker was open and now succeeds ends its time; the next request is a probe."""

    async def work(stage: Stage) -> None:
        await stage.open()
        stage.ready = False
        assert await stage.breaker.status() == await stage.status()
        assert (stage.breaker.state, await stage.ask() is None) == ("open", False)
        stage.ready, stage.reply = True, "Hello"
        assert (await stage.breaker.status()).ready
        assert (stage.breaker.state, stage.asked) == ("half_open", 0)
        assert await stage.ask() is None
        assert stage.breaker.state == "closed"

    run(work)


def test_an_engine_that_hangs_is_not_tried_for_its_health() -> None:
    """A health check that never failed ends nothing, and one that failed in an earlier outage neither."""

    async def work(stage: Stage) -> None:
        for _ in range(2):
            await stage.open()
            for _ in range(5):
                assert not (await stage.breaker.status()).ready
            assert stage.breaker.state == "open"
            stage.ready = False
            await stage.breaker.status()
            stage.ready, stage.reply = True, "Hello"
            await stage.breaker.status()
            assert await stage.ask() is None

    run(work)


def test_the_gateway_shows_the_state() -> None:
    """The gauge has a 1 at the state and only there, through all three, and /readyz is 503 while requests are refused.

    The breaker would stay open for an hour: it is the health check, which failed meanwhile, that ends it.
    """

    def shown() -> tuple[int, str]:
        ready = http.get("/readyz").status_code
        states = {name: Meter.of(http)("ergo_circuit_breaker_state", state=name) for name in ("closed", "open", "half_open")}
        (state,) = (name for name, value in states.items() if value)
        assert states[state] == 1
        return ready, state

    replies: list[str | EngineError] = [FAILS[0]] * 3
    engine = ScriptedEngine(lambda said, sampling: replies.pop(0) if replies else asking.ANSWER)
    http = asking.client(engine, breaker_failures=3, breaker_seconds=3600)
    assert shown() == (200, "closed")
    assert [asking.vqa(http).status_code for _ in range(3)] == [502] * 3
    for engine.ready in (True, False):
        assert shown() == (503, "open")
        refused = asking.vqa(http)
        assert asking.error(refused) == (503, "engine_unavailable", None)
        assert refused.headers["retry-after"] == "120"
    assert len(engine.calls) == 3
    engine.ready = True
    assert shown() == (200, "half_open")
    assert asking.vqa(http).status_code == 200
    assert shown() == (200, "closed")


@pytest.fixture
def dead() -> Iterator[tuple[str, list[str]]]:
    """A server that fails every request: its URL, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            asked.append(self.path)
            self.send_error(500)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def test_the_gateway_counts_and_bounds_what_it_sends_again(dead: tuple[str, list[str]]) -> None:
    """With the settings' budget and breaker: three failures open it, and only one of them is met with a second attempt."""
    url, asked = dead
    http = TestClient(
        create_app(
            support.mini_settings(
                engine="vllm", engine_url=url, engine_model="m", retry_burst=1, retry_share=0, breaker_failures=3
            )
        )
    )
    assert [asking.vqa(http).status_code for _ in range(5)] == [502, 502, 502, 503, 503]
    meter = Meter.of(http)
    assert meter("ergo_engine_retries_total", outcome="retried") == 1
    assert meter("ergo_engine_retries_total", outcome="budget_exhausted") == 2
    assert asked == ["/v1/chat/completions"] * 4
