"""``/v1/chat/completions`` and ``/v1/models``: the wire form that OpenAI's clients and the evaluation harnesses rely on."""

from __future__ import annotations

from typing import Any

import asking
import pytest
from asking import chat, chunks, client, data_url, error, events, picture, says, scripted

from ergo_server.engine.scripted import ScriptedEngine
from ergo_server.errors import EngineFailed

OLD, NEW = picture(400, 400, red=True), picture()
"""Views of 7 x 7 and 8 x 6 visual tokens at ergo-mini's budget."""


def content(body: Any) -> str:
    """Return the text of a completion."""
    found: str = body["choices"][0]["message"]["content"]
    return found


def lettered(answer: str = "B") -> ScriptedEngine:
    """Return an engine that answers with a choice in some form."""
    return scripted(answer=f"<think>Azure.</think><answer>{answer}</answer>")


# --- not streaming ------------------------------------------------------------------------------------------------------


def test_the_shape_of_a_completion() -> None:
    """A completion has every key that a client was seen to need, and the extra ``ergo`` object."""
    body = chat(client()).json()
    top = "id object created model choices usage system_fingerprint service_tier ergo"
    assert set(body) == set(top.split())
    assert (body["object"], body["model"]) == ("chat.completion", "ergo")
    assert body["id"].startswith("chatcmpl-")
    message = {
        "role": "assistant",
        "content": "seven",
        "refusal": None,
        "reasoning": "It is a seven.",
        "reasoning_content": "It is a seven.",
    }
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert set(body["ergo"]) == {"regions", "visual_tokens", "turns", "timings"}


def test_the_usage_of_a_completion() -> None:
    """Usage sums up both turns, and its details never exceed their totals."""
    body = chat(client()).json()
    usage, turns = body["usage"], body["ergo"]["turns"]
    assert set(usage["prompt_tokens_details"]) == {"cached_tokens", "image_tokens", "text_tokens", "audio_tokens"}
    assert usage["prompt_tokens"] == sum(turn["prompt_tokens"] for turn in turns)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    details = usage["prompt_tokens_details"]
    assert details["image_tokens"] + details["text_tokens"] == usage["prompt_tokens"]
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]


def test_ergo_includes_the_crop_when_asked() -> None:
    """The extra object carries the crop's pixels on request."""
    plain, full = (chat(client(), ergo={"include": include}).json()["ergo"]["regions"][0] for include in ([], ["crop"]))
    assert plain["crop"]["data"] is None
    assert full["crop"]["data"].startswith("data:image/png;base64,")


def test_ergo_options() -> None:
    """Budget and zoom mode can be chosen as on /v1/vqa, within the same bounds."""
    http = client()
    assert chat(http, ergo={"max_visual_tokens": 16}).json()["ergo"]["visual_tokens"]["overview"] <= 16
    assert chat(http, ergo={"zoom": "never"}).json()["ergo"]["regions"][0]["outcome"] == "skipped"
    assert error(chat(http, ergo={"max_visual_tokens": 50}))[:2] == (400, "invalid_request")


# --- streaming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["ergo", "ergo-single", "ergo-raw"])
def test_the_shape_of_chunks(model: str) -> None:
    """One id and time throughout, the role in the first chunk with its first token, the reason in the last, no usage unasked."""
    found = chunks(chat(client(), model=model, stream=True).text)
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in found}) == 1
    assert found[0]["object"] == "chat.completion.chunk"
    deltas = [chunk["choices"][0]["delta"] for chunk in found]
    assert deltas[0]["role"] == "assistant"
    assert deltas[0].get("reasoning") or deltas[0].get("content")
    assert not [delta for delta in deltas[1:] if "role" in delta]
    assert [chunk["choices"][0]["finish_reason"] for chunk in found] == [None] * (len(found) - 1) + ["stop"]
    assert not [chunk for chunk in found if "usage" in chunk]


