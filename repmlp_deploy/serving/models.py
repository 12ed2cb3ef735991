"""The models of a server, by name."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from repmlp_deploy.errors import InputError
from repmlp_deploy.serving.metrics import Metrics, ModelMetrics
from repmlp_deploy.serving.protocol import UnknownModel
from repmlp_deploy.serving.served_model import ModelOptions, ServedModel
from repmlp_deploy.text import printable

__all__ = ["IMAGE_SUFFIX", "Models"]

IMAGE_SUFFIX = "-image"
"""What the name of the model that takes images ends in."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Models:
    """Models by name. Several threads may add, remove and look up.

    Args:
        options: of every model.
    """

    def __init__(self, options: ModelOptions) -> None:
        self.options, self.metrics = options, Metrics()
        self.stopping = False
        self._told: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._models: Mapping[str, ServedModel] = MappingProxyType({})

    def add(self, name: str, folder: Path) -> ServedModel:
        """Add a model; it answers only after its `load`.

        Raises:
            InputError: the name is taken, or is none that a URL can carry.
        """
        if not _NAME.fullmatch(name):
            raise InputError(f"model name {printable(name, 140)!r}: expected letters, digits, '.', '_' and '-'")
        if name.endswith(IMAGE_SUFFIX):
            raise InputError(f"model name {name!r} ends in {IMAGE_SUFFIX}, which stands for images; name it otherwise")
        with self._lock:
            if name in self._models:
                said = f"{self._models[name].folder} and {folder}: give one of them another name, as NAME=PATH"
                raise InputError(f"two bundles are named {name}: {said}")
            model = ServedModel(name, folder, self.options, ModelMetrics(self.metrics, name), self._changed)
            self._models = MappingProxyType({**self._models, name: model})
        return model

    def remove(self, name: str) -> None:
        """Forget a model, after it has answered what it had begun."""
        with self._lock:
            gone = self._models[name]
            self._models = MappingProxyType({n: model for n, model in self._models.items() if n != name})
        gone.unload("its bundle is gone")
        gone.metrics.forget()

    def when_changed(self, told: Callable[[], None]) -> None:
        """Have `told` called whenever a model's state or version changed, from any thread."""
        self._told = told

    def _changed(self) -> None:
        self._told()

    def all(self) -> list[ServedModel]:
        """Return the models in the order in which they were added."""
        return list(self._models.values())

    def find(self, name: str) -> tuple[ServedModel, bool]:
        """Return the model behind a name, and whether the name asks for images.

        Raises:
            UnknownModel: there is none.
        """
        models = self._models
        if name in models:
            return models[name], False
        base = name.removesuffix(IMAGE_SUFFIX)
        if base != name and base in models:
            return models[base], True
        raise UnknownModel(f"no model is named {printable(name, 140)!r}; served are {', '.join(models) or 'none'}")

    @property
    def ready(self) -> bool:
        """Whether every model answers but those that were unloaded, there is one, and the server is not stopping."""
        models = [model for model in self.all() if not model.unloaded]
        return not self.stopping and bool(models) and all(model.ready for model in models)

    def health(self) -> dict[str, Any]:
        """Return the readiness and, for every model that is not as it should be, the reason."""
        reasons = {m.name: m.reason for m in self.all() if not m.ready}
        refused = {m.name: m.refused for m in self.all() if m.ready and m.refused}
        said: dict[str, Any] = {"ready": self.ready}
        if self.stopping:
            said["reason"] = "the server stops"
        if reasons:
            said["models"] = reasons
        if refused:
            said["refused"] = refused
        return said

    def close(self) -> None:
        """Answer what was queued, and give back memory."""
        for model in self.all():
            model.unload("the server stops")
