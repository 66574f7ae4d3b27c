"""Ask a checkpoint about held-out scenes, in this process: ``python -m ergo_train.assess CHECKPOINT PROMPTS``.

The same loop and imaging as the server's, without HTTP and many questions at a time: for the many checkpoints that an ablation
makes. `ergo_train.evaluate` asks a running server, which is what its users get.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ergo_server.imaging.geometry import PixelBudget
from ergo_server.imaging.work import ImageWork
from ergo_server.pipeline import Pipeline
from ergo_server.protocol.ergo import ErgoPolicy
from ergo_server.protocol.rewards import GAMMA, target_coverage
from ergo_server.protocol.single import SinglePolicy
from ergo_train import hard_scenes, scenes
from ergo_train.grpo import Loaded, problem_of, profile_of
from ergo_train.rollouts import PATIENCE, BatchEngine, Judge, Problem, Reader, Rollout, roll_out
from ergo_train.scenes import HELD_OUT, Scene

TOGETHER = 64
"""Problems at a time: more are no faster on a CPU."""


@dataclass(frozen=True, slots=True)
class Assessment:
    """Means over problems; shares are from 0 to 1."""

    problems: int
    accuracy: float
    region: float
    """Right answers from the crop and the question alone."""
    format: float
    box: float
    """Regions of at most γ of the image."""
    area: float
    """Of the region, as a share of the image."""
    coverage: float
    """Target Coverage Score."""
    visual_tokens: float


def held_out(count: int, *, hard: bool, first: int = 0) -> list[Scene]:
    """Draw held-out scenes, at the sizes of their lists."""
    draw = hard_scenes.hard_scene if hard else scenes.scene
    return [draw(HELD_OUT + number) for number in range(first, first + count)]


async def assess(loaded: Loaded, prompts: Path, problems: Sequence[Problem], judge: Judge | None = None) -> list[Rollout]:
    """Answer problems greedily, with zoom.

    Args:
        loaded: the checkpoint.
        prompts: its prompts file, which also names its budget.
        problems: what to answer; each with its target.
        judge: who says what regions are worth; without one, the checkpoint itself.
    """
    profile = profile_of(prompts)
    engine = BatchEngine(loaded.network, loaded.encoder, longest=96)
    judge = judge or Reader(engine, SinglePolicy(profile.prompts))
    pipeline = Pipeline(engine, ErgoPolicy(profile.prompts), SinglePolicy(profile.prompts), deadlines=PATIENCE)
    work = ImageWork(threads=os.cpu_count() or 1, wait_seconds=PATIENCE.turn, decode_seconds=PATIENCE.turn)
    done: list[Rollout] = []
    try:
        for start in range(0, len(problems), TOGETHER):
            groups = await roll_out(
                pipeline,
                judge,
                problems[start : start + TOGETHER],
                group=1,
                budget=PixelBudget(profile.default_visual_tokens),
                temperature=0,
                seed=0,
                work=work,
            )
            done += [group[0] for group in groups]
    finally:
        work.close()
    return done


def summed_up(rollouts: Sequence[Rollout]) -> Assessment:
    """Return the means."""
    count = len(rollouts)
    return Assessment(
        problems=count,
        accuracy=sum(r.rewards.accuracy for r in rollouts) / count,
        region=sum(r.rewards.region for r in rollouts) / count,
        format=sum(r.rewards.format for r in rollouts) / count,
        box=sum(r.result.region.area_ratio <= GAMMA for r in rollouts) / count,
        area=sum(r.result.region.area_ratio for r in rollouts) / count,
        coverage=sum(target_coverage(r.result.region.box, r.problem.target) for r in rollouts if r.problem.target) / count,
        visual_tokens=sum(r.result.visual_tokens.total for r in rollouts) / count,
    )


def main() -> None:
    """Print a table by kinds of questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--scenes", type=int, default=200, help="of each sort (%(default)s)")
    args = parser.parse_args()
    loaded = Loaded.of(args.checkpoint)
    loaded.network.eval()
    print(
        "| scenes | questions | right | right from the crop alone | form | area | plate covered |\n|---|---|---|---|---|---|---|"
    )
    for hard in (False, True):
        made = held_out(args.scenes, hard=hard)
        rollouts = asyncio.run(assess(loaded, args.prompts, [problem_of(scene) for scene in made]))
        for kind in ["all", *sorted({scene.query.kind for scene in made})]:
            some = [r for r, scene in zip(rollouts, made, strict=True) if kind in ("all", scene.query.kind)]
            s = summed_up(some)
            figures = " | ".join(f"{share:.1%}" for share in (s.accuracy, s.region, s.format, s.area, s.coverage))
            print(f"| {'hard' if hard else 'plain'}: {kind} | {s.problems} | {figures} |")


if __name__ == "__main__":
    main()
