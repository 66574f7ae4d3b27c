"""ergo_client against the real gateway."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import support
from asking import picture
from backend import Blocking
from PIL import Image

from ergo_client import (
    Answer,
    AnswerDelta,
    Client,
    ClientError,
    Done,
    ImageExpired,
    InvalidImage,
    InvalidRequest,
    NotAllowed,
    OverviewMade,
    ReasoningDelta,
    RegionFound,
    UnexpectedResponse,
    Unreachable,
)

SCENE = support.held_out(0)
PHOTO = support.encode(SCENE)


@pytest.fixture(params=[Client, Blocking])
def client(embedded: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Each of the two clients of the gateway with the embedded engine."""
    with request.param(embedded) as connected:
        yield connected


@pytest.fixture(scope="module")
def answer(embedded: str) -> Answer:
    """An answer with everything that can be included."""
    with Client(embedded) as connected:
        return connected.ask(PHOTO, SCENE.question, include=["overview", "crop", "reasoning", "replies", "rewards"])


def test_the_client_reads_the_code(real: str) -> None:
    """A user of the Python client is told a code that only zooming can read, whichever engine answers."""
    with Client(real) as connected:
        assert connected.ask(PHOTO, SCENE.question).text == SCENE.answer


def test_both_clients_read_the_code(client: Any) -> None:
    """The asynchronous client gets the same answer as the other."""
    assert client.ask(PHOTO, SCENE.question).text == SCENE.answer


def test_an_answer_says_how_it_was_found(answer: Answer) -> None:
    """The answer carries the region in pixels of the image, what was spent, and everything else that the response says."""
    x1, y1, x2, y2 = answer.region.box
    assert 0 <= x1 < x2 <= answer.image.width == SCENE.image.width
    assert 0 <= y1 < y2 <= answer.image.height == SCENE.image.height
    assert answer.region.zoomed
    assert answer.visual_tokens.total == answer.visual_tokens.overview + answer.visual_tokens.crop
    assert answer.visual_tokens.saved_ratio > 0.9
    assert answer.raw["answer"] == answer.text
    assert answer.replies is not None
    assert len(answer.replies) == len(answer.usage.turns) == 2
    assert answer.reasoning
    assert answer.reasoning in answer.replies[1]
    assert answer.timings.total_ms > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert (answer.model, answer.finish_reason, answer.choice) == ("ergo", "stop", None)


def test_every_field_of_the_response_is_in_the_answer(answer: Answer) -> None:
    """Nothing of the wire form is lost on the way: each of its fields is an attribute, nested ones included."""
    raw = answer.raw
    assert set(raw) - {"object", "created", "answer", "regions"} <= {field.name for field in dataclasses.fields(answer)}
    for name in ("image", "visual_tokens", "timings", "rewards"):
        assert dataclasses.asdict(getattr(answer, name)) == raw[name]
    region = dataclasses.asdict(answer.region) | {"crop": raw["regions"][0]["crop"]}
    assert {name: list(v) if isinstance(v, tuple) else v for name, v in region.items()} == raw["regions"][0]
    details = raw["usage"]["prompt_tokens_details"] | raw["usage"]["completion_tokens_details"]
    assert details.items() <= dataclasses.asdict(answer.usage).items()
    assert [dataclasses.asdict(turn) for turn in answer.usage.turns] == raw["usage"]["turns"]


def test_views_are_png_files(answer: Answer, tmp_path: Path) -> None:
    """An included view is the PNG that the model saw, of the size that the answer names, and can be saved."""
    assert answer.overview is not None
    assert answer.crop is not None
    for view in (answer.overview, answer.crop):
        view.save(tmp_path / "view.png")
        with Image.open(tmp_path / "view.png") as saved:
            assert (saved.format, *saved.size) == ("PNG", view.width, view.height)


def test_a_view_that_was_not_included_has_no_pixels(client: Any, tmp_path: Path) -> None:
    """Without include the crop has its size only; saving it says what to ask for."""
    answer = client.ask(PHOTO, SCENE.question)
    assert answer.overview is None
    assert answer.crop.width > 0
    with pytest.raises(ValueError, match="include"):
        answer.crop.save(tmp_path / "crop.png")


def test_choices_come_back_as_an_index(client: Any) -> None:
    """With choices, the index points at the choice that was meant, or at none."""
    codes = [mark.code for mark in SCENE.landmarks]
    answer = client.ask(PHOTO, SCENE.question, choices=codes)
    assert answer.choice is None or codes[answer.choice] in answer.text
    assert answer.raw["choice"] == answer.choice


