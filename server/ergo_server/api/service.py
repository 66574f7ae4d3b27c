"""What the routes need of the server: its models and its bounds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request

from ergo_server.api.keys import Tenant
from ergo_server.engine.base import Engine
from ergo_server.errors import ErgoError, RequestError, UnknownModel
from ergo_server.imaging.geometry import MIN_VISUAL_TOKENS, PixelBudget
from ergo_server.imaging.work import ImageWork
from ergo_server.intake.body import RequestLimits
from ergo_server.intake.fetch import Fetcher
from ergo_server.intake.images import Images
from ergo_server.intake.store import ImageStore
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
    created: int
    """Unix time of the start; shown as the models' age."""
    refused: Callable[[str], None]
    """Told the error's code, or ``cancelled``, of a question that ends before a pipeline has it."""
    work: ImageWork
    store: ImageStore
    fetcher: Fetcher
    limits: RequestLimits
    salted: Callable[[Tenant], str]
    """Returns what keeps a tenant's part of the engine's prefix cache apart."""
    charge: Callable[[str, int], None]
    """Told a tenant's name and the visual tokens of what it asked past the pipeline."""

    def tenant(self, request: Request) -> Tenant:
        """Return who asks."""
        tenant: Tenant = request.scope["tenant"]
        return tenant

    def salt(self, request: Request) -> str:
        """Return what keeps the caller's part of the engine's prefix cache apart."""
        return self.salted(self.tenant(request))

    def received(self, request: Request) -> float:
        """Return the seconds that it took to read a request, and to fetch what it names, until now."""
        since: float = request.scope["received_at"]
        return time.perf_counter() - since

    def images(self, request: Request) -> Images:
        """Return where the images of a request come from; they are closed when it is over."""
        return Images(self.work, self.store, self.fetcher, self.tenant(request).name, request.scope["closing"])

    def likely_budget(self, wanted: object) -> PixelBudget:
        """Return the budget for the overview of an image that still arrives; what is wrong with it is said later."""
        try:
            return self.budget(int(str(wanted)) if wanted is not None else None)
        except (RequestError, ValueError):
            return self.budget(None)

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
        except Exception:
            self.refused(ErgoError.code)
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
