"""vLLM over HTTP.

Facts this file rests on (measured on vLLM 0.32, research of this project):
    * Prefix and image caches are keyed by the encoded bytes of an image: the very same ``data:`` URL must be sent again.
    * ``metrics`` holds the engine's own times when the server runs with ``--enable-per-request-metrics``.
    * ``usage.prompt_tokens_details`` holds ``cached_tokens`` and ``multimodal_tokens.image`` when the server runs with
      ``--enable-prompt-tokens-details``; streaming sends it in a last chunk without choices.
    * ``stop`` with ``include_stop_str_in_output`` keeps the closing tag.
    * A model's generation_config.json fills in sampling parameters that a request leaves out: all are sent, always.
    * With its LRU image cache, a request that is refused or cancelled after its image was processed leaves the cache
      inconsistent: the next request with that image gets one ``500 Internal server error`` before any token, and the one
      after that works (vllm-project/vllm #43941). Hence one retry with full data, within a budget.
    * When the client closes the connection, the request is aborted within a tenth of a second. No field and no header tells vLLM
      a deadline: closing is how it learns that one has passed.
    * ``cache_salt`` goes into the hash of a prompt's first block: under another salt nothing of a prefix is found, and
      ``cached_tokens`` are 0. It must be a non-empty string of at most 128 characters without ``@``, ``/``, ``\\`` and NUL.
    * The caches of images, processed and encoded, are not salted. No ``uuid`` is ever sent, so their only key is the hash of an
      image's bytes: nobody gets another's features. Whoever has the very bytes can still tell by timing that they were seen.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import httpx2

from ergo_server.engine.base import Delta, EngineStatus, Generation, Sampling, Usage, address, within
from ergo_server.engine.retries import RetryBudget
from ergo_server.errors import (
    ContextTooLong,
    EngineBusy,
    EngineError,
    EngineFailed,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
)
from ergo_server.imaging.view import View
from ergo_server.protocol.conversation import Conversation, Message

CONNECT_SECONDS = 5.0
"""A server on the same network accepts within milliseconds, or is not there."""

READ_SECONDS = 120.0
"""Longest silence within a stream; the pipeline's deadlines are shorter and end a turn before that."""

MAX_LINE = 1 << 20
"""Characters of one event; a chunk of one token has under a thousand."""


class _Retryable(Exception):
    """The attempt failed before any token, in a way that a second attempt is known to cure."""

    def __init__(self, error: EngineError) -> None:
        super().__init__(str(error))
        self.error = error