@pytest.mark.parametrize("model", ["ergo", "ergo-raw"])
def test_usage_in_a_chunk_of_its_own(model: str) -> None:
    """Usage comes when asked for, in a last chunk without choices, and is what the same request says without streaming."""
    http = client()
    options = {"include_usage": True, "continuous_usage_stats": True}
    *body, last = chunks(chat(http, model=model, stream=True, stream_options=options).text)
    assert last["choices"] == []
    assert last["usage"] == chat(http, model=model).json()["usage"]
    assert [chunk["usage"] for chunk in body] == [None] * len(body)


def test_the_deltas_are_the_completion() -> None:
    """Content and reasoning, joined, are those of the same request without streaming."""
    http = client(scripted(answer=f"<think>{'because ' * 9}</think><answer>{'word ' * 9}</answer>"))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks(chat(http, stream=True).text)]
    message = chat(http).json()["choices"][0]["message"]
    for key in ("content", "reasoning", "reasoning_content"):
        assert "".join(delta.get(key, "") for delta in deltas) == message[key]


def test_an_empty_answer_still_has_a_content_chunk() -> None:
    """A reply of nothing gives a chunk with a role and empty content, which benchmarks wait for."""
    found = chunks(chat(client(scripted(answer="")), stream=True).text)
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_an_error_amid_a_stream() -> None:
    """An error after the first chunk is a last event in the one form, and [DONE] ends the stream all the same."""
    engine = scripted()
    http = client(engine, turn_seconds=1)
    engine.script = lambda conversation, sampling: asking.ZOOM if "</zoom>" in sampling.stop else _slowly(engine)
    found = events(chat(http, stream=True).text)
    assert found[0][1]["choices"][0]["delta"]["reasoning"]
    assert found[-2][1]["error"]["code"] == "engine_timeout"
    assert found[-1][1] == "[DONE]"


def _slowly(engine: ScriptedEngine) -> str:
    engine.seconds_per_token = 0.02
    return f"<think>{'because ' * 999}"


def test_an_error_before_the_first_token_has_its_status() -> None:
    """A stream that fails in either turn before its first token is answered with a status."""
    assert error(chat(client(scripted(zoom=EngineFailed("x"))), stream=True))[0] == 502
    assert error(chat(client(scripted(answer=EngineFailed("x"))), stream=True))[0] == 502


# --- multiple choice ----------------------------------------------------------------------------------------------------

LAYOUTS = {
    "V*, lmms-eval": (
        "What colour?\nA. scarlet\nB. azure\nAnswer with the option's letter from the given choices directly."
        "\nAnswer with the option's letter from the given choices directly."
    ),
    "V*, official": "What colour?\n(A) scarlet\n(B) azure\nAnswer with the option's letter from the given choices directly.",
    "V*, VLMEvalKit": (
        "Question: What colour?\nOptions:\nA. scarlet\nB. azure\nPlease select the correct answer from the options above. \n"
    ),
    "HR-Bench, lmms-eval": "What colour?\nA. scarlet\nB. azure\nAnswer the option letter directly.",
    "ERGO": "What colour?\nA:scarlet\nB:azure",
    "MME-RealWorld": (
        "What colour? The choices are listed below:\n(A) scarlet\n(B) azure\n(C) This image doesn't feature the colour.\n"
        "Select the best answer to the above multiple-choice question based on the image. The best answer is:"
    ),
    "TreeBench": "Question: What colour?\nOptions:\nA. scarlet\nB. azure\nAnswer with the correct option's letter directly. \n",
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("text", LAYOUTS.values(), ids=LAYOUTS)
def test_multiple_choice_is_answered_with_the_bare_letter(text: str, stream: bool) -> None:
    """In every harness's layout the choices are kept from the zoom turn, and the content is the letter alone."""
    engine = lettered("azure")
    response = chat(client(engine), says(NEW, text), stream=stream)
    if stream:
        letter = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks(response.text))
    else:
        letter = content(response.json())
    assert letter == "B"
    first, second = (asking.texts(conversation) for conversation, _, _ in engine.calls)
    assert "What colour?" in first
    assert "azure" not in first
    assert "(B) azure" in second


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B.", "**B**", "B. azure", "azure", "The answer is B"])
def test_any_way_to_name_the_choice_becomes_the_letter(answer: str) -> None:
    """However the model names the choice, the content is its letter."""
    assert content(chat(client(lettered(answer)), says(NEW, LAYOUTS["V*, official"])).json()) == "B"


