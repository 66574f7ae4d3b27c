"""Asks a question about a drawn scene: that there is a box, tokens, and an answer turn that finds the zoom turn's work.

Run by `helm test` in the gateway's image, with the gateway's URL; needs what that image holds and nothing else.
"""

import sys
import tempfile
from pathlib import Path

from ergo_client import Client
from ergo_train.scenes import scene

PATIENCE_SECONDS = 300
"""An engine that has just started compiles while it answers for the first time."""

# Another than the tests draw, and larger than any pixel budget, so that there is something to zoom into.
made = scene(1_000_000_007, size=(4096, 3072))
with tempfile.TemporaryDirectory() as folder, Client(sys.argv[1], timeout=PATIENCE_SECONDS) as client:
    image = Path(folder) / "scene.png"
    made.image.save(image)
    answer = client.ask(image, made.question, zoom="always")

turns = {turn.turn: turn for turn in answer.usage.turns}
print(f"{made.question} {answer.text!r}, drawn: {made.answer!r}")
print(f"region {answer.region.box} ({answer.region.outcome}); visual tokens {answer.visual_tokens.total}")
print(f"prompt tokens {turns['zoom'].prompt_tokens} + {turns['answer'].prompt_tokens}, reused {turns['answer'].cached_tokens}")

faults = []
if answer.region.outcome not in ("zoomed", "clamped"):
    faults.append(f"no box: {answer.region.outcome}, {answer.region.reason}")
if not 0 < answer.visual_tokens.total < answer.visual_tokens.baseline:
    faults.append("visual tokens are not between nothing and the baseline")
if answer.visual_tokens.source != "engine":
    faults.append("the engine does not count visual tokens: start it with --enable-prompt-tokens-details")
if not turns["answer"].cached_tokens:
    faults.append("the answer turn found nothing in the prefix cache: caching is off, or another engine got it")
for fault in faults:
    print(f"fault: {fault}", file=sys.stderr)
sys.exit(1 if faults else 0)
