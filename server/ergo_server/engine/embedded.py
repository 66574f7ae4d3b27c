"""transformers in this process: any Qwen2.5-VL checkpoint, on a CPU or one GPU, one generation at a time.

The only file that imports torch. Made for trying things out, for tests and for small checkpoints; vLLM is what serves load.

All work on the model happens in one thread of its own, in order of arrival, so the event loop never waits for arithmetic and
the model's state needs no lock. Keys and values of past conversations are kept, a few of them: the answer turn finds those of
its zoom turn and computes only what is new.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ergo_server.engine.base import Delta, EngineStatus, FinishReason, Generation, Sampling, Usage, within
from ergo_server.errors import ContextTooLong, EngineFailed, EngineRejected, EngineUnavailable
from ergo_server.imaging.file import Stop
from ergo_server.imaging.header import Limits
from ergo_server.imaging.view import View, pixels
from ergo_server.imaging.work import DECODE_SECONDS
from ergo_server.protocol.conversation import Conversation

if TYPE_CHECKING:
    from torch import Tensor

KEPT_CONVERSATIONS = 8
"""Prefixes kept for reuse. Each costs memory (about 60 KB a token for a 7B model, 6 KB for ergo-mini); a request needs one
between its two turns, so this is also how many requests may interleave without losing theirs."""

LEAST_TEMPERATURE = 0.01
"""What vLLM raises a lower one to, zero excepted: divided by much less, logits overflow."""


class EmbeddedEngine:
    """A Qwen2.5-VL checkpoint in this process.

    Args:
        checkpoint: a folder, or a model's name on a hub.
        device: ``cpu``, ``cuda``, or ``auto``.
        threads: threads of the arithmetic on a CPU; 0 leaves torch's choice.
    """

    name = "embedded"

    def __init__(self, checkpoint: str | Path, *, device: str = "auto", threads: int = 0) -> None:
        self._checkpoint = str(checkpoint)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embedded-engine")
        self._closed = threading.Event()
        self._model = self._thread.submit(_Model.load, self._checkpoint, device, threads)

    def generate(
        self,
        conversation: Conversation,
        sampling: Sampling,
        *,
        session: str = "",
        salt: str = "",
        deadline: float | None = None,
    ) -> AsyncGenerator[Delta | Generation, None]:
        """Continue a conversation, after those that came before it."""
        return within(deadline, self._generate(conversation, sampling, salt))

    async def status(self) -> EngineStatus:
        """Ready once the checkpoint is loaded."""
        if not self._model.done():
            return EngineStatus(False, self._checkpoint, "loading the checkpoint")
        error = self._model.exception()
        if error is not None:
            return EngineStatus(False, self._checkpoint, f"{type(error).__name__}: {error}")
        return EngineStatus(not self._closed.is_set(), self._checkpoint)

    async def loaded(self) -> None:
        """Wait until the checkpoint is loaded.

        Raises:
            EngineUnavailable: it cannot be loaded; the message says why.
        """
        try:
            await asyncio.wrap_future(self._model)
        except Exception as error:  # transformers raises many kinds; each means the same here
            raise EngineUnavailable(f"{self._checkpoint} cannot be loaded: {error}") from error

    async def aclose(self) -> None:
        """End what runs and give the thread back."""
        self._closed.set()
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    async def _generate(
        self, conversation: Conversation, sampling: Sampling, salt: str
    ) -> AsyncGenerator[Delta | Generation, None]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Delta | Generation | BaseException] = asyncio.Queue()
        cancelled = threading.Event()

        def send(piece: Delta | Generation | BaseException) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, piece)

        def stopped() -> bool:
            return cancelled.is_set() or self._closed.is_set()

        def work() -> None:
            try:
                if self._model.exception() is not None:
                    raise EngineUnavailable("the checkpoint could not be loaded")
                for piece in self._model.result().generate(conversation, sampling, salt, stopped):
                    send(piece)
                if stopped():
                    send(EngineUnavailable("the engine is shutting down"))
            except BaseException as error:  # carried to the waiting coroutine, which raises it there
                send(error)

        def dropped(job: Future[None]) -> None:
            if job.cancelled() and not cancelled.is_set():  # `aclose` drops what has not begun; nobody else would tell its reader
                send(EngineUnavailable("the engine is shutting down"))

        try:
            job = self._thread.submit(work)
        except RuntimeError as error:  # the executor was shut down
            raise EngineUnavailable("the engine is shutting down") from error
        job.add_done_callback(dropped)
        try:
            while True:
                piece = await queue.get()
                if isinstance(piece, EngineRejected | EngineUnavailable):
                    raise piece
                if isinstance(piece, BaseException):
                    raise EngineFailed("the engine failed while generating") from piece
                yield piece
                if isinstance(piece, Generation):
                    return
        finally:
            cancelled.set()
            job.cancel()


@dataclass(slots=True)
class _Kept:
    """A conversation whose keys and values are kept."""

    salt: str
    """Whose it is: only conversations of the same salt go on from it."""
    ids: list[int]
    """Its tokens; those of images are replaced by a number that stands for the image's bytes."""
    cache: Any


