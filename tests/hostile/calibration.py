"""Calibration samples, labelled data, states and suites that are damaged or dishonest."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hostile.bundles import npy
from hostile.case import Case, Kit, Make
from hostile.checkpoints import EVIL

INT8 = "export --ckpt {ckpt} --precision int8 --out {earlier} --calibration "


def cases() -> Iterator[Case]:
    """Yield every case of this kind."""
    for name, arrays in ARRAYS.items():
        yield Case(f"calibration arrays: {name}", INT8 + "{x}/x.npz", partial(_saved, arrays=arrays))
    for name, make in ARCHIVES.items():
        yield Case(f"calibration archive: {name}", INT8 + "{x}/x.npz", make)
    for name, make in FOLDERS.items():
        yield Case(f"calibration folder: {name}", INT8 + "{x}/images", make)
    yield Case("a corrupt image is named", INT8 + "{x}/images", _corrupt, said="corrupt.png")
    yield Case("calibration that is not there", INT8 + "{x}/none")
    yield Case("calibration from a device", INT8 + "/dev/zero")
    yield Case("calibration from a picture", INT8 + "{image}")
    for name, make in DATA.items():
        yield Case(f"data: {name}", "eval {bundle} --data {x}/data", make)
    for name, data in LISTS.items():
        yield Case(f"list: {name}", "eval {bundle} --data {x}/list.txt", partial(_written, name="list.txt", data=data))
    for name, data in SUITES.items():
        yield Case(f"suite: {name}", "bench --suite {x}/suite.toml", partial(_written, name="suite.toml", data=data))
    for name, data in REPORTS.items():
        make = partial(_written, name="old.json", data=data)
        yield Case(f"report: {name}", "bench --compare {x}/old.json", make)
    yield Case("eval from a device", "eval {bundle} --data /dev/zero")
    yield Case("eval of nothing", "eval {bundle} --data {x}/none")
    for name, data in STATES.items():
        for fresh in ("", " --fresh"):
            make = partial(_with_state, data=data)
            yield Case(f"state{fresh}: {name}", "eval {bundle} --data {x}/data --state {x}/state.json" + fresh, make)


def _saved(folder: Path, _: Kit, arrays: Callable[[], dict[str, Any]]) -> None:
    np.savez(folder / "x.npz", **arrays())


def _images(count: int = 40) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3, 32, 32)).astype(np.float32)


ARRAYS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "texts": lambda: {"images": np.array([EVIL] * 40)},
    "bytes": lambda: {"images": np.array([b"x"] * 40)},
    "objects": lambda: {"images": np.array([{}] * 40, dtype=object)},
    "dates": lambda: {"images": np.zeros(40, "datetime64[D]")},
    "structures": lambda: {"images": np.zeros(40, [("a", "f4")])},
    "complex numbers": lambda: {"images": _images().astype(np.complex64)},
    "whole numbers": lambda: {"images": np.zeros((40, 3, 32, 32), np.uint8)},
    "flags": lambda: {"images": np.zeros((40, 3, 32, 32), bool)},
    "NaN": lambda: {"images": _images() * np.float32("nan")},
    "infinity": lambda: {"images": _images() * np.float32("inf")},
    "levels": lambda: {"images": _images() * 100 + 127},
    "another size": lambda: {"images": _images()[:, :, :5]},
    "no samples": lambda: {"images": _images()[:0]},
    "a scalar": lambda: {"images": np.float32(1)},
    "another name": lambda: {"a": _images(), "b": _images()},
    "a name with escapes": lambda: {EVIL.replace("\r\n", ""): _images(), "b": _images()},
    "forty of one": lambda: {"images": np.repeat(_images(1), 40, 0)},
    "huge values": lambda: {"images": _images() * np.float32(1e30)},
}


def _archive(folder: Path, _: Kit, member: bytes, name: str = "images.npy", kind: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(folder / "x.npz", "w", kind) as archive:
        archive.writestr(name, member)


def _flagged(folder: Path, _: Kit) -> None:
    """Set the flag of encryption in the archive's directory and in its members."""
    np.savez(folder / "x.npz", images=_images())
    path = folder / "x.npz"
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = -1
        while (at := data.find(mark, at + 1)) >= 0:
            data[at + offset] |= 1
    path.write_bytes(data)


def _declares_more(folder: Path, _: Kit) -> None:
    np.savez(folder / "x.npz", images=_images())
    path = folder / "x.npz"
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\x01\x02")
    data[at + 24 : at + 28] = b"\xfe\xff\xff\x7f"
    path.write_bytes(data)


def _shape(words: str) -> bytes:
    return npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {words}}}")


ARCHIVES: Mapping[str, Make] = {
    "encrypted": _flagged,
    "of other lengths than declared": _declares_more,
    "empty": partial(_archive, member=b""),
    "a bomb": partial(_archive, member=_shape("(2000000000,)") + bytes(200_000_000)),
    "a terabyte declared": partial(_archive, member=_shape("(1000000, 3, 32, 32, 100)")),
    "a negative shape": partial(_archive, member=_shape("(-40, 3, 32, 32)")),
    "a shape of code": partial(_archive, member=npy("__import__('os').system('touch executed')")),
    "a nested header": partial(_archive, member=npy("(" * 5000)),
    "a header of tokens": partial(_archive, member=npy("{'descr': 'f4', 'shape': (1L, 3}")),
    "an unknown type": partial(_archive, member=npy("{'descr': 'zz', 'fortran_order': False, 'shape': (1,)}")),
    "compressed by LZMA": partial(_archive, member=b"x" * 100, kind=zipfile.ZIP_LZMA),
    "no arrays": partial(_archive, member=b"x", name="readme.txt"),
    "an image": lambda f, k: (f / "x.npz").write_bytes(k.image.read_bytes()),
    "a pickle": lambda f, _: (f / "x.npz").write_bytes(b"\x80\x04cos\nsystem\n(X\x0e\x00\x00\x00touch executedtR."),
    "a folder of its name": lambda f, _: (f / "x.npz").mkdir(),
    "a pipe": lambda f, _: os.mkfifo(f / "x.npz"),
}


