"""What is asked of the server, apart from how it is sent: the requests, and how their answers are read."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from ergo_client import _reading
from ergo_client._answers import Answer, Estimate, UploadedImage
from ergo_client._errors import InvalidImage
from ergo_client._images import UPLOAD_ID, ImageLike, Sent, sent

T = TypeVar("T")

Zoom = Literal["auto", "always", "never"]
Include = Literal["overview", "crop", "reasoning", "replies", "rewards"]


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image, for `Client.ask_many`; its options are those of `Client.ask`.

    Raises:
        TypeError: ``choices`` or ``include`` is a text, whose letters would be taken one by one.
    """

    image: ImageLike = field(repr=False)
    question: str
    choices: Sequence[str] = ()
    """Options, if it is a multiple-choice question; at most 26."""
    instructions: str = ""
    """How to answer; the model reads them in the answer turn only."""
    model: str = "ergo"
    """``ergo`` zooms, ``ergo-single`` does not."""
    max_visual_tokens: int | None = None
    """Pixel budget of each view, in visual tokens of 28 × 28 pixels; None takes the model's."""
    max_tokens: int | None = None
    """Bounds the visible answer, in tokens; the thinking is not counted."""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    zoom: Zoom = "auto"
    """``auto`` leaves the zoom turn out where the image fits the budget at full resolution."""
    include: Sequence[Include] = ()
    """What else to send back: ``overview`` and ``crop`` (their pixels), ``reasoning``, ``replies``, ``rewards``."""
    timeout: float | None = None
    """Seconds for this question from the moment that it is worked on; None takes the client's."""

    def __post_init__(self) -> None:
        for name, value in (("choices", self.choices), ("include", self.include)):
            if isinstance(value, str):
                raise TypeError(f"{name} is a list of texts, not one text")

    def fields(self) -> dict[str, Any]:
        """Return what the server is told beside the image. What is not given is left to the server."""
        given = {
            "question": self.question,
            "choices": list(self.choices),
            "instructions": self.instructions,
            "model": self.model,
            "max_visual_tokens": self.max_visual_tokens,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "zoom": self.zoom,
            "include": list(self.include),
        }
        return {name: value for name, value in given.items() if value not in (None, "", []) or name == "question"}


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One thing to ask of the server, as often as it takes."""

    path: str
    read: Callable[[Any, str, ImageLike | None], T]
    """Reads the response's JSON, given the request id and the image."""
    fields: dict[str, Any] = field(default_factory=dict)
    image: Sent | None = None
    method: Literal["POST", "DELETE"] = "POST"

    @contextlib.contextmanager
    def body(self) -> Iterator[dict[str, Any]]:
        """Yield httpx2's arguments for the body: JSON where the image is named, otherwise a form with the file in it.

        The file comes last: the server looks at it while it arrives, with the budget that it has read before.

        Raises:
            OSError: the file cannot be opened.
        """
        if self.image is None:
            yield {}
        elif self.image.open is None:
            yield {"json": {"image": self.image.reference, **self.fields}}
        else:
            with self.image.open() as file:
                yield {"data": self.fields, "files": {"image": ("image", file, "application/octet-stream")}}


def asking(question: Question, *, stream: bool = False) -> Call[Answer]:
    """Ask. Errors are those of `sent`."""
    fields = question.fields() | ({"stream": True} if stream else {})
    return Call("v1/vqa", _reading.answer, fields, sent(question.image))


def one_of_many(question: Question, batch: threading.Lock) -> Call[Answer]:
    """Ask one of many questions.

    Args:
        question: which.
        batch: as for `sent`.

    Raises:
        InvalidImage: the image cannot be read, or is none. The others are not to be lost for that.
        ImportError: Pillow is missing, which is no fault of this image.
    """
    with spared(OSError, TypeError, ValueError):
        image = sent(question.image, batch)
    return Call("v1/vqa", _reading.answer, question.fields(), image)


@contextlib.contextmanager
def spared(*errors: type[Exception]) -> Iterator[None]:
    """Turn what an unusable image raises into `InvalidImage`, with the same code as the server's."""
    try:
        yield
    except errors as error:
        raise InvalidImage(str(error), code="image_unreadable", param="image") from error


def estimating(image: ImageLike, model: str, max_visual_tokens: int | None, zoom: Zoom) -> Call[Estimate]:
    """Estimate. Errors are those of `sent`."""
    fields = {"model": model, "zoom": zoom, **_budget(max_visual_tokens)}
    return Call("v1/vqa/estimate", _reading.estimate, fields, sent(image))


def uploading(image: ImageLike, max_visual_tokens: int | None) -> Call[UploadedImage]:
    """Upload. Errors are those of `sent`."""
    return Call("v1/images", _reading.uploaded, _budget(max_visual_tokens), sent(image))


def deleting(uploaded: UploadedImage | str) -> Call[None]:
    """Forget an upload.

    Raises:
        ValueError: a text that is no upload's id.
    """
    name = uploaded if isinstance(uploaded, str) else uploaded.id
    if not UPLOAD_ID.fullmatch(name):
        raise ValueError("the id of an upload is img_ and 24 characters")
    return Call(f"v1/images/{name}", _reading.deleted, method="DELETE")


def _budget(max_visual_tokens: int | None) -> dict[str, int]:
    return {} if max_visual_tokens is None else {"max_visual_tokens": max_visual_tokens}
