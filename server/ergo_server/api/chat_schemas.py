"""The wire forms of ``/v1/chat/completions`` and ``/v1/models``, as OpenAI's clients send and read them, with ``ergo`` beside.

`ChatRequest` reads requests. Of a message it takes anything, so that the route can name the place of what is wrong; the forms of
messages, and those of completions, are the reference, held to what is really sent by ``tests/api/test_openapi.py``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, TypeAdapter
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from ergo_server.api.schemas import (
    REQUEST_ID,
    TINY_PNG,
    DataUrl,
    ImageAddress,
    ImageId,
    RegionInfo,
    Seed,
    Shown,
    Timings,
    TurnUsage,
    VisualTokensInfo,
    only_if_asked,
)
from ergo_server.api.service import MODELS
from ergo_server.errors import RequestError
from ergo_server.imaging.geometry import MAX_VISUAL_TOKENS, MIN_VISUAL_TOKENS
from ergo_server.pipeline import ZoomMode


class DescribedAs:
    """Describes a field as another type than the one that it is read as.

    Args:
        kind: the type that the JSON schema shows.
    """

    def __init__(self, kind: Any) -> None:
        self._schema = TypeAdapter(kind).core_schema

    def __get_pydantic_json_schema__(self, _: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Take the place of the field's own schema."""
        return handler(self._schema)


def _refused(*allowed: object) -> dict[str, Any]:
    """Return a schema's part for a field of which only these values are not refused."""
    return {"enum": [*allowed, None]}


# --- what is asked ------------------------------------------------------------------------------------------------------


class TextPart(BaseModel):
    """Text within a message."""

    type: Literal["text"] = Field(description="what this part is")
    text: str = Field(description="the text", examples=["What is the code on the red circle?"])


class ImageUrl(BaseModel):
    """Where an image is."""

    url: DataUrl | ImageId | ImageAddress = Field(
        description="the image: JPEG, PNG, WebP, GIF or BMP", examples=[f"data:image/png;base64,{TINY_PNG}"]
    )


class ImagePart(BaseModel):
    """An image within a message."""

    type: Literal["image_url"] = Field(description="what this part is")
    image_url: ImageUrl | DataUrl | ImageId | ImageAddress = Field(
        description="the image, as OpenAI's object or as its url alone", examples=[{"url": f"data:image/png;base64,{TINY_PNG}"}]
    )


class ChatInstruction(BaseModel):
    """A message that says how to answer."""

    role: Literal["system", "developer"] = Field(description="the two mean the same", examples=["system"])
    content: str | list[str | TextPart] | None = Field(
        default=None, description="text, or parts in order", examples=["Answer with the digits only."]
    )


class ChatMessage(BaseModel):
    """What was said."""

    role: Literal["user", "assistant"] = Field(description="who says it", examples=["user"])
    content: str | list[str | TextPart | ImagePart] | None = Field(
        default=None, description="text, or parts in order", examples=["What is the code on the red circle?"]
    )


class StreamOptions(BaseModel):
    """How to stream."""

    include_usage: bool = Field(default=False, description="end with a chunk that has the usage and no choices", examples=[True])


class ErgoOptions(BaseModel):
    """What the server's own form offers beyond OpenAI's, under ``ergo``."""

    model_config = ConfigDict(extra="forbid")

    max_visual_tokens: int | None = Field(
        default=None,
        description="pixel budget of each view, in visual tokens (28 x 28 pixels each); unset takes the model's, "
        "and what is outside the model's bounds is a 400 that names them",
        examples=[49],
        json_schema_extra={"minimum": MIN_VISUAL_TOKENS, "maximum": MAX_VISUAL_TOKENS},
    )
    zoom: ZoomMode = Field(
        default="auto",
        description="`auto` leaves the zoom turn out when the image fits the budget at full resolution",
        examples=["auto"],
    )
    include: list[str] = Field(default=[], description="`crop` adds the crop's pixels", examples=[["crop"]])


