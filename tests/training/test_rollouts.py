"""Rollouts: the server's own loop, asked many at a time by the network in training, and what its answers are worth."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from support import CHECKPOINT, PROMPTS, held_out

from ergo_server.engine.base import Delta, Engine, Generation, Sampling
from ergo_server.engine.embedded import EmbeddedEngine
from ergo_server.imaging.geometry import Box, PixelBudget
from ergo_server.imaging.work import ImageWork
from ergo_server.pipeline import Pipeline
from ergo_server.protocol.conversation import Conversation, Message
from ergo_server.protocol.ergo import ErgoPolicy
from ergo_server.protocol.prompts import load_profile
from ergo_server.protocol.single import SinglePolicy
from ergo_train.grpo import Loaded, Scorer, problem_of
from ergo_train.rollouts import PATIENCE, BatchEngine, Encoded, Judge, Problem, Reader, Rollout, SharpEye, padded, roll_out

PROFILE = load_profile(PROMPTS)
SIZE = (1150, 1000)


@cache
def loaded() -> Loaded:
    """The shipped checkpoint."""
    found = Loaded.of(str(CHECKPOINT))
    found.network.eval()
    return found


@cache
def problems(count: int) -> tuple[Problem, ...]:
    """Held-out scenes, each of another shape."""
    return tuple(problem_of(held_out(800 + number, size=(SIZE[0] + 60 * number, SIZE[1]))) for number in range(count))


def batch_engine(longest: int = 96) -> BatchEngine:
    """The engine of rollouts, with the shipped checkpoint."""
    return BatchEngine(loaded().network, loaded().encoder, longest=longest)


def rolled(
    engine: Engine,
    asked: Sequence[Problem],
    judge: Judge | None = None,
    *,
    group: int = 1,
    temperature: float = 0.0,
    seed: int = 1,
) -> list[list[Rollout]]:
    """Roll out."""

    async def run() -> list[list[Rollout]]:
        pipeline = Pipeline(engine, ErgoPolicy(PROFILE.prompts), SinglePolicy(PROFILE.prompts), deadlines=PATIENCE)
        work = ImageWork(threads=os.cpu_count() or 1, wait_seconds=PATIENCE.turn, decode_seconds=PATIENCE.turn)
        try:
            return await roll_out(
                pipeline,
                judge or SharpEye(),
                asked,
                group=group,
                budget=PixelBudget(PROFILE.default_visual_tokens),
                temperature=temperature,
                seed=seed,
                work=work,
            )
        finally:
            work.close()
            await engine.aclose()

    return asyncio.run(run())


def replies(groups: Sequence[Sequence[Rollout]]) -> list[tuple[str, ...]]:
    """What the model wrote, rollout by rollout."""
    return [tuple(turn.generation.text for turn in rollout.result.turns) for group in groups for rollout in group]


def test_many_at_a_time_are_answered_as_one_at_a_time_by_the_server() -> None:
    """Greedy rollouts of one batch say, word for word in both turns, what the embedded engine says to each question alone."""
    together = rolled(batch_engine(), problems(6))
    alone = rolled(EmbeddedEngine(CHECKPOINT), problems(6))
    assert replies(together) == replies(alone)
    usage = [[turn.generation.usage for turn in rollout.result.turns] for group in together for rollout in group]
    expected = [[turn.generation.usage for turn in rollout.result.turns] for group in alone for rollout in group]
    for mine, theirs in zip(usage, expected, strict=True):
        assert [(u.prompt_tokens, u.image_tokens) for u in mine] == [(u.prompt_tokens, u.image_tokens) for u in theirs]


def test_the_same_seed_draws_the_same_answers() -> None:
    """A sampled rollout depends on its seed and the weights alone, and the answers of a group differ."""
    first, again, other = (
        replies(rolled(batch_engine(), problems(2), group=4, temperature=1.5, seed=seed)) for seed in (7, 7, 8)
    )
    assert first == again
    assert first != other
    assert len(set(first[:4])) > 1


def test_replies_end_where_the_server_says() -> None:
    """A reply ends with its stop string, which stays; one that does not come to it ends at the limit, and says so."""

    async def write(sampling: Sampling) -> Generation:
        engine = batch_engine(longest=200)
        pieces = [piece async for piece in engine.generate(asked, sampling)]
        assert isinstance(pieces[-1], Generation)
        assert "".join(piece.text for piece in pieces[:-1]) == pieces[-1].text
        return pieces[-1]

    [[rollout]] = spoken()
    asked = Conversation(rollout.conversation.messages[:2])
    stopped = asyncio.run(write(Sampling(64, stop=("</think>",))))
    assert stopped.text.endswith("</think>")
    assert stopped.finish_reason == "stop"
    cut = asyncio.run(write(Sampling(3)))
    assert (cut.finish_reason, cut.usage.completion_tokens) == ("length", 3)


@cache
def spoken(count: int = 1) -> list[list[Rollout]]:
    """Greedy rollouts."""
    return rolled(batch_engine(), problems(count))


def test_what_the_model_wrote_is_marked_and_nothing_else() -> None:
    """Of a whole conversation exactly the two replies carry loss, with the end where the model wrote that; the rest is the
    prompt, token for token."""
    encoder = loaded().encoder
    for [rollout] in spoken(3):
        zoom, answer = (turn.generation.text for turn in rollout.result.turns)
        for ended, expected in ([False, False], zoom + answer), ([True, True], f"{zoom}<|im_end|>{answer}<|im_end|>"):
            whole = encoder.whole(rollout.conversation, ended)
            assert encoder.tokenizer.decode(whole.ids[whole.written]) == expected
            assert not (whole.written & whole.visual.bool()).any()
        prompt = encoder.prompt(Conversation(rollout.conversation.messages[:-1]))
        assert whole.ids[: len(prompt)].tolist() == prompt.ids.tolist()
        assert int(whole.visual.sum()) == rollout.result.visual_tokens.total


def test_a_conversation_is_scored_in_a_batch_as_it_is_alone() -> None:
    """Padding and neighbours do not move the chance of a token."""
    encoded = [loaded().encoder.whole(rollout.conversation, [False, False]) for [rollout] in spoken(3)]
    assert len({len(one) for one in encoded}) > 1
    together = scores(encoded)
    alone = torch.cat([scores([one]) for one in encoded])
    torch.testing.assert_close(together, alone, atol=2e-4, rtol=1e-3)
    assert together.max() <= 0


def test_the_crop_moves_the_scores_of_the_answer_alone() -> None:
    """With another crop the answer is less likely, and the zoom reply as likely as before: no crop was there yet."""
    [[rollout], [other], _] = spoken(3)
    messages = list(rollout.conversation.messages)
    _, foreign = other.conversation.views
    parts = [part if isinstance(part, str) else foreign for part in messages[3].parts]
    swapped = Conversation((*messages[:3], Message(messages[3].role, tuple(parts)), messages[4]))
    encoder = loaded().encoder
    mine, theirs = (scores([encoder.whole(c, [False, False])]) for c in (rollout.conversation, swapped))
    first = len(encoder.tokenizer(rollout.result.turns[0].generation.text)["input_ids"])
    torch.testing.assert_close(mine[:first], theirs[:first], atol=2e-4, rtol=1e-3)
    assert theirs[first:].sum() < mine[first:].sum() - 1


def scores(encoded: list[Encoded]) -> torch.Tensor:
    """The logarithms of the chances of what was written."""
    written = torch.nn.utils.rnn.pad_sequence([one.written for one in encoded], batch_first=True)
    with torch.inference_mode():
        found: torch.Tensor = Scorer(loaded().network, 1.0)(padded(encoded, 0, "cpu", left=False), written)
    return found


class Listening(BatchEngine):
    """Keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(loaded().network, loaded().encoder, longest=96)
        self.asked: list[Conversation] = []

    async def _generate(self, conversation: Conversation, sampling: Sampling) -> AsyncGenerator[Delta | Generation, None]:
        self.asked.append(conversation)
        async for piece in super()._generate(conversation, sampling):
            yield piece


