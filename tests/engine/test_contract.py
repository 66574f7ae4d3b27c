"""The contract at the head of engine/base.py: one set of tests for the scripted engine, the embedded one and real vLLM.

A circuit breaker is an engine too: it is held to it around the scripted one and around vLLM; so are several engines as one,
of which only one is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2
import pytest
import support

from ergo_server.engine.base import Delta, Engine, Generation, Sampling
from ergo_server.engine.breaker import Breaker
from ergo_server.engine.embedded import EmbeddedEngine
from ergo_server.engine.replicas import Replicas
from ergo_server.engine.scripted import ScriptedEngine
from ergo_server.engine.vllm import VllmEngine
from ergo_server.errors import ContextTooLong, EngineError, EngineFailed, EngineTimeout, EngineUnavailable
from ergo_server.imaging.geometry import Size
from ergo_server.imaging.view import View
from ergo_server.protocol.conversation import Conversation

ENDLESS = 2000
"""Tokens of a reply that is still being written when a test interrupts it."""


class Rambling(httpx2.AsyncHTTPTransport):
    """The network; on its way, a request for an endless reply is told to ignore the model's end."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request."""
        if request.method == "POST":
            body = json.loads(request.content)
            body |= {"ignore_eos": True} if body["max_tokens"] == ENDLESS else {}
            request = httpx2.Request("POST", request.url, json=body)
        return await super().handle_async_request(request)


@dataclass(frozen=True)
class Case:
    """One kind of engine."""

    name: str
    within: str = ""
    """What stands before it: a breaker, or replicas."""
    url: str = ""
    checkpoint: Path = support.CHECKPOINT

    def engine(self) -> Engine:
        """Make one."""
        if self.within == "replicas":
            gone = VllmEngine(f"http://127.0.0.1:{support.free_port()}", model="gone")
            return Replicas({"gone": gone, "there": self.bare()})
        return Breaker(self.bare()) if self.within else self.bare()

    def bare(self) -> Engine:
        """Make one with nothing before it."""
        if self.name == "scripted":
            return ScriptedEngine(lambda said, _: f"{[len(message.parts) for message in said.messages]} " * 1000, 1e-4)
        if self.name == "embedded":
            return EmbeddedEngine(self.checkpoint, device="cpu", threads=1)
        return VllmEngine(self.url, transport=Rambling())

    def run(self, work: Callable[[Engine], Awaitable[None]]) -> None:
        """Run ``work`` with an engine of this kind."""

        async def opened() -> None:
            async with contextlib.aclosing(self.engine()) as engine:
                await work(engine)

        asyncio.run(opened())


REAL = ["embedded", *(pytest.param(name, marks=pytest.mark.vllm) for name in ("vllm", "vllm, breaker", "vllm, replicas"))]


@pytest.fixture(params=["scripted", "scripted, breaker", "scripted, replicas", *REAL])
def case(request: pytest.FixtureRequest) -> Case:
    """Each kind of engine in turn."""
    name, _, within = request.param.partition(", ")
    return Case(name, within, request.getfixturevalue("vllm") if name == "vllm" else "")


@pytest.fixture
def endless(case: Case, tmp_path: Path) -> Case:
    """Each kind of engine, with a checkpoint that does not know the model's end."""
    copy = shutil.copytree(support.CHECKPOINT, tmp_path / "endless")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [411]}))  # <|video_pad|>
    return replace(case, checkpoint=copy)


real = pytest.mark.parametrize("case", REAL, indirect=True)


def look(number: int) -> View:
    """Return the overview of a held-out scene."""
    return support.look(support.encode(support.held_out(number)))


def question(number: int = 100) -> Conversation:
    """Return a zoom turn in the words that ergo-mini was trained with."""
    return Conversation().system("Look closely.").user(look(number), support.held_out(number).question + "\nWhere?")


async def read(reply: AsyncGenerator[Delta | Generation, None]) -> tuple[list[Delta], Generation]:
    """Read a reply to its end."""
    pieces = [piece async for piece in reply]
    (generation,) = (piece for piece in pieces if isinstance(piece, Generation))
    return [piece for piece in pieces if isinstance(piece, Delta)], generation


def test_a_reply_is_deltas_and_then_one_generation_of_all_of_them(case: Case) -> None:
    """Whatever comes before the last piece is a delta, and the last one's text is all of theirs joined."""

    async def work(engine: Engine) -> None:
        *deltas, generation = [piece async for piece in engine.generate(question(), Sampling(64))]
        assert isinstance(generation, Generation)
        assert len(deltas) > 1
        assert all(isinstance(delta, Delta) for delta in deltas)
        assert generation.text == "".join(delta.text for delta in deltas)

    case.run(work)


def test_a_reply_ends_after_a_stop_string(case: Case) -> None:
    """The stop string stays in the text, nothing follows it, and the reason is "stop"."""

    async def work(engine: Engine) -> None:
        _, whole = await read(engine.generate(question(), Sampling(64)))
        stop = whole.text[5:8]
        _, stopped = await read(engine.generate(question(), Sampling(64, stop=("never said", stop))))
        assert stopped.text == whole.text[: whole.text.index(stop) + 3]
        assert stopped.finish_reason == "stop"

    case.run(work)


