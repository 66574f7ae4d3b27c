"""The network of ergo-mini, and the forward pass that training uses.

The checkpoint is an ordinary ``Qwen2_5_VLForConditionalGeneration``. Training runs its very modules, but batches views and
branches densely with padding and masks, where transformers loops over images: about three times faster on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ergo_train import tokenizer
from ergo_train.samples import DOT, NO_CLASS, NO_DIGIT, SLOTS

LOOKING_LAYER = 3
"""The text layer whose heads 0 and 1 are taught where to look: after binding has had three layers to happen."""

POSITION_LAYER = 1
"""The position head reads the output of the first text layer."""

MAX_GRID = 14
"""Visual tokens a side that the position head can tell apart; 16:9 at 49 tokens is 9."""


def build(tokens: Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Return the network with random weights."""
    ids: dict[str, Any] = {name: tokens.token_to_id(name) for name in tokenizer.SPECIALS}
    ends: dict[str, Any] = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    config = Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_config={
            "vocab_size": tokens.get_vocab_size(),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
            # Column positions take the last 7 of the 16 frequencies. With the family's base of 1,000,000 they would turn by
            # less than 0.02 rad over a whole view; with 50 by 1 rad.
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "mrope_section": [2, 7, 7]},
            **ends,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 288,
            "num_heads": 3,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            # One window holds every view the budget allows up to 20 tokens a side, so each layer sees all of it.
            "window_size": 560,
            "fullatt_block_indexes": [2],
            "out_hidden_size": 128,
            "tokens_per_second": 2,
            "hidden_act": "silu",
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
        **ends,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def save(model: Qwen2_5_VLForConditionalGeneration, folder: Path) -> None:
    """Write weights (bfloat16), configuration and processor files; the tokenizer's files must be there already."""
    config: Any = model.config
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=config.text_config.bos_token_id,
        pad_token_id=config.text_config.pad_token_id,
        eos_token_id=[config.text_config.eos_token_id, config.text_config.pad_token_id],
        do_sample=False,
    )
    dtype = model.dtype
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    model.to(dtype)  # type: ignore[arg-type]
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
    image = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": pixels["shortest_edge"],
        "max_pixels": pixels["longest_edge"],
        "merge_size": 2,
        "patch_size": 14,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "temporal_patch_size": 2,
        "size": pixels,
    }
    tokenizer.write_json(folder / "preprocessor_config.json", image)
    video = {k: v for k, v in image.items() if k != "image_processor_type"}
    video |= {"video_processor_type": "Qwen2VLVideoProcessor", "do_sample_frames": False, "fps": 2.0}
    tokenizer.write_json(folder / "video_preprocessor_config.json", video)


IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's statistics, which the Qwen-VL processors use."""


@dataclass(slots=True)
class Batch:
    """A batch of packed samples. B samples, V views each, P = 4 · SLOTS patches a view, L tokens."""

    patches: Tensor  # B·V, P, 588
    patch_places: Tensor  # B·V, P, 2: row and column of each patch
    patch_valid: Tensor  # B·V, P
    ids: Tensor  # B, L
    branch: Tensor  # B, L; -1 for padding
    positions: Tensor  # 3, B, L
    weights: Tensor  # B, L
    slots: Tensor  # B, L: index into V · SLOTS, or -1
    looks: Tensor  # N, 4: sample, head, from, to
    landmarks: Tensor  # N, 4: flat visual token, class, half token, 0
    digits: Tensor  # N, 3: flat visual token, patch, digit
    crops: Tensor  # B·V: whether the view is a crop


@dataclass(slots=True)
class Losses:
    """One scalar each, and counts for the log."""

    language: Tensor
    looking: Tensor
    position: Tensor
    landmark: Tensor
    digit: Tensor
    digits_right: Tensor
    codes_right: Tensor
    looks_right: Tensor

    @property
    def total(self) -> Tensor:
        """What training descends."""
        return self.language + 0.5 * self.looking + 0.3 * self.position + 0.5 * self.landmark + self.digit


@dataclass(slots=True)
class Reading:
    """What a forward pass leaves behind."""

    tokens: Tensor
    """B·V·SLOTS × hidden: all visual tokens, flat."""
    hidden: list[Tensor]
    """B × L × hidden each: the input of every text layer, and the output of the last."""
    cos: Tensor
    sin: Tensor
    mask: Tensor


