"""`repmlp-serve --host-engine ray`: start Ray Serve, follow the bundles, and end all of it on a signal.

A changed bundle is a new application to Ray: a new replica starts beside the old ones, passes its check, takes their
place and they drain, one after another. If no new replica passes, the old ones serve on. Then what served before is
deployed again, since Ray replaces no replica of an update that failed.
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from repmlp_deploy.errors import DeviceError, InputError, optional_imports
from repmlp_deploy.serving.hosts.addresses import bound_socket, naming_address
from repmlp_deploy.serving.hosts.ray.loopback import CALLBACK, LOOPBACK
from repmlp_deploy.serving.hosts.ray.settings import APPLICATION, Scale, Served, Settings, proxy_options
from repmlp_deploy.serving.models import Models
from repmlp_deploy.serving.served_model import Fingerprint, ModelOptions, fingerprint_of, version_name
from repmlp_deploy.serving.watch import find_bundles
from repmlp_deploy.text import first_line, printable

with optional_imports():
    from repmlp_deploy.runtime.ray_cluster import is_alive, join_or_start, kill_processes, leave, ray
    from repmlp_deploy.serving.hosts.ray.replica import deployment

    serve = ray.serve

__all__ = ["Address", "Sources", "serve_on_ray"]

_LOOK_SECONDS = 0.2  # between two looks at Ray's status
_END_SECONDS = 15.0  # for Ray's own processes to end, after the requests
_SAME_SECONDS = 0.5
_STOPPED = 143  # what a shell says of a process that SIGTERM ended
_LOCAL = ("127.0.0.1", "localhost", "::1")
_REFUSED = re.compile(r"\w+Error: (.*? was refused: .*)")
_log = logging.getLogger("repmlp.serve.ray")


@dataclass(frozen=True)
class Address:
    """Where Ray's proxies listen.

    Attributes:
        host: address to listen on; on a cluster of several machines that of every one of them, such as 0.0.0.0.
        port: of HTTP; 0 for any free one.
        grpc_port: of gRPC; 0 for any free one, None for no gRPC.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = 8001

    def resolved(self) -> Address:
        """Return the address with ports that are free now.

        Raises:
            InputError: a port is taken, or the address is none.
        """
        grpc_port = None if self.grpc_port is None else _free_port(self.host, self.grpc_port)
        return Address(self.host, _free_port(self.host, self.port), grpc_port)


class Sources:
    """The bundles on disk: those that were named, and those in watched folders.

    Args:
        named: name to folder.
        watched: folders of bundles.
        every: seconds between two looks.
    """

    def __init__(self, named: Mapping[str, Path], watched: Sequence[Path] = (), every: float = 2.0) -> None:
        self._named, self._watched, self.every = dict(named), tuple(watched), every
        self._left_out: set[Path] = set()

    def find(self) -> dict[str, Served]:
        """Return what lies there now, by name.

        Raises:
            InputError: two bundles have one name, or a named one has a name that no URL can carry.
            OSError: a watched folder cannot be read.
        """
        names = Models(ModelOptions())
        for name, folder in self._named.items():
            names.add(name, folder)
        for folder in self._watched:
            for path in find_bundles(folder):
                self._add(names, path)
        found = {model.name: (model.folder.resolve(), version_name(model.folder)) for model in names.all()}
        return {name: Served(path=str(path), version=version) for name, (path, version) in found.items() if version}

    def _add(self, names: Models, path: Path) -> None:
        try:
            names.add(path.name, path)
        except InputError as error:
            if path not in self._left_out:
                _log.error("bundle left out", extra={"folder": str(path), "reason": str(error)})
                self._left_out.add(path)


def serve_on_ray(settings: Callable[[Mapping[str, Served]], Settings], sources: Sources, scale: Scale,
                 address: Address) -> None:  # fmt: skip
    """Serve until a signal ends it.

    Args:
        settings: makes the settings of a set of bundles.
        sources: of the bundles.
        scale: how many replicas.
        address: where the proxies listen.

    Raises:
        InputError: an address is taken, or a bundle that was there at the start was refused.
        DeviceError: Ray cannot be started, or is lost.
    """
    address = address.resolved()
    host = _Host(settings, scale, address)
    try:
        host.start()
        host.follow(sources)
    except (ray.exceptions.RayError, ConnectionError, TimeoutError) as error:
        raise DeviceError(f"Ray failed: {first_line(error)}; `ray status` shows the cluster") from None
    finally:
        host.close()


class _Look(NamedTuple):
    """What lies there: bundles by name, and what their folders look like."""

    bundles: Mapping[str, Served]
    files: Mapping[str, Fingerprint]


