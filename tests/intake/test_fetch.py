"""Fetching: which URLs are refused, where the connection goes, and what a server on the other side can do.

The default resolver is the system's, which reads one file of root's; so the fetcher's own seam for names is given a small client
of a real nameserver (tests/outside.py). Where a server must be reached, it stands on 127.0.0.2, and the policy of the test lets
through this address and no other of loopback; a connection beyond loopback is recorded at the socket and goes nowhere.
"""

from __future__ import annotations

import ast
import asyncio
import gzip
import logging
import socket
import ssl
import struct
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import get_args

import idna
import outside
import pytest
import support
from hostile import URLS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from outside import OUTSIDE, Address, Asked, Authority, nameserver, web, witness
from prometheus_client.parser import text_string_to_metric_families

from ergo_server.errors import ErgoError, ImageNotFetched, ImageTooLarge
from ergo_server.intake.addresses import is_public
from ergo_server.intake.fetch import FETCH_OUTCOMES, FREE_PIECES, NOT_FETCHED, OFF, FetchBlocked, Fetcher, FetchLimits
from ergo_server.settings import Settings
from ergo_server.telemetry.metrics import Metrics

TRUST = ssl.create_default_context()
"""For fetchers that never get as far as TLS; to make one anew takes 50 ms."""

PATIENT = FetchLimits(seconds=60, dns_seconds=30, connect_seconds=30, idle_seconds=30, rate_seconds=40)
"""Limits that no busy machine reaches by itself."""

PUBLIC = "93.184.216.34"
IMAGE = b"\x89PNG" + bytes(range(256)) * 300
OK = b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n"
WHOLE = OK + b"content-length: %d\r\n\r\n" % len(IMAGE) + IMAGE

NAMES = {
    "public.example": [PUBLIC],
    "xn--bcher-kva.example": [PUBLIC],
    "loopback.example": ["127.0.0.1"],
    "metadata.google.internal": ["169.254.169.254"],
    "private.example": ["10.0.0.7"],
    "mixed.example": [PUBLIC, "10.0.0.7"],
    "mixed6.example": ["2606:4700::1111", "fd00::7"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "mapped-metadata.example": ["::ffff:169.254.169.254"],
    "nat64.example": ["64:ff9b::7f00:1"],
    "sixtofour.example": ["2002:7f00:1::"],
    "zero.example": ["0.0.0.0"],
    "azure.example": ["168.63.129.16"],
    "carrier.example": ["100.100.100.200"],
    "empty.example": [],
}


@dataclass
class Got:
    """How a fetch ended: what the metrics heard, what was written, and what the caller was told."""

    outcome: str
    body: bytes
    error: ErgoError | None


async def table(name: str) -> Sequence[Address]:
    """Resolve the names of `NAMES`."""
    if name not in NAMES:
        raise OSError("no such name")
    return [ip_address(text) for text in NAMES[name]]


def outside_is_allowed(address: Address) -> bool:
    """Let the server of a test stand for the internet; judge all else as always."""
    return str(address) == OUTSIDE or is_public(address)


async def fetch(url: str, **given: object) -> Got:
    """Fetch once."""
    told: list[str] = []
    body = bytearray()
    options: dict[str, object] = {
        "mode": "public",
        "resolve": table,
        "ssl_context": TRUST,
        "limits": PATIENT,
        "told": told.append,
    }
    fetcher = Fetcher(**(options | given))  # type: ignore[arg-type]
    error: ErgoError | None = None
    try:
        await fetcher.fetch(url, body.extend)
    except (ImageNotFetched, ImageTooLarge) as raised:
        error = raised
    finally:
        await fetcher.aclose()
    if error is not None:
        assert error.__cause__ is error.__context__ is None, "what the library said names hosts, and goes no further"
    assert len(told) == 1
    assert (told == ["ok"]) == (error is None)
    return Got(told[0], bytes(body), error)


async def ask(answer: bytes | outside.Answer, limits: FetchLimits = PATIENT, path: str = "/a.png") -> Got:
    """Fetch from a server that gives this answer, over plain HTTP; the only peer is that server."""
    with witness() as seen:
        async with web(answer) as server:
            got = await fetch(
                f"http://{OUTSIDE}:{server.port}{path}",
                http=True,
                ports=(server.port,),
                limits=limits,
                allowed=outside_is_allowed,
            )
    assert set(seen.peers) == {OUTSIDE}
    return got


# --- URLs -------------------------------------------------------------------------------------------------------------


def test_the_table_is_long_enough() -> None:
    """There are at least eighty hostile URLs, and every reason that a URL alone can give is among theirs."""
    assert len(URLS) >= 80
    assert set(URLS.values()) == {"url", "scheme", "credentials", "host", "port", "private_address", "dns"}


@pytest.mark.parametrize(("url", "reason"), URLS.items(), ids=[ascii(url)[1:60] for url in URLS])
def test_a_hostile_url_is_refused(url: str, reason: str) -> None:
    """It is refused for the reason that the table gives, no connection is begun, and the client reads the one sentence."""
    with witness() as seen:
        got = asyncio.run(fetch(url))
    assert got.outcome == reason
    assert got.body == b""
    assert got.error is not None
    assert (got.error.message, got.error.code, got.error.status) == (NOT_FETCHED, "image_fetch_blocked", 422)
    assert seen.peers == []
    assert seen.looked_up == []


@pytest.mark.parametrize(
    "url",
    [
        "https://public.example",
        "https://public.example/a.png?x=1&y=%20#part",
        "HTTPS://Public.EXAMPLE:443/",
        "https://public.example:80/",
        "https://xn--bcher-kva.example/",
        "https://bücher.example/é",
        "https://Bücher.example/",
        f"https://{PUBLIC}/",
        f"https://[::ffff:{PUBLIC}]/",
        f"https://[64:FF9B::{PUBLIC}]/",
    ],
)
def test_an_ordinary_url_is_asked(url: str) -> None:
    """Ordinary URLs, upper case and other alphabets included, lead to one connection: to the address that was checked."""
    with witness() as seen:
        assert asyncio.run(fetch(url)).outcome == "connect"  # the witness lets nothing out
    assert [str(ip_address(peer)) for peer in seen.peers] == [
        str(ip_address(peer)) for peer in seen.peers if is_public(ip_address(peer))
    ]
    assert len(seen.peers) == 1
    assert seen.peers[0].endswith(PUBLIC) or seen.peers[0].endswith("5db8:d822")


SPECIAL = [*(text for texts in NAMES.values() for text in texts), "::1", "fe80::1", "224.0.0.1", "2001:db8::1", "192.168.0.1"]
ADDRESSES = st.sampled_from(SPECIAL).map(ip_address) | st.ip_addresses(v=4) | st.ip_addresses(v=6)


@settings(max_examples=300, deadline=None)
@given(st.lists(ADDRESSES, max_size=5))
@example([ip_address(PUBLIC), ip_address("2606:4700::1111")])
def test_only_checked_public_addresses_are_connected_to(found: list[Address]) -> None:
    """Whatever a name resolves to: one address that is not public refuses all; else only addresses of the answer are tried."""

    async def resolve(name: str) -> Sequence[Address]:
        return found

    with witness() as seen:
        outcome = asyncio.run(fetch("https://public.example/", resolve=resolve)).outcome
    peers = [ip_address(peer) for peer in seen.peers]
    assert all(is_public(peer) for peer in peers)
    if not found:
        assert outcome == "dns"
    elif all(map(is_public, found)):
        assert outcome == "connect"
        assert peers == list(dict.fromkeys(found))[:3]
    else:
        assert outcome == "private_address"
        assert peers == []


# fmt: off
CRUMBS = [
    "https://", "http://", "HTTPS:", "//", "/", "\\", "@", ":", ".", "..", "%", "%2e", "%00", "#", "?", "[", "]", "[::1]",
    "[::ffff:7f00:1]", "127.0.0.1", "0x7f", "2130706433", "public.example", "loopback.example", "example", "localhost", "user:",
    "443", "80", "22", "\u3002", "\uff0e", "\u2100", "xn--", "bücher", "\u00df", "\u0130", "\u212a", "-",
]
# fmt: on


@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.sampled_from(CRUMBS) | st.text(max_size=3), max_size=8).map("".join) | st.text(max_size=40))
@example("https://" + "1" * 5000 + "/")
@example("https://public.example:" + "1" * 5000 + "/")
def test_no_text_does_more_than_be_refused(text: str) -> None:
    """Any text ends in a refusal; a name that is asked for is one that stands in the text, and no socket goes anywhere inner."""
    asked: list[str] = []

    async def resolve(name: str) -> Sequence[Address]:
        asked.append(name)
        return await table(name)

    for url in (text, "https://" + text):
        asked.clear()
        with witness() as seen:
            outcome = asyncio.run(fetch(url, resolve=resolve)).outcome
        assert outcome in (*get_args(FetchBlocked), "dns", "connect")
        assert all(is_public(ip_address(peer)) for peer in seen.peers)
        for name in asked:
            assert name in url.lower() or idna.decode(name) in url.lower()


