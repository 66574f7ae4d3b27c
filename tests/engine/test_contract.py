"""The contract at the head of engine/base.py: one set of tests for the scripted engine, the embedded one and real vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import support

from ergo_server.engine.base import Delta, Engine, Generation, Sampling
from ergo_server.engine.embedded import EmbeddedEngine
from ergo_server.engine.scripted import ScriptedEngine
from ergo_server.engine.vllm import VllmEngine
from ergo_server.errors import ContextTooLong, EngineError, EngineFailed, EngineUnavailable
from ergo_server.imaging.decode import decode_image
from ergo_server.imaging.geometry import PixelBudget, Size
from ergo_server.imaging.view import View, overview
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
    url: str = ""
    checkpoint: Path = support.CHECKPOINT

    def engine(self) -> Engine:
        """Make one."""
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


@pytest.fixture(params=["scripted", "embedded", pytest.param("vllm", marks=pytest.mark.vllm)])
def case(request: pytest.FixtureRequest) -> Case:
    """Each kind of engine in turn."""
    return Case(request.param, request.getfixturevalue("vllm") if request.param == "vllm" else "")


@pytest.fixture
def endless(case: Case, tmp_path: Path) -> Case:
    """Each kind of engine, with a checkpoint that does not know the model's end."""
    copy = shutil.copytree(support.CHECKPOINT, tmp_path / "endless")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [411]}))  # <|video_pad|>
    return Case(case.name, case.url, copy)


real = pytest.mark.parametrize("case", ["embedded", pytest.param("vllm", marks=pytest.mark.vllm)], indirect=True)


def look(number: int) -> View:
    """Return the overview of a held-out scene."""
    return overview(decode_image(support.encode(support.held_out(number))), PixelBudget(49))


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
        assert getattr(engine, "running", 0) == 0  # the scripted engine counts by itself

    finished = support.metric(endless.url, "request_success_total", "length") if endless.url else 0
    endless.run(work)
    if endless.url:
        support.wait_until(lambda: support.metric(endless.url, "num_requests_running") == 0, "vLLM has nothing to do")
        assert support.metric(endless.url, "request_success_total", "length") == finished, "no reply was written to its end"


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
