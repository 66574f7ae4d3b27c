"""The contract at the head of engine/base.py: one set of tests for the scripted engine, the embedded one and real vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

import httpx2
import pytest
import support

from ergo_server.engine.base import Delta, Engine, Generation, Sampling
from ergo_server.engine.embedded import EmbeddedEngine
from ergo_server.engine.scripted import ScriptedEngine
from ergo_server.engine.vllm import VllmEngine
from ergo_server.errors import EngineError, EngineFailed, EngineRejected, EngineUnavailable
from ergo_server.imaging.decode import decode_image
from ergo_server.imaging.geometry import PixelBudget, Size
from ergo_server.imaging.view import View, overview
from ergo_server.protocol.conversation import Conversation

ENDLESS = 2000
"""Asked for as many tokens as this, each engine goes on long enough to be interrupted."""


class Rambling(httpx2.AsyncHTTPTransport):
    """The network, but vLLM is told not to end a reply of `ENDLESS` tokens by itself: ergo-mini's replies are short."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.method == "POST":
            body = json.loads(request.content)
            body |= {"ignore_eos": True} if body["max_tokens"] == ENDLESS else {}
            request = httpx2.Request("POST", request.url, json=body)
        return await super().handle_async_request(request)


@dataclass(frozen=True)
class Case:
    """One kind of engine."""

    name: str
    url: str = ""

    def engine(self) -> Engine:
        """Make one."""
        if self.name == "scripted":
            return ScriptedEngine(lambda conversation, sampling: f"{list(conversation.messages)!r} " * 50, seconds_per_token=1e-4)
        if self.name == "embedded":
            return EmbeddedEngine(support.CHECKPOINT, device="cpu", threads=1)
        return VllmEngine(self.url, transport=Rambling())

    def run(self, work: Callable[[Engine], Awaitable[None]]) -> None:
        """Run ``work`` with an engine of this kind."""

        async def opened() -> None:
            async with contextlib.aclosing(self.engine()) as engine:
                await work(engine)

        asyncio.run(opened())


@pytest.fixture(params=["scripted", "embedded", pytest.param("vllm", marks=pytest.mark.vllm)])
def case(request: pytest.FixtureRequest) -> Case:
    """Each kind of engine in turn."""
    return Case(request.param, request.getfixturevalue("vllm") if request.param == "vllm" else "")


real = pytest.mark.parametrize("case", ["embedded", pytest.param("vllm", marks=pytest.mark.vllm)], indirect=True)


def look(number: int) -> View:
    """Return the overview of a held-out scene."""
    return overview(decode_image(support.encode(support.held_out(number))), PixelBudget(49))


def question(number: int = 100) -> Conversation:
    """Return a zoom turn in the words that ergo-mini was trained with."""
    return Conversation().system("Look closely.").user(look(number), support.held_out(number).question + "\nWhere?")


async def read(engine: Engine, conversation: Conversation, sampling: Sampling) -> tuple[list[Delta], Generation]:
    """Read a reply to its end, which must be one generation."""
    pieces = [piece async for piece in engine.generate(conversation, sampling)]
    *deltas, generation = pieces
    assert isinstance(generation, Generation)
    return [delta for delta in deltas if isinstance(delta, Delta)] + [d for d in deltas if not isinstance(d, Delta)], generation


def endless(engine: Engine) -> AsyncGenerator[Delta | Generation, None]:
    """Begin a reply that takes far longer than any test waits."""
    # The embedded engine takes any temperature: at this one every token is as likely as the end, some hundreds to one.
    return engine.generate(question(), Sampling(ENDLESS, temperature=1e6 if engine.name == "embedded" else 0.0))


