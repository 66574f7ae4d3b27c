"""``POST /v1/chat/completions`` and ``GET /v1/models``: any OpenAI client gains zoom by changing its base URL.

What real clients were seen to rely on decides the form (research of this project, evals §0 and §2):
    * For a multiple-choice question the content is the bare letter: the one form that every harness scores right.
    * The client's ``max_tokens`` bounds the visible answer only, and is clamped, never refused.
    * No role chunk before the first token, no comment lines, usage in a last chunk of its own with ``choices: []``.
    * Unknown fields are ignored; what would be silently wrong is refused.
    * The reasoning travels as ``reasoning`` (vLLM) and ``reasoning_content`` (older clients).

The newest image of the user is the one that is zoomed into; all others ride along within the budget.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError
from starlette.responses import JSONResponse

from ergo_server.api.chat_schemas import ChatChunk, ChatCompletion, ChatRequest, ModelInfo, ModelList
from ergo_server.api.errors import envelope, from_validation
from ergo_server.api.openapi import ANSWERED, ASKING, KEYED, answer, chunks, json_body, operation, path
from ergo_server.api.schemas import TINY_PNG, ErrorEnvelope, RegionInfo, Timings, TurnUsage, UsageInfo, VisualTokensInfo
from ergo_server.api.service import MODELS, Service
from ergo_server.api.stream import event_stream, sse, unless_gone
from ergo_server.engine.base import Delta, Generation, Sampling, Usage
from ergo_server.errors import EngineFailed, ErgoError, NotFound, RequestError, UnknownModel
from ergo_server.imaging.geometry import PixelBudget, smart_resize
from ergo_server.imaging.original import Original
from ergo_server.imaging.view import View
from ergo_server.intake.body import RequestLimits, read_json
from ergo_server.intake.images import Images
from ergo_server.pipeline import (
    TURN_TOKENS,
    AnswerDelta,
    ContextMessage,
    Done,
    Event,
    OverviewMade,
    ReasoningDelta,
    RegionFound,
    Result,
    Task,
)
from ergo_server.protocol.base import Question
from ergo_server.protocol.choices import split_choices
from ergo_server.protocol.conversation import Conversation, Role


@dataclass(frozen=True, slots=True)
class _Said:
    """A message of the client: text and images, in order."""

    role: Role
    parts: tuple[str | Original, ...]

    @property
    def text(self) -> str:
        return "\n".join(part for part in self.parts if isinstance(part, str))


_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


_MESSAGE = {
    "role": "user",
    "content": [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{TINY_PNG}"}},
        {"type": "text", "text": "What is the code on the red circle?"},
    ],
}

_CHUNKS = chunks(ChatChunk, ErrorEnvelope)


def router(service: Service) -> APIRouter:
    """Return the OpenAI-compatible routes."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post(
        "/v1/chat/completions",
        **operation(
            "create_chat_completion",
            "OpenAI chat completions",
            answer("the completion, whole or as it comes", ChatCompletion, events=_CHUNKS, headers=ANSWERED),
            errors=ASKING,
            body=json_body(ChatRequest, image=("a question about an image", {"model": "ergo", "messages": [_MESSAGE]})),
        ),
    )
    async def completions(request: Request) -> Response:
        """Answer as OpenAI's chat completions do. `ergo` zooms, `ergo-single` does not, `ergo-raw` is the engine as it is."""
        with service.accepting():
            chat = await _read_chat(request)
            budget = service.likely_budget(chat.ergo.max_visual_tokens)
            said = await unless_gone(request, _read_messages(chat.messages, service.images(request), budget, service.limits))
            raw = chat.model == "ergo-raw" or not any(isinstance(part, Original) for message in said for part in message.parts)
            asked = await unless_gone(request, _as_given(said)) if raw else _task(service, request, chat, said)
        if isinstance(asked, Conversation):
            return await _raw(request, service, chat, asked)
        task = asked
        reply = _Reply(chat, task.question)
        if chat.stream:
            return await event_stream(request, _chunked(service.pipeline(chat.model).stream(task), reply), str, _failed)
        result = await unless_gone(request, service.pipeline(chat.model).answer(task))
        return JSONResponse(reply.completion(result))

    @routes.get("/v1/models", **operation("list_models", "OpenAI model list", answer("all of them", ModelList), errors=KEYED))
    async def models() -> ModelList:
        """List the model names."""
        return ModelList(data=[ModelInfo(id=name, created=service.created) for name in MODELS])

    @routes.get(
        "/v1/models/{model_id}",
        **operation(
            "get_model",
            "One model",
            answer("it is there", ModelInfo),
            errors=(*KEYED, NotFound, UnknownModel),
            parameters=path("model_id", "its name", "ergo"),
        ),
    )
    async def model(model_id: str) -> ModelInfo:
        """Describe one model name."""
        if model_id not in MODELS:
            raise UnknownModel(f"there is no model {model_id[:64]!r} here", param="model")
        return ModelInfo(id=model_id, created=service.created)

    return routes


