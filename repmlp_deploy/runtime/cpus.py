"""What the processor is, and how many CPUs this process may use.

Runtimes start one thread per core of the machine. In a container with a quota they then wait for each other: with one
of two CPUs allowed, an inference took 60 % longer than with a single thread. Three things limit a process, and
`os.cpu_count` sees none of them: its affinity, the quota of its control groups, and OMP_NUM_THREADS.

A quota of 1.5 CPUs counts as one: threads that wait spin, and what a second one spins away is missing to the first.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

__all__ = ["cpu_info", "cpu_instructions", "cpu_name", "cpu_quota", "thread_limit", "usable_cpus"]

_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8", "asimd", "sve")
_INFO = Path("/proc/cpuinfo")
_PROC = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")

_Reader = Callable[[Path], float | None]
"""A control group's folder to the CPUs that it allows; None for no limit."""


def usable_cpus() -> int:
    """Return how many CPUs this process may keep busy, at least 1."""
    limits, quota = [_affinity(), *_environment(os.environ)], cpu_quota()
    return min(limits if quota is None else [*limits, max(1, int(quota))])


def cpu_quota() -> float | None:
    """Return the CPUs that the control groups around this process allow, or None without a limit."""
    return min(_quotas(_PROC, _GROUPS), default=None)


def cpu_info() -> dict[str, str]:
    """Return the first processor's lines of /proc/cpuinfo, by name; none where the system has no such file."""
    try:
        first = _INFO.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def cpu_name() -> str:
    """Return what the processor calls itself, or its architecture."""
    return cpu_info().get("model name") or platform.processor() or platform.machine()


def cpu_instructions() -> list[str]:
    """Return the instruction sets that tell how fast the processor multiplies matrices."""
    info = cpu_info()
    flags = (info.get("flags") or info.get("Features", "")).split()
    return [name for name in _INSTRUCTIONS if name in flags]


def thread_limit() -> int | None:
    """Return the threads that an inference should have at most; None where the runtime's own choice is right."""
    usable = usable_cpus()
    return usable if usable < (os.cpu_count() or 1) else None


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _environment(environment: Mapping[str, str]) -> Iterator[int]:
    """Yield what OMP_NUM_THREADS says; of a list, one number per level of nesting, the first."""
    word = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if word.isascii() and word.isdecimal() and int(word[:9]) > 0:
        yield int(word[:9])


def _quotas(proc: Path, groups: Path) -> Iterator[float]:
    """Yield the CPUs that every control group around this process allows.

    Args:
        proc: the process's groups, lines of `number:controllers:path`.
        groups: where the control groups are mounted, of version 2 or of version 1 with a folder per controller.
    """
    try:
        lines = proc.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            for root in (groups, groups / "unified"):
                yield from _allowed(root, path, _version_2)
        elif "cpu" in controllers.split(","):
            for root in (groups / controllers, groups / "cpu"):
                yield from _allowed(root, path, _version_1)


def _allowed(root: Path, path: str, read: _Reader) -> Iterator[float]:
    """Yield the limits of a group and of those it lies in; in a container its path may lie outside what is mounted."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        quota = _read(root.joinpath(*parts[:depth]), read)
        if quota is not None:
            yield quota


def _read(group: Path, read: _Reader) -> float | None:
    try:
        return read(group)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _version_2(group: Path) -> float | None:
    quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
    return None if quota == "max" else int(quota) / int(period)


def _version_1(group: Path) -> float | None:
    quota = int((group / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
    return None if quota < 0 else quota / int((group / "cpu.cfs_period_us").read_text(encoding="utf-8"))
