"""From the server's JSON to records. What does not fit raises one of `WRONG`: it is no ergo-vqa's."""

from __future__ import annotations

import base64
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from ergo_client._answers import (
    Answer,
    AnswerDelta,
    Done,
    Estimate,
    EstimatedTokens,
    Event,
    ImageInfo,
    OverviewMade,
    ReasoningDelta,
    Region,
    RegionFound,
    Rewards,
    Timings,
    TurnUsage,
    UploadedImage,
    Usage,
    View,
    VisualTokens,
)
from ergo_client._images import ImageLike

R = TypeVar("R")

WRONG = (KeyError, TypeError, ValueError, IndexError, AttributeError)
"""What reading something else raises."""


def answer(body: Any, request_id: str, image: ImageLike | None) -> Answer:
    """Read an answer; ``image`` is what it will be painted on."""
    region = body["regions"][0]
    replies = body.get("replies")
    return Answer(
        text=body["answer"],
        choice=body["choice"],
        finish_reason=body["finish_reason"],
        region=_region(region),
        crop=_view(region["crop"]),
        overview=_view(body.get("overview")),
        image=_record(ImageInfo, body["image"]),
        visual_tokens=_record(VisualTokens, body["visual_tokens"]),
        usage=_usage(body["usage"]),
        timings=_record(Timings, body["timings"]),
        reasoning=body.get("reasoning"),
        replies=None if replies is None else tuple(replies),
        rewards=_record(Rewards, body["rewards"]) if "rewards" in body else None,
        model=body["model"],
        id=body["id"],
        request_id=request_id,
        raw=body,
        _image=image,
    )


def estimate(body: Any, request_id: str, image: ImageLike | None) -> Estimate:
    """Read an estimate."""
    view = body["overview"]
    return Estimate(
        model=body["model"],
        image=_record(ImageInfo, body["image"]),
        zoom=body["zoom"],
        overview=View(view["width"], view["height"]),
        visual_tokens=_record(EstimatedTokens, body["visual_tokens"]),
        request_id=request_id,
        raw=body,
    )


def uploaded(body: Any, request_id: str, image: ImageLike | None) -> UploadedImage:
    """Read what is known of an upload."""
    return _record(UploadedImage, body)


def deleted(body: Any, request_id: str, image: ImageLike | None) -> None:
    """Read that an upload is forgotten."""
    if body["deleted"] is not True:
        raise ValueError("not deleted")


def event(name: str, data: Any, request_id: str, image: ImageLike | None) -> Event | None:
    """Read an event of a stream; None for one that a newer server has and this client does not know."""
    match name:
        case "overview":
            return OverviewMade(View(data["width"], data["height"], _png(data["data"])))
        case "region":
            return RegionFound(_region(data), _view(data["crop"]))
        case "reasoning.delta":
            return ReasoningDelta(data["text"])
        case "answer.delta":
            return AnswerDelta(data["text"])
        case "done":
            return Done(answer(data, request_id, image))
    return None


def _record(kind: type[R], data: Any) -> R:
    """Fill a dataclass from the members of the same names; those that a newer server adds are left out."""
    wanted = [(one.name, one.default is MISSING) for one in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: data[name] for name, needed in wanted if needed or name in data})


def _region(data: Any) -> Region:
    x1, y1, x2, y2 = data["box"]
    left, top, right, bottom = data["normalized"]
    seen = None if data["seen"] is None else tuple(data["seen"])
    return _record(Region, {**data, "box": (x1, y1, x2, y2), "normalized": (left, top, right, bottom), "seen": seen})


def _view(data: Any) -> View | None:
    return None if data is None else View(data["width"], data["height"], _png(data.get("data")))


def _png(url: str | None) -> bytes | None:
    return None if url is None else base64.b64decode(url.partition(",")[2])


def _usage(data: Any) -> Usage:
    prompt, completion = data["prompt_tokens_details"], data["completion_tokens_details"]
    turns = tuple(_record(TurnUsage, turn) for turn in data["turns"])
    return _record(Usage, {**data, **prompt, **completion, "turns": turns})
