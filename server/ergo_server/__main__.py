"""``ergo-vqa``: the command line."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from ergo_client.cli import add_commands

EXIT_FAILED = 1
EXIT_USAGE = 2
"""As argparse exits on a wrong command line."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    about = "Ask questions about large images: a server, and the commands that ask it."
    parser = argparse.ArgumentParser(prog="ergo-vqa", description=about)
    commands = parser.add_subparsers(dest="command", required=True)

    serve = commands.add_parser(
        "serve", help="start the server", description="Start the server. All else is set by ERGO_… variables."
    )
    serve.add_argument("--host", help="address to listen on (ERGO_HOST, 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on (ERGO_PORT, 8000; 0 takes a free one)")
    serve.set_defaults(run=_serve)

    scene = commands.add_parser(
        "scene",
        help="draw a synthetic scene",
        description="Draw a scene; print its question and answer as JSON. One seed, one scene.",
    )
    scene.add_argument("--seed", type=int, default=1_000_000_000, help="never trained on from 1000000000, the default, on")
    scene.add_argument("--size", type=_size, metavar="WxH", help="pixels; drawn from a list when not given")
    scene.add_argument("out", type=Path, help="where to write it; the ending decides the format (.png, .jpg, .webp)")
    scene.set_defaults(run=_scene)

    add_commands(commands)

    prompts = commands.add_parser("prompts", help="prompts of a checkpoint").add_subparsers(dest="action", required=True)
    importing = prompts.add_parser(
        "import",
        help="make a prompts file from string constants of another project",
        description="Read string constants from a Python or TOML file, never running it; print a file for ERGO_PROMPTS.",
    )
    importing.add_argument("file", type=Path)
    importing.add_argument("--zoom-system", default="SYSTEM_PROMPT", help="name of the system prompt (%(default)s)")
    importing.add_argument("--zoom-user", default="QUESTION_TEMPLATE1", help="name of the zoom turn's template (%(default)s)")
    importing.add_argument("--answer-user", default="QUESTION_TEMPLATE2", help="name of the answer turn's template (%(default)s)")
    importing.set_defaults(run=_import_prompts)

    keys = commands.add_parser("keys", help="API keys").add_subparsers(dest="action", required=True)
    drawing = keys.add_parser(
        "new",
        help="draw a key",
        description="Draw an API key. Its line for ERGO_API_KEYS_FILE goes to standard output, so that >> appends it there; "
        "the key itself, which is kept nowhere, goes to standard error.",
    )
    drawing.add_argument("name", metavar="NAME", type=_tenant, help="the tenant it is for")
    drawing.set_defaults(run=_new_key)

    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
    except ModuleNotFoundError as error:
        extra = "embedded" if (error.name or "") in ("torch", "transformers") else "server"
        print(f"ergo-vqa: {error.name} is not installed; run: pip install 'ergo-vqa[{extra}]'", file=sys.stderr)
        return EXIT_FAILED
    return status


def _serve(args: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from ergo_server.api.app import create_app
    from ergo_server.api.keys import KeysError
    from ergo_server.api.listen import listen, server
    from ergo_server.imaging.work import return_freed_memory
    from ergo_server.protocol.prompts import PromptsError
    from ergo_server.settings import Settings
    from ergo_server.telemetry.logging import configure

    given = {name: value for name in ("host", "port") if (value := getattr(args, name)) is not None}
    try:
        settings = Settings(**given)
        configure(settings.log_level, settings.log_format)
        app = create_app(settings)
        listening = listen(settings.host, settings.port)
    except (KeysError, ValidationError, PromptsError, OSError) as error:
        print(f"ergo-vqa: {error}", file=sys.stderr)
        return EXIT_FAILED
    host, port = listening.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    print(_WELCOME.format(url=f"http://{shown}:{port}", engine=settings.engine, command=_command()), flush=True)
    return_freed_memory()
    running = server(app)
    running.run(sockets=[listening])
    print()  # after the ^C that a terminal shows
    if running.cut_off:
        print(f"ergo-vqa: requests cut off, not finished in time: {running.cut_off}", file=sys.stderr)
        return EXIT_FAILED
    return 0


_WELCOME = """\
ergo-vqa listens on {url} (engine: {engine}). Try:

    the page                {url}/
    its interface           {url}/docs
    a scene to ask about    {command} scene scene.png
    a question about it     curl -F image=@scene.png -F 'question=What is the code on the red circle?' {url}/v1/vqa
    an OpenAI client        base URL {url}/v1, model "ergo"

Ctrl-C ends it, once what is under way is answered; a second one at once."""


def _command() -> str:
    """How the one who started this can call it again: the environment's commands need not be on the PATH."""
    return "ergo-vqa" if shutil.which("ergo-vqa") else os.path.relpath(Path(sys.executable).with_name("ergo-vqa"))


def _scene(args: argparse.Namespace) -> int:
    from ergo_train import scenes

    made = scenes.scene(args.seed, size=args.size)
    try:
        made.image.save(args.out, quality=92)
    except (OSError, ValueError) as error:
        print(f"ergo-vqa: {args.out} cannot be written: {error}", file=sys.stderr)
        return EXIT_FAILED
    facts = {
        "question": made.question,
        "answer": made.answer,
        "box": made.box,
        "landmarks": [{"name": mark.name, "code": mark.code} for mark in made.landmarks],
        "width": made.image.width,
        "height": made.image.height,
        "seed": args.seed,
    }
    print(json.dumps(facts))
    return 0


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and 400 <= int(width) <= 8192 and 400 <= int(height) <= 8192):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT with sides of 400 to 8192 pixels")
    return int(width), int(height)


def _tenant(text: str) -> str:
    from ergo_server.api.keys import is_tenant_name

    if not is_tenant_name(text):
        raise argparse.ArgumentTypeError("a tenant's name is of letters, digits, '.', '_' and '-', and not 'anonymous'")
    return text


def _new_key(args: argparse.Namespace) -> int:
    from ergo_server.api.keys import new_key

    key, line = new_key(args.name)
    print(f"{key}\n    is the key for {args.name}, shown this once; the server gets the line with its SHA-256.", file=sys.stderr)
    print(line)
    return 0


def _import_prompts(args: argparse.Namespace) -> int:
    from ergo_server.protocol.prompts import PromptsError, import_prompts

    try:
        made = import_prompts(
            args.file.read_text(encoding="utf-8"),
            source=str(args.file),
            zoom_system=args.zoom_system,
            zoom_user=args.zoom_user,
            answer_user=args.answer_user,
        )
    except (OSError, UnicodeDecodeError, PromptsError) as error:
        print(f"ergo-vqa: {error}", file=sys.stderr)
        return EXIT_FAILED
    print(made, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
