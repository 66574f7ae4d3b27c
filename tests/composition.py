"""The Compose file as Compose reads it: variables filled in, services by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml
from support import ROOT

FOLDER = ROOT / "docker"
FILE = FOLDER / "compose.yaml"

_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<rest>[^}]*))?\}")


def variables() -> dict[str, set[str | None]]:
    """Return the variables of the Compose file with the defaults that it gives them; None is for one that must be set."""
    found: dict[str, set[str | None]] = {}
    for match in _VARIABLE.finditer(FILE.read_text()):
        found.setdefault(match["name"], set()).add(match["rest"] if match["kind"] == "-" else None)
    return found


def example() -> dict[str, str]:
    """Return the variables of .env.example."""
    lines = (FOLDER / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def composition(given: Mapping[str, str]) -> dict[str, Any]:
    """Return the Compose file with variables filled in.

    Raises:
        KeyError: a variable that must be set is not.
    """

    def value(match: re.Match[str]) -> str:
        return given.get(match["name"]) or (match["rest"] if match["kind"] == "-" else given[match["name"]])

    read: dict[str, Any] = yaml.safe_load(_VARIABLE.sub(value, FILE.read_text()))
    return read


def engine_flags() -> list[str]:
    """Return what vLLM is started with, behind the model, where .env is as .env.example."""
    flags: list[str] = composition(example())["services"]["engine"]["command"][1:]
    return flags
