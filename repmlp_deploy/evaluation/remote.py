"""Files outside this machine's own file systems: what a URI names, through the file systems of pyarrow.

`s3://bucket/photos`, `gs://…`, `abfs://…`, `hdfs://…`, `file:///…`; with fsspec, also `fsspec+memory://…` and whatever
else it knows. Credentials are those that the file system finds in its usual places.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.fs

from repmlp_deploy.errors import ImageError, InputError
from repmlp_deploy.reading import files_below, is_hidden, tried
from repmlp_deploy.text import first_line

__all__ = ["RemoteFile", "RemoteStore", "is_uri"]

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(/?)")


def is_uri(data: str | PurePath) -> bool:
    """Return whether this names something by its file system, as `s3://bucket/photos` does.

    A path has one slash where the URI has two.
    """
    found = _URI.match(str(data))
    return found is not None and (isinstance(data, PurePath) or found[1] == "/")


@dataclass(frozen=True)
class RemoteFile:
    """A file that is read when its turn comes.

    Attributes:
        filesystem: of pyarrow.
        path: in it.
        most_bytes: that are read.
    """

    filesystem: Any
    path: str
    most_bytes: int

    def read(self) -> bytes:
        """Return the file's content.

        Raises:
            ImageError: there is no such file, or it is too large.
            InputError: the file system fails, several times: no fault of the image, so the run ends and can go on.
        """
        try:
            return tried(self._content, self.path, pa.ArrowException)
        except FileNotFoundError:
            raise ImageError(f"{self.path}: no such file") from None

    def _content(self) -> bytes:
        with self.filesystem.open_input_file(self.path) as file:
            size = file.size()
            if size > self.most_bytes:
                raise ImageError(f"{self.path} has {size:,} bytes; expected at most {self.most_bytes:,}")
            return bytes(file.read())


@dataclass(frozen=True)
class RemoteStore:
    """A file system; can be sent to another process.

    Attributes:
        filesystem: of pyarrow.
        prefix: of the URIs in it.
    """

    filesystem: Any
    prefix: str

    @classmethod
    def of(cls, uri: str) -> tuple[RemoteStore, str]:
        """Return the file system of a URI, and the path in it.

        Raises:
            InputError: there is no such file system, or nothing of that name in it.
        """
        try:
            filesystem, path = pa.fs.FileSystem.from_uri(uri)
            found = filesystem.get_file_info(path).type
        except (pa.ArrowException, OSError, ValueError, ImportError) as error:
            raise InputError(f"--data {uri} cannot be opened: {first_line(error)}") from None
        if found == pa.fs.FileType.NotFound:
            raise InputError(f"--data {uri}: no such file or folder")
        path, uri = path.rstrip("/"), uri.rstrip("/")
        scheme = f"{uri.partition('://')[0]}://"
        return cls(filesystem, uri.removesuffix(path) if uri.endswith(path) else scheme), path

    def images(self, path: str, suffixes: tuple[str, ...]) -> tuple[list[str], str] | None:
        """Return the names of the image files below a folder, sorted, and a hash of what is known of them.

        Hidden files and folders are left out. None for a file.
        """
        if self.filesystem.get_file_info(path).type != pa.fs.FileType.Directory:
            return None
        below: Any = pa.fs.FileSelector(path, recursive=True)
        if isinstance(self.filesystem, pa.fs.LocalFileSystem):  # which follows links round and round
            below = [str(file) for file in files_below(Path(path))]
        files = [one for one in self.filesystem.get_file_info(below) if one.type == pa.fs.FileType.File]
        inside = [(posixpath.relpath(one.path, path), one) for one in files if one.path.lower().endswith(suffixes)]
        wanted = sorted((pair for pair in inside if not is_hidden(pair[0])), key=lambda pair: pair[0].split("/"))
        return [name for name, _ in wanted], _hash(one for _, one in wanted)

    def fingerprint(self, path: str, *about: str) -> str:
        """Return a hash of a file's name, length and time."""
        return _hash([self.filesystem.get_file_info(path)], *about)

    def stream(self, path: str) -> BinaryIO:
        """Return a file that is read from front to back."""
        opened: BinaryIO = self.filesystem.open_input_stream(path, compression=None)
        return opened

    def text(self, path: str, most_bytes: int) -> str:
        """Return the text of a file, without a byte order mark.

        Raises:
            ValueError: it is larger than `most_bytes`, or is no UTF-8.
        """
        with self.filesystem.open_input_file(path) as file:
            if file.size() > most_bytes:
                raise ValueError(f"it is larger than {most_bytes:,} bytes")
            return bytes(file.read()).decode("utf-8-sig")

    def file(self, root: str, name: str, most_bytes: int) -> RemoteFile | ImageError:
        """Return a file of this file system; what somebody wrote into a list opens no other one.

        Args:
            root: a folder.
            name: relative to it, or a URI.
            most_bytes: that may be read.
        """
        if not is_uri(name):
            return RemoteFile(self.filesystem, name if name.startswith("/") else f"{root}/{name}", most_bytes)
        if not name.startswith(self.prefix):
            return ImageError(f"{name} is in another file system; expected {self.prefix}…")
        return RemoteFile(self.filesystem, name.removeprefix(self.prefix), most_bytes)


def _hash(files: Iterable[Any], *about: str) -> str:
    digest = hashlib.sha256("|".join(about).encode())
    for one in files:
        digest.update(f"{one.path}|{one.size}|{one.mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
