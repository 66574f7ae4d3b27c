"""``/v1/vqa``: every form of the request, every part of the answer, every way to fail."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import asking
import httpx2
import pytest
import support
from asking import ANSWER, Meter, client, encoded, error, events, picture, scripted, vqa
from starlette.testclient import TestClient

from ergo_server.api.app import create_app
from ergo_server.errors import EngineFailed

QUESTION = "What is written there?"


# --- forms of the request -----------------------------------------------------------------------------------------------


def test_json_with_a_data_url() -> None:
    """A JSON body with the image as a data: URL is answered."""
    assert vqa(client()).json()["answer"] == "seven"


def test_json_with_base64() -> None:
    """A JSON body with the image under ``data`` is answered."""
    response = client().post("/v1/vqa", json={"image": {"data": encoded(picture())}, "question": QUESTION})
    assert response.json()["answer"] == "seven"


def test_multipart() -> None:
    """A form with a file is answered, with its repeated and numeric fields understood."""
    fields = {"question": QUESTION, "choices": ["six", "seven"], "max_visual_tokens": "16", "include": "reasoning"}
    body = client().post("/v1/vqa", data=fields, files={"image": ("a.png", picture(), "image/png")}).json()
    assert (body["answer"], body["choice"], body["reasoning"]) == ("seven", 1, "It is a seven.")
    assert body["visual_tokens"]["overview"] <= 16


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "application/octet-stream"])
def test_raw_image_with_a_query(kind: str) -> None:
    """The image itself as the body is answered, whatever it is called, with the other fields in the query."""
    query: dict[str, Any] = {"question": QUESTION, "choices": ["six", "seven"], "zoom": "never"}
    response = client().post("/v1/vqa", params=query, content=picture(), headers={"content-type": kind})
    body = response.json()
    assert (body["choice"], body["regions"][0]["outcome"]) == (1, "skipped")


def test_an_unknown_field_is_named() -> None:
    """A misspelled field is refused and named, for it would be silently without effect."""
    assert error(vqa(client(), zooom="never")) == (400, "invalid_request", "zooom")


# --- the response -------------------------------------------------------------------------------------------------------


def test_the_shape_of_the_response() -> None:
    """The response has exactly the documented keys, in every part."""
    body = vqa(client()).json()
    top = "id object created model answer choice finish_reason image regions visual_tokens usage timings"
    assert set(body) == set(top.split())
    region = "box normalized seen area_ratio magnification outcome reason lenient crop"
    assert [set(found) for found in body["regions"]] == [set(region.split())]
    assert set(body["image"]) == {"width", "height", "format", "orientation", "animated"}
    assert set(body["visual_tokens"]) == {"overview", "crop", "extra", "total", "baseline", "saved_ratio", "source"}
    usage = "prompt_tokens completion_tokens total_tokens prompt_tokens_details completion_tokens_details turns"
    assert set(body["usage"]) == set(usage.split())
    turn = {"turn", "prompt_tokens", "completion_tokens", "cached_tokens", "image_tokens"}
    assert [set(found) for found in body["usage"]["turns"]] == [turn, turn]
    stages = "receive_ms decode_ms overview_ms zoom_turn_ms crop_ms answer_turn_ms total_ms"
    assert set(body["timings"]) == set(stages.split())


def test_usage_sums_up_the_turns() -> None:
    """Token counts are the sums of the two turns', and the details never exceed them."""
    usage = vqa(client()).json()["usage"]
    for count in ("prompt_tokens", "completion_tokens"):
        assert usage[count] == sum(turn[count] for turn in usage["turns"])
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["image_tokens"] == sum(turn["image_tokens"] for turn in usage["turns"])
    assert usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]


