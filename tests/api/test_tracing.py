"""Traces: what a collector is told of a request, how the caller's goes on to the engine, and what a dead collector costs."""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import support
from asking import chat, client, data_url, picture, scripted, vqa
from collector import Collector, attributes, collecting
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from starlette.testclient import TestClient
from upstream import Upstream

from ergo_server.engine.base import Engine
from ergo_server.errors import EngineFailed

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CALLER = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector."""
    with collecting() as server:
        yield server


@pytest.fixture(autouse=True)
def straight(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy is asked for loopback, whatever the environment says."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def asked(collector: Collector, engine: Engine | None = None, **given: Any) -> TestClient:
    """Return a client of a server that traces; what it has to tell is there when the client is closed."""
    return client(engine, otlp_endpoint=collector.url, **given)


def tree(collector: Collector) -> tuple[Span, dict[str, Span]]:
    """Return the root, and the other spans by their stage; fails where a parent is another than the root."""
    root, *others = [span for span in collector.spans if span.kind == Span.SPAN_KIND_SERVER] + [
        span for span in collector.spans if span.kind != Span.SPAN_KIND_SERVER
    ]
    assert all((span.trace_id, span.parent_span_id) == (root.trace_id, root.span_id) for span in others)
    assert len({span.span_id for span in collector.spans}) == len(collector.spans)
    return root, {attributes(span)["ergo.stage"]: span for span in others}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_and_each_of_its_stages_one(collector: Collector, stream: bool) -> None:
    """The caller's trace goes on with the request's span, and below it the stages' in their order, within its time."""
    before = time.time_ns()
    with asked(collector) as http:
        http.headers["traceparent"] = CALLER
        vqa(http, stream=stream)
    root, stages = tree(collector)
    assert {path for path, _ in collector.sent} == {"/v1/traces"}
    assert (root.trace_id.hex(), root.parent_span_id.hex(), root.name) == (TRACE, PARENT, "POST /v1/vqa")
    assert {"receive", "overview", "zoom_turn", "crop", "answer_turn"} <= stages.keys()
    assert before <= root.start_time_unix_nano <= root.end_time_unix_nano <= time.time_ns()
    for span in stages.values():
        assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano <= root.end_time_unix_nano
    in_turn = [stages[name] for name in ("receive", "overview", "zoom_turn", "crop", "answer_turn")]
    for former, latter in itertools.pairwise(in_turn):
        assert former.end_time_unix_nano <= latter.start_time_unix_nano + 1000  # the clock's floats


def test_spans_tell_what_the_response_says(collector: Collector) -> None:
    """Visual tokens, the zoom's outcome, tokens of the turns and the stages' times are those of the response."""
    with asked(collector) as http:
        response = vqa(http)
    said = response.json()
    root, stages = tree(collector)
    told = attributes(root)
    assert {name: told[f"ergo.visual_tokens.{name}"] for name in ("overview", "crop", "total", "baseline")} == {
        name: said["visual_tokens"][name] for name in ("overview", "crop", "total", "baseline")
    }
    assert (told["ergo.zoom.outcome"], told["ergo.policy"], told["ergo.outcome"]) == ("zoomed", "ergo", "ok")
    assert (told["http.request.method"], told["http.route"], told["http.response.status_code"]) == ("POST", "/v1/vqa", 200)
    assert (told["ergo.image.width"], told["ergo.image.height"], told["ergo.image.format"]) == (800, 600, "png")
    assert told["ergo.request_id"] == response.headers["x-request-id"]
    assert "error.type" not in told
    for turn, name in zip(said["usage"]["turns"], ("zoom_turn", "answer_turn"), strict=True):
        of_turn = attributes(stages[name])
        assert of_turn["gen_ai.usage.input_tokens"] == turn["prompt_tokens"]
        assert of_turn["gen_ai.usage.output_tokens"] == turn["completion_tokens"]
        assert of_turn["gen_ai.response.finish_reasons"] == ["stop"]
        assert (of_turn["gen_ai.operation.name"], of_turn["gen_ai.provider.name"]) == ("chat", "scripted")
    for name in ("zoom_turn", "crop", "answer_turn"):
        took = (stages[name].end_time_unix_nano - stages[name].start_time_unix_nano) / 1e6
        assert took == pytest.approx(said["timings"][f"{name}_ms"], abs=0.01)


