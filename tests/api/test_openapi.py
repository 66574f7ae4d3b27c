"""The OpenAPI document: complete, true of what the server answers, and readable without the internet."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import http.client
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import jsonschema_rs
import pytest
import schemathesis
import support
from asking import chat, client, data_url, picture, post_json, says, scripted, vqa
from schemathesis.schemas import APIOperation, BaseSchema
from starlette.testclient import TestClient

from ergo_server.api.openapi import kinds
from ergo_server.engine.base import Engine, Sampling
from ergo_server.engine.scripted import ScriptedEngine
from ergo_server.errors import (
    ContextTooLong,
    EngineBusy,
    EngineError,
    EngineFailed,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    ErgoError,
    MethodNotAllowed,
)
from ergo_server.protocol.conversation import Conversation

Json = dict[str, Any]

KEY = "ergo-alice"
ALICE = f"alice {hashlib.sha256(KEY.encode()).hexdigest()}"


@pytest.fixture(scope="module")
def document() -> Json:
    """What the server says of itself."""
    told: Json = client().get("/openapi.json").json()
    return told


def operations(document: Json) -> Iterator[tuple[str, Json]]:
    """Yield the name and the description of each operation."""
    for path, methods in document["paths"].items():
        for method, told in methods.items():
            yield f"{method.upper()} {path}", told


def everything(part: object, where: str = "#") -> Iterator[tuple[str, Json]]:
    """Yield every object of a document with its place."""
    if isinstance(part, dict):
        yield where, part
        for name, value in part.items():
            yield from everything(value, f"{where}/{name}")
    elif isinstance(part, list):
        for number, value in enumerate(part):
            yield from everything(value, f"{where}/{number}")


def resolve(document: Json, part: Json) -> Json:
    """Follow a reference, if it is one."""
    for name in part["$ref"].removeprefix("#/").split("/") if "$ref" in part else ():
        document = document[name]
    return document if "$ref" in part else part


# --- it is complete -----------------------------------------------------------------------------------------------------


def fields(document: Json) -> Iterator[tuple[str, Json]]:
    """Yield every field of every form, every parameter and every header, with its place."""
    for where, part in everything(document):
        for name, field in part.get("properties", {}).items() if part.get("type") == "object" else ():
            if "/text~1event-stream/" not in where and "/text/event-stream/" not in where:  # lines of a stream are no fields
                yield f"{where}/{name}", field
    for name, told in operations(document):
        yield from ((f"{name} {given['name']}", given) for given in told["parameters"])
    yield from document["components"]["headers"].items()


def shows_itself(field: Json) -> bool:
    """Say whether a field's schema, or the forms that it names, show what stands there."""
    if any(word in field for word in ("example", "examples", "enum", "const", "$ref")) or field.get("format") == "binary":
        return True
    options = [option for option in field.get("anyOf", ()) if option != {"type": "null"}]
    return all(map(shows_itself, options)) if options else shows_itself(field["items"]) if "items" in field else False


def test_every_field_is_described(document: Json) -> None:
    """Each field, parameter and header has a description and an example, or values or a form that show themselves."""
    found = dict(fields(document))
    assert len(found) > 150
    assert not [where for where, field in found.items() if not field.get("description")]
    assert not [where for where, field in found.items() if not shows_itself(field)]


def test_every_example_fits(document: Json) -> None:
    """Each example has the form of what it is an example of."""
    shown = [(field.get("schema", field), field.get("examples", [])) for _, field in fields(document)]
    shown += [(field["schema"], [field["example"]]) for _, field in fields(document) if "example" in field]
    for _, told in operations(document):
        for content in told.get("requestBody", {}).get("content", {}).values():
            shown.append((content["schema"], [example["value"] for example in content.get("examples", {}).values()]))
    assert sum(len(examples) for _, examples in shown) > 150
    for schema, examples in shown:
        judge = jsonschema_rs.validator_for({**schema, "components": document["components"]})
        assert all(map(judge.is_valid, examples)), f"{examples} of {schema}"


UNITS = {
    r"tokens|baseline|^(overview|crop|extra|crop_max|total|total_max)$": "tokens|their sum|of both|all others|none;",
    r"_ms$": "^milliseconds",
    r"^(width|height)$": "pixels",
    r"^(box|seen)$": "pixels",
    r"ratio|^normalized$": "fraction|area of",
    r"^(created|expires_at|expires_in)$": "seconds",
    r"^bytes$": "bytes",
}
"""Names of numbers, and how their descriptions say the unit."""


