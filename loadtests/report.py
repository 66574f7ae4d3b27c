"""What a load test found, in figures: for a terminal, as one HTML file that needs nothing beside it, and as PNG."""

from __future__ import annotations

import base64
import html
import io
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.questions import Sample
from loadtests.soak import Reading

PERCENTILES = (50, 90, 95, 99)

COLUMNS = (
    "run",
    "sent",
    "answered",
    "right",
    *(f"p{p} s" for p in PERCENTILES),
    "answers/s",
    "goodput",
    "visual tokens",
    "of baseline",
    "zoom turn ms",
    "answer turn ms",
    "cached tokens",
    "gateway CPU ms",
    "not answered",
)


@dataclass(frozen=True, slots=True)
class Run:
    """One load and what became of each request."""

    name: str
    samples: Sequence[Sample]
    cpu: float = math.nan
    """Seconds of processor time that the server's process took for all of them; NaN where it does not say."""


@dataclass(frozen=True, slots=True)
class Section:
    """What one scenario has to tell."""

    name: str
    """Of its files."""
    about: str
    """One sentence: what the scenario is."""
    runs: Sequence[Run]
    notes: Sequence[str] = ()
    failures: Sequence[str] = ()
    """What must not be."""
    readings: Sequence[Reading] = field(default=())
    """Of a soak."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Some requests in figures. Seconds count from when a request was due to its last byte; only answers have any."""

    sent: int
    answered: int
    right: int
    percentiles: dict[int, float]
    """Seconds; NaN where nothing was answered."""
    rate: float
    """Answers a second."""
    goodput: float
    """Share of the questions whose right answer came within the objective; NaN where nothing was asked."""
    visual_tokens: float
    """Mean of an answer that tells of any."""
    of_baseline: float
    """Visual tokens by those of the baseline."""
    stages: dict[str, float]
    """Median milliseconds of each stage, as the server says."""
    cached_tokens: float
    """Mean of an answer that tells of visual tokens."""
    errors: Counter[str]
    """What came instead of answers, by status and code."""


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the least of the values that at least so many percent of them do not exceed (nearest rank); NaN of none."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(percent / 100 * len(ranked)) - 1)] if ranked else math.nan


def summarize(samples: Sequence[Sample], objective: float) -> Summary:
    """Sum up requests.

    Args:
        samples: what became of them.
        objective: seconds within which the right answer counts as good.
    """
    answered = [sample for sample in samples if sample.answered]
    questions = [sample for sample in samples if sample.answer is not None]
    good = sum(sample.right and sample.seconds <= objective for sample in questions)
    span = max((sample.ended for sample in samples), default=0.0) - min((sample.due for sample in samples), default=0.0)
    told = [sample.reply for sample in answered if sample.reply.visual_tokens]
    tokens, baseline = (sum(getattr(reply, name) for reply in told) for name in ("visual_tokens", "baseline"))
    stages = sorted({stage for reply in told for stage in reply.timings})
    return Summary(
        sent=len(samples),
        answered=len(answered),
        right=sum(sample.right for sample in questions),
        percentiles={p: percentile((sample.seconds for sample in answered), p) for p in PERCENTILES},
        rate=len(answered) / span if span else 0.0,
        goodput=good / len(questions) if questions else math.nan,
        visual_tokens=tokens / len(told) if told else math.nan,
        of_baseline=tokens / baseline if baseline else math.nan,
        stages={stage: statistics.median(reply.timings.get(stage, 0.0) for reply in told) for stage in stages},
        cached_tokens=statistics.fmean(reply.cached_tokens for reply in told) if told else math.nan,
        errors=Counter(f"{sample.reply.status} {sample.reply.code}" for sample in samples if not sample.answered),
    )


def rows(run: Run, objective: float) -> list[list[str]]:
    """Return the rows of a run: the whole, then each kind of request where there are several."""
    kinds = list(dict.fromkeys(sample.kind for sample in run.samples))
    parts = [(f"{run.name}: {kind}", [sample for sample in run.samples if sample.kind == kind]) for kind in kinds]
    whole = _row(run.name, summarize(run.samples, objective), run.cpu)
    return [whole, *(_row(name, summarize(samples, objective)) for name, samples in (parts if len(kinds) > 1 else []))]


def _row(name: str, found: Summary, cpu: float = math.nan) -> list[str]:
    def shown(value: float, form: str) -> str:
        return "–" if math.isnan(value) else format(value, form)

    stages = [shown(found.stages.get(stage, math.nan), ".0f") for stage in ("zoom_turn", "answer_turn")]
    return [
        name,
        str(found.sent),
        str(found.answered),
        "–" if math.isnan(found.goodput) else str(found.right),
        *(shown(found.percentiles[p], ".2f") for p in PERCENTILES),
        f"{found.rate:.2f}",
        shown(found.goodput, ".1%"),
        shown(found.visual_tokens, ".0f"),
        shown(found.of_baseline, ".1%"),
        *stages,
        shown(found.cached_tokens, ".0f"),
        shown(1000 * cpu / found.answered if found.answered else math.nan, ".1f"),
        ", ".join(f"{count} x {what}" for what, count in found.errors.most_common()) or "–",
    ]


