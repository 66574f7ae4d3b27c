"""Several engines as one: who is asked, and who stands in. Around engines that fail on command; two real vLLM are in
test_two_engines.py."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
import support
from asking import ANSWER, ZOOM, chunks, data_url, events, picture
from hypothesis import given
from hypothesis import strategies as st
from upstream import Upstream

from ergo_server.engine.base import Delta, EngineStatus, Generation, Sampling, Usage, address
from ergo_server.engine.breaker import Breaker
from ergo_server.engine.replicas import FAILED_CHECKS, Replicas
from ergo_server.engine.vllm import VllmEngine
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

Reply = AsyncGenerator[Delta | Generation, None]

ASK = Conversation().user("How many?")
BRIEF = Sampling(16)
NAMES = st.lists(st.text("abcdefgh.:0123456789", min_size=1, max_size=12), min_size=2, max_size=9, unique=True)
SESSIONS = st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=40, unique=True)


@dataclass(eq=False)
class Told:
    """An engine that says its pieces, and then what it is told to raise, if anything."""

    pieces: Sequence[str] = ("se", "ven")
    error: EngineError | None = None
    ready: bool = True
    name: str = "told"
    asked: list[str] = field(default_factory=list)
    """Sessions."""
    running: int = 0

    async def generate(self, conversation: Conversation, sampling: Sampling, **given: Any) -> Reply:
        """Answer, or fail amid it."""
        self.asked.append(given["session"])
        self.running += 1
        try:
            for piece in self.pieces:
                await asyncio.sleep(0)
                yield Delta(piece)
            if self.error is not None:
                raise self.error
            yield Generation("".join(self.pieces), "stop", Usage(10, len(self.pieces)))
        finally:
            self.running -= 1

    async def status(self) -> EngineStatus:
        """Ready, as told."""
        return EngineStatus(self.ready, "m", "" if self.ready else "gone")

    async def aclose(self) -> None:
        """Nothing to give back."""


def run(work: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine function."""
    asyncio.run(asyncio.wait_for(work(), support.START_SECONDS))


async def read(replicas: Replicas, session: str = "s", deadline: float | None = None) -> list[Delta | Generation]:
    """Ask, and return all pieces."""
    async with contextlib.aclosing(replicas.generate(ASK, BRIEF, session=session, deadline=deadline)) as pieces:
        return [piece async for piece in pieces]


