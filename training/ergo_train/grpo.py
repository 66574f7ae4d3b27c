"""GRPO with the paper's rewards: ``python -m ergo_train.grpo CONFIG RUN_FOLDER``.

Each step answers some questions several times with the server's own loop (`rollouts`), weighs the answers, and makes those that
were worth more than the others of their question more likely:

    A = (R - mean of the group) / (its deviation + 1e-4)
    loss = - mean over the written tokens of  min(r·A, clip(r, 1 - ε, 1 + ε)·A) - β·KL
    r = π / π of the rollout,   KL = exp(log ref/π) - log ref/π - 1   (always positive, little variance)

Both turns of a conversation are one sequence: one forward pass scores the zoom reply and the answer, and only what the model
wrote carries loss. The reward model sees the crop and the question, never the overview. The group's advantage and the
estimator of KL are DeepSeekMath's, the mean over all tokens of the batch is DAPO's.

Scores are taken of the reply's text as the tokenizer spells it, which is how the next turn, and the server, spell it; a sampled
reply is rarely spelled otherwise (`respelled` in the log says how often).

A run writes ``log.jsonl``, and every so often ``state`` and ``checkpoint``; started again, it goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import io
import json
import math
import os
import random
import time
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx2
import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil
from transformers.utils import logging as transformers_logging

from ergo_server.engine.base import Engine
from ergo_server.engine.vllm import VllmEngine
from ergo_server.imaging.geometry import Box, PixelBudget
from ergo_server.imaging.work import ImageWork
from ergo_server.pipeline import Pipeline
from ergo_server.protocol.base import ModelProfile, Question
from ergo_server.protocol.ergo import ErgoPolicy
from ergo_server.protocol.prompts import builtin_profile, load_profile
from ergo_server.protocol.rewards import GAMMA, Matcher, Rewards, exact, letter, numeric
from ergo_server.protocol.single import SinglePolicy
from ergo_train import hard_scenes, scenes
from ergo_train.rollouts import (
    PATIENCE,
    BatchEngine,
    Encoded,
    Encoder,
    Judge,
    Problem,
    Reader,
    Rollout,
    SharpEye,
    padded,
    roll_out,
)

LEAST_DEVIATION = 1e-4
"""Added to a group's deviation, as in TRL: answers that are all worth the same teach nothing, and must not divide by zero."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelTable(_Table):
    """What is trained."""

    checkpoint: str
    """A folder, or a model's name on a hub."""
    prompts: Path | None = None
    """Its prompts file; without one, those of ERGO-7B."""
    visual_tokens: int
    """Budget of one view."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    freeze_vision: bool = True
    """Train the language model alone: where to look is decided there, and a step on a CPU takes half as long."""


class DataTable(_Table):
    """What is asked."""

    file: Path | None = None
    """JSON lines with ``image`` (a path beside the file), ``question``, ``answer``, and perhaps ``choices`` (a list),
    ``instructions``, ``match`` (exact, letter, or a number: the relative tolerance) and ``target`` (x1, y1, x2, y2 in pixels of
    the image). Without it, drawn scenes."""
    hard_share: float = Field(default=0.6, ge=0, le=1)
    """Of the drawn scenes, those of `hard_scenes`."""


class RolloutTable(_Table):
    """How answers are sampled."""

    questions: int = Field(gt=0)
    """A step, over all processes."""
    group: int = Field(default=8, gt=1)
    """Answers to each."""
    temperature: float = Field(default=1.0, gt=0)
    max_tokens: int = Field(default=1024, gt=0)
    """Of one reply."""
    engine: str | None = None
    """URL of a vLLM that serves the checkpoint in development mode; without it, the network in training writes itself."""


class RewardTable(_Table):
    """What an answer is worth: the paper's weights."""

    accuracy: float = 1.0
    region: float = 1.0
    box: float = 0.5
    format: float = 1.0
    gamma: float = Field(default=GAMMA, gt=0, le=1)
    judge: str | None = None
    """The frozen reward model: a folder, or the URL of a vLLM; ``target`` for one that sees whatever the region holds
    (`rollouts.SharpEye`); without it, the weights that training began with."""
    judge_prompts: Path | None = None

    def worth(self, rewards: Rewards) -> float:
        """Return the weighted sum."""
        return (
            self.accuracy * rewards.accuracy
            + self.region * rewards.region
            + self.box * rewards.box
            + self.format * rewards.format
        )


