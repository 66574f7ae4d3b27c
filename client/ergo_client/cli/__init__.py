"""The commands that ask a server: ``ask``, ``estimate`` and ``batch`` of ``ergo-vqa``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 180.0
"""For one question; longer than the server's own deadline (120 s), so that its error arrives rather than ours."""

BATCH_TIMEOUT_SECONDS = 900.0
"""For one row of a batch, waits for a busy server included."""

_SERVER = "The server is the one at ERGO_URL, or http://127.0.0.1:8000; the API key, if it wants one, is in ERGO_API_KEY."


def add_commands(commands: Any) -> None:
    """Add the commands to a parser.

    Args:
        commands: what ``ArgumentParser.add_subparsers`` returned.
    """
    _add_ask(commands)
    _add_batch(commands)
    _add_estimate(commands)


def _add_ask(commands: Any) -> None:
    parser = commands.add_parser(
        "ask",
        help="ask about an image",
        description="Ask a question about an image. The answer goes to standard output, how it was found to standard error.",
        epilog=_SERVER + " Exit status: 0 answered, 1 not answered, 2 wrong command line.",
    )
    parser.add_argument("image", metavar="IMAGE", help="file, address, id of an upload, or - for standard input")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument("--choice", action="append", default=[], metavar="TEXT", help="an option to choose from; once for each")
    parser.add_argument("--instructions", default="", metavar="TEXT", help="how to answer; shown in the answer turn only")
    _add_options(parser, TIMEOUT_SECONDS)
    parser.add_argument("--json", action="store_true", help="print the server's whole response")
    parser.add_argument("--save-crop", type=Path, metavar="OUT.png", help="write the region as the model saw it")
    parser.add_argument("--draw", type=Path, metavar="OUT.png", help="write the image with the region drawn on it (needs pillow)")
    parser.add_argument("-q", "--quiet", action="store_true", help="the answer, and nothing else")
    parser.set_defaults(run=_run_ask)


def _add_batch(commands: Any) -> None:
    parser = commands.add_parser(
        "batch",
        help="ask many questions",
        description="Ask the questions of a file and write one line of JSON for each, in their order. Killed, or stopped with "
        "Ctrl-C, the same command goes on where it was.",
        epilog="A row has image (a path from the input's folder, an address or, in Parquet, bytes), question, and perhaps "
        "choices (in CSV a JSON list, or with | between them), instructions and max_visual_tokens; all its columns but the "
        f"image's bytes are repeated in the output. {_SERVER} Exit status: 0 all rows answered, 1 not finished, 2 wrong command "
        "line, 3 finished with errors in some rows, 130 stopped with Ctrl-C.",
    )
    parser.add_argument(
        "input", metavar="IN", type=Path, help="file that ends in .jsonl, .csv or .parquet, folder of images, or - for JSON lines"
    )
    parser.add_argument("output", metavar="OUT.jsonl", type=Path)
    parser.add_argument("--question", metavar="TEXT", help="for rows without one, and for a folder")
    parser.add_argument("--concurrency", type=_positive, default=8, metavar="N", help="questions at a time (%(default)s)")
    parser.add_argument("--retry-errors", action="store_true", help="ask rows again that hold an error from an earlier run")
    _add_options(parser, BATCH_TIMEOUT_SECONDS)
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=_run_batch)


def _add_estimate(commands: Any) -> None:
    parser = commands.add_parser(
        "estimate",
        help="say what a question would cost",
        description="Count the visual tokens of a question from the image's header; the model is not asked.",
        epilog=_SERVER + " Exit status: 0 all counted, 1 not all, 2 wrong command line.",
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="file, id of an upload, or - for standard input")
    _add_options(parser, TIMEOUT_SECONDS)
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each image")
    parser.set_defaults(run=_run_estimate)


def _add_options(parser: argparse.ArgumentParser, timeout: float) -> None:
    parser.add_argument("--model", default="ergo", help="ergo zooms, ergo-single does not (%(default)s)")
    parser.add_argument(
        "--zoom",
        choices=("auto", "always", "never"),
        default="auto",
        help="auto leaves the zoom turn out where the image fits the budget (%(default)s)",
    )
    parser.add_argument("--max-visual-tokens", type=_positive, metavar="N", help="pixel budget of each view (the model's own)")
    parser.add_argument("--url", help="the server's base URL, without /v1 (ERGO_URL)")
    parser.add_argument("--timeout", type=float, default=timeout, metavar="SECONDS", help="for one question (%(default)g)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


# The commands are imported when they are run: they need the client, and the other commands do not.


def _run_ask(args: argparse.Namespace) -> int:
    from ergo_client.cli.ask import ask

    return ask(args)


def _run_estimate(args: argparse.Namespace) -> int:
    from ergo_client.cli.ask import estimate

    return estimate(args)


def _run_batch(args: argparse.Namespace) -> int:
    from ergo_client.cli.batch import run

    return run(args)
