"""The same load against the gateway that zooms, the gateway at full resolution, and the bare engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ergo_server.imaging.geometry import MAX_VISUAL_TOKENS
from ergo_server.protocol.base import Prompts
from loadtests.pictures import Picture
from loadtests.questions import Request, Server, bare, chat
from loadtests.report import Run, Summary, summarize


@dataclass(frozen=True, slots=True)
class Lane:
    """One of the systems that are compared."""

    name: str
    server: Server
    asks: Callable[[Picture], Request]

    def requests(self, pictures: Sequence[Picture]) -> list[Request]:
        """Return what it is sent about pictures."""
        return [self.asks(picture) for picture in pictures]


def lanes(
    gateway: Server, engine: Server, engine_model: str, prompts: Prompts, full: int = MAX_VISUAL_TOKENS
) -> tuple[Lane, ...]:
    """Return the three; the first is what the others are measured by.

    Args:
        gateway: in front of ``engine``; it must allow ``full`` visual tokens (``ERGO_MAX_VISUAL_TOKENS``).
        engine: vLLM.
        engine_model: the name under which it serves the model.
        prompts: the gateway's, so that the bare engine is told the same.
        full: pixel budget that no image exceeds.
    """
    return (
        Lane("ergo", gateway, lambda picture: chat(picture, "ergo")),
        Lane("ergo-single, full", gateway, lambda picture: chat(picture, "ergo-single", full)),
        Lane("bare engine, full", engine, lambda picture: bare(picture, engine_model, prompts)),
    )


def interleaved(count: int, lanes: Sequence[Lane]) -> Iterator[tuple[int, Lane]]:
    """Yield rounds in which each lane has its turn, another one first each time, so that none profits from its place."""
    for number in range(count):
        for place in range(len(lanes)):
            yield number, lanes[(number + place) % len(lanes)]


def ratios(runs: Sequence[Run], objective: float) -> list[str]:
    """Return what each run takes by what the first takes, as Markdown."""
    first, *others = [(run.name, summarize(run.samples, objective)) for run in runs]
    lines = [f"| ratio to {first[0]} | p50 | p95 | answers/s | visual tokens | goodput, points | right |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, found in others:
        points = f"{100 * (found.goodput - first[1].goodput):+.0f}"
        right = " against ".join(_share(summary) for summary in (found, first[1]))
        shown = " | ".join(_ratio(read(found), read(first[1])) for read in (_p50, _p95, _rate, _tokens))
        lines.append(f"| {name} | {shown} | {points} | {right} |")
    return lines


def _p50(found: Summary) -> float:
    return found.percentiles[50]


def _p95(found: Summary) -> float:
    return found.percentiles[95]


def _rate(found: Summary) -> float:
    return found.rate


def _tokens(found: Summary) -> float:
    return found.visual_tokens


def _share(found: Summary) -> str:
    return f"{found.right} of {found.sent}"


def _ratio(value: float, by: float) -> str:
    return f"{value / by:.2f}" if by and not math.isnan(value / by) else "–"
