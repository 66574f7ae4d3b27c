"""Pixels. Knows no model and no HTTP."""