class _Host:
    """Ray Serve's application, and what it serves now."""

    def __init__(self, settings: Callable[[Mapping[str, Served]], Settings], scale: Scale, address: Address) -> None:
        self._settings, self._scale, self._address = settings, scale, address
        self._stop, self._stopped_at = threading.Event(), -math.inf
        self._own = self._joined = False
        self._serving: Mapping[str, Served] = {}
        self._refused: _Look | None = None
        self._settled = True

    def start(self) -> None:
        """Start Ray, or join it, and its proxies."""
        address, scale = self._address, self._scale
        if not os.environ.get("RAY_ADDRESS") and address.host in _LOCAL:
            package = __name__.rpartition(".")[0]
            os.environ[LOOPBACK] = "[::1]" if address.host == "::1" else "127.0.0.1"
            os.environ[CALLBACK] = f"{package}.loopback.keep_proxy"
        self._own = join_or_start(cpus=((scale.most or scale.replicas) + 1) * scale.cpus, adopt=True)
        self._joined = True
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._handle_signals()
        timeout = self._settings({"any": Served(path="")}).timeout
        http, grpc = proxy_options(address.host, address.port, address.grpc_port, timeout)
        serve.start(proxy_location="HeadOnly" if self._own else "EveryNode", http_options=http,
                    grpc_options=grpc or None)  # fmt: skip
        shown = f"[{address.host}]" if ":" in address.host else address.host
        addresses = {"http": f"http://{shown}:{address.port}"}
        if address.grpc_port is not None:
            addresses["grpc"] = f"{shown}:{address.grpc_port}"
        _log.info("listening", extra=addresses)

    def follow(self, sources: Sources) -> None:
        """Serve what lies there, and what takes its place, until a signal comes."""
        before = None
        while not self._stop.is_set():
            now = self._looked(sources)
            if now is not None and now.bundles and now == before and self._is_news(now):  # at two looks: one that is
                self._deploy(now)  # replaced by renames is gone for a moment, one that is copied is not whole
            before = now or before
            self._require_alive()
            self._stop.wait(sources.every if self._serving else min(sources.every, _LOOK_SECONDS))

    def close(self) -> None:
        """Let the replicas finish what is under way, and end what was started here."""
        if not self._joined:
            return
        drain = self._settings({"any": Served(path="")}).drain

        def end() -> None:
            serve.delete(APPLICATION)

        if leave(own=self._own, first=end, seconds=drain + _END_SECONDS):
            _log.info("stopped")
            return
        _log.warning("stopped at once: Ray did not end by itself")
        sys.stderr.flush()
        os._exit(_STOPPED)

    def _looked(self, sources: Sources) -> _Look | None:
        """Return what lies there; None if a watched folder cannot be read for a moment, which takes no model away."""
        try:
            found = sources.find()
        except OSError as error:
            _log.error("cannot watch", extra={"reason": printable(error)})
            return None
        return _Look(found, {name: fingerprint_of(Path(served.path)) for name, served in found.items()})

    def _is_news(self, look: _Look) -> bool:
        """Return whether Ray is to deploy these bundles."""
        return look != self._refused and (look.bundles != self._serving or not self._settled)

    def _deploy(self, look: _Look) -> None:
        """Let new replicas take the place of the old ones; where they fail, go on with the old ones."""
        start, before, found = time.monotonic(), self._serving, look.bundles
        reason = self._run(found)
        if self._stop.is_set():
            return
        extra = {name: served.version for name, served in found.items()}
        if not reason:
            self._serving, self._refused, self._settled = found, None, True
            _log.info("replicas ready", extra={"versions": extra, "seconds": round(time.monotonic() - start, 3)})
            return
        if not before:
            raise InputError(reason)
        self._refused, self._settled = look, False
        _log.error("bundles refused", extra={"versions": extra, "reason": reason})
        if all(version_name(Path(served.path)) == served.version for served in before.values()):
            self._settled = not self._run(before)

    def _run(self, found: Mapping[str, Served]) -> str:
        """Deploy, and wait until every replica is new. Return why that failed, or nothing."""
        settings = self._settings(found)
        bound = deployment(settings).options(**self._scale.options).bind(settings.model_dump(mode="json"))
        target = serve.RunTarget(bound, APPLICATION, route_prefix="/")
        serve.run_many([target], wait_for_applications_running=False)
        while not self._stop.wait(_LOOK_SECONDS):
            application = serve.status().applications[APPLICATION]
            if application.status in {"DEPLOY_FAILED", "UNHEALTHY"}:
                return _reason(application)
            if application.status == "RUNNING":
                return ""
        return "stopped"

    def _require_alive(self) -> None:
        """Raise unless Ray runs."""
        if self._own and not is_alive() and not self._stop.is_set():
            raise DeviceError("Ray's processes on this machine have ended")

    def _handle_signals(self) -> None:
        """Let the first signal drain, and the second end the process. Ray has set handlers of its own."""

        def stop(number: int, _frame: Any) -> None:
            if time.monotonic() - self._stopped_at < _SAME_SECONDS:
                return  # one signal, sent to this process and to its group
            if self._stop.is_set():
                sys.stderr.write("stopped at once\n")
                sys.stderr.flush()
                if self._own:
                    kill_processes()
                os._exit(128 + number)
            self._stopped_at = time.monotonic()
            self._stop.set()
            _log.info("stopping", extra={"signal": signal.Signals(number).name})

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)


def _reason(application: Any) -> str:
    """Return one line: what a replica said, or what Ray says."""
    said = "\n".join([application.message, *(one.message for one in application.deployments.values())])
    found = _REFUSED.findall(said)
    lines = [line for line in said.splitlines() if line.strip()]
    return printable(found[-1] if found else (lines[-1] if lines else "Ray gave no reason"), 500)


def _free_port(host: str, port: int) -> int:
    """Return a port that can be listened on now."""
    with naming_address(host, port), bound_socket(host, port) as tried:
        return int(tried.getsockname()[1])