def test_visual_tokens_add_up() -> None:
    """The total is each view once, and the saving is measured against the baseline."""
    tokens = vqa(client()).json()["visual_tokens"]
    assert tokens["total"] == tokens["overview"] + tokens["crop"] <= 2 * 49
    assert tokens["baseline"] == 29 * 21  # 800 x 600 in steps of 28
    assert tokens["saved_ratio"] == pytest.approx(1 - tokens["total"] / tokens["baseline"])


def test_the_region_is_in_pixels_of_the_image() -> None:
    """The box is the model's, scaled from the overview to the image, outwards to whole pixels."""
    region = vqa(client()).json()["regions"][0]
    assert region["seen"] == [10, 20, 60, 60]
    # The overview of 800 x 600 within 49 tokens is 224 x 168, a factor of 25 / 7 on both axes.
    assert region["box"] == [35, 71, 215, 215]
    assert region["normalized"] == pytest.approx([35 / 800, 71 / 600, 215 / 800, 215 / 600])
    assert region["area_ratio"] == pytest.approx(180 * 144 / (800 * 600))
    assert region["outcome"] == "zoomed"


@pytest.mark.parametrize("include", [[], ["crop"], ["reasoning"], ["replies"], ["overview", "crop", "reasoning", "replies"]])
def test_include(include: list[str]) -> None:
    """The overview, the crop's pixels, the reasoning and the replies are sent when they are asked for, and only then."""
    body = vqa(client(), include=include).json()
    assert {"overview", "reasoning", "replies"} & set(body) == {"overview", "reasoning", "replies"} & set(include)
    assert (body["regions"][0]["crop"]["data"] is not None) == ("crop" in include)


def test_the_included_views_are_what_the_model_saw() -> None:
    """Overview and crop that are sent back have the very bytes that the engine was shown."""
    engine = scripted()
    body = vqa(client(engine), include=["overview", "crop"]).json()
    for sent, shown in zip((body["overview"], body["regions"][0]["crop"]), engine.calls[1][0].views, strict=True):
        assert sent == {"width": shown.size.width, "height": shown.size.height, "data": shown.data_url}


def test_the_answer_turn_repeats_the_zoom_turn() -> None:
    """The second conversation begins with the first and its reply, word for word and byte for byte."""
    engine = scripted()
    replies = vqa(client(engine), include=["replies"]).json()["replies"]
    (first, _, session), (second, _, same) = engine.calls
    assert second.messages[: len(first.messages)] == first.messages
    assert second.messages[len(first.messages)].parts == (replies[0],)
    assert session == same != ""


def test_exif_rotated_upload_gives_upright_coordinates() -> None:
    """A photograph taken sideways is reported, and its box given, as one sees it."""
    body = vqa(client(), picture(800, 600, "JPEG", orientation=6)).json()
    assert body["image"] == {"width": 600, "height": 800, "format": "jpeg", "orientation": 6, "animated": False}
    assert body["regions"][0]["box"] == [35, 71, 215, 215]


# --- zoom ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zoom", "size", "turns"),
    [
        ("auto", (800, 600), ["zoom", "answer"]),
        ("auto", (190, 190), ["single"]),
        ("always", (190, 190), ["zoom", "answer"]),
        ("never", (800, 600), ["single"]),
    ],
)
def test_zoom_modes(zoom: str, size: tuple[int, int], turns: list[str]) -> None:
    """``auto`` leaves the zoom turn out for an image within the budget, ``always`` and ``never`` do as they say."""
    body = vqa(client(), picture(*size), zoom=zoom).json()
    assert [turn["turn"] for turn in body["usage"]["turns"]] == turns
    assert (body["regions"][0]["outcome"] == "skipped") == (turns == ["single"])


@pytest.mark.parametrize(
    ("fields", "size", "reason"), [({}, (190, 190), "fits_budget"), ({"zoom": "never"}, (800, 600), "requested")]
)
def test_a_skipped_zoom_says_why(fields: dict[str, str], size: tuple[int, int], reason: str) -> None:
    """Without a zoom turn the region is the whole image, there is no crop, and the reason is given."""
    region = vqa(client(), picture(*size), **fields).json()["regions"][0]
    assert (region["box"], region["crop"], region["reason"]) == ([0, 0, *size], None, reason)


