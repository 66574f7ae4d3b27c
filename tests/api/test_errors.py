"""Errors: one envelope and a request id on every path, and never a mistake of ours for bad input."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from asking import client, data_url, error, picture, post_json, scripted, vqa
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from ergo_server.engine.base import Sampling
from ergo_server.engine.scripted import ScriptedEngine
from ergo_server.errors import EngineBusy
from ergo_server.protocol.conversation import Conversation

JSON_HEADERS = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def http() -> TestClient:
    """A server that answers every sound question."""
    return client(max_body_bytes=50_000)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("POST", "/v1/vqa/nowhere", 404, "not_found"),
        ("GET", "/static/nowhere.js", 404, "not_found"),
        ("GET", "/static/../../settings.py", 404, "not_found"),
        ("GET", "/v1/models/gpt-5", 404, "model_not_found"),
        ("GET", "/v1/vqa", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("BREW", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/static/nowhere.js", 405, "method_not_allowed"),
    ],
)
def test_paths_and_methods(http: TestClient, method: str, path: str, status: int, code: str) -> None:
    """A path or method that does not exist is answered with the envelope."""
    assert error(http.request(method, path))[:2] == (status, code)


def test_405_says_what_is_allowed(http: TestClient) -> None:
    """A wrong method is told the right ones."""
    assert http.get("/v1/vqa").headers["allow"] == "POST"
    assert http.post("/v1/models").headers["allow"] == "GET"


@pytest.mark.parametrize("path", ["/v1/vqa", "/v1/vqa/estimate", "/v1/chat/completions"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b"[" * 49_000, b"1" * 9000], ids=repr)
def test_bodies_that_are_no_json_object(http: TestClient, path: str, body: bytes) -> None:
    """Whatever is not a JSON object is refused as such."""
    assert error(http.post(path, content=body, headers=JSON_HEADERS)) == (400, "invalid_request", None)


@pytest.mark.parametrize("path", ["/v1/vqa", "/v1/vqa/estimate", "/v1/chat/completions", "/v1/models", "/"])
def test_any_path_limits_its_body(http: TestClient, path: str) -> None:
    """A body above the limit is refused on every path."""
    assert error(http.post(path, content=bytes(50_001))) == (413, "request_too_large", None)


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded", "application/xml"])
def test_content_types_that_are_not_read(http: TestClient, kind: str) -> None:
    """A content type that no route reads is refused with 415."""
    assert error(http.post("/v1/vqa", content=b"x", headers={"content-type": kind})) == (415, "unsupported_media_type", None)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=x", b"garbage"),
        ("multipart/form-data; boundary=x", b"--x\r\nfoo\r\n\r\nbar\r\n--x--"),
        (
            "multipart/form-data; boundary=x; charset=no-such",
            b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--x--',
        ),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + bytes(100)),
    ],
)
def test_broken_forms(http: TestClient, kind: str, body: bytes) -> None:
    """A form that cannot be read is the sender's fault."""
    assert error(http.post("/v1/vqa", content=body, headers={"content-type": kind}))[:2] == (400, "invalid_request")


def test_a_form_with_two_files(http: TestClient) -> None:
    """A form may hold one file."""
    files = [("image", ("a.png", picture())), ("image", ("b.png", picture()))]
    assert error(http.post("/v1/vqa", data={"question": "?"}, files=files))[:2] == (400, "invalid_request")


def test_an_image_that_cannot_be_used(http: TestClient) -> None:
    """An image that is none is answered with 422 and the envelope."""
    assert error(vqa(http, b"hello")) == (422, "image_unreadable", "image")


def test_validation_names_the_place(http: TestClient) -> None:
    """The first wrong field is named with its place, and its value is not repeated."""
    response = vqa(http, choices=["fine", {"secret": "secret"}])
    assert error(response) == (400, "invalid_request", "choices.1")
    assert "secret" not in response.text


def test_a_long_field_name_is_cut_short(http: TestClient) -> None:
    """An unknown field's name is not sent back at any length."""
    response = vqa(http, **{"k" * 40_000: 1})
    assert error(response)[0] == 400
    assert len(response.text) < 500


def test_retry_after(http: TestClient) -> None:
    """An engine that is busy is a 503 that says when to come back."""
    response = vqa(client(scripted(zoom=EngineBusy("full", retry_after=7))))
    assert error(response) == (503, "engine_busy", None)
    assert response.headers["retry-after"] == "7"


# --- what nobody foresaw ------------------------------------------------------------------------------------------------


def broken() -> ScriptedEngine:
    """Return an engine with a mistake in it."""

    def script(conversation: Conversation, sampling: Sampling) -> str:
        raise RuntimeError("the secret question")

    return ScriptedEngine(script)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/vqa", "/v1/chat/completions"])