# --- reading ------------------------------------------------------------------------------------------------------------


async def _read_chat(request: Request) -> ChatRequest:
    try:
        chat = ChatRequest.model_validate(await read_json(request))
    except ValidationError as error:
        raise from_validation(error) from error
    if chat.model not in MODELS:
        raise UnknownModel(f"there is no model {chat.model[:64]!r} here; there are {', '.join(MODELS)}", param="model")
    chat.refuse()
    return chat


async def _read_messages(
    messages: Sequence[dict[str, Any]], images: Images, budget: PixelBudget, limits: RequestLimits
) -> list[_Said]:
    _count_images(messages, limits.images)
    said = []
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise RequestError(f"{where}.role: must be one of {', '.join(_ROLES)}", param=f"{where}.role")
        content = message.get("content")
        parts = [content] if isinstance(content, str) else [] if content is None else content
        if not isinstance(parts, list):
            raise RequestError(f"{where}.content: must be text or a list of parts", param=f"{where}.content")
        read = [await _read_part(part, f"{where}.content.{i}", images, budget) for i, part in enumerate(parts)]
        said.append(_Said(_ROLES[role], tuple(read)))
    if said[-1].role != "user":
        raise RequestError("messages: the last one must be the user's", param="messages")
    limits.check_text((message.text for message in said), "messages")
    return said


def _count_images(messages: Sequence[dict[str, Any]], most: int) -> None:
    """Refuse too many images before the first of them is fetched."""
    contents = (message.get("content") for message in messages)
    parts = (part for content in contents if isinstance(content, list) for part in content)
    if sum(isinstance(part, dict) and part.get("type") == "image_url" for part in parts) > most:
        raise RequestError(f"messages: at most {most} images", param="messages")


async def _read_part(part: object, where: str, images: Images, budget: PixelBudget) -> str | Original:
    if isinstance(part, str):
        return _text(part, where)
    if isinstance(part, dict):
        match part.get("type"):
            case "text" if isinstance(part.get("text"), str):
                return _text(part["text"], where)
            case "image_url":
                image = part.get("image_url")
                return await images.named(image.get("url") if isinstance(image, dict) else image, budget=budget)
    raise RequestError(f"{where}: must be a text or an image_url part", param=where)


def _text(text: str, where: str) -> str:
    """Refuse half of a surrogate pair, which JSON can spell and no tokenizer can read."""
    if text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text):
        return text
    raise RequestError(f"{where}: is not Unicode text", param=where)