def test_a_conversation_that_is_passed_through_has_its_turn(collector: Collector) -> None:
    """What goes to the engine as it is has one span below the request's."""
    with asked(collector) as http:
        usage = chat(http, model="ergo-raw").json()["usage"]
    root, stages = tree(collector)
    assert root.name == "POST /v1/chat/completions"
    assert attributes(stages.pop("answer_turn"))["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert stages == {}


@pytest.mark.parametrize("model", ["ergo", "ergo-raw"])
def test_the_engine_joins_the_trace(collector: Collector, upstream: Upstream, model: str) -> None:
    """vLLM is told the caller's trace, with the very turn's span as its parent, and nothing else of the caller's."""
    upstream.go_on.set()
    given: dict[str, Any] = {"engine": "vllm", "engine_url": upstream.url, "engine_model": "qwen"}
    headers = {"traceparent": CALLER, "tracestate": "vendor=secret", "baggage": "user=secret"}
    with support.gateway(otlp_endpoint=collector.url, **given) as url:
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(picture())}}, "?"]}]
        body = {"model": model, "messages": messages}
        answer = httpx2.post(f"{url}/v1/chat/completions", json=body, headers=headers, trust_env=False, timeout=60)
        assert answer.status_code == 200
    _, stages = tree(collector)
    turns = [stages[name] for name in ("zoom_turn", "answer_turn") if name in stages]
    assert [sent["traceparent"] for sent in upstream.headers] == [f"00-{TRACE}-{turn.span_id.hex()}-01" for turn in turns]
    assert len(turns) == (2 if model == "ergo" else 1)
    assert "secret" not in str(upstream.headers)
    for turn in turns:
        told = attributes(turn)
        assert (turn.kind, turn.name) == (Span.SPAN_KIND_CLIENT, "chat qwen")
        assert (told["gen_ai.request.model"], told["gen_ai.response.model"]) == ("qwen", "qwen")
        assert f"http://{told['server.address']}:{told['server.port']}" == upstream.url


def test_without_tracing_the_engine_is_told_nothing(upstream: Upstream) -> None:
    """Where nothing is traced, the caller's trace ends at the server."""
    upstream.go_on.set()
    with support.gateway(engine="vllm", engine_url=upstream.url, engine_model="qwen") as url:
        body = {"image": data_url(picture()), "question": "?"}
        httpx2.post(f"{url}/v1/vqa", json=body, headers={"traceparent": CALLER}, trust_env=False, timeout=60)
    assert len(upstream.headers) == 2
    assert not [name for sent in upstream.headers for name in sent if name.startswith("trace")]


def test_without_tracing_the_sdk_is_not_imported() -> None:
    """A server that does not trace has not loaded OpenTelemetry's SDK, nor its exporter."""
    program = (
        "import sys; from ergo_server.api.app import create_app; from ergo_server.settings import Settings\n"
        "from ergo_server.engine.scripted import ScriptedEngine\n"
        "create_app(Settings(), ScriptedEngine(lambda conversation, sampling: ''))\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter', 'google'))])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    "given",
    [
        [],
        [CALLER, CALLER],
        [""],
        ["nonsense"],
        [CALLER.upper()],
        [CALLER + "-more"],
        [f"ff{CALLER[2:]}"],
        [f"00-{'0' * 32}-{PARENT}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [CALLER.replace("00-", "01-", 1) + "-" + "x" * 600],
    ],
    ids=lambda given: ",".join(given)[:70] or "none",
)
def test_an_unsound_traceparent_begins_a_new_trace(collector: Collector, given: list[str], caplog: Any) -> None:
    """Whatever is no trace by the standard is left aside in silence, and the request has a trace of its own."""
    with asked(collector) as http, caplog.at_level(logging.INFO, "opentelemetry"):
        http.get("/v1/models", headers=[("traceparent", value) for value in given])
    (root,) = collector.spans
    assert root.trace_id.hex() != TRACE
    assert root.parent_span_id == b""
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]


@pytest.mark.parametrize(("share", "flag", "traced"), [(0, "01", 1), (0, "00", 0), (1, "00", 0), (0, None, 0), (1, None, 1)])
def test_a_share_is_traced(collector: Collector, upstream: Upstream, share: float, flag: str | None, traced: int) -> None:
    """The caller's decision counts, and where it has made none the share; the engine is told the same."""
    upstream.go_on.set()
    given: dict[str, Any] = {"engine": "vllm", "engine_url": upstream.url, "engine_model": "qwen", "trace_share": share}
    headers = {"traceparent": CALLER[:-2] + flag} if flag else {}
    with support.gateway(otlp_endpoint=collector.url, **given) as url:
        body = {"image": data_url(picture()), "question": "?"}
        httpx2.post(f"{url}/v1/vqa", json=body, headers=headers, trust_env=False, timeout=60)
    assert sum(span.kind == Span.SPAN_KIND_SERVER for span in collector.spans) == traced
    assert {int(sent["traceparent"][-2:], 16) & 1 for sent in upstream.headers} == {traced}