def test_every_number_has_its_unit(document: Json) -> None:
    """The description of each length, time, count and ratio says in which unit it is."""
    numbers = {
        (where, name): field["description"]
        for where, form in document["components"]["schemas"].items()
        for name, field in form["properties"].items()
        if "number" in json.dumps(field) or "integer" in json.dumps(field)
    }
    judged = 0
    for (where, name), text in numbers.items():
        for pattern, unit in UNITS.items():
            if re.search(pattern, name):
                judged += 1
                assert re.search(unit, text), f"{where}.{name}: {text}"
    assert judged > 40


def test_every_operation_is_described(document: Json) -> None:
    """Each operation has a name of its own, a summary, a description and a known tag; each of its answers says what it is."""
    names = [told["operationId"] for _, told in operations(document)]
    assert len(set(names)) == len(names) == 12
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", name) for name in names)
    tags = {tag["name"] for tag in document["tags"]}
    for name, told in operations(document):
        assert told["summary"], name
        assert told["description"], name
        assert set(told["tags"]) <= tags, name
        assert all(answer["description"] and answer["content"] and answer["headers"] for answer in told["responses"].values()), (
            name
        )


def test_every_reference_leads_somewhere(document: Json) -> None:
    """What the document refers to, is in it; and what is in it, is referred to."""
    named = {part["$ref"] for _, part in everything(document) if "$ref" in part}
    there = {
        f"#/components/{kind}/{name}" for kind in ("schemas", "headers", "examples") for name in document["components"][kind]
    }
    assert named <= there
    assert there - named == {f"#/components/examples/{MethodNotAllowed.code}"}


def test_every_error_is_documented(document: Json) -> None:
    """Each error that the server can name is in the table with its status and, but for 405, among an operation's answers."""
    shown = {
        (int(status), code)
        for _, told in operations(document)
        for status, answer in told["responses"].items()
        for code in answer["content"].get("application/json", {}).get("examples", ())
    }
    named = {(kind.status, kind.code) for kind in kinds(ErgoError)}
    assert shown == named - {(MethodNotAllowed.status, MethodNotAllowed.code)}
    for status, code in named:
        assert f"| `{code}` | {status} |" in document["info"]["description"]
    for code, example in document["components"]["examples"].items():
        assert example["value"]["error"]["code"] == code


def test_open_operations_ask_for_no_key(document: Json) -> None:
    """Keys are documented where the server asks for them, and nowhere else."""
    http = client(api_keys=ALICE)
    for name, told in operations(document):
        method, path = name.split()
        asked = http.request(method, path).status_code == 401
        assert asked == ("401" in told["responses"]) == ("security" not in told), name


# --- it is true ---------------------------------------------------------------------------------------------------------


def closed(document: Json) -> Json:
    """Return the document with no room for fields that it does not name."""
    strict = copy.deepcopy(document)
    for form in strict["components"]["schemas"].values():
        form.setdefault("additionalProperties", False)
    return strict


@pytest.fixture(scope="module")
def described(document: Json) -> BaseSchema:
    """The document, as that which judges answers."""
    return schemathesis.openapi.from_dict(closed(document))


def operation(described: BaseSchema, response: httpx2.Response) -> APIOperation[Any, Any, Any, Any]:
    """Return the operation that was asked for."""
    path = re.sub("^/v1/(image|model)s/.+", r"/v1/\1s/{\1_id}", response.request.url.path)
    return described[path][response.request.method]


def hold(described: BaseSchema, response: httpx2.Response) -> None:
    """Hold an answer to what is documented: status, headers, content type, every field, every event, the error's code."""
    asked = operation(described, response)
    told = asked.definition.raw["responses"][str(response.status_code)]
    kind = response.headers["content-type"].split(";")[0]
    assert kind in told["content"]
    if response.status_code >= 400 and "error" in response.json():
        assert response.json()["error"]["code"] in told["content"][kind]["examples"]
        assert ("retry-after" in response.headers) <= ("retry-after" in told["headers"])
    response.elapsed = timedelta()  # schemathesis wants to know, and not every response here was timed
    asked.validate_response(response)


