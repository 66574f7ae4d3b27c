"""API keys: who may ask, and what each may use.

A key is 256 random bits that ``ergo-vqa keys new NAME`` draws and shows once; the server keeps its SHA-256 only. Keys stand in
a file (``ERGO_API_KEYS_FILE``), in the environment (``ERGO_API_KEYS``, where ``;`` may stand for the end of a line), or in both,
one a line:

    # tenant  SHA-256 of the key       limits that differ from the server's, if any
    alice     (64 hexadecimal digits)
    bob       (64 hexadecimal digits)  requests_per_minute=60 concurrent_requests=4

A tenant may have several keys, and that is how one is replaced: add a line, have the new key taken into use, remove the old line.
The file is read again when it has changed. Limits belong to the tenant, not to the key, so they need to stand on one of its lines
only; 0 is no limit.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

log = logging.getLogger("ergo_server")

MAX_FILE_BYTES = 1024 * 1024
"""Longest keys file: ten thousand keys. Every one of them is compared on every request, which takes 0.5 ms."""

LOOK_SECONDS = 1.0
"""How often the file may be looked at: one stat, microseconds. A key that was withdrawn is good for a second more at most."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_NUMBER = re.compile(r"[0-9]{1,9}")

PREFIX = "ergo-"
"""Begins every key, so that those who search repositories for secrets can know one."""


class KeysError(ValueError):
    """The keys cannot be used; the text names the place, and repeats nothing of what stands there: it may be a key."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one tenant may use; 0 is no limit."""

    requests_per_minute: int = 0
    concurrent_requests: int = 0
    visual_tokens_per_minute: int = 0


_LIMITS = tuple(field.name for field in fields(Limits))


@dataclass(frozen=True, slots=True)
class Tenant:
    """One who may ask: the owner of one or several keys."""

    name: str
    limits: Limits = Limits()


ANONYMOUS = Tenant("anonymous")
"""Everybody, where no keys are configured. Without limits: all callers together would share them."""


@dataclass(frozen=True, slots=True)
class _Line:
    """One key as it was configured."""

    where: str
    name: str
    digest: bytes
    limits: dict[str, int]


class Keys:
    """The keys that are known.

    Args:
        text: lines with keys, from the environment.
        file: a file with more of them; read again when it has changed. One that cannot be used then is ignored, with one warning.
        defaults: limits of a tenant whose lines name no others.
        clock: monotonic seconds.

    Raises:
        KeysError: a line is malformed or contradicts another one, the file cannot be read, or there is no key in either.
    """

    def __init__(
        self,
        text: str = "",
        file: Path | None = None,
        defaults: Limits = Limits(),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.needed = file is not None or bool(text.strip())
        """Whether a key is asked for at all."""
        self._given = _parse(text.replace(";", "\n"), "ERGO_API_KEYS")
        self._file = file
        self._defaults = defaults
        self._clock = clock
        self._looked = clock()
        self._seen = _state(file)
        self._known = self._read() if self.needed else ()

    def tenant(self, key: bytes) -> Tenant | None:
        """Return whose key this is, or None. Takes as long whether it is known or not, and whichever it is."""
        if not self.needed:
            return ANONYMOUS
        self._look()
        digest = hashlib.sha256(key).digest()
        found = None
        for known, tenant in self._known:  # to the end: a loop that stops at the match tells where that was
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    def _look(self) -> None:
        """Read the file again if it has changed since it was looked at."""
        now = self._clock()
        if self._file is None or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        seen = _state(self._file)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._known = self._read()
        except KeysError as error:
            log.warning("the API keys stay as they were: %s", error)
        else:
            log.info("the API keys were read again; there are %d", len(self._known))

    def _read(self) -> Sequence[tuple[bytes, Tenant]]:
        lines = list(self._given)
        if self._file is not None:
            lines += _parse(_content(self._file), str(self._file))
            if not lines:  # cut off while it was written, more likely than meant: it must not lock everybody out
                raise KeysError(f"{self._file}: there is no key in it")
        if not lines:
            raise KeysError("ERGO_API_KEYS: there is no key in it")
        return _combine(lines, self._defaults)


def _state(file: Path | None) -> tuple[int, int, int, int] | None:
    """What changes when a file does, its permissions included; None where there is none."""
    try:
        found = file.stat() if file is not None else None
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino) if found else None


