"""GRPO: what answers are worth beside each other, how weights move, and that a run can be stopped and resumed."""

from __future__ import annotations

import asyncio
import copy
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from support import CHECKPOINT, PROMPTS, ROOT

from ergo_server.engine.base import Engine, Generation, Sampling
from ergo_server.engine.vllm import VllmEngine
from ergo_server.imaging.geometry import Box
from ergo_server.protocol.rewards import Rewards
from ergo_train.grpo import Config, Loaded, Trainer, advantages, drawn, objective, recorded, report
from ergo_train.rollouts import BatchEngine, Rollout
from ergo_train.scenes import scene

WORTHS = st.lists(st.lists(st.floats(0, 3.5), min_size=2, max_size=8), min_size=1, max_size=4)


def config(**tables: dict[str, Any]) -> Config:
    """A short run on the shipped checkpoint."""
    given: dict[str, dict[str, Any]] = {
        "data": {},
        "model": {"checkpoint": str(CHECKPOINT), "prompts": PROMPTS, "visual_tokens": 49},
        "rollouts": {"questions": 2, "group": 3, "max_tokens": 64, "temperature": 1.5},
        "reward": {"judge": "target"},
        "training": {"steps": 2, "rate": 1e-3, "warmup": 0, "save_every": 2},
    }
    return Config.model_validate({name: table | tables.get(name, {}) for name, table in given.items()})


# --- the arithmetic -------------------------------------------------------------------------------------------------------


@given(WORTHS)
def test_advantages_compare_within_a_group(worths: list[list[float]]) -> None:
    """Their mean is 0, their order that of the rewards, and what is worth as much as all others of its group gets none."""
    for group, gains in zip(worths, advantages(worths), strict=True):
        assert sum(gains) == pytest.approx(0, abs=1e-6)
        if max(group) - min(group) > 1e-6:
            assert [group[i] for i in sorted(range(len(group)), key=gains.__getitem__)] == pytest.approx(sorted(group), abs=1e-6)
        if len(set(group)) == 1:
            assert gains == pytest.approx([0] * len(group), abs=1e-6)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=8), st.floats(1, 100), st.floats(-10, 10))
def test_advantages_have_no_unit(group: list[int], scale: float, shift: float) -> None:
    """Rewards in other units, or with something added to all, give the same advantages."""
    [plain], [moved] = advantages([group]), advantages([[scale * worth + shift for worth in group]])
    assert moved == pytest.approx(plain, abs=2e-3)


def test_at_the_weights_of_the_rollout_the_objective_is_the_advantage() -> None:
    """Its gradient is then the policy gradient: the advantage for each token; the KL is 0 and pulls nowhere."""
    new = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    gain = torch.tensor([1.0, -2.0, 0.0])
    value, kl = objective(new, new.detach(), new.detach(), gain, clip=0.2, beta=0.04)
    value.sum().backward()  # type: ignore[no-untyped-call]
    assert value.tolist() == gain.tolist()
    assert kl.tolist() == [0, 0, 0]
    assert new.grad is not None
    assert new.grad.tolist() == gain.tolist()


@pytest.mark.parametrize(
    ("ratio", "gain", "moves"),
    [(1.3, 1.0, False), (1.1, 1.0, True), (0.7, 1.0, True), (0.7, -1.0, False), (0.9, -1.0, True), (1.3, -1.0, True)],
)
def test_a_chance_that_has_moved_enough_is_left_alone(ratio: float, gain: float, moves: bool) -> None:
    """Beyond the clip in the direction of its advantage a token has no gradient; in the other direction it always has."""
    old = torch.tensor([-1.0])
    new = (old + torch.tensor(ratio).log()).requires_grad_()
    value, _ = objective(new, old, new.detach(), torch.tensor([gain]), clip=0.2, beta=0.0)
    value.sum().backward()  # type: ignore[no-untyped-call]
    assert new.grad is not None
    assert bool(new.grad.abs().item() > 0) is moves


@given(st.floats(-8, 0), st.floats(-8, 0))
def test_the_kl_is_never_negative_and_pulls_back(now: float, reference: float) -> None:
    """The estimator is at least 0, 0 where nothing moved, and its gradient leads back to the reference."""
    new = torch.tensor([now], dtype=torch.float64, requires_grad=True)
    value, kl = objective(new, new.detach(), torch.tensor([reference], dtype=torch.float64), torch.zeros(1), clip=0.2, beta=1.0)
    value.sum().backward()  # type: ignore[no-untyped-call]
    assert kl.item() >= 0
    assert new.grad is not None
    assert new.grad.item() * (reference - now) >= 0


