"""Was the region enough? Some finished questions are asked again with the crop alone, for nobody but the metrics.

This is the paper's region-verification reward with the served answer in the place of the right one, which nobody knows here: who
sees only the crop and the question says the same, or something else. Agreement is not accuracy. Where it falls, regions have
become worse, or questions need more of the image than a crop has.

No caller waits for it: it begins after the answer has gone, only while the server has places to spare, with few at a time; what
comes on top is dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import Literal, get_args

from ergo_server.engine.base import Engine, Generation, Sampling
from ergo_server.errors import EngineError
from ergo_server.imaging.view import View
from ergo_server.pipeline import TURN_TOKENS, Deadlines, Result, Task
from ergo_server.protocol.base import Policy, Question
from ergo_server.protocol.replies import parse_answer
from ergo_server.protocol.rewards import Matcher, exact, letter, region_reward

Verification = Literal["agrees", "differs", "failed", "dropped"]
"""What came of one: the same answer, another, none from the engine; or it was not begun, as there was no room for it."""

VERIFICATIONS: tuple[Verification, ...] = get_args(Verification)

CONCURRENT = 2
"""At a time: at 4 s each half a question a second, which is a sample of any traffic."""


class Verifier:
    """Asks some finished questions again. Belongs to one event loop; close it.

    Args:
        engine: whom it asks.
        policy: how it asks; of one turn.
        fraction: of the questions that were zoomed, 0 to 1.
        concurrent: most at a time.
        busy: says whether callers need what there is.
        told: told of each what came of it.
        seconds: deadline of one.
        draw: returns numbers from 0 to 1, by which questions are chosen.
    """

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        *,
        fraction: float,
        concurrent: int = CONCURRENT,
        busy: Callable[[], bool] = lambda: False,
        told: Callable[[Verification], None] = lambda outcome: None,
        seconds: float = Deadlines().turn,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._engine = engine
        self._policy = policy
        self._fraction = fraction
        self._concurrent = concurrent
        self._busy = busy
        self._told = told
        self._seconds = seconds
        self._draw = draw
        self._under_way: set[asyncio.Task[None]] = set()

    def offer(self, task: Task, result: Result) -> None:
        """Take a finished question up, if chance and room allow. Returns at once."""
        crop = result.region.crop
        if crop is None or result.truncated or self._draw() >= self._fraction:
            return
        if len(self._under_way) >= self._concurrent or self._busy():
            self._told("dropped")
            return
        asking = asyncio.create_task(self._verify(task.question, crop, result.answer.text, task.salt))
        self._under_way.add(asking)
        asking.add_done_callback(self._under_way.discard)

    async def aclose(self) -> None:
        """Give up what is under way, and close the engine, which does no harm to one that another closes too."""
        for asking in self._under_way:
            asking.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        await self._engine.aclose()

    async def _verify(self, question: Question, crop: View, served: str, salt: str) -> None:
        deadline = asyncio.get_running_loop().time() + self._seconds
        try:
            said = await answer_from_crop(self._engine, self._policy, question, crop, salt=salt, deadline=deadline)
        except EngineError:  # counted; nobody waits for more
            self._told("failed")
            return
        match: Matcher = letter(question) if question.choices else exact
        self._told("agrees" if region_reward(said, served, match) else "differs")


async def answer_from_crop(
    engine: Engine,
    policy: Policy,
    question: Question,
    crop: View,
    *,
    salt: str = "",
    deadline: float | None = None,
    seed: int | None = None,
) -> str:
    """Return what is answered by someone who sees the crop and the question alone, greedily.

    Args:
        engine: who answers.
        policy: how it is asked; of one turn.
        question: what is asked.
        crop: all that is seen.
        salt: as `Engine.generate`.
        deadline: likewise.
        seed: likewise; changes nothing about a greedy answer, but names the caller to an engine that orders by it.

    Raises:
        EngineError: there was no answer.
    """
    ask = policy.first(question, crop)
    sampling = Sampling(TURN_TOKENS, seed=seed, stop=ask.stop)
    async with contextlib.aclosing(engine.generate(ask.conversation, sampling, salt=salt, deadline=deadline)) as pieces:
        (generation,) = [piece async for piece in pieces if isinstance(piece, Generation)]
    return parse_answer(generation.text).text
