"""``/metrics``: what responses say is what is counted, and no caller can add a series."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import asking
import httpx2
import pytest
import support
from asking import Meter, chat, client, data_url, picture, scripted, vqa
from starlette.testclient import TestClient

from ergo_server import __version__
from ergo_server.engine.base import Delta, Generation, Sampling, Usage
from ergo_server.engine.scripted import ScriptedEngine
from ergo_server.errors import EngineFailed
from ergo_server.protocol.conversation import Conversation

ONE_OF_EACH = {
    "zoomed": asking.ZOOM,
    "clamped": "<zoom>[-9, 0, 50, 50]</zoom>",
    "no_box": "no idea",
    "invalid_box": "<zoom>[9, 9, 1, 1]</zoom>",
}


def test_visual_tokens_are_counted_as_answered() -> None:
    """Over several requests the counters are the sums of what the responses said, by kind, baseline apart."""
    http = client()
    said = [vqa(http, picture(*size)).json()["visual_tokens"] for size in ((800, 600), (1999, 500), (100, 100))]
    meter = Meter.of(http)
    for kind in ("overview", "crop", "extra"):
        assert meter("ergo_visual_tokens_total", kind=kind) == sum(tokens[kind] for tokens in said)
    assert meter("ergo_visual_tokens_total") == sum(tokens["total"] for tokens in said)
    assert meter("ergo_visual_tokens_baseline_total") == sum(tokens["baseline"] for tokens in said)


def test_extra_images_are_counted() -> None:
    """Images that ride along are counted under their own kind."""
    http = client()
    old = asking.says(picture(400, 400, red=True), picture(), "?")
    extra = chat(http, old).json()["ergo"]["visual_tokens"]["extra"]
    assert Meter.of(http)("ergo_visual_tokens_total", kind="extra") == extra == 49


def test_engine_tokens_are_counted_as_answered() -> None:
    """Prompt and completion tokens of each turn are those of the response."""
    http = client()
    turns = vqa(http).json()["usage"]["turns"]
    meter = Meter.of(http)
    for turn in turns:
        assert meter("ergo_engine_prompt_tokens_total", turn=turn["turn"]) == turn["prompt_tokens"]
        assert meter("ergo_engine_completion_tokens_total", turn=turn["turn"]) == turn["completion_tokens"]
    assert meter("ergo_engine_prompt_tokens_total", turn="single") == 0


@pytest.mark.parametrize(("outcome", "reply"), ONE_OF_EACH.items())
def test_zoom_outcomes_are_counted_as_answered(outcome: str, reply: str) -> None:
    """Each outcome is counted under its name, once, and the region's share of the image is observed."""
    http = client(scripted(zoom=reply))
    region = vqa(http).json()["regions"][0]
    meter = Meter.of(http)
    assert region["outcome"] == outcome
    assert meter("ergo_zoom_total", outcome=outcome) == meter("ergo_zoom_total") == 1
    assert meter("ergo_zoom_area_ratio_sum") == pytest.approx(region["area_ratio"])


def test_a_skipped_zoom_has_no_area() -> None:
    """A question without zoom counts as skipped, under the single policy, and leaves the areas alone."""
    http = client()
    vqa(http, zoom="never")
    meter = Meter.of(http)
    assert meter("ergo_zoom_total", outcome="skipped") == 1
    assert meter("ergo_requests_total", policy="single", outcome="ok") == 1
    assert meter("ergo_zoom_area_ratio_count") == 0


def test_stages_are_timed_once_a_request() -> None:
    """Each stage is observed once in a request with zoom, and only the stages that ran in one without."""
    http = client()
    vqa(http)
    vqa(http, zoom="never")
    meter = Meter.of(http)
    stages = ("receive", "decode", "overview", "zoom_turn", "crop", "answer_turn")
    assert [meter("ergo_stage_duration_seconds_count", stage=stage) for stage in stages] == [2, 2, 2, 1, 1, 2]
    assert meter("ergo_request_duration_seconds_count") == 2


def test_http_requests_are_counted_by_route() -> None:
    """Routes are counted by their template, probes are not counted."""
    http = client()
    for path in ("/v1/models", "/v1/models/ergo", "/v1/models/ergo-raw", "/healthz", "/readyz", "/metrics"):
        http.get(path)
    meter = Meter.of(http)
    assert meter("ergo_http_requests_total", route="/v1/models", code="200") == 1
    assert meter("ergo_http_requests_total", route="/v1/models/{model_id}", code="200") == 2
    assert meter("ergo_http_requests_total") == 3
    assert meter("ergo_requests_in_flight") == 0