def text(section: Section, objective: float) -> str:
    """Return a section as Markdown, for a terminal or a page."""
    table = [list(COLUMNS), ["---"] * len(COLUMNS), *(row for run in section.runs for row in rows(run, objective))]
    lines = [f"## {section.name}", "", section.about, "", *("| " + " | ".join(row) + " |" for row in table)]
    lines += ["", *section.notes] if section.notes else []
    return "\n".join([*lines, *(f"FAILED: {failure}" for failure in section.failures)]) + "\n"


# --- figures --------------------------------------------------------------------------------------------------------------


def figure(section: Section) -> Figure:
    """Draw a section: how many were answered within how long, when; and what a soak read."""
    drawn = Figure(figsize=(13, 8 if section.readings else 4.2), layout="constrained")
    grid = drawn.subplots(2, 2).flat if section.readings else drawn.subplots(1, 2).flat
    within, over, *rest = grid
    for run in section.runs:
        _draw_within(within, run)
        _draw_over_time(over, run)
    within.set(xlabel="seconds, from when it was due", ylabel="share of the answers", ylim=(0, 1.02), xlim=(0, None))
    over.set(xlabel="due at, s", ylabel="seconds", ylim=(0, None))
    if any(line.get_label() for line in within.get_lines()):
        within.legend(fontsize="small")
    for axes, name, scale in zip(rest, ("memory", "files"), (2**20, 1), strict=False):
        axes.plot([reading.at for reading in section.readings], [getattr(reading, name) / scale for reading in section.readings])
        axes.set(xlabel="s", ylabel="memory, MiB" if name == "memory" else "open files", ylim=(0, None))
    drawn.suptitle(section.name)
    return drawn


def _draw_within(axes: Axes, run: Run) -> None:
    took = sorted(sample.seconds for sample in run.samples if sample.answered)
    if took:
        axes.step(took, [(n + 1) / len(took) for n in range(len(took))], where="post", label=run.name)


def _draw_over_time(axes: Axes, run: Run) -> None:
    answered = [sample for sample in run.samples if sample.answered]
    others = [sample for sample in run.samples if not sample.answered]
    axes.scatter([sample.due for sample in answered], [sample.seconds for sample in answered], s=9)
    axes.scatter([sample.due for sample in others], [sample.seconds for sample in others], s=16, marker="x", color="tab:red")


def png(section: Section) -> bytes:
    """Return the figure of a section as a file."""
    with io.BytesIO() as file:
        figure(section).savefig(file, format="png", dpi=110)
        return file.getvalue()


# --- files ----------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1250px; padding: 0 1rem; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { border-bottom: 1px solid #8886; padding: .25rem .6rem; text-align: right; }
th:first-child, td:first-child, td:last-child { text-align: left; }
img { max-width: 100%; background: white; }
.failed { color: #c22; font-weight: bold; }
"""


def page(title: str, facts: Sequence[str], sections: Sequence[Section], objective: float) -> str:
    """Return the whole report as HTML that refers to nothing outside itself."""
    parts = [f"<h1>{html.escape(title)}</h1>", "<ul>", *(f"<li>{html.escape(fact)}</li>" for fact in facts), "</ul>"]
    for section in sections:
        parts += [f"<h2>{html.escape(section.name)}</h2>", f"<p>{html.escape(section.about)}</p>", "<div><table>"]
        parts += ["<tr>", *(f"<th>{html.escape(name)}</th>" for name in COLUMNS), "</tr>"]
        for run in section.runs:
            for row in rows(run, objective):
                parts += ["<tr>", *(f"<td>{html.escape(cell)}</td>" for cell in row), "</tr>"]
        drawn = base64.b64encode(png(section)).decode()
        parts += ["</table></div>", *(f"<p>{html.escape(note)}</p>" for note in section.notes)]
        parts += [f'<p class="failed">{html.escape(failure)}</p>' for failure in section.failures]
        parts.append(f'<img alt="{html.escape(section.name)}: latencies" src="data:image/png;base64,{drawn}">')
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def write(folder: Path, title: str, facts: Sequence[str], sections: Sequence[Section], objective: float) -> Path:
    """Write ``report.html`` and a PNG for each section; returns the former's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        (folder / f"{section.name}.png").write_bytes(png(section))
    whole = folder / "report.html"
    whole.write_text(page(title, facts, sections, objective))
    return whole