def test_a_reply_ends_at_max_tokens(case: Case) -> None:
    """A reply that is cut off says "length", and has as many tokens as were allowed."""

    async def work(engine: Engine) -> None:
        deltas, cut = await read(engine.generate(question(), Sampling(3)))
        assert (cut.finish_reason, cut.usage.completion_tokens) == ("length", 3)
        assert sum(delta.tokens for delta in deltas) == 3

    case.run(work)


def test_greedy_sampling_repeats_itself(case: Case) -> None:
    """The same conversation gives the same text again, whatever is in the caches by then."""

    async def work(engine: Engine) -> None:
        replies = [await read(engine.generate(question(), Sampling(64))) for _ in range(3)]
        assert len({generation.text for _, generation in replies}) == 1

    case.run(work)


def test_usage_counts_what_was_read_and_written(case: Case) -> None:
    """Image tokens are what the formula says, and the deltas add up to the completion, the model's end excepted."""

    async def work(engine: Engine) -> None:
        conversation = question().assistant("There.").user(look(101), "\nAnswer.")
        deltas, generation = await read(engine.generate(conversation, Sampling(64)))
        usage = generation.usage
        assert usage.image_tokens == sum(view.visual_tokens for view in conversation.views)
        assert usage.image_tokens < usage.prompt_tokens
        assert 0 <= (usage.cached_tokens or 0) < usage.prompt_tokens
        assert 0 <= usage.completion_tokens - sum(delta.tokens for delta in deltas) <= 1

    case.run(work)


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_a_reader_who_leaves_frees_the_engine(endless: Case, how: str) -> None:
    """Closing the iterator and cancelling its reader both end the work behind it, and the next request is served at once."""

    async def work(engine: Engine) -> None:
        begun = time.perf_counter()
        await read(engine.generate(question(), Sampling(64)))
        usual = time.perf_counter() - begun
        for _ in range(3):
            await leave(engine.generate(question(), Sampling(ENDLESS)), how)
        begun = time.perf_counter()
        await read(engine.generate(question(), Sampling(64)))
        # 6,000 tokens were left unwritten, a hundred times as many as are asked for here.
        assert time.perf_counter() - begun < 20 * usual
        assert running(engine) == 0

    finished = support.metric(endless.url, "request_success_total", "length") if endless.url else 0
    endless.run(work)
    if endless.url:
        support.wait_until(lambda: support.metric(endless.url, "num_requests_running") == 0, "vLLM has nothing to do")
        assert support.metric(endless.url, "request_success_total", "length") == finished, "no reply was written to its end"


def running(engine: Engine) -> int:
    """Return how many generations the scripted engine has under way; the others do not count."""
    return getattr(engine.engine if isinstance(engine, Breaker) else engine, "running", 0)


async def leave(reply: AsyncGenerator[Delta | Generation, None], how: str) -> None:
    """Read the beginning of a reply and go."""
    begun = asyncio.Event()

    async def reader() -> None:
        async for _ in reply:
            begun.set()

    if how == "close":
        await anext(reply)
        await asyncio.sleep(0.3)  # some tokens of thousands
    else:
        task = asyncio.create_task(reader())
        await begun.wait()
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await reply.aclose()


def test_the_deadline_ends_the_work(endless: Case) -> None:
    """A reply that is not over by its deadline ends with a time-out that says how long it had, and the engine is free again."""

    async def work(engine: Engine) -> None:
        loop = asyncio.get_running_loop()
        begun = time.perf_counter()
        await read(engine.generate(question(), Sampling(64)))
        usual = time.perf_counter() - begun
        for _ in range(3):
            with pytest.raises(EngineTimeout, match=r"0\.(5|4\d) s"):
                await read(engine.generate(question(), Sampling(ENDLESS), deadline=loop.time() + 0.5))
        begun = time.perf_counter()
        await read(engine.generate(question(), Sampling(64), deadline=loop.time() + support.START_SECONDS))
        assert time.perf_counter() - begun < 20 * usual
        assert running(engine) == 0

    finished = support.metric(endless.url, "request_success_total", "length") if endless.url else 0
    endless.run(work)
    if endless.url:
        support.wait_until(lambda: support.metric(endless.url, "num_requests_running") == 0, "vLLM has nothing to do")
        assert support.metric(endless.url, "request_success_total", "length") == finished, "no reply was written to its end"


def test_the_deadline_never_strikes_in_the_readers_code(endless: Case) -> None:
    """A reader who is busy when it passes is not interrupted, and gets nothing more, however much is written by then."""

    async def work(engine: Engine) -> None:
        await read(engine.generate(question(), Sampling(1)))
        reply = engine.generate(question(), Sampling(ENDLESS), deadline=asyncio.get_running_loop().time() + 0.3)
        await anext(reply)
        await asyncio.sleep(0.6)
        with pytest.raises(EngineTimeout):
            await anext(reply)

    endless.run(work)


