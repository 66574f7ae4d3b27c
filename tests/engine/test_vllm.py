"""The vLLM engine: against real vLLM, and against a server that fails as real vLLM cannot be made to."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import httpx2
import pytest
import support
from PIL import Image

from ergo_server.engine.base import Delta, Engine, Generation, Sampling
from ergo_server.engine.embedded import EmbeddedEngine
from ergo_server.engine.retries import BURST, SHARE, RetryBudget, RetryOutcome
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
from ergo_server.imaging.file import ImageFile
from ergo_server.imaging.geometry import PixelBudget
from ergo_server.imaging.original import Original
from ergo_server.imaging.view import View
from ergo_server.imaging.work import ImageWork
from ergo_server.pipeline import Deadlines, Pipeline, Result, Task
from ergo_server.protocol.base import Question
from ergo_server.protocol.conversation import Conversation
from ergo_server.protocol.ergo import ErgoPolicy
from ergo_server.protocol.prompts import load_profile
from ergo_server.protocol.single import SinglePolicy

GREEDY = Sampling(64)
WORK = ImageWork(threads=2)
SIZE = (1190, 1330)
"""Of the scenes here, and of no other test: what vLLM has in its caches is what was asked here."""

# --- real vLLM ----------------------------------------------------------------------------------------------------------


@dataclass
class Wire(httpx2.AsyncHTTPTransport):
    """The network; keeps what was sent, and can tell vLLM to ramble: to go on to the end of its context."""

    rambling: Callable[[int], bool] = lambda number: False
    """Says which requests, by their number."""
    sent: list[dict[str, Any]] = field(default_factory=list)
    headers: list[httpx2.Headers] = field(default_factory=list)
    begun: int = 0
    """Replies that vLLM has begun to write."""

    def __post_init__(self) -> None:
        super().__init__()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request."""
        if request.method == "POST":
            body = json.loads(request.content)
            self.sent.append(body)
            self.headers.append(request.headers)
            if self.rambling(len(self.sent) - 1):
                body = body | {"ignore_eos": True, "stop": [], "max_tokens": 4000}
                request = httpx2.Request("POST", request.url, json=body)
        response = await super().handle_async_request(request)
        self.begun += request.method == "POST"
        return response


def pipeline(engine: Engine, **given: Any) -> Pipeline:
    """Return a pipeline with ergo-mini's prompts."""
    prompts = load_profile(support.PROMPTS).prompts
    return Pipeline(engine, ErgoPolicy(prompts), SinglePolicy(prompts), session_secret=b"of the test", **given)


def task(number: int) -> Task:
    """Ask a held-out scene's question about it."""
    made = support.held_out(number, size=SIZE)
    return Task(Original(ImageFile.of(support.encode(made)), WORK), Question(made.question), PixelBudget(49))


def answers(engine: Engine, numbers: Sequence[int]) -> list[Result]:
    """Answer the questions of held-out scenes, one after the other, and close the engine."""

    async def work() -> list[Result]:
        async with contextlib.aclosing(engine):
            return [await pipeline(engine).answer(task(number)) for number in numbers]

    return asyncio.run(work())


async def read(engine: Engine, conversation: Conversation, sampling: Sampling = GREEDY) -> Generation:
    """Read a reply to its end."""
    async with contextlib.aclosing(engine.generate(conversation, sampling)) as pieces:
        async for piece in pieces:
            if isinstance(piece, Generation):
                return piece
    raise AssertionError("no generation")


@pytest.mark.vllm
def test_both_real_engines_write_the_same(vllm: str) -> None:
    """From the same files in float32, vLLM and the embedded engine write the same text in both turns of ten scenes."""
    numbers = range(300, 310)
    here = answers(EmbeddedEngine(support.CHECKPOINT, device="cpu", threads=1), numbers)
    there = answers(VllmEngine(vllm), numbers)
    for a, b in zip(here, there, strict=True):
        assert [turn.generation.text for turn in a.turns] == [turn.generation.text for turn in b.turns]
        assert [turn.generation.usage.prompt_tokens for turn in a.turns] == [
            turn.generation.usage.prompt_tokens for turn in b.turns
        ]


