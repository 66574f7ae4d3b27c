"""Train ergo-mini: ``python -m ergo_train.train RUN_FOLDER`` (or ``make train``).

First the vision part alone learns to see landmarks and digits, then everything learns the two turns, on the scenes of
`scenes` and those of `hard_scenes` alike. ``--start`` begins with the weights of a checkpoint instead, whatever words it knew.
A run writes ``RUN_FOLDER/state.pt`` every few minutes and goes on from it when started again; ``log.jsonl`` holds its curve. The
scenes of step n depend on n only, so a resumed run sees what an unbroken one sees. At the end the checkpoint lies in
``RUN_FOLDER/checkpoint``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen2_5_VLForConditionalGeneration

from ergo_train import hard_scenes, scenes, tokenizer
from ergo_train import model as network
from ergo_train.model import IMAGE_MEAN, IMAGE_STD, Batch, Trainee
from ergo_train.samples import LENGTH, SLOTS, VIEWS, Packer, Sample, View

PROMPTS = Path(__file__).parents[2] / "models" / "ergo_mini" / "prompts.toml"


HARD_SHARE = 0.75
"""Share of hard scenes: they hold five kinds of questions, the others one."""


class Samples(Dataset[Sample]):
    """Sample ``i`` is made from seed ``i``; the first ``sights`` of them are for the vision part alone.

    Sample ``-i`` is three close-ups, to read more than the conversations give to read: drawing and seeing them is cheap.
    """

    def __init__(self, packer: Packer, sights: int, count: int) -> None:
        self.packer, self.sights, self.count = packer, sights, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, seed: int) -> Sample:
        rng = random.Random(f"sample {seed}")
        if seed < 0:
            return self.packer.sight(rng, None)
        hard = rng.random() < HARD_SHARE
        draw, spread = (hard_scenes.hard_scene, 0.8) if hard else (scenes.scene, 0.6)
        if seed < self.sights:
            return self.packer.sight(rng, draw(seed, size=scenes.sized(rng, rng.uniform(0.25e6, 0.4e6), spread)))
        # Most scenes have sizes that no list holds, and not those of the largest, which are drawn slowly.
        listed = rng.random() < 0.1
        return self.packer.sample(rng, draw(seed, size=None if listed else scenes.unlisted_size(rng, spread)))


def collate(samples: list[Sample]) -> Batch:
    """Pad samples to one shape."""
    count = len(samples)
    patches = np.zeros((count * VIEWS, 4 * SLOTS, 588), np.float32)
    places = np.zeros((count * VIEWS, 4 * SLOTS, 2), np.float32)
    valid = np.zeros((count * VIEWS, 4 * SLOTS), bool)
    crops = np.zeros(count * VIEWS, bool)
    ids = torch.zeros(count, LENGTH, dtype=torch.long)
    branch = torch.full((count, LENGTH), -1)
    positions = torch.zeros(3, count, LENGTH, dtype=torch.long)
    weights = torch.zeros(count, LENGTH)
    slots = torch.full((count, LENGTH), -1)
    looks, landmarks, digits = [], [], []
    for b, sample in enumerate(samples):
        used = len(sample.ids)
        ids[b, :used] = torch.tensor(sample.ids)
        branch[b, :used] = torch.tensor(sample.branch)
        positions[:, b, :used] = torch.tensor(sample.positions, dtype=torch.long).reshape(-1, 3).T
        weights[b, :used] = torch.tensor(sample.weights)
        slots[b, :used] = torch.tensor(sample.slots)
        looks += [(b, head, here, there) for head, here, there in sample.looks]
        base = b * VIEWS
        landmarks += [((base + v) * SLOTS + token, kind, half, 0) for v, token, kind, half in sample.landmarks]
        digits += [((base + v) * SLOTS + token, patch, digit) for v, token, patch, digit in sample.digits]
        for v, view in enumerate(sample.views):
            used = 4 * view.rows * view.columns
            patches[base + v, :used], places[base + v, :used] = patchify(view)
            valid[base + v, :used] = True
            crops[base + v] = any(number == v for number, *_ in sample.digits)
        for v in range(len(sample.views), VIEWS):
            valid[base + v, :4] = True  # a row of attention must have something to look at
    return Batch(
        patches=torch.from_numpy(patches),
        patch_places=torch.from_numpy(places),
        patch_valid=torch.from_numpy(valid),
        ids=ids,
        branch=branch,
        positions=positions,
        weights=weights,
        slots=slots,
        looks=torch.tensor(looks),
        landmarks=torch.tensor(landmarks),
        digits=torch.tensor(digits),
        crops=torch.from_numpy(crops),
    )


def patchify(view: View) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the patches of a view, 588 values each, and their rows and columns, in the processor's order of 2 × 2 blocks."""
    x = (view.pixels.astype(np.float32) / 255 - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)
    x = x.reshape(view.rows, 2, 14, view.columns, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    row, column = np.divmod(np.arange(view.rows * view.columns), view.columns)
    places = np.stack(
        [
            (2 * row[:, None] + np.array([0, 0, 1, 1])).ravel(),
            (2 * column[:, None] + np.array([0, 1, 0, 1])).ravel(),
        ],
        1,
    )
    return x.reshape(-1, 588), places


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: float) -> float:
    """Warm up, hold, and fall to a fiftieth along a cosine over the last ``decay`` of the run."""
    if step < warmup:
        return peak * (step + 1) / warmup
    start = int(steps * (1 - decay))
    if step < start:
        return peak
    along = min(1.0, (step - start) / max(1, steps - start))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * along)))


