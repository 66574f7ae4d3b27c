"""Reckons what a fleet needs: the tables of docs/scaling.md, and those of your own figures.

``python docs/sizing.py --price 2.5 --prefill 12000 --decode 1500`` prints the tables; with ``--write`` and no other option it
writes those of the page again. A test holds the page to it.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from ergo_server.imaging.geometry import PixelBudget, Size, baseline_visual_tokens, visual_tokens
from ergo_server.settings import Settings

PAGE = Path(__file__).parent / "scaling.md"
MEASURED = Path(__file__).parent / "load-tests.md"

PHOTOGRAPH = Size(4032, 3024)
"""A telephone's."""

SIZES = (Size(1690, 1500), Size(2246, 1582), PHOTOGRAPH, Size(7680, 4320))
"""The smallest images of V*, its usual ones, a photograph, 8K."""

WAYS = {
    "zoom": "zoom, both turns on one engine",
    "apart": "zoom, each turn on another engine",
    "whole": "without zoom",
    "photograph": f"without zoom, {PHOTOGRAPH.width} × {PHOTOGRAPH.height}",
}
"""How a question can be asked."""

BUDGETS = (640, 1280)
"""Those that ERGO-7B was trained and measured with."""

KV_BYTES = 2 * 28 * 4 * 128 * 2
"""Bytes of a token in the cache: keys and values, 28 layers, 4 heads of 128 numbers, bfloat16 (config.json of Qwen2.5-VL-7B)."""

PIXEL_BYTES = 4 * 3 * 2 * 14 * 14
"""Bytes of a visual token in the cache of processed images: 4 patches of 14 × 14 pixels, 3 colours, two frames, a byte each."""

WEIGHTS = {"vocabulary": 152_064, "width": 3584, "layers": 28, "keys": 4 * 128, "inner": 18_944}
VISION = {"width": 1280, "layers": 32, "inner": 3420, "patch": 3 * 2 * 14 * 14, "merged": 4 * 1280}
"""The shape of Qwen2.5-VL-7B (its config.json): of the language model, and of what sees."""

REPLIES = {
    "zoom": "<think>The handbag would be on the woman's arm or shoulder. She stands at the left of the fountain, about a third "
    "from the left edge, so the region around her contains it.</think><zoom>[210, 305, 342, 468]</zoom>",
    "answer": "<think>In the enlarged region the woman carries a handbag over her right shoulder. It is white with a brown "
    "strap.</think><answer>B</answer>",
}
"""What the assumed lengths of replies are those of."""

LONGER = 4
"""The other length of replies that the table shows, times the assumed one: a zoom turn then writes half of the 512 tokens that
the model's authors allow it in their demonstration."""

