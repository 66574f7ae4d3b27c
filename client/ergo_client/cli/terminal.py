"""What is shown to people: on standard error, so that standard output holds answers only."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

from ergo_client import Progress, VisualTokens

BOLD, DIM, RED = "1", "2", "31"
"""Select graphic rendition (ECMA-48, 8.3.117)."""

BAR = 24
"""Columns of a progress bar: with what stands beside it, it fits the usual 80."""

REDRAW_SECONDS = 0.1
"""Between two states of the progress bar, as often as anyone can read."""

REPORT_SECONDS = 30.0
"""Between two lines of progress where no terminal can redraw one."""


def styled(text: str, style: str, stream: TextIO) -> str:
    """Return the text in a style where ``stream`` is a terminal that shows it; https://no-color.org is honoured."""
    return f"\x1b[{style}m{text}\x1b[0m" if _draws(stream) and "NO_COLOR" not in os.environ else text


def _draws(stream: TextIO) -> bool:
    """Say whether it is a terminal that can do more than write one line after the other."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def note(name: str, text: str) -> None:
    """Print one named fact."""
    print(styled(f"{name:8}", DIM, sys.stderr) + text, file=sys.stderr)


def complain(text: str) -> None:
    """Print what went wrong."""
    print(styled("ergo-vqa:", RED, sys.stderr), text, file=sys.stderr)


def saving(tokens: VisualTokens) -> str:
    """Say what was spent instead of what."""
    return f"{tokens.total:,} visual tokens instead of {tokens.baseline:,} ({_saved(tokens.total, tokens.baseline)})"


def _saved(spent: int, baseline: int) -> str:
    ratio = 100 * (1 - spent / baseline) if baseline else 0.0
    return f"{ratio:.1f} % saved" if ratio >= 0 else f"{-ratio:.1f} % more"


class ProgressBar:
    """How far a batch is: redrawn on a terminal, a line now and then elsewhere.

    Args:
        total: rows in all; None where nobody knows.
        skipped: rows that were answered before this run.
        quiet: show nothing.
    """

    def __init__(self, total: int | None, skipped: int, *, quiet: bool) -> None:
        self._total = total
        self._skipped = skipped
        self._stream = sys.stderr
        self._redraws = _draws(self._stream)
        self._every = REDRAW_SECONDS if self._redraws else REPORT_SECONDS
        self._quiet = quiet
        self._started = time.monotonic()
        self._shown_at = self._started if not self._redraws else 0.0
        self._width = 0

    def show(self, progress: Progress, *, last: bool = False) -> None:
        """Show the state, if it is time to."""
        now = time.monotonic()
        if self._quiet or (now - self._shown_at < self._every and not last):
            return
        self._shown_at = now
        line = self.line(progress, now - self._started)
        if not self._redraws:
            print(line, file=self._stream)
            return
        # What is left of a longer line before is overwritten.
        self._stream.write("\r" + line.ljust(self._width) + ("\n" if last else ""))
        self._stream.flush()
        self._width = len(line)

    def line(self, progress: Progress, seconds: float) -> str:
        """Return the state as one line.

        Args:
            progress: of this run.
            seconds: since it began.
        """
        at, rate = self._skipped + progress.done, progress.done / seconds if seconds > 0 else 0.0
        parts = [f"{at:,}" if self._total is None else f"{at:,}/{self._total:,}", f"{rate:.1f}/s"]
        if progress.baseline:
            parts.append(f"{_saved(progress.visual_tokens, progress.baseline)} of {progress.baseline:,} visual tokens")
        if progress.failed:
            parts.append(f"{progress.failed:,} failed")
        if self._total is not None and self._total > at and rate:
            parts.append(f"{_clock((self._total - at) / rate)} left")
        if not self._total or not self._redraws:
            return "  ".join(parts)
        full = BAR * min(at, self._total) // self._total
        return f"[{'#' * full}{'.' * (BAR - full)}]  " + "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
