"""Logs: one line for every request, and no line with anything of its content.

A line holds ids, sizes, counts, times, and names out of closed sets. What an exception says may quote a prompt, so none is
written with its text: its kind and the places it came through are.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, TextIO

from ergo_server.pipeline import EngineCall, Record
from ergo_server.telemetry.exchange import Exchange, milliseconds

Format = Literal["auto", "text", "json"]
Level = Literal["info", "warning", "error"]

Fields = dict[str, Any]

log = logging.getLogger("ergo_server.access")


def configure(level: Level, form: Format, stream: TextIO | None = None) -> None:
    """Write what the process logs to its standard error, one line each; for the whole process.

    Args:
        level: of the server's own lines. Libraries write warnings only: below, some tell of addresses and headers.
        form: ``auto`` is text on a terminal, and JSON where a program reads.
        stream: instead of the standard error.
    """
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    text = form == "text" or (form == "auto" and stream.isatty())
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.startswith("ergo_server"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("ergo_server").setLevel(level.upper())


def places(trace: TracebackType | None) -> list[str]:
    """Return the places that an exception came through, the one that raised it first."""
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(traceback.extract_tb(trace))]


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a line."""
        line: Fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        return json.dumps(line | getattr(record, "fields", {}) | _exception(record))


class TextFormatter(logging.Formatter):
    """A line to be read at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a line."""
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        found = _exception(record)
        return f"{time} {level}{_message(record)}" + (f" ({found['exception']} at {found['places'][:1]})" if found else "")


def _message(record: logging.LogRecord) -> str:
    """Return the first line; in those that follow, asyncio shows exceptions with their text."""
    return record.getMessage().partition("\n")[0]


def _exception(record: logging.LogRecord) -> Fields:
    if not record.exc_info or record.exc_info[0] is None:
        return {}
    kind, _, trace = record.exc_info
    return {"exception": kind.__name__, "places": places(trace)}


def write(exchange: Exchange) -> None:
    """Write the line of a request that has ended."""
    if log.isEnabledFor(logging.INFO):
        log.info("%s", _sentence(exchange), extra={"fields": fields(exchange)})


def fields(exchange: Exchange) -> Fields:
    """Return what the line of a request says; times in milliseconds."""
    found: Fields = {
        "request_id": exchange.request_id,
        "trace_id": exchange.trace_id,
        "tenant": exchange.tenant,
        "method": exchange.method,
        "route": exchange.route,
        "status": exchange.status,
        "outcome": exchange.outcome,
        "ms": milliseconds(exchange.seconds),
    }
    if exchange.record is not None:
        found |= _question(exchange.record)
    found["turns"] = [_turn(call) for call in exchange.calls]
    return {name: value for name, value in found.items() if value not in ("", [])}


def _question(record: Record) -> Fields:
    header, result = record.header, record.result
    image: Fields = {"source": record.source, "bytes": record.image_bytes}
    if header is not None:
        image |= {"format": header.format, "width": header.size.width, "height": header.size.height}
    found: Fields = {"policy": record.policy, "image": image}
    if result is not None:
        tokens = result.visual_tokens
        found |= {
            "zoom": result.region.outcome,
            "area_ratio": round(result.region.area_ratio, 4),
            "visual_tokens": {
                "overview": tokens.overview,
                "crop": tokens.crop,
                "extra": tokens.extra,
                "total": tokens.total,
                "baseline": tokens.baseline,
            },
        }
    if record.first_token_seconds is not None:
        found["first_token_ms"] = milliseconds(record.first_token_seconds)
    return found | {"timings_ms": {name: milliseconds(seconds) for name, seconds in record.timings.items()}}


def _turn(call: EngineCall) -> Fields:
    found: Fields = {"turn": call.turn, "ms": milliseconds(call.seconds), "outcome": call.error or "ok"}
    if call.generation is not None:
        usage = call.generation.usage
        found |= {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "image_tokens": usage.image_tokens,
            "finish_reason": call.generation.finish_reason,
        }
    return found


def _sentence(exchange: Exchange) -> str:
    said = [f"{exchange.method} {exchange.route} {exchange.status} {exchange.outcome}", f"{exchange.seconds * 1000:.0f} ms"]
    if exchange.record is not None and (result := exchange.record.result) is not None:
        tokens = result.visual_tokens
        said += [result.region.outcome, f"{tokens.total:,} visual tokens (baseline {tokens.baseline:,})"]
    return ", ".join([*said, f"request {exchange.request_id}"])