def raising(error: type[EngineError], **given: Any) -> TestClient:
    """Return a client of a server whose engine fails."""
    return client(scripted(zoom=error("it is so", **given)))


def broken() -> TestClient:
    """Return a client of a server with a mistake in it."""

    def script(conversation: Conversation, sampling: Sampling) -> str:
        raise RuntimeError

    return client(ScriptedEngine(script))


def twice(http: TestClient) -> httpx2.Response:
    """Ask twice; return the second answer."""
    vqa(http)
    return vqa(http)


def keyed(key: str = KEY, engine: Engine | None = None, **given: object) -> TestClient:
    """Return a client that brings a key to a server that asks for one."""
    http = client(engine, api_keys=ALICE, **given)
    http.headers["authorization"] = f"Bearer {key}"
    return http


def late() -> httpx2.Response:
    """Send half of a body to a real server, and wait for what it says."""
    with support.gateway(scripted(), body_stall_seconds=0.2) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        with contextlib.closing(connection):
            connection.request("POST", "/v1/vqa", b"{", {"content-length": "2", "content-type": "application/json"})
            answer = connection.getresponse()
            request = httpx2.Request("POST", f"{url}/v1/vqa")
            return httpx2.Response(answer.status, headers=answer.getheaders(), content=answer.read(), request=request)


RAW = {"content-type": "image/png"}
WIDE = picture(2010, 10)

REFUSED: dict[str, Callable[[], httpx2.Response]] = {
    "400 invalid_request": lambda: vqa(client(), temperature=9),
    "400 invalid_request of the model's bounds": lambda: vqa(client(), max_visual_tokens=50),
    "400 invalid_request of a chat": lambda: chat(client(), n=2),
    "400 invalid_request of instructions with an image": lambda: chat(
        client(), says(picture(), role="system"), says(picture(), "?")
    ),
    "400 context_length_exceeded": lambda: vqa(raising(ContextTooLong)),
    "401 invalid_api_key": lambda: keyed("ergo-bob").get("/v1/models"),
    "404 model_not_found": lambda: client().get("/v1/models/gpt-5"),
    "404 model_not_found of a chat": lambda: chat(client(), model="gpt-5"),
    "404 image_not_found": lambda: client().delete("/v1/images/img_x"),
    "404 not_found": lambda: client().get("/v1/images/a%2Fb"),
    "408 request_timeout": late,
    "413 request_too_large": lambda: client(max_body_bytes=10).request("GET", "/version", content=bytes(11)),
    "413 image_too_large": lambda: client(max_pixels=100).post("/v1/images", content=picture(), headers=RAW),
    "415 unsupported_media_type": lambda: client().post("/v1/vqa", content=b"x"),
    "415 image_format_unsupported": lambda: client().post("/v1/vqa/estimate", content=b"%PDF-1.7\n", headers=RAW),
    "422 image_unreadable": lambda: client().post("/v1/images", content=b"x", headers=RAW),
    "422 image_aspect_unsupported": lambda: client().post("/v1/vqa/estimate", content=WIDE, headers=RAW),
    "422 image_fetch_blocked": lambda: post_json(client(), "/v1/images", {"image": "https://images.example/a.png"}),
    "422 image_too_slow": lambda: client(decode_seconds=1e-9).post("/v1/images", content=picture(), headers=RAW),
    "429 rate_limit_exceeded": lambda: twice(keyed(requests_per_minute=1)),
    "429 rate_limit_exceeded of uploads": lambda: client(image_store_tenant_bytes=1).post(
        "/v1/images", content=picture(), headers=RAW
    ),
    "500 internal_error": lambda: vqa(broken()),
    "502 engine_failed": lambda: vqa(raising(EngineFailed)),
    "502 engine_rejected": lambda: chat(raising(EngineRejected)),
    "503 engine_busy": lambda: vqa(raising(EngineBusy, retry_after=3)),
    "503 engine_unavailable": lambda: chat(raising(EngineUnavailable)),
    "503 overloaded": lambda: client(image_store_bytes=1).post("/v1/images", content=picture(), headers=RAW),
    "504 engine_timeout": lambda: vqa(raising(EngineTimeout)),
}
"""Every error, provoked; chosen so that every operation with errors of its own is there."""


