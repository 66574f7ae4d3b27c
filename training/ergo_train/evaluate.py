"""Ask a running server about held-out scenes: ``python -m ergo_train.evaluate --url http://127.0.0.1:8000``.

Goes through HTTP like any client, so what it measures is what users get: decode, overview, both turns, parsing. ``--hard`` asks
about `hard_scenes`. At full resolution: ``--model ergo-single --visual-tokens 16384``, from a server that was started with
``ERGO_MAX_VISUAL_TOKENS=16384``.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from ergo_client import Answer, Client
from ergo_train.hard_scenes import hard_scene
from ergo_train.scenes import HELD_OUT, Scene, scene


@dataclass(frozen=True, slots=True)
class Score:
    """How one model did. Shares are fractions of the scenes."""

    model: str
    scenes: int
    exact: float
    """Answers that are the code or the number, letter for letter."""
    well_formed: float
    """Zoom replies in the very form that was trained; 0 without a zoom turn."""
    covered: float
    """Regions that hold the whole of what is to be read."""
    visual_tokens: float
    """Mean of one question."""
    of_baseline: float
    """Visual tokens of all questions by those of the baseline."""


def evaluate(
    url: str, model: str, count: int, *, hard: bool = False, visual_tokens: int | None = None, first: int = 0, jobs: int = 2
) -> Score:
    """Ask ``count`` held-out scenes, as JPEG uploads.

    Args:
        url: of the server.
        model: ``ergo`` or ``ergo-single``.
        count: how many.
        hard: whether they are hard ones.
        visual_tokens: budget of each view; the server's own where it is not given.
        first: number of the first.
        jobs: questions in flight.

    Raises:
        ClientError: the server answered one of them with an error; nothing is left out of the count.
    """
    with Client(url) as client, ThreadPoolExecutor(jobs) as pool:

        def ask(number: int) -> tuple[Scene, Answer]:
            made = (hard_scene if hard else scene)(HELD_OUT + number)
            with io.BytesIO() as file:
                made.image.save(file, "JPEG", quality=92)
                return made, client.ask(file.getvalue(), made.question, model=model, max_visual_tokens=visual_tokens)

        return score(model, pool.map(ask, range(first, first + count)))


def score(model: str, asked: Iterable[tuple[Scene, Answer]]) -> Score:
    """Sum up answers."""
    rows = list(asked)
    count = len(rows)
    tokens = sum(answer.visual_tokens.total for _, answer in rows)
    return Score(
        model=model,
        scenes=count,
        exact=sum(answer.text == made.answer for made, answer in rows) / count,
        well_formed=sum(_well_formed(answer) for _, answer in rows) / count,
        covered=sum(_covers(answer.region.box, made.box) and answer.region.outcome != "skipped" for made, answer in rows) / count,
        visual_tokens=tokens / count,
        of_baseline=tokens / sum(answer.visual_tokens.baseline for _, answer in rows),
    )


def _well_formed(answer: Answer) -> bool:
    return answer.region.zoomed and not answer.region.lenient


def _covers(outer: Sequence[int], inner: Sequence[int]) -> bool:
    return outer[0] <= inner[0] and outer[1] <= inner[1] and outer[2] >= inner[2] and outer[3] >= inner[3]


def table(scores: Sequence[Score]) -> str:
    """Return scores as a Markdown table."""
    lines = ["| model | scenes | exact answers | well-formed zoom | target in region | visual tokens | of baseline |"]
    lines.append("|---|---|---|---|---|---|---|")
    for s in scores:
        zoom = "– | –" if s.model == "ergo-single" else f"{s.well_formed:.1%} | {s.covered:.1%}"
        shares = f"{s.exact:.1%} | {zoom}"
        lines.append(f"| {s.model} | {s.scenes} | {shares} | {s.visual_tokens:.1f} | {s.of_baseline:.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="base URL of the server")
    parser.add_argument("--scenes", type=int, default=500, help="how many held-out scenes (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="questions in flight (%(default)s)")
    parser.add_argument("--hard", action="store_true", help="ask the hard ones")
    parser.add_argument("--visual-tokens", type=int, help="budget of each view (the server's own)")
    parser.add_argument("--model", action="append", help="may stand several times (ergo and ergo-single)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    models = args.model or ["ergo", "ergo-single"]
    scores = [
        evaluate(
            args.url,
            model,
            args.scenes,
            hard=args.hard,
            visual_tokens=args.visual_tokens,
            first=args.first,
            jobs=args.jobs,
        )
        for model in models
    ]
    print(json.dumps([asdict(s) for s in scores], indent=2) if args.json else table(scores))


if __name__ == "__main__":
    main()
