"""Every error the server can name, as one tree.

    ErgoError
    ├── RequestError                the caller must change something                      400
    │   ├── BodyTooLarge                                                                  413
    │   ├── UnsupportedBody         a content type no route reads                         415
    │   ├── BodyTooSlow             it did not arrive in time                             408
    │   ├── Unauthenticated         no API key, or none that is known                     401
    │   ├── RateLimited             the key's share is used up                            429
    │   ├── NotFound                a path, a model, an uploaded image                    404
    │   │   ├── UnknownModel
    │   │   └── UnknownImage
    │   ├── MethodNotAllowed                                                              405
    │   └── ImageError              the bytes are no image we can use
    │       ├── ImageUnreadable     not an image, truncated, corrupt                      422
    │       ├── ImageUnsupported    a format outside the allowlist                        415
    │       ├── ImageTooLarge       more pixels or bytes than the limit                   413
    │       ├── ImageAspect         longer than 200 : 1                                   422
    │       ├── ImageTooSlow        decoding took longer than the limit                   422
    │       └── ImageNotFetched     a remote image could not, or may not, be fetched      422
    ├── Overloaded                  the server has as much work as it takes, or is stopping   503
    └── EngineError                 the engine, not the caller, is at fault
        ├── EngineUnavailable       refused, unreachable, starting                        503
        ├── EngineBusy              its queue is full                                     503
        ├── EngineTimeout           a turn or the request passed its deadline             504
        ├── EngineRejected          it refused what we sent (a 4xx of the engine)         502
        │   └── ContextTooLong      the conversation does not fit its context: the caller's to mend      400
        └── EngineFailed            it broke while answering                              502

An error carries what a client needs to act: an HTTP status, a machine-readable ``code``, the parameter at fault and, where
waiting helps, seconds until a retry makes sense. ``api/errors.py`` turns any of them into the one envelope. The class says
who is at fault, so no code needs to compare messages. Texts never contain prompts, answers, URLs or keys.
"""

from __future__ import annotations

from typing import ClassVar


class ErgoError(Exception):
    """Base of all errors that the server raises on purpose.

    Args:
        message: one sentence for the caller: what was wrong and the limit that applied.
        param: the request field at fault, if one is.
        retry_after: seconds after which the same request may succeed, if waiting helps.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class RequestError(ErgoError):
    """The request is wrong; sending it again unchanged fails again."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class BodyTooLarge(RequestError):
    """The body is longer than the limit."""

    status = 413
    code = "request_too_large"


class UnsupportedBody(RequestError):
    """The content type is none that the route reads."""

    status = 415
    code = "unsupported_media_type"


class BodyTooSlow(RequestError):
    """The body did not arrive in time."""

    status = 408
    code = "request_timeout"


class Unauthenticated(RequestError):
    """No API key, or none that is known; the text is the same for both."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class RateLimited(RequestError):
    """The key's share of requests or visual tokens is used up for now."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class NotFound(RequestError):
    """No such path."""

    status = 404
    type = "not_found_error"
    code = "not_found"


class UnknownModel(NotFound):
    """No such model name."""

    code = "model_not_found"


class UnknownImage(NotFound):
    """No uploaded image of that name, or no longer, or another tenant's."""

    code = "image_not_found"


class MethodNotAllowed(RequestError):
    """The path exists, the method does not."""

    status = 405
    code = "method_not_allowed"


class ImageError(RequestError):
    """The bytes are no image that the server can use."""

    status = 422
    code = "image_invalid"


class ImageUnreadable(ImageError):
    """Not an image, truncated, or corrupt."""

    code = "image_unreadable"


class ImageUnsupported(ImageError):
    """An image, but of a format outside the allowlist."""

    status = 415
    code = "image_format_unsupported"


class ImageTooLarge(ImageError):
    """More pixels or bytes than the limit; found from the header, before decoding."""

    status = 413
    code = "image_too_large"


class ImageAspect(ImageError):
    """More than 200 times longer than wide; the Qwen processors refuse such images."""

    code = "image_aspect_unsupported"


class ImageTooSlow(ImageError):
    """Decoding took longer than the limit."""

    code = "image_too_slow"


class ImageNotFetched(ImageError):
    """A remote image that could not, or may not, be fetched."""

    code = "image_fetch_blocked"


class Overloaded(ErgoError):
    """The server has as much work as it takes on, or is stopping."""

    status = 503
    type = "overloaded_error"
    code = "overloaded"


class EngineError(ErgoError):
    """The engine did not do its part; the request itself may be fine."""

    status = 502
    code = "engine_error"


class EngineUnavailable(EngineError):
    """The engine refused the connection, cannot be reached, or is still starting."""

    status = 503
    code = "engine_unavailable"


class EngineBusy(EngineError):
    """The engine's own queue is full."""

    status = 503
    code = "engine_busy"


class EngineTimeout(EngineError):
    """The deadline of a turn or of the request passed."""

    status = 504
    code = "engine_timeout"


class EngineRejected(EngineError):
    """The engine refused what the server sent it."""

    code = "engine_rejected"


class ContextTooLong(EngineRejected):
    """The conversation does not fit the engine's context; only a shorter one, or a smaller budget, will."""

    status = 400
    type = "invalid_request_error"
    code = "context_length_exceeded"


class EngineFailed(EngineError):
    """The engine broke while it was answering."""

    code = "engine_failed"