def test_ergo_single_never_zooms() -> None:
    """The model name alone switches zoom off, even against ``zoom: always``."""
    body = vqa(client(), model="ergo-single", zoom="always").json()
    assert (body["model"], body["regions"][0]["outcome"]) == ("ergo-single", "skipped")


# --- choices ------------------------------------------------------------------------------------------------------------


def test_choices_are_shown_in_the_answer_turn_only() -> None:
    """The zoom turn sees neither choices nor instructions, the answer turn sees both."""
    engine = scripted()
    vqa(client(engine), choices=["scarlet", "azure"], instructions="Be brief.")
    first, second = (asking.texts(conversation) for conversation, _, _ in engine.calls)
    assert not [word for word in ("scarlet", "azure", "brief") if word in first]
    assert "(A) scarlet\n(B) azure\nBe brief." in second


@pytest.mark.parametrize(("reply", "index"), [("B", 1), ("(A)", 0), ("seven", 1), ("It is six.", 0), ("eight", None)])
def test_the_choice_is_an_index(reply: str, index: int | None) -> None:
    """Letter or text, the choice that the answer means comes back as its index, and null where it means none."""
    assert vqa(client(scripted(answer=f"<answer>{reply}</answer>")), choices=["six", "seven"]).json()["choice"] == index


# --- sampling -----------------------------------------------------------------------------------------------------------


def test_max_tokens_bounds_the_visible_answer() -> None:
    """A small ``max_tokens`` cuts the answer, says so, and leaves the turns of the engine their full length."""
    engine = scripted(answer=f"<think>{'why ' * 50}</think><answer>{'word ' * 100}</answer>")
    body = vqa(client(engine), max_tokens=5, include=["reasoning"]).json()
    assert 0 < len(body["answer"]) <= 4 * 5
    assert body["finish_reason"] == "length"
    assert len(body["reasoning"]) == 199
    assert [sampling.max_tokens for _, sampling, _ in engine.calls] == [1024, 1024]


def test_sampling_reaches_the_engine() -> None:
    """Temperature, top_p and seed are sent with both turns."""
    engine = scripted()
    vqa(client(engine), temperature=0.7, top_p=0.9, seed=5)
    assert [(s.temperature, s.top_p, s.seed) for _, s, _ in engine.calls] == [(0.7, 0.9, 5)] * 2


@pytest.mark.parametrize("budget", [4, 16, 49])
def test_both_views_keep_the_budget(budget: int) -> None:
    """Whatever budget within the bounds is asked for, neither view costs more."""
    tokens = vqa(client(), max_visual_tokens=budget).json()["visual_tokens"]
    assert 0 < tokens["overview"] <= budget
    assert 0 < tokens["crop"] <= budget


# --- stream -------------------------------------------------------------------------------------------------------------


def test_the_stream_tells_events_in_order() -> None:
    """Region, reasoning, answer, done; and the pieces joined are what the done object says."""
    engine = scripted(answer=f"<think>{'because ' * 5}</think><answer>{'word ' * 5}</answer>")
    response = vqa(client(engine), stream=True, include=["reasoning"])
    found = events(response.text)
    assert list(dict.fromkeys(name for name, _ in found)) == ["region", "reasoning.delta", "answer.delta", "done"]
    done = found[-1][1]
    assert found[0][1] == done["regions"][0]
    for name, whole in (("reasoning.delta", done["reasoning"]), ("answer.delta", done["answer"])):
        pieces = [data["text"] for its, data in found if its == name]
        assert len(pieces) > 1
        assert "".join(pieces) == whole


