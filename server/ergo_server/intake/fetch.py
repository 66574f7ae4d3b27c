"""The one way out: a remote image, fetched on a client's behalf.

Whoever names an address makes the server connect from where it stands, inside the operator's network. Each rule here answers
a way in which that was turned against an inference server:

* One parser reads a URL, for the checks and for the request; what it made of the URL must be what stands there, sign for sign.
  Two parsers that disagreed about a backslash were CVE-2026-24779; numbers for addresses, percent signs and control characters
  in hosts are the same trick.
* A name is resolved once, every address of it is checked, and the connection goes to the checked address; TLS still checks the
  certificate against the name. A check that is followed by a second look-up (vllm-project/vllm #57157) can be told two things.
* Redirects are followed by hand, each through the same checks (CVE-2025-6242, InternLM/lmdeploy #4761).
* Nothing of the environment, of another request, or of the client's goes along: no proxy, no cookie, no credential, no referrer.
* Bytes, silence, rate and time are bounded, and no content encoding is accepted: a body is as long as what arrives.
* Whatever was refused, or failed, the client reads the same sentence: else the server could be asked which inner names exist.
  The reason goes to ``told``, for the metrics.

The declared content type is not looked at: it says nothing that the first bytes do not say better, and ``write`` may raise when
it does not like them, which ends the transfer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import ssl
import unicodedata
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal, get_args

import httpx2
import idna

from ergo_server import __version__
from ergo_server.errors import ImageError, ImageNotFetched, ImageTooLarge
from ergo_server.intake.addresses import Address, is_public

FetchMode = Literal["off", "allowlist", "public"]

FetchBlocked = Literal[
    "off",  # the server fetches nothing
    "url",  # too long, unreadable, or with signs that no URL has
    "scheme",
    "credentials",
    "host",  # no public name and no address, or not in the one way of writing it
    "port",
    "host_not_allowed",
    "private_address",
    "redirect_limit",
    "redirect_downgrade",  # from https to http
]
"""Why an address was refused; a redirect's target is refused for the same reasons."""

FetchFailed = Literal[
    "dns",
    "connect",
    "tls",
    "timeout",  # no connection, no answer or no more bytes in time, or all of it took too long
    "status",  # another than 200, or a redirect to nowhere
    "encoding",  # compressed, although asked not to
    "too_large",
    "too_slow",  # below the least rate, or in crumbs
    "broken",  # not HTTP, or an end before the end
    "abandoned",  # the caller left, or would not have the bytes
]

FetchOutcome = Literal["ok", FetchBlocked, FetchFailed]

FETCH_OUTCOMES: tuple[FetchOutcome, ...] = ("ok", *get_args(FetchBlocked), *get_args(FetchFailed))

OFF = "this server fetches no remote images; send the bytes, or a data: URL"
NOT_FETCHED = "the remote image could not be fetched; send the bytes, or a data: URL"
"""All that a client learns, whatever the reason."""

MAX_ATTEMPTS = 3
"""Addresses of one name that are tried. The system sorts the reachable ones to the front (RFC 6724)."""

MAX_LOOKUPS = 16
"""Names being looked up at once, each in a thread: a nameserver that never answers holds one for as long as the system's
resolver has patience (10 s by default), and must hold none of those that read images."""

PIECE_BYTES = 256
FREE_PIECES = 1000
"""A body may come in pieces of 256 bytes on average, and 1000 more. Servers send thousands of bytes a piece; each costs the event
loop 13 µs to 19 µs (measured), so a body in chunks of one byte would be an attack on all other requests."""

PIECES_AT_A_TIME = 64
"""Pieces that are read before other requests get a turn: 1 ms. Without this, what one read of such a body brings held the event
loop for 171 ms (measured), with it for 5 ms."""

ACCEPT = "image/jpeg, image/png, image/webp, image/gif, image/bmp"
"""What ``imaging.decode`` reads, so that a server that has a choice does not send AVIF."""

_DEFAULT_PORTS = {"https": 443, "http": 80}
_REDIRECTS = (301, 302, 303, 307, 308)

_NAME = re.compile(r"(?=.{4,253}$)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])")
"""A host name as DNS knows it (RFC 1035, with the underscores that occur), of two labels or more. The last begins with a letter:
where it is a number, decimal, octal or hexadecimal, some resolvers read the whole as an IPv4 address (WHATWG URL, 3.5)."""

Resolve = Callable[[str], Awaitable[Sequence[Address]]]


