"""Checkpoints that are damaged, dishonest or malicious."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hostile.case import FAILED, Case, Kit, Make, checkpoint_cases

MARKER = "executed"
EVIL = "\x1b[31m\x1b]0;owned\x07\u202egnp.\u2066\x9b2J\r\n"


def cases() -> Iterator[Case]:
    """Yield every case of this kind."""
    for suffix in ("pth", "safetensors"):
        for name, data in RAW.items():
            yield Case(f"{name} as {suffix}", f"inspect {{x}}/x.{suffix}", _writes(f"x.{suffix}", data))
    for kind in ("pth", "old.pth", "safetensors"):
        for part in (0.01, 0.7, 0.999):
            make = partial(_truncated, kind=kind, part=part)
            yield Case(f"{kind} truncated at {part:g}", f"export --ckpt {{x}}/x.{kind} --out {{earlier}}", make)
    yield from _pickles()
    for name, change in CONTENTS.items():
        yield Case(f"content: {name}", "export --ckpt {x}/x.pth --out {earlier}", partial(_saved, change=change))
    for name, header in HEADERS.items():
        yield Case(f"safetensors: {name}", "inspect {x}/x.safetensors", _writes("x.safetensors", tensors(header)))
    for name, make in ARCHIVES.items():
        yield Case(f"archive: {name}", "export --ckpt {x}/x.pth --out {earlier}", make)
    for name, (make, file) in FILES.items():
        yield from checkpoint_cases(f"file: {name}", file, make)
    yield from _other_commands()


def _pickles() -> Iterator[Case]:
    for name, data in PICKLES.items():
        yield Case(f"pickle: {name}", "export --ckpt {x}/x.pth --out {earlier}", _writes("x.pth", _packed(data)))
    for name in ("os.system", "builtins.exec", "nested tuples", "a list of itself", "no end"):
        yield Case(f"bare pickle: {name}", "inspect {x}/x.pth", _writes("x.pth", PICKLES[name]))


def _other_commands() -> Iterator[Case]:
    nan = partial(_saved, change=lambda state: state | {"head.bias": state["head.bias"] * float("nan")})
    junk = _writes("x.pth", RAW["random bytes"])
    for name, make in (("damaged", junk), ("with NaN", nan)):
        yield Case(f"verify against a {name} checkpoint", "verify {bundle} --ckpt {x}/x.pth", make, FAILED)
        yield Case(f"bisect against a {name} checkpoint", "verify {bundle} --bisect --ckpt {x}/x.pth", make)
        yield Case(f"evaluate a {name} checkpoint", "eval {bundle} --data {x} --ckpt {x}/x.pth", make)
        yield Case(f"refit from a {name} checkpoint", "build {earlier} --refit-from {x}/x.pth", make)
    for path in ("/dev/null", "/dev/zero", "/proc/self/mem", "/proc/self/environ", "/proc/self/maps", "/", "/dev/tty"):
        yield Case(f"export {path}", f"export --ckpt {path} --out {{earlier}}")
        yield Case(f"inspect {path}", f"inspect {path}")
    yield Case("a name that is too long", "export --ckpt " + "a" * 5000 + ".pth")
    yield Case("a name with escapes", f"export --ckpt {EVIL.strip()}.pth")


def _writes(name: str, data: bytes) -> Make:
    def make(folder: Path, _: Kit) -> None:
        (folder / name).write_bytes(data)

    return make


RAW: Mapping[str, bytes] = {
    "an empty file": b"",
    "one byte": b"\x80",
    "zeros": bytes(4096),
    "random bytes": bytes((i * 7919 + i // 3) % 251 for i in range(5000)),
    "a web page": b"<!DOCTYPE html><html>\x1b[31m404</html>",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n",
    "the head of an archive": b"PK\x03\x04" + bytes(100),
    "an archive of nothing": b"PK\x05\x06" + bytes(18),
    "a length without end": struct.pack("<Q", (1 << 63) - 1) + b"{}",
    "JSON": b'{"state_dict": {"w": 1}}',
    "gzip": b"\x1f\x8b\x08\x00" + bytes(64),
    "xz": b"\xfd7zXZ\x00" + bytes(64),
    "a program": b"\x7fELF" + bytes(200),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(200),
    "source": b"import os\nos.system('touch executed')\n",
}


def _global(module: str, name: str, *arguments: bytes) -> bytes:
    """Return a pickle that calls `module.name` with texts."""
    texts = b"".join(b"X" + struct.pack("<I", len(a)) + a for a in arguments)
    return b"\x80\x02c" + module.encode() + b"\n" + name.encode() + b"\n(" + texts + b"tR."


PICKLES: Mapping[str, bytes] = {
    "os.system": _global("os", "system", b"touch " + MARKER.encode()),
    "posix.system": _global("posix", "system", b"touch " + MARKER.encode()),
    "builtins.exec": _global("builtins", "exec", b"open('executed','w')"),
    "builtins.eval": _global("builtins", "eval", b"open('executed','w')"),
    "builtins.open": _global("builtins", "open", MARKER.encode(), b"w"),
    "builtins.getattr": _global("builtins", "getattr", b"x", b"y"),
    "torch.load": _global("torch", "load", b"/etc/passwd"),
    "torch.hub.load": _global("torch.hub", "load", b"a/b", b"c"),
    "torch._utils._rebuild_tensor_v2 of texts": _global("torch._utils", "_rebuild_tensor_v2", b"x", b"y"),
    "numpy.load": _global("numpy", "load", b"/etc/passwd"),
    "runpy": _global("runpy", "run_path", b"/etc/passwd"),
    "a dotted name": b"\x80\x04\x8c\x08builtins\x8c\x0egetattr.__call__\x93\x8c\x01a\x85R.",
    "a name with escapes": _global("a\x1b[31m", "b\u202e"),
    "an import with code": _global("antigravity", "x"),
    "nested tuples": b"\x80\x02}(" + b")" + b"\x85" * 500_000 + b"K\x01u.",
    "lists within lists": b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".",
    "doubled lists": b"\x80\x02]q\x00" + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(60)) + b".",
    "a million entries": b"\x80\x02]" + b"(" + b"N" * 1_000_000 + b"e.",
    "a list of itself": b"\x80\x02]q\x00h\x00a.",
    "a dictionary of itself": b"\x80\x02}q\x00(K\x01h\x00u.",
    "a huge text": b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "a huge frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x00.",
    "a huge memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a long integer": b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\xff" * 100,
    "a text integer": b"I" + b"9" * 50_000 + b"\n.",
    "no end": b"\x80\x02}",
    "an unknown operation": b"\x80\x02\xff.",
    "an empty stack": b"\x80\x02R.",
    "a persistent load": b"\x80\x02(X\x07\x00\x00\x00storageX\x01\x00\x00\x00ytQ.",
    "an extension": b"\x80\x02\x82\x01.",
    "a buffer": b"\x80\x05\x97.",
    "a protocol of the future": b"\x80\x63N.",
}


def _packed(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3")
    return buffer.getvalue()


State = dict[str, Any]


def _saved(folder: Path, kit: Kit, change: Callable[[State], Any]) -> None:
    torch.save(change(load_file(kit.checkpoint)), folder / "x.pth")


def _named(state: State, name: str) -> State:
    return {name + key: value for key, value in state.items()}


CONTENTS: Mapping[str, Callable[[State], Any]] = {
    "a list": lambda _: [1, 2],
    "a number": lambda _: 7,
    "a text": lambda _: EVIL,
    "nothing": lambda _: None,
    "an empty dictionary": lambda _: {},
    "one tensor": lambda _: torch.ones(3),
    "numbers as keys": lambda s: dict(enumerate(s.values())),
    "bytes as keys": lambda s: {k.encode(): v for k, v in s.items()},
    "tuples as keys": lambda s: {(k, 1): v for k, v in s.items()},
    "another network": lambda _: {"conv.weight": torch.ones(3, 3, 3, 3)},
    "not a number": lambda s: s | {"head.bias": s["head.bias"] * float("nan")},
    "infinity": lambda s: s | {"head.bias": s["head.bias"] / 0},
    "a negative variance": lambda s: s | {"head_norm.running_var": -s["head_norm.running_var"] - 1},
    "a missing key": lambda s: {k: v for k, v in s.items() if k != "head.bias"},
    "another shape": lambda s: s | {"head.bias": torch.ones(3)},
    "a scalar": lambda s: s | {"head.bias": torch.tensor(1.0)},
    "an empty tensor": lambda s: s | {"head.weight": torch.empty(0, 96)},
    "seven axes": lambda s: s | {"head.weight": torch.ones(1, 1, 1, 1, 1, 1, 1)},
    "complex numbers": lambda s: s | {"head.bias": torch.ones(10, dtype=torch.complex64)},
    "whole numbers": lambda s: s | {"head.bias": torch.ones(10, dtype=torch.int64)},
    "flags": lambda s: s | {"head.bias": torch.ones(10, dtype=torch.bool)},
    "a sparse tensor": lambda s: s | {"head.weight": s["head.weight"].to_sparse()},
    "a tensor without numbers": lambda s: s | {"head.weight": torch.empty(10, 96, device="meta")},
    "a text for a tensor": lambda s: s | {"head.bias": EVIL},
    "a list for a tensor": lambda s: s | {"head.bias": [1.0] * 10},
    "an extra key with escapes": lambda s: s | {f"stages.0.{EVIL}": torch.ones(3)},
    "an extra key of a megabyte": lambda s: s | {"stages.0." + "x" * (1 << 20): torch.ones(3)},
    "an extra key of surrogates": lambda s: s | {"stages.0.\ud800": torch.ones(3)},
    "stage ten million": lambda s: s | {"stages.10000000.0.repmlp_block.fc3.weight": torch.ones(3)},
    "a stage of 5,000 digits": lambda s: s | {f"stages.{'9' * 5000}.0.repmlp_block.fc3.weight": torch.ones(3)},
    "stage minus one": lambda s: s | {"stages.-1.0.repmlp_block.fc3.weight": torch.ones(3)},
    "a stage of letters": lambda s: s | {"stages.abc.0.repmlp_block.fc3.weight": torch.ones(3)},
    "a kernel of letters": lambda s: s | {"stages.0.0.repmlp_block.repconvX.conv.weight": torch.ones(3)},
    "a kernel of 9 digits": lambda s: s | {"stages.0.0.repmlp_block.repconv999999999.conv.weight": torch.ones(3)},
    "a stage of another script": lambda s: s | {"stages.\u0663.0.repmlp_block.fc3.weight": torch.ones(3)},
    "half merged": lambda s: s | {"stages.0.0.repmlp_block.fc3.bias": torch.ones(3)},
    "every key twice": lambda s: s | _named(s, "module."),
    "deep containers": lambda s: {"a": {"b": {"c": {"d": {"e": s}}}}},
    "two state dicts": lambda _: {"model": {"x": torch.ones(2)}, "ema": {"y": torch.ones(2)}},
    "a refused key of a megabyte": lambda s: s | {"a" * (1 << 20): "text"},
}


def _truncated(folder: Path, kit: Kit, kind: str, part: float) -> None:
    path = folder / f"x.{kind}"
    if kind == "safetensors":
        data = kit.checkpoint.read_bytes()
    else:
        torch.save(load_file(kit.checkpoint), path, _use_new_zipfile_serialization=kind == "pth")
        data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])


def tensors(header: bytes, size: int = 64) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(size)


def header(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


def tensor(dtype: str = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: Mapping[str, bytes] = {
    "no tensors": b"{}",
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a number of 5,000 digits": b'{"a": {"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,64]}}',
    "an unknown type": header(a=tensor("F13")),
    "a type with escapes": header(a=tensor(EVIL)),
    "an end before its start": header(a=tensor(offsets=(16, 0))),
    "data beyond the file": header(a=tensor(offsets=(0, 1 << 40))),
    "overlapping data": header(a=tensor(), b=tensor()),
    "a shape that overflows": header(a=tensor(shape=(1 << 32, 1 << 32, 4), offsets=(0, 16))),
    "a negative shape": header(a=tensor(shape=(-4,))),
    "a name twice": b'{"a":%s,"a":%s}' % ((json.dumps(tensor()).encode(),) * 2),
    "names with escapes": header(**{EVIL: tensor(offsets=(0, 64), shape=(16,))}),
    "metadata of a megabyte": header(__metadata__={"format": "x" * (1 << 20)}, a=tensor(offsets=(0, 64))),
    "text that is no UTF-8": b'{"\xff\xfe": 1}',
}


def _archive(folder: Path, change: Callable[[zipfile.ZipFile], object], kind: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(folder / "x.pth", "w", kind) as archive:
        change(archive)


def _patched(folder: Path, kit: Kit, old: bytes, new: bytes) -> None:
    """Save good weights and replace bytes everywhere in the archive."""
    _saved(folder, kit, lambda state: state)
    path = folder / "x.pth"
    path.write_bytes(path.read_bytes().replace(old, new))


def _encrypted(folder: Path, kit: Kit) -> None:
    """Set the flag of every member in the archive's directory."""
    _saved(folder, kit, lambda state: state)
    path = folder / "x.pth"
    data = bytearray(path.read_bytes())
    at = -1
    while (at := data.find(b"PK\x01\x02", at + 1)) >= 0:
        data[at + 8] |= 1
    path.write_bytes(data)