@pytest.mark.parametrize("zoom", ["auto", "never"])
def test_the_stream_begins_with_the_overview_where_it_is_wanted(zoom: str) -> None:
    """With include=overview the first event is the overview of the done object; the region follows."""
    found = events(vqa(client(), stream=True, include=["overview"], zoom=zoom).text)
    assert [name for name, _ in found[:2]] == ["overview", "region"]
    assert found[0][1] == found[-1][1]["overview"]


def test_the_stream_is_not_held_back() -> None:
    """A stream names its type, and tells caches and nginx to pass it on."""
    headers = vqa(client(), stream=True).headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")


def test_streaming_changes_nothing() -> None:
    """The done object is the response that the same request gets without streaming."""
    http = client()
    plain, streamed = vqa(http).json(), events(vqa(http, stream=True).text)[-1][1]
    for body in (plain, streamed):
        del body["id"], body["created"], body["timings"]
    assert streamed == plain


def test_max_tokens_bounds_the_stream() -> None:
    """What is streamed ends where the answer is cut."""
    found = events(vqa(client(scripted(answer=f"<answer>{'word ' * 99}</answer>")), stream=True, max_tokens=5).text)
    assert "".join(data["text"] for name, data in found if name == "answer.delta") == found[-1][1]["answer"]
    assert len(found[-1][1]["answer"]) <= 4 * 5


def test_an_error_before_the_first_event_has_its_status() -> None:
    """A stream that fails in the zoom turn is answered with the error's status."""
    assert error(vqa(client(scripted(zoom=EngineFailed("broken"))), stream=True)) == (502, "engine_failed", None)


@pytest.mark.parametrize("failure", [EngineFailed("broken"), "unforeseen"])
def test_an_error_after_the_first_event_ends_the_stream(failure: EngineFailed | str) -> None:
    """A stream that fails later, for whatever reason, ends with an error event of the one form."""
    engine = scripted(answer=failure)
    if failure == "unforeseen":
        engine = scripted()
        engine.script = lambda conversation, sampling: asking.ZOOM if "</zoom>" in sampling.stop else _broken()
    found = events(vqa(client(engine), stream=True).text)
    assert [name for name, _ in found] == ["region", "error"]
    assert found[1][1]["error"]["code"] == ("engine_failed" if isinstance(failure, EngineFailed) else "internal_error")


def _broken() -> str:
    raise RuntimeError("secret")


# --- estimate -----------------------------------------------------------------------------------------------------------


def test_an_estimate_is_what_an_answer_reports() -> None:
    """Image, overview and baseline of the estimate are those of a real answer, and its bound holds."""
    http, image = client(), picture(1999, 777, "JPEG", orientation=6)
    estimate = http.post("/v1/vqa/estimate", json={"image": asking.data_url(image)}).json()
    answer = vqa(http, image).json()
    assert estimate["image"] == answer["image"]
    said, found = estimate["visual_tokens"], answer["visual_tokens"]
    assert (said["overview"], said["baseline"]) == (found["overview"], found["baseline"])
    assert found["crop"] <= said["crop_max"]
    assert found["total"] <= said["total_max"]
    assert found["saved_ratio"] >= said["saved_ratio_min"]


@pytest.mark.parametrize(
    ("query", "zoom"),
    [({}, True), ({"zoom": "never"}, False), ({"model": "ergo-single"}, False), ({"max_visual_tokens": 4}, True)],
)
def test_an_estimate_foresees_the_zoom(query: dict[str, Any], zoom: bool) -> None:
    """Whether there would be a zoom turn is decided as for an answer."""
    response = client().post("/v1/vqa/estimate", params=query, content=picture(), headers={"content-type": "image/png"})
    assert response.json()["zoom"] is zoom
    assert (response.json()["visual_tokens"]["crop_max"] > 0) is zoom


