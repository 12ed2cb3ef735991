"""Write files so that a reader sees the old content or the new one, lock them between processes, and place caches.

This is the only module that renames or locks files. Caches lie in the folder that the environment variable
`REPMLP_CACHE` names, otherwise in `repmlp-deploy` in the user's cache folder.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "cache_folder",
    "flush",
    "locked",
    "read_text",
    "remove_abandoned",
    "replace_file",
    "take_place",
    "write_new",
]


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
    """Return the text of a small file that somebody else may have written.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, is larger than `most_bytes`, or is no UTF-8; the message says which.
    """
    if not path.is_file():
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes:,} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: {error.reason} at byte {error.start}") from None


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


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock `path`.lock beside `path`; a process that dies releases it.

    Raises:
        OSError: it cannot be made.
    """
    with path.with_name(f"{path.name}.lock").open("a+b") as file:
        if sys.platform == "win32":
            import msvcrt  # noqa: PLC0415 - Windows alone has it

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl  # noqa: PLC0415 - Windows has none

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
    elif not _exchange(partial, target):
        # No atomic exchange on this system: for an instant the old bundle has another name.
        aside = target.parent / f"{partial.name}-old"
        target.rename(aside)
        try:
            partial.rename(target)
        except OSError:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


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