@pytest.mark.vllm
def test_the_answer_turn_finds_the_zoom_turn_in_the_prefix_cache(vllm: str) -> None:
    """The answer turn takes over all full blocks of tokens that it shares with the zoom turn, its prompt and its reply.

    The zoom turn has about 77 tokens of prompt and 33 of reply, and blocks are 32 long: of 110 shared tokens 96 are found, more
    than the whole prompt of the zoom turn. Where the last block ends with the last token of the reply, it may miss: generation
    ended there, and whether that token was still computed depends on who was faster.
    """
    wire = Wire()
    results = answers(VllmEngine(vllm, transport=wire), range(320, 323))
    for number, result in enumerate(results):
        first, second = (turn.generation.usage for turn in result.turns)
        whole, following = (_tokens(vllm, body) for body in wire.sent[2 * number : 2 * number + 2])
        shared = next((i for i, (a, b) in enumerate(zip(whole, following, strict=False)) if a != b), len(whole))
        print(f"scene {320 + number}: {shared} tokens shared, {second.cached_tokens} cached of {second.prompt_tokens}")
        assert (second.cached_tokens or 0) >= 0.9 * first.prompt_tokens
        assert second.cached_tokens == shared // 32 * 32 or shared % 32 == 0


def _tokens(url: str, body: dict[str, Any]) -> list[int]:
    """Return the tokens of a turn, prompt and reply, as vLLM sees them."""
    once = {name: value for name, value in body.items() if name != "stream_options"} | {"stream": False, "return_token_ids": True}
    said = httpx2.post(f"{url}/v1/chat/completions", json=once, timeout=support.START_SECONDS, trust_env=False).json()
    return [*said["prompt_token_ids"], *said["choices"][0]["token_ids"]]


@pytest.mark.vllm
def test_the_engine_counts_visual_tokens_as_the_formula_does(vllm: str) -> None:
    """vLLM's processor leaves a view of any size as it is, so its own count is width by height by 28 squared."""
    small = [((w, h), budget) for w in (1, 56, 333) for h in (27, 141, 900) for budget in (7, 49) if h <= 200 * w]
    cases = [*small, ((2000, 10), 4), ((9, 1800), 100), ((4000, 3000), 600), ((1000, 1001), 1280)]

    async def work() -> None:
        async with contextlib.aclosing(VllmEngine(vllm)) as engine:
            for size, budget in cases:
                view = _view(Image.new("RGB", size), budget)
                usage = (await read(engine, Conversation().user(view, "?"), Sampling(1))).usage
                assert usage.image_tokens == view.visual_tokens <= budget, (size, budget)

    asyncio.run(work())


def _view(image: Image.Image, budget: int) -> View:
    with io.BytesIO() as file:
        image.save(file, "PNG")
        return support.look(file.getvalue(), budget)


@pytest.mark.vllm
def test_both_turns_are_sent_to_the_same_replica_and_begin_alike(vllm: str) -> None:
    """Both turns carry the same session, other images another; the answer turn repeats the zoom turn's image and reply."""
    wire = Wire()
    results = answers(VllmEngine(vllm, transport=wire, session_headers=("x-session-id", "x-other")), (330, 331))
    sessions = [headers["x-session-id"] for headers in wire.headers]
    assert sessions[0] == sessions[1] != sessions[2] == sessions[3]
    assert sessions == [headers["x-other"] for headers in wire.headers]
    for number, result in enumerate(results):
        first, second = wire.sent[2 * number : 2 * number + 2]
        assert second["messages"][:2] == first["messages"]
        assert second["messages"][2] == {"role": "assistant", "content": result.turns[0].generation.text}
        image = base64.b64decode(second["messages"][1]["content"][0]["image_url"]["url"].removeprefix("data:image/png;base64,"))
        assert image == result.overview.data