def test_an_estimate_reads_the_header_only() -> None:
    """A file that ends after its header is estimated, and the engine is not asked."""
    engine = scripted()
    cut = picture(4000, 3000)[:200]
    response = client(engine).post("/v1/vqa/estimate", json={"image": asking.data_url(cut)})
    assert response.json()["image"]["width"] == 4000
    assert not engine.calls


# --- bad requests -------------------------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """Return a PNG whose header promises far more pixels than its data holds."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


IMAGES = {
    "not an image": (b"hello, world", 422, "image_unreadable"),
    "truncated": (picture(1200, 900, "JPEG")[:-2000], 422, "image_unreadable"),
    "too many pixels": (bomb(30_000, 30_000), 413, "image_too_large"),
    "too long": (picture(2010, 10), 422, "image_aspect_unsupported"),
    "another format": (picture(form="TIFF"), 415, "image_format_unsupported"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("image", "status", "code"), IMAGES.values(), ids=IMAGES)
def test_bad_images(image: bytes, status: int, code: str, stream: bool) -> None:
    """An image that cannot be used is refused with its own code, naming the field, and counted by it."""
    http = client()
    assert error(vqa(http, image, stream=stream)) == (status, code, "image")
    assert Meter.of(http)("ergo_requests_total", outcome=code) == 1


FIELDS: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "no image": ({"image": None}, 400, "invalid_request", "image"),
    "empty image": ({"image": ""}, 400, "invalid_request", "image"),
    "broken base64": ({"image": {"data": "a"}}, 422, "image_unreadable", "image"),
    "an address": ({"image": "https://example.com/a.png"}, 422, "image_fetch_blocked", "image"),
    "empty question": ({"question": " "}, 400, "invalid_request", "question"),
    "unknown model": ({"model": "gpt-5"}, 404, "model_not_found", "model"),
    "budget too small": ({"max_visual_tokens": 3}, 400, "invalid_request", "max_visual_tokens"),
    "budget above the model's": ({"max_visual_tokens": 50}, 400, "invalid_request", "max_visual_tokens"),
    "budget above all": ({"max_visual_tokens": 16_385}, 400, "invalid_request", "max_visual_tokens"),
    "zoom": ({"zoom": "sometimes"}, 400, "invalid_request", "zoom"),
    "too many choices": ({"choices": ["x"] * 27}, 400, "invalid_request", "choices"),
    "not Unicode": ({"question": "\ud800"}, 400, "invalid_request", "question"),
}


@pytest.mark.parametrize(("fields", "status", "code", "param"), FIELDS.values(), ids=FIELDS)
def test_bad_fields(fields: dict[str, Any], status: int, code: str, param: str) -> None:
    """A field that is missing or wrong is named, the engine is not asked, and the refusal is counted."""
    engine = scripted()
    http = client(engine)
    assert error(vqa(http, **fields)) == (status, code, param)
    assert not engine.calls
    assert Meter.of(http)("ergo_requests_total", outcome=code) == 1


def test_a_body_above_the_limit_is_refused_by_its_length() -> None:
    """A Content-Length above the limit is refused before the body is read, and counted."""
    http = client(max_body_bytes=1000)
    assert error(http.post("/v1/vqa", content=bytes(1001))) == (413, "request_too_large", None)
    assert Meter.of(http)("ergo_requests_total", outcome="request_too_large") == 1


@pytest.mark.parametrize("kind", ["image/png", "application/json", "multipart/form-data; boundary=x"])
def test_a_body_without_a_length_is_refused_where_it_exceeds(kind: str) -> None:
    """A body that does not say its length is read up to the limit only, in every form, and counted."""
    sent = []

    def pieces() -> Iterator[bytes]:
        for number in range(100):
            sent.append(number)
            yield bytes(100) if number else b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'

    http = client(max_body_bytes=1000)
    assert error(http.post("/v1/vqa", content=pieces(), headers={"content-type": kind})) == (413, "request_too_large", None)
    assert Meter.of(http)("ergo_requests_total", outcome="request_too_large") == 1


