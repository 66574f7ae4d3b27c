"""Listeners of the pipeline's records."""
