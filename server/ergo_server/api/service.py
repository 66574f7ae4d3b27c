"""What the routes need of the server: its models and its bounds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from starlette.requests import ClientDisconnect

from ergo_server.engine.base import Engine
from ergo_server.errors import ErgoError, RequestError, UnknownModel
from ergo_server.imaging.geometry import MIN_VISUAL_TOKENS, PixelBudget
from ergo_server.pipeline import Pipeline

MODELS = ("ergo", "ergo-single", "ergo-raw")
"""With zoom, without, and the engine as it is."""


@dataclass(frozen=True, slots=True)
class Service:
    """Handed to every route."""

    engine: Engine
    zooming: Pipeline
    default_visual_tokens: int
    max_visual_tokens: int
    max_pixels: int
    created: int
    """Unix time of the start; shown as the models' age."""
    refused: Callable[[str], None]
    """Told the error's code, or ``cancelled``, of a question that ends before a pipeline has it."""

    @contextlib.contextmanager
    def accepting(self) -> Iterator[None]:
        """Report what is refused within: a question that never reaches a pipeline leaves no record there."""
        try:
            yield
        except ErgoError as error:
            self.refused(error.code)
            raise
        except ClientDisconnect:
            self.refused("cancelled")
            raise

    def pipeline(self, model: str) -> Pipeline:
        """Return the pipeline behind a model name.

        Raises:
            UnknownModel: `ergo-raw` has no pipeline, other names are unknown.
        """
        if model not in ("ergo", "ergo-single"):
            raise UnknownModel(f"there is no model {model[:64]!r} here; there are ergo and ergo-single", param="model")
        return self.zooming

    def budget(self, wanted: int | None) -> PixelBudget:
        """Return the pixel budget for a request.

        Raises:
            RequestError: outside the model's bounds.
        """
        tokens = self.default_visual_tokens if wanted is None else wanted
        if not MIN_VISUAL_TOKENS <= tokens <= self.max_visual_tokens:
            bounds = f"between {MIN_VISUAL_TOKENS} and {self.max_visual_tokens}"
            raise RequestError(f"max_visual_tokens must be {bounds} with this model", param="max_visual_tokens")
        return PixelBudget(tokens)