class VllmEngine:
    """One vLLM server.

    Args:
        url: its base URL without ``/v1``, as in ``http://engine:8000``.
        model: the name it serves the model under; None takes the first it lists.
        api_key: sent as bearer token, if the server wants one.
        session_headers: names under which the session key is sent, for the routers in use.
        max_connections: most requests in flight; more wait for one to end.
        retries: how many failures before any token may be met with a second attempt; None: a budget with the usual numbers.
        trace_headers: returns the headers by which a request joins its caller's trace; called once for each, where it is made.
        transport: replaces the network in tests.
    """

    name = "vllm"

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        session_headers: tuple[str, ...] = ("x-session-id",),
        max_connections: int = 256,
        retries: RetryBudget | None = None,
        trace_headers: Callable[[], Mapping[str, str]] = dict,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._given_model = model
        self._model = model
        self._session_headers = session_headers
        self._retries = retries or RetryBudget()
        self._trace_headers = trace_headers
        self._server = address(url)
        self._client = httpx2.AsyncClient(
            base_url=url.rstrip("/"),
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
            trust_env=False,  # a proxy named in the environment is for the way out, not for the engine
            transport=transport,
        )

    def generate(
        self,
        conversation: Conversation,
        sampling: Sampling,
        *,
        session: str = "",
        salt: str = "",
        deadline: float | None = None,
    ) -> AsyncGenerator[Delta | Generation, None]:
        """Continue a conversation over ``POST /v1/chat/completions``, streaming."""
        return within(deadline, self._generate(conversation, sampling, session, salt))

    async def status(self) -> EngineStatus:
        """Ask ``/health`` and, once, ``/v1/models``."""
        if self._client.is_closed:
            return EngineStatus(False, self._model, "closed")
        try:
            response = await self._client.get("/health", timeout=CONNECT_SECONDS)
            if response.status_code != 200:
                return EngineStatus(False, self._model, f"health check answered {response.status_code}")
            return EngineStatus(True, await self._served_model())
        except (httpx2.HTTPError, EngineError) as error:
            return EngineStatus(False, self._model, type(error).__name__)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    # --- the request --------------------------------------------------------------------------------------------------

    async def _generate(
        self, conversation: Conversation, sampling: Sampling, session: str, salt: str
    ) -> AsyncGenerator[Delta | Generation, None]:
        body = await self._body(conversation, sampling, salt)
        headers = {"content-type": "application/json"} | {name: session for name in self._session_headers if session}
        headers |= self._trace_headers()
        self._retries.earn()
        for last in (False, True):
            try:
                async with contextlib.aclosing(self._attempt(body, headers)) as pieces:
                    async for piece in pieces:
                        yield piece
                return
            except _Retryable as failed:
                if last or self._client.is_closed or not self._retries.take():
                    raise failed.error from failed

    async def _body(self, conversation: Conversation, sampling: Sampling, salt: str) -> bytes:
        images = _Images()
        body = {
            "model": await self._served_model(),
            "messages": [_message(message, images) for message in conversation.messages],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": sampling.seed,
            "stop": list(sampling.stop),
            "include_stop_str_in_output": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        } | ({"cache_salt": salt} if salt else {})
        return images.put_into(json.dumps(body).encode())

    async def _served_model(self) -> str:
        if self._client.is_closed:
            raise EngineUnavailable("the engine is shutting down")
        if self._model is None:
            try:
                response = await self._client.get("/v1/models", timeout=CONNECT_SECONDS)
                response.raise_for_status()
                self._model = str(response.json()["data"][0]["id"])
            except httpx2.ReadTimeout as error:  # no turn has timed out, none was begun: another engine may be asked
                raise EngineUnavailable("the engine is silent", retry_after=5) from error
            except httpx2.TransportError as error:
                raise _unreachable(error) from error
            except (httpx2.HTTPError, ValueError, LookupError, TypeError) as error:
                raise EngineUnavailable("the engine does not list its models yet", retry_after=5) from error
        return self._model

    # --- the reply ----------------------------------------------------------------------------------------------------

    async def _attempt(self, body: bytes, headers: Mapping[str, str]) -> AsyncGenerator[Delta | Generation, None]:
        text: list[str] = []
        try:
            async with self._client.stream("POST", "/v1/chat/completions", content=body, headers=headers) as response:
                if response.status_code != 200:
                    raise self._refused(response.status_code, _json(await response.aread()))
                reason, usage, counted = None, None, 0
                timings: dict[str, Any] = {}
                async for event in _events(response):
                    if self._client.is_closed:  # closing it ends the connections it had, not one that was being made
                        raise EngineUnavailable("the engine is shutting down")
                    if "error" in event:
                        raise self._refused(_status(event["error"]), event, started=bool(text))
                    counts = event.get("usage")
                    if counts:
                        usage = counts
                    timings = event.get("metrics") or timings
                    for choice in event.get("choices") or ():
                        reason = choice.get("finish_reason") or reason
                        piece = (choice.get("delta") or {}).get("content") or ""
                        if piece:
                            total = int(counts["completion_tokens"]) if counts else counted + 1
                            text.append(piece)
                            yield Delta(piece, max(0, total - counted))
                            counted = total
                if reason not in ("stop", "length") or usage is None:  # vLLM says "abort" when it is shut down meanwhile
                    raise EngineFailed("the engine ended its reply without finishing it")
                yield Generation(
                    "".join(text),
                    reason,
                    _usage(usage),
                    queue_seconds=_seconds(timings.get("queue_time_ms")),
                    first_token_seconds=_seconds(timings.get("time_to_first_token_ms")),
                    model=self._model or "",
                    server=self._server,
                )
        except httpx2.TransportError as error:
            failure = _unreachable(error)
            # A pooled connection that the engine closed while idle breaks at once when used: the request was never read.
            if isinstance(error, (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError)) and not text:
                raise _Retryable(failure) from error
            raise failure from error
        except (httpx2.DecodingError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise EngineFailed("the engine's reply could not be read") from error

    def _refused(self, status: int, body: dict[str, Any], *, started: bool = False) -> EngineError | _Retryable:
        """Translate a status of the engine. Its message is not passed on: it may quote the prompt."""
        if status == 404:
            self._model = self._given_model  # it was restarted with another model; discovered anew on the next request
        if status == 503:
            return EngineBusy("the engine's queue is full", retry_after=1)
        if status in (408, 504):
            return EngineTimeout("the engine gave up on the request")
        if status in (401, 403):
            return EngineFailed("the engine refuses the server's credentials")
        if 400 <= status < 500:
            error = body.get("error")
            message = str(error.get("message", "")) if isinstance(error, dict) else ""
            if "context length" in message or "longer than the maximum model length" in message:
                return ContextTooLong("the conversation is longer than the engine's context", param="max_visual_tokens")
            return EngineRejected(f"the engine refused the request with status {status}")
        failure = EngineFailed(f"the engine failed with status {status}")
        return failure if started else _Retryable(failure)


class _Images:
    """Images on their way into a JSON text: a mark stands for each until all else is encoded.

    ``json.dumps`` looks at every letter of a string: 3 ms for a megabyte of base64, in which the event loop stands still.
    """

    def __init__(self) -> None:
        self._secret = secrets.token_hex()  # so that no text of a conversation can name a mark
        self._urls: list[bytes] = []

    def mark(self, view: View) -> str:
        """Return what stands for a view."""
        self._urls.append(view.data_url.encode())
        return f"{self._secret}-{len(self._urls) - 1:04d}"

    def put_into(self, text: bytes) -> bytes:
        """Put every image where its mark is."""
        pieces = re.split(f"{self._secret}-([0-9]{{4}})".encode(), text)
        pieces[1::2] = [self._urls[int(number)] for number in pieces[1::2]]
        return b"".join(pieces)


def _message(message: Message, images: _Images) -> dict[str, Any]:
    if all(isinstance(part, str) for part in message.parts):
        return {"role": message.role, "content": "".join(part for part in message.parts if isinstance(part, str))}
    parts = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": images.mark(part)}}
        for part in message.parts
    ]
    return {"role": message.role, "content": parts}