@dataclass(slots=True)
class _Model:
    """The loaded checkpoint. Used by one thread only."""

    network: Any
    tokenizer: Any
    processor: Any
    image_pad: int
    ends: frozenset[int]
    context: int
    kept: list[_Kept] = field(default_factory=list)
    """Oldest first."""

    @classmethod
    def load(cls, checkpoint: str, device: str, threads: int) -> _Model:
        import torch
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it would write to the terminal of a server
        if threads:
            torch.set_num_threads(threads)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        network: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
        network.to(device).eval()
        network.requires_grad_(False)
        ends = network.generation_config.eos_token_id
        return cls(
            network=network,
            tokenizer=AutoTokenizer.from_pretrained(checkpoint),
            processor=Qwen2VLImageProcessorPil.from_pretrained(checkpoint),
            image_pad=network.config.image_token_id,
            ends=frozenset(ends if isinstance(ends, list) else [ends]),
            context=network.config.text_config.max_position_embeddings,
        )

    def generate(
        self, conversation: Conversation, sampling: Sampling, salt: str, stopped: Callable[[], bool]
    ) -> Iterator[Delta | Generation]:
        """Yield deltas and the generation; nothing more once ``stopped`` says so."""
        import torch

        with torch.inference_mode():
            if stopped():
                return
            views = list(conversation.views)
            grids, pixels = self._pixels(views)
            ids, keys = self._tokens(conversation, views, grids)
            if len(ids) >= self.context:
                raise ContextTooLong("the conversation is longer than the engine's context", param="max_visual_tokens")
            kept, common = self._take(salt, keys)
            logits, following = self._read(ids, grids, pixels, kept, common)
            text = _Text(self.tokenizer)
            chooser = _Chooser(sampling)
            reason: FinishReason = "length"
            written: list[int] = []
            told = 0
            room = min(sampling.max_tokens, self.context - len(ids))
            while len(written) < room and not stopped():
                token = chooser(logits)
                written.append(token)
                if token in self.ends:
                    reason = "stop"
                    break
                piece, ended = text.add(token, sampling.stop)
                if piece:
                    yield Delta(piece, len(written) - told)
                    told = len(written)
                if ended:
                    reason = "stop"
                    break
                logits = self._step(token, following, kept)
                following += 1
            done = kept.cache.get_seq_length()
            self._keep(_Kept(salt, (keys + written)[:done], kept.cache))
            if stopped():
                return
            image_tokens = sum(token == self.image_pad for token in ids)
            yield Generation(text.text, reason, Usage(len(ids), len(written), cached_tokens=common, image_tokens=image_tokens))

    def _pixels(self, views: Sequence[View]) -> tuple[Any, Any]:
        if not views:
            return None, None
        images = []
        for view in views:
            images.append(pixels(view.data, Limits(), Stop(DECODE_SECONDS)))
        inputs = self.processor(images=images, return_tensors="pt")
        return inputs["image_grid_thw"], inputs["pixel_values"].to(self.network.device)

    def _tokens(self, conversation: Conversation, views: Sequence[View], grids: Any) -> tuple[list[int], list[int]]:
        """Return the token ids, and the same with each image's tokens replaced by a number made of its bytes."""
        messages = [
            {
                "role": message.role,
                "content": [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in message.parts],
            }
            for message in conversation.messages
        ]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = []
        keys: list[int] = []
        image = 0
        for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]:
            if token != self.image_pad:
                ids.append(token)
                keys.append(token)
                continue
            count = int(grids[image].prod()) // 4
            ids += [token] * count
            keys += [-int.from_bytes(sha256(views[image].data).digest()[:8])] * count
            image += 1
        return ids, keys

    def _take(self, salt: str, keys: list[int]) -> tuple[_Kept, int]:
        """Take the kept conversation of this salt that shares the longest beginning, cut down to it; an empty one if none does.

        One that would lose something is left as it is and copied: all conversations begin alike, and a new one must not cost
        another its image. The last token is always computed anew: its logits are what generation starts from.
        """
        from transformers import DynamicCache

        best, common = None, 0
        for kept in (other for other in self.kept if other.salt == salt):
            shared = _common(kept.ids, keys[:-1])
            if shared > common:
                best, common = kept, shared
        if best is None:
            return _Kept(salt, [], DynamicCache(config=self.network.config.text_config)), 0
        surplus = best.cache.get_seq_length() - common
        if not surplus:
            self.kept.remove(best)
            return best, common
        copy = deepcopy(best.cache)
        copy.crop(-surplus)  # the number of tokens to remove, negative (transformers 5.23)
        return _Kept(salt, [], copy), common

    def _keep(self, kept: _Kept) -> None:
        # What it goes on from, or repeats, would be kept twice.
        others = [other for other in self.kept if other.salt != kept.salt or kept.ids[: len(other.ids)] != other.ids]
        self.kept = [*others[1 - KEPT_CONVERSATIONS :], kept]

    def _read(self, ids: list[int], grids: Any, pixels: Any, kept: _Kept, common: int) -> tuple[Tensor, int]:
        """Compute what the cache lacks; return the logits after the last token and the position that follows it."""
        import torch

        inner = self.network.model
        tokens = torch.tensor([ids], device=self.network.device)
        visual = tokens == self.image_pad
        places, _ = inner.get_rope_index(
            tokens, mm_token_type_ids=visual.int(), image_grid_thw=None if grids is None else grids.to(tokens.device)
        )
        x = self.network.get_input_embeddings()(tokens[:, common:])
        counts = [] if grids is None else (grids.prod(-1) // 4).tolist()
        fresh = _unread_images(int(visual[0, :common].sum()), counts)
        if fresh < len(counts):
            skipped = int(grids[:fresh].prod(-1).sum())
            features = inner.get_image_features(pixels[skipped:], grids[fresh:].to(tokens.device)).pooler_output
            wanted = int(visual[0, common:].sum())
            x[visual[:, common:]] = torch.cat(list(features))[-wanted:].to(x.dtype)
        hidden = inner.language_model(
            inputs_embeds=x, position_ids=places[:, :, common:], past_key_values=kept.cache, use_cache=True
        ).last_hidden_state
        return self.network.lm_head(hidden[0, -1]), int(places.max()) + 1

    def _step(self, token: int, position: int, kept: _Kept) -> Tensor:
        import torch

        device = self.network.device
        hidden = self.network.model.language_model(
            input_ids=torch.tensor([[token]], device=device),
            position_ids=torch.full((3, 1, 1), position, device=device),
            past_key_values=kept.cache,
            use_cache=True,
        ).last_hidden_state
        logits: Tensor = self.network.lm_head(hidden[0, -1])
        return logits


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    shared = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared += 1
    return shared


def _unread_images(visual_tokens_read: int, counts: Sequence[int]) -> int:
    """Return the index of the first image that is not wholly among the tokens read."""
    for index, count in enumerate(counts):
        visual_tokens_read -= count
        if visual_tokens_read < 0:
            return index
    return len(counts)


class _Chooser:
    """Picks the next token: the likeliest at temperature 0, else a draw from the top-p nucleus with the request's seed."""

    def __init__(self, sampling: Sampling) -> None:
        import torch

        self._sampling = sampling
        self._draw = torch.Generator()
        if sampling.seed is not None:
            self._draw.manual_seed(sampling.seed)
        elif sampling.temperature > 0:
            self._draw.seed()

    def __call__(self, logits: Tensor) -> int:
        import torch

        if self._sampling.temperature == 0:
            return int(logits.argmax())
        warmth = max(self._sampling.temperature, LEAST_TEMPERATURE)
        chances = torch.softmax(logits.float().cpu() / warmth, -1)
        ordered, tokens = chances.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered > self._sampling.top_p] = 0
        return int(tokens[torch.multinomial(ordered, 1, generator=self._draw)])


class _Text:
    """Turns tokens into text piece by piece, never splitting a character, and finds stop strings across tokens.

    A character that is never completed is dropped.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self.text = ""
        self._sent = 0

    def add(self, token: int, stops: Sequence[str]) -> tuple[str, bool]:
        """Return the text that may be sent now, and whether a stop string has been completed (all after it is dropped)."""
        grown = self._stream.step(self._tokenizer, token)
        if not grown:
            return "", False
        before = len(self.text)
        self.text += grown
        ends = [at + len(s) for s in stops if (at := self.text.find(s, max(0, before - len(s) + 1))) >= 0]
        if ends:
            self.text = self.text[: min(ends)]
        piece, self._sent = self.text[self._sent :], len(self.text)
        return piece, bool(ends)