def _declares_more(folder: Path, kit: Kit) -> None:
    """Declare a length of four gigabytes for every member."""
    _saved(folder, kit, lambda state: state)
    path = folder / "x.pth"
    data = bytearray(path.read_bytes())
    at = -1
    while (at := data.find(b"PK\x01\x02", at + 1)) >= 0:
        data[at + 20 : at + 28] = b"\xfe\xff\xff\xff" * 2
    path.write_bytes(data)


ARCHIVES: Mapping[str, Make] = {
    "encrypted": _encrypted,
    "members of four gigabytes": _declares_more,
    "without its pickle": lambda f, _: _archive(f, lambda z: z.writestr("archive/version", "3")),
    "a bomb": lambda f, _: _archive(
        f, lambda z: z.writestr("archive/data.pkl", bytes(50_000_000)), zipfile.ZIP_DEFLATED
    ),
    "compressed by LZMA": lambda f, _: _archive(f, lambda z: z.writestr("archive/data.pkl", b"N."), zipfile.ZIP_LZMA),
    "compressed by bzip2": lambda f, _: _archive(f, lambda z: z.writestr("archive/data.pkl", b"N."), zipfile.ZIP_BZIP2),
    "names that leave the archive": lambda f, _: _archive(f, lambda z: z.writestr("../../data.pkl", b"\x80\x02N.")),
    "names with escapes": lambda f, _: _archive(f, lambda z: z.writestr(f"{EVIL}/data.pkl", b"\x80\x02(")),
    "a document": lambda f, _: _archive(f, lambda z: z.writestr("word/document.xml", "<w/>")),
    "a TorchScript": lambda f, _: _archive(f, lambda z: z.writestr("x/constants.pkl", "\x80\x02N.")),
    "20,000 members": lambda f, _: _archive(f, lambda z: [z.writestr(str(i), b"") for i in range(20_000)]),
    "data of tensors that are missing": partial(_patched, old=b"/data/1", new=b"/data/z"),
    "data of tensors that are changed": partial(_patched, old=bytes(16), new=b"\x01" * 16),
}


