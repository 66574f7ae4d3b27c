"""Writes docs/api.md from the OpenAPI document: ``python docs/api.py``. A test holds that it is up to date."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ergo_server.api.app import create_app
from ergo_server.engine.scripted import ScriptedEngine
from ergo_server.settings import Settings

PAGE = Path(__file__).parent / "api.md"

HEAD = """# The HTTP interface

A running server shows the same at `/docs`, to be tried out, and at `/openapi.json`, for programs. This page is made from that
document by `python docs/api.py`.

"""

Json = dict[str, Any]


def _table(*columns: str) -> str:
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |\n"


def _code(value: object) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    text = text.replace("\n", "\\n")
    return f"`{text if len(text) <= 64 else text[:63] + '…'}`"


def _link(reference: str) -> str:
    name = reference.rpartition("/")[2]
    return f"[{name}](#{name.lower()})"


def _type(schema: Json) -> str:
    """Write a schema's type with its bounds."""
    if "$ref" in schema:
        return _link(schema["$ref"])
    if "const" in schema:
        return _code(schema["const"])
    if "enum" in schema:
        return ", ".join(_code(value) for value in schema["enum"])
    for many in ("anyOf", "oneOf"):
        if many in schema:
            return " or ".join(dict.fromkeys(_type(option) for option in schema[many]))
    match schema.get("type"):
        case "array" if "prefixItems" in schema:
            return f"list of {len(schema['prefixItems'])} {_type(schema['prefixItems'][0])}s"
        case "array":
            return f"list of {_type(schema['items'])}"
        case "string" if schema.get("format") == "binary":
            return "file"
        case "string":
            return schema.get("title") or ("base64" if schema.get("contentEncoding") else "text")
        case "integer" | "number" as kind:
            return {"integer": "whole number", "number": "number"}[kind] + _bounds(schema)
        case "boolean":
            return "true, false"
        case kind:
            return str(kind or "anything")


def _bounds(schema: Json) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    shown = {2**63 - 1: "2⁶³ - 1", -(2**63): "-2⁶³"}
    return "".join(f", {sign} {shown.get(schema[name], schema[name])}" for name, sign in signs.items() if name in schema)


def _example(schema: Json) -> str:
    return _code(schema["examples"][0]) if "examples" in schema else ""


def _fields(schema: Json) -> str:
    """Write the fields of an object: with defaults where it is read, and with which are always there where it is sent."""
    required, fields = schema.get("required", ()), schema["properties"]
    if not any("default" in field for name, field in fields.items() if name not in required):
        rows = [
            _row(
                f"`{name}`" if name in required else f"`{name}`, not always",
                _type(field),
                field["description"],
                _example(field),
            )
            for name, field in fields.items()
        ]
        return _table("field", "type", "what it is", "example") + "".join(rows)
    rows = [
        _row(
            f"`{name}`",
            _type(field),
            "needed" if name in required else _code(field["default"]),
            field["description"],
            _example(field),
        )
        for name, field in fields.items()
    ]
    return _table("field", "type", "default", "what it is", "example") + "".join(rows)


def _event(event: Json) -> str:
    data = event["properties"]["data"]
    name = event["properties"].get("event", {}).get("const", "")
    shown = _link(data["contentSchema"]["$ref"]) if "contentSchema" in data else _code(data["const"])
    return _row(f"`{name}`" if name else "", shown)


def _body(body: Json) -> Iterator[str]:
    yield "**Body**\n\n" + _table("content type", "form")
    for kind, content in body["content"].items():
        schema = content["schema"]
        form = "the same fields; `image` is a file, or a text as in the JSON; lists are sent as several fields of one name"
        yield _row(f"`{kind}`", _type(schema) if "$ref" in schema else schema.get("description", form))
    yield "\n"
    for example in body["content"]["application/json"].get("examples", {}).values():
        yield f"{example['summary']}:\n\n```json\n{json.dumps(example['value'], ensure_ascii=False)}\n```\n\n"


def _answers(responses: Json) -> Iterator[str]:
    yield "**Answers**\n\n" + _table("status", "what", "body", "headers")
    for status, response in responses.items():
        kinds = (_type(content["schema"]) for kind, content in response["content"].items() if kind != "text/event-stream")
        codes = next(iter(response["content"].values())).get("examples")
        what = ", ".join(f"`{code}`" for code in codes) if codes else response["description"]
        headers = dict.fromkeys("x-ratelimit-*" if name.startswith("x-ratelimit") else name for name in response["headers"])
        yield _row(status, what, " or ".join(kinds), ", ".join(map(_code, headers)))
    yield "\n"
    for response in responses.values():
        if events := response["content"].get("text/event-stream"):
            schema = events["schema"]
            yield "**Events**, where the answer is a stream (`text/event-stream`)\n\n" + _table("event", "data")
            yield "".join(map(_event, schema.get("oneOf") or schema["anyOf"])) + "\n"


def _operation(method: str, path: str, told: Json) -> Iterator[str]:
    yield f"### `{method.upper()} {path}`\n\n{told['summary']}. {told['description']}\n\n"
    if "security" in told:
        yield "Open: no key is asked for.\n\n"
    for given in told["parameters"]:
        if given["in"] == "path":
            yield f"`{given['name']}` is {given['description']}: {_code(given['example'])}.\n\n"
    if "requestBody" in told:
        yield from _body(told["requestBody"])
    yield from _answers(told["responses"])


def _page(document: Json) -> Iterator[str]:
    yield HEAD + document["info"]["description"] + "\n"
    for tag in document["tags"]:
        yield f"## {tag['name']}\n\n{tag['description']}\n\n"
        for path, methods in document["paths"].items():
            for method, told in methods.items():
                if tag["name"] in told["tags"]:
                    yield from _operation(method, path, told)
    yield "## Headers of answers\n\n" + _table("header", "type", "what it is", "example")
    for name, header in document["components"]["headers"].items():
        yield _row(f"`{name}`", _type(header["schema"]), header["description"], _code(header["example"]))
    yield "\n## Forms\n\n"
    for name, schema in document["components"]["schemas"].items():
        yield f"### {name}\n\n{schema['description']}\n\n{_fields(schema)}\n"


def page() -> str:
    """Return the page."""
    app = create_app(Settings(), ScriptedEngine(lambda conversation, sampling: ""))
    return "".join(_page(app.openapi())).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
