"""``ergo-vqa ask`` and ``ergo-vqa estimate``: one question; what it would cost."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ergo_client import Answer, Client, ClientError
from ergo_client.cli.terminal import BOLD, complain, note, saving, styled


def ask(args: argparse.Namespace) -> int:
    """Ask one question; returns the exit status."""
    image = _image(args.image)
    try:
        with Client(args.url, timeout=args.timeout) as client:
            answer = client.ask(
                image,
                args.question,
                choices=args.choice,
                instructions=args.instructions,
                model=args.model,
                zoom=args.zoom,
                max_visual_tokens=args.max_visual_tokens,
                include=["crop"] if args.save_crop else [],
            )
        if args.draw:
            answer.draw(image if isinstance(image, bytes) else None).save(args.draw)
        if args.save_crop and answer.crop is not None:
            answer.crop.save(args.save_crop)
    except (ClientError, OSError, ValueError, ImportError) as error:
        return failed(error)
    if args.json:
        print(json.dumps(_shown(answer), ensure_ascii=False))
        return 0
    print(styled(answer.text, BOLD, sys.stdout))
    if not args.quiet:
        _tell(answer)
        if args.save_crop and answer.crop is None:
            note("crop", "none: there was no zoom")
    return 0


def estimate(args: argparse.Namespace) -> int:
    """Say what questions about images would cost; returns the exit status."""
    status = 0
    with Client(args.url, timeout=args.timeout) as client:
        for name in args.images:
            try:
                found = client.estimate(_image(name), model=args.model, zoom=args.zoom, max_visual_tokens=args.max_visual_tokens)
            except (ClientError, OSError) as error:
                status = failed(error, name)
                continue
            if args.json:
                print(json.dumps({"source": name, **found.raw}))
                continue
            tokens = found.visual_tokens
            print(
                f"{name}: {found.image.width} × {found.image.height}, at most {tokens.total_max:,} visual tokens instead of "
                f"{tokens.baseline:,}"
            )
    return status


def failed(error: Exception, name: str = "") -> int:
    """Say what went wrong; returns the exit status."""
    request_id = error.request_id if isinstance(error, ClientError) else ""
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    complain((f"{name}: " if name and name not in text else "") + text + (f" (request {request_id})" if request_id else ""))
    return 1


def _image(name: str) -> str | bytes:
    """Return what to ask about: ``-`` is standard input."""
    return sys.stdin.buffer.read() if name == "-" else name


def _tell(answer: Answer) -> None:
    region, image = answer.region, answer.image
    if region.outcome == "skipped":
        note("region", f"the whole image, {image.width} × {image.height}: no zoom ({region.reason})")
    elif region.zoomed:
        x1, y1, x2, y2 = region.box
        share = f"{100 * region.area_ratio:.1f} % of {image.width} × {image.height}, magnified {region.magnification:.1f} times"
        note("region", f"{x1},{y1} to {x2},{y2} ({share})")
    else:
        note("region", f"the whole image: the model named none that can be used ({region.reason})")
    note("seen", saving(answer.visual_tokens))
    note("time", f"{answer.timings.total_ms / 1000:.2f} s")


def _shown(answer: Answer) -> dict[str, Any]:
    """Return the server's response; the crop's pixels are in the file that was asked for."""
    (region,) = answer.raw["regions"]
    crop = {**region["crop"], "data": None} if region["crop"] else None
    return {**answer.raw, "regions": [{**region, "crop": crop}], "request_id": answer.request_id}