class ChatRequest(BaseModel):
    """A chat completion request. Fields that are not here are ignored."""

    model_config = ConfigDict(extra="ignore")

    model: str = Field(
        default="ergo",
        description="`ergo` zooms into the newest image of the user, `ergo-single` does not, `ergo-raw` is the engine as it is",
        examples=["ergo"],
        json_schema_extra={"enum": [*MODELS]},
    )
    messages: Annotated[list[dict[str, Any]], DescribedAs(list[ChatInstruction | ChatMessage])] = Field(
        min_length=1,
        max_length=512,
        description="the conversation; the last message is the user's and, where there is an image, has a question. "
        "At most 8 images, unless the operator set another limit",
        examples=[[{"role": "user", "content": "What is the code on the red circle?"}]],
        json_schema_extra={"minItems": 1, "maxItems": 512},
    )
    stream: bool = Field(default=False, description="answer with server-sent events", examples=[False])
    stream_options: StreamOptions | None = Field(default=None, description="how to stream")
    max_tokens: int | None = Field(
        default=None, ge=1, description="most tokens of the visible answer; clamped to the server's own bound", examples=[64]
    )
    max_completion_tokens: int | None = Field(
        default=None, ge=1, description="OpenAI's newer name of max_tokens; comes first where both are given", examples=[64]
    )
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="of sampling; unset or 0 always takes the likeliest token", examples=[0.0]
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="only the likeliest tokens that together have this probability", examples=[1.0]
    )
    seed: Seed | None = Field(default=None, description="makes sampling repeatable, as far as the engine does", examples=[7])
    stop: str | list[str] | None = Field(
        default=None, description="text before which the visible answer ends; one, or several", examples=["\n"]
    )
    n: int | None = Field(default=None, description="one answer; more are refused", json_schema_extra=_refused(1))
    tools: list[Any] | None = Field(default=None, description="tools are refused", json_schema_extra=_refused([]))
    functions: list[Any] | None = Field(default=None, description="functions are refused", json_schema_extra=_refused([]))
    logprobs: bool | None = Field(
        default=None, description="probabilities of tokens are refused", json_schema_extra=_refused(False)
    )
    logit_bias: dict[str, Any] | None = Field(default=None, description="biases are refused", json_schema_extra=_refused({}))
    presence_penalty: float | None = Field(default=None, description="penalties are refused", json_schema_extra=_refused(0))
    frequency_penalty: float | None = Field(default=None, description="penalties are refused", json_schema_extra=_refused(0))
    response_format: dict[str, Any] | None = Field(
        default=None, description="text; all else is refused", json_schema_extra=_refused({"type": "text"}, {})
    )
    ergo: ErgoOptions = Field(default=ErgoOptions(), description="what OpenAI's form has no place for")

    @property
    def limit(self) -> int | None:
        """Most tokens of the visible answer."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings at which the answer ends; special tokens among them end it anyway."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in given if stop and not stop.startswith("<|"))

    def refuse(self) -> None:
        """Refuse what would be silently wrong.

        Raises:
            RequestError: naming the field.
        """
        wrong = {
            "n": self.n not in (None, 1),
            "tools": bool(self.tools),
            "functions": bool(self.functions),
            "logprobs": bool(self.logprobs),
            "logit_bias": bool(self.logit_bias),
            "presence_penalty": bool(self.presence_penalty),
            "frequency_penalty": bool(self.frequency_penalty),
            "response_format": (self.response_format or {}).get("type", "text") != "text",
        }
        for name, asked in wrong.items():
            if asked:
                raise RequestError(f"{name} is not supported by this server", param=name)


# --- what is answered ---------------------------------------------------------------------------------------------------


class ChatPromptDetails(Shown):
    """Parts of the prompt tokens."""

    model_config = ConfigDict(json_schema_extra=only_if_asked("text_tokens", "audio_tokens"))

    cached_tokens: int = Field(ge=0, description="tokens found in the engine's prefix cache", examples=[105])
    image_tokens: int = Field(ge=0, description="visual tokens", examples=[140])
    text_tokens: int = Field(description="all others; not with `ergo-raw`", examples=[109])
    audio_tokens: Literal[0] = Field(description="none; not with `ergo-raw`")


class ChatCompletionDetails(Shown):
    """Parts of the completion tokens."""

    reasoning_tokens: int = Field(ge=0, description="tokens of all that is not the visible answer", examples=[43])


class ChatUsage(Shown):
    """Tokens, summed over both turns."""

    prompt_tokens: int = Field(ge=0, description="tokens of both conversations; the second repeats the first", examples=[249])
    completion_tokens: int = Field(ge=0, description="tokens of both replies", examples=[46])
    total_tokens: int = Field(ge=0, description="their sum", examples=[295])
    prompt_tokens_details: ChatPromptDetails = Field(description="parts of the prompt tokens")
    completion_tokens_details: ChatCompletionDetails = Field(description="parts of the completion tokens")


class ChatErgo(Shown):
    """How the answer was found."""

    regions: list[RegionInfo] = Field(min_length=1, max_length=1, description="where the model looked closer")
    visual_tokens: VisualTokensInfo = Field(description="what was spent on seeing")
    turns: list[TurnUsage] = Field(description="tokens turn by turn")
    timings: Timings = Field(description="where the time went")


class ChatAnswer(Shown):
    """The assistant's message."""

    model_config = ConfigDict(json_schema_extra=only_if_asked("reasoning", "reasoning_content"))

    role: Literal["assistant"] = Field(description="who says it")
    content: str = Field(
        description="the visible answer; for a multiple-choice question the bare letter of the choice", examples=["434"]
    )
    refusal: None = Field(description="always null", examples=[None])
    reasoning: str = Field(description="what the model thought, if it did; vLLM's name", examples=["It reads 434."])
    reasoning_content: str = Field(description="the same, by its older name", examples=["It reads 434."])