# --- who may be asked -------------------------------------------------------------------------------------------------


def test_off_refuses_all() -> None:
    """Switched off, it says so, resolves nothing and connects to nothing."""
    with witness() as seen:
        got = asyncio.run(fetch("https://public.example/", mode="off"))
    assert got.outcome == "off"
    assert got.error is not None
    assert (got.error.message, got.error.code) == (OFF, "image_fetch_blocked")
    assert seen.peers == []


@pytest.mark.parametrize(
    ("url", "outcome"),
    [
        ("https://public.example/", "connect"),
        ("https://PUBLIC.example/", "connect"),
        ("https://bücher.example/", "connect"),
        ("https://a.public.example/", "host_not_allowed"),
        ("https://evilpublic.example/", "host_not_allowed"),
        ("https://public.example.evil.example/", "host_not_allowed"),
        ("https://below.example/", "host_not_allowed"),
        ("https://a.below.example/", "dns"),
        ("https://a.b.below.example/", "dns"),
        ("https://abelow.example/", "host_not_allowed"),
        ("https://1.1.1.1/", "host_not_allowed"),
        (f"https://{PUBLIC}/", "connect"),
        ("https://loopback.example/", "private_address"),
        ("https://public.example@evil.example/", "credentials"),
        ("https://evil.example/?public.example", "host_not_allowed"),
    ],
)
def test_the_allowlist_is_exact(url: str, outcome: str) -> None:
    """Only hosts that are named, or lie below a starred name, are asked; their addresses are checked like all others."""
    hosts = ("Public.example", "bücher.example", "*.below.example", PUBLIC, "loopback.example")
    with witness():
        assert asyncio.run(fetch(url, mode="allowlist", hosts=hosts)).outcome == outcome


