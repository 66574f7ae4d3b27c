"""Servers to put under load where none is named: real vLLM on the CPU, and the gateway in front of it, each its own process."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import support

from ergo_server.imaging.geometry import MAX_VISUAL_TOKENS
from loadtests.questions import ANSWER_TOKENS


@dataclass(frozen=True, slots=True)
class Servers:
    """Where they listen."""

    gateway: str
    engine: str | None
    """None: the gateway's engine is in its own process."""


@contextlib.contextmanager
def started(engine: str, folder: Path) -> Iterator[Servers]:
    """Start the gateway for ergo-mini on loopback; ends it, and what was started for it.

    Args:
        engine: ``vllm`` or ``embedded``.
        folder: takes vLLM's log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        settings: dict[str, object] = {"engine": engine}
        url = None
        if engine == "vllm":
            # One step must hold an image at full resolution, which has 2,700 visual tokens. Replies are limited at the engine, as
            # a caller of the gateway limits the visible answer only, and a reply without any is read to its end.
            limits = ("--override-generation-config", json.dumps({"max_new_tokens": ANSWER_TOKENS}))
            flags = ("--max-num-batched-tokens", "4096", *limits)
            url = stack.enter_context(support.vllm(folder / "vllm.log", *flags))
            # ergo-mini knows one budget of 49; more is for comparison at full resolution, whatever it makes of that.
            settings |= {"engine_url": url, "max_visual_tokens": MAX_VISUAL_TOKENS}
        yield Servers(stack.enter_context(support.process(**settings)).url, url)