class Trainee(nn.Module):
    """The network with the heads that help it learn; only ``model`` is kept in the end."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        text, vision = config.text_config, config.vision_config
        self.heads = text.num_attention_heads
        self.vision_heads = vision.num_heads
        self.landmark_head = nn.Linear(text.hidden_size, NO_CLASS + 1 + 5)
        self.digit_head = nn.Linear(text.hidden_size, 4 * (DOT + 1))
        self.position_head = nn.Linear(text.hidden_size, 2 * MAX_GRID)
        self.text_layer = _text_layer
        self.vision_layer = _vision_layer

    def compile(self) -> None:
        """Compile the two layer functions; needs a C++ compiler."""
        self.text_layer = torch.compile(_text_layer, dynamic=False)
        self.vision_layer = torch.compile(_vision_layer, dynamic=False)

    def see(self, batch: Batch) -> Tensor:
        """Return the visual tokens, B·V × SLOTS × hidden."""
        tower = self.model.model.visual
        kernel = tower.patch_embed.proj.weight.sum(2).flatten(1)  # both frames of an image are the same
        x = functional.linear(batch.patches, kernel)
        angles = batch.patch_places[..., None] * tower.rotary_pos_emb.inv_freq
        angles = torch.cat([angles[..., 0, :], angles[..., 1, :]], -1)
        angles = torch.cat([angles, angles], -1)[:, None]
        mask = batch.patch_valid[:, None, None, :]
        for block in tower.blocks:
            x = self.vision_layer(block, x, angles.cos(), angles.sin(), mask, self.vision_heads)
        views, patches, width = x.shape
        merger = tower.merger
        merged: Tensor = merger.mlp(merger.ln_q(x).view(views, patches // 4, width * 4))
        return merged

    def look(self, batch: Batch) -> Losses:
        """Return the losses of the vision part alone; the others are zero."""
        tokens = self.see(batch).flatten(0, 1)
        digit, digits_right = self._digits(batch, tokens)
        zero = torch.zeros(())
        return Losses(zero, zero, zero, self._landmarks(batch, tokens), digit, digits_right, zero, zero)

    def read_digits(self, batch: Batch) -> Tensor:
        """Return the loss of reading alone."""
        return self._digits(batch, self.see(batch).flatten(0, 1))[0]

    def read(self, batch: Batch) -> Reading:
        """Run the whole network over a batch."""
        seen = self.see(batch)
        lm = self.model.model.language_model
        samples = len(batch.ids)
        visual = batch.slots >= 0
        flat = batch.slots + torch.arange(samples)[:, None] * (seen.shape[0] // samples * SLOTS)
        tokens = seen.flatten(0, 1)
        x = lm.embed_tokens(batch.ids)
        x = torch.where(visual[..., None], tokens[flat.clamp(min=0)], x)
        cos, sin = lm.rotary_emb(x, batch.positions)
        cos, sin = cos[:, None], sin[:, None]
        mask = attention_mask(batch.branch)
        hidden = [x]
        for layer in lm.layers:
            hidden.append(self.text_layer(layer, hidden[-1], cos, sin, mask, self.heads))
        return Reading(tokens, hidden, cos, sin, mask)

    def forward(self, batch: Batch) -> Losses:
        """Return every loss of the batch."""
        reading = self.read(batch)
        language, codes_right = self.language(batch, reading)
        looking, looks_right = self._looking(batch, reading)
        digit, digits_right = self._digits(batch, reading.tokens)
        return Losses(
            language=language,
            looking=looking,
            position=self._position(batch, reading),
            landmark=self._landmarks(batch, reading.tokens),
            digit=digit,
            digits_right=digits_right,
            codes_right=codes_right,
            looks_right=looks_right,
        )

    def language(self, batch: Batch, reading: Reading) -> tuple[Tensor, Tensor]:
        """Return the loss of the replies' tokens, and the share of their digits that are right."""
        weights = batch.weights[:, 1:]
        wanted = weights > 0
        hidden = self.model.model.language_model.norm(reading.hidden[-1][:, :-1][wanted])
        logits = self.model.lm_head(hidden)
        targets, weights = batch.ids[:, 1:][wanted], weights[wanted]
        losses = functional.cross_entropy(logits, targets, reduction="none")
        digits = weights > 1
        right = (logits.argmax(-1) == targets)[digits].float().mean()
        return (losses * weights).sum() / weights.sum(), right

    def _looking(self, batch: Batch, reading: Reading) -> tuple[Tensor, Tensor]:
        """Cross-entropy of two heads' attention against the visual token to look at, among all that is visible."""
        layer = self.model.model.language_model.layers[LOOKING_LAYER]
        sample, head, here, there = batch.looks.unbind(-1)
        h = layer.input_layernorm(reading.hidden[LOOKING_LAYER])
        cos, sin = reading.cos, reading.sin
        samples, length, width = h.shape
        size = width // self.heads
        query = layer.self_attn.q_proj(h[sample, here]).view(-1, self.heads, size)[torch.arange(len(head)), head]
        key = layer.self_attn.k_proj(h).view(samples, length, self.heads, size).transpose(1, 2)
        key = rotate(key, cos, sin)[sample, head]
        query = rotate(query, cos[sample, 0, here], sin[sample, 0, here])
        scores = (key @ query[..., None])[..., 0] * size**-0.5
        scores = scores.masked_fill(~reading.mask[sample, 0, here], -torch.inf)
        return functional.cross_entropy(scores, there), (scores.argmax(-1) == there).float().mean()

    def _position(self, batch: Batch, reading: Reading) -> Tensor:
        visual = batch.slots >= 0
        rows_columns = self.position_head(reading.hidden[POSITION_LAYER][visual]).view(-1, 2, MAX_GRID)
        places = batch.positions[:, visual]
        wanted = torch.stack([places[1] - places[0], places[2] - places[0]], 1)
        return functional.cross_entropy(rows_columns.flatten(0, 1), wanted.flatten())

    def _landmarks(self, batch: Batch, tokens: Tensor) -> Tensor:
        overview = (~batch.crops).repeat_interleave(SLOTS) & batch.patch_valid[:, ::4].flatten()
        logits = self.landmark_head(tokens)
        kinds = torch.full((len(tokens),), NO_CLASS)
        halves = torch.full((len(tokens),), 4)
        where, kind, half, _ = batch.landmarks.unbind(-1)
        kinds[where] = kind
        halves[where] = torch.where(half >= 0, half, 4)
        even = torch.ones(NO_CLASS + 1)
        even[NO_CLASS] = 0.2
        what = functional.cross_entropy(logits[overview, : NO_CLASS + 1], kinds[overview], weight=even)
        mostly_absent = torch.tensor([1, 1, 1, 1, 0.2])
        where_in = functional.cross_entropy(logits[overview, NO_CLASS + 1 :], halves[overview], weight=mostly_absent)
        return what + where_in

    def _digits(self, batch: Batch, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """One digit, a dot or nothing in each of the four patches of every visual token of a crop."""
        where, patch, digit = batch.digits.unbind(-1)
        wanted = torch.full((len(tokens), 4), NO_DIGIT)
        wanted[where, patch] = digit
        crops = batch.crops.repeat_interleave(SLOTS) & batch.patch_valid[:, ::4].flatten()
        logits = self.digit_head(tokens).view(-1, 4, DOT + 1)
        even = torch.ones(DOT + 1)
        even[NO_DIGIT] = 0.1
        loss = functional.cross_entropy(logits[crops].flatten(0, 1), wanted[crops].flatten(), weight=even)
        return loss, (logits[where, patch].argmax(-1) == digit).float().mean()


def attention_mask(branch: Tensor) -> Tensor:
    """Return B × 1 × L × L, true where a token may look: earlier, and in the shared beginning or its own branch."""
    length = branch.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    same = (branch[:, None, :] == branch[:, :, None]) | (branch[:, None, :] == 0)
    return (same & earlier)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions."""
    near, far = x.chunk(2, -1)
    return x * cos + torch.cat([-far, near], -1) * sin


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attend in float32 whatever the rest multiplies in: on a CPU its backward pass takes half as long as in bfloat16."""
    with torch.autocast(query.device.type, enabled=False):
        return functional.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask)


def _text_layer(layer: Any, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, heads: int) -> Tensor:
    attention = layer.self_attn
    h = layer.input_layernorm(x)
    samples, length, width = h.shape
    shape = (samples, length, heads, width // heads)
    query = rotate(attention.q_proj(h).view(shape).transpose(1, 2), cos, sin)
    key = rotate(attention.k_proj(h).view(shape).transpose(1, 2), cos, sin)
    value = attention.v_proj(h).view(shape).transpose(1, 2)
    mixed = _attention(query, key, value, mask)
    x = x + attention.o_proj(mixed.transpose(1, 2).reshape(samples, length, width))
    out: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
    return out


def _vision_layer(block: Any, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, heads: int) -> Tensor:
    h = block.norm1(x)
    views, patches, width = h.shape
    query, key, value = block.attn.qkv(h).view(views, patches, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    mixed = _attention(rotate(query, cos, sin), rotate(key, cos, sin), value, mask)
    x = x + block.attn.proj(mixed.transpose(1, 2).reshape(views, patches, width))
    out: Tensor = x + block.mlp(block.norm2(x))
    return out
