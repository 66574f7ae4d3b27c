"""Every knob, with its unit and where its default comes from. Read once, frozen, handed down as plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from ergo_server.engine.base import address
from ergo_server.engine.breaker import FAILURES, OPEN_SECONDS
from ergo_server.engine.replicas import CHECK_SECONDS
from ergo_server.engine.retries import BURST, SHARE
from ergo_server.imaging.geometry import MAX_VISUAL_TOKENS, MIN_VISUAL_TOKENS
from ergo_server.imaging.header import MAX_PIXELS, Limits
from ergo_server.imaging.work import ARRIVALS_SHARE, DECODE_SECONDS, MEMORY_BYTES, WAIT_SECONDS
from ergo_server.intake import store
from ergo_server.intake.body import RequestLimits
from ergo_server.intake.fetch import FetchLimits, FetchMode
from ergo_server.pipeline import Deadlines, SessionScope
from ergo_server.telemetry.logging import Format, Level
from ergo_server.verification import CONCURRENT


class Settings(BaseSettings):
    """The server's configuration, from environment variables ``ERGO_…``.

    Raises:
        pydantic.ValidationError: a value is out of bounds; the message names the variable.
    """

    model_config = SettingsConfigDict(env_prefix="ERGO_", frozen=True, extra="ignore")

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")

    log_level: Level = Field(
        default="info",
        description="least level that is written to standard error; `info` has a line for every request but the probes",
    )
    log_format: Format = Field(
        default="auto", description="`json`: an object a line; `text`: for people; `auto`: text on a terminal, else json"
    )
    otlp_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s/]",
        description="base URL of an OpenTelemetry collector with traces taken at `/v1/traces` (OTLP over HTTP, often port 4318); "
        "unset: no traces. `OTEL_EXPORTER_OTLP_HEADERS`, `…_CERTIFICATE` and `…_COMPRESSION`, `OTEL_SERVICE_NAME` and "
        "`OTEL_RESOURCE_ATTRIBUTES` are obeyed",
    )
    trace_share: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="of the requests, those that are traced where the caller's `traceparent` does not decide it; all, as a "
        "request takes seconds and its trace about two kilobytes",
    )

    engine: Literal["embedded", "vllm"] = Field(default="embedded", description="transformers in this process, or vLLM over HTTP")
    checkpoint: str = Field(
        default="", description="embedded: folder or hub name of a Qwen2.5-VL checkpoint; empty takes ergo-mini"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="embedded: where the model runs")
    threads: int = Field(default=0, ge=0, description="embedded: CPU threads of the model; 0 leaves torch's choice")
    engine_url: str = Field(
        default="http://127.0.0.1:8001",
        description="vllm: base URL, without /v1; several, with commas between, are used as one: each image has its engine, "
        "and the others stand in for it",
    )
    engine_check_seconds: float = Field(
        default=CHECK_SECONDS,
        gt=0,
        description="vllm, several: seconds between two health checks of each; one that fails two is asked last",
    )
    engine_model: str | None = Field(default=None, description="vllm: served model name; unset takes the first that it lists")
    engine_api_key: SecretStr | None = Field(default=None, description="vllm: bearer token, if it wants one")
    engine_api_key_file: Path | None = Field(default=None, description="file with that token, instead; read at start")
    session_headers: tuple[str, ...] = Field(
        default=("x-session-id", "x-smg-routing-key"),
        description="vllm: header names that carry the session key, for routers in front of several replicas (JSON list)",
    )
    session_secret: SecretStr | None = Field(
        default=None,
        description="keys the session header and the tenants' cache salts; unset draws one at start. Give replicas of the "
        "gateway the same, or they share no cache",
    )
    session_secret_file: Path | None = Field(default=None, description="file with that secret, instead; read at start")
    session_scope: SessionScope = Field(
        default="image",
        description="what goes to one engine for its cache: all that a tenant asks about an image (`image`), or only the turns "
        "of one question (`request`), for pictures that everybody asks about",
    )

    breaker_failures: int = Field(
        default=FAILURES,
        ge=1,
        description="requests in a row that the engine fails before it is left alone; fewer would take an accident for an outage",
    )
    breaker_seconds: float = Field(
        default=OPEN_SECONDS,
        gt=0,
        description="seconds for which it is; a failed health check that succeeds again ends them at once",
    )
    retry_share: float = Field(
        default=SHARE,
        ge=0,
        le=1,
        description="vllm: second attempts that one request earns; in an outage the load grows by no more than this share",
    )
    retry_burst: int = Field(
        default=BURST,
        ge=0,
        description="vllm: most second attempts saved up, and those at start; 0 switches them off. "
        "The first question after a reader who left may need one",
    )

    verify_fraction: float = Field(
        default=0,
        ge=0,
        le=1,
        description="of the zoomed questions, those that are asked again in the background with the crop alone; whether the "
        "answer is the same becomes `ergo_reward_region_total`. Each costs a turn; off, as that is the operator's to spend",
    )
    verify_concurrent: int = Field(
        default=CONCURRENT,
        ge=1,
        description="of these at a time; what comes on top is dropped, as is all while the server is busy",
    )
    verify_engine: str | None = Field(
        default=None,
        description="base URL of a vLLM that is asked instead, a stronger model's or an idle one's; unset: the engine itself. "
        "With `embedded` one must be named: its one model would keep callers waiting",
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

    api_keys: SecretStr | None = Field(
        default=None,
        description="API keys, as lines `TENANT SHA-256 [LIMIT=NUMBER …]` or with `;` between them. "
        "`ergo-vqa keys new` draws a key. With neither these nor a file nobody is asked for one",
    )
    api_keys_file: Path | None = Field(
        default=None, description="file with API keys in the same form; read again within a second of a change"
    )
    requests_per_minute: int = Field(
        default=240,
        ge=0,
        description="of one tenant, unless its keys say otherwise; 0: no limit. "
        "What concurrent_requests comes to at 4 s each, so that it binds only where requests are cheaper than questions",
    )
    concurrent_requests: int = Field(
        default=16,
        ge=0,
        description="requests of one tenant at a time; 0: no limit. A quarter of max_concurrent: one tenant cannot fill a server",
    )
    visual_tokens_per_minute: int = Field(
        default=300_000,
        ge=0,
        description="of one tenant; 0: no limit. requests_per_minute at ERGO-7B's budget of 1,280 a question, which is 307,200",
    )
    open_metrics: bool = Field(
        default=False,
        description="answer /metrics without a key where keys are asked for; it tells how much is asked, and nothing of whom. "
        "For when only the monitoring can reach it; else give that a key of its own",
    )

    max_concurrent: int = Field(
        default=64,
        gt=0,
        description="requests worked on at a time. An engine that takes 4 s for a question then gets 16 a second, "
        "and four cores make the views of 12-megapixel photographs at about that rate",
    )
    max_queued: int = Field(
        default=64,
        ge=0,
        description="requests that wait for a place; as many as are worked on, so that the last waits for about one question",
    )
    queue_seconds: float = Field(
        default=10, gt=0, description="longest wait for a place; who has waited for longer than that mostly has given up"
    )
    max_bytes_in_flight: int = Field(
        default=2 * 1024**3,
        gt=0,
        description="bytes of all request bodies at a time: announced, being read, or worked on. With the text and the base64 "
        "decoded from it a body takes three times its length: 6 of 24 GiB. At least max_body_bytes",
    )
    max_body_bytes: int = Field(
        default=128 * 1024 * 1024,
        gt=0,
        description="largest request body; lmms-eval re-encodes an 8K photograph to about 67 MB of base64",
    )
    max_text_chars: int = Field(
        default=RequestLimits().text_chars,
        gt=0,
        description="characters of a question with its choices and instructions, or of a conversation; at four a token twice "
        "ERGO-7B's context, which itself refuses by the token",
    )
    max_images: int = Field(
        default=RequestLimits().images,
        ge=1,
        description="images of a conversation; more would not fit the engine's context beside the two views of one",
    )
    max_form_fields: int = Field(
        default=RequestLimits().form.fields, ge=2, description="fields of a form; a question has a dozen, and up to 26 choices"
    )
    max_form_field_bytes: int = Field(
        default=RequestLimits().form.field_bytes,
        gt=0,
        description="bytes of one text in a form; max_text_chars in the longest letters, four bytes each, fit",
    )
    max_pixels: int = Field(
        default=MAX_PIXELS, gt=0, description="largest image, width x height; the 108-megapixel photographs of telephones fit"
    )
    max_scans: int = Field(
        default=Limits().max_scans, ge=1, description="scans of a progressive JPEG; encoders write about ten, each costs a pass"
    )
    max_metadata_bytes: int = Field(
        default=Limits().max_metadata_bytes,
        gt=0,
        description="bytes before an image's pixels: EXIF with its preview, XMP, profiles; cameras write a few megabytes",
    )
    image_threads: int = Field(
        default=0, ge=0, description="images decoded at a time; 0: as many as there are cores, more would make each slower"
    )
    image_arrivals: int = Field(
        default=16,
        ge=0,
        description="images decoded while they arrive, each holding a thread that mostly waits; others are decoded afterwards",
    )
    image_memory_bytes: int = Field(
        default=MEMORY_BYTES,
        gt=0,
        description="memory of all decodes at a time, reserved from the header before they begin: the largest lossless "
        "photograph takes 1.1 GiB, a JPEG of any size some 40 MiB",
    )
    image_arrivals_share: float = Field(
        default=ARRIVALS_SHARE,
        ge=0,
        le=1,
        description="of that memory, for images that still arrive: a quarter, so that who sends the beginning of a large image "
        "and then nothing keeps it from nobody whose image is there",
    )
    image_memory_seconds: float = Field(
        default=WAIT_SECONDS, gt=0, description="longest wait for that memory; decodes take a tenth of a second each"
    )
    decode_seconds: float = Field(
        default=DECODE_SECONDS,
        gt=0,
        description="longest decode of one image; the largest progressive photograph takes 1.3 s on an idle core",
    )

    image_store_seconds: float = Field(
        default=store.SECONDS, gt=0, description="seconds that an uploaded image is kept: a person asks about it for so long"
    )
    image_store_bytes: int = Field(
        default=store.MAX_BYTES,
        ge=0,
        description="bytes of all uploaded images at a time; a photograph of 12 megapixels has 4 MB",
    )
    image_store_tenant_bytes: int = Field(
        default=store.TENANT_BYTES, ge=0, description="bytes of one tenant's uploaded images; a quarter, so that none can fill it"
    )

    @property
    def engine_urls(self) -> tuple[str, ...]:
        """The base URLs of all engines."""
        return tuple(url.strip().rstrip("/") for url in self.engine_url.split(","))

    @model_validator(mode="after")
    def _engines_are_addresses(self) -> Settings:
        for url in self.engine_urls:
            if not _is_address(url):
                raise ValueError("engine_url must be http:// or https:// and a host, or several of these with commas between")
        if self.verify_engine is not None and not _is_address(self.verify_engine):
            raise ValueError("verify_engine must be http:// or https:// and a host")
        if len({address(url) for url in self.engine_urls}) < len(self.engine_urls):
            raise ValueError("engine_url names an engine twice")
        return self

    @model_validator(mode="after")
    def _verification_keeps_nobody_waiting(self) -> Settings:
        if self.verify_fraction and self.engine == "embedded" and not self.verify_engine:
            raise ValueError("verify_fraction with engine=embedded needs a verify_engine, or callers would wait for it")
        return self

    @model_validator(mode="after")
    def _one_of_secret_and_file(self) -> Settings:
        for name in ("engine_api_key", "session_secret"):
            if getattr(self, name) is not None and getattr(self, f"{name}_file") is not None:
                raise ValueError(f"{name} and {name}_file are both given")
        return self

    @model_validator(mode="after")
    def _largest_body_fits(self) -> Settings:
        if self.max_body_bytes > self.max_bytes_in_flight:
            raise ValueError("max_bytes_in_flight must be at least max_body_bytes")
        return self

    body_seconds: float = Field(
        default=300.0,
        gt=0,
        description="seconds that a whole body is waited for; a phone on 1 Mbit/s sends a photograph of 12 MB in 100",
    )
    body_stall_seconds: float = Field(
        default=15.0,
        gt=0,
        description="seconds that the sender of a body may be silent: a phone that changes cells. "
        "Who sends fewer than min_bytes_per_second uses them up",
    )
    min_bytes_per_second: float = Field(
        default=4096.0,
        gt=0,
        description="slowest average of who sends a body, or reads an answer; a quarter of what the slowest mobile network "
        "(EDGE, 120 kbit/s) carries. Drips hold a connection for body_stall_seconds only",
    )
    head_seconds: float = Field(
        default=10.0,
        gt=0,
        description="seconds for the head of a request to arrive: it is one packet, and this is three times sent again (1+2+4 s)",
    )
    max_head_bytes: int = Field(
        default=64 * 1024,
        ge=1024,
        description="longest head of a request; a raw image brings its question in there, in up to 9 bytes a character",
    )
    keep_alive_seconds: int = Field(
        default=5,
        ge=1,
        description="seconds that a connection stays open between two requests. Behind a load balancer that keeps connections, "
        "set it above the balancer's own figure, or requests meet a connection that is just being closed",
    )
    linger_seconds: float = Field(
        default=10.0,
        gt=0,
        description="seconds that the rest of a refused body is still taken in (and dropped), so that its sender reads the "
        "answer instead of a broken connection; 12 MB in that time need 10 Mbit/s",
    )
    reader_stall_seconds: float = Field(
        default=60.0,
        gt=0,
        description="seconds that the reader of an answer may take nothing. Progress shows in steps of a third of the kernel's "
        "buffer, which takes a slow reader many seconds",
    )
    max_connections: int = Field(
        default=512,
        ge=1,
        description="connections open at once; half of the 1024 files that a process usually may open: the engine needs some, "
        "too. One more displaces one that does nothing, or is refused",
    )
    drain_grace_seconds: float = Field(
        default=0.0,
        ge=0,
        description="seconds after SIGTERM in which connections are still accepted, with readiness false: on Kubernetes set 5 to "
        "15, which endpoints and balancers need to notice; at a terminal nobody waits for that",
    )
    drain_seconds: float = Field(
        default=25.0,
        ge=0,
        description="seconds that requests under way then have to finish. With drain_grace_seconds and 3 more less than the "
        "orchestrator waits: 30 s on Kubernetes unless told otherwise, but 10 s with `docker stop` and Compose",
    )

    fetch: FetchMode = Field(
        default="off",
        description="remote images: `off`, from `allowlist` hosts, or from anywhere `public`. Off, because who may name an "
        "address borrows the server's place in the network, its name and its bandwidth; only the operator can say who may",
    )
    fetch_hosts: tuple[str, ...] = Field(
        default=(),
        description="fetch=allowlist: hosts (JSON list), exact or `*.example.com` for all names below; their addresses are "
        "checked too",
    )
    fetch_http: bool = Field(
        default=False, description="fetch `http` too; off, because on the way anyone can read and replace such an image"
    )
    fetch_ports: tuple[int, ...] = Field(
        default=(443, 80),
        description="ports that may be asked (JSON list); images stand on the web's own, other services behind the others",
    )
    fetch_max_bytes: int = Field(
        default=FetchLimits().max_bytes, gt=0, description="longest remote image; an 8K photograph as PNG has about 50 MB"
    )
    fetch_seconds: float = Field(
        default=FetchLimits().seconds,
        gt=0,
        description="for a whole fetch, redirects included; the longest remote image needs 54 Mbit/s to come in that time",
    )
    fetch_dns_seconds: float = Field(
        default=FetchLimits().dns_seconds,
        gt=0,
        description="for the addresses of one name, which mostly take milliseconds",
    )
    fetch_connect_seconds: float = Field(
        default=FetchLimits().connect_seconds,
        gt=0,
        description="for a connection to one address, and again for TLS; a lost first packet is sent again after 1 s (RFC 6298)",
    )
    fetch_idle_seconds: float = Field(
        default=FetchLimits().idle_seconds, gt=0, description="longest silence of the other server, before or amid its answer"
    )
    fetch_bytes_per_second: int = Field(
        default=FetchLimits().bytes_per_second,
        ge=0,
        description="least rate, over any fetch_rate_seconds; slower, not even 160 kB would come within the 10 s of a fetch",
    )
    fetch_rate_seconds: float = Field(
        default=FetchLimits().rate_seconds,
        gt=0,
        description="the stretch over which the least rate is measured; longer than the silence that is allowed",
    )
    fetch_redirects: int = Field(
        default=FetchLimits().redirects, ge=0, description="most redirects: to https, to www, to where the bytes are"
    )
    fetch_url_chars: int = Field(
        default=FetchLimits().url_chars, gt=0, description="longest URL; RFC 9110, 4.1 asks for 8000, signed ones have about 2000"
    )


def _is_address(url: str) -> bool:
    found = urlsplit(url)
    return found.scheme in ("http", "https") and bool(found.hostname)
