"""The paper's ablation in miniature: what each reward does to a model that looks at the wrong places.

``python -m ergo_train.ablation RUN_FOLDER`` (two hours on two cores; goes on where it stopped) makes one start from a good one,
by teaching it to look at random boxes about the right place, and trains it with each set of rewards and each seed. The start and
what came of it are asked about the same held-out scenes. ``--arm`` and ``--seeds`` choose, ``--steps`` shortens: ``make grpo`` is
one arm of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ergo_server.imaging.geometry import Box
from ergo_train import hard_scenes, scenes
from ergo_train.assess import Assessment, assess, held_out, summed_up
from ergo_train.grpo import Config, Loaded, Trainer, problem_of
from ergo_train.model import Trainee, save
from ergo_train.rollouts import SharpEye
from ergo_train.samples import Packer, Sample, View, cell, where_reply
from ergo_train.scenes import Point
from ergo_train.train import PROMPTS, collate

CHECKPOINT = PROMPTS.parent / "checkpoint"

WANDER = 5.0
"""Standard deviation, in pixels of the overview, of where the start is taught to look: a plate is 10 wide, a view about 196."""

SIDES = (24, 44)
"""Twice the least and the greatest distance of its boxes' edges from there, in the same pixels, drawn evenly in their logarithm.
The checkpoint was taught one side, 30, and reads crops of about that scale alone: with sides to 75 and deviations of 10 not one
sampled answer in thirty was right, and there was nothing to begin from."""

TIDY = 0.7
"""Share of its zoom replies that keep the form; the rest do not end their thinking."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One set of rewards."""

    title: str
    region: float = 0.0
    box: float = 0.0
    accuracy: float = 0.0
    format: float = 0.0
    judge: str = str(CHECKPOINT)
    """As `grpo.RewardTable.judge`."""


ARMS = {
    "accuracy": Arm("A: r_acc", accuracy=1),
    "region": Arm("B: r_region", region=1),
    "box": Arm("C: r_region + r_box", region=1, box=1),
    "weighted": Arm("D: r_region + 0.5 r_box", region=1, box=0.5),
    "full": Arm("E: D + r_acc + r_format", region=1, box=0.5, accuracy=1, format=1),
    "region-sharp": Arm("B': r_region, all-seeing", region=1, judge="target"),
    "box-sharp": Arm("C': r_region + r_box, all-seeing", region=1, box=1, judge="target"),
}
"""The paper's five, and two with a reward model that reads a region however large it is: the paper's sees crops at up to 16,384
visual tokens, ergo-mini's at 49, and cannot be satisfied by the whole image."""