HPA_SHARE = 0.65
"""Of a gateway's cores that the chart's HPA keeps busy."""

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked, and what one GPU gives; every figure is the reader's to replace."""

    overview: int = 640
    """Visual tokens of the overview (mean). The default is the budget that the paper's 1,025 was measured with."""

    crop: int = 385
    """Visual tokens of the crop (mean): 1,025 less the overview."""

    baseline: int = 4471
    """Visual tokens without zoom (mean): the paper's, on V*. A photograph of a telephone has 15,552."""

    zoom_text: int = 173
    """Tokens of words in the prompt of the zoom turn: template, instructions, question. Counted, with Qwen's vocabulary, of the
    server's prompts and a question of eight words."""

    answer_text: int = 78
    """Those that the answer turn adds: template, question with four choices of a word each, instructions; counted likewise."""

    single_text: int = 70
    """Those of the only turn without zoom, with the same question and choices; counted likewise."""

    zoom_reply: int = 65
    """Tokens that the zoom turn writes. Assumed: `REPLIES` has so many, two sentences and a box."""

    answer_reply: int = 32
    """Tokens that the answer turn writes. Assumed: two short sentences and a letter."""

    single_reply: int = 32
    """Tokens that the only turn without zoom writes. Assumed: as many as an answer turn."""

    before: int = 86
    """Tokens of words in front of the overview: template and instructions. Counted; a next question finds both."""

    prefill: float = 10_000
    """Prompt tokens that a GPU computes in a second."""

    decode: float = 1_000
    """Tokens that it writes in a second, of all requests together."""

    price: float = 1.0
    """Of a GPU for an hour, in any currency."""

    busy: float = 0.7
    """Share of its capacity that a GPU is loaded with, so that queues stay short."""

    def computed(self, way: str) -> tuple[int, int]:
        """Return prompt tokens computed and tokens written for a question, asked in a way of `WAYS`."""
        zoom_turn, answer_turn = self.overview + self.zoom_text, self.crop + self.answer_text
        written = self.zoom_reply + self.answer_reply
        if way == "zoom":
            return zoom_turn + answer_turn, written
        if way == "apart":  # the answer turn finds nothing of the zoom turn, and computes its prompt and its reply again
            return 2 * zoom_turn + self.zoom_reply + answer_turn, written
        baseline = baseline_visual_tokens(PHOTOGRAPH) if way == "photograph" else self.baseline
        return baseline + self.single_text, self.single_reply

    def rate(self, way: str) -> float:
        """Return questions per second of one GPU."""
        prompt, written = self.computed(way)
        return self.busy / (prompt / self.prefill + written / self.decode)

    def cost(self, way: str) -> float:
        """Return what a thousand images cost, one question each."""
        return 1000 * self.price / (3600 * self.rate(way))

    @property
    def longer(self) -> Load:
        """The same with replies `LONGER` times as long."""
        replies = ("zoom_reply", "answer_reply", "single_reply")
        return replace(self, **{name: LONGER * getattr(self, name) for name in replies})


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, tuple("---" for _ in head), *rows)) + "\n"


def tokens(_: Load) -> str:
    """Visual tokens of a question, by image and budget."""
    rows = []
    for size in SIZES:
        cells = [f"{size.width} × {size.height}"]
        for budget in BUDGETS:
            overview = visual_tokens(PixelBudget(budget).view_size(size))
            cells += [f"{overview:,}", f"{overview + budget:,}"]
        rows.append((*cells, f"{baseline_visual_tokens(size):,}"))
    head = [f"{what} at {budget:,}" for budget in BUDGETS for what in ("overview", "most, both views")]
    return _table(("image", *head, "without zoom"), rows)


def work(load: Load) -> str:
    """Work, rate and cost of a question, each way."""
    rows = []
    for way, name in WAYS.items():
        prompt, written = load.computed(way)
        figures = (f"{load.rate(way):.2f}", f"{load.cost(way):.3f}", f"{load.longer.rate(way):.2f}")
        rows.append((name, f"{prompt:,}", f"{written:,}", *figures))
    head = ("way", "prompt tokens computed", "tokens written", "questions/s and GPU", "cost of 1,000 images")
    return _table((*head, f"questions/s, replies {LONGER} × as long"), rows)


def parameters() -> int:
    """Return how many numbers the model has: those of its matrices, their biases and its norms."""
    w, v = WEIGHTS, VISION
    attention = 2 * w["width"] ** 2 + w["width"] + 2 * w["keys"] * (w["width"] + 1)
    layer = attention + 3 * w["width"] * w["inner"] + 2 * w["width"]
    language = 2 * w["vocabulary"] * w["width"] + w["layers"] * layer + w["width"]
    seen = 4 * v["width"] * (v["width"] + 1) + 3 * v["width"] * v["inner"] + 2 * v["inner"] + 3 * v["width"]
    merger = v["width"] + v["merged"] * (v["merged"] + 1) + w["width"] * (v["merged"] + 1)
    return language + v["patch"] * v["width"] + v["layers"] * seen + merger