def _written(folder: Path, _: Kit, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)


def _filled(folder: Path, kit: Kit) -> Path:
    images = folder / "images"
    shutil.copytree(kit.image.parent, images)
    return images


def _corrupt(folder: Path, kit: Kit) -> None:
    (_filled(folder, kit) / "corrupt.png").write_bytes(bytes(100))


FOLDERS: Mapping[str, Make] = {
    "empty": lambda f, _: (f / "images").mkdir(),
    "only texts": lambda f, _: ((f / "images").mkdir(), (f / "images" / "x.txt").write_bytes(b"x")),
    "a loop of links": lambda f, _: (f / "images").symlink_to("images"),
    "a corrupt image": _corrupt,
    "an empty image": lambda f, k: (_filled(f, k) / "empty.jpg").write_bytes(b""),
    "a dangling link": lambda f, k: (_filled(f, k) / "dangling.png").symlink_to("nowhere"),
    "a pipe": lambda f, k: os.mkfifo(_filled(f, k) / "pipe.png"),
    "a device": lambda f, k: (_filled(f, k) / "zero.png").symlink_to("/dev/zero"),
    "a name with escapes": lambda f, k: (_filled(f, k) / f"{EVIL}.png").write_bytes(b"x"),
    "a program": lambda f, k: (_filled(f, k) / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"),
}


def _classes(folder: Path, kit: Kit, change: Callable[[Path], object]) -> None:
    for digit in range(10):
        (folder / "data" / str(digit)).mkdir(parents=True)
        shutil.copy(kit.image, folder / "data" / str(digit) / "a.png")
    change(folder / "data")


DATA: Mapping[str, Make] = {
    "empty": lambda f, _: (f / "data").mkdir(),
    "a loop of links": lambda f, _: (f / "data").symlink_to("data"),
    "empty classes": lambda f, _: [(f / "data" / str(i)).mkdir(parents=True) for i in range(10)],
    "classes with escapes": lambda f, _: (f / "data" / EVIL).mkdir(parents=True),
    "a corrupt image": partial(_classes, change=lambda d: (d / "3" / "b.png").write_bytes(bytes(99))),
    "an image with escapes": partial(_classes, change=lambda d: (d / "3" / f"{EVIL}.png").write_bytes(bytes(99))),
    "one class too many": partial(_classes, change=lambda d: (d / "nine").mkdir()),
    "a class of many digits": partial(_classes, change=lambda d: (d / ("9" * 200)).mkdir()),
    "a class of another script": lambda f, _: (f / "data" / "\u0663").mkdir(parents=True),
    "a class of a superscript": lambda f, _: (f / "data" / "\u00b2").mkdir(parents=True),
}


def _with_state(folder: Path, kit: Kit, data: bytes) -> None:
    _classes(folder, kit, lambda _: None)
    (folder / "state.json").write_bytes(data)


STATES: Mapping[str, bytes] = {
    "a text of others": b"my thesis",
    "JSON of others": b'{"name": "package"}',
    "nested": b"[" * 100_000,
    "bytes": bytes(range(256)),
    "5,000 digits": b'{"key": "", "done": ' + b"9" * 5000 + b"}",
    "infinite": b'{"key": "", "done": Infinity, "unreadable": [], "tallies": {}}',
}

LISTS: Mapping[str, bytes] = {
    "empty": b"",
    "bytes": bytes(range(256)),
    "no labels": b"a.png\n",
    "a label of 5,000 digits": b"a.png " + b"9" * 5000 + b"\n",
    "a label of escapes": b"a.png \x1b[31m\n",
    "a negative label": b"a.png -1\n",
    "an image of escapes": b"\x1b[31m.png 1\n",
    "an image that is not there": b"none.png 1\n",
    "an image from a device": b"/dev/zero 1\n",
    "a null character": b"a\0b.png 1\n",
    "a path of a megabyte": b"x" * (1 << 20) + b" 1\n",
}

SUITES: Mapping[str, bytes] = {
    "empty models": b"models = []\n",
    "bytes": bytes(range(256)),
    "nested": b"a = " + b"[" * 50_000,
    "5,000 digits": b"seconds = " + b"9" * 5000,
    "an unknown key": b'"\\u001b[31m" = 1\n',
    "negative seconds": b"seconds = -1\n",
    "infinite seconds": b"seconds = inf\n",
    "a batch of text": b'batch = "many"\n',
    "a huge batch": b"batch = [1000000000000]\n",
    "a model elsewhere": b'models = ["../../etc/passwd"]\n',
    "escapes": b'models = ["\\u001b[31m\\u202e"]\n',
}

REPORTS: Mapping[str, bytes] = {
    "empty": b"",
    "bytes": bytes(range(256)),
    "nested": b"[" * 100_000,
    "5,000 digits": b'{"schema_version": ' + b"9" * 5000 + b"}",
    "a list": b"[]",
    "an unknown key": b'{"schema_version": 1, "\\u001b[31m": 1}',
}
