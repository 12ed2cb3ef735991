"""Reading a weights file without trusting it.

Nothing in a file is executed or imported. `.safetensors` holds tensors only. A pickle is read by `unpickle`, in a child
process with limits on time and memory: it returns where every tensor lies. The numbers are then copied out of the file
here, every size checked against the file first and every checksum of a zip archive on the way.

The states of optimizers are never weights, so their tensors stay in the file.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import stat
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from repmlp_deploy.bundle import hash_file
from repmlp_deploy.convert.source import unpickle
from repmlp_deploy.errors import CheckpointError

__all__ = ["SUFFIXES", "Checkpoint", "OddTensor", "Placeholder", "read_checkpoint"]

SUFFIXES = (".pth", ".pt", ".safetensors")

_MAX_RATIO = 20  # of unpacked to packed size; torch.save does not compress, and weights hardly can be
_HOLES = 8  # a file whose blocks on the disk hold less than this part of its size is mostly holes
_READABLE = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1
_CHILD_SECONDS = 3  # of CPU time; the pickle of a checkpoint takes less than a tenth of one
_CHILD_BYTES = 1 << 30
_PATIENCE_SECONDS = 60.0  # of waiting for the child on a machine that is busy
_HEADER_BYTES = 4 << 20  # of a safetensors file: some 30,000 tensors, ten times a large checkpoint's
_NEVER_WEIGHTS = re.compile(r"optim|sched|(?<![a-z])scaler")  # an upscaler is a network
_PART = re.compile(r"-\d{5}-of-(?!00001\b)\d{5}\b")  # as transformers and safetensors name the files of one checkpoint
_GZIP = b"\x1f\x8b"
_TAR_AT = 257  # where a tar archive says that it is one
_MODULE_STATE = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Placeholder:
    """What is left of an object whose class was not loaded.

    Attributes:
        name: of the class, `package.module.Class`.
        content: the plain values and tensors in it, under their names.
    """

    name: str
    content: Mapping[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OddTensor:
    """A tensor that cannot be weights, `sparse`, `quantized` or `without numbers`."""

    kind: str


@dataclass(frozen=True)
class Checkpoint:
    """A weights file as it was read.

    Attributes:
        path: the file.
        sha256: of its bytes.
        content: what it holds: nested dictionaries and lists of tensors and plain values.
        replaced: names of the classes that were not loaded: configurations, training arguments, whole modules.
    """

    path: Path
    sha256: str
    content: Any
    replaced: tuple[str, ...] = ()


def read_checkpoint(path: str | Path, check: Callable[[str], None] | None = None) -> Checkpoint:
    """Return the content of a `.pth`, `.pt` or `.safetensors` file.

    Args:
        path: the file.
        check: called with the SHA-256 before the content is read; it raises if another file is needed.

    Raises:
        CheckpointError: it is not there, not a weights file, damaged, of a size that no checkpoint has, or was changed
            while it was read.
    """
    path = Path(path)
    try:
        _require_file(path)
        before = _identity(path)
        digest = hash_file(path)
        if check is not None:
            check(digest)
        content, replaced = _read(path)
        if _identity(path) != before:  # a training run saved, or a link was turned: the digest is of something else
            raise CheckpointError(f"{path} was changed while it was read: wait until it is written, and try again")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise CheckpointError(f"{path} holds more than this machine's memory") from None
    return Checkpoint(path, digest, content, replaced)


def _read(path: Path) -> tuple[Any, tuple[str, ...]]:
    """Return the content of a weights file, and the names of the classes that were not loaded."""
    head = _head(path)
    _refuse_other_kinds(path, head)
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        if int.from_bytes(head[:8], "little") > _HEADER_BYTES:
            raise CheckpointError(f"{path} is damaged, or its header names more tensors than a checkpoint has")
        return _read_safetensors(path), ()
    zipped = head.startswith(b"PK")
    if zipped:
        _check_archive(path)
    structure = _structure(path)
    return _Tensors(path, structure, zipped=zipped).content(), tuple(structure["replaced"])


def _identity(path: Path) -> tuple[int, ...]:
    """Return what changes when another file takes this name, or the file is written to."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _require_file(path: Path) -> None:
    """Raise unless `path` is a regular file whose bytes are really there."""
    try:
        found = path.stat()
    except FileNotFoundError:
        dangling = " (a link to a file that does not exist)" if path.is_symlink() else ""
        raise CheckpointError(f"{path}: no such file{dangling}") from None
    except ValueError as error:  # a null character in the name
        raise CheckpointError(f"{path}: no such file: {error}") from None
    if stat.S_ISDIR(found.st_mode):
        raise CheckpointError(f"{path} is a folder; give a {', '.join(SUFFIXES)} file")
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file; give a {', '.join(SUFFIXES)} file")
    if found.st_size == 0:
        raise CheckpointError(f"{path} is empty: download or save it again")
    blocks = getattr(found, "st_blocks", None)
    if blocks is not None and found.st_size > 1 << 20 and blocks * 512 * _HOLES < found.st_size:
        raise CheckpointError(f"{path} is mostly holes: its download was not finished; download it again")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    """Name what people mistake for weights: a web page, a pointer to a file that was not fetched, a part, a package."""
    text = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: fetch them with git lfs pull")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not weights: download the file itself")
    if text.startswith(b"{") and b'"weight_map"' in text:
        raise CheckpointError(f"{path} is the index of a checkpoint in several files: join them into one")
    if _PART.search(path.name):
        said = "is named as a part of a checkpoint in several files: join them into one, or rename it if it is whole"
        raise CheckpointError(f"{path} {said}")
    if head.startswith(_GZIP) or head[_TAR_AT:].startswith(b"ustar"):
        kind = "gzip file" if head.startswith(_GZIP) else "tar archive"
        raise CheckpointError(f"{path} is a {kind}: unpack it, and give the weights file in it")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file, or is damaged: {str(error)[:200]}") from None
    except (KeyError, ValueError, RuntimeError) as error:  # a type that torch does not have, a shape that does not fit
        raise CheckpointError(f"{path} holds a tensor that PyTorch cannot read ({type(error).__name__})") from None