# --- the run --------------------------------------------------------------------------------------------------------------


def roll(trainer: Trainer) -> list[list[Rollout]]:
    """Return the rollouts of the next step."""
    return asyncio.run(trainer.roll())


def scored(trainer: Trainer, rollouts: Sequence[Rollout]) -> list[float]:
    """Return the logarithm of the chance of each rollout."""
    written = [trainer.encoded(rollout) for rollout in rollouts]
    return [float(trainer.scores(trainer.scorer, [one]).sum()) for one in written]


def test_a_step_makes_the_better_answer_likelier(tmp_path: Path) -> None:
    """Of a group of different answers the one with the higher reward gains chance beside the others, and what sees stays."""
    trainer = Trainer(config(rollouts={"questions": 1, "group": 4}, training={"rate": 1e-5}), tmp_path)
    seeing = copy.deepcopy(trainer.network.model.visual.state_dict())
    [group] = roll(trainer)
    texts = [rollout.conversation for rollout in group]
    best = next(i for i in range(1, len(texts)) if texts[i] != texts[0])
    weighed = [replace(rollout, rewards=Rewards(*[float(i == best)] * 4)) for i, rollout in enumerate(group)]
    before = scored(trainer, weighed)
    line = trainer.learn([weighed])
    after = scored(trainer, weighed)
    moved = [b - a for a, b in zip(before, after, strict=True)]
    assert moved[best] == max(moved)
    assert moved[best] > 0
    assert min(moved) < 0
    assert line["kl"] == pytest.approx(0, abs=1e-6)  # counted before the step, at the weights of the reference
    assert line["respelled"] <= 1
    assert all(torch.equal(value, seeing[name]) for name, value in trainer.network.model.visual.state_dict().items())


def test_answers_that_are_all_worth_the_same_teach_nothing(tmp_path: Path) -> None:
    """Without a difference within the groups, and at the reference, no weight moves."""
    trainer = Trainer(config(), tmp_path)
    before = copy.deepcopy(trainer.network.state_dict())
    trainer.learn([[replace(rollout, rewards=Rewards(1, 1, 1, 1)) for rollout in group] for group in roll(trainer)])
    assert all(torch.equal(value, before[name]) for name, value in trainer.network.state_dict().items())


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Two steps, and two more in another process' place, end at the weights of four steps on end, and log the same."""
    table = {"steps": 4, "save_every": 2, "rate": 1e-3, "warmup": 0}
    whole = trained(tmp_path / "whole", table, 4)
    trained(tmp_path / "parts", table, 2)
    parts = trained(tmp_path / "parts", table, 4)
    mine, theirs = parts.network.state_dict(), whole.network.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    lines = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    logs = [[{k: v for k, v in json.loads(line).items() if not k.endswith("_s")} for line in log] for log in lines]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [1, 2, 3, 4]
    kept = Loaded.of(str(tmp_path / "parts" / "checkpoint")).network.state_dict()
    assert all(torch.equal(value, mine[name].bfloat16().float()) for name, value in kept.items())


def test_runs_with_other_seeds_are_other_runs(tmp_path: Path) -> None:
    """To the same questions the same seed writes the same, and another something else; drawn questions are others, too."""
    made = scene(7, size=(1200, 1050))
    made.image.save(tmp_path / "made.png")
    line = {"image": "made.png", "question": made.question, "answer": made.answer, "target": made.box}
    (tmp_path / "questions.jsonl").write_text(json.dumps(line))
    asked = config(data={"file": tmp_path / "questions.jsonl"}, rollouts={"questions": 1, "group": 4})

    def replies(seed: int) -> list[str]:
        [group] = roll(Trainer(asked.model_copy(update={"seed": seed}), tmp_path))
        return [turn.generation.text for one in group for turn in one.result.turns]

    first = replies(1)
    assert replies(1) == first
    assert replies(2) != first
    assert drawn(3, 0.5, 1).image != drawn(3, 0.5, 2).image


def trained(folder: Path, table: dict[str, Any], steps: int) -> Trainer:
    """Start or resume a run, up to a step."""
    folder.mkdir(exist_ok=True)
    trainer = Trainer(config(training=table), folder)
    trainer.resume()
    trainer.config = trainer.config.model_copy(update={"training": trainer.config.training.model_copy(update={"steps": steps})})
    asyncio.run(trainer.run())
    return trainer


