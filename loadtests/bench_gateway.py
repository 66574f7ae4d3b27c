"""What the gateway itself costs, in one run: ``make bench``.

With an engine that replies at once, a request is the gateway's own work. Most of that is work on pixels, whose time the
gateway reports; what is left is HTTP, parsing, validation, accounting. Then the embedded engine shows how much of the zoom
turn the answer turn finds computed. Figures are medians; compare the ratios, not the milliseconds.
"""

from __future__ import annotations

import argparse
import io
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from ergo_client import Answer, Client
from ergo_server.api import app
from ergo_server.api.app import create_app
from ergo_server.api.listen import listen, server
from ergo_server.engine.base import Engine, Sampling
from ergo_server.engine.scripted import ScriptedEngine
from ergo_server.pipeline import Pipeline
from ergo_server.protocol.conversation import Conversation
from ergo_server.settings import Settings
from ergo_server.telemetry.metrics import Metrics
from ergo_train.scenes import HELD_OUT, scene

SIZES = ((1120, 1120), (2240, 1680), (4032, 3024))


@contextmanager
def gateway(engine: Engine | None) -> Iterator[str]:
    """Serve the gateway on a free port of loopback."""
    listening, running = listen("127.0.0.1", 0), server(create_app(Settings(), engine))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()
        listening.close()


def picture(width: int, height: int) -> tuple[bytes, str]:
    """Return a scene of this size as a JPEG, and its question."""
    made = scene(HELD_OUT, size=(width, height))
    with io.BytesIO() as file:
        made.image.save(file, "JPEG", quality=92)
        return file.getvalue(), made.question


def reply(conversation: Conversation, sampling: Sampling) -> str:
    """Point at the middle, then answer."""
    if "</zoom>" in sampling.stop:
        return "<think>there</think><zoom>[60, 60, 90, 90]</zoom>"
    return "<think>it says</think><answer>472</answer>"


def timed(client: Client, image: bytes, question: str, count: int) -> tuple[list[float], list[Answer]]:
    """Ask ``count`` times; returns the seconds and the answers of all but the first, which warms up."""
    seconds, answers = [], []
    for _ in range(count + 1):
        started = time.perf_counter()
        answers.append(client.ask(image, question))
        seconds.append(time.perf_counter() - started)
    return seconds[1:], answers[1:]


def own_time(count: int) -> None:
    """Print the gateway's time beside that of its image work."""
    print("| image | whole request | image work | the rest | rest ÷ whole |\n|---|---|---|---|---|")
    with gateway(ScriptedEngine(reply)) as url, Client(url) as client:
        for width, height in SIZES:
            image, question = picture(width, height)
            seconds, answers = timed(client, image, question, count)
            work = [sum(a.raw["timings"][f"{stage}_ms"] for stage in ("decode", "overview", "crop")) / 1000 for a in answers]
            whole, pixels = statistics.median(seconds), statistics.median(work)
            rest = statistics.median(s - w for s, w in zip(seconds, work, strict=True))
            row = f"{1000 * whole:.1f} ms | {1000 * pixels:.1f} ms | {1000 * rest:.1f} ms | {rest / whole:.2f}"
            print(f"| {width} × {height} JPEG | {row} |")


class Watch:
    """Measures what it costs to be observed: the time in the pipeline's listeners, and in the count of HTTP requests."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, listen: Callable[..., None]) -> Callable[..., None]:
        """Return the same listener, with its time added up."""

        def listening(*given: Any) -> None:
            started = time.perf_counter()
            listen(*given)
            self.seconds += time.perf_counter() - started

        return listening


def observed(count: int) -> None:
    """Print the share of a request that its listeners take; the bar is 2 %."""
    watch = Watch()

    class Watched(Pipeline):
        def __init__(self, *, listeners: Sequence[Callable[..., None]], **given: Any) -> None:
            super().__init__(**given, listeners=tuple(watch.timed(listen) for listen in listeners))

    class Counted(Metrics):
        def observe_http(self, *given: Any) -> None:
            watch.timed(super().observe_http)(*given)

    with (
        mock.patch.object(app, "Pipeline", Watched),
        mock.patch.object(app, "Metrics", Counted),
        gateway(ScriptedEngine(reply)) as url,
        Client(url) as client,
    ):
        image, question = picture(*SIZES[0])
        timed(client, image, question, 5)
        watch.seconds = 0.0
        seconds, _ = timed(client, image, question, count)
    each = watch.seconds / (count + 1)
    share = each / statistics.mean(seconds)
    print(f"\nlisteners: {1e6 * each:.0f} µs of {1000 * statistics.mean(seconds):.1f} ms, {share:.2%} of a request (bar: 2 %)")


def prefix_reuse(count: int) -> None:
    """Print what the answer turn finds computed, and what a repeated question does."""
    with gateway(None) as url, Client(url) as client:
        while True:
            try:
                client.ask(*picture(1120, 1120))
                break
            except Exception as error:  # the checkpoint is still loading: the server says so with 503
                if getattr(error, "status", None) != 503:
                    raise
                time.sleep(0.5)
        shares, gains = [], []
        for number in range(count):
            made = scene(HELD_OUT + 900 + number)
            with io.BytesIO() as file:
                made.image.save(file, "JPEG", quality=92)
                first = client.ask(file.getvalue(), made.question).raw
                again = client.ask(file.getvalue(), made.question).raw
            zoom, answer = first["usage"]["turns"]
            shares.append(answer["cached_tokens"] / zoom["prompt_tokens"])
            gains.append(again["timings"]["zoom_turn_ms"] / first["timings"]["zoom_turn_ms"])
    print(f"\ncached tokens of the answer turn ÷ prompt tokens of the zoom turn: {statistics.median(shares):.2f}")
    print("(above 1: the zoom turn's reply is reused as well as its prompt)")
    print(f"zoom turn of the same question again ÷ the first time: {statistics.median(gains):.2f}")


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20, help="requests a row (%(default)s)")
    count = parser.parse_args().requests
    own_time(count)
    observed(5 * count)
    prefix_reuse(count)


if __name__ == "__main__":
    main()
