"""Asking a server. Depends on httpx2 only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

TIMEOUT_SECONDS = 180.0
"""Longer than the server's own deadline for a request (120 s), so that its error arrives rather than ours."""


class RequestFailed(Exception):
    """The server answered with an error, or could not be reached.

    Attributes:
        status: HTTP status; 0 where there was no answer.
        code: the server's machine-readable code.
        request_id: what to look for in its log.
    """

    def __init__(self, message: str, *, status: int = 0, code: str = "", request_id: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.request_id = request_id


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """What was spent on seeing."""

    overview: int
    crop: int
    total: int
    baseline: int
    saved_ratio: float


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, and how it was found."""

    text: str
    choice: int | None
    outcome: str
    """What became of the zoom: zoomed, clamped, no_box, invalid_box or skipped."""
    box: tuple[int, int, int, int]
    """The region that was cropped, in upright pixels of the image."""
    visual_tokens: VisualTokens
    raw: dict[str, Any] = field(repr=False)
    """The whole response."""


class Client:
    """A connection to a server; close it, or use it as a context manager.

    Args:
        url: the server's base URL, without ``/v1``.
        transport: replaces the network in tests.
    """

    def __init__(self, url: str, *, transport: httpx2.BaseTransport | None = None) -> None:
        self._http = httpx2.Client(base_url=url, timeout=TIMEOUT_SECONDS, transport=transport)

    def ask(
        self,
        image: str | Path | bytes,
        question: str,
        *,
        choices: Sequence[str] = (),
        model: str = "ergo",
        max_visual_tokens: int | None = None,
        include: Sequence[str] = (),
    ) -> Answer:
        """Ask about an image.

        Args:
            image: a path, or the encoded file.
            question: what to find out.
            choices: options, if it is a multiple-choice question.
            model: ``ergo`` zooms, ``ergo-single`` does not.
            max_visual_tokens: pixel budget of each view; None takes the model's.
            include: of ``crop``, ``reasoning`` and ``replies``, what else to send back in ``raw``.

        Raises:
            RequestFailed: the server refused, failed, or was not there.
            OSError: the file cannot be read.
        """
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        fields: dict[str, Any] = {"question": question, "choices": list(choices), "model": model, "include": list(include)}
        if max_visual_tokens is not None:
            fields["max_visual_tokens"] = str(max_visual_tokens)
        try:
            response = self._http.post("/v1/vqa", data=fields, files={"image": ("image", data, "application/octet-stream")})
        except httpx2.HTTPError as error:
            raise RequestFailed(f"no answer: {error}") from error
        return _read(response)

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(response: httpx2.Response) -> Answer:
    request_id = response.headers.get("x-request-id", "")
    try:
        body = response.json()
        if response.status_code != 200:
            error = body["error"]
            raise RequestFailed(error["message"], status=response.status_code, code=error["code"], request_id=request_id)
        region, tokens = body["regions"][0], body["visual_tokens"]
        x1, y1, x2, y2 = region["box"]
        return Answer(
            text=body["answer"],
            choice=body["choice"],
            outcome=region["outcome"],
            box=(x1, y1, x2, y2),
            visual_tokens=VisualTokens(
                tokens["overview"], tokens["crop"], tokens["total"], tokens["baseline"], tokens["saved_ratio"]
            ),
            raw=body,
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise RequestFailed(
            f"status {response.status_code}, and not a body of ergo-vqa", status=response.status_code, request_id=request_id
        ) from error