class TrainingTable(_Table):
    """How weights are changed."""

    steps: int = Field(gt=0)
    rate: float = Field(gt=0)
    warmup: int = 5
    beta: float = Field(default=0.04, ge=0)
    """Of the KL to the reference."""
    clip: float = Field(default=0.2, gt=0, lt=1)
    updates: int = Field(default=1, gt=0)
    """Passes over each step's rollouts."""
    together: int = Field(default=16, gt=0)
    """Conversations in one forward pass."""
    largest_gradient: float = 1.0
    save_every: int = Field(default=50, gt=0)
    bfloat16: bool = False
    """Multiply in bfloat16."""


class Config(_Table):
    """A configuration file, TOML."""

    model: ModelTable
    data: DataTable = DataTable()
    rollouts: RolloutTable
    reward: RewardTable = RewardTable()
    training: TrainingTable
    seed: int = Field(default=0, ge=0, lt=400)
    """Of the questions that are drawn, and of the answers."""

    @classmethod
    def read(cls, file: Path) -> Config:
        """Read a file; paths in it are relative to it.

        Raises:
            pydantic.ValidationError: a value is missing, unknown or wrong.
        """
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
        for table, name in (("model", "prompts"), ("data", "file"), ("reward", "judge_prompts")):
            if value := tables.get(table, {}).get(name):
                tables[table][name] = file.parent / value
        for table, name in (("model", "checkpoint"), ("reward", "judge")):
            value = tables.get(table, {}).get(name)
            if value and (file.parent / value).is_dir():
                tables[table][name] = str(file.parent / value)
        return cls.model_validate(tables)


MOST_DRAWN = 1_000_000
"""Problems of one run, so that runs with other seeds draw others."""


# --- what is asked --------------------------------------------------------------------------------------------------------


def problem_of(scene: scenes.Scene) -> Problem:
    """Return a drawn scene as a problem."""
    with io.BytesIO() as file:
        scene.image.save(file, "PNG", compress_level=0)
        return Problem(file.getvalue(), Question(scene.question), scene.answer, target=Box(*scene.box))


