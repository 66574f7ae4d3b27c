"""ergo-mini: a small checkpoint of the Qwen2.5-VL architecture that zooms, as package data. See MODEL_CARD.md."""

from pathlib import Path

FOLDER = Path(__file__).parent
"""Holds ``checkpoint/``, in the form that transformers and vLLM load, and ``prompts.toml``."""