def test_requests_at_a_time_have_traces_of_their_own(collector: Collector) -> None:
    """Questions asked together have as many traces, each with all of its stages and its own request's id."""
    with support.gateway(scripted(seconds_per_token=0.002), otlp_endpoint=collector.url) as url:
        body = {"image": data_url(picture()), "question": "?"}

        def ask(number: int) -> str:
            headers = {"x-request-id": f"r{number}", "traceparent": f"00-{number + 1:032x}-{PARENT}-01"}
            return httpx2.post(f"{url}/v1/vqa", json=body, headers=headers, trust_env=False, timeout=60).headers["x-request-id"]

        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            ids = list(threads.map(ask, range(8)))
    assert ids == [f"r{number}" for number in range(8)]
    for number in range(8):
        of_trace = [span for span in collector.spans if int(span.trace_id.hex(), 16) == number + 1]
        (root,) = [span for span in of_trace if span.kind == Span.SPAN_KIND_SERVER]
        assert attributes(root)["ergo.request_id"] == f"r{number}"
        assert {span.parent_span_id for span in of_trace if span is not root} == {root.span_id}
        assert len(of_trace) >= 6


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_engine_is_an_error(collector: Collector, stream: bool) -> None:
    """The turn that failed and the request bear the error's code, and are errors; the stages before are not."""
    with asked(collector, scripted(answer=EngineFailed("it broke"))) as http:
        vqa(http, stream=stream)
    root, stages = tree(collector)
    failed = {name for name, span in {**stages, "root": root}.items() if span.status.code == Status.STATUS_CODE_ERROR}
    assert failed == {"root", "answer_turn"}
    assert {attributes(span)["error.type"] for span in (root, stages["answer_turn"])} == {"engine_failed"}
    assert root.status.message == ""


@pytest.mark.parametrize(
    ("path", "name", "route"),
    [("/v1/models/gpt-secret", "GET /v1/models/{model_id}", "/v1/models/{model_id}"), ("/secret?a=secret", "GET", None)],
)
def test_a_mistake_of_the_callers_is_no_error_of_the_server(
    collector: Collector, path: str, name: str, route: str | None
) -> None:
    """A refused request bears the error's code, is no error of the server's, and repeats no text of the caller's."""
    with asked(collector) as http:
        http.get(path)
    (root,) = collector.spans
    assert (root.name, attributes(root).get("http.route"), root.status.code) == (name, route, Status.STATUS_CODE_UNSET)
    assert attributes(root)["error.type"] in ("model_not_found", "not_found")
    assert b"secret" not in collector.sent[0][1]


def test_an_image_that_fails_ends_with_its_stage(collector: Collector) -> None:
    """Of an image that breaks while it is decoded, the stages up to there are told, and the size that it had said it has."""
    with asked(collector) as http:
        assert vqa(http, picture(900, 700)[:-400]).status_code == 422
    root, stages = tree(collector)
    assert list(stages) == ["receive", "overview"]
    assert (attributes(root)["ergo.image.width"], attributes(root)["error.type"]) == (900, "image_unreadable")


def test_probes_are_not_traced(collector: Collector) -> None:
    """What machines ask every few seconds leaves no trace."""
    with asked(collector) as http:
        for path in ("/healthz", "/readyz", "/metrics", "/health", "/v1/models"):
            http.get(path)
    assert [span.name for span in collector.spans] == ["GET /v1/models"]


def test_the_server_is_named_as_its_operator_says(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenTelemetry's own variables name the service and what it belongs to; else it is ergo-vqa."""
    with asked(collector) as http:
        http.get("/v1/models")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "eyes")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    with asked(collector) as http:
        http.get("/v1/models")
    plain, named = (attributes(request.resource) for request in collector.requests)
    assert (plain["service.name"], named["service.name"]) == ("ergo-vqa", "eyes")
    assert named["deployment.environment.name"] == "test"
    assert plain["service.instance.id"] != named["service.instance.id"]


def test_a_collector_that_fails_is_told_of_once(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A collector that refuses batch after batch is one warning, and its return another."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    collector.status = 400
    with asked(collector) as http:
        for number in range(1, 4):
            assert http.get("/v1/models").status_code == 200
            support.wait_until(lambda wanted=number: len(collector.sent) >= wanted, "a batch was sent")
        collector.status = 200
        http.get("/v1/models")
        support.wait_until(lambda: "again" in caplog.text, "the batch was taken")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "the collector takes no traces; they are dropped until it does",
        "the collector takes traces again",
    ]


@pytest.mark.parametrize("there", [True, False], ids=["it hangs", "it is not there"])
def test_a_dead_collector_keeps_nobody_waiting(collector: Collector, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a collector that hangs, or is not there, questions are answered, and the server ends with status 0 and a warning."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    collector.answering.clear()
    endpoint = collector.url if there else f"http://127.0.0.1:{support.free_port()}"
    with support.process(otlp_endpoint=endpoint) as server:
        for _ in range(3):
            assert server.get("/v1/models").status_code == 200
        if there:
            support.wait_until(lambda: collector.sent, "the collector was asked")
        server.signal()
        status, complaints = server.end()
    assert status == 0
    assert len(re.findall("the collector takes no traces", complaints)) == len(complaints.splitlines()) <= 1
    assert len(collector.sent) <= 1


def test_an_endpoint_that_is_no_address_is_named() -> None:
    """What is no http address is refused at start."""
    with pytest.raises(ValueError, match="otlp_endpoint"):
        support.mini_settings(otlp_endpoint="collector:4318")