@pytest.mark.vllm
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("turn", [0, 1])
def test_a_client_who_closes_the_connection_frees_the_engine(vllm: str, turn: int, streaming: bool) -> None:
    """Through the gateway, in either turn, streaming or not: vLLM stops writing a reply that nobody waits for any more."""
    finished = support.metric(vllm, "request_success_total", "length")
    made = support.held_out(340)
    fields = {
        "question": made.question,
        "stream": streaming,
        "image": f"data:;base64,{base64.b64encode(support.encode(made)).decode()}",
    }

    def busy() -> bool:
        return support.metric(vllm, "num_requests_running") > 0

    async def leave(url: str) -> None:
        async with httpx2.AsyncClient(timeout=support.START_SECONDS, trust_env=False) as client:
            asking = asyncio.create_task(client.post(f"{url}/v1/vqa", json=fields))
            await asyncio.to_thread(support.wait_until, lambda: wire.begun > turn, "the turn is being written")
            await asyncio.sleep(0.5)  # some tokens of four thousand
            assert not asking.done()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    wire = Wire(rambling=lambda number: number == turn)
    with support.gateway(instead=VllmEngine(vllm, transport=wire)) as url:
        asyncio.run(leave(url))
        support.wait_until(lambda: not busy(), "vLLM has nothing to do")
    assert support.metric(vllm, "request_success_total", "length") == finished, "the reply was written to its end"
    assert len(wire.sent) == turn + 1


@pytest.mark.vllm
def test_the_one_time_error_of_the_image_cache_is_survived(vllm: str) -> None:
    """An image that came with a refused request costs the next one with it an internal error: the engine asks twice, and answers.

    The number of requests sent shows that the error was there to be survived (vllm-project/vllm #43941).
    """
    wire, view = Wire(), _view(support.held_out(350, size=SIZE).image, 49)
    conversation = Conversation().system("Look closely.").user(view, "What code?\nWhere?")

    async def work() -> Generation:
        async with contextlib.aclosing(VllmEngine(vllm, transport=wire)) as engine:
            parts = [{"type": "image_url", "image_url": {"url": view.data_url}}]
            body = {"messages": [{"role": "user", "content": parts}], "temperature": 5}
            async with httpx2.AsyncClient(timeout=support.START_SECONDS, trust_env=False) as client:
                assert (await client.post(f"{vllm}/v1/chat/completions", json=body)).status_code == 400
            return await read(engine, conversation)

    assert asyncio.run(work()).usage.image_tokens == view.visual_tokens
    assert len(wire.sent) == 2


@pytest.mark.vllm
def test_the_served_model_is_found(vllm: str) -> None:
    """Without a name the engine takes the model that vLLM lists, and says that it is ready."""

    async def work() -> None:
        async with contextlib.aclosing(VllmEngine(vllm + "/")) as engine:
            status = await engine.status()
            assert (status.ready, status.model) == (True, "ergo-mini")

    asyncio.run(work())


@pytest.mark.vllm
def test_a_model_that_vllm_does_not_serve_is_rejected(vllm: str) -> None:
    """A wrong name in the settings is an error of the engine, not of the caller."""

    async def work() -> None:
        async with contextlib.aclosing(VllmEngine(vllm, model="another")) as engine:
            with pytest.raises(EngineRejected, match="404"):
                await read(engine, Conversation().user("?"))

    asyncio.run(work())


# --- a server that fails on command -------------------------------------------------------------------------------------


def sse(*events: object) -> str:
    """Return server-sent events; text stands as it is, all else as JSON."""
    return "".join(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events)


def says(text: str, reason: str | None = None) -> dict[str, Any]:
    """Return a chunk as vLLM streams it."""
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}


def fails(code: int, message: str = "no") -> dict[str, Any]:
    """Return vLLM's error body."""
    return {"error": {"message": message, "type": "x", "param": None, "code": code}}


ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}}
WHOLE = sse(ROLE, says("Hel"), says("lo", "stop"), USAGE, "[DONE]")

