"""Hostile input, as tables: images made to do harm, and URLs that point inwards or that parsers read differently.

The tests of the parts take them one by one, and ``make attack`` sends them to the real server.
"""

from __future__ import annotations

import functools
import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable

from PIL import Image

# --- images -------------------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Return the file of an image."""
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


@functools.cache
def soft(width: int, height: int) -> Image.Image:
    """Return an image without sharp edges."""
    bands = [Image.effect_noise((8, 8), 120).resize((width, height), Image.Resampling.BICUBIC) for _ in "rgb"]
    return Image.merge("RGB", bands)


def chunk(kind: bytes, body: bytes) -> bytes:
    """Return a PNG chunk."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(*chunks: bytes) -> bytes:
    """Return a small PNG with chunks in front of its pixels."""
    data = encoded(Image.new("RGB", (64, 64)), "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


@functools.cache
def zipped(length: int) -> bytes:
    """Return zeros, a thousandth as long as they were."""
    return zlib.compress(bytes(length), 9)


def jpeg_of_scans(repeats: int, width: int, height: int) -> bytes:
    """Return a *sequential* JPEG that has a scan for each of its three components, and these as often as asked for."""
    grey = encoded(Image.new("L", (width, height), 128), "JPEG")
    tables, at = b"", 2
    while (code := grey[at + 1]) != 0xDA:
        end = at + 2 + int.from_bytes(grey[at + 2 : at + 4])
        tables += grey[at:end] if code in (0xDB, 0xC4) else b""
        at = end
    data = grey[at + 2 + int.from_bytes(grey[at + 2 : at + 4]) : -2]
    frame = b"\xff\xc0" + struct.pack(">HBHHB9B", 17, 8, height, width, 3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0)
    scans = b"".join(b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, number, 0, 0, 63, 0) + data for number in (1, 2, 3))
    return b"\xff\xd8" + tables + frame + scans * repeats + b"\xff\xd9"


def progressive_of_scans(count: int, side: int = 640) -> bytes:
    """Return a legal progressive JPEG, grey all over, with up to 127 scans of a few bytes: one for each coefficient, then one
    that refines each."""
    quantization = b"\xff\xdb\0\x43\0" + b"\1" * 64
    frame = b"\xff\xc2" + struct.pack(">HBHHBBBB", 11, 8, side, side, 1, 1, 0x11, 0)
    codes = b"".join(b"\xff\xc4\0\x14" + bytes((kind, 1)) + bytes(15) + b"\0" for kind in (0x00, 0x10))  # "0": nothing, end
    nothing = bytes(side // 8 * (side // 8) // 8)
    steps = [(0, 0, 0x00), *((k, k, 0x01) for k in range(1, 64)), *((k, k, 0x10) for k in range(1, 64))]
    scans = (b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, *step) + nothing for step in steps[:count])
    return b"\xff\xd8" + quantization + frame + codes + b"".join(scans) + b"\xff\xd9"


def gif_of_frames(count: int, size: tuple[int, int] = (1, 1)) -> bytes:
    """Return a GIF of 64 × 64 with frames that claim a size, each 15 bytes long."""
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, *size, 0) + b"\x02\x02\x44\x01\0"
    return b"GIF89a" + struct.pack("<HHBBB", 64, 64, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + frame * count + b";"


def webp_of_frames(count: int) -> bytes:
    """Return an animated WebP of 8 × 8 with as many frames as asked for, each some 56 bytes long."""
    data = encoded(Image.new("RGB", (8, 8)), "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    start = data.index(b"ANMF")
    end = start + 8 + int.from_bytes(data[start + 4 : start + 8], "little")
    body = data[8:start] + data[start:end] * count
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp_of_runs(side: int) -> bytes:
    """Return a run-length encoded BMP whose every run is one pixel: Pillow decodes those in Python."""
    row = b"".join(b"\x01" + bytes((x & 255,)) for x in range(side)) + b"\0\0"
    palette = b"".join(bytes((i, i, i ^ 1, 0)) for i in range(256))
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(row) * side, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(row) * side, 0, 0, 1078) + head + palette + row * side + b"\0\1"


def honest(kind: str, mode: str, **options: object) -> bytes:
    """Return a file of 12 megapixels."""
    image = soft(4000, 3000)
    return encoded(image.quantize(16) if mode == "P" else image.convert(mode), kind, **options)


BOMBS: dict[str, Callable[[], bytes]] = {
    "png: 60 texts of 1 MB": lambda: png_with(*(chunk(b"zTXt", b"k%d\0\0" % n + zipped(1_000_000)) for n in range(60))),
    "png: 900 texts of 70 KB": lambda: png_with(*(chunk(b"zTXt", b"k%d\0\0" % n + zipped(70_000)) for n in range(900))),
    "png: 500 texts of 8 MB": lambda: png_with(*(chunk(b"zTXt", b"k%d\0\0" % n + zipped(7_900_000)) for n in range(500))),
    "png: international text of 60 MB": lambda: png_with(chunk(b"iTXt", b"k\0\1\0\0\0" + zipped(60_000_000))),
    "png: profile of 100 MB": lambda: png_with(chunk(b"iCCP", b"k\0\0" + zipped(100_000_000))),
    "gif: 1,000,000 frames": lambda: gif_of_frames(1_000_000),
    "gif: 4,000,000 frames": lambda: gif_of_frames(4_000_000),
    "gif: first frame beyond the canvas": lambda: gif_of_frames(1, (20_000, 20_000)),
    "gif: second frame beyond the canvas": lambda: gif_of_frames(1)[:-1] + gif_of_frames(1, (20_000, 20_000))[19:],
    "webp: 900 frames": lambda: webp_of_frames(900),
    "webp: 100,000 frames": lambda: webp_of_frames(100_000),
    "jpeg: sequential, three scans, 36 MP": lambda: jpeg_of_scans(1, 6000, 6000),
    "jpeg: EXIF block in each of 100 segments": lambda: (
        b"\xff\xd8" + (b"\xff\xe1\xff\xffExif\0\0II*\0" + bytes(65523)) * 100 + encoded(soft(64, 64), "JPEG")[2:]
    ),
    "jpeg": lambda: honest("JPEG", "RGB"),
    "jpeg: progressive": lambda: honest("JPEG", "RGB", progressive=True, subsampling=0),
    "jpeg: CMYK": lambda: honest("JPEG", "CMYK"),
    "png: RGBA": lambda: honest("PNG", "RGBA", compress_level=1),
    "webp": lambda: honest("WEBP", "RGB", method=0),
    "webp: lossless": lambda: honest("WEBP", "RGB", lossless=True, method=0),
    "webp: alpha": lambda: honest("WEBP", "RGBA", method=0, exact=True),
    "gif": lambda: honest("GIF", "P"),
    "bmp": lambda: honest("BMP", "RGB"),
    "bmp: palette": lambda: honest("BMP", "P"),
    "bmp: 1 bit": lambda: honest("BMP", "1"),
}


def png_of_zeros(width: int, height: int, depth: int = 1, colours: int = 0, interlaced: bool = False) -> bytes:
    """Return a PNG whose pixels are all there, and all zero: a thousandth as long as its pixels."""
    bits = depth * {0: 1, 2: 3, 6: 4}[colours]
    # Adam7: offset and step of each of the seven passes (PNG specification, 8.2)
    adam7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    passes = adam7 if interlaced else [(0, 0, 1, 1)]
    deflate = zlib.compressobj(1)
    pixels = b""
    for left, top, across, down in passes:
        row = bytes(1 + (-(-(width - left) // across) * bits + 7) // 8)
        rows = -(-(height - top) // down)
        pixels += b"".join(deflate.compress(row * min(256, rows - done)) for done in range(0, rows, 256))
    pixels += deflate.flush()
    head = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def cut_off(kind: str, **options: object) -> bytes:
    """Return the first two thirds of a file."""
    data = encoded(soft(640, 480), kind, **options)
    return data[: len(data) * 2 // 3]


def animation(kind: str) -> bytes:
    """Return an image that moves."""
    return encoded(soft(64, 48), kind, save_all=True, append_images=[Image.new("RGB", (64, 48), "red")])


def polyglot(kind: str) -> bytes:
    """Return an image that is a ZIP archive, and a web page, too."""
    with io.BytesIO() as file:
        file.write(encoded(soft(64, 48), kind))
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("index.html", "<script>alert(1)</script>")
        return file.getvalue()


IMAGES: dict[str, Callable[[], bytes]] = BOMBS | {
    # more pixels than are read, and as many as are
    "png: 30,000 x 30,000, 1 bit": lambda: png_of_zeros(30_000, 30_000),
    "png: 11,000 x 11,000, 16 bits, alpha": lambda: png_of_zeros(11_000, 11_000, 16, 6),
    "png: 11,000 x 11,000, interlaced": lambda: png_of_zeros(11_000, 11_000, 8, 2, interlaced=True),
    "png: header alone, of 2**31 - 1 squared": lambda: png_of_zeros(1, 1)[:16] + b"\x7f\xff\xff\xff" * 2,
    "jpeg: 65,500 x 65,500, cut off": lambda: jpeg_of_scans(1, 640, 640).replace(
        b"\x08\x02\x80\x02\x80", b"\x08" + b"\xff\xdc" * 2
    ),
    # work
    "jpeg: 3,000 sequential scans": lambda: jpeg_of_scans(1000, 640, 640),
    "jpeg: 60 sequential scans, 36 MP": lambda: jpeg_of_scans(20, 6000, 6000),
    "jpeg: 127 progressive scans": lambda: progressive_of_scans(127, 4000),
    "bmp: runs of one pixel": lambda: bmp_of_runs(3000),
    "jpeg: EXIF block of 20 MB": lambda: (
        b"\xff\xd8" + (b"\xff\xe1\xff\xffExif\0\0II*\0" + bytes(65_523)) * 310 + encoded(soft(64, 64), "JPEG")[2:]
    ),
    "png: EXIF that points to itself": lambda: png_with(chunk(b"eXIf", b"II*\0\x08\0\0\0\0\0\x08\0\0\0")),
    # shapes
    "png: 1 x 1": lambda: png_of_zeros(1, 1),
    "png: 0 x 0": lambda: png_of_zeros(0, 0),
    "png: 1 x 65,535": lambda: png_of_zeros(1, 65_535),
    "png: 65,535 x 1": lambda: png_of_zeros(65_535, 1),
    "png: 200 : 1": lambda: png_of_zeros(4000, 20),
    "png: 201 : 1": lambda: png_of_zeros(4020, 20),
    # kinds of pixels
    "png: 16 bits, grey": lambda: encoded(soft(640, 480).convert("I").convert("I;16"), "PNG"),
    "png: grey and alpha": lambda: encoded(soft(640, 480).convert("LA"), "PNG"),
    "jpeg: CMYK, small": lambda: encoded(soft(640, 480).convert("CMYK"), "JPEG"),
    "gif: moving": lambda: animation("GIF"),
    "webp: moving": lambda: animation("WEBP"),
    "png: moving": lambda: animation("PNG"),
    "mpo": lambda: animation("MPO"),
    # broken, or something else
    "jpeg: cut off": lambda: cut_off("JPEG"),
    "jpeg: progressive, cut off": lambda: cut_off("JPEG", progressive=True),
    "png: cut off": lambda: cut_off("PNG"),
    "webp: cut off": lambda: cut_off("WEBP"),
    "webp: lossless, cut off": lambda: cut_off("WEBP", lossless=True),
    "gif: cut off": lambda: cut_off("GIF"),
    "bmp: cut off": lambda: cut_off("BMP"),
    "jpeg: an archive, too": lambda: polyglot("JPEG"),
    "gif: an archive, too": lambda: polyglot("GIF"),
    "gif: a script, too": lambda: b"GIF89a=1;alert(document.domain);//" + bytes(100),
    "jpeg: behind a line": lambda: b"\n" + encoded(soft(64, 48), "JPEG"),
    "tiff": lambda: encoded(soft(64, 48), "TIFF"),
    "ico": lambda: encoded(soft(64, 48), "ICO"),
    "ppm": lambda: encoded(soft(64, 48), "PPM"),
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1/"/></svg>',
    "svg: entities": lambda: b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
    "heic": lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(1000),
    "avif": lambda: b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(1000),
    "pdf": lambda: encoded(soft(64, 48), "PDF"),
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    "image of a script": lambda: b"push graphic-context\nfill 'url(https://127.0.0.1/a.jpg\"|ls \"-la)'\npop graphic-context\n",
    "web page": lambda: b"<!doctype html><script>alert(1)</script>",
    "archive": lambda: b"PK\x03\x04" + bytes(1000),
    "arbitrary": lambda: random.Random(5).randbytes(100_000),
    "zeros": lambda: bytes(100_000),
    "one byte": lambda: b"\xff",
    "nothing": lambda: b"",
}
"""Bombs of every kind, broken files, files of another kind than they say, and odd but honest ones."""

# --- URLs ---------------------------------------------------------------------------------------------------------------------

URLS = {
    # not a URL, or one that two parsers read differently
    "": "scheme",
    "https://": "host",
    "https:///": "host",
    "https:public.example/": "host",
    "https:/public.example/": "host",
    "//public.example/": "scheme",
    "public.example/a.png": "scheme",
    "https://public.example" + "/a" * 4000: "url",
    "https://public.example\\@127.0.0.1/": "url",
    "https://127.0.0.1\\@public.example/": "url",
    "https:\\\\127.0.0.1\\": "url",
    "https://public.example/\\..\\": "url",
    "https://public.example/\r\nHost: 127.0.0.1": "url",
    "https://public.example/\nx": "url",
    "https://pub\tlic.example/": "url",
    "https://public.example/\0": "url",
    "https://public.example\x7f/": "url",
    " https://public.example/": "url",
    "https://public.example/ ": "url",
    "https://public .example/": "url",
    "https://public\u00a0.example/": "url",
    "https://public\u200b.example/": "url",
    "https://public\u00ad.example/": "url",
    "https://public.example/\u202egnp.a": "url",
    "https://public.example/\u2028": "url",
    "https://public.example/\udc80": "url",
    "https://public.example:port/": "url",
    "https://[::1/": "url",
    "https://[127.0.0.1]/": "url",
    "https://[public.example]/": "url",
    "https://public.example:443:80/": "url",
    # schemes
    "http://public.example/": "scheme",
    "HTTP://public.example/": "scheme",
    "ftp://public.example/": "scheme",
    "file:///etc/passwd": "scheme",
    "file://public.example/etc/passwd": "scheme",
    "gopher://public.example:443/_GET": "scheme",
    "dict://public.example/": "scheme",
    "ws://public.example/": "scheme",
    "jar:https://public.example!/": "scheme",
    "javascript:fetch(1)": "scheme",
    "data:image/png;base64,AAAA": "scheme",
    "unix:///run/docker.sock": "scheme",
    "https+unix://public.example/": "scheme",
    # credentials
    "https://user@public.example/": "credentials",
    "https://user:word@public.example/": "credentials",
    "https://public.example@127.0.0.1/": "credentials",
    "https://public.example%40127.0.0.1@public.example/": "credentials",
    "https://a@b@public.example/": "credentials",
    "https://:@public.example/": "credentials",
    "https://@public.example/": "host",
    # hosts: addresses in other clothes
    "https://2130706433/": "host",
    "https://0x7f000001/": "host",
    "https://0x7f.0.0.1/": "host",
    "https://0177.0.0.1/": "url",
    "https://017700000001/": "host",
    "https://127.1/": "host",
    "https://127.0.1/": "host",
    "https://127.0.0.01/": "url",
    "https://127.0.0.1./": "host",
    "https://127.0.0.0x1/": "host",
    "https://1.2.3.4.5/": "host",
    "https://999.1.1.1/": "url",
    "https://127.0.0.1.2130706433/": "host",
    "https://\uff11\uff12\uff17.0.0.1/": "url",
    "https://127\u30020\u30020\u30021/": "host",
    "https://8\u30028\u30028\u30028/": "host",
    "https://\u2460\u2461\u2466.0.0.1/": "url",
    "https://%31%32%37.0.0.1/": "host",
    "https://127.0.0.1%2f.public.example/": "host",
    "https://127.0.0.1%00.public.example/": "host",
    "https://public%2eexample/": "host",
    "https://[fe80::1%25eth0]/": "host",
    "https://[fe80::1%eth0]/": "host",
    "https://[::1%2525lo]/": "host",
    # hosts: names in other clothes
    "https://localhost/": "host",
    "https://kubernetes/": "host",
    "https://public.example./": "host",
    "https://public..example/": "host",
    "https://.public.example/": "host",
    "https://public\u3002example/": "host",
    "https://public\uff0eexample/": "host",
    "https://\uff50ublic.example/": "url",
    "https://\u24dfublic.example/": "url",
    "https://\u212aelvin.example/": "host",
    "https://a\u2100.example/": "url",
    "https://xn--a.example/": "host",
    "https://xn--public-.example/": "host",
    "https://-public.example/": "host",
    "https://public!.example/": "host",
    "https://public.example;x/": "host",
    "https://public.example|x/": "host",
    "https://{public}.example/": "host",
    "https://*.public.example/": "host",
    f"https://{'a' * 64}.example/": "host",
    f"https://{'a.' * 130}example/": "host",
    # ports
    "https://public.example:22/": "port",
    "https://public.example:6379/": "port",
    "https://public.example:8443/": "port",
    "https://public.example:0/": "port",
    "https://public.example:/": "port",
    "https://public.example:0443/": "port",
    "https://public.example:+443/": "port",
    "https://public.example:4_4_3/": "port",
    "https://public.example:\uff14\uff14\uff13/": "port",
    "https://public.example:65979/": "port",
    "https://public.example:-443/": "port",
    # addresses, and names that have them
    "https://127.0.0.1/": "private_address",
    "https://127.0.0.1:80/": "private_address",
    "https://0.0.0.0/": "private_address",
    "https://10.0.0.1/": "private_address",
    "https://172.16.0.1/": "private_address",
    "https://192.168.1.1/": "private_address",
    "https://169.254.169.254/latest/meta-data/": "private_address",
    "https://169.254.170.2/v2/credentials": "private_address",
    "https://100.100.100.200/": "private_address",
    "https://168.63.129.16/": "private_address",
    "https://192.0.0.192/": "private_address",
    "https://224.0.0.1/": "private_address",
    "https://255.255.255.255/": "private_address",
    "https://[::1]/": "private_address",
    "https://[::]/": "private_address",
    "https://[0:0:0:0:0:0:0:1]/": "private_address",
    "https://[::127.0.0.1]/": "private_address",
    "https://[::ffff:127.0.0.1]/": "private_address",
    "https://[::FFFF:7F00:1]/": "private_address",
    "https://[::ffff:a9fe:a9fe]/": "private_address",
    "https://[64:ff9b::a9fe:a9fe]/": "private_address",
    "https://[64:ff9b:1::a00:1]/": "private_address",
    "https://[2002:a9fe:a9fe::]/": "private_address",
    "https://[2001:0:a9fe:a9fe::]/": "private_address",
    "https://[fd00:ec2::254]/": "private_address",
    "https://[fe80::1]/": "private_address",
    "https://[ff02::1]/": "private_address",
    "https://loopback.example/": "private_address",
    "https://LOOPBACK.Example/": "private_address",
    "https://metadata.google.internal/": "private_address",
    "https://private.example/#public.example": "private_address",
    "https://private.example?@public.example/": "private_address",
    "https://mixed.example/": "private_address",
    "https://mixed6.example/": "private_address",
    "https://mapped.example/": "private_address",
    "https://mapped-metadata.example/": "private_address",
    "https://nat64.example/": "private_address",
    "https://sixtofour.example/": "private_address",
    "https://zero.example/": "private_address",
    "https://azure.example/": "private_address",
    "https://carrier.example/": "private_address",
    # names without addresses
    "https://empty.example/": "dns",
    "https://unknown.example/": "dns",
}
"""What is not fetched, and the first reason why not. The names are those that test_fetch.py resolves; elsewhere they have no
address."""
