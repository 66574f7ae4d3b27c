"""Draws the figure of docs/choose-a-budget.md: exact answers of ergo-mini against the visual tokens that they cost.

``ERGO_MAX_VISUAL_TOKENS=16384 ergo-vqa serve`` in one terminal, ``python docs/budget.py`` in another (ten minutes on two cores).
Without zoom the model is given up to four times that budget; it was not trained on such views, and the page says so.
"""

from __future__ import annotations

import argparse
import io
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ergo_client import Client
from ergo_train.scenes import HELD_OUT, scene

FIGURE = Path(__file__).parent / "images" / "budget.svg"
BUDGETS = {"ergo": (25, 36, 42, 49, 56, 64, 81, 100, 144), "ergo-single": (49, 100, 196)}
"""Visual tokens of each view: around the 49 that the checkpoint was trained with; without zoom up to four times as many."""

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 720, 380, 70, 24, 60
FROM, TO = 32, 256
"""Visual tokens at the axis' ends; both are powers of two, as the axis is logarithmic."""

COLOURS = {"ergo": "#0a7d5a", "ergo-single": "#b3541e"}

Point = tuple[float, float]
"""Mean visual tokens of a question, share of exact answers."""


def measure(url: str, count: int) -> dict[str, list[Point]]:
    """Ask about held-out scenes with each model and budget."""
    scenes = []
    for number in range(count):
        made = scene(HELD_OUT + number)
        with io.BytesIO() as file:
            made.image.save(file, "JPEG", quality=92)
            scenes.append((made, file.getvalue()))
    found: dict[str, list[Point]] = {model: [] for model in BUDGETS}
    with Client(url, timeout=600) as client, ThreadPoolExecutor(2) as pool:
        for model, budgets in BUDGETS.items():
            for budget in budgets:
                asked = [pool.submit(client.ask, d, m.question, model=model, max_visual_tokens=budget) for m, d in scenes]
                answers = [(made, job.result()) for (made, _), job in zip(scenes, asked, strict=True)]
                tokens = sum(answer.visual_tokens.total for _, answer in answers) / count
                exact = sum(answer.text == made.answer for made, answer in answers) / count
                found[model].append((tokens, exact))
                print(f"| {model} | {budget} | {tokens:.0f} | {exact:.0%} |", flush=True)
    return found


def figure(found: dict[str, list[Point]], count: int) -> str:
    """Return the figure as SVG, readable on light and dark pages."""
    octaves = round(math.log2(TO / FROM))

    def x(tokens: float) -> float:
        return LEFT + (WIDTH - LEFT - 20) * math.log2(tokens / FROM) / octaves

    def y(share: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="14">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for step in range(5):
        share = step / 4
        parts.append(f'<path d="M{LEFT} {y(share):.1f}H{WIDTH - 20}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(share) + 5:.1f}" text-anchor="end">{share:.0%}</text>')
    for doubling in range(octaves + 1):
        tokens = FROM << doubling
        parts.append(f'<text x="{x(tokens):.1f}" y="{HEIGHT - BOTTOM + 22}" text-anchor="middle">{tokens:,}</text>')
    below = f"visual tokens of a question, both views (mean of {count} scenes)"
    parts.append(f'<text x="{(WIDTH + LEFT) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">{below}</text>')
    for row, (model, points) in enumerate(found.items()):
        path = " ".join(f"{x(tokens):.1f},{y(share):.1f}" for tokens, share in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[model]}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(t):.1f}" cy="{y(s):.1f}" r="4" fill="{COLOURS[model]}"/>' for t, s in points]
        says = {"ergo": "ergo: with zoom", "ergo-single": "ergo-single: without"}[model]
        parts.append(f'<text x="{WIDTH - 30}" y="{TOP + 20 + 22 * row}" text-anchor="end" fill="{COLOURS[model]}">{says}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Measure, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="base URL of the server (%(default)s)")
    parser.add_argument("--scenes", type=int, default=100, help="how many (%(default)s)")
    args = parser.parse_args()
    print("| model | budget of a view | visual tokens | exact answers |\n|---|---|---|---|")
    FIGURE.write_text(figure(measure(args.url, args.scenes), args.scenes))


if __name__ == "__main__":
    main()
