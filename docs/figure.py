"""Draws the README's picture: image with box, overview, crop. ``python docs/figure.py URL`` asks a running server."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ergo_client import Client
from ergo_server.imaging.geometry import PixelBudget, Size
from ergo_train.scenes import BUDGET

IMAGES = Path(__file__).parent / "images"
HEIGHT = 392
GAP = 16


def _panel(picture: Image.Image, caption: str) -> Image.Image:
    width = round(HEIGHT * picture.width / picture.height)
    smooth = Image.Resampling.LANCZOS if picture.height > HEIGHT else Image.Resampling.NEAREST
    panel = Image.new("RGB", (width, HEIGHT + 34), "white")
    panel.paste(picture.resize((width, HEIGHT), smooth))
    ImageDraw.Draw(panel).text((0, HEIGHT + 8), caption, fill="black", font=ImageFont.load_default(17))
    return panel


def main() -> None:
    """Ask about the sample scene and draw what happened."""
    question = "What is the code on the red circle?"
    image = Image.open(IMAGES / "scene.jpg")
    with Client(sys.argv[1]) as client:
        answer = client.ask(IMAGES / "scene.jpg", question, include=["crop"])
    crop = Image.open(io.BytesIO(base64.b64decode(answer.raw["regions"][0]["crop"]["data"].partition(",")[2])))
    overview = image.resize(PixelBudget(BUDGET).view_size(Size(*image.size)), Image.Resampling.BICUBIC)
    ImageDraw.Draw(image).rectangle(answer.region.box, outline="white", width=12)
    panels = [
        _panel(image, f"the image: {image.width} x {image.height}, {answer.visual_tokens.baseline:,} visual tokens"),
        _panel(overview, f"the overview, enlarged here: {answer.visual_tokens.overview} visual tokens"),
        _panel(crop, f'the crop: {answer.visual_tokens.crop} visual tokens: "{answer.text}"'),
    ]
    sheet = Image.new("RGB", (sum(p.width for p in panels) + GAP * 2, HEIGHT + 34), "white")
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width + GAP
    sheet.save(IMAGES / "zoom.png", optimize=True)


if __name__ == "__main__":
    main()