def test_a_deadline_that_has_passed_begins_nothing(case: Case) -> None:
    """Nothing is asked of the engine any more; it goes on to answer others."""

    async def work(engine: Engine) -> None:
        now = asyncio.get_running_loop().time()
        for deadline in (now, now - 1):
            with pytest.raises(EngineTimeout, match="before the engine was asked"):
                await anext(engine.generate(question(), Sampling(64), deadline=deadline))
        calls = getattr(engine.engine if isinstance(engine, Breaker) else engine, "calls", [])
        assert calls == []
        await read(engine.generate(question(), Sampling(1)))

    case.run(work)


@real
def test_tenants_do_not_share_the_prefix_cache(case: Case) -> None:
    """Under another salt nothing of the same conversation is found in the cache, under the same all but its end; the text is one.

    Without a salt nothing is found of what was asked with one either.
    """

    async def work(engine: Engine) -> None:
        salts = [f"{name}-{uuid.uuid4().hex}" for name in "ab"]  # what vLLM keeps outlives a test
        system = f"Look closely. {uuid.uuid4().hex}"
        conversation = Conversation().system(system).user(look(102), support.held_out(102).question + "\nWhere?")
        texts, cached = set(), []
        for salt in (salts[0], salts[1], "", *salts, ""):
            _, generation = await read(engine.generate(conversation, Sampling(64), salt=salt))
            texts.add(generation.text)
            cached.append(generation.usage.cached_tokens or 0)
        first, again = cached[:3], cached[3:]
        print(f"of {generation.usage.prompt_tokens} tokens, cached the first time {first}, the second {again}")
        assert first == [0, 0, 0]
        assert min(again) >= 0.5 * generation.usage.prompt_tokens
        assert len(texts) == 1

    case.run(work)


def test_two_replies_at_a_time_do_not_mix(case: Case) -> None:
    """Two conversations at once get the texts that each gets alone."""

    async def work(engine: Engine) -> None:
        alone = [await read(engine.generate(question(n), Sampling(64))) for n in (100, 101)]
        at_once = await asyncio.gather(*(read(engine.generate(question(n), Sampling(64))) for n in (100, 101)))
        assert [generation.text for _, generation in at_once] == [generation.text for _, generation in alone]

    case.run(work)


@real
def test_a_conversation_beyond_the_context_is_rejected(case: Case) -> None:
    """A conversation of more tokens than the context holds is the sender's fault, and names the parameter that helps."""

    async def work(engine: Engine) -> None:
        with pytest.raises(ContextTooLong) as raised:
            await read(engine.generate(Conversation().user("0 1 2 3 4 5 6 7 8 9 " * 300), Sampling(8)))
        assert raised.value.param == "max_visual_tokens"

    case.run(work)


@real
def test_an_image_that_is_none_is_an_engine_error(case: Case) -> None:
    """Whatever the image library of an engine raises on broken bytes, its caller gets an engine error."""

    async def work(engine: Engine) -> None:
        with pytest.raises(EngineError):
            await read(engine.generate(Conversation().user(View(b"no image", Size(56, 56)), "?"), Sampling(8)))

    case.run(work)


def test_a_failure_of_the_script_is_passed_on() -> None:
    """The scripted engine raises the error that it is told to, and counts the generation as over."""
    engine = ScriptedEngine(lambda said, sampling: EngineFailed("as told"))
    with pytest.raises(EngineFailed, match="as told"):
        asyncio.run(read(engine.generate(Conversation().user("?"), Sampling(8))))
    assert engine.running == 0


@real
def test_a_closed_engine_is_unavailable(case: Case) -> None:
    """A closed engine refuses new work with an engine error, and its status says that it is not ready."""

    async def work(engine: Engine) -> None:
        await engine.aclose()
        with pytest.raises(EngineUnavailable):
            await read(engine.generate(question(), Sampling(8)))
        assert not (await engine.status()).ready

    case.run(work)


@real
def test_closing_the_engine_ends_replies_under_way(endless: Case) -> None:
    """Replies that are being written, and those that wait their turn, all end with an engine error."""

    async def work(engine: Engine) -> None:
        first = engine.generate(question(), Sampling(ENDLESS))
        await anext(first)
        readers = [asyncio.create_task(read(reply)) for reply in (first, engine.generate(question(101), Sampling(ENDLESS)))]
        await asyncio.sleep(0)
        await engine.aclose()
        ended = await asyncio.gather(*readers, return_exceptions=True)
        assert all(isinstance(error, EngineError) for error in ended), ended

    endless.run(work)


def test_the_status_names_the_model_once_ready(case: Case) -> None:
    """An engine that can be asked says so."""

    async def work(engine: Engine) -> None:
        await read(engine.generate(question(), Sampling(1)))
        status = await engine.status()
        assert status.ready
        assert status.model

    case.run(work)