@pytest.mark.parametrize(
    "host",
    ["", "*", "*.", "*.com", "com", "a.*.example", "https://a.example", "a.example:443", "*.10.0.0.1", "a_.", "%61.example"],
)
def test_an_allowlist_of_nonsense_is_an_error(host: str) -> None:
    """A host that no URL could name, or a star for half of the internet, is a mistake of the operator's, and is said."""
    with pytest.raises(ValueError, match="no host name"):
        Fetcher(mode="allowlist", hosts=[host], ssl_context=TRUST)


def test_hosts_and_mode_belong_together() -> None:
    """An allowlist without hosts, and hosts that would not bind, are mistakes of the operator's."""
    with pytest.raises(ValueError, match="allowlist"):
        Fetcher(mode="allowlist", ssl_context=TRUST)
    with pytest.raises(ValueError, match="allowlist"):
        Fetcher(mode="public", hosts=("public.example",), ssl_context=TRUST)


# --- names ------------------------------------------------------------------------------------------------------------


def test_rebinding_changes_nothing() -> None:
    """A nameserver that says "outside" first and "127.0.0.1" then is asked once a fetch: one goes outside, the next nowhere."""

    async def work() -> None:
        async with (
            web(WHOLE) as server,
            web(WHOLE, host="127.0.0.1", port=server.port) as inner,
            nameserver(rebinding=[[OUTSIDE], ["127.0.0.1"]]) as (stub, resolve),
        ):
            options = {"http": True, "ports": (server.port,), "allowed": outside_is_allowed, "resolve": resolve}
            url = f"http://rebinding.example:{server.port}/a.png"
            with witness() as seen:
                first = await fetch(url, **options)
                assert stub.asked == [("rebinding.example", outside.A), ("rebinding.example", outside.AAAA)]
                second = await fetch(url, **options)
        assert (first.outcome, first.body) == ("ok", IMAGE)
        assert (second.outcome, second.body) == ("private_address", b"")
        assert seen.peers == [OUTSIDE]
        assert set(seen.looked_up) <= {OUTSIDE}, "the HTTP library resolves no name again"
        assert inner.connections == 0

    asyncio.run(work())


@pytest.mark.parametrize(
    ("records", "outcome", "peers"),
    [
        ([PUBLIC, "10.0.0.1"], "private_address", []),
        (["10.0.0.1", PUBLIC], "private_address", []),
        ([PUBLIC, "1.1.1.1", "8.8.8.8", "9.9.9.9", "127.0.0.1"], "private_address", []),
        ([PUBLIC, "::1"], "private_address", []),
        (["::ffff:127.0.0.1"], "private_address", []),
        (["::ffff:10.0.0.1", PUBLIC], "private_address", []),
        (["64:ff9b::10.0.0.1"], "private_address", []),
        ([PUBLIC, "1.1.1.1"], "connect", [PUBLIC, "1.1.1.1"]),
        ([], "dns", []),
    ],
    ids=str,
)
def test_every_record_is_checked(records: list[str], outcome: str, peers: list[str]) -> None:
    """Under the default policy one inner address among several refuses the name, in any order and family."""

    async def work() -> None:
        async with nameserver(several=[records]) as (_, resolve):
            with witness() as seen:
                assert (await fetch("https://several.example/", resolve=resolve)).outcome == outcome
            assert seen.peers == peers

    asyncio.run(work())


def test_rebinding_under_the_default_policy() -> None:
    """Public first, loopback then: the connection of the first fetch is begun to the public address, the second begins none."""

    async def work() -> None:
        async with nameserver(rebinding=[[PUBLIC], ["127.0.0.1"]]) as (_, resolve):
            for outcome, peers in (("connect", [PUBLIC]), ("private_address", [])):
                with witness() as seen:
                    assert (await fetch("https://rebinding.example/", resolve=resolve)).outcome == outcome
                assert seen.peers == peers

    asyncio.run(work())


def test_a_name_that_is_not_there() -> None:
    """A nameserver's "no such name" is a failure of names."""

    async def work() -> None:
        async with nameserver() as (_, resolve):
            assert (await fetch("https://nobody.example/", resolve=resolve)).outcome == "dns"

    asyncio.run(work())


def test_the_next_address_is_tried() -> None:
    """Where the first address of a name does not answer, the second is asked."""

    async def work() -> Got:
        async with web(WHOLE) as server, nameserver(two=[["127.0.0.3", OUTSIDE]]) as (_, resolve):
            return await fetch(
                f"http://two.example:{server.port}/",
                http=True,
                ports=(server.port,),
                resolve=resolve,
                allowed=lambda address: address.is_loopback,
            )

    assert asyncio.run(work()).body == IMAGE


def test_the_system_is_asked_for_the_absolute_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default resolver asks for the name as it is, with no search list, in a thread, and every record counts."""
    asked: list[tuple[str, bool]] = []

    def records(name: str, port: None, *, type: int) -> list[tuple[object, ...]]:
        asked.append((name, threading.current_thread() is threading.main_thread()))
        found = [("fe80::1%eth0", 0, 0, 2)] if name.startswith("zone") else [(PUBLIC, 0), (PUBLIC, 0)]
        return [(0, type, 6, "", address) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", records)
    with witness() as seen:
        assert asyncio.run(fetch("https://public.example/", resolve=None)).outcome == "connect"
        assert asyncio.run(fetch("https://zone.example/", resolve=None)).outcome == "private_address"
    assert asked == [("public.example.", False), ("zone.example.", False)]
    assert seen.peers == [PUBLIC]


def test_a_nameserver_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's resolver may wait for long; the fetch does not, and its threads are not those that others need."""
    done = threading.Event()

    def wait(name: str, port: None, *, type: int) -> list[tuple[object, ...]]:
        done.wait(60)
        raise OSError("no answer")

    async def work() -> None:
        limits = replace(PATIENT, dns_seconds=0.1)
        options = {"resolve": None, "limits": limits}
        assert {
            got.outcome for got in await asyncio.gather(*(fetch("https://public.example/", **options) for _ in range(40)))
        } == {"dns"}
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 30) == "free"

    monkeypatch.setattr(socket, "getaddrinfo", wait)
    try:
        asyncio.run(work())
    finally:
        done.set()


