"""The server's bundles on disk: which names they have, and what changes there.

A watched folder holds bundles as its subfolders; each is served under its folder's name. A bundle that appears is
loaded, one that is replaced is checked and swapped in, one that is gone is removed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from repmlp_deploy.bundle.manifest import MANIFEST
from repmlp_deploy.errors import InputError
from repmlp_deploy.serving.models import Models
from repmlp_deploy.serving.protocol import BadRequest, Forbidden, NotReady, UnknownModel
from repmlp_deploy.serving.served_model import Fingerprint, ServedModel
from repmlp_deploy.text import printable

__all__ = ["Library", "check_parameters", "find_bundles", "require_control"]

_log = logging.getLogger("repmlp.serve")


class Library:
    """Loads and unloads the models of a server.

    Args:
        models: that answer.
        watched: folders of bundles.
        every: seconds between two looks at them.
    """

    def __init__(self, models: Models, watched: Sequence[Path] = (), every: float = 2.0) -> None:
        self._models, self._watched, self._every = models, tuple(watched), every
        self._seen: dict[str, Fingerprint] = {}  # when a bundle was last loaded
        self._before: dict[str, Fingerprint] = {}  # at the last look
        self._found: dict[str, Path] = {}  # of the watched folders
        self._left_out: set[Path] = set()
        self._missing: set[str] = set()
        self._stop = threading.Event()
        self._looking = threading.Lock()
        self._asked = ThreadPoolExecutor(1, "asked")  # loads wait here, and not in the threads that decode requests
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Load every model, then look for changes; in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="library", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more; wait for a load that is under way."""
        self._stop.set()
        self._asked.shutdown(cancel_futures=True)
        if self._thread is not None:
            self._thread.join()

    def look(self) -> None:
        """Look once: load what is new or was replaced, remove what is gone."""
        with self._looking:
            self._discover()
            for model in self._models.all():
                fingerprint = model.fingerprint()
                if self._stop.is_set() or model.unloaded:
                    continue
                if self._is_news(model, fingerprint):
                    self._seen[model.name] = fingerprint  # before: what was refused is tried again if it changes
                    model.load()
                self._before[model.name] = fingerprint

    def load(self, name: str) -> str:
        """Load a model, or the present content of its folder. Return why it was refused, or nothing.

        Raises:
            UnknownModel: no bundle has this name.
        """
        with self._looking:
            self._discover()
            model = self._model(name)
            self._seen[name] = model.fingerprint()
            return "" if model.load() else model.refused

    def unload(self, name: str) -> None:
        """Unload a model until it is asked for again.

        Raises:
            UnknownModel: no bundle has this name.
        """
        with self._looking:
            self._model(name).unload()

    def begin_load(self, name: str) -> Future[None]:
        """Begin `load` in a thread, after what was asked for before; the future raises BadRequest if it was refused."""
        return self._asked.submit(self._load_or_raise, name)

    def begin_unload(self, name: str) -> Future[None]:
        """Begin `unload` in a thread, after what was asked for before."""
        return self._asked.submit(self.unload, name)

    def _load_or_raise(self, name: str) -> None:
        reason = self.load(name)
        if reason:
            raise BadRequest(f"{name} was not loaded: {reason}")

    def index(self) -> list[dict[str, Any]]:
        """Return the protocol's index: name, version, state and reason of every model."""
        return [_entry(model) for model in self._models.all()]

    def _is_news(self, model: ServedModel, now: Fingerprint) -> bool:
        """Return whether to load a bundle: it is new, or it was refused, has changed since, and is copied no more."""
        seen = self._seen.get(model.name)
        if seen is None or now.manifest != seen.manifest:
            return bool(now.manifest) or model.name not in self._found
        return bool(model.refused) and now != seen and now == self._before.get(model.name)

    def _model(self, name: str) -> ServedModel:
        model, images = self._models.find(name)
        if images:
            raise UnknownModel(f"{printable(name, 140)!r} is served with {model.name}: load or unload that")
        return model

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.look()
            except Exception:  # noqa: BLE001 - the next look may succeed
                _log.exception("the look at the bundles failed")
            self._stop.wait(self._every)
            if not self._watched:
                return

    def _discover(self) -> None:
        """Add the bundles that appeared in watched folders, and remove those that are gone."""
        found: list[Path] = []
        for folder in self._watched:
            try:
                bundles = find_bundles(folder)
            except OSError as error:
                _log.error("cannot watch", extra={"folder": str(folder), "reason": printable(error)})
                return  # a folder that cannot be read for a moment takes no model away
            found += bundles
        present = {path.name: path for path in found if path == self._found.get(path.name)}  # they serve on
        for path in found:
            if path != present.setdefault(path.name, path):
                self._leave_out(path, f"{present[path.name]} has the same name: rename one of them")
        gone, self._missing = self._missing, {name for name, path in self._found.items() if present.get(name) != path}
        for name in gone & self._missing:  # at two looks: one that is replaced by renames is gone for a moment
            self._missing.discard(name)
            self._models.remove(name)
            del self._found[name]
            self._seen.pop(name, None)
            self._before.pop(name, None)
        for name in [name for name in present if name not in self._found]:
            try:
                self._models.add(name, present[name])
            except InputError as error:
                self._leave_out(present[name], str(error))
                continue
            self._found[name] = present[name]

    def _leave_out(self, path: Path, reason: str) -> None:
        """Say once why a bundle is not served."""
        if path not in self._left_out:
            _log.error("bundle left out", extra={"folder": str(path), "reason": reason})
            self._left_out.add(path)


def require_control(*, allowed: bool) -> None:
    """Raise Forbidden unless clients may load and unload models."""
    if not allowed:
        raise Forbidden("this server loads and unloads nothing on request; start it with --control")


def check_parameters(names: Iterable[str]) -> None:
    """Raise BadRequest if a request to load or unload has a parameter that is not offered.

    Args:
        names: of its parameters. `unload_dependents` changes nothing, as no model depends on another.
    """
    unknown = sorted(set(names) - {"unload_dependents"})
    if unknown:
        raise BadRequest(f"parameters {printable(', '.join(unknown), 100)} are not offered")


def find_bundles(folder: Path) -> list[Path]:
    """Return the bundles in a folder, sorted; hidden ones, and what this process may not look into, are left out.

    Raises:
        OSError: the folder, or what is in it, cannot be read.
    """
    found = []
    for path in sorted(folder.iterdir()):
        with suppress(PermissionError):  # a folder of root's, such as lost+found on a volume
            if path.name[0] != "." and (path / MANIFEST).is_file():
                found.append(path)
    return found


def _entry(model: ServedModel) -> dict[str, Any]:
    states = {"ready": "READY", "loading": "LOADING", "unavailable": "UNAVAILABLE", "unloaded": "UNAVAILABLE"}
    entry = {"name": model.name, "state": states[model.state]}
    try:
        entry["version"] = model.version().name
    except NotReady:
        entry["version"] = ""
    reason = model.reason or (f"a new bundle was refused: {model.refused}" if model.refused else "")
    return entry | ({"reason": reason} if reason else {})