def test_the_reward_model_sees_the_crop_and_the_question_alone() -> None:
    """It is shown one view, the bytes of the crop, and the question; nothing of the overview or of what the model said."""
    judge = Listening()
    groups = rolled(batch_engine(), problems(2), Reader(judge, SinglePolicy(PROFILE.prompts)), group=2)
    rollouts = [rollout for group in groups for rollout in group]
    assert len(judge.asked) == len(rollouts) == 4
    shown = {next(iter(conversation.views)).data for conversation in judge.asked}
    assert shown == {list(rollout.conversation.views)[1].data for rollout in rollouts}
    for conversation in judge.asked:
        assert len(list(conversation.views)) == 1
        words = " ".join(part for message in conversation.messages for part in message.parts if isinstance(part, str))
        assert any(problem.question.text in words for problem in problems(2))
        assert "row" not in words
        assert "<zoom>" not in words
    # It is the checkpoint itself, which was taught to read crops: its verdicts are worth something.
    assert {rollout.verdict for rollout in rollouts} <= {rollout.problem.truth for rollout in rollouts}
    assert all(rollout.rewards.region == 1 for rollout in rollouts)


def test_a_right_answer_from_a_wrong_region_earns_no_region_reward() -> None:
    """The two rewards are of different things: who knows the answer in spite of the crop has accuracy, not region."""

    class Blind(SharpEye):
        async def answer(self, *_: object) -> str:
            return ""

    [[rollout]] = rolled(batch_engine(), problems(1), Blind())
    assert (rollout.rewards.accuracy, rollout.rewards.region) == (1, 0)


@pytest.mark.parametrize(("moved", "right"), [(0, True), (200, False)])
def test_the_all_seeing_judge_wants_the_whole_target(moved: int, right: bool) -> None:
    """Its answer is right where the region holds the whole target, and is none otherwise."""
    problem = problems(1)[0]
    assert problem.target is not None
    x1, y1, x2, y2 = problem.target.edges
    elsewhere = replace(problem, target=Box(x1 - moved, y1, x2 - moved, y2))
    [[rollout]] = rolled(batch_engine(), [elsewhere])
    assert (rollout.rewards.region == 1) is right
    assert rollout.verdict == (problem.truth if right else "")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in one order: a batch of another size may be split over threads in another way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
