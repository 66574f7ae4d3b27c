"""ergo-mini's tokenizer: byte-level BPE of a few hundred entries with Qwen's splitting rule, special tokens and chat form.

Every single byte has an entry, so any text can be written; the merges come from the templates alone, so that the words of
the task are one token each. Digits are never merged: Qwen's rule splits them one by one, and coordinates and codes are read
and written digit by digit.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ergo_train import hard_scenes, scenes

VOCABULARY = 512
"""At most; the corpus runs out of merges before that."""

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""The same names in the same order as the Qwen2.5-VL family; the model's config refers to some of them by id."""

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenizer. transformers rebuilds it for ``Qwen2Tokenizer`` whatever the file says, so no other can be used."""

CHAT_TEMPLATE = """\
{%- if messages and messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nLook closely.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- elif message['content'] -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') or 'image' in part or 'image_url' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' or 'video' in part -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""ChatML, as the family uses it."""


def _corpus() -> Iterator[str]:
    """Everything the two turns say, each word of the task in every place where it can stand."""
    for colour, shape, form in itertools.product(scenes.COLOURS, scenes.SHAPES, scenes.QUESTIONS):
        yield "user\n" + form.format(f"{colour} {shape}") + "\nWhere?"
        yield "\nAnswer."
        yield "system\nLook closely."
        yield "assistant\n<think>row 0 column 0</think><zoom>[0, 0, 0, 0]</zoom>"
        yield "assistant\n<think>row 0 column 0</think><answer>0</answer>"
    for kind, side, other in itertools.product(hard_scenes.FORMS, hard_scenes.SIDES, hard_scenes.SIDES):
        for form in hard_scenes.FORMS[kind]:
            yield "user\n" + form.format("red circle", side=side, other=other) + "\nWhere?"
            yield "assistant\n<think>row 0 column 0, row 0 column 0, dots 0</think><answer>0</answer>"
    for word in ("unseen", scenes.ABSENT, "(A)", "(B)", "(C)", "(D)"):
        yield from itertools.repeat(f"<think>{word}</think><answer>{word}</answer>\n{word} 0", 20)


def build(folder: Path) -> Tokenizer:
    """Train the tokenizer and write every file that transformers and vLLM look for into ``folder``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(tokenizer.token_to_id(s)): {"content": s, **flags} for s in SPECIALS},
        "additional_special_tokens": list(SPECIALS[1:]),
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", config)
    bpe = json.loads(tokenizer.to_str())["model"]
    write_json(folder / "vocab.json", bpe["vocab"])
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return tokenizer


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as readable JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
