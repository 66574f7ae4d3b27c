"""The paper's occlusion test: does a model look where the answer must be, when the answer itself is hidden?

``python -m ergo_train.occlusion CHECKPOINT PROMPTS`` asks each scene three times: as it is; with a black box over what answers
the question; and with one over every landmark too, which takes away all that the question names. A model that finds its target by
what stands around it looks at the right place in the second case, and cannot in the third. One that looks at black boxes, or
nowhere in particular, does about as well in both.

Only questions that have such surroundings are asked: for a tag beside a landmark, a landmark beside another, a tag beside
that. The Target Coverage Score (`ergo_server.protocol.rewards.target_coverage`) is of the hidden plate. It is 1 for a region that
is the whole image, so the mean area stands beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from PIL import ImageDraw

from ergo_train.assess import Assessment, assess, summed_up
from ergo_train.grpo import Loaded, problem_of
from ergo_train.hard_scenes import hard_scene
from ergo_train.rollouts import SharpEye
from ergo_train.scenes import HELD_OUT, Edges, Kind, Landmark, Scene

CONTEXTUAL = (Kind.BESIDE, Kind.RELATION, Kind.CHAIN)
"""Questions that say where the answer is by what is beside it."""


def contextual(first: int = 0) -> Iterator[Scene]:
    """Draw held-out scenes with such questions, each kind as often as any other."""
    numbers, kinds = itertools.count(HELD_OUT + first), itertools.cycle(CONTEXTUAL)
    kind = next(kinds)
    for number in numbers:
        scene = hard_scene(number, kind=kind)
        if scene.query.kind == kind:
            yield scene
            kind = next(kinds)


def covered(scene: Scene, *, context: bool) -> Scene:
    """Return the scene with a black box over what answers its question; without ``context`` over every landmark as well.

    A landmark is covered as a whole, a tag with its own height around it.
    """
    target = scene.query.plate
    owner = next((mark for mark in scene.landmarks if mark.plate == target), None)
    boxes = [_around(owner) if owner else _grown(target, target[3] - target[1])]
    if not context:
        boxes += [_around(mark) for mark in scene.landmarks]
    image = scene.image.copy()
    for box in boxes:
        ImageDraw.Draw(image).rectangle(box, fill=(0, 0, 0))
    return replace(scene, image=image)


def _around(mark: Landmark) -> Edges:
    reach = 0.62 * mark.diameter  # the tips of a diamond are 0.6 away
    return (mark.x - reach, mark.y - reach, mark.x + reach, mark.y + reach)


def _grown(edges: Edges, by: float) -> Edges:
    return (edges[0] - by, edges[1] - by, edges[2] + by, edges[3] + by)


def occluded(loaded: Loaded, prompts: Path, scenes: Iterable[Scene]) -> dict[str, Assessment]:
    """Return what each case gave."""
    made = list(scenes)
    cases = {
        "nothing is covered": made,
        "the target is covered": [covered(scene, context=True) for scene in made],
        "the landmarks are covered as well": [covered(scene, context=False) for scene in made],
    }
    return {
        name: summed_up(asyncio.run(assess(loaded, prompts, [problem_of(scene) for scene in case], SharpEye())))
        for name, case in cases.items()
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--scenes", type=int, default=150, help="(%(default)s)")
    args = parser.parse_args()
    loaded = Loaded.of(args.checkpoint)
    loaded.network.eval()
    print("| | Target Coverage Score | whole plate in the region | area | right |\n|---|---|---|---|---|")
    for name, s in occluded(loaded, args.prompts, itertools.islice(contextual(), args.scenes)).items():
        print(f"| {name} | {s.coverage:.3f} | {s.region:.1%} | {s.area:.1%} | {s.accuracy:.1%} |")


if __name__ == "__main__":
    main()
