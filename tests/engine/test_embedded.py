"""The embedded engine against transformers' own generation, and what it keeps between turns."""

from __future__ import annotations

import asyncio
import contextlib
import io
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import support
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ergo_server.engine.base import Generation, Sampling
from ergo_server.engine.embedded import EmbeddedEngine, _Text
from ergo_server.errors import EngineUnavailable
from ergo_server.imaging.view import View
from ergo_server.protocol.conversation import Conversation

GREEDY = Sampling(64)


@dataclass(frozen=True)
class Reference:
    """transformers by itself, with the checkpoint that the engine serves."""

    network: Any
    tokenizer: Any
    processor: Any

    def tokens(self, conversation: Conversation) -> list[int]:
        """Return the prompt's tokens, image pads expanded by hand."""
        messages = [
            {"role": message.role, "content": [{"text": p} if isinstance(p, str) else {"type": "image"} for p in message.parts]}
            for message in conversation.messages
        ]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pieces = text.split("<|image_pad|>")
        pads = ["<|image_pad|>" * view.visual_tokens for view in conversation.views]
        expanded = pieces[0] + "".join(pad + piece for pad, piece in zip(pads, pieces[1:], strict=True))
        return list(self.tokenizer(expanded, add_special_tokens=False)["input_ids"])

    def generate(self, conversation: Conversation) -> str:
        """Return what ``generate`` of transformers writes, greedily."""
        import torch

        ids = torch.tensor([self.tokens(conversation)])
        images = [Image.open(io.BytesIO(view.data)) for view in conversation.views]
        seen = self.processor(images=images, return_tensors="pt") if images else {}
        kinds = (ids == self.network.config.image_token_id).int()
        mask = torch.ones_like(ids)
        out = self.network.generate(
            input_ids=ids, attention_mask=mask, mm_token_type_ids=kinds, **seen, do_sample=False, max_new_tokens=64
        )
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.fixture(scope="module")
def reference() -> Reference:
    """The checkpoint as transformers loads it."""
    import torch
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    torch.set_num_threads(1)  # of this thread; two of them on a busy machine take a hundred times as long as one
    network: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(support.CHECKPOINT, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(support.CHECKPOINT)
    return Reference(network.eval(), tokenizer, Qwen2VLImageProcessorPil.from_pretrained(support.CHECKPOINT))


@pytest.fixture
def engine() -> Iterator[EmbeddedEngine]:
    """A fresh engine, that remembers nothing."""
    made = EmbeddedEngine(support.CHECKPOINT, device="cpu", threads=1)
    yield made
    asyncio.run(made.aclose())


def ask(engine: EmbeddedEngine, conversation: Conversation, sampling: Sampling = GREEDY) -> Generation:
    """Read a reply to its end."""

    async def read() -> Generation:
        async for piece in engine.generate(conversation, sampling):
            if isinstance(piece, Generation):
                return piece
        raise AssertionError("no generation")

    return asyncio.run(read())


@cache
def look(number: int) -> View:
    """Return the overview of a held-out scene."""
    return support.look(support.encode(support.held_out(number)))


def zoom_turn(number: int) -> Conversation:
    """Ask where to look, in the words that ergo-mini was trained with."""
    return Conversation().system("Look closely.").user(look(number), support.held_out(number).question + "\nWhere?")


def answer_turn(number: int, reply: str) -> Conversation:
    """Go on from the zoom turn, with another scene in the crop's place."""
    return zoom_turn(number).assistant(reply).user(look(number + 50), "What code?\nAnswer.")


def common(a: list[int], b: list[int]) -> int:
    """Return the length of the beginning that both share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("number", [200, 201, 202])
def test_greedy_text_is_that_of_transformers(engine: EmbeddedEngine, reference: Reference, number: int) -> None:
    """With one image and with two, the engine writes what ``generate`` of transformers writes, and counts the same prompt."""
    first = ask(engine, zoom_turn(number))
    second = ask(engine, answer_turn(number, first.text))
    for turn, conversation in ((first, zoom_turn(number)), (second, answer_turn(number, first.text))):
        assert turn.text == reference.generate(conversation)
        assert turn.usage.prompt_tokens == len(reference.tokens(conversation))


def test_text_alone_is_that_of_transformers(engine: EmbeddedEngine, reference: Reference) -> None:
    """A conversation without images is continued as transformers does."""
    conversation = Conversation().system("Look closely.").user("What is the code on the red circle?\nWhere?")
    ids, turn = reference.tokens(conversation), ask(engine, conversation)
    assert (turn.usage.prompt_tokens, turn.usage.image_tokens) == (len(ids), 0)
    assert turn.text == reference.generate(conversation)


def test_the_kept_cache_changes_nothing_but_the_work(engine: EmbeddedEngine, reference: Reference) -> None:
    """The answer turn reads from the cache all that it shares with the zoom turn, and writes what an engine without one writes.

    All but the last token of the first reply: generation ended with it, so its keys and values were never computed.
    """
    first = ask(engine, zoom_turn(210))
    conversation = answer_turn(210, first.text)
    second = ask(engine, conversation)
    fresh = EmbeddedEngine(support.CHECKPOINT, device="cpu", threads=1)
    without = ask(fresh, conversation)
    asyncio.run(fresh.aclose())
    said = reference.tokens(zoom_turn(210)) + reference.tokenizer(first.text)["input_ids"]
    shared = common(said, reference.tokens(conversation))
    assert (first.usage.cached_tokens, without.usage.cached_tokens) == (0, 0)
    assert second.usage.cached_tokens == min(shared, first.usage.prompt_tokens + first.usage.completion_tokens - 1)
    assert second.text == without.text


def test_other_questions_about_an_image_share_it(engine: EmbeddedEngine, reference: Reference) -> None:
    """A second question about the same picture reuses everything up to where the questions part."""
    conversations = [Conversation().system("Look.").user(look(220), text) for text in ("Which code? Where?", "Which number?")]
    a, b = (reference.tokens(conversation) for conversation in conversations)
    ask(engine, conversations[0], Sampling(1))
    assert ask(engine, conversations[1], Sampling(1)).usage.cached_tokens == common(a, b)


def test_other_bytes_share_nothing_from_the_image_on(engine: EmbeddedEngine, reference: Reference) -> None:
    """The same pixels in another file are another image: only the text before it comes from the cache."""
    view = look(230)
    with io.BytesIO() as file:
        Image.open(io.BytesIO(view.data)).save(file, "PNG", compress_level=9)
        other = replace(view, data=file.getvalue())
    first, second = (Conversation().system("Look.").user(v, "Which code?\nWhere?") for v in (view, other))
    a, b = ask(engine, first), ask(engine, second)
    assert b.usage.cached_tokens == reference.tokens(second).index(reference.network.config.image_token_id)
    assert a.text == b.text


def test_interleaved_conversations_keep_their_caches(engine: EmbeddedEngine) -> None:
    """Of several requests at once, each finds its own zoom turn again, whatever the others did in between."""
    numbers = range(240, 246)
    firsts = [ask(engine, zoom_turn(n)) for n in numbers]
    for number, first in zip(numbers, firsts, strict=True):
        assert (ask(engine, answer_turn(number, first.text)).usage.cached_tokens or 0) >= first.usage.prompt_tokens


def test_a_seed_repeats_what_was_drawn(engine: EmbeddedEngine) -> None:
    """Sampling with a seed gives the same text again; at a high temperature other seeds give others."""
    drawn = [ask(engine, zoom_turn(250), Sampling(32, temperature=5.0, seed=seed)).text for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


@pytest.mark.parametrize("sampling", [Sampling(32, temperature=1e-42), Sampling(32, temperature=1.0, top_p=1e-9)])
def test_next_to_no_chance_is_greedy(engine: EmbeddedEngine, sampling: Sampling) -> None:
    """A temperature or a nucleus near nothing leaves the likeliest token, and no number overflows."""
    assert ask(engine, zoom_turn(251), sampling).text == ask(engine, zoom_turn(251), Sampling(32)).text


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.text("é漢🙂ß<zoom>1 ", max_size=20))
@settings(deadline=None)
def test_a_character_is_never_broken(text: str) -> None:
    """Whatever tokens its bytes are spread over, each character is sent whole, once, and in order."""
    tokenizer = _tokenizer()
    reader = _Text(tokenizer)
    text = unicodedata.normalize("NFC", text.replace("<|", "< |"))  # as Qwen's tokenizer does
    pieces = [reader.add(token, ())[0] for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert "".join(pieces) == text


@given(tokens=st.lists(st.integers(0, 411), max_size=30))
@settings(deadline=None)
def test_any_tokens_can_be_read(tokens: list[int]) -> None:
    """Tokens that make no sense, broken characters among them, give the text that the tokenizer gives for them."""
    tokenizer = _tokenizer()
    reader = _Text(tokenizer)
    text = "".join(reader.add(token, ())[0] for token in tokens)
    assert str(tokenizer.decode(tokens, skip_special_tokens=True)).startswith(text)


@given(text=st.text("ab<é漢", max_size=30), stop=st.text("ab<é漢", min_size=1, max_size=3))
@settings(deadline=None)
def test_a_stop_string_is_found_across_tokens(text: str, stop: str) -> None:
    """The text ends just after the first stop string, however tokens are cut."""
    tokenizer = _tokenizer()
    reader = _Text(tokenizer)
    ended = False
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if not ended:
            _, ended = reader.add(token, (stop,))
    assert (reader.text, ended) == (text[: text.index(stop) + len(stop)] if stop in text else text, stop in text)


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(support.CHECKPOINT)


def test_a_checkpoint_that_does_not_load_is_unavailable(tmp_path: Path) -> None:
    """The status says why, and asking the engine is an engine error, not one of transformers."""

    async def work() -> None:
        async with contextlib.aclosing(EmbeddedEngine(tmp_path)) as engine:
            with pytest.raises(EngineUnavailable, match="cannot be loaded"):
                await engine.loaded()
            status = await engine.status()
            assert (status.ready, str(tmp_path) in status.detail) == (False, True)
            with pytest.raises(EngineUnavailable):
                await anext(engine.generate(zoom_turn(260), GREEDY))

    asyncio.run(work())


def test_a_loading_engine_is_not_ready_but_takes_work() -> None:
    """Before the checkpoint is loaded the status says so; what is asked meanwhile is answered afterwards."""

    async def work() -> None:
        async with contextlib.aclosing(EmbeddedEngine(support.CHECKPOINT, device="cpu", threads=1)) as engine:
            assert await engine.status() == replace(await engine.status(), ready=False, detail="loading the checkpoint")
            await anext(engine.generate(zoom_turn(260), GREEDY))
            assert (await engine.status()).ready

    asyncio.run(work())


def test_closing_while_loading_ends_what_waits() -> None:
    """Work that has not begun when the engine is closed ends with an engine error, and nobody waits for ever."""

    async def work() -> None:
        engine = EmbeddedEngine(support.CHECKPOINT, device="cpu", threads=1)
        waiting = [asyncio.create_task(anext(engine.generate(zoom_turn(260), GREEDY))) for _ in range(3)]
        await asyncio.sleep(0)
        await engine.aclose()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(error) for error in ended] == [EngineUnavailable] * 3

    asyncio.run(work())
