"""Draws the sample scenes of the page, with their thumbnails. ``python docs/samples.py`` writes them into the package."""

from __future__ import annotations

from PIL import Image

from ergo_server.api.playground import FOLDER
from ergo_train.scenes import HELD_OUT, Scene, scene

SAMPLES: dict[str, tuple[int, tuple[int, int]]] = {
    "scene": (HELD_OUT, (2000, 2000)),
    "scene-landscape": (HELD_OUT + 5, (3000, 2000)),
    "scene-portrait": (HELD_OUT + 188, (2000, 3000)),
    "scene-panorama": (HELD_OUT + 52, (4800, 2000)),
}
"""Seed and size of each; ``static/samples.js`` names them with their questions."""

THUMBNAIL = 160
"""Pixels of the longer side: twice what is shown, for displays of double density."""


def draw(name: str) -> Scene:
    """Draw a sample."""
    seed, size = SAMPLES[name]
    return scene(seed) if name == "scene" else scene(seed, size=size)


def main() -> None:
    """Write every sample and its thumbnail; quality 92 as everywhere that scenes are written."""
    for name in SAMPLES:
        image = draw(name).image
        image.save(FOLDER / "static" / f"{name}.jpg", quality=92)
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        image.save(FOLDER / "static" / f"{name}-small.jpg", quality=80)


if __name__ == "__main__":
    main()