class ChatChoice(Shown):
    """The one answer."""

    index: Literal[0] = Field(description="there is one")
    message: ChatAnswer = Field(description="what is said")
    logprobs: None = Field(description="always null", examples=[None])
    finish_reason: Literal["stop", "length"] = Field(description="`length`: it was cut short by max_tokens", examples=["stop"])


class ChatCompletion(Shown):
    """A whole completion."""

    model_config = ConfigDict(json_schema_extra=only_if_asked("ergo"))

    id: str = Field(description="of the completion", examples=[f"chatcmpl-{REQUEST_ID}"])
    object: Literal["chat.completion"] = Field(description="what this is")
    created: int = Field(description="when: seconds since 1970 (Unix time)", examples=[1795455118])
    model: str = Field(description="who was asked", examples=["ergo"])
    choices: list[ChatChoice] = Field(min_length=1, max_length=1, description="the one answer")
    usage: ChatUsage = Field(description="tokens")
    system_fingerprint: None = Field(description="always null", examples=[None])
    service_tier: None = Field(description="always null", examples=[None])
    ergo: ChatErgo = Field(
        description="how the answer was found; not where the engine was asked as it is (`ergo-raw`, or no image)"
    )


class ChatDelta(Shown):
    """What a chunk adds to the message."""

    model_config = ConfigDict(json_schema_extra=only_if_asked("role", "content", "reasoning", "reasoning_content"))

    role: Literal["assistant"] = Field(description="who says it; in the first chunk only")
    content: str = Field(description="the next piece of the visible answer", examples=["43"])
    reasoning: str = Field(description="the next piece of what the model thought; vLLM's name", examples=["It "])
    reasoning_content: str = Field(description="the same, by its older name", examples=["It "])


class ChatChunkChoice(Shown):
    """The next piece of the one answer."""

    index: Literal[0] = Field(description="there is one")
    delta: ChatDelta = Field(description="what is added")
    logprobs: None = Field(description="always null", examples=[None])
    finish_reason: Literal["stop", "length"] | None = Field(description="null, but in the last piece", examples=["stop"])


class ChatChunk(Shown):
    """One chunk of a streamed completion."""

    model_config = ConfigDict(json_schema_extra=only_if_asked("usage", "ergo"))

    id: str = Field(description="of the completion, the same in all its chunks", examples=[f"chatcmpl-{REQUEST_ID}"])
    object: Literal["chat.completion.chunk"] = Field(description="what this is")
    created: int = Field(description="when: seconds since 1970 (Unix time)", examples=[1795455118])
    model: str = Field(description="who was asked", examples=["ergo"])
    choices: list[ChatChunkChoice] = Field(max_length=1, description="the next piece; empty in the chunk of the usage")
    usage: ChatUsage | None = Field(
        description="with `stream_options.include_usage`: tokens, in a last chunk of their own, before it null"
    )
    ergo: ChatErgo = Field(description="how the answer was found; with the last piece")


class ModelInfo(Shown):
    """One name that can be asked."""

    id: str = Field(description="the name", examples=["ergo"])
    object: Literal["model"] = Field(default="model", description="what this is")
    created: int = Field(description="when the server started: seconds since 1970 (Unix time)", examples=[1795455000])
    owned_by: Literal["ergo-vqa"] = Field(default="ergo-vqa", description="who serves it")


class ModelList(Shown):
    """All names that can be asked."""

    object: Literal["list"] = Field(default="list", description="what this is")
    data: list[ModelInfo] = Field(description="the names")
