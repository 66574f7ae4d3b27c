"""What an image may be, how it goes out, and how a box is painted on it."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import support
from asking import data_url, picture, scripted
from backend import Backend, Blocking, answer, fails, gives, serving
from PIL import Image

from ergo_client import Answer, Client, Estimate

SCENE = support.held_out(0)
PHOTO = support.encode(SCENE)
BOTH = pytest.mark.parametrize("kind", [Client, Blocking])


@pytest.fixture
def backend() -> Iterator[Backend]:
    """A server that answers everything alike."""
    with serving(gives()) as server:
        yield server


class Pipe(io.RawIOBase):
    """A file that can be read once only."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read."""
        return self._data.readinto(buffer)


def at_its_end(data: bytes) -> io.BytesIO:
    """Return a file as something that was just written into it leaves it."""
    file = io.BytesIO()
    file.write(data)
    return file


def zipped(path: Path, data: bytes) -> Any:
    """Return a file whose descriptor tells another length than it has."""
    path.write_bytes(gzip.compress(data))
    return gzip.open(path)


FILES: dict[str, Callable[[Path, bytes], Any]] = {
    "path as text": lambda path, data: str(path),
    "path": lambda path, data: path,
    "bytes": lambda path, data: data,
    "bytearray": lambda path, data: bytearray(data),
    "memoryview": lambda path, data: memoryview(data),
    "file": lambda path, data: path.open("rb"),
    "file in memory": lambda path, data: io.BytesIO(data),
    "file at its end": lambda path, data: at_its_end(data),
    "file that cannot be rewound": lambda path, data: Pipe(data),
    "gzip file": lambda path, data: zipped(path.with_name("packed"), data),
}


@BOTH
@pytest.mark.parametrize("name", FILES)
def test_files_go_out_as_they_are(backend: Backend, tmp_path: Path, kind: Any, name: str) -> None:
    """Whatever holds a file's bytes, they are what is sent, in a form, and nothing of it in base64."""
    path = tmp_path / "scene.jpg"
    path.write_bytes(PHOTO)
    image = FILES[name](path, PHOTO)
    with kind(backend.url) as client:
        client.ask(image, "?")
    (asked,) = backend.requests
    assert asked.file == PHOTO
    assert asked.headers["content-type"].startswith("multipart/form-data")
    assert len(asked.body) < len(PHOTO) + 2000
    if hasattr(image, "close"):
        assert not image.closed
        image.close()


@BOTH
@pytest.mark.parametrize("name", FILES)
def test_a_retry_sends_the_same_bytes(tmp_path: Path, kind: Any, name: str) -> None:
    """A second attempt sends the whole file again."""
    path = tmp_path / "scene.jpg"
    path.write_bytes(PHOTO)
    image = FILES[name](path, PHOTO)
    with serving(fails(503, retry_after_ms="1"), gives()) as server, kind(server.url) as client:
        client.ask(image, "?")
    assert [asked.file == PHOTO for asked in server.requests] == [True, True]
    if hasattr(image, "close"):
        image.close()


@BOTH
def test_a_named_pipe_is_read_once(tmp_path: Path, kind: Any) -> None:
    """A path that is no plain file, as shells make them of a command's output, is read as a whole and can be sent again."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(PHOTO))
    writer.start()
    with serving(fails(503, retry_after_ms="1"), gives()) as server, kind(server.url) as client:
        client.ask(pipe, "?")
    writer.join()
    assert [asked.file == PHOTO for asked in server.requests] == [True, True]


@BOTH
@pytest.mark.parametrize("image", ["https://images.example/a.jpg", "HTTP://images.example/a", data_url(b"x"), "img_" + 24 * "a"])
def test_names_go_out_as_json(backend: Backend, kind: Any, image: str) -> None:
    """A URL and an upload's id are named in JSON."""
    with kind(backend.url) as client:
        client.ask(image, "?", choices=["a", "b"], seed=3, include=["crop"])
    (asked,) = backend.requests
    sent = json.loads(asked.body)
    assert sent["image"] == image
    assert (sent["choices"], sent["seed"], sent["include"]) == (["a", "b"], 3, ["crop"])


