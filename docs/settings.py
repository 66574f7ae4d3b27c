"""Writes docs/configuration.md from the settings: ``python docs/settings.py``. A test holds that it is up to date."""

from __future__ import annotations

from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ergo_server.settings import Settings

PAGE = Path(__file__).parent / "configuration.md"

HEAD = """# Configuration

Every setting is an environment variable. `ergo-vqa serve` reads them once, at start, and names the variable whose value is out of
bounds. The defaults are meant to be safe on the open internet. This page is made from `server/ergo_server/settings.py` by
`python docs/settings.py`.

| variable | values | default | what it is, and why that |
|---|---|---|---|
"""

UNITS = (
    ("bytes_in_flight", "bytes"),
    ("bytes_per_second", "bytes a second"),
    ("_per_minute", "a minute"),
    ("_seconds", "seconds"),
    ("_bytes", "bytes"),
)
"""How names end, and the unit that they say."""

TYPES = {"int": "whole number", "float": "number", "str": "text", "Path": "path", "bool": "true, false", "SecretStr": "secret"}


def _values(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_values(part) for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is tuple:
        return f"JSON list of {_values(get_args(kind)[0])}"
    return TYPES[kind.__name__]


def _bounds(field: FieldInfo) -> str:
    signs = {annotated_types.Gt: (">", "gt"), annotated_types.Ge: ("≥", "ge"), annotated_types.Le: ("≤", "le")}
    found = [f"{signs[type(rule)][0]} {getattr(rule, signs[type(rule)][1]):,}" for rule in field.metadata if type(rule) in signs]
    return "".join(f", {bound}" for bound in found)


def _default(name: str, value: object) -> str:
    if value is None or value == "":
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"`[{', '.join(repr(part).replace(chr(39), chr(34)) for part in value)}]`"
    if isinstance(value, (int, float)):
        if "bytes" in name and value >= 1 << 20 and value % (1 << 20) == 0:
            return f"{value:.0f} ({value // (1 << 20):,} MiB)"
        return f"{value:.10g}"
    return f"`{value}`"


def page() -> str:
    """Return the page."""
    rows = []
    for name, field in Settings.model_fields.items():
        assert field.default is not PydanticUndefined, f"{name} has no default"
        assert field.description, f"{name} has no reason"
        unit = next((f", {unit}" for end, unit in UNITS if name.endswith(end)), "")
        values = f"{_values(field.annotation)}{unit}{_bounds(field)}"
        what = " ".join(field.description.split()).replace("|", "\\|")
        rows.append(f"| `ERGO_{name.upper()}` | {values} | {_default(name, field.default)} | {what} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