def test_max_pixels_is_a_setting() -> None:
    """The operator's limit on pixels holds, inclusively."""
    http = client(max_pixels=800 * 600)
    assert vqa(http).status_code == 200
    assert error(vqa(http, picture(800, 601))) == (413, "image_too_large", "image")


# --- bad boxes ----------------------------------------------------------------------------------------------------------

BOXES = {
    "missing": ("<think>Nothing.</think>", "no_box", "missing"),
    "inverted": ("<zoom>[60, 60, 10, 20]</zoom>", "invalid_box", "inverted"),
    "empty": ("<zoom>[10, 10, 10, 20]</zoom>", "invalid_box", "empty"),
    "outside": ("<zoom>[900, 900, 950, 950]</zoom>", "invalid_box", "outside"),
    "not numbers": ("<zoom>[left, top, right, bottom]</zoom>", "invalid_box", "not_numbers"),
    "three numbers": ("<zoom>[1, 2, 3]</zoom>", "invalid_box", "not_numbers"),
    "huge": ("<zoom>[0, 0, 99999999999999999999, 9]</zoom>", "invalid_box", "not_numbers"),
}


@pytest.mark.parametrize(("reply", "outcome", "reason"), BOXES.values(), ids=BOXES)
def test_bad_boxes(reply: str, outcome: str, reason: str) -> None:
    """A box that cannot be used is no error: the whole image decides, the outcome and reason are reported and counted."""
    http = client(scripted(zoom=reply))
    response = vqa(http)
    region = response.json()["regions"][0]
    assert (response.status_code, region["outcome"], region["reason"]) == (200, outcome, reason)
    assert region["box"] == [0, 0, 800, 600]
    assert region["crop"]["width"] * region["crop"]["height"] <= 49 * 28**2
    meter = Meter.of(http)
    assert meter("ergo_zoom_total", outcome=outcome) == meter("ergo_zoom_total") == 1


@pytest.mark.parametrize("box", ["[-50, -50, 100, 100]", "[100, 100, 999999999, 999999999]"])
def test_a_box_partly_outside_is_clamped(box: str) -> None:
    """A box that leaves the image, however far, is cut to it."""
    http = client(scripted(zoom=f"<zoom>{box}</zoom>"))
    region = vqa(http).json()["regions"][0]
    x1, y1, x2, y2 = region["box"]
    assert 0 <= x1 < x2 <= 800
    assert 0 <= y1 < y2 <= 600
    assert region["outcome"] == "clamped"
    assert Meter.of(http)("ergo_zoom_total", outcome="clamped") == 1


def test_a_sloppy_box_is_used_and_marked() -> None:
    """A box that strays from the trained form is used, and said to be lenient."""
    region = vqa(client(scripted(zoom="<zoom>( 10.0 20.0 ; 60 60</zoom>"))).json()["regions"][0]
    assert (region["outcome"], region["lenient"], region["box"]) == ("zoomed", True, [35, 71, 215, 215])


@pytest.mark.parametrize(
    ("reply", "answer", "parse"), [("just seven", "just seven", "untagged"), ("", "", "empty"), (ANSWER, "seven", "tagged")]
)
def test_a_reply_without_an_answer_tag(reply: str, answer: str, parse: str) -> None:
    """Without an answer tag the whole reply is the answer; how it was read is counted."""
    http = client(scripted(answer=reply))
    response = vqa(http)
    assert (response.status_code, response.json()["answer"]) == (200, answer)
    assert Meter.of(http)("ergo_answers_total", parse=parse) == 1


# --- the engine's faults ------------------------------------------------------------------------------------------------


def test_an_unreachable_engine() -> None:
    """Where nothing listens, a question is answered with 503 and when to try again, and counted."""
    settings = support.mini_settings(engine="vllm", engine_url=f"http://127.0.0.1:{support.free_port()}")
    with TestClient(create_app(settings)) as http:
        response = vqa(http)
        assert error(response) == (503, "engine_unavailable", None)
        assert int(response.headers["retry-after"]) > 0
        assert Meter.of(http)("ergo_requests_total", outcome="engine_unavailable") == 1
        assert http.get("/readyz").status_code == 503


