"""The world outside, on loopback: a nameserver, web servers with certificates, and a witness of every connection."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import socket
import ssl
import struct
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

Address = IPv4Address | IPv6Address

OUTSIDE = "127.0.0.2"
"""Stands for the internet in tests that need a server there; Linux answers on all of 127.0.0.0/8."""

# --- the witness ------------------------------------------------------------------------------------------------------


@dataclass
class Witness:
    """What one process did with its sockets.

    Attributes:
        peers: addresses to which a connection was begun, in order.
        looked_up: hosts that the system's resolver was asked for.
    """

    peers: list[str] = field(default_factory=list)
    looked_up: list[str] = field(default_factory=list)


_watching: list[Witness] = []


def _hear(event: str, args: tuple[object, ...]) -> None:
    if event == "socket.connect":
        peer = str(args[1][0])  # type: ignore[index]
        for witness in _watching:
            witness.peers.append(peer)
        if _watching and not ip_address(peer).is_loopback:
            raise ConnectionRefusedError("no packet of a test leaves the machine")
    if event == "socket.getaddrinfo":
        for witness in _watching:
            witness.looked_up.append(str(args[0]))


sys.addaudithook(_hear)  # the interpreter itself calls it for every socket of the process, whoever made it


@contextlib.contextmanager
def witness() -> Iterator[Witness]:
    """Watch the process' sockets; connections beyond loopback are recorded and then refused."""
    seen = Witness()
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)


# --- certificates -----------------------------------------------------------------------------------------------------


class Authority:
    """A certificate authority that only `client` trusts."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority of a test")])
        made = self._sign(self._name, self._key, x509.BasicConstraints(ca=True, path_length=0))
        self.certificate = made.public_bytes(Encoding.PEM).decode()
        self.client = ssl.create_default_context(cadata=self.certificate)

    def server(self, *names: str) -> ssl.SSLContext:
        """Return the context of a server whose certificate holds these names and addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        made = self._sign(x509.Name([]), key, x509.SubjectAlternativeName([_alternative(name) for name in names]))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "server.pem")
            secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            file.write_bytes(secret + made.public_bytes(Encoding.PEM))
            context.load_cert_chain(file)
        return context

    def _sign(self, name: x509.Name, key: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder(self._name, name, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        return builder.add_extension(extension, critical=True).sign(self._key, SHA256())


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


# --- web servers ------------------------------------------------------------------------------------------------------


@dataclass
class Asked:
    """One request as a server got it.

    Attributes:
        target: path and query.
        headers: in order, names in lower case.
        sni: the name that TLS was asked for.
    """

    target: str
    headers: list[tuple[str, str]]
    sni: str | None


@dataclass
class Web:
    """A running server.

    Attributes:
        port: where it listens.
        asked: requests so far.
        connections: connections accepted so far, TLS or not.
        served: set when there was a request.
        left: set when a client closed a connection.
    """

    port: int
    asked: list[Asked]
    connections: int = 0
    served: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)


Answer = Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def web(
    answer: bytes | Answer, tls: ssl.SSLContext | None = None, host: str = OUTSIDE, port: int = 0
) -> AsyncIterator[Web]:
    """Run a server that answers each connection once, with these bytes or by this function, and closes it."""
    names: list[str | None] = []
    if tls is not None:
        tls.sni_callback = lambda tls_object, name, context: names.append(name)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        running.connections += 1
        try:
            await exchange(reader, writer)
            writer.close()
            await writer.wait_closed()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client is gone, or the test over
        finally:
            writer.transport.abort()

    async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines[1:-2])]
        asked = Asked(lines[0].split(" ")[1], headers, names[-1] if names else None)
        running.asked.append(asked)
        running.served.set()
        watch = asyncio.ensure_future(_until_closed(reader, running.left))
        try:
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(asked, writer)
        finally:
            watch.cancel()

    listening = socket.create_server((host, port))
    running = Web(listening.getsockname()[1], [])
    server = await asyncio.start_server(serve, sock=listening, ssl=tls)
    try:
        yield running
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)


async def _until_closed(reader: asyncio.StreamReader, left: asyncio.Event) -> None:
    with contextlib.suppress(OSError):
        while await reader.read(4096):
            pass
    left.set()


# --- names ------------------------------------------------------------------------------------------------------------

A, AAAA = 1, 28
"""Types of DNS records (RFC 1035, RFC 3596)."""


class Nameserver(asyncio.DatagramProtocol):
    """A nameserver that speaks DNS over UDP (RFC 1035).

    Args:
        zone: for each name the answers to the first look-up, the second and so on; the last stands for all that follow.
    """

    def __init__(self, zone: dict[str, Sequence[Sequence[str]]]) -> None:
        self._zone = zone
        self.asked: list[tuple[str, int]] = []
        """Names and record types, in order."""

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        name, end = _read_name(data, 12)
        kind = struct.unpack_from("!H", data, end)[0]
        number = self.asked.count((name, kind))
        self.asked.append((name, kind))
        answers = self._zone.get(name, [[]])
        found = [ip_address(text) for text in answers[min(number, len(answers) - 1)]]
        records = [address.packed for address in found if (address.version == 4) == (kind == A)]
        flags = 0x8180 | (3 if name not in self._zone else 0)  # an answer, from one who recurses; 3 says: no such name
        reply = data[:2] + struct.pack("!5H", flags, 1, len(records), 0, 0) + data[12 : end + 4]
        reply += b"".join(struct.pack("!3HIH", 0xC00C, kind, 1, 0, len(record)) + record for record in records)
        self._transport.sendto(reply, addr)


def _read_name(message: bytes, at: int) -> tuple[str, int]:
    labels = []
    while length := message[at]:
        labels.append(message[at + 1 : at + 1 + length].decode("ascii"))
        at += 1 + length
    return ".".join(labels), at + 1


@contextlib.asynccontextmanager
async def nameserver(
    **zone: Sequence[Sequence[str]],
) -> AsyncIterator[tuple[Nameserver, Callable[[str], Awaitable[Sequence[Address]]]]]:
    """Run a nameserver for names below ``.example``; yields it, and a function that asks it for the addresses of a name."""
    loop = asyncio.get_running_loop()
    transport, stub = await loop.create_datagram_endpoint(
        lambda: Nameserver({f"{name}.example": answers for name, answers in zone.items()}), local_addr=("127.0.0.1", 0)
    )
    server = transport.get_extra_info("sockname")

    async def ask(name: str, kind: int) -> list[Address]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.setblocking(False)
            labels = b"".join(bytes([len(label)]) + label.encode("ascii") for label in name.split("."))
            query = struct.pack("!6H", kind, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", kind, 1)
            await loop.sock_sendto(one, query, server)
            reply = await loop.sock_recv(one, 65535)
        number, flags, _, count = struct.unpack_from("!4H", reply)
        assert number == kind
        if flags & 0xF:
            raise OSError("no such name")
        found: list[Address] = []
        at = len(query)
        for _ in range(count):
            length = struct.unpack_from("!H", reply, at + 10)[0]
            found.append(ip_address(reply[at + 12 : at + 12 + length]))
            at += 12 + length
        return found

    async def resolve(name: str) -> Sequence[Address]:
        return [*await ask(name, A), *await ask(name, AAAA)]

    try:
        yield stub, resolve
    finally:
        transport.close()