# --- redirects --------------------------------------------------------------------------------------------------------


def redirect(to: str, status: int = 302) -> bytes:
    """Return an answer that leads elsewhere."""
    return f"HTTP/1.1 {status} Elsewhere\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n".encode("latin-1")


@pytest.mark.parametrize(
    ("location", "outcome"),
    [
        ("https://127.0.0.1/", "private_address"),
        ("http://127.0.0.1:PORT/", "private_address"),
        ("//127.0.0.1:PORT/", "private_address"),
        ("http://[::ffff:169.254.169.254]/", "private_address"),
        ("https://[::ffff:a9fe:a9fe]/latest/meta-data/", "private_address"),
        ("https://169.254.169.254/", "private_address"),
        ("https://loopback.example/", "private_address"),
        ("https://mixed.example/", "private_address"),
        ("https://2130706433/", "host"),
        ("//2130706433/", "host"),
        ("//%31%32%37.0.0.1/", "host"),
        ("https://localhost/", "host"),
        ("https://user@public.example/", "credentials"),
        ("https://public.example:22/", "port"),
        ("https://public.example:0443/", "port"),
        ("https://@public.example/", "host"),
        ("ftp://public.example/", "scheme"),
        ("file:///etc/passwd", "scheme"),
        ("gopher://127.0.0.1/", "scheme"),
        ("javascript:1", "scheme"),
        ("data:image/png;base64,AAAA", "scheme"),
        ("\\\\127.0.0.1\\", "url"),
        ("/\\127.0.0.1/", "url"),
        ("// 127.0.0.1/", "host"),
        ("https://public.example\t/", "url"),
        ("https://b\xfccher.example/", "url"),
        ("https://[::1/", "url"),
        ("https://public.example:port/", "url"),
        ("https://public.example" + "/a" * 4000, "url"),
        ("https://unknown.example/", "dns"),
    ],
)
def test_a_redirect_goes_through_the_same_checks(location: str, outcome: str) -> None:
    """Where a server leads is refused for the same reasons as what a client names; the only peer is that server."""

    async def work() -> None:
        async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
            await _send(writer, redirect(location.replace("PORT", str(server.port))))

        async with web(answer) as server, web(WHOLE, host="127.0.0.1", port=server.port) as inner:
            with witness() as seen:
                got = await fetch(
                    f"http://{OUTSIDE}:{server.port}/",
                    http=True,
                    ports=(443, 80, server.port),
                    allowed=outside_is_allowed,
                )
        assert got.outcome == outcome
        assert str(got.error) == NOT_FETCHED
        assert seen.peers == [OUTSIDE]
        assert inner.connections == 0

    asyncio.run(work())


async def _send(writer: asyncio.StreamWriter, *pieces: bytes, pause: float = 0) -> None:
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(pause)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["/b/c.png?d=e", "../b/c.png?d=e", "HTTP://HOST/b/c.png?d=e", "//HOST/b/c.png?d=e#f"])
def test_a_redirect_is_followed(status: int, location: str) -> None:
    """Relative or absolute, the target is asked for, with nothing about where the fetch came from."""

    async def work() -> None:
        async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
            to = location.replace("HOST", f"{OUTSIDE}:{server.port}")
            await _send(writer, WHOLE if asked.target == "/b/c.png?d=e" else redirect(to, status) + b"not an image")

        async with web(answer) as server:
            url = f"http://{OUTSIDE}:{server.port}/x/a.png?secret"
            got = await fetch(url, http=True, ports=(server.port,), allowed=outside_is_allowed)
        assert (got.outcome, got.body) == ("ok", IMAGE)
        assert not any("secret" in value for _, value in server.asked[1].headers)

    asyncio.run(work())


@pytest.mark.parametrize("hops", [3, 4, 6])
def test_redirects_are_counted(hops: int) -> None:
    """Three redirects are followed, and no fourth."""

    async def work() -> None:
        async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
            number = int(asked.target[1:])
            await _send(writer, WHOLE if number == hops else redirect(f"/{number + 1}"))

        async with web(answer) as server:
            got = await fetch(f"http://{OUTSIDE}:{server.port}/0", http=True, ports=(server.port,), allowed=outside_is_allowed)
        assert got.outcome == ("ok" if hops <= 3 else "redirect_limit")
        assert len(server.asked) == 4

    asyncio.run(work())


def test_a_loop_of_redirects_ends() -> None:
    """A server that leads to itself is left after three redirects."""
    assert asyncio.run(ask(redirect("/a.png"))).outcome == "redirect_limit"