def _linked(folder: Path, _: Kit, to: str) -> None:
    (folder / "x.pth").symlink_to(to)


def _sparse(folder: Path, _: Kit) -> None:
    with (folder / "x.pth").open("wb") as file:
        file.write(b"\x80\x02")
        file.truncate(8 << 30)


def _strange_name(folder: Path, _: Kit) -> None:
    (folder / f"x{EVIL.strip()}.pth").write_bytes(b"\x80\x02N.")


FILES: Mapping[str, tuple[Make, str]] = {
    "a folder": (lambda f, _: (f / "x.pth").mkdir(), "x.pth"),
    "a pipe": (lambda f, _: os.mkfifo(f / "x.pth"), "x.pth"),
    "a dangling link": (partial(_linked, to="nowhere"), "x.pth"),
    "a loop of links": (partial(_linked, to="x.pth"), "x.pth"),
    "a link to a device": (partial(_linked, to="/dev/zero"), "x.pth"),
    "a file of holes": (_sparse, "x.pth"),
    "a name with escapes": (_strange_name, f"x{EVIL.strip()}.pth"),
    "another kind of file": (lambda f, k: (f / "x.txt").write_bytes(k.image.read_bytes()), "x.txt"),
    "an image": (lambda f, k: (f / "x.pth").write_bytes(k.image.read_bytes()), "x.pth"),
}
