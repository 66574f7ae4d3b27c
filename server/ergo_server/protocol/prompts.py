"""Prompts are data: a TOML file beside each checkpoint, or one that the operator imports.

::

    [budget]                 visual tokens of one view (optional: those of ERGO-7B)
    default = 640
    largest = 1280

    [zoom]                   first turn: {question}
    system = "…"
    user = "…"

    [answer]                 second turn: {question}{choices}{instructions}
    user = "…"

    [single]                 the only turn when there is no zoom
    system = "…"
    user = "…"

``{choices}`` is empty or one line for each choice, ``{instructions}`` empty or one line; both begin with a line break.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from ergo_server.imaging.geometry import PixelBudget
from ergo_server.protocol.base import ModelProfile, Prompts, Question

_FIELD = re.compile(r"\{(question|choices|instructions)\}")
_FOREIGN_FIELD = re.compile(r"\{(?:[Qq]uestion|QUESTION)?\}|%s")


class PromptsError(ValueError):
    """A prompts file is not usable; the message says where."""


def fill(template: str, question: Question, *, choices: bool) -> str:
    """Put a question into a template, in one pass: nothing in the question is taken for a field.

    Args:
        template: a prompt with ``{question}`` and perhaps ``{choices}`` and ``{instructions}``.
        question: what the caller asks.
        choices: whether this turn may see choices and instructions.
    """
    values = {"question": question.text, "choices": "", "instructions": ""}
    if choices:
        lines = (f"\n({label}) {choice}" for label, choice in zip(question.labels, question.choices, strict=True))
        values["choices"] = "".join(lines)
        values["instructions"] = f"\n{question.instructions}" if question.instructions else ""
    return _FIELD.sub(lambda found: values[found[1]], template)


def builtin_profile() -> ModelProfile:
    """Return the profile of ERGO-7B, in our own words."""
    file = resources.files("ergo_server.protocol") / "prompts" / "ergo.toml"
    return read_profile(file.read_text(encoding="utf-8"), source="ergo.toml")


def load_profile(path: Path) -> ModelProfile:
    """Read a prompts file.

    Raises:
        PromptsError: the file cannot be read, or lacks something.
    """
    try:
        return read_profile(path.read_text(encoding="utf-8"), source=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise PromptsError(f"{path}: {error}") from error


def read_profile(text: str, *, source: str) -> ModelProfile:
    """Read the text of a prompts file; see the head of this module.

    Raises:
        PromptsError: not TOML, a prompt is missing or is no string, lacks ``{question}``, or the budget is out of bounds.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PromptsError(f"{source}: {error}") from error
    prompts = Prompts(
        zoom_system=_prompt(table, "zoom", "system", source, fields=()),
        zoom_user=_prompt(table, "zoom", "user", source),
        answer_user=_prompt(table, "answer", "user", source),
        single_system=_prompt(table, "single", "system", source, fields=()),
        single_user=_prompt(table, "single", "user", source),
    )
    # Without a budget: the two constraints at which the paper evaluates ERGO-7B.
    budget = table.get("budget", {"default": 640, "largest": 1280})
    if not isinstance(budget, dict):
        raise PromptsError(f"{source}: budget is no table")
    default, largest = budget.get("default"), budget.get("largest")
    if not isinstance(default, int) or not isinstance(largest, int):
        raise PromptsError(f"{source}: [budget] default or largest is missing or is no whole number")
    try:
        PixelBudget(default), PixelBudget(largest)
    except ValueError as error:
        raise PromptsError(f"{source}: [budget] {error}") from error
    if default > largest:
        raise PromptsError(f"{source}: [budget] default is above largest")
    return ModelProfile(prompts, default, largest, source)


def _prompt(table: dict[str, Any], section: str, key: str, source: str, fields: tuple[str, ...] = ("{question}",)) -> str:
    found = table.get(section)
    value = found.get(key) if isinstance(found, dict) else None
    if not isinstance(value, str):
        raise PromptsError(f"{source}: [{section}] {key} is missing or is no string")
    for name in fields:
        if name not in value:
            raise PromptsError(f"{source}: [{section}] {key} lacks {name}")
    return value


def import_prompts(
    text: str,
    *,
    source: str,
    zoom_system: str = "SYSTEM_PROMPT",
    zoom_user: str = "QUESTION_TEMPLATE1",
    answer_user: str = "QUESTION_TEMPLATE2",
) -> str:
    """Return a prompts file made of string constants of a TOML file (named so) or a Python file, which is read, never run.

    The names default to those that ERGO's published evaluation code gives its three prompts. A field of any usual spelling
    (``{question}``, ``{Question}``, ``{}``, ``%s``) becomes ``{question}``; in the answer turn, choices and instructions
    follow it, as upstream joins them. The prompts of the single turn are ours: the published code has none.

    Raises:
        PromptsError: the file is not valid, or one of the constants is not a string in it.
    """
    constants = _constants(text, source)
    missing = [name for name in (zoom_system, zoom_user, answer_user) if name not in constants]
    if missing:
        found = ", ".join(sorted(constants)) or "none"
        raise PromptsError(f"{source}: no string constant named {', '.join(missing)}; found {found}")
    ours = builtin_profile()
    sections: dict[str, dict[str, str | int]] = {
        "budget": {"default": ours.default_visual_tokens, "largest": ours.max_visual_tokens},
        "zoom": {"system": constants[zoom_system], "user": _FOREIGN_FIELD.sub("{question}", constants[zoom_user])},
        "answer": {"user": _FOREIGN_FIELD.sub("{question}{choices}{instructions}", constants[answer_user])},
        "single": {"system": ours.prompts.single_system, "user": ours.prompts.single_user},
    }
    made = "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in section.items())
        for name, section in sections.items()
    )
    read_profile(made, source=source)  # so that a template without a question is refused here, not at start-up
    return made


def _constants(text: str, source: str) -> dict[str, str]:
    # The name decides, not the text: a file of assignments is often both, and the two read '\\n' differently.
    try:
        if source.endswith(".toml"):
            return {key: value for key, value in tomllib.loads(text).items() if isinstance(value, str)}
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:  # TOMLDecodeError is a ValueError
        raise PromptsError(f"{source}: {error}") from error
    found = {}
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                found[target.id] = value.value
    return found


def _toml(value: str | int) -> str:
    # JSON's strings are TOML's basic strings, but for DEL, which TOML wants escaped too.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