@pytest.mark.parametrize("provoked", REFUSED)
def test_every_error_is_answered_as_documented(described: BaseSchema, provoked: str) -> None:
    """Each error is answered with the status, code, form and headers that the document has for that operation."""
    response = REFUSED[provoked]()
    status, code = provoked.split()[:2]
    assert (response.status_code, response.json()["error"]["code"]) == (int(status), code)
    hold(described, response)


def test_every_error_was_provoked() -> None:
    """The table above has every error of the tree but 405, which belongs to no operation."""
    codes = {kind.code for kind in kinds(ErgoError)} - {MethodNotAllowed.code}
    assert {provoked.split()[1] for provoked in REFUSED} == codes


def uploaded(http: TestClient) -> str:
    """Upload an image; returns what names it."""
    return str(http.post("/v1/images", content=picture(), headers=RAW).json()["id"])


ALL = ["overview", "crop", "reasoning", "replies"]
USAGE = {"stream": True, "stream_options": {"include_usage": True}}

ANSWERED: dict[str, Callable[[TestClient], httpx2.Response]] = {
    "a question": lambda http: vqa(http, choices=["six", "seven"], include=ALL),
    "a question without zoom": lambda http: vqa(http, zoom="never"),
    "a stream": lambda http: vqa(http, stream=True, include=ALL),
    "a form": lambda http: http.post("/v1/vqa", data={"question": "?"}, files={"image": picture()}),
    "a raw image": lambda http: http.post("/v1/vqa?question=?", content=picture(), headers=RAW),
    "an estimate": lambda http: post_json(http, "/v1/vqa/estimate", {"image": data_url(picture())}),
    "an upload": lambda http: http.post("/v1/images", content=picture(), headers=RAW),
    "an uploaded image": lambda http: http.get(f"/v1/images/{uploaded(http)}"),
    "a deleted image": lambda http: http.delete(f"/v1/images/{uploaded(http)}"),
    "a chat": chat,
    "a chat of the engine's": lambda http: chat(http, says("Hello")),
    "a streamed chat": lambda http: chat(http, **USAGE),
    "a streamed chat of the engine's": lambda http: chat(http, says("Hello"), **USAGE),
    "models": lambda http: http.get("/v1/models"),
    "a model": lambda http: http.get("/v1/models/ergo-raw"),
    "health": lambda http: http.get("/healthz"),
    "readiness": lambda http: http.get("/readyz"),
    "version": lambda http: http.get("/version"),
    "metrics": lambda http: http.get("/metrics"),
}


@pytest.mark.parametrize("asked", ANSWERED)
@pytest.mark.parametrize("zoom", ["<zoom>[10, 20, 60, 60]</zoom>", "<zoom>[10, 20, 9999, 60]</zoom>", "Nowhere."])
def test_every_answer_is_as_documented(described: BaseSchema, asked: str, zoom: str) -> None:
    """Whatever became of the zoom, an answer has every field that the document promises and none that it does not know."""
    with keyed(engine=scripted(zoom)) as http:
        response = ANSWERED[asked](http)
    assert response.status_code in (200, 201)
    hold(described, response)


@pytest.mark.parametrize("ask", [vqa, chat])
def test_an_error_within_a_stream_is_as_documented(described: BaseSchema, ask: Callable[..., httpx2.Response]) -> None:
    """What fails after the first event is an event of the documented form."""
    response = ask(client(scripted(answer=EngineBusy("full"))), stream=True, include=["overview"])
    assert "engine_busy" in response.text
    hold(described, response)


def test_a_server_that_is_not_ready_is_as_documented(described: BaseSchema) -> None:
    """While the engine cannot be asked, readiness is the documented 503, which is no error's form."""
    response = client(ScriptedEngine(lambda conversation, sampling: "", ready=False)).get("/readyz")
    assert response.json()["status"] == "waiting"
    hold(described, response)


