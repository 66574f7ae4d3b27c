"""Multipart forms, read while they arrive: the bytes of a file are passed on as they come, and are kept nowhere else.

Starlette's own reader spools files to disk and has them only when the whole form is there; the parser below both is
python-multipart.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterable, Callable
from dataclasses import dataclass
from typing import Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ergo_server.errors import RequestError

Texts = dict[str, list[str]]

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns, with letters of it, of each form that is broken


@dataclass(frozen=True, slots=True)
class FormLimits:
    """What a form may be like."""

    fields: int = 64
    """A question has a dozen, and up to 26 choices."""
    field_bytes: int = 1 << 20
    """Of one text; a question is at most a few kilobytes."""


class Sink(Protocol):
    """Takes the bytes of a file."""

    def write(self, chunk: bytes) -> object:
        """Take some more."""

    def end(self) -> object:
        """There are no more."""


async def read_form(
    chunks: AsyncIterable[bytes], content_type: str, open_file: Callable[[str, Texts], Sink], limits: FormLimits
) -> tuple[Texts, Sink | None]:
    """Read a form with at most one file.

    Args:
        chunks: the body.
        content_type: of the request, with the boundary.
        open_file: called with the file's field name and the text fields that came before it; returns where its bytes go.
        limits: what the form may be like.

    Returns:
        The text fields, each with all its values in order, and what ``open_file`` returned.

    Raises:
        RequestError: the form is broken, incomplete, or has too many or too long parts.
    """
    form = _Form(open_file, limits)
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise RequestError("the form has no boundary")
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": form.begin,
                "on_header_field": form.header_name,
                "on_header_value": form.header_value,
                "on_header_end": form.header_end,
                "on_headers_finished": form.headers_end,
                "on_part_data": form.data,
                "on_part_end": form.end,
                "on_end": form.finish,
            },
        )
        async for chunk in chunks:
            parser.write(chunk)
        parser.finalize()
    except FormParserError as error:
        raise RequestError("the form cannot be read") from error
    if not form.complete:
        raise RequestError("the form ends in the middle")
    return form.texts, form.file


class _Form:
    """Takes the parser's calls."""

    def __init__(self, open_file: Callable[[str, Texts], Sink], limits: FormLimits) -> None:
        self.texts: Texts = {}
        self.file: Sink | None = None
        self.complete = False
        self._open_file = open_file
        self._limits = limits
        self._fields = 0
        self._name = ""
        self._header = [b"", b""]
        self._disposition = b""
        self._text: bytearray | None = None
        """Of the field that is being read; None while it is the file."""

    def begin(self) -> None:
        self._disposition = b""

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0] += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1] += data[start:end]

    def header_end(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = value
        self._header = [b"", b""]

    def headers_end(self) -> None:
        options = parse_options_header(self._disposition.decode("latin-1"))[1]
        if b"name" not in options:
            raise RequestError("a part of the form has no name")
        self._name = _decoded(options[b"name"])
        self._fields += 1
        if self._fields > self._limits.fields:
            raise RequestError(f"the form has more than {self._limits.fields} fields")
        if b"filename" not in options:
            self._text = bytearray()
            return
        if self.file is not None:
            raise RequestError("the form has more than one file", param=self._name)
        self._text = None
        self.file = self._open_file(self._name, self.texts)

    def data(self, data: bytes, start: int, end: int) -> None:
        piece = data[start:end]
        if self._text is None:
            assert self.file is not None
            self.file.write(piece)
            return
        if len(self._text) + len(piece) > self._limits.field_bytes:
            raise RequestError(f"a field of the form is longer than {self._limits.field_bytes:,} bytes", param=self._name)
        self._text += piece

    def end(self) -> None:
        if self._text is not None:
            self.texts.setdefault(self._name, []).append(_decoded(bytes(self._text)))
        elif self.file is not None:
            self.file.end()

    def finish(self) -> None:
        self.complete = True


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise RequestError("a field of the form is not UTF-8") from error
