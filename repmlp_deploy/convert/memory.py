"""Memory of this process: how much it has held, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

__all__ = ["peak_bytes", "release_memory"]


def release_memory(*, cycles: bool = False) -> None:
    """Give freed memory back to the system, where the C library would keep it for later.

    Args:
        cycles: first look for what only refers to itself, as traced programs do, which takes a fraction of a second.
    """
    if cycles:
        gc.collect()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc
            libc.malloc_trim(0)


def peak_bytes() -> int | None:
    """Return the largest resident size of this process so far; None if the system does not say."""
    status = Path("/proc/self/status")
    if status.is_file():  # of this program alone: getrusage also counts what it was started from
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource  # noqa: PLC0415 - not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
