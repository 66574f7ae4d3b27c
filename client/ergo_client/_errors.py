"""Every way in which a call can fail, as one tree: one class for each thing that its caller can do about it.

    ClientError
    ├── InvalidRequest        change the request: a field, its size, the model's name
    ├── InvalidImage          take another image: this one is none, is broken, or is more than the server takes
    ├── ImageExpired          upload the image again
    ├── NotAllowed            give an API key that the server knows
    ├── RateLimited           ask less often; ``retry_after`` says when again
    ├── ServerBusy            ask later, or another server; ``retry_after`` says when
    ├── ServerFailed          report it, with the request id
    ├── TimedOut              give it more time, or ask again
    ├── Unreachable           is the URL right, does the server run, did the network hold?
    └── UnexpectedResponse    is the URL right? What answered is no ergo-vqa, or its URL has something after the host

`RateLimited`, `ServerBusy`, `Unreachable` and the 502 of `ServerFailed` come only after the retries that a client was allowed.
Beside this tree a call raises what its caller's own arguments cause: ``OSError`` for a file that cannot be read, ``TypeError``
and ``ValueError`` for what is no image or no option, ``ImportError`` where Pillow is needed and missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any


class ClientError(Exception):
    """A call has failed. ``str()`` is the message; a traceback shows the request id below it.

    Attributes:
        message: what was wrong, in a sentence.
        status: HTTP status; 0 where there was no answer, 200 where a stream had begun.
        code: the server's machine-readable code; empty where something else failed.
        param: the field of the request that is at fault, if one is.
        request_id: what to look for in the server's log; also where no answer came, if the request was sent.
        retry_after: seconds after which the same call may succeed, if the server said so.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        code: str = "",
        param: str | None = None,
        request_id: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after
        if request_id:
            self.add_note(f"request id: {request_id}")


class InvalidRequest(ClientError):
    """The server cannot do what was asked: a field is missing or out of bounds, the model is unknown, the body too large."""


class InvalidImage(ClientError):
    """The image is none, is broken, or is larger, longer or slower to decode than the server allows."""


class ImageExpired(ClientError):
    """The uploaded image is not there, or not any more; upload it again."""


class NotAllowed(ClientError):
    """The server wants an API key that it knows."""


class RateLimited(ClientError):
    """The key's share of requests, visual tokens or uploads is used up for now."""


class ServerBusy(ClientError):
    """The server has as much work as it takes, is stopping, or its engine is not there."""


class ServerFailed(ClientError):
    """The server, or its engine, broke; the request id names it in the log."""


class TimedOut(ClientError):
    """The call took longer than it was given here (status 0), or than the server gives one (408, 504)."""


class Unreachable(ClientError):
    """No connection, or one that broke: before an answer (status 0), or in its middle."""


class UnexpectedResponse(ClientError):
    """Something answered, but not as ergo-vqa does."""


_BY_CODE: dict[str, type[ClientError]] = {
    "invalid_request": InvalidRequest,
    "context_length_exceeded": InvalidRequest,
    "request_too_large": InvalidRequest,
    "unsupported_media_type": InvalidRequest,
    "method_not_allowed": InvalidRequest,
    "model_not_found": InvalidRequest,
    "image_not_found": ImageExpired,
    "not_found": UnexpectedResponse,
    "invalid_api_key": NotAllowed,
    "rate_limit_exceeded": RateLimited,
    "request_timeout": TimedOut,
    "engine_timeout": TimedOut,
    "overloaded": ServerBusy,
    "engine_busy": ServerBusy,
    "engine_unavailable": ServerBusy,
    "engine_error": ServerFailed,
    "engine_failed": ServerFailed,
    "engine_rejected": ServerFailed,
    "internal_error": ServerFailed,
}
"""Codes of the server whose name does not begin with ``image_``."""

_BY_STATUS: dict[int, type[ClientError]] = {
    400: InvalidRequest,
    401: NotAllowed,
    403: NotAllowed,
    405: InvalidRequest,
    408: TimedOut,
    413: InvalidRequest,
    415: InvalidRequest,
    422: InvalidRequest,
    429: RateLimited,
    500: ServerFailed,
    502: ServerFailed,
    503: ServerBusy,
    504: TimedOut,
}
"""For codes of a newer server, and for proxies, which answer in a form of their own."""


def failure(body: object, status: int, headers: Mapping[str, str], request_id: str) -> ClientError:
    """Return the error that a response stands for.

    Args:
        body: what its JSON holds; None if it is not JSON.
        status: of the response.
        headers: of the response.
        request_id: of the request.
    """
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return _foreign(status, headers, request_id)
    code, param = _text(error.get("code")), _text(error.get("param"))
    return _kind(code, status)(
        _text(error.get("message")) or f"status {status}",
        status=status,
        code=code,
        param=param or None,
        request_id=request_id,
        retry_after=_retry_after(headers),
    )


def _kind(code: str, status: int) -> type[ClientError]:
    if code in _BY_CODE:
        return _BY_CODE[code]
    return InvalidImage if code.startswith("image_") else _BY_STATUS.get(status, UnexpectedResponse)


def _foreign(status: int, headers: Mapping[str, str], request_id: str) -> ClientError:
    """Return the error for an answer in another form than the server's."""
    hint = f"; it redirects to {headers['location'][:200]}, which is not followed" if "location" in headers else ""
    kind = _BY_STATUS.get(status, UnexpectedResponse)
    text = f"status {status}, and not in the form of ergo-vqa{hint}"
    return kind(text, status=status, request_id=request_id, retry_after=_retry_after(headers))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Read how long to wait, in seconds: ``retry-after-ms``, which the server sends where it knows better than to the second, or
    ``retry-after`` as a number or a date."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        if re.fullmatch(r"\d{1,9}(\.\d+)?", value := headers.get(name, "").strip()):
            return unit * float(value)
    then = _date(headers.get("retry-after", ""))
    # The two clocks need not agree, so that the date is held against the server's own where it tells.
    now = _date(headers.get("date", "")) or datetime.now(UTC)
    return max(0.0, (then - now).total_seconds()) if then else None


def _date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