def test_options_reach_the_server(client: Any) -> None:
    """Model, budget and extras are sent as given."""
    answer = client.ask(PHOTO, SCENE.question, model="ergo-single", max_visual_tokens=16, include=["replies", "reasoning"])
    assert answer.region.outcome == "skipped"
    assert not answer.region.zoomed
    assert answer.visual_tokens.overview <= 16
    assert len(answer.replies) == 1
    assert answer.reasoning is not None
    assert answer.crop is None


def test_zoom_can_be_switched_off(client: Any) -> None:
    """With zoom="never" the model looks once."""
    assert client.ask(PHOTO, SCENE.question, zoom="never").region.outcome == "skipped"


def test_a_stream_tells_each_step(client: Any) -> None:
    """A stream yields overview, region, reasoning and answer as they come, and the answer that `ask` gives as its last event."""
    with client.stream(PHOTO, SCENE.question, include=["overview", "crop", "reasoning"]) as stream:
        events = list(stream)
    first, found, *deltas, done = events
    assert isinstance(first, OverviewMade)
    assert isinstance(found, RegionFound)
    assert isinstance(done, Done)
    assert all(isinstance(event, ReasoningDelta | AnswerDelta) for event in deltas)
    assert "".join(event.text for event in deltas if isinstance(event, AnswerDelta)) == done.answer.text == SCENE.answer
    assert "".join(event.text for event in deltas if isinstance(event, ReasoningDelta)) == done.answer.reasoning
    assert (found.region, found.crop) == (done.answer.region, done.answer.crop)
    assert first.view == done.answer.overview
    asked = client.ask(PHOTO, SCENE.question)
    assert (done.answer.text, done.answer.region) == (asked.text, asked.region)


def test_an_upload_is_asked_about_many_times(client: Any) -> None:
    """An upload stands for its image in every call, as itself or by its id, until it is deleted."""
    uploaded = client.upload(PHOTO)
    assert (uploaded.width, uploaded.height, uploaded.bytes) == (*SCENE.image.size, len(PHOTO))
    assert uploaded.expires_in > 0
    assert client.ask(uploaded, SCENE.question).text == client.ask(uploaded.id, SCENE.question).text == SCENE.answer
    assert client.estimate(uploaded).image == client.estimate(PHOTO).image
    client.delete(uploaded)
    with pytest.raises(ImageExpired):
        client.ask(uploaded, SCENE.question)
    with pytest.raises(ImageExpired):
        client.delete(uploaded.id)


def test_an_estimate_bounds_the_cost(client: Any) -> None:
    """What an estimate names as the most is not exceeded by the question."""
    estimate = client.estimate(PHOTO)
    tokens = client.ask(PHOTO, SCENE.question).visual_tokens
    assert estimate.zoom
    assert estimate.visual_tokens.overview == tokens.overview
    assert tokens.total <= estimate.visual_tokens.total_max
    assert estimate.visual_tokens.baseline == tokens.baseline
    assert client.estimate(PHOTO, zoom="never").visual_tokens.crop_max == 0
    assert client.estimate(PHOTO, model="ergo-single", max_visual_tokens=16).visual_tokens.total_max <= 16
    assert estimate.raw["object"] == "vqa.estimate"


@pytest.mark.parametrize(
    ("image", "question", "model", "kind", "status", "code"),
    [
        (b"hello", "?", "ergo", InvalidImage, 422, "image_unreadable"),
        (PHOTO, " ", "ergo", InvalidRequest, 400, "invalid_request"),
        (PHOTO, "?", "gpt-5", InvalidRequest, 404, "model_not_found"),
        ("img_" + 24 * "x", "?", "ergo", ImageExpired, 404, "image_not_found"),
        ("http://nowhere.example/a.jpg", "?", "ergo", InvalidImage, 422, "image_fetch_blocked"),
    ],
)
def test_a_refusal(client: Any, image: Any, question: str, model: str, kind: type[ClientError], status: int, code: str) -> None:
    """A refusal is raised as what its caller can do about it, with status, code, message and the request's id."""
    with pytest.raises(kind, match=r"\w+ \w+") as caught:
        client.ask(image, question, model=model)
    assert (type(caught.value), caught.value.status, caught.value.code) == (kind, status, code)
    assert caught.value.request_id
    assert caught.value.__notes__ == [f"request id: {caught.value.request_id}"]


def test_an_error_survives_pickling(client: Any) -> None:
    """An error of a worker process arrives in its parent as it was."""
    with pytest.raises(InvalidImage) as caught:
        client.ask(b"hello", "?")
    again = pickle.loads(pickle.dumps(caught.value))
    assert vars(again) == vars(caught.value)
    assert str(again) == caught.value.message