def _content(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise KeysError(f"{file}: is longer than {MAX_FILE_BYTES:,} bytes")
        return content.decode("utf-8-sig")  # some editors begin with a byte order mark
    except OSError as error:
        raise KeysError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise KeysError(f"{file}: is not text in UTF-8") from None


def _parse(text: str, source: str) -> list[_Line]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        words = line.partition("#")[0].split()
        if words:
            found.append(_parse_line(words, f"{source}, line {number}"))
    return found


def _parse_line(words: Sequence[str], where: str) -> _Line:
    name, *rest = words
    if not is_tenant_name(name):
        raise KeysError(f"{where}: the first word must be the tenant's name: letters, digits, '.', '_', '-', not 'anonymous'")
    if not rest or not _DIGEST.fullmatch(rest[0]):
        raise KeysError(f"{where}: the second word must be the SHA-256 of the key, 64 hexadecimal digits, never the key itself")
    limits: dict[str, int] = {}
    for word in rest[1:]:
        limit, _, value = word.partition("=")
        if limit not in _LIMITS or not _NUMBER.fullmatch(value):
            raise KeysError(f"{where}: what follows the SHA-256 must be LIMIT=NUMBER, with a limit of {', '.join(_LIMITS)}")
        if limit in limits:
            raise KeysError(f"{where}: {limit} is given twice")
        limits[limit] = int(value)
    return _Line(where, name, bytes.fromhex(rest[0]), limits)


def _combine(lines: Sequence[_Line], defaults: Limits) -> Sequence[tuple[bytes, Tenant]]:
    """Put the lines of each tenant together."""
    limits: dict[str, dict[str, int]] = {}
    first: dict[bytes, str] = {}
    for line in lines:
        if line.digest in first:
            raise KeysError(f"{line.where}: the same key stands in {first[line.digest]}")
        first[line.digest] = line.where
        of_tenant = limits.setdefault(line.name, {})
        for limit, value in line.limits.items():
            if of_tenant.setdefault(limit, value) != value:
                raise KeysError(f"{line.where}: another line of the same tenant has another {limit}")
    tenants = {name: Tenant(name, replace(defaults, **given)) for name, given in limits.items()}
    return tuple((line.digest, tenants[line.name]) for line in lines)


def is_tenant_name(name: str) -> bool:
    """Say whether a tenant may be called so: at most 64 letters, digits, '.', '_', '-', the first a letter or digit."""
    return _NAME.fullmatch(name) is not None and name != ANONYMOUS.name


def new_key(name: str) -> tuple[str, str]:
    """Draw a key for a tenant; returns the key, and the line that makes it known."""
    key = PREFIX + secrets.token_urlsafe(32)
    return key, f"{name}  {hashlib.sha256(key.encode()).hexdigest()}"


def bearer(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the key that a request brings as ``Authorization: Bearer …`` (RFC 6750 §2.1), empty if it brings none.

    No other header is looked at: every OpenAI client sends this one, and proxies and log filters know that it is secret.
    """
    given = [value for name, value in headers if name == b"authorization"]
    scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


def salt(secret: bytes, tenant: Tenant) -> str:
    """Return what keeps a tenant's share of the engine's prefix cache apart: nobody can see by timing what another asked.

    52 characters a-z and 2-7: vLLM joins the salt with other parts of a key, so that ``@``, ``/``, ``\\`` and NUL must not be in
    it (GHSA-wpww-v874-ph2p). Empty for the anonymous tenant, who is everybody: there is nobody to keep apart.

    Args:
        secret: the server's; without it, who knows a tenant's name would know its salt.
        tenant: whose.
    """
    if tenant is ANONYMOUS:
        return ""
    return base64.b32encode(hmac.digest(secret, tenant.name.encode(), "sha256")).rstrip(b"=").decode().lower()