@dataclass(frozen=True)
class FetchLimits:
    """The bounds of one fetch.

    Attributes:
        max_bytes: longest body.
        seconds: for everything, redirects included.
        dns_seconds: for the addresses of one name.
        connect_seconds: for a connection to one address, and again for its TLS handshake.
        idle_seconds: longest silence.
        bytes_per_second: least rate of a body, over any ``rate_seconds``.
        rate_seconds: the stretch over which the rate is measured.
        redirects: most redirects followed.
        url_chars: longest URL.
    """

    max_bytes: int = 64 * 1024 * 1024
    seconds: float = 10.0
    dns_seconds: float = 3.0
    connect_seconds: float = 3.0
    idle_seconds: float = 3.0
    bytes_per_second: int = 16 * 1024
    rate_seconds: float = 5.0
    redirects: int = 3
    url_chars: int = 8000


@dataclass(frozen=True)
class _Target:
    """A URL that may be asked, if its addresses may.

    Attributes:
        url: the parsed URL; its host is ASCII.
        host: the name, or the address without brackets.
        address: the address, where the URL holds one.
    """

    url: httpx2.URL
    host: str
    address: Address | None


class _Stop(Exception):
    """The fetch ends here."""

    def __init__(self, outcome: FetchOutcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class _NotConnected(_Stop):
    """No connection to this address; another may do."""


class Fetcher:
    """Fetches remote images for clients.

    Args:
        mode: ``off`` refuses all, ``allowlist`` all but ``hosts``, ``public`` whatever is not on the public internet.
        hosts: for ``allowlist``: host names, exact, or ``*.example.com`` for every name below example.com but not itself.
            The addresses of an allowed host are checked like all others.
        http: whether ``http`` is read beside ``https``.
        ports: the ports that may be asked.
        limits: the bounds of one fetch.
        told: hears how each fetch ended, once.
        resolve: gives the addresses of a name, or raises OSError; None asks the system.
        allowed: says whether an address may be connected to.
        ssl_context: checks certificates; None trusts what the system trusts, whatever the environment says.

    Raises:
        ValueError: a host that no URL could name, no hosts for ``allowlist``, or hosts for ``public``, which would not bind it.
    """

    def __init__(
        self,
        *,
        mode: FetchMode,
        hosts: Sequence[str] = (),
        http: bool = False,
        ports: Sequence[int] = (443, 80),
        limits: FetchLimits = FetchLimits(),
        told: Callable[[FetchOutcome], object] = lambda outcome: None,
        resolve: Resolve | None = None,
        allowed: Callable[[Address], bool] = is_public,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        if (mode == "allowlist" and not hosts) or (mode == "public" and hosts):
            raise ValueError("a list of hosts goes with the mode allowlist, and with it alone")
        self._mode = mode
        self._hosts = frozenset(map(_listed, hosts))
        self._schemes = ("https", "http") if http else ("https",)
        self._ports = frozenset(ports)
        self._limits = limits
        self._told = told
        self._threads = ThreadPoolExecutor(MAX_LOOKUPS, thread_name_prefix="names")
        self._resolve = resolve or self._ask_system
        self._allowed = allowed
        self._ssl_context = ssl_context or httpx2.create_ssl_context(trust_env=False)
        # At DEBUG it writes hosts and the headers of responses, and a redirect's target may carry a signature.
        logging.getLogger("httpcore2").setLevel(logging.INFO)

    async def fetch(self, url: str, write: Callable[[bytes], object]) -> None:
        """Fetch an image; cancelling it closes the connection.

        Args:
            url: as the client gave it.
            write: takes the body, piece by piece as it arrives; what it raises ends the fetch and comes out of here.

        Raises:
            ImageNotFetched: it may not, or could not, be fetched; some bytes may have been written.
            ImageTooLarge: it is longer than the limit.
        """
        outcome: FetchOutcome = "abandoned"
        try:
            outcome = await self._run(url, write)
        finally:
            self._told(outcome)
        if outcome != "ok":
            raise self._error(outcome)

    async def aclose(self) -> None:
        """Look up no further names; fetches under way go on."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, url: str, write: Callable[[bytes], object]) -> FetchOutcome:
        if self._mode == "off":
            return "off"
        try:
            async with asyncio.timeout(self._limits.seconds) as total:
                await self._follow(url, write)
        except _Stop as stop:
            return stop.outcome
        except TimeoutError:
            if not total.expired():
                raise
            return "timeout"
        return "ok"

    def _error(self, outcome: FetchOutcome) -> ImageError:
        if outcome == "off":
            return ImageNotFetched(OFF, param="image")
        if outcome == "too_large":
            return ImageTooLarge(f"the remote image is longer than {self._limits.max_bytes} bytes", param="image")
        return ImageNotFetched(NOT_FETCHED, param="image")

    async def _follow(self, url: str, write: Callable[[bytes], object]) -> None:
        target = self._target(url)
        for redirects_left in reversed(range(self._limits.redirects + 1)):
            location = await self._get(target, write)
            if location is None:
                return
            if not redirects_left:
                raise _Stop("redirect_limit")
            target = self._onward(target, location)

    # --- what may be asked --------------------------------------------------------------------------------------------

    def _target(self, url: str) -> _Target:
        if len(url) > self._limits.url_chars or not _is_plain(url):
            raise _Stop("url")
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL:
            raise _Stop("url") from None
        if parsed.scheme not in self._schemes:
            raise _Stop("scheme")
        if parsed.userinfo:
            raise _Stop("credentials")
        host = parsed.raw_host.decode("ascii")
        address = _literal(host)
        if address is None and not _is_name(host):
            raise _Stop("host")
        port = _DEFAULT_PORTS[parsed.scheme] if parsed.port is None else parsed.port
        _must_stand_there(url, parsed, port)
        if port not in self._ports:
            raise _Stop("port")
        if self._mode == "allowlist" and not self._is_listed(host):
            raise _Stop("host_not_allowed")
        return _Target(parsed, host, address)

    def _onward(self, here: _Target, location: bytes) -> _Target:
        try:
            text = location.decode("ascii")
            there = httpx2.URL(text)
            onward = text if there.is_absolute_url else str(here.url.join(there))
            scheme = httpx2.URL(onward).scheme
        except (httpx2.InvalidURL, ValueError):  # no ASCII, or no URL
            raise _Stop("url") from None
        if here.url.scheme == "https" and scheme == "http":
            raise _Stop("redirect_downgrade")
        return self._target(onward)

    def _is_listed(self, host: str) -> bool:
        below = ("*." + host.split(".", at)[at] for at in range(1, host.count(".") + 1))
        return host in self._hosts or any(pattern in self._hosts for pattern in below)

    async def _addresses(self, target: _Target) -> list[Address]:
        if target.address is not None:
            found: Sequence[Address] = [target.address]
        else:
            try:
                async with asyncio.timeout(self._limits.dns_seconds):
                    found = await self._resolve(target.host)
            except OSError:  # TimeoutError is one
                raise _Stop("dns") from None
        if not found:
            raise _Stop("dns")
        if not all(map(self._allowed, found)):
            raise _Stop("private_address")
        return list(dict.fromkeys(found))[:MAX_ATTEMPTS]

    async def _ask_system(self, name: str) -> Sequence[Address]:
        def ask() -> list[Address]:
            # The dot makes the name absolute: no search list of the network's own may complete it, no hosts file answer for it.
            records = socket.getaddrinfo(f"{name}.", None, type=socket.SOCK_STREAM)
            return [ip_address(record[4][0]) for record in records]

        return await asyncio.get_running_loop().run_in_executor(self._threads, ask)

    # --- asking -------------------------------------------------------------------------------------------------------

    async def _get(self, target: _Target, write: Callable[[bytes], object]) -> bytes | None:
        """Ask one target; write the body, or return where it redirects to."""
        outcome: FetchOutcome = "connect"
        for address in await self._addresses(target):
            # A transport for one request: a connection that was checked for one name must not serve another at that address,
            # and leaving it closes the connection, whatever of the answer is still to come.
            async with httpx2.AsyncHTTPTransport(verify=self._ssl_context, trust_env=False) as transport:
                try:
                    with _failures_named():
                        response = await transport.handle_async_request(self._request(target, address))
                except _NotConnected as failed:
                    outcome = failed.outcome
                    continue
                return await self._read(response, write)
        raise _Stop(outcome)

    def _request(self, target: _Target, address: Address) -> httpx2.Request:
        limits = self._limits
        timeout = httpx2.Timeout(limits.idle_seconds, connect=limits.connect_seconds)
        return httpx2.Request(
            "GET",
            target.url.copy_with(host=str(address)),
            headers={
                "host": target.url.netloc.decode("ascii"),
                "user-agent": f"ergo-vqa/{__version__}",
                "accept": ACCEPT,
                "accept-encoding": "identity",
                "connection": "close",
            },
            extensions={"timeout": timeout.as_dict(), "sni_hostname": target.host},
        )

    async def _read(self, response: httpx2.Response, write: Callable[[bytes], object]) -> bytes | None:
        if response.status_code in _REDIRECTS:
            locations = [value for name, value in response.headers.raw if name.lower() == b"location"]
            if len(locations) != 1:
                raise _Stop("status")
            return locations[0]
        if response.status_code != 200:
            raise _Stop("status")
        if response.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
            raise _Stop("encoding")
        if int(response.headers.get("content-length", "0")) > self._limits.max_bytes:  # digits: the HTTP parser made sure
            raise _Stop("too_large")
        await self._stream(response, write)
        return None

    async def _stream(self, response: httpx2.Response, write: Callable[[bytes], object]) -> None:
        limits = self._limits
        enough = limits.bytes_per_second * limits.rate_seconds
        received = recent = pieces = 0
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(limits.rate_seconds) as patience, contextlib.aclosing(_pieces(response)) as arriving:
                async for piece in arriving:
                    received += len(piece)
                    recent += len(piece)
                    pieces += 1
                    if received > limits.max_bytes:
                        raise _Stop("too_large")
                    if pieces > FREE_PIECES + received // PIECE_BYTES:
                        raise _Stop("too_slow")
                    if recent >= enough:
                        recent = 0
                        patience.reschedule(clock() + limits.rate_seconds)
                    write(piece)
                    if pieces % PIECES_AT_A_TIME == 0:
                        await asyncio.sleep(0)
        except TimeoutError:
            if not patience.expired():
                raise
            raise _Stop("too_slow") from None


def _is_plain(url: str) -> bool:
    """Say whether a URL is free of control signs, blanks and invisible letters of any alphabet, and of backslashes."""
    return "\\" not in url and not any(sign.isspace() or not sign.isprintable() for sign in url)


def _literal(host: str) -> Address | None:
    """Return the address that a host is: four decimal numbers without leading zeros, or IPv6 without a zone."""
    try:
        return None if "%" in host else ip_address(host)
    except ValueError:
        return None


def _is_name(host: str) -> bool:
    """Say whether a host is a name in the one form that DNS and certificates know: ASCII, lower case, valid punycode."""
    if not _NAME.fullmatch(host):
        return False
    try:
        return "xn--" not in host or idna.encode(idna.decode(host)).decode("ascii") == host
    except idna.IDNAError:
        return False


def _must_stand_there(url: str, parsed: httpx2.URL, port: int) -> None:
    """Refuse a URL that does not begin with exactly the scheme, the host and, if any, the port that the parser found."""
    host = parsed.raw_host.decode("ascii")
    for written in (f"[{host}]" if ":" in host else host, parsed.host):
        start = f"{parsed.scheme}://{written}".lower()
        head, rest = url[: len(start)], url[len(start) :]
        if head.lower() == start and unicodedata.is_normalized("NFKC", head):
            if rest.removeprefix(f":{port}")[:1] not in ("", "/", "?", "#"):
                raise _Stop("port" if rest.startswith(":") else "host")
            return
    raise _Stop("host")


def _listed(host: str) -> str:
    """Return an entry of the allowlist in the form in which hosts are compared.

    Raises:
        ValueError: no URL could name it.
    """
    stars, name = ("*.", host[2:]) if host.startswith("*.") else ("", host)
    try:
        name = name.lower() if name.isascii() else idna.encode(name.lower()).decode("ascii")
    except idna.IDNAError:
        name = ""
    if not _is_name(name) and (stars or _literal(name) is None):
        raise ValueError(f"{host!r} is no host name: write images.example.com, or *.example.com for all names below it")
    return stars + name


@contextlib.contextmanager
def _failures_named() -> Iterator[None]:
    """Turn what the HTTP library raises into an outcome."""
    try:
        yield
    except httpx2.ConnectTimeout:
        raise _NotConnected("timeout") from None
    except httpx2.ConnectError as error:
        raise (_Stop("tls") if _is_tls(error) else _NotConnected("connect")) from None
    except httpx2.TimeoutException:
        raise _Stop("timeout") from None
    except ssl.SSLError:  # an alert after the handshake comes as it is
        raise _Stop("tls") from None
    except (httpx2.TransportError, OSError):
        raise _Stop("broken") from None


def _is_tls(error: BaseException | None) -> bool:
    while error is not None and (not isinstance(error, ssl.SSLError) or isinstance(error, ssl.SSLWantReadError)):
        error = error.__cause__ or error.__context__
    return error is not None


async def _pieces(response: httpx2.Response) -> AsyncGenerator[bytes, None]:
    """Yield the body as it arrives."""
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    with _failures_named():
        async for piece in response.stream:
            yield piece
