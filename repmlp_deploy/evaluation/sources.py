"""Unlabelled images, one after the other: what `repmlp-map` reads, in an order that is always the same.

A folder        its image files and those of the folders inside it
A glob          the image files that match, such as `photos/**/*.jpg`
A text file     one path per line, relative to the file's folder
A tar archive   its image files, as WebDataset writes them; read from front to back, never unpacked
Parquet, Arrow  a column of encoded images, of paths relative to the file's folder, or of both (`{bytes, path}`)
A URI           a folder or a file of one of these kinds in an object store or another file system: see `remote`
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from repmlp_deploy.errors import ImageError, InputError
from repmlp_deploy.evaluation.remote import RemoteFile, RemoteStore, is_uri
from repmlp_deploy.evaluation.tables import TABLE_SUFFIXES, count_rows, find_column, read_column
from repmlp_deploy.files import read_text
from repmlp_deploy.reading import is_hidden, state_of
from repmlp_deploy.runtime.images import IMAGE_SUFFIXES, find_images

__all__ = ["Item", "Source", "open_source"]

_LARGEST_LIST_BYTES = 1 << 30
_LARGEST_IMAGE_BYTES = 1 << 28
_REMOTE_READERS = 16  # reads under way at a time: each waits for an answer
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        key: its name in the source.
        content: its file, the bytes of one, or why there is none.
    """

    key: str
    content: Path | bytes | RemoteFile | ImageError

    def encoded(self) -> Path | bytes:
        """Return the image's file, or the bytes of one.

        Raises:
            ImageError: there is none.
            InputError: it lies elsewhere, and cannot be read now.
        """
        if isinstance(self.content, ImageError):
            raise self.content
        return self.content.read() if isinstance(self.content, RemoteFile) else self.content


@dataclass(frozen=True)
class Source:
    """Images in their order; can be sent to another process.

    Attributes:
        count: how many there are.
        fingerprint: hash of the files' names, lengths and times; it differs where the images may differ.
        items: (first) -> the images from the one with this number on.
        readers: threads that read images, at least.
        is_table: whether they are the rows of a table.
    """

    count: int
    fingerprint: str
    items: Callable[[int], Iterator[Item]]
    readers: int = 1
    is_table: bool = False


def open_source(data: str, column: str | None = None) -> Source:
    """Return the images of a folder, a glob, a file of one of the kinds above, or of a URI.

    Args:
        data: the path, the glob or the URI.
        column: of a table; by default `image`, `bytes` or `path`, whichever comes first.

    Raises:
        InputError: there is nothing of that name, it holds no images, or a column of no table is named.
    """
    try:
        source = _of_uri(data, column) if is_uri(data) else _of_path(data, column)
    except InputError:
        raise
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
        raise InputError(f"--data {data} cannot be read: {error}") from None
    if column is not None and not source.is_table:
        raise InputError(f"--column {column} names a column of a table; --data {data} is none: leave it out")
    if not source.count:
        raise InputError(f"--data {data} holds no images; expected {', '.join(IMAGE_SUFFIXES)} files")
    return source


def _of_path(data: str, column: str | None) -> Source:
    path = Path(data)
    there = state_of(path, f"--data {data}") is not None
    if not there and not glob.has_magic(data):
        raise InputError(f"--data {data}: no such file or folder")
    if not there:
        _require_readable(data)
        found = sorted(glob.glob(data, recursive=True))  # noqa: PTH207 - may be absolute
        return _of_files(Path(), [name for name in found if name.lower().endswith(IMAGE_SUFFIXES)])
    if path.is_dir():
        return _of_files(path, [file.relative_to(path).as_posix() for file in find_images(path)])
    name = path.name.lower()
    if name.endswith(_TAR_SUFFIXES):
        return _of_tar(data, partial(_open, path), _fingerprint([path]), stream=False)
    if name.endswith(TABLE_SUFFIXES):
        used = find_column(data, column)
        items = partial(_table_items, data, used, None)
        return Source(count_rows(data), _fingerprint([path], used), items, is_table=True)
    if name.endswith(IMAGE_SUFFIXES):
        raise InputError(f"--data {data} is one image; give a folder, a glob or a list, or use repmlp-predict")
    return _of_files(path.parent, _lines(read_text(path, _LARGEST_LIST_BYTES)))


def _require_readable(pattern: str) -> None:
    """Raise OSError if a folder in which a glob looks cannot be read: `glob` passes over it."""
    parts = pattern.replace(os.sep, "/").split("/")
    for i, part in enumerate(parts):
        if glob.has_magic(part):
            inside = "/".join([*parts[: i + (part == "**")], ""])
            for folder in glob.iglob(inside, recursive=True):  # noqa: PTH207 - may be absolute
                if not is_hidden(Path(folder).name):
                    os.scandir(folder).close()


def _of_files(root: Path, keys: list[str]) -> Source:
    return Source(len(keys), _fingerprint(root / key for key in keys), partial(_file_items, root, keys))


def _file_items(root: Path, keys: list[str], first: int) -> Iterator[Item]:
    for i in range(first, len(keys)):
        yield Item(keys[i], root / keys[i])


