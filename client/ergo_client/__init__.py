"""A light client of an ergo-vqa server: ``Client(url).ask("street.jpg", "What does the red sign say?").text``.

`Client` and `AsyncClient` have the same calls; their errors are the tree in ``ergo_client._errors``; `ImageLike` says what an
image may be. Needs httpx2 only; Pillow and numpy are used where they are there and asked for.
"""

from ergo_client._answers import (
    Answer,
    AnswerDelta,
    Done,
    Estimate,
    EstimatedTokens,
    Event,
    ImageInfo,
    OverviewMade,
    Progress,
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
from ergo_client._async import AsyncClient
from ergo_client._calls import Question
from ergo_client._errors import (
    ClientError,
    ImageExpired,
    InvalidImage,
    InvalidRequest,
    NotAllowed,
    RateLimited,
    ServerBusy,
    ServerFailed,
    TimedOut,
    UnexpectedResponse,
    Unreachable,
)
from ergo_client._images import ImageLike
from ergo_client._sync import Client

__all__ = [
    "Answer",
    "AnswerDelta",
    "AsyncClient",
    "Client",
    "ClientError",
    "Done",
    "Estimate",
    "EstimatedTokens",
    "Event",
    "ImageExpired",
    "ImageInfo",
    "ImageLike",
    "InvalidImage",
    "InvalidRequest",
    "NotAllowed",
    "OverviewMade",
    "Progress",
    "Question",
    "RateLimited",
    "ReasoningDelta",
    "Region",
    "RegionFound",
    "Rewards",
    "ServerBusy",
    "ServerFailed",
    "TimedOut",
    "Timings",
    "TurnUsage",
    "UnexpectedResponse",
    "Unreachable",
    "UploadedImage",
    "Usage",
    "View",
    "VisualTokens",
]