async def settled(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    await asyncio.to_thread(support.wait_until, condition, "it is so")


def text(pieces: Sequence[Delta | Generation]) -> str:
    """Return what a caller makes of the deltas."""
    said = ""
    for piece in pieces:
        if isinstance(piece, Delta):
            said = piece.text if piece.anew else said + piece.text
    return said


def in_order(replicas: Replicas, session: str = "s") -> list[Told]:
    """Return the engines in the order in which they are asked."""
    found = [replica.engine for replica in replicas.order(session)]
    assert all(isinstance(engine, Told) for engine in found)
    return found  # type: ignore[return-value]


def several(count: int = 3, **given: Any) -> Replicas:
    """Return engines that answer."""
    return Replicas({f"engine-{number}:8001": Told() for number in range(count)}, seconds=0.001, **given)


@given(NAMES, SESSIONS, st.randoms())
def test_every_gateway_decides_alike(names: list[str], sessions: list[str], random: Any) -> None:
    """Who is asked for a session, and in which order, depends on the names alone, not on the order in which they are given."""
    shuffled = list(names)
    random.shuffle(shuffled)
    here, there = (Replicas({name: Told() for name in order}) for order in (names, shuffled))
    for session in sessions:
        assert [one.name for one in here.order(session)] == [one.name for one in there.order(session)]


@given(NAMES, SESSIONS)
def test_an_engine_that_leaves_takes_only_its_own_sessions_along(names: list[str], sessions: list[str]) -> None:
    """Without one engine the others keep their order for every session; so does whoever adds one."""
    every, fewer = Replicas({name: Told() for name in names}), Replicas({name: Told() for name in names[1:]})
    for session in sessions:
        assert [one.name for one in fewer.order(session)] == [one.name for one in every.order(session) if one.name != names[0]]


def test_sessions_are_spread_evenly() -> None:
    """Of 4,000 sessions each of four engines gets a quarter, within five standard deviations."""
    replicas = several(4)
    firsts = [replicas.order(f"session {number}")[0].name for number in range(4000)]
    counts = [firsts.count(name) for name in set(firsts)]
    assert len(counts) == 4
    assert all(abs(count - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for count in counts)


def test_without_a_session_all_are_asked() -> None:
    """What belongs to no session is not all sent to one engine."""
    replicas = several(3)

    async def work() -> None:
        for _ in range(60):
            await read(replicas, session="")
        await replicas.aclose()

    run(work)
    assert all(engine.asked == [""] * len(engine.asked) and engine.asked for engine in in_order(replicas))


def test_a_session_stays_with_its_engine() -> None:
    """All turns of a session reach the same engine, while that one is well."""
    replicas = several(5)

    async def work() -> None:
        for _ in range(20):
            await read(replicas)
        await replicas.aclose()

    run(work)
    assert [len(engine.asked) for engine in in_order(replicas)] == [20, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("failure", "reason"),
    [(EngineUnavailable("gone"), "unavailable"), (EngineBusy("full"), "busy"), (EngineFailed("broke"), "failed")],
)
def test_the_next_takes_over(failure: EngineError, reason: str) -> None:
    """An engine that is gone, full or broken before its first word costs the caller nothing but the other's answer."""
    reasons: list[str] = []
    replicas = several(told=reasons.append)
    first, second, third = in_order(replicas)
    first.pieces, first.error = (), failure

    async def work() -> None:
        assert await read(replicas) == [Delta("se"), Delta("ven"), Generation("seven", "stop", Usage(10, 2))]
        await replicas.aclose()

    run(work)
    assert (len(first.asked), len(second.asked), len(third.asked), reasons) == (1, 1, 0, [reason])


def test_all_are_tried_where_none_has_begun() -> None:
    """As long as engines refuse before they begin, the next is asked; a full queue is what the caller is told of, if one was."""
    replicas = several()
    for engine, failure in zip(
        in_order(replicas), (EngineUnavailable("gone"), EngineBusy("full"), EngineUnavailable("gone")), strict=True
    ):
        engine.pieces, engine.error = (), failure

    async def work() -> None:
        with pytest.raises(EngineBusy):
            await read(replicas)
        await replicas.aclose()

    run(work)
    assert [len(engine.asked) for engine in in_order(replicas)] == [1, 1, 1]


def test_a_question_that_brings_engines_down_brings_down_two_at_most() -> None:
    """After a second engine broke over a reply, no third is given it."""
    replicas = several(4)
    for engine in in_order(replicas):
        engine.error = EngineFailed("broke")

    async def work() -> None:
        with pytest.raises(EngineFailed):
            await read(replicas)
        await replicas.aclose()

    run(work)
    assert [len(engine.asked) for engine in in_order(replicas)] == [1, 1, 0, 0]


@pytest.mark.parametrize("failure", [EngineTimeout("late"), EngineRejected("no"), ContextTooLong("long")])
def test_what_another_would_do_no_better_is_told(failure: EngineError) -> None:
    """A deadline that passed and a refusal go to the caller; nobody else is asked."""
    replicas = several()
    first, second, _ = in_order(replicas)
    first.error = failure

    async def work() -> None:
        with pytest.raises(type(failure)):
            await read(replicas)
        await replicas.aclose()

    run(work)
    assert (len(first.asked), len(second.asked)) == (1, 0)


@pytest.mark.parametrize("waits", [(5, 30), (30, 5)])
@pytest.mark.parametrize("kind", [EngineBusy, EngineUnavailable])
def test_the_caller_is_told_the_shortest_time(waits: tuple[int, int], kind: type[EngineError]) -> None:
    """Where none could do it, ``retry_after`` is the least that any of them named, whichever was asked last."""
    replicas = several()
    first, broken, last = in_order(replicas)
    first.error, broken.error, last.error = EngineUnavailable("gone", retry_after=waits[0]), EngineFailed("broke"), kind("no")
    last.error.retry_after = waits[1]
    first.pieces = broken.pieces = last.pieces = ()

    async def work() -> None:
        with pytest.raises(kind) as caught:
            await read(replicas)
        assert caught.value.retry_after == 5
        await replicas.aclose()

    run(work)


@given(
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=6),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=6),
)
def test_a_reply_that_another_takes_over_is_whole(before: list[str], after: list[str]) -> None:
    """Whatever one engine said before it broke, and whatever the other says: its deltas make the second's text, token for token.

    Where the second repeats the first, nothing is said twice and nothing is void.
    """
    replicas = several(2)
    first, second = in_order(replicas)
    first.pieces, first.error, second.pieces = before, EngineFailed("broke"), after

    async def work() -> None:
        pieces = await read(replicas)
        *deltas, last = pieces
        assert isinstance(last, Generation)
        assert text(deltas) == last.text == "".join(after)
        anew = [number for number, delta in enumerate(deltas) if isinstance(delta, Delta) and delta.anew]
        goes_on = "".join(after).startswith("".join(before))
        assert bool(anew) is not goes_on
        assert all(isinstance(delta, Delta) and delta.text for delta in deltas if not getattr(delta, "anew", False))
        await replicas.aclose()

    run(work)