def _of_uri(data: str, column: str | None) -> Source:
    store, path = RemoteStore.of(data)
    name, readers = path.lower(), _REMOTE_READERS
    listed = store.images(path, IMAGE_SUFFIXES)
    if listed is not None:  # a folder
        keys, about = listed
        return Source(len(keys), about, partial(_remote_items, store, path, keys), readers)
    if name.endswith(_TAR_SUFFIXES):
        return _of_tar(data, partial(store.stream, path), store.fingerprint(path), stream=True)
    if name.endswith(TABLE_SUFFIXES):
        used = find_column(path, column, store.filesystem)
        count, items = count_rows(path, store.filesystem), partial(_table_items, path, used, store)
        return Source(count, store.fingerprint(path, used), items, readers, is_table=True)
    keys = _lines(store.text(path, _LARGEST_LIST_BYTES))
    # the objects that a list names are not asked for their times: that would be a request for each
    about = store.fingerprint(path)
    return Source(len(keys), about, partial(_remote_items, store, path.rpartition("/")[0], keys), readers)


def _remote_items(store: RemoteStore, root: str, keys: list[str], first: int) -> Iterator[Item]:
    for i in range(first, len(keys)):
        yield Item(keys[i], store.file(root, keys[i], _LARGEST_IMAGE_BYTES))


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


def _members(opened: Callable[[], BinaryIO], *, stream: bool) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the archive and its members, one after the other."""
    with opened() as file, tarfile.open(fileobj=file, mode="r|*" if stream else "r:*") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined] # tarfile remembers every member otherwise
            yield archive, member


def _is_image(member: tarfile.TarInfo) -> bool:
    """Return whether a member has an image's name and may be one; macOS adds a hidden file to every one."""
    can_be = member.isfile() or member.islnk() or member.issym()
    return can_be and member.name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(member.name.rpartition("/")[2])


def _of_tar(data: str, opened: Callable[[], BinaryIO], fingerprint: str, *, stream: bool) -> Source:
    count, linked = 0, set()
    for _, member in _members(opened, stream=stream):
        if _is_image(member):
            count += 1
            if member.islnk():
                linked.add(member.linkname)
    items = partial(_tar_items, data, opened, stream=stream, linked=frozenset(linked))
    return Source(count, fingerprint, items, _REMOTE_READERS if stream else 1)


def _tar_items(
    data: str, opened: Callable[[], BinaryIO], first: int, *, stream: bool, linked: frozenset[str]
) -> Iterator[Item]:
    """Yield the images of an archive; `linked` names the members that hard links share their content with."""
    number, contents = 0, dict[str, tarfile.TarInfo]()
    try:
        for archive, member in _members(opened, stream=stream):
            if member.isfile() and member.name in linked and _goes_back(archive):
                contents[member.name] = member
            if not _is_image(member):
                continue
            if number >= first:
                yield Item(member.name, _extracted(archive, member, contents))
            number += 1
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise InputError(f"--data {data} cannot be read: {error}") from None


def _goes_back(archive: tarfile.TarFile) -> bool:
    """Return whether an earlier member can be read at once: a compressed archive is read again from its beginning."""
    return isinstance(archive.fileobj, io.BufferedReader)


def _extracted(
    archive: tarfile.TarFile, member: tarfile.TarInfo, contents: Mapping[str, tarfile.TarInfo]
) -> bytes | ImageError:
    if not member.isfile():
        if not member.islnk() or member.linkname not in contents:
            how = "--hard-dereference" if member.islnk() else "--dereference"
            return ImageError(f"{member.name} is a link to {member.linkname} in the archive: pack it with tar {how}")
        member = contents[member.linkname]
    if member.size > _LARGEST_IMAGE_BYTES:
        return ImageError(f"{member.name} has {member.size:,} bytes; expected at most {_LARGEST_IMAGE_BYTES:,}")
    file = archive.extractfile(member)
    data = file.read() if file is not None else b""
    return data if len(data) == member.size else ImageError(f"{member.name} is truncated")


def _table_items(path: str, name: str, store: RemoteStore | None, first: int) -> Iterator[Item]:
    folder = path.rpartition("/")[0]
    for i, value in enumerate(read_column(path, name, first, store and store.filesystem), first):
        key = value if isinstance(value, str) else str(i)
        if isinstance(value, dict):
            encoded, key = value.get("bytes"), value.get("path") or key
            value = value.get("path") if encoded is None else encoded  # noqa: PLW2901
        if value is None:
            yield Item(key, ImageError(f"row {i} holds no image"))
        elif isinstance(value, bytes) or store is None:
            yield Item(key, value if isinstance(value, bytes) else Path(path).parent / value)
        else:
            yield Item(key, store.file(folder, value, _LARGEST_IMAGE_BYTES))


def _fingerprint(files: Iterable[Path], *about: str) -> str:
    digest = hashlib.sha256("|".join(about).encode())
    for file in files:
        try:
            state = file.stat()
            said = f"{file.resolve()}|{state.st_size}|{state.st_mtime_ns}\n"
        except (OSError, ValueError):
            said = f"{file}|missing\n"
        digest.update(said.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
