"""Bytes in: request bodies, and the images in them."""