@pytest.mark.parametrize(
    ("asked", "spoil"),
    [
        ("a question", lambda text: text.replace('"answer":', '"reply":')),
        ("a question", lambda text: text.replace('"width":', '"breadth":1,"width":')),
        ("a stream", lambda text: text.replace("answer.delta", "answer.delat")),
        ("a stream", lambda text: text.replace('"magnification": ', '"magnification": -')),
        ("a streamed chat", lambda text: text.replace('"delta"', '"message"')),
    ],
)
def test_the_judge_is_strict(described: BaseSchema, asked: str, spoil: Callable[[str], str]) -> None:
    """A field that is missing, unknown or out of bounds, and an event of another name, are found."""
    with keyed() as http:
        response = ANSWERED[asked](http)
    assert spoil(response.text) != response.text
    response._content = spoil(response.text).encode()
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        hold(described, response)


def test_the_examples_work(document: Json) -> None:
    """The bodies that the document shows are answered: with success, or, where they name an upload or an address, as such."""
    http = client()
    for name, told in operations(document):
        content = told.get("requestBody", {}).get("content", {}).get("application/json", {})
        for example, shown in content.get("examples", {}).items():
            status = {"uploaded": (404,), "streamed": (422,)}.get(example, (200, 201))
            assert post_json(http, name.split()[1], shown["value"]).status_code in status, (name, example)


def test_405_names_every_method() -> None:
    """Where a path has several methods, all are named to who used another."""
    assert client().put("/v1/images/img_x").headers["allow"] == "DELETE, GET"


# --- schemathesis -------------------------------------------------------------------------------------------------------


def fuzz(url: str, *options: str, upload: str = "") -> None:
    """Let schemathesis try every operation; fails with its report."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(here / "schemathesis.toml")]
    given = {"SCHEMATHESIS_HOOKS": str(here / "sound.py"), "PYTHONPATH": str(here.parent), "ERGO_TEST_UPLOAD": upload}
    done = subprocess.run(
        [*command, "run", f"{url}/openapi.json", "--no-color", *options],
        capture_output=True,
        text=True,
        env=os.environ | given,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]


def test_schemathesis_finds_nothing() -> None:
    """No request, sound or not, brings about a server error, or an answer that is not documented; every operation succeeds."""
    with support.gateway(scripted(), max_visual_tokens=16_384) as url:
        image = httpx2.post(f"{url}/v1/images", content=picture(), headers=RAW, trust_env=False).json()["id"]
        fuzz(url, upload=image)


@pytest.mark.parametrize(
    ("key", "options"),
    [(KEY, ()), ("ergo-bob", ("--exclude-checks", "Answered", "--warnings", "off"))],
    ids=["with a key", "with a wrong key"],
)
def test_schemathesis_finds_nothing_where_keys_are_asked_for(key: str, options: tuple[str, ...]) -> None:
    """The same holds of a server with keys, for who has one and for who has not."""
    with support.gateway(scripted(), max_visual_tokens=16_384, api_keys=ALICE, requests_per_minute=0) as url:
        fuzz(url, "--header", f"Authorization: Bearer {key}", "--phases", "examples,fuzzing,stateful", *options)


# --- it can be read -----------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_from_elsewhere() -> None:
    """The page at /docs names files of this server only, they are there without a key, and its policy allows no others."""
    http = client(api_keys=ALICE)
    page = http.get("/docs")
    named = re.findall(r"(?:src|href)=\"([^\"]*)\"", page.text)
    assert [name for name in named if name != "data:,"] == ["/static/docs/swagger-ui.css", "/static/docs/swagger-ui-bundle.js"]
    assert "//" not in re.sub(r"<!--.*?-->", "", page.text)
    assert all(http.get(name).status_code == 200 for name in named[:1] + named[2:])
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert not re.search(r"https?:|\*|unsafe", policy)
    assert http.get("/redoc", headers={"authorization": f"Bearer {KEY}"}).status_code == 404


def test_the_reference_is_up_to_date(document: Json) -> None:
    """Running docs/api.py again would change nothing, so every operation and form is there."""
    made = runpy.run_path(str(support.ROOT / "docs" / "api.py"))["page"]()
    assert (support.ROOT / "docs" / "api.md").read_text() == made
    assert all(f"`{name}`" in made for name, _ in operations(document))
    assert all(f"### {name}\n" in made for name in document["components"]["schemas"])
    anchors = {line.lstrip("# ").lower() for line in made.splitlines() if line.startswith("### ")}
    assert set(re.findall(r"\]\(#([^)]*)\)", made)) <= anchors
