"""The questions of a batch: JSON lines, CSV, Parquet, or a folder of images with one question. Read row by row, never whole."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ergo_client import Question

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
"""Of images in a folder: the formats that the server reads."""

PARQUET_ROWS = 8
"""Read at a time; rows with photographs in them have several megabytes each."""

MAX_CELL = 1 << 28
"""Characters; the module's own limit of 131,072 is less than an image as a data: URL has."""

STDIN = Path("-")


class RowsUnreadable(Exception):
    """The questions cannot be read at all."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the input: a question, or what is wrong with it."""

    number: int
    """From 0."""
    given: dict[str, Any]
    """As it stands there, but for the bytes of an image."""
    question: Question | None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds for rows that do not say otherwise."""

    question: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of `Client.ask`."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of an input; they can be read more than once, unless they come through a pipe."""

    total: int | None
    """None where only the end will tell."""
    read: Callable[[], Iterator[Row]]


def open_rows(path: Path, defaults: Defaults) -> Rows:
    """Find out what an input is.

    Args:
        path: a folder, a file whose ending is .jsonl, .csv or .parquet, or ``-`` for JSON lines from standard input.
        defaults: the question and the options of rows without.

    Raises:
        RowsUnreadable: not there, or of no known kind.
    """
    try:
        if path == STDIN:
            return Rows(None, lambda: _rows(_json_lines(sys.stdin), Path(), defaults))
        if path.is_dir():
            return _folder(path, defaults)
        kind = path.suffix.lower()
        if kind == ".jsonl":
            return Rows(_count_lines(path), lambda: _rows(_opened(path, _json_lines), path.parent, defaults))
        if kind == ".csv":
            total = sum(1 for _ in _opened(path, _csv))
            return Rows(total, lambda: _rows(_opened(path, _csv), path.parent, defaults))
        if kind == ".parquet":
            return _parquet(path, defaults)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RowsUnreadable(f"{path} cannot be read: {error}") from error
    raise RowsUnreadable(f"{path}: give a folder of images, or a file that ends in .jsonl, .csv or .parquet")


Read = tuple[dict[str, Any], str | None]
"""A row as it stands in the input, and why it cannot be read."""


def _opened(path: Path, read: Callable[[TextIO], Iterator[Read]]) -> Iterator[Read]:
    with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte order mark
        yield from read(file)


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _json_lines(file: TextIO) -> Iterator[Read]:
    for line in file:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            yield {"line": line.strip()[:200]}, "the line is not JSON"
            continue
        yield (value, None) if isinstance(value, dict) else ({"line": line.strip()[:200]}, "the line is no JSON object")


def _csv(file: TextIO) -> Iterator[Read]:
    csv.field_size_limit(MAX_CELL)
    for given in csv.DictReader(file):
        extra = given.pop(None, None)
        yield {name: value for name, value in given.items() if value not in (None, "")}, "too many columns" if extra else None


def _parquet(path: Path, defaults: Defaults) -> Rows:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise RowsUnreadable("Parquet needs pyarrow: pip install pyarrow") from error

    def read() -> Iterator[Read]:
        # One row group after the other, as all that are asked for in one call are read at once.
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group]):
                    for row in batch.to_pylist():
                        yield {name: value for name, value in row.items() if value is not None}, None

    try:
        with parquet.ParquetFile(path) as file:
            total = file.metadata.num_rows
    except ArrowInvalid as error:
        raise RowsUnreadable(f"{path} cannot be read: {error}") from error
    return Rows(total, lambda: _rows(read(), path.parent, defaults))


def _folder(path: Path, defaults: Defaults) -> Rows:
    images = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not images:
        raise RowsUnreadable(f"there are no images in {path}")
    if defaults.question is None:
        raise RowsUnreadable("a folder needs --question")
    names = [str(image.relative_to(path)) for image in images]
    return Rows(len(names), lambda: _rows((({"image": name}, None) for name in names), path, defaults))


def _rows(read: Iterator[Read], folder: Path, defaults: Defaults) -> Iterator[Row]:
    for number, (given, problem) in enumerate(_guarded(read)):
        shown = {name: value for name, value in given.items() if _is_shown(value)}
        try:
            if problem is not None:
                raise ValueError(problem)
            yield Row(number, shown, _question(given, folder, defaults))
        except ValueError as error:
            yield Row(number, shown, None, str(error))


def _guarded(read: Iterator[Read]) -> Iterator[Read]:
    try:
        yield from read
    except (OSError, ValueError, csv.Error) as error:  # not UTF-8, cut short, and what pyarrow finds wrong are ValueErrors
        raise RowsUnreadable(f"the input cannot be read any further: {error}") from error


def _is_shown(value: object) -> bool:
    if isinstance(value, str):
        return not value.startswith("data:")
    return not (isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes)))


def _question(given: dict[str, Any], folder: Path, defaults: Defaults) -> Question:
    """Make a row's question; its columns may carry the options of `Client.ask`, too.

    Raises:
        ValueError: the row has no image or no question, or a column of the wrong kind.
    """
    question = given.get("question", defaults.question)
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the row has no question")
    options = dict(defaults.options)
    for name in ("choices", "instructions", "max_visual_tokens"):
        if name in given:
            options[name] = _choices(given[name]) if name == "choices" else given[name]
    if isinstance(options.get("max_visual_tokens"), str):  # a CSV file has nothing but text
        options["max_visual_tokens"] = _number(options["max_visual_tokens"])
    return Question(_image(given.get("image"), folder), question, **options)


def _image(value: object, folder: Path) -> str | bytes | Path:
    """Find a row's image: an address, a data: URL, an upload's id, a path from the input's folder, or bytes.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(value, dict):  # as data sets of the Hugging Face hub keep images
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value.strip():
        raise ValueError("the row has no image")
    if value.startswith(("http://", "https://", "data:", "img_")):
        return value
    return folder / value


def _number(text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError("max_visual_tokens is no number")
    return int(text)


def _choices(value: object) -> tuple[str, ...]:
    """Read a list, or one in a CSV cell: a JSON list, or choices with ``|`` between them.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str):
        value = _json(value) if value.lstrip().startswith("[") else [choice.strip() for choice in value.split("|")]
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise ValueError("choices must be a list of texts")
    return tuple(value)


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