def main() -> None:
    """Run or resume the training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--see-steps", type=int, default=1200, help="steps of the vision part alone")
    parser.add_argument("--steps", type=int, default=2400, help="steps of the whole, after those")
    parser.add_argument("--batch", type=int, default=32, help="scenes a step")
    parser.add_argument("--close-ups", type=int, default=40, help="triples of close-ups a step, beside the scenes")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--decay", type=float, default=0.5, help="share of the steps over which the rate falls")
    parser.add_argument("--threads", type=int, default=1, help="threads of the arithmetic")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights")
    parser.add_argument("--start", type=Path, help="checkpoint whose weights to begin with")
    parser.add_argument("--bfloat16", action="store_true", help="multiply in bfloat16 (faster where the processor has AMX)")
    parser.add_argument("--compile", action="store_true", help="compile the layers (needs a C++ compiler; about 1.3 x)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long; start again to go on")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Train until the steps are done or the minutes are over."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    checkpoint, state_file = args.folder / "checkpoint", args.folder / "state.pt"
    tokens = tokenizer.build(checkpoint)
    trainee = Trainee(network.build(tokens))
    optimizers = _optimizers(trainee)
    step = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        trainee.load_state_dict(state["trainee"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        step = state["step"]
    elif args.start:
        adopt(trainee.model, tokens, args.start)
    if args.compile:
        trainee.compile()
    total = args.see_steps + args.steps
    packer = Packer(tokens, tomllib.loads(PROMPTS.read_text(encoding="utf-8")))
    samples = Samples(packer, args.see_steps * args.batch, total * args.batch)
    loader = DataLoader(
        samples,
        batch_sampler=[_seeds(n, args) for n in range(step, total)],
        collate_fn=lambda drawn: (collate(drawn[: args.batch]), collate(drawn[args.batch :]) if drawn[args.batch :] else None),
        num_workers=args.workers,
        prefetch_factor=8 if args.workers else None,
    )
    started = last = time.monotonic()
    history: list[list[float]] = []
    for batch, close_ups in loader:
        seeing = step < args.see_steps
        local, length = (step, args.see_steps) if seeing else (step - args.see_steps, args.steps)
        rate = learning_rate(local, length, args.rate, 100, 0.3 if seeing else args.decay)
        for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
            group["lr"] = rate
        values = _step(trainee, batch, close_ups, optimizers, seeing=seeing, bfloat16=args.bfloat16)
        history.append(values)
        step += 1
        now = time.monotonic()
        if step % 50 == 0:
            means = np.nanmean(np.array(history), 0)
            names = ("language", "looking", "position", "landmark", "digit", "digits", "codes", "looks")
            line = {"step": step, "rate": round(rate, 6), "seconds": round(now - started)}
            line |= {name: round(float(v), 4) for name, v in zip(names, means, strict=True)}
            with (args.folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(line, flush=True)
            history = []
        over = now - started > args.minutes * 60
        if now - last > 180 or over or step == total:
            last = now
            kept = [optimizer.state_dict() for optimizer in optimizers]
            state = {"trainee": trainee.state_dict(), "optimizers": kept, "step": step}
            torch.save(state, state_file.with_suffix(".tmp"))
            os.replace(state_file.with_suffix(".tmp"), state_file)
            network.save(trainee.model, checkpoint)
        if over or step == total:
            break


def _optimizers(trainee: Trainee) -> list[torch.optim.Optimizer]:
    """Muon for the matrices within the layers, AdamW for all else: words, heads, the patches' kernel and every vector.

    With ``match_rms_adamw`` both take steps of one size, so one learning rate serves both.
    """
    network = trainee.model.model
    layers = [*network.language_model.layers, *network.visual.blocks, network.visual.merger.mlp]
    matrices = [p for layer in layers for p in layer.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in trainee.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _seeds(step: int, args: argparse.Namespace) -> list[int]:
    scene_seeds = list(range(step * args.batch, (step + 1) * args.batch))
    close_ups = 0 if step < args.see_steps else args.close_ups
    return scene_seeds + [-1 - seed for seed in range(step * args.close_ups, step * args.close_ups + close_ups)]


def adopt(model: Qwen2_5_VLForConditionalGeneration, tokens: Tokenizer, checkpoint: Path) -> None:
    """Take over the weights of a checkpoint of the same shape; those of words that both know word by word."""
    weights = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
    known = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).get_vocab()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                for word, row in tokens.get_vocab().items():
                    if word in known:
                        value[row] = weights[name][known[word]]
            else:
                value.copy_(weights[name])


def _step(
    trainee: Trainee,
    batch: Batch,
    close_ups: Batch | None,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    seeing: bool,
    bfloat16: bool = False,
) -> list[float]:
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        losses = trainee.look(batch) if seeing else trainee(batch)
        loss: Tensor = losses.total
        if close_ups is not None:
            loss = loss + 2 * trainee.read_digits(close_ups)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([p for p in trainee.parameters() if p.grad is not None], 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [
        v.item()
        for v in (
            losses.language,
            losses.looking,
            losses.position,
            losses.landmark,
            losses.digit,
            losses.digits_right,
            losses.codes_right,
            losses.looks_right,
        )
    ]


if __name__ == "__main__":
    main()