def test_an_answer_that_is_no_choice_stays_as_it_is() -> None:
    """An answer that means none of the choices is passed on, not replaced."""
    assert content(chat(client(lettered("mauve")), says(NEW, LAYOUTS["V*, official"])).json()) == "mauve"


def test_text_before_or_after_the_image() -> None:
    """The question is found on either side of its image, as harnesses send both."""
    for parts in ((NEW, LAYOUTS["ERGO"]), (LAYOUTS["ERGO"], NEW)):
        assert content(chat(client(lettered()), says(*parts)).json()) == "B"


# --- conversations ------------------------------------------------------------------------------------------------------


def test_a_follow_up_question_about_an_earlier_image() -> None:
    """A question without an image is about the newest one before it; what was said since is kept."""
    engine = scripted()
    body = chat(client(engine), says(NEW, "First?"), says("It is one.", role="assistant"), says("And then?")).json()
    assert body["ergo"]["regions"][0]["outcome"] == "zoomed"
    first = engine.calls[0][0]
    assert [message.role for message in first.messages] == ["system", "user", "assistant", "user"]
    assert first.messages[1].parts == ("First?",)
    assert first.messages[2].parts == ("It is one.",)
    assert "And then?" in asking.texts(first)
    assert asking.sizes(first) == [(224, 168)]


def test_the_newest_image_is_the_target_and_others_ride_along() -> None:
    """Of several images the newest is zoomed into; the others are shown within the budget, and counted as extra."""
    engine = scripted()
    body = chat(client(engine), says(OLD, "One."), says("Yes.", role="assistant"), says(OLD, NEW, "Two?")).json()
    assert asking.sizes(engine.calls[0][0]) == [(196, 196), (196, 196), (224, 168)]
    assert asking.sizes(engine.calls[1][0])[:3] == [(196, 196), (196, 196), (224, 168)]
    tokens = body["ergo"]["visual_tokens"]
    assert (tokens["extra"], tokens["overview"]) == (2 * 49, 48)
    assert tokens["baseline"] == 2 * 14 * 14 + 29 * 21
    assert body["ergo"]["regions"][0]["box"] == [35, 71, 215, 215]  # in pixels of the newest


def test_the_clients_system_message_is_kept() -> None:
    """A client's system message joins the policy's own, in one message at the head."""
    engine = scripted()
    chat(client(engine), says("Answer in French.", role="system"), says(NEW, "Quoi?"))
    system, *rest = engine.calls[0][0].messages
    assert system.parts == ("Look closely.\n\nAnswer in French.",)
    assert "system" not in [message.role for message in rest]


@pytest.mark.parametrize("model", ["ergo", "ergo-raw"])
def test_special_tokens_in_a_message_are_harmless(model: str) -> None:
    """No text of a client can spell one of the model's own tokens, not even across parts."""
    engine = scripted()
    given = (says("<|im_end|>", role="system"), says(NEW, "Is <|image_pad|> or <", "|im_start|> there?"))
    chat(client(engine), *given, model=model)
    for message in engine.calls[0][0].messages:
        assert "<|" not in "".join(part for part in message.parts if isinstance(part, str))


def test_a_text_only_request_is_answered_by_the_engine() -> None:
    """Without any image the engine answers, in one turn, with the words as they are."""
    engine = scripted(answer="Hello!")
    body = chat(client(engine), {"role": "user", "content": "hello"}).json()
    assert content(body) == "Hello!"
    assert [(m.role, m.parts) for m in engine.calls[0][0].messages] == [("user", ("hello",))]
    assert len(engine.calls) == 1


def test_ergo_single_answers_in_one_turn() -> None:
    """The name ``ergo-single`` answers from the overview alone."""
    engine = scripted()
    body = chat(client(engine), model="ergo-single").json()
    assert (body["model"], len(engine.calls)) == ("ergo-single", 1)
    assert body["ergo"]["regions"][0]["outcome"] == "skipped"


# --- the engine as it is ------------------------------------------------------------------------------------------------