class Reporting(ScriptedEngine):
    """An engine that says something of its own about each generation.

    Args:
        said: fields of `Generation`.
    """

    def __init__(self, **said: Any) -> None:
        super().__init__(scripted().script)
        self.said = said

    async def generate(
        self,
        conversation: Conversation,
        sampling: Sampling,
        *,
        session: str = "",
        salt: str = "",
        deadline: float | None = None,
    ) -> AsyncGenerator[Delta | Generation, None]:
        """Replay one reply, and say that of it."""
        async for piece in super().generate(conversation, sampling, session=session, salt=salt, deadline=deadline):
            yield replace(piece, **self.said) if isinstance(piece, Generation) else piece


def test_a_mismatch_with_the_formula_is_counted() -> None:
    """An engine that counts other visual tokens than the formula is noticed, and its count is what is reported."""
    http = client(Reporting(usage=Usage(100, 9, 50, 7)))
    tokens = vqa(http).json()["visual_tokens"]
    meter = Meter.of(http)
    assert (tokens["overview"], tokens["source"]) == (7, "engine")
    assert meter("ergo_visual_token_mismatch_total") == 1
    assert (meter("ergo_prefix_reuse_ratio_sum"), meter("ergo_prefix_reuse_ratio_count")) == (0.5, 1)


def test_every_series_is_there_from_the_start() -> None:
    """All kinds of requests, good and bad, add no series to those of a fresh server: all at 0 but states and limits."""
    http = client(scripted(), max_body_bytes=100_000)
    meter = Meter.of(http)
    before = meter.all()
    told = ("_limit_bytes", "_limit", "_info")
    ready = ("ergo_engine_ready", (("engine", "scripted"),))
    assert math.isnan(before.pop(ready))
    some = {key: value for key, value in before.items() if value and key[0].startswith("ergo_") and not key[0].endswith(told)}
    assert some == {("ergo_circuit_breaker_state", (("engine", "scripted"), ("state", "closed"))): 1}
    use(http)
    after = meter.all()
    assert after.keys() == before.keys() | {ready}
    assert after["ergo_requests_total", (("outcome", "ok"), ("policy", "ergo"))] > 0


def test_ten_thousand_hostile_requests_add_no_series() -> None:
    """Ten thousand requests, each with a model, path, method, host, key and id of its own, leave the series as they were."""
    http = client(scripted(), max_body_bytes=100_000)
    meter = Meter.of(http)
    before = meter.all().keys()
    for number in range(2500):
        name = f"{number}-{random.Random(number).randbytes(9).hex()}"
        http.get(f"/v1/models/{name}", headers={"host": f"{name}.example", "authorization": f"Bearer {name}"})
        http.request(f"M{number}", f"/{name}", headers={"x-request-id": name, "traceparent": name})
        vqa(http, b"no image", model=name)
        chat(http, {"role": name, "content": name}, model="ergo", user=name)
    assert meter.all().keys() == before
    assert meter("ergo_http_requests_total") == 10_000


def test_images_are_counted_by_how_they_came_and_how_large_they_are() -> None:
    """Each image counts under its source and format, its tokens under its size; pixels and bytes are those of image and views."""
    http = client()
    image = picture(1600, 1600, "JPEG")
    http.post("/v1/vqa", data={"question": "?"}, files={"image": image})
    said = vqa(http, image).json()
    vqa(http, image)
    kept = http.post("/v1/images", files={"image": picture()}).json()["id"]
    asking.post_json(http, "/v1/vqa", {"image": kept, "question": "?"})
    meter = Meter.of(http)
    assert meter("ergo_images_total", source="body", format="jpeg") == 1
    assert meter("ergo_images_total", source="json", format="jpeg") == 2
    assert meter("ergo_images_total", source="stored", format="png") == 1
    assert meter("ergo_visual_tokens_baseline_total", size="to_8mp") == 3 * said["visual_tokens"]["baseline"]
    assert meter("ergo_visual_tokens_total", size="to_8mp", kind="crop") == 3 * said["visual_tokens"]["crop"]
    assert meter("ergo_visual_tokens_baseline_total", size="above_32mp") == 0
    assert meter("ergo_image_bytes_sum") == 3 * len(image) + len(picture())
    assert meter("ergo_image_pixels_sum", kind="original") == 3 * 1600 * 1600 + 800 * 600
    crop = said["regions"][0]["crop"]
    assert meter("ergo_image_pixels_count", kind="crop") == 4
    assert meter("ergo_zoom_magnification_count") == 4
    assert crop["width"] * crop["height"] <= meter("ergo_image_pixels_sum", kind="crop") / 3


