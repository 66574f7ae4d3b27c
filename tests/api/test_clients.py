"""Real clients against the real gateway, on both real engines: the openai SDK and LangChain, as their users would write it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import support
from asking import data_url
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from openai.types.chat import ChatCompletion

SCENE = support.held_out(0)
PHOTO = data_url(support.encode(SCENE), "jpeg")
MESSAGES: Any = [
    {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": PHOTO}}, {"type": "text", "text": SCENE.question}],
    }
]

# As the engine is given it, unshrunk, the scene's full size would not fit ergo-mini's context.
SMALL_SCENE = support.held_out(0, size=(400, 400))
SMALL_PHOTO = data_url(support.encode(SMALL_SCENE), "jpeg")
SMALL_PARTS = [{"type": "image_url", "image_url": {"url": SMALL_PHOTO}}, {"type": "text", "text": SMALL_SCENE.question}]
SMALL: Any = [{"role": "user", "content": SMALL_PARTS}]


@pytest.fixture
def sdk(real: str) -> Iterator[openai.OpenAI]:
    """The openai SDK, told nothing but the base URL."""
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=f"{real}/v1", api_key="none", http_client=http, max_retries=0) as client:
        yield client


@pytest.fixture
def langchain(real: str) -> Iterator[ChatOpenAI]:
    """LangChain's chat model, told nothing but the base URL."""
    with openai.DefaultHttpxClient(trust_env=False) as http:
        yield ChatOpenAI(
            model="ergo", base_url=f"{real}/v1", api_key=lambda: "none", http_client=http, max_retries=0, stream_usage=True
        )


def ask(sdk: openai.OpenAI, **more: Any) -> ChatCompletion:
    """Ask about the scene."""
    found = sdk.chat.completions.create(**{"model": "ergo", "messages": MESSAGES, **more})
    assert isinstance(found, ChatCompletion)
    return found


# --- the openai SDK -----------------------------------------------------------------------------------------------------


def test_the_sdk_reads_the_code(sdk: openai.OpenAI) -> None:
    """A user of the openai SDK is told a code that only zooming can read."""
    assert ask(sdk).choices[0].message.content == SCENE.answer


def test_the_sdk_understands_a_completion(sdk: openai.OpenAI) -> None:
    """Text, finish reason and usage arrive in the SDK's own types."""
    found = ask(sdk)
    assert found.choices[0].message.content
    assert found.choices[0].finish_reason == "stop"
    assert found.usage is not None
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.usage.prompt_tokens_details is not None
    assert (found.usage.prompt_tokens_details.cached_tokens or 0) > 0  # the answer turn's, of the zoom turn's prefix
    assert found._request_id


def test_the_sdk_keeps_the_extra_object(sdk: openai.OpenAI) -> None:
    """What OpenAI's form has no place for is readable through ``model_extra``, and counted by the engine itself."""
    extra = (ask(sdk).model_extra or {})["ergo"]
    assert [turn["turn"] for turn in extra["turns"]] == ["zoom", "answer"]
    assert extra["visual_tokens"]["source"] == "engine"
    assert extra["visual_tokens"]["overview"] == 49
    assert extra["regions"][0]["outcome"] in ("zoomed", "clamped")


def test_extra_body_reaches_the_server(sdk: openai.OpenAI) -> None:
    """Options of ours travel in the SDK's ``extra_body``."""
    extra = ask(sdk, extra_body={"ergo": {"zoom": "never"}}).model_extra or {}
    assert extra["ergo"]["regions"][0]["outcome"] == "skipped"