def test_a_redirect_to_another_name_is_resolved_and_checked() -> None:
    """Each hop resolves its own name: the first may be public, the second is not."""

    async def work() -> None:
        async with (
            nameserver(first=[[OUTSIDE]], second=[["10.0.0.1"]]) as (stub, resolve),
            web(redirect("http://second.example/")) as server,
        ):
            with witness() as seen:
                got = await fetch(
                    f"http://first.example:{server.port}/",
                    http=True,
                    ports=(80, server.port),
                    resolve=resolve,
                    allowed=outside_is_allowed,
                )
            assert got.outcome == "private_address"
            assert seen.peers == [OUTSIDE]
            assert {name for name, _ in stub.asked} == {"first.example", "second.example"}

    asyncio.run(work())


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 302 Found\r\n\r\n",
        redirect("/a").replace(b"\r\n\r\n", b"\r\nLocation: /b\r\n\r\n"),
        redirect("/a", 300),
        redirect("/a", 304),
        redirect("/a", 305),
    ],
)
def test_a_redirect_to_nowhere(answer: bytes) -> None:
    """No target, two targets, and statuses that are no plain redirect count as what they are: not 200."""
    assert asyncio.run(ask(answer)).outcome == "status"


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> Authority:
    """An authority that the fetchers of this module trust."""
    return Authority()


async def securely(
    url: str, authority: Authority, *names: str, answer: bytes = WHOLE, **given: object
) -> tuple[Got, outside.Web]:
    """Fetch from a server whose certificate holds ``names``; PORT in the URL is its port; every name leads to it."""

    async def resolve(name: str) -> Sequence[Address]:
        return [ip_address(OUTSIDE)]

    async with web(answer, authority.server(*names)) as server:
        options: dict[str, object] = {"resolve": resolve, "ssl_context": authority.client, "allowed": outside_is_allowed}
        with witness() as seen:
            got = await fetch(url.replace("PORT", str(server.port)), ports=(server.port, 80, 443), **(options | given))
        assert set(seen.peers) == {OUTSIDE}
    return got, server


@pytest.mark.parametrize(
    ("host", "names", "outcome"),
    [
        ("images.example", ["images.example"], "ok"),
        ("images.example", ["other.example", "images.example"], "ok"),
        ("a.images.example", ["*.images.example"], "ok"),
        ("bücher.example", ["xn--bcher-kva.example"], "ok"),
        (OUTSIDE, [OUTSIDE], "ok"),
        ("images.example", ["other.example"], "tls"),
        ("images.example", [OUTSIDE], "tls"),
        ("a.b.images.example", ["*.images.example"], "tls"),
        (OUTSIDE, ["images.example"], "tls"),
    ],
)
def test_the_certificate_is_checked_on_the_name(authority: Authority, host: str, names: list[str], outcome: str) -> None:
    """The connection goes to the address, the certificate is for the name in the URL, or nothing is asked."""
    got, server = asyncio.run(securely(f"https://{host}:PORT/a.png", authority, *names))
    assert got.outcome == outcome
    assert got.body == (IMAGE if outcome == "ok" else b"")
    assert len(server.asked) == (outcome == "ok")


def test_name_goes_into_sni_and_host(authority: Authority) -> None:
    """The server hears the name, in TLS and in HTTP, and never the address."""
    _, server = asyncio.run(securely("https://Bücher.example:PORT/a%20b/ü?x=%2F", authority, "xn--bcher-kva.example"))
    assert server.asked[0].sni == "xn--bcher-kva.example"
    assert server.asked[0].target == "/a%20b/%C3%BC?x=%2F"
    assert server.asked[0].headers[0] == ("host", f"xn--bcher-kva.example:{server.port}")
    assert not any(OUTSIDE in value for _, value in server.asked[0].headers)