def drawn(number: int, hard_share: float, seed: int = 0) -> Problem:
    """Return problem ``number`` of those that are drawn for the GRPO of this seed; no other training draws the same."""
    number += seed * MOST_DRAWN
    rng = random.Random(f"grpo {number}")
    draw = hard_scenes.hard_scene if rng.random() < hard_share else scenes.scene
    return problem_of(draw(scenes.HELD_OUT // 2 + number, size=scenes.unlisted_size(rng, 0.6)))


def recorded(file: Path) -> list[Problem]:
    """Read a file of problems; see `DataTable.file`. Images are read when they are needed."""
    return [_record(file.parent, json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _record(folder: Path, record: dict[str, Any]) -> Problem:
    question = Question(record["question"], tuple(record.get("choices", ())), record.get("instructions", ""))
    wanted = record.get("match", "letter" if question.choices else "exact")
    match: Matcher = exact if wanted == "exact" else letter(question) if wanted == "letter" else numeric(float(wanted))
    target = Box(*record["target"]) if "target" in record else None
    return Problem((folder / record["image"]).read_bytes(), question, record["answer"], match, target)


# --- scores ---------------------------------------------------------------------------------------------------------------


class Scorer(nn.Module):
    """Says how likely a network was to write what it wrote.

    A module, and called as one, so that what shards or copies networks over devices sees every use of the weights.
    """

    def __init__(self, network: Any, temperature: float) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature

    def forward(self, inputs: dict[str, Tensor], written: Tensor) -> Tensor:
        """Return the logarithms of the chances of the written tokens, N in all, in order.

        Args:
            inputs: of B conversations, as `rollouts.padded` gives them, L long.
            written: B × L, true where the model wrote the token.
        """
        hidden = self.network.model(**inputs, use_cache=False).last_hidden_state
        chosen = written[:, 1:]
        # Only where something was written: all logits of a 7B model over a batch would take more memory than the model.
        logits = self.network.lm_head(hidden[:, :-1][chosen]).float() / self.temperature
        tokens = inputs["input_ids"][:, 1:][chosen]
        return -nn.functional.cross_entropy(logits, tokens, reduction="none")


def advantages(worths: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return what each answer was worth beside the others of its question, in deviations of the group.

    >>> advantages([[1.0, 0.0], [2.0, 2.0]])
    [[0.7069..., -0.7069...], [0.0, 0.0]]
    """
    normalised = []
    for group in worths:
        mean = sum(group) / len(group)
        deviation = math.sqrt(sum((worth - mean) ** 2 for worth in group) / (len(group) - 1))
        normalised.append([(worth - mean) / (deviation + LEAST_DEVIATION) for worth in group])
    return normalised


def objective(
    new: Tensor, old: Tensor, reference: Tensor, advantage: Tensor, *, clip: float, beta: float
) -> tuple[Tensor, Tensor]:
    """Return what is to be maximised, and the KL to the reference: of each written token, N.

    Args:
        new: logarithms of the chances by the weights of now, with gradient.
        old: by those that wrote the rollout.
        reference: by those that training began with.
        advantage: of the answer that the token belongs to.
        clip: how far a chance may move for its advantage to count.
        beta: weight of the KL.
    """
    ratio = (new - old).exp()
    gain = torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    apart = reference - new
    kl = apart.exp() - apart - 1
    return gain - beta * kl, kl


# --- the run --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checkpoint."""

    network: Any
    encoder: Encoder

    @classmethod
    def of(cls, checkpoint: str, dtype: str = "float32") -> Loaded:
        """Load it."""
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        network: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
        processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        return cls(network, Encoder(tokenizer, processor, network.config.image_token_id))


def frozen(network: Any) -> Any:
    """Return a copy that does not learn."""
    return copy.deepcopy(network).eval().requires_grad_(False)


def profile_of(prompts: Path | None) -> ModelProfile:
    """Read a prompts file, or give ERGO-7B's."""
    return load_profile(prompts) if prompts else builtin_profile()


class Trainer:
    """A run. Everything that has to be kept between steps is here.

    Args:
        config: of the run.
        folder: where it is kept.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        # Not told of the precision: its choice holds for all of the process, and another run in it could not choose again.
        self.accelerator = Accelerator()
        self.step = 0
        torch.manual_seed(config.seed)
        loaded = Loaded.of(config.model.checkpoint, config.model.dtype)
        self.encoder, temperature = loaded.encoder, config.rollouts.temperature
        self._pad: int = loaded.network.generation_config.pad_token_id
        self._reference = Scorer(frozen(loaded.network), temperature).to(self.accelerator.device)
        if config.model.gradient_checkpointing:
            loaded.network.gradient_checkpointing_enable()
        loaded.network.model.visual.requires_grad_(not config.model.freeze_vision)
        scorer = Scorer(loaded.network, temperature)
        optimizer = torch.optim.AdamW(
            [weight for weight in scorer.parameters() if weight.requires_grad],
            lr=config.training.rate,
            betas=(0.9, 0.99),
            weight_decay=0.0,
        )
        self.scorer, self.optimizer = self.accelerator.prepare(scorer, optimizer)
        self._profile = profile_of(config.model.prompts)
        self._records = recorded(config.data.file) if config.data.file else None

    @property
    def network(self) -> Any:
        """The network in training."""
        return self.accelerator.unwrap_model(self.scorer).network

    def resume(self) -> None:
        """Go on from where the folder's run stopped, if it holds one."""
        if (self.folder / "state").is_dir():
            self.accelerator.load_state(str(self.folder / "state"))
            self.step = json.loads((self.folder / "state" / "step.json").read_text())

    def save(self) -> None:
        """Write the state to go on from, and the checkpoint."""
        self.accelerator.save_state(str(self.folder / "state"))
        if self.accelerator.is_main_process:
            (self.folder / "state" / "step.json").write_text(json.dumps(self.step))
        self.write_checkpoint(self.folder / "checkpoint")

    def write_checkpoint(self, folder: Path) -> None:
        """Write what transformers and vLLM load."""
        weights = self.accelerator.get_state_dict(self.scorer)
        if not self.accelerator.is_main_process:
            return
        weights = {name.removeprefix("network."): value.to(torch.bfloat16) for name, value in weights.items()}
        self.network.save_pretrained(folder, state_dict=weights)
        self.encoder.save(folder)

    async def run(self, *, minutes: float = math.inf) -> None:
        """Train until the steps are done or the minutes are over."""
        end = time.monotonic() + minutes * 60
        async with self._rolling() as roll:
            while self.step < self.config.training.steps and time.monotonic() < end:
                started = time.monotonic()
                groups = await roll()
                rolled = time.monotonic()
                line = report(groups, self.config.reward) | self.learn(groups)
                self.step += 1
                if self.config.rollouts.engine:
                    await self._hand_over(self.config.rollouts.engine)
                self._log(line | {"rollouts_s": rolled - started, "learning_s": time.monotonic() - rolled})
                if self.step % self.config.training.save_every == 0 or self.step == self.config.training.steps:
                    self.save()

    async def roll(self) -> list[list[Rollout]]:
        """Return the rollouts that the next step would learn from: for each of its questions a group."""
        async with self._rolling() as roll:
            return await roll()

    @contextlib.asynccontextmanager
    async def _rolling(self) -> AsyncIterator[Callable[[], Awaitable[list[list[Rollout]]]]]:
        """Hold what rollouts need; yields what makes those of the step that is next then."""
        async with contextlib.AsyncExitStack() as stack:
            engine, judge = self._engine(), self._judge()
            for one in (engine, judge.engine):
                if one is not None:
                    stack.push_async_callback(one.aclose)
            work = ImageWork(threads=os.cpu_count() or 1, wait_seconds=PATIENCE.turn, decode_seconds=PATIENCE.turn)
            stack.callback(work.close)
            prompts = self._profile.prompts
            pipeline = Pipeline(engine, ErgoPolicy(prompts), SinglePolicy(prompts), deadlines=PATIENCE)
            yield lambda: roll_out(
                pipeline,
                judge,
                self._problems(),
                group=self.config.rollouts.group,
                budget=PixelBudget(self.config.model.visual_tokens),
                temperature=self.config.rollouts.temperature,
                seed=self._draw_seed(),
                gamma=self.config.reward.gamma,
                work=work,
            )

    def _draw_seed(self) -> int:
        """The seed of this step's first answer; each further answer's is one more.

        Below 2³¹, since of a larger one torch's generator for CPUs takes the low 32 bits alone. Primes, so that runs, steps and
        processes of a size that occurs do not meet.
        """
        mixed: int = self.config.seed * 1_000_000_007 + self.step * 100_003 + self.accelerator.process_index * 10_007
        return mixed % (1 << 31)

    def _problems(self) -> list[Problem]:
        """The questions of this step that are this process's."""
        count, index = self.accelerator.num_processes, self.accelerator.process_index
        first = self.step * self.config.rollouts.questions
        numbers = range(first + index, first + self.config.rollouts.questions, count)
        if self._records is None:
            return [drawn(number, self.config.data.hard_share, self.config.seed) for number in numbers]
        order = random.Random(self.config.seed).sample(self._records, len(self._records))
        return [order[number % len(order)] for number in numbers]

    def _engine(self) -> Engine:
        url = self.config.rollouts.engine
        if url:
            return VllmEngine(url)
        return BatchEngine(self.network, self.encoder, longest=self.config.rollouts.max_tokens)

    def _judge(self) -> Judge:
        table, longest = self.config.reward, self.config.rollouts.max_tokens
        if table.judge == "target":
            return SharpEye()
        policy = SinglePolicy(profile_of(table.judge_prompts or self.config.model.prompts).prompts)
        if table.judge is None:
            return Reader(BatchEngine(self._reference.network, self.encoder, longest=longest), policy)
        if table.judge.startswith(("http://", "https://")):
            return Reader(VllmEngine(table.judge), policy)
        loaded = Loaded.of(table.judge, self.config.model.dtype)
        network = loaded.network.to(self.accelerator.device).eval().requires_grad_(False)
        return Reader(BatchEngine(network, loaded.encoder, longest=longest), policy)

    def learn(self, groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
        """Change the weights by one step's rollouts."""
        table = self.config.training
        worths = [[self.config.reward.worth(rollout.rewards) for rollout in group] for group in groups]
        gains = [gain for group in advantages(worths) for gain in group]
        rollouts = [rollout for group in groups for rollout in group]
        encoded = [self.encoded(rollout) for rollout in rollouts]
        parts = [slice(start, start + table.together) for start in range(0, len(encoded), table.together)]
        tokens = sum(int(conversation.written[1:].sum()) for conversation in encoded)
        everywhere = self.accelerator.reduce(torch.tensor(float(tokens), device=self.accelerator.device)).item()
        share = everywhere / self.accelerator.num_processes  # gradients are averaged over processes, not summed
        said = sum(turn.generation.usage.completion_tokens for rollout in rollouts for turn in rollout.result.turns)
        self.scorer.train()
        reference = [self.scores(self._reference, encoded[part]) for part in parts]
        old = [self.scores(self.scorer, encoded[part]) for part in parts] if table.updates > 1 else None
        rate = table.rate * min(1.0, (self.step + 1) / (table.warmup + 1))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        kl_sum = 0.0
        for _ in range(table.updates):
            for number, part in enumerate(parts):
                inputs, written = self._inputs(encoded[part])
                with self._autocast():
                    new = self.scorer(inputs, written)
                counts = written[:, 1:].sum(1)
                gain = torch.tensor(gains[part], device=new.device).repeat_interleave(counts)
                before = new.detach() if old is None else old[number]
                value, kl = objective(new, before, reference[number], gain, clip=table.clip, beta=table.beta)
                self.accelerator.backward(-value.sum() / share)
                kl_sum += float(kl.detach().sum())
            norm = self.accelerator.clip_grad_norm_(self.scorer.parameters(), table.largest_gradient)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.scorer.eval()
        return {
            "kl": kl_sum / max(1, tokens) / table.updates,
            "gradient": float(norm),
            "tokens": tokens / len(rollouts),
            "respelled": abs(said - tokens) / max(1, said),
            "rate": rate,
        }

    def encoded(self, rollout: Rollout) -> Encoded:
        """Return a rollout as tokens, with what the model wrote marked."""
        turns = [turn.generation for turn in rollout.result.turns]
        ended = [g.finish_reason == "stop" and not g.text.endswith(("</zoom>", "</answer>")) for g in turns]
        return self.encoder.whole(rollout.conversation, ended)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.config.training.bfloat16)

    def _inputs(self, part: Sequence[Encoded]) -> tuple[dict[str, Tensor], Tensor]:
        device = self.accelerator.device
        written = nn.utils.rnn.pad_sequence([c.written for c in part], batch_first=True, padding_value=False)
        return padded(part, self._pad, device, left=False), written.to(device)

    @torch.no_grad()
    def scores(self, scorer: nn.Module, part: Sequence[Encoded]) -> Tensor:
        """Return the logarithms of the chances of what was written; see `Scorer`."""
        with self._autocast():
            scores: Tensor = scorer(*self._inputs(part))
        return scores

    async def _hand_over(self, url: str) -> None:
        """Have vLLM take the new weights over, and forget what it computed with the old."""
        folder = (self.folder / "serving").absolute()
        self.write_checkpoint(folder)
        if self.accelerator.is_main_process:
            async with httpx2.AsyncClient(base_url=url, timeout=600) as client:
                reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
                (await client.post("/collective_rpc", json=reload)).raise_for_status()
                for cache in ("prefix", "mm", "encoder"):
                    (await client.post(f"/reset_{cache}_cache")).raise_for_status()
        self.accelerator.wait_for_everyone()

    def _log(self, line: dict[str, float]) -> None:
        mean = {name: float(self.accelerator.reduce(torch.tensor(value), "mean")) for name, value in sorted(line.items())}
        if self.accelerator.is_main_process:
            written = {"step": self.step} | {name: round(value, 5) for name, value in mean.items()}
            with (self.folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(written) + "\n")
            shown = ("reward", "accuracy", "region", "box", "format", "area", "visual_tokens", "kl")
            print(f"step {self.step:4}  " + "  ".join(f"{name} {mean[name]:.3f}" for name in shown), flush=True)


def report(groups: Sequence[Sequence[Rollout]], table: RewardTable) -> dict[str, float]:
    """Return means over rollouts: rewards, shares and sizes."""
    rollouts = [rollout for group in groups for rollout in group]

    def mean(values: Iterator[float]) -> float:
        return sum(values) / len(rollouts)

    return {
        "reward": mean(table.worth(r.rewards) for r in rollouts),
        "accuracy": mean(r.rewards.accuracy for r in rollouts),
        "region": mean(r.rewards.region for r in rollouts),
        "box": mean(r.rewards.box for r in rollouts),
        "format": mean(r.rewards.format for r in rollouts),
        "area": mean(r.result.region.area_ratio for r in rollouts),
        "visual_tokens": mean(r.result.visual_tokens.total for r in rollouts),
    }


def main() -> None:
    """Run or resume a training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="TOML file; see training/configs")
    parser.add_argument("folder", type=Path, help="where the run is kept")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long; start again to go on")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(Config.read(args.config), args.folder)
    trainer.resume()
    asyncio.run(trainer.run(minutes=args.minutes))


if __name__ == "__main__":
    main()