def warm(load: Load) -> str:
    """Images that a gibibyte of KV cache keeps warm."""
    head = (
        "budget",
        "tokens up to the question",
        "MiB",
        "images warm per GiB",
        "tokens of a whole question",
        "questions at a time per GiB",
    )
    rows = []
    for budget in BUDGETS:
        prefix = load.before + budget
        whole = 2 * budget + load.zoom_text + load.answer_text + load.zoom_reply + load.answer_reply
        held = [GIB // (count * KV_BYTES) for count in (prefix, whole)]
        rows.append(
            (f"{budget:,}", f"{prefix:,}", f"{prefix * KV_BYTES / (1 << 20):.0f}", str(held[0]), f"{whole:,}", str(held[1]))
        )
    return _table(head, rows)


def processed(_: Load) -> str:
    """Images that vLLM's cache of processed images holds."""
    rows = []
    for budget in BUDGETS:
        one = budget * PIXEL_BYTES
        rows.append((f"{budget:,}", f"{one / 1e6:.1f} MB", f"{4 * GIB // one:,}", f"{4 * GIB // (2 * one):,}"))
    return _table(("budget", "a view", "views in 4 GiB", "questions in 4 GiB"), rows)


KINDS = {
    "2 MP": "2 MP JPEG",
    "12 MP": "12 MP JPEG",
    "24 MP": "24 MP JPEG",
    "50 MP": "50 MP JPEG",
    "12 MP PNG": "12 MP PNG",
    "24 MP progressive": "24 MP progressive JPEG",
}
"""Runs of the load tests' `sizes`, and what was asked about."""


def measured() -> dict[str, float]:
    """Return milliseconds of the gateway's processor time for an answer, by run, from docs/load-tests.md."""
    lines = (line for line in MEASURED.read_text().splitlines() if line[:2] == "| ")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    (at,) = {row.index("gateway CPU ms") for row in rows if "gateway CPU ms" in row}
    return {run: next(float(row[at]) for row in rows if row[0] == run and len(row) > at) for run in KINDS}


def cores(_: Load) -> str:
    """Cores of the gateways for a hundred questions a second."""
    rows = []
    for run, spent in measured().items():
        busy = 100 * spent / 1000
        rows.append((KINDS[run], f"{spent:.0f} ms", str(math.ceil(busy)), str(math.ceil(busy / HPA_SHARE))))
    return _table(("image", "processor time of an answer", "cores for 100 questions/s", "at 65 % of each"), rows)


def memory(_: Load) -> str:
    """Memory of one gateway."""
    values = (PAGE.parent.parent / "helm" / "ergo-vqa" / "values.yaml").read_text()
    chart = re.search(r"^    max_bytes_in_flight: (\d+)$", values, re.MULTILINE)
    assert chart
    rows = []
    for name, bodies in (("defaults", Settings().max_bytes_in_flight), ("the chart", int(chart[1]))):
        given = Settings(max_bytes_in_flight=bodies)
        parts = (3 * bodies, given.image_memory_bytes, given.image_store_bytes)
        rows.append((name, *(f"{part / GIB:.1f}" for part in (*parts, sum(parts)))))
    return _table(("", "3 × `max_bytes_in_flight`", "`image_memory_bytes`", "`image_store_bytes`", "GiB at most"), rows)


TABLES = {table.__name__: table for table in (tokens, work, warm, processed, cores, memory)}


def page(text: str) -> str:
    """Return the page with each table, between its two marks, made anew."""
    for name, table in TABLES.items():
        before, mark, after = text.partition(f"<!-- {name} -->\n")
        assert mark, name
        text = before + mark + table(Load()) + after[after.index("<!-- end -->") :]
    return text


def main() -> None:
    """Print the tables, or write those of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables of docs/scaling.md again")
    for field in fields(Load):
        kind = int if isinstance(field.default, int) else float
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help="(%(default)s)")
    args = vars(parser.parse_args())
    if args.pop("write"):
        PAGE.write_text(page(PAGE.read_text()))
        return
    for table in TABLES.values():
        print(f"{(table.__doc__ or '').strip()}\n\n{table(Load(**args))}")


if __name__ == "__main__":
    main()
