"""The same load against the gateway that zooms, the gateway at full resolution, and the bare engine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ergo_server.imaging.geometry import MAX_VISUAL_TOKENS
from ergo_server.protocol.base import Prompts
from loadtests.pictures import Picture
from loadtests.questions import Request, Sample, Server, bare, chat
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


def after(before: Sequence[Sample], samples: Sequence[Sample]) -> list[Sample]:
    """Return samples moved behind those of the round before, so that the pause between the rounds counts for nothing."""
    shift = max((sample.ended for sample in before), default=0.0) - min((sample.due for sample in samples), default=0.0)
    return [replace(s, due=s.due + shift, sent=s.sent + shift, ended=s.ended + shift) for s in samples]


def work(samples: Sequence[Sample]) -> str | None:
    """Return the work of a question as options of docs/sizing.py, means of what the server said of its turns; None of no turns.

    An answer turn's prompt is the zoom turn's, its reply, and what is new; only that is counted.
    """
    turns = [{turn.name: turn for turn in sample.reply.turns} for sample in samples if sample.answered]
    zoomed = [found for found in turns if found.keys() == {"zoom", "answer"}]
    single = [found["single"] for found in turns if found.keys() == {"single"}]
    means: dict[str, float] = {}
    if zoomed:
        zoom, answer = ([found[name] for found in zoomed] for name in ("zoom", "answer"))
        pairs = list(zip(zoom, answer, strict=True))
        means |= {
            "overview": statistics.fmean(turn.image for turn in zoom),
            "zoom-text": statistics.fmean(turn.prompt - turn.image for turn in zoom),
            "zoom-reply": statistics.fmean(turn.completion for turn in zoom),
            "crop": statistics.fmean(last.image - first.image for first, last in pairs),
            "answer-text": statistics.fmean(
                last.prompt - last.image - (first.prompt - first.image) - first.completion for first, last in pairs
            ),
            "answer-reply": statistics.fmean(turn.completion for turn in answer),
        }
    if single:
        means |= {
            "baseline": statistics.fmean(turn.image for turn in single),
            "single-text": statistics.fmean(turn.prompt - turn.image for turn in single),
            "single-reply": statistics.fmean(turn.completion for turn in single),
        }
    return " ".join(f"--{name} {value:.0f}" for name, value in means.items()) or None


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
