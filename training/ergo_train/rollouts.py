"""Rollouts: questions answered by the server's own loop, many at a time, and what each answer is worth.

Nothing of the method is written a second time here. A rollout is `ergo_server.pipeline.Pipeline.answer` with the server's policy,
prompts, boxes and imaging; the only part of its own is the engine: the network that is being trained, which many rollouts ask at
once (`BatchEngine`), or vLLM with its weights (`ergo_server.engine.vllm`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import StoppingCriteria

from ergo_server.engine.base import Delta, Engine, EngineStatus, FinishReason, Generation, Sampling, Usage, within
from ergo_server.imaging.file import ImageFile, Stop
from ergo_server.imaging.geometry import Box, PixelBudget
from ergo_server.imaging.header import Limits
from ergo_server.imaging.original import Original
from ergo_server.imaging.view import pixels
from ergo_server.imaging.work import DECODE_SECONDS, ImageWork
from ergo_server.pipeline import Deadlines, Pipeline, Result, Task
from ergo_server.protocol.base import Policy, Question
from ergo_server.protocol.conversation import Conversation
from ergo_server.protocol.rewards import (
    GAMMA,
    Matcher,
    Rewards,
    accuracy_reward,
    box_reward,
    exact,
    format_reward,
    region_reward,
    target_coverage,
)
from ergo_server.verification import answer_from_crop

T = TypeVar("T")

PATIENCE = Deadlines(turn=3600.0, request=7200.0)
"""Nobody waits for a rollout; a batch on a CPU may take minutes."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question whose answer is known."""

    image: bytes
    """The file."""
    question: Question
    truth: str
    match: Matcher = exact
    target: Box | None = None
    """Where the answer is, in pixels of the image, if that is known."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer to a problem, with all that was said and seen on the way."""

    problem: Problem
    result: Result
    conversation: Conversation
    """All of it, the answer included."""
    rewards: Rewards
    verdict: str
    """What the reward model answered from the crop and the question alone."""


# --- conversations as tokens ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as the network takes it. L tokens, P patches of 14 × 14 pixels in V views."""

    ids: Tensor  # L
    visual: Tensor  # L: 1 where a token is visual
    written: Tensor  # L: whether the model wrote it
    patches: Tensor  # P, 1176
    grids: Tensor  # V, 3

    def __len__(self) -> int:
        return len(self.ids)


