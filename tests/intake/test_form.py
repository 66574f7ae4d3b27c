"""Multipart forms: what is sent comes out, however it is cut into pieces, and nothing else does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ergo_server.errors import RequestError
from ergo_server.intake.form import FormLimits, Texts, read_form


class Sink:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.data = b""
        self.before: Texts = {}
        self.pieces = 0
        self.ended = False

    def write(self, chunk: bytes) -> None:
        """Take some more."""
        self.data += chunk
        self.pieces += 1

    def end(self) -> None:
        """There are no more."""
        self.ended = True


LIMITS = FormLimits(fields=5, field_bytes=100)


def read(body: bytes, content_type: str, cuts: int = 7, limits: FormLimits = LIMITS) -> tuple[Texts, Sink | None]:
    """Read a form that comes in pieces of ``cuts`` bytes."""

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), cuts):
            yield body[start : start + cuts]

    sink = Sink()

    def opened(name: str, texts: Texts) -> Sink:
        sink.before = {key: list(values) for key, values in texts.items()}
        return sink

    texts, file = asyncio.run(read_form(chunks(), content_type, opened, limits))
    assert file is None or file is sink
    return texts, sink if file is not None else None


def form(fields: dict[str, list[str]], image: bytes | None) -> tuple[bytes, str]:
    """Return a form as httpx writes it, and its content type."""
    files: list[tuple[str, tuple[str | None, str | bytes]]]
    files = [(name, (None, value)) for name, values in fields.items() for value in values]
    if image is not None:
        files.append(("image", ("x.jpg", image)))
    request = httpx2.Request("POST", "http://x/", files=files)
    return request.read(), request.headers["content-type"]


TEXTS = st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=3)
FIELDS = st.dictionaries(st.text("abcdef", min_size=1), TEXTS, min_size=1, max_size=4)
FILES = st.none() | st.binary(max_size=300) | st.just(b"\r\n--not the boundary\r\n\r\n--")


@given(FIELDS, FILES, st.integers(1, 90))
def test_what_is_sent_comes_out(fields: dict[str, list[str]], image: bytes | None, cuts: int) -> None:
    """Fields keep their names, values and order, and the file its bytes, wherever the network cuts them."""
    texts, sink = read(*form(fields, image), cuts, FormLimits())
    assert texts == fields
    assert (sink.data if sink else None) == image
    assert sink is None or (sink.ended and sink.before == texts)


def test_a_file_is_passed_on_while_it_arrives() -> None:
    """The sink has the file's bytes piece by piece, not at the end."""
    _, sink = read(*form({"question": ["?"]}, bytes(range(256)) * 100), cuts=1000)
    assert sink is not None
    assert sink.pieces > 20


BOUNDARY = "multipart/form-data; boundary=b"
NAMED = 'content-disposition: form-data; name="a"'
FILE = 'content-disposition: form-data; name="image"; filename="f"'
END = "--b--\r\n"


def part(head: str, body: str = "x") -> str:
    """Return one part."""
    return f"--b\r\n{head}\r\n\r\n{body}\r\n"


@pytest.mark.parametrize(
    ("body", "content_type", "says"),
    [
        ("", "multipart/form-data", "no boundary"),
        ("nothing", BOUNDARY, "cannot be read"),
        ("", BOUNDARY, "in the middle"),
        (part(NAMED), BOUNDARY, "in the middle"),
        (part(FILE, "half"), BOUNDARY, "in the middle"),
        (part("content-disposition: form-data") + END, BOUNDARY, "no name"),
        (part("x-other: 1") + END, BOUNDARY, "no name"),
        (part(FILE) * 2 + END, BOUNDARY, "more than one file"),
        (part(NAMED) * (LIMITS.fields + 1) + END, BOUNDARY, "more than 5 fields"),
        (part(NAMED, "x" * (LIMITS.field_bytes + 1)) + END, BOUNDARY, "longer than 100 bytes"),
        (part(NAMED + "\r\n" + "\r\n".join(f"x-{n}: 1" for n in range(100))) + END, BOUNDARY, "cannot be read"),
        (part(NAMED + "\r\nx: " + "y" * 100_000) + END, BOUNDARY, "cannot be read"),
        ("", "multipart/form-data; boundary=" + "b" * 1000, "cannot be read"),
        (part(NAMED, "\ud800") + END, BOUNDARY, "not UTF-8"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_a_broken_form_is_refused(body: str, content_type: str, says: str) -> None:
    """Whatever is wrong with a form is a request error that says what, and never an exception of the parser."""
    with pytest.raises(RequestError, match=says):
        read(body.encode("utf-8", "surrogatepass"), content_type, cuts=4096)


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    """Bytes that are no form, or the beginning or a mixture of forms, raise nothing but a request error."""
    for data in (body, part(NAMED).encode() + body, part(FILE).encode() + body + END.encode()):
        with contextlib.suppress(RequestError):
            read(data, BOUNDARY)