def _check_archive(path: Path) -> None:
    """Raise unless a zip archive is readable, of honest size and without duplicates."""
    with _zip_errors(path), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len({member.filename for member in members}) != len(members):
            raise CheckpointError(f"{path} holds members of the same name: it was tampered with")
        if any(member.flag_bits & _ENCRYPTED for member in members):
            raise CheckpointError(f"{path} is encrypted: unpack it and save it again with torch.save")
        if any(member.compress_type not in _READABLE for member in members):
            raise CheckpointError(f"{path} is compressed in a way that torch.save never uses: save it again")
        size = sum(member.file_size for member in members)
        if size > _MAX_RATIO * path.stat().st_size:
            raise CheckpointError(f"{path} would unpack to {size} bytes, over {_MAX_RATIO} times its size: refused")


@contextlib.contextmanager
def _zip_errors(path: Path) -> Iterator[None]:
    """Say in one line what is wrong with an archive."""
    try:
        yield
    except CheckpointError:  # a ValueError too
        raise
    except zipfile.BadZipFile as error:
        member = str(error).rpartition("Bad CRC-32 for file ")[2]
        if member != str(error):
            said = f"{path} is damaged: the checksum of {member.strip(chr(39))[:200]} is wrong"
        else:
            said = f"{path} is truncated or damaged: {str(error)[:200]}"
        raise CheckpointError(f"{said}; download or save it again") from None
    except (EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError, zlib.error) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({type(error).__name__}); download or save it again"
        ) from None


def _structure(path: Path) -> dict[str, Any]:
    """Return what `unpickle` reads of a file, in a child process."""
    command = [sys.executable, "-I", unpickle.__file__, str(path.absolute()), str(_CHILD_SECONDS), str(_CHILD_BYTES)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_PATIENCE_SECONDS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"{path} is no PyTorch checkpoint: reading it took over {_PATIENCE_SECONDS:g} s"
        ) from None
    if done.returncode != 0:  # ended by its limits, or by a pickle nested so deeply that the interpreter fails
        raise CheckpointError(f"{path} is damaged or unsafe: reading its pickle needs more than a checkpoint does")
    structure: dict[str, Any] = json.loads(done.stdout)
    if "refused" in structure:
        raise CheckpointError(f"{path} is no PyTorch checkpoint, or is damaged or unsafe: {structure['refused']}")
    return structure


