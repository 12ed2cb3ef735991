"""Bundles whose manifest, probe or artifacts lie, and folders that are no bundles."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hostile.case import MISSING, UNWRITTEN, USAGE, Case, Kit, Make
from hostile.checkpoints import EVIL
from repmlp_deploy.bundle import MANIFEST, PROBE, describe_file

DEEP = "[" * 100_000
OUT = "export --ckpt {ckpt} --out {x}/out"


def cases() -> Iterator[Case]:
    """Yield every case of this kind."""
    for name, text in MANIFESTS.items():
        yield Case(f"manifest: {name}", "predict {x}/bundle {image}", partial(_manifest, text=text))
    for name, (place, value) in VALUES.items():
        make = partial(_valued, place=place.split("/"), value=value)
        yield Case(f"manifest with {name}", "predict {x}/bundle {image} --format onnx", make)
    for name, data in PROBES.items():
        make = partial(replaced, entry="probe", data=data)
        yield Case(f"probe: {name}", "verify {x}/bundle", make)
    for name, data in GRAPHS.items():
        make = partial(replaced, entry="onnx", data=data)
        yield Case(f"graph: {name}", "predict {x}/bundle {image} --format onnx", make)
        build = "build {x}/bundle --format trt-rtx --compute-capability 8.6"
        if name != "doubled":  # the vendor's parser prints a line of its own
            yield Case(f"build from a graph: {name}", build, make, MISSING)
    for name, data in NETWORKS.items():
        make = partial(replaced, entry="openvino", data=data)
        yield Case(f"OpenVINO network: {name}", "predict {x}/bundle {image} --format openvino", make)
    yield from _places()


def _places() -> Iterator[Case]:
    for name, make in FOLDERS.items():
        for command in ("predict {x}/bundle {image}", "verify {x}/bundle"):
            yield Case(f"{command.split()[0]} of a folder: {name}", command, make)
    for name, (make, code) in OUTPUTS.items():
        yield Case(f"out: {name}", OUT, make, code)
    for path, code in (
        ("", USAGE),
        ("/", USAGE),
        ("/proc/x", UNWRITTEN),
        ("/dev/null", USAGE),
        ("/dev/null/x", UNWRITTEN),
        ("{x}/" + "a" * 300, UNWRITTEN),
        ("..", USAGE),
        ("{ckpt}", USAGE),
    ):
        yield Case(f"out is {path[:20]!r}", f"export --ckpt {{ckpt}} --out {path}", None, code)


def _manifest(folder: Path, kit: Kit, text: Callable[[str], str | bytes]) -> None:
    path = kit.copy_bundle(folder) / MANIFEST
    changed = text(path.read_text(encoding="utf-8"))
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode("utf-8", "surrogatepass"))


def _valued(folder: Path, kit: Kit, place: list[str], value: Any) -> None:
    path = kit.copy_bundle(folder) / MANIFEST
    data = inner = json.loads(path.read_text(encoding="utf-8"))
    for key in place[:-1]:
        inner = inner[int(key) if key.isdigit() else key]
    inner[place[-1]] = value
    path.write_text(json.dumps(data), encoding="utf-8")


def replaced(folder: Path, kit: Kit, entry: str, data: Callable[[bytes], bytes]) -> None:
    """Replace a file, and what the manifest says of it."""
    bundle = kit.copy_bundle(folder)
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    said = manifest["probe"] if entry == "probe" else manifest["artifacts"][entry]
    file = bundle / said["path"]
    changed = data(file.read_bytes())
    file.write_bytes(changed)
    said |= describe_file(said["path"], changed).model_dump()
    (bundle / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


MANIFESTS: Mapping[str, Callable[[str], str | bytes]] = {
    "empty": lambda _: "",
    "bytes": lambda _: bytes(range(256)),
    "nested lists": lambda _: DEEP,
    "nested objects": lambda _: '{"a":' * 50_000,
    "a list": lambda _: "[]",
    "a text": lambda _: json.dumps(EVIL),
    "a number of 5,000 digits": lambda t: t.replace('"schema": 1', f'"schema": {"9" * 5000}'),
    "another schema": lambda t: t.replace('"schema": 1', '"schema": "\\u001b[31m"'),
    "a huge schema": lambda t: t.replace('"schema": 1', f'"schema": "{"x" * (1 << 20)}"'),
    "no schema": lambda _: "{}",
    "only a schema": lambda _: '{"schema": 1}',
    "cut": lambda t: t[: len(t) // 2],
    "UTF-16": lambda t: t.encode("utf-16"),
    "twenty megabytes": lambda t: t + " " * (20 << 20),
    "surrogates": lambda t: t.replace('"repmlp-digits"', '"\ud800"'),
    "NaN": lambda t: t.replace('"schema": 1', '"schema": NaN'),
}

VALUES: Mapping[str, tuple[str, Any]] = {
    "another task": ("task", "\x1b[31m"),
    "no task": ("task", None),
    "a key of its own": (EVIL, 1),
    "no artifacts": ("artifacts", {}),
    "a list of artifacts": ("artifacts", []),
    "an artifact of text": ("artifacts/onnx", "model.onnx"),
    "a path that leaves it": ("artifacts/onnx/path", "../../etc/passwd"),
    "an absolute path": ("artifacts/onnx/path", "/etc/passwd"),
    "a path with escapes": ("artifacts/onnx/path", EVIL),
    "a hidden path": ("artifacts/onnx/path", ".hidden"),
    "a path of a megabyte": ("artifacts/onnx/path", "x" * (1 << 20)),
    "a digest that is none": ("artifacts/onnx/sha256", "z" * 64),
    "another digest": ("artifacts/onnx/sha256", "0" * 64),
    "another length": ("artifacts/onnx/bytes", 1 << 62),
    "a negative length": ("artifacts/onnx/bytes", -1),
    "an unknown precision": ("artifacts/onnx/precision", "fp3"),
    "a probe elsewhere": ("probe/path", "../probe.npz"),
    "batches of text": ("batch", "1:8:64"),
    "falling batches": ("batch", {"min": 9, "opt": 5, "max": 1}),
    "a batch of a billion": ("batch", {"min": 1, "opt": 1, "max": 10**9}),
    "an input of no axes": ("input/shape", []),
    "a huge input": ("input/shape", [None, 3, 10**9, 10**9]),
    "a negative input": ("input/shape", [None, 3, -32, 32]),
    "an input of text": ("input/dtype", "object"),
    "no classes": ("output/shape", [None, 0]),
    "a million classes": ("output/shape", [None, 1_000_000]),
    "nine labels": ("labels", list("012345678")),
    "labels of numbers": ("labels", list(range(10))),
    "a label of a megabyte": ("labels", ["x" * (1 << 20)] * 10),
    "a mean of text": ("preprocessing/mean", [EVIL] * 3),
    "a mean of one channel": ("preprocessing/mean", [1.0]),
    "no std": ("preprocessing/std", []),
    "a std of nothing": ("preprocessing/std", [0.0, 0.0, 0.0]),
    "a huge resize": ("preprocessing/resize", {"mode": "exact", "size": [1 << 30, 1 << 30]}),
    "a resize that is none": ("preprocessing/resize", {"mode": EVIL, "size": [32, 32]}),
    "a huge crop": ("preprocessing/crop", [1 << 20, 1 << 20]),
    "scores that are none": ("scores", "exec"),
    "a certificate of text": ("certificate", EVIL),
    "provenance of text": ("provenance", EVIL),
    "warnings of numbers": ("warnings", [1]),
}


def _arrays(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        with np.load(io.BytesIO(data)) as arrays:
            content = dict(arrays)
        change(content)
        buffer = io.BytesIO()
        np.savez(buffer, **content)
        return buffer.getvalue()

    return changed


def _set(name: str, value: Callable[[np.ndarray], Any]) -> Callable[[bytes], bytes]:
    return _arrays(lambda content: content.update({name: value(content[name])}))


def _zipped(name: str, content: bytes, kind: int = zipfile.ZIP_DEFLATED) -> Callable[[bytes], bytes]:
    def changed(_: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", kind) as archive:
            archive.writestr(name, content)
        return buffer.getvalue()

    return changed


def npy(header: str) -> bytes:
    """Return an array file with this header and no data."""
    text = header.encode("latin1")
    return b"\x93NUMPY\x01\x00" + (len(text) + 1).to_bytes(2, "little") + text + b"\n"


PROBES: Mapping[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "bytes": lambda _: bytes(range(256)) * 10,
    "cut": lambda d: d[: len(d) // 2],
    "no samples": _arrays(lambda c: c.update({k: v[:0] for k, v in c.items()})),
    "NaN": _set("inputs", lambda x: x * np.float32("nan")),
    "infinity": _set("reference", lambda x: x + np.inf),
    "objects": _set("inputs", lambda _: np.array([{}], dtype=object)),
    "texts": _set("reference", lambda _: np.array(["a"])),
    "another size": _set("inputs", lambda x: x[:, :, :5]),
    "a bomb": _zipped("inputs.npy", bytes(100_000_000)),
    "a header of code": _zipped("inputs.npy", npy("__import__('os').system('touch executed')")),
    "a header that is nested": _zipped("inputs.npy", npy("(" * 5000)),
    "a header of tokens": _zipped("inputs.npy", npy("{'descr': 'f4', 'fortran_order': False, 'shape': (1L, 3}")),
    "a huge shape": _zipped("inputs.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}")),
    "a negative shape": _zipped("inputs.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}")),
    "bytes compressed by LZMA": _zipped("inputs.npy", b"x", zipfile.ZIP_LZMA),
    "a pickle": lambda _: b"\x80\x04cos\nsystem\n(X\x0e\x00\x00\x00touch executedtR.",
}


GRAPHS: Mapping[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "bytes": lambda _: bytes(range(256)) * 10,
    "cut": lambda d: d[: len(d) // 2],
    "doubled": lambda d: d + d,
    "a text": lambda _: EVIL.encode(),
    "nested messages": lambda _: b"\x3a\xff\xff\xff\x07" * 1000,
}

NETWORKS: Mapping[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "bytes": lambda _: bytes(range(256)) * 10,
    "cut": lambda d: d[: len(d) // 2],
    "a bomb of entities": lambda _: (
        b'<?xml version="1.0"?><!DOCTYPE b [<!ENTITY a "ha">'
        + b"".join(b'<!ENTITY a%d "%s">' % (i, b"&a%d;" % (i - 1) * 10 if i else b"&a;" * 10) for i in range(10))
        + b"]><net>&a9;</net>"
    ),
    "a file of the system": lambda _: b'<!DOCTYPE n [<!ENTITY x SYSTEM "file:///etc/passwd">]><net name="&x;"/>',
    "nested elements": lambda _: b"<net>" * 100_000,
    "a weight beyond its file": lambda d: d.replace(b'offset="0"', b'offset="99999999999"'),
}


def _bundle(folder: Path, kit: Kit, change: Callable[[Path], object]) -> None:
    change(kit.copy_bundle(folder))


def _linked(bundle: Path, to: str) -> None:
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").symlink_to(to)


FOLDERS: Mapping[str, Make] = {
    "empty": lambda f, _: (f / "bundle").mkdir(),
    "missing": lambda _, __: None,
    "a file": lambda f, _: (f / "bundle").write_bytes(b"x"),
    "a loop of links": lambda f, _: (f / "bundle").symlink_to("bundle"),
    "without its graph": partial(_bundle, change=lambda b: (b / "model.onnx").unlink()),
    "with a folder for a graph": partial(
        _bundle, change=lambda b: ((b / "model.onnx").unlink(), (b / "model.onnx").mkdir())
    ),
    "with a pipe for a graph": partial(
        _bundle, change=lambda b: ((b / "model.onnx").unlink(), os.mkfifo(b / "model.onnx"))
    ),
    "with a link to a device": partial(_bundle, change=partial(_linked, to="/dev/zero")),
    "with a link to a file of the system": partial(_bundle, change=partial(_linked, to="/etc/passwd")),
    "with a pipe for a manifest": partial(_bundle, change=lambda b: ((b / MANIFEST).unlink(), os.mkfifo(b / MANIFEST))),
    "with a device for a manifest": partial(
        _bundle, change=lambda b: ((b / MANIFEST).unlink(), (b / MANIFEST).symlink_to("/dev/zero"))
    ),
    "without its probe": partial(_bundle, change=lambda b: (b / PROBE).unlink()),
}


def _filled(folder: Path, _: Kit, name: str, text: str = "mine") -> None:
    (folder / "out").mkdir()
    (folder / "out" / name).write_text(text, encoding="utf-8")


def _foreign_manifest(folder: Path, _: Kit) -> None:
    """Write the manifest of an extension or a web application, which lists files by names that are there."""
    _filled(folder, _, "manifest.json", json.dumps({"schema": 1, "artifacts": {}, "probe": {"path": "notes.txt"}}))
    (folder / "out" / "notes.txt").write_text("mine", encoding="utf-8")


def _with_folder(folder: Path, kit: Kit) -> None:
    """Put a folder where the manifest of a good bundle names a file."""
    out = kit.copy_bundle(folder).rename(folder / "out")
    (out / "model.onnx").unlink()
    (out / "model.onnx").mkdir()
    (out / "model.onnx" / "thesis.txt").write_text("mine", encoding="utf-8")


def _with_extra(folder: Path, kit: Kit) -> None:
    out = kit.copy_bundle(folder).rename(folder / "out")
    (out / "thesis.txt").write_text("mine", encoding="utf-8")


OUTPUTS: Mapping[str, tuple[Make, int]] = {
    "a file": (lambda f, _: (f / "out").write_text("x", encoding="utf-8"), USAGE),
    "a folder with a text": (partial(_filled, name="thesis.txt"), USAGE),
    "a folder with a hidden file": (partial(_filled, name=".git"), USAGE),
    "a folder with names with escapes": (partial(_filled, name=EVIL), USAGE),
    "a manifest of others": (partial(_filled, name=MANIFEST, text='{"name": "extension"}'), USAGE),
    "a manifest that accounts for files of others": (_foreign_manifest, USAGE),
    "a nested manifest": (partial(_filled, name=MANIFEST, text=DEEP), USAGE),
    "a bundle with a folder": (_with_folder, USAGE),
    "a bundle with a text": (_with_extra, USAGE),
    "a dangling link": (lambda f, _: (f / "out").symlink_to("/dev/null/x"), UNWRITTEN),
    "a loop of links": (lambda f, _: (f / "out").symlink_to("out"), UNWRITTEN),
    "a pipe": (lambda f, _: os.mkfifo(f / "out"), USAGE),
}
