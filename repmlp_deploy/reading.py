"""Read what lies on the disks of others: folders with links, files on disks that fail, paths that lead nowhere.

Nothing that cannot be read is left out silently, and a fault of a disk is never one of a file's content.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from repmlp_deploy.errors import InputError
from repmlp_deploy.text import first_line

__all__ = ["DiskError", "files_below", "is_folder", "is_hidden", "opened", "require_file", "state_of", "tried"]

_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""What the system says of a name that no file has."""
_NO_NAME = (21, 123, 1921)
"""What Windows says of a name that no file can have, such as that of a glob."""
_OF_THE_SYSTEM = "lost+found"  # at the root of every ext4 disk; it is root's
_MOST_FOLDERS = 1 << 20  # on all paths: folders full of links to each other have more than anyone can wait for

_T = TypeVar("_T")
_TRIES = 4
_FIRST_WAIT_SECONDS = 0.2  # then twice as long every time


class DiskError(InputError):
    """A disk or a network failed every time: no fault of what lies there."""


def state_of(path: Path, called: object) -> os.stat_result | None:
    """Return what the system knows of a file or folder; None if there is none of that name.

    `Path.exists` and its like raise OSError for a name that is too long, or in a folder that this user may not search.

    Args:
        path: what a user named.
        called: what to call it in the error.

    Raises:
        InputError: this user may not know, or the disk fails.
    """
    try:
        return path.stat()
    except ValueError:  # a zero byte in the name
        return None
    except OSError as error:
        if _is_missing(error):
            return None
        raise InputError(f"{called} cannot be read: {error.strerror or error}") from None


def _is_missing(error: OSError) -> bool:
    return error.errno in _NO_FILE or getattr(error, "winerror", None) in _NO_NAME


def is_folder(path: Path, called: object) -> bool:
    """Return whether there is a folder of this name; see `state_of`."""
    state = state_of(path, called)
    return state is not None and stat.S_ISDIR(state.st_mode)


def require_file(path: Path, called: object) -> None:
    """Raise InputError unless there is a regular file of this name; see `state_of`."""
    state = state_of(path, called)
    if state is None:
        raise InputError(f"{called}: no such file")
    if not stat.S_ISREG(state.st_mode):
        raise InputError(f"{called} is not a regular file")


def is_hidden(path: str) -> bool:
    """Return whether a path inside a folder, with slashes, is hidden or in a hidden folder; so is `lost+found`."""
    return any(part == _OF_THE_SYSTEM or (part[:1] == "." and part not in {".", ".."}) for part in path.split("/"))


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and in the folders inside it, in no order; hidden files and folders are left out.

    Links to folders are followed, except one to a folder that it lies in. What is no folder is a file here, such as a
    dangling link.

    Raises:
        OSError: a folder cannot be read; nothing is left out silently.
        InputError: links lead to more folders than can be looked at.
    """
    looked = 0
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [(str(folder), ())]  # a folder, and those it lies in
    while waiting:
        place, above = waiting.pop()
        state = os.stat(place)  # noqa: PTH116 - a Path for every folder takes longer than reading it
        here = (state.st_dev, state.st_ino)
        if here in above:
            continue
        looked += 1
        if looked > _MOST_FOLDERS:
            raise InputError(f"{folder} has more than {_MOST_FOLDERS:,} folders, links followed; name a part of it")
        with os.scandir(place) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if _is_folder(entry):
                    waiting.append((entry.path, (*above, here)))
                else:
                    yield Path(entry.path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself dangles
            return False
        raise


def opened(path: Path, most_bytes: int) -> BinaryIO:
    """Return a file's content, read at once, so that a disk that fails is told from a damaged file.

    A file of more than `most_bytes` is opened, and read by whoever needs a part of it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no regular file.
        DiskError: the disk fails every time.
        InputError: this user may not read the file.
    """
    return tried(partial(_opened, path, most_bytes), path)


def _opened(path: Path, most_bytes: int) -> BinaryIO:
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # opening a pipe waits for a writer; a device may never end
            raise ValueError("it is a folder, a pipe or a device; give a file")
        return path.open("rb") if state.st_size > most_bytes else io.BytesIO(path.read_bytes())
    except OSError as error:
        if _is_missing(error):
            raise FileNotFoundError(*error.args) from None
        raise


def tried(read: Callable[[], _T], name: object, *failures: type[Exception]) -> _T:
    """Return what `read` returns. A disk or a network that fails is tried again a few times.

    Args:
        read: reads a file.
        name: of the file.
        failures: errors, besides OSError, that say so.

    Raises:
        FileNotFoundError: there is no such file, as `read` says.
        DiskError: it fails every time.
        InputError: this user may not read the file.
    """
    for turn in range(_TRIES):
        if turn:
            time.sleep(_FIRST_WAIT_SECONDS * 2 ** (turn - 1))
        try:
            return read()
        except FileNotFoundError:
            raise
        except PermissionError as error:
            raise InputError(f"{name} cannot be read: {error.strerror or first_line(error)}") from None
        except Exception as error:
            if not isinstance(error, (OSError, *failures)):
                raise
            failure = error
    raise DiskError(f"{name} could not be read {_TRIES} times: {first_line(failure)}; run again to go on")