def test_an_unknown_authority_is_refused(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate of an authority that the system does not trust is none, even if the environment names that authority."""
    file = tmp_path / "authority.pem"
    file.write_text(authority.certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    got, server = asyncio.run(securely("https://images.example:PORT/", authority, "images.example", ssl_context=None))
    assert got.outcome == "tls"
    assert server.asked == []


def test_no_way_from_https_to_http(authority: Authority) -> None:
    """A redirect from https to http is refused even where http is allowed."""
    for http in (True, False):
        got, server = asyncio.run(
            securely(
                "https://images.example:PORT/", authority, "images.example", answer=redirect("http://public.example/"), http=http
            )
        )
        assert got.outcome == "redirect_downgrade"
        assert len(server.asked) == 1


def test_a_server_that_speaks_no_tls() -> None:
    """Plain text on the port of an https URL is a failure of TLS."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _send(writer, b"SSH-2.0-OpenSSH_9.9\r\n")
        writer.close()
        await writer.wait_closed()

    async def work() -> Got:
        async with await asyncio.start_server(greet, OUTSIDE) as server:
            port = server.sockets[0].getsockname()[1]
            return await fetch(f"https://{OUTSIDE}:{port}/", ports=(port,), allowed=outside_is_allowed)

    assert asyncio.run(work()).outcome == "tls"


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_nothing_goes_along(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """The headers are these and no others; proxies that the environment names are not used."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.lower(), "http://127.0.0.1:9")
    got, server = asyncio.run(securely("https://images.example:PORT/", authority, "images.example"))
    assert got.outcome == "ok"
    assert [name for name, _ in server.asked[0].headers] == ["host", "user-agent", "accept", "accept-encoding", "connection"]
    assert ("accept-encoding", "identity") in server.asked[0].headers


def test_cookies_are_forgotten() -> None:
    """What one answer sets is not sent with the next request, of the same fetch or of another."""

    async def work() -> None:
        cookie = b"\r\nset-cookie: a=b\r\n\r\n"

        async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
            await _send(writer, (WHOLE if asked.target == "/b" else redirect("/b")).replace(b"\r\n\r\n", cookie, 1))

        async with web(answer) as server:
            fetcher = Fetcher(
                mode="public", http=True, ports=(server.port,), allowed=outside_is_allowed, ssl_context=TRUST, limits=PATIENT
            )
            for _ in range(2):
                await fetcher.fetch(f"http://{OUTSIDE}:{server.port}/a", lambda piece: None)
            await fetcher.aclose()
        assert [asked.target for asked in server.asked] == ["/a", "/b"] * 2
        assert not any(name == "cookie" for asked in server.asked for name, _ in asked.headers)

    asyncio.run(work())


# --- what comes back --------------------------------------------------------------------------------------------------

CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
SMALL = replace(PATIENT, max_bytes=1000)

ANSWERS: dict[str, tuple[bytes, str, FetchLimits]] = {
    "whole": (WHOLE, "ok", PATIENT),
    "no length": (OK + b"\r\n" + IMAGE, "ok", PATIENT),
    "chunks": (CHUNKED + b"5\r\nabcde\r\n3;x=y\r\nfgh\r\n0\r\n\r\n", "ok", PATIENT),
    "empty": (OK + b"content-length: 0\r\n\r\n", "ok", PATIENT),
    "identity": (OK + b"content-encoding: identity\r\ncontent-length: 1\r\n\r\na", "ok", PATIENT),
    "called a page": (b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 1\r\n\r\na", "ok", PATIENT),
    "early hints first": (b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + WHOLE, "ok", PATIENT),
    "exactly the limit": (OK + b"content-length: 1000\r\n\r\n" + b"a" * 1000, "ok", SMALL),
    "one byte more": (OK + b"content-length: 1001\r\n\r\n" + b"a" * 1001, "too_large", SMALL),
    "one byte more in chunks": (CHUNKED + b"3e9\r\n" + b"a" * 1001 + b"\r\n0\r\n\r\n", "too_large", SMALL),
    "one byte more until the end": (OK + b"\r\n" + b"a" * 1001, "too_large", SMALL),
    "much is promised": (OK + b"content-length: 99999999999999999999\r\n\r\n", "too_large", SMALL),
    "more is promised than comes": (OK + b"content-length: 900\r\n\r\nabc", "broken", SMALL),
    "chunks without end": (CHUNKED + b"5\r\nabcde\r\n", "broken", SMALL),
    "negative length": (OK + b"content-length: -1\r\n\r\nabc", "broken", PATIENT),
    "two lengths": (OK + b"content-length: 1\r\ncontent-length: 2\r\n\r\nabc", "broken", PATIENT),
    "length in words": (OK + b"content-length: many\r\n\r\nabc", "broken", PATIENT),
    "chunk of nonsense": (CHUNKED + b"zz\r\nabc", "broken", PATIENT),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", "status", PATIENT),
    "part": (b"HTTP/1.1 206 Partial Content\r\ncontent-length: 1\r\n\r\na", "status", PATIENT),
    "not found": (b"HTTP/1.1 404 Not Found\r\ncontent-length: 1\r\n\r\na", "status", PATIENT),
    "not allowed": (b"HTTP/1.1 401 Unauthorized\r\nwww-authenticate: Basic\r\ncontent-length: 0\r\n\r\n", "status", PATIENT),
    "broken server": (b"HTTP/1.1 500 Oh\r\ncontent-length: 1\r\n\r\na", "status", PATIENT),
    "other protocol": (b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nabc", "broken", PATIENT),
    "gzip": (OK + b"content-encoding: gzip\r\n\r\n" + gzip.compress(bytes(10_000_000)), "encoding", PATIENT),
    "gzip twice": (OK + b"content-encoding: identity\r\ncontent-encoding: gzip\r\n\r\n", "encoding", PATIENT),
    "brotli": (OK + b"Content-Encoding: BR\r\n\r\nabc", "encoding", PATIENT),
    "gzip for the way": (OK + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "broken", PATIENT),
    "nothing": (b"", "broken", PATIENT),
    "half a head": (b"HTTP/1.1 200 OK\r\ncontent-", "broken", PATIENT),
    "not HTTP": (b"SSH-2.0-OpenSSH_9.9\r\n" * 10, "broken", PATIENT),
    "long head": (OK + b"x: " + b"a" * 200_000 + b"\r\n\r\n", "broken", PATIENT),
}


@pytest.mark.parametrize(("answer", "outcome", "limits"), ANSWERS.values(), ids=ANSWERS)
def test_answers(answer: bytes, outcome: str, limits: FetchLimits) -> None:
    """Only a whole body of a plain 200 within the limit is an image; never more is written than the limit."""
    got = asyncio.run(ask(answer, limits))
    assert got.outcome == outcome
    assert len(got.body) <= limits.max_bytes
    if outcome == "too_large":
        assert isinstance(got.error, ImageTooLarge)
        assert "1000 bytes" in got.error.message
    elif outcome != "ok":
        assert str(got.error) == NOT_FETCHED


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", b"HTTP/1.1 ", OK, OK + b"\r\n", CHUNKED, b"HTTP/1.1 302 x\r\nlocation: "]))
def test_no_answer_does_more_than_fail(noise: bytes, start: bytes) -> None:
    """Whatever a server sends, the fetch ends with an image's bytes or with an error that is meant."""
    assert asyncio.run(ask(start + noise)).outcome in FETCH_OUTCOMES


def test_a_slow_drip_is_cut_off() -> None:
    """A server that sends a byte now and then, for ever, is left long before the time for everything is over."""
    got = asyncio.run(ask(_endless(OK + b"\r\n", b"a", pause=0.01), replace(PATIENT, rate_seconds=0.5, bytes_per_second=16_384)))
    assert got.outcome == "too_slow"
    assert len(got.body) < 8192


def test_a_burst_does_not_pay_for_a_drip() -> None:
    """The rate is measured over each stretch: what came quickly at first does not count later."""
    first = OK + b"\r\n" + bytes(4_000_000)
    got = asyncio.run(ask(_endless(first, b"a", pause=0.01), replace(PATIENT, rate_seconds=0.5, bytes_per_second=16_384)))
    assert got.outcome == "too_slow"
    assert len(got.body) >= 4_000_000


def test_silence_is_cut_off() -> None:
    """A server that stops speaking, before the head or amid the body, is left after the longest silence."""
    quick = replace(PATIENT, idle_seconds=0.3)
    for spoken in (b"", b"HTTP/1.1 200", OK + b"\r\nabc"):
        assert asyncio.run(ask(_silent(spoken), quick)).outcome == "timeout"


def test_a_dripping_head_is_cut_off() -> None:
    """A head that comes a byte at a time is bounded by the time for everything."""
    assert (
        asyncio.run(ask(_endless(b"HTTP/1.1 200 OK\r\nx: ", b"a", pause=0.01), replace(PATIENT, seconds=0.5))).outcome
        == "timeout"
    )


def test_an_endless_body_is_cut_off() -> None:
    """A body that never ends meets the limit of bytes, or of time if it is slower than that."""
    fast = asyncio.run(ask(_endless(OK + b"\r\n", bytes(65536)), replace(PATIENT, max_bytes=1_000_000)))
    assert (fast.outcome, len(fast.body) <= 1_000_000) == ("too_large", True)
    slow = asyncio.run(ask(_endless(OK + b"\r\n", bytes(1000), pause=0.01), replace(PATIENT, seconds=0.5, bytes_per_second=0)))
    assert slow.outcome == "timeout"


def test_a_body_of_crumbs_is_cut_off() -> None:
    """Chunks of one byte, which cost the event loop far more than their bytes, are not taken for long."""
    crumbs = CHUNKED + b"1\r\na\r\n" * 100_000 + b"0\r\n\r\n"
    got = asyncio.run(ask(crumbs))
    assert got.outcome == "too_slow"
    assert len(got.body) < FREE_PIECES + 10


def test_others_get_their_turn_amid_crumbs() -> None:
    """While a body of many small chunks is read, another task of the event loop runs again and again."""

    async def work() -> int:
        turns = 0
        done = False

        async def other() -> None:
            nonlocal turns
            while not done:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        body = CHUNKED + b"100\r\n" + bytes(256) + b"\r\n"
        got = await ask(body + (b"100\r\n" + bytes(256) + b"\r\n") * 3000 + b"0\r\n\r\n")
        done = True
        await task
        assert got.outcome == "ok"
        return turns

    assert asyncio.run(work()) > 3000 / 64


@pytest.mark.parametrize(("reset", "outcome"), [(False, "tls"), (True, "connect")])
def test_a_server_that_hangs_up(reset: bool, outcome: str) -> None:
    """A connection closed amid the handshake is a failure of TLS; one that is reset is no connection, and the next is tried."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        if reset:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def work() -> Got:
        async with await asyncio.start_server(hang_up, OUTSIDE) as server:
            port = server.sockets[0].getsockname()[1]
            return await fetch(f"https://{OUTSIDE}:{port}/", ports=(port,), allowed=outside_is_allowed)

    assert asyncio.run(work()).outcome == outcome


def test_a_server_that_does_not_shake_hands() -> None:
    """A connection on which TLS does not get on is left after the time for connecting."""

    async def work() -> Got:
        async with web(_silent(b"")) as server:
            return await fetch(
                f"https://{OUTSIDE}:{server.port}/",
                ports=(server.port,),
                allowed=outside_is_allowed,
                limits=replace(PATIENT, connect_seconds=0.3),
            )

    assert asyncio.run(work()).outcome == "timeout"


def _endless(first: bytes, then: bytes, pause: float = 0) -> outside.Answer:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        await _send(writer, first)
        while True:
            await _send(writer, then, pause=pause)

    return answer


def _silent(first: bytes) -> outside.Answer:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        await _send(writer, first)
        await asyncio.sleep(3600)

    return answer


# --- leaving ----------------------------------------------------------------------------------------------------------


async def _leave(answer: outside.Answer, end: Callable[[asyncio.Task[None], asyncio.Event], Awaitable[None]]) -> list[str]:
    """Begin a fetch, let ``end`` end it, and wait until the server sees that the connection is closed."""
    told: list[str] = []
    began = asyncio.Event()

    def write(piece: bytes) -> None:
        began.set()

    async with web(answer) as server:
        fetcher = Fetcher(
            mode="public",
            http=True,
            ports=(server.port,),
            allowed=outside_is_allowed,
            ssl_context=TRUST,
            limits=PATIENT,
            told=told.append,
        )
        task = asyncio.create_task(fetcher.fetch(f"http://{OUTSIDE}:{server.port}/", write))
        await server.served.wait()
        await end(task, began)
        await asyncio.wait_for(server.left.wait(), 30)
        await fetcher.aclose()
    return told


@pytest.mark.parametrize("spoken", [b"", OK + b"\r\nabc"], ids=["before the head", "amid the body"])
def test_cancelling_closes_the_connection(spoken: bytes) -> None:
    """Whoever asked may leave at any time; the other server sees the connection closed, and the metrics hear of it."""

    async def cancel(task: asyncio.Task[None], began: asyncio.Event) -> None:
        if spoken:
            await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert asyncio.run(_leave(_silent(spoken), cancel)) == ["abandoned"]


@pytest.mark.parametrize("error", [ValueError("no image"), OSError("disk full"), TimeoutError("too slow")], ids=repr)
def test_what_write_raises_comes_out(error: Exception) -> None:
    """A reader that will not have the bytes ends the fetch with its own error, and the connection is closed."""

    async def work() -> None:
        told: list[str] = []

        def write(piece: bytes) -> None:
            raise error

        async with web(_silent(OK + b"\r\nabc")) as server:
            fetcher = Fetcher(
                mode="public",
                http=True,
                ports=(server.port,),
                allowed=outside_is_allowed,
                ssl_context=TRUST,
                limits=PATIENT,
                told=told.append,
            )
            with pytest.raises(type(error)) as raised:
                await fetcher.fetch(f"http://{OUTSIDE}:{server.port}/", write)
            await asyncio.wait_for(server.left.wait(), 30)
            await fetcher.aclose()
        assert raised.value is error
        assert told == ["abandoned"]

    asyncio.run(work())


def test_a_failed_fetch_closes_the_connection() -> None:
    """A server that goes on sending after it was refused finds the connection closed."""

    async def work() -> None:
        async with web(_silent(OK + b"content-encoding: gzip\r\n\r\nabc")) as server:
            url = f"http://{OUTSIDE}:{server.port}/"
            assert (await fetch(url, http=True, ports=(server.port,), allowed=outside_is_allowed)).outcome == "encoding"
            await asyncio.wait_for(server.left.wait(), 30)

    asyncio.run(work())


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_nothing_is_logged(caplog: pytest.LogCaptureFixture, authority: Authority) -> None:
    """At DEBUG, in good fetches and bad ones, no log has a word of the URL, the name, or the other server's headers."""
    caplog.set_level(logging.DEBUG)
    for answer in (WHOLE, redirect("https://canary-b.example/?signature"), redirect("http://canary-c.example/")):
        asyncio.run(securely("https://canary-a.example:PORT/canary?canary", authority, "canary-a.example", answer=answer))
    asyncio.run(fetch("https://canary-d.example/canary"))
    assert "canary" not in caplog.text
    assert OUTSIDE not in caplog.text


def test_fetches_are_counted() -> None:
    """Each outcome is a series from the start, and a fetch adds one to its own."""
    metrics = Metrics(())
    fetcher = Fetcher(mode="public", told=metrics.fetched, ssl_context=TRUST)
    with pytest.raises(ImageNotFetched):
        asyncio.run(fetcher.fetch("https://127.0.0.1/", lambda piece: None))
    families = {family.name: family for family in text_string_to_metric_families(metrics.expose().decode())}
    series = {sample.labels["outcome"]: sample.value for sample in families["ergo_image_fetches"].samples}
    assert series == {outcome: float(outcome == "private_address") for outcome in FETCH_OUTCOMES}


def test_the_settings_hand_down_what_the_fetcher_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by default; every limit has a setting of its name, with the same default."""
    settings = Settings()
    assert settings.fetch == "off"
    limits = {name: getattr(settings, f"fetch_{name}") for name in FetchLimits.__dataclass_fields__}
    assert FetchLimits(**limits) == FetchLimits()
    monkeypatch.setenv("ERGO_FETCH", "allowlist")
    monkeypatch.setenv("ERGO_FETCH_HOSTS", '["*.images.example"]')
    settings = Settings()
    asyncio.run(
        Fetcher(mode=settings.fetch, hosts=settings.fetch_hosts, http=settings.fetch_http, ports=settings.fetch_ports).aclose()
    )


NETWORK = {
    "aiohttp",
    "anyio",
    "ftplib",
    "http",
    "httpcore",
    "httpcore2",
    "httpx",
    "httpx2",
    "requests",
    "smtplib",
    "socket",
    "socketserver",
    "telnetlib",
    "urllib3",
    "websockets",
    "xmlrpc",
    "poplib",
    "imaplib",
}
"""Top-level modules that can open a connection."""

CONNECTING = {
    "open_connection",
    "open_unix_connection",
    "create_connection",
    "create_unix_connection",
    "create_datagram_endpoint",
    "sock_connect",
    "connect",
    "getaddrinfo",
    "urlopen",
}
"""Names of what opens one, in whatever module."""


def _reaches_out(text: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        else:
            names = set()
        found |= {name for name in names if name.split(".")[0] in NETWORK or name.startswith("urllib.request")}
        if isinstance(node, ast.Attribute) and node.attr in CONNECTING:
            found.add(node.attr)
    return found


def test_one_file_fetches() -> None:
    """No file but this one and the engine's client opens connections; those that accept them import ``socket`` and do no more."""
    server = support.ROOT / "server" / "ergo_server"
    found = {str(path.relative_to(server)): _reaches_out(path.read_text()) for path in server.rglob("*.py")}
    assert "httpx2" in found.pop("intake/fetch.py")
    assert "httpx2" in found.pop("engine/vllm.py")
    assert found.pop("api/listen.py") == {"socket", "getaddrinfo"}
    assert found.pop("api/connection.py") == {"socket"}
    assert {name: what for name, what in found.items() if what} == {}


def test_the_search_finds_what_it_looks_for() -> None:
    """Each usual way of opening a connection is one that the test above would see."""
    for text in (
        "import httpx2",
        "import http.client",
        "from urllib import request",
        "from urllib.request import urlopen",
        "import urllib.request as r",
        "def f():\n    from httpcore2 import Request",
        "import asyncio\nasyncio.open_connection('a', 1)",
        "import socket as s",
        "loop.create_connection(f)",
    ):
        assert _reaches_out(text), text
