"""What may be asked about, how it is sent, and how a region is painted on it.

Pillow is imported when it is needed, numpy never.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray
    from PIL.Image import Image as PilImage

    from ergo_client._answers import UploadedImage

ImageLike: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | UploadedImage | PilImage | NDArray[numpy.uint8]"
)
"""What may be asked about.

* text: an ``http:``, ``https:`` or ``data:`` URL, the id of an upload (``img_`` and 24 characters), or else a path
* a path: opened anew for each attempt, and never read as a whole
* bytes: the encoded file
* a file object opened for reading bytes: sent from its beginning, and not closed. One that cannot be rewound is read as a whole
* an `UploadedImage`
* a Pillow image: sent as PNG, turned upright as its EXIF data say
* a numpy array of ``uint8``, of shape (height, width), (height, width, 3) in the order red, green, blue, or (height, width, 4)
  with alpha: sent as PNG, which needs Pillow
"""

UPLOAD_ID = re.compile(r"img_[A-Za-z0-9_-]{24}")
"""The ids that the server gives: 18 random bytes in URL-safe base64. ``img_0001.jpg`` is a path."""

_URL = re.compile(r"https?://|data:", re.IGNORECASE)

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""What Pillow writes as PNG without loss and without a warning."""

_PNG_LEVEL = 1
"""zlib's fastest. A photograph becomes a tenth larger than at Pillow's 6, and is written several times faster."""

_LINES = 300
"""The longer side of an image by the width of a painted line: 13 pixels on 4032, 2 on small ones."""


@dataclass(frozen=True, slots=True)
class Sent:
    """An image, ready to be sent as often as it takes."""

    reference: str | None = None
    """What JSON says instead: a URL, or an upload's id."""
    open: Callable[[], AbstractContextManager[IO[bytes]]] | None = None
    """Opens the file from its beginning. Set where there is no reference."""
    again: ImageLike | None = None
    """The image itself, where it can be looked at again later."""


