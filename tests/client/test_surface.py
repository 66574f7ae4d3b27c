"""What users of ergo_client see of it: names, signatures, types, its README."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import re
import subprocess
import sys
import typing
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from pathlib import Path
from typing import Any, assert_type

import numpy
import pytest
from backend import gives, serving, streams
from PIL import Image
from support import ROOT

import ergo_client
from ergo_client import Answer, AsyncClient, Client, ClientError, Done, Event, Question, UploadedImage

README = ROOT / "client" / "README.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def public(kind: type) -> dict[str, Any]:
    """Return the methods of a class for its users."""
    return {name: method for name, method in vars(kind).items() if not name.startswith("_")}


def test_both_clients_have_the_same_calls() -> None:
    """Every method of one client is one of the other's, with the same parameters, defaults and types of them."""
    threads, loop = public(Client), public(AsyncClient)
    assert set(threads) - {"close"} == set(loop) - {"aclose"} == {"ask", "stream", "estimate", "upload", "delete", "ask_many"}
    for name in set(threads) - {"close"}:
        one, other = (inspect.signature(calls[name]) for calls in (threads, loop))
        assert list(one.parameters) == list(other.parameters)
        for parameter in one.parameters.values():
            same = other.parameters[parameter.name]
            assert (parameter.kind, parameter.default) == (same.kind, same.default), name
            if parameter.name != "questions":  # which may come asynchronously
                assert parameter.annotation == same.annotation, name
    made = [inspect.signature(kind).parameters for kind in (Client, AsyncClient)]
    assert list(made[0]) == list(made[1])
    assert [given.default for given in made[0].values()] == [given.default for given in made[1].values()]


def test_a_question_has_the_options_of_ask() -> None:
    """Whatever can be asked alone can be asked in a batch, with the same defaults."""
    ask, stream = (list(inspect.signature(call).parameters.values())[1:] for call in (Client.ask, Client.stream))
    question = inspect.signature(Question).parameters.values()
    assert [(p.name, p.default, p.annotation) for p in ask] == [(p.name, p.default, p.annotation) for p in question]
    assert ask == stream


def test_every_record_is_frozen_and_described() -> None:
    """All that comes back is frozen, and everything public has a docstring."""
    for name in ergo_client.__all__:
        thing: Any = getattr(ergo_client, name)
        if dataclasses.is_dataclass(thing):
            assert vars(thing)["__dataclass_params__"].frozen, name
        if inspect.isclass(thing):
            assert thing.__doc__, name
            assert all(inspect.getdoc(method) for method in public(thing).values() if callable(method)), name


def test_every_error_is_in_the_tree() -> None:
    """The tree of errors in the module, the table of the README and the exported classes are the same."""
    classes = {name for name in ergo_client.__all__ if issubclass_of_error(getattr(ergo_client, name))}
    assert ergo_client.ClientError.__module__ == "ergo_client._errors"
    tree = sys.modules["ergo_client._errors"].__doc__ or ""
    assert set(re.findall(r"[├└]── (\w+)", tree)) | {"ClientError"} == classes
    assert set(re.findall(r"^\| `(\w+)` \|", README.read_text(encoding="utf-8"), re.MULTILINE)) | {"ClientError"} == classes


def issubclass_of_error(thing: object) -> bool:
    """Say whether it is a class of errors."""
    return inspect.isclass(thing) and issubclass(thing, ClientError)


def test_the_types_are_those_that_come_back() -> None:
    """A type checker knows what each call returns, and at run time it is that; mypy checks this test."""
    upload = {"id": "img_" + 24 * "a", "width": 1, "height": 1, "format": "png", "orientation": 1, "animated": False}
    upload |= {"object": "image", "bytes": 1, "expires_at": 1, "expires_in": 1.0}
    with serving(gives(), gives(201, upload), gives(200, {"deleted": True}), gives()) as server, Client(server.url) as client:
        answer = assert_type(client.ask(b"x", "?", include=["crop"], zoom="never"), Answer)
        uploaded = assert_type(client.upload(b"x"), UploadedImage)
        results = assert_type(client.ask_many([]), Generator[Answer | ClientError, None, None])
        list(results)
        assert isinstance(uploaded, UploadedImage)
        assert_type(answer.region.box, tuple[int, int, int, int])
        assert_type(answer.draw(Image.new("RGB", (800, 600))), Image.Image)
    # As every kind of image is accepted by type:
    for image in ("a.jpg", Path("a.jpg"), b"x", uploaded, Image.new("RGB", (1, 1)), numpy.zeros((1, 1), numpy.uint8)):
        Question(image, "?")
    with Path(__file__).open("rb") as file:
        Question(file, "?")
    assert typing.get_args(Event)[-1] is Done


def test_the_types_of_the_asynchronous_client() -> None:
    """The same holds for the asynchronous client."""
    from backend import answer

    async def ask(url: str) -> None:
        async with AsyncClient(url) as client:
            assert_type(await client.ask(b"x", "?"), Answer)
            async with client.stream(b"x", "?") as events:
                assert_type(events, AsyncIterator[Event])
                async for event in events:
                    assert isinstance(event, Done)
            assert_type(client.ask_many([]), AsyncGenerator[Answer | ClientError, None])

    with serving(gives(), streams(("done", answer()))) as server:
        asyncio.run(ask(server.url))


def test_importing_takes_nothing_heavy() -> None:
    """Importing the client imports neither Pillow nor numpy, and no part of the server."""
    heavy = {"PIL", "numpy", "pydantic", "ergo_server"}
    code = f"import sys, ergo_client; print({{name.split('.')[0] for name in sys.modules}} & {heavy})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_the_readme_runs(embedded: str, tmp_path: Path, number: int) -> None:
    """Every example of the client's README runs as it stands, and prints what it should."""
    (tmp_path / "scene.jpg").write_bytes((ROOT / "docs" / "images" / "scene.jpg").read_bytes())
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SNIPPETS[number]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"ERGO_URL": embedded, "PYTHONIOENCODING": "utf-8"},
    )
    assert (run.returncode, run.stderr) == (0, "")
    expected = (
        r"434\n\(\d+, \d+, \d+, \d+\), 98% of the visual tokens saved\n",
        r"looks at \(\d+, \d+, \d+, \d+\)\n434\n\d+ ms\n",
        r"434\n\d{3}\n",
        r"take another image: .+\n",
    )
    assert len(SNIPPETS) == len(expected)
    assert re.fullmatch(expected[number], run.stdout), run.stdout
    assert {path.name for path in tmp_path.glob("*.png")} == ({"crop.png", "found.png"} if number == 0 else set())