def test_who_leaves_frees_the_engine() -> None:
    """Closing the reply ends the work behind it, on the engine that stands in, too."""
    replicas = several(2)
    first, second = in_order(replicas)
    first.pieces, first.error, second.pieces = (), EngineUnavailable("gone"), ["x"] * 1000

    async def work() -> None:
        async with contextlib.aclosing(replicas.generate(ASK, BRIEF, session="s")) as pieces:
            await anext(pieces)
            assert (first.running, second.running) == (0, 1)
        assert second.running == 0
        await replicas.aclose()

    run(work)


def test_one_that_fails_its_checks_is_asked_last_until_it_is_back() -> None:
    """An engine whose health check fails twice in a row is asked after all others, until one check succeeds."""
    replicas = several()
    first, *others = in_order(replicas)

    async def work() -> None:
        assert not (await replicas.status()).ready  # nobody was looked at yet
        await settled(lambda: all(replica.status.ready for replica in replicas.order("s")))
        assert (await replicas.status()) == EngineStatus(True, "m")
        first.ready = False
        await settled(lambda: in_order(replicas) == [*others, first])
        assert (await replicas.status()) == EngineStatus(True, "m", "2 of 3 engines are ready")
        await read(replicas)
        assert (first.asked, len(others[0].asked)) == ([], 1)
        for engine in others:
            engine.ready = False
        await settled(lambda: in_order(replicas) == [first, *others])
        assert not (await replicas.status()).ready
        first.ready = True
        await settled(lambda: replicas.order("s")[0].status.ready)
        assert (await replicas.status()) == EngineStatus(True, "m", "1 of 3 engines are ready")
        await replicas.aclose()

    run(work)


def test_one_late_check_ejects_nobody() -> None:
    """One failed check, as of a server that was busy for a moment, changes nothing; two in a row do."""
    replicas = several(2)
    first, second = in_order(replicas)

    async def work() -> None:
        for number, ready in enumerate([True] + [False] * (FAILED_CHECKS - 1) + [True] + [False] * FAILED_CHECKS):
            assert in_order(replicas) == [first, second], number
            first.ready = ready
            await replicas.order("s")[0].check()
        assert in_order(replicas) == [second, first]
        await replicas.aclose()

    run(work)


def test_a_check_that_breaks_is_a_failed_one(caplog: pytest.LogCaptureFixture) -> None:
    """An exception that no engine should raise is logged and ejects its engine; the checks go on, and bring that back."""
    replicas = several(2)
    first, second = in_order(replicas)
    broken = [True]

    async def status() -> EngineStatus:
        if broken:
            raise RuntimeError("a mistake")
        return EngineStatus(True, "m")

    first.status = status  # type: ignore[method-assign]

    async def work() -> None:
        await replicas.status()
        await settled(lambda: in_order(replicas) == [second, first])
        await settled(lambda: second.ready and bool(replicas.order("s")[0].status.ready))
        assert await replicas.status() == EngineStatus(True, "m", "1 of 2 engines are ready")
        broken.clear()
        await settled(lambda: in_order(replicas) == [first, second])
        assert await replicas.status() == EngineStatus(True, "m")
        await replicas.aclose()

    run(work)
    told = [record for record in caplog.records if record.exc_info]
    assert {record.getMessage() for record in told} == {f"the health check of engine {replicas.order('s')[0].name} broke"}


# --- engines that hang ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Hanging(Told):
    """An engine that says some words, and the others when it is let."""

    words: Sequence[str] = ()
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, conversation: Conversation, sampling: Sampling, **given: Any) -> Reply:
        """Say the words, wait, and answer as told."""
        for word in self.words:
            yield Delta(word)
        self.asked.append(given["session"])
        self.running += 1
        try:
            await self.go_on.wait()
        finally:
            self.running -= 1
        async with contextlib.aclosing(super().generate(conversation, sampling, **given)) as pieces:
            async for piece in pieces:
                yield piece


