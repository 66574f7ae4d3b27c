"""Writes docs/python-client.md, the reference of `ergo_client`, from its code: ``python docs/python_client.py``."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import ergo_client

PAGE = Path(__file__).parent / "python-client.md"

WIDTH = 100
"""Columns of a signature on one line."""

_INTRODUCTION = """\
# Python client

Made from the code by `python docs/python_client.py`. `pip install ergo-vqa` brings `ergo_client` and what it needs, httpx2;
Pillow and numpy are used where they are there. `AsyncClient` has the methods of `Client`, to be awaited.
"""


def page() -> str:
    """Return the page."""
    exported = [getattr(ergo_client, name) for name in ergo_client.__all__]
    clients = [thing for thing in exported if thing in (ergo_client.Client, ergo_client.AsyncClient)]
    errors = [thing for thing in exported if inspect.isclass(thing) and issubclass(thing, Exception)]
    records = [thing for thing in exported if dataclasses.is_dataclass(thing)]
    parts = [_INTRODUCTION, "## Clients\n", *(_client(client) for client in reversed(clients))]
    parts += ["## What is asked and answered\n", *(_record(record) for record in records)]  # type: ignore[arg-type]
    parts += ["## Errors\n", *(_error(error) for error in sorted(errors, key=lambda error: len(error.__mro__)))]
    return "\n".join(parts)


def _client(client: type) -> str:
    parts = [f"### `{client.__name__}`\n\n{_declared(client.__name__, client)}\n{_text(client)}\n"]
    for name, method in vars(client).items():
        if name.startswith("_") or not callable(method):
            continue
        if client is ergo_client.AsyncClient and name != "aclose":  # the others are described with `Client`
            continue
        parts.append(f"#### `{name}`\n\n{_declared(name, method)}\n{_text(method)}\n")
    return "\n".join(parts)


def _declared(name: str, thing: object) -> str:
    """Return a signature as a block of code, a parameter a line where it is long."""
    line = f"{name}{_signature(thing)}"
    if len(line) > WIDTH:
        inner, _, returns = line[len(name) + 1 :].rpartition(")")
        parameters = re.split(r", (?=\w+: |\*, )", inner)
        line = f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){returns}"
    return f"```\n{line}\n```\n"


def _record(record: type) -> str:
    lines = list(_fields(record))
    methods = [
        f"* `.{name}{_signature(thing) if callable(thing) else ''}`: {_text(thing).splitlines()[0]}"
        for name, thing in vars(record).items()
        if not name.startswith("_") and (inspect.isfunction(thing) or isinstance(thing, property))
    ]
    return "\n".join([f"### `{record.__name__}`\n\n{_text(record)}\n", *lines, *methods]) + "\n"


def _fields(record: type) -> Iterator[str]:
    """Yield each field with its type and the text below it, where that adds something."""
    source = inspect.getsource(record)
    for field in dataclasses.fields(record):
        found = re.search(rf'^    {field.name}: [^\n]*\n    """(.*?)"""', source, re.MULTILINE | re.DOTALL)
        says = f": {' '.join(found[1].split())}" if found else ""
        yield f"* `{field.name}: {field.type}`{says}"


def _error(error: type) -> str:
    parent = f", a `{error.__mro__[1].__name__}`" if error.__mro__[1] is not Exception else ""
    return f"### `{error.__name__}`{parent}\n\n{_text(error)}\n"


def _signature(thing: object) -> str:
    signature = inspect.signature(thing)  # type: ignore[arg-type]
    parameters = [parameter for name, parameter in signature.parameters.items() if name != "self"]
    # Annotations are texts in this code, and shown in quotes.
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(signature.replace(parameters=parameters)))
    return text.replace("'", '"').removesuffix(" -> None")


def _text(thing: object) -> str:
    """Return a docstring as Markdown: its sections become lists."""
    lines = (inspect.getdoc(thing) or "").replace("``", "`").splitlines()
    found: list[str] = []
    section = False
    for line in lines:
        if line in ("Args:", "Raises:", "Returns:", "Yields:", "Attributes:"):
            section = True
            found.append(f"*{line[:-1]}*\n")
        elif section and re.match(r"    [\w*]+: ", line):
            name, _, says = line.strip().partition(": ")
            found.append(f"* `{name}`: {says}")
        else:
            section = section and (line.startswith("    ") or not line)
            found.append(("  " + line.strip()) if section and line else line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(found))


if __name__ == "__main__":
    PAGE.write_text(page())