def test_a_reply_is_deltas_and_then_one_generation_of_all_of_them(case: Case) -> None:
    """Whatever comes before the last piece is a delta, and the generation's text is all deltas joined."""

    async def work(engine: Engine) -> None:
        *deltas, generation = [piece async for piece in engine.generate(question(), Sampling(64))]
        assert isinstance(generation, Generation)
        assert len(deltas) > 1
        assert generation.text == "".join(delta.text for delta in deltas if isinstance(delta, Delta))
        assert all(isinstance(delta, Delta) for delta in deltas)

    case.run(work)


def test_a_reply_ends_after_a_stop_string(case: Case) -> None:
    """The stop string stays in the text, nothing follows it, and the reason is "stop"."""

    async def work(engine: Engine) -> None:
        _, whole = await read(engine, question(), Sampling(64))
        stop = whole.text[9:12]
        _, stopped = await read(engine, question(), Sampling(64, stop=("never said", stop)))
        assert stopped.text == whole.text[: whole.text.index(stop) + 3]
        assert stopped.finish_reason == "stop"

    case.run(work)


def test_a_reply_ends_at_max_tokens(case: Case) -> None:
    """A reply that is cut off says "length", and has just as many tokens."""

    async def work(engine: Engine) -> None:
        deltas, cut = await read(engine, question(), Sampling(3))
        assert (cut.finish_reason, cut.usage.completion_tokens) == ("length", 3)
        assert sum(delta.tokens for delta in deltas) <= 3

    case.run(work)


def test_greedy_sampling_repeats_itself(case: Case) -> None:
    """The same conversation gives the same text again."""

    async def work(engine: Engine) -> None:
        first, second = [await read(engine, question(), Sampling(64)) for _ in range(2)]
        assert first[1].text == second[1].text

    case.run(work)


def test_usage_counts_what_was_read_and_written(case: Case) -> None:
    """Image tokens are what the formula says, the prompt is longer than they are, and deltas add up to the completion."""

    async def work(engine: Engine) -> None:
        conversation = question().assistant("There.").user(look(101), "Answer.")
        deltas, generation = await read(engine, conversation, Sampling(64))
        usage, end = generation.usage, 1 if generation.finish_reason == "stop" else 0
        assert usage.image_tokens == sum(view.visual_tokens for view in conversation.views)
        assert usage.prompt_tokens > usage.image_tokens
        assert 0 <= (usage.cached_tokens or 0) < usage.prompt_tokens
        assert 0 <= usage.completion_tokens - sum(delta.tokens for delta in deltas) <= end

    case.run(work)


@pytest.mark.parametrize("how", ["closing the iterator", "cancelling the task"])
def test_a_reader_who_leaves_frees_the_engine(case: Case, how: str) -> None:
    """Both ways of leaving end the work behind the reply: nothing runs any more, and the next request is not kept waiting."""

    async def work(engine: Engine) -> None:
        begun, many = time.perf_counter(), [endless(engine) for _ in range(6)]
        readers = [asyncio.create_task(anext(aiter(reply))) for reply in many]
        await readers[0]
        reading = time.perf_counter() - begun
        if how == "cancelling the task":
            for reader in readers[1:]:
                reader.cancel()
            going_on = asyncio.create_task(anext(many[0]))
            await asyncio.sleep(0)
            going_on.cancel()
            await asyncio.gather(*readers, going_on, return_exceptions=True)
        for reply, reader in zip(many, readers, strict=True):
            if not reader.done():
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)
            await reply.aclose()
        print(reading)
        await freed(case, engine)

    case.run(work)


async def freed(case: Case, engine: Engine) -> None:
    """Fail unless the engine has nothing to do."""


def test_two_replies_at_a_time_do_not_mix(case: Case) -> None:
    """Two conversations at once get the texts that each gets alone."""

    async def work(engine: Engine) -> None:
        alone = [(await read(engine, question(n), Sampling(64)))[1].text for n in (100, 101)]
        at_once = await asyncio.gather(*(read(engine, question(n), Sampling(64)) for n in (100, 101)))
        assert [generation.text for _, generation in at_once] == alone

    case.run(work)