def test_ergo_raw_passes_a_conversation_through() -> None:
    """Roles, texts and the very bytes of every image reach the engine; its reply comes back as it is."""
    engine = scripted()
    photo = picture(form="JPEG")
    given = (says("Be exact.", role="system"), says(NEW, "Where?"), says(asking.ZOOM, role="assistant"), says(photo, "So?"))
    body = chat(client(engine), *given, model="ergo-raw").json()
    (conversation, sampling, _), *more = engine.calls
    assert not more
    assert [message.role for message in conversation.messages] == ["system", "user", "assistant", "user"]
    assert asking.texts(conversation).split("\n") == ["Be exact.", "Where?", asking.ZOOM, "So?"]
    assert [(view.data, view.format) for view in conversation.views] == [(NEW, "png"), (photo, "jpeg")]
    assert (content(body), sampling.stop) == (asking.ANSWER, ())


def test_ergo_raw_sampling() -> None:
    """The bound on tokens is the client's here, clamped; stop strings and the rest reach the engine, but for special tokens."""
    engine = scripted()
    chat(client(engine), model="ergo-raw", max_tokens=32_768, stop=["</zoom>", "<|im_end|>"], temperature=0.5, seed=42)
    sampling = engine.calls[0][1]
    assert (sampling.max_tokens, sampling.stop, sampling.temperature, sampling.seed) == (8192, ("</zoom>",), 0.5, 42)


def test_ergo_raw_says_when_it_was_cut() -> None:
    """A reply that ends at the client's bound has the finish reason ``length``."""
    body = chat(client(), model="ergo-raw", max_tokens=2).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 2


def test_ergo_raw_refuses_an_unusable_image() -> None:
    """Images that are passed through are checked by their headers first."""
    assert error(chat(client(), says(b"hello", "?"), model="ergo-raw")) == (422, "image_unreadable", "image")


# --- fields -------------------------------------------------------------------------------------------------------------

IGNORED: dict[str, Any] = {
    "reasoning_effort": "low",
    "parallel_tool_calls": True,
    "ignore_eos": True,
    "n": 1,
    "user": "me",
    "store": False,
    "tools": [],
    "logprobs": False,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "stream_options": None,
    "stop": None,
    "temperature": None,
}


@pytest.mark.parametrize("name", IGNORED)
def test_fields_without_effect_are_ignored(name: str) -> None:
    """Fields that are unknown, or known and at their default, do not stop a request."""
    assert chat(client(), **{name: IGNORED[name]}).status_code == 200


REFUSED: dict[str, Any] = {
    "n": 2,
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "functions": [{"name": "f"}],
    "logprobs": True,
    "logit_bias": {"1": 5},
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "response_format": {"type": "json_object"},
    "temperature": 3,
    "top_p": 0,
    "max_tokens": 0,
}


@pytest.mark.parametrize("model", ["ergo", "ergo-raw"])
@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_would_be_silently_wrong_are_refused(name: str, model: str) -> None:
    """What the server does not do is refused by name, whichever model is asked."""
    engine = scripted()
    assert error(chat(client(engine), model=model, **{name: REFUSED[name]})) == (400, "invalid_request", name)
    assert not engine.calls


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("limit", [16, 32_768])
def test_the_clients_limit_does_not_cut_the_hidden_turns(name: str, limit: int) -> None:
    """lmms-eval's 16 and VLMEvalKit's 32768 bound the visible answer only."""
    engine = scripted(answer=f"<think>{'because ' * 99}</think><answer>seven</answer>")
    body = chat(client(engine), **{name: limit}).json()
    assert (content(body), body["choices"][0]["finish_reason"]) == ("seven", "stop")
    assert [sampling.max_tokens for _, sampling, _ in engine.calls] == [1024, 1024]


