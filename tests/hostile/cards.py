"""Model cards and label files that lie, nest too deeply or name what they must not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from hostile.case import Case, Kit, Make
from hostile.checkpoints import EVIL
from repmlp_deploy.card import data_root

COMMAND = "export --ckpt {ckpt} --card {x}/card.toml --out {earlier}"


def cases() -> Iterator[Case]:
    """Yield every case of this kind."""
    for name, text in TEXTS.items():
        yield Case(f"card: {name}", COMMAND, partial(_written, data=text))
    for name, (old, new) in CHANGES.items():
        yield Case(f"card with {name}", COMMAND, partial(_changed, old=old, new=new))
    for name, data in LABELS.items():
        make = partial(_labels, data=data)
        yield Case(f"labels: {name}", "export --ckpt {ckpt} --labels {x}/labels.txt --out {earlier}", make)
    for name, make in FILES.items():
        yield Case(f"card file: {name}", COMMAND, make)
    for name in ("../../etc/passwd", "/etc/passwd", "..", ".", "", "labels/imagenet-1k", "a" * 5000, EVIL.strip()):
        yield Case(f"card called {name[:20]!r}", f"export --ckpt {{ckpt}} --card {name} --out {{earlier}}")
    yield Case("labels from a device", "export --ckpt {ckpt} --labels /dev/zero --out {earlier}")
    yield Case("labels that are not there", "export --ckpt {ckpt} --labels {x}/none --out {earlier}")
    yield Case("a card over a card", "inspect {ckpt} --write-card {x}/card.toml", partial(_written, data=b"x"))
    yield Case("a card that is no TOML", "inspect {ckpt} --write-card {x}/card.json")
    yield Case("a card into nowhere", "inspect {ckpt} --write-card {x}/a/b/card.toml", None, 5)


def _written(folder: Path, _: Kit, data: bytes) -> None:
    (folder / "card.toml").write_bytes(data)


def _changed(folder: Path, _: Kit, old: str, new: str) -> None:
    text = (data_root() / "repmlp-digits.toml").read_text(encoding="utf-8")
    assert old in text
    (folder / "card.toml").write_bytes(text.replace(old, new).encode("utf-8", "surrogatepass"))


def _labels(folder: Path, _: Kit, data: bytes) -> None:
    (folder / "labels.txt").write_bytes(data)


TEXTS: Mapping[str, bytes] = {
    "empty": b"",
    "bytes": bytes(range(256)),
    "UTF-16": 'name = "x"'.encode("utf-16"),
    "nested lists": b"a = " + b"[" * 50_000,
    "nested tables": b"[" + b".".join([b"a"] * 50_000) + b"]",
    "nested inline tables": b"a = " + b"{b = " * 20_000,
    "an integer of 5,000 digits": b"a = " + b"9" * 5000,
    "a float of 5,000 digits": b"a = 1." + b"9" * 5000,
    "two megabytes": b"# " + b"x" * (2 << 20),
    "a date that is none": b"a = 2020-99-99",
    "the same key twice": b"a = 1\na = 2",
    "an escape": b'name = "\\u001b[31m"',
    "JSON": b'{"name": "x"}',
}

CHANGES: Mapping[str, tuple[str, str]] = {
    "a name of dots": ('name = "repmlp-digits"', 'name = "../../x"'),
    "a name with escapes": ('name = "repmlp-digits"', 'name = "\\u001b[31m"'),
    "a name of a megabyte": ('name = "repmlp-digits"', f'name = "{"x" * 900_000}"'),
    "an empty name": ('name = "repmlp-digits"', 'name = ""'),
    "a family that is none": ('family = "repmlpnet"', 'family = "os"'),
    "a family with escapes": ('family = "repmlpnet"', 'family = "\\u001b[31m\\u202e"'),
    "a task that is none": ('task = "classify"', 'task = "exec"'),
    "a key that is none": ('task = "classify"', 'task = "classify"\nhook = "os:system"'),
    "a key with escapes": ('task = "classify"', 'task = "classify"\n"\\u001b[31m" = 1'),
    "a size of nothing": ("input_size = [32, 32]", "input_size = [0, 0]"),
    "a negative size": ("input_size = [32, 32]", "input_size = [-32, 32]"),
    "a huge size": ("input_size = [32, 32]", "input_size = [1000000000, 1000000000]"),
    "a size beyond 64 bits": ("input_size = [32, 32]", f"input_size = [{10**30}, 32]"),
    "a size of text": ("input_size = [32, 32]", 'input_size = "32x32"'),
    "infinite size": ("input_size = [32, 32]", "input_size = [inf, nan]"),
    "huge channels": ("channels = [24, 48, 96]", "channels = [1000000000, 48, 96]"),
    "negative channels": ("channels = [24, 48, 96]", "channels = [-24, 48, 96]"),
    "a million stages": ("channels = [24, 48, 96]", f"channels = [{'24,' * 300_000}]"),
    "a depth of a billion": ("depths = [1, 2, 1]", "depths = [1, 1000000000, 1]"),
    "lists of other lengths": ("depths = [1, 2, 1]", "depths = [1, 2]"),
    "no sharesets": ("sharesets = [1, 4, 16]", "sharesets = []"),
    "sharesets of nothing": ("sharesets = [1, 4, 16]", "sharesets = [0, 0, 0]"),
    "huge kernels": ("kernels = [1, 3]", "kernels = [1, 1000001]"),
    "even kernels": ("kernels = [1, 3]", "kernels = [2, 4]"),
    "negative kernels": ("kernels = [1, 3]", "kernels = [-1]"),
    "a thousand kernels": ("kernels = [1, 3]", f"kernels = [{','.join(map(str, range(1, 2001, 2)))}]"),
    "a reduction of nothing": ("reduction = 4", "reduction = 0"),
    "a huge expansion": ("expansion = 4", "expansion = 100000000"),
    "a patch of nothing": ("patch = 4", "patch = 0"),
    "a huge patch": ("patch = 4", "patch = 1000000"),
    "a billion classes": ("classes = 10", "classes = 1000000000"),
    "classes of text": ("classes = 10", 'classes = "ten"'),
    "nine labels": ('labels = ["0", ', "labels = ["),
    "labels from elsewhere": (
        'labels = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]',
        'labels = "../../../etc/passwd"',
    ),
    "labels of an absolute path": (
        'labels = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]',
        'labels = "/etc/passwd"',
    ),
    "labels of another network": (
        'labels = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]',
        'labels = "imagenet-1k"',
    ),
    "a label of a megabyte": ('labels = ["0", ', f'labels = ["{"x" * 900_000}", '),
    "a std of nothing": ("std = [96.0, 96.0, 96.0]", "std = [0.0, 96.0, 96.0]"),
    "a std that is no number": ("std = [96.0, 96.0, 96.0]", "std = [nan, 96.0, 96.0]"),
    "an infinite mean": ("mean = [78.0, 78.0, 78.0]", "mean = [inf, 78.0, 78.0]"),
    "a mean of one channel": ("mean = [78.0, 78.0, 78.0]", "mean = [78.0]"),
    "a colour order that is none": ('colour_order = "RGB"', 'colour_order = "CMYK"'),
    "an interpolation that is none": ('interpolation = "bilinear"', 'interpolation = "eval"'),
    "a huge resize": ("size = [32, 32] }", "size = [1000000, 1000000] }"),
    "weights from elsewhere": ('file = "weights/repmlp-digits.safetensors"', 'file = "../../etc/passwd"'),
    "weights of an absolute path": ('file = "weights/repmlp-digits.safetensors"', 'file = "/etc/passwd"'),
    "a URL of a file": ('file = "weights/repmlp-digits.safetensors"', 'url = "file:///etc/passwd"'),
    "a URL with a user": ('file = "weights/repmlp-digits.safetensors"', 'url = "https://a:b@c/d"'),
    "a URL with a line end": ('file = "weights/repmlp-digits.safetensors"', 'url = "https://a/b\\r\\nX: y"'),
    "a URL without a digest": ('file = "weights/repmlp-digits.safetensors"', 'url = "https://example.org/x.pth"'),
    "a layout that is none": ('layout = "official"', 'layout = "\\u001b]0;x\\u0007"'),
}

LABELS: Mapping[str, bytes] = {
    "none": b"",
    "too few": b"a\nb\n",
    "too many": b"a\n" * 11,
    "an empty line": b"a\n\n" + b"b\n" * 8,
    "bytes": b"\xff\xfe\x00" * 10,
    "a line of a megabyte": b"x" * (1 << 20) + b"\n" + b"b\n" * 9,
    "thirty megabytes": b"x\n" * (15 << 20),
}


def _looped(folder: Path, _: Kit) -> None:
    (folder / "card.toml").symlink_to("card.toml")


def _folder(folder: Path, _: Kit) -> None:
    (folder / "card.toml").mkdir()


def _device(folder: Path, _: Kit) -> None:
    (folder / "card.toml").symlink_to("/dev/zero")


FILES: Mapping[str, Make] = {"a loop of links": _looped, "a folder": _folder, "a device": _device}
