"""Ray on this machine, or on the cluster that RAY_ADDRESS names: how every command that uses Ray begins and ends.

Reports of use are off. A cluster of this machine alone is private to the command: its nodes have loopback addresses,
and who talks to it needs a random token, which no file holds. It ends with the command, whatever became of Ray.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Read when ray is imported. The second, whatever its name, gives the nodes of a new cluster loopback addresses.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if not os.environ.get("RAY_ADDRESS"):
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray

from repmlp_deploy.runtime.cpus import usable_cpus

__all__ = ["is_alive", "join_or_start", "kill_processes", "leave", "ray"]

_STORE_BYTES = 1 << 27  # for small things: neither images nor requests pass through Ray's store
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
_DAEMONS = ("raylet", "gcs_server")
_WAIT_SECONDS = 0.1
_LAST_SECONDS = 5.0
_ROUNDS = 5


def join_or_start(cpus: float = 0, *, adopt: bool = False) -> bool:
    """Join the cluster that RAY_ADDRESS names, or start one. Return whether this process started it.

    Args:
        cpus: that a new cluster must have in its books, whatever the machine has.
        adopt: become the parent of processes whose parents die, so that none of the cluster's is out of sight. For a
            process that does nothing else.
    """
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level="ERROR")
        return False
    if adopt and _has_processes():
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # otherwise Ray writes one to the home folder
    ray.init(
        num_cpus=max(usable_cpus(), math.ceil(cpus)),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=_STORE_BYTES,
        _node_ip_address="127.0.0.1",
    )
    return True


def is_alive() -> bool:
    """Return whether the daemons of a cluster of this process still run."""
    if not _has_processes():
        return True
    alive = {name for _, name, state in _descendants(os.getpid()) if state != "Z"}
    return alive.issuperset(_DAEMONS)


def leave(*, own: bool, first: Callable[[], None] = lambda: None, seconds: float = 10.0) -> bool:
    """Leave the cluster; end it if this process started it. Return whether that went as it should.

    Args:
        own: whether this process started it.
        first: what is to be done before.
        seconds: that this may take; then the cluster's processes are killed.
    """
    done = threading.Event()

    def end() -> None:
        with contextlib.suppress(Exception):  # the cluster may be gone
            first()
        with contextlib.suppress(Exception):
            ray.shutdown()
        done.set()

    threading.Thread(target=end, daemon=True).start()
    limit = time.monotonic() + seconds
    while not done.wait(_WAIT_SECONDS) and time.monotonic() < limit and (is_alive() or not own):
        pass
    finished = done.wait(_LAST_SECONDS)  # Ray's daemons end before `ray.shutdown` returns
    if own:
        kill_processes()
    return finished


def kill_processes() -> None:
    """Kill whatever the cluster of this process has left."""
    if not _has_processes():
        return
    for _ in range(_ROUNDS):  # what was killed may leave children to this process
        left = [pid for pid, _, state in _descendants(os.getpid()) if state != "Z" and _is_of_ray(pid)]
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not left:
            return
        time.sleep(_WAIT_SECONDS)


def _has_processes() -> bool:
    return sys.platform == "linux"


def _is_of_ray(pid: int) -> bool:
    """Return whether a process is one of Ray's: those have its name, or run a program of its package."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return command.startswith(b"ray::") or os.fsencode(Path(ray.__file__).parent) in command
    return False


def _descendants(root: int) -> Iterator[tuple[int, str, str]]:
    """Yield the number, the name and the state of every process below `root`."""
    children: dict[int, list[tuple[int, str, str]]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            before, _, after = path.read_text(encoding="utf-8", errors="replace").rpartition(") ")
            number, _, name = before.partition(" (")
            state, parent = after.split()[:2]
            children.setdefault(int(parent), []).append((int(number), name, state))
    below = [root]
    while below:
        for found in children.get(below.pop(), ()):
            yield found
            below.append(found[0])