def _task(service: Service, request: Request, chat: ChatRequest, said: Sequence[_Said]) -> Task:
    """Find the image to zoom into, the question, and what was said before."""
    *before, last = said
    question = split_choices(last.text)
    if not question.text:
        raise RequestError("messages: the last one asks no question", param="messages")
    images = [
        (number, i, part)
        for number, message in enumerate(said)
        if message.role == "user"
        for i, part in enumerate(message.parts)
        if isinstance(part, Original)
    ]
    if not images:
        raise RequestError("messages: an image must be in a message of the user", param="messages")
    for number, message in enumerate(before):
        if message.role == "system" and any(isinstance(part, Original) for part in message.parts):
            raise RequestError(f"messages.{number}: an image cannot be part of instructions", param=f"messages.{number}")
    newest, index, image = images[-1]
    context = []
    for number, message in enumerate(before):
        kept = tuple(part for i, part in enumerate(message.parts) if (number, i) != (newest, index))
        if kept:
            context.append(ContextMessage(message.role, kept))
    aside = tuple(part for i, part in enumerate(last.parts) if isinstance(part, Original) and (len(before), i) != (newest, index))
    if aside:
        context.append(ContextMessage("user", aside))
    return Task(
        image=image,
        question=question,
        budget=service.budget(chat.ergo.max_visual_tokens),
        zoom="never" if chat.model == "ergo-single" else chat.ergo.zoom,
        max_tokens=chat.limit,
        temperature=chat.temperature or 0.0,
        top_p=chat.top_p or 1.0,
        seed=chat.seed,
        context=tuple(context),
        tenant=service.tenant(request).name,
        salt=service.salt(request),
        receive_seconds=service.received(request),
    )


