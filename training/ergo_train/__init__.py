"""Synthetic scenes, and the training of ergo-mini on them."""
