"""Servers to put under load where none is named: real vLLM on the CPU, and the gateway in front of it, each its own process."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import support

from ergo_server.api.keys import new_key
from ergo_server.imaging.geometry import MAX_VISUAL_TOKENS
from loadtests.questions import ANSWER_TOKENS

NARROW: dict[str, Any] = {"max_concurrent": 2, "max_queued": 4, "queue_seconds": 2}
"""Settings of a gateway with room for as many as usually ask, and for few more: the peak of a spike finds it full. Who is refused
is told to come back after about `queue_seconds`."""

UNLIMITED = {"requests_per_minute": 0, "concurrent_requests": 0, "visual_tokens_per_minute": 0}
"""The load has one key; it stands for all who ask."""


@dataclass(frozen=True, slots=True)
class Servers:
    """Where they listen."""

    gateway: str
    engine: str | None
    """None: the gateway's engine is in its own process."""
    key: str
    """The gateways' API key. They ask for one so that strangers with other keys are turned away as on the internet."""
    narrow: Callable[[], str]
    """Starts another gateway, with `NARROW` room, on the same engine, unless that is there; returns its URL."""


@contextlib.contextmanager
def started(engine: str, folder: Path) -> Iterator[Servers]:
    """Start the gateway for ergo-mini on loopback; ends it, and what was started for it.

    Args:
        engine: ``vllm`` or ``embedded``.
        folder: takes vLLM's log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        key, line = new_key("load")
        settings: dict[str, object] = {"engine": engine, "api_keys": line, **UNLIMITED}
        url = None
        if engine == "vllm":
            # One step must hold an image at full resolution, which has 2,700 visual tokens. Replies are limited at the engine, as
            # a caller of the gateway limits the visible answer only, and a reply without any is read to its end.
            limits = ("--override-generation-config", json.dumps({"max_new_tokens": ANSWER_TOKENS}))
            flags = ("--max-num-batched-tokens", "4096", *limits)
            url = stack.enter_context(support.vllm(folder / "vllm.log", *flags))
            # ergo-mini knows one budget of 49; more is for comparison at full resolution, whatever it makes of that.
            settings |= {"engine_url": url, "max_visual_tokens": MAX_VISUAL_TOKENS}

        @functools.cache
        def narrow() -> str:
            return stack.enter_context(support.process(**settings, **NARROW)).url

        yield Servers(stack.enter_context(support.process(**settings)).url, url, key, narrow)