def test_the_sdk_streams(sdk: openai.OpenAI) -> None:
    """Streamed pieces are the completion, and usage comes last, in a chunk without choices."""
    stream = sdk.chat.completions.create(model="ergo", messages=MESSAGES, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ask(sdk).choices[0].message.content
    assert [chunk.choices == [] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage is not None
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_the_stream_helper(sdk: openai.OpenAI) -> None:
    """The SDK's helper, which checks more than the plain stream, assembles the same completion."""
    with sdk.chat.completions.stream(model="ergo", messages=MESSAGES) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.done" in kinds
    assert final.choices[0].message.content == ask(sdk).choices[0].message.content


def test_multiple_choice_through_the_sdk(sdk: openai.OpenAI) -> None:
    """A question that lists the codes of the scene's landmarks is answered with the letter of the right one."""
    codes = sorted(mark.code for mark in SCENE.landmarks)
    listed = "\n".join(f"{letter}. {code}" for letter, code in zip("ABCDE", codes, strict=False))
    text = f"{SCENE.question}\n{listed}\nAnswer with the letter."
    content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": PHOTO}}]
    found = ask(sdk, messages=[{"role": "user", "content": content}], max_tokens=16).choices[0].message.content
    assert found == "ABCDE"[codes.index(SCENE.answer)]


def test_models_through_the_sdk(sdk: openai.OpenAI) -> None:
    """The SDK lists the models and retrieves each."""
    names = [model.id for model in sdk.models.list()]
    assert names == ["ergo", "ergo-single", "ergo-raw"]
    assert [sdk.models.retrieve(name).id for name in names] == names


def test_every_model_answers(sdk: openai.OpenAI) -> None:
    """Each model of the list can be asked by its name, and says something."""
    for name, messages in (("ergo", MESSAGES), ("ergo-single", MESSAGES), ("ergo-raw", SMALL)):
        found = ask(sdk, model=name, messages=messages)
        assert found.model == name
        assert found.choices[0].message.content


def test_the_two_turns_driven_from_outside(sdk: openai.OpenAI) -> None:
    """Through ``ergo-raw`` an evaluator can put the policy's own first question, and gets the model's own reply."""
    content = [
        {"type": "image_url", "image_url": {"url": data_url(support.look(support.encode(SCENE)).data)}},
        {"type": "text", "text": f"{SCENE.question}\nWhere?"},
    ]
    messages = [{"role": "system", "content": "Look closely."}, {"role": "user", "content": content}]
    reply = ask(sdk, model="ergo-raw", messages=messages, stop=["</zoom>"]).choices[0].message.content
    assert reply is not None
    assert "<zoom>[" in reply


ERRORS: dict[str, tuple[dict[str, Any], type[openai.APIStatusError], str, str | None]] = {
    "an unknown model": ({"model": "gpt-5"}, openai.NotFoundError, "model_not_found", "model"),
    "two answers": ({"n": 2}, openai.BadRequestError, "invalid_request", "n"),
    "no messages": ({"messages": []}, openai.BadRequestError, "invalid_request", "messages"),
    "not an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(b"x")}}, "?"]}]},
        openai.UnprocessableEntityError,
        "image_unreadable",
        "image",
    ),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("fields", "kind", "code", "param"), ERRORS.values(), ids=ERRORS)
def test_errors_are_the_sdks_own(
    sdk: openai.OpenAI, fields: dict[str, Any], kind: type[openai.APIStatusError], code: str, param: str | None, stream: bool
) -> None:
    """A refusal is raised as the SDK's class for it, with code, param, message and the request's id."""
    with pytest.raises(kind) as caught:
        sdk.chat.completions.create(**{"model": "ergo", "messages": MESSAGES, "stream": stream, **fields})
    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.request_id
    assert caught.value.type
    assert len(caught.value.message) > 10


def test_the_async_sdk(real: str) -> None:
    """The asynchronous SDK asks, streams and fails in the same way."""

    async def use() -> None:
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(base_url=f"{real}/v1", api_key="none", http_client=http, max_retries=0) as sdk:
            whole = await sdk.chat.completions.create(model="ergo", messages=MESSAGES)
            stream = await sdk.chat.completions.create(model="ergo", messages=MESSAGES, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(pieces) == whole.choices[0].message.content
            with pytest.raises(openai.NotFoundError):
                await sdk.models.retrieve("gpt-5")

    asyncio.run(use())


# --- LangChain ----------------------------------------------------------------------------------------------------------

HUMAN = HumanMessage(MESSAGES[0]["content"])


def test_langchain_reads_the_code(langchain: ChatOpenAI) -> None:
    """A user of LangChain is told a code that only zooming can read."""
    assert langchain.invoke([HUMAN]).content == SCENE.answer


def test_langchain_understands_a_completion(langchain: ChatOpenAI) -> None:
    """LangChain's message has the text, the finish reason and the usage."""
    message = langchain.invoke([HUMAN])
    assert message.content
    assert message.response_metadata["finish_reason"] == "stop"
    assert message.usage_metadata is not None
    assert message.usage_metadata["total_tokens"] > message.usage_metadata["output_tokens"] > 0


def test_langchain_streams(langchain: ChatOpenAI) -> None:
    """LangChain's chunks add up to the message, usage included."""
    first, *rest = langchain.stream([HUMAN])
    whole = first
    for chunk in rest:
        whole = whole + chunk
    message = langchain.invoke([HUMAN])
    assert whole.content == message.content
    assert whole.usage_metadata is not None
    assert message.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == message.usage_metadata["output_tokens"]


def test_langchains_own_image_block(langchain: ChatOpenAI) -> None:
    """LangChain's provider-neutral image block arrives as an image."""
    block = {"type": "image", "base64": PHOTO.partition(",")[2], "mime_type": "image/jpeg"}
    message = langchain.invoke([HumanMessage([block, {"type": "text", "text": SCENE.question}])])
    assert message.content == langchain.invoke([HUMAN]).content


def test_langchain_errors(langchain: ChatOpenAI) -> None:
    """A refusal arrives as the SDK's exception that LangChain's users catch."""
    with pytest.raises(openai.BadRequestError) as caught:
        langchain.invoke([HUMAN], n=2)
    assert caught.value.param == "n"