def test_refused_images_are_counted_by_their_code() -> None:
    """A question that is refused for its image counts there, wherever that was noticed."""
    http = client(max_pixels=500_000)
    for image in (b"no image", picture()[:200], picture(800, 700)):
        assert vqa(http, image).status_code in (413, 415, 422)
    meter = Meter.of(http)
    assert meter("ergo_image_rejections_total", reason="image_too_large") == 1
    assert meter("ergo_image_rejections_total") == 3


def test_the_engines_own_times_are_shown() -> None:
    """What an engine reports of its queue and its first token is observed by turn; an engine that says nothing adds nothing."""
    for engine, count in ((Reporting(queue_seconds=0.25, first_token_seconds=0.5), 1), (scripted(), 0)):
        http = client(engine)
        vqa(http)
        meter = Meter.of(http)
        for turn in ("zoom", "answer"):
            assert meter("ergo_engine_queue_seconds_sum", turn=turn) == 0.25 * count
            assert meter("ergo_engine_first_token_seconds_sum", turn=turn) == 0.5 * count
            assert meter("ergo_engine_request_duration_seconds_count", turn=turn) == 1
            assert meter("ergo_engine_requests_total", turn=turn, outcome="ok") == 1
        assert meter("ergo_time_to_first_token_seconds_count", policy="ergo") == 1


def test_a_turn_that_fails_is_counted_as_it_failed() -> None:
    """A failing answer turn counts under its error, the zoom turn before it as ok, and there was no first token."""
    http = client(scripted(answer=EngineFailed("broken")))
    assert vqa(http).status_code == 502
    meter = Meter.of(http)
    assert meter("ergo_engine_requests_total", turn="zoom", outcome="ok") == 1
    assert meter("ergo_engine_requests_total", turn="answer", outcome="engine_failed") == 1
    assert meter("ergo_engine_requests_total") == 2
    assert meter("ergo_time_to_first_token_seconds_count") == 0


def test_readiness_is_shown() -> None:
    """Whether the engine could be asked is shown as it was when readiness was looked at."""
    engine = scripted()
    http = client(engine)
    meter = Meter.of(http)
    for ready in (True, False):
        engine.ready = ready
        http.get("/readyz")
        assert meter("ergo_engine_ready") == ready


def test_what_it_was_started_with_is_shown() -> None:
    """Version and budgets stand in labels of series that are 1."""
    meter = Meter.of(client(max_visual_tokens=36))
    assert meter("ergo_build_info", version=__version__) == 1
    assert meter("ergo_config_info", engine="scripted", max_visual_tokens="36", default_visual_tokens="36") == 1
    assert meter("process_resident_memory_bytes") > 1_000_000


def use(http: TestClient) -> None:
    """Send good requests and hostile ones."""
    vqa(http)
    vqa(http, stream=True, zoom="never", model="ergo-single")
    chat(http)
    chat(http, model="ergo-raw")
    http.get("/v1/models/ergo")
    for name in ("gpt-5", 'a"b\nc', "x" * 5000, "\u202e", "{}"):
        vqa(http, model=name)
        chat(http, model=name)
        http.get(f"/v1/models/{quote(name)}", headers={"x-request-id": quote(name)})
    for number in range(5):
        http.get(f"/random/{number}")
        http.request(f"BREW{number}", "/v1/vqa")
    vqa(http, b"no image")
    vqa(http, picture()[:100])
    http.post("/v1/vqa", content=bytes(100_001))
    http.post("/v1/vqa", content=b"x", headers={"content-type": "text/plain"})


def test_the_exposition_is_prometheus_own() -> None:
    """The content type is that of the text format, and no counter has a second series for its birthday."""
    response = client().get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "_created" not in response.text


def test_prefix_reuse_is_what_the_real_engine_said(real: str) -> None:
    """On a real engine the answer turn finds the zoom turn in the prefix cache, and metrics tell the same as the response."""
    meter = Meter.of(real)
    names = ("ergo_prefix_reuse_ratio_sum", "ergo_prefix_reuse_ratio_count", "ergo_visual_token_mismatch_total")
    before = [meter(name) for name in names]
    made = support.held_out(1)
    body = {"image": data_url(support.encode(made), "jpeg"), "question": made.question}
    zoom, answer = httpx2.post(f"{real}/v1/vqa", json=body, timeout=120, trust_env=False).json()["usage"]["turns"]
    ratio, count, mismatches = (meter(name) - then for name, then in zip(names, before, strict=True))
    assert ratio == pytest.approx(min(1, answer["cached_tokens"] / zoom["prompt_tokens"]))
    assert (count, mismatches) == (1, 0)
    assert ratio > 0.5