Reply = str | tuple[int, object] | Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """Answers each request with the next of its replies: a body with status 200, a status and JSON, or a way to misbehave."""

    replies: list[Reply]
    asked: list[tuple[str, bytes]] = field(default_factory=list)
    """Path and body of every request."""
    gone: int = 0
    """Connections that the engine closed before their reply was over."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, which has one request."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lengths = [line.split(":")[1] for line in head.lower().splitlines() if line.startswith("content-length")]
        self.asked.append((head.split()[1], await reader.readexactly(int(lengths[0]) if lengths else 0)))
        reply = self.replies.pop(0)
        try:
            if callable(reply):
                await reply(writer)
            else:
                status, body = reply if isinstance(reply, tuple) else (200, reply)
                begin(writer, status)
                writer.write((body if isinstance(body, str) else json.dumps(body)).encode())
                await writer.drain()
        except ConnectionError:
            self.gone += 1
        writer.close()


def begin(writer: asyncio.StreamWriter, status: int = 200) -> None:
    """Write the head of a response that ends when the connection does."""
    writer.write(f"HTTP/1.1 {status} X\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n".encode())


def resets(after: str | None) -> Reply:
    """Return a reply that breaks off with a reset, after a beginning or before anything."""

    async def reply(writer: asyncio.StreamWriter) -> None:
        if after is not None:
            begin(writer)
            writer.write(after.encode())
            await writer.drain()
            await asyncio.sleep(0.1)  # a reset overtakes what the other side has not read yet
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    return reply


async def never_ends(writer: asyncio.StreamWriter) -> None:
    """Write one token after the other, for ever."""
    begin(writer)
    while True:
        writer.write(sse(says("and ")).encode())
        await writer.drain()
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def failing(
    *replies: Reply, model: str | None = "m", retries: RetryBudget | None = None
) -> AsyncIterator[tuple[VllmEngine, Server]]:
    """Serve replies on loopback; yields an engine that asks for them."""
    server = Server(list(replies))
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    engine = VllmEngine(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", model=model, retries=retries)
    try:
        yield engine, server
    finally:
        await engine.aclose()
        listener.close()


def ask(*replies: Reply, model: str | None = "m") -> tuple[list[Delta | Generation], EngineError | None, Server]:
    """Ask once; returns the pieces that came, the error they ended with, and the server."""

    async def work() -> tuple[list[Delta | Generation], EngineError | None, Server]:
        pieces: list[Delta | Generation] = []
        async with failing(*replies, model=model) as (engine, server):
            try:
                async for piece in engine.generate(Conversation().user("?"), Sampling(8)):
                    pieces.append(piece)
            except EngineError as error:
                return pieces, error, server
        return pieces, None, server

    return asyncio.run(work())


FIRST = says("Hel")
BEFORE_ANY_TOKEN: dict[str, Reply] = {
    "status 500": (500, fails(500)),
    "status 502 of a router, in HTML": (502, "<html>bad gateway</html>"),
    "an error event first": sse(ROLE, fails(500), "[DONE]"),
    "a reset instead of a response": resets(None),
    "a reset after the head": resets(""),
    "a reset after the role": resets(sse(ROLE)),
}


@pytest.mark.parametrize("failure", BEFORE_ANY_TOKEN)
def test_a_failure_before_any_token_is_retried_once(failure: str) -> None:
    """The same request is sent a second time, and its reply is whole."""
    pieces, error, server = ask(BEFORE_ANY_TOKEN[failure], WHOLE)
    assert error is None
    assert [piece.text for piece in pieces] == ["Hel", "lo", "Hello"]
    assert server.asked[0] == server.asked[1]


@pytest.mark.parametrize("failure", BEFORE_ANY_TOKEN)
def test_a_second_failure_is_final(failure: str) -> None:
    """There is no third attempt: the caller learns that the engine failed."""
    pieces, error, server = ask(BEFORE_ANY_TOKEN[failure], BEFORE_ANY_TOKEN[failure], WHOLE)
    assert (pieces, type(error), len(server.asked)) == ([], EngineFailed, 2)


def test_an_outage_is_not_made_worse_by_retries() -> None:
    """A hundred questions to a server that fails them all: ten more requests at first, then one more for every ten questions.

    A server that recovers earns its engine new retries.
    """
    told: list[RetryOutcome] = []

    async def work() -> None:
        failing_replies: list[Reply] = [(500, fails(500))] * 120
        async with failing(*failing_replies, retries=RetryBudget(told=told.append)) as (engine, server):
            for _ in range(100):
                with pytest.raises(EngineFailed):
                    await read(engine, Conversation().user("?"))
            sent = len(server.asked)
            print(f"{sent} requests for 100 questions")
            assert 100 + BURST <= sent <= 100 * (1 + SHARE) + BURST
            assert (len(told), told.count("retried")) == (100, sent - 100)
            server.replies[:] = [WHOLE] * 20 + [(500, fails(500)), WHOLE]
            for _ in range(21):
                assert (await read(engine, Conversation().user("?"))).text == "Hello"
            assert not server.replies

    asyncio.run(work())


def test_in_light_traffic_each_first_failure_is_cured() -> None:
    """The one-time error of the image cache, ten times in a row from the first question on, is survived each time."""

    async def work() -> None:
        replies: list[Reply] = [(500, fails(500)), WHOLE] * BURST
        async with failing(*replies) as (engine, _):
            for _ in range(BURST):
                assert (await read(engine, Conversation().user("?"))).text == "Hello"

    asyncio.run(work())


@pytest.mark.parametrize(
    "failure",
    [
        sse(ROLE, FIRST, fails(500), "[DONE]"),
        resets(sse(FIRST)),
        sse(FIRST),
        sse(FIRST, "[DONE]"),
        sse(FIRST, says("", "stop"), "[DONE]"),
        sse(FIRST, USAGE, "[DONE]"),
        sse(FIRST, says("", "abort"), USAGE, "[DONE]"),
        sse(FIRST, "{broken"),
        sse(FIRST, "[1, 2]"),
        sse(FIRST, {"choices": 1}),
        sse(FIRST, {"choices": [{"delta": "text"}]}),
        sse(FIRST, {"choices": [], "usage": {"prompt_tokens": "many"}}, says("", "stop")),
        sse(FIRST, "[" * 100_000),
        sse(FIRST, "x" * 2_000_000),
    ],
    ids=lambda failure: failure[-60:] if isinstance(failure, str) else "a reset",
)
def test_a_failure_after_a_token_is_final(failure: Reply) -> None:
    """What was passed on cannot be taken back, so nothing is retried: an error event, a broken reply, one without an end or
    without usage, one that vLLM aborted, and what is no reply at all."""
    pieces, error, server = ask(failure, WHOLE)
    assert pieces == [Delta("Hel")]
    assert (type(error), len(server.asked)) == (EngineFailed, 1)


@pytest.mark.parametrize(
    ("status", "body", "expected", "retry_after", "param"),
    [
        (400, fails(400, "temperature must be in [0, 2]"), EngineRejected, None, None),
        (400, fails(400, "This model's maximum context length is 4096 tokens."), ContextTooLong, None, "max_visual_tokens"),
        (400, {"error": "a text"}, EngineRejected, None, None),
        (422, "no JSON", EngineRejected, None, None),
        (404, {"detail": "Not Found"}, EngineRejected, None, None),
        (401, fails(401), EngineFailed, None, None),
        (408, fails(408), EngineTimeout, None, None),
        (503, fails(503, "The engine is currently busy"), EngineBusy, 1, None),
        (504, fails(504), EngineTimeout, None, None),
    ],
)
def test_each_status_has_its_error(
    status: int, body: object, expected: type[EngineError], retry_after: int | None, param: str | None
) -> None:
    """A refusal is not retried, is told apart from a full queue and a time-out, and never passes on vLLM's own words."""
    pieces, error, server = ask((status, body), WHOLE)
    assert (pieces, type(error), len(server.asked)) == ([], expected, 1)
    assert error is not None
    assert (error.retry_after, error.param) == (retry_after, param)
    assert not {"temperature", "4096"} & set(error.message.split())


