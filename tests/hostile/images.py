"""Pictures that are damaged, too large, or programs."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from hostile.case import Case, Kit, Make
from hostile.checkpoints import EVIL, MARKER

FORMATS = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP", "ppm": "PPM"}


def cases() -> Iterator[Case]:
    """Yield every case of this kind."""
    for suffix in FORMATS:
        make = partial(_cut, suffix=suffix, part=0.3)
        yield Case(f"{suffix} that is cut", f"predict {{bundle}} {{x}}/x.{suffix}", make)
        yield Case(f"{suffix} of zeros", f"predict {{bundle}} {{x}}/x.{suffix}", partial(_zeros, name=f"x.{suffix}"))
    for name, data in CONTENTS.items():
        make = partial(_written, data=data)
        yield Case(f"picture: {name}", "predict {bundle} {x}/x.png", make)
    for name, make in FILES.items():
        yield Case(f"picture file: {name}", "predict {bundle} {x}/x.png", make)
    for path in ("/dev/zero", "/dev/stdin", "/proc/self/mem", "{x}", "{x}/none.png", EVIL.strip(), "a" * 5000):
        yield Case(f"predict {path[:20]!r}", f"predict {{bundle}} {path}")
    yield Case("a good picture and a bad one", "predict {bundle} {image} {x}/x.png", partial(_zeros, name="x.png"))


def _picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    levels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(levels).save(buffer, kind)
    return buffer.getvalue()


def _cut(folder: Path, _: Kit, suffix: str, part: float) -> None:
    data = _picture(FORMATS[suffix])
    (folder / f"x.{suffix}").write_bytes(data[: int(len(data) * part)])


def _zeros(folder: Path, _: Kit, name: str) -> None:
    (folder / name).write_bytes(bytes(3000))


def _written(folder: Path, _: Kit, data: bytes) -> None:
    (folder / "x.png").write_bytes(data)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, rows: bytes = b"", *, depth: int = 8, before: bytes = b"") -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _tiff(levels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "TIFF")
    return buffer.getvalue()


PROGRAM = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({MARKER}) (w) file closefile\nshowpage\n".encode()

CONTENTS: Mapping[str, bytes] = {
    "empty": b"",
    "text": b"\x1b[31mno picture\x1b[0m",
    "a PostScript program": PROGRAM,
    "a page description": b"%PDF-1.4\n1 0 obj<</JS(app.alert(1))>>endobj\ntrailer<<>>",
    "a vector graphic": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "an icon": b"\x00\x00\x01\x00\x01\x00" + bytes(64),
    "a metafile": b"\xd7\xcd\xc6\x9a" + bytes(64),
    "a film": b"\x00\x00\x01\xba" + bytes(64),
    "a billion pixels": _png(40_000, 40_000),
    "two billion pixels wide": _png(2_147_483_647, 1, bytes(10)),
    "no pixels": _png(0, 0),
    "two million pixels wide": _png(2_000_000, 1, bytes(2_000_001)),
    "too little data": _png(64, 64, bytes(10)),
    "a wrong checksum": _png(8, 8, bytes(72))[:-20] + bytes(20),
    "a wrong head": b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", bytes(3)),
    "an unknown depth": _png(8, 8, bytes(72), depth=77),
    "a text that unpacks to gigabytes": _png(
        8, 8, b"", before=_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000)))
    ),
    "a name that unpacks to gigabytes": _png(
        8, 8, b"", before=_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000_000)))
    ),
    "NaN levels": _tiff(np.full((8, 8), np.nan, np.float32)),
    "float levels": _tiff(np.ones((8, 8), np.float32)),
    "levels below nothing": _tiff(np.full((8, 8), -5, np.int32)),
    "JPEG without end": b"\xff\xd8\xff\xe0" + b"\xff\xfe\xff\xff" * 2000,
    "a huge JPEG": b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01",
    "a TIFF whose directory is itself": b"II*\x00\x08\x00\x00\x00" + b"\x01\x00" + bytes(12) + b"\x08\x00\x00\x00",
    "a TIFF of many tags": b"II*\x00\x08\x00\x00\x00\xff\xff" + b"\x00\x01\x04\x00\xff\xff\xff\xff" * 12_000,
    "a GIF without colours": b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x0c",
    "a WebP without data": b"RIFF\xff\xff\xff\xffWEBPVP8X\x0a\x00\x00\x00" + b"\xff" * 10,
    "a huge PPM": b"P6 99999 99999 255\n",
    "a PPM of 5,000 digits": b"P6 " + b"9" * 5000 + b" 1 255\n",
    "a huge BMP": b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 2**31 - 1, -(2**31), 1, 24, 0) + bytes(60),
}


def _unreadable_name(folder: Path, _: Kit) -> None:
    (folder / "x.png").symlink_to("x.png")


FILES: Mapping[str, Make] = {
    "a folder": lambda f, _: (f / "x.png").mkdir(),
    "a pipe": lambda f, _: os.mkfifo(f / "x.png"),
    "a loop of links": _unreadable_name,
    "a dangling link": lambda f, _: (f / "x.png").symlink_to("nowhere"),
    "a device": lambda f, _: (f / "x.png").symlink_to("/dev/zero"),
    "weights": lambda f, k: (f / "x.png").symlink_to(k.checkpoint),
}
