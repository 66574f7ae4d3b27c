"""ergo-vqa: a server that answers questions about large images by zooming in once.

Importing this package loads neither FastAPI nor torch.
"""

__version__ = "0.1.0"