def test_a_refusal_within_the_stream_is_one() -> None:
    """vLLM answers a streamed request with 200 before it refuses it: the event's code counts."""
    assert type(ask(sse(ROLE, fails(400)), WHOLE)[1]) is EngineRejected
    assert type(ask(sse(ROLE, fails(503)), WHOLE)[1]) is EngineBusy


def test_another_model_after_a_restart_is_discovered() -> None:
    """A 404 makes the engine ask for the list of models again, and the next request names the new one."""

    async def work() -> list[Any]:
        lists: list[Reply] = [(200, {"data": [{"id": name}]}) for name in ("old", "new")]
        async with failing(lists[0], (404, fails(404)), lists[1], WHOLE, model=None) as (engine, server):
            with pytest.raises(EngineRejected):
                await read(engine, Conversation().user("?"))
            assert (await read(engine, Conversation().user("?"))).text == "Hello"
            return [json.loads(body)["model"] if body else path for path, body in server.asked]

    assert asyncio.run(work()) == ["/v1/models", "old", "/v1/models", "new"]


@pytest.mark.parametrize("answer", [(200, {"data": []}), (200, "no JSON"), (500, fails(500)), (401, fails(401))])
def test_an_engine_that_lists_no_model_is_unavailable(answer: Reply) -> None:
    """A server that still starts, or is no vLLM, gives an engine error that says when to come back."""
    _, error, _ = ask(answer, model=None)
    assert isinstance(error, EngineUnavailable)
    assert error.retry_after