class _Tensors:
    """Build the content of a checkpoint from its structure.

    Args:
        path: the file.
        structure: as `unpickle.read_structure` returns it.
        zipped: whether the file is a zip archive.
    """

    def __init__(self, path: Path, structure: Mapping[str, Any], *, zipped: bool) -> None:
        self._path = path
        self._structure = structure
        self._zipped = zipped
        self._storages: dict[str, Tensor] = {}

    def content(self) -> Any:
        """Return the tree with real tensors.

        Raises:
            CheckpointError: a tensor does not lie inside the file, or a checksum is wrong.
        """
        if not self._zipped:
            with self._path.open("rb") as file:
                return self._made(self._structure["tree"], file)
        with _zip_errors(self._path), zipfile.ZipFile(self._path) as archive:
            return self._made(self._structure["tree"], archive)

    def _made(self, node: Any, source: Any, *, weights: bool = True) -> Any:
        """Return a node of the tree; of its tensors only the kind where they cannot be weights."""
        if not isinstance(node, dict):
            return node
        if "tensor" in node:
            return self._tensor(node["tensor"], source) if weights else OddTensor("of an optimizer")
        if "odd" in node or "other" in node:
            return OddTensor(node["odd"]) if "odd" in node else Placeholder(node["other"])
        if "dict" not in node:
            return [self._made(value, source, weights=weights) for value in node["list"]]
        items = {
            key: self._made(value, source, weights=weights and not _is_training_state(key, value))
            for key, value in node["dict"]
        }
        return items if "class" not in node else self._object(node, items, source, weights=weights)

    def _object(self, node: Mapping[str, Any], items: dict[Any, Any], source: Any, *, weights: bool) -> Any:
        """Return the state dict of a pickled module, or a placeholder for any other object."""
        state = self._made(node["state"], source, weights=weights)
        if isinstance(state, Mapping) and all(part in state for part in _MODULE_STATE):
            return _module_tensors(state)
        return Placeholder(node["class"], items | (dict(state) if isinstance(state, Mapping) else {}))

    def _tensor(self, place: Mapping[str, Any], source: Any) -> Tensor | OddTensor:
        dtype, stored = getattr(torch, place["dtype"], None), getattr(torch, place["stored"], None)
        if not isinstance(dtype, torch.dtype) or not isinstance(stored, torch.dtype):
            return OddTensor(f"of type {place['dtype']}")
        shape, stride, offset = place["shape"], place["stride"], place["offset"]
        storage = self._storage(place["storage"], place["elements"] * stored.itemsize, source).view(dtype)
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if math.prod(shape) and last >= storage.numel():
            raise CheckpointError(f"{self._path} is damaged: a tensor of shape {tuple(shape)[:8]} ends after its data")
        if math.prod(shape) > storage.numel():
            raise CheckpointError(f"{self._path}: a tensor claims {tuple(shape)[:8]}, more than the file stores for it")
        tensor = storage.as_strided(shape, stride, offset)
        return tensor.neg() if place["negative"] and dtype.is_floating_point else tensor

    def _storage(self, key: str, size: int, source: Any) -> Tensor:
        """Return the bytes of a storage as a tensor, read once."""
        if key not in self._storages:
            data = self._member(key, size, source) if self._zipped else self._piece(key, source)
            if len(data) < size:
                raise CheckpointError(f"{self._path} is damaged: the data of a tensor ends early")
            self._storages[key] = (
                torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            )
        return self._storages[key][:size]

    def _member(self, key: str, size: int, archive: zipfile.ZipFile) -> bytearray:
        try:
            info = archive.getinfo(self._structure["root"] + key)
        except KeyError:
            raise CheckpointError(f"{self._path} is damaged: the data of a tensor are missing") from None
        if info.file_size < size or (
            info.compress_type == zipfile.ZIP_STORED and info.file_size > self._path.stat().st_size
        ):
            raise CheckpointError(f"{self._path} is damaged: the data of a tensor ends early")
        data = bytearray(info.file_size)
        with archive.open(info) as member:
            view, read = memoryview(data), 0
            while count := member.readinto(view[read : read + (1 << 24)]):  # type: ignore[attr-defined]
                read += count
        if read < info.file_size:
            raise CheckpointError(f"{self._path} is damaged: the data of a tensor ends early")
        return data

    def _piece(self, key: str, file: Any) -> bytearray:
        place = self._structure["places"].get(key)
        if place is None:
            raise CheckpointError(f"{self._path} is damaged: the data of a tensor are missing")
        start, size = place
        data = bytearray(size)
        file.seek(start)
        if file.readinto(data) < size:
            raise CheckpointError(f"{self._path} is damaged: the data of a tensor ends early")
        return data


def _is_training_state(key: Any, node: Any) -> bool:
    """Return whether a node holds the state of an optimizer or the like; a tensor or a module of such a name does not.

    Args:
        key: the name of the node.
        node: of the tree of `unpickle`.
    """
    if not isinstance(key, str) or not _NEVER_WEIGHTS.search(key.lower()):
        return False
    if not isinstance(node, dict) or "tensor" in node:
        return False
    state = node.get("state")  # of an object
    names = [name for name, _ in state["dict"]] if isinstance(state, dict) and "dict" in state else []
    return not all(part in names for part in _MODULE_STATE)


def _module_tensors(state: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return the state dict of a pickled module: its parameters and buffers under their dotted names."""
    hidden = state.get("_non_persistent_buffers_set") or ()
    found: dict[str, Any] = {}
    for name, value in {**state["_parameters"], **state["_buffers"]}.items():
        if value is not None and name not in hidden:
            found[f"{prefix}{name}"] = value
    for name, child in state["_modules"].items():
        if isinstance(child, Mapping):  # of children that were made a state dict on the way
            found |= {f"{prefix}{name}.{key}": value for key, value in child.items()}
    return found