class Encoder:
    """Turns conversations into tokens and patches, with a checkpoint's own chat template, tokenizer and processor.

    Args:
        tokenizer: transformers' tokenizer.
        processor: transformers' image processor.
        image_pad: id of the visual token.
    """

    def __init__(self, tokenizer: Any, processor: Any, image_pad: int) -> None:
        self.tokenizer, self._processor, self._image_pad = tokenizer, processor, image_pad

    def save(self, folder: Path) -> None:
        """Write the files of tokenizer and processor beside a checkpoint's weights."""
        self.tokenizer.save_pretrained(folder)
        self._processor.save_pretrained(folder)

    def prompt(self, conversation: Conversation) -> Encoded:
        """Return a conversation up to where the model goes on."""
        return self._encode(conversation, self._text(conversation, 0, generate=True), [])

    def whole(self, conversation: Conversation, ended: Sequence[bool]) -> Encoded:
        """Return a conversation of which the assistant's messages were written by the model.

        Args:
            conversation: the last message is the assistant's.
            ended: for each of them, whether the model ended it itself: then it wrote the token for that too.
        """
        spans: list[tuple[int, int]] = []
        for number, message in enumerate(conversation.messages):
            if message.role == "assistant":
                before = Conversation(conversation.messages[:number])
                start = len(self._text(before, 0, generate=True))
                reply = "".join(part for part in message.parts if isinstance(part, str))
                spans.append((start, start + len(reply) + len(self.tokenizer.eos_token) * ended[len(spans)]))
        return self._encode(conversation, self._text(conversation, 0, generate=False), spans)

    def _text(self, conversation: Conversation, start: int, *, generate: bool) -> str:
        messages = [
            {
                "role": message.role,
                "content": [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in message.parts],
            }
            for message in conversation.messages[start:]
        ]
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        return text

    def _encode(self, conversation: Conversation, text: str, spans: Sequence[tuple[int, int]]) -> Encoded:
        images = [pixels(view.data, Limits(), Stop(DECODE_SECONDS)) for view in conversation.views]
        inputs = self._processor(images=images, return_tensors="pt")
        grids: Tensor = inputs["image_grid_thw"]
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = []
        written: list[bool] = []
        counts = iter((grids.prod(-1) // 4).tolist())
        for token, (at, _) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
            count = next(counts) if token == self._image_pad else 1
            ids += [token] * count
            written += [any(start <= at < end for start, end in spans)] * count
        found = torch.tensor(ids)
        return Encoded(found, (found == self._image_pad).long(), torch.tensor(written), inputs["pixel_values"], grids)


def padded(conversations: Sequence[Encoded], pad: int, device: Any, *, left: bool) -> dict[str, Tensor]:
    """Return the network's arguments for several conversations at once: B × L, padded on the left to be continued."""
    side = "left" if left else "right"

    def stacked(rows: list[Tensor], value: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side).to(device)

    return {
        "input_ids": stacked([c.ids for c in conversations], pad),
        "attention_mask": stacked([torch.ones_like(c.ids) for c in conversations], 0),
        "mm_token_type_ids": stacked([c.visual for c in conversations], 0).int(),
        "pixel_values": torch.cat([c.patches for c in conversations]).to(device),
        "image_grid_thw": torch.cat([c.grids for c in conversations]).to(device),
    }


# --- the engine -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Asked:
    conversation: Conversation
    sampling: Sampling
    reply: asyncio.Future[Generation]


class BatchEngine:
    """An engine for many conversations at once: whoever asks waits until all who are under way have asked, then all go on.

    Args:
        network: a causal model of transformers; not copied, so that it writes with the weights of the moment.
        encoder: of its checkpoint.
        longest: most tokens of a reply, whatever is asked for.
    """

    name = "batch"

    def __init__(self, network: Any, encoder: Encoder, *, longest: int) -> None:
        self._network, self._encoder, self._longest = network, encoder, longest
        self._asked: list[_Asked] = []
        self._under_way = 0

    @contextlib.contextmanager
    def taking_part(self) -> Iterator[None]:
        """Count as one who will ask, until the end."""
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            self._go_on()

    def generate(
        self,
        conversation: Conversation,
        sampling: Sampling,
        *,
        session: str = "",
        salt: str = "",
        deadline: float | None = None,
    ) -> AsyncGenerator[Delta | Generation, None]:
        """Continue a conversation together with the others'; see `ergo_server.engine.base`."""
        return within(deadline, self._generate(conversation, sampling))

    async def status(self) -> EngineStatus:
        """Always ready."""
        return EngineStatus(True)

    async def aclose(self) -> None:
        """Nothing is held."""

    async def _generate(self, conversation: Conversation, sampling: Sampling) -> AsyncGenerator[Delta | Generation, None]:
        asked = _Asked(conversation, sampling, asyncio.get_running_loop().create_future())
        self._asked.append(asked)
        self._go_on()
        generation = await asked.reply
        yield Delta(generation.text, generation.usage.completion_tokens)
        yield generation

    def _go_on(self) -> None:
        if self._asked and len(self._asked) >= self._under_way:
            # Images are cut in threads, so the order of asking is chance; that of the seeds is not.
            asked = sorted(self._asked, key=lambda one: one.sampling.seed or 0)
            self._asked = []
            alive = [one for one in asked if not one.reply.cancelled()]
            for one, generation in zip(alive, self._write(alive), strict=True):
                one.reply.set_result(generation)

    def _write(self, asked: Sequence[_Asked]) -> list[Generation]:
        """Write all replies. The draw depends on the first one's seed, and on nothing that was drawn before."""
        if not asked:
            return []
        first = asked[0].sampling
        encoder, network = self._encoder, self._network
        prompts = [encoder.prompt(one.conversation) for one in asked]
        pad: int = network.generation_config.pad_token_id
        inputs = padded(prompts, pad, network.device, left=True)
        length = inputs["input_ids"].shape[1]
        ends = _Ends(encoder.tokenizer, length, [one.sampling.stop for one in asked])
        choice: dict[str, Any] = {"do_sample": False}
        if first.temperature > 0:
            choice = {"do_sample": True, "temperature": first.temperature, "top_p": first.top_p, "top_k": 0}
        with torch.random.fork_rng(enabled=first.seed is not None), torch.inference_mode():
            if first.seed is not None:
                torch.manual_seed(first.seed)
            room = min(self._longest, first.max_tokens)
            written = network.generate(**inputs, max_new_tokens=room, stopping_criteria=[ends], **choice)[:, length:]
        replies = []
        for row, (prompt, one) in enumerate(zip(prompts, asked, strict=True)):
            tokens = [token for token in written[row].tolist() if token != pad]
            text = encoder.tokenizer.decode(tokens, skip_special_tokens=True)
            finished: FinishReason = "stop" if ends.over[row] or tokens[-1:] == [encoder.tokenizer.eos_token_id] else "length"
            usage = Usage(len(prompt), len(tokens), cached_tokens=0, image_tokens=int(prompt.visual.sum()))
            replies.append(Generation(_cut_short(text, one.sampling.stop), finished, usage))
        return replies


class _Ends(StoppingCriteria):
    """Ends each row where one of its stop strings is complete."""

    def __init__(self, tokenizer: Any, length: int, stops: Sequence[tuple[str, ...]]) -> None:
        self._tokenizer, self._length, self._stops = tokenizer, length, stops
        self.over = [False] * len(stops)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        # Eight tokens hold any closing tag, however oddly it was split; the whole would be decoded anew at every step.
        tails = self._tokenizer.batch_decode(input_ids[:, max(self._length, input_ids.shape[1] - 8) :])
        for row, (tail, stops) in enumerate(zip(tails, self._stops, strict=True)):
            self.over[row] = self.over[row] or any(stop in tail for stop in stops)
        return torch.tensor(self.over, device=input_ids.device)


def _cut_short(text: str, stops: tuple[str, ...]) -> str:
    ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


# --- the loop -------------------------------------------------------------------------------------------------------------


class Judge(Protocol):
    """The reward model. It is frozen, and sees the region and the question alone: the paper's point."""

    engine: Engine | None
    """Whom it asks, if anyone."""

    async def answer(self, problem: Problem, task: Task, result: Result) -> str:
        """Return the answer from the region that was found."""


class Reader:
    """A model that reads the crop, within the budget.

    Args:
        engine: who answers.
        policy: how it is asked; of one turn.
    """

    def __init__(self, engine: Engine, policy: Policy) -> None:
        self.engine: Engine | None = engine
        self._ask = partial(answer_from_crop, engine, policy)

    async def answer(self, problem: Problem, task: Task, result: Result) -> str:
        """Return what it reads."""
        assert result.region.crop is not None  # a rollout always zooms
        return await self._ask(task.question, result.region.crop, seed=task.seed)


class SharpEye:
    """Stands in for a reward model so good that it reads whatever the region holds, however large that is and whatever else is
    in it: the answer is right where the region holds the whole target."""

    engine: Engine | None = None

    async def answer(self, problem: Problem, task: Task, result: Result) -> str:
        """Return the right answer, or none."""
        assert problem.target is not None, "only for problems whose target is known"
        return problem.truth if target_coverage(result.region.box, problem.target) == 1 else ""


async def roll_out(
    pipeline: Pipeline,
    judge: Judge,
    problems: Sequence[Problem],
    *,
    group: int,
    budget: PixelBudget,
    temperature: float,
    seed: int,
    gamma: float = GAMMA,
    work: ImageWork,
) -> list[list[Rollout]]:
    """Answer every problem ``group`` times, always with a zoom turn, and weigh the answers.

    Args:
        pipeline: the server's, with the engine that is being trained.
        judge: who says what a region is worth.
        problems: what to answer.
        group: answers to each.
        budget: visual tokens of one view.
        temperature: of the sampling; 0 gives equal answers.
        seed: the same seed and weights give the same answers, with `BatchEngine`.
        gamma: largest share of the image that a region may cover for the box reward.
        work: where images are decoded.

    Returns:
        For each problem its rollouts.
    """
    originals = [Original(ImageFile.of(problem.image), work) for problem in problems]
    try:
        for original in originals:
            await original.overview(budget)
            await original.release()  # the overview is what its rollouts share; the pixels of all would fill the memory
        tasks = [
            Task(original.again(), problem.question, budget, "always", temperature=temperature, seed=seed + index)
            for index, (original, problem) in enumerate(_times(zip(originals, problems, strict=True), group))
        ]
        results = await _together(pipeline.engine, [partial(pipeline.answer, task) for task in tasks])
        verdicts = await _together(
            judge.engine, [partial(judge.answer, *row) for row in zip(_times(problems, group), tasks, results, strict=True)]
        )
    finally:
        for original in originals:
            await original.aclose()
    rollouts = [
        _weighed(pipeline.policy, problems[number // group], task, result, verdict, gamma)
        for number, (task, result, verdict) in enumerate(zip(tasks, results, verdicts, strict=True))
    ]
    return [rollouts[start : start + group] for start in range(0, len(rollouts), group)]


def _times(items: Iterable[T], count: int) -> Iterator[T]:
    return (item for item in items for _ in range(count))


async def _together(engine: Engine | None, jobs: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
    """Run jobs at the same time, and have a `BatchEngine` know of each."""
    counted = engine.taking_part if isinstance(engine, BatchEngine) else contextlib.nullcontext

    async def run(job: Callable[[], Coroutine[Any, Any, T]]) -> T:
        with counted():
            await asyncio.sleep(0)  # until all are counted
            return await job()

    return list(await asyncio.gather(*(run(job) for job in jobs)))


def _weighed(policy: Policy, problem: Problem, task: Task, result: Result, verdict: str, gamma: float) -> Rollout:
    zoom, answer = (turn.generation.text for turn in result.turns)
    rewards = Rewards(
        accuracy=accuracy_reward(result.answer.text, problem.truth, problem.match),
        region=region_reward(verdict, problem.truth, problem.match),
        box=box_reward(result.region.box, result.header.size, gamma),
        format=format_reward(zoom, answer),
    )
    assert result.region.crop is not None
    asked = policy.next(policy.first(task.question, result.overview), zoom, task.question, result.region.crop)
    return Rollout(problem, result, asked.conversation.assistant(answer), rewards, verdict)