def test_nobody_there_is_unavailable() -> None:
    """A refused connection is told at once, and the status says that the engine is not ready."""

    async def work() -> None:
        async with contextlib.aclosing(VllmEngine(f"http://127.0.0.1:{support.free_port()}", model="m")) as engine:
            assert not (await engine.status()).ready
            with pytest.raises(EngineUnavailable) as raised:
                await read(engine, Conversation().user("?"))
            assert raised.value.retry_after

    asyncio.run(work())


def test_an_unhealthy_engine_is_not_ready() -> None:
    """The status is that of vLLM's own health check."""

    async def work() -> None:
        async with failing((503, "")) as (engine, _):
            assert not (await engine.status()).ready

    asyncio.run(work())


@pytest.mark.parametrize("passing_on", [False, True])
def test_a_reply_that_never_ends_meets_the_deadline(passing_on: bool) -> None:
    """The pipeline's deadline ends it with a time-out, and the connection is closed."""

    async def work() -> None:
        async with failing(never_ends) as (engine, server):
            loop = pipeline(engine, deadlines=Deadlines(turn=0.5))
            work: Coroutine[Any, Any, object]
            work = _drain(loop.converse(Conversation().user("?"), Sampling(8))) if passing_on else loop.answer(task(360))
            with pytest.raises(EngineTimeout):
                await work
            await asyncio.to_thread(support.wait_until, lambda: server.gone == 1, "the connection is closed")

    asyncio.run(work())


async def _drain(pieces: AsyncGenerator[Delta | Generation, None]) -> None:
    async for _ in pieces:
        pass


def test_closing_a_reply_closes_its_connection_at_once() -> None:
    """When closing the iterator returns, the response is closed: nothing is left to the garbage collector."""

    class Body(httpx2.AsyncByteStream):
        closed = False

        async def __aiter__(self) -> AsyncIterator[bytes]:
            for _ in range(100):
                yield sse(FIRST).encode()

        async def aclose(self) -> None:
            self.closed = True

    async def work() -> None:
        body = Body()
        network = httpx2.MockTransport(lambda request: httpx2.Response(200, stream=body))
        async with contextlib.aclosing(VllmEngine("http://engine", model="m", transport=network)) as engine:
            reply = engine.generate(Conversation().user("?"), Sampling(8))
            await anext(reply)
            await reply.aclose()
            assert body.closed

    asyncio.run(work())