def test_a_report_is_of_means(tmp_path: Path) -> None:
    """The log's reward is the mean of the weighted sums: the paper's weights count a right answer with a good region 3.5."""
    groups = roll(Trainer(config(), tmp_path))
    best = [[replace(rollout, rewards=Rewards(1, 1, 1, 1)) for rollout in group] for group in groups]
    assert report(best, config().reward)["reward"] == 3.5
    half = [[replace(rollout, rewards=Rewards(float(i % 2), 0, 0, 0)) for i, rollout in enumerate(g[:2])] for g in groups]
    assert report(half, config().reward)["accuracy"] == 0.5
    assert 0 < report(groups, config().reward)["area"] <= 1


# --- what is asked, and how it is configured ------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted((ROOT / "training" / "configs").glob("*.toml")), ids=lambda file: file.name)
def test_every_configuration_file_is_read(file: Path) -> None:
    """What the project ships is valid, and its prompts file, where it names one, exists."""
    found = Config.read(file)
    assert found.model.prompts is None or found.model.prompts.exists()


@pytest.mark.parametrize(
    ("table", "value", "named"),
    [
        ("training", {"rat": 1e-4}, "training.rat"),
        ("rollouts", {"group": 1}, "rollouts.group"),
        ("reward", {"gamma": 2}, "reward.gamma"),
        ("model", {"dtype": "int8"}, "model.dtype"),
    ],
)
def test_a_wrong_configuration_says_where(table: str, value: dict[str, Any], named: str) -> None:
    """An unknown or impossible value is an error that names its place, before anything is loaded."""
    with pytest.raises(ValidationError) as caught:
        config(**{table: value})
    assert ".".join(map(str, caught.value.errors()[0]["loc"])) == named


def test_recorded_problems_say_how_they_are_matched(tmp_path: Path) -> None:
    """A line names its image beside the file; choices are matched by letter, numbers within their tolerance, all else exactly."""
    with io.BytesIO() as image:
        Image.new("RGB", (60, 60)).save(image, "PNG")
        (tmp_path / "a.png").write_bytes(image.getvalue())
    lines = [
        {"image": "a.png", "question": "What?", "answer": "red", "target": [1, 2, 30, 40]},
        {"image": "a.png", "question": "Which?", "answer": "B", "choices": ["red", "blue"]},
        {"image": "a.png", "question": "How far?", "answer": "100", "match": 0.05},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    plain, choice, number = recorded(tmp_path / "data.jsonl")
    assert plain.target == Box(1, 2, 30, 40)
    assert plain.image == (tmp_path / "a.png").read_bytes()
    assert plain.match("Red.", plain.truth)
    assert choice.match("blue", choice.truth)
    assert not choice.match("red", choice.truth)
    assert number.match("104", number.truth)
    assert not number.match("106", number.truth)


def test_drawn_problems_are_reproducible_and_held_apart() -> None:
    """The same number gives the same problem, and none is one of the held-out scenes."""
    one, again, other = drawn(3, 0.5), drawn(3, 0.5), drawn(4, 0.5)
    assert one.image == again.image
    assert one.image != other.image
    assert one.target is not None


# --- on real vLLM ---------------------------------------------------------------------------------------------------------


@pytest.mark.vllm
def test_vllm_writes_the_rollouts_and_takes_the_new_weights_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rollouts on a real vLLM each step hands it the new weights: what it then writes is what they write in this process,
    and no longer what it wrote before, though it has the conversation in its caches."""
    if reason := support.why_no_vllm():
        pytest.skip(reason)
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    with support.vllm(tmp_path / "vllm.log") as url:
        table = {"steps": 1, "rate": 3e-2, "warmup": 0}
        trainer = Trainer(config(rollouts={"engine": url}, training=table), tmp_path)
        [[first, *_], *_] = roll(trainer)
        prompt = type(first.conversation)(first.conversation.messages[:2])
        before = written(VllmEngine(url), prompt)
        asyncio.run(trainer.run())
        after = written(VllmEngine(url), prompt)
    kept = Loaded.of(str(tmp_path / "checkpoint"))
    assert after == written(BatchEngine(kept.network.eval(), kept.encoder, longest=24), prompt)
    assert after != before
    assert json.loads((tmp_path / "log.jsonl").read_text())["tokens"] > 10


def written(engine: Engine, prompt: Any) -> str:
    """Return what an engine goes on with, greedily."""

    async def write() -> str:
        try:
            [*_, last] = [piece async for piece in engine.generate(prompt, Sampling(24))]
        finally:
            await engine.aclose()
        assert isinstance(last, Generation)
        return last.text

    return asyncio.run(write())
