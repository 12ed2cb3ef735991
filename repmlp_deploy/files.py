"""Write files so that a reader sees the old content or the new one, and lock files between processes."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["flush", "locked", "remove_abandoned", "take_place", "write_new"]


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
