"""Reading a weights file without trusting it.

Nothing in a file is executed: `.safetensors` holds tensors only, and pickles are read with `weights_only=True`, always.
PyTorch's reader does not check the archive's checksums, sizes or duplicates, so that is done before it runs.
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors
import safetensors.torch
import torch

from repmlp_deploy.bundle import hash_file
from repmlp_deploy.errors import CheckpointError

__all__ = ["SUFFIXES", "Checkpoint", "read_checkpoint"]

SUFFIXES = (".pth", ".pt", ".safetensors")

_MAX_RATIO = 20  # of unpacked to packed size; torch.save does not compress, and weights hardly can be


@dataclass(frozen=True)
class Checkpoint:
    """A weights file as it was read.

    Attributes:
        path: the file.
        sha256: of its bytes.
        content: what it holds: nested dictionaries and lists of tensors and plain values.
    """

    path: Path
    sha256: str
    content: Any


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The content of a `.pth`, `.pt` or `.safetensors` file.

    Raises:
        CheckpointError: it is not there, not a weights file, damaged, or would need code to be run.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give a {', '.join(SUFFIXES)} file")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        head = _head(path)
        _refuse_other_kinds(path, head)
        digest = hash_file(path)
        safe = path.suffix == ".safetensors" or head[8:9] == b"{"
        content = _read_safetensors(path) if safe else _read_pickle(path, zipped=head.startswith(b"PK"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    return Checkpoint(path, digest, content)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    """Name what people mistake for weights: an empty file, a web page, a pointer to a file that was not fetched."""
    text = head.lstrip().lower()
    if not head:
        raise CheckpointError(f"{path} is empty: download or save it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: fetch them with git lfs pull")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not weights: download the file itself")


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file, or is damaged: {error}") from None


def _read_pickle(path: Path, *, zipped: bool) -> Any:
    if zipped:
        _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        blocked = re.search(r"GLOBAL ([\w.]+) was not an allowed global", str(error))
        if blocked:
            raise CheckpointError(_blocked(path, blocked[1])) from None
        said = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is no PyTorch checkpoint, or is damaged or unsafe: {said[:200]}") from None
    except Exception as error:  # noqa: BLE001 - a damaged pickle makes the reader raise anything
        said = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{path} is no PyTorch checkpoint, or is damaged: {said[:200] or type(error).__name__}"
        ) from None


def _blocked(path: Path, name: str) -> str:
    safe = path.with_name(f"{path.stem}-weights.pth").name
    return (
        f"{path} holds a {name}, which only running code could load; if you trust the file, re-save its tensors: "
        f'python -c "import torch; c = torch.load({path.name!r}, map_location={"cpu"!r}, weights_only=False); '
        "torch.save({k: c[k] for k in ('model', 'state_dict', 'ema') if k in c}, "
        f'{safe!r})"'
    )


def _check_archive(path: Path) -> None:
    """Raise unless a zip archive is whole, of honest size and without duplicates."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len({member.filename for member in members}) != len(members):
                raise CheckpointError(f"{path} holds members of the same name: it was tampered with")
            size = sum(member.file_size for member in members)
            if size > _MAX_RATIO * path.stat().st_size:
                raise CheckpointError(f"{path} would unpack to {size} bytes, over {_MAX_RATIO} times its size: refused")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}; download or save it again") from None
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong; download or save it again")