def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is asked directly, whatever proxy the environment names for the way out."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{support.free_port()}")
        monkeypatch.setenv(name.lower(), os.environ[name])
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    pieces, error, _ = ask(WHOLE)
    assert error is None
    assert pieces[-1].text == "Hello"


def test_every_sampling_parameter_is_sent() -> None:
    """Those of the request and those that vLLM would take from the model's generation_config, seed and stop included."""

    async def work() -> dict[str, Any]:
        async with failing(WHOLE) as (engine, server):
            await read(engine, Conversation().user("?"), Sampling(5, 0.25, 0.5, 7, ("</zoom>",)))
            sent: dict[str, Any] = json.loads(server.asked[0][1])
            return sent

    sent = asyncio.run(work())
    assert [sent[item.name] for item in fields(Sampling)] == [5, 0.25, 0.5, 7, ["</zoom>"]]
    assert {"top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"} <= sent.keys()
    assert sent["include_stop_str_in_output"] is True


def test_the_salt_is_sent_where_there_is_one() -> None:
    """vLLM refuses an empty one, so without a salt the field is left out."""

    async def work() -> list[dict[str, Any]]:
        async with failing(WHOLE, WHOLE) as (engine, server):
            for salt in ("", "of a tenant"):
                async for _ in engine.generate(Conversation().user("?"), Sampling(8), salt=salt):
                    pass
            return [json.loads(body) for _, body in server.asked]

    without, salted = asyncio.run(work())
    assert without | {"cache_salt": "of a tenant"} == salted
    assert "cache_salt" not in without


@pytest.mark.parametrize("attempts", [0, 1])
def test_the_deadline_bounds_both_attempts(attempts: int) -> None:
    """A server that says nothing, to the first attempt or the second, costs no more than the deadline, and is hung up on."""

    async def silent(writer: asyncio.StreamWriter) -> None:
        begin(writer)
        while True:
            writer.write(sse(ROLE).encode())
            await writer.drain()
            await asyncio.sleep(0.01)

    async def work() -> None:
        replies: list[Reply] = [*[(500, fails(500))] * attempts, silent]
        async with failing(*replies) as (engine, server):
            deadline = asyncio.get_running_loop().time() + 0.5
            with pytest.raises(EngineTimeout, match=r"0\.5 s"):
                await anext(engine.generate(Conversation().user("?"), Sampling(8), deadline=deadline))
            await asyncio.to_thread(support.wait_until, lambda: server.gone == 1, "the connection is closed")
            assert len(server.asked) == attempts + 1

    asyncio.run(work())


def test_the_api_key_is_sent_as_bearer_token() -> None:
    """A server that wants a key gets it, with every request."""
    seen: list[str] = []

    def network(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.headers["authorization"])
        return httpx2.Response(200, text=WHOLE)

    async def work() -> None:
        engine = VllmEngine("http://engine", model="m", api_key="secret", transport=httpx2.MockTransport(network))
        async with contextlib.aclosing(engine):
            await read(engine, Conversation().user("?"))

    asyncio.run(work())
    assert seen == ["Bearer secret"]


def test_a_reply_in_a_broken_encoding_is_an_engine_error() -> None:
    """What a proxy in between may do to a body is no reason to let another library's exception out."""

    async def work() -> None:
        broken = httpx2.MockTransport(lambda _: httpx2.Response(200, headers={"content-encoding": "gzip"}, stream=_Plain()))
        async with contextlib.aclosing(VllmEngine("http://engine", model="m", transport=broken)) as engine:
            with pytest.raises(EngineFailed):
                await read(engine, Conversation().user("?"))

    asyncio.run(work())


class _Plain(httpx2.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield WHOLE.encode()
