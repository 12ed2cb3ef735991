"""A model that is served: its bundle is opened, checked on this machine, and only then answers.

A bundle becomes a *version*: every file has its SHA-256, the probe has passed, memory is warm. A new version is made
beside the one that answers and takes its place in one step; the old one answers what it has begun with. A version that
fails leaves things as they are, and the reason is kept for the log, the metrics and the health answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from repmlp_deploy.bundle import Bundle, FileEntry, Manifest
from repmlp_deploy.bundle.manifest import MANIFEST
from repmlp_deploy.bundle.storage import hash_file
from repmlp_deploy.errors import BundleError, RepMLPError
from repmlp_deploy.runtime.batching import Execution, Queueing
from repmlp_deploy.runtime.choice import CHOICES
from repmlp_deploy.runtime.runner import RunnerOptions
from repmlp_deploy.runtime.served import Served
from repmlp_deploy.serving.metrics import ModelMetrics
from repmlp_deploy.serving.protocol import NotReady
from repmlp_deploy.text import printable

__all__ = ["Fingerprint", "ModelOptions", "ServedModel", "Version", "fingerprint_of", "version_name"]

State = Literal["loading", "ready", "unavailable", "unloaded"]

_TRUSTED = 10.0  # times what a check takes, for which it is believed
_DIGITS = 12  # of a version's name, which is a number since clients of Triton read it as one
_log = logging.getLogger("repmlp.serve")


@dataclass(frozen=True)
class ModelOptions:
    """How models are run.

    Attributes:
        artifact_format: which artifact; None for the best that runs here.
        runner: device, threads, cache.
        queue: samples that may wait.
        delay: seconds that a batch may wait for more requests while several come at a time.
        workers: batches that run at a time; 0 for as many as the runner's streams.
        target: seconds within which requests are to be answered where that is possible; see `Queueing`.
    """

    artifact_format: str | None = None
    runner: RunnerOptions = field(default_factory=RunnerOptions)
    queue: int = 1024
    delay: float = 0.0
    workers: int = 0
    target: float | None = None


@dataclass(frozen=True)
class _Noting(Bundle):
    """A bundle that notes which files were read, and so have their SHA-256."""

    hashed: set[str] = field(default_factory=set, compare=False, repr=False)

    def read(self, entry: FileEntry) -> bytes:
        data = super().read(entry)
        self.hashed.add(entry.path)
        return data

    def view(self, entry: FileEntry) -> memoryview:
        content = super().view(entry)
        self.hashed.add(entry.path)
        return content


class Version:
    """A bundle that has passed its check, and its queue.

    Attributes:
        name: the last decimal digits of the manifest's SHA-256: the same bundle has the same version everywhere.
        margin: how often the largest error of the check fits into what is allowed.
    """

    def __init__(self, name: str, served: Served) -> None:
        self.name, self.served, self.margin = name, served, served.margin
        self.batcher = served.batcher()

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.served.manifest

    def close(self) -> None:
        """Answer what was queued, then give back memory."""
        self.served.close()


class Fingerprint(NamedTuple):
    """What a bundle's folder looks like: inode, size and time of its files.

    Attributes:
        manifest: of the manifest; empty where there is none.
        others: names and figures of all other files.
    """

    manifest: tuple[int, ...]
    others: tuple[tuple[str, tuple[int, ...]], ...]


class ServedModel:
    """One name that answers, and the bundle behind it.

    Args:
        name: in the protocol.
        folder: of the bundle; read again by every `load`.
        options: how it is run.
        metrics: where it counts.
        changed: told whenever the state or the version changed.
    """

    def __init__(
        self, name: str, folder: Path, options: ModelOptions, metrics: ModelMetrics, changed: Callable[[], None]
    ) -> None:
        self.name, self.folder, self.options, self.metrics = name, folder, options, metrics
        self.state: State = "loading"
        self.reason = "it is being loaded"
        self.refused = ""
        self._changed = changed
        self._version: Version | None = None
        self._loading = threading.Lock()
        self._swapping = threading.Lock()  # of the version, the state and its reason
        self._checking = threading.Lock()
        self._trusted_until = -math.inf
        metrics.ready.set(0)
        metrics.waiting.set_function(self._waiting)

    @property
    def ready(self) -> bool:
        """Whether it answers."""
        return self.state == "ready"

    @property
    def unloaded(self) -> bool:
        """Whether it does not answer because it was asked not to."""
        return self.state == "unloaded"

    def version(self) -> Version:
        """Return what answers now.

        Raises:
            NotReady: nothing does; the message says why.
        """
        version = self._version
        if version is None or self.state != "ready":
            raise NotReady(f"{self.name} is not ready: {self.reason}")
        return version

    def load(self) -> bool:
        """Open the bundle, check it, and let it take the place of the present one. Return whether it answers.

        A bundle that fails is refused: the present version serves on.
        """
        with self._loading:
            start = time.monotonic()
            try:
                fresh = self._opened()
            except Exception as error:  # noqa: BLE001 - a bundle may be damaged in any way, and the server must live
                self._refuse(error)
                return False
            stale = self._swap(fresh, "ready", "")
            self.metrics.margin.set(fresh.margin or 0)
            self.metrics.loads["ok"].inc()
            seconds = round(time.monotonic() - start, 3)
            _log.info("model ready", extra={"model": self.name, "seconds": seconds} | self._described(fresh))
            self._changed()
        if stale is not None:
            stale.close()
        return True

    def unload(self, reason: str = "it was unloaded") -> None:
        """Answer no more; what was begun is finished."""
        with self._loading:
            stale = self._swap(None, "unloaded", reason)
            _log.info("model unloaded", extra={"model": self.name})
            self._changed()
        if stale is not None:
            stale.close()

    def fingerprint(self) -> Fingerprint:
        """Return what changes when another bundle takes the folder's place, or a file in it changes."""
        return fingerprint_of(self.folder)

    def _described(self, version: Version) -> dict[str, object]:
        """Return what the log says of a version that answers."""
        runner = version.served.runner
        said: dict[str, object] = {
            "version": version.name,
            "artifact": f"{runner.format} on {runner.device}",
            "margin": version.margin,
        }
        if self.options.target is not None:
            said["target_ms"] = 1000 * self.options.target
        said |= {key: runner.details[key] for key in CHOICES if key in runner.details}
        if version.manifest.warnings:
            said["warnings"] = list(version.manifest.warnings)
        return said

    def _refuse(self, error: Exception) -> None:
        """Keep the reason why a bundle was not taken."""
        reason = _reason(error)
        self.metrics.loads["refused"].inc()
        _log.error("bundle refused", extra={"model": self.name, "folder": str(self.folder), "reason": reason})
        with self._swapping:
            self.refused = reason
            if self._version is None:
                self.state, self.reason = "unavailable", reason
        self._changed()

    def _opened(self) -> Version:
        """Return the bundle in the folder as a version that has passed its check."""
        name = version_name(self.folder)
        bundle = _Noting(Bundle.load(self.folder).manifest, self.folder)
        options = self.options
        queueing = Queueing(options.queue, options.delay, options.workers, self._observe, options.target)
        served = Served(bundle, options.artifact_format, options.runner, queueing)
        try:
            served.check()
            _require_unchanged(bundle)
            if served.runner.device != "cpu":  # there the check has run every size that needs memory of its own
                served.warm_up()
            _require_version(self.folder, name)
        except BaseException:
            served.close()
            raise
        return Version(name, served)

    def _observe(self, execution: Execution) -> None:
        self.metrics.observe(execution)
        if execution.error is not None:
            _log.error("execution failed", extra={"model": self.name, "reason": _reason(execution.error)})
            self._check_again()

    def _swap(self, version: Version | None, state: State, reason: str) -> Version | None:
        """Let a version, or none, take the place of the present one, which is returned."""
        with self._swapping:
            stale, self._version = self._version, version
            self.state, self.reason, self.refused = state, reason, ""
            self._trusted_until = -math.inf
            self.metrics.ready.set(state == "ready")
        return stale

    def _waiting(self) -> int:
        version = self._version
        return 0 if version is None else version.batcher.waiting

    def _check_again(self) -> None:
        """Run the probe after a failed execution: a runtime that is broken must not stay ready.

        Requests may fail one after the other while the runtime is sound. So a check that passed is believed for as long
        as ten checks take.
        """
        version, start = self._version, time.monotonic()
        if version is None or not self.ready or start < self._trusted_until:
            return
        if not self._checking.acquire(blocking=False):
            return
        try:
            version.served.check()
            self._trust(version, time.monotonic() - start)
        except Exception as error:  # noqa: BLE001 - whatever it is, the model does not compute what it should
            self._fail(version, _reason(error))
        finally:
            self._checking.release()

    def _trust(self, version: Version, seconds: float) -> None:
        """Believe a check that passed, unless another version has taken the place of this one."""
        with self._swapping:
            if self._version is version:
                self._trusted_until = time.monotonic() + _TRUSTED * seconds

    def _fail(self, version: Version, reason: str) -> None:
        """Answer no more, unless another version has taken the place of this one."""
        with self._swapping:
            if self._version is not version:
                return
            self.state, self.reason = "unavailable", reason
            self.metrics.ready.set(0)
        _log.error("self-check failed", extra={"model": self.name, "reason": reason})
        self._changed()