@pytest.mark.parametrize("name", ["img_0001.jpg", "img_" + 23 * "a", "data.jpg", "https", "ftp:a"])
def test_what_merely_looks_like_a_name_is_a_path(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A file may be named like the beginning of an id or a URL."""
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(PHOTO)
    with Client(backend.url) as client:
        client.ask(name, "?")
    assert backend.requests[0].file == PHOTO


@BOTH
def test_the_file_comes_after_the_fields(backend: Backend, kind: Any) -> None:
    """The budget stands before the file, so that the server can begin with the overview while the file arrives."""
    with kind(backend.url) as client:
        client.ask(PHOTO, "?", max_visual_tokens=16)
    body = backend.requests[0].body
    assert body.index(b'name="max_visual_tokens"') < body.index(b'name="image"')


@BOTH
def test_the_name_of_a_file_stays_here(backend: Backend, tmp_path: Path, kind: Any) -> None:
    """Names of local files are not told to the server."""
    path = tmp_path / "Patient Miller.jpg"
    path.write_bytes(PHOTO)
    with kind(backend.url) as client:
        client.ask(path, "?")
    assert b"Miller" not in backend.requests[0].body


@pytest.mark.parametrize("kind", [Client, Blocking])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_a_pillow_image_goes_out_as_png(backend: Backend, kind: Any, mode: str) -> None:
    """A Pillow image of any usual mode arrives as PNG; without loss where PNG knows the mode."""
    image = Image.new("L", (60, 40), 77).convert(mode) if mode != "I;16" else Image.new(mode, (60, 40), 777)
    with kind(backend.url) as client:
        client.ask(image, "?")
    with Image.open(io.BytesIO(backend.requests[0].file)) as sent:
        assert (sent.format, sent.size) == ("PNG", (60, 40))
        if mode not in ("CMYK", "YCbCr"):
            assert sent.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()


@BOTH
@pytest.mark.parametrize("shape", [(40, 60), (40, 60, 3), (40, 60, 4)])
def test_an_array_goes_out_as_png(backend: Backend, kind: Any, shape: tuple[int, ...]) -> None:
    """An array's pixels arrive as they are, also where it is a view with strides."""
    pixels = numpy.random.default_rng(0).integers(0, 256, shape, dtype=numpy.uint8)
    with kind(backend.url) as client:
        client.ask(pixels, "?")
        client.ask(pixels[:, ::-1], "?")
    first, second = (numpy.asarray(Image.open(io.BytesIO(asked.file))) for asked in backend.requests)
    assert numpy.array_equal(first, pixels)
    assert numpy.array_equal(second, pixels[:, ::-1])


@BOTH
@pytest.mark.parametrize(
    "array",
    [
        numpy.zeros((4, 6)),
        numpy.zeros((4, 6, 2), numpy.uint8),
        numpy.zeros((4, 6, 1), numpy.uint8),
        numpy.zeros(4, numpy.uint8),
        numpy.zeros((0, 6), numpy.uint8),
    ],
)
def test_an_array_of_another_form_is_refused(backend: Backend, kind: Any, array: Any) -> None:
    """An array that is no image is refused, saying what one is like, and nothing is sent."""
    with kind(backend.url) as client, pytest.raises(ValueError, match="uint8 and of shape"):
        client.ask(array, "?")
    assert not backend.requests


@BOTH
@pytest.mark.parametrize("image", [None, 7, [b"x"], io.StringIO("x")])
def test_what_is_no_image_is_refused(backend: Backend, kind: Any, image: Any) -> None:
    """What is no image at all is refused, saying what one is, and nothing is sent."""
    with kind(backend.url) as client, pytest.raises(TypeError, match=f"an image is .*, not {type(image).__name__}"):
        client.ask(image, "?")
    assert not backend.requests


@BOTH
@pytest.mark.parametrize(("name", "error"), [("nowhere.jpg", FileNotFoundError), (".", IsADirectoryError)])
def test_a_file_that_cannot_be_read(backend: Backend, kind: Any, tmp_path: Path, name: str, error: type[OSError]) -> None:
    """A path that cannot be read is the caller's OSError, and nothing is sent."""
    with kind(backend.url) as client, pytest.raises(error):
        client.ask(tmp_path / name, "?")
    assert not backend.requests


@BOTH
def test_a_photograph_lies_the_same_way_however_it_is_sent(embedded: str, kind: Any) -> None:
    """A photograph that EXIF says is turned is the same upright image as a file and as a Pillow image."""
    turned = picture(800, 600, "JPEG", orientation=6)
    with kind(embedded) as client, Image.open(io.BytesIO(turned)) as opened:
        as_file: Estimate = client.estimate(turned)
        as_image: Estimate = client.estimate(opened)
    assert (as_file.image.width, as_file.image.height) == (as_image.image.width, as_image.image.height) == (600, 800)
    assert as_file.image.orientation == 6


@BOTH
def test_every_kind_of_image_gets_the_same_answer(embedded: str, tmp_path: Path, kind: Any) -> None:
    """The server sees the same pixels whatever the image came as, and gives the same answer."""
    path = tmp_path / "scene.png"
    SCENE.image.save(path, compress_level=1)
    file = path.read_bytes()
    with kind(embedded) as client:
        kinds = [path, file, io.BytesIO(file), SCENE.image, numpy.asarray(SCENE.image), client.upload(file), data_url(file)]
        answers: list[Answer] = [client.ask(image, SCENE.question) for image in kinds]
    assert {(given.text, given.region, given.visual_tokens) for given in answers} == {
        (SCENE.answer, answers[0].region, answers[0].visual_tokens)
    }


PEAK = """
import asyncio, resource, sys
from ergo_client import AsyncClient, Client

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

async def ask(client, path):
    async with client:
        await client.ask(path, "?")
        before = peak()
        await client.ask(path + "-large", "?")
        print(peak() - before)

class Threaded(Client):
    async def __aenter__(self): return self
    async def __aexit__(self, *_): self.close()
    async def ask(self, *given): return super().ask(*given)

asyncio.run(ask({"Client": Threaded, "Blocking": AsyncClient}[sys.argv[1]](sys.argv[2]), sys.argv[3]))
"""
"""Prints how many MB more the process has held at most when it has sent a large file."""


@BOTH
def test_a_file_is_not_read_as_a_whole(backend: Backend, tmp_path: Path, kind: Any) -> None:
    """Sending a file of 128 MB takes a small part of that of the client's memory."""
    path = tmp_path / "file"
    path.write_bytes(PHOTO)
    with (tmp_path / "file-large").open("wb") as file:
        file.truncate(128 << 20)
    command = [sys.executable, "-c", PEAK, kind.__name__, backend.url, str(path)]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) < 32


