"""Writes ergo-vqa/values.schema.json from the comments of values.yaml, and from the gateway's own settings.

What stands above a value is its description; the JSON after ``@schema`` there is added to what the default says of its type.
Two keys are this program's own: ``x-settings`` takes the properties from ``Settings``, ``x-free`` lets any property pass.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from ergo_server.settings import Settings

CHART = Path(__file__).parent / "ergo-vqa"
MARK = "@schema "

OF_THE_CHART = {
    "host",
    "port",
    "engine",
    "engine_url",
    "engine_model",
    "engine_api_key",
    "engine_api_key_file",
    "session_secret",
    "session_secret_file",
    "prompts",
    "api_keys",
    "api_keys_file",
    "drain_grace_seconds",
    "drain_seconds",
}
"""Settings that the templates set from other values, or that are secrets."""

EMBEDDED = {"checkpoint", "device", "threads"}
"""Settings of an engine that the chart does not run."""

Schema = dict[str, Any]


def schema() -> Schema:
    """Return the schema of the chart's values.

    Raises:
        ValueError: a value has no comment, or what comes after ``@schema`` is no JSON.
    """
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    root = yaml.compose(text)
    made = _of(root, yaml.safe_load(text), text.splitlines(), "")
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of ergo-vqa"} | made


def settings() -> Schema:
    """Return types and bounds of the gateway's settings that may be given as values; docs/configuration.md has their words."""
    found = {}
    for name, about in Settings.model_json_schema()["properties"].items():
        if name not in OF_THE_CHART | EMBEDDED:
            found[name] = {key: value for key, value in about.items() if key not in ("title", "default", "description")}
    return found


def _of(node: Any, value: object, lines: list[str], path: str) -> Schema:
    """Return the schema of a mapping."""
    properties = {}
    for key, below in node.value:
        name = key.value
        description, added = _comment(lines, key.start_mark.line, f"{path}{name}")
        default = value[name]  # type: ignore[index]
        made: Schema = {"description": description, "type": _type(default)}
        if added.pop("x-settings", False):
            made |= {"properties": settings(), "additionalProperties": False}
        elif not added.pop("x-free", False) and isinstance(default, dict) and default and "additionalProperties" not in added:
            made |= _of(below, default, lines, f"{path}{name}.")
        properties[name] = made | added
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _comment(lines: list[str], at: int, name: str) -> tuple[str, Schema]:
    """Return description and ``@schema`` of the comment above a line."""
    above: list[str] = []
    while at and lines[at - 1].strip().startswith("#"):
        at -= 1
        above.insert(0, lines[at].strip().removeprefix("#").strip())
    marks = [line.removeprefix(MARK) for line in above if line.startswith(MARK)]
    description = " ".join(line for line in above if not line.startswith(MARK))
    if not description:
        raise ValueError(f"{name} has no comment")
    return description, {key: value for mark in marks for key, value in json.loads(mark).items()}


def _type(default: object) -> str:
    kinds = {bool: "boolean", int: "integer", str: "string", list: "array", dict: "object"}
    return kinds[type(default)]


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else CHART / "values.schema.json"
    out.write_text(json.dumps(schema(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