def make_start(checkpoint: Path, folder: Path, *, steps: int, seed: int = 0) -> None:
    """Teach a good checkpoint to look at random boxes about the right place, and leave its reading as it is.

    Args:
        checkpoint: where to begin.
        folder: where the worse one is written.
        steps: of 16 scenes.
        seed: of the scenes.
    """
    loaded = Loaded.of(str(checkpoint))
    tokens = loaded.encoder.tokenizer.backend_tokenizer
    trainee = Trainee(loaded.network)
    loaded.network.model.visual.requires_grad_(False)
    packer = Packer(tokens, tomllib.loads(PROMPTS.read_text(encoding="utf-8")), astray)
    weights = [weight for weight in loaded.network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-4, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-4 * min(1.0, (steps - step) / (0.3 * steps))
        batch = collate([_sample(packer, f"start {seed} {step} {row}") for row in range(16)])
        loss, _ = trainee.language(batch, trainee.read(batch))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 25 == 0:
            print(f"start: step {step + 1:4}  loss {loss.item():.3f}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    for file in checkpoint.iterdir():
        shutil.copy(file, folder)
    save(loaded.network, folder)


def _sample(packer: Packer, seed: str) -> Sample:
    rng = random.Random(seed)
    draw = hard_scenes.hard_scene if rng.random() < 0.6 else scenes.scene
    return packer.sample(rng, draw(rng.randrange(scenes.HELD_OUT), size=scenes.unlisted_size(rng, 0.6)))


def astray(rng: random.Random, view: View, path: Sequence[Point]) -> str:
    """Return a zoom reply whose box is by chance off the last of these points of the image, and its edges at any distance."""
    x, y = view.at(*path[-1])
    x = min(max(x + rng.gauss(0, WANDER), 0), view.size.width - 1)
    y = min(max(y + rng.gauss(0, WANDER), 0), view.size.height - 1)
    # Each edge by itself: one that is drawn together with another would have to be computed from it, which takes longer to learn.
    x1, y1, x2, y2 = (scenes.log_uniform(rng, *SIDES) / 2 for _ in range(4))
    box = Box(
        max(0, round(x - x1)), max(0, round(y - y1)), min(view.size.width, round(x + x2)), min(view.size.height, round(y + y2))
    )
    reply = where_reply([*(view.cell(place) for place in path[:-1]), cell(x, y)], box)
    return reply if rng.random() < TIDY else reply.replace("</think>", "")


def configuration(arm: Arm, seed: int, steps: int, start: Path) -> Config:
    """Return the run of an arm with a seed."""
    return Config.model_validate(
        {
            "model": {"checkpoint": str(start), "prompts": PROMPTS, "visual_tokens": scenes.BUDGET},
            "rollouts": {"questions": 8, "group": 8, "temperature": 0.8, "max_tokens": 72},
            "reward": {name: getattr(arm, name) for name in ("region", "box", "accuracy", "format", "judge")},
            "training": {"steps": steps, "rate": 3e-4, "together": 32, "bfloat16": True, "save_every": steps},
            "seed": seed,
        }
    )


def run_arm(name: str, seed: int, steps: int, start: Path, folder: Path) -> None:
    """Train one arm with one seed, unless that was done."""
    if not (folder / "checkpoint").is_dir():
        print(f"{ARMS[name].title}, seed {seed}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").unlink(missing_ok=True)
        asyncio.run(Trainer(configuration(ARMS[name], seed, steps, start), folder).run())


def asked(checkpoint: Path, folder: Path, count: int) -> Assessment:
    """Return what a checkpoint does on the held-out scenes, half of them hard, asking only once."""
    file = folder / f"held_out_{count}.json"
    if not file.exists():
        loaded = Loaded.of(str(checkpoint))
        loaded.network.eval()
        made = [scene for hard in (False, True) for scene in held_out(count // 2, hard=hard)]
        rollouts = asyncio.run(assess(loaded, PROMPTS, [problem_of(scene) for scene in made], SharpEye()))
        file.write_text(json.dumps(asdict(summed_up(rollouts))))
    return Assessment(**json.loads(file.read_text()))


def row(title: str, seeds: Sequence[Assessment]) -> str:
    """Return a row of the table: means over seeds, and their spread."""

    def cell(name: str, form: str, scale: float = 1) -> str:
        values = [scale * float(getattr(seed, name)) for seed in seeds]
        spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}{spread}"

    shares = [cell(name, ".1f", 100) for name in ("accuracy", "coverage", "area", "box", "format")]
    return f"| {title} | {' | '.join(shares)} | {cell('visual_tokens', '.1f')} |"


HEADER = """\
| rewards | right % | target covered % | region, % of image | r_box % | r_format % | visual tokens |
|---|---|---|---|---|---|---|"""


def plot(folder: Path, arms: Sequence[str], seeds: Sequence[int], out: Path) -> None:
    """Draw accuracy, region area and form of the rollouts over the steps, five steps each: mean of the seeds, and their range."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 3.8), layout="constrained")
    for arm in arms:
        files = [folder / arm / str(seed) / "log.jsonl" for seed in seeds]
        logs = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        for axis, name, title in zip(
            axes, ("accuracy", "area", "format"), ("right", "region, share of image", "r_format"), strict=True
        ):
            curves = [_smooth([line[name] for line in log]) for log in logs]
            steps = range(1, len(curves[0]) + 1)
            axis.plot(steps, [statistics.mean(values) for values in zip(*curves, strict=True)], label=ARMS[arm].title)
            axis.fill_between(steps, *[[edge(values) for values in zip(*curves, strict=True)] for edge in (min, max)], alpha=0.15)
            axis.set(title=title, xlabel="step")
    for axis in axes:
        axis.set_ylim(bottom=0)  # only now: a limit that is set ends the fitting to what is drawn later
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(out, dpi=110)


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def run(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    start = args.folder / "start"
    if not (start / "model.safetensors").exists():
        make_start(args.checkpoint, start, steps=args.start_steps)
    for seed in range(args.seeds):
        for arm in args.arm:
            run_arm(arm, seed, args.steps, start, args.folder / arm / str(seed))
    lines = [HEADER, row("start", [asked(start, start, args.scenes)])]
    for arm in args.arm:
        folders = [args.folder / arm / str(seed) for seed in range(args.seeds)]
        lines.append(row(ARMS[arm].title, [asked(folder / "checkpoint", folder, args.scenes) for folder in folders]))
    print("\n".join(lines))
    if args.plot:
        plot(args.folder, args.arm, range(args.seeds), args.plot)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="the good one to begin with")
    parser.add_argument("--arm", action="append", choices=ARMS, help="may stand several times (all)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--start-steps", type=int, default=80, help="of teaching it to look astray (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of GRPO (%(default)s)")
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes (%(default)s)")
    parser.add_argument("--plot", type=Path, help="where to draw the curves")
    args = parser.parse_args(given)
    args.arm = args.arm or list(ARMS)
    return args


def main() -> None:
    """Run or resume the ablation."""
    run(arguments())


if __name__ == "__main__":
    main()
