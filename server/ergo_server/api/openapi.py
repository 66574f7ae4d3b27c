"""The OpenAPI document, and how a route says what it takes and gives.

FastAPI would read that from the handlers' arguments. Ours read their bodies while they arrive and answer in several forms, so
each route declares itself with `operation`, and `document` puts together what the routers' routes have declared. Texts about
errors come from ``errors.py``, those about fields from the forms.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema

from ergo_server import __version__
from ergo_server.api import chat_schemas, schemas
from ergo_server.api.schemas import ErrorEnvelope, Form, Shown
from ergo_server.errors import (
    BodyTooLarge,
    BodyTooSlow,
    ContextTooLong,
    EngineError,
    ErgoError,
    ImageError,
    ImageNotFetched,
    Overloaded,
    RateLimited,
    RequestError,
    Unauthenticated,
    UnknownImage,
    UnknownModel,
    UnsupportedBody,
)

Json = dict[str, Any]
Errors = tuple[type[ErgoError], ...]

REF = "#/components/schemas/{model}"

# --- which errors there are, and where ----------------------------------------------------------------------------------


def kinds(root: type[ErgoError]) -> Errors:
    """Return the errors of a branch of the tree that are raised: all but the two that only group others."""
    below = tuple(kind for child in root.__subclasses__() for kind in kinds(child))
    return below if root in (ImageError, EngineError) else (root, *below)


ANY: Errors = (RequestError, BodyTooLarge, UnsupportedBody, ErgoError)
"""Of every operation: what the head of a request, or a mistake of the server's, can bring about."""

KEYED: Errors = (*ANY, Unauthenticated)
"""Where a key is asked for."""

UPLOADING: Errors = (*KEYED, BodyTooSlow, UnknownImage, *kinds(ImageError), RateLimited, Overloaded)
"""Where an image comes in."""

ESTIMATING: Errors = tuple(kind for kind in (*UPLOADING, UnknownModel) if kind is not ImageNotFetched)
"""There nothing is fetched."""

ASKING: Errors = (*UPLOADING, UnknownModel, *kinds(EngineError))
"""Where the engine is asked."""

_PARAMS: Mapping[type[ErgoError], str] = {
    ImageError: "image",
    UnknownImage: "image",
    UnknownModel: "model",
    ContextTooLong: "max_visual_tokens",
}


def _meaning(kind: type[ErgoError]) -> str:
    """Return what an error's docstring says first. That of the root is about the tree: raised itself, it is a mistake of ours."""
    if kind is ErgoError:
        return "The server made a mistake; the request id names it in its log."
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def _example(kind: type[ErgoError]) -> Json:
    param = next((param for base, param in _PARAMS.items() if issubclass(kind, base)), None)
    error = {"message": _meaning(kind), "type": kind.type, "param": param, "code": kind.code}
    return {"summary": _meaning(kind), "value": {"error": error}}


def _failures(errors: Errors) -> Iterator[tuple[str, Json]]:
    """Yield a response for each status of the errors, with an example for each code."""
    for status in sorted({kind.status for kind in errors}):
        found = {kind.code: kind for kind in errors if kind.status == status}
        examples = {code: {"$ref": f"#/components/examples/{code}"} for code in sorted(found)}
        lines = (f"* `{code}`: {_meaning(kind)}" for code, kind in sorted(found.items()))
        yield (
            str(status),
            {
                "description": "\n".join(lines),
                "headers": _headers("x-request-id", *_ERROR_HEADERS.get(status, ())),
                "content": {"application/json": {"schema": _ref(ErrorEnvelope), "examples": examples}},
            },
        )


# --- headers ------------------------------------------------------------------------------------------------------------

