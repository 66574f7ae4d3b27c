"""``ergo-vqa batch``: many questions, one line of JSON for each, and no work lost when it is killed.

The output has one line a row, in the order of the rows, so how many whole lines it has tells where to go on. To ask failed rows
again, the output is renamed to ``….previous``, and its good lines are copied instead of asked; that can be killed, too.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ergo_client import (
    Answer,
    Client,
    ClientError,
    NotAllowed,
    Progress,
    Question,
    TimedOut,
    UnexpectedResponse,
    Unreachable,
)
from ergo_client.cli.rows import Defaults, Row, Rows, RowsUnreadable, open_rows
from ergo_client.cli.terminal import ProgressBar, complain

RETRIES = 8
"""Of each row: nobody sits beside a batch, so it waits for longer than a person would."""

MOST_WAITING = 1024
"""Rows read and not written; far more than are asked for at a time. Between two failed rows of an earlier run may stand millions
of good ones, whose lines are not all to be kept while the first of the two is asked again."""

EXIT_ROWS_FAILED = 3
"""Finished, but some rows hold an error instead of an answer."""

EXIT_INTERRUPTED = 130
"""As shells report the signal of Ctrl-C (128 + 2)."""


class BatchStopped(Exception):
    """The batch cannot go on, but can be taken up again."""


def run(args: argparse.Namespace) -> int:
    """Ask the questions of a file; returns the exit status."""
    options = {"model": args.model, "zoom": args.zoom, "max_visual_tokens": args.max_visual_tokens}
    try:
        rows = open_rows(args.input, Defaults(args.question, options))
        with _Output(args.output, retry_errors=args.retry_errors) as output:
            bar = ProgressBar(rows.total, output.lines, quiet=args.quiet)
            with Client(args.url, timeout=args.timeout, max_retries=RETRIES) as client:
                progress = _answer(client, rows, output, bar, args.concurrency)
            output.finish()
            bar.show(progress, last=True)
    except (RowsUnreadable, BatchStopped, OSError) as error:
        complain(str(error))
        return 1
    except KeyboardInterrupt:
        complain("stopped; the same command goes on where it stopped")
        return EXIT_INTERRUPTED
    return EXIT_ROWS_FAILED if output.failed else 0


def _answer(client: Client, rows: Rows, output: _Output, bar: ProgressBar, concurrency: int) -> Progress:
    """Answer the rows that are not answered yet, and write them in their order."""
    unwritten, progress = output.unwritten(rows.read()), Progress(0, 0, 0, 0)
    waiting: collections.deque[_Waiting] = collections.deque()

    def questions() -> Iterator[Question]:
        for row in unwritten:
            known = output.previous(row)
            if known is None and row.question is None:
                known = _line(row.number, row.given, error={"code": "row_unreadable", "message": row.problem})
            waiting.append(_Waiting(row.number, row.given, known))
            if known is None and row.question is not None:
                yield row.question
            if len(waiting) >= MOST_WAITING:
                return

    def write(found: Answer | ClientError | None) -> None:
        """Write the row that was asked, and all that follow it and were known before."""
        nonlocal progress
        while waiting and (found is not None or waiting[0].line is not None):
            row = waiting.popleft()
            line = row.line
            if line is None and found is not None:
                line, found = _found(row, found), None
            assert line is not None
            output.write(line)
            progress = _further(progress, line)
            bar.show(progress)

    while True:
        with contextlib.closing(client.ask_many(questions(), concurrency=concurrency)) as results:
            for result in results:
                write(result)
        write(None)
        if (next_row := next(unwritten, None)) is None:
            return progress
        unwritten = itertools.chain([next_row], unwritten)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A row that was read and is not written."""

    number: int
    given: dict[str, Any]
    line: dict[str, Any] | None
    """None while it is asked for."""


def _further(progress: Progress, line: dict[str, Any]) -> Progress:
    tokens = line.get("visual_tokens") or {"total": 0, "baseline": 0}
    return Progress(
        progress.done + 1,
        progress.failed + (line["error"] is not None),
        progress.visual_tokens + tokens["total"],
        progress.baseline + tokens["baseline"],
    )