def test_the_clients_limit_cuts_the_answer() -> None:
    """A visible answer beyond the limit is cut, and the finish reason says so."""
    body = chat(client(scripted(answer=f"<answer>{'word ' * 99}</answer>")), max_tokens=16).json()
    assert 0 < len(content(body)) <= 64
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stop", ["two", ["two", "three"], ["</none>", "two"]])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(stop: str | list[str], stream: bool) -> None:
    """The content ends before the first stop string, streamed or not; the thinking and the policy's own stops are unaffected."""
    engine = scripted(answer="<think>two</think><answer>one two three</answer>")
    response = chat(client(engine), stop=stop, stream=stream)
    if stream:
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks(response.text))
    else:
        text = content(response.json())
    assert text == "one "
    assert [sampling.stop for _, sampling, _ in engine.calls] == [("</zoom>",), ("</answer>",)]


# --- images -------------------------------------------------------------------------------------------------------------


def pointing(url: object) -> dict[str, Any]:
    """Return a question about an image at a URL."""
    return {"role": "user", "content": [{"type": "image_url", "image_url": url}, {"type": "text", "text": "?"}]}


@pytest.mark.parametrize(
    "url",
    [{"url": data_url(NEW, "jpeg")}, {"url": data_url(NEW, "PNG"), "detail": "low"}, data_url(NEW), {"url": data_url(NEW, "x")}],
)
def test_the_type_of_an_image_is_found_from_its_bytes(url: object) -> None:
    """A PNG labelled image/jpeg is read as what it is; ``detail`` is ignored; a bare string is taken."""
    assert chat(client(), pointing(url)).status_code == 200


@pytest.mark.parametrize("url", ["http://127.0.0.1/a.png", "https://example.com/a.png", "HTTPS://example.com/a.png"])
def test_a_remote_image_is_refused(url: str) -> None:
    """The address of an image is refused with the envelope: this server fetches none."""
    assert error(chat(client(), pointing({"url": url}))) == (422, "image_fetch_blocked", "image")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "", "img", None, 5, {}, {"url": None}, "data:image/png,AAAA"])
def test_other_images_are_refused(url: object) -> None:
    """Whatever names no image is refused, naming the field."""
    status, _, param = error(chat(client(), pointing(url)))
    assert status in (400, 422)
    assert param == "image"


MESSAGES: dict[str, tuple[list[Any], str]] = {
    "none": ([], "messages"),
    "not a list": (["hello"], "messages.0"),
    "a tool's": ([{"role": "tool", "content": "x"}, says(NEW, "?")], "messages.0.role"),
    "no role": ([{"content": "x"}], "messages.0.role"),
    "the assistant's last": ([says(NEW, "?"), says("x", role="assistant")], "messages"),
    "no question": ([says(NEW)], "messages"),
    "a sound": ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages.0.content.0"),
    "a number": ([{"role": "user", "content": 5}], "messages.0.content"),
    "an image of the assistant": ([says(NEW, role="assistant"), says("?")], "messages"),
    "too many images": ([says(*[NEW] * 9, "?")], "messages"),
    "not Unicode": ([says(NEW, "\udc00?")], "messages.0.content.1"),
    "too much text": ([says(NEW, "x" * 300_000)], "messages"),
}


@pytest.mark.parametrize(("messages", "param"), MESSAGES.values(), ids=MESSAGES)
def test_messages_that_cannot_be_used(messages: list[Any], param: str) -> None:
    """A conversation that cannot be answered is refused, naming the place."""
    response = asking.post_json(client(), "/v1/chat/completions", {"model": "ergo", "messages": messages})
    assert error(response) == (400, "invalid_request", param)


# --- models -------------------------------------------------------------------------------------------------------------


def test_models() -> None:
    """The list names the three models in OpenAI's form."""
    body = client().get("/v1/models").json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == ["ergo", "ergo-single", "ergo-raw"]
    assert {frozenset(model) for model in body["data"]} == {frozenset({"id", "object", "created", "owned_by"})}


def test_one_model() -> None:
    """Each model of the list can be asked for, and is the same there."""
    http = client()
    for model in http.get("/v1/models").json()["data"]:
        assert http.get(f"/v1/models/{model['id']}").json() == model


def test_an_unknown_model() -> None:
    """An unknown model is a 404 with the code that SDKs know, in both places."""
    http = client()
    assert error(http.get("/v1/models/gpt-5")) == (404, "model_not_found", "model")
    assert error(chat(http, model="gpt-5")) == (404, "model_not_found", "model")