def sent(image: ImageLike, batch: threading.Lock | None = None) -> Sent:
    """Prepare an image for sending: look whether it is there, encode pixels.

    Args:
        image: what the caller gave.
        batch: held while something that several questions of a batch may name is read, so that they do not read it at the same
            time. Where it is given only paths are looked at again: a batch of answers would keep all pixels in memory otherwise.

    Raises:
        OSError: the file cannot be read.
        TypeError: no image at all.
        ValueError: an array of a shape that is no image's.
        ImportError: an array, and no Pillow.
    """
    from ergo_client._answers import UploadedImage  # which paints, and so needs this module

    kept = image if batch is None else None
    if isinstance(image, UploadedImage):
        return Sent(image.id)
    if isinstance(image, str) and (_URL.match(image) or UPLOAD_ID.fullmatch(image)):
        return Sent(image)
    if isinstance(image, str | os.PathLike):
        return _path(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return _bytes(bytes(image), kept)
    if _is_array(image) or _is_pil(image):
        with batch or contextlib.nullcontext():
            pixels = _pixels(image)
            pixels.load()
        return _bytes(_png(pixels), kept)
    if _is_file(image):
        return _file(image, batch)
    raise TypeError(
        "an image is a path, a URL, bytes, a file opened in binary mode, an UploadedImage, a Pillow image or a numpy array, not "
        f"{type(image).__name__}"
    )


def _path(path: str | os.PathLike[str]) -> Sent:
    if stat.S_ISREG(os.stat(path).st_mode):
        return Sent(open=lambda: Path(path).open("rb"), again=path)
    return _bytes(Path(path).read_bytes(), None)  # a pipe tells neither its length nor the same thing twice


def _bytes(data: bytes, again: ImageLike | None) -> Sent:
    return Sent(open=lambda: io.BytesIO(data), again=again)


def _is_file(image: object) -> TypeGuard[IO[bytes]]:
    return hasattr(image, "read") and not isinstance(image, io.TextIOBase)


def _file(file: IO[bytes], batch: threading.Lock | None) -> Sent:
    if not file.seekable():
        return _bytes(file.read(), None)
    if batch is None:
        return Sent(open=lambda: contextlib.nullcontext(cast("IO[bytes]", _Seekable(file))))
    with batch:
        file.seek(0)
        return _bytes(file.read(), None)


class _Seekable:
    """A caller's file with nothing but its contents: httpx2 would take the length of a ``gzip`` file from its descriptor."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _is_array(image: object) -> TypeGuard[NDArray[Any]]:
    numpy = sys.modules.get("numpy")  # who has an array has imported it
    return numpy is not None and isinstance(image, numpy.ndarray)


def _is_pil(image: object) -> TypeGuard[PilImage]:
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(image, pil.Image)


def _pixels(image: PilImage | NDArray[Any]) -> PilImage:
    """Return a Pillow image of what is one, or an array. Not turned."""
    if not _is_array(image):
        return cast("PilImage", image)
    Image = _pillow("to send or draw a numpy array")
    if image.dtype != "uint8" or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))) or not image.size:
        forms = "(height, width), (height, width, 3) or (height, width, 4)"
        raise ValueError(f"an array must be uint8 and of shape {forms}, not {image.dtype} and {image.shape}")
    made: PilImage = Image.fromarray(image)
    return made


def _png(image: PilImage) -> bytes:
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode not in _PNG_MODES:
        upright = upright.convert("RGB")
    with io.BytesIO() as file:
        upright.save(file, "PNG", compress_level=_PNG_LEVEL)
        return file.getvalue()


def _pillow(what: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"Pillow is needed {what}: pip install pillow") from error
    return Image


def painted(image: ImageLike | None, size: tuple[int, int], box: tuple[int, int, int, int] | None) -> PilImage:
    """Return an image upright, with a box painted on it.

    Args:
        image: a path, bytes, a file object, a Pillow image or an array.
        size: width and height that the upright image must have.
        box: x1, y1, x2, y2 in upright pixels; None paints nothing.

    Raises:
        ImportError: Pillow is missing.
        OSError: the file cannot be read.
        ValueError: there is no image to paint on, or another one than was asked about.
    """
    Image = _pillow("to draw on an image")
    upright = _upright(image, Image)
    if upright.size != size:
        raise ValueError(f"this is another image: {upright.width} × {upright.height} pixels instead of {size[0]} × {size[1]}")
    if box is not None:
        _paint(upright, box)
    return upright


def _upright(image: ImageLike | None, Image: Any) -> PilImage:
    from PIL import ImageOps

    with contextlib.ExitStack() as stack:
        if _is_array(image) or _is_pil(image):
            opened = _pixels(image)
        else:
            source = sent(image) if image is not None else Sent()
            if source.open is None:
                raise ValueError("draw needs the image: what was asked about cannot be read again here")
            # The server took the image: Pillow's warning of many pixels tells nothing new.
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = stack.enter_context(Image.open(stack.enter_context(source.open())))
        upright = ImageOps.exif_transpose(opened)
        if upright.mode not in ("RGB", "RGBA"):
            upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    return upright


def _paint(image: PilImage, box: tuple[int, int, int, int]) -> None:
    """Paint a white line around a box, between two black ones, so that it shows on any image. Nothing inside the box is covered
    where there is room outside."""
    from PIL import ImageDraw

    pen, width = ImageDraw.Draw(image), max(2, round(max(image.size) / _LINES))
    x1, y1, x2, y2 = box
    for out, thick, colour in ((2 * width, 2 * width, "black"), (width + width // 2, width, "white")):
        edges = max(0, x1 - out), max(0, y1 - out), min(image.width, x2 + out) - 1, min(image.height, y2 + out) - 1
        pen.rectangle(edges, outline=colour, width=thick)