def test_neither_pillow_nor_numpy_is_imported_unless_asked_for(backend: Backend) -> None:
    """Asking about a file imports neither; both may be missing."""
    code = f"""
import sys
sys.modules["PIL"] = sys.modules["numpy"] = None
from ergo_client import Client
with Client({backend.url!r}) as client:
    answer = client.ask(b"x", "?")
    print(answer.text)
    try:
        answer.draw()
    except ImportError as error:
        print(error)
"""
    shown = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == f"{answer()['answer']}\nPillow is needed to draw on an image: pip install pillow\n"


def test_an_array_without_pillow(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Pillow an array cannot be sent, which says what to install."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "PIL.Image")
    with Client(backend.url) as client, pytest.raises(ImportError, match="pip install pillow"):
        client.ask(numpy.zeros((4, 6), numpy.uint8), "?")


def asked_about(image: Any, url: str) -> Answer:
    """Return an answer about an image."""
    with Client(url) as client:
        return client.ask(image, "?")


BLACK, WHITE = (0, 0, 0), (255, 255, 255)

PAINTED: dict[str, Callable[[Path, bytes], Any]] = {
    "path": lambda path, data: path,
    "bytes": lambda path, data: data,
    "image": lambda path, data: Image.open(path),
    "array": lambda path, data: numpy.asarray(Image.open(path)),
}


@pytest.mark.parametrize("name", PAINTED)
def test_the_box_is_painted_around_the_region(backend: Backend, tmp_path: Path, name: str) -> None:
    """What `draw` returns shows a black and white line directly around the box, and leaves all pixels inside it as they were."""
    path = tmp_path / "picture.png"
    path.write_bytes(picture())
    given = asked_about(PAINTED[name](path, picture()), backend.url)
    assert given.region.zoomed
    x1, y1, x2, y2 = given.region.box
    drawn = given.draw()
    with Image.open(path) as original:
        assert drawn.size == original.size
        green = original.getpixel((0, 0))
        assert drawn.crop((x1, y1, x2, y2)).tobytes() == original.crop((x1, y1, x2, y2)).tobytes()
    middle = (y1 + y2) // 2
    left = [drawn.getpixel((x, middle)) for x in range(x1 - 7, x1)]
    right = [drawn.getpixel((x, middle)) for x in range(x2 + 6, x2 - 1, -1)]
    assert left == right == [green, BLACK, BLACK, WHITE, WHITE, WHITE, BLACK]


@pytest.fixture(scope="module")
def zooming() -> Iterator[str]:
    """URL of the gateway, with an engine that names the same box for every overview."""
    with support.gateway(scripted()) as url:
        yield url


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_box_is_painted_on_the_upright_image(zooming: str, orientation: int) -> None:
    """Whatever EXIF says of a photograph, the box is painted where the region is when it is looked at upright."""
    given = asked_about(picture(1200, 900, "JPEG", orientation=orientation), zooming)
    drawn = given.draw()
    assert drawn.size == (given.image.width, given.image.height) == ((1200, 900) if orientation < 5 else (900, 1200))
    x1, y1, x2, y2 = given.region.box
    assert {drawn.getpixel(at) for at in ((x1 - 1, y1), (x2, y2 - 1), (x1, y1 - 1), (x2 - 1, y2))} == {BLACK}
    assert BLACK not in {drawn.getpixel(at) for at in ((x1, y1), (x2 - 1, y2 - 1))}


def test_lines_grow_with_the_image(backend: Backend) -> None:
    """The line is as wide, compared with the image, on a large image as on a small one."""
    given = asked_about(picture(), backend.url)
    small = given.draw()
    large_answer = replace(given, image=replace(given.image, width=8000, height=6000))
    large = large_answer.draw(Image.open(io.BytesIO(picture(8000, 6000))))
    counts = [sum(drawn.crop((0, 150, drawn.width, 151)).convert("L").histogram()[200:]) for drawn in (small, large)]
    assert counts[1] > 5 * counts[0] > 0


def test_nothing_is_painted_without_zoom() -> None:
    """Where the whole image was looked at, `draw` returns it as it is."""
    region = {**answer()["regions"][0], "outcome": "skipped", "box": [0, 0, 800, 600]}
    with serving(gives(body={**answer(), "regions": [region]})) as server:
        given = asked_about(picture(), server.url)
    with Image.open(io.BytesIO(picture())) as original:
        assert given.draw().tobytes() == original.tobytes()


def test_draw_says_when_it_needs_the_image(backend: Backend) -> None:
    """An image that cannot be looked at again has to be given, and has to be the same one."""
    for image in (io.BytesIO(picture()), "img_" + 24 * "a", "https://images.example/a.png"):
        given = asked_about(image, backend.url)
        with pytest.raises(ValueError, match="draw needs the image"):
            given.draw()
        assert given.draw(picture()).size == (800, 600)
        assert given.draw(io.BytesIO(picture())).size == (800, 600)
    with pytest.raises(ValueError, match="another image: 80 × 60"):
        given.draw(picture(80, 60))


def test_show_opens_a_viewer(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """`show` hands what `draw` returns to Pillow's viewer."""
    shown: list[Image.Image] = []
    monkeypatch.setattr(Image.Image, "show", lambda image: shown.append(image))
    given = asked_about(picture(), backend.url)
    given.show()
    assert [image.tobytes() for image in shown] == [given.draw().tobytes()]
