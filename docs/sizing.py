"""Reckons what a fleet needs: the tables of docs/scaling.md, and those of your own figures.

``python docs/sizing.py --price 2.5 --prefill 12000 --decode 1500`` prints the tables; with ``--write`` and no other option it
writes those of the page again. A test holds the page to it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ergo_server.imaging.geometry import PixelBudget, Size, baseline_visual_tokens, visual_tokens
from ergo_server.settings import Settings

PAGE = Path(__file__).parent / "scaling.md"
MEASURED = Path(__file__).parent / "measurements.md"

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

    text: int = 200
    """Tokens of words in the prompt of a turn: the model's instructions and the question."""

    reply: int = 120
    """Tokens that a turn writes."""

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
        zoom_turn, answer_turn = self.overview + self.text, self.crop + self.text
        if way == "zoom":
            return zoom_turn + answer_turn, 2 * self.reply
        if way == "apart":  # the answer turn finds nothing of the zoom turn, and computes its prompt and its reply again
            return 2 * zoom_turn + self.reply + answer_turn, 2 * self.reply
        baseline = baseline_visual_tokens(PHOTOGRAPH) if way == "photograph" else self.baseline
        return baseline + self.text, self.reply

    def rate(self, way: str) -> float:
        """Return questions per second of one GPU."""
        prompt, written = self.computed(way)
        return self.busy / (prompt / self.prefill + written / self.decode)

    def cost(self, way: str) -> float:
        """Return what a thousand images cost, one question each."""
        return 1000 * self.price / (3600 * self.rate(way))


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
        rows.append((name, f"{prompt:,}", f"{written:,}", f"{load.rate(way):.2f}", f"{load.cost(way):.2f}"))
    return _table(("way", "prompt tokens computed", "tokens written", "questions/s and GPU", "cost of 1,000 images"), rows)


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
        prefix = budget + load.text
        whole = 2 * budget + 2 * load.text + 2 * load.reply
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


KINDS = ("12 MP JPEG", "24 MP JPEG", "50 MP JPEG", "12 MP PNG", "24 MP progressive JPEG")


def measured() -> tuple[dict[str, tuple[int, int]], float]:
    """Return milliseconds of (overview, crop) by image, and of the rest of a request, from docs/measurements.md."""
    text = MEASURED.read_text()
    views = {}
    for kind in KINDS:
        found = re.search(rf"^\| {kind} \| [^|]+\| (\d+) ms \|[^|]+\|[^|]+\| (\d+) ms \|", text, re.MULTILINE)
        assert found, kind
        views[kind] = (int(found[1]), int(found[2]))
    rest = re.search(r"^\| 4032 × 3024 JPEG \|[^|]+\|[^|]+\| ([\d.]+) ms \|", text, re.MULTILINE)
    assert rest
    return views, float(rest[1])


def cores(_: Load) -> str:
    """Cores of the gateways for a hundred questions a second."""
    views, rest = measured()
    rows = []
    for kind, (overview, crop) in views.items():
        spent = overview + crop + rest
        rows.append((kind, f"{overview} + {crop} + {rest:.0f} ms", f"{spent / 10:.0f}", f"{spent / 10 / 0.65:.0f}"))
    return _table(("image", "overview + crop + the rest", "cores for 100 questions/s", "at 65 % of each"), rows)


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
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help="(%(default)s)")
    args = vars(parser.parse_args())
    if args.pop("write"):
        PAGE.write_text(page(PAGE.read_text()))
        return
    for table in TABLES.values():
        print(f"{(table.__doc__ or '').strip()}\n\n{table(Load(**args))}")


if __name__ == "__main__":
    main()