def test_an_unforeseen_exception(path: str, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A mistake of ours is a 500 in the same envelope; its text is neither answered nor logged, its id and place are logged."""
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": data_url(picture())}, "?"]}]
    body = {"messages": messages} if "chat" in path else {"image": data_url(picture()), "question": "?"}
    with caplog.at_level(logging.INFO):
        response = post_json(client(broken()), path, {**body, "stream": stream})
    assert error(response) == (500, "internal_error", None)
    assert "secret" not in response.text + caplog.text
    assert response.headers["x-request-id"] in caplog.text
    assert "test_errors.py" in caplog.text


# --- the request's id ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/models", "/nowhere", "/healthz", "/metrics", "/", "/static/nowhere", "/docs"])
def test_every_response_has_a_request_id(http: TestClient, path: str) -> None:
    """Every path answers with an id, another each time."""
    ids = {http.get(path).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2


@pytest.mark.parametrize("given_id", ["a", "A-1._z", "x" * 128])
def test_a_sound_request_id_is_kept(http: TestClient, given_id: str) -> None:
    """The caller's own id is used where its form is harmless."""
    for path in ("/v1/models", "/nowhere"):
        assert http.get(path, headers={"x-request-id": given_id}).headers["x-request-id"] == given_id


@pytest.mark.parametrize("given_id", [b"", b"x" * 129, b"a b", b"a\tb", "é".encode(), b"{}", b"a/b"])
def test_an_unsound_request_id_is_replaced(http: TestClient, given_id: bytes) -> None:
    """An id that could break a log or a header is replaced."""
    answered = http.get("/v1/models", headers={b"x-request-id": given_id}).headers["x-request-id"]
    assert len(answered) == 32
    assert answered.isalnum()


# --- properties ---------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(), max_size=20)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8
)

VQA: dict[str, Any] = {"image": data_url(picture(60, 60)), "question": "?"}
VQA_FIELDS = "image question choices instructions model max_visual_tokens max_tokens temperature top_p seed zoom stream include"
PART = {"type": "image_url", "image_url": {"url": data_url(picture(60, 60))}}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": [PART, {"type": "text", "text": "?"}]}]}
CHAT_FIELDS = (
    "model messages stream stream_options max_tokens max_completion_tokens temperature top_p seed stop n tools functions "
    "logprobs logit_bias presence_penalty frequency_penalty response_format ergo"
)
PARTS = st.sampled_from(["text", "image_url", "input_audio"]).flatmap(
    lambda kind: st.fixed_dictionaries({"type": st.just(kind), kind: VALUES})
)
quick = settings(max_examples=80, deadline=None)


def sound(http: TestClient, path: str, body: object) -> None:
    """Hold a response to the rules: answered, or refused with the envelope."""
    response = post_json(http, path, body)
    assert response.status_code == 200 or 400 <= error(response)[0] < 500


@quick
@given(path=st.sampled_from(["/v1/vqa", "/v1/vqa/estimate", "/v1/chat/completions"]), body=VALUES)
def test_any_json_is_no_mistake_of_ours(http: TestClient, path: str, body: object) -> None:
    """No JSON body at all makes the server fail."""
    sound(http, path, body)


@quick
@given(name=st.sampled_from(VQA_FIELDS.split()), value=VALUES)
def test_any_value_of_a_vqa_field_is_no_mistake_of_ours(http: TestClient, name: str, value: object) -> None:
    """No value of one field makes the server fail."""
    sound(http, "/v1/vqa", {**VQA, name: value})


@quick
@given(name=st.sampled_from(CHAT_FIELDS.split()), value=VALUES)
def test_any_value_of_a_chat_field_is_no_mistake_of_ours(http: TestClient, name: str, value: object) -> None:
    """No value of one field of a chat completion makes the server fail."""
    sound(http, "/v1/chat/completions", {**CHAT, name: value})


@quick
@given(
    role=st.sampled_from(["user", "system", "assistant"]) | VALUES,
    part=PARTS | VALUES,
    model=st.sampled_from(["ergo", "ergo-single", "ergo-raw"]),
)
def test_any_message_is_no_mistake_of_ours(http: TestClient, role: object, part: object, model: str) -> None:
    """No role and no content part makes the server fail, before or after an image."""
    earlier = {"role": role, "content": [part]}
    sound(http, "/v1/chat/completions", {"model": model, "messages": [earlier, *CHAT["messages"]]})
    sound(http, "/v1/chat/completions", {"model": model, "messages": [*CHAT["messages"], earlier]})
