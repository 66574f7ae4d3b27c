"""Pictures and questions as files, for other people's load tools: ``python -m loadtests.dataset FOLDER``.

``vllm.jsonl`` is for ``vllm bench serve --dataset-name custom_image``, ``guidellm.json`` for guidellm, as data of the kind
``json_file``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from loadtests.pictures import MIXES, pool


def write(folder: Path, mix: str, count: int, seed: int) -> None:
    """Write ``count`` pictures of a mix, and the two files that name them with their first questions."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = []
    for number, picture in enumerate(pool(mix, count, seed)):
        path = folder / f"{number:04d}.jpg"
        path.write_bytes(picture.data)
        asked.append((str(path.resolve()), picture.question))
    lines = [json.dumps({"prompt": question, "image_files": [path]}) for path, question in asked]
    (folder / "vllm.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "guidellm.json").write_text(json.dumps([{"question": question, "image": path} for path, question in asked]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mix", choices=list(MIXES), default="usual", help="kinds of images (%(default)s)")
    parser.add_argument("--count", type=int, default=40, help="pictures, each asked about once (%(default)s)")
    parser.add_argument("--seed", type=int, default=90, help="of the pictures (%(default)s)")
    options = parser.parse_args(arguments)
    write(options.folder, options.mix, options.count, options.seed)


if __name__ == "__main__":
    main()
