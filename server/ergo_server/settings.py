"""Every knob, with its unit and where its default comes from. Read once, frozen, handed down as plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from ergo_server.imaging.decode import MAX_PIXELS
from ergo_server.imaging.geometry import MAX_VISUAL_TOKENS, MIN_VISUAL_TOKENS
from ergo_server.pipeline import Deadlines


class Settings(BaseSettings):
    """The server's configuration, from environment variables ``ERGO_…``.

    Raises:
        pydantic.ValidationError: a value is out of bounds; the message names the variable.
    """

    model_config = SettingsConfigDict(env_prefix="ERGO_", frozen=True, extra="ignore")

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")

    engine: Literal["embedded", "vllm"] = Field(default="embedded", description="transformers in this process, or vLLM over HTTP")
    checkpoint: str = Field(
        default="", description="embedded: folder or hub name of a Qwen2.5-VL checkpoint; empty takes ergo-mini"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="embedded: where the model runs")
    threads: int = Field(default=0, ge=0, description="embedded: CPU threads of the model; 0 leaves torch's choice")
    engine_url: str = Field(default="http://127.0.0.1:8001", description="vllm: base URL, without /v1")
    engine_model: str | None = Field(default=None, description="vllm: served model name; unset takes the first that it lists")
    engine_api_key: SecretStr | None = Field(default=None, description="vllm: bearer token, if it wants one")
    session_headers: tuple[str, ...] = Field(
        default=("x-session-id", "x-smg-routing-key"),
        description="vllm: header names that carry the session key, for routers in front of several replicas (JSON list)",
    )
    session_secret: SecretStr | None = Field(
        default=None, description="keys the session header; unset draws one at start. Give replicas of the gateway the same"
    )

    prompts: Path | None = Field(
        default=None, description="prompts file (`ergo-vqa prompts import` makes one); unset takes the checkpoint's own"
    )
    default_visual_tokens: int | None = Field(
        default=None,
        ge=MIN_VISUAL_TOKENS,
        le=MAX_VISUAL_TOKENS,
        description="pixel budget where the request names none; unset: the model's",
    )
    max_visual_tokens: int | None = Field(
        default=None,
        ge=MIN_VISUAL_TOKENS,
        le=MAX_VISUAL_TOKENS,
        description="largest pixel budget a request may name; unset: the model's",
    )
    turn_seconds: float = Field(default=Deadlines().turn, gt=0, description="deadline of one turn on the engine")
    request_seconds: float = Field(default=Deadlines().request, gt=0, description="deadline of a whole request")

    max_body_bytes: int = Field(
        default=128 * 1024 * 1024,
        gt=0,
        description="largest request body; lmms-eval re-encodes an 8K photograph to about 67 MB of base64",
    )
    max_pixels: int = Field(default=MAX_PIXELS, gt=0, description="largest image, width x height")