@pytest.mark.parametrize("deadline", ["turn_seconds", "request_seconds"])
def test_deadlines(deadline: str) -> None:
    """A turn or a request past its deadline is answered with 504, ended on the engine, and counted."""
    engine = scripted(seconds_per_token=5)
    http = client(engine, **{deadline: 0.3})
    assert error(vqa(http)) == (504, "engine_timeout", None)
    assert engine.running == 0
    assert Meter.of(http)("ergo_requests_total", outcome="engine_timeout") == 1


def test_every_request_is_accounted_for() -> None:
    """The outcomes of all questions, answered or refused, add up to the number of requests."""
    http = client(max_body_bytes=100_000)
    for fields in (
        {},
        {"stream": True},
        {"question": ""},
        {"model": "x"},
        {"image": "data:;base64,AAAA"},
        {"image": "x" * 200_000},
    ):
        vqa(http, **fields)
    http.post("/v1/vqa", content=b"not JSON", headers={"content-type": "application/json"})
    http.post("/v1/vqa", content=b"text", headers={"content-type": "text/plain"})
    http.post("/v1/vqa", content=b"bad", headers={"content-type": "multipart/form-data; boundary=x"})
    meter = Meter.of(http)
    assert meter("ergo_requests_total") == 9
    assert meter("ergo_requests_total", outcome="ok") == 2
    assert meter("ergo_http_requests_total", code="500") == 0


def test_a_scene_is_read(real: str) -> None:
    """Over plain HTTP, a code that only a crop can show is read by the shipped checkpoint."""
    made = support.held_out(0)
    files = {"image": ("scene.jpg", support.encode(made), "image/jpeg")}
    response = httpx2.post(f"{real}/v1/vqa", data={"question": made.question}, files=files, timeout=120, trust_env=False)
    assert response.json()["regions"][0]["outcome"] in ("zoomed", "clamped")
    assert response.json()["answer"] == made.answer


def test_a_stream_without_zoom_from_an_absent_engine_has_its_status() -> None:
    """An engine that is not there is a 503 for a stream too, even where the region is known without asking it."""
    url = f"http://127.0.0.1:{support.free_port()}"
    client = TestClient(support.app(engine="vllm", engine_url=url))
    form = {"question": "?", "stream": "true", "zoom": "never"}
    response = client.post("/v1/vqa", data=form, files={"image": support.encode(support.held_out(0))})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_unavailable"


@pytest.mark.parametrize(
    ("zoom", "answer", "wanted"),
    [
        (asking.ZOOM, ANSWER, {"box": 1, "format": 1}),
        ("<think>all</think><zoom>[0, 0, 168, 168]</zoom>", ANSWER, {"box": 0, "format": 1}),
        ("I see it.", ANSWER, {"box": 0, "format": 0}),
        (asking.ZOOM, "seven", {"box": 1, "format": 0}),
    ],
)
def test_the_rewards_that_need_no_right_answer(zoom: str, answer: str, wanted: dict[str, float]) -> None:
    """With include=rewards an answer says what its region and its tags would have earned, streamed or not."""
    http = client(scripted(zoom=zoom, answer=answer))
    assert vqa(http, include=["rewards"]).json()["rewards"] == wanted
    assert events(vqa(http, include=["rewards"], stream=True).text)[-1][1]["rewards"] == wanted
    assert "rewards" not in vqa(http).json()


def test_without_a_zoom_turn_there_is_nothing_to_reward() -> None:
    """Where the zoom turn was left out, both are null."""
    assert vqa(client(), include=["rewards"], zoom="never").json()["rewards"] == {"box": None, "format": None}