async def _events(response: httpx2.Response) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the JSON of each server-sent event up to ``[DONE]``."""
    async for line in response.aiter_lines():
        if len(line) > MAX_LINE:
            raise EngineFailed("the engine's reply could not be read")
        if not line.startswith("data:"):
            continue
        payload = line[5:].strip()
        if payload == "[DONE]":
            return
        event = json.loads(payload)
        if not isinstance(event, dict):
            raise EngineFailed("the engine's reply could not be read")
        yield event


def _usage(counts: Mapping[str, Any]) -> Usage:
    details = counts.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=int(counts["prompt_tokens"]),
        completion_tokens=int(counts["completion_tokens"]),
        cached_tokens=details.get("cached_tokens"),
        image_tokens=(details.get("multimodal_tokens") or {}).get("image"),
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else max(0.0, milliseconds / 1000)


def _unreachable(error: httpx2.TransportError) -> EngineError:
    if isinstance(error, httpx2.PoolTimeout):
        return EngineBusy("all connections to the engine are in use", retry_after=1)
    if isinstance(error, httpx2.ConnectTimeout | httpx2.ConnectError | httpx2.UnsupportedProtocol):
        return EngineUnavailable("the engine cannot be reached", retry_after=5)
    if isinstance(error, httpx2.TimeoutException):
        return EngineTimeout("the engine has fallen silent")
    return EngineFailed("the connection to the engine broke")


def _json(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _status(error: object) -> int:
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) else 500