def fingerprint_of(folder: Path) -> Fingerprint:
    """Return what a folder looks like now, without reading its files."""
    found: dict[str, tuple[int, ...]] = {}
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):  # a link that leads nowhere, or a file that is gone again
                seen = path.stat()
                found[path.name] = (seen.st_ino, seen.st_size, seen.st_mtime_ns)
    return Fingerprint(found.pop(MANIFEST, ()), tuple(sorted(found.items())))


def version_name(folder: Path) -> str:
    """Return the name of the version in a folder; empty where there is no bundle."""
    with contextlib.suppress(OSError):
        digest = hashlib.sha256((folder / MANIFEST).read_bytes()).digest()
        return str(int.from_bytes(digest) % 10**_DIGITS)
    return ""


def _require_version(folder: Path, name: str) -> None:
    """Raise BundleError if another bundle took the folder's place."""
    if version_name(folder) != name:
        raise BundleError(f"{folder} was replaced while it was loaded; load it again")


def _require_unchanged(bundle: _Noting) -> None:
    """Raise BundleError unless every file has its SHA-256, also those that were not read."""
    assert bundle.folder is not None  # it was loaded  # noqa: S101
    for entry in bundle.files():
        path = bundle.folder / entry.path
        if entry.path not in bundle.hashed and hash_file(path) != entry.sha256:
            raise BundleError(f"{path} was changed: its sha256 is not the manifest's; export again")


def _reason(error: BaseException) -> str:
    """Return one line for health answers and logs."""
    said = str(error) if isinstance(error, RepMLPError) else f"{type(error).__name__}: {error}"
    return printable(said)