_HEADERS: Mapping[str, tuple[str, Json, object]] = {
    "x-request-id": (
        "names the request in the server's log; the caller's own, if its form is this one",
        {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
        schemas.REQUEST_ID,
    ),
    "server-timing": (
        "milliseconds of each stage that ran, and of all; not with a stream, nor where a conversation was passed through",
        {"type": "string"},
        "receive;dur=8.056, overview;dur=4.66, zoom_turn;dur=155.238, crop;dur=2.664, answer_turn;dur=72.401, total;dur=258.839",
    ),
    "retry-after": ("seconds after which to try again, where that makes sense", {"type": "integer", "minimum": 1}, 3),
    "retry-after-ms": ("the same in milliseconds, where the server's own limits refuse", {"type": "integer", "minimum": 1}, 2600),
    "www-authenticate": ("how to bring the key", {"type": "string", "const": "Bearer"}, "Bearer"),
    "connection": (
        "the connection is closed: the rest of the body would be taken for a request",
        {"type": "string", "const": "close"},
        "close",
    ),
    **{
        f"x-ratelimit-{what}-{of}": (f"{meaning}{name}; where the tenant has such a limit", schema, example)
        for of, name in (("requests", "requests"), ("tokens", "visual tokens"))
        for what, meaning, schema, example in (
            ("limit", "a minute's worth of ", {"type": "integer", "minimum": 1}, 240),
            ("remaining", "what is left of it, in ", {"type": "integer", "minimum": 0}, 239),
            ("reset", "time until all of it is there again (`20ms`, `8.64s`, `1m30s`), of ", {"type": "string"}, "250ms"),
        )
    },
}
"""Every header that says something: what, its schema, an example."""

_ALWAYS = ("x-request-id", "www-authenticate")
"""Those that are there wherever they are named."""

RATE_LIMITS = tuple(name for name in _HEADERS if name.startswith("x-ratelimit"))

ANSWERED = ("server-timing", *RATE_LIMITS)
"""Of an answer to a question."""

_ERROR_HEADERS: Mapping[int, tuple[str, ...]] = {
    Unauthenticated.status: ("www-authenticate",),
    BodyTooSlow.status: ("connection",),
    RateLimited.status: ("retry-after", "retry-after-ms", *RATE_LIMITS),
    Overloaded.status: ("retry-after", "retry-after-ms"),
}


def _headers(*names: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _header(name: str) -> Json:
    description, schema, example = _HEADERS[name]
    return {"description": description, "required": name in _ALWAYS, "schema": schema, "example": example}


# --- what a route says of itself ----------------------------------------------------------------------------------------


def operation(
    name: str,
    summary: str,
    *answers: Json,
    errors: Errors = ANY,
    body: Json | None = None,
    parameters: Sequence[Json] = (),
) -> Json:
    """Declare what a route takes and gives.

    Args:
        name: of the operation; generated clients name their methods by it.
        summary: a few words; the handler's docstring is the description.
        answers: from `answer`.
        errors: that it can answer.
        body: from `image_body` or `json_body`.
        parameters: from `query` or `path`.

    Returns:
        Keyword arguments for the route's decorator.
    """
    responses = dict(_failures(errors))
    for given in answers:
        responses |= given
    extra: Json = {"parameters": [*parameters], "responses": dict(sorted(responses.items()))}
    if body is not None:
        extra["requestBody"] = body
    if Unauthenticated not in errors:
        extra["security"] = []
    return {"operation_id": name, "summary": summary, "openapi_extra": extra}


def answer(
    description: str,
    form: type[BaseModel] | str,
    *,
    status: int = 200,
    events: Json | None = None,
    headers: tuple[str, ...] = (),
    links: Json | None = None,
) -> Json:
    """Describe what is answered where all is well.

    Args:
        description: what it is.
        form: of the JSON; or the media type of a text.
        status: of the response.
        events: schema of one event, where it can be a stream.
        headers: beside the request's id.
        links: what can be done with it next.
    """
    kind, schema = (form, {"type": "string"}) if isinstance(form, str) else ("application/json", _ref(form))
    content: Json = {kind: {"schema": schema}}
    if events is not None:
        content["text/event-stream"] = {"schema": events}
    shown: Json = {"description": description, "headers": _headers("x-request-id", *headers), "content": content}
    return {str(status): shown | ({"links": links} if links else {})}


def named_events(**forms: type[BaseModel]) -> Json:
    """Return the schema of one event of a stream whose events have names; ``_`` stands for the dot in a name."""
    return {"oneOf": [_event(form, {"event": {"const": name.replace("_", ".")}}) for name, form in forms.items()]}


def chunks(*forms: type[BaseModel]) -> Json:
    """Return the schema of one event of a stream of OpenAI's: nameless, and a last one that is no JSON."""
    end = {"type": "object", "title": "end", "properties": {"data": {"const": "[DONE]"}}, "required": ["data"]}
    return {"anyOf": [*(_event(form, {}) for form in forms), end]}


def _event(form: type[BaseModel], named: Json) -> Json:
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": _ref(form)}
    title = named["event"]["const"] if named else form.__name__
    return {"type": "object", "title": title, "properties": {**named, "data": data}, "required": [*named, "data"]}


def json_body(form: type[BaseModel], **examples: tuple[str, Json]) -> Json:
    """Describe a body of JSON.

    Args:
        form: what it holds.
        examples: by name, a few words and the value.
    """
    shown = {name: {"summary": summary, "value": value} for name, (summary, value) in examples.items()}
    return {"required": True, "content": {"application/json": {"schema": _ref(form), "examples": shown}}}


def image_body(form: type[BaseModel], fields: type[Form], **examples: tuple[str, Json]) -> Json:
    """Describe the three forms of a body with an image: JSON, a multipart form, the image itself.

    Args:
        form: of the JSON.
        fields: of the multipart form, beside the image.
        examples: of the JSON, by name: a few words and the value.
    """
    file = {"type": "string", "format": "binary"}
    image = file | {"description": "the file; or, as text, what JSON says of an image: an id, an address, a data: URL"}
    names = [name for name, field in fields.model_fields.items() if field.is_required()]
    multipart = {
        "type": "object",
        "properties": {"image": image, **_flat(fields)},
        "required": ["image", *names],
        "additionalProperties": False,
    }
    body = json_body(form, **examples)
    body["content"] |= {
        "multipart/form-data": {
            "schema": multipart,
            "encoding": {"image": {"contentType": ", ".join(f"image/{kind}" for kind in schemas.FORMATS)}},
        },
        "image/*": {"schema": file | {"description": "the file; the fields are in the query"}},
        "application/octet-stream": {"schema": file | {"description": "the same: what it is, is found from its bytes"}},
    }
    return body


def query(fields: type[Form]) -> list[Json]:
    """Describe the fields in a query, beside a body that is an image."""
    return [
        {
            "name": name,
            "in": "query",
            "description": f"with an image as the body: {schema['description']}",
            "schema": {key: value for key, value in schema.items() if key not in ("description", "examples")},
            "example": schema["examples"][0],
        }
        for name, schema in _flat(fields).items()
    ]


def path(name: str, description: str, example: str) -> list[Json]:
    """Describe the one parameter of a path."""
    schema = {"type": "string", "minLength": 1}
    return [{"name": name, "in": "path", "required": True, "description": description, "schema": schema, "example": example}]


def _flat(fields: type[Form]) -> Json:
    """Return the schemas of fields where there is no null: in a form or a query, what is unset is left out."""
    found = {}
    for name, schema in fields.model_json_schema(schema_generator=_Schemas)["properties"].items():
        kept = {key: value for key, value in schema.items() if not (key == "default" and value is None)}
        for option in kept.pop("anyOf", ()):
            if option != {"type": "null"}:
                kept |= option
        found[name] = kept
    return found


# --- the document -------------------------------------------------------------------------------------------------------

_TAGS = {
    "questions": "Questions about one image, in the server's own form: where the answer was found, and what it cost.",
    "images": "Images that are kept for a while, so that many questions cost one upload.",
    "OpenAI": "The forms of OpenAI's clients: change their base URL to this server's `/v1`.",
    "operation": "For load balancers, monitoring and those who operate the server.",
}

_ABOUT = """\
Answers questions about high-resolution images: looks at the whole within a budget of visual tokens, zooms in once, answers.

**Keys.** Where the operator has set API keys, all but the open operations ask for one: `Authorization: Bearer KEY`.

**Errors.** Every error, whatever the path, has the form of `ErrorEnvelope` and an `x-request-id`. Each operation lists what it
can answer. Beside that, any request may be refused before it has reached one: 400 `invalid_request` (no HTTP, or too long a
head), 408 `request_timeout` (too slow a head), 503 `overloaded` (too many connections, or the server is stopping), and, at paths
and with methods that are not in this document, 404 `not_found` and 405 `method_not_allowed`, which names the right ones in
`allow`.

| code | status | type | meaning |
|---|---|---|---|
{errors}
"""


REQUESTS: tuple[type[BaseModel], ...] = (
    schemas.VqaRequest,
    schemas.EstimateRequest,
    schemas.UploadRequest,
    chat_schemas.ChatRequest,
)
"""The forms that are read."""


class _Schemas(GenerateJsonSchema):
    """Without titles, which repeat the names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never."""
        return False


def _ref(form: type[BaseModel]) -> Json:
    return {"$ref": REF.format(model=form.__name__)}


def _forms() -> Json:
    """Return the schemas of all forms: of requests as they are read, of answers as they are sent."""
    found = [form for module in (schemas, chat_schemas) for form in vars(module).values() if inspect.isclass(form)]
    modes: dict[type[BaseModel], JsonSchemaMode] = dict.fromkeys(REQUESTS, "validation")
    modes |= {form: "serialization" for form in found if issubclass(form, Shown) and form is not Shown}
    inputs = sorted(modes.items(), key=lambda pair: pair[0].__name__)
    _, made = models_json_schema(inputs, ref_template=REF, schema_generator=_Schemas)
    return dict(sorted(made["$defs"].items()))


def _operations(routers: Iterable[APIRouter]) -> Iterator[tuple[str, str, Json]]:
    """Yield path, method and description of each route that is to be seen."""
    for router in routers:
        for route in router.routes:
            if isinstance(route, APIRoute) and route.include_in_schema:
                told = {"operationId": route.operation_id, "tags": route.tags, "summary": route.summary}
                told |= {"description": route.description} | (route.openapi_extra or {})
                yield from ((route.path_format, method.lower(), told) for method in route.methods or ())


def document(routers: Iterable[APIRouter]) -> Json:
    """Return the OpenAPI document of some routers."""
    errors = sorted(kinds(ErgoError), key=lambda kind: (kind.status, kind.code))
    rows = "\n".join(f"| `{kind.code}` | {kind.status} | `{kind.type}` | {_meaning(kind)} |" for kind in errors)
    paths: dict[str, Json] = {}
    for where, method, told in _operations(routers):
        paths.setdefault(where, {})[method] = told
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ergo-vqa",
            "version": __version__,
            "summary": "An inference server for questions about high-resolution images.",
            "description": _ABOUT.format(errors=rows),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "this server"}],
        "security": [{}, {"key": []}],
        "tags": [{"name": name, "description": description} for name, description in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": _forms(),
            "headers": {name: _header(name) for name in _HEADERS},
            "examples": {kind.code: _example(kind) for kind in errors},
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, as `ergo-vqa keys new` draws it; asked for where the operator has set some.",
                }
            },
        },
    }