# --- writing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Reply:
    """Puts a result into OpenAI's form."""

    chat: ChatRequest
    question: Question
    """Seconds it took to read the body."""

    @property
    def late(self) -> bool:
        """The content is known only when the answer is complete: it is a letter, or it ends at a stop string."""
        return bool(self.question.choices or self.chat.stops)

    def content(self, result: Result) -> str:
        """Return the visible answer: the bare letter where there are choices and one was meant."""
        text = self.question.labels[result.choice] if result.choice is not None else result.answer.text
        ends = [at for stop in self.chat.stops if (at := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text

    def completion(self, result: Result) -> dict[str, Any]:
        """Return a whole completion."""
        message = {"role": "assistant", "content": self.content(result), "refusal": None, **_reasoning(result.answer.reasoning)}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "length" if result.truncated else "stop"}
        return {
            "id": f"chatcmpl-{result.id}",
            "object": "chat.completion",
            "created": result.created,
            "model": self.chat.model,
            "choices": [choice],
            "usage": _usage(result),
            "system_fingerprint": None,
            "service_tier": None,
            "ergo": self.ergo(result),
        }

    def ergo(self, result: Result) -> dict[str, Any]:
        """Return what OpenAI's form has no place for."""
        region = RegionInfo.of(result.region, result.header, crop="crop" in self.chat.ergo.include)
        return {
            "regions": [region.model_dump(mode="json")],
            "visual_tokens": VisualTokensInfo.of(result.visual_tokens).model_dump(mode="json"),
            "turns": [TurnUsage.of(turn).model_dump(mode="json") for turn in result.turns],
            "timings": Timings.of(result.timings).model_dump(mode="json"),
        }


def _reasoning(text: str) -> dict[str, str]:
    return {"reasoning": text, "reasoning_content": text} if text else {}


def _usage(result: Result) -> dict[str, Any]:
    usage = UsageInfo.of(result).model_dump(mode="json", exclude={"turns"})
    details = usage["prompt_tokens_details"]
    details |= {"text_tokens": usage["prompt_tokens"] - details["image_tokens"], "audio_tokens": 0}
    return usage


@dataclass(slots=True)
class _Chunks:
    """Makes the chunks of one streamed completion: the same id, time and model in each, the role in the first."""

    id: str
    created: int
    model: str
    with_usage: bool
    first: bool = True

    def delta(self, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> str:
        """Return a chunk with a choice."""
        if self.first:
            delta = {"role": "assistant", **delta}
            self.first = False
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._chunk([choice], **({"usage": None} if self.with_usage else {}), **more)

    def usage(self, usage: dict[str, Any]) -> str:
        """Return the chunk of the usage, if it was asked for."""
        return self._chunk([], usage=usage) if self.with_usage else ""

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        return sse({**head, "choices": choices, **more})


def _new_chunks(chat: ChatRequest) -> _Chunks:
    wanted = chat.stream_options is not None and chat.stream_options.include_usage
    return _Chunks(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), chat.model, wanted)


async def _chunked(events: AsyncGenerator[Event, None], reply: _Reply) -> AsyncGenerator[str, None]:
    """Turn the pipeline's events into chunks."""
    chunks = _new_chunks(reply.chat)
    try:
        async for event in events:
            match event:
                case ReasoningDelta(text=text) if text:
                    yield chunks.delta(_reasoning(text))
                case AnswerDelta(text=text) if text and not reply.late:
                    yield chunks.delta({"content": text})
                case Done(result=result):
                    if reply.late:
                        yield chunks.delta({"content": reply.content(result)})
                    reason = "length" if result.truncated else "stop"
                    yield chunks.delta({} if not chunks.first else {"content": ""}, reason, ergo=reply.ergo(result))
                    yield chunks.usage(_usage(result)) + "data: [DONE]\n\n"
                case OverviewMade() | RegionFound() | ReasoningDelta() | AnswerDelta():
                    pass
    finally:
        await events.aclose()


def _failed(error: ErgoError) -> str:
    return sse(envelope(error)) + "data: [DONE]\n\n"


# --- the engine as it is ------------------------------------------------------------------------------------------------


async def _as_given(said: Sequence[_Said]) -> Conversation:
    """Pass a conversation on unchanged in meaning: every image as its own bytes, after its header was checked."""
    conversation = Conversation()
    for message in said:
        parts: list[str | View] = []
        for part in message.parts:
            if isinstance(part, Original):
                header = await part.header()
                parts.append(View(part.file.data, smart_resize(header.size), header.format))
            else:
                parts.append(part)
        conversation = conversation.say(message.role, *parts)
    return conversation


async def _raw(request: Request, service: Service, chat: ChatRequest, conversation: Conversation) -> Response:
    """One turn on the engine, its reply as it is."""
    limit = min(chat.limit or TURN_TOKENS, 8 * TURN_TOKENS)
    sampling = Sampling(limit, chat.temperature or 0.0, chat.top_p or 1.0, chat.seed, chat.stops)
    tenant = service.tenant(request).name
    pieces = service.zooming.converse(conversation, sampling, tenant=tenant, salt=service.salt(request))
    chunks = _new_chunks(chat)

    def charge(usage: Usage) -> None:
        """Here, as no pipeline tells of what goes past it."""
        shown = sum(view.visual_tokens for view in conversation.views)
        service.charge(tenant, shown if usage.image_tokens is None else usage.image_tokens)

    if chat.stream:

        async def lines() -> AsyncGenerator[str, None]:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    if isinstance(piece, Delta):
                        if piece.anew:
                            raise EngineFailed("the engine broke while it was answering, and another gave another answer")
                        yield chunks.delta({"content": piece.text})
                    else:
                        charge(piece.usage)
                        yield chunks.delta({} if not chunks.first else {"content": ""}, piece.finish_reason)
                        yield chunks.usage(_raw_usage(piece.usage)) + "data: [DONE]\n\n"

        return await event_stream(request, lines(), str, _failed)

    async def whole() -> Generation:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                if isinstance(piece, Generation):
                    return piece
        raise AssertionError("an engine ends with a Generation")

    generation = await unless_gone(request, whole())
    charge(generation.usage)
    message = {"role": "assistant", "content": generation.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": generation.finish_reason}
    return JSONResponse(
        {
            "id": chunks.id,
            "object": "chat.completion",
            "created": chunks.created,
            "model": chunks.model,
            "choices": [choice],
            "usage": _raw_usage(generation.usage),
            "system_fingerprint": None,
            "service_tier": None,
        }
    )


def _raw_usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens or 0, "image_tokens": usage.image_tokens or 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