def hanging(*kinds: type[Told], **given: Any) -> tuple[Replicas, list[Told]]:
    """Return engines of these kinds, as they are asked for a session."""
    names = [replica.name for replica in several(len(kinds)).order("s")]
    engines = [kind() for kind in kinds]
    return Replicas(dict(zip(names, engines, strict=True)), seconds=0.001, **given), engines


def test_who_hangs_is_given_up_for_one_who_does_not() -> None:
    """Turns that wait for the first word of an engine are answered by another once its health check has failed twice."""
    reasons: list[str] = []
    replicas, (hung, other) = hanging(Hanging, Told, told=reasons.append)

    async def work() -> None:
        asked = [asyncio.create_task(read(replicas)) for _ in range(3)]
        await settled(lambda: hung.running == 3)
        hung.ready = False
        assert [text(pieces) for pieces in await asyncio.gather(*asked)] == ["seven"] * 3
        await replicas.aclose()

    run(work)
    assert (hung.running, len(other.asked), reasons) == (0, 3, ["failed"] * 3)


@pytest.mark.parametrize("comes_back", ["own", "other"])
def test_nobody_is_given_up_for_one_who_is_no_better(comes_back: str) -> None:
    """While no other engine is well, a turn goes on waiting; it is answered if its own comes back, and moved if another does."""
    replicas, (hung, other) = hanging(Hanging, Told)
    assert isinstance(hung, Hanging)
    hung.ready = other.ready = False

    async def work() -> None:
        asked = asyncio.create_task(read(replicas))
        await settled(lambda: all(replica.ejected for replica in replicas.order("s")))
        assert (hung.running, other.asked) == (1, [])
        if comes_back == "own":
            hung.go_on.set()
        else:
            other.ready = True
        assert text(await asked) == "seven"
        await replicas.aclose()

    run(work)
    assert (hung.running, len(other.asked)) == (0, int(comes_back == "other"))


def test_who_has_begun_to_answer_is_not_given_up() -> None:
    """After its first word an engine is waited for, whatever its health check says."""
    replicas, (hung, other) = hanging(Hanging, Told)
    assert isinstance(hung, Hanging)
    hung.words = ("twenty-",)

    async def work() -> None:
        asked = asyncio.create_task(read(replicas))
        await settled(lambda: hung.running == 1)
        hung.ready = False
        await settled(lambda: in_order(replicas) == [other, hung])
        hung.go_on.set()
        assert text(await asked) == "twenty-seven"
        await replicas.aclose()

    run(work)
    assert other.asked == []


def test_a_question_that_makes_engines_hang_makes_two_hang_at_most() -> None:
    """Where one engine broke, or was given up, the next is waited for; no third is given the question."""
    replicas, (first, second, third) = hanging(Hanging, Hanging, Told)
    assert isinstance(second, Hanging)

    async def work() -> None:
        asked = asyncio.create_task(read(replicas))
        await settled(lambda: first.running == 1)
        first.ready = False
        await settled(lambda: second.running == 1)
        second.ready = False
        await settled(lambda: in_order(replicas)[0] is third)
        second.go_on.set()
        assert text(await asked) == "seven"
        await replicas.aclose()

    run(work)
    assert third.asked == []


@pytest.mark.parametrize(("model", "reason"), [("m", "failed"), (None, "unavailable")])
def test_a_peer_that_accepts_and_never_answers_costs_nobody_an_answer(upstream: Upstream, model: str | None, reason: str) -> None:
    """Over real sockets, with the checks as they are: what waits on a silent peer is answered by the other engine long before
    its deadline, and the next question does not wait at all; also where the peer was silent before it named its model."""
    upstream.go_on.set()
    reasons: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        urls = [f"http://127.0.0.1:{silent.getsockname()[1]}", upstream.url]
        engines = {address(url): VllmEngine(url, model=given) for url, given in zip(urls, (model, "m"), strict=True)}
        replicas = Replicas(engines, seconds=0.1, told=reasons.append)
        mine = (f"session {number}" for number in itertools.count())
        session = next(session for session in mine if replicas.order(session)[0].name == address(urls[0]))

        async def work() -> None:
            late = asyncio.get_running_loop().time() + support.START_SECONDS
            for found in await asyncio.gather(*(read(replicas, session, late) for _ in range(3))):
                assert text(found) == ANSWER
            await settled(lambda: replicas.order(session)[0].name == address(upstream.url))
            moved = len(reasons)
            assert text(await read(replicas, session, late)) == ANSWER
            assert (moved, len(reasons)) == (3, 3)
            await replicas.aclose()

        run(work)
    assert set(reasons) == {reason}


