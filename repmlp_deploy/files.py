"""Write files so that a reader sees the old content or the new one, lock them between processes, and place caches.

This is the only module that renames or locks files. Caches lie in the folder that the environment variable
`REPMLP_CACHE` names, otherwise in `repmlp-deploy` in the user's cache folder.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import sys
import tomllib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "cache_folder",
    "can_be_replaced",
    "flush",
    "is_part",
    "locked",
    "move_into",
    "put_file",
    "read_json",
    "read_text",
    "read_toml",
    "remove_abandoned",
    "replace_file",
    "take_place",
    "write_named",
    "write_new",
]

_PART = re.compile(r"\..+\.(\d+)-[0-9a-f]{8}\.part")


_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
"""What a rename says when another writer was there first."""

_DEEP_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){64}""")
"""A TOML key of so many parts: the parser's time grows with the square of their number."""


def cache_folder(*parts: str) -> Path:
    """Return the folder for what can be made again; it may not exist yet.

    Args:
        parts: folders inside it.
    """
    named = os.environ.get("REPMLP_CACHE")
    if named:
        return Path(named, *parts)
    if sys.platform == "win32":
        user = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user, "repmlp-deploy", *parts)


def read_text(path: Path, most_bytes: int) -> str:
    """Return the text of a small file that somebody else may have written, without a byte order mark.

    Raises:
        OSError: it cannot be read.
        ValueError: it is missing, no regular file, larger than `most_bytes`, or no UTF-8; the message says which.
    """
    if not path.is_file():
        raise ValueError("it is not a regular file" if path.exists() else "no such file")
    with path.open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes:,} bytes")
    try:
        return data.decode("utf-8-sig")  # editors on Windows begin a file with the mark
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_json(path: Path, most_bytes: int) -> Any:
    """Return the content of a JSON file that somebody else may have written.

    Raises:
        OSError: it cannot be read.
        ValueError: see `read_text`; or it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(read_text(path, most_bytes))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_toml(path: Path, most_bytes: int) -> dict[str, Any]:
    """Return the content of a TOML file that somebody else may have written.

    Raises:
        OSError: it cannot be read.
        ValueError: see `read_text`; or it is no TOML, or nested too deeply.
    """
    text = read_text(path, most_bytes)
    try:
        if _DEEP_KEY.search(text) is None:
            return tomllib.loads(text)
    except RecursionError:
        pass
    raise ValueError("it is nested too deeply")


def replace_file(path: Path, *pieces: bytes, durable: bool = False) -> None:
    """Write a file so that a reader sees the old content or all of the new one.

    Args:
        path: the file.
        pieces: its content, in parts so that they need not be joined in memory.
        durable: wait until the content is on the disk.

    Raises:
        OSError: it cannot be written; the old content is untouched.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    try:
        with partial.open("xb") as file:
            file.writelines(pieces)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_named(path: Path, content: bytes) -> None:
    """Write a file that a user named: a device or a pipe, such as /dev/stdout, gets the content, and a link stays one.

    Raises:
        OSError: it cannot be written; the old content of a file is untouched.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
    else:
        replace_file(Path(os.path.realpath(path)), content)


def put_file(written: Path, target: Path) -> None:
    """Give a finished file its name, on the same disk; a reader sees what was there before, or all of it.

    Raises:
        OSError: it cannot be written.
    """
    flush(written)
    written.replace(target)


_LOST = 100  # times in a row that a folder may be gone when it was just made


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock `path`.lock beside `path`, in a folder that is made; a process that dies releases it.

    Whoever holds it may remove it with its folder.

    Raises:
        OSError: it cannot be made.
    """
    lock = path.with_name(f"{path.name}.lock")
    held, lost = False, 0
    while not held:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = lock.open("a+b")
        except FileNotFoundError:  # the last holder removed the folder just now
            lost += 1
            if lost == _LOST:
                raise
            continue
        with file:
            _wait_for(file)
            held = _is_there(file, lock)
            if held:
                yield


def _wait_for(file: BinaryIO) -> None:
    if sys.platform == "win32":
        import msvcrt  # noqa: PLC0415 - Windows alone has it

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
    else:
        import fcntl  # noqa: PLC0415 - Windows has none

        fcntl.flock(file, fcntl.LOCK_EX)


def _is_there(file: BinaryIO, path: Path) -> bool:
    """Return whether an open file is still the one of this name: its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def write_new(path: Path, content: bytes) -> None:
    """Write a file that does not exist yet."""
    with path.open("xb") as file:
        file.write(content)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if sys.platform == "win32" and path.is_dir():  # there, folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_place(partial: Path, target: Path) -> None:
    """Put the folder `partial` where `target` is; afterwards `partial` is gone or holds what was there."""
    if not target.is_dir() or not any(target.iterdir()):
        try:
            if target.is_dir():
                target.rmdir()
            partial.rename(target)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        else:
            return
    if not _exchange(partial, target):
        # No atomic exchange on this system: for an instant the old bundle has another name.
        aside = target.parent / f"{partial.name}-old"
        target.rename(aside)
        try:
            partial.rename(target)
        except OSError:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def can_be_replaced(folder: Path) -> bool:
    """Return whether `take_place` can work on `folder`: it is no mount point, and its parent can be written to."""
    return not os.path.ismount(folder) and os.access(folder.parent, os.W_OK | os.X_OK)


def move_into(partial: Path, target: Path, last: str) -> None:
    """Move the files of `partial` into the folder `target`, such as a mounted volume, which cannot be exchanged.

    All content is in `target`, under hidden names, before the first name changes; what remains is one rename per file.
    A writer that is killed between them leaves files that the manifest does not describe, which a reader notices.

    Args:
        partial: a folder with nothing but files; afterwards empty.
        target: an existing folder. Its other files are removed at last.
        last: the file that takes its name after all others.

    Raises:
        OSError: it cannot be written. Where that happens before the first rename, `target` is unchanged.
    """
    _remove_parts(target)
    old = {path.name for path in target.iterdir() if path.is_file()}
    names = sorted((path.name for path in partial.iterdir()), key=lambda name: name == last)
    parts = {name: target / f".{name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part" for name in names}
    try:
        for name, part in parts.items():
            shutil.copyfile(partial / name, part)
            flush(part)
        for name, part in parts.items():
            part.replace(target / name)
        for name in old - {*names}:
            (target / name).unlink()
        flush(target)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    for name in names:
        (partial / name).unlink()


def is_part(name: str) -> bool:
    """Return whether a file of this name is what a writer left that was killed."""
    return _PART.fullmatch(name) is not None


def _remove_parts(folder: Path) -> None:
    for path in folder.iterdir():
        match = _PART.fullmatch(path.name)
        if match and not _alive(int(match[1])):
            path.unlink(missing_ok=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    swap, here = 2, -100  # RENAME_EXCHANGE, AT_FDCWD
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    return bool(libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), swap) == 0)


def remove_abandoned(target: Path) -> None:
    """Remove siblings that killed writers of `target` left."""
    name = re.compile(rf"\.{re.escape(target.name)}\.partial-(\d+)-[0-9a-f]{{8}}")
    for path in target.parent.iterdir():
        match = name.fullmatch(path.name)
        if match and not _alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    if sys.platform == "win32":  # there, signal 0 is a real one
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
