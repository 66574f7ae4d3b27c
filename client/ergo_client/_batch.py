"""What both clients' ``ask_many`` have in common."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from ergo_client._answers import Answer, Progress
from ergo_client._errors import ClientError

Result = Answer | ClientError

AHEAD = 2
"""Questions that are taken and not yet yielded, by those worked on at a time: enough that a slow one does not stop the others at
once, and no more than a reader who stops would have wasted."""


class Batch:
    """One batch.

    Args:
        concurrency: questions worked on at a time.
        progress: told of each result before it is yielded.

    Raises:
        ValueError: ``concurrency`` is none.

    Attributes:
        reading: held while an image is read that several questions may name.
    """

    def __init__(self, concurrency: int, progress: Callable[[Progress], None] | None) -> None:
        if concurrency < 1:
            raise ValueError("concurrency must be at least 1")
        self.concurrency = concurrency
        self.window = AHEAD * concurrency
        self.reading = threading.Lock()
        self._progress = progress
        self._so_far = Progress(0, 0, 0, 0)

    def counted(self, result: Result) -> Result:
        """Count a result, and tell of it."""
        self._so_far = _further(self._so_far, result)
        if self._progress is not None:
            self._progress(self._so_far)
        return result


def _further(so_far: Progress, result: Result) -> Progress:
    if isinstance(result, ClientError):
        return replace(so_far, done=so_far.done + 1, failed=so_far.failed + 1)
    tokens = result.visual_tokens
    return replace(
        so_far,
        done=so_far.done + 1,
        visual_tokens=so_far.visual_tokens + tokens.total,
        baseline=so_far.baseline + tokens.baseline,
    )
