"""Unlabelled images, one after the other: what `repmlp-map` reads, in an order that is always the same.

A folder        its image files and those of the folders inside it
A glob          the image files that match, such as `photos/**/*.jpg`
A text file     one path per line, relative to the file's folder
A tar archive   its image files, as WebDataset writes them; read from front to back, never unpacked
Parquet, Arrow  a column of encoded images, of paths relative to the file's folder, or of both (`{bytes, path}`)
"""

from __future__ import annotations

import glob
import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from repmlp_deploy.errors import ImageError, InputError
from repmlp_deploy.evaluation.tables import TABLE_SUFFIXES, count_rows, find_column, read_column
from repmlp_deploy.files import read_text
from repmlp_deploy.runtime.images import IMAGE_SUFFIXES, find_images

__all__ = ["Item", "Source", "open_source"]

_LARGEST_LIST_BYTES = 1 << 30
_LARGEST_IMAGE_BYTES = 1 << 28
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        key: its name in the source.
        content: its file, the bytes of one, or why there is none.
    """

    key: str
    content: Path | bytes | ImageError


@dataclass(frozen=True)
class Source:
    """Images in their order.

    Attributes:
        count: how many there are.
        fingerprint: hash of the files' names, lengths and times; it differs where the images may differ.
        items: (first) -> the images from the one with this number on.
    """

    count: int
    fingerprint: str
    items: Callable[[int], Iterator[Item]]


def open_source(data: str, column: str | None = None) -> Source:
    """Return the images of a folder, a glob, or a file of one of the kinds above.

    Args:
        data: the path or the glob.
        column: of a table; by default `image`, `bytes` or `path`, whichever comes first.

    Raises:
        InputError: there is nothing of that name, or it holds no images.
    """
    path = Path(data)
    if not path.exists() and not glob.has_magic(data):
        raise InputError(f"--data {data}: no such file or folder")
    try:
        if not path.exists():
            found = sorted(Path(name) for name in glob.glob(data, recursive=True))  # noqa: PTH207 - may be absolute
            files = [file for file in found if file.suffix.lower() in IMAGE_SUFFIXES]
            source = _of_files([str(file) for file in files], files)
        elif path.is_dir():
            files = find_images(path)
            source = _of_files([file.relative_to(path).as_posix() for file in files], files)
        elif path.name.lower().endswith(_TAR_SUFFIXES):
            source = _of_tar(path)
        elif path.suffix.lower() in TABLE_SUFFIXES:
            source = _of_table(path, column)
        else:
            lines = [line for line in read_text(path, _LARGEST_LIST_BYTES).splitlines() if line.strip()]
            source = _of_files(lines, [path.parent / line for line in lines])
    except InputError:
        raise
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
        raise InputError(f"--data {data} cannot be read: {error}") from None
    if not source.count:
        raise InputError(f"--data {data} holds no images; expected {', '.join(IMAGE_SUFFIXES)} files")
    return source


def _of_files(keys: list[str], files: list[Path]) -> Source:
    def items(first: int) -> Iterator[Item]:
        for i in range(first, len(files)):
            yield Item(keys[i], files[i])

    return Source(len(files), _fingerprint(files), items)


def _of_tar(path: Path) -> Source:
    def members() -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        with tarfile.open(path) as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined] # tarfile remembers every member otherwise
                if member.isfile() and member.name.lower().endswith(IMAGE_SUFFIXES):
                    yield archive, member

    def items(first: int) -> Iterator[Item]:
        try:
            for i, (archive, member) in enumerate(members()):
                if i >= first:
                    yield Item(member.name, _extracted(archive, member))
        except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
            raise InputError(f"--data {path} cannot be read: {error}") from None

    return Source(sum(1 for _ in members()), _fingerprint([path]), items)


def _extracted(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | ImageError:
    if member.size > _LARGEST_IMAGE_BYTES:
        return ImageError(f"{member.name} has {member.size:,} bytes; expected at most {_LARGEST_IMAGE_BYTES:,}")
    file = archive.extractfile(member)
    data = file.read() if file is not None else b""
    return data if len(data) == member.size else ImageError(f"{member.name} is truncated")


def _of_table(path: Path, column: str | None) -> Source:
    name = find_column(path, column)

    def items(first: int) -> Iterator[Item]:
        for i, value in enumerate(read_column(path, name, first), first):
            key = value if isinstance(value, str) else str(i)
            if isinstance(value, dict):
                encoded, key = value.get("bytes"), value.get("path") or key
                value = value.get("path") if encoded is None else encoded  # noqa: PLW2901
            if value is None:
                yield Item(key, ImageError(f"row {i} holds no image"))
            else:
                yield Item(key, value if isinstance(value, bytes) else path.parent / value)

    return Source(count_rows(path), _fingerprint([path], name), items)


def _fingerprint(files: list[Path], *about: str) -> str:
    digest = hashlib.sha256("|".join(about).encode())
    for file in files:
        try:
            state = file.stat()
            said = f"{file.resolve()}|{state.st_size}|{state.st_mtime_ns}\n"
        except (OSError, ValueError):
            said = f"{file}|missing\n"
        digest.update(said.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
