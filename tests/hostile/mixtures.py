"""Inputs of the wrong kind, files of two kinds at once, names that are no text, graphs that ask for too much."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper
from PIL import Image

from hostile.bundles import npy, replaced
from hostile.case import MISSING, USAGE, Case, Kit, Make
from hostile.checkpoints import EVIL, header, tensor, tensors

RAW_NAME = os.fsdecode(b"\xff\xfe\x80")
"""A file name that is no UTF-8."""


def cases() -> Iterator[Case]:
    """Yield every case of this kind."""
    for command in WRONG_KINDS:
        yield Case(f"wrong kind: {command}", command)
    for name, graph in GRAPHS.items():
        make = partial(replaced, entry="onnx", data=partial(_graph, change=graph))
        code = MISSING if name == "a terabyte of zeros" else USAGE
        yield Case(f"ONNX: {name}", "predict {x}/bundle {image} --format onnx", make, code)
        yield Case(f"verify ONNX: {name}", "verify {x}/bundle --format onnx", make, code)
    for name, data in XML.items():
        make = partial(replaced, entry="openvino", data=data)
        yield Case(f"OpenVINO: {name}", "predict {x}/bundle {image} --format openvino", make)
    for name, data in TENSORS.items():
        yield Case(
            f"tensors: {name}",
            "export --ckpt {x}/x.safetensors --out {earlier}",
            partial(_written, name="x.safetensors", data=data),
        )
    for name, make in POLYGLOTS.items():
        yield Case(f"two kinds: {name}", "export --ckpt {x}/x.pth --out {earlier}", make)
    for name, member in ARRAYS.items():
        command = "export --ckpt {ckpt} --out {earlier} --precision int8 --calibration {x}/x.npz"
        yield Case(f"array: {name}", command, partial(_zipped, member=member))
    for name, data in PICTURES.items():
        yield Case(f"image: {name}", "predict {bundle} {x}/x.png", partial(_written, name="x.png", data=data))
    for name, data in TOML.items():
        yield Case(
            f"TOML: {name}",
            "export --ckpt {ckpt} --out {earlier} --card {x}/x.toml",
            partial(_written, name="x.toml", data=data),
        )
    yield from _names()


def _names() -> Iterator[Case]:
    yield Case(
        "name: a picture",
        f"predict {{bundle}} {{x}}/{RAW_NAME}.png",
        partial(_written, name=f"{RAW_NAME}.png", data=b"x"),
    )
    yield Case(
        "name: weights",
        f"export --ckpt {{x}}/{RAW_NAME}.pth --out {{earlier}}",
        partial(_written, name=f"{RAW_NAME}.pth", data=b"x"),
    )
    yield Case("name: a bundle", f"predict {{x}}/{RAW_NAME} {{image}}", lambda f, _: (f / RAW_NAME).mkdir())
    yield Case("name: a card", f"export --ckpt {{ckpt}} --card {RAW_NAME}.toml --out {{earlier}}")
    yield Case("name: a module", f"export --ckpt {{ckpt}} --module {RAW_NAME}:make --out {{earlier}}")
    yield Case("name: a model", f"export --ckpt {{ckpt}} --model timm:{RAW_NAME} --out {{earlier}}")
    yield Case("name: an option", f"export --{RAW_NAME}")
    yield Case("name: a command", f"{RAW_NAME}")
    yield Case("name: a null in it", "predict {bundle} {x}/a\0b.png")
    yield Case("name: a null in a bundle", "predict {x}/a\0b {image}")
    yield Case("name: a null in weights", "inspect {x}/a\0b.pth")
    yield Case("name: a null in out", "export --ckpt {ckpt} --out {x}/a\0b")
    yield Case("name: a null in labels", "export --ckpt {ckpt} --labels {x}/a\0b --out {earlier}")
    yield Case(
        "name: a null in a calibration", "export --ckpt {ckpt} --precision int8 --calibration {x}/a\0b --out {earlier}"
    )
    yield Case("name: a null in data", "eval {bundle} --data {x}/a\0b")
    yield Case("name: a null in a card", "export --ckpt {ckpt} --card {x}/a\0b.toml --out {earlier}")
    yield Case("name: raw labels", f"export --ckpt {{ckpt}} --labels {RAW_NAME} --out {{earlier}}")


WRONG_KINDS = (
    "inspect {image}",
    "export --ckpt {bundle} --out {earlier}",
    "export --ckpt {bundle}/manifest.json --out {earlier}",
    "export --ckpt {bundle}/probe.npz --out {earlier}",
    "export --ckpt {bundle}/model.onnx --out {earlier}",
    "export --ckpt {image} --out {earlier}",
    "export --ckpt {ckpt} --card {bundle}/manifest.json --out {earlier}",
    "export --ckpt {ckpt} --card {bundle} --out {earlier}",
    "export --ckpt {ckpt} --card {ckpt} --out {earlier}",
    "export --ckpt {ckpt} --labels {ckpt} --out {earlier}",
    "export --ckpt {ckpt} --labels {bundle} --out {earlier}",
    "export --ckpt {ckpt} --labels /dev/zero --out {earlier}",
    "export --ckpt {ckpt} --precision int8 --calibration {bundle} --out {earlier}",
    "export --ckpt {ckpt} --precision int8 --calibration {ckpt} --out {earlier}",
    "export --ckpt {ckpt} --precision int8 --calibration {bundle}/manifest.json --out {earlier}",
    "export --ckpt {ckpt} --module {ckpt} --out {earlier}",
    "predict {bundle} {bundle}",
    "predict {ckpt} {image}",
    "predict {bundle}/manifest.json {image}",
    "predict {bundle} {ckpt}",
    "predict {bundle} {bundle}/model.onnx",
    "verify {ckpt}",
    "verify {bundle}/model.onnx",
    "verify {bundle} --ckpt {bundle} --bisect",
    "eval {bundle} --data {bundle}",
    "eval {bundle} --data {ckpt}",
    "eval {ckpt} --data {bundle}",
    "build {ckpt} --format onnx",
    "build {earlier} --refit-from {bundle}",
    "build {earlier} --refit-from {bundle}/model.onnx",
    "pack {ckpt} --layout triton --out {x}/out",
    "pack {bundle} --layout {bundle} --out {x}/out",
    "pack {bundle} --layout triton --name ../../x --out {x}/out",
    "bench {bundle}/manifest.json",
    "bench {image}",
    "bench --ckpt {bundle}",
    "bench --compare {bundle}/manifest.json {bundle}/manifest.json",
    "serve {ckpt}",
    "serve {bundle}/model.onnx",
    "serve --config {bundle}/manifest.json",
    "serve --config /dev/zero",
    "serve {bundle} --port 99999999",
)

Change = Callable[[onnx.ModelProto], object]


def _graph(data: bytes, change: Change) -> bytes:
    model = onnx.load_model_from_string(data)
    change(model)
    return model.SerializeToString()


def _external(model: onnx.ModelProto, location: str, length: int = 0, offset: int = 0) -> None:
    """Say that the data of the largest weights lie in another file."""
    weights = max(model.graph.initializer, key=lambda value: len(value.raw_data))
    length = length or len(weights.raw_data)
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        weights.external_data.add(key=key, value=value)


def _rename_operator(model: onnx.ModelProto, name: str, domain: str = "") -> None:
    model.graph.node[0].op_type, model.graph.node[0].domain = name, domain


def _first_dims(model: onnx.ModelProto, *sizes: int) -> None:
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend(sizes)


def _fills_memory(model: onnx.ModelProto) -> None:
    """Add a terabyte of zeros to the output."""
    out = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["inner" if name == out else name for name in node.output]
    model.graph.initializer.append(helper.make_tensor("size", TensorProto.INT64, [2], [1 << 20, 1 << 18]))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["size"], ["zeros"]))
    model.graph.node.append(helper.make_node("ReduceSum", ["zeros"], ["sum"], keepdims=0))
    model.graph.node.append(helper.make_node("Add", ["inner", "sum"], [out]))


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = model.graph.output[0].name


GRAPHS: Mapping[str, Change] = {
    "weights in a file of the system": partial(_external, location="/etc/passwd", length=16),
    "weights outside": partial(_external, location="../../../../../etc/passwd", length=16),
    "weights in a device": partial(_external, location="/dev/zero"),
    "weights in the manifest": partial(_external, location="manifest.json", length=16),
    "weights beyond a file": partial(_external, location="probe.npz", offset=1 << 62),
    "weights of a negative length": partial(_external, location="probe.npz", length=-5),
    "weights in a name with escapes": partial(_external, location=EVIL),
    "weights in a name of a megabyte": partial(_external, location="x" * (1 << 20)),
    "an operator with escapes": partial(_rename_operator, name=EVIL),
    "an operator of a megabyte": partial(_rename_operator, name="x" * (1 << 20)),
    "an operator of others": partial(_rename_operator, name="PyOp", domain="pyop"),
    "dims that overflow": lambda m: _first_dims(m, 1 << 62, 1 << 62),
    "negative dims": lambda m: _first_dims(m, -1),
    "a terabyte of zeros": _fills_memory,
    "a cycle": _cycle,
    "no output": lambda m: m.graph.ClearField("output"),
    "no nodes": lambda m: m.graph.ClearField("node"),
    "an IR version of the future": lambda m: setattr(m, "ir_version", 1 << 40),
    "an opset of the future": lambda m: setattr(m.opset_import[0], "version", 1 << 40),
    "another input": lambda m: setattr(m.graph.input[0], "name", EVIL),
}


def _replaces(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(old, new, 1)


XML: Mapping[str, Callable[[bytes], bytes]] = {
    "an operation with escapes": _replaces(b'type="Parameter"', b'type="&#x1b;[31m"'),
    "an operation of a megabyte": _replaces(b'type="Parameter"', b'type="' + b"x" * (1 << 20) + b'"'),
    "an unknown operation": _replaces(b'type="Parameter"', b'type="PythonOp" version="extension"'),
    "a layer twice": _replaces(b'<layer id="1"', b'<layer id="0"'),
    "an edge to nowhere": _replaces(b'from-layer="0"', b'from-layer="99999"'),
    "an edge to itself": lambda d: d.replace(b'from-layer="0"', b'from-layer="1"'),
    "a terabyte of weights": _replaces(b'offset="0" size="', b'offset="0" size="99999999999999'),
    "an offset that overflows": _replaces(b'offset="0"', b'offset="18446744073709551615"'),
    "a version of the future": _replaces(b'version="11"', b'version="4294967295"'),
}

TENSORS: Mapping[str, bytes] = {
    "300,000 tensors of nothing": tensors(
        json.dumps({f"stages.{i}.x": tensor(shape=(0,), offsets=(0, 0)) for i in range(300_000)}).encode(), 0
    ),
    "a shape of nothing times everything": tensors(header(a=tensor(shape=(0, 1 << 62, 1 << 62), offsets=(0, 0))), 0),
    "thousand axes": tensors(header(a=tensor(shape=(1,) * 1000, offsets=(0, 4))), 4),
    "an empty name": tensors(header(**{"": tensor(offsets=(0, 16))}), 16),
    "dots alone": tensors(header(**{"." * 50_000: tensor(offsets=(0, 16))}), 16),
    "stages of dots": tensors(header(**{"stages." * 20_000: tensor(offsets=(0, 16))}), 16),
    "four bits": tensors(header(a=tensor("F4", offsets=(0, 2))), 2),
    "eight bits": tensors(header(a=tensor("F8_E4M3", offsets=(0, 4))), 4),
    "metadata of numbers": tensors(header(__metadata__={"format": 1}, a=tensor(offsets=(0, 16))), 16),
    "labels of a megabyte": tensors(header(__metadata__={"classes": "x" * (1 << 20)}, a=tensor(offsets=(0, 16))), 16),
    "a hole": tensors(header(a=tensor(offsets=(0, 16)), b=tensor(offsets=(32, 48))), 48),
}


def _written(folder: Path, _: Kit, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)


def _zip(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def _joined(folder: Path, kit: Kit, *, image: bool) -> None:
    """Write a picture, or weights, that are an archive of a pickle too."""
    first = (kit.image if image else kit.checkpoint).read_bytes()
    (folder / "x.pth").write_bytes(first + _zip(("archive/data.pkl", b"\x80\x02N."), ("archive/version", b"3")))


POLYGLOTS: Mapping[str, Make] = {
    "a picture and an archive": partial(_joined, image=True),
    "an array and a pickle": lambda f, _: (f / "x.pth").write_bytes(b"\x80\x02N." + b"\x93NUMPY\x01\x00"),
    "an archive in an archive": lambda f, _: (f / "x.pth").write_bytes(
        _zip(("x.pth", _zip(("archive/data.pkl", b"\x80\x02N."))))
    ),
    "two pickles": lambda f, _: (f / "x.pth").write_bytes(
        _zip(("a/data.pkl", b"\x80\x02N."), ("b/data.pkl", b"\x80\x02}."))
    ),
    "a tar": lambda f, _: (f / "x.pth").write_bytes(b"storages\0" + bytes(248) + b"ustar\x0000" + bytes(700)),
    "an archive after a megabyte": lambda f, _: (f / "x.pth").write_bytes(
        bytes(1 << 20) + _zip(("archive/data.pkl", b"\x80\x02N."))
    ),
    "a comment that is an archive": lambda f, _: (f / "x.pth").write_bytes(
        _zip(("a", b"x"))[:-2] + struct.pack("<H", 22) + b"PK\x05\x06" + bytes(18)
    ),
}


def _zipped(folder: Path, _: Kit, member: bytes) -> None:
    (folder / "x.npz").write_bytes(_zip(("images.npy", member)))


def _array(kind: str, shape: str = "(40, 3, 32, 32)", size: int = 0) -> bytes:
    return npy(f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}}}") + bytes(size)


ARRAYS: Mapping[str, bytes] = {
    "of a gigabyte an element": _array("('<f4', (1000000000,))"),
    "of 3,000 fields": _array("[" + ", ".join(f"('f{i}', '<f4')" for i in range(3000)) + "]"),
    "of dates": _array("'<M8[s]'", size=40 * 3072 * 8),
    "of texts": _array("'<U1'", size=40 * 3072 * 4),
    "of long floats": _array("'<f16'", size=40 * 3072 * 16),
    "of nothing times everything": _array("'<f4'", "(0, 4611686018427387904, 4611686018427387904)"),
    "of shapes that overflow": _array("'<f4'", "(4611686018427387904, 4611686018427387904)"),
    "of 5,000 digits": _array("'<f4'", "(" + "9" * 5000 + ",)"),
    "of forty axes": _array("'<f4'", "(" + "1, " * 70 + ")", 4),
    "of flags as a shape": _array("'<f4'", "(True, True)", 4),
    "of a head without end": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
    "of version 9": b"\x93NUMPY\x09\x00\x10\x00{",
    "of code as a type": _array("__import__('os').system('touch executed')"),
    "of objects": _array("'|O'", "(1,)") + b"\x80\x04cos\nsystem\n(X\x0e\x00\x00\x00touch executedtR.",
}


def _save(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _many_scans() -> bytes:
    """Return a JPEG of thousands of progressive scans, each over every pixel."""
    data = _save(Image.new("RGB", (2000, 2000)), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * 3000 + b"\xff\xd9"


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _chunks() -> bytes:
    data = _save(Image.new("L", (8, 8)), "PNG")
    return data[:33] + _chunk(b"tEXt", b"a\0b") * 200_000


PICTURES: Mapping[str, bytes] = {
    "many scans": _many_scans(),
    "chunks without end": _chunks(),
    "a directory of millions": b"MM\x00*\x00\x00\x00\x08\xff\xff" + bytes(12) * 60_000,
    "a film of nothing": b"GIF89a\x01\x00\x01\x00\x80\x00\x00" + bytes(6) + b"!\xf9\x04\x00\x00\x00\x00\x00" * 200_000,
}

TOML: Mapping[str, bytes] = {
    "50,000 tables": b"".join(b"[a%d]\n" % i for i in range(50_000)),
    "400,000 elements": b"a = [" + b"1," * 400_000 + b"]",
    "tables in tables": b"".join(b"[[a]]\n" for _ in range(100_000)),
    "inline tables": b"a = " + b"{a = " * 3000 + b"1" + b"}" * 3000,
    "brackets in dotted heads": b"[" + b"a." * 63 + b"a]\n[" + b"b." * 20_000 + b"b]",
    "dates": b"name = 9999-99-99\n",
    "escapes": b'name = "\\U0000001b[31m\\u202e"\n',
    "surrogates": b'name = "\\ud800"\n',
    "quotes without end": b'a = """' + b"x" * 900_000,
    "a null": b"a = \0",
    "quoted keys": b'"' + b'a"."' * 20_000 + b'" = 1',
    "spaces": b"a = 1" + b" " * 900_000 + b"x",
    "digits": b"a = 1" + b"_1" * 400_000 + b"_",
    "a number with dots": b"a = " + b"1." * 400_000,
    "backslashes": b'a = "' + b"\\\\" * 400_000,
}
