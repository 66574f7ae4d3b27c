"""The training's own arithmetic against transformers, and its data."""

from __future__ import annotations

import argparse
import itertools
import random
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import client, scripted
from support import PROMPTS, encode
from transformers import AutoTokenizer

from ergo_train import model as network
from ergo_train import samples, tokenizer, train
from ergo_train.hard_scenes import hard_scene
from ergo_train.samples import Packer
from ergo_train.scenes import Scene, scene


def _packer(folder: Path) -> Packer:
    return Packer(tokenizer.build(folder), tomllib.loads(PROMPTS.read_text()))


def _large_weights(trainee: network.Trainee) -> None:
    """Make the random weights large enough that every part of the input moves the output."""
    with torch.no_grad():
        for parameter in trainee.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.1)


@pytest.mark.parametrize("draw", [scene, hard_scene])
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_a_packed_branch_is_the_conversation_alone(seed: int, draw: Callable[..., Scene], tmp_path: Path) -> None:
    """Every branch of a packed sample has the hidden states that transformers computes for that conversation by itself."""
    torch.manual_seed(0)
    packer = _packer(tmp_path)
    trainee = network.Trainee(network.build(packer.tokenizer)).eval()
    _large_weights(trainee)
    batch = train.collate([packer.sample(random.Random(seed), draw(seed, size=(1280, 1100)))])
    with torch.inference_mode():
        packed = trainee.model.model.language_model.norm(trainee.read(batch).hidden[-1])[0]
        for branch in range(1, int(batch.branch.max()) + 1):
            mine = (batch.branch[0] == 0) | (batch.branch[0] == branch)
            alone = _alone(trainee, batch, mine)
            torch.testing.assert_close(packed[mine], alone, atol=2e-4, rtol=1e-3)


def _alone(trainee: network.Trainee, batch: network.Batch, mine: torch.Tensor) -> torch.Tensor:
    """Run transformers' own forward pass over the tokens of one branch."""
    ids, slots = batch.ids[:, mine], batch.slots[0][mine]
    views = sorted({int(slot) // samples.SLOTS for slot in slots if slot >= 0})
    valid = [batch.patch_valid[view] for view in views]
    pixels = torch.cat([batch.patches[view][mask] for view, mask in zip(views, valid, strict=True)])
    both_frames = pixels.view(-1, 3, 1, 14, 14).expand(-1, 3, 2, 14, 14).reshape(-1, 1176)
    sides = [batch.patch_places[view][mask].amax(0).int() + 1 for view, mask in zip(views, valid, strict=True)]
    grid = torch.stack([torch.tensor([1, int(rows), int(columns)]) for rows, columns in sides])
    kinds = (slots >= 0).int()[None]
    hidden: torch.Tensor = trainee.model.model(
        input_ids=ids, pixel_values=both_frames, image_grid_thw=grid, mm_token_type_ids=kinds
    ).last_hidden_state[0]
    return hidden


def test_a_branch_spells_the_conversation_of_the_chat_template(tmp_path: Path) -> None:
    """The tokens of the first branch are those that the chat template and the tokenizer of the checkpoint give."""
    packer = _packer(tmp_path)
    network.save(network.build(packer.tokenizer), tmp_path)
    sample = packer.sample(random.Random(1), scene(1))
    chosen = [token for token, branch in zip(sample.ids, sample.branch, strict=True) if branch <= 1]
    text = packer.tokenizer.decode(chosen, skip_special_tokens=False)
    turns = [turn.split("\n", 1) for turn in text.split("<|im_start|>")[1:]]
    messages = [{"role": role, "content": content.removesuffix("<|im_end|>\n")} for role, content in turns]
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(messages, tokenize=False) == text
    assert loaded(text)["input_ids"] == chosen


def test_hints_point_at_what_they_name(tmp_path: Path) -> None:
    """Every reply token that must look has a visual token of its own conversation to look at, before it."""
    packer = _packer(tmp_path)
    for seed, draw in itertools.product(range(8), (scene, hard_scene)):
        sample = packer.sample(random.Random(seed), draw(seed, size=(1280, 1100)))
        for _, here, there in sample.looks:
            assert there < here
            assert sample.slots[there] >= 0
            assert sample.branch[there] in (0, sample.branch[here])


@pytest.mark.parametrize("draw", [scene, hard_scene])
def test_the_trainer_and_the_server_hold_one_conversation(draw: Callable[..., Scene], tmp_path: Path) -> None:
    """For the same image, question and replies, what the server sends is byte for byte what training showed: text and views."""
    packer = _packer(tmp_path)
    network.save(network.build(packer.tokenizer), tmp_path)
    template = AutoTokenizer.from_pretrained(tmp_path)
    compared = 0
    for seed in range(12):
        made = draw(seed, size=(1280, 1100))
        sample = packer.sample(random.Random(seed), made)
        chosen = [token for token, branch in zip(sample.ids, sample.branch, strict=True) if branch <= 1]
        text = re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", packer.tokenizer.decode(chosen, skip_special_tokens=False))
        said = re.fullmatch(r".*<\|vision_end\|>(.*)\nWhere\?.*?assistant\n(.*?)<\|im_end.*(\nAnswer\..*)", text, re.DOTALL)
        if said is None or "(A)" in text or "Reply with" in text:
            continue  # read without zoom, or with choices: the question would have to be taken apart
        question, zoom = said[1], said[2]
        engine = scripted(zoom, re.findall(r"assistant\n(.*?)<\|im_end", text, re.DOTALL)[1])
        with client(engine, prompts=PROMPTS) as server:
            server.post("/v1/vqa", files={"image": encode(made, "PNG")}, data={"question": question}).raise_for_status()
        conversation = engine.calls[1][0].assistant(engine.script(engine.calls[1][0], engine.calls[1][1]))  # type: ignore[arg-type]
        messages: list[Any] = [
            {
                "role": m.role,
                "content": [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in m.parts],
            }
            for m in conversation.messages
        ]
        assert template.apply_chat_template(messages, tokenize=False) == text
        views = sorted(
            {slot // samples.SLOTS for slot, b in zip(sample.slots, sample.branch, strict=True) if slot >= 0 and b <= 1}
        )
        assert [view.data for view in conversation.views] == [sample.views[number].data for number in views]
        compared += 1
    assert compared >= 4


def _arguments(folder: Path, steps: int) -> argparse.Namespace:
    return argparse.Namespace(
        folder=folder,
        see_steps=2,
        steps=steps,
        batch=2,
        close_ups=2,
        rate=1e-3,
        decay=0.4,
        threads=1,
        workers=0,
        seed=0,
        compile=False,
        start=None,
        bfloat16=False,
        minutes=60,
    )


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    """Stopping after three of five steps and starting again gives the weights of five steps in one go."""
    train.run(_arguments(tmp_path / "whole", steps=3))
    broken = _arguments(tmp_path / "broken", steps=3)
    train.run(argparse.Namespace(**{**vars(broken), "minutes": 0.0}))
    assert torch.load(tmp_path / "broken" / "state.pt", weights_only=True)["step"] == 1
    train.run(broken)
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True)["trainee"] for name in ("whole", "broken")]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], msg=name)
