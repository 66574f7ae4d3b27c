"""The loop: look at the whole, find the region, look closer, answer.

Written against the `Policy` interface: whatever a policy's replies mean, this is what is done about it. `Pipeline.answer`
and `Pipeline.stream` are one piece of work; the second passes on what happens while it happens.

What of the image's work can be done while the engine is busy with the zoom turn is done then; see `Original`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ergo_server.engine.base import Delta, Engine, Generation, Sampling
from ergo_server.errors import EngineFailed, EngineTimeout, ErgoError
from ergo_server.imaging.geometry import Box, PixelBudget, Size, baseline_visual_tokens
from ergo_server.imaging.header import ImageHeader
from ergo_server.imaging.original import ImageSource, Original
from ergo_server.imaging.view import View
from ergo_server.protocol.base import Action, Answer, Ask, Malformed, MalformedReason, Policy, Question, Resize, Seen, Zoom, cut
from ergo_server.protocol.choices import choose
from ergo_server.protocol.conversation import Conversation, Message, Role
from ergo_server.protocol.replies import AnswerReader, Piece

ZoomMode = Literal["auto", "always", "never"]
SessionScope = Literal["image", "request"]
ZoomOutcome = Literal["zoomed", "clamped", "no_box", "invalid_box", "skipped"]
TurnName = Literal["zoom", "answer", "single"]
Stage = Literal["receive", "decode", "overview", "zoom_turn", "crop", "answer_turn"]

ZOOM_OUTCOMES: tuple[ZoomOutcome, ...] = ("zoomed", "clamped", "no_box", "invalid_box", "skipped")
STAGES: tuple[Stage, ...] = ("receive", "decode", "overview", "zoom_turn", "crop", "answer_turn")

TURN_TOKENS = 1024
"""Most tokens of one reply, thinking included: what ERGO's evaluation gives each turn. A client's max_tokens bounds the
visible answer only; small ones (lmms-eval sends 16) would otherwise end the thinking before it begins."""


@dataclass(frozen=True, slots=True)
class ContextMessage:
    """An earlier message of the caller's conversation: text and images, in order."""

    role: Role
    parts: tuple[str | Original, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """One question about one image. Whoever made the images closes them; the pipeline lets go of their pixels before."""

    image: Original
    question: Question
    budget: PixelBudget
    zoom: ZoomMode = "auto"
    max_tokens: int | None = None
    """Bounds the visible answer; None: only the turn's own bound."""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    context: tuple[ContextMessage, ...] = ()
    """What was said before the question; its images ride along within the budget and are never zoomed into."""
    tenant: str = ""
    """Who asks; told to the listeners."""
    salt: str = ""
    """What keeps this tenant's part of the engine's prefix cache apart."""
    receive_seconds: float = 0.0
    """How long reading the request took."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange with the engine."""

    name: TurnName
    generation: Generation
    seconds: float
    image_tokens_formula: int
    """Visual tokens of the conversation by the formula; the engine's own count is checked against it."""


@dataclass(frozen=True, slots=True)
class RegionReport:
    """What became of the zoom."""

    outcome: ZoomOutcome
    box: Box
    """The region in upright original pixels; the whole image where there was no usable box."""
    seen: tuple[float, float, float, float] | None
    """The box as the model wrote it, in overview pixels."""
    area_ratio: float
    magnification: float
    """Crop pixels per overview pixel, linear."""
    reason: str | None = None
    lenient: bool = False
    crop: View | None = None


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """What was spent on seeing, and what would have been."""

    overview: int
    crop: int
    extra: int
    """Images of the context."""
    baseline: int
    source: Literal["engine", "formula"]
    mismatch: bool = False
    """The engine counted other visual tokens than the formula."""

    @property
    def total(self) -> int:
        """Each view once: the answer turn finds the overview in the prefix cache."""
        return self.overview + self.crop + self.extra

    @property
    def saved_ratio(self) -> float:
        """1 - total ÷ baseline; negative where zoom cost more than the image itself."""
        return 1 - self.total / self.baseline


@dataclass(frozen=True, slots=True)
class Result:
    """A finished request."""

    id: str
    created: int
    policy: str
    header: ImageHeader
    answer: Answer
    answer_tokens: int
    """Tokens of the visible answer."""
    choice: int | None
    truncated: bool
    region: RegionReport
    turns: tuple[Turn, ...]
    visual_tokens: VisualTokens
    timings: dict[str, float]
    """Seconds of each stage, and ``total``."""
    overview: View = field(repr=False)


@dataclass(frozen=True, slots=True)
class EngineCall:
    """One turn as it went on the engine, well or not."""

    turn: TurnName
    error: str | None
    """The error's code, ``cancelled``, or None."""
    seconds: float
    generation: Generation | None
    started: float
    """On the clock of `time.perf_counter`."""


@dataclass(frozen=True, slots=True)
class StageSpan:
    """When a stage ran, on the clock of `time.perf_counter`."""

    name: Stage
    started: float
    ended: float


@dataclass(frozen=True, slots=True)
class Record:
    """What listeners are told of a request that has ended, well or not."""

    policy: str
    seconds: float
    timings: dict[str, float]
    result: Result | None
    error: str | None
    """The error's code, ``cancelled``, or None."""
    tenant: str = ""
    source: ImageSource = "body"
    image_bytes: int = 0
    first_token_seconds: float | None = None
    """Until the first visible piece of the answer; None where it came to none."""
    calls: tuple[EngineCall, ...] = ()
    """What the engine was asked, in its order."""
    stages: tuple[StageSpan, ...] = ()
    """In the order of their ends; they may overlap. A stage that failed is among them."""
    header: ImageHeader | None = None
    """What was known of the image; None where it could not be read."""


@dataclass(frozen=True, slots=True)
class OverviewMade:
    """Event: the model looks at the whole image."""

    view: View


@dataclass(frozen=True, slots=True)
class RegionFound:
    """Event: it is decided where to look."""

    region: RegionReport
    header: ImageHeader


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Event: a piece of the answer turn's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """Event: a piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """Event, always the last: the result."""

    result: Result


Event = OverviewMade | RegionFound | ReasoningDelta | AnswerDelta | Done
Listener = Callable[[Record], None]
CallListener = Callable[[EngineCall], None]


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds."""

    turn: float = 60.0
    """One exchange with the engine: 1,024 tokens at the 30 a second of a loaded 7B engine take 34."""
    request: float = 120.0
    """Everything."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Answers questions about images.

    Args:
        engine: who generates.
        policy: how the model is spoken to.
        single: how it is spoken to without zoom.
        session_secret: keys the session header, so that it tells nobody what the image was.
        session_scope: what has one session: all that a tenant asks about an image, or each question, which spreads those about
            an image that everybody asks about.
        deadlines: bounds in seconds.
        listeners: told of every request when it ends.
        passed: told of every turn that was passed through, when it ends.
        finished: given every task that has a result, and the result; what keeps either keeps an image in memory.
    """

    engine: Engine
    policy: Policy
    single: Policy
    session_secret: bytes = b""
    session_scope: SessionScope = "image"
    deadlines: Deadlines = Deadlines()
    listeners: Sequence[Listener] = ()
    passed: Sequence[CallListener] = ()
    finished: Sequence[Callable[[Task, Result], None]] = ()

    async def answer(self, task: Task) -> Result:
        """Answer a question.

        Raises:
            ImageError: the image cannot be used.
            EngineError: the engine did not do its part, or a deadline passed.
        """
        return await self._run(task, None)

    async def stream(self, task: Task) -> AsyncGenerator[Event, None]:
        """Answer a question and tell what happens on the way; the last event is `Done`. Raises as `answer`.

        Closing the generator ends the work, the engine's included.
        """
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        work = asyncio.create_task(self._run(task, events.put_nowait))
        work.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            yield Done(await work)
        finally:
            work.cancel()
            await asyncio.wait({work})  # so that the engine is free before the caller goes on
            if not work.cancelled():
                work.exception()  # was raised above, if anybody wanted it; raising it again would lose its traceback

    def session(self, view: View, tenant: str) -> str:
        """Return the key by which all that a tenant asks about one image reaches the engine that holds its cache."""
        if self.session_scope == "request":
            return secrets.token_hex(32)
        image = hashlib.sha256(view.data).digest()
        return hmac.digest(self.session_secret, tenant.encode() + image, "sha256").hex()

    async def converse(
        self, conversation: Conversation, sampling: Sampling, *, tenant: str = "", salt: str = ""
    ) -> AsyncGenerator[Delta | Generation, None]:
        """Pass one turn through to the engine, within the turn's deadline.

        Raises:
            EngineError: the engine did not do its part, or the deadline passed.
        """
        deadline = asyncio.get_running_loop().time() + self.deadlines.turn
        first = next(conversation.views, None)
        session = self.session(first, tenant) if first is not None else ""
        pieces = self.engine.generate(conversation, sampling, session=session, salt=salt, deadline=deadline)
        started = time.perf_counter()
        generation, error = None, None
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    generation = piece if isinstance(piece, Generation) else None
                    yield piece
        except BaseException as failure:
            if generation is None:  # else its reader, who has all, closes it
                error = _code(failure)
            raise
        finally:
            call = EngineCall("single", error, time.perf_counter() - started, generation, started)
            for listener in self.passed:
                listener(call)

    async def _run(self, task: Task, emit: Callable[[Event], None] | None) -> Result:
        run = _Run(self, task, emit)
        started = time.perf_counter()
        result, error = None, None
        try:
            async with asyncio.timeout_at(run.deadline):
                result = await run.answer()
            for offer in self.finished:
                offer(task, result)
            return result
        except TimeoutError:
            error = EngineTimeout.code
            raise EngineTimeout(f"no answer within {self.deadlines.request:g} s") from None
        except BaseException as failure:
            error = _code(failure)
            raise
        finally:
            await run.close()
            seconds = time.perf_counter() - started
            record = Record(
                run.policy.name,
                seconds,
                dict(run.timings),
                result,
                error,
                task.tenant,
                task.image.source,
                task.image.file.size,
                run.first_token_seconds,
                tuple(run.calls),
                tuple(run.stages),
                run.header,
            )
            for listener in self.listeners:
                listener(record)


class _Run:
    """One request on its way. What it has seen and said so far lives here."""

    def __init__(self, pipeline: Pipeline, task: Task, emit: Callable[[Event], None] | None) -> None:
        self.pipeline = pipeline
        self.task = task
        self._emit = emit
        self._started = time.perf_counter()
        self.first_token_seconds: float | None = None
        self.calls: list[EngineCall] = []
        self.deadline = asyncio.get_running_loop().time() + pipeline.deadlines.request
        self.policy = pipeline.policy
        self.header: ImageHeader | None = None
        self.timings: dict[str, float] = {}
        self.stages: list[StageSpan] = []
        self._time("receive", self._started - task.receive_seconds, task.receive_seconds)
        self.turns: list[Turn] = []
        self.session = ""
        self._context: tuple[Message, ...] = ()
        self._aside_baseline = 0
        # What is known before the engine is asked: the overview and, without a zoom turn, the region. It is told when the engine
        # has begun to answer, so that an engine which is not there is still an error with a status, not one within a stream.
        self._known: list[Event] = []
        self._cut_short = False
        self._answer_tokens = 0

    def emit(self, event: Event) -> None:
        """Tell what has happened."""
        if self.first_token_seconds is None and isinstance(event, AnswerDelta) and event.text:
            self.first_token_seconds = time.perf_counter() - self._started
        if self._emit is not None:
            self._emit(event)

    async def answer(self) -> Result:
        task = self.task
        header = self.header = await task.image.header()
        skipped = self._skipped(header.size)
        if skipped:
            self.policy = self.pipeline.single
        overview = await self._look()
        self.session = self.pipeline.session(overview, task.tenant)
        self._known.append(OverviewMade(overview))
        if not skipped:
            await task.image.prepare()

        seen = [Seen(overview, Box.whole(header.size))]
        ask = self.policy.first(task.question, overview)
        if task.context:
            ask = replace(ask, conversation=_after(self._context, ask.conversation))
        region = RegionReport("skipped", Box.whole(header.size), None, 1.0, 1.0, skipped)
        if skipped:
            self._known.append(RegionFound(region, header))
        action: Action = Answer("", tagged=False)
        for number in range(self.policy.max_turns):
            action = await self._turn(ask, number)
            if isinstance(action, Answer):
                break
            region = await self._look_closer(action, seen, header.size)
            assert region.crop is not None
            self.emit(RegionFound(region, header))
            seen.append(Seen(region.crop, region.box))
            ask = self.policy.next(ask, self.turns[-1].generation.text, task.question, region.crop)
            if ask.answers:
                await task.image.release()  # nothing more is cropped
        if seconds := task.image.load_seconds:
            self._time("decode", task.image.load_started, seconds)
        # A policy whose turns are used up without an answer has answered nothing.
        answer = action if isinstance(action, Answer) else Answer("", tagged=False)
        return self._result(header, overview, region, answer, time.perf_counter() - self._started)

    async def close(self) -> None:
        """Let go of the pixels, and end the decode that nobody waits for any more."""
        await self.task.image.release()

    # --- the image ------------------------------------------------------------------------------------------------------

    def _skipped(self, size: Size) -> str | None:
        """Why the zoom turn is left out, if it is."""
        if self.task.zoom == "never":
            return "requested"
        if self.task.zoom == "auto" and self.task.budget.holds(size):
            return "fits_budget"
        return None

    async def _look(self) -> View:
        """Make the overview, and the views of the images that ride along."""
        with self._timed("overview"):
            overview = await self.task.image.overview(self.task.budget)
            for message in self.task.context:
                parts = tuple([part if isinstance(part, str) else await self._aside(part) for part in message.parts])
                self._context += (Message(message.role, parts),)
        return overview

    async def _aside(self, image: Original) -> View:
        """Make the view of an image that rides along."""
        self._aside_baseline += baseline_visual_tokens((await image.header()).size)
        return await image.overview(self.task.budget)

    async def _look_closer(self, action: Zoom | Resize | Malformed, seen: Sequence[Seen], size: Size) -> RegionReport:
        """Decide the region and crop it."""
        found = cut(action, seen, size, self.policy.crop_rule) if isinstance(action, Zoom) else action
        outcome: ZoomOutcome
        if isinstance(found, Malformed):
            box = self.policy.on_malformed(found, size)
            outcome = "no_box" if found.reason is MalformedReason.MISSING else "invalid_box"
        elif isinstance(found, Resize):
            box, outcome = Box.whole(size), "zoomed"
        else:
            box, outcome = found.box, "clamped" if found.clamped else "zoomed"
        with self._timed("crop"):
            crop = await self.task.image.crop(box, self.task.budget)
        before = seen[0].view.size.width / size.width
        return RegionReport(
            outcome=outcome,
            box=box,
            seen=action.edges if isinstance(action, Zoom) else None,
            area_ratio=box.area_ratio(size),
            magnification=crop.size.width / box.size.width / before,
            reason=found.reason.value if isinstance(found, Malformed) else None,
            lenient=isinstance(action, Zoom) and action.lenient,
            crop=crop,
        )

    # --- the engine -----------------------------------------------------------------------------------------------------

    async def _turn(self, ask: Ask, number: int) -> Action:
        """One exchange with the engine; returns what the reply means."""
        name: TurnName = ("single" if self.policy.max_turns == 1 else "answer") if ask.answers else "zoom"
        sampling = Sampling(TURN_TOKENS, self.task.temperature, self.task.top_p, self.task.seed, ask.stop)
        reader = _VisibleAnswer(self.emit, self.task.max_tokens) if ask.answers else None
        deadline = min(asyncio.get_running_loop().time() + self.pipeline.deadlines.turn, self.deadline)
        pieces = self.pipeline.engine.generate(
            ask.conversation, sampling, session=self.session, salt=self.task.salt, deadline=deadline
        )
        started = time.perf_counter()
        generation, error = None, None
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    while self._known:
                        self.emit(self._known.pop(0))
                    if isinstance(piece, Generation):
                        generation = piece
                    elif reader is not None:
                        if piece.anew:
                            reader = self._begin_anew(reader)
                        reader.feed(piece)
        except BaseException as failure:
            error = _code(failure)
            raise
        finally:
            seconds = time.perf_counter() - started
            self.calls.append(EngineCall(name, error, seconds, generation, started))
            self._time("zoom_turn" if name == "zoom" else "answer_turn", started, seconds)
        assert generation is not None  # every engine ends with one
        formula = sum(view.visual_tokens for view in ask.conversation.views)
        self.turns.append(Turn(name, generation, seconds, formula))
        if reader is not None:
            answer = reader.finish()
            self._cut_short, self._answer_tokens = reader.cut_short, reader.tokens
            return answer
        action = self.policy.parse(generation.text, number)
        if isinstance(action, Answer):
            self.emit(ReasoningDelta(action.reasoning))
            self.emit(AnswerDelta(action.text))
        return action

    def _begin_anew(self, reader: _VisibleAnswer) -> _VisibleAnswer:
        """Return a reader for a reply that another engine began anew in other words.

        Raises:
            EngineFailed: the caller was told some of the former.
        """
        if self._emit is not None and reader.told:
            raise EngineFailed("the engine broke while it was answering, and another gave another answer")
        self.first_token_seconds = None
        return _VisibleAnswer(self.emit, self.task.max_tokens)

    # --- the end --------------------------------------------------------------------------------------------------------

    def _result(self, header: ImageHeader, overview: View, region: RegionReport, answer: Answer, seconds: float) -> Result:
        self.timings["total"] = seconds
        return Result(
            id=uuid.uuid4().hex,
            created=int(time.time()),
            policy=self.policy.name,
            header=header,
            answer=answer,
            answer_tokens=self._answer_tokens,
            choice=choose(answer.text, self.task.question),
            truncated=self._cut_short or self.turns[-1].generation.finish_reason == "length",
            region=region,
            turns=tuple(self.turns),
            visual_tokens=self._visual_tokens(header, overview, region),
            timings=dict(self.timings),
            overview=overview,
        )

    def _visual_tokens(self, header: ImageHeader, overview: View, region: RegionReport) -> VisualTokens:
        """Count what was seen: by the engine's own usage where it reports it, else by the formula."""
        extra = sum(part.visual_tokens for message in self._context for part in message.parts if isinstance(part, View))
        first, last = self.turns[0].generation.usage.image_tokens, self.turns[-1].generation.usage.image_tokens
        crop = region.crop.visual_tokens if region.crop else 0
        baseline = baseline_visual_tokens(header.size) + self._aside_baseline
        if first is None or last is None:
            return VisualTokens(overview.visual_tokens, crop, extra, baseline, "formula")
        mismatch = any(turn.generation.usage.image_tokens != turn.image_tokens_formula for turn in self.turns)
        # An engine that counts fewer than the images of the context come to by the formula must not make anything negative.
        return VisualTokens(max(0, first - extra), max(0, last - first), extra, baseline, "engine", mismatch)

    @contextlib.contextmanager
    def _timed(self, stage: Stage) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._time(stage, started, time.perf_counter() - started)

    def _time(self, stage: Stage, started: float, seconds: float) -> None:
        self.timings[stage] = self.timings.get(stage, 0.0) + seconds
        self.stages.append(StageSpan(stage, started, started + seconds))


class _VisibleAnswer:
    """Passes on the answer turn's text as it becomes certain, and at most ``max_tokens`` of the answer.

    What lies beyond is read to its end all the same, so that the engine's usage is known.
    """

    def __init__(self, emit: Callable[[Event], None], max_tokens: int | None) -> None:
        self.cut_short = False
        self.told = False
        """Whether anything was passed on."""
        self.tokens = 0
        self._emit = emit
        self._left = max_tokens
        self._reader = AnswerReader()
        self._visible = ""

    def feed(self, delta: Delta) -> None:
        """Take the next piece of the reply."""
        self._pass_on(self._reader.feed(delta.text), delta.tokens)

    def finish(self) -> Answer:
        """Say that the reply is over; returns the answer as far as it is visible."""
        # Only an untagged reply leaves its answer for the end, and how many tokens that was made of nobody counted: letters
        # stand in, four to a token.
        rest = self._reader.finish()
        self._pass_on(rest, sum(len(piece.text) // 4 + 1 for piece in rest if piece.kind == "answer"), divisible=True)
        return replace(self._reader.answer, text=self._visible)

    def _pass_on(self, pieces: Sequence[Piece], tokens: int, *, divisible: bool = False) -> None:
        for piece in pieces:
            self.told = True
            if piece.kind == "reasoning":
                self._emit(ReasoningDelta(piece.text))
                continue
            if self.cut_short:
                continue
            text = piece.text
            if self._left is not None and self.tokens + tokens > self._left:
                self.cut_short = True
                left = self._left - self.tokens
                text, tokens = (text[: 4 * left], left) if divisible else ("", 0)
            self.tokens += tokens
            if text:
                self._visible += text
                self._emit(AnswerDelta(text))


def _code(failure: BaseException) -> str:
    """Return what listeners are told of a failure."""
    if isinstance(failure, asyncio.CancelledError | GeneratorExit):
        return "cancelled"
    return failure.code if isinstance(failure, ErgoError) else ErgoError.code


def _after(context: Sequence[Message], conversation: Conversation) -> Conversation:
    """Put earlier messages between the policy's system message and its question; system texts of both are joined."""
    system, *rest = conversation.messages
    systems = (message for message in (system, *context) if message.role == "system")
    texts = [part for message in systems for part in message.parts if isinstance(part, str)]
    joined = Conversation().system("\n\n".join(texts))
    for message in (*(m for m in context if m.role != "system"), *rest):
        joined = joined.say(message.role, *message.parts)
    return joined