def _found(row: _Waiting, result: Answer | ClientError) -> dict[str, Any]:
    """Return the line of a row that was asked.

    Raises:
        BatchStopped: the failure is not the row's: without a server or a key, every row would fail.
    """
    if isinstance(result, NotAllowed | Unreachable | UnexpectedResponse):
        raise BatchStopped(f"row {row.number}: {result}; the same command goes on there")
    if isinstance(result, ClientError):
        code = result.code or ("timed_out" if isinstance(result, TimedOut) else f"http_{result.status}")  # a proxy has no codes
        error = {"code": code, "message": result.message, "status": result.status, "request_id": result.request_id}
        return _line(row.number, row.given, error=error)
    raw = result.raw
    kept = ("answer", "choice", "finish_reason", "image", "regions", "visual_tokens", "usage", "timings")
    return _line(row.number, row.given, **{name: raw[name] for name in kept}, request_id=result.request_id, error=None)


def _line(number: int, given: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"row": number, "input": given, **more}


class _Output:
    """The lines that are written, and where to go on.

    Args:
        path: of the output; locked, so that two batches do not write into one file.
        retry_errors: ask the rows again that hold an error.

    Raises:
        BatchStopped: it is locked, or is no output of a batch.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, *, retry_errors: bool) -> None:
        self.lines = 0
        """Whole lines that were there."""
        self.failed = 0
        """Rows that hold an error, of these lines and of new ones."""
        self._path = path
        self._before = path.with_name(path.name + ".previous")
        self._retry_errors = retry_errors
        self._last: dict[str, Any] = {}
        self._old: Iterator[dict[str, Any]] = iter(())
        self._next_old: dict[str, Any] | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Output:
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(_locked(self._path))
            if self._retry_errors and not self._before.exists():
                self._path.rename(self._before)
                self._file = stack.enter_context(_locked(self._path))
            self._take_up()
            if self._before.exists():
                self._old = _read_lines(stack.enter_context(self._before.open("rb")), self._before)
                self._next_old = next(self._old, None)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _take_up(self) -> None:
        """Count what is there, and drop the line in whose middle the last run was killed."""
        self._file.seek(0)
        end = 0
        for line in _read_lines(self._file, self._path):
            if line.get("row") != self.lines:
                raise BatchStopped(f"{self._path} was not written by a batch: its line {self.lines + 1} is not row {self.lines}")
            self.lines += 1
            self.failed += line.get("error") is not None
            self._last = line
            end = self._file.tell()
        self._file.truncate(end)

    def unwritten(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yield the rows that have no line yet.

        Raises:
            BatchStopped: the lines are those of another input.
        """
        for row in rows:
            if row.number == self.lines - 1 and _as_json(row.given) != self._last.get("input"):
                raise BatchStopped(f"{self._path} holds answers to another input: row {row.number} differs")
            if row.number >= self.lines:
                yield row

    def previous(self, row: Row) -> dict[str, Any] | None:
        """Return the good line of a row from before the retry."""
        while self._next_old is not None and self._next_old["row"] < row.number:
            self._next_old = next(self._old, None)
        line = self._next_old
        same = line is not None and line["row"] == row.number and line.get("input") == _as_json(row.given)
        return line if line is not None and same and line.get("error") is None else None

    def write(self, line: dict[str, Any]) -> None:
        """Write a line; from then on it survives the end of this process."""
        self._file.write(json.dumps(line, ensure_ascii=False, default=str).encode() + b"\n")
        self._file.flush()
        self.failed += line.get("error") is not None

    def finish(self) -> None:
        """All rows are written: what was copied from is not needed any more."""
        os.fsync(self._file.fileno())
        self._before.unlink(missing_ok=True)


def _locked(path: Path) -> BinaryIO:
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise BatchStopped(f"another batch is writing {path}") from error
    return file


def _read_lines(file: BinaryIO, path: Path) -> Iterator[dict[str, Any]]:
    """Yield whole lines; the last one may have been cut off."""
    while (line := file.readline()).endswith(b"\n"):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise BatchStopped(f"{path} was not written by a batch") from error
        if not isinstance(value, dict):
            raise BatchStopped(f"{path} was not written by a batch")
        yield value


def _as_json(given: dict[str, Any]) -> object:
    """Return a row as it will be read back from its line."""
    return json.loads(json.dumps(given, default=str))