@pytest.mark.parametrize("kind", [Client, Blocking])
def test_a_key_is_sent(kind: Any) -> None:
    """With keys the server answers who has one, and tells others to get one."""
    key = "ergo-secret"
    keys = f"alice {hashlib.sha256(key.encode()).hexdigest()}\n"
    with support.gateway(api_keys=keys) as url:
        with kind(url, api_key=key) as allowed:
            assert allowed.estimate(picture()).image.width == 800
        with kind(url, max_retries=0) as stranger, pytest.raises(NotAllowed) as caught:
            stranger.estimate(picture())
    assert caught.value.code == "invalid_api_key"


def test_the_environment_names_the_server(embedded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a URL the client asks the one in ERGO_URL, with the key in ERGO_API_KEY, and no proxy on the way to loopback."""
    monkeypatch.setenv("ERGO_URL", f"{embedded}/")
    monkeypatch.setenv("ERGO_API_KEY", "ergo-key\n")
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{support.free_port()}")
    with Client() as connected:
        assert connected.estimate(PHOTO).image.width == SCENE.image.width
        assert "ergo-key" not in repr(vars(connected)) + repr(connected)


@pytest.mark.parametrize("kind", [Client, Blocking])
def test_a_server_that_is_not_there(kind: Any) -> None:
    """Where nothing listens, the failure says so, and where it looked; status and code are empty."""
    url = f"http://127.0.0.1:{support.free_port()}"
    with kind(url, max_retries=1) as connected, pytest.raises(Unreachable, match=url) as caught:
        connected.ask(PHOTO, "?")
    assert (caught.value.status, caught.value.code) == (0, "")


@pytest.mark.parametrize("kind", [Client, Blocking])
@pytest.mark.parametrize("path", ["docs", "v1"])
def test_a_url_with_too_much_in_it(embedded: str, kind: Any, path: str) -> None:
    """A base URL that is none is told from a server that is none."""
    with kind(f"{embedded}/{path}") as connected, pytest.raises(UnexpectedResponse) as caught:
        connected.ask(PHOTO, "?")
    assert (caught.value.status, caught.value.code) == (404, "not_found")


@pytest.mark.parametrize(
    "given",
    [
        {"url": "127.0.0.1:8000"},
        {"url": "ftp://127.0.0.1"},
        {"url": "http://127.0.0.1:port"},
        {"url": "http://127.0.0.1/?a=b"},
        {"api_key": "a\nb"},
        {"api_key": "ä"},
        {"timeout": 0},
        {"timeout": float("inf")},
        {"max_retries": -1},
    ],
)
@pytest.mark.parametrize("kind", [Client, Blocking])
def test_what_cannot_be_used_is_refused_at_once(kind: Any, given: dict[str, Any]) -> None:
    """A client is not made with a URL, key or number that no call could succeed with; the key is not repeated."""
    with pytest.raises(ValueError, match=r"URL|key|timeout|max_retries") as caught:
        kind(**given)
    assert str(given.get("api_key", "never")) not in str(caught.value)


def test_texts_in_the_place_of_lists_are_refused(client: Any) -> None:
    """One text as choices or include would be taken letter by letter, and is refused."""
    for given in ({"choices": "yes"}, {"include": "crop"}):
        with pytest.raises(TypeError, match="list"):
            client.ask(PHOTO, "?", **given)


def test_a_closed_client_asks_nothing(embedded: str) -> None:
    """After close both clients refuse to go on."""
    connected = Client(embedded)
    connected.close()
    with pytest.raises(RuntimeError, match="closed"):
        connected.ask(PHOTO, "?")
    blocking = Blocking(embedded)
    with blocking:
        blocking.aclose()
        with pytest.raises(RuntimeError, match="closed"):
            blocking.ask(PHOTO, "?")


def test_an_answer_is_frozen(answer: Answer) -> None:
    """An answer cannot be changed by accident, its repr stays short, and it survives pickling."""
    assert "receive_ms" in repr(answer)
    assert "data:image" not in repr(answer)
    assert len(repr(answer)) < 2000
    assert pickle.loads(pickle.dumps(answer)) == answer
    with pytest.raises(dataclasses.FrozenInstanceError):
        answer.text = "x"  # type: ignore[misc]


def test_a_custom_transport_is_used(embedded: str) -> None:
    """What httpx2 offers as a transport carries the calls, and is closed with the client."""
    asked = []

    class Transport(httpx2.HTTPTransport):
        closed = False

        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            asked.append(request.url.path)
            return super().handle_request(request)

        def close(self) -> None:
            Transport.closed = True
            super().close()

    with Client(embedded, transport=Transport(trust_env=False)) as connected:
        assert connected.ask(io.BytesIO(PHOTO), SCENE.question).text == SCENE.answer
    assert asked == ["/v1/vqa"]
    assert Transport.closed
