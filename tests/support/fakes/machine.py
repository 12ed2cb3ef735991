"""A machine with a simulated GPU: its modules take the place of the real ones, and a bundle has engines for it."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from repmlp_deploy.bundle import ArtifactEntry, Bundle
from repmlp_deploy.runtime.runner import EngineSettings, RunnerOptions
from repmlp_deploy.runtime.tensorrt import log as tensorrt_log
from repmlp_deploy.runtime.tensorrt.engine import FLAVOURS
from repmlp_deploy.runtime.tensorrt.runner import TensorRTRunner
from support.fakes.cuda_runtime import make_runtime
from support.fakes.gpu import Gpu
from support.fakes.pycuda_driver import make_driver
from support.fakes.tensorrt import Plan, make_tensorrt

FORMATS = ("trt", "trt-rtx")
MEMORIES = ("cuda-python", "pycuda")
VERSIONS = {"trt": "10.13.2.6", "trt-rtx": "1.7.1.116"}
CAPABILITIES = {"trt": ["8.6"], "trt-rtx": None}
BACK_ENDS = ("repmlp_deploy.runtime.tensorrt.cuda_python_memory", "repmlp_deploy.runtime.tensorrt.pycuda_memory")


def with_engines(bundle: Bundle, out: Path, **details: Any) -> Bundle:
    """The bundle with two engines, both the one that was really built; `details` change what the manifest says."""
    built = bundle.artifact("trt-rtx")
    contents = {entry.path: bundle.read(entry) for entry in bundle.files()}
    artifacts = dict(bundle.manifest.artifacts)
    for name in FORMATS:
        contents[f"model.{name}.engine"] = bundle.read(built)
        own = {"path": f"model.{name}.engine", "flavour": name, "version": VERSIONS[name]}
        own["compute_capabilities"] = CAPABILITIES[name]
        artifacts[name] = ArtifactEntry.model_validate(built.model_dump() | own | details)
    return Bundle(bundle.manifest.model_copy(update={"artifacts": artifacts}), contents=contents).save(out)


@dataclass
class Machine:
    """The GPU, and the modules on it.

    Attributes:
        bundle: with an engine of either flavour.
        format: the flavour.
        memory: the back end.
        gpu: the device.
        versions: of the installed packages.
    """

    bundle: Bundle
    format: str = "trt"
    memory: str = "cuda-python"
    gpu: Gpu = field(default_factory=Gpu)
    versions: dict[str, str] = field(default_factory=lambda: dict(VERSIONS))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Machine:
        """Put the modules in place."""
        onnx = self.bundle.read(self.bundle.artifact("onnx"))
        monkeypatch.setattr(tensorrt_log, "_loggers", {})  # the real module's logger is not for the stand-in's
        for name in FORMATS:
            entry = self.bundle.artifact(name)
            profiles = tuple(
                {key: tuple(map(tuple, shapes)) for key, shapes in profile.items()}
                for profile in entry.model_extra["profiles"]
            )
            plans = {self.bundle.read(entry): Plan(onnx, profiles)}
            module = make_tensorrt(self.gpu, FLAVOURS[name].module, self.versions[name], plans)
            monkeypatch.setitem(sys.modules, FLAVOURS[name].module, module)
        self._install("cuda", "bindings", "runtime", make_runtime(self.gpu), monkeypatch)
        self._install("pycuda", "driver", None, make_driver(self.gpu), monkeypatch)
        for name in BACK_ENDS:  # imported anew, on the modules above
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
            del sys.modules[name]
        return self

    def open(self, options: RunnerOptions | None = None, **settings: Any) -> TensorRTRunner:
        """A runner, as a service opens it."""
        with self.context():
            engine = EngineSettings(memory=self.memory, **settings)
            options = replace(options or RunnerOptions(), engine=engine)
            return TensorRTRunner(self.bundle, options, artifact_format=self.format)

    @contextmanager
    def context(self) -> Iterator[None]:
        """What a service has current where it opens the runner: for PyCUDA, its context."""
        if self.memory != "pycuda":
            yield
            return
        driver = sys.modules["pycuda.driver"]
        driver.Device(0).make_context()
        try:
            yield
        finally:
            driver.Context.pop()

    def _install(
        self, top: str, middle: str, leaf: str | None, module: types.ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = [top, f"{top}.{middle}"] + ([f"{top}.{middle}.{leaf}"] if leaf else [])
        packages = [types.ModuleType(name) for name in names[:-1]] + [module]
        for name, package in zip(names, packages, strict=True):
            package.__path__ = []
            monkeypatch.setitem(sys.modules, name, package)
        for parent, name, child in zip(packages, names[1:], packages[1:], strict=False):
            setattr(parent, name.rsplit(".", 1)[1], child)