def test_none_is_a_mistake() -> None:
    """There must be an engine."""
    with pytest.raises(ValueError, match="no engines"):
        Replicas({})


# --- in the gateway ---------------------------------------------------------------------------------------------------


def zooming(words: Sequence[str] = (), failure: EngineError | None = None) -> type[Told]:
    """Return engines that look closer first; the one that is asked first says ``words`` in the answer turn and fails."""
    failing: list[Told] = []

    class Zooming(Told):
        async def generate(self, conversation: Conversation, sampling: Sampling, **given: Any) -> Reply:
            if "</zoom>" in sampling.stop:
                self.pieces, self.error = [ZOOM[:9], ZOOM[9:]], None
                if not failing:
                    failing.append(self)
            else:
                broken = failing and failing[0] is self
                self.pieces, self.error = (words, failure) if broken else ([ANSWER[:9], ANSWER[9:]], None)
            async with contextlib.aclosing(super().generate(conversation, sampling, **given)) as pieces:
                async for piece in pieces:
                    yield piece

    return Zooming


def ask_of(kind: type[Told], **more: Any) -> httpx2.Response:
    """Ask a gateway on two such engines."""
    engine = Replicas({name: Breaker(kind()) for name in ("a:1", "b:1")}, seconds=0.01)
    with support.gateway(engine) as url:
        return httpx2.post(
            f"{url}/v1/vqa", json={"image": data_url(picture()), "question": "How many?"} | more, trust_env=False, timeout=60
        )


@pytest.mark.parametrize("words", [(), (ANSWER[:9],), ("<think>something else",)])
def test_a_caller_who_waits_for_the_whole_notices_nothing(words: Sequence[str]) -> None:
    """An engine that breaks amid the answer turn is replaced, whatever it had said: a whole answer, of one engine alone."""
    response = ask_of(zooming(words, EngineFailed("broke")))
    assert (response.status_code, response.json()["answer"]) == (200, "seven")


def test_a_stream_goes_on_where_it_stopped() -> None:
    """A reader of a stream gets each word once, where the other engine says the same."""
    response = ask_of(zooming((ANSWER[:-12],), EngineFailed("broke")), stream=True)
    deltas = [data["text"] for name, data in events(response.text) if name == "answer.delta"]
    assert "".join(deltas) == "seven"


def test_a_stream_never_tells_two_stories() -> None:
    """Where the other engine says something else than the reader was told, the stream ends with an error."""
    response = ask_of(zooming(("<think>no</think><answer>ni", "ne"), EngineFailed("broke")), stream=True)
    name, data = events(response.text)[-1]
    assert (name, data["error"]["code"]) == ("error", "engine_failed")


def raw(before: str, after: str, **more: Any) -> httpx2.Response:
    """Pass a conversation through to engines of which the first breaks after some words."""
    first, second = Told((before,), EngineFailed("broke")), Told((after,))
    engine = Replicas({"a:1": first, "b:1": second}, seconds=0.01)
    with support.gateway(engine) as url:
        body: dict[str, Any] = {"model": "ergo-raw", "messages": [{"role": "user", "content": "How many?"}], **more}
        for _ in range(20):  # without an image there is no session, and any engine is asked
            response = httpx2.post(f"{url}/v1/chat/completions", json=body, trust_env=False, timeout=60)
            if first.asked:
                return response
    raise AssertionError("the first was never asked")


def test_what_is_passed_through_is_taken_over_too() -> None:
    """A conversation that is passed through gets one engine's words: whole, and streamed unless it was told others before."""
    assert raw("six", "seven").json()["choices"][0]["message"]["content"] == "seven"
    streamed = chunks(raw("sev", "seven", stream=True).text)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in streamed if chunk["choices"]) == "seven"
    name, data = events(raw("six", "seven", stream=True).text)[-2]
    assert (name, data["error"]["code"]) == ("", "engine_failed")
