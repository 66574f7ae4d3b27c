"""``/v1/images``: one upload, many questions."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx2
import pytest
import support
from asking import Meter, client, data_url, error, picture, says, scripted, sizes, vqa
from starlette.testclient import TestClient


def upload(http: TestClient, image: bytes | None = None, **query: str) -> httpx2.Response:
    """Upload an image as a raw body."""
    return http.post("/v1/images", params=query, content=image or picture(), headers={"content-type": "image/png"})


@pytest.fixture
def http() -> Iterator[TestClient]:
    """A client of a server in this process, whose event loop stays the same from request to request."""
    with client() as http:
        yield http


def test_an_upload_says_what_it_is(http: TestClient) -> None:
    """The answer names the id, the upright size and until when the image is kept; asking for it says the same."""
    response = upload(http, picture(800, 600, "JPEG", orientation=6))
    said = response.json()
    assert response.status_code == 201
    assert (said["width"], said["height"], said["format"], said["orientation"]) == (600, 800, "jpeg", 6)
    assert said["bytes"] == len(picture(800, 600, "JPEG", orientation=6))
    assert 0 < said["expires_in"] <= 600
    assert abs(said["expires_at"] - time.time() - said["expires_in"]) < 60
    again = http.get(f"/v1/images/{said['id']}").json()
    assert again | {"expires_in": 0} == said | {"expires_in": 0}


@pytest.mark.parametrize("form", ["json", "form", "raw"])
def test_every_form_uploads(http: TestClient, form: str) -> None:
    """JSON, a multipart form and a raw body upload the same image."""
    response = {
        "json": lambda: http.post("/v1/images", json={"image": data_url(picture())}),
        "form": lambda: http.post("/v1/images", files={"image": picture()}),
        "raw": lambda: upload(http),
    }[form]()
    assert (response.status_code, response.json()["width"]) == (201, 800)


def test_questions_about_an_upload_need_no_second_upload() -> None:
    """In JSON, in a form and in a chat the id stands for the image: the engine sees the very same views as with its bytes."""
    engine = scripted()
    with client(engine) as http:
        name = upload(http).json()["id"]
        answers = [vqa(http), vqa(http, image=name)]
        answers.append(http.post("/v1/vqa", files={"image": (None, name), "question": (None, "What is written there?")}))
        assert [answer.json()["answer"] for answer in answers] == ["seven"] * 3
        message = says("What is written there?")
        message["content"].insert(0, {"type": "image_url", "image_url": {"url": name}})
        chat = http.post("/v1/chat/completions", json={"model": "ergo", "messages": [message]})
        assert chat.json()["choices"][0]["message"]["content"] == "seven"
        views = [[view.data for view in said.views] for said, _, _ in engine.calls]
        assert views == views[:2] * 4


def test_the_overview_of_an_upload_is_not_made_again() -> None:
    """A question about an upload spends no time on its overview: less than a hundredth of what the first one took."""
    with client() as http:
        image = support.encode(support.held_out(0, size=(2400, 2400)), "PNG")
        name = upload(http, image).json()["id"]
        direct = [vqa(http, image).json()["timings"]["overview_ms"] for _ in range(3)]
        stored = [vqa(http, image=name).json()["timings"]["overview_ms"] for _ in range(3)]
        assert min(stored) < min(direct) / 20


def test_an_estimate_of_an_upload(http: TestClient) -> None:
    """The estimate reads the header that is already known."""
    name = upload(http).json()["id"]
    assert http.post("/v1/vqa/estimate", json={"image": name}).json()["image"]["width"] == 800


def test_a_deleted_image_is_not_found(http: TestClient) -> None:
    """After its deletion the id means nothing, wherever it is used."""
    name = upload(http).json()["id"]
    assert http.delete(f"/v1/images/{name}").json() == {"id": name, "object": "image", "deleted": True}
    for response in (vqa(http, image=name), http.get(f"/v1/images/{name}"), http.delete(f"/v1/images/{name}")):
        assert error(response) == (404, "image_not_found", "image")


def test_what_is_no_image_is_not_kept(http: TestClient) -> None:
    """A file that cannot be decoded is refused at its upload, not at the first question."""
    cut = picture()[:-200]
    assert error(upload(http, b"no image"))[:2] == (422, "image_unreadable")
    assert error(upload(http, cut))[:2] == (422, "image_unreadable")
    assert Meter.of(http)("ergo_stored_images") == 0


def test_uploads_are_counted() -> None:
    """The number of kept images and their bytes are shown, and fall when one is deleted or forgotten."""
    with client(image_store_seconds=1.0) as http:
        meter = Meter.of(http)
        names = [upload(http).json()["id"] for _ in range(2)]
        assert meter("ergo_stored_images") == 2
        assert meter("ergo_stored_image_bytes") >= 2 * len(picture())
        http.delete(f"/v1/images/{names[0]}")
        assert meter("ergo_stored_images") == 1
        support.wait_until(lambda: meter("ergo_stored_images") == 0, "the other is forgotten", 60)
        assert meter("ergo_stored_image_bytes") == 0


def test_a_full_store_says_when_to_come_back() -> None:
    """Beyond the tenant's share an upload is 429 with Retry-After; questions with their own image go on."""
    with client(image_store_tenant_bytes=1000) as http:
        refused = upload(http, support.encode(support.held_out(0)))
        assert error(refused)[:2] == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        assert vqa(http).status_code == 200


def test_the_overview_is_that_of_the_budget_asked_for() -> None:
    """Questions with another budget than the upload's get a view of that budget."""
    engine = scripted()
    with client(engine, max_visual_tokens=200) as http:
        name = upload(http, max_visual_tokens="100").json()["id"]
        for budget in (100, 200, 49):
            vqa(http, image=name, max_visual_tokens=budget)
        first = [sizes(said)[0] for said, _, _ in engine.calls[::2]]
        tokens = [width * height // 784 for width, height in first]
        assert all(have <= want for have, want in zip(tokens, (100, 200, 49), strict=True))
        assert len(set(tokens)) == 3


@pytest.mark.vllm
def test_a_second_question_hits_the_prefix_cache(on_vllm: str) -> None:
    """On real vLLM, another question about an upload finds the overview computed; another image's does not."""
    scenes = [support.held_out(number, size=(1500, 1400)) for number in (710, 711)]
    with httpx2.Client(base_url=on_vllm, timeout=support.START_SECONDS, trust_env=False) as http:
        cached = []
        for scene in scenes:
            name = http.post("/v1/images", files={"image": support.encode(scene)}).json()["id"]
            for mark in scene.landmarks[:2]:
                question = f"What is the code on the {mark.name}?"
                said = http.post("/v1/vqa", json={"image": name, "question": question}).json()
                cached.append(said["usage"]["turns"][0]["cached_tokens"])
            http.delete(f"/v1/images/{name}").raise_for_status()
    first, second = cached[::2], cached[1::2]
    print(f"cached tokens of the zoom turn: first questions {first}, second questions {second}")
    assert max(first) < 32 <= min(second)
